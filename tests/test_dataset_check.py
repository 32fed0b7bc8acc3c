"""dataset/check.py, and the command line of `python -m dataset`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pictures_helpers import make_pairs, noise
from PIL import Image

import dataset
import training
from dataset.__main__ import main


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs python -m dataset ARGUMENTS in tmp_path; returns exit status, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dataset", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            training.run(main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_check_counts_a_sound_folder(tmp_path, run):
    folder = make_pairs(tmp_path / "set", 5)
    make_pairs(folder, 2, (30, 60), split="test")
    for seed, side in enumerate("AB"):
        noise(10, 20, seed).save(folder / f"train_{side}" / "000.png")

    status, out, err = run("check", folder)
    assert status == 0
    for line in (
        "train_A: 5 pictures, distinct sizes 2, min 20x10, median 40x40, max 40x40",
        "test_B: 2 pictures, distinct sizes 1, min 60x30, median 60x30, max 60x30",
        "no problems",
    ):
        assert line in out
    captions = "train captions: 5, 0 empty, longest 9 characters\n"
    examples = "    caption 0\n    caption 1\n    caption 2\n"
    assert captions + examples in out
    assert "caption 3" not in out
    assert "train_A" in err  # the progress bar

    sheet = Image.open(tmp_path / "set_check.png")
    assert sheet.mode == "RGB"
    assert "set_check.png" in out


def test_the_contact_sheet_shows_a_beside_b_and_at_most_16_pairs(tmp_path, run):
    folder = make_pairs(tmp_path / "set", 40)
    for i in range(40):
        Image.new("RGB", (40, 40), "red").save(folder / "train_A" / f"{i:03}.png")
        Image.new("RGB", (40, 40), "blue").save(folder / "train_B" / f"{i:03}.png")
    run("check", folder, "--output", tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert not (tmp_path / "set_check.png").exists()

    colours = {colour: count for count, colour in sheet.getcolors(1 << 24)}
    assert colours[255, 0, 0] == colours[0, 0, 255] == 16 * 40 * 40
    captions_are_dark = any(red == green == blue < 100 for red, green, blue in colours)
    assert captions_are_dark


def test_check_names_every_problem(tmp_path, run):
    folder = make_pairs(tmp_path / "set", 6)
    path = folder / "train_A" / "000.png"
    path.write_bytes(path.read_bytes()[:60])
    noise(40, 41).save(folder / "train_B" / "001.png")
    (folder / "train_B" / "002.png").unlink()
    target = (folder / "train_B" / "003.png").read_bytes()
    (folder / "train_A" / "003.png").write_bytes(target)
    noise(4, 4).save(folder / "train_B" / "lonely.png")
    prompts = {f"{i:03}.png": "x" for i in range(4)}
    prompts |= {"005.png": "", "y.png": "", "z.png": ""}
    (folder / "train_prompts.json").write_text(json.dumps(prompts))

    status, out, _ = run("check", folder)
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert status == 2
    assert len(problems) == 7
    for wanted in (
        "train_A/000.png is not a readable picture",
        "train_A/001.png is 40x40 pixels but its partner 41x40",
        "train_A/002.png has no partner in train_B",
        "train_A/003.png and its partner are identical",
        "train_B/lonely.png has no partner in train_A",
        "train_A/004.png has no caption",
        "train_prompts.json has 2 entries without a picture, the first 'y.png'",
    ):
        assert sum(wanted in line for line in problems) == 1, wanted
    assert "train captions: 4, 2 empty" in out


def test_check_reports_broken_prompts_and_a_missing_side(tmp_path, run):
    folder = make_pairs(tmp_path / "set", 2)
    (folder / "train_prompts.json").write_text("{\n\noops")
    (folder / "test_A").mkdir()
    status, out, _ = run("check", folder)
    assert status == 2
    assert "train_prompts.json cannot be used (Expecting" in out
    assert "line 3" in out
    assert "test_B is not a folder" in out
    assert "test_A holds no picture" in out


def test_check_reports_text_captions_that_only_some_pictures_have(tmp_path, run):
    folder = make_pairs(tmp_path / "set", 2)
    (folder / "train_prompts.json").unlink()
    # A data set without any caption is fine.
    assert run("check", folder)[0] == 0
    (folder / "train_A" / "000.txt").write_text("one")
    status, out, _ = run("check", folder)
    assert status == 2
    assert "train_A/001.png has no caption" in out


def test_check_knows_the_unpaired_layout(tmp_path, run):
    folder = tmp_path / "set"
    for side, count in (("A", 3), ("B", 2)):
        (folder / f"train_{side}").mkdir(parents=True)
        for i in range(count):
            noise(20 + i, 30).save(folder / f"train_{side}" / f"{side}{i}.jpg")
        (folder / f"fixed_prompt_{side.lower()}.txt").write_text(f"prompt of {side}\n")

    status, out, _ = run("check", folder)
    assert status == 0
    assert "no problems" in out
    assert "train_A: 3 pictures" in out
    assert "train_B: 2 pictures" in out
    assert "fixed_prompt_b.txt: prompt of B" in out
    assert (tmp_path / "set_check.png").exists()

    (folder / "fixed_prompt_b.txt").unlink()
    status, out, _ = run("check", folder)
    assert status == 2
    assert "fixed_prompt_b.txt cannot be used" in out
    assert "partner" not in out


def test_check_of_a_bad_folder_is_one_line_and_status_2(tmp_path, run):
    for folder in (tmp_path / "none", tmp_path):
        status, out, err = run("check", folder)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert "not a data set" in err


def test_check_of_the_real_folders_finds_no_problem(shared, run):
    status, out, _ = run("check", shared / "facades")
    assert status == 0
    assert "train_A: 36 pictures" in out
    assert "test_B: 6 pictures" in out


# -------------------- the command line

def test_the_command_without_arguments_prints_its_help():
    process = subprocess.run(
        [sys.executable, "-m", "dataset"],
        cwd=Path(dataset.__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert "usage: python -m dataset" in process.stdout
    for command in ("check", "cache", "prior"):
        assert command in process.stdout


@pytest.mark.parametrize("arguments, message", [
    (["chek", "x"], "'chek'"),
    (["check", "x", "--ouput", "y"], "did you mean --output?"),
    (["cache", "x", "--output", "y", "--device", "foo"], "--device foo"),
    (["cache", "x", "--output", "y", "--batch", "0"], "--batch 0: expected 1 or more"),
    (["cache", "x"], "--output"),
])
def test_wrong_arguments_are_one_line(run, tmp_path, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.iterdir())


def test_the_package_imports_no_network():
    """Only `cache` and `prior` need models, and import them when they run."""
    program = "import sys, dataset.__main__; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(dataset.__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    packages = {name.split(".")[0] for name in process.stdout.split()}
    assert "dataset" in packages
    assert not packages & {"models", "files", "tiny"}
