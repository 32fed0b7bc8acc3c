"""Files: where checkpoints lie, what is in them, and the networks made of them.

The one module of `models/` that opens files. `load_base` gives the networks of a Stable Diffusion folder,
`load_generator` a trained translator on its base; `save_generator` and `save_folder` write. Weights are mapped, not
read: a network is built without memory (device "meta") and its tensors are then the file's pages. """

from __future__ import annotations  # a field called vae may be a vae.VAE

import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import clip, pix2pix_turbo, unet, vae
from models.diffusion import Schedule
from models.lora import LoRAConv2d, LoRALinear, merge, set_scale

ROOT = pathlib.Path(__file__).parent.parent
# Names for --base: folders of this project and ids of the Hugging Face Hub.
BASES = {
    "tiny": str(ROOT / "tiny" / "tiny"),
    "sd-turbo": "stabilityai/sd-turbo",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
}
# Names for --checkpoint: the released pix2pix-Turbo files, and how large they are.
CHECKPOINTS = {
    "edge_to_image": "https://www.cs.cmu.edu/~img2img-turbo/models/edge_to_image_loras.pkl",
    "sketch_to_image_stochastic": "https://www.cs.cmu.edu/~img2img-turbo/models/sketch_to_image_stochastic_lora.pkl",
}
# Part of a base: its network, configuration, the options it must have, and the stem of its weight files.
PARTS = {
    "vae": (vae.VAE, vae.VAEConfig, vae.FIXED, "diffusion_pytorch_model"),
    "unet": (unet.UNet, unet.UNetConfig, unet.FIXED, "diffusion_pytorch_model"),
    "text_encoder": (clip.TextEncoder, clip.TextConfig, clip.FIXED, "model"),
}
FORMAT = "one-step-diffusion 1"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


# ----------------------------------------------------------------------------------------------------- finding files


def hub_cache() -> pathlib.Path:
    env = os.environ
    if cache := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return pathlib.Path(cache)
    if home := env.get("HF_HOME"):
        return pathlib.Path(home) / "hub"
    return pathlib.Path(env.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "huggingface" / "hub"


def find(base: str, names: list[str]) -> pathlib.Path | None:
    """The first of `names` (relative paths) that a base has: a folder, a name of the table, or a Hub id. A Hub id is
    looked for in the local cache first, and only when none of the names is there is it downloaded, into that
    cache."""
    base = BASES.get(base, base)
    folder = pathlib.Path(base).expanduser()
    if folder.is_dir():
        return next((folder / name for name in names if (folder / name).is_file()), None)
    if folder.is_file():
        raise ValueError(f"{base} is a file; expected a folder in the diffusers layout (unet/, vae/, text_encoder/, ...)")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base):
        raise ValueError(f"there is no folder {base}; expected a folder, a Hub id (ORGANISATION/NAME) or one of {', '.join(BASES)}")
    repository = hub_cache() / ("models--" + base.replace("/", "--"))
    ref = repository / "refs" / "main"
    commit = ref.read_text().strip() if ref.is_file() else None
    if commit:
        for name in names:
            if (path := repository / "snapshots" / commit / name).is_file():
                return path
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(f"{base} has no {names[0]} in the local cache {repository}, and HF_HUB_OFFLINE forbids a download:"
                         " unset it, or name a folder")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    for name in names:
        landing = repository / "downloads" / name.replace("/", "--")
        if answered := download(f"{endpoint}/{base}/resolve/{commit or 'main'}/{name}", landing):
            path = repository / "snapshots" / answered / name
            path.parent.mkdir(parents=True, exist_ok=True)
            landing.replace(path)
            if not commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(answered)
            return path
    return None


def download(url: str, path: pathlib.Path) -> str | None:
    """Fetches `url` to `path`, under another name until it is complete, saying so with its size. Returns the commit
    that a Hub answer names ("main" without one), or None where there is no such file."""
    commits: list[str | None] = []

    class Redirects(urllib.request.HTTPRedirectHandler):  # the Hub names the commit in the answer that redirects
        def redirect_request(self, request, file, code, message, headers, newurl):
            commits.append(headers.get("X-Repo-Commit"))
            return super().redirect_request(request, file, code, message, headers, newurl)

    request, partial = urllib.request.Request(url), path.with_name(path.name + ".incomplete")
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(Redirects).open(request, timeout=60) as answer:
            commits.append(answer.headers.get("X-Repo-Commit"))
            size = int(answer.headers.get("Content-Length") or 0)
            print(f"downloading {url}, {size / 1e6:.1f} MB", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := answer.read(1 << 20):
                    bar.update(file.write(block))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise OSError(f"{url} answered {error.code} {error.reason}; if the model asks for a login, set HF_TOKEN") from None
    except OSError as error:
        raise OSError(f"{url} could not be fetched ({error}); try again, or copy the files to a folder and name that") from None
    if size and partial.stat().st_size != size:
        raise OSError(f"{url} broke off after {partial.stat().st_size} of {size} bytes; run the command again")
    partial.replace(path)
    return next((c for c in commits if c), "main")


# ----------------------------------------------------------------------------------------------------- reading files


def read_json(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def read_config(cls: type, fixed: dict, path: pathlib.Path):
    """A network's configuration dataclass from its `config.json`. Keys that name no field and no fixed option are for
    training or for other libraries and are passed over."""
    found = read_json(path)
    if "text_config" in found:  # a whole CLIP model's file
        found = found["text_config"]
    for key, value in fixed.items():
        if key in found and found[key] != value:
            raise ValueError(f"{path} says {key} {found[key]!r}; this network is built for {value!r} only:"
                             " it is the file of another kind of model")
    known = {f.name for f in fields(cls)}
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k in known})
    except TypeError as error:
        raise ValueError(f"{path} does not describe a {cls.__name__} ({error}); expected the file of a diffusers folder") from None


def read_header(path: pathlib.Path) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], dict[str, str]]:
    """Names, types and shapes of a safetensors file, and its metadata, without reading a tensor. Refuses a file whose
    length or offsets do not add up."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{path} is no whole safetensors file ({size} bytes, header said to be {length}); copy it again")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {k: (DTYPES[v["dtype"]], tuple(v["shape"]), *v["data_offsets"]) for k, v in header.items()}
            for name, (dtype, shape, start, end) in entries.items():
                if end - start != math.prod(shape) * dtype.itemsize or min(start, *shape, 0) < 0:
                    raise ValueError(name)
            end = max((e[3] for e in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} has a damaged safetensors header ({type(error).__name__}: {error}); copy it again") from None
    if 8 + length + end != size:
        raise ValueError(f"{path} is cut: {size} bytes, and its header promises {8 + length + end}; copy it again")
    return {k: e[:2] for k, e in entries.items()}, metadata


def weight_files(base: str, part: str, stem: str) -> list[pathlib.Path]:
    """The file, or all shards, of one part of a base. Full precision goes before fp16 where both are there."""
    names = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
    path = find(base, [f"{part}/{name}" for name in names])
    if path is None:
        raise ValueError(f"{base} has no {part}/{names[0]} (nor fp16, nor an index of shards); expected weights as safetensors:"
                         " where there are only .bin files, convert them with diffusers' save_pretrained")
    if path.suffix != ".json":
        return [path]
    shards = sorted(set(read_json(path).get("weight_map", {}).values()))
    files = [find(base, [f"{part}/{shard}"]) for shard in shards]
    if not shards or None in files:
        missing = shards[files.index(None)] if shards else "weight_map"
        raise ValueError(f"{path} names {missing}, which is not there; expected all {len(shards)} shards beside it: copy it too")
    return files


def current_name(part: str, name: str) -> str | None:
    """A tensor's name in today's layout, None for one to ignore: older VAEs call the attention's layers otherwise, and
    text encoders come with a buffer of positions, and with or without a prefix."""
    if part == "vae":
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", name)
    if part == "text_encoder":
        if name.endswith("position_ids"):
            return None
        return name if name.startswith("text_model.") else "text_model." + name
    return name


def load_network(network: nn.Module, part: str, files: list[pathlib.Path], dtype: torch.dtype | None = None,
                 device: str = "cpu") -> nn.Module:
    """Fills a network built on "meta" from safetensors files. Every tensor must be there, once, in its shape, and no
    other: all headers are checked before anything is read. `dtype` None keeps the file's."""
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    source: dict[str, tuple[pathlib.Path, str]] = {}
    for path in files:
        for name, (_, shape) in read_header(path)[0].items():
            ours = current_name(part, name)
            if ours is None:
                continue
            if ours not in expected:
                raise ValueError(f"{path} holds {name}, which this {part} does not have; expected the weights that belong to its config.json")
            if shape != expected[ours] and not (shape[2:] == (1, 1) and shape[:2] == expected[ours]):  # old 1x1 convolutions
                raise ValueError(f"{path}: {name} is {list(shape)}; expected {list(expected[ours])} by its config.json")
            source[ours] = path, name
    if missing := sorted(expected.keys() - source.keys()):
        raise ValueError(f"{files[0]} lacks {missing[0]} {list(expected[missing[0]])}" +
                         (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "") + "; expected the whole network: copy it again")
    tensors = {}
    for path in files:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            for ours, (where, name) in source.items():
                if where == path:
                    tensors[ours] = file.get_tensor(name).to(dtype).reshape(expected[ours])
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.requires_grad_(False)


def load_tokenizer(base: str) -> clip.Tokenizer:
    """From `tokenizer/`: vocab.json and merges.txt, or tokenizer.json; the padding from the configuration files."""
    config, tokens = {}, {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if path := find(base, [f"tokenizer/{name}"]):
            config = {**read_json(path), **config}
    for name, default in dict(pad="<|endoftext|>", bos="<|startoftext|>", eos="<|endoftext|>").items():
        token = config.get(f"{name}_token", default)
        tokens[name] = token["content"] if isinstance(token, dict) else token
    path = find(base, ["tokenizer/vocab.json", "tokenizer/tokenizer.json"])
    if path is None:
        raise ValueError(f"{base} has no tokenizer/vocab.json and no tokenizer/tokenizer.json; expected one: copy it too")
    if path.name == "vocab.json":
        merges = find(base, ["tokenizer/merges.txt"])
        if merges is None:
            raise ValueError(f"{base} has tokenizer/vocab.json but no tokenizer/merges.txt; expected both: copy it too")
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if bad := next((line for line in pairs if len(line) != 2), None):
            raise ValueError(f"{merges} has a line of {len(bad)} pieces ({' '.join(bad)[:40]}); expected two a line: copy it again")
        vocab = read_json(path)
    else:
        model = read_json(path).get("model", {})
        vocab, pairs = model.get("vocab"), model.get("merges")
        if not isinstance(vocab, dict) or not isinstance(pairs, list):
            raise ValueError(f"{path} is not a byte-level BPE tokenizer; expected CLIP's")
        pairs = [tuple(p.split()) if isinstance(p, str) else tuple(p) for p in pairs]
    try:
        pieces = clip.clip_pieces(vocab, pairs)
    except Exception as error:  # tokenizers raises plain Exception for a merge that names no piece
        raise ValueError(f"{path} and its merges do not fit together ({error}); copy both again") from None
    return clip.Tokenizer(pieces, min(config.get("model_max_length", 77), 77), tokens["pad"], tokens["bos"], tokens["eos"])


# ----------------------------------------------------------------------------------------------------- bases


@dataclass
class Base:
    """What was asked for of a base; the rest is None."""
    name: str
    vae: vae.VAE | None = None
    unet: unet.UNet | None = None
    text_encoder: clip.TextEncoder | None = None
    tokenizer: clip.Tokenizer | None = None
    schedule: Schedule | None = None


def load_base(name: str, parts: tuple[str, ...] = ("vae", "unet", "text_encoder", "tokenizer", "schedule"),
              dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0) -> Base:
    """The parts of a base, frozen, in the file's type where `dtype` is None. `name`: see `find`. A base whose
    `model_index.json` says `"initialise": "random"` has no weights: they are drawn from `seed`."""
    index = find(name, ["model_index.json"])
    if index is None:
        raise ValueError(f"{name} has no model_index.json; expected a folder in the diffusers layout")
    drawn = read_json(index).get("initialise") == "random"
    base = Base(name)
    for part in parts:
        if part == "tokenizer":
            base.tokenizer = load_tokenizer(name)
        elif part == "schedule":
            path = find(name, ["scheduler/scheduler_config.json"])
            if path is None:
                raise ValueError(f"{name} has no scheduler/scheduler_config.json; expected one: copy it too")
            base.schedule = Schedule.from_config(read_json(path))
        else:
            cls, config_cls, fixed, stem = PARTS[part]
            path = find(name, [f"{part}/config.json"])
            if path is None:
                raise ValueError(f"{name} has no {part}/config.json; expected one: copy it too")
            config = read_config(config_cls, fixed, path)
            if drawn:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    network = cls(config).requires_grad_(False).to(device=device, dtype=dtype)
            else:
                with torch.device("meta"):
                    network = cls(config)
                load_network(network, part, weight_files(name, part, stem), dtype, device)
            setattr(base, part, network)
    return base


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Stores the frozen weights of linear layers and convolutions in `dtype` (for autocast); norms stay as they are."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            for p in layer.parameters(recurse=False):
                if not p.requires_grad:
                    p.data = p.data.to(dtype)


def fingerprint(network: nn.Module, but: Iterable[str] = ()) -> str:
    """A short hash of the names, shapes and contents of a network's tensors, but those named (what is trained). Contents
    are summed as integers: fast, whatever the type, and enough to tell one base from another."""
    digest, but = hashlib.sha256(), set(but)
    for name, tensor in network.state_dict().items():
        if name not in but:
            raw = tensor.detach().contiguous().flatten().view(torch.uint8)
            raw = raw.view(torch.int64) if raw.numel() % 8 == 0 else raw
            digest.update(f"{name} {tuple(tensor.shape)} {int(raw.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- generators


@dataclass
class Loaded:
    """A generator ready to run, and what its checkpoint says of itself."""
    generator: pix2pix_turbo.Pix2PixTurbo
    text_encoder: clip.TextEncoder
    tokenizer: clip.Tokenizer
    kind: str
    base: str
    prompts: list[str]
    r: float | None  # of a stochastic model


def save_generator(path: pathlib.Path, generator: nn.Module, kind: str, base: str, prompts: list[str],
                   text_encoder: clip.TextEncoder | None = None, tokenizer: clip.Tokenizer | None = None) -> None:
    """Writes what was trained, with all that sampling needs to know in the metadata. Where everything was trained the
    file also takes the text encoder, all configurations and the tokenizer, and opens no base."""
    tensors = {name: p.detach() for name, p in generator.named_parameters() if p.requires_grad}
    config = dict(generator=asdict(generator.config))
    if generator.config.train == "all":
        tensors |= {f"text_encoder.{name}": p.detach() for name, p in text_encoder.named_parameters()}
        config |= dict(vae=asdict(generator.vae.config), unet=asdict(generator.unet.config), text_encoder=asdict(text_encoder.config),
                       schedule=generator.schedule.config, tokenizer=tokenizer.to_json())
    metadata = dict(format=FORMAT, kind=kind, base=base, config=json.dumps(config), prompts=json.dumps(prompts))
    tensors = {name: t.to("cpu").contiguous() for name, t in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata)


def read_pkl(path: pathlib.Path) -> dict:
    """An official `.pkl`: tensors, numbers, names; a file that would run code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of tensors ({str(error).splitlines()[0][:120]}); expected a file of"
                         " img2img-turbo, and nothing in it that runs code") from None


def find_checkpoint(name: str) -> pathlib.Path:
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file() and name in CHECKPOINTS:
        path = hub_cache().parent / "img2img-turbo" / CHECKPOINTS[name].rpartition("/")[2]
        if not path.is_file() and download(CHECKPOINTS[name], path) is None:
            raise ValueError(f"{CHECKPOINTS[name]} does not exist any more; look for the file at the img2img-turbo project")
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; expected a file, a run's folder, or one of {', '.join(CHECKPOINTS)}")
    return path


def load_generator(checkpoint: str, base: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu",
                   r: float | None = None, strength: float = 1.0, merged: bool = True) -> Loaded:
    """A trained generator on its base, from a file of ours or an official `.pkl` (whose base is SD-Turbo unless one
    is named). `strength` takes the trained change that many times, `r` sets a stochastic model's adapters; `merged`
    adds the LoRA to the weights, for inference only."""
    path = find_checkpoint(checkpoint)
    if path.suffix != ".safetensors":
        config, tensors = pix2pix_turbo.from_official(read_pkl(path), path)
        kind, base, prompts = "pix2pix_turbo", base or "sd-turbo", []
    else:
        header, metadata = read_header(path)
        if metadata.get("format") != FORMAT or metadata.get("kind") != "pix2pix_turbo":
            raise ValueError(f"{path} is a safetensors file of format {metadata.get('format')!r} and kind {metadata.get('kind')!r};"
                             f" expected {FORMAT!r} and 'pix2pix_turbo': a model.safetensors that a trainer here wrote")
        saved, kind, prompts = json.loads(metadata["config"]), metadata["kind"], json.loads(metadata["prompts"])
        base = base or metadata["base"]
        config = pix2pix_turbo.Pix2PixTurboConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved["generator"].items()})
        tensors = safetensors.torch.load_file(path)

    whole = config.train == "all"
    if whole:
        if strength != 1:
            raise ValueError(f"{path} holds every weight and knows no other; strength works for LoRA checkpoints only")
        networks = Base(base, schedule=Schedule.from_config(saved["schedule"]), tokenizer=clip.Tokenizer.from_json(saved["tokenizer"]))
        for part, (cls, config_cls, _, _) in PARTS.items():
            sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in saved[part].items()}
            with torch.device("meta"):
                setattr(networks, part, cls(config_cls(**sizes)))
        own = {k.removeprefix("text_encoder."): tensors.pop(k) for k in [*tensors] if k.startswith("text_encoder.")}
        assign(networks.text_encoder, own, path)
    else:
        networks = load_base(base, dtype=dtype, device=device)
    generator = pix2pix_turbo.Pix2PixTurbo(networks.vae, networks.unet, networks.schedule, config)
    assign(generator, tensors, path, strength)
    for layer in generator.modules():
        if isinstance(layer, LoRALinear | LoRAConv2d):
            layer.full_scale *= strength
    if config.stochastic:
        r = 0.4 if r is None else r
    elif r is not None:
        raise ValueError(f"{path} is not a stochastic model and has no r; leave --r out")
    set_scale(generator, 1.0 if r is None else r)
    if merged:
        merge(generator)
    generator.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return Loaded(generator, networks.text_encoder.to(device=device, dtype=dtype).eval(), networks.tokenizer, kind, base, prompts, r)


def assign(network: nn.Module, tensors: dict[str, Tensor], path: pathlib.Path, strength: float = 1.0) -> None:
    """Puts a checkpoint's tensors in place of the network's trainable ones: exactly those, in their shapes. Tensors
    that were trained in full go `strength` of the way from their value before."""
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for name, tensor in tensors.items():
        if name not in trainable:
            raise ValueError(f"{path} holds {name}, which the generator on this base does not train; is it for another base?")
        if tensor.shape != trainable[name].shape:
            raise ValueError(f"{path}: {name} is {list(tensor.shape)}; expected {list(trainable[name].shape)}: it is for another base")
    if missing := sorted(trainable.keys() - tensors.keys()):
        raise ValueError(f"{path} lacks {missing[0]} and {len(missing) - 1} more of {len(trainable)} trained tensors; copy it again")
    if strength != 1:
        tensors = {k: t if ".lora_" in k else torch.lerp(trainable[k].detach().cpu().to(t.dtype), t, strength) for k, t in tensors.items()}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, nn.Parameter(tensor))


def save_folder(folder: pathlib.Path, base: Base, dtype: torch.dtype | None = None) -> None:
    """Writes the networks of a base back in the Stable Diffusion layout."""
    index = {"_class_name": "StableDiffusionPipeline"}
    for part, (_, _, _, stem) in PARTS.items():
        if network := getattr(base, part):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / "config.json").write_text(json.dumps(asdict(network.config), indent=2))
            tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in network.state_dict().items()}
            safetensors.torch.save_file(tensors, folder / part / f"{stem}.safetensors", {"format": "pt"})
            index[part] = ["diffusers", part]
    if base.schedule:
        (folder / "scheduler").mkdir(parents=True, exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(base.schedule.config, indent=2))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
