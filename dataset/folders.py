"""Folders, zips and files of captions as data sets."""

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from dataset.pictures import SUFFIXES, open_picture, prepare, to_tensor

MAX_UNZIPPED = 1 << 28  # bytes of one file in a zip, which may claim, and unpack to, a thousand times its size

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
    """A folder of pairs, or drawn:scenes, drawn at `size` and without use for prep."""
    if not str(folder).startswith("drawn:"):
        return PairedFolder(folder, split, prep)
    prepare(prep)
    from tiny import scenes
    if str(folder) == "drawn:scenes":
        return scenes.Paired(split, size, seed)
    raise ValueError(f"there are no drawings {folder}: expected drawn:scenes")


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


def open_captioned(source: str | Path, split: str, prep: str, seed: int = 0, size: int = 64, column: str = "text"
                   ) -> Dataset:
    """Pictures with captions from any place that this file's first lines name."""
    if (Path(source) / "index.json").is_file():
        from dataset.cache import Cached
        return Cached(source, split)
    if str(source).startswith("drawn:") or (Path(source) / "train_B").is_dir():
        return open_paired(source, split, prep, seed, size)
    return Captioned(source, split, prep, column)
