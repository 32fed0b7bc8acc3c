"""report.md: written at the end and on Ctrl-C, short, and true."""

import os
import signal

import pytest
import torch
import trainer_helpers as helpers
from trainer_helpers import pairs  # noqa: F401  a fixture

import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
from training import report, watch

SMALL = ["--device", "cpu", "--resolution", 24, "--train_batch_size", 2, "--lambda_gan", 0]
SMALL += ["--validation_num_images", 2, "--max_train_steps", 2]


def test_a_finished_run_has_a_report_that_fits_into_an_issue(
    monkeypatch, tmp_path, pairs  # noqa: F811
):
    folder = tmp_path / "my run"
    flags = [*SMALL, "--dataset_folder", pairs, "--output_dir", folder, "--skips", "off"]
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    text = (folder / "report.md").read_text()
    score = helpers.read_log(folder)[1]["val_l2"]
    for words in [
        "# my run\n",
        "- end: finished 2 steps\n",
        "- command: `python train_pix2pix_turbo.py --base tiny --device cpu",
        f"- data: 6 pairs of {pairs}\n",
        "minutes for 2 steps\n",
        f"torch {torch.__version__}",
        f"- best validation: step 2: val_l2 {score:.4g}, val_psnr",
        "- short data: an epoch has 6 items",
        "\n--base tiny\n",
        "\n--skips off\n",
        "![losses](losses.png)",
        "![000002](samples/000002.png)",
    ]:
        assert words in text, words
    assert "--seed" not in text.split("```")[1] and len(text) < 4000
    for line in text.splitlines():
        if line.startswith("!["):
            assert (folder / line.partition("(")[2].rstrip(")")).is_file(), line


def test_names_that_are_not_utf_8_are_reported(monkeypatch, tmp_path, pairs):  # noqa: F811
    odd = tmp_path / os.fsdecode(b"latin-\xe9")
    odd.symlink_to(pairs)
    flags = [*SMALL, "--dataset_folder", odd, "--output_dir", tmp_path / "run"]
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    assert "latin-\\udce9" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    "trainer", [train_cyclegan_turbo, train_yoso], ids=["cyclegan_turbo", "yoso"]
)
def test_the_other_trainers_report_too(monkeypatch, tmp_path, trainer):
    flags = [*SMALL, "--output_dir", tmp_path, "--train", "lora"]
    if trainer is train_yoso:
        flags += ["--prior_pictures", 3]
    helpers.train(monkeypatch, trainer, *flags)
    text = (tmp_path / "report.md").read_text()
    assert "- end: finished 2 steps" in text and "![000002](samples/000002.png)" in text
    expected = "none was scored" if trainer is train_yoso else "step 2: val_change_a2b"
    assert f"- best validation: {expected}" in text


def test_a_stopped_run_reports_too_and_the_resumed_one_writes_it_anew(
    monkeypatch, tmp_path, pairs  # noqa: F811
):
    flags = [*SMALL, "--dataset_folder", pairs, "--output_dir", tmp_path]
    signals = train_pix2pix_turbo.signals

    def interrupt(*tensors):
        os.kill(os.getpid(), signal.SIGINT)
        return signals(*tensors)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(train_pix2pix_turbo, "signals", interrupt)
        helpers.train(patch, train_pix2pix_turbo, *flags)
    assert caught.value.code == 130
    text = (tmp_path / "report.md").read_text()
    assert "- end: stopped after step 1 of 2" in text and "minutes for 1 steps" in text
    assert "none was scored" in text and "![000001](samples/000001.png)" in text
    helpers.train(monkeypatch, train_pix2pix_turbo, "--resume", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "- end: finished 2 steps" in text and "for 1 steps, resumed at step 1" in text
    assert "- short data" in text  # of the part before


def test_a_report_names_torchrun_where_there_are_several_processes(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset_folder", "my pictures"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert report.command_line() == "python train.py --dataset_folder 'my pictures'"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert report.command_line().startswith("torchrun --nproc_per_node=2 train.py")


def test_the_best_validation_is_the_lowest_score_with_what_was_measured_there():
    history = watch.History(1000, 600)
    for step, score in [(100, 3.0), (200, 1.0), (300, 2.0)]:
        history.add(step, {"val_score": score, "val_l2": score, "val_psnr": 20.0 + step})
    found = report.best_validation(history)
    assert found == "step 200: val_l2 1, val_psnr 220 (the last was at step 300)"


def test_a_report_that_cannot_be_written_ends_in_one_line_and_keeps_the_run(
    monkeypatch, tmp_path, pairs, capsys  # noqa: F811
):
    (tmp_path / "report.md").mkdir()
    flags = [*SMALL, "--dataset_folder", pairs, "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as caught:
        helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    lines = helpers.error_lines(capsys.readouterr().err)
    assert caught.value.code == 2 and len(lines) == 1 and "report.md could not" in lines[0]
    assert helpers.read_state(tmp_path)["step"] == 2
