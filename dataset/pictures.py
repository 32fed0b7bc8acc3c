"""One picture: opening, conversion to and from tensors, preparation, edges and sketches."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

# The formats of finished pictures, as Pillow names their readers. Others are left out on purpose:
# EPS runs the PostScript program that the file is, WMF needs Windows, PSD holds drafts that often
# lie beside the pictures made of them, FITS, HDF5 and GRIB hold measurements.
WANTED = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "DIB",
    "QOI",
    "SGI",
    "PCX",
    "TGA",
)


def readable_formats() -> tuple[str, ...]:
    """The wanted formats that this installation of Pillow can open."""
    Image.init()
    formats = []
    for name in WANTED:
        needs_codec = name == "JPEG2000"
        if needs_codec and not features.check_codec("jpg_2000"):
            continue
        if name in Image.OPEN:
            formats.append(name)
    return tuple(formats)


def suffixes_of(formats: tuple[str, ...]) -> set[str]:
    """The suffixes that Pillow registers for these formats, in lower case with their dot."""
    suffixes = set()
    for suffix, name in Image.registered_extensions().items():
        if name == "MPO":
            # Two views of a stereo camera; the JPEG reader opens them and gives the first.
            name = "JPEG"
        if name in formats:
            suffixes.add(suffix.lower())
    # Its floating-point values have no range that is known: depth maps are kept in it.
    return suffixes - {".pfm"}


FORMATS = readable_formats()
SUFFIXES = suffixes_of(FORMATS)

# Pillow's own decoder takes planes of 16 bits for 8, and maps uncompressed files that are rotated
# as if they were not. libtiff does neither.
TiffImagePlugin.READ_LIBTIFF = features.check("libtiff")

# Pillow itself refuses larger pictures; as RGB this is half a gigabyte.
MAX_PIXELS = 178_956_970


# -------------------- opening

def open_picture(
    path: str | Path | BinaryIO,
    name: str | Path | None = None,
) -> Image.Image:
    """Opens a picture file, or an open binary file, as 8-bit RGB.

    EXIF rotation is applied, and transparency is composited over white, also that of a single
    level or colour. 16-bit grey is rounded to 8 bits; Pillow keeps the upper 8 bits of 16-bit
    colour. An animation gives its first frame.

    Error messages call the picture `name` (by default its path). ValueError if it cannot be read,
    has no pixels or more than MAX_PIXELS, or holds floating-point or 32-bit values.
    """
    name = name or path
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd metadata, and about sizes that are allowed here.
            warnings.simplefilter("ignore")
            return _as_rgb(_load_upright(path))
    except FileNotFoundError:
        raise ValueError(f"there is no file {name}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} {_why_unidentified(path)}") from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
        reason = getattr(error, "strerror", None)
        if not reason:
            reason = " ".join(str(error).split())
        if not reason:
            reason = type(error).__name__
        raise ValueError(
            f"{name} is not a readable picture ({reason}): replace or remove it"
        ) from None


def _why_unidentified(path: str | Path | BinaryIO) -> str:
    """What is wrong with a file that Pillow takes for no picture."""
    from files import kinds

    if hasattr(path, "read"):
        path.seek(0)
        start = path.read(kinds.BYTES)
    else:
        start = kinds.first_bytes(Path(path))
    kind = kinds.of_bytes(start) or kinds.of_text(start)
    if kind in kinds.PICTURES.values():
        return (
            "is not a readable picture (its header is damaged, or its pixels are of a kind that is"
            " not supported): replace it, or save it as PNG of 8 or 16 bits"
        )
    found = f" but {kind}" if kind else ""
    return (
        f"is not a picture of a known format{found}: remove it, or save it as PNG, JPEG, WebP or"
        " TIFF"
    )


def _load_upright(path: str | Path | BinaryIO) -> Image.Image:
    """Decodes a picture in its own mode and applies the EXIF rotation."""
    with Image.open(path, formats=FORMATS) as file:
        # The header says how large the picture is, before any memory is taken for it.
        if not 0 < file.width * file.height <= MAX_PIXELS:
            size = f"{file.width}x{file.height}"
            raise ValueError(f"{size}, expected 1 to {MAX_PIXELS} pixels")

        raw_mode = _raw_mode(file)
        file.load()
        _scale_transparent_level(file, raw_mode)
        file = _scale_grey_tiff(file)
        try:
            return ImageOps.exif_transpose(file)
        except Exception:
            # The EXIF data is broken but the picture is not: show it unrotated, as viewers do.
            return file.copy()


def _raw_mode(file: Image.Image) -> str:
    """How a PNG stores its pixels, such as "L;4" for 4-bit grey; empty for other formats.

    To be asked before the pixels are loaded.
    """
    tile = getattr(file, "tile", None)  # how Pillow will decode the file
    if file.format != "PNG" or not tile:
        return ""
    return str(tile[0][3])


def _scale_transparent_level(file: Image.Image, raw_mode: str) -> None:
    """Puts the transparent level of a PNG on the scale of the loaded pixels.

    Pillow converts pixels of 2, 4 and 16 bits to 8 bits but leaves the level as it is in the file.
    """
    level = file.info.get("transparency")
    if raw_mode == "L;2" and isinstance(level, int):
        file.info["transparency"] = level * 85
    elif raw_mode == "L;4" and isinstance(level, int):
        file.info["transparency"] = level * 17
    elif raw_mode == "RGB;16B" and isinstance(level, tuple):
        # Of the pixels too, Pillow keeps the upper 8 bits.
        file.info["transparency"] = tuple(value >> 8 for value in level)


def _scale_grey_tiff(file: Image.Image) -> Image.Image:
    """Puts 12-bit grey of a TIFF on 16 bits, and inverts it where 0 stands for white.

    Pillow does neither for grey of more than 8 bits. Other pictures stay as they are.
    """
    if not isinstance(file, TiffImageFile) or not file.mode.startswith("I;16"):
        return file
    values = np.asarray(file).astype(np.int64)
    bits = file.tag_v2.get(258, (16,))[0]
    if bits == 12:
        values = values * 65535 // 4095
    if file.tag_v2.get(262) == 0:
        values = 65535 - values
    scaled = Image.fromarray(values.astype(np.uint16))
    scaled.info = file.info
    exif = file.getexif()
    if exif:
        scaled.info["exif"] = exif.tobytes()
    return scaled


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB. ValueError for values whose range is not known."""
    if picture.mode == "F":
        raise ValueError("floating-point values, expected 8 or 16 bits a channel")

    if picture.mode.startswith("I"):
        # Mode I has room for 32 bits but usually holds 16-bit values.
        values = np.asarray(picture).astype(np.int64)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise ValueError(f"values from {low} to {high}, expected 8 or 16 bits a channel")
        rounded = (values + 128) // 257
        transparent = picture.info.get("transparency")
        if isinstance(transparent, int):
            rounded[values == transparent] = 255
        picture = Image.fromarray(rounded.astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)

    return picture.convert("RGB")


# -------------------- tensors

def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> float32 [3, H, W] in [0, 1]."""
    levels = torch.from_numpy(np.array(picture))            # [H, W, 3]
    return levels.permute(2, 0, 1).contiguous().float() / 255


def to_picture(x: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> RGB picture, clamped and rounded to the nearest of 256 levels.

    ValueError if x holds NaN or has another shape.
    """
    if x.ndim != 3 or x.shape[0] != 3:
        raise ValueError(
            f"found a tensor of shape {list(x.shape)}, expected one picture [3, H, W]"
        )
    x = x.detach().float()
    if x.isnan().any():
        raise ValueError("the picture holds NaN; expected numbers: look at the network's weights")
    levels = (x.clamp(-1, 1) + 1) * 127.5
    levels = levels.round().byte().cpu()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def pad_to_multiple(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pads [B, 3, H, W] on the right and below to multiples of `factor`.

    Returns the padded pictures and the (H, W) to crop the result back to. Padding reflects the
    picture, or repeats its edge in a direction where the picture is too small to be reflected.
    """
    height, width = x.shape[-2:]
    right = -width % factor
    below = -height % factor
    x = F.pad(x, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    x = F.pad(x, (0, 0, 0, below), mode="reflect" if below < height else "replicate")
    return x, (height, width)


# -------------------- preparation

# A preparation: pictures and a random generator (or None) -> prepared pictures.
Preparation = Callable[..., list[Image.Image]]


def prepare(name: str) -> Preparation:
    """Returns the preparation of that name, a function f(pictures, rng=None) -> pictures.

        no_resize                       the pictures as they are
        resize_N, resize_NxN            stretched to N x N
        resized_crop_N                  shorter side scaled to N, central N x N crop
        resized_randomcrop_N            the same, with a random crop
        resize_M_randomcrop_NxN         stretched to M x M, random N x N crop

    All with a crop may end in _hflip: half of the pictures are mirrored. Crop and flip are drawn
    from `rng` once for the whole list, so pairs stay aligned (the official data set draws them
    for each picture, so its pairs do not match). Without `rng` the crop is central and nothing is
    flipped. All scaling is Lanczos. ValueError for any other name.
    """
    if name == "no_resize":
        return _keep

    match = re.fullmatch(r"resized_(random)?crop_([1-9]\d*)(_hflip)?", name)
    if match:
        return partial(
            _scale_and_crop,
            size=int(match[2]),
            random_crop=bool(match[1]),
            hflip=bool(match[3]),
        )

    match = re.fullmatch(r"resize_([1-9]\d*)(x\1)?", name)
    if match:
        return partial(_stretch, size=int(match[1]))

    match = re.fullmatch(r"resize_([1-9]\d*)_randomcrop_([1-9]\d*)x\2(_hflip)?", name)
    if match and int(match[1]) >= int(match[2]):
        return partial(
            _stretch_and_crop,
            stretched=int(match[1]),
            size=int(match[2]),
            hflip=bool(match[3]),
        )

    raise ValueError(
        f"unknown preparation '{name}': expected resized_crop_N, resized_randomcrop_N, resize_N,"
        " resize_M_randomcrop_NxN (M at least N), those with a crop also with _hflip, or no_resize"
    )


def _keep(
    pictures: Sequence[Image.Image],
    rng: np.random.Generator | None = None,
) -> list[Image.Image]:
    return list(pictures)


def _stretch(
    pictures: Sequence[Image.Image],
    rng: np.random.Generator | None = None,
    *,
    size: int,
) -> list[Image.Image]:
    """Resizes to a square, whatever the aspect ratio."""
    if size**2 > MAX_PIXELS:
        raise ValueError(f"{size}x{size}, expected 1 to {MAX_PIXELS} pixels")
    return [picture.resize((size, size), Image.Resampling.LANCZOS) for picture in pictures]


def _stretch_and_crop(
    pictures: Sequence[Image.Image],
    rng: np.random.Generator | None = None,
    *,
    stretched: int,
    size: int,
    hflip: bool,
) -> list[Image.Image]:
    """Resizes to a square and crops a smaller one."""
    corner = None
    if rng is not None:
        corner = rng.integers(0, stretched - size + 1, size=2).tolist()
    flip = _draw_flip(hflip, rng)

    prepared = []
    for picture in _stretch(pictures, size=stretched):
        if corner is None:
            left, top = _central_corner(picture, size)
        else:
            left, top = corner
        prepared.append(_crop(picture, left, top, size, flip))
    return prepared


def _scale_and_crop(
    pictures: Sequence[Image.Image],
    rng: np.random.Generator | None = None,
    *,
    size: int,
    random_crop: bool,
    hflip: bool,
) -> list[Image.Image]:
    """Scales the shorter side and crops a square."""
    # Pictures of a list may have different aspect ratios, so what is drawn are fractions.
    fractions = None
    if random_crop and rng is not None:
        fractions = rng.random(2)
    flip = _draw_flip(hflip, rng)

    prepared = []
    for picture in pictures:
        picture = _scale_shorter_side(picture, size)
        if fractions is None:
            left, top = _central_corner(picture, size)
        else:
            left = int(fractions[0] * (picture.width - size + 1))
            top = int(fractions[1] * (picture.height - size + 1))
        prepared.append(_crop(picture, left, top, size, flip))
    return prepared


def _scale_shorter_side(picture: Image.Image, short: int) -> Image.Image:
    width, height = picture.size
    # The longer side is rounded down, as in torchvision's Resize.
    long = int(short * max(width, height) / min(width, height))
    if short * long > MAX_PIXELS:
        raise ValueError(
            f"a picture of {width}x{height} pixels becomes {short}x{long}: crop it first"
        )
    size = (short, long) if width <= height else (long, short)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _draw_flip(hflip: bool, rng: np.random.Generator | None) -> bool:
    if not hflip or rng is None:
        return False
    return rng.random() < 0.5


def _central_corner(picture: Image.Image, size: int) -> tuple[int, int]:
    """The left upper corner of a central crop; halves round to even, as in CenterCrop."""
    left = round((picture.width - size) / 2)
    top = round((picture.height - size) / 2)
    return left, top


def _crop(picture: Image.Image, left: int, top: int, size: int, flip: bool) -> Image.Image:
    picture = picture.crop((left, top, left + size, top + size))
    if flip:
        return ImageOps.mirror(picture)
    return picture


# -------------------- edges and sketches

def canny(picture: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Canny edges (Canny 1986) as a picture of three equal channels, 0 or 255.

    The result equals cv2.Canny(rgb, low, high) in every bit: 3x3 Sobel filters, L1 norm, and at
    each pixel the gradient of the channel with the largest norm. The integer arithmetic is that
    of OpenCV's imgproc/canny.cpp.
    """
    low, high = sorted((math.floor(low), math.floor(high)))
    dx, dy, norm = _gradients(picture)
    ridge = _ridges(dx, dy, norm) & (norm > low)
    edges = _hysteresis(ridge, strong=ridge & (norm > high))
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def _gradients(picture: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sobel derivatives dx, dy and their L1 norm, int32 [H, W]."""
    rgb = np.asarray(picture, dtype=np.int16)
    rgb = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")            # [H + 2, W + 2, 3]

    smooth = rgb[:-2] + 2 * rgb[1:-1] + rgb[2:]
    dx = smooth[:, 2:] - smooth[:, :-2]                                 # [H, W, 3]
    smooth = rgb[:, :-2] + 2 * rgb[:, 1:-1] + rgb[:, 2:]
    dy = smooth[2:] - smooth[:-2]
    norm = np.abs(dx) + np.abs(dy)

    # argmax takes the first of equal channels, as OpenCV does.
    strongest = norm.argmax(axis=2, keepdims=True)

    def of_strongest(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, strongest, axis=2)[..., 0].astype(np.int32)

    return of_strongest(dx), of_strongest(dy), of_strongest(norm)


def _ridges(dx: np.ndarray, dy: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Where the norm is larger than at both neighbours across the edge, bool [H, W].

    Along an axis, the first of two equal neighbours is kept.
    """
    height, width = norm.shape
    padded = np.pad(norm, 1)

    def neighbour(down: int, right: int) -> np.ndarray:
        top = 1 + down
        left = 1 + right
        return padded[top : top + height, left : left + width]

    # The angle of the gradient in fixed point: tan(67.5 degrees) is 2 more than tan(22.5 degrees),
    # which is 13573 in units of 2^-15.
    x = np.abs(dx)
    y = np.abs(dy) << 15
    tan22 = x * 13573
    tan67 = tan22 + (x << 16)

    falling = (norm > neighbour(-1, -1)) & (norm > neighbour(1, 1))
    rising = (norm > neighbour(-1, 1)) & (norm > neighbour(1, -1))
    horizontal_edge = (norm > neighbour(-1, 0)) & (norm >= neighbour(1, 0))
    vertical_edge = (norm > neighbour(0, -1)) & (norm >= neighbour(0, 1))

    ridge = np.where((dx ^ dy) < 0, rising, falling)
    ridge = np.where(y > tan67, horizontal_edge, ridge)
    return np.where(y < tan22, vertical_edge, ridge)


def _hysteresis(ridge: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The ridge pixels that connect to a strong one, in all eight directions, bool [H, W].

    A stack of pixels takes the same short time however long and winding the lines are; growing
    whole arrays step by step does not.
    """
    # A border of False, so that offsets into the flat array never leave it or wrap around.
    ridge = np.pad(ridge, 1)
    strong = np.pad(strong, 1)
    row = ridge.shape[1]
    neighbours = (-row - 1, -row, -row + 1, -1, 1, row - 1, row, row + 1)

    # The bytes of `weak` are cleared one by one: a bytearray is faster at this than numpy.
    weak = bytearray((ridge & ~strong).tobytes())
    stack = np.flatnonzero(strong).tolist()
    while stack:
        pixel = stack.pop()
        for offset in neighbours:
            if weak[pixel + offset]:
                weak[pixel + offset] = 0
                stack.append(pixel + offset)

    unconnected = np.frombuffer(weak, dtype=bool).reshape(ridge.shape)
    return (ridge & ~unconnected)[1:-1, 1:-1]


def sketch(picture: Image.Image) -> Image.Image:
    """The sketch input of the official script: a channel below 0.5 becomes 1, any other 0.

    So dark strokes become white and paper becomes black.
    """
    dark = np.asarray(picture) < 128
    return Image.fromarray(dark.astype(np.uint8) * 255)
