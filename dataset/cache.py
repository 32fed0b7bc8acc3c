"""Latents and text contexts that are computed once, and priors.

A cache is a folder of shards, SPLIT-NUMBER.safetensors, and an index.json that says what was
encoded, by which networks, and which captions each shard holds.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch.utils.data import Dataset
from tqdm import tqdm

import training
from dataset.folders import Item, open_captioned, pictures_in, reading, report_empty
from dataset.loader import collate
from dataset.pictures import open_picture, prepare, to_tensor

if TYPE_CHECKING:
    from files.bases import Base

CACHE = "one-step-diffusion cache 1"
SPLITS = ("train", "test")


# -------------------- reading a cache

class Cached(Dataset):
    """One split of a cache.

    An item holds mean and std [4, h, w] of the scaled latent (unless there are captions alone),
    context_0 [N, C] and, for T5, its mask context_1 [N], caption and name. `facts` says what was
    encoded and how. The hash of a shard is checked when an item of it is first read.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        index = read_cache_index(self.folder)
        self.facts = index["facts"]
        self.shards = index["shards"][split]
        self.verified = set()  # numbers of the shards whose hash was right

        self.items = []  # (number of the shard, row in it)
        self.captions = []
        for number, shard in enumerate(self.shards):
            self.items += [(number, row) for row in range(len(shard["captions"]))]
            self.captions += shard["captions"]

        expected = index["items"][split]
        again = "run python -m dataset cache again, which continues where it stopped"
        if len(self.items) < expected or not self.items:
            found = f"{len(self.items)} of {expected} {split} items"
            raise ValueError(f"{folder} holds {found}: {again}")
        if not index.get("complete", True):
            raise ValueError(f"{folder} was not brought up to date to its end: {again}")
        names = [name for shard in self.shards for name in shard["names"]]
        report_empty(f"{folder} {split}", dict(zip(names, self.captions, strict=True)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: Item) -> dict:
        index = item[0] if isinstance(item, tuple) else item
        number, row = self.items[index]
        shard = self.shards[number]
        if number not in self.verified:
            check_shard(self.folder, shard)
            self.verified.add(number)

        result = {}
        with safe_open(self.folder / shard["file"], framework="pt") as file:
            names = file.keys()
            for name in names:
                result[name] = file.get_slice(name)[row]
        result["caption"] = shard["captions"][row]
        result["name"] = shard["names"][row]
        return result


def read_cache_index(folder: Path) -> dict:
    """The index.json of a cache: format, facts, items and shards. ValueError if it is damaged."""
    path = folder / "index.json"
    with reading(path, "the index of a cache, as python -m dataset cache writes it"):
        index = json.loads(path.read_text())
        if index["format"] != CACHE:
            raise ValueError(f"its format is {index['format']!r}")
        for shard in index["shards"]["train"] + index["shards"]["test"]:
            _check_shard_entry(shard)
        for split in SPLITS:
            if not isinstance(index["items"][split], int):
                raise ValueError(f"it does not say how many {split} items there are")
        missing = {"base", "dtype", "vae", "text_encoder"} - index["facts"].keys()
        if missing:
            raise ValueError(f"it does not name its {', '.join(sorted(missing))}")
    return index


def _check_shard_entry(shard: dict) -> None:
    """ValueError if an entry of the index does not describe a shard of this folder."""
    texts = [shard["file"], shard["sha256"], *shard["captions"], *shard["names"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a shard is described by something other than text")
    if len(shard["captions"]) != len(shard["names"]):
        counts = f"{len(shard['captions'])} captions but {len(shard['names'])} names"
        raise ValueError(f"a shard has {counts}")
    # The name is a file name without a path, so an index cannot lead out of its folder.
    if not re.fullmatch(r"\w+-\d+\.safetensors", shard["file"]):
        raise ValueError(f"{shard['file']!r} is not the file name of a shard")


def check_shard(folder: Path, shard: dict) -> None:
    """ValueError if the file of a shard is missing or is not what was written."""
    path = folder / shard["file"]
    with contextlib.suppress(OSError):
        if _sha256(path) == shard["sha256"]:
            return
    raise ValueError(
        f"{path} is missing or damaged: run python -m dataset cache again, which replaces it"
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -------------------- writing a cache

def write_cache(
    source: str,
    base_name: str,
    output: Path,
    prep: str,
    size: int,
    column: str,
    seed: int,
    batch: int,
    device: str,
    dtype: str,
    shard_items: int = 256,
) -> None:
    """Encodes a data set into the folder `output`; of captions alone, contexts alone.

    Shards are written one at a time, so memory holds `shard_items` items at most. Shards that are
    there, undamaged and of files and captions that have not changed are kept, so a stopped run
    continues. Crops and flips are drawn once, from `seed`. ValueError if `output` holds anything
    else, or a cache of something else.
    """
    from files.bases import load_base
    from files.tensors import fingerprint

    base = load_base(base_name, ("text_encoder", "tokenizer"), getattr(torch, dtype), device)
    # The VAE stays in float32 as in training, which compares its fingerprint.
    base.vae = load_base(base_name, ("vae",), torch.float32, device).vae
    facts = dict(
        base=base_name,
        dtype=dtype,
        prep=prep,
        size=size,
        column=column,
        seed=seed,
        data=str(Path(source).resolve()) if Path(source).exists() else str(source),
        vae=fingerprint(base.vae),
        text_encoder=fingerprint(base.text_encoder),
    )

    sets = _open_sets(source, prep, size, column, seed, base)
    counts = {split: len(dataset) for split, dataset in sets.items()}
    index = _open_cache(output, facts, counts)

    # With an index the folder is a cache, so a run that is stopped from here on can continue.
    _write_index(output, index)
    problems = []
    write = partial(_write_shard, base=base, batch=batch, device=device)
    for split, dataset in sets.items():
        problems += _write_split(output, index, split, dataset, seed, shard_items, write)
    _refuse(problems)
    _write_index(output, index | dict(complete=True))
    print(output)


def _write_split(
    output: Path,
    index: dict,
    split: str,
    dataset: Dataset,
    seed: int,
    shard_items: int,
    write: Callable[[Path, list[dict]], dict],
) -> list[str]:
    """Writes the shards of a split that are not there yet. Returns what is wrong with its items."""
    shards = index["shards"][split]
    problems = []
    starts = range(0, len(dataset), shard_items)
    for number, start in enumerate(tqdm(starts, split, unit=" shards")):
        indices = range(len(dataset))[start:start + shard_items]
        made_of = _state_of(dataset, indices)
        if _is_written(output, shards, number, made_of):
            continue
        items, broken = _read_items(dataset, indices, seed)
        problems += broken
        if problems:  # No shard may follow a missing one, but the rest is read all the same.
            continue
        path = output / f"{split}-{number:05d}.safetensors"
        shards[number:number + 1] = [write(path, items) | dict(made_of=made_of)]
        _write_index(output, index)
    _remove_surplus(output, index, split, len(starts))
    return problems


def _state_of(dataset: Dataset, indices: range) -> str:
    """A hash that changes when files or captions of these items do. Drawings and digits do not."""
    state = getattr(dataset, "state", None)
    if state is None:
        return ""
    return hashlib.sha256(repr([state(i) for i in indices]).encode()).hexdigest()


def _remove_surplus(output: Path, index: dict, split: str, count: int) -> None:
    """Removes what a larger data set left behind the first `count` shards of a split."""
    surplus = index["shards"][split][count:]
    if surplus:
        del index["shards"][split][count:]
        _write_index(output, index)
    for shard in surplus:
        (output / shard["file"]).unlink(missing_ok=True)


def _read_items(dataset: Dataset, indices: range, seed: int) -> tuple[list[dict], list[str]]:
    """Items of a data set, and what is wrong with those that cannot be used."""
    items = []
    problems = []
    for i in indices:
        try:
            items.append(dataset[(i, (seed, 0, i))])
        except ValueError as error:
            problems.append(str(error))
    return items, problems


def _refuse(problems: list[str]) -> None:
    """ValueError if there are problems."""
    if problems:
        raise ValueError(
            f"{len(problems)} items cannot be used: {'; '.join(problems)}; fix or remove them and"
            " run the command again: it continues"
        )


def _open_sets(
    source: str,
    prep: str,
    size: int,
    column: str,
    seed: int,
    base: "Base",
) -> dict[str, Dataset]:
    """Both splits of the data set to encode. Too long captions are reported on stderr."""
    # Imported here because dataset.check itself imports this module.
    from dataset.check import captions_of, report_cut

    sets = {}
    for split in SPLITS:
        sets[split] = open_captioned(source, split, prep, seed, size, column)
    if isinstance(sets["train"], Cached):
        raise ValueError(f"{source} is a cache already; expected pictures or captions")
    report_cut(source, captions_of(sets["train"]), base.tokenizer)
    return sets


def _open_cache(output: Path, facts: dict, counts: dict[str, int]) -> dict:
    """The index of the cache in `output`, new or continued.

    ValueError if the folder holds anything else, or a cache of something else.
    """
    output.mkdir(parents=True, exist_ok=True)
    # Until the end, shards of an earlier run may stand beside new ones.
    changing = dict(items=counts, complete=False)
    new = dict(format=CACHE, facts=facts, shards=dict(train=[], test=[])) | changing
    if not (output / "index.json").exists():
        if any(output.iterdir()):
            raise ValueError(f"{output} is neither empty nor a cache: choose another --output")
        return new

    index = read_cache_index(output)
    if not any(index["shards"].values()):  # of a run that failed before the first
        return new
    found = index["facts"]
    for name in found | facts:
        if found.get(name) != facts.get(name):
            raise ValueError(
                f"{output} is a cache of something else: its {name} is {found.get(name)}, and"
                f" this one's would be {facts.get(name)}: choose another --output"
            )
    return index | changing


def _write_index(output: Path, index: dict) -> None:
    text = json.dumps(index)
    training.write_file(output / "index.json", lambda path: path.write_text(text))


def _is_written(output: Path, shards: list[dict], number: int, made_of: str) -> bool:
    """Whether shard `number` is in the index, of these items, and its file is undamaged."""
    if number >= len(shards) or shards[number].get("made_of") != made_of:
        return False
    try:
        check_shard(output, shards[number])
    except ValueError:
        return False
    return True


def _write_shard(path: Path, items: list[dict], base: "Base", batch: int, device: str) -> dict:
    """Encodes items, `batch` at a time, into one file. Returns its entry of the index."""
    from files.tensors import save_tensors

    parts = []
    for start in range(0, len(items), batch):
        parts.append(_encode_batch(base, items[start : start + batch], device))
    tensors = {}
    for name in parts[0]:
        shapes = {tuple(part[name].shape[1:]) for part in parts}
        if len(shapes) > 1:
            first, second, *_ = sorted(shapes)
            raise ValueError(
                f"pictures differ in size (latents {first} and {second}); expected one size for a"
                " cache: choose a --prep such as resized_crop_512"
            )
        tensors[name] = torch.cat([part[name] for part in parts])
    save_tensors(path, tensors, metadata={})
    return dict(
        file=path.name,
        captions=[item["caption"] for item in items],
        names=[item["name"] for item in items],
        sha256=_sha256(path),
    )


@torch.inference_mode()
def _encode_batch(base: "Base", items: list[dict], device: str) -> dict[str, torch.Tensor]:
    """Text contexts and, of pictures, mean and std of the scaled latent, all on the CPU.

    ValueError for pictures whose sides are no multiples of the VAE's factor.
    """
    from models.vae import latent_size

    tensors = {}
    contexts = base.encode([item["caption"] for item in items])
    for i, context in enumerate(contexts):
        tensors[f"context_{i}"] = context.cpu()

    if "target" in items[0]:
        target = collate(items)["target"].to(device)                    # [B, 3, H, W]
        latent_size(target.shape[2:], base.vae.factor)  # refuses what would be cut
        mean, logvar, _ = base.vae.encode(target)                       # [B, 4, h, w]
        scale = base.vae.config.scaling_factor
        tensors["mean"] = mean.cpu() * scale
        tensors["std"] = (0.5 * logvar).exp().cpu() * scale
    return tensors


# -------------------- priors

def estimate_prior(
    folder: str | Path, base: str, size: int, output: str | Path, device: str = "cpu"
) -> None:
    """Writes mean and standard deviation [4, h, w] of the scaled latents of a folder's pictures.

    The pictures are cropped to size x size. ValueError if `size` does not suit the VAE.
    """
    from files.bases import load_base, save_prior
    from models.diffusion import mean_and_std

    folder = Path(folder)
    output = Path(output)
    _check_prior_output(output)
    names = pictures_in(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    vae = load_base(base, ("vae",), torch.float32, device).vae
    if size < 1 or size % vae.factor:
        raise ValueError(f"--size {size}: expected a multiple of {vae.factor}")
    crop = prepare(f"resized_crop_{size}")
    problems = []

    def latents() -> Iterator[torch.Tensor]:
        """Those of the pictures that can be read."""
        for name in tqdm(names, unit=" pictures"):
            try:
                (picture,) = crop([open_picture(folder / name)])
            except ValueError as error:
                problems.append(str(error))
                continue
            x = 2 * to_tensor(picture)[None] - 1  # [1, 3, H, W]
            with torch.inference_mode():
                mean, _, _ = vae.encode(x.to(device))
                latent = mean[0] * vae.config.scaling_factor  # [4, h, w]
            yield latent
        if len(problems) == len(names):
            raise ValueError(f"no picture can be used: {'; '.join(problems)}")

    mean, std = mean_and_std(latents())
    training.write_file(output, lambda temporary: save_prior(temporary, mean, std))
    print(output)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(names)} pictures are not in the prior: {'; '.join(problems)}"
        )


def _check_prior_output(output: Path) -> None:
    """ValueError if a prior would be written over anything but a prior, or has another ending."""
    from files.tensors import read_tensors

    if output.suffix != ".safetensors":
        raise ValueError(f"--output {output}: expected a name ending in .safetensors")
    if output.exists():
        tensors, _ = read_tensors(output, "a prior, or a new name")
        if tensors.keys() != {"mean", "std"}:
            raise ValueError(f"--output {output} exists and is not a prior; expected a new name")
