"""Autoencoders that take the place of a base's VAE: TAESD, and other VAEs for the same latents."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from files.bases import NETWORKS, Base, class_of, read_network
from files.formats import vae_from_original
from files.hub import ROOT, find, locate
from files.tensors import build, fill, read_json, read_tensors, read_weights, reading
from models import taesd, vae

# Names for --vae.
AUTOENCODERS = {
    "taesd": "madebyollin/taesd",
    "tiny-turbo-taesd": str(ROOT / "tiny" / "tiny-turbo-taesd"),
}
# What a folder may hold. The last is a half of the original TAESD, with the other half beside it.
FILES = ["config.json", "vae/config.json", "taesd_decoder.safetensors", "taesd_decoder.pth"]
EXPECTED = (
    f"an autoencoder: {', '.join(AUTOENCODERS)}, a folder or Hub id with its config.json, or a file"
    " of its tensors"
)


def load_autoencoder(
    name: str,
    base: Base,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> vae.VAE | taesd.TAESD:
    """An autoencoder to take the place of the base's VAE, with frozen weights.

    `name` is one of AUTOENCODERS, a folder, a file or a Hub id. Of TAESD's original pair of files
    either one may be named. ValueError if it was made for latents of another size.
    """
    source = name if Path(name).exists() else AUTOENCODERS.get(name, name)
    path = locate(source, FILES, EXPECTED)
    if path.name == "config.json":
        folder = "" if find(source, ["config.json"]) else "vae/"
        cls, config = read_network("vae", path)
        if cls is vae.Identity:
            kind = read_json(path).get("_class_name")
            raise ValueError(f"{path} is of {kind!r}; expected {EXPECTED}")
        network = build(cls, config, path)
        files = read_weights(source, folder, NETWORKS[cls].stem)
    else:
        network, tensors = _read_file(path, base)
        files = {path: tensors}
    _check_latents(name, network, base)
    return fill(network, files, "this autoencoder", dtype, device)


def _check_latents(name: str, network: nn.Module, base: Base) -> None:
    """ValueError if a network's latents are not of the size of those of the base's VAE."""
    # Where the VAE is the identity, the latents are the pictures themselves.
    channels = getattr(base.vae.config, "latent_channels", 3)
    found = (network.factor, network.config.latent_channels)
    if found != (base.vae.factor, channels):
        raise ValueError(
            f"{name}: its latents have {found[1]} channels and 1/{found[0]} of a picture's side;"
            f" expected {channels} channels and 1/{base.vae.factor}, as in {base.name}: choose an"
            " autoencoder that was made for this base"
        )
    if isinstance(network, vae.VAE) and isinstance(base.vae, vae.VAE):
        scale, usual = network.config.scaling_factor, base.vae.config.scaling_factor
        if scale != usual:
            raise ValueError(
                f"{name}: the scaling_factor of its latents is {scale}; expected {usual}, as in"
                f" {base.name}: choose an autoencoder that was made for this base"
            )


def _read_file(path: Path, base: Base) -> tuple[nn.Module, dict[str, Tensor]]:
    """The autoencoder that a file is for, without its weights, and its tensors by our names.

    If there is no config.json beside the file, TAESD has its usual sizes. A VAE, which may also
    have the names of the original code, has those of the base's VAE.
    """
    tensors, _ = read_tensors(path, EXPECTED)
    with reading(path, EXPECTED):
        tensors = tensors.get("state_dict", tensors)
        if all(re.match(r"\d+\.", name) for name in tensors):
            tensors = _read_pair(path)
        if any(name.startswith("decoder.layers.") for name in tensors):
            config = taesd.TAESDConfig()
            beside = path.with_name("config.json")
            if beside.is_file() and class_of("vae", read_json(beside)) is taesd.TAESD:
                _, config = read_network("vae", beside)
            return build(taesd.TAESD, config, path), tensors

        config = base.vae.config
        if not isinstance(config, vae.VAEConfig):
            config = vae.VAEConfig()
        return build(vae.VAE, config, path), vae_from_original(tensors, config)


def _read_pair(path: Path) -> dict[str, Tensor]:
    """The tensors of TAESD's original encoder and decoder, one of which is the file `path`."""
    halves = []
    for part in ("encoder", "decoder"):
        file = path.with_name(re.sub("encoder|decoder", part, path.name))
        if not file.is_file():
            raise ValueError(f"{path} is one half of TAESD; expected {file.name} beside it")
        tensors, _ = read_tensors(file, EXPECTED)
        halves.append(tensors)
    return taesd.from_pth(*halves)
