"""dataset/check.py, and the command line of `python -m dataset`."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pictures_helpers import cache_settings, make_pairs, noise, refused
from PIL import Image

import dataset
import training
from dataset.__main__ import main
from dataset.cache import write_cache
from dataset.check import captions_of, check_readable, report_cut
from dataset.folders import open_captioned, open_paired, open_unpaired
from files.tokenizers import load_t5_tokenizer, load_tokenizer


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs python -m dataset ARGUMENTS in tmp_path; returns exit status, stdout, stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dataset", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            training.run_script(main)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def problems_in(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("problem: ")]


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
    problems = problems_in(out)
    assert status == 2
    assert len(problems) == 9
    for wanted in (
        "train_A/002.png has no partner of its name or stem in train_B (1 of 6 have none)",
        "test_A is not a folder",
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
    make_pairs(folder, 2, split="test")
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
        for split in ("train", "test"):
            (folder / f"{split}_{side}").mkdir(parents=True)
            for i in range(count):
                noise(20 + i, 30).save(folder / f"{split}_{side}" / f"{side}{i}.jpg")
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


# -------------------- what a trainer refuses

@pytest.fixture
def paired(tmp_path):
    folder = make_pairs(tmp_path / "set", 3)
    return make_pairs(folder, 2, split="test")


@pytest.fixture
def unpaired(paired):
    """The same pictures for CycleGAN."""
    for path in paired.glob("*_prompts.json"):
        path.unlink()
    for side in "ab":
        (paired / f"fixed_prompt_{side}.txt").write_text(f"a photo of {side}")
    return paired


def captioned(folder: Path, count: int = 20) -> Path:
    folder.mkdir()
    for i in range(count):
        noise(20, 30 + i % 2, i).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"caption {i}")
    return folder


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for picture in sorted(folder.glob("*.png")):
            archive.write(picture, picture.name)
        archive.writestr("dataset.json", '{"labels": null}')
    return path


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_each_layout_is_checked_for_its_trainer(paired, tmp_path, run):
    assert "set: checked for pix2pix\n" in run("check", paired)[1]
    pictures = captioned(tmp_path / "pictures")
    (tmp_path / "captions.txt").write_text("caption\n" * 20)
    for source in (pictures, zipped(pictures), tmp_path / "captions.txt"):
        status, out, _ = run("check", source)
        assert (status, problems_in(out)) == (0, []), out
        assert f"{source}: checked for yoso\n" in out
        assert "train captions: " in out
    assert (tmp_path / "pictures_check.png").exists()
    assert (tmp_path / "pictures.zip_check.png").exists()
    assert "train: 18 pictures, distinct sizes 2, min 30x20" in run("check", pictures)[1]

    # YOSO also takes the targets of pairs.
    status, out, _ = run("check", paired, "--for", "yoso")
    assert (status, problems_in(out)) == (0, [])


def test_the_unpaired_layout_is_checked_for_cyclegan(unpaired, run):
    status, out, _ = run("check", unpaired)
    assert (status, problems_in(out)) == (0, [])
    assert "checked for cyclegan\n" in out


@pytest.mark.parametrize("missing", ["test_A", "test_B", "train_A", "train_B"])
@pytest.mark.parametrize("trainer", ["pix2pix", "cyclegan"])
def test_a_missing_side_is_a_problem(unpaired, run, missing, trainer):
    shutil.rmtree(unpaired / missing)
    status, out, _ = run("check", unpaired, "--for", trainer)
    assert status == 2
    assert sum(f"{missing} is not a folder" in line for line in problems_in(out)) == 1


def test_a_set_of_another_trainer_is_a_problem(paired, tmp_path, run):
    for source, trainer, reason in (
        (paired, "cyclegan", "fixed_prompt_a.txt cannot be used"),
        (captioned(tmp_path / "pictures"), "pix2pix", "train_A is not a folder"),
        (tmp_path / "pictures", "cyclegan", "test_A is not a folder"),
        (tmp_path / "none", "yoso", "none is not a data set"),
    ):
        status, out, _ = run("check", source, "--for", trainer)
        assert status == 2
        assert reason in "".join(problems_in(out))


@pytest.mark.parametrize("name", ["fixed_prompt_a.txt", "fixed_prompt_b.txt"])
def test_an_empty_fixed_prompt_is_a_problem(unpaired, run, name):
    (unpaired / name).write_text(" \n")
    status, out, err = run("check", unpaired)
    assert status == 2
    (problem,) = problems_in(out)
    assert f"{name} is empty" in problem
    assert f"1 of 2 captions are empty ({name})" in err


def test_a_picture_that_cannot_be_prepared_is_a_problem(unpaired, run):
    for side in "AB":
        noise(100_000, 1).save(unpaired / f"test_{side}" / "thread.png")
    status, out, _ = run("check", unpaired, "--for", "pix2pix")
    assert status == 2
    problems = "".join(problems_in(out))
    assert "test_A/thread.png: a picture of 1x100000 pixels becomes 512x51200000" in problems
    # CycleGAN stretches its test pictures.
    assert run("check", unpaired, "--for", "cyclegan")[0] == 0


def test_every_broken_picture_of_yoso_is_a_problem(tmp_path, run):
    pictures = captioned(tmp_path / "pictures")
    for name in ("03.png", "09.png", "18.png"):
        spoil(pictures / name)
    for source in (pictures, zipped(pictures)):
        status, out, _ = run("check", source)
        assert status == 2
        problems = problems_in(out)
        assert len(problems) == 3
        for name in ("03.png", "09.png", "18.png"):
            assert sum(f"{source}/{name} is not a readable" in line for line in problems) == 1


@pytest.mark.parametrize("spoiled, reason", [
    ("few", "holds 3 pictures or captions; expected ten or more"),
    ("metadata", "metadata.jsonl line 2 cannot be used (the caption is null"),
    ("labels", "cannot be used (Expecting value"),
    ("not a zip", "cannot be used (BadZipFile"),
    ("not text", "captions.txt cannot be used"),
])
def test_what_yoso_refuses_to_open_is_a_problem(tmp_path, run, spoiled, reason):
    pictures = captioned(tmp_path / "pictures", 3 if spoiled == "few" else 20)
    source = pictures
    if spoiled == "metadata":
        rows = [dict(file_name="00.png", text="x"), dict(file_name="01.png", text=None)]
        lines = [json.dumps(row) for row in rows]
        (pictures / "metadata.jsonl").write_text("\n".join(lines))
    elif spoiled == "labels":
        source = tmp_path / "labels.zip"
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("dataset.json", "oops")
    elif spoiled == "not a zip":
        source = tmp_path / "text.zip"
        source.write_text("text")
    elif spoiled == "not text":
        source = tmp_path / "captions.txt"
        source.write_bytes(b"\xff\xfe\x80")

    status, out, _ = run("check", source)
    assert status == 2
    assert reason in "".join(problems_in(out))


@pytest.mark.parametrize("output", ["pictures/00.png", "sheet.xyz", "."])
def test_a_contact_sheet_is_written_over_no_picture_of_the_data_set(tmp_path, run, output):
    pictures = captioned(tmp_path / "pictures")
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    status, _, err = run("check", pictures, "--output", tmp_path / output)
    assert status == 2 and "--output" in err and "expected a name" in err
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before


def test_a_damaged_shard_of_a_cache_is_a_problem(tmp_path, run):
    pictures = captioned(tmp_path / "pictures")
    write_cache(**cache_settings(pictures, tmp_path / "cache", shard_items=6))
    status, out, _ = run("check", tmp_path / "cache")
    assert (status, problems_in(out)) == (0, [])
    assert "train: 18 items in 3 shards" in out

    spoil(tmp_path / "cache" / "train-00001.safetensors")
    (tmp_path / "cache" / "test-00000.safetensors").unlink()
    status, out, _ = run("check", tmp_path / "cache")
    assert status == 2
    damaged, missing = problems_in(out)
    assert "train-00001.safetensors is missing or damaged" in damaged
    assert "test-00000.safetensors is missing or damaged" in missing


# -------------------- at the start of a run

def test_test_pictures_are_read_at_the_start(unpaired, tmp_path):
    pictures = captioned(tmp_path / "pictures", 40)
    (tmp_path / "captions.txt").write_text("caption\n" * 20)
    prep = "resize_16"
    sets = {
        "test_B/001.png": lambda: open_paired(unpaired, "test", prep),
        "test_A/001.png": lambda: open_unpaired(unpaired, "test", prep),
        "pictures/19.png": lambda: open_captioned(pictures, "test", prep),
        "pictures.zip/19.png": lambda: open_captioned(zipped(pictures), "test", prep),
    }
    for name, opened in sets.items():
        check_readable(opened(), 100)
        path = unpaired / name
        if name.startswith("pictures"):
            path = pictures / "19.png"
        whole = path.read_bytes()
        spoil(path)
        check_readable(opened(), 1)
        refused(check_readable, opened(), 2, match=f"{name} is not a readable picture")
        refused(check_readable, opened(), 100, match=f"{name} is not a readable picture")
        path.write_bytes(whole)
    check_readable(open_captioned(tmp_path / "captions.txt", "test", prep), 100)


def test_how_many_test_pictures_are_broken_is_said(paired):
    noise(50, 41).save(paired / "test_A" / "000.png")
    spoil(paired / "test_B" / "001.png")
    pairs = open_paired(paired, "test", "resize_16")
    refused(check_readable, pairs, 9, match="000.png and its partner in test_B are 41x50 and 40x40")
    refused(check_readable, pairs, 9, match="(2 of the 2 test items that are read have problems")


# -------------------- captions that are too long

# The tokenizer of the base "tiny" takes 24 tokens, of which 22 are the caption's.
LONG = " ".join(["red"] * 22) + " and the end"


def test_check_counts_tokens_as_a_base_does(tmp_path, run):
    pictures = captioned(tmp_path / "pictures")
    (pictures / "03.txt").write_text(LONG)
    (pictures / "05.txt").write_text("red " * 22)
    (pictures / "19.txt").write_text("blue " * 30)
    status, out, _ = run("check", pictures, "--base", "tiny")
    assert (status, problems_in(out)) == (0, [])
    train = "train tokens: longest caption 26, room for 22, 1 captions cut\n"
    assert f"{train}    without effect: and the end\n" in out
    test = "test tokens: longest caption 30, room for 22, 1 captions cut\n"
    assert f"{test}    without effect: blue blue blue" in out
    assert "train tokens" not in run("check", pictures)[1]


def test_check_counts_the_tokens_of_every_layout(paired, tmp_path, run):
    names = [path.name for path in (paired / "train_A").iterdir()]
    (paired / "train_prompts.json").write_text(json.dumps(dict.fromkeys(names, LONG)))
    out = run("check", paired, "--base", "tiny")[1]
    assert "train tokens: longest caption 26, room for 22, 3 captions cut" in out
    for side in "ab":
        (paired / f"fixed_prompt_{side}.txt").write_text(LONG if side == "b" else "a")
    out = run("check", paired, "--base", "tiny", "--for", "cyclegan")[1]
    assert "train tokens: longest caption 26, room for 22, 1 captions cut" in out

    lines = ["a red circle", LONG] * 10
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    out = run("check", tmp_path / "captions.txt", "--base", "tiny")[1]
    assert "train tokens: longest caption 26, room for 22, 8 captions cut" in out
    assert "test tokens: longest caption 26, room for 22, 2 captions cut" in out

    pictures = captioned(tmp_path / "pictures")
    rows = [dict(file_name=f"{i:02}.png", text=["short", LONG, LONG]) for i in range(20)]
    (pictures / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    out = run("check", pictures, "--base", "tiny")[1]
    assert "train tokens: longest caption 26, room for 22, 36 captions cut" in out


def test_a_base_that_is_none_is_refused_before_anything_is_read(paired, run):
    status, out, err = run("check", paired, "--base", "no-such-base")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no-such-base is no folder here" in err


def test_half_a_character_is_a_problem(tmp_path, run):
    (tmp_path / "captions.txt").write_text("caption\n" * 20)
    pictures = captioned(tmp_path / "pictures")
    rows = [dict(file_name=f"{i:02}.png", text="\ud800") for i in range(20)]
    (pictures / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    status, out, _ = run("check", pictures, "--base", "tiny")
    assert status == 2
    assert "half a character" in problems_in(out)[0]


@pytest.mark.parametrize("captions, says", [
    ([], None),
    (["a red circle"], None),
    (["red " * 22] * 5, None),
    (["a red circle", LONG, "a"], "1 of 3 captions are longer than the text encoder's 24 tokens"),
    ([LONG] * 7 + [""] * 5000, "7 of 5007 captions are"),
    (["x"] * 9000 + [LONG], "1 of 9001 captions are"),
    (["red " * 23] * 3000, "at least 2000 of 3000 captions are"),
    (["猫" * 30] + ["red red red"] * 3000, "1 of 3001 captions are"),
])
def test_the_start_of_a_run_says_how_many_captions_are_cut(captions, says, capsys):
    report_cut("the set", captions, load_tokenizer("tiny"))
    err = capsys.readouterr().err
    if says is None:
        assert err == ""
    else:
        assert err.startswith(f"the set: {says}")
        assert err.count("\n") == 1


def test_nothing_is_said_of_encoded_captions_and_by_other_processes(capsys, monkeypatch):
    report_cut("the set", [LONG], None)
    monkeypatch.setenv("RANK", "1")
    report_cut("the set", [LONG], load_tokenizer("tiny"))
    assert capsys.readouterr().err == ""


def test_t5_counts_the_cleaned_caption(shared, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(shared / "tokenizers" / "t5" / "spiece.model", tmp_path / "tokenizer")
    tokenizer = load_t5_tokenizer(str(tmp_path))
    # In capitals each word is several pieces.
    report_cut("the set", ["PICTURE HOUSE " * 35], tokenizer)
    assert capsys.readouterr().err == ""
    report_cut("the set", ["PICTURE HOUSE " * 35, "a house " * 60], tokenizer)
    err = capsys.readouterr().err
    assert "1 of 2 captions are longer than the text encoder's 120 tokens" in err


def test_drawings_have_no_captions_to_count():
    assert captions_of(open_paired("drawn:scenes", "train", "no_resize")) == []


def test_making_a_cache_says_how_many_captions_are_cut(tmp_path, capsys):
    pictures = captioned(tmp_path / "pictures")
    (pictures / "03.txt").write_text(LONG)
    write_cache(**cache_settings(pictures, tmp_path / "cache"))
    assert f"{pictures}: 1 of 18 captions are longer" in capsys.readouterr().err
    captions = captions_of(open_captioned(tmp_path / "cache", "train", ""))
    assert len(captions) == 18 and LONG in captions


def test_drawings_are_not_read_at_the_start():
    check_readable(open_paired("drawn:scenes", "test", "no_resize", size=4096), 200)


def test_check_of_a_bad_folder_is_one_line_and_status_2(tmp_path, run):
    for folder in (tmp_path / "none", tmp_path):
        status, out, err = run("check", folder)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert "not a data set" in err


@pytest.mark.parametrize("data", ["digits", "drawn:scenes"])
def test_check_of_what_has_no_files_says_so(run, data):
    for more in ([], ["--for", "yoso"]):
        status, out, err = run("check", data, *more)
        assert (status, out) == (2, "")
        assert f"{data} is part of this code" in err and err.count("\n") == 1


def test_a_folder_named_like_data_of_this_code_is_checked_by_its_path(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    for i in range(12):
        Image.new("L", (16, 16), i).save(tmp_path / "digits" / f"{i}.png")
    status, out, err = run("check", "./digits", "--for", "yoso")
    assert "pictures" in out and "Traceback" not in err
    status, out, err = run("check", "digits")
    assert (status, out) == (2, "") and "digits is part of this code" in err


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
    (["check", "x", "--for", "gan"], "--for"),
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
