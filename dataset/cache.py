"""Latents and text contexts computed once, and priors."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils.data import Dataset
from tqdm import tqdm

import training
from dataset.folders import _reading, open_captioned, pictures_in
from dataset.loader import collate
from dataset.pictures import open_picture, prepare, to_tensor

CACHE = "one-step-diffusion cache 1"

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


def write_cache(source: str, base_name: str, output: Path, prep: str, size: int, column: str, seed: int, batch: int,
          device: str, dtype: str, shard_items: int = 256) -> None:
    """Writes latents and text contexts of a data set, a shard at a time: no more is in memory. Shards that are there
    and whole are kept, so a stopped run goes on. Without pictures, contexts alone."""
    from files import bases, tensors
    base = bases.load_base(base_name, ("text_encoder", "tokenizer"), getattr(torch, dtype), device)
    base.vae = bases.load_base(base_name, ("vae",), torch.float32, device).vae  # as in training, which compares it
    facts = dict(base=base_name, dtype=dtype, prep=prep, size=size, column=column, seed=seed, data=str(source),
                 vae=tensors.fingerprint(base.vae), text_encoder=tensors.fingerprint(base.text_encoder))
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
            tensors.save_tensors(output / shard["file"], {k: torch.cat([m[k] for m in made]) for k in made[0]}, {})
            shard["sha256"] = hashlib.sha256((output / shard["file"]).read_bytes()).hexdigest()
            index["shards"][split][number:number + 1] = [shard]
            write_index()
    print(output)


def estimate_prior(folder: str | Path, base: str, size: int, output: str | Path) -> None:
    """Writes mean and deviation of the scaled latents of a folder's pictures, cropped to size x size."""
    from files import bases
    from models import diffusion
    names = pictures_in(Path(folder))
    vae = bases.load_base(base, ("vae",), torch.float32).vae
    if size < 1 or size % vae.factor:
        raise ValueError(f"--size {size}: expected a multiple of {vae.factor}")

    def latents() -> Iterator[torch.Tensor]:
        for name in tqdm(names, unit=" pictures"):
            pictures = prepare(f"resized_crop_{size}")([open_picture(Path(folder) / name)])
            with torch.inference_mode():
                yield vae.encode(2 * to_tensor(pictures[0])[None] - 1)[0][0] * vae.config.scaling_factor

    bases.save_prior(Path(output), *diffusion.mean_and_std(latents()))
    print(output)
