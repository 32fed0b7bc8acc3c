"""Pictures before they are tensors: opening, cropping, edges, folders of pairs, the order of training.

A paired data set is a folder (the layout of img2img-turbo, github.com/GaParmar/img2img-turbo):

    train_A/  train_B/  train_prompts.json      inputs, targets of the same name (or stem), {"file name": "caption"}
    test_A/   test_B/   test_prompts.json       without the json: a .txt beside a picture, else no caption

An unpaired one has the same four folders, names at will, and fixed_prompt_a.txt, fixed_prompt_b.txt. For YOSO's
training, pictures with captions are the targets of a paired set, or any of

    FOLDER                      pictures, with metadata.jsonl ({"file_name": ..., "text": ...}) or a .txt beside each
    FILE.zip                    pictures, with dataset.json ({"labels": [["name", class], ...]}: the layout of EDM)
    FILE.txt                    captions alone, one a line: a --teacher draws the pictures
    CACHE                       what `data.py cache` made of one of these

of which every tenth item is for the test, unless FOLDER has train/ and test/. What is wrong with a folder or a file is
a ValueError of one sentence, at construction or at the item. Commands:

    python data.py check FOLDER                 counts, sizes, captions, problems, and a contact sheet
    python data.py cache DATA --base B --output CACHE           latents and text contexts, computed once
    python data.py prior FOLDER --base B --size S --output F    mean and deviation of a folder's latents
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import training

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # of Pillow's: one of the others runs PostScript
MAX_PIXELS = 178_956_970  # Pillow's own limit for an error: half a gigabyte as RGB
MAX_UNZIPPED = 1 << 28  # bytes of one file in a zip, which may claim, and unpack to, a thousand times its size
CACHE = "one-step-diffusion cache 1"


# -------------------- One picture

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


# -------------------- Preparations, by the names of the official scripts

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


# -------------------- Conditions drawn from a picture

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


# -------------------- Folders

def pictures_in(folder: Path) -> list[str]:
    """The names of its pictures, sorted. ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected one with pictures in it")
    files = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file())
    if not (names := sorted(p.name for p in files)):
        raise ValueError(f"{folder} holds no picture: expected files ending in {', '.join(sorted(SUFFIXES))}")
    return names


def _partners(a: list[str], b: list[str]) -> dict[str, str | None]:
    """Name in A -> name in B: the same, else the only one of the same stem that no other has claimed, else None."""
    same, stems = set(a) & set(b), {}
    for name in sorted(set(b) - same):
        stems.setdefault(Path(name).stem, []).append(name)
    found = {name: stems.pop(Path(name).stem, []) for name in a if name not in same}
    return {name: name if name in same else found[name][0] if len(found[name]) == 1 else None for name in a}


@contextlib.contextmanager
def _reading(what: object, expected: str) -> Iterator[None]:
    """Whatever a damaged or foreign file makes Python or a library raise becomes one sentence that names it."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
        raise ValueError(f"{what} cannot be used ({text}); expected {expected}") from None


def _read_text(path: Path) -> str:
    with _reading(path, "text in UTF-8"):
        return path.read_text(encoding="utf-8-sig")


def read_prompts(path: Path) -> dict[str, str] | None:
    """{file name: caption}, None without the file."""
    if not path.exists():
        return None
    text = _read_text(path)
    with _reading(path, "JSON, {file name: caption}"):
        prompts = json.loads(text)
        if not isinstance(prompts, dict):
            raise ValueError(f"it holds a {type(prompts).__name__}")
        if odd := [name for name, caption in prompts.items() if not isinstance(caption, str)]:
            raise ValueError(f"the caption of '{odd[0]}' is a {type(prompts[odd[0]]).__name__}")
    return prompts


def _caption(a: Path, b: Path, prompts: dict[str, str] | None) -> str | None:
    if prompts is not None:
        return prompts.get(a.name, prompts.get(b.name))
    for text in (a.with_suffix(".txt"), b.with_suffix(".txt")):
        if text.exists():
            return " ".join(_read_text(text).split())
    return None


def _complete(captions: dict[str, str | None], source: Path) -> list[str]:
    if missing := [name for name, caption in captions.items() if caption is None]:
        raise ValueError(f"{source} has no caption for '{missing[0]}' ({len(missing)} of {len(captions)} have none)")
    return list(captions.values())


def _drawing(item: int | tuple[int, tuple[int, ...]]) -> tuple[int, np.random.Generator | None]:
    """The index of an item, i or (i, key), and what its crop and flip are drawn from."""
    return (item[0], np.random.default_rng(item[1])) if isinstance(item, tuple) else (item, None)


class PairedFolder(Dataset):
    """The pairs of one split; item i, or (i, key) with key the integers from which crop and flip are drawn:
    input [3, H, W] in [0, 1], target [3, H, W] in [-1, 1], caption, name (the file's in A)."""

    def __init__(self, folder: str | Path, split: str, prep: str):
        self.a, self.b = Path(folder) / f"{split}_A", Path(folder) / f"{split}_B"
        self.prepare = prepare(prep)
        partners = _partners(pictures_in(self.a), pictures_in(self.b))
        if alone := [name for name, partner in partners.items() if partner is None]:
            raise ValueError(f"{self.a / alone[0]} has no partner of its name or stem in {self.b.name} ({len(alone)} "
                             f"of {len(partners)} have none): add the missing pictures or remove these")
        self.pairs = list(partners.items())
        path = Path(folder) / f"{split}_prompts.json"
        prompts = read_prompts(path)
        captions = {a: _caption(self.a / a, self.b / b, prompts) for a, b in self.pairs}
        self.captions = [text or "" for text in captions.values()] if prompts is None else _complete(captions, path)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        index, rng = _drawing(item)
        name, partner = self.pairs[index]
        pair = [open_picture(self.a / name), open_picture(self.b / partner)]
        if pair[0].size != pair[1].size:
            sizes = " and ".join("{}x{}".format(*picture.size) for picture in pair)
            raise ValueError(f"{self.a / name} and its partner in {self.b.name} are {sizes} pixels: make them equal")
        a, b = self.prepare(pair, rng)
        return dict(input=to_tensor(a), target=to_tensor(b) * 2 - 1, caption=self.captions[index], name=name)


class UnpairedFolder(Dataset):
    """The pictures of two domains; item i, or (i, key), is the i-th of A with one of B, drawn from the key (the i-th
    without one): a, b [3, H, W] in [-1, 1], name_a, name_b. `prompts` are the two fixed captions, of A and of B."""

    def __init__(self, folder: str | Path, split: str, prep: str):
        self.sides, self.prepare = [Path(folder) / f"{split}_A", Path(folder) / f"{split}_B"], prepare(prep)
        self.names = [pictures_in(side) for side in self.sides]
        self.prompts = tuple(_read_text(Path(folder) / f"fixed_prompt_{domain}.txt").strip() for domain in "ab")

    def __len__(self) -> int:
        return max(map(len, self.names))

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        index, rng = _drawing(item)
        other = index if rng is None else int(rng.integers(len(self.names[1])))
        names = [names[i % len(names)] for names, i in zip(self.names, (index, other))]
        a, b = (to_tensor(self.prepare([open_picture(side / name)], rng)[0]) * 2 - 1
                for side, name in zip(self.sides, names))
        return dict(a=a, b=b, name_a=names[0], name_b=names[1])


def open_unpaired(folder: str | Path, split: str, prep: str, seed: int = 0, size: int = 64) -> Dataset:
    """A folder of two domains, or drawn:day2night or drawn:clear2rain, drawn at `size` and without use for prep."""
    if not str(folder).startswith("drawn:"):
        return UnpairedFolder(folder, split, prep)
    prepare(prep)  # a wrong word is an error all the same
    from tiny.scenes import Unpaired
    return Unpaired(str(folder).removeprefix("drawn:"), split, size, seed)


def open_paired(folder: str | Path, split: str, prep: str, seed: int = 0, size: int = 32) -> Dataset:
    """A folder of pairs, or drawn:circles or drawn:scenes, which are drawn at `size` and have no use for prep."""
    if not str(folder).startswith("drawn:"):
        return PairedFolder(folder, split, prep)
    prepare(prep)
    from tiny import circles, scenes
    if str(folder) == "drawn:circles":
        return circles.Circles(split, seed, size)
    if str(folder) == "drawn:scenes":
        return scenes.Paired(split, size, seed)
    raise ValueError(f"there are no drawings {folder}: expected drawn:circles or drawn:scenes")


class Captioned(Dataset):
    """Pictures with captions, of one of the places that this file's first lines name; item i, or (i, key) with key the
    integers from which crop and flip are drawn: target [3, H, W] in [-1, 1] (not of captions alone), caption, name."""

    def __init__(self, source: str | Path, split: str, prep: str, column: str = "text"):
        self.source, self.prepare, self.archive = Path(source), prepare(prep), None
        folders = all((self.source / name).is_dir() for name in ("train", "test"))
        self.folder = self.source / split if folders else self.source
        self.kind = "folder" if self.folder.is_dir() else self.source.suffix
        if self.kind == "folder":
            items = self._in_folder(column)
        elif self.kind == ".zip":
            items = self._in_zip()
        elif self.kind == ".txt":
            lines = [" ".join(line.split()) for line in _read_text(self.source).splitlines()]
            items = [(f"caption {i}", line) for i, line in enumerate(filter(None, lines))]
        else:
            raise ValueError(f"{source} is no data: expected a folder of pictures, a .zip in the layout of EDM, a .txt"
                             " of captions, a cache of data.py, or drawn:scenes")
        test = split == "test"
        self.items = items if folders else [item for i, item in enumerate(items) if (i % 10 == 9) == test]
        if not self.items:
            raise ValueError(f"{self.folder} holds {len(items)} pictures or captions; expected ten or more, of which"
                             " every tenth is for the test")
        self.captions = [caption for _, caption in self.items]

    def _in_zip(self) -> list[tuple[str, str]]:
        with _reading(self.source, "a zip of pictures with a dataset.json, as EDM's dataset_tool.py writes it"):
            names = sorted(n for n in self._archive().namelist() if Path(n).suffix.lower() in SUFFIXES)
            labels = json.loads(self._unzipped("dataset.json"))["labels"] or []
            classes = {name: f"class {int(label)}" for name, label in labels}
        return [(name, classes.get(name, "")) for name in names]

    def _archive(self) -> zipfile.ZipFile:
        if self.archive is None or self.archive[0] != os.getpid():  # processes that share a file share the place in it
            self.archive = os.getpid(), zipfile.ZipFile(self.source)
        return self.archive[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(archive=None)

    def _unzipped(self, name: str) -> bytes:
        with _reading(f"{name} in {self.source}", f"{MAX_UNZIPPED} bytes at most, whole: make the zip anew"):
            if (size := self._archive().getinfo(name).file_size) > MAX_UNZIPPED:
                raise ValueError(f"it unpacks to {size} bytes")
            return self._archive().read(name)

    def _in_folder(self, column: str) -> list[tuple[str, str]]:
        names, table = pictures_in(self.folder), self.folder / "metadata.jsonl"
        if not table.is_file():
            return [(name, _caption(self.folder / name, self.folder / name, None) or "") for name in names]
        captions = {}
        for number, line in enumerate(_read_text(table).split("\n"), start=1):
            with _reading(f"{table} line {number}", f"an object with file_name and {column} (--caption_column)"):
                row = json.loads(line or "null")
                captions |= {row["file_name"]: str(row[column])} if row else {}
        return list(zip(names, _complete({name: captions.get(name) for name in names}, table)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        index, rng = _drawing(item)
        name, caption = self.items[index]
        if self.kind == ".txt":
            return dict(caption=caption, name=name)
        path = self.folder / name
        picture = open_picture(io.BytesIO(self._unzipped(name)) if self.kind == ".zip" else path, path)
        return dict(target=to_tensor(self.prepare([picture], rng)[0]) * 2 - 1, caption=caption, name=name)


class Cached(Dataset):
    """What `cache` wrote: mean and std [4, h, w] of the scaled latent (not of captions alone), context_0 [N, C] and
    context_1 [N] (a mask) of the caption, caption, name. A shard's bytes are hashed when it is first opened."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.sound = Path(folder), set()  # the shards whose hash was found right
        index = read_cache_index(self.folder)
        self.facts, self.shards = index["facts"], index["shards"][split]
        self.items = [(i, row) for i, shard in enumerate(self.shards) for row in range(len(shard["captions"]))]
        self.captions = [caption for shard in self.shards for caption in shard["captions"]]
        if len(self.items) < index["items"][split] or not self.items:
            raise ValueError(f"{folder} holds {len(self.items)} of {index['items'][split]} {split} items; run python"
                             " data.py cache again, which goes on where it stood")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        i, row = self.items[item[0] if isinstance(item, tuple) else item]
        shard = self.shards[i]
        if i not in self.sound:
            check_shard(self.folder, shard)
            self.sound.add(i)
        with safe_open(self.folder / shard["file"], framework="pt") as file:
            tensors = {name: file.get_slice(name)[row] for name in file.keys()}
        return tensors | dict(caption=shard["captions"][row], name=shard["names"][row])


def read_cache_index(folder: Path) -> dict:
    with _reading(folder / "index.json", "the index of a cache, as python data.py cache wrote it"):
        index = json.loads((folder / "index.json").read_text())
        if index["format"] != CACHE:
            raise ValueError(f"its format is {index['format']!r}")
        for shard in index["shards"]["train"] + index["shards"]["test"]:
            texts = [shard["file"], shard["sha256"], *shard["captions"], *shard["names"]]
            if not all(isinstance(text, str) for text in texts) or len(shard["captions"]) != len(shard["names"]) \
                    or not re.fullmatch(r"\w+-\d+\.safetensors", shard["file"]):
                raise ValueError("a shard is not described as one")
        if not all(isinstance(index["items"][split], int) for split in ("train", "test")) or \
                not {"base", "dtype", "vae", "text_encoder"} <= index["facts"].keys():
            raise ValueError("it does not say what it is of, and how much")
    return index


def check_shard(folder: Path, shard: dict) -> None:
    path = folder / shard["file"]
    with contextlib.suppress(OSError):
        if hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]:
            return
    raise ValueError(f"{path} is missing or not what was written: run python data.py cache again, which makes it anew")


def open_captioned(source: str | Path, split: str, prep: str, seed: int = 0, size: int = 64, column: str = "text"
                   ) -> Dataset:
    """Pictures with captions from any place that this file's first lines name."""
    if (Path(source) / "index.json").is_file():
        return Cached(source, split)
    if str(source).startswith("drawn:") or (Path(source) / "train_B").is_dir():
        return open_paired(source, split, prep, seed, size)
    return Captioned(source, split, prep, column)


# -------------------- The order of training

def _steps(length: int, batch: int, seed: int, start: int, end: int | None, rows: Sequence[int]) -> Iterator[list]:
    @lru_cache(maxsize=2)  # a step may reach over the end of an epoch
    def order(epoch: int) -> np.ndarray:
        # (seed, epoch) alone would be the stream of the key (seed, step, 0): numpy fills short keys up with zeros
        return np.random.default_rng((seed, epoch, 0, 1)).permutation(length)

    for step in count(start) if end is None else range(start, end):
        places = [(row, divmod(step * batch + row, length)) for row in rows]
        yield [(int(order(epoch)[place]), (seed, step, row)) for row, (epoch, place) in places]


def collate(items: list[dict]) -> dict:
    def shapes(item: dict) -> list[torch.Size]:
        return [value.shape for value in item.values() if isinstance(value, torch.Tensor)]

    if odd := next((item for item in items if shapes(item) != shapes(items[0])), None):
        names = [item.get("name") or item["name_a"] for item in (items[0], odd)]
        raise ValueError(f"'{names[0]}' and '{names[1]}' differ in size, expected one size a batch: "
                         "choose a preparation that makes them equal, or a batch size of 1")
    return default_collate(items)


def _leave_stops_to_the_trainer(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or torchrun tells every process; one saves the state
        signal.signal(number, signal.SIG_IGN)


def batches(dataset: Dataset, batch: int, seed: int, start_step: int = 0, end_step: int | None = None,
            rows: Sequence[int] | None = None, num_workers: int = 0) -> Iterator[dict]:
    """One dictionary a step (tensors [B, ...], lists of strings) with this process's `rows` of a global batch.

    The samples are one endless row of permutations of the data set, each drawn from (seed, epoch), of which step s
    takes the places s * batch to (s + 1) * batch - 1; row j of step s draws its crop from (seed, s, j). So nothing is
    dropped, a run may begin at any step, and N processes with a part of the rows each are one with all of them.
    ValueError, one sentence, also when a worker met the picture."""
    steps = _steps(len(dataset), batch, seed, start_step, end_step, range(batch) if rows is None else rows)
    loader = DataLoader(dataset, batch_sampler=steps, num_workers=num_workers, collate_fn=collate,
                        pin_memory=torch.cuda.is_initialized(), worker_init_fn=_leave_stops_to_the_trainer,
                        generator=torch.Generator())  # its own: a loader draws a number from the global one otherwise
    iterator = iter(loader)  # named, so that it is there until what comes of a lost worker has been dealt with
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:  # of its pipe, before the signal of its end is heard
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise RuntimeError(f"DataLoader worker is lost: {error or 'end of its pipe'}") from None
    except ValueError as error:  # from a worker it comes as its whole traceback, the sentence last
        error.__traceback__ = iterator = None  # a cycle around the loader, whose workers would end seconds later
        raise ValueError(str(error).rpartition("\nValueError: ")[2].strip()) from None


# -------------------- python data.py check FOLDER

def _attempt(problems: list[str], function: Callable, *arguments):
    """The function's result, or None with the sentence of its ValueError among the problems."""
    try:
        return function(*arguments)
    except ValueError as error:
        problems.append(str(error))


def _survey(side: Path, problems: list[str]) -> dict[str, tuple | None]:
    """Opens every picture of one folder and prints count and sizes: name -> (size, fingerprint), None if unreadable."""
    seen = {}
    for name in tqdm(_attempt(problems, pictures_in, side) or [], desc=side.name, unit=" pictures"):
        picture = _attempt(problems, open_picture, side / name)
        seen[name] = (picture.size, hash(picture.tobytes())) if picture else None
    if sizes := sorted((found[0] for found in seen.values() if found), key=math.prod):
        low, middle, high = ("{}x{}".format(*sizes[i]) for i in (0, len(sizes) // 2, -1))
        print(f"{side.name}: {len(seen)} pictures, distinct sizes {len(set(sizes))}, "
              f"min {low}, median {middle}, max {high}")
    return seen


def _compare(a: Path, b: Path, seen_a: dict, seen_b: dict, problems: list[str]) -> list[tuple[Path, Path, str]]:
    """What can be wrong between two folders and with their captions; returns the pairs that can be shown."""
    partners, captions, pairs = _partners(list(seen_a), list(seen_b)), {}, []
    path = a.with_name(a.name[:-2] + "_prompts.json")
    prompts = _attempt(problems, read_prompts, path)
    for name, partner in partners.items():
        one, other = seen_a[name], seen_b.get(partner)
        if partner is None:
            problems.append(f"{a / name} has no partner in {b.name}")
        elif one and other and one[0] != other[0]:
            problems.append("{} is {}x{} pixels but its partner {}x{}".format(a / name, *one[0], *other[0]))
        elif one and one == other:
            problems.append(f"{a / name} and its partner are identical")
        captions[name] = _attempt(problems, _caption, a / name, b / (partner or name), prompts)
        if one and other:
            pairs.append((a / name, b / partner, captions[name] or ""))
    problems += [f"{b / name} has no partner in {a.name}" for name in seen_b if name not in partners.values()]

    given = [caption for caption in captions.values() if caption]
    if given or prompts is not None:  # a folder without any caption is meant so, one that lacks some is not
        problems += [f"{a / name} has no caption" for name, caption in captions.items() if caption is None]
    if extra := [name for name in prompts or () if name not in seen_a and name not in seen_b]:
        problems.append(f"{path} has {len(extra)} entries without a picture, the first '{extra[0]}'")
    print(f"{a.name[:-2]} captions: {len(given)}, {len(captions) - len(given)} empty, "
          f"longest {max(map(len, given), default=0)} characters")
    for caption in list(dict.fromkeys(given))[:3]:
        print(f"    {caption}")
    return pairs


def _contact_sheet(pairs: list[tuple[Path, Path, str]], side: int = 192) -> Image.Image:
    """Up to 16 pairs spread over the list, A beside B, the caption below."""
    pairs = [pairs[i * len(pairs) // min(16, len(pairs))] for i in range(min(16, len(pairs)))]
    columns = math.ceil(math.sqrt(len(pairs)))
    width, height = 2 * side + 16, side + 48
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pairs) / columns) * height), "white")
    for i, (a, b, caption) in enumerate(pairs):
        left, top = i % columns * width + 8, i // columns * height + 8
        for x, path in ((left, a), (left + side, b)):
            picture = open_picture(path)
            picture.thumbnail((side, side))
            sheet.paste(picture, (x, top))
        lines = textwrap.wrap(caption, 64, max_lines=2, placeholder=" ...")
        ImageDraw.Draw(sheet).multiline_text((left, top + side + 4), "\n".join(lines), fill="black")
    return sheet


def check(folder: str | Path, output: str | Path | None = None) -> list[str]:
    """Prints what a data folder holds, paired or unpaired (fixed_prompt_a.txt or _b.txt and no SPLIT_prompts.json), and
    its problems, which it returns; writes a contact sheet, FOLDER_check.png here unless told otherwise."""
    folder = Path(folder)
    splits = [(folder / f"{split}_A", folder / f"{split}_B") for split in ("train", "test")]
    splits = [(a, b) for a, b in splits if a.is_dir() or b.is_dir()]
    if not splits:
        raise ValueError(f"{folder} is not a data set: expected a folder with train_A and train_B inside")
    fixed = [folder / "fixed_prompt_a.txt", folder / "fixed_prompt_b.txt"]
    paired = any(folder.glob("*_prompts.json")) or not any(path.exists() for path in fixed)
    problems, pairs = [], []
    for a, b in splits:
        seen_a, seen_b = _survey(a, problems), _survey(b, problems)
        if paired:
            pairs += _compare(a, b, seen_a, seen_b, problems)
        else:
            pairs += [(a / x, b / y, "") for x, y in zip(seen_a, seen_b, strict=False) if seen_a[x] and seen_b[y]]
    for path in [] if paired else fixed:
        text = _attempt(problems, _read_text, path)
        print(f"{path.name}: {(text or '').strip()}")
    print("\n".join(f"problem: {problem}" for problem in problems) or "no problems")
    if pairs:
        output = Path(output or f"{folder.resolve().name}_check.png")
        _contact_sheet(pairs).save(output)
        print(output)
    return problems


def cache(source: str, base_name: str, output: Path, prep: str, size: int, column: str, seed: int, batch: int,
          device: str, dtype: str, shard_items: int = 256) -> None:
    """Writes latents and text contexts of a data set, a shard at a time: no more is in memory. Shards that are there
    and whole are kept, so a stopped run goes on. Without pictures, contexts alone."""
    from models import weights
    base = weights.load_base(base_name, ("text_encoder", "tokenizer"), getattr(torch, dtype), device)
    base.vae = weights.load_base(base_name, ("vae",), torch.float32, device).vae  # as in training, which compares it
    facts = dict(base=base_name, dtype=dtype, prep=prep, size=size, column=column, seed=seed, data=str(source),
                 vae=weights.fingerprint(base.vae), text_encoder=weights.fingerprint(base.text_encoder))
    sets = {split: open_captioned(source, split, prep, seed, size, column) for split in ("train", "test")}
    if isinstance(sets["train"], Cached):
        raise ValueError(f"{source} is a cache already; expected pictures or captions")
    index = dict(format=CACHE, facts=facts, items={k: len(v) for k, v in sets.items()}, shards=dict(train=[], test=[]))
    output.mkdir(parents=True, exist_ok=True)
    if (output / "index.json").exists():
        wanted, index = index, read_cache_index(output)
        if any(index[key] != wanted[key] for key in ("facts", "items")):
            raise ValueError(f"{output} is a cache of {index['facts']}, not {facts}: choose another --output")
    elif any(output.iterdir()):
        raise ValueError(f"{output} is not empty and no cache: choose another --output")

    def write_index() -> None:
        training.write_file(output / "index.json", lambda path: path.write_text(json.dumps(index)))

    @torch.inference_mode()
    def encoded(items: list[dict]) -> dict[str, torch.Tensor]:
        found = {f"context_{i}": c.cpu() for i, c in enumerate(base.encode([item["caption"] for item in items]))}
        if "target" in items[0]:
            mean, logvar, _ = base.vae.encode(collate(items)["target"].to(device))
            scale = base.vae.config.scaling_factor
            found |= dict(mean=mean.cpu() * scale, std=(0.5 * logvar).exp().cpu() * scale)
        return found

    write_index()  # the folder is a cache from now on, wherever the work is stopped
    for split, items in sets.items():
        starts = range(0, len(items), shard_items)
        for number, start in enumerate(tqdm(starts, split, unit=" shards")):
            if number < len(index["shards"][split]):
                with contextlib.suppress(ValueError):
                    check_shard(output, index["shards"][split][number])
                    continue
            rows = [items[(i, (seed, 0, i))] for i in range(len(items))[start:start + shard_items]]
            made = [encoded(rows[i:i + batch]) for i in range(0, len(rows), batch)]
            shard = dict(file=f"{split}-{number:05d}.safetensors", captions=[row["caption"] for row in rows],
                         names=[row["name"] for row in rows])
            weights.save_tensors(output / shard["file"], {k: torch.cat([m[k] for m in made]) for k in made[0]}, {})
            shard["sha256"] = hashlib.sha256((output / shard["file"]).read_bytes()).hexdigest()
            index["shards"][split][number:number + 1] = [shard]
            write_index()
    print(output)


def prior(folder: str | Path, base: str, size: int, output: str | Path) -> None:
    """Writes mean and deviation of the scaled latents of a folder's pictures, cropped to size x size."""
    from models import diffusion, weights
    names = pictures_in(Path(folder))
    vae = weights.load_base(base, ("vae",), torch.float32).vae
    if size < 1 or size % vae.factor:
        raise ValueError(f"--size {size}: expected a multiple of {vae.factor}")

    def latents() -> Iterator[torch.Tensor]:
        for name in tqdm(names, unit=" pictures"):
            pictures = prepare(f"resized_crop_{size}")([open_picture(Path(folder) / name)])
            with torch.inference_mode():
                yield vae.encode(2 * to_tensor(pictures[0])[None] - 1)[0][0] * vae.config.scaling_factor

    weights.save_prior(Path(output), *diffusion.mean_and_std(latents()))
    print(output)


def main() -> None:
    parser = argparse.ArgumentParser(prog="data.py", description="Looks at pictures, and prepares them.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="print counts, sizes, captions and problems, write a contact sheet")
    command.add_argument("folder", help="holds train_A, train_B and so on")
    command.add_argument("--output", help="the contact sheet (default: FOLDER_check.png)")
    command = commands.add_parser("prior", help="estimate mean and deviation of the latents of a folder's pictures")
    command.add_argument("folder", help="holds pictures")
    command.add_argument("--base", default="sd-turbo", help="whose VAE [sd-turbo]")
    command.add_argument("--size", type=int, default=512, help="of the pictures to be drawn [512]")
    command.add_argument("--output", default="prior.safetensors")
    command = commands.add_parser("cache", help="compute latents and text contexts of a data set once")
    command.add_argument("data", help="a folder, a .zip, a .txt of captions, or drawn:scenes")
    command.add_argument("--base", default="sd15", help="whose VAE and text encoder [sd15]")
    command.add_argument("--output", type=Path, required=True, help="a folder; one that was stopped goes on")
    command.add_argument("--prep", help="the preparation of the pictures [resized_crop_SIZE]")
    command.add_argument("--size", type=int, default=512, help="[512]")
    command.add_argument("--caption_column", default="text", help="of metadata.jsonl [text]")
    command.add_argument("--seed", type=int, default=42, help="of random crops and flips, drawn once [42]")
    command.add_argument("--batch", type=int, default=8, help="items at a time [8]")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                         help="of the text encoder [float32]")
    args = training.parse_args(parser, sys.argv[1:] or ["--help"])
    if args.command == "check":
        sys.exit(2 if check(args.folder, args.output) else 0)
    if args.command == "prior":
        prior(args.folder, args.base, args.size, args.output)
    else:
        cache(args.data, args.base, args.output, args.prep or f"resized_crop_{args.size}", args.size,
              args.caption_column, args.seed, args.batch, str(training.pick_device(args.device)), args.dtype)


if __name__ == "__main__":
    training.run(main)
