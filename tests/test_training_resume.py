"""What a resumed run may change, and that it then ends where it would have ended."""

import shutil
from pathlib import Path

import pytest
import torch
import trainer_helpers as helpers
from trainer_helpers import pairs  # noqa: F401  a fixture

import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
import training
from training.folders import data_fingerprint

QUIET = ["--viz_freq", 1000, "--validation_steps", 1000, "--validation_num_images", 2]
SMALL = [*QUIET, "--device", "cpu", "--resolution", 24, "--dtype", "float64"]
OF_TWO = [*SMALL, "--train_batch_size", 2]
TRANSLATOR = ["--disc_width", 8, "--lambda_gan", 1, "--train", "lora"]
TRAINERS = {
    train_pix2pix_turbo: [*OF_TWO, *TRANSLATOR],
    train_cyclegan_turbo: [*OF_TWO, "--lambda_gan", 0, "--train", "lora"],
    train_yoso: [*OF_TWO, "--prior_pictures", 3],
}
NAMES = [trainer.__name__ for trainer in TRAINERS]


@pytest.fixture
def data(tmp_path, pairs) -> Path:  # noqa: F811
    """A data set that every trainer takes."""
    folder = tmp_path / "data"
    shutil.copytree(pairs, folder)
    for side in "ab":
        (folder / f"fixed_prompt_{side}.txt").write_text(f"a picture of {side}")
    return folder


CHANGES = dict(
    max_train_steps=2,
    max_train_epochs=50,
    gradient_checkpointing="on",
    dataloader_num_workers=1,
    device="auto",
    viz_freq=500,
    validation_steps=600,
    validation_num_images=1,
    checkpointing_steps=700,
    tracker_project_name="another",
)


def as_flags(settings: dict) -> list:
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("trainer", TRAINERS, ids=NAMES)
def test_a_run_ends_in_the_same_bits_with_all_that_changes_no_mathematics_changed(
    monkeypatch, tmp_path, data, trainer, capsys
):
    whole, cut, split = tmp_path / "whole", tmp_path / "cut", tmp_path / "split"
    flags = [*TRAINERS[trainer], "--dataset_folder", data, "--lr_scheduler", "constant"]
    helpers.train(monkeypatch, trainer, *flags, "--max_train_steps", 2, "--output_dir", whole)
    helpers.train(monkeypatch, trainer, *flags, "--max_train_steps", 1, "--output_dir", cut)
    shutil.copytree(cut, split)
    before = helpers.read_settings(cut)

    changes = CHANGES | {"dataset_folder": str(data.rename(tmp_path / "elsewhere"))}
    if trainer is train_yoso:
        changes["validation_prompts"] = "fog|rain"
    capsys.readouterr()
    helpers.train(monkeypatch, trainer, "--resume", cut, *as_flags(changes))
    helpers.assert_same_bits(whole, cut)
    err = capsys.readouterr().err
    assert "resuming with" in err and "--viz_freq 500 (was 1000)" in err
    changes |= {"gradient_checkpointing": True, "resume": str(cut)}
    assert helpers.read_settings(cut) == before | changes

    # Another split of the global batch sums in another order.
    changes = dict(train_batch_size=1, gradient_accumulation_steps=2, max_train_steps=2)
    changes["dataset_folder"] = tmp_path / "elsewhere"
    helpers.train(monkeypatch, trainer, "--resume", split, *as_flags(changes))
    assert helpers.largest_difference(whole, split) < 1e-10


def test_a_relative_data_path_holds_from_another_working_folder(monkeypatch, tmp_path, data):
    run = tmp_path / "run"
    flags = [*TRAINERS[train_pix2pix_turbo], "--lambda_gan", 0, "--output_dir", run]
    monkeypatch.chdir(tmp_path)
    helpers.train(
        monkeypatch,
        train_pix2pix_turbo,
        *flags,
        "--dataset_folder",
        "data",
        "--max_train_steps",
        1,
    )
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    helpers.train(monkeypatch, train_pix2pix_turbo, "--resume", run, "--max_train_steps", 2)
    assert helpers.read_settings(run)["dataset_folder"] == str(data)
    assert helpers.read_state(run)["step"] == 2


def add_a_picture(data: Path) -> None:
    for side in "AB":
        shutil.copy(data / f"train_{side}" / "0.png", data / f"train_{side}" / "9.png")
    path = data / "train_prompts.json"
    path.write_text(path.read_text().replace('"0.png"', '"9.png": "noise", "0.png"'))


def rename_a_picture(data: Path) -> None:
    for side in "AB":
        (data / f"train_{side}" / "0.png").rename(data / f"train_{side}" / "9.png")
    path = data / "train_prompts.json"
    path.write_text(path.read_text().replace('"0.png"', '"9.png"'))


def lengthen_a_caption(data: Path) -> None:
    path = data / "train_prompts.json"
    path.write_text(path.read_text().replace('"noise"', '"much noise"', 1))


def leave_as_it_is(data: Path) -> None:
    pass


def test_a_run_goes_on_after_a_broken_picture_was_replaced(monkeypatch, tmp_path, data, capsys):
    run = tmp_path / "run"
    broken = sorted((data / "train_A").iterdir())[5]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-40])
    flags = [*TRAINERS[train_pix2pix_turbo], "--lambda_gan", 0, "--dataset_folder", data]
    flags += ["--train_batch_size", 1, "--max_train_steps", 6, "--output_dir", run]
    with pytest.raises(SystemExit):
        helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    error = capsys.readouterr().err
    assert f"{broken} is not a readable picture" in error
    steps = helpers.read_state(run)["step"]
    assert 0 < steps < 6 and f"saved the {steps} steps before that; --resume {run}" in error

    broken.write_bytes(whole)
    helpers.train(monkeypatch, train_pix2pix_turbo, "--resume", run)
    assert "the files of some pictures have changed" in capsys.readouterr().err
    assert helpers.read_state(run)["step"] == 6


def test_models_may_lie_elsewhere_when_a_run_goes_on(monkeypatch, tmp_path, data):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree("tiny/tiny-turbo", first / "mine")
    second.mkdir()
    run = tmp_path / "run"
    flags = [*TRAINERS[train_pix2pix_turbo], "--base", "mine", "--train", "lora"]
    flags += ["--lambda_gan", 0, "--lambda_lpips", 0, "--lambda_clipsim", 0]
    flags += ["--dataset_folder", data, "--output_dir", run]
    monkeypatch.chdir(first)
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags, "--max_train_steps", 1)
    assert helpers.read_settings(run)["base"] == str(first / "mine")
    monkeypatch.chdir(second)
    helpers.train(monkeypatch, train_pix2pix_turbo, "--resume", run, "--max_train_steps", 2)
    shutil.move(first / "mine", second / "mine")
    flags = ["--resume", run, "--base", "mine", "--max_train_steps", 3]
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    assert helpers.read_state(run)["step"] == 3


OTHER_FILES = ["the data set is not the one"]
REFUSED = {
    "another picture": (add_a_picture, [], OTHER_FILES),
    "another name": (rename_a_picture, [], OTHER_FILES),
    "another caption": (lengthen_a_caption, [], OTHER_FILES),
    "built-in data": (leave_as_it_is, ["--dataset_folder", "drawn:scenes"], OTHER_FILES),
    "another batch": (leave_as_it_is, ["--train_batch_size", 3], ["steps of 2", "would be of 3"]),
    "another rate": (leave_as_it_is, ["--learning_rate", 1], ["--learning_rate", "differs"]),
    "another precision": (leave_as_it_is, ["--mixed_precision", "bf16"], ["--mixed_precision"]),
    "no epochs": (leave_as_it_is, ["--max_train_epochs", 0], ["expected 1 or more"]),
    "no such data": (leave_as_it_is, ["--dataset_folder", "/nowhere"], ["/nowhere"]),
}


def test_what_changes_the_mathematics_is_refused_in_one_line_and_nothing_is_written(
    monkeypatch, tmp_path, data, capsys
):
    run = tmp_path / "run"
    flags = [*TRAINERS[train_pix2pix_turbo], "--lambda_gan", 0, "--dataset_folder", data]
    more = ["--max_train_steps", 1, "--output_dir", run]
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags, *more)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for name, (change, flags, words) in REFUSED.items():
        folder = tmp_path / name
        shutil.copytree(data, folder)
        change(folder)
        if "--dataset_folder" not in flags:
            flags = ["--dataset_folder", folder, *flags]
        flags = ["--max_train_steps", 2, *flags]
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            helpers.train(monkeypatch, train_pix2pix_turbo, "--resume", run, *flags)
        lines = helpers.error_lines(capsys.readouterr().err)
        assert caught.value.code == 2 and len(lines) == 1, (name, lines)
        assert all(word in lines[0] for word in words), (name, lines)
        after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        assert after == before, name


def test_it_is_said_which_limit_ends_a_resumed_run(monkeypatch, tmp_path, data, capsys):
    run = tmp_path / "run"
    flags = [*TRAINERS[train_pix2pix_turbo], "--lambda_gan", 0, "--dataset_folder", data]
    flags += ["--max_train_epochs", 1, "--output_dir", run]
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    assert helpers.read_state(run)["step"] == 3  # six pairs in batches of two
    cases = {
        "--max_train_epochs 1 ends the run at step 3, before": ["--max_train_steps", 50],
        "at step 3 already and ends at step 1: nothing is left": ["--max_train_steps", 1],
        "ends the run, and --max_train_epochs 9": ["--max_train_steps", 3, "--max_train_epochs", 9],
    }
    for said, flags in cases.items():
        capsys.readouterr()
        helpers.train(monkeypatch, train_pix2pix_turbo, "--resume", run, *flags)
        assert said in capsys.readouterr().err and helpers.read_state(run)["step"] == 3


def test_a_data_sets_fingerprint_is_of_names_and_sizes_below_its_folder(tmp_path):
    folder = tmp_path / "one"
    (folder / "train_A").mkdir(parents=True)
    (folder / "a.txt").write_text("abc")
    (folder / "train_A" / "a.png").write_text("12345")
    found = data_fingerprint(str(folder))
    for clutter in (".DS_Store", "Thumbs.db"):
        (folder / clutter).write_text("x")
    (folder / "notes").mkdir()
    (folder / "notes" / "b.txt").write_text("trainers do not look here")
    moved = folder.rename(tmp_path / "other")
    assert data_fingerprint(str(moved)) == found
    (moved / "a.txt").write_text("xyz")
    assert data_fingerprint(str(moved)) == found
    without_pictures = data_fingerprint(str(moved), with_pictures=False)
    (moved / "train_A" / "a.png").write_text("123456")
    assert data_fingerprint(str(moved)) != found
    assert data_fingerprint(str(moved), with_pictures=False) == without_pictures
    (moved / "train_A" / "a.png").write_text("12345")
    (moved / "a.txt").write_text("abcd")
    assert data_fingerprint(str(moved)) != found
    assert data_fingerprint(str(moved), with_pictures=False) != without_pictures


def test_a_single_file_counts_by_its_size_and_a_name_for_itself(tmp_path):
    one, other = tmp_path / "one.zip", tmp_path / "other.zip"
    one.write_bytes(b"12")
    other.write_bytes(b"34")
    assert data_fingerprint(str(one)) == data_fingerprint(str(other))
    other.write_bytes(b"345")
    assert data_fingerprint(str(one)) != data_fingerprint(str(other))
    assert data_fingerprint("drawn:scenes") != data_fingerprint("drawn:day2night")


def test_an_optimizers_state_of_another_device_is_stepped_as_this_device_does(tmp_path):
    def network_and_optimizer(fused: bool):
        network = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(network.parameters(), fused=fused)
        network(torch.ones(2)).sum().backward()
        optimizer.step()
        return network, optimizer

    _, optimizer = network_and_optimizer(fused=True)
    training.save_state(tmp_path / "state.pt", dict(step=1, base="", optimizer=optimizer))
    network, other = network_and_optimizer(fused=False)
    training.restore(tmp_path, "", dict(optimizer=other), "step")
    assert other.param_groups[0]["fused"] is False
    network(torch.ones(2)).sum().backward()
    other.step()


def test_a_state_without_a_record_of_its_data_is_accepted(tmp_path):
    """Runs of earlier versions have none."""
    training.save_state(tmp_path / "state.pt", dict(step=1, base="abc"))
    assert training.restore(tmp_path, "abc", {}, "step", data="123") == [1]
