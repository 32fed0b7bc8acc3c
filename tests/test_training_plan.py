"""--plan: what is measured, what is printed, and that an end without memory is a row."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import trainer_helpers as helpers
from safetensors.torch import load_file
from trainer_helpers import pairs  # noqa: F401  a fixture

import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
from training import meter, plan

SMALL = ["--device", "cpu", "--resolution", 24, "--train_batch_size", 2]
SMALL += ["--validation_num_images", 1, "--lr_scheduler", "constant"]
TRAINERS = {
    train_pix2pix_turbo: [*SMALL, "--disc_width", 8, "--lambda_gan", 1, "--train", "lora"],
    train_cyclegan_turbo: [*SMALL, "--disc_width", 8, "--lambda_gan", 1, "--train", "lora"],
    train_yoso: [*SMALL, "--prior_pictures", 3],
}
NAMES = [trainer.__name__ for trainer in TRAINERS]


# ------------------------------------------------------------------- what a process measures

@pytest.mark.parametrize("trainer", TRAINERS, ids=NAMES)
def test_a_measured_trainer_prints_json_and_writes_nothing(monkeypatch, tmp_path, capsys, trainer):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        helpers.train(monkeypatch, trainer, *TRAINERS[trainer], "--plan_steps", 2)
    assert caught.value.code == 0 and not list(tmp_path.iterdir())
    begin, end = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert begin.items() <= end.items() and end["resident"] < end["total"]
    assert min(begin[name] for name in ("trained", "discriminator", "frozen", "loading")) > 0
    assert (end["global_batch"], end["last_step"]) == (2, trainer.TINY["max_train_steps"])
    assert end["step"] > 0 and end["validation"] > 0 and end["seconds"] > end["first_step"]
    assert end["state_bytes"] > end["weights_bytes"] == 4 * end["trained"]


@pytest.mark.gpu
def test_on_a_gpu_its_memory_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*TRAINERS[train_pix2pix_turbo], "--device", "cuda", "--plan_steps", 2]
    with pytest.raises(SystemExit):
        helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < facts["allocated"] <= facts["reserved"] < facts["total"]
    assert "resident" not in facts


def test_the_sizes_of_a_checkpoint_are_those_of_its_files(
    monkeypatch, tmp_path, pairs, capsys  # noqa: F811
):
    flags = [*TRAINERS[train_pix2pix_turbo], "--dataset_folder", pairs, "--viz_freq", 100]
    with pytest.raises(SystemExit):
        helpers.train(monkeypatch, train_pix2pix_turbo, *flags, "--plan_steps", 1)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    flags += ["--max_train_steps", 1, "--output_dir", tmp_path]
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    saved = load_file(tmp_path / "model.safetensors").values()
    assert facts["weights_bytes"] == sum(p.numel() * p.element_size() for p in saved)
    # A state file has a header and padding for each of its tensors.
    size = (tmp_path / "state.pt").stat().st_size
    assert facts["state_bytes"] < size < 1.2 * facts["state_bytes"] + 200_000


@dataclass
class Inner:
    network: torch.nn.Module
    name: str = "x"


@dataclass
class Networks:
    inner: Inner
    again: torch.nn.Module
    D: torch.nn.Module | None
    trained: dict


def test_weights_are_counted_once_as_trained_the_discriminators_or_frozen():
    shared = torch.nn.Linear(3, 2)  # 6 + 2
    D = torch.nn.Linear(4, 1)  # 4 + 1, the bias frozen
    D.bias.requires_grad_(False)
    nets = Networks(Inner(shared), shared, D, trained={"weight": shared.weight})
    assert meter.count_weights(nets) == dict(trained=6, discriminator=4, frozen=3)
    nets.D = None
    assert meter.count_weights(nets) == dict(trained=6, discriminator=0, frozen=2)


def test_the_bytes_of_a_state_are_those_of_all_its_tensors():
    network = torch.nn.Linear(3, 2).double()
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(3).double()).sum().backward()
    optimizer.step()
    state = dict(trained={"w": torch.zeros(5)}, network=network, step=3, none=None)
    assert meter.count_bytes(state) == 20 + 64
    # Two moments, and a step for each parameter.
    assert meter.count_bytes(dict(optimizer=optimizer)) == 2 * 64 + 2 * 4


def test_a_meter_times_steps_and_the_last_validation_and_counts_no_first_step(
    monkeypatch, capsys
):
    """A step is over when the loop asks for the validation."""
    times = iter([100.0, 107.0, 107.0, 109.0, 109.0, 111.0, 117.0, 118.0])
    monkeypatch.setattr(meter.Meter, "now", lambda self: next(times))
    p = torch.nn.Parameter(torch.zeros(3))
    one = meter.Meter(torch.device("cpu"), steps=3)
    one.start(Networks(Inner(torch.nn.Identity()), None, None, {"p": p}), {}, loading=5.0)
    due = []
    for step in range(3):
        due.append((one.due("validation", step), one.due("preview", step)))
    one.finish(validated=2)
    assert due == [(False, False), (False, False), (True, False)]
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["first_step"], facts["step"], facts["validation"]) == (7, 2, 3)
    assert (facts["seconds"], facts["loading"], facts["weights_bytes"]) == (18, 5, 12)


def test_reading_speed_asks_for_items_as_training_does():
    asked = []

    class Items:
        def __len__(self):
            return 3

        def __getitem__(self, item):
            asked.append(item)

    assert meter.reading_speed(Items(), seed=7) > 0
    assert asked[:4] == [(0, (7, 0, 0)), (1, (7, 0, 1)), (2, (7, 0, 2)), (0, (7, 0, 3))]


# ---------------------------------------------------------------------- rows and the summary

@dataclass
class Settings:
    base: str = "tiny"
    dataset_folder: str = "drawn:scenes"
    train_image_prep: str | None = None
    resolution: int = 64
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    dataloader_num_workers: int = 0
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    dtype: str = "float32"
    validation_steps: int = 10
    validation_num_images: int = 50
    viz_freq: int = 20
    prior_pictures: int = 100
    denoising_steps: int = 0
    lambda_mismatch: float = 0.0
    init: str | None = None
    resume: str | None = None
    output_dir: str | None = None
    plan: bool = True
    plan_steps: int | None = None


FACTS = dict(
    trained=2e6,
    discriminator=1e6,
    frozen=3e8,
    loading=80.0,
    last_step=40,
    global_batch=8,
    test_items=20,
    preview_items=16,
    first_step=4.0,
    step=2.0,
    validation=0.5,
    seconds=10.0,
    weights_bytes=8e6,
    state_bytes=2.4e9,
    resident=3e9,
    total=16e9,
)


def test_variants_are_the_flags_that_are_not_set_yet(tmp_path):
    found = plan.variants(Settings())
    assert list(found) == [
        "--gradient_checkpointing on",
        "--mixed_precision bf16",
        "--train_batch_size 1 --gradient_accumulation_steps 8",
        "all of the above",
        "--resolution 32",
    ]
    assert len(found["all of the above"]) == 4
    saving = Settings(gradient_checkpointing=True, mixed_precision="bf16", train_batch_size=1)
    assert list(plan.variants(saving)) == ["--resolution 32"]
    saving.train_image_prep = "resize_64"  # which --resolution does not change
    assert plan.variants(saving) == {}
    saving.train_image_prep = None
    saving.dataset_folder = str(tmp_path)
    assert list(plan.variants(saving)) == ["--resolution 32"]
    (tmp_path / "index.json").touch()  # a cache, whose pictures have their size
    assert plan.variants(saving) == {}
    # With it, the micro-batch is part of the mathematics.
    assert not any("batch" in name for name in plan.variants(Settings(lambda_mismatch=1.0)))


def test_a_measured_process_gets_all_settings_but_where_to_write():
    cfg = Settings(output_dir="runs/x", init="w", prior_pictures=4)
    words = plan.command("train.py", cfg, dict(resolution=32))
    assert words[:2] == [sys.executable, "train.py"]
    given = dict(word.removeprefix("--").split("=") for word in words[2:])
    assert not given.keys() & {"plan", "output_dir", "resume", "train_image_prep"}
    expected = dict(resolution="32", plan_steps="3", gradient_checkpointing="off", init="w")
    expected |= dict(validation_num_images="2", prior_pictures="4")
    assert expected.items() <= given.items()
    assert given["denoising_steps"] == "0"
    cfg.denoising_steps = 600  # which are cheaper than the steps that follow
    assert "--denoising_steps=0" in plan.command("train.py", cfg, {})
    said = plan.summary(cfg, "train.py", plan.Row("as asked", FACTS, seconds=30.0))[-1]
    assert said == "faster than said  the first 600 steps (--denoising_steps)"
    cfg.resume = "runs/x"
    assert not any("--init" in word for word in plan.command("train.py", cfg, {}))


def test_the_summary_adds_up():
    row = plan.Row("as asked", FACTS, seconds=30.0)  # of which 20 before the first step
    assert plan.seconds_to(row, 10) == 20 + 4 + 9 * 2
    assert plan.periodic_seconds(Settings(), row) == (10, 8)  # 20 test items, 16 in a preview
    # 40 steps, four validations, a preview after the first step and two more.
    assert plan.whole_run(Settings(), row) == 20 + 4 + 39 * 2 + 4 * 10 + 3 * 8
    text = "\n".join(plan.summary(Settings(), "a/train_x.py", row))
    for words in [
        "train_x.py: tiny on drawn:scenes, 64 px, 4 x 2 items a step",
        "2 M trained, 1 M of discriminators, 300 M frozen",
        "3 GB resident of 16 GB at the peak",
        "2 s (the first 4 s), after 20 s to start",
        "after 32 s (step 1), 8 s for each",
        "after 52 s (step 10), 10 s for each",
        "2.77 min for 40 steps, 39% of it",
        "model.safetensors 8 MB, state.pt 2.4 GB",
        "80 items/s alone, training takes 4 items/s; it is 5% of a step",
        "the prior of 100 pictures",
    ]:
        assert words in text, words
    assert text.count("\n") <= 10


def test_a_resumed_run_is_planned_from_its_beginning_and_that_is_said():
    row = plan.Row("as asked", FACTS, seconds=30.0)
    for resume in (None, "runs/x"):
        text = "\n".join(plan.summary(Settings(resume=resume), "train.py", row))
        assert ("times are from step 1" in text) == bool(resume)


def test_memory_on_a_gpu_is_allocated_and_reserved():
    facts = FACTS | dict(allocated=5e9, reserved=6e9)
    found = plan.describe_memory(facts)
    assert found == "5 GB allocated, 6 GB reserved of 16 GB at the peak (CUDA)"
    assert plan.Row("", facts).memory == 6e9 and plan.Row("", FACTS).memory == 3e9


@pytest.mark.parametrize(
    "workers, loading, said",
    [
        (0, 40.0, "10% of a step"),
        (0, 10.0, "40% of a step: --dataloader_num_workers 2"),
        (2, 3.0, "does not hold"),
        (1, 4.0, "it holds training up"),
    ],
)
def test_loading_is_compared_with_training(workers, loading, said):
    cfg = Settings(dataloader_num_workers=workers)
    assert said in plan.describe_loading(cfg, FACTS | {"loading": loading})


def test_the_table_has_a_line_for_each_variant_whatever_became_of_it():
    rows = [
        plan.Row("as asked", problem="out of memory"),
        plan.Row("--resolution 32", FACTS, seconds=30.0),
        plan.Row("all of the above", problem="not tried: 10 min are over"),
    ]
    lines = plan.table(Settings(), rows)[2:]
    assert lines[0].startswith("> as asked") and lines[0].endswith("out of memory")
    assert lines[1].split() == "--resolution 32 3 GB 2 2.77 min".split()
    assert lines[2].startswith("  all of the above") and lines[2].endswith("are over")


@pytest.mark.parametrize(
    "seconds, text",
    [(0.123, "0.12 s"), (75, "75 s"), (130, "2.17 min"), (9000, "2.5 h"), (2e5, "2.31 days")],
)
def test_durations_are_read_easily(seconds, text):
    assert plan.duration(seconds) == text


def test_a_plan_counts_no_more_pictures_and_steps_than_there_are():
    row = plan.Row("as asked", FACTS, seconds=30.0)
    assert plan.periodic_seconds(Settings(validation_num_images=5), row) == (2.5, 8)
    # 40 steps, after the last of which a validation is due: 20 + 4 + 39 * 2 + 10 seconds.
    text = "\n".join(plan.summary(Settings(validation_steps=100), "train.py", row))
    assert "first validation  after 112 s (step 40), 10 s for each" in text


# ------------------------------------------------------------------------ how processes end

def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{code}"]


@pytest.mark.parametrize(
    "code, problem, failed",
    [
        ("print('{}')", "", False),
        ("sys.exit('x.py: error: out of memory (CUDA out of memory)')", "out of memory", False),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9 (out of memory?)", False),
        ("sys.exit('bar\\nx.py: error: /x is not there')", "/x is not there", True),
        ("{}['bug']", "KeyError: 'bug'", True),
        ("os._exit(3)", "it ended with status 3", True),
        ("time.sleep(60)", "stopped after 0.2 s", False),
    ],
    ids=["well", "no memory", "killed", "an error", "a bug", "silent", "too long"],
)
def test_how_a_measured_process_ends_is_said_in_words(capfd, code, problem, failed):
    limit = 0.2 if "sleep" in code else None
    done = plan.run(python(code), limit, speak=True)
    assert (done.problem, done.failed) == (problem, failed)
    assert "error: " not in capfd.readouterr().err  # whoever asked says it, once


def fake_processes(monkeypatch, *ends: plan.Done) -> list[list[str]]:
    """Replaces the measured processes by these ends; returns the list of their commands."""
    commands: list[list[str]] = []
    left = iter(ends)

    def run(words, limit, speak):
        commands.append(words)
        return next(left)

    monkeypatch.setattr(plan, "run", run)
    return commands


def test_out_of_memory_is_a_row_of_the_plan_and_not_its_end(monkeypatch, capsys):
    begin = json.dumps({"trained": 2e6, "discriminator": 0, "frozen": 3e8})
    good = plan.Done(f"{begin}\n{json.dumps(FACTS)}\n")
    none = plan.Done(f"{begin}\n", "out of memory")
    small = plan.Done("", "pictures of 32x32 are too small", failed=True)
    commands = fake_processes(monkeypatch, none, good, none, good, good, small)
    plan.print_plan(Settings(), "train.py")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("2 M trained, 0 M of discriminators, 300 M frozen")
    assert lines[2] == "as asked          out of memory"
    assert "> as asked" in lines[5] and "out of memory" in lines[5]
    assert "3 GB" in lines[6] and "out of memory" in lines[7]
    assert "too small" in lines[10] and len(lines) == 11 and len(commands) == 6


def test_variants_are_not_tried_when_the_time_is_over(monkeypatch, capsys):
    monkeypatch.setattr(plan, "PATIENCE", -1.0)
    commands = fake_processes(monkeypatch, plan.Done(json.dumps(FACTS)))
    plan.print_plan(Settings(), "train.py")
    assert capsys.readouterr().out.count("not tried") == 5 and len(commands) == 1


def test_plan_in_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    """The whole way, with the variants left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "variants", lambda cfg: {})
    monkeypatch.setattr(plan, "STEPS", 2)
    helpers.train(monkeypatch, train_pix2pix_turbo, *SMALL, "--train", "lora", "--plan")
    out = capsys.readouterr().out
    assert out.startswith("plan of train_pix2pix_turbo.py: tiny on drawn:scenes, 24 px")
    assert "> as asked" in out and "resident" in out and not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sigterm_ends_the_process_that_measures_too(tmp_path):
    script = Path(train_pix2pix_turbo.__file__)
    words = [sys.executable, str(script), *map(str, SMALL), "--plan"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while not (child := children.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # it has begun to measure
        process.terminate()
    assert process.returncode == 130 and not Path(f"/proc/{child}").exists()


def test_a_run_that_would_be_resumed_can_be_planned_and_is_left_alone(
    monkeypatch, tmp_path, capsys
):
    flags = [*SMALL, "--train", "lora", "--lambda_gan", 0, "--max_train_steps", 1]
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags, "--output_dir", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    commands = fake_processes(monkeypatch, *[plan.Done(json.dumps(FACTS))] * 6)
    more = ["--gradient_checkpointing", "on", "--plan"]
    helpers.train(monkeypatch, train_pix2pix_turbo, "--resume", tmp_path, *more)
    assert "> as asked" in capsys.readouterr().out
    words = commands[0]
    assert "--gradient_checkpointing=on" in words and "--train=lora" in words
    assert not any(str(tmp_path) in word for word in words)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


BAD = {
    "a data set that is not there": (["--plan", "--dataset_folder", "/no"], {}, "/no/train_A is"),
    "no switch": (["--plan", "maybe"], {}, "expected on or off"),
    "no steps": (["--plan_steps", 0], {}, "--plan_steps 0: expected 1 or more"),
    "torchrun": (["--plan"], {"WORLD_SIZE": "2"}, "run it without torchrun"),
}


@pytest.mark.parametrize("flags, variables, said", BAD.values(), ids=BAD)
def test_a_plan_that_cannot_be_made_ends_in_one_line(
    monkeypatch, tmp_path, capsys, flags, variables, said
):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        helpers.train(monkeypatch, train_pix2pix_turbo, *SMALL, *flags)
    lines = helpers.error_lines(capsys.readouterr().err)
    assert caught.value.code == 2 and len(lines) == 1 and said in lines[0], lines
    assert not list(tmp_path.iterdir())
