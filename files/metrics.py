"""Networks that score pictures: their files and how they are loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from files.hub import find, find_url, hub_cache
from files.tensors import read_tensors, reading
from files.tokenizers import load_tokenizer
from models import clip, dino, inception, lpips

# Networks that judge pictures: their file, and the addresses of their weights, or an id of the Hub.
METRIC_NETWORKS = {
    "lpips": (lpips, ["https://download.pytorch.org/models/vgg16-397923af.pth",
                      "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"]),
    "clip": (clip, ["openai/clip-vit-base-patch32"]),
    "dino": (dino, ["facebook/dino-vitb8"]),
    "inception": (inception, ["https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                              "pt_inception-2015-12-05-6726825d.pth"]),
}

@dataclass
class MetricNetwork:
    """A network that judges pictures, frozen; `hash` tells its files from others."""
    network: nn.Module
    hash: str
    tokenizer: clip.Tokenizer | None = None  # of CLIP


def metric_files(name: str, fetch: bool = True) -> list[Path | None]:
    """The files of a judge, downloaded (if `fetch`) where they are not here; None for one that is not to be had."""
    return [find_url(source, "judges", fetch) if "://" in source else
            find(source, ["model.safetensors", "pytorch_model.bin"], fetch=fetch) for source in METRIC_NETWORKS[name][1]]


def has_metric_network(name: str) -> bool:
    """Whether a judge's files are on this machine."""
    return None not in metric_files(name, fetch=False)


def load_metric_network(name: str, device: str = "cpu") -> MetricNetwork:
    """"lpips", "clip", "dino" or "inception", in float32."""
    files, (module, sources) = metric_files(name), METRIC_NETWORKS[name]
    if None in files:
        raise ValueError(f"the weights of {name} are not here; expected {' and '.join(sources)}, of the Hub in"
                         f" {hub_cache()}, others in {hub_cache().parent / 'judges'}")
    read = [read_tensors(path, f"{name}'s weights")[0] for path in files]
    with reading(files[0], f"the weights of {name}, {' and '.join(sources)}"):
        network = module.from_state_dict(*read).float().to(device)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    tokenizer = load_tokenizer(sources[0], "") if name == "clip" else None
    return MetricNetwork(network, hashlib.sha256("".join(hashes).encode()).hexdigest()[:16], tokenizer)
