"""data.py: opening, preparing and pairing pictures, edges as OpenCV draws them, the order of training, `check`."""

import itertools
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset.pictures
import files.tensors
import training
from dataset import __main__, cache, folders, loader
from dataset.pictures import canny, open_picture, pad_to_multiple, prepare, sketch, to_picture, to_tensor
from files.tensors import save_tensors


@pytest.fixture
def shared() -> Path:
    if "SHARED_DATA" not in os.environ:
        pytest.skip("SHARED_DATA does not name the folder of real pictures")
    return Path(os.environ["SHARED_DATA"])


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def coordinates(height: int, width: int, blue: int = 0) -> Image.Image:
    """Every pixel carries its column (red) and row (green): a crop shows where it was taken from."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, blue)], axis=2).astype(np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def refused(function, *arguments, match: str, **named) -> None:
    """It raises a ValueError of one line that holds `match` (plain text)."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **named)
    assert match in str(caught.value)
    assert "\n" not in str(caught.value)


# -------------------- pictures with captions, of every layout

def test_captions_come_from_metadata_or_text_files_and_every_tenth_item_is_for_the_test(tmp_path):
    for i in range(20):
        noise(6, 8, i).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f" noise \n{i}")
    train, test = (folders.open_captioned(tmp_path, split, "no_resize") for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 2) and test[1]["name"] == "19.png" and train[3]["caption"] == "noise 3"
    assert np.array_equal(pixels(to_picture(train[3]["target"])), pixels(noise(6, 8, 3)))
    rows = [json.dumps(dict(file_name=f"{i:02d}.png", text=f"text {i}", other=f"other {i}")) for i in range(20)]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*rows, ""]))
    assert folders.open_captioned(tmp_path, "train", "no_resize")[3]["caption"] == "text 3"
    assert folders.open_captioned(tmp_path, "test", "no_resize", column="other")[0]["caption"] == "other 9"
    refused(folders.open_captioned, tmp_path, "train", "no_resize", column="caption", match="--caption_column")
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows[:-1]))
    refused(folders.open_captioned, tmp_path, "train", "no_resize", match="no caption for '19.png'")
    for split in ("train", "test"):
        (tmp_path / "whole" / split).mkdir(parents=True)
        noise(6, 8).save(tmp_path / "whole" / split / f"{split}.png")
    assert folders.open_captioned(tmp_path / "whole", "test", "no_resize")[0] | {"target": 0} == dict(
        target=0, caption="", name="test.png")


def test_a_zip_of_edm_gives_its_classes_as_captions(shared):
    train, test = (folders.open_captioned(shared / "cifar10.zip", split, "no_resize") for split in ("train", "test"))
    assert (len(train), len(test)) == (18_000, 2_000) and train[0]["target"].shape == (3, 32, 32)
    assert set(train.captions) == {f"class {i}" for i in range(10)}
    batch = next(loader.batches(train, 4, 0, num_workers=1))  # a worker opens the file for itself
    assert batch["target"].shape == (4, 3, 32, 32) and len(batch["caption"]) == 4


def test_a_cache_with_half_its_text_encoder_has_the_latents_of_a_whole_one(tmp_path):
    for i in range(10):
        noise(12, 12, i).save(tmp_path / f"{i}.png")
    made = []
    for dtype in ("float32", "bfloat16"):
        cache.write_cache(str(tmp_path), "tiny", tmp_path / dtype, "resized_crop_8", 8, "text", 0, 4, "cpu", dtype)
        made.append(cache.Cached(tmp_path / dtype, "train"))
    assert made[0].facts["vae"] == made[1].facts["vae"]  # which a trainer asks for
    a, b = (pictures[3] for pictures in made)
    assert torch.equal(a["mean"], b["mean"]) and torch.equal(a["std"], b["std"])
    assert (a["context_0"] - b["context_0"]).abs().max() < 0.1 < a["context_0"].abs().max()


def test_workers_open_a_zip_and_a_cache_for_themselves(tmp_path):
    """Forked, they would share the place in a file that was open before; where processes do not fork, none can be
    sent to them."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(60):
            noise(40, 40, i).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"{i:02d}.png")
        archive.writestr("dataset.json", '{"labels": null}')
    cache.write_cache(str(tmp_path / "set.zip"), "tiny", tmp_path / "cache", "resized_crop_8", 8, "text", 0, 4, "cpu",
               "float32")
    for source in ("set.zip", "cache"):
        pictures = folders.open_captioned(tmp_path / source, "train", "no_resize")
        first = pictures[0]
        again = pickle.loads(pickle.dumps(pictures))[0]
        assert all(torch.equal(first[k], again[k]) for k in first if isinstance(first[k], torch.Tensor))
        one, several = (loader.batches(pictures, 4, 0, end_step=60, num_workers=n) for n in (0, 2))
        assert all(a["name"] == b["name"] and torch.equal(a[k], b[k]) for a, b in zip(one, several, strict=True)
                   for k in {"target", "mean"} & a.keys())


def test_random_crops_stay_inside_follow_their_key_and_are_central_without_one():
    picture, arrange = coordinates(20, 40), prepare("resized_randomcrop_20_hflip")
    crops = [pixels(arrange([picture], np.random.default_rng(i))[0]) for i in range(40)]
    lefts = {min(crop[0, 0, 0], crop[0, -1, 0]) for crop in crops}
    assert min(lefts) == 0 and max(lefts) == 20 and len(lefts) > 10
    assert {crop[0, 0, 0] < crop[0, -1, 0] for crop in crops} == {True, False}
    assert all(np.ptp(crop[..., 0]) == np.ptp(crop[..., 1]) == 19 for crop in crops)
    assert np.array_equal(crops[7], pixels(arrange([picture], np.random.default_rng(7))[0]))
    assert np.array_equal(pixels(arrange([picture])[0]), pixels(prepare("resized_crop_20")([picture])[0]))


def test_a_stopped_cache_goes_on_and_a_damaged_one_is_noticed_and_mended(tmp_path, monkeypatch):
    for i in range(20):
        noise(12, 12, i).save(tmp_path / f"{i:02d}.png")
    arguments = (str(tmp_path), "tiny", tmp_path / "cache", "resized_crop_8", 8, "text", 0, 4, "cpu", "float32", 5)
    count, item = [], folders.Captioned.__getitem__
    def stopped(self, index):
        count.append(index)
        if len(count) == 12:
            raise KeyboardInterrupt
        return item(self, index)
    save = save_tensors
    def cut(path, *_):
        path.write_bytes(b"half of")
        raise KeyboardInterrupt
    monkeypatch.setattr(files.tensors, "save_tensors", cut)
    with pytest.raises(KeyboardInterrupt):
        cache.write_cache(*arguments)
    monkeypatch.setattr(files.tensors, "save_tensors", save)
    monkeypatch.setattr(folders.Captioned, "__getitem__", stopped)
    with pytest.raises(KeyboardInterrupt):
        cache.write_cache(*arguments)
    refused(folders.open_captioned, tmp_path / "cache", "train", "", match="10 of 18")
    cache.write_cache(*arguments)
    assert len(count) == 12 + 8 + 2  # the two whole shards were not made again
    cached = folders.open_captioned(tmp_path / "cache", "train", "")
    assert len(cached) == 18 and cached[7]["name"] == "07.png" and cached[17]["name"] == "18.png"
    whole = cached[7]
    shard = tmp_path / "cache" / "train-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    refused(lambda: folders.open_captioned(tmp_path / "cache", "train", "")[7], match="train-00001.safetensors")
    cache.write_cache(*arguments)
    assert torch.equal(folders.open_captioned(tmp_path / "cache", "train", "")[7]["mean"], whole["mean"])
    refused(cache.write_cache, *arguments[:6], 1, *arguments[7:], match="choose another --output")
    refused(cache.write_cache, *arguments[:5], "caption", *arguments[6:], match="choose another --output")
    refused(cache.write_cache, str(tmp_path / "cache"), "tiny", tmp_path / "second", *arguments[3:], match="a cache already")
    (tmp_path / "cache" / "index.json").write_text("[]")
    refused(folders.open_captioned, tmp_path / "cache", "train", "", match="index.json cannot be used")


# -------------------- one picture

def test_grey_and_one_bit_pictures_become_three_equal_channels(tmp_path):
    grey = noise(5, 7).convert("L")
    for mode in ("L", "1"):
        grey.convert(mode).save(tmp_path / "a.png")
        opened = open_picture(tmp_path / "a.png")
        assert opened.mode == "RGB"
        assert (np.asarray(opened) == np.asarray(grey.convert(mode).convert("L"))[..., None]).all()


def test_palette_pictures_keep_their_colours_and_show_white_where_transparent(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "plain.png")
    assert pixels(open_picture(tmp_path / "plain.png")).tolist() == [[[10, 20, 30], [200, 100, 50], [0, 0, 0]]]
    palette.save(tmp_path / "index.png", transparency=1)
    assert pixels(open_picture(tmp_path / "index.png")).tolist() == [[[10, 20, 30], [255] * 3, [0, 0, 0]]]
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 255, 51]))  # black at a fifth
    assert pixels(open_picture(tmp_path / "bytes.png")).tolist() == [[[10, 20, 30], [200, 100, 50], [204] * 3]]


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.array([[[0, 100, 200, 255], [0, 100, 200, 0], [0, 100, 200, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert pixels(open_picture(tmp_path / "rgba.png")).tolist() == [[[0, 100, 200], [255] * 3, [204, 224, 244]]]
    Image.fromarray(rgba[..., [1, 3]], mode="LA").save(tmp_path / "la.png")
    assert pixels(open_picture(tmp_path / "la.png")).tolist() == [[[100] * 3, [255] * 3, [224] * 3]]
    noise(1, 1).save(tmp_path / "rgb.png", transparency=noise(1, 1).getpixel((0, 0)))
    assert pixels(open_picture(tmp_path / "rgb.png")).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm", "mode I"])
def test_16_bit_grey_is_rounded_to_the_nearest_of_8_bits(tmp_path, kind):
    values = np.array([[0, 128, 129, 257, 385, 386, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    path = tmp_path / ("a.tif" if kind != "png" and kind != "pgm" else f"a.{kind}")
    if kind == "pgm":
        path.write_bytes(b"P5 10 1 65535\n" + values.astype(">u2").tobytes())
    elif kind == "mode I":
        Image.fromarray(values.astype(np.int32)).save(path)
    else:
        Image.fromarray(values.astype(">u2") if kind.startswith("big") else values).save(path)
    opened = pixels(open_picture(path))
    assert opened[0, :, 0].tolist() == [0, 0, 1, 1, 1, 2, 128, 254, 255, 255]
    assert (opened == opened[..., :1]).all()


def test_16_bit_colour_and_16_bit_transparency_open(tmp_path):
    (tmp_path / "rgb.png").write_bytes(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 257 * 10, 257 * 20, 257 * 30)))
    assert pixels(open_picture(tmp_path / "rgb.png")).tolist() == [[[10, 20, 30]]]
    (tmp_path / "la.png").write_bytes(png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 257 * 100, 257 * 51)))
    assert pixels(open_picture(tmp_path / "la.png")).tolist() == [[[224] * 3]]


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert open_picture(tmp_path / "a.tif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["png", "jpg", "tif", "webp"])
def test_exif_rotation_is_applied(tmp_path, format):
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise: left becomes top
    picture.save(tmp_path / f"a.{format}", exif=exif)
    opened = open_picture(tmp_path / f"a.{format}")
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5))[2] > 200 and opened.getpixel((10, 35))[0] > 200


def test_16_bit_pictures_are_rotated_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert pixels(open_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 0]


def test_broken_exif_does_not_cost_the_picture(tmp_path):
    noise(8, 8).save(tmp_path / "a.png", exif=b"Exif\0\0XX\0*nonsense")
    assert open_picture(tmp_path / "a.png").tobytes() == noise(8, 8).tobytes()


@pytest.mark.parametrize("format", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path, format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{format}", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(tmp_path / f"a.{format}").n_frames == 2
    assert open_picture(tmp_path / f"a.{format}").getpixel((3, 3)) == (255, 0, 0)


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name, what in {"text": "not a picture of a known format", "empty": "not a picture of a known format",
                       "folder": "Is a directory", "absent": "No such file"}.items():
        refused(open_picture, tmp_path / f"{name}.png", match=f"{name}.png is not a")
        refused(open_picture, tmp_path / f"{name}.png", match=what)


@pytest.mark.parametrize("format", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_a_file_cut_short_is_refused_by_name(tmp_path, format):
    path = tmp_path / f"a.{format}"
    noise(64, 64).save(path)
    whole = path.read_bytes()
    for part in (8, 2, 1.2):
        path.write_bytes(whole[: int(len(whole) / part)])
        refused(open_picture, path, match=str(path))


def test_damaged_bytes_give_a_picture_or_one_sentence(tmp_path):
    rng = np.random.default_rng(0)
    for format in ("png", "jpg", "tif", "gif"):
        path = tmp_path / f"a.{format}"
        noise(24, 24).save(path)
        whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(damaged.tobytes())
            try:
                assert open_picture(path).mode == "RGB"
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def test_too_many_pixels_are_refused_from_the_header(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000, 8, 2, b""))
    refused(open_picture, tmp_path / "bomb.png", match="bomb.png")
    refused(open_picture, tmp_path / "bomb.png", match="900000000 pixels")
    noise(10, 10).save(tmp_path / "a.png")
    monkeypatch.setattr(dataset.pictures, "MAX_PIXELS", 99)  # ours holds where a user has lifted Pillow's
    refused(open_picture, tmp_path / "a.png", match="10x10, expected 1 to 99 pixels")


def test_a_large_but_allowed_picture_opens_without_a_warning(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # Pillow warns from here, refuses from twice as much
    noise(10, 10).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == (10, 10)
    assert not recwarn.list


def test_pictures_without_pixels_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0, 5, 8, 2, b""))
    (tmp_path / "a.bmp").write_bytes(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 4, 1, 24, *[0] * 6))
    refused(open_picture, tmp_path / "a.png", match="a.png")
    refused(open_picture, tmp_path / "a.bmp", match="a.bmp")


def test_values_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    refused(open_picture, tmp_path / "float.tif", match="floating-point")
    Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(tmp_path / "wide.tif")
    refused(open_picture, tmp_path / "wide.tif", match="from 70000 to 70000")


def test_tensors_and_pictures_convert_back_and_forth_at_every_level():
    picture = coordinates(256, 256, blue=7)
    x = to_tensor(picture)
    assert x.dtype == torch.float32 and x.shape == (3, 256, 256) and x.is_contiguous()
    assert x[0, 0, 255] == 1 and x[1, 0, 255] == 0 and x[2, 0, 0] == torch.tensor(7.0) / 255
    assert to_picture(x * 2 - 1).tobytes() == picture.tobytes()


def test_to_picture_rounds_to_the_nearest_level_and_clamps():
    for level, drift in itertools.product((0, 1, 127, 128, 254, 255), (-0.49, 0.49)):
        x = torch.full((3, 1, 1), (level + drift) / 127.5 - 1, dtype=torch.float64)
        assert to_picture(x).getpixel((0, 0)) == (level,) * 3
    extremes = torch.tensor([-1e9, float("inf"), -1.0]).view(3, 1, 1)
    assert to_picture(extremes).getpixel((0, 0)) == (0, 255, 0)
    assert to_picture(torch.ones(3, 2, 2, dtype=torch.float16, requires_grad=True)).getpixel((0, 0)) == (255,) * 3


def test_to_picture_refuses_nan_and_other_shapes():
    x = torch.zeros(3, 4, 4)
    x[1, 2, 3] = float("nan")
    refused(to_picture, x, match="NaN")
    refused(to_picture, torch.zeros(1, 3, 4, 4), match="[1, 3, 4, 4]")
    refused(to_picture, torch.zeros(1, 4, 4), match="[1, 4, 4]")


@pytest.mark.parametrize("height,width", [(16, 24), (9, 15), (5, 17), (13, 8), (4, 4), (1, 1), (3, 20), (8, 1)])
def test_padding_reflects_or_repeats_the_edge_and_crops_back(height, width):
    x = torch.arange(2 * 3 * height * width, dtype=torch.float64).view(2, 3, height, width)
    padded, size = pad_to_multiple(x, 8)
    assert size == (height, width)
    assert padded.shape[-2] % 8 == 0 and padded.shape[-1] % 8 == 0
    assert padded.shape[-2] - height < 8 and padded.shape[-1] - width < 8
    below, right = padded.shape[-2] - height, padded.shape[-1] - width
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (0, 0), (0, right)], "reflect" if right < width else "edge")
    expected = np.pad(expected, [(0, 0), (0, 0), (0, below), (0, 0)], "reflect" if below < height else "edge")
    assert (padded.numpy() == expected).all()
    assert (padded[..., :height, :width] == x).all()


# -------------------- preparations

@pytest.mark.parametrize("width,height,scaled,corner", [
    (100, 103, (64, 65), (0, 0)),    # 65.92 is cut to 65; a half offset of 0.5 rounds to 0
    (103, 100, (65, 64), (0, 0)),
    (100, 105, (64, 67), (0, 2)),    # 1.5 rounds to 2
    (100, 108, (64, 69), (0, 2)),    # 2.5 rounds to 2
    (128, 64, (128, 64), (32, 0)),
    (20, 10, (128, 64), (32, 0)),    # smaller pictures grow
])
def test_resized_crop_is_the_one_of_torchvision(width, height, scaled, corner):
    picture = noise(height, width)
    (prepared,) = prepare("resized_crop_64")([picture])
    expected = picture.resize(scaled, Image.Resampling.LANCZOS)
    expected = expected.crop((*corner, corner[0] + 64, corner[1] + 64))
    assert prepared.size == (64, 64) and prepared.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["resize_48", "resize_48x48"])
def test_resize_stretches_to_a_square(name):
    picture = noise(30, 90)
    (prepared,) = prepare(name)([picture], np.random.default_rng(0))
    assert prepared.tobytes() == picture.resize((48, 48), Image.Resampling.LANCZOS).tobytes()


def test_no_resize_leaves_the_pictures_as_they_are():
    pictures = [noise(30, 91), noise(5, 6)]
    prepared = prepare("no_resize")(pictures, np.random.default_rng(0))
    assert [p.tobytes() for p in prepared] == [p.tobytes() for p in pictures]


def test_crop_and_flip_are_shared_by_all_pictures_of_a_list():
    arrange = prepare("resize_40_randomcrop_32x32_hflip")
    corners, flips = set(), set()
    for seed in range(60):
        pair = [coordinates(40, 40, 1), coordinates(40, 40, 2)]
        a, b = (pixels(picture) for picture in arrange(pair, np.random.default_rng(seed)))
        assert a.shape == b.shape == (32, 32, 3)
        assert (a[..., :2] == b[..., :2]).all()
        assert (a[..., 2] == 1).all() and (b[..., 2] == 2).all()
        left, top = a[..., 0].min(), a[..., 1].min()
        columns = np.arange(left, left + 32)
        flipped = a[0, 0, 0] != left
        assert (a[..., 0] == (columns[::-1] if flipped else columns)).all()
        assert (a[..., 1] == np.arange(top, top + 32)[:, None]).all()
        corners.add((left, top))
        flips.add(flipped)
    assert flips == {True, False}
    assert {left for left, _ in corners} == {top for _, top in corners} == set(range(9))  # both ends are reached
    assert any(left != top for left, top in corners)


def test_without_hflip_nothing_is_flipped():
    arrange = prepare("resize_40_randomcrop_32x32")
    for seed in range(20):
        (a,) = arrange([coordinates(40, 40)], np.random.default_rng(seed))
        assert (np.diff(pixels(a)[0, :, 0]) == 1).all()


def test_without_a_generator_the_crop_is_central_and_unflipped():
    (a,) = prepare("resize_40_randomcrop_32x32_hflip")([coordinates(40, 40)])
    assert pixels(a)[0, 0].tolist() == [4, 4, 0] and pixels(a)[-1, -1].tolist() == [35, 35, 0]


def test_the_official_names_are_known():
    sizes = {"resized_crop_512": 512, "resize_286_randomcrop_256x256_hflip": 256, "resize_256": 256,
             "resize_256x256": 256, "resize_512": 512, "resize_512x512": 512}
    for name, size in sizes.items():
        assert prepare(name)([noise(20, 30)])[0].size == (size, size)


@pytest.mark.parametrize("name", ["", "resize", "resize_0", "resize_256x512", "resized_crop_-1", "crop_256",
                                  "resize_12\n", "no_resize2", "resize_256_randomcrop_286x286",
                                  "resize_286_randomcrop_256x255"])
def test_unknown_preparations_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="resized_crop_N.*resize_N.*resize_M_randomcrop_NxN.*no_resize"):
        prepare(name)


def test_a_thin_line_is_not_scaled_to_a_huge_picture():
    refused(prepare("resized_crop_512"), [Image.new("RGB", (1, 2000))], match="1x2000")


# -------------------- edges and sketches

def assert_canny_is_opencvs(picture: Image.Image, low: float = 100, high: float = 200) -> None:
    cv2 = pytest.importorskip("cv2")
    edges = np.asarray(canny(picture, low, high))
    expected = cv2.Canny(np.ascontiguousarray(picture), low, high)
    assert edges.dtype == np.uint8 and edges.shape == (*expected.shape, 3)
    assert (edges == expected[..., None]).all()


def test_canny_is_opencvs_on_random_pictures_of_every_size():
    rng = np.random.default_rng(0)
    for _ in range(200):  # few levels make many equal gradients, where strict and non-strict comparisons differ
        height, width, levels = rng.integers(1, 40), rng.integers(1, 40), rng.integers(2, 256)
        values = rng.integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
        assert_canny_is_opencvs(Image.fromarray(values.astype(np.uint8)))


@pytest.mark.parametrize("height,width", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 300), (300, 1), (3, 3)])
def test_canny_is_opencvs_on_lines_and_tiny_pictures(height, width):
    for seed in range(5):
        assert_canny_is_opencvs(noise(height, width, seed))


def test_canny_of_a_flat_picture_is_black():
    assert_canny_is_opencvs(Image.new("RGB", (30, 20), (70, 80, 90)))
    assert canny(Image.new("RGB", (30, 20), (70, 80, 90))).getextrema() == ((0, 0),) * 3


def test_canny_is_opencvs_at_other_thresholds():
    cv2 = pytest.importorskip("cv2")
    smooth = Image.fromarray(cv2.GaussianBlur(np.asarray(noise(300, 400)), (5, 5), 2))
    for low, high in [(3, 60), (60, 3), (10.7, 40.2), (0, 0)]:
        assert_canny_is_opencvs(smooth, low, high)


def test_canny_is_opencvs_on_photographs(shared):
    paths = sorted((shared / "day_night").glob("*_*/*.jpg"))[::12] + sorted((shared / "facades").glob("*_*/*.png"))[::6]
    assert len(paths) > 30
    for path in paths:
        assert_canny_is_opencvs(open_picture(path))


def test_canny_follows_a_weak_winding_line_to_its_end():
    """A spiral, strong at its outer end alone, is kept whole: the growth has no limit on length."""
    cv2 = pytest.importorskip("cv2")
    turn = np.linspace(0, 8 * 2 * np.pi, 4000)
    points = 120 + 2.2 * turn[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    canvas = np.zeros((240, 240, 3), np.uint8)
    cv2.polylines(canvas, [points.round().astype(np.int32)], False, (30, 30, 30), 5)
    assert canny(Image.fromarray(canvas)).getextrema()[0] == (0, 0)
    canvas[118:123, 225:232] = 255
    edges = np.asarray(canny(Image.fromarray(canvas)))
    assert (edges[110:130, 110:130] == 255).any()
    assert_canny_is_opencvs(Image.fromarray(canvas))


def test_sketch_turns_dark_into_one_and_light_into_zero_in_each_channel():
    picture = Image.fromarray(np.array([[[0, 127, 128], [255, 200, 10]]], dtype=np.uint8))
    assert pixels(sketch(picture)).tolist() == [[[255, 255, 0], [0, 0, 255]]]
    picture = coordinates(256, 256)
    assert torch.equal(to_tensor(sketch(picture)), (to_tensor(picture) < 0.5).float())


# -------------------- folders of pairs

def make_pairs(folder: Path, count: int = 5, size: tuple[int, int] = (40, 40), split: str = "train") -> Path:
    """Pairs whose input says where a pixel lies and, in blue, which pair it is of."""
    for side in "AB":
        (folder / f"{split}_{side}").mkdir(parents=True)
    for i in range(count):
        coordinates(*size, blue=i).save(folder / f"{split}_A" / f"{i:03}.png")
        coordinates(*size, blue=i + 100).save(folder / f"{split}_B" / f"{i:03}.png")
    captions = {f"{i:03}.png": f"caption {i}" for i in range(count)}
    (folder / f"{split}_prompts.json").write_text(json.dumps(captions))
    return folder


def test_a_pair_is_input_target_caption_and_name(tmp_path):
    pairs = folders.PairedFolder(make_pairs(tmp_path), "train", "no_resize")
    assert len(pairs) == 5
    item = pairs[3]
    assert set(item) == {"input", "target", "caption", "name"}
    assert item["caption"] == "caption 3" and item["name"] == "003.png"
    assert torch.equal(item["input"], to_tensor(coordinates(40, 40, 3)))
    assert torch.equal(item["target"], to_tensor(coordinates(40, 40, 103)) * 2 - 1)


def test_crop_and_flip_of_a_pair_match_and_come_from_the_key(tmp_path):
    pairs = folders.PairedFolder(make_pairs(tmp_path), "train", "resize_40_randomcrop_32x32_hflip")
    places = set()
    for step in range(20):
        item, again = pairs[1, (7, step, 0)], pairs[1, (7, step, 0)]
        assert torch.equal(item["input"], again["input"]) and torch.equal(item["target"], again["target"])
        where = (item["target"][:2] + 1) / 2
        assert torch.allclose(item["input"][:2], where, atol=1e-6)
        places.add(tuple((item["input"][:2, 0, 0] * 255).round().int().tolist()))
    assert len(places) > 10
    assert (pairs[1]["input"][:2, 0, 0] * 255).round().tolist() == [4, 4]  # an int: no draw, the centre
    assert not torch.equal(pairs[1, (7, 0, 0)]["input"], pairs[1, (7, 0, 1)]["input"])


def test_pairs_match_by_name_first_and_by_stem_otherwise(tmp_path):
    sides = dict(A=["a.jpg", "b.png", "c.PNG", "d.png"], B=["a.png", "b.png", "b.jpg", "c.webp", "d.png"])
    for side, names in sides.items():
        (tmp_path / f"test_{side}").mkdir()
        for name in names:
            noise(8, 8).save(tmp_path / f"test_{side}" / name)
    (tmp_path / "test_A" / ".hidden.png").write_text("")
    (tmp_path / "test_A" / "notes.md").write_text("")
    pairs = folders.PairedFolder(tmp_path, "test", "no_resize")
    assert pairs.pairs == [("a.jpg", "a.png"), ("b.png", "b.png"), ("c.PNG", "c.webp"), ("d.png", "d.png")]


def test_a_stem_with_two_candidates_or_two_claims_is_no_match(tmp_path):
    assert folders._partners(["a.jpg"], ["a.png", "a.webp"]) == {"a.jpg": None}
    assert folders._partners(["a.jpg", "a.png"], ["a.png"]) == {"a.jpg": None, "a.png": "a.png"}


def test_captions_come_from_text_files_without_the_json(tmp_path):
    make_pairs(tmp_path, 4)
    (tmp_path / "train_prompts.json").unlink()
    (tmp_path / "train_A" / "000.txt").write_text("beside A\n")
    (tmp_path / "train_B" / "001.txt").write_text("\ufeffbeside B,\n in two lines", encoding="utf-8")
    (tmp_path / "train_A" / "003.txt").write_text("")
    pairs = folders.PairedFolder(tmp_path, "train", "no_resize")
    assert [pairs[i]["caption"] for i in range(4)] == ["beside A", "beside B, in two lines", "", ""]


def test_the_json_goes_before_text_files_and_may_hold_more_entries(tmp_path):
    make_pairs(tmp_path, 2)
    (tmp_path / "train_A" / "000.txt").write_text("beside A")
    (tmp_path / "train_prompts.json").write_text(json.dumps({"000.png": "Été", "001.png": "", "x": "extra"}))
    pairs = folders.PairedFolder(tmp_path, "train", "no_resize")
    assert pairs[0]["caption"] == "Été" and pairs[1]["caption"] == ""


def test_bad_folders_are_refused_when_they_are_opened(tmp_path):
    refused(folders.PairedFolder, tmp_path / "none", "train", "no_resize", match="none/train_A is not a folder")
    make_pairs(tmp_path)
    refused(folders.PairedFolder, tmp_path, "test", "no_resize", match="test_A is not a folder")
    (tmp_path / "test_A").mkdir()
    refused(folders.PairedFolder, tmp_path, "test", "no_resize", match="test_A holds no picture")
    noise(8, 8).save(tmp_path / "test_A" / "a.png")
    refused(folders.PairedFolder, tmp_path, "test", "no_resize", match="test_B is not a folder")
    refused(folders.PairedFolder, tmp_path, "train", "resize_big", match="resize_big")
    (tmp_path / "train_B" / "002.png").unlink()
    (tmp_path / "train_B" / "004.png").unlink()
    refused(folders.PairedFolder, tmp_path, "train", "no_resize", match="002.png has no partner")
    refused(folders.PairedFolder, tmp_path, "train", "no_resize", match="(2 of 5 have none)")


@pytest.mark.parametrize("text,match", [
    ('{"000.png": "a",\n"001.png" "b"}', "train_prompts.json cannot be used (Expecting ':' delimiter: line 2"),
    ('["a", "b"]', "holds a list); expected JSON, {file name: caption}"),
    ('{"000.png": "a", "001.png": 5}', "the caption of '001.png' is a int"),
    ('{"001.png": "b"}', "no caption for '000.png' (1 of 2 have none)"),
    (b'{"000.png": "\xe9"}', "text in UTF-8"),
])
def test_bad_prompts_are_refused_when_the_folder_is_opened(tmp_path, text, match):
    make_pairs(tmp_path, 2)
    (tmp_path / "train_prompts.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folders.PairedFolder, tmp_path, "train", "no_resize", match=match)


@pytest.mark.parametrize("prep", ["no_resize", "resize_32"])
def test_a_pair_of_two_sizes_is_refused_by_name(tmp_path, prep):
    make_pairs(tmp_path)
    noise(41, 40).save(tmp_path / "train_B" / "001.png")
    pairs = folders.PairedFolder(tmp_path, "train", prep)
    pairs[0]
    refused(lambda: pairs[1], match="001.png and its partner in train_B are 40x40 and 40x41 pixels")


def test_real_pairs_open(shared):
    pairs = folders.open_paired(shared / "facades", "train", "resize_286_randomcrop_256x256_hflip")
    assert len(pairs) == 36
    item = pairs[0, (1, 2, 3)]
    assert item["input"].shape == item["target"].shape == (3, 256, 256)
    assert item["caption"] == "a photo of a building facade"


def test_unknown_drawings_are_refused_with_the_known_ones():
    refused(folders.open_paired, "drawn:squares", "train", "no_resize", match="drawn:squares: expected drawn:scenes")


# -------------------- the order of training

class Numbers(torch.utils.data.Dataset):
    """Items that tell their index, their key and how their process takes Ctrl-C."""

    def __init__(self, length: int, broken: int | None = None):
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple) -> dict:
        index, key = item
        if index == self.broken:
            try:
                raise ValueError("inner")
            except ValueError:
                raise ValueError(f"picture {index} is broken: replace it") from None
        ignores = all(signal.getsignal(s) is signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM))
        draw = torch.tensor([np.random.default_rng(key).random()] * 3).view(3, 1, 1)
        return dict(input=draw, target=draw, caption=f"ignores {ignores}", name=f"{index} {key}")


def names(iterator) -> list[list[str]]:
    return [batch["name"] for batch in iterator]


def test_every_sample_is_seen_once_an_epoch_and_none_is_dropped():
    taken = [int(name.split()[0]) for name in itertools.chain(*names(loader.batches(Numbers(10), 4, 0, end_step=10)))]
    epochs = [taken[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_be_larger_than_the_data_set():
    (batch,) = names(loader.batches(Numbers(3), 8, 0, end_step=1))
    taken = [int(name.split()[0]) for name in batch]
    assert sorted(taken[:3]) == sorted(taken[3:6]) == [0, 1, 2] and len(taken) == 8


def test_row_j_of_step_s_has_the_key_seed_s_j():
    steps = names(loader.batches(Numbers(5), 3, 9, start_step=2, end_step=4))
    assert [[name.partition(" ")[2] for name in step] for step in steps] == [
        [f"(9, {step}, {row})" for row in range(3)] for step in (2, 3)]


def test_the_seed_decides_the_order():
    one, same, other = (names(loader.batches(Numbers(50), 50, seed, end_step=1)) for seed in (1, 1, 2))
    assert one == same != other


def test_resuming_at_any_step_continues_the_same_run():
    whole = names(loader.batches(Numbers(7), 3, 5, end_step=12))
    for start in (0, 1, 5, 11):
        assert names(loader.batches(Numbers(7), 3, 5, start_step=start, end_step=12)) == whole[start:]
    endless = loader.batches(Numbers(7), 3, 5, start_step=4)
    assert names(itertools.islice(endless, 5)) == whole[4:9]


def test_the_rows_of_several_processes_are_those_of_one():
    whole = names(loader.batches(Numbers(7), 4, 5, end_step=6))
    ranks = [names(loader.batches(Numbers(7), 4, 5, end_step=6, rows=rows)) for rows in ([0, 2], [1], [3])]
    for step in range(6):
        (a, c), (b,), (d,) = (rank[step] for rank in ranks)
        assert [a, b, c, d] == whole[step]


def test_batches_of_a_folder_are_the_same_with_and_without_workers(tmp_path):
    pairs = folders.PairedFolder(make_pairs(tmp_path), "train", "resize_40_randomcrop_32x32_hflip")
    one, other = (list(loader.batches(pairs, 2, 3, end_step=5, num_workers=n)) for n in (0, 2))
    assert len(one) == len(other) == 5
    for a, b in zip(one, other, strict=True):
        assert a["input"].shape == a["target"].shape == (2, 3, 32, 32)
        assert torch.equal(a["input"], b["input"]) and torch.equal(a["target"], b["target"])
        assert a["caption"] == b["caption"] and a["name"] == b["name"] and isinstance(a["caption"], list)
    blue = (one[0]["input"][:, 2, 0, 0] * 255).round().int().tolist()
    assert [f"{i:03}.png" for i in blue] == one[0]["name"]


def test_the_order_of_an_epoch_is_not_the_stream_of_a_crop():
    """numpy pads short keys with zeros, so (seed, epoch) would be (seed, step, row 0)."""
    steps = names(loader.batches(Numbers(100), 100, 3, end_step=1))
    shared_stream = np.random.default_rng((3, 0)).permutation(100).tolist()
    assert [int(name.split()[0]) for name in steps[0]] != shared_stream
    assert np.random.default_rng((3, 0)).random() == np.random.default_rng((3, 0, 0)).random()


def test_loading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader.batches(Numbers(4), 2, 0, end_step=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_surfaces_as_its_one_sentence(workers):
    with pytest.raises(ValueError) as caught:
        list(loader.batches(Numbers(6, broken=4), 2, 0, end_step=3, num_workers=workers))
    assert str(caught.value) == "picture 4 is broken: replace it"


def test_an_unreadable_file_met_by_a_worker_is_named(tmp_path):
    make_pairs(tmp_path)
    path = tmp_path / "train_B" / "002.png"
    noise(40, 40).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    pairs = folders.PairedFolder(tmp_path, "train", "no_resize")
    refused(list, loader.batches(pairs, 5, 0, end_step=1, num_workers=1), match=f"{path} is not a readable picture")


def test_pictures_of_several_sizes_in_one_batch_are_refused_by_name(tmp_path):
    make_pairs(tmp_path, 1)
    for side in "AB":
        noise(20, 40).save(tmp_path / f"train_{side}" / "001.png")
    (tmp_path / "train_prompts.json").unlink()
    pairs = folders.PairedFolder(tmp_path, "train", "no_resize")
    refused(list, loader.batches(pairs, 2, 0, end_step=1), match="differ in size")
    assert len(list(loader.batches(pairs, 1, 0, end_step=2))) == 2


def test_workers_ignore_stops_and_the_main_process_does_not():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start ignoring it
    try:
        for workers, ignores in ((1, True), (0, False)):
            (batch,) = loader.batches(Numbers(2), 2, 0, end_step=1, num_workers=workers)
            assert batch["caption"] == [f"ignores {ignores}"] * 2
    finally:
        signal.signal(signal.SIGINT, before)


# -------------------- check

@pytest.fixture
def run_check(tmp_path, monkeypatch, capsys):
    """python data.py ARGUMENTS in tmp_path -> exit status, stdout, stderr."""
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dataset", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = training.run(__main__.main) or 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    return run


def test_check_counts_a_sound_folder(tmp_path, run_check):
    folder = make_pairs(tmp_path / "set", 5)
    make_pairs(folder, 2, (30, 60), split="test")
    for seed, side in enumerate("AB"):
        noise(10, 20, seed).save(folder / f"train_{side}" / "000.png")
    status, out, err = run_check("check", folder)
    assert status == 0
    assert "train_A: 5 pictures, distinct sizes 2, min 20x10, median 40x40, max 40x40" in out
    assert "test_B: 2 pictures, distinct sizes 1, min 60x30, median 60x30, max 60x30" in out
    assert "train captions: 5, 0 empty, longest 9 characters\n    caption 0\n    caption 1\n    caption 2\n" in out
    assert "caption 3" not in out and "no problems" in out
    assert "train_A" in err  # the progress
    sheet = Image.open(tmp_path / "set_check.png")
    assert sheet.mode == "RGB" and "set_check.png" in out


def test_the_contact_sheet_shows_a_beside_b_and_at_most_16_pairs(tmp_path, run_check):
    folder = make_pairs(tmp_path / "set", 40)
    for i in range(40):
        Image.new("RGB", (40, 40), "red").save(folder / "train_A" / f"{i:03}.png")
        Image.new("RGB", (40, 40), "blue").save(folder / "train_B" / f"{i:03}.png")
    run_check("check", folder, "--output", tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert not (tmp_path / "set_check.png").exists()
    colours = {colour: count for count, colour in sheet.getcolors(1 << 24)}
    assert colours[255, 0, 0] == colours[0, 0, 255] == 16 * 40 * 40
    assert any(red == green == blue < 100 for red, green, blue in colours)  # the captions


def test_check_names_every_problem(tmp_path, run_check):
    folder = make_pairs(tmp_path / "set", 6)
    path = folder / "train_A" / "000.png"
    path.write_bytes(path.read_bytes()[:60])
    noise(40, 41).save(folder / "train_B" / "001.png")
    (folder / "train_B" / "002.png").unlink()
    (folder / "train_A" / "003.png").write_bytes((folder / "train_B" / "003.png").read_bytes())
    noise(4, 4).save(folder / "train_B" / "lonely.png")
    (folder / "train_prompts.json").write_text(json.dumps(
        {f"{i:03}.png": "x" for i in range(4)} | {"005.png": "", "y.png": "", "z.png": ""}))
    status, out, _ = run_check("check", folder)
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert status == 2 and len(problems) == 7
    for wanted in ("train_A/000.png is not a readable picture", "train_A/001.png is 40x40 pixels but its partner 41x40",
                   "train_A/002.png has no partner in train_B", "train_A/003.png and its partner are identical",
                   "train_B/lonely.png has no partner in train_A", "train_A/004.png has no caption",
                   "train_prompts.json has 2 entries without a picture, the first 'y.png'"):
        assert sum(wanted in line for line in problems) == 1, wanted
    assert "train captions: 4, 2 empty" in out


def test_check_reports_broken_prompts_and_a_missing_side(tmp_path, run_check):
    folder = make_pairs(tmp_path / "set", 2)
    (folder / "train_prompts.json").write_text("{\n\noops")
    (folder / "test_A").mkdir()
    status, out, _ = run_check("check", folder)
    assert status == 2
    assert "train_prompts.json cannot be used (Expecting" in out and "line 3" in out
    assert "test_B is not a folder" in out and "test_A holds no picture" in out


def test_check_reports_text_captions_that_only_some_pictures_have(tmp_path, run_check):
    folder = make_pairs(tmp_path / "set", 2)
    (folder / "train_prompts.json").unlink()
    assert run_check("check", folder)[0] == 0  # none at all is a choice
    (folder / "train_A" / "000.txt").write_text("one")
    status, out, _ = run_check("check", folder)
    assert status == 2 and "train_A/001.png has no caption" in out


def test_check_knows_the_unpaired_layout(tmp_path, run_check):
    folder = tmp_path / "set"
    for side, count in (("A", 3), ("B", 2)):
        (folder / f"train_{side}").mkdir(parents=True)
        for i in range(count):
            noise(20 + i, 30).save(folder / f"train_{side}" / f"{side}{i}.jpg")
        (folder / f"fixed_prompt_{side.lower()}.txt").write_text(f"prompt of {side}\n")
    status, out, _ = run_check("check", folder)
    assert status == 0 and "no problems" in out
    assert "train_A: 3 pictures" in out and "train_B: 2 pictures" in out and "fixed_prompt_b.txt: prompt of B" in out
    assert (tmp_path / "set_check.png").exists()
    (folder / "fixed_prompt_b.txt").unlink()
    status, out, _ = run_check("check", folder)
    assert status == 2 and "fixed_prompt_b.txt cannot be used" in out and "partner" not in out


def test_check_of_a_bad_folder_is_one_line_and_status_2(tmp_path, run_check):
    for folder in (tmp_path / "none", tmp_path):
        status, out, err = run_check("check", folder)
        assert status == 2 and out == "" and err.count("\n") == 1 and "not a data set" in err


def test_check_of_the_real_folders_finds_no_problem(shared, run_check):
    status, out, _ = run_check("check", shared / "facades")
    assert status == 0 and "train_A: 36 pictures" in out and "test_B: 6 pictures" in out


def test_the_command_without_arguments_prints_its_help():
    done = subprocess.run([sys.executable, "-m", "dataset"], cwd=Path(dataset.__file__).parent.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "check" in done.stdout


@pytest.mark.parametrize("arguments, says", [
    (["chek", "x"], "'chek'"), (["check", "x", "--ouput", "y"], "did you mean --output?"),
    (["cache", "x", "--output", "y", "--device", "foo"], "--device foo"),
    (["cache", "x", "--output", "y", "--batch", "0"], "--batch 0: expected 1 or more"), (["cache", "x"], "--output")])
def test_wrong_arguments_are_one_line(run_check, tmp_path, arguments, says):
    status, out, err = run_check(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and says in err
    assert not [*tmp_path.iterdir()]


# -------------------- Unpaired folders

@pytest.fixture
def domains(tmp_path):
    for side, n in [("A", 5), ("B", 3)]:
        (tmp_path / f"train_{side}").mkdir()
        for i in range(n):
            Image.new("RGB", (20 + i, 18), (10 * i, 100 if side == "A" else 200, 0)).save(
                tmp_path / f"train_{side}" / f"{side.lower()}{i}.png")
        (tmp_path / f"fixed_prompt_{side.lower()}.txt").write_text(f"a photo of {side}\n")
    return tmp_path


def test_unpaired_items_come_of_both_domains_and_follow_their_key(domains):
    pictures = folders.UnpairedFolder(domains, "train", "resize_16")
    assert len(pictures) == 5 and pictures.prompts == ("a photo of A", "a photo of B")
    item = pictures[4]
    assert (item["name_a"], item["name_b"]) == ("a4.png", "b1.png")
    for side, green in [("a", 100), ("b", 200)]:
        assert item[side].shape == (3, 16, 16) and item[side][1].mean() == pytest.approx(2 * green / 255 - 1)
    drawn = [[pictures[(0, (7, s, 0))]["name_b"] for s in range(30)] for _ in range(2)]
    assert set(drawn[0]) == {"b0.png", "b1.png", "b2.png"} and drawn[0] == drawn[1]


def test_unpaired_folders_are_refused_by_name(domains):
    (domains / "fixed_prompt_b.txt").unlink()
    with pytest.raises(ValueError, match="fixed_prompt_b.txt cannot be used"):
        folders.UnpairedFolder(domains, "train", "resize_16")
    with pytest.raises(ValueError, match="test_A is not a folder"):
        folders.UnpairedFolder(domains, "test", "resize_16")
    with pytest.raises(ValueError, match="no unpaired drawings 'cats': known are drawn:day2night"):
        folders.open_unpaired("drawn:cats", "train", "resize_16")
