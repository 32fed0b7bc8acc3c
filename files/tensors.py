"""Reading and writing tensors and configurations, and putting them into networks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import types
import typing
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from files import kinds
from files.formats import current_name
from files.hub import find
from models import unet, vae

FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # for storing only
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOATS_8)
Network = typing.TypeVar("Network", bound=nn.Module)
# The advice for a file that is damaged, but not for one that is whole and of another kind.
AGAIN = ": copy it again"

# -------------------- reading files

@contextlib.contextmanager
def reading(what: object, expected: str) -> Iterator[None]:
    """Turns any exception into a ValueError of one sentence that names the file `what`.

    A damaged or foreign file may make Python or a library raise anything. OSError passes through,
    and so does an error whose message names the file already. If the file turns out to be a web
    page or another kind of thing altogether, the sentence says so.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or str(what) in str(error):
            raise
        if isinstance(what, Path) and what.is_file():
            kind = kinds.of_file(what)
            if kind:
                message = f"{what} is {kind}; expected {expected.removesuffix(AGAIN)}"
                raise ValueError(message) from error
        reason = kinds.shorten(error)
        if type(error) is not ValueError:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{what} cannot be used ({reason}); expected {expected}") from error


def read_json(path: Path) -> dict:
    """The JSON object in a file, which may begin with a byte order mark.

    ValueError if the file holds anything else.
    """
    with reading(path, f"a JSON object{AGAIN}"):
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    return value


def read_tensors(path: Path, expected: str = "weights") -> tuple[dict, dict[str, str]]:
    """The tensors of a file, and its metadata if it has any.

    A safetensors file is mapped into memory, not copied. Of a file that `torch.save` wrote, the
    result is the saved object; a file that contains code is refused. Which of the two it is shows
    in its first bytes, whatever its name. ValueError if it is neither, or damaged; `expected` is
    for the message.
    """
    is_torch = kinds.is_torch(path)
    if kinds.is_safetensors(path) or (path.suffix == ".safetensors" and not is_torch):
        return _read_safetensors(path)
    if not is_torch:
        start = kinds.first_bytes(path)
        kind = kinds.of_file(path) or kinds.of_text(start) or "of an unknown kind"
        raise ValueError(f"{path} is {kind}; expected {expected}, from safetensors or torch.save")
    # torch.save never compresses, and a compressed file could fill the memory.
    if _is_compressed(path):
        raise ValueError(f"{path} is compressed; expected {expected}, as torch.save writes it")
    try:
        # Given a name in .safetensors, torch.load would go by that.
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True), {}
    except Exception as error:
        # The messages of torch.load are not passed on: they advise to let the code run.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            message = (
                f"{path} has code in it ({code[1]}); expected {expected}: tensors, numbers and"
                " names only"
            )
        else:
            message = f"{path} is damaged ({type(error).__name__}); expected {expected}{AGAIN}"
        raise ValueError(message) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    expected = f"a complete safetensors file, and these are {size} bytes{AGAIN}"
    with reading(path, expected), safetensors.safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        return tensors, file.metadata() or {}


def _is_compressed(path: Path) -> bool:
    """Whether a file is a zip archive with a compressed entry."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception:
        return False  # no zip, or a damaged one, which torch.load refuses


def read_weights(base: str, folder: str, stem: str) -> dict[Path, dict[str, Tensor]]:
    """The weights in one folder of a base ("unet/"), mapped: {file: {name: tensor}}.

    One file, or all shards that an index names. Full precision is preferred to fp16.
    """
    endings = (
        ".safetensors",
        ".safetensors.index.json",
        ".fp16.safetensors",
        ".safetensors.index.fp16.json",
    )
    path = find(
        base,
        [f"{folder}{stem}{ending}" for ending in endings],
        "weights as safetensors, in one file or in shards, in full precision or fp16: if there are"
        " only .bin files, convert them with diffusers' save_pretrained",
    )
    if path.suffix != ".json":
        return {path: read_tensors(path)[0]}

    weights = {}
    shards = _read_shard_names(path)
    for shard in shards:
        expected = f"all {len(shards)} shards that {path} names: copy it too"
        file = find(base, [folder + shard], expected)
        weights[file] = read_tensors(file)[0]
    return weights


def _read_shard_names(path: Path) -> list[str]:
    """The file names in the index of sharded weights, sorted."""
    index = read_json(path)
    with reading(path, f"a weight_map from tensors to the shards beside it{AGAIN}"):
        shards = sorted(set(index["weight_map"].values()))
        # A name with a slash could lead out of the folder.
        if not shards or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in shards):
            raise ValueError(f"it names {shards}")
    return shards

# -------------------- configurations

def read_config(cls: type, fixed: dict, path: Path):
    """A network's configuration, of the dataclass `cls`, from its `config.json`.

    `fixed` holds the options for which only one value is supported. Other keys of the file are
    ignored: they are for training, or for other libraries.
    """
    found = read_json(path)
    expected = "the configuration of a network of Stable Diffusion 1.x or 2.x, or of PixArt"
    with reading(path, expected):
        # The file of a whole CLIP model has the text encoder's options one level deeper.
        found = found.get("text_config", found)
        hints = typing.get_type_hints(cls)
        for key, value in found.items():
            if not _takes_tuples(hints.get(key)):
                found[key] = _one_of_equals(value)
        _read_other_spellings(found, cls)

        for key, value in fixed.items():
            if found.get(key, value) != value:
                raise ValueError(f"{key} is {found[key]!r}, but only {value!r} is supported")
        known = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        return from_json(cls, known)


def _read_other_spellings(found: dict, cls: type) -> None:
    """Replaces values of a `config.json` by others that mean the same.

    ValueError for a scale of 0.
    """
    if found.get("act_fn") == "swish":
        found["act_fn"] = "silu"
    if found.get("shift_factor") == 0 and cls is vae.VAEConfig:
        found["shift_factor"] = None
    if found.get("scaling_factor") == 0:
        raise ValueError("scaling_factor is 0, and latents are divided by it")
    # It is the default size of pictures in a U-Net or VAE; in PixArt, weights depend on it.
    if cls in (unet.UNetConfig, vae.VAEConfig):
        size = found.get("sample_size", 0)
        if size is None:
            del found["sample_size"]
        elif isinstance(size, list) and len(size) == 2:
            found["sample_size"] = max(size)


def _takes_tuples(kind: object) -> bool:
    """Whether a dataclass field of this type may hold a tuple."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else [kind]
    return any(typing.get_origin(option) is tuple for option in options)


def _one_of_equals(value: object) -> object:
    """The number that a list repeats, one for each block; any other value as it is."""
    if not isinstance(value, list) or not value or not isinstance(value[0], int | float):
        return value
    equal = all(item == value[0] for item in value)
    return value[0] if equal else value


def from_json(cls: type, values: dict):
    """An instance of a dataclass from JSON values, in which its tuples have become lists.

    ValueError for a value of the wrong type, and for numbers of layers or ranks far beyond those of
    any network, which would take forever to build.
    """
    values = {name: _lists_to_tuples(value) for name, value in values.items()}
    for name, kind in typing.get_type_hints(cls).items():
        if name not in values:
            continue
        value = values[name]
        if not _has_type(value, kind):
            raise ValueError(f"{name} is {value!r:.100}, not {_type_in_words(kind)}")
        is_count = "layers" in name or "rank" in name
        if is_count and isinstance(value, int) and value > 1000:
            raise ValueError(f"{name} is {value!r:.100}, not a whole number up to 1000")
    return cls(**values)


def _lists_to_tuples(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _has_type(value: object, kind: type) -> bool:
    """Whether a value from JSON has the type of a dataclass field. Integers must not be negative,
    and an integer may stand for a float."""
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_has_type(item, item_kind) for item in value)
    if isinstance(kind, types.UnionType):
        return any(_has_type(value, one) for one in typing.get_args(kind))
    if kind is int:
        return type(value) is int and value >= 0
    if kind is float:
        return type(value) in (float, int)
    return type(value) is kind


def _type_in_words(kind: type) -> str:
    """What a dataclass field of this type may hold."""
    if typing.get_origin(kind) is tuple:
        plural = {int: "whole numbers", float: "numbers", str: "texts"}
        return f"a list of {plural.get(typing.get_args(kind)[0], 'values')}"
    if isinstance(kind, types.UnionType):
        return " or ".join(_type_in_words(one) for one in typing.get_args(kind))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(kind, "null")

# -------------------- networks

def build(cls: type[Network], config: object, path: Path, device: str = "meta") -> Network:
    """The network `cls(config)`, by default without memory for its weights.

    `path` is the file of the configuration, for the error if its sizes do not make a network.
    """
    with reading(path, "sizes that make a network"), torch.device(device):
        return cls(config)


def fit(
    network: nn.Module,
    files: dict[Path, dict[str, Tensor]],
    expected: dict[str, Tensor],
    owner: str,
) -> dict[str, Tensor]:
    """The tensors of some files, under the names that they have in the network.

    ValueError unless they are exactly those of `expected`, in the same shapes and in floating
    point. `owner` says in the message what they are expected for.
    """
    first = next(iter(files))
    what = first if len(files) == 1 else first.parent
    wanted = f"the {len(expected)} tensors of {owner}"
    with reading(what, wanted):
        tensors = {}
        kind = None
        for found in files.values():
            kind = kind or kinds.of_tensors(found)
            for name, tensor in found.items():
                tensors[current_name(network, name)] = tensor
        tensors.pop(None, None)  # the name of tensors to ignore
        _refuse_others(tensors, expected, kind)
    with reading(what, wanted + AGAIN):
        _refuse_missing(tensors, expected)
    with reading(what, f"{wanted}: take both from one model"):
        for name, tensor in tensors.items():
            tensors[name] = _fit_shape(name, tensor, expected[name].shape)
    return tensors


def _refuse_others(
    tensors: dict[str, Tensor],
    expected: dict[str, Tensor],
    kind: str | None,
) -> None:
    """ValueError if there are tensors of another network; `kind` is what they seem to be."""
    others = sorted(tensors.keys() - expected.keys())
    if others:
        if kind and not tensors.keys() & expected.keys():
            raise ValueError(f"it is {kind}, with {others[0]} and so on")
        raise ValueError(f"it holds {others[0]}{_and_more(others)}, which is none of them")


def _refuse_missing(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        shape = list(expected[missing[0]].shape)
        raise ValueError(f"it is incomplete and lacks {missing[0]} {shape}{_and_more(missing)}")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _fit_shape(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in this shape. ValueError if it has another, or is not floating point."""
    # A linear layer may have been saved as a 1x1 convolution.
    if tensor.shape[2:] == (1, 1) and len(shape) == 2:
        tensor = tensor.flatten(1)
    if tensor.shape != shape or tensor.dtype not in FLOATS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} is {dtype} {list(tensor.shape)}; expected floating point {list(shape)}"
        )
    return tensor


def fill(
    network: Network,
    files: dict[Path, dict[str, Tensor]],
    owner: str,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Network:
    """Gives a network that was built on "meta" its weights, and freezes it.

    A tensor that has the dtype and the device already, or if `dtype` is None, stays mapped from its
    file. Others are copied one by one, so no more memory is needed than for the network and one
    tensor. Of 8-bit floats, which no layer computes with, float32 is made if `dtype` is None.
    """
    tensors = fit(network, files, network.state_dict(), owner)
    for name, tensor in tensors.items():
        own = torch.float32 if tensor.dtype in FLOATS_8 else None
        tensors[name] = tensor.to(device=device, dtype=dtype or own)
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False)


def assign(
    network: nn.Module,
    tensors: dict[str, Tensor],
    path: Path,
    strength: float = 1.0,
) -> None:
    """Puts a checkpoint's tensors in the place of the network's trainable ones.

    The tensors must be exactly those, and buffers that have no value yet; other buffers keep theirs
    unless the checkpoint has one. Fully trained weights go W0 + strength (W - W0) from their value
    before; those of a LoRA are taken as they are.
    """
    expected = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for name, buffer in network.named_buffers():
        if buffer.is_meta or name in tensors:
            expected[name] = buffer

    fitted = fit(network, {path: tensors}, expected, "the generator on this base")
    for name, tensor in fitted.items():
        before = expected[name]
        if tensor.dtype in FLOATS_8:
            tensor = tensor.float()
        if not before.is_meta:
            tensor = tensor.to(before.device)
        if strength != 1 and ".lora_" not in name:
            tensor = torch.lerp(before.detach().to(tensor.dtype), tensor, strength)
        if before.requires_grad:
            tensor = nn.Parameter(tensor)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, tensor)


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Stores the frozen weights of linear layers, convolutions and group norms in `dtype`.

    These are the layers that autocast runs in half precision.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm):
            for p in layer.parameters(recurse=False):
                if not p.requires_grad:
                    p.data = p.data.to(dtype)


def fingerprint(network: nn.Module, ignored: Iterable[str] = ()) -> str:
    """A short hash of the names, shapes and contents of a network's tensors.

    The tensors named in `ignored` (those that are trained) do not count. The contents are summed as
    integers, which is fast for all types and enough to tell one base from another.
    """
    digest = hashlib.sha256()
    ignored = set(ignored)
    for name, tensor in network.state_dict().items():
        if name in ignored:
            continue
        raw = tensor.contiguous().flatten().view(torch.uint8)
        # A view as int64 needs an aligned start and a multiple of 8 bytes.
        if raw.storage_offset() % 8:
            raw = raw.clone()
        if len(raw) % 8 == 0:
            raw = raw.view(torch.int64)
        total = int(raw.sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(tensor.shape)} {total}".encode())
    return digest.hexdigest()[:16]

# -------------------- writing

def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, with the usual permissions of a new file.

    Equal tensors and metadata give equal bytes. OSError if it cannot be written.
    """
    # The library makes the file's owner its only reader, so the mode of a new file is kept.
    path.touch()
    mode = path.stat().st_mode
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        message = f"{path} could not be written ({error}); make room, and run the command again"
        raise OSError(message) from error
    _sort_metadata(path)
    path.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file in place: the library writes it in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if not header.get("__metadata__"):
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))

        # Spaces at the end keep the header's length, which all offsets count from.
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
        content = text.encode().ljust(length)
        if len(content) != length:
            raise ValueError(f"{path}: the sorted header has {len(content)} bytes, not {length}")
        file.seek(8)
        file.write(content)
