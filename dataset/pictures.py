"""One picture: opening, preparing, edges, tensors."""

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
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # of Pillow's: one of the others runs PostScript
MAX_PIXELS = 178_956_970  # Pillow's own limit for an error: half a gigabyte as RGB

def open_picture(path: str | Path | BinaryIO, name: str | Path | None = None) -> Image.Image:
    """Any picture file as 8-bit RGB, upright: EXIF rotation applied, transparency over white, 16 bits rounded to 8
    (grey; of 16-bit colour Pillow itself keeps the upper 8 bits), the first frame of an animation. Refused are no
    pixel or more than MAX_PIXELS, floating-point and 32-bit values. Of an open file `name` is what errors call it."""
    name = name or path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes that are allowed here
            with Image.open(path, formats=FORMATS) as file:
                if not 0 < file.width * file.height <= MAX_PIXELS:  # from the header, before memory is taken
                    raise ValueError(f"{file.width}x{file.height}, expected 1 to {MAX_PIXELS} pixels")
                file.load()
                try:
                    picture = ImageOps.exif_transpose(file)
                except Exception:  # broken EXIF beside a sound picture: viewers show it as it is
                    picture = file.copy()
            return _as_rgb(picture)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture of a known format: save it as PNG, JPEG, WebP or TIFF") from None
    except Exception as error:  # Pillow's decoders let out OSError, SyntaxError, ValueError, struct.error, ...
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is not a readable picture ({reason}): replace or remove it") from None


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point values, expected 8 or 16 bits a channel")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:  # mode I has room for 32 bits and mostly holds 16
            raise ValueError(f"values from {values.min()} to {values.max()}, expected 8 or 16 bits a channel")
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255


def to_picture(x: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1], clamped, to the nearest of the 256 levels. ValueError on NaN or another shape."""
    if x.ndim != 3 or x.shape[0] != 3:
        raise ValueError(f"found a tensor of shape {list(x.shape)}, expected one picture [3, H, W]")
    x = x.detach().float()
    if x.isnan().any():
        raise ValueError("the picture holds NaN, no colour: try --mixed_precision no or a lower learning rate")
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def pad_to_multiple(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """[B, 3, H, W] -> the same, extended right and below to multiples of factor, and (H, W) to crop back to:
    by reflection, in a direction where the picture is too small for that by repeating its edge."""
    height, width = x.shape[-2:]
    right, below = -width % factor, -height % factor
    x = F.pad(x, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    x = F.pad(x, (0, 0, 0, below), mode="reflect" if below < height else "replicate")
    return x, (height, width)


def _arrange(pictures: Sequence[Image.Image], rng: np.random.Generator | None = None, *, short: int = 0,
             stretch: int = 0, crop: int = 0, random: bool = False, flip: bool = False) -> list[Image.Image]:
    """Scale (short side to `short`, or to a square of `stretch`), crop to a square, flip: one draw for all pictures."""
    prepared = []
    where = rng.random(2) if short and random and rng is not None else None
    corner = rng.integers(0, stretch - crop + 1, size=2).tolist() if stretch and random and rng is not None else None
    flip = flip and rng is not None and rng.random() < 0.5
    for picture in pictures:
        width, height = picture.size
        if short:  # torchvision's Resize(N): the long side is cut off to a whole number, not rounded
            long = int(short * max(width, height) / min(width, height))
            if short * long > MAX_PIXELS:
                raise ValueError(f"a picture of {width}x{height} pixels becomes {short}x{long}: crop it first")
            picture = picture.resize((short, long) if width <= height else (long, short), Image.Resampling.LANCZOS)
        if stretch:
            picture = picture.resize((stretch, stretch), Image.Resampling.LANCZOS)
        if crop:  # round half to even, as torchvision's CenterCrop
            if where is not None:
                corner = [int(u * (side - crop + 1)) for u, side in zip(where, picture.size)]
            left, top = corner or (round((side - crop) / 2) for side in picture.size)
            picture = picture.crop((left, top, left + crop, top + crop))
        prepared.append(ImageOps.mirror(picture) if flip else picture)
    return prepared


def prepare(name: str) -> Callable[..., list[Image.Image]]:
    """The preparation of that name: f(pictures, rng=None) -> pictures. Crop and flip are drawn from rng once for the
    whole list (the official data set draws them apart, so that its pairs do not match); without rng the crop is
    central and nothing is flipped. All scaling is Lanczos."""
    if name == "no_resize":
        return _arrange
    if match := re.fullmatch(r"resized_(random)?crop_([1-9]\d*)(_hflip)?", name):
        return partial(_arrange, short=int(match[2]), crop=int(match[2]), random=bool(match[1]), flip=bool(match[3]))
    if match := re.fullmatch(r"resize_([1-9]\d*)(x\1)?", name):
        return partial(_arrange, stretch=int(match[1]))
    if match := re.fullmatch(r"resize_([1-9]\d*)_randomcrop_([1-9]\d*)x\2(_hflip)?", name):
        if int(match[1]) >= int(match[2]):
            return partial(_arrange, stretch=int(match[1]), crop=int(match[2]), random=True, flip=bool(match[3]))
    raise ValueError(f"unknown preparation '{name}': expected resized_crop_N, resized_randomcrop_N, resize_N,"
                     " resize_M_randomcrop_NxN (M at least N), those with a crop also with _hflip, or no_resize")


def canny(picture: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Edges as three equal channels, 0 or 255, bit for bit those of cv2.Canny(rgb, low, high): 3x3 Sobel, L1 norm, at
    each pixel the channel of the largest norm (Canny 1986; the integer arithmetic is OpenCV's imgproc/canny.cpp)."""
    low, high = sorted((math.floor(low), math.floor(high)))
    rgb = np.pad(np.asarray(picture, dtype=np.int16), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth = rgb[:-2] + 2 * rgb[1:-1] + rgb[2:]
    dx = smooth[:, 2:] - smooth[:, :-2]
    smooth = rgb[:, :-2] + 2 * rgb[:, 1:-1] + rgb[:, 2:]
    dy = smooth[2:] - smooth[:-2]
    norm = np.abs(dx) + np.abs(dy)
    strongest = norm.argmax(axis=2, keepdims=True)  # the first of equals, as OpenCV
    dx, dy, norm = (np.take_along_axis(a, strongest, axis=2)[..., 0].astype(np.int32) for a in (dx, dy, norm))
    height, width = norm.shape

    # An edge is a ridge: larger than both neighbours across it. Of two equal neighbours along an axis the first stays.
    padded = np.pad(norm, 1)
    def neighbour(i: int, j: int) -> np.ndarray:
        return padded[1 + i : 1 + i + height, 1 + j : 1 + j + width]
    x, y = np.abs(dx), np.abs(dy) << 15
    tan22 = x * 13573  # tan(22.5 degrees) in units of 2^-15; tan(67.5) is 2 more
    falling = (norm > neighbour(-1, -1)) & (norm > neighbour(1, 1))
    rising = (norm > neighbour(-1, 1)) & (norm > neighbour(1, -1))
    ridge = np.where((dx ^ dy) < 0, rising, falling)
    ridge = np.where(y > tan22 + (x << 16), (norm > neighbour(-1, 0)) & (norm >= neighbour(1, 0)), ridge)
    ridge = np.where(y < tan22, (norm > neighbour(0, -1)) & (norm >= neighbour(0, 1)), ridge)
    ridge = np.pad(ridge & (norm > low), 1)

    # Hysteresis: from the strong ridge pixels along the weak ones, all eight ways. A plain stack takes the same short
    # time however long and winding the lines are, which growing whole arrays step by step does not.
    step = width + 2
    around = (-step - 1, -step, -step + 1, -1, 1, step - 1, step, step + 1)
    strong = ridge & (padded > high)
    weak = bytearray((ridge & ~strong).tobytes())
    stack = np.flatnonzero(strong).tolist()
    while stack:
        pixel = stack.pop()
        for offset in around:
            if weak[pixel + offset]:
                weak[pixel + offset] = 0
                stack.append(pixel + offset)
    left = np.frombuffer(weak, dtype=bool).reshape(ridge.shape)
    edges = (ridge & ~left)[1:-1, 1:-1].astype(np.uint8) * 255
    return Image.fromarray(edges).convert("RGB")


def sketch(picture: Image.Image) -> Image.Image:
    """The sketch input of the official script, pixel < 0.5 -> 1 a channel: dark strokes become white, paper black."""
    return Image.fromarray((np.asarray(picture) < 128).astype(np.uint8) * 255)
