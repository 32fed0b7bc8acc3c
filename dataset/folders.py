"""Data sets of folders, zips and caption files. The package's docstring describes their layouts.

An item is asked for by its index i, or by (i, key): crop and flip are drawn from the integers of
the key, and without a key the crop is central and nothing is flipped.
"""

import contextlib
import io
import json
import os
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dataset.pictures import SUFFIXES, open_picture, prepare, to_tensor
from training.exits import say_once

# Bytes of one file in a zip. A zip may claim, and unpack to, a thousand times its own size.
MAX_UNZIPPED = 1 << 28

Item = int | tuple[int, tuple[int, ...]]

# One caption, or several of which each training step draws one.
Caption = str | list[str]

# {kind of thing: the names of those that are left out}. A kind may say why: "KIND, as REASON".
LeftOut = dict[str, list[str]]

PLURALS = {
    "folder": "folders",
    "hidden picture": "hidden pictures",
    "broken link": "broken links",
    "file of another kind": "files of another kind",
    "caption file without a picture": "caption files without a picture",
    "caption without a picture": "captions without a picture",
    "caption file": "caption files",
    "repeated caption": "repeated captions",
    "label without a picture": "labels without a picture",
    "picture without a partner": "pictures without a partner",
    "entry that macOS added": "entries that macOS added",
    "picture": "pictures",
    "text": "texts",
    "repeated entry": "repeated entries",
}

# Files beside pictures that are no pictures and that nobody misses.
CLUTTER = {"thumbs.db", "desktop.ini"}


# -------------------- files

def pictures_in(folder: Path) -> list[str]:
    """The sorted file names of the pictures in a folder. ValueError if there are none.

    What else the folder holds is named on stderr.
    """
    names, left_out = list_folder(folder)
    report_left_out(folder, left_out)
    return names


def list_folder(folder: Path) -> tuple[list[str], LeftOut]:
    """The sorted file names of the pictures in a folder, and what else is in it.

    ValueError if there are no pictures.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected one with pictures in it")
    names = []
    left_out = {}
    texts = []
    for path in sorted(folder.iterdir()):
        kind = _kind_of(path)
        if kind == "picture":
            names.append(path.name)
        elif kind == "text":
            texts.append(path.name)
        elif kind is not None:
            left_out.setdefault(kind, []).append(path.name)

    stems = {Path(name).stem for name in names}
    unused = [text for text in texts if Path(text).stem not in stems]
    if unused:
        left_out["caption file without a picture"] = unused
    if not names:
        found = ""
        if left_out:
            found = f" but {describe_left_out(left_out)}"
        raise ValueError(
            f"{folder} holds no picture{found}: expected files ending in .bmp, .gif, .jpg, .png,"
            " .tif, .webp or another suffix of dataset.pictures.SUFFIXES"
        )
    return sorted(names), left_out


def _kind_of(path: Path) -> str | None:
    """What a folder's entry is: picture, text, something to leave out, or None for clutter."""
    is_picture = path.suffix.lower() in SUFFIXES
    if path.name.startswith("."):
        return "hidden picture" if is_picture else None
    if is_picture and path.is_file():
        return "picture"
    if path.is_dir():
        return "folder"
    if not path.is_file():
        return "broken link"
    if path.suffix == ".txt":
        return "text"
    if path.name.lower() in CLUTTER:
        return None
    return "file of another kind"


def describe_left_out(left_out: LeftOut) -> str:
    """Such as "2 folders (old, raw), 1 hidden picture (._a.png)"; three names of each kind."""
    parts = []
    for kind, names in left_out.items():
        noun, comma, reason = kind.partition(", ")
        if len(names) > 1:
            noun = PLURALS[noun]
        parts.append(f"{len(names)} {noun} ({_shortened(names)}){comma}{reason}")
    return ", ".join(parts)


def _shortened(names: list[str]) -> str:
    """The first three of a list of names, on one line."""
    shown = [" ".join(name.split()) for name in names[:3]]
    if len(names) > 3:
        shown.append("...")
    return ", ".join(shown)


def report_left_out(source: object, left_out: LeftOut) -> None:
    """Names what of `source` is not used, in one line on stderr; nothing if all is used."""
    if left_out:
        say_once(f"{source}: left out {describe_left_out(left_out)}")


def report_empty(source: object, captions: dict[str, str]) -> None:
    """Says on stderr how many captions of {name: caption} are empty, if any are."""
    empty = [name for name, caption in captions.items() if not _has_text(caption)]
    if empty:
        count = f"{len(empty)} of {len(captions)}"
        say_once(f"{source}: {count} captions are empty ({_shortened(empty)})")


def _has_text(caption: Caption | None) -> bool:
    """Whether a caption, or one of a list, is more than spaces."""
    texts = [caption] if isinstance(caption, str) else caption or []
    return any(text.strip() for text in texts)


@contextlib.contextmanager
def reading(what: object, expected: str) -> Iterator[None]:
    """Turns whatever a damaged or foreign file makes Python raise into one sentence.

    The sentence names the file, `what`, and what was `expected`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(what, Path) and what.is_file():
            from files import kinds

            kind = kinds.of_bytes(kinds.first_bytes(what))
            if kind:
                raise ValueError(f"{what} is {kind}; expected {expected}") from None
        reason = " ".join(str(error).split())
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        elif not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{what} cannot be used ({reason}); expected {expected}") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. ValueError for others."""
    with reading(path, "text in UTF-8"):
        text = path.read_text(encoding="utf-8-sig")
        if text.startswith("version https://git-lfs"):
            raise ValueError("it is a pointer")  # which must not become a caption
        return text


def _repeated(names: list[str]) -> list[str]:
    """The names that occur more than once, each once."""
    return [name for name, count in Counter(names).items() if count > 1]


def read_prompts(path: Path) -> dict[str, str] | None:
    """{file name: caption} of a JSON file, or None if there is no such file."""
    if not path.exists():
        return None
    text = read_text(path)
    repeated: list[str] = []

    def collect(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        repeated.extend(_repeated(names))
        return dict(pairs)

    with reading(path, "JSON, {file name: caption}"):
        prompts = json.loads(text, object_pairs_hook=collect)
        if not isinstance(prompts, dict):
            raise ValueError(f"it holds {_type_name(prompts)}")
        for name, caption in prompts.items():
            if not isinstance(caption, str):
                raise ValueError(f"the caption of '{name}' is {_type_name(caption)}, not text")
    if repeated:
        report_left_out(path, {"repeated caption, as the last one counts": repeated})
    return {composed(name): caption for name, caption in prompts.items()}


def composed(name: str) -> str:
    """A file name in one of its Unicode forms. Disks and archives differ in whether é is one
    character or two."""
    return unicodedata.normalize("NFC", name)


def find_caption(a: Path, b: Path, prompts: dict[str, str] | None) -> str | None:
    """The caption of the pair of files a and b, or None if it has none.

    It is looked up in `prompts`, under either name; if that is None, in a .txt beside a or b.
    """
    if prompts is not None:
        return prompts.get(composed(a.name), prompts.get(composed(b.name)))
    for path in (a.with_suffix(".txt"), b.with_suffix(".txt")):
        if path.exists():
            return " ".join(read_text(path).split())
    return None


def texts_beside(folder: Path, names: list[str]) -> list[str]:
    """The names of the .txt files beside pictures of a folder."""
    texts = [Path(name).with_suffix(".txt").name for name in names]
    return [text for text in dict.fromkeys(texts) if (folder / text).is_file()]


def check_captions(captions: dict[str, str | None], source: Path) -> None:
    """ValueError if a picture has no caption; `source` is the file that should hold it."""
    missing = [name for name, caption in captions.items() if caption is None]
    if missing:
        raise ValueError(
            f"{source} has no caption for '{missing[0]}'"
            f" ({len(missing)} of {len(captions)} have none)"
        )


def match_partners(a: list[str], b: list[str]) -> dict[str, str | None]:
    """For each file name in A its partner's name in B, or None.

    The partner has the same name, or else the same stem. A stem that several files of B share, or
    that an earlier file of A has claimed, gives no partner.
    """
    same = {composed(name): name for name in b}
    claimed = {composed(name) for name in a}
    by_stem = {}
    for name in sorted(set(b)):
        if composed(name) not in claimed:
            by_stem.setdefault(composed(Path(name).stem), []).append(name)

    partners = {}
    for name in a:
        partners[name] = same.get(composed(name))
        if partners[name]:
            continue
        candidates = by_stem.pop(composed(Path(name).stem), [])
        if len(candidates) == 1:
            partners[name] = candidates[0]
    return partners


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of the last change: what shows that a file is another one now."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def split_item(item: Item) -> tuple[int, np.random.Generator | None]:
    """The index of an item, and the random generator that its key seeds (None without a key)."""
    if isinstance(item, tuple):
        index, key = item
        return index, np.random.default_rng(key)
    return item, None


def _draw_caption(caption: Caption, item: Item) -> str:
    """The caption, or one of a list: drawn from the item's key, the first without a key."""
    if isinstance(caption, str):
        return caption
    if not isinstance(item, tuple):
        return caption[0]
    # A generator of its own, so that crops and flips do not depend on the number of captions.
    # Its last number keeps it apart from those of crops and of the order of an epoch.
    rng = np.random.default_rng((*item[1], 2))
    return caption[int(rng.integers(len(caption)))]


def _to_signed_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> [3, H, W] in [-1, 1]."""
    return to_tensor(picture) * 2 - 1


# -------------------- pairs

class PairedFolder(Dataset):
    """The pairs of one split.

    An item holds input [3, H, W] in [0, 1], target [3, H, W] in [-1, 1], caption, and name, the
    file name of the input.
    """

    def __init__(self, folder: str | Path, split: str, prep: str):
        self.a = Path(folder) / f"{split}_A"
        self.b = Path(folder) / f"{split}_B"
        self.prepare = prepare(prep)

        inputs = pictures_in(self.a)
        targets = pictures_in(self.b)
        partners = match_partners(inputs, targets)
        alone = [name for name, partner in partners.items() if partner is None]
        if alone:
            raise ValueError(
                f"{self.a / alone[0]} has no partner of its name or stem in {self.b.name}"
                f" ({len(alone)} of {len(partners)} have none):"
                " add the missing pictures or remove these"
            )
        self.pairs = list(partners.items())
        taken = set(partners.values())
        unused = [name for name in targets if name not in taken]
        if unused:
            report_left_out(self.b, {"picture without a partner": unused})

        path = Path(folder) / f"{split}_prompts.json"
        prompts = read_prompts(path)
        captions = {}
        for a, b in self.pairs:
            captions[a] = find_caption(self.a / a, self.b / b, prompts)
        # A prompts.json must be complete. Without one, captions are optional.
        if prompts is not None:
            check_captions(captions, path)
            known = {composed(name) for name in (*inputs, *targets)}
            unused = [name for name in prompts if name not in known]
            if unused:
                report_left_out(path, {"caption without a picture": unused})
            for side, names in ((self.a, inputs), (self.b, targets)):
                texts = texts_beside(side, names)
                if texts:
                    kind = f"caption file, as {path.name} holds the captions"
                    report_left_out(side, {kind: texts})
        report_empty(self.a, captions)
        self.captions = [caption or "" for caption in captions.values()]

    def __len__(self) -> int:
        return len(self.pairs)

    def state(self, index: int) -> tuple:
        """Changes when the target or the caption of an item does."""
        name, partner = self.pairs[index]
        return name, self.captions[index], *file_state(self.b / partner)

    def __getitem__(self, item: Item) -> dict:
        index, rng = split_item(item)
        name, partner = self.pairs[index]
        pair = [open_picture(self.a / name), open_picture(self.b / partner)]
        if pair[0].size != pair[1].size:
            sizes = " and ".join(f"{picture.width}x{picture.height}" for picture in pair)
            raise ValueError(
                f"{self.a / name} and its partner in {self.b.name} are {sizes} pixels:"
                " resize or crop one of them"
            )
        a, b = self.prepare(pair, rng)
        return dict(
            input=to_tensor(a),
            target=_to_signed_tensor(b),
            caption=self.captions[index],
            name=name,
        )


def check_preparation(folder: str | Path, *given: str | None) -> None:
    """ValueError for a preparation that was given for drawings, which have the size asked for."""
    if str(folder).startswith("drawn:") and any(given):
        raise ValueError(
            f"{folder} is drawn in the size of --resolution; leave --train_image_prep and"
            " --test_image_prep out"
        )


def open_paired(
    folder: str | Path,
    split: str,
    prep: str,
    seed: int = 0,
    size: int = 32,
) -> Dataset:
    """A folder of pairs, drawn:scenes, or drawn:loose, where one caption in five is a loose one.

    `seed` and `size` are those of the drawings, which ignore `prep` except that it must exist.
    """
    if not str(folder).startswith("drawn:"):
        return PairedFolder(folder, split, prep)
    prepare(prep)
    from tiny import scenes

    if str(folder) not in ("drawn:scenes", "drawn:loose"):
        raise ValueError(
            f"there are no drawings {folder}: expected drawn:scenes or drawn:loose"
        )
    return scenes.Paired(split, size, seed, loose=str(folder) == "drawn:loose")


# -------------------- two domains without pairs

class UnpairedFolder(Dataset):
    """The pictures of two domains, A and B; the larger one gives the length.

    An item holds a and b, [3, H, W] in [-1, 1], name_a and name_b. Its index chooses the picture
    of A, or where A has fewer, one of A is drawn from the key. That of B is always drawn from it.
    Without a key, the index chooses both. `prompts` are the two fixed captions, of A and of B.
    """

    def __init__(self, folder: str | Path, split: str, prep: str):
        folder = Path(folder)
        self.prepare = prepare(prep)
        self.sides = [folder / f"{split}_A", folder / f"{split}_B"]
        self.names = [pictures_in(side) for side in self.sides]
        self.prompts = (
            read_text(folder / "fixed_prompt_a.txt").strip(),
            read_text(folder / "fixed_prompt_b.txt").strip(),
        )
        if split == "train":
            names = ("fixed_prompt_a.txt", "fixed_prompt_b.txt")
            report_empty(folder, dict(zip(names, self.prompts, strict=True)))
            for side, pictures in zip(self.sides, self.names):
                beside = texts_beside(side, pictures)
                if beside:
                    kind = "caption file, as each domain has one caption"
                    report_left_out(side, {kind: beside})

    def __len__(self) -> int:
        return max(len(names) for names in self.names)

    def __getitem__(self, item: Item) -> dict:
        index_a, rng = split_item(item)
        names_a, names_b = self.names
        index_b = index_a
        if rng is not None:
            index_b = int(rng.integers(len(names_b)))
            if index_a >= len(names_a):
                index_a = int(rng.integers(len(names_a)))
        name_a = names_a[index_a % len(names_a)]
        name_b = names_b[index_b % len(names_b)]

        # Two calls, because the two crops are drawn one after the other.
        side_a, side_b = self.sides
        (a,) = self.prepare([open_picture(side_a / name_a)], rng)
        (b,) = self.prepare([open_picture(side_b / name_b)], rng)
        return dict(
            a=_to_signed_tensor(a),
            b=_to_signed_tensor(b),
            name_a=name_a,
            name_b=name_b,
        )


def open_unpaired(
    folder: str | Path,
    split: str,
    prep: str,
    seed: int = 0,
    size: int = 64,
) -> Dataset:
    """A folder of two domains, or drawn:day2night or drawn:clear2rain.

    `seed` and `size` are those of the drawings, which ignore `prep` except that it must exist.
    """
    if not str(folder).startswith("drawn:"):
        return UnpairedFolder(folder, split, prep)
    prepare(prep)
    from tiny.scenes import Unpaired

    task = str(folder).removeprefix("drawn:")
    return Unpaired(task, split, size, seed)


# -------------------- pictures with captions

class _PictureZip:
    """A zip of pictures that several processes may read.

    Processes that share an open file also share the position in it, so each process opens the
    zip for itself.
    """

    def __init__(self, path: Path):
        self.path = path
        self.opened_by = None
        self.archive = None

    def __getstate__(self) -> dict:
        return dict(path=self.path, opened_by=None, archive=None)

    def _open(self) -> zipfile.ZipFile:
        if self.opened_by != os.getpid():
            self.archive = zipfile.ZipFile(self.path)
            self.opened_by = os.getpid()
        return self.archive

    def contents(self) -> tuple[list[str], LeftOut]:
        """The sorted names of the pictures, and what else the zip holds."""
        names = []
        left_out = {}
        entries = self._open().namelist()
        repeated = sorted(_repeated(entries))
        if repeated:
            left_out["repeated entry, as the last one counts"] = repeated
        for name in sorted(set(entries)):
            kind = _kind_in_zip(name)
            if kind == "picture":
                names.append(name)
            elif kind is not None:
                left_out.setdefault(kind, []).append(name)
        return names, left_out

    def has(self, name: str) -> bool:
        return name in self._open().namelist()

    def read(self, name: str) -> bytes:
        expected = f"{MAX_UNZIPPED} bytes at most, whole: make the zip again"
        with reading(f"{name} in {self.path}", expected):
            size = self._open().getinfo(name).file_size
            if size > MAX_UNZIPPED:
                raise ValueError(f"it unpacks to {size} bytes")
            return self._open().read(name)


def _kind_in_zip(name: str) -> str | None:
    """What an entry of a zip is: picture, something to leave out, or None for what is expected."""
    path = Path(name)
    if "__MACOSX" in path.parts or path.name.startswith("._"):
        return "entry that macOS added"
    is_picture = path.suffix.lower() in SUFFIXES
    if name.endswith("/") or name == "dataset.json":
        return None
    if path.name.startswith("."):
        return "hidden picture" if is_picture else None
    return "picture" if is_picture else "file of another kind"


def _whole_number(label: object) -> int:
    """A label of dataset.json. ValueError if it is no whole number."""
    if isinstance(label, bool) or (isinstance(label, float) and not label.is_integer()):
        raise ValueError(f"a label is {label!r}, not a whole number")
    return int(label)


def _captions_of_zip(archive: _PictureZip) -> tuple[list[tuple[str, str]], LeftOut]:
    """(name, caption) of all pictures; the caption is "class N", or empty without a label.

    And what of the zip is left out.
    """
    expected = "a zip of pictures with a dataset.json, as EDM's dataset_tool.py writes it"
    with reading(archive.path, expected):
        names, left_out = archive.contents()
        if not archive.has("dataset.json"):
            raise ValueError("it has no dataset.json at its top")
        labels = json.loads(archive.read("dataset.json"))["labels"] or []
        classes = {}
        for name, label in labels:
            classes[composed(name)] = f"class {_whole_number(label)}"
    known = {composed(name) for name in names}
    unused = [name for name in classes if name not in known]
    if unused:
        left_out["label without a picture"] = unused
    return [(name, classes.get(composed(name), "")) for name in names], left_out


def _captions_of_folder(
    folder: Path,
    column: str,
) -> tuple[list[tuple[str, Caption]], LeftOut]:
    """(name, caption) of all pictures, from metadata.jsonl or else from .txt files.

    And what of the folder is left out.
    """
    names, left_out = list_folder(folder)
    table = folder / "metadata.jsonl"
    if table.is_file():
        others = left_out.pop("file of another kind", [])
        others = [name for name in others if name != table.name]
        if others:
            left_out["file of another kind"] = others
        found, repeated = _read_metadata(table, column)
        captions = {name: found.get(composed(name)) for name in names}
        check_captions(captions, table)
        known = {composed(name) for name in names}
        unused = [name for name in found if name not in known]
        if unused:
            left_out["caption without a picture"] = unused
        if repeated:
            left_out["repeated caption, as the last one counts"] = repeated
        beside = texts_beside(folder, names)
        if beside:
            left_out["caption file, as metadata.jsonl holds the captions"] = beside
        return list(captions.items()), left_out

    items = []
    for name in names:
        caption = find_caption(folder / name, folder / name, None)
        items.append((name, caption or ""))
    return items, left_out


def _read_metadata(table: Path, column: str) -> tuple[dict[str, Caption], list[str]]:
    """{file name, composed: caption or list of captions} of a metadata.jsonl.

    And the file names that have more than one line. Lines may be empty.
    """
    captions = {}
    repeated = []
    # Not splitlines(), which would also split at line separators inside a caption.
    for number, line in enumerate(read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        expected = f"an object with file_name and {column} (--caption_column)"
        with reading(f"{table} line {number}", expected):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"it holds {_type_name(row)}")
            name = row["file_name"]
            if not isinstance(name, str):
                raise ValueError(f"file_name is {_type_name(name)}, not text")
            caption = _checked_caption(row[column])
        if composed(name) in captions:
            repeated.append(name)
        captions[composed(name)] = caption
    return captions, repeated


def _checked_caption(caption: object) -> Caption:
    """A caption of metadata.jsonl: text, or a list of texts. ValueError for anything else."""
    if isinstance(caption, str):
        return caption
    if not isinstance(caption, list):
        raise ValueError(f"the caption is {_type_name(caption)}, not text or a list of texts")
    if not caption:
        raise ValueError("the caption is an empty list")
    for text in caption:
        if not isinstance(text, str):
            raise ValueError(f"the list of captions holds {_type_name(text)}, not only texts")
    return caption


def _type_name(value: object) -> str:
    """What JSON calls the type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    names = {str: "text", list: "a list", dict: "an object"}
    return names[type(value)]


def _beside_splits(folder: Path) -> LeftOut:
    """What a folder holds besides the folders train and test."""
    left_out = {}
    for path in sorted(folder.iterdir()):
        kind = _kind_of(path)
        if kind is not None and path.name not in ("train", "test"):
            left_out.setdefault(kind, []).append(path.name)
    return left_out


def _captions_of_text(path: Path) -> list[tuple[str, str]]:
    """("caption I", caption) of all lines that are not empty."""
    # Not splitlines(), which would also split at line separators inside a caption.
    lines = [" ".join(line.split()) for line in read_text(path).split("\n")]
    lines = [line for line in lines if line]
    return [(f"caption {i}", line) for i, line in enumerate(lines)]


def _part_for_split(items: list, split: str) -> list:
    """Every tenth item is for the test, all others are for training."""
    if split == "test":
        return items[9::10]
    return [item for i, item in enumerate(items) if i % 10 != 9]


class Captioned(Dataset):
    """Pictures with captions of a folder or a zip, or the captions of a .txt alone.

    An item holds target [3, H, W] in [-1, 1] (unless there are captions alone), caption and name.
    `column` names the captions in metadata.jsonl. If a picture has several captions, an item holds
    one of them, and `captions` holds the first of each picture.
    """

    def __init__(self, source: str | Path, split: str, prep: str, column: str = "text"):
        self.source = Path(source)
        self.prepare = prepare(prep)
        self.archive = None

        has_splits = (self.source / "train").is_dir() and (self.source / "test").is_dir()
        self.folder = self.source / split if has_splits else self.source
        self.kind = "folder" if self.folder.is_dir() else self.source.suffix.lower()

        left_out = {}
        if self.kind == "folder":
            items, left_out = _captions_of_folder(self.folder, column)
        elif self.kind == ".zip":
            self.archive = _PictureZip(self.source)
            items, left_out = _captions_of_zip(self.archive)
        elif self.kind == ".txt":
            items = _captions_of_text(self.source)
        else:
            raise ValueError(
                f"{source} is not a data set: expected a folder of pictures, a .zip in the layout"
                " of EDM, a .txt of captions, a cache of python -m dataset cache, drawn:scenes, or"
                " digits"
            )

        # Without folders of their own, both splits come from one source, which speaks once.
        if has_splits or split == "train":
            report_left_out(self.folder, left_out)
            report_empty(self.folder, dict(items))
        if has_splits and split == "train":
            report_left_out(self.source, _beside_splits(self.source))

        self.items = items if has_splits else _part_for_split(items, split)
        if not self.items:
            raise ValueError(
                f"{self.folder} holds {len(items)} pictures or captions; expected ten or more,"
                " because every tenth is held out for testing"
            )
        self.captions = [_draw_caption(caption, item=0) for _, caption in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: Item) -> dict:
        index, rng = split_item(item)
        name, caption = self.items[index]
        caption = _draw_caption(caption, item)
        if self.kind == ".txt":
            return dict(caption=caption, name=name)

        (picture,) = self.prepare([self.read_picture(index)], rng)
        return dict(target=_to_signed_tensor(picture), caption=caption, name=name)

    def state(self, index: int) -> tuple:
        """Changes when the picture or the caption of an item does; of a zip, when the zip does."""
        name, caption = self.items[index]
        if self.kind == ".txt":
            return name, caption
        return name, caption, *file_state(self.source if self.archive else self.folder / name)

    def read_picture(self, index: int) -> Image.Image:
        """The picture of an item, unprepared. ValueError if it cannot be read."""
        name, _ = self.items[index]
        path = self.folder / name
        if self.archive is None:
            return open_picture(path)
        return open_picture(io.BytesIO(self.archive.read(name)), path)


def open_captioned(
    source: str | Path,
    split: str,
    prep: str,
    seed: int = 0,
    size: int = 64,
    column: str = "text",
) -> Dataset:
    """Pictures with captions, in any layout that the package's docstring names, or digits.

    `seed` and `size` are those of drawings, `column` names the captions in metadata.jsonl.
    """
    if source == "digits":  # a Path of that name is a folder
        # Imported here because dataset.digits itself imports this module.
        from dataset.digits import Digits

        return Digits(split, prep)
    if (Path(source) / "index.json").is_file():
        # Imported here because dataset.cache itself opens data sets with this function.
        from dataset.cache import Cached

        return Cached(source, split)
    if str(source).startswith("drawn:") or (Path(source) / "train_B").is_dir():
        return open_paired(source, split, prep, seed, size)
    return Captioned(source, split, prep, column)
