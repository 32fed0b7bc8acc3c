"""dataset/pictures.py: opening pictures, tensors, preparations, edges equal to OpenCV's."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures_helpers import coordinates, noise, pixels, refused
from PIL import Image

import dataset.pictures
from dataset.pictures import (
    canny,
    open_picture,
    pad_to_multiple,
    prepare,
    sketch,
    to_picture,
    to_tensor,
)


def png(
    width: int,
    height: int,
    depth: int,
    colour: int,
    raw: bytes,
    transparent: tuple[int, ...] = (),
) -> bytes:
    """A PNG file made by hand, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    level = b""
    if transparent:
        level = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + level
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


# -------------------- opening

def test_grey_and_one_bit_pictures_become_three_equal_channels(tmp_path):
    grey = noise(5, 7).convert("L")
    for mode in ("L", "1"):
        grey.convert(mode).save(tmp_path / "a.png")
        opened = open_picture(tmp_path / "a.png")
        expected = np.asarray(grey.convert(mode).convert("L"))
        assert opened.mode == "RGB"
        assert (np.asarray(opened) == expected[..., None]).all()


def test_palette_pictures_keep_their_colours_and_show_white_where_transparent(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    palette.putdata([0, 1, 2])

    def opened(name: str) -> list:
        return pixels(open_picture(tmp_path / name)).tolist()

    palette.save(tmp_path / "plain.png")
    assert opened("plain.png") == [[[10, 20, 30], [200, 100, 50], [0, 0, 0]]]

    palette.save(tmp_path / "index.png", transparency=1)
    assert opened("index.png") == [[[10, 20, 30], [255] * 3, [0, 0, 0]]]

    # Black at an opacity of one fifth.
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 255, 51]))
    assert opened("bytes.png") == [[[10, 20, 30], [200, 100, 50], [204] * 3]]


def test_transparency_is_composited_over_white(tmp_path):
    rgba = np.array(
        [[[0, 100, 200, 255], [0, 100, 200, 0], [0, 100, 200, 51]]],
        dtype=np.uint8,
    )
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    opened = pixels(open_picture(tmp_path / "rgba.png"))
    assert opened.tolist() == [[[0, 100, 200], [255] * 3, [204, 224, 244]]]

    Image.fromarray(rgba[..., [1, 3]], mode="LA").save(tmp_path / "la.png")
    opened = pixels(open_picture(tmp_path / "la.png"))
    assert opened.tolist() == [[[100] * 3, [255] * 3, [224] * 3]]

    colour = noise(1, 1).getpixel((0, 0))
    noise(1, 1).save(tmp_path / "rgb.png", transparency=colour)
    assert pixels(open_picture(tmp_path / "rgb.png")).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm", "mode I"])
def test_16_bit_grey_is_rounded_to_the_nearest_of_8_bits(tmp_path, kind):
    values = np.array(
        [[0, 128, 129, 257, 385, 386, 32768, 65406, 65407, 65535]],
        dtype=np.uint16,
    )
    suffix = kind if kind in ("png", "pgm") else "tif"
    path = tmp_path / f"a.{suffix}"
    if kind == "pgm":
        path.write_bytes(b"P5 10 1 65535\n" + values.astype(">u2").tobytes())
    elif kind == "mode I":
        Image.fromarray(values.astype(np.int32)).save(path)
    elif kind == "big-endian tiff":
        Image.fromarray(values.astype(">u2")).save(path)
    else:
        Image.fromarray(values).save(path)

    opened = pixels(open_picture(path))
    assert opened[0, :, 0].tolist() == [0, 0, 1, 1, 1, 2, 128, 254, 255, 255]
    assert (opened == opened[..., :1]).all()


def test_16_bit_colour_and_16_bit_transparency_open(tmp_path):
    colour = b"\0" + struct.pack(">HHH", 257 * 10, 257 * 20, 257 * 30)
    (tmp_path / "rgb.png").write_bytes(png(1, 1, 16, 2, colour))
    assert pixels(open_picture(tmp_path / "rgb.png")).tolist() == [[[10, 20, 30]]]

    grey_and_alpha = b"\0" + struct.pack(">HH", 257 * 100, 257 * 51)
    (tmp_path / "la.png").write_bytes(png(1, 1, 16, 4, grey_and_alpha))
    assert pixels(open_picture(tmp_path / "la.png")).tolist() == [[[224] * 3]]


GREY = 0
COLOUR = 2


@pytest.mark.parametrize("depth, kind, raw, transparent, expected", [
    (1, GREY, b"\0\xa0", (1,), [255, 0, 255, 0]),
    (1, GREY, b"\0\xa0", (0,), [255] * 4),
    (2, GREY, b"\0\x1b", (1,), [0, 255, 170, 255]),
    (4, GREY, b"\0\x5a\x0f", (10,), [85, 255, 0, 255]),
    (8, GREY, b"\0\x05\x5a\0\xff", (5,), [255, 90, 0, 255]),
    (16, GREY, b"\0\0\0\x12\x34\0\1\0\xff", (0,), [255, 18, 0, 1]),
    (16, GREY, b"\0\0\0\x12\x34\x12\x33\0\xff", (0x1234,), [0, 255, 18, 1]),
    (16, GREY, b"\0\0\0\x12\x34\x12\x33\0\xff", (7,), [0, 18, 18, 1]),
    (16, COLOUR, b"\0" + b"\x12\x34" * 3 + bytes(18), (0x1234,) * 3, [255, 0, 0, 0]),
    (16, COLOUR, b"\0" + b"\x12\x34" * 3 + bytes(18), (0,) * 3, [18, 255, 255, 255]),
])
def test_a_transparent_level_is_white_at_every_depth(
    tmp_path, depth, kind, raw, transparent, expected
):
    (tmp_path / "a.png").write_bytes(png(4, 1, depth, kind, raw, transparent))
    opened = pixels(open_picture(tmp_path / "a.png"))
    assert (opened == opened[..., :1]).all()
    assert opened[0, :, 0].tolist() == expected


def test_a_transparent_level_survives_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Image.fromarray(np.array([[0, 65535, 257]], dtype=np.uint16))
    picture.save(tmp_path / "a.png", exif=exif, transparency=0)
    assert pixels(open_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [1, 255, 255]


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert open_picture(tmp_path / "a.tif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["png", "jpg", "tif", "webp"])
def test_exif_rotation_is_applied(tmp_path, format):
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise: left becomes top
    picture.save(tmp_path / f"a.{format}", exif=exif)

    opened = open_picture(tmp_path / f"a.{format}")
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5))[2] > 200
    assert opened.getpixel((10, 35))[0] > 200


def test_16_bit_pictures_are_rotated_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    picture.save(tmp_path / "a.png", exif=exif)
    assert pixels(open_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 0]


def test_a_picture_with_broken_exif_still_opens(tmp_path):
    noise(8, 8).save(tmp_path / "a.png", exif=b"Exif\0\0XX\0*nonsense")
    assert open_picture(tmp_path / "a.png").tobytes() == noise(8, 8).tobytes()


@pytest.mark.parametrize("format", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path, format):
    path = tmp_path / f"a.{format}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(path).n_frames == 2
    assert open_picture(path).getpixel((3, 3)) == (255, 0, 0)


def test_files_that_are_not_pictures_are_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    reasons = {
        "text": "not a picture of a known format",
        "empty": "not a picture of a known format",
        "folder": "Is a directory",
    }
    for name, reason in reasons.items():
        refused(open_picture, tmp_path / f"{name}.png", match=f"{name}.png is not a")
        refused(open_picture, tmp_path / f"{name}.png", match=reason)
    refused(open_picture, tmp_path / "absent.png", match=f"there is no file {tmp_path}/absent.png")


@pytest.mark.parametrize("format", ["png", "jpg", "tif", "webp", "bmp", "gif"])
def test_a_truncated_file_is_refused_by_name(tmp_path, format):
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
                assert str(path) in str(error)
                assert "\n" not in str(error)


def test_too_many_pixels_are_refused_from_the_header(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000, 8, 2, b""))
    refused(open_picture, tmp_path / "bomb.png", match="bomb.png")
    refused(open_picture, tmp_path / "bomb.png", match="900000000 pixels")

    # Our own limit also holds where a user has lifted Pillow's.
    noise(10, 10).save(tmp_path / "a.png")
    monkeypatch.setattr(dataset.pictures, "MAX_PIXELS", 99)
    refused(open_picture, tmp_path / "a.png", match="10x10, expected 1 to 99 pixels")


def test_a_large_but_allowed_picture_opens_without_a_warning(tmp_path, monkeypatch, recwarn):
    # Pillow warns above this limit, and refuses above twice as much.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    noise(10, 10).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").size == (10, 10)
    assert not recwarn.list


def test_pictures_without_pixels_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0, 5, 8, 2, b""))
    fields = (54, 0, 0, 54, 40, 0, 4, 1, 24, *[0] * 6)
    (tmp_path / "a.bmp").write_bytes(b"BM" + struct.pack("<IHHIIiiHHIIiiII", *fields))
    refused(open_picture, tmp_path / "a.png", match="a.png")
    refused(open_picture, tmp_path / "a.bmp", match="a.bmp")


def test_values_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    refused(open_picture, tmp_path / "float.tif", match="floating-point")
    Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(tmp_path / "wide.tif")
    refused(open_picture, tmp_path / "wide.tif", match="from 70000 to 70000")


@pytest.mark.parametrize("suffix", [
    *("jfif", "jpe", "apng", "avif", "jp2", "j2k", "dib", "tga", "pcx", "sgi", "qoi"),
    *("pnm", "mpo", "JPG"),
])
def test_what_pillow_writes_under_a_listed_suffix_opens(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    assert path.suffix.lower() in dataset.pictures.SUFFIXES
    flat = Image.new("RGB", (16, 12), (200, 100, 50))
    flat.save(path)
    opened = pixels(open_picture(path))
    assert opened.shape == (12, 16, 3)
    assert np.abs(opened - pixels(flat)).max() <= 3


def test_suffixes_are_those_of_the_formats_that_are_opened():
    registered = Image.registered_extensions()
    for suffix in dataset.pictures.SUFFIXES:
        assert registered[suffix] in (*dataset.pictures.FORMATS, "MPO")
        assert suffix == suffix.lower()
    earlier = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
    assert earlier <= dataset.pictures.SUFFIXES
    for suffix in (".eps", ".ps", ".pdf", ".wmf", ".psd", ".h5", ".mpg", ".pfm"):
        assert suffix not in dataset.pictures.SUFFIXES


@pytest.mark.parametrize("suffix", ["png", "jpg", "eps", "tga"])
def test_postscript_is_never_run_whatever_its_suffix(tmp_path, suffix):
    noise(8, 8).save(tmp_path / "real.eps")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((tmp_path / "real.eps").read_bytes())
    refused(open_picture, path, match="not a picture of a known format")


# -------------------- tensors

def test_tensors_and_pictures_convert_back_and_forth_at_every_level():
    picture = coordinates(256, 256, blue=7)
    x = to_tensor(picture)
    assert x.dtype == torch.float32
    assert x.shape == (3, 256, 256)
    assert x.is_contiguous()
    assert x[0, 0, 255] == 1
    assert x[1, 0, 255] == 0
    assert x[2, 0, 0] == torch.tensor(7.0) / 255
    assert to_picture(x * 2 - 1).tobytes() == picture.tobytes()


def test_to_picture_rounds_to_the_nearest_level_and_clamps():
    levels = (0, 1, 127, 128, 254, 255)
    for level, offset in itertools.product(levels, (-0.49, 0.49)):
        x = torch.full((3, 1, 1), (level + offset) / 127.5 - 1, dtype=torch.float64)
        assert to_picture(x).getpixel((0, 0)) == (level,) * 3

    extremes = torch.tensor([-1e9, float("inf"), -1.0]).view(3, 1, 1)
    assert to_picture(extremes).getpixel((0, 0)) == (0, 255, 0)

    half = torch.ones(3, 2, 2, dtype=torch.float16, requires_grad=True)
    assert to_picture(half).getpixel((0, 0)) == (255,) * 3


def test_to_picture_refuses_nan_and_other_shapes():
    x = torch.zeros(3, 4, 4)
    x[1, 2, 3] = float("nan")
    refused(to_picture, x, match="NaN")
    refused(to_picture, torch.zeros(1, 3, 4, 4), match="[1, 3, 4, 4]")
    refused(to_picture, torch.zeros(1, 4, 4), match="[1, 4, 4]")


@pytest.mark.parametrize(
    "height,width",
    [(16, 24), (9, 15), (5, 17), (13, 8), (4, 4), (1, 1), (3, 20), (8, 1)],
)
def test_padding_reflects_or_repeats_the_edge_and_crops_back(height, width):
    x = torch.arange(2 * 3 * height * width, dtype=torch.float64).view(2, 3, height, width)
    padded, size = pad_to_multiple(x, 8)
    below = padded.shape[-2] - height
    right = padded.shape[-1] - width
    assert size == (height, width)
    assert padded.shape[-2] % 8 == 0
    assert padded.shape[-1] % 8 == 0
    assert below < 8
    assert right < 8

    mode = "reflect" if right < width else "edge"
    expected = np.pad(x.numpy(), [(0, 0), (0, 0), (0, 0), (0, right)], mode)
    mode = "reflect" if below < height else "edge"
    expected = np.pad(expected, [(0, 0), (0, 0), (0, below), (0, 0)], mode)
    assert (padded.numpy() == expected).all()
    assert (padded[..., :height, :width] == x).all()


# -------------------- preparations

@pytest.mark.parametrize("width,height,scaled,corner", [
    (100, 103, (64, 65), (0, 0)),    # 65.92 is cut to 65; half of 1 rounds to 0
    (103, 100, (65, 64), (0, 0)),
    (100, 105, (64, 67), (0, 2)),    # 1.5 rounds to 2
    (100, 108, (64, 69), (0, 2)),    # 2.5 rounds to 2
    (128, 64, (128, 64), (32, 0)),
    (20, 10, (128, 64), (32, 0)),    # smaller pictures are enlarged
])
def test_resized_crop_is_that_of_torchvision(width, height, scaled, corner):
    picture = noise(height, width)
    (prepared,) = prepare("resized_crop_64")([picture])
    left, top = corner
    expected = picture.resize(scaled, Image.Resampling.LANCZOS)
    expected = expected.crop((left, top, left + 64, top + 64))
    assert prepared.size == (64, 64)
    assert prepared.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["resize_48", "resize_48x48"])
def test_resize_stretches_to_a_square(name):
    picture = noise(30, 90)
    (prepared,) = prepare(name)([picture], np.random.default_rng(0))
    expected = picture.resize((48, 48), Image.Resampling.LANCZOS)
    assert prepared.tobytes() == expected.tobytes()


def test_no_resize_leaves_the_pictures_as_they_are():
    pictures = [noise(30, 91), noise(5, 6)]
    prepared = prepare("no_resize")(pictures, np.random.default_rng(0))
    assert [p.tobytes() for p in prepared] == [p.tobytes() for p in pictures]


def test_crop_and_flip_are_shared_by_all_pictures_of_a_list():
    arrange = prepare("resize_40_randomcrop_32x32_hflip")
    corners = set()
    flips = set()
    for seed in range(60):
        pair = [coordinates(40, 40, 1), coordinates(40, 40, 2)]
        a, b = (pixels(picture) for picture in arrange(pair, np.random.default_rng(seed)))
        assert a.shape == b.shape == (32, 32, 3)
        assert (a[..., :2] == b[..., :2]).all()
        assert (a[..., 2] == 1).all()
        assert (b[..., 2] == 2).all()

        left = a[..., 0].min()
        top = a[..., 1].min()
        columns = np.arange(left, left + 32)
        rows = np.arange(top, top + 32)
        flipped = a[0, 0, 0] != left
        assert (a[..., 0] == (columns[::-1] if flipped else columns)).all()
        assert (a[..., 1] == rows[:, None]).all()
        corners.add((left, top))
        flips.add(flipped)

    assert flips == {True, False}
    # Both ends of the range are reached, and the two sides are drawn independently.
    assert {left for left, _ in corners} == set(range(9))
    assert {top for _, top in corners} == set(range(9))
    assert any(left != top for left, top in corners)


def test_random_crops_stay_inside_follow_their_key_and_are_central_without_one():
    picture = coordinates(20, 40)
    arrange = prepare("resized_randomcrop_20_hflip")
    crops = [pixels(arrange([picture], np.random.default_rng(i))[0]) for i in range(40)]

    lefts = {min(crop[0, 0, 0], crop[0, -1, 0]) for crop in crops}
    assert min(lefts) == 0
    assert max(lefts) == 20
    assert len(lefts) > 10
    assert {crop[0, 0, 0] < crop[0, -1, 0] for crop in crops} == {True, False}
    for crop in crops:
        assert np.ptp(crop[..., 0]) == np.ptp(crop[..., 1]) == 19

    again = pixels(arrange([picture], np.random.default_rng(7))[0])
    assert np.array_equal(crops[7], again)
    central = pixels(prepare("resized_crop_20")([picture])[0])
    assert np.array_equal(pixels(arrange([picture])[0]), central)


def test_without_hflip_nothing_is_flipped():
    arrange = prepare("resize_40_randomcrop_32x32")
    for seed in range(20):
        (a,) = arrange([coordinates(40, 40)], np.random.default_rng(seed))
        assert (np.diff(pixels(a)[0, :, 0]) == 1).all()


def test_without_a_generator_the_crop_is_central_and_unflipped():
    (a,) = prepare("resize_40_randomcrop_32x32_hflip")([coordinates(40, 40)])
    assert pixels(a)[0, 0].tolist() == [4, 4, 0]
    assert pixels(a)[-1, -1].tolist() == [35, 35, 0]


def test_the_official_names_are_known():
    sizes = {
        "resized_crop_512": 512,
        "resize_286_randomcrop_256x256_hflip": 256,
        "resize_256": 256,
        "resize_256x256": 256,
        "resize_512": 512,
        "resize_512x512": 512,
    }
    for name, size in sizes.items():
        assert prepare(name)([noise(20, 30)])[0].size == (size, size)


@pytest.mark.parametrize("name", [
    "",
    "resize",
    "resize_0",
    "resize_256x512",
    "resized_crop_-1",
    "crop_256",
    "resize_12\n",
    "no_resize2",
    "resize_256_randomcrop_286x286",
    "resize_286_randomcrop_256x255",
])
def test_unknown_preparations_are_refused_with_the_known_ones(name):
    known = "resized_crop_N.*resize_N.*resize_M_randomcrop_NxN.*no_resize"
    with pytest.raises(ValueError, match=known):
        prepare(name)


def test_a_thin_line_is_not_scaled_to_a_huge_picture():
    line = Image.new("RGB", (1, 2000))
    refused(prepare("resized_crop_512"), [line], match="1x2000")


# -------------------- edges and sketches

def assert_equals_opencv(picture: Image.Image, low: float = 100, high: float = 200) -> None:
    cv2 = pytest.importorskip("cv2")
    edges = np.asarray(canny(picture, low, high))
    expected = cv2.Canny(np.ascontiguousarray(picture), low, high)
    assert edges.dtype == np.uint8
    assert edges.shape == (*expected.shape, 3)
    assert (edges == expected[..., None]).all()


def test_canny_is_opencvs_on_random_pictures_of_every_size():
    rng = np.random.default_rng(0)
    for _ in range(200):
        # Few levels make many equal gradients, where strict and non-strict comparisons differ.
        height, width, levels = rng.integers(1, 40), rng.integers(1, 40), rng.integers(2, 256)
        values = rng.integers(0, levels, (height, width, 3)) * (255 // (levels - 1))
        assert_equals_opencv(Image.fromarray(values.astype(np.uint8)))


@pytest.mark.parametrize(
    "height,width",
    [(1, 1), (1, 2), (2, 1), (2, 2), (1, 300), (300, 1), (3, 3)],
)
def test_canny_is_opencvs_on_lines_and_tiny_pictures(height, width):
    for seed in range(5):
        assert_equals_opencv(noise(height, width, seed))


def test_canny_of_a_flat_picture_is_black():
    flat = Image.new("RGB", (30, 20), (70, 80, 90))
    assert_equals_opencv(flat)
    assert canny(flat).getextrema() == ((0, 0),) * 3


def test_canny_is_opencvs_at_other_thresholds():
    cv2 = pytest.importorskip("cv2")
    smooth = Image.fromarray(cv2.GaussianBlur(np.asarray(noise(300, 400)), (5, 5), 2))
    for low, high in [(3, 60), (60, 3), (10.7, 40.2), (0, 0)]:
        assert_equals_opencv(smooth, low, high)


def test_canny_is_opencvs_on_photographs(shared):
    photographs = sorted((shared / "day_night").glob("*_*/*.jpg"))[::12]
    facades = sorted((shared / "facades").glob("*_*/*.png"))[::6]
    paths = photographs + facades
    assert len(paths) > 30
    for path in paths:
        assert_equals_opencv(open_picture(path))


def test_canny_follows_a_weak_winding_line_to_its_end():
    """A spiral that is strong only at its outer end is kept whole: there is no limit on length."""
    cv2 = pytest.importorskip("cv2")
    turn = np.linspace(0, 8 * 2 * np.pi, 4000)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    points = 120 + 2.2 * turn[:, None] * circle
    canvas = np.zeros((240, 240, 3), np.uint8)
    cv2.polylines(canvas, [points.round().astype(np.int32)], False, (30, 30, 30), 5)
    assert canny(Image.fromarray(canvas)).getextrema()[0] == (0, 0)

    canvas[118:123, 225:232] = 255
    edges = np.asarray(canny(Image.fromarray(canvas)))
    assert (edges[110:130, 110:130] == 255).any()
    assert_equals_opencv(Image.fromarray(canvas))


def test_sketch_turns_dark_into_one_and_light_into_zero_in_each_channel():
    levels = np.array([[[0, 127, 128], [255, 200, 10]]], dtype=np.uint8)
    picture = Image.fromarray(levels)
    assert pixels(sketch(picture)).tolist() == [[[255, 255, 0], [0, 0, 255]]]

    picture = coordinates(256, 256)
    expected = (to_tensor(picture) < 0.5).float()
    assert torch.equal(to_tensor(sketch(picture)), expected)
