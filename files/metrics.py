"""Networks that score pictures: where their files come from, and how they are loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import nn

from files.hub import find, find_url, hub_cache
from files.tensors import read_tensors, reading
from files.tokenizers import load_tokenizer
from models import clip, dino, inception, lpips


class Source(NamedTuple):
    """A metric network's module, and where its weights are: URLs, or the id of a Hub model."""

    module: ModuleType
    places: list[str]


METRIC_NETWORKS = {
    "lpips": Source(
        lpips,
        [
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights"
            "/v0.1/vgg.pth",
        ],
    ),
    "clip": Source(clip, ["openai/clip-vit-base-patch32"]),
    "dino": Source(dino, ["facebook/dino-vitb8"]),
    "inception": Source(
        inception,
        [
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth"
        ],
    ),
}
# Where files from URLs are, beside the Hub's cache. The second is the folder's earlier name.
FOLDER = "metric_networks"
EARLIER_FOLDER = "judges"


@dataclass
class MetricNetwork:
    """A frozen network that scores pictures."""

    network: nn.Module
    hash: str  # of its weight files
    tokenizer: clip.Tokenizer | None = None  # CLIP's


def has_metric_network(name: str) -> bool:
    """Whether the files of a metric network are on this machine."""
    return None not in _metric_files(name, fetch=False)


def load_metric_network(name: str, device: str = "cpu") -> MetricNetwork:
    """The metric network "lpips", "clip", "dino" or "inception", in float32.

    Its files are downloaded if they are not here. ValueError if that is forbidden, or if they are
    not the expected weights; OSError if the download fails.
    """
    module, places = METRIC_NETWORKS[name]
    files = _metric_files(name)
    if None in files:
        raise ValueError(
            f"the weights of {name} are not here; expected {' and '.join(places)}, those of the Hub"
            f" in {hub_cache()}, others in {hub_cache().parent / FOLDER}"
        )

    states = [read_tensors(path, f"{name}'s weights")[0] for path in files]
    with reading(files[0], f"the weights of {name}, {' and '.join(places)}"):
        network = module.from_state_dict(*states).float().to(device)
    tokenizer = None
    if name == "clip":
        tokenizer = load_tokenizer(places[0], folder="")
    return MetricNetwork(network, _hash_of(files), tokenizer)


def _metric_files(name: str, fetch: bool = True) -> list[Path | None]:
    """The weight files of a metric network, downloaded if `fetch`; None for a missing one."""
    files = []
    for place in METRIC_NETWORKS[name].places:
        if "://" in place:
            file = find_url(place, EARLIER_FOLDER, fetch=False) or find_url(place, FOLDER, fetch)
        else:
            file = find(place, ["model.safetensors", "pytorch_model.bin"], fetch=fetch)
        files.append(file)
    return files


def _hash_of(files: list[Path]) -> str:
    """The first 16 digits of the SHA-256 of the files' SHA-256."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]
