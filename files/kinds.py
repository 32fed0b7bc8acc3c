"""Words for messages: what a file is, from its first bytes or from the names of its tensors.

What was downloaded often turns out to be a pointer, a web page or another
kind of file. Messages say which.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor


def shorten(message: object, most: int = 400) -> str:
    """A message on one line. The middle of a long one is left out: its point may be at the end."""
    line = " ".join(str(message).split())
    if len(line) <= most:
        return line
    return f"{line[:most * 5 // 8]} ... {line[-most * 3 // 8:]}"

# -------------------- first bytes

# How many bytes are looked at.
BYTES = 400
# How pictures of the usual formats begin, and other files.
PICTURES = {
    b"\x89PNG\r\n\x1a\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"\0\0\0\x0cjP  \r\n": "a JPEG 2000 picture",
    b"RIFF....WEBP": "a WebP picture",  # the dots stand for its size
    b"BM....\0\0\0\0": "a BMP picture",
}
OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull gets it)",
    b"/annex/objects/": "a pointer of git-annex, not the file itself (git annex get gets it)",
    b"%PDF": "a PDF document",
    b"\x1f\x8b": "an archive (gzip): unpack it first",
    b"7z\xbc\xaf\x27\x1c": "an archive (7-Zip): unpack it first",
    b"BZh91AY&SY": "an archive (bzip2): unpack it first",
    b"\xfd7zXZ\0": "an archive (xz): unpack it first",
    b"\x28\xb5\x2f\xfd": "an archive (zstd): unpack it first",
    b"\x93NUMPY": "an array of NumPy",
    b"Rar!": "an archive (RAR): unpack it first",
    b"GGUF": "a GGUF file, whose quantised weights are not supported",
    b"\x89HDF": "an HDF5 file of Keras or TensorFlow",
    b"\x7fELF": "a program",
}
# The kinds of the container of MP4, by the brand in bytes 8 to 12; all others are videos.
BRANDS = {
    b"heic": "a HEIC picture",
    b"heix": "a HEIC picture",
    b"mif1": "a HEIF picture",
    b"avif": "an AVIF picture",
}


def of_bytes(start: bytes) -> str | None:
    """What a file is that begins with these bytes, or None if they do not show it."""
    if not start:
        return "empty"
    for beginning, kind in (*PICTURES.items(), *OTHERS.items()):
        if start.startswith(beginning):
            return kind
    if start.startswith(b"BM") and start[6:10] == bytes(4):
        return PICTURES[b"BM....\0\0\0\0"]
    if start.startswith(b"RIFF"):
        return PICTURES.get(b"RIFF...." + start[8:12], "a video or a sound")
    if start[4:8] == b"ftyp":
        return BRANDS.get(start[8:12], "a video")

    markup = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if markup.startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file itself (a login or an error, perhaps)"
    if b"<svg" in markup:
        return "a drawing (SVG)"
    if markup.startswith(b"<?xml"):
        return "an answer of a server in XML, not the file itself"
    return None


def of_text(start: bytes) -> str | None:
    """What a file is that begins with text; None if it does not."""
    text = start.decode("utf-8", errors="replace")
    # The last character may be cut.
    if "\ufffd" in text[:-1] or not text.strip() or any(ord(c) < 9 for c in text):
        return None
    return f"text, which begins with {' '.join(text.split())[:60]!r}"


def of_file(path: Path) -> str | None:
    """What a file is that holds neither the expected text nor weights; None if unknown."""
    start = first_bytes(path)
    if start.startswith(b"PK\3\4") and not is_torch(path):
        return "an archive (zip): unpack it first"
    return of_bytes(start)


def first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(BYTES)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as a safetensors file: the length of a JSON object, and its brace."""
    start = first_bytes(path)
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 40


def is_torch(path: Path) -> bool:
    """Whether a file begins as those of torch.save: a zip with a pickle, or just a pickle.

    A tar archive is torch's oldest format, from which no release reads weights alone.
    """
    start = first_bytes(path)
    if start[257:262] == b"ustar":
        return False
    return start.startswith(b"\x80") or (start.startswith(b"PK\3\4") and b"/data.pkl" in start)

# -------------------- names of tensors

EMBEDDING = "an embedding (textual inversion, for --embedding)"
LORA = "a LoRA (for --lora)"
OFFICIAL = "a checkpoint of img2img-turbo (for --checkpoint)"
# What a file is that has a tensor whose name begins like this. The first that fits counts.
TENSORS = {
    r"emb_params$|string_to_(param|token)$": EMBEDDING,
    r"clip_[lg]$": "an embedding for SDXL",
    r"sd_encoder$|state_dict_unet$|rank_unet$": OFFICIAL,
    r"optimizer": "the state of a training run",
    r"context_\d$": "a shard of a cache (python -m dataset cache)",
    r"mean$": "a prior (python -m dataset prior)",
    r".*lora|.*(hada|lokr)_w|.*oft_": LORA,
    r".*motion_modules": "a motion module of AnimateDiff",
    r"control_model\.|controlnet_|.*input_hint_block": "a ControlNet",
    r"ip_adapter|image_proj": "an IP-Adapter",
    r"adapter\.|body\.0\.block": "a T2I-Adapter",
    r"body\.0\.rdb|model\.1\.sub|RRDB": "an upscaler (ESRGAN)",
    r".*double_(stream_modulation|blocks)|.*single_transformer_blocks": "a model of Flux",
    r".*joint_blocks|.*add_q_proj": "a model of Stable Diffusion 3",
    r"conditioner\.embedders\.1|add_embedding|.*label_emb": "a model of SDXL",
    r"cond_stage_model\.transformer\.": "a one-file model of Stable Diffusion 1.x",
    r"cond_stage_model\.model\.": "a one-file model of Stable Diffusion 2.x",
    r"model\.diffusion_model\.": "a U-Net from a one-file model",
    r"first_stage_model\.": "a VAE from a one-file model",
    r"encoder\.down\.0|decoder\.up\.0": "a VAE in the names of the original code",
    r"decoder\.(up_blocks|mid_block)": "a VAE",
    r"adaln_single\.|pos_embed\.proj": "a transformer of PixArt or DiT",
    r"time_embedding\.": "a U-Net",
    r".*SelfAttention": "T5",
    r"visual_projection|vision_model\.": "CLIP's image encoder, or a whole CLIP",
    r".*text_model\.|.*transformer\.resblocks|encoder\.layers.*self_attn": "CLIP's text encoder",
    r"(encoder|decoder)\.layers\.|\d+\.conv\.0": "a TAESD",
    r"lin\d\.model|features\.\d|Mixed_|blocks\.0\.attn\.qkv": "a network that scores pictures",
}
# What the kinds of our own checkpoints are, by their metadata.
OWN_KINDS = {
    "pix2pix_turbo": "a translator of train_pix2pix_turbo.py (for --checkpoint)",
    "cyclegan_turbo": "a translator of train_cyclegan_turbo.py (for --checkpoint)",
    "yoso": "a one-step generator of train_yoso.py (for --checkpoint)",
}


def of_tensors(saved: object, metadata: dict[str, str] | None = None) -> str | None:
    """What a file is that holds these tensors and this metadata; None if unknown."""
    if isinstance(saved, Tensor):
        return "a tensor without a name"
    if not isinstance(saved, dict):
        return f"a saved {type(saved).__name__}"
    if not saved:
        return "a file without tensors"
    own = OWN_KINDS.get((metadata or {}).get("kind"))
    if own:
        return own

    tensors = saved.get("state_dict", saved)
    names = [str(name) for name in tensors]
    if len(names) == 1:
        (only,) = tensors.values()
        if isinstance(only, dict):
            return of_tensors(only)  # such as "params_ema" or "model"
    is_sdxl = "clip_l" in names or "clip_g" in names
    if len(names) == 1 and not is_sdxl and not names[0].endswith((".weight", ".bias")):
        return EMBEDDING  # under the name of its token, which may be any text
    for pattern, kind in TENSORS.items():
        if any(re.match(pattern, name) for name in names):
            return kind
    return None
