"""What strangers' files and commands come to: a table for each kind of fault that was found once.

A row is a relative of a fault that was reported: an input, and what must come of it now. The
comment above a table says what came before.
"""

# ruff: noqa: F811  (fixtures are imported, and arguments have their names)

import contextlib
import io
import json
import os
import shutil
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import test_diffusion as schedules
import test_files_bases as damages
import test_files_formats_lora as loras
import torch
import trainer_helpers as helpers
from conftest import normal, relative
from diffusers import StableDiffusionPipeline
from pictures_helpers import cache_settings, make_pairs, noise, refused
from PIL import Image
from pipelines import UNET, edit, refusal, tiny_pipeline, tokenizer_folder, weight_file
from safetensors.torch import load_file, save_file
from test_pix2pix_turbo import Official, draw
from torch import Tensor
from trainer_helpers import metric_networks, pairs  # noqa: F401  (fixtures)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import evaluate
import sample
import sampling.pace
import sampling.pictures
import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
import training
from dataset.__main__ import main as dataset_main
from dataset.cache import write_cache
from dataset.check import count_tokens, report_cut
from dataset.folders import open_captioned, open_paired, pictures_in
from dataset.loader import batches
from dataset.pictures import open_picture
from files import bases, checkpoints, embeddings, kinds
from files.bases import load_base, load_lora
from files.formats import read_lora
from files.tensors import read_tensors, save_tensors
from files.tokenizers import load_tokenizer
from models import diffusion, schedulers
from models.pix2pix_turbo import Pix2PixTurbo
from training.folders import data_fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINERS = [train_pix2pix_turbo, train_cyclegan_turbo, train_yoso]
NAMES = [trainer.__name__ for trainer in TRAINERS]


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Calls a script's main with these arguments in a new folder: exit status, stdout, stderr."""
    here = tmp_path / "working folder"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(main: Callable, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            training.run_script(main)
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small Stable Diffusion as `diffusers` writes it, never to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "base"))


def pictures(folder: Path, names: list[str]) -> Path:
    """A new folder with different small pictures of these names."""
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        noise(16, 16, i).save(folder / name, format="PNG")
    return folder


def numbered(count: int) -> list[str]:
    return [f"{i:02}.png" for i in range(count)]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


# -------------------- 1. one item that fails, and the rest

def occupied_output(folder: Path, out: Path) -> None:
    """A folder stands where the picture's result is to be written."""
    (out / "b.png").mkdir(parents=True)


def huge_text_chunk(folder: Path, out: Path) -> None:
    """Pillow refuses text that unpacks to more than 64 MB."""
    text = zlib.compress(bytes(70_000_000))
    data = (folder / "b.png").read_bytes()
    end = data.index(b"IDAT") - 4
    (folder / "b.png").write_bytes(data[:end] + chunk(b"zTXt", b"a\0\0" + text) + data[end:])


def link_to_a_picture_that_is_cut(folder: Path, out: Path) -> None:
    (folder / "b.png").rename(folder.parent / "elsewhere.png")
    cut(folder.parent / "elsewhere.png")
    (folder / "b.png").symlink_to(folder.parent / "elsewhere.png")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A piece of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


# Before: the first picture that failed after it was opened ended the folder, unnamed.
MISHAPS = [
    pytest.param(occupied_output, "b.png could not be written", id="a folder in its place"),
    pytest.param(huge_text_chunk, "b.png is not a readable picture", id="70 MB of text"),
    pytest.param(link_to_a_picture_that_is_cut, "b.png is not a readable", id="a link to one"),
]


@pytest.mark.parametrize("mishap, says", MISHAPS)
def test_the_other_pictures_of_a_folder_are_translated(script, tmp_path, mishap, says):
    folder = pictures(tmp_path / "in", ["a.png", "b.png", "c.png"])
    out = tmp_path / "out"
    mishap(folder, out)
    flags = ["--checkpoint", "day2night", "--input", folder, "--output", out, "--device", "cpu"]
    status, paths, err = script(sample.main, *flags)
    assert (status, paths.splitlines()) == (2, [f"{out}/a.png", f"{out}/c.png"])
    last = err.splitlines()[-1]
    assert "1 of 3 pictures were not made: " in last
    assert says in last


# Before: a legal name of 245 bytes had no room for what was added to it.
LONG_NAMES = [
    pytest.param(["x" * 251 + ".png"], 0, id="255 bytes"),
    pytest.param(["日" * 83 + ".png"], 0, id="253 bytes of three each"),
    # Both would be NAME.png, and are too long with both suffixes.
    pytest.param(["x" * 250 + ".png", "x" * 250 + ".jpg", "a.png"], 2, id="a stem for two"),
]


@pytest.mark.parametrize("names, failing", LONG_NAMES)
def test_names_as_long_as_the_system_allows_are_written_or_named(
    script, tmp_path, names, failing
):
    folder = pictures(tmp_path / "in", names)
    out = tmp_path / "out"
    flags = ["--checkpoint", "day2night", "--input", folder, "--output", out, "--device", "cpu"]
    status, paths, err = script(sample.main, *flags)
    assert len(paths.splitlines()) == len(list(out.iterdir())) == len(names) - failing
    assert status == (2 if failing else 0)
    assert not failing or f"{failing} of {len(names)} pictures were not made" in err


# Before: a broken picture ended these commands at once. All that are broken must be named.
@pytest.mark.parametrize("command", [
    pytest.param("check", id="dataset check"),
    pytest.param("prior", id="dataset prior"),
    pytest.param("cache", id="dataset cache"),
])
def test_every_broken_picture_is_named(script, tmp_path, command):
    folder = pictures(tmp_path / "set", numbered(20))
    for name in ("03.png", "07.png"):
        cut(folder / name)
    flags = []
    if command != "check":
        name = "result.safetensors" if command == "prior" else "result"
        flags = ["--base", "tiny", "--size", 8, "--output", tmp_path / name]
    status, out, err = script(dataset_main, command, folder, *flags)
    assert status == 2
    assert "03.png" in out + err
    assert "07.png" in out + err


@pytest.mark.parametrize("letters", [
    pytest.param(200, id="200 letters"),
    pytest.param(250, id="250 letters"),
])
def test_a_folder_with_a_long_name_is_checked(script, tmp_path, letters):
    folder = pictures(tmp_path / ("n" * letters), numbered(20))
    status, out, err = script(dataset_main, "check", folder)
    assert "no problems" in out
    assert status == 0, err


# Before: a letter that stdout's encoding does not have ended the command with UnicodeEncodeError.
CAPTIONS = [
    pytest.param("cp1252", "猫 Łódź", id="Japanese and Polish in cp1252"),
    pytest.param("ascii", "Ünïcode \U0001f408", id="accents and a cat in ASCII"),
    pytest.param("latin-1", "a\u2028b \u202e c", id="separators and a change of direction"),
]


@pytest.mark.parametrize("encoding, caption", CAPTIONS)
def test_captions_that_stdout_cannot_say_are_checked(script, tmp_path, encoding, caption):
    folder = pictures(tmp_path / "日本", numbered(10))
    for i in range(10):
        (folder / f"{i:02}.txt").write_text(caption, encoding="utf-8")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        status, _, _ = script(dataset_main, "check", folder)
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue() for stream in streams)
    assert status == 0, err
    assert b"no problems" in out
    assert "日本".encode(encoding, errors="backslashreplace") in out


# -------------------- 2. time without a word

# Sizes that are translated one after the other at 10 seconds for 64 x 64 latents, and what is said.
# Before: nothing was.
TIMES = [
    pytest.param({}, [(700, 700)], [], id="a small one"),
    pytest.param({}, [(10_000, 512)], ["(10000x512 pixels): about 10 min; --t"], id="wide"),
    pytest.param({}, [(512, 10_000)], ["(512x10000 pixels): about 10 min"], id="a long page"),
    pytest.param(
        {},
        [(1100, 1100), (1100, 1120), (2000, 1500)],
        ["about 1 min", "about 4 min"],
        id="again only where it is twice as long",
    ),
    pytest.param(dict(tile=0), [(6000, 4000)], ["--tile 512"], id="tiles forbidden"),
    pytest.param(dict(tile=256), [(6000, 4000)], ["256 pixels (--tile)"], id="tiles asked for"),
    pytest.param({}, [(6000, 4000)], ["squares of 1024 pixels, whose"], id="tiles chosen"),
    pytest.param(
        dict(tiles_all=False),
        [(2304, 2304)],
        ["about 10 min; --tile"],
        id="an edit, whose U-Net sees the whole",
    ),
]


@pytest.mark.parametrize("changes, sizes, says", TIMES)
def test_what_takes_long_is_said_once(capsys, changes, sizes, says):
    settings = dict(tile=None, factor=8, rate=10.0)
    settings |= dict(tiles_all=True, tiles_unasked=True, times_small=True)
    pace = sampling.pace.Pace(**settings | changes)
    for size in sizes:
        pace.estimate("a picture", size, 1, lambda side: pytest.fail("it is measured already"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(says)
    for line, words in zip(lines, says):
        assert words in line


# What is told when a denoiser with these evaluations takes a minute for each.
EVALUATIONS = [
    pytest.param(4, 2, 240, id="4 steps"),
    pytest.param(50, 2, 3000, id="50 steps"),
    pytest.param(2, 1, 120, id="2 steps"),
]


@pytest.mark.parametrize("count, after, seconds", EVALUATIONS)
def test_the_time_of_several_steps_is_told_before_the_last(monkeypatch, count, after, seconds):
    now = iter(range(0, 100_000, 60))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    told = []
    model = sampling.pace.timed(lambda x, t: x, count, told.append)
    for _ in range(after):
        assert told == []
        model(torch.zeros(1), 0)
    assert told == [seconds]


# -------------------- 3. files left out without a word

def captions_in_capitals(folder: Path) -> None:
    (folder / "00.TXT").write_text("a caption")


def half_a_download(folder: Path) -> None:
    (folder / "10.png.part").write_bytes(b"")


def table_of_hugging_face(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\n00.png,a caption\n")


def link_to_itself(folder: Path) -> None:
    (folder / "10.png").symlink_to(folder / "10.png")


def text_without_suffix(folder: Path) -> None:
    (folder / "00").write_text("a caption")


def text_beside_a_table(folder: Path) -> None:
    write_table(folder, ["x"] * 10)
    (folder / "00.txt").write_text("another caption")


def validation_beside_train_and_test(folder: Path) -> None:
    for split in ("train", "test", "val"):
        pictures(folder / split, ["a.png"])


def write_table(folder: Path, captions: list) -> None:
    rows = [dict(file_name=f"{i:02}.png", text=caption) for i, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def write_table_beside(folder: Path, captions: list) -> None:
    """Beside train and test, where it is not read."""
    for split in ("train", "test"):
        pictures(folder / split, ["a.png"])
    write_table(folder, captions)


# Before: none of these was named.
LEFT_OUT = [
    pytest.param(captions_in_capitals, "of another kind (00.TXT)", id="captions in .TXT"),
    pytest.param(half_a_download, "of another kind (10.png.part)", id="half a download"),
    pytest.param(table_of_hugging_face, "of another kind (metadata.csv)", id="metadata.csv"),
    pytest.param(link_to_itself, "1 broken link (10.png)", id="a link to itself"),
    pytest.param(
        partial(write_table_beside, captions=["a"] * 10),
        "of another kind (metadata.jsonl)",
        id="metadata.jsonl beside train and test",
    ),
    pytest.param(text_without_suffix, "of another kind (00)", id="captions without a suffix"),
    pytest.param(
        text_beside_a_table,
        "00.txt",
        id="a text beside metadata.jsonl",
    ),
    pytest.param(
        validation_beside_train_and_test,
        "val",
        id="a third split",
    ),
]


@pytest.mark.parametrize("add, says", LEFT_OUT)
def test_what_a_data_set_leaves_out_is_named(tmp_path, capsys, add, says):
    folder = pictures(tmp_path / "set", numbered(10))
    add(folder)
    for split in ("train", "test"):
        open_captioned(folder, split, "no_resize")
    named = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert says in "".join(named)


@pytest.mark.parametrize("name", ["a.JPE", "a.MPO", "a.Apng", "a.j2k", "a.ICB", "a.RGBA", "a.pnm"])
def test_suffixes_of_pictures_are_pillows_in_any_case(tmp_path, capsys, name):
    pictures(tmp_path / "set", [name])
    assert pictures_in(tmp_path / "set") == [name]
    assert capsys.readouterr().err == ""


def zipped(path: Path, names: list[str], labels: object = None, **texts: str) -> Path:
    """A zip of pictures of these names, with dataset.json and other texts."""
    file = io.BytesIO()
    noise(8, 8).save(file, format="PNG")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of a name that is written twice
        for name in names:
            archive.writestr(name, file.getvalue())
        for name, text in texts.items():
            archive.writestr(name.replace("_", "."), text)
        archive.writestr("dataset.json", json.dumps(dict(labels=labels)))
    return path


# Before: whatever ended in .png was a picture, and gaps among the labels were nothing.
ZIPS = [
    pytest.param("a.zip", numbered(10), dict(captions_txt="x"), "captions.txt", id="captions"),
    pytest.param("a.zip", [*numbered(10), "__MACOSX/._0.png"], {}, "1 entry", id="one of macOS"),
    pytest.param("a.zip", [*numbered(10), "x/.y.png"], {}, "1 hidden picture", id="a hidden one"),
    pytest.param(
        "a.zip",
        [*numbered(10), "03.png"],
        {},
        "03.png",
        id="a name that is there twice",
    ),
    pytest.param(
        "A.ZIP",
        numbered(10),
        {},
        "",
        id="a suffix in capitals",
    ),
]


@pytest.mark.parametrize("name, names, texts, says", ZIPS)
def test_a_zip_has_as_many_items_as_pictures(tmp_path, capsys, name, names, texts, says):
    path = zipped(tmp_path / name, names, **texts)
    sets = [open_captioned(path, split, "no_resize") for split in ("train", "test")]
    assert sum(map(len, sets)) == 10
    assert says in capsys.readouterr().err


# Before: nothing was said of captions that are empty.
EMPTY = [
    pytest.param([""] * 4 + ["x"] * 6, "4 of 10 captions are empty", id="no letter"),
    pytest.param([["", "x"]] + ["x"] * 9, None, id="one of several"),
    pytest.param(["  \n"] * 4 + ["x"] * 6, "4 of 10 captions", id="spaces"),
    pytest.param([["", ""]] + ["x"] * 9, "1 of 10 captions", id="a list of none"),
]


@pytest.mark.parametrize("captions, says", EMPTY)
def test_empty_captions_are_counted(tmp_path, capsys, captions, says):
    folder = pictures(tmp_path / "set", numbered(10))
    write_table(folder, captions)
    open_captioned(folder, "train", "no_resize")
    err = capsys.readouterr().err
    assert says in err if says else err == ""


# Before: captions that had no effect were nothing to speak of.
PROMPTS = [
    pytest.param('{"000.png": "a", "001.png": "b", "9.png": "c"}', "(9.png)", id="no picture"),
    pytest.param('{"000.png": "a", "001.png": "", "x": ""}', "1 of 2 captions", id="an empty one"),
    pytest.param(
        '{"000.png": "a", "000.png": "b", "001.png": "c"}',
        "000.png",
        id="two for one picture",
    ),
]


@pytest.mark.parametrize("text, says", PROMPTS)
def test_captions_of_pairs_without_an_effect_are_named(tmp_path, capsys, text, says):
    folder = make_pairs(tmp_path / "set", 2)
    (folder / "train_prompts.json").write_text(text)
    open_paired(folder, "train", "no_resize")
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("inside", [
    pytest.param(False, id="from another folder"),
    pytest.param(True, id="from inside"),
])
def test_a_check_adds_nothing_to_the_data_set(script, tmp_path, monkeypatch, inside):
    folder = pictures(tmp_path / "set", numbered(20))
    if inside:
        monkeypatch.chdir(folder)
    status, out, err = script(dataset_main, "check", "." if inside else folder)
    assert (status, "no problems" in out) == (0, True), err
    assert pictures_in(folder) == numbered(20)


# -------------------- 4. two inputs, one output

# Before: results of the same stem overwrote each other.
SHARED_STEMS = [
    pytest.param(["a.b.png", "a.b.jpg", "a.png"], id="dots in the stem"),
    pytest.param(["x.png", "x.png.png", "x.png.png.png"], id="a chain of suffixes"),
    pytest.param(["x.jpg", "x.jpeg", "x.jpg.jpeg", "x.jpeg.jpg"], id="each the stem of another"),
    pytest.param(["x.png", "x.jpg", "x.webp", "x.bmp", "x.gif"], id="five kinds"),
    pytest.param(["é.png", "e\u0301.png", "é.jpg"], id="two ways to write an accent"),
]


@pytest.mark.parametrize("names", SHARED_STEMS)
def test_as_many_results_as_pictures(tmp_path, names):
    pictures(tmp_path / "in", names)
    targets = sampling.pictures.plan_folder(tmp_path / "in", tmp_path / "out")
    assert len({path.name for path in targets}) == len(names)
    assert len(set(targets.values())) == len(names)
    assert all(target.suffix == ".png" for target in targets.values())


# Pictures that are read, and would be written over. Before: they were.
OUTPUTS = [
    pytest.param(["--checkpoint", "day2night", "--input", "out.png"], id="the input by default"),
    pytest.param(
        ["--checkpoint", "day2night", "--input", "out.png", "--output", "."],
        id="the input through its folder",
    ),
    pytest.param(
        ["a", "--input", "other.png", "--output", "../working folder/other.png"],
        id="the input by another path",
    ),
    pytest.param(
        ["a", "--controlnet", "c", "--control_image", "out.png"],
        id="the control picture",
    ),
    pytest.param(
        ["a", "--controlnet", "c", "--control_image", "out.png", "--input", "other.png"],
        id="the control picture of an edit",
    ),
]


@pytest.mark.parametrize("flags", OUTPUTS)
def test_no_picture_that_is_read_is_written_over(script, monkeypatch, flags):
    def load_nothing(*_, **__):
        pytest.fail("the output was accepted")

    monkeypatch.setattr(bases, "load_base", load_nothing)
    monkeypatch.setattr(checkpoints, "load_generator", load_nothing)
    for name in ("out.png", "other.png"):
        noise(16, 16).save(name)
    status, _, err = script(sample.main, *flags, "--device", "cpu")
    assert status == 2
    assert "would write over" in err


# -------------------- 5. transparency and depth

def png(depth: int, kind: int, row: bytes, transparent: tuple = (), interlaced: int = 0) -> bytes:
    """A PNG of one row, of eight bits of data or of whole pixels; `kind` 0 is grey, 2 colour."""
    width = max(len(row) * 8 // (depth * (3 if kind == 2 else 1)), 1)
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, interlaced)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    if transparent:
        data += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return data + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def tiff(bits: int, white_is_zero: bool, row: bytes, width: int) -> bytes:
    """A grey TIFF of one row, as microscopes and scanners write it."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero)}
    start = 8 + 2 + 12 * 9 + 4
    tags |= {273: start, 277: 1, 278: 1, 279: len(row)}
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(entries) + bytes(4) + row


def planar_tiff(values: list[tuple[int, int, int]]) -> bytes:
    """A 16-bit RGB TIFF of one row, with a plane for each colour, as microscopes write it."""
    width = len(values)
    start = 8 + 2 + 10 * 12 + 4
    tags = {256: (3, 1, width), 257: (3, 1, 1), 258: (3, 3, start), 259: (3, 1, 1), 262: (3, 1, 2)}
    plane = 2 * width
    first = start + 6 + 24
    tags |= {273: (4, 3, start + 6), 277: (3, 1, 3), 278: (3, 1, 1), 279: (4, 3, start + 18)}
    tags |= {284: (3, 1, 2)}
    entries = [struct.pack("<HHII", tag, *entry) for tag, entry in tags.items()]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)
    depths = struct.pack("<3H", 16, 16, 16)
    places = struct.pack("<6I", first, first + plane, first + 2 * plane, plane, plane, plane)
    planes = [struct.pack(f"<{width}H", *channel) for channel in zip(*values)]
    return head + depths + places + b"".join(planes)


def written(mode: str, pixels: list, format: str, **options) -> bytes:
    """A picture of one row, as Pillow writes it."""
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    file = io.BytesIO()
    picture.save(file, format=format, **options)
    return file.getvalue()


GREY, COLOUR = 0, 2
# Files, and the red of their pixels. Before: a 16-bit transparent level stayed black.
DEPTHS = [
    pytest.param(png(16, GREY, b"\x12\x34", (0x1234,), 1), [255], id="16 bits, interlaced"),
    pytest.param(png(8, COLOUR, b"\5\5\5\6\6\6", (5, 5, 5)), [255, 6], id="a colour of 8 bits"),
    pytest.param(png(8, COLOUR, b"\5\5\6", (5, 5, 5)), [5], id="a colour that is nearly it"),
    pytest.param(written("LA", [(0, 0), (0, 255)], "TIFF"), [255, 0], id="alpha in a TIFF"),
    pytest.param(
        written("RGBA", [(0, 0, 0, 0), (0, 0, 0, 255)], "WEBP", lossless=True, exact=True),
        [255, 0],
        id="alpha in a WebP",
    ),
    pytest.param(written("P", [0, 1], "GIF", transparency=0), [255, 0], id="a level of a GIF"),
    pytest.param(written("I;16", [0, 65535, 257], "TIFF"), [0, 255, 1], id="16 bits in a TIFF"),
    pytest.param(tiff(8, True, bytes([0, 255, 10]), 3), [255, 0, 245], id="8 bits of ink"),
    pytest.param(tiff(4, False, b"\xf0", 2), [255, 0], id="4 bits in a TIFF"),
    pytest.param(
        tiff(16, True, struct.pack("<3H", 0, 65535, 257), 3),
        [255, 0, 254],
        id="16 bits of ink",
    ),
    pytest.param(
        tiff(12, False, b"\xff\xf0\x00", 2),
        [255, 0],
        id="12 bits in a TIFF",
    ),
    pytest.param(
        planar_tiff([(0x1200, 0, 65535), (0xff00, 7, 0)]),
        [0x12, 0xff],
        id="planes of 16 bits",
    ),
    pytest.param(b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 512), [255, 128], id="10-bit PGM"),
    pytest.param(b"P5 2 1 15\n" + bytes([15, 7]), [255, 119], id="4-bit PGM"),
    pytest.param(b"P6 1 1 1023\n" + struct.pack(">3H", 1023, 0, 0), [255], id="10-bit PPM"),
]


@pytest.mark.parametrize("data, red", DEPTHS)
def test_transparency_is_white_and_every_depth_is_scaled(data, red):
    levels = np.asarray(open_picture(io.BytesIO(data), "picture"))
    assert levels[0, :, 0].tolist() == red


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16", "CMYK"])
def test_an_uncompressed_tiff_is_rotated_as_a_file_and_as_an_open_file(tmp_path, mode):
    levels = np.random.default_rng(0).integers(0, 256, (4, 7, 4), dtype=np.uint8)
    picture = Image.fromarray(levels, "RGBA").convert("RGB")
    if mode == "I;16":
        picture = Image.fromarray(levels[:, :, 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        picture = picture.convert(mode)
    path = tmp_path / "a.tif"
    picture.save(path)
    upright = np.asarray(open_picture(path))
    picture.save(path, tiffinfo={274: 6})
    rotated = np.asarray(open_picture(path))
    assert np.array_equal(rotated, np.rot90(upright, -1))
    assert np.array_equal(rotated, open_picture(io.BytesIO(path.read_bytes()), "a"))


# -------------------- 6. captions that are no text

# Captions of one picture in metadata.jsonl, and what is trained on, or why it is refused.
# Before: Python's spelling of null, lists and objects.
METADATA = [
    pytest.param('"null"', "null", None, id="the word null"),
    pytest.param('"[1, 2]"', "[1, 2]", None, id="a list in a text"),
    pytest.param('["x"]', "x", None, id="a list of one"),
    pytest.param('"\\u017c\\u00f3"', "żó", None, id="escaped letters"),
    pytest.param("1e400", None, "the caption is a number", id="infinity"),
    pytest.param("false", None, "the caption is true or false", id="false"),
    pytest.param('["x", 3]', None, "the list of captions holds a number", id="with a number"),
    pytest.param('["x", {}]', None, "the list of captions holds an object", id="with an object"),
    pytest.param('{"caption": "x"}', None, "the caption is an object", id="an object"),
]


@pytest.mark.parametrize("value, caption, reason", METADATA)
def test_captions_of_metadata_are_text(tmp_path, value, caption, reason):
    folder = pictures(tmp_path / "set", ["0.png"])
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": {value}}}')
    if reason:
        refused(open_captioned, folder, "train", "no_resize", match=reason)
    else:
        assert open_captioned(folder, "train", "no_resize").captions == [caption]


LABELS = [
    pytest.param([["00.png", 3]], ["class 3"], id="a number"),
    pytest.param([["00.png", -1]], ["class -1"], id="a negative number"),
    pytest.param([["00.png", None]], None, id="null"),
    pytest.param([["00.png", [0, 1]]], None, id="one-hot"),
    pytest.param([["00.png", "cat"]], None, id="a word"),
    pytest.param({"00.png": 3}, None, id="an object"),
    pytest.param([["00.png", 3.7]], None, id="a fraction"),
    pytest.param([["00.png", True]], None, id="true"),
]


@pytest.mark.parametrize("labels, captions", LABELS)
def test_labels_of_a_zip_are_whole_numbers(tmp_path, labels, captions):
    path = zipped(tmp_path / "set.zip", numbered(10), labels)
    if captions is None:
        refused(open_captioned, path, "train", "no_resize", match="set.zip cannot be used")
    else:
        assert open_captioned(path, "train", "no_resize").captions[:1] == captions


@pytest.mark.parametrize("value, reason", [
    ("null", "the caption of '0.png' is null"),
    ('["x"]', "the caption of '0.png' is a list"),
    ('{"en": "x"}', "the caption of '0.png' is an object"),
    ("true", "the caption of '0.png' is true or false"),
])
def test_captions_of_metrics_are_text(tmp_path, value, reason):
    path = tmp_path / "captions.json"
    path.write_text(f'{{"0.png": {value}}}')
    refused(evaluate.read_captions, path, [Path("0.png")], match=reason)


# -------------------- 7. text that is cut

# Texts, and the end that the 22 pieces of the tiny text encoder leave out. Before: not a word.
CUT = [
    pytest.param("\n\t " * 50, None, id="spaces alone"),
    pytest.param("a " * 22 + " \n ", None, id="spaces behind what just fits"),
    pytest.param("a " * 21 + "red-blue", "-blue", id="within a word with a hyphen"),
    pytest.param("a " * 22 + "e\u0301", "e\u0301", id="an accent by itself"),
    pytest.param("a," * 11 + " end", "end", id="commas count"),
    pytest.param("<|startoftext|>" * 22 + "end", "end", id="special tokens in the text"),
]


@pytest.mark.parametrize("text, end", CUT)
def test_the_end_without_effect_is_what_changes_no_id(capsys, text, end):
    tokenizer = load_tokenizer("tiny")
    assert sample.cut_off(tokenizer, text) == end
    sample.warn_of_cut_texts(tokenizer, text)
    said = capsys.readouterr().err
    assert (said == "") == (end is None)
    if end is not None:
        kept = text.removesuffix(end)
        assert tokenizer([kept]).tolist() == tokenizer([text]).tolist()
        assert count_tokens([text], tokenizer)[0][1] > tokenizer.limit


@pytest.mark.parametrize("captions, says", [
    (("a" * 30, "a b"), "1 of 2 captions are longer"),
    (["1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"] * 2, None),
    (["żółć " * 20, "a"], "1 of 2 captions are longer"),
    (["\ud800 " * 3], None),
])
def test_a_data_set_says_how_many_captions_are_cut(capsys, captions, says):
    tokenizer = load_tokenizer("tiny")
    with contextlib.suppress(ValueError):  # half a character, which is another matter
        report_cut("the set", captions, tokenizer)
    err = capsys.readouterr().err
    assert says in err if says else err == ""


# Captions of a data set, and those of a preview: both are cut. Before: neither was counted.
@pytest.mark.parametrize("flags, says", [
    pytest.param(["--dataset_folder"], "1 of 9 captions are longer", id="of the data set"),
    pytest.param(
        ["--validation_prompts", "red " * 30, "--dataset_folder"],
        "red red",
        id="of the preview",
    ),
])
def test_the_start_of_a_run_tells_of_captions_that_are_cut(
    monkeypatch, tmp_path, capsys, flags, says
):
    folder = pictures(tmp_path / "set", numbered(10))
    if "--validation_prompts" not in flags:
        (folder / "03.txt").write_text("red " * 30)

    def stop(*_):
        raise ValueError("the networks are built")

    monkeypatch.setattr(train_yoso, "choose_trained", stop)
    flags = [*flags, folder, "--device", "cpu", "--resolution", 16]
    flags += ["--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit):
        helpers.train(monkeypatch, train_yoso, *flags)
    assert says in capsys.readouterr().err


# -------------------- 8. steps that are lost

# Before: an error in validation cost all steps since the last save.
@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    KeyError("val_l2"),
    ZeroDivisionError(),
], ids=repr)
def test_whatever_ends_a_validation_the_steps_before_it_are_saved(error):
    saved = []
    with pytest.raises(type(error)), training.saved_on_failure(saved.append, 7):
        raise error
    assert saved == [7]


@pytest.fixture
def data(tmp_path) -> Path:
    """A data set that every trainer takes: six pairs, eight for the test."""
    folder = make_pairs(tmp_path / "data", 6, (32, 32))
    make_pairs(folder, 8, (32, 32), split="test")
    for side in "ab":
        (folder / f"fixed_prompt_{side}.txt").write_text(f"a picture of {side}")
    return folder


# Before: test pictures were first opened at the first validation.
@pytest.mark.parametrize("trainer", TRAINERS, ids=NAMES)
@pytest.mark.parametrize("name, count", [
    pytest.param("test_B/005.png", 1, id="of the preview alone"),
    pytest.param("test_A/007.png", 100, id="the last of the validation"),
    pytest.param("test_B/000.png", 1, id="the first"),
])
def test_a_broken_test_picture_is_found_before_the_first_step(
    monkeypatch, tmp_path, data, capsys, trainer, name, count
):
    cut(data / name)
    run = tmp_path / "run"
    flags = ["--dataset_folder", data, "--output_dir", run, "--validation_num_images", count]
    with pytest.raises(SystemExit) as end:
        helpers.train(monkeypatch, trainer, *flags, "--device", "cpu")
    assert end.value.code == 2
    assert f"{data / name} is not a readable picture" in capsys.readouterr().err
    assert not run.exists()


def test_a_broken_training_picture_costs_no_step(monkeypatch, tmp_path, data):
    run = tmp_path / "run"
    flags = ["--dataset_folder", data, "--output_dir", run, "--device", "cpu", "--lambda_gan", 0]
    flags += ["--resolution", 24, "--train_batch_size", 1, "--max_train_steps", 6]
    order = batches(open_paired(data, "train", "resize_24"), 1, seed=42)
    names = [next(order)["name"][0] for _ in range(4)]
    cut(data / "train_A" / names[3])
    with pytest.raises(SystemExit):
        helpers.train(monkeypatch, train_pix2pix_turbo, *flags)
    assert (run / "log.jsonl").read_text().count("\n") == 3
    assert helpers.read_state(run)["step"] == 3


# -------------------- 9. what a check finds

def null_caption(data: Path) -> Path:
    (data / "train_prompts.json").write_text('{"000.png": null}')
    return data


def caption_missing_in_the_test(data: Path) -> Path:
    (data / "test_prompts.json").write_text('{"000.png": "x"}')
    return data


def pointer_for_a_prompt(data: Path) -> Path:
    for path in data.glob("*_prompts.json"):
        path.unlink()
    (data / "fixed_prompt_b.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    return data


def blank_lines(data: Path) -> Path:
    (data / "captions.txt").write_text("\n  \n\t\n" * 20)
    return data / "captions.txt"


def damaged_entry(data: Path) -> Path:
    path = zipped(data / "set.zip", numbered(20))
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT", len(content) // 2)
    content[start + 8] ^= 255
    path.write_bytes(content)
    return path


def empty_test_folder(data: Path) -> Path:
    folder = pictures(data / "pictures" / "train", numbered(10)).parent
    (folder / "test").mkdir()
    return folder


def half_a_character(data: Path) -> Path:
    folder = pictures(data / "pictures", numbered(20))
    write_table(folder, ["\ud83d"] * 20)
    return folder


# Sets that a trainer refuses. Before: "no problems".
PROBLEMS = [
    pytest.param(null_caption, "pix2pix", "the caption of '000.png' is null", id="null"),
    pytest.param(caption_missing_in_the_test, "pix2pix", "no caption for '001.png'", id="a gap"),
    pytest.param(pointer_for_a_prompt, "cyclegan", "a pointer of Git LFS", id="a pointer"),
    pytest.param(blank_lines, "yoso", "holds 0 pictures or captions", id="blank lines"),
    pytest.param(damaged_entry, "yoso", "Bad CRC-32", id="a damaged entry of a zip"),
    pytest.param(empty_test_folder, "yoso", "test holds no picture", id="an empty test folder"),
    pytest.param(
        half_a_character,
        "yoso",
        "half a character",
        id="half a character",
    ),
]


@pytest.mark.parametrize("spoil, trainer, says", PROBLEMS)
def test_a_check_finds_what_a_trainer_refuses(script, data, spoil, trainer, says):
    source = spoil(data)
    status, out, _ = script(dataset_main, "check", source, "--for", trainer)
    found = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert status == 2
    assert says in "".join(found)


# -------------------- 10. what a resumed run may change

@pytest.fixture
def begun(tmp_path, data) -> Path:
    """The folder of a run that was begun."""
    run = tmp_path / "run"
    run.mkdir()
    cfg = train_pix2pix_turbo.Config(dataset_folder=str(data), output_dir=str(run), resolution=32)
    training.folders.write_settings(run, cfg)
    return run


def resumed(run: Path, *flags: object) -> train_pix2pix_turbo.Config:
    trainer = train_pix2pix_turbo
    argv = ["--resume", str(run), *map(str, flags)]
    return training.parse(trainer.Config, trainer.TABLES, trainer.ALIASES, "", argv)


# Before: all but the number of steps was refused.
MAY_CHANGE = [
    pytest.param(["--eval_freq", 7], dict(validation_steps=7), id="by another name"),
    pytest.param(["--num_training_epochs", 3], dict(max_train_epochs=3), id="epochs"),
    pytest.param(["--gradient_checkpointing"], dict(gradient_checkpointing=True), id="a switch"),
    pytest.param(["--report_to", "tensorboard"], dict(report_to="tensorboard"), id="reports"),
    pytest.param(["--learning_rate", 5e-6], dict(learning_rate=5e-6), id="the same value"),
    pytest.param(["--device", "cpu"], dict(device="cpu"), id="the device"),
    pytest.param(
        ["--base", "/elsewhere/tiny-turbo"],
        dict(base="/elsewhere/tiny-turbo"),
        id="a base that has moved",
    ),
]


@pytest.mark.parametrize("flags, settings", MAY_CHANGE)
def test_what_changes_no_mathematics_may_change(begun, flags, settings):
    cfg = resumed(begun, *flags)
    assert {name: getattr(cfg, name) for name in settings} == settings


@pytest.mark.parametrize("flags", [
    ["--seed", 43],
    ["--lambda_l2", 2],
    ["--resolution", 64],
    ["--train", "all"],
    ["--test_image_prep", "resize_32"],
    ["--pretrained_model_name_or_path", "tiny"],
], ids=str)
def test_what_changes_the_mathematics_is_refused(begun, flags):
    with pytest.raises(ValueError, match="differs from the .* began with"):
        resumed(begun, *flags)


@pytest.mark.parametrize("setting", [
    pytest.param("dataset_folder", id="the data set"),
    pytest.param("base", id="the base"),
    pytest.param("init", id="a checkpoint"),
])
def test_relative_paths_hold_from_another_folder(monkeypatch, tmp_path, begun, setting):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    cfg = train_pix2pix_turbo.Config(output_dir=str(begun), **{setting: "models/mine"})
    training.folders.write_settings(begun, cfg)
    assert helpers.read_settings(begun)[setting] == str(tmp_path / "models" / "mine")


def by_a_link(data: Path) -> Path:
    link = data.with_name("link")
    link.symlink_to(data)
    return link


def by_a_detour(data: Path) -> Path:
    return data / "train_A" / ".."


def touched(data: Path) -> Path:
    for path in data.rglob("*.png"):
        os.utime(path, (0, 0))
    return data


def with_clutter(data: Path) -> Path:
    (data / "train_A" / "._000.png").write_bytes(b"x")
    (data / "train_B" / "desktop.ini").write_bytes(b"x")
    return data


def without_a_picture(data: Path) -> Path:
    (data / "train_B" / "005.png").unlink()
    return data


def with_a_prompt_longer(data: Path) -> Path:
    (data / "fixed_prompt_a.txt").write_text("another picture of a")
    return data


def with_two_names_exchanged(data: Path) -> Path:
    """Of files of two sizes."""
    with (data / "train_A" / "000.png").open("ab") as file:
        file.write(b"\0")
    return data


@pytest.mark.parametrize("change, same", [
    (by_a_link, True),
    (by_a_detour, True),
    (touched, True),
    (with_clutter, True),
    (without_a_picture, False),
    (with_a_prompt_longer, False),
    (with_two_names_exchanged, False),
])
def test_data_that_has_moved_is_known_by_its_names_and_sizes(data, change, same):
    before = data_fingerprint(str(data))
    assert (data_fingerprint(str(change(data))) == before) == same


# -------------------- 11. equal bytes

TENSORS = {"b": torch.arange(6.0), "a": torch.ones(2, 3), "c": torch.ones(2).half()}


def metadata_in_another_order(path: Path, again: bool) -> None:
    names = [f"key{i}" for i in range(20)]
    names = reversed(names) if again else names
    save_tensors(path / "a.safetensors", TENSORS, dict.fromkeys(names, "żółć"))


def tensors_in_another_order(path: Path, again: bool) -> None:
    tensors = dict(reversed(TENSORS.items())) if again else TENSORS
    save_tensors(path / "a.safetensors", tensors, {})


def tensors_of_another_layout(path: Path, again: bool) -> None:
    tensor = normal(4, 3, 2, 2)
    if again:
        tensor = tensor.to(memory_format=torch.channels_last)
    save_tensors(path / "a.safetensors", {"a": tensor}, {})


def whole_base(path: Path, again: bool) -> None:
    bases.save_folder(path, load_base("tiny", seed=3))


def cache(path: Path, again: bool) -> None:
    source = path.parent / "pictures"
    if not source.exists():
        pictures(source, numbered(10))
    write_cache(**cache_settings(source, path))


def drawing(path: Path, again: bool) -> None:
    facts = dict(dtype="float32", prompt="żółć")
    sampling.pictures.save(normal(3, 16, 16).tanh(), path / "a.png", facts)


def state_of_another_process(path: Path, again: bool) -> None:
    training.save_state(path / "state.pt", dict(step=1, base="0", weights=torch.ones(3)))


# Before: the metadata came in another order each time.
@pytest.mark.parametrize("write", [
    metadata_in_another_order,
    tensors_in_another_order,
    tensors_of_another_layout,
    whole_base,
    cache,
    drawing,
    pytest.param(
        state_of_another_process,
    ),
])
def test_the_same_is_written_in_the_same_bytes(monkeypatch, tmp_path, write):
    written = []
    for again in (False, True):
        folder = tmp_path / f"run {again}"
        folder.mkdir()
        monkeypatch.setattr(os, "getpid", lambda again=again: 10_000 + again)
        write(folder, again)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert written[0]
    assert written[0] == written[1]


# -------------------- 12. pairs that a metric cannot take

# Sizes of pairs, the metric, and how many it is computed for. Before: no figure at all.
SMALL_PAIRS = [
    pytest.param([(24, 24), (24, 10), (24, 24)], "ssim", 2, id="10 pixels high"),
    pytest.param([(1, 1), (24, 24)], "ssim", 1, id="one pixel"),
    pytest.param([(300, 11), (300, 10), (10, 300)], "ssim", 1, id="strips"),
    pytest.param([(24, 24), (15, 40), (1, 1)], "lpips", 1, id="a strip and a pixel for LPIPS"),
    pytest.param([(10, 10), (3, 3)], "ssim", 0, id="none is large enough"),
]


def pair_folders(folder: Path, sizes: list[tuple[int, int]]) -> list:
    """Flags that name two folders of pairs with these sizes."""
    for seed, side in enumerate(("real", "fake")):
        (folder / side).mkdir()
        for i, (width, height) in enumerate(sizes):
            noise(height, width, seed + 2 * i).save(folder / side / f"{i}.png")
    return ["--real", folder / "real", "--fake", folder / "fake", "--device", "cpu", "--json"]


@pytest.mark.parametrize("sizes, metric, count", SMALL_PAIRS)
def test_all_other_pairs_have_a_figure(
    script, tmp_path, metric_networks, sizes, metric, count
):
    flags = pair_folders(tmp_path, sizes)
    status, out, err = script(evaluate.main, *flags, "--metrics", f"psnr,{metric}")
    assert status == 2
    results = json.loads(out)["metrics"]
    assert results["psnr"]["n"] == dict(pairs=len(sizes))
    assert (metric in results) == (count > 0)
    if count:
        assert results[metric]["n"] == dict(pairs=count)
    assert f"not computed for {len(sizes) - count} of {len(sizes)}" in err


def test_a_pair_of_two_sizes_is_named_and_the_others_have_a_figure(script, tmp_path):
    flags = pair_folders(tmp_path, [(24, 24)] * 3)
    noise(24, 25).save(tmp_path / "fake" / "1.png")
    status, out, err = script(evaluate.main, *flags, "--metrics", "psnr")
    assert status == 2
    assert "1.png is 24x24 pixels" in err
    assert json.loads(out)["metrics"]["psnr"]["n"] == dict(pairs=2)


# -------------------- 13. the strength of an adapter

def as_it_is(folder: Path) -> Path:
    return folder


def the_file_itself(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def as_bin(folder: Path) -> Path:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def renamed(folder: Path) -> Path:
    return (folder / "adapter_model.safetensors").rename(folder / "watercolour.safetensors")


def in_a_folder_of_the_adapters_name(folder: Path) -> Path:
    """As peft saves an adapter that is not called "default"."""
    return Path(shutil.move(folder, folder.parent / "named" / "style")).parent


PEFT = dict(r=4, lora_alpha=16)
# Before: alpha was taken to be the rank, so that the change was four times too weak.
STRENGTHS = [
    pytest.param(dict(r=1, lora_alpha=0.5), as_it_is, id="a fraction"),
    pytest.param(dict(r=3, lora_alpha=-2), the_file_itself, id="negative"),
    pytest.param(dict(r=9, lora_alpha=2, use_rslora=True), as_bin, id="rsLoRA in a .bin"),
    pytest.param(
        # peft saves the patterns in the order of the alphabet.
        PEFT | dict(alpha_pattern={"attn1.to_q": 1, "to_q": 32}),
        as_it_is,
        id="the first pattern that fits",
    ),
    pytest.param(
        PEFT | dict(use_dora=True, alpha_pattern={"to_q": 1}, rank_pattern={"to_q": 2}),
        the_file_itself,
        id="DoRA with patterns",
    ),
    pytest.param(
        PEFT,
        renamed,
        id="another name beside adapter_config.json",
    ),
    pytest.param(
        PEFT,
        in_a_folder_of_the_adapters_name,
        id="the folder above",
    ),
]


@pytest.mark.parametrize("options, place", STRENGTHS)
def test_an_adapter_is_as_strong_as_in_peft(tmp_path, options, place):
    peer = loras.save_peft(tmp_path / "adapter", **options)
    path = place(tmp_path / "adapter")
    (tmp_path / "named").mkdir(exist_ok=True)
    base = loras.our_base()
    load_lora(str(path), base)
    assert loras.unet_difference(base, peer) < 1e-9


@pytest.mark.parametrize("name", [
    pytest.param("adapter_model.safetensors", id="peft's name"),
    pytest.param("cat.safetensors", id="its own name"),
])
def test_an_adapter_of_peft_without_its_configuration_says_so(tmp_path, capsys, name):
    loras.save_peft(tmp_path / "adapter", **PEFT)
    shutil.move(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / name)
    load_lora(str(tmp_path / name), loras.our_base())
    assert "there is no adapter_config.json beside it" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    pytest.param(dict(lora_alpha="16"), id="a word"),
    pytest.param(dict(alpha_pattern={"to_q": "16"}), id="a word in a pattern"),
    pytest.param(dict(alpha_pattern={"(": 16}), id="no pattern"),
    pytest.param(dict(lora_alpha=float("nan")), id="NaN"),
    pytest.param(dict(lora_alpha=float("inf")), id="infinity"),
])
def test_a_strength_that_is_no_number_is_refused(tmp_path, changes):
    loras.save_peft(tmp_path, **PEFT)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert str(tmp_path) in refusal(lambda: load_lora(str(tmp_path), loras.our_base()))


# -------------------- 14. adapters applied in part

Q = loras.Q
KOHYA_Q = loras.KOHYA_Q
# A key beside a pair that fits, and what it must be called. Before: it was left out.
KEYS = [
    pytest.param("lora_te3_encoder_block_0_layer_0.lora_up.weight", "Stable Diffusion 3", id="T5"),
    pytest.param("transformer.transformer_blocks.0.img_mod.1.lora_A.weight", "Qwen", id="Qwen"),
    pytest.param("lora_prior_unet_x.lora_up.weight", "Stable Cascade", id="Cascade"),
    pytest.param("diffusion_model.context_refiner.0.x.lora_A.weight", "Lumina", id="Lumina"),
    pytest.param("unet.add_embedding.linear_1.lora_A.weight", "SDXL", id="sizes of SDXL"),
    pytest.param("lora_unet_label_emb_0_0.lora_down.weight", "SDXL", id="sizes in kohya's names"),
    pytest.param(f"{KOHYA_Q}.lora_up.bias", "LoRA with a bias", id="a bias"),
    pytest.param("lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w2", "LoKr", id="LoKr"),
    pytest.param(f"base_model.model.{Q}.lora_embedding_A", "an embedding", id="of an embedding"),
    pytest.param("base_model.model.modules_to_save.conv_in.weight", "modules_to_save", id="saved"),
    pytest.param(
        f"{KOHYA_Q}.scalar",
        "LyCORIS",
        id="a trained scalar",
    ),
    pytest.param(
        "lora_te2_text_projection.lora_up.weight",
        "SDXL",
        id="the projection of SDXL's second text encoder",
    ),
]


def pair(**changes: object) -> dict:
    tensors = {"A": normal(2, 8), "B": normal(8, 2)} | changes
    return {f"unet.{Q}.lora_{matrix}.weight": tensor for matrix, tensor in tensors.items()}


@pytest.mark.parametrize("key, says", KEYS)
def test_an_adapter_that_would_apply_in_part_is_refused_by_name(key, says):
    with pytest.raises(ValueError) as refused_one:
        read_lora(pair() | {key: normal(2, 8)}, None, loras.our_networks())
    assert says in str(refused_one.value)
    assert key in str(refused_one.value)


# What stands for a matrix. Before: integers were numbers like others.
@pytest.mark.parametrize("tensor", [
    pytest.param(normal(8, 2).to(torch.complex64), id="complex numbers"),
    pytest.param(normal(8, 2) > 0, id="true and false"),
    pytest.param(torch.ones(8, 2, dtype=torch.uint8), id="4-bit numbers, two a byte"),
    pytest.param([[1.0, 2.0]] * 8, id="a list"),
    pytest.param(normal(8, 2).index_fill(0, torch.tensor(3), torch.inf), id="infinity"),
    pytest.param(normal(2), id="a row"),
    pytest.param(normal(8, 0), id="no column"),
])
def test_a_matrix_of_anything_but_numbers_is_refused(tensor):
    with pytest.raises(ValueError, match="lora_B.weight (is|holds)"):
        read_lora(pair(B=tensor), None, loras.our_networks())


# -------------------- 15. networks that do not fit

def text_encoder_of_length(length: int) -> Callable:
    def change(folder: Path) -> None:
        config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
        config.max_position_embeddings = length
        shutil.rmtree(folder / "text_encoder")
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")

    return change


# Another network in a base. Before: a traceback at the first step.
MISFITS = [
    pytest.param(damages.unet_like(in_channels=12), "12 input channels", id="12 channels"),
    pytest.param(damages.unet_like(in_channels=1, out_channels=1), "expected 1", id="grey latents"),
    pytest.param(damages.unet_like(in_channels=3), "3 input channels", id="pixels in"),
    pytest.param(damages.vae_like(latent_channels=8), "latents have 8 channels", id="8 latents"),
    pytest.param(damages.text_encoder_of_width(48), "width of 48; expected 32", id="a wider text"),
    pytest.param(text_encoder_of_length(16), "no more than a length of 16", id="a shorter text"),
]


@pytest.mark.parametrize("change, says", MISFITS)
def test_a_base_of_parts_of_two_models_is_refused(folder, change, says):
    change(folder)
    assert says in refusal(lambda: load_base(str(folder)))


@pytest.mark.parametrize("trainer", TRAINERS, ids=NAMES)
@pytest.mark.parametrize("change, says", MISFITS[:1] + MISFITS[3:5])
def test_trainers_refuse_it_too_before_they_write(
    monkeypatch, folder, tmp_path, capsys, trainer, change, says
):
    change(folder)
    drawings = "drawn:day2night" if trainer is train_cyclegan_turbo else "drawn:scenes"
    flags = ["--base", folder, "--dataset_folder", drawings, "--resolution", 16]
    flags += ["--output_dir", tmp_path / "run", "--device", "cpu", "--lambda_gan", 0]
    with pytest.raises(SystemExit) as end:
        helpers.train(monkeypatch, trainer, *flags)
    lines = helpers.error_lines(capsys.readouterr().err)
    assert end.value.code == 2
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sizes, says", [
    (dict(block_out_channels=(16, 48)), "block_out_channels is (16, 48); expected (16, 32)"),
    (dict(layers_per_block=2), "layers_per_block is 2; expected 1"),
    (dict(conditioning_channels=1), "conditioning_channels is 1; expected 3"),
])
def test_a_controlnet_of_another_base_is_refused(saved, tmp_path, sizes, says):
    own = ("block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
    control = {key: UNET[key] for key in (*own, "attention_head_dim", "down_block_types")}
    diffusers.ControlNetModel(**(control | sizes)).save_pretrained(tmp_path)
    unet = load_base(str(saved), ("unet",)).unet
    assert says in refusal(lambda: bases.load_controlnet(str(tmp_path), unet))


# -------------------- 16. the original conv_in of a file

@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official stochastic generator, whose original `conv_in` is not its base's."""
    official = Official(tmp_path_factory.mktemp("official"), stochastic=True)
    for i, p in enumerate(official.unet.conv_in.conv_in_pretrained.parameters()):
        p.data = draw(p, seed=40 + i)
    official.save()
    return official


def load_official(official, path: Path, r: float, **options) -> Pix2PixTurbo:
    return checkpoints.load_generator(str(path), str(official.base), r=r, **options).generator


def saved_anew(official, folder: Path) -> Path:
    """Our own checkpoint of the official file."""
    generator = load_official(official, official.pkl, 1.0, merged=False)
    names = generator.named_parameters()
    for name, p in names:
        p.requires_grad_(".lora_" in name or "skip_conv" in name or name.startswith("unet.conv_in"))
    path = folder / "model.safetensors"
    checkpoints.save_generator(path, generator, "pix2pix_turbo", str(official.base), [])
    return path


def keys_in_another_order(official, folder: Path) -> Path:
    contents = official.contents()
    contents["state_dict_unet"] = dict(reversed(contents["state_dict_unet"].items()))
    torch.save(contents, folder / "model.pkl")
    return folder / "model.pkl"


def unchanged(official, folder: Path) -> Path:
    return official.pkl


# Before: the base's own conv_in was taken, and the picture was another one for r below 1.
@torch.no_grad()
@pytest.mark.parametrize("store, r", [
    (unchanged, 0.1),
    (unchanged, 0.75),
    (keys_in_another_order, 0.6),
    (saved_anew, 0.6),
])
def test_the_original_conv_in_comes_from_the_file(official, tmp_path, store, r):
    x = normal(1, 3, 16, 16).sigmoid()
    context = normal(1, 7, UNET["cross_attention_dim"], seed=1)
    eps = normal(1, 4, 2, 2, seed=2)
    path = store(official, tmp_path)
    expected = official(x, context, r, eps)
    for merged in (False, True):
        generator = load_official(official, path, r, merged=merged, dtype=torch.float64)
        # Our own checkpoint went through no rounding either: all is float64.
        assert relative(generator(x, context, r, eps), expected) < 1e-9


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_half_an_original_conv_in_is_refused(official, tmp_path, name):
    contents = official.contents()
    del contents["state_dict_unet"][f"conv_in.conv_in_pretrained.{name}"]
    torch.save(contents, tmp_path / "model.pkl")
    with pytest.raises(ValueError, match=f"conv_in.*{name}"):
        load_official(official, tmp_path / "model.pkl", 0.4)


# -------------------- 17. added tokens

# Words of embeddings, as people choose them. Before: they were spelled letter by letter.
WORDS = ["EasyNegative", "<Cat-Toy>", "ŻÓŁW", "my cat", "100%", "e\u0301x", "<日本>", "a.b"]


def embedding(folder: Path, word: str, count: int) -> Path:
    save_file({word: normal(count, 32, dtype=torch.float32)}, folder / "word.safetensors")
    return folder / "word.safetensors"


@pytest.mark.parametrize("word", WORDS)
def test_an_added_word_has_the_peers_ids_wherever_it_stands(saved, tmp_path, word):
    base = load_base(str(saved), ("text_encoder", "tokenizer"))
    embeddings.add_embedding(str(embedding(tmp_path, word, 1)), base)
    peer = StableDiffusionPipeline.from_pretrained(saved, unet=None, vae=None)
    peer.load_textual_inversion(tmp_path, weight_name="word.safetensors")
    for text in (word, f"a {word}, b", word.lower(), word.upper(), word * 2, f"x{word}y"):
        theirs = peer.tokenizer(text, padding="max_length", truncation=True).input_ids
        assert base.tokenizer([text])[0].tolist() == theirs


@pytest.mark.parametrize("word", WORDS)
def test_all_vectors_of_a_word_stand_in_its_place_in_any_case(saved, tmp_path, word):
    base = load_base(str(saved), ("text_encoder", "tokenizer"))
    first = base.text_encoder.config.vocab_size
    embeddings.add_embedding(str(embedding(tmp_path, word, 3)), base)
    for text in (f"a {word} b", f"a {word.lower()} b", f"A {word.upper()} B"):
        ids = base.tokenizer([text])[0].tolist()
        assert ids[2:5] == [first, first + 1, first + 2]
        assert ids[1] == base.tokenizer(["a"])[0, 1]
        assert ids[5] == base.tokenizer(["b"])[0, 1]


# Files beside the vocabulary, and a text with the word that they add.
@pytest.mark.parametrize("token", [
    dict(content="<New>", normalized=True),
    dict(content="<New>", normalized=False),
    dict(content="<new>", special=True, rstrip=True),
])
def test_words_of_a_saved_pipeline_have_the_peers_ids(saved, tmp_path, token):
    tokenizer_folder(tmp_path, dict(added_tokens_decoder={"979": token}), None)
    (tmp_path / "model_index.json").write_text("{}")
    peer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours = load_tokenizer(str(tmp_path))
    for text in ("a <New> b", "a <new> b", "<NEW>", "<new>  x<new>"):
        theirs = peer(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours([text])[0].tolist() == theirs


# -------------------- 18. settings of schedulers

SD = schedules.SD
COSINE = dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000)
SHORTER = SD | dict(num_train_timesteps=500)
# Samplers and settings. Before: what a setting or its absence means to the class was ignored.
PATHS = [
    pytest.param("ddim", SHORTER | dict(timestep_spacing="leading"), 10, id="500 timesteps"),
    pytest.param("ddim", SD | dict(steps_offset=2, set_alpha_to_one=False), 8, id="an offset of 2"),
    pytest.param("euler", SHORTER, 7, id="Euler's spacing of 500 timesteps"),
    pytest.param(
        "euler",
        SHORTER | dict(use_karras_sigmas=True, timestep_spacing="leading", steps_offset=1),
        5,
        id="Karras's sigmas below an offset",
    ),
    pytest.param("dpm", SHORTER | dict(prediction_type="v_prediction"), 6, id="DPM-Solver on v"),
    pytest.param("dpm", dict(num_train_timesteps=800), 9, id="DPM-Solver's own betas"),
    pytest.param("euler", COSINE, 7, id="Euler on cosines"),
    pytest.param("dpm", COSINE, 7, id="DPM-Solver on cosines"),
    pytest.param(
        "dpm",
        COSINE | dict(timestep_spacing="trailing"),
        4,
        id="trailing cosines",
    ),
]


@pytest.mark.parametrize("sampler, settings, steps", PATHS)
def test_a_sampler_goes_the_way_of_its_class(sampler, settings, steps):
    name = schedulers.OWN_CLASS[sampler]
    if sampler == "ddim":
        settings = settings | dict(clip_sample=False)
    peer = getattr(diffusers, name)(**settings)
    peer.set_timesteps(steps)
    eps = normal(1, 4, 5, 6)
    sampled = schedules.sampled_by_euler if sampler == "euler" else schedules.sampled_by
    ours = schedules.sampled_by_ours(settings | dict(_class_name=name), eps, steps)
    # The peer's tables are in float32.
    assert relative(ours, sampled(peer, eps).double()) < 1e-3


REFUSED_SETTINGS = [
    pytest.param(dict(_class_name="UniPCMultistepScheduler", solver_order=3), "solver_order is 3"),
    pytest.param(dict(_class_name="DEISMultistepScheduler", solver_order=1), "solver_order is 1"),
    pytest.param(
        dict(_class_name="HeunDiscreteScheduler", use_beta_sigmas=True), "use_beta_sigmas is True"
    ),
    pytest.param(
        dict(_class_name="DPMSolverSinglestepScheduler", thresholding=True), "thresholding is True"
    ),
    pytest.param(dict(_class_name="DPMSolverMultistepInverseScheduler"), "not supported"),
    pytest.param(dict(_class_name="IPNDMScheduler"), "not supported"),
    pytest.param(dict(_class_name="CogVideoXDDIMScheduler"), "not supported"),
    pytest.param(dict(_class_name="FlowMatchHeunDiscreteScheduler"), "flow matching"),
    pytest.param(dict(prediction_type="flow_prediction"), "'flow_prediction'"),
    pytest.param(dict(beta_schedule="laplace"), "'laplace'"),
    pytest.param(dict(beta_schedule="exp"), "'exp'"),
]


@pytest.mark.parametrize("settings, says", REFUSED_SETTINGS)
def test_what_is_not_built_is_refused_by_name(settings, says):
    with pytest.raises(ValueError) as refused_one:
        schedule = diffusion.Schedule.from_config(SD | settings)
        diffusion.for_sampler(schedule, diffusion.sampler_of(schedule), 10)
    assert says in str(refused_one.value)


@pytest.mark.parametrize("name, sampler", [
    ("UniPCMultistepScheduler", "dpm"),
    ("KDPM2AncestralDiscreteScheduler", "euler"),
    ("DDPMParallelScheduler", "ddim"),
    ("DPMSolverSDEScheduler", "dpm"),
    ("SASolverScheduler", "dpm"),
])
def test_a_sampler_that_stands_in_is_named(folder, capsys, name, sampler):
    damages.scheduler(name, **damages.SCHEDULE)(folder)
    base = load_base(str(folder), ("schedule",))
    options = sample.Options(prompt="a", steps=10)
    assert sample.choose_sampler(options, base) == sampler
    assert f"{name}, is not implemented; the sampler {sampler} stands in" in capsys.readouterr().err


# -------------------- 19. tracebacks from small inputs

# Before: IndexError, ZeroDivisionError or TypeError.
SMALL_SCHEDULES = [
    pytest.param(dict(num_train_timesteps=2), 1, id="one step of two"),
    pytest.param(dict(num_train_timesteps=2), 2, id="two steps of two"),
    pytest.param(dict(num_train_timesteps=3, use_karras_sigmas=True), 2, id="Karras's of three"),
    pytest.param(dict(num_train_timesteps=7), 7, id="as many steps as timesteps"),
    pytest.param(dict(num_train_timesteps=7, timestep_spacing="trailing"), 7, id="trailing"),
    pytest.param(dict(num_train_timesteps=10, steps_offset=1), 10, id="one too far"),
    pytest.param(dict(num_train_timesteps=10), 11, id="more steps than timesteps"),
    pytest.param(dict(num_train_timesteps=100_000), 3, id="the most timesteps"),
    pytest.param(dict(beta_end=0.5), 10, id="alphas near 0"),
    pytest.param(dict(rescale_betas_zero_snr=True, num_train_timesteps=2), 2, id="ends in noise"),
]


@pytest.mark.parametrize("sampler", schedulers.OWN_CLASS)
@pytest.mark.parametrize("settings, steps", SMALL_SCHEDULES)
def test_small_schedules_sample_or_are_refused(sampler, settings, steps):
    settings = SD | settings | dict(_class_name=schedulers.OWN_CLASS[sampler])
    settings["original_inference_steps"] = min(50, settings["num_train_timesteps"])
    try:
        schedule = diffusion.Schedule.from_config(settings)
        schedule = diffusion.for_sampler(schedule, sampler, steps)
        ts = sample.SAMPLERS[sampler](schedule, steps)
    except ValueError as error:
        assert "expected" in str(error) or "takes 1 to" in str(error)
        return
    x = diffusion.start(normal(1, 4, 2, 2), ts[0], schedule)
    made = diffusion.denoise(sampler, schedules.smooth, x, ts, schedule, lambda: x)
    assert made.shape == x.shape


# Entries of configuration files that are null, or nothing. Before: a TypeError at the first use.
NULLS = [
    pytest.param(damages.model_index(vae=[None, None]), None, id="no VAE in the index"),
    pytest.param(damages.model_index(safety_checker=None), None, id="no safety checker"),
    pytest.param(damages.model_index(scheduler=["diffusers", None]), None, id="no class"),
    pytest.param(damages.config("unet", in_channels=None), "in_channels is None", id="channels"),
    pytest.param(damages.config("unet", down_block_types=[]), "0 down blocks", id="no blocks"),
    pytest.param(damages.config("vae", scaling_factor=None), "scaling_factor is None", id="scale"),
    pytest.param(
        damages.config("text_encoder", layer_norm_eps=None), "layer_norm_eps is None", id="epsilon"
    ),
    pytest.param(
        damages.config("scheduler", prediction_type=None),
        "prediction_type is None",
        id="prediction",
    ),
    pytest.param(
        damages.model_index(transformer=[None, None]),
        None,
        id="no transformer",
    ),
    pytest.param(
        damages.config("vae", scaling_factor=0),
        "scaling_factor is 0",
        id="a scaling of 0",
    ),
]


@pytest.mark.parametrize("change, says", NULLS)
def test_null_in_a_base_is_read_or_refused_by_name(folder, change, says):
    change(folder)
    if says is None:
        assert load_base(str(folder), bases.parts_of(str(folder))).unet is not None
    else:
        assert says in refusal(lambda: load_base(str(folder)))


# -------------------- 20. words

# First bytes, and what the message must call the file. Before: "damaged: copy it again".
FIRST_BYTES = [
    pytest.param(b"\xef\xbb\xbf\r\n<!doctype HTML>", "a web page", id="a page with a mark"),
    pytest.param(b"version https://git-lfs.github.com/spec/v1\r\n", "Git LFS", id="Windows"),
    pytest.param(b"RIFF\x10\0\0\0AVI LIST", "a video", id="AVI"),
    pytest.param(b"\0\0\0\x20ftypqt  ", "a video", id="QuickTime"),
    pytest.param(b"PK\3\4\x14\0\6\0word/document.xml", "an archive (zip)", id="a document"),
    pytest.param(b"MM\0*\0\0\0\x08", "a TIFF picture", id="TIFF of the other byte order"),
    pytest.param(b"\n{'error': 'Not Found'}", "text, which begins with", id="an answer"),
    pytest.param(b"\x93NUMPY\1\0v\0{'descr'", "NumPy", id="an array"),
    pytest.param(b"BZh91AY&SY", "an archive", id="bzip2"),
    pytest.param(b"\xfd7zXZ\0\0\4", "an archive", id="xz"),
    pytest.param(b"\x28\xb5\x2f\xfd\4\0", "an archive", id="zstd"),
    pytest.param(b"BM\x36\0\0\0\0\0\0\0\x36", "a BMP picture", id="BMP"),
    pytest.param(b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture", id="JPEG 2000"),
]


@pytest.mark.parametrize("content, says", FIRST_BYTES)
def test_a_file_of_another_kind_is_named(tmp_path, content, says):
    path = tmp_path / "lora.pt"
    path.write_bytes(content)
    message = refusal(lambda: read_tensors(path, "a LoRA"))
    assert says in message
    assert "again" not in message


ONE = torch.ones(2)
UPSCALER = {"params_ema": {"body.0.rdb1.conv1.weight": ONE, "conv_first.weight": ONE}}
# What a file holds, and what it is called. Before: its first tensor belonged to no layer.
CONTENTS = [
    pytest.param({"model.diffusion_model.double_blocks.0.x": ONE, "vae.y": ONE}, "Flux", id="Flux"),
    pytest.param({"text_encoders.clip_l.x": ONE, "model.joint_blocks.0.y": ONE}, "3", id="SD 3"),
    pytest.param({"first_stage_model.x": ONE, "y": ONE}, "a VAE from a one-file", id="a VAE"),
    pytest.param({"image_proj": {"x": ONE}, "ip_adapter": {"y": ONE}}, "IP-Adapter", id="nested"),
    pytest.param(dict(state_dict={"unet.a.lora_A.weight": ONE, "b": ONE}), "a LoRA", id="a state"),
    pytest.param(UPSCALER, "an upscaler", id="a nested upscaler"),
    pytest.param(
        dict(model={"time_embedding.x": ONE, "conv_in.weight": ONE}),
        "a U-Net",
        id="a nested U-Net",
    ),
]


@pytest.mark.parametrize("saved_object, says", CONTENTS)
def test_tensors_of_another_kind_are_named(saved_object, says):
    found = kinds.of_tensors(saved_object)
    assert found is not None
    assert says in found


def run_folder(folder: Path) -> Path:
    """The folder of a run, which is for --checkpoint."""
    (folder / "run").mkdir()
    training.folders.write_settings(folder / "run", train_pix2pix_turbo.Config())
    save_tensors(folder / "run" / "model.safetensors", TENSORS, {})
    return folder / "run"


def controlnet_folder(folder: Path) -> Path:
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    return folder


def lora_folder(folder: Path) -> Path:
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    return folder


# Folders that are no base, and what the message must say. Before: "there is no unet/config.json".
FOLDERS = [
    pytest.param(controlnet_folder, "'ControlNetModel'", id="a ControlNet"),
    pytest.param(lora_folder, "beside pytorch_lora_weights.safetensors", id="a LoRA"),
    pytest.param(
        run_folder, "--checkpoint", id="a run"
    ),
]


@pytest.mark.parametrize("make, says", FOLDERS)
def test_a_folder_that_is_no_base_is_named(tmp_path, make, says):
    path = make(tmp_path)
    assert says in refusal(lambda: load_base(str(path)))


@pytest.mark.parametrize("part, says", [
    pytest.param(lambda: {"a": torch.ones(3)}, "must match", id="a tensor of another size"),
    pytest.param(lambda: {"b": torch.ones(2)}, "KeyError", id="a tensor of another name"),
    pytest.param(
        lambda: torch.nn.Linear(2, 5),
        "size mismatch",
        id="a network of another size",
    ),
])
def test_a_state_that_does_not_fit_says_where(tmp_path, part, says):
    before = torch.nn.Linear(2, 3) if isinstance(part(), torch.nn.Module) else {"a": torch.ones(2)}
    training.save_state(tmp_path / "state.pt", dict(step=1, base="0", part=before))
    with pytest.raises(ValueError, match=says):
        training.restore(tmp_path, "0", dict(part=part()), "step")


# -------------------- 21. refused though harmless

def in_8_bits(part: str) -> Callable:
    def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}

    return lambda folder: edit(weight_file(folder, part), cast)


def with_buffers(folder: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None].float()
        tensors["logit_scale"] = torch.ones(())

    edit(weight_file(folder, "text_encoder"), add)


# Changes of a base that leave what it draws alone. Before: each was refused.
HARMLESS = [
    pytest.param(in_8_bits("vae"), id="a VAE in 8 bits"),
    pytest.param(in_8_bits("text_encoder"), id="a text encoder in 8 bits"),
    pytest.param(with_buffers, id="buffers of a whole CLIP"),
    pytest.param(damages.config("unet", num_attention_heads=None), id="heads by the older name"),
    pytest.param(damages.config("unet", upcast_attention=None), id="null for a switch"),
    pytest.param(damages.config("unet", dropout=0.1), id="dropout of the training"),
    pytest.param(damages.config("vae", scaling_factor=[0.18215, 0.18215]), id="equal factors"),
    pytest.param(damages.config("text_encoder", eos_token_id=[978]), id="a list of one token"),
    pytest.param(damages.config("text_encoder", attention_dropout=0), id="0 for 0.0"),
    pytest.param(damages.config("unet", act_fn="swish"), id="swish in the U-Net"),
    pytest.param(damages.config("vae", act_fn="swish"), id="swish in the VAE"),
    pytest.param(damages.config("unet", sample_size=[8, 12]), id="an oblong size"),
    pytest.param(damages.config("vae", sample_size=[16, 32]), id="one of the VAE"),
    pytest.param(
        damages.config("vae", shift_factor=0.0),
        id="a shift of 0",
    ),
]


@pytest.mark.parametrize("change", HARMLESS)
def test_a_base_with_a_harmless_change_is_read(saved, folder, change):
    change(folder)
    before = load_base(str(saved))
    after = load_base(str(folder))
    for part, network in before.networks.items():
        tensors = getattr(after, part).state_dict()
        assert tensors.keys() == network.state_dict().keys()
        # 8-bit floats have three bits behind the point.
        assert all(
            torch.allclose(tensors[name].float(), t, rtol=0.07, atol=0.01)
            for name, t in network.state_dict().items()
        )


# Alphas of a LoRA in kohya's names of rank 2, and the scale. Before: some ended in a TypeError.
@pytest.mark.parametrize("alpha, scale", [
    (torch.tensor([4.0]), 2.0),
    (torch.tensor([[4]]), 2.0),
    (torch.tensor(4, dtype=torch.bfloat16), 2.0),
    (torch.tensor(4.0).to(torch.float8_e4m3fn), 2.0),
    (4, 2.0),
    (0.5, 0.25),
])
def test_an_alpha_may_be_any_number(alpha, scale):
    tensors = {f"{KOHYA_Q}.lora_down.weight": normal(2, 8), f"{KOHYA_Q}.alpha": alpha}
    tensors[f"{KOHYA_Q}.lora_up.weight"] = normal(8, 2)
    found, unused = read_lora(tensors, None, loras.our_networks())
    assert unused == []
    assert found["unet"][Q].scale == scale


@pytest.mark.parametrize("key", ["epoch", "global_step", "iterations", f"unet.{Q}.alpha"])
def test_counters_beside_the_matrices_are_left_out(tmp_path, capsys, key):
    torch.save(dict(state_dict=pair() | {key: 3}, epoch=1), tmp_path / "lora.ckpt")
    load_lora(str(tmp_path / "lora.ckpt"), loras.our_base())
    assert "1 of 3 tensors are not needed and are left out" in capsys.readouterr().err
