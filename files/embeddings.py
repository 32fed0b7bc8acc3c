"""Embeddings (textual inversion): new words for CLIP's text encoder, from files of their own.

Source: Gal et al. 2022, "An Image is Worth One Word". A word is one vector in the text encoder's
table of embeddings, or several, which follow one another in the prompt.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from files import kinds
from files.bases import Base
from files.hub import home_path, locate
from files.tensors import read_tensors, reading
from models import clip

# The names of embeddings in a folder or a Hub id, as `diffusers` saves them.
FILES = ["learned_embeds.safetensors", "learned_embeds.bin"]
EXPECTED = "an embedding (textual inversion) for the text encoder of Stable Diffusion 1.x or 2.x"
# The models for embeddings of this width.
WIDTHS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "SDXL",
    4096: "T5",
}


def add_embedding(spec: str, base: Base) -> None:
    """Adds the word of an embedding's file to a base's tokenizer and text encoder.

    `spec` is FILE or FILE:TOKEN, with a file, a folder or a Hub id for FILE. Without TOKEN the word
    is the one that the file names, which is reported on stderr. ValueError if the embedding is for
    another base, or the tokenizer has the word already.
    """
    name, token = _split_token(spec)
    path = locate(name, FILES, EXPECTED)
    own_token, vectors = load_embedding(path)
    token = token or own_token
    if not isinstance(base.text_encoder, clip.TextEncoder):
        raise ValueError(
            f"{path} is an embedding for CLIP's text encoder, and that of {base.name} is T5;"
            " expected a Stable Diffusion base"
        )
    width = base.text_encoder.config.hidden_size
    if vectors.shape[1] != width:
        model = WIDTHS.get(vectors.shape[1], "another model")
        raise ValueError(
            f"{path} has vectors of {vectors.shape[1]} numbers, for {model}; expected {width}, for"
            f" {base.name}: choose an embedding that was made for this base"
        )
    with reading(path, "a word that is new: choose one with FILE:TOKEN"):
        ids = base.tokenizer.add_token(token, len(vectors))
    base.text_encoder.set_embeddings(ids, vectors)
    count = "1 vector" if len(ids) == 1 else f"{len(ids)} vectors"
    print(f"{path}: {token} in a prompt stands for its {count}", file=sys.stderr)


def _split_token(spec: str) -> tuple[str, str | None]:
    """The name and the token of FILE:TOKEN; None if there is no token."""
    # Names of files and tokens may both have colons.
    ends = [match.start() for match in re.finditer(":", spec)]
    for end in (len(spec), *ends):
        if home_path(spec[:end]).exists():
            return spec[:end], spec[end + 1:] or None
    name, _, token = spec.partition(":")
    return name, token or None


def load_embedding(path: Path) -> tuple[str, Tensor]:
    """The word and the vectors [n, C] of an embedding's file.

    Files of `diffusers` and of the original code name their word, or else it is the name of the
    file. ValueError if it is a file of another kind, or damaged.
    """
    # The original code saved a ParameterDict, which takes no code to read.
    with torch.serialization.safe_globals([nn.ParameterDict]):
        saved, metadata = read_tensors(path, EXPECTED)
    with reading(path, EXPECTED):
        token, vectors = _find_vectors(saved, path.stem, metadata)
        if not isinstance(vectors, Tensor) or not vectors.is_floating_point():
            raise ValueError(f"it holds {getattr(vectors, 'dtype', type(vectors).__name__)}")
        if vectors.ndim not in (1, 2) or not 0 < vectors.numel() < 1 << 24:
            raise ValueError(f"it holds a tensor {list(vectors.shape)}, not vectors [n, C]")
        vectors = vectors.detach().float().reshape(-1, vectors.shape[-1])
        if not vectors.isfinite().all():
            raise ValueError("it holds NaN or infinite numbers: its training has failed")
    return token, vectors


def _find_vectors(
    saved: Tensor | dict,
    stem: str,
    metadata: dict[str, str],
) -> tuple[str, Tensor]:
    """The word and the vectors among what a file holds. `stem` is the file's own name.

        diffusers       {token: vectors}
        A1111, kohya    {"emb_params": vectors}
        original code   {"string_to_param": {"*": vectors}, "name": token (in A1111's files)}
    """
    if isinstance(saved, Tensor):
        return stem, saved
    kind = kinds.of_tensors(saved, metadata) or "a file of other tensors"
    if kind != kinds.EMBEDDING:
        raise ValueError(f"it is {kind}")

    if "string_to_param" in saved:
        vectors = saved["string_to_param"]
        vectors = getattr(vectors, "_parameters", vectors)  # of a ParameterDict
        if len(vectors) != 1:
            raise ValueError(f"it holds {len(vectors)} embeddings, not one")
        token = saved.get("name") or stem
        if not isinstance(token, str):
            raise ValueError(f"its name is {token!r:.100}")
        (vectors,) = vectors.values()
        return token, vectors
    if len(saved) != 1:
        raise ValueError(f"it holds {len(saved)} tensors, not one")
    ((token, vectors),) = saved.items()
    return stem if token == "emb_params" else str(token), vectors
