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

from files.formats import current_name
from files.hub import find

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

@contextlib.contextmanager
def reading(what: object, expected: str) -> Iterator[None]:
    """Whatever a damaged or foreign file makes Python or a library raise becomes one sentence that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or str(what) in str(error):
            raise  # it names a file already
        kind, text = type(error).__name__, " ".join(str(error).split())[:200]
        text = text if kind == "ValueError" else f"{kind}: {text}"
        raise ValueError(f"{what} cannot be used ({text}); expected {expected}") from error


def read_json(path: Path) -> dict:
    with reading(path, "a JSON object: copy the file again"):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    return value


def read_tensors(path: Path, expected: str = "") -> tuple[dict, dict[str, str]]:
    """The tensors of a safetensors file, mapped, and its metadata; the library refuses one that does not add up to the
    byte. Or what a file of torch.save holds, unless that is code, or packed, which torch.save leaves none."""
    if path.suffix == ".safetensors":
        with reading(path, f"a whole safetensors file, and these are {path.stat().st_size} bytes: copy it again"), \
                safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    try:
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is packed")
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except Exception as error:  # of many kinds, whose texts advise to let the code run
        raise ValueError(f"{path} is no file of torch.save, or one with code in it ({type(error).__name__}); expected"
                         f" {expected}: tensors, numbers and names") from error


def is_of(value: object, kind: type) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_of(v, typing.get_args(kind)[0]) for v in value)
    if isinstance(kind, types.UnionType):
        return any(is_of(value, one) for one in typing.get_args(kind))
    return type(value) is kind and (kind is not int or value >= 0) or kind is float and type(value) is int


def from_json(cls: type, values: dict):
    """A dataclass again, whose tuples JSON has made lists. Refuses values of other types, and layers or ranks beyond
    those of any network: to build them alone would take for ever."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, kind in typing.get_type_hints(cls).items():
        value = values.get(name)
        endless = ("layers" in name or "rank" in name) and isinstance(value, int) and value > 1000
        if endless or name in values and not is_of(value, kind):
            raise ValueError(f"{name} is {value!r:.100}")
    return cls(**values)


def read_config(cls: type, fixed: dict, path: Path):
    """A network's configuration from its `config.json`, whose other keys are for training or other libraries."""
    found = read_json(path)
    with reading(path, "the configuration of a network of Stable Diffusion 1.x or 2.x"):
        found = found.get("text_config", found)  # of a whole CLIP model's file
        for key, value in fixed.items():
            if found.get(key, value) != value:
                raise ValueError(f"{key} is {found[key]!r}, and this network is built for {value!r} only")
        return from_json(cls, {f.name: found[f.name] for f in fields(cls) if f.name in found})


def build(cls: type, config: object, path: Path, device: str = "meta") -> nn.Module:
    with reading(path, "sizes that make a network"), torch.device(device):
        return cls(config)


def read_weights(base: str, folder: str, stem: str) -> dict[Path, dict[str, Tensor]]:
    """The file, or all shards, in one folder ("unet/") of a base, mapped. Full precision goes before fp16."""
    ends = (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json")
    path = find(base, [f"{folder}{stem}{end}" for end in ends], "weights as safetensors, whole, in shards or fp16:"
                " where there are only .bin files, convert them with diffusers' save_pretrained")
    if path.suffix != ".json":
        return {path: read_tensors(path)[0]}
    index = read_json(path)
    with reading(path, "a weight_map of tensors to the shards beside it: copy it again"):
        shards = sorted(set(index["weight_map"].values()))
        if not shards or not all(re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards):
            raise ValueError(f"it names {shards}")
    files = [find(base, [folder + s], f"all {len(shards)} shards that {path} names: copy it too") for s in shards]
    return {file: read_tensors(file)[0] for file in files}


def fit(network: nn.Module, files: dict[Path, dict[str, Tensor]], expected: dict[str, Tensor], owner: str
        ) -> dict[str, Tensor]:
    """The tensors of files under a network's names (it is `owner` in errors): just those expected, in their shapes."""
    first = next(iter(files))
    with reading(first if len(files) == 1 else first.parent, f"the {len(expected)} tensors of {owner}: copy it again"):
        tensors = {current_name(network, name): t for found in files.values() for name, t in found.items()}
        tensors.pop(None, None)
        for name in sorted(tensors.keys() | expected.keys()):
            if name not in tensors or name not in expected:
                raise ValueError(f"it lacks {name} {list(expected[name].shape)}" if name in expected else
                                 f"it holds {name}, which is none of them")
            t, shape = tensors[name], expected[name].shape
            if t.shape[2:] == (1, 1) and len(shape) == 2:  # a linear layer that was a 1x1 convolution
                tensors[name] = t = t.flatten(1)
            if t.shape != shape or t.dtype not in FLOATS:
                raise ValueError(f"{name} is {str(t.dtype)[6:]} {list(t.shape)}; expected floating point {list(shape)}")
    return tensors


def fill(network: nn.Module, files: dict[Path, dict[str, Tensor]], owner: str,
         dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """Gives a network built on "meta" its tensors: the mapped ones where `dtype` is None or theirs, else copies, made
    one by one, so that no memory is taken but the network's own and one tensor's."""
    tensors = fit(network, files, network.state_dict(), owner)
    network.load_state_dict({name: t.to(device=device, dtype=dtype) for name, t in tensors.items()}, assign=True)
    return network.requires_grad_(False)


def assign(network: nn.Module, tensors: dict[str, Tensor], path: Path, strength: float = 1.0) -> None:
    """Puts a checkpoint's tensors in place of the network's trainable ones, and of buffers without a value: exactly
    those, in their shapes. Tensors that were trained in full go `strength` of the way from their value before."""
    expected = {name: p for name, p in network.named_parameters() if p.requires_grad}
    expected |= {name: b for name, b in network.named_buffers() if b.is_meta}
    for name, tensor in fit(network, {path: tensors}, expected, "the generator on this base").items():
        before, (parent, _, leaf) = expected[name], name.rpartition(".")
        tensor = tensor if before.is_meta else tensor.to(before.device)
        if strength != 1 and ".lora_" not in name:
            tensor = torch.lerp(before.detach().to(tensor.dtype), tensor, strength)
        setattr(network.get_submodule(parent), leaf, nn.Parameter(tensor) if before.requires_grad else tensor)


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Stores the frozen weights of linear layers, convolutions and group norms in `dtype`, autocast's."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm):
            for p in layer.parameters(recurse=False):
                p.data = p.data if p.requires_grad else p.data.to(dtype)


def fingerprint(network: nn.Module, but: Iterable[str] = ()) -> str:
    """A short hash of the names, shapes and contents of a network's tensors, but those named (what is trained).
    Contents are summed as integers: fast, whatever the type, and enough to tell one base from another."""
    digest, but = hashlib.sha256(), set(but)
    for name, tensor in network.state_dict().items():
        if name not in but:
            raw = tensor.contiguous().flatten().view(torch.uint8)
            raw = raw.clone() if raw.storage_offset() % 8 else raw  # what the next line asks for
            total = (raw.view(torch.int64) if len(raw) % 8 == 0 else raw).sum(dtype=torch.int64)
            digest.update(f"{name} {tuple(tensor.shape)} {int(total)}".encode())
    return digest.hexdigest()[:16]


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode  # any new file's; left alone, safetensors makes the user its only reader
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); make room, and run the command again") from error
    path.chmod(mode)
