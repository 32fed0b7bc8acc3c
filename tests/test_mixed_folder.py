"""Two hundred files as strangers keep them: each comes out or is named, and the counts add up."""

import json
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import evaluate
import sample
import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
import training
from dataset import __main__ as dataset_command

GOOD = {
    "png": 55,
    "jpg": 30,
    "jpeg": 10,
    "JPG": 10,
    "webp": 10,
    "bmp": 10,
    "gif": 10,
    "tiff": 10,
    "jfif": 5,
}
ODD_NAMES = [
    "zażółć gęślą jaźń.png",
    "日本の家.png",
    "-rf.png",
    "two  spaces .png",
    "a" * 200 + ".png",
    "dots.in.name.png",
    "100%.png",
    "{braces}.png",
    "quote's.png",
    "#hash.png",
]
LEFT_OUT = ["notes.txt", "archive.tar", "clip.mp4", "model.safetensors", "raw.cr2"]


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def bomb() -> bytes:
    """The header of a PNG that says it has 2.5 thousand million pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + body


def write_good(folder: Path) -> set[str]:
    names = set()
    for suffix, count in GOOD.items():
        for i in range(count):
            name = f"{suffix.lower()}{'-big' if suffix.isupper() else ''}-{i:02d}.{suffix}"
            kind = Image.registered_extensions()[f".{suffix.lower()}"]
            noise(len(names)).save(folder / name, format=kind)
            names.add(name)
    for i, name in enumerate(ODD_NAMES):
        noise(500 + i).save(folder / name)
        names.add(name)
    for mode in ("L", "1", "P", "RGBA", "LA", "I;16", "CMYK"):
        suffix = "tiff" if mode == "CMYK" else "png"
        picture = noise(600, "L").convert("I;16") if mode == "I;16" else noise(600, mode)
        name = f"mode {mode.replace(';', '')}.{suffix}"
        picture.save(folder / name)
        names.add(name)
    return names


def write_broken(folder: Path) -> set[str]:
    whole = (folder / "png-00.png").read_bytes()
    photo = (folder / "jpg-00.jpg").read_bytes()
    wrong_sum = bytearray(whole)
    wrong_sum[60] ^= 255
    made = {
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "text.webp": b"this is no picture",
        "bomb.png": bomb(),
        "sum.png": bytes(wrong_sum),
    }
    for i in range(10):
        made[f"cut{i}.png"] = whole[: 40 + 100 * i]
        made[f"photo{i}.jpg"] = photo[: 30 + 20 * i]
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return set(made)


def write_left_out(folder: Path) -> set[str]:
    for name in LEFT_OUT:
        (folder / name).write_bytes(b"no picture")
    for name in ("nested", "more pictures"):
        (folder / name).mkdir()
        noise(700).save(folder / name / "inside.png")
    return {*LEFT_OUT, "nested", "more pictures"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Path, dict[str, set[str]]]:
    """The folder, and which of its 200 files are good, broken and left out."""
    folder = tmp_path_factory.mktemp("mixed")
    kinds = dict(good=write_good(folder), broken=write_broken(folder))
    kinds["left out"] = write_left_out(folder)
    return folder, kinds


def call(monkeypatch, capsys, main: Callable, *argv) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a script."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    status = 0
    try:
        training.run_script(main)
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_there_are_two_hundred(mixed):
    folder, kinds = mixed
    assert sum(map(len, kinds.values())) == len(list(folder.iterdir())) == 200


def test_a_translated_folder_accounts_for_every_file(monkeypatch, capsys, mixed, tmp_path):
    folder, kinds = mixed
    out = tmp_path / "out"
    argv = ["sample.py", "--checkpoint", "day2night", "--input", folder, "--output", out]
    status, paths, err = call(monkeypatch, capsys, sample.main, *argv, "--device", "cpu")
    assert status == 2
    made = {path.name for path in out.iterdir()}
    assert len(made) == len(kinds["good"]) == len(paths.splitlines())
    for name in kinds["broken"]:
        assert name in err
    for name in kinds["good"]:
        assert any(result.startswith(Path(name).stem[:150]) for result in made), name
    for count in ("4 files of another kind", "2 folders", "1 caption file without a picture"):
        assert count in err
    assert f"{len(kinds['broken'])} of {len(kinds['good']) + len(kinds['broken'])} pictures" in err


def test_metrics_account_for_every_pair(monkeypatch, capsys, mixed):
    folder, kinds = mixed
    argv = ["evaluate.py", "--real", folder, "--fake", folder, "--metrics", "psnr", "--json"]
    status, out, err = call(monkeypatch, capsys, evaluate.main, *argv, "--device", "cpu")
    assert status == 2
    for name in kinds["broken"]:
        assert name in err
    result = json.loads(out)
    assert result["metrics"]["psnr"]["n"] == {"pairs": len(kinds["good"])}
    assert len(result["failed"]) == len(kinds["broken"])


def test_the_check_names_every_broken_file(monkeypatch, capsys, mixed):
    folder, kinds = mixed
    argv = ["dataset", "check", folder, "--for", "yoso"]
    status, out, err = call(monkeypatch, capsys, dataset_command.main, *argv)
    assert status == 2
    for name in kinds["broken"]:
        assert name in out + err
    numbers = [int(number) for number in re.findall(r"\d+", out + err)]
    assert len(kinds["good"]) + len(kinds["broken"]) in numbers


@pytest.mark.parametrize("trainer", [train_pix2pix_turbo, train_cyclegan_turbo, train_yoso])
def test_a_trainer_refuses_a_broken_test_picture_before_it_trains(
    monkeypatch, capsys, mixed, tmp_path, trainer
):
    folder, kinds = mixed
    data = folder
    if trainer is not train_yoso:
        data = tmp_path / "data"
        data.mkdir()
        for side in ("train_A", "train_B", "test_A", "test_B"):
            (data / side).symlink_to(folder)
        for side in "ab":
            (data / f"fixed_prompt_{side}.txt").write_text("noise")
    run = tmp_path / "run"
    argv = [trainer.__file__, "--dataset_folder", data, "--output_dir", run, "--device", "cpu"]
    status, _, err = call(monkeypatch, capsys, trainer.main, *argv, "--max_train_steps", 1)
    lines = [line for line in err.splitlines() if "error: " in line]
    assert status == 2 and len(lines) == 1
    assert any(name in lines[0] for name in kinds["broken"])
    assert not run.exists()


def test_the_metadata_of_a_picture_is_no_trap(monkeypatch, capsys, tmp_path):
    """A text chunk of a megabyte, as some editors write, does not hide the picture."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 1_000_000, zip=True)
    (tmp_path / "in").mkdir()
    noise(1).save(tmp_path / "in" / "chunk.png", pnginfo=info)
    out = tmp_path / "out"
    argv = ["sample.py", "--checkpoint", "day2night", "--input", tmp_path / "in", "--output", out]
    status, _, err = call(monkeypatch, capsys, sample.main, *argv, "--device", "cpu")
    assert status == 0 and len(list(out.iterdir())) == 1, err
