"""Files: where checkpoints lie, what is in them, and the networks made of them.

The one module of `models/` that opens files. `load_base` gives the networks of a folder or a one-file model,
`load_merged` those of a sum of bases, `load_lora` and `load_controlnet` what is put on them, `load_generator` a trained
translator on its base; `save_generator` and `save_folder` write. Weights are mapped, not read: a network is built
without memory (device "meta") and its tensors are then the file's pages, or copied from them one at a time into the
type asked for. What is wrong with a file is said in one line that names it."""

from __future__ import annotations  # a field called vae may be a vae.VAE

import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
import types
import typing
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import clip, controlnet, cyclegan_turbo, dino, inception, lpips, pix2pix_turbo, pixart, t5, unet, vae
from models.diffusion import Schedule
from models.lora import LoRAConv2d, LoRALinear, apply_lora, merge, read_lora, set_scale

ROOT = pathlib.Path(__file__).parent.parent
# Names for --base: folders of this project and ids of the Hugging Face Hub.
BASES = {
    "tiny": str(ROOT / "tiny" / "tiny"),
    "tiny-sd": str(ROOT / "tiny" / "tiny-sd"),
    "tiny-turbo": str(ROOT / "tiny" / "tiny-turbo"),
    "pixels": str(ROOT / "tiny" / "pixels"),
    "sd-turbo": "stabilityai/sd-turbo",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "pixart512": "PixArt-alpha/PixArt-XL-2-512x512",
    "pixart1024": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "yoso512": "Luo-Yihong/yoso_pixart512",
    "yoso1024": "Luo-Yihong/yoso_pixart1024",
}
# The last two are a transformer alone: all else is PixArt's, but for this of its scheduler.
YOSO = dict(_class_name="LCMScheduler", prediction_type="v_prediction")
# Names for --checkpoint: the released files, and for CycleGAN-Turbo the direction and the caption that go with each.
RELEASED = "https://www.cs.cmu.edu/~img2img-turbo/models"
CHECKPOINTS: dict[str, tuple[str, str | None, str | None]] = {
    "edge_to_image": ("edge_to_image_loras.pkl", None, None),
    "sketch_to_image_stochastic": ("sketch_to_image_stochastic_lora.pkl", None, None),
    "day_to_night": ("day2night.pkl", "a2b", "driving in the night"),
    "night_to_day": ("night2day.pkl", "b2a", "driving in the day"),
    "clear_to_rainy": ("clear2rainy.pkl", "a2b", "driving in heavy rain"),
    "rainy_to_clear": ("rainy2clear.pkl", "b2a", "driving in the day"),
}
ADAPTERS = ROOT / "tiny" / "adapters"  # of tiny-turbo, by their names there
# Networks that judge pictures: addresses of their files, or an id of the Hub.
JUDGES = {
    "lpips": ["https://download.pytorch.org/models/vgg16-397923af.pth", "https://raw.githubusercontent.com/richzhang/"
              "PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"],
    "clip": ["openai/clip-vit-base-patch32"],
    "dino": ["facebook/dino-vitb8"],
    "inception": ["https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth"],
}
# Kinds of generator: the class, its settings, and what reads an official file of its kind.
KINDS = {
    "pix2pix_turbo": (pix2pix_turbo.Pix2PixTurbo, pix2pix_turbo.Pix2PixTurboConfig, pix2pix_turbo.from_official),
    "cyclegan_turbo": (cyclegan_turbo.CycleGANTurbo, cyclegan_turbo.CycleGANTurboConfig, cyclegan_turbo.from_official),
}
# Networks of a base: class, configuration, the options it must have, the stem of its files, its name in diffusers.
PARTS = {
    "vae": (vae.VAE, vae.VAEConfig, vae.FIXED, "diffusion_pytorch_model", ("diffusers", "AutoencoderKL")),
    "unet": (unet.UNet, unet.UNetConfig, unet.FIXED, "diffusion_pytorch_model", ("diffusers", "UNet2DConditionModel")),
    "text_encoder": (clip.TextEncoder, clip.TextConfig, clip.FIXED, "model", ("transformers", "CLIPTextModel")),
    "transformer": (pixart.PixArt, pixart.PixArtConfig, pixart.FIXED, "diffusion_pytorch_model",
                    ("diffusers", "PixArtTransformer2DModel")),
}
IDENTITY = (vae.Identity, vae.IdentityConfig, {}, "diffusion_pytorch_model", ("models.vae", "Identity"))  # of pixels
T5 = (t5.T5Encoder, t5.T5Config, t5.FIXED, "model", ("transformers", "T5EncoderModel"))  # the text_encoder of PixArt
STABLE_DIFFUSION = ("vae", "unet", "text_encoder", "tokenizer", "schedule")
PIXART = ("vae", "transformer", "text_encoder", "tokenizer", "schedule")
FORMAT = "one-step-diffusion 1"
LAYOUT = ("a folder in the diffusers layout (unet/ or transformer/, vae/, text_encoder/, tokenizer/, scheduler/,"
          " model_index.json)")
ONE_FILE = "a one-file checkpoint of Stable Diffusion 1.x or 2.x (model.diffusion_model..., first_stage_model...)"
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")


# ----------------------------------------------------------------------------------------------------- finding files


def hub_cache() -> pathlib.Path:
    env = os.environ
    home = env.get("HF_HOME") or pathlib.Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface").expanduser()
    return pathlib.Path(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or pathlib.Path(home, "hub"))


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def find(base: str, names: list[str], expected: str | None = None, fetch: bool = True) -> pathlib.Path | None:
    """The first of `names` (relative paths) that a base has: a folder, a name of the table, or a Hub id. A Hub id is
    looked for in the local cache first, and only when none of the names is there is it downloaded (if `fetch`), into
    that cache, which also remembers what the Hub does not have. Where there is none: None, or an error that says what
    was `expected`."""
    base = BASES.get(base, base)
    folder = pathlib.Path(base).expanduser()
    hub = not folder.is_dir()
    if hub:
        if folder.is_file() or not re.fullmatch(HUB_ID, base):
            raise ValueError(f"{base} is {'a file' if folder.is_file() else 'no folder here'}; expected {LAYOUT}, a Hub"
                             f" id (ORGANISATION/NAME) or one of {', '.join(BASES)}")
        repository = hub_cache() / f"models--{base.replace('/', '--')}"
        ref = repository / "refs" / "main"
        commit = ref.read_text().strip() if ref.is_file() else "main"
        folder = repository / "snapshots" / commit
    if here := next((folder / name for name in names if (folder / name).is_file()), None):
        return here
    for name in names if hub and fetch and not offline() else []:
        absent = repository / ".no_exist" / commit / name
        if absent.is_file():
            continue
        landing = repository / "downloads" / f"{os.getpid()}--{name.replace('/', '--')}"  # each process its own
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        if answered := download(f"{endpoint}/{base}/resolve/{commit}/{name}", landing):
            if not ref.is_file():
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(answered)
                folder = repository / "snapshots" / answered
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            return landing.replace(folder / name)
        if ref.is_file():
            absent.parent.mkdir(parents=True, exist_ok=True)
            absent.touch()
    if expected:
        note = f" in {folder}, and HF_HUB_OFFLINE forbids a download" if hub and offline() else ""
        raise ValueError(f"{base} has no {names[0]}{note}; expected {expected}")
    return None


def download(url: str, path: pathlib.Path) -> str | None:
    """Fetches `url` to `path`, under another name until it is complete, saying so with its size. Returns the commit
    that a Hub answer names ("main" without one), or None where there is no such file."""
    commits, partial = [], path.with_name(f"{path.name}.{os.getpid()}.incomplete")

    def ask(target: str) -> urllib.request.Request:  # the token goes to the host that was named and to no other
        token, same = os.environ.get("HF_TOKEN"), len({urllib.parse.urlsplit(u).netloc for u in (target, url)}) == 1
        return urllib.request.Request(target, headers={"Authorization": f"Bearer {token}"} if token and same else {})

    class Redirects(urllib.request.HTTPRedirectHandler):  # the Hub names the commit in the answer that redirects
        def redirect_request(self, request, file, code, message, headers, newurl):
            commits.append(headers.get("X-Repo-Commit"))
            return ask(newurl)

    try:
        with urllib.request.build_opener(Redirects).open(ask(url), timeout=60) as answer:
            commits.append(answer.headers.get("X-Repo-Commit"))
            size = int(answer.headers.get("Content-Length") or 0)
            print(f"downloading {url}, {size / 1e6:.1f} MB", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file, tqdm(total=size, unit="B", unit_scale=True, disable=size < 1e7) as bar:
                while block := answer.read(1 << 20):
                    bar.update(file.write(block))
        if size and partial.stat().st_size != size:
            raise OSError(f"it broke off after {partial.stat().st_size} of {size} bytes")
        partial.replace(path)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise OSError(f"{url} answered {error.code} {error.reason}; expected a folder that is here or a model of the"
                      " Hub: where that asks for a login, set HF_TOKEN") from None
    except Exception as error:  # OSError and what http.client raises
        raise OSError(f"{url} could not be fetched ({str(error) or type(error).__name__}); run the command again, or"
                      " copy the files to a folder and name that") from None
    finally:
        partial.unlink(missing_ok=True)
    return next((commit for commit in commits if commit), "main")


# ----------------------------------------------------------------------------------------------------- reading files


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


def read_tensors(path: pathlib.Path, expected: str) -> tuple[dict, dict[str, str]]:
    """What a safetensors file, or one of torch.save without code in it, holds, and the metadata of the first."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path), read_header(path)[1]
    return read_pkl(path, expected), {}


def read_json(path: pathlib.Path) -> dict:
    with reading(path, "a JSON object: copy the file again"):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    return value


def is_of(value: object, kind: type) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_of(v, typing.get_args(kind)[0]) for v in value)
    if isinstance(kind, types.UnionType):
        return any(is_of(value, one) for one in typing.get_args(kind))
    return type(value) is kind and (kind is not int or value >= 0) or kind is float and type(value) is int


def from_json(cls: type, values: dict):
    """A dataclass again, whose tuples JSON has made lists. Refuses values of other types, and more layers than any
    network has: to build them alone would take for ever."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, kind in typing.get_type_hints(cls).items():
        value = values.get(name)
        if name in values and not is_of(value, kind) or "layers" in name and name in values and value > 1000:
            raise ValueError(f"{name} is {value!r:.100}")
    return cls(**values)


def read_config(cls: type, fixed: dict, path: pathlib.Path):
    """A network's configuration dataclass from its `config.json`. Keys that name no field and no fixed option are for
    training or for other libraries and are passed over."""
    found = read_json(path)
    with reading(path, "the configuration of a network of Stable Diffusion 1.x or 2.x"):
        found = found.get("text_config", found)  # of a whole CLIP model's file
        for key, value in fixed.items():
            if found.get(key, value) != value:
                raise ValueError(f"{key} is {found[key]!r}, and this network is built for {value!r} only")
        return from_json(cls, {f.name: found[f.name] for f in fields(cls) if f.name in found})


def build(cls: type, config: object, path: pathlib.Path) -> nn.Module:
    with reading(path, "sizes that make a network"), torch.device("meta"):
        return cls(config)


def read_header(path: pathlib.Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Names, types ("F32") and shapes of a safetensors file, and its metadata, without reading a tensor. The library
    refuses a file whose length, shapes and offsets do not add up to the byte."""
    with reading(path, f"a whole safetensors file, and these are {path.stat().st_size} bytes: copy it again"), \
            safetensors.safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}, file.metadata() or {}


def weight_files(base: str, folder: str, stem: str) -> list[pathlib.Path]:
    """The file, or all shards, in one folder ("unet/") of a base. Full precision goes before fp16 where both are
    there."""
    ends = (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json")
    path = find(base, [f"{folder}{stem}{end}" for end in ends], "weights as safetensors, whole, in shards or fp16:"
                " where there are only .bin files, convert them with diffusers' save_pretrained")
    if path.suffix != ".json":
        return [path]
    index = read_json(path)
    with reading(path, "a weight_map of tensors to the shards beside it: copy it again"):
        shards = sorted(set(index["weight_map"].values()))
        if not shards or not all(re.fullmatch(r"[\w.-]+\.safetensors", shard) for shard in shards):
            raise ValueError(f"it names {shards}")
    return [find(base, [folder + s], f"all {len(shards)} shards that {path} names: copy it too") for s in shards]


def current_name(network: nn.Module, name: str) -> str | None:
    """A tensor's name in today's layout, None for one to ignore: older VAEs call the attention's layers otherwise, and
    text encoders come with a buffer of positions, and with or without a prefix, or with their embedding twice."""
    if isinstance(network, vae.VAE):
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{old[m[2]]}.", name)
    if isinstance(network, t5.T5Encoder):
        return None if name == "encoder.embed_tokens.weight" else name
    if isinstance(network, clip.TextEncoder):
        return None if name.endswith("position_ids") else "text_model." + name.removeprefix("text_model.")
    return name


def compare(found: list[tuple[str, str, str, tuple[int, ...], pathlib.Path]], expected: dict[str, Tensor],
            owner: str, path: pathlib.Path) -> None:
    """Refuses all but exactly the expected tensors, each once, in its shape. found: our name, the file's name, type,
    shape, file."""
    seen = set()
    for ours, name, dtype, shape, where in found:
        if ours not in expected or ours in seen:
            fault = "a second time" if ours in seen else f"a tensor that {owner} does not have"
            raise ValueError(f"{where} holds {name}, {fault}; expected the weights that belong to it")
        if shape != expected[ours].shape or dtype not in FLOATS:
            raise ValueError(f"{where}: {name} is {dtype} {list(shape)}; expected floating point"
                             f" {list(expected[ours].shape)} for {owner}")
        seen.add(ours)
    if missing := sorted(expected.keys() - seen):
        raise ValueError(f"{path} lacks {missing[0]} {list(expected[missing[0]].shape)} and {len(missing) - 1} more;"
                         f" expected all {len(expected)} tensors of {owner}: copy it again")


def load_network(network: nn.Module, part: str, files: list[pathlib.Path], dtype: torch.dtype | None = None,
                 device: str = "cpu") -> nn.Module:
    """Fills a network built on "meta" from safetensors files. Every tensor must be there, once, in its shape, and no
    other: all headers are checked before anything is read. `dtype` None keeps the file's; another is made tensor by
    tensor, so that no memory is taken but the network's own and one tensor's."""
    expected, found = network.state_dict(), []
    for path in files:
        for name, (kind, shape) in read_header(path)[0].items():
            if ours := current_name(network, name):
                if shape[2:] == (1, 1) and ours in expected and expected[ours].ndim == 2:
                    shape = shape[:2]  # linear layers that were 1x1 convolutions
                found.append((ours, name, kind, shape, path))
    compare(found, expected, f"the {part} of its config.json", files[0])
    tensors = {}
    for path in files:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            tensors |= {ours: file.get_tensor(name).to(dtype).reshape(shape)
                        for ours, name, _, shape, where in found if where == path}
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.requires_grad_(False)


def load_t5_tokenizer(base: str) -> t5.T5Tokenizer:
    path = find(base, ["tokenizer/spiece.model", "tokenizer/tokenizer.json"], "it or tokenizer.json, T5's vocabulary")
    with reading(path, "the vocabulary of T5: copy it again"):
        return t5.T5Tokenizer(t5.pieces_from_spiece(path.read_bytes()) if path.suffix == ".model" else
                              t5.pieces_from_json(path.read_text(encoding="utf-8")))


def load_tokenizer(base: str, folder: str = "tokenizer/") -> clip.Tokenizer:
    """From vocab.json and merges.txt, or tokenizer.json; the padding from the configuration files."""
    path = find(base, [f"{folder}tokenizer_config.json"])
    config = read_json(path) if path else {}
    # As in transformers: the second file overrules the first, unless that is of the newer kind. SD 2.1 needs it.
    if "added_tokens_decoder" not in config and (path := find(base, [f"{folder}special_tokens_map.json"])):
        config |= read_json(path)
    path = find(base, [f"{folder}vocab.json", f"{folder}tokenizer.json"], "it and merges.txt, or tokenizer.json")
    vocab = read_json(path)
    if path.name == "vocab.json":
        path = find(base, [f"{folder}merges.txt"], "it beside vocab.json: copy it too")
    with reading(path, "CLIP's byte-level BPE, with all files of one model: copy them again"):
        if path.name == "merges.txt":
            merges = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#version")]
        else:
            vocab, merges = vocab["model"]["vocab"], vocab["model"]["merges"]
        pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges if pair]
        if odd := next((pair for pair in pairs if len(pair) != 2), None):
            raise ValueError(f"a merge is of {len(odd)} pieces, not 2: {' '.join(odd)}")
        tokens = [config.get(f"{name}_token") or default for name, default in
                  dict(pad="<|endoftext|>", bos="<|startoftext|>", eos="<|endoftext|>").items()]
        tokens = [token["content"] if isinstance(token, dict) else token for token in tokens]
        return clip.Tokenizer(clip.clip_pieces(vocab, pairs), min(config.get("model_max_length", 77), 77), *tokens)


# ------------------------------------------------------------------------------------------------------------- bases


@dataclass
class Base:
    """What was asked for of a base; the rest is None. PixArt has a transformer in place of the U-Net, and T5."""
    name: str
    vae: vae.VAE | None = None
    unet: unet.UNet | None = None
    transformer: pixart.PixArt | None = None
    text_encoder: clip.TextEncoder | t5.T5Encoder | None = None
    tokenizer: clip.Tokenizer | t5.T5Tokenizer | None = None
    schedule: Schedule | None = None
    random: bool = False  # whether its networks were drawn from a seed

    @property
    def denoiser(self) -> unet.UNet | pixart.PixArt:
        return self.transformer or self.unet

    @property
    def multiple(self) -> int:
        """What the sides of a picture are multiples of."""
        return self.vae.factor * (self.transformer.config.patch_size if self.transformer else 1)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, ...]:
        """What the denoiser takes after x and t: contexts [n, N, C] and, of T5, the mask of their tokens [n, N]."""
        device = next(self.text_encoder.parameters()).device
        if isinstance(self.tokenizer, t5.T5Tokenizer):
            ids, mask = (x.to(device) for x in self.tokenizer([t5.clean(text) for text in texts]))
            return self.text_encoder(ids, mask), mask
        return (self.text_encoder(self.tokenizer(texts).to(device)),)


def is_file(name: str) -> bool:
    """Whether a base is a one-file model."""
    path = pathlib.Path(name).expanduser()
    return path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") and path.is_file()


def read_index(name: str) -> tuple[dict, bool]:
    """The `model_index.json` of a base, and whether it is a transformer that comes alone: then its `config.json`."""
    path = find(name, ["model_index.json", "config.json"], LAYOUT)
    index, alone = read_json(path), path.name == "config.json"
    if alone and index.get("_class_name") not in ("Transformer2DModel", "PixArtTransformer2DModel"):
        raise ValueError(f"{path} is of {index.get('_class_name')!r}; expected {LAYOUT}, or PixArt's transformer alone")
    if not isinstance(rest := index.get("rest", ""), str):
        raise ValueError(f"{path}: its rest is {rest!r:.100}; expected the name of a base")
    return index, alone


def parts_of(name: str, encoded: bool = False) -> tuple[str, ...]:
    """STABLE_DIFFUSION or PIXART, whichever a base is. Where captions are encoded already, PixArt needs no T5, which is
    larger than all the rest."""
    index, alone = ({}, False) if is_file(name) else read_index(name)
    is_pixart = alone or "transformer" in index
    return ("vae", "transformer", "schedule") if is_pixart and encoded else PIXART if is_pixart else STABLE_DIFFUSION


def load_base(name: str, parts: tuple[str, ...] = STABLE_DIFFUSION, dtype: torch.dtype | None = None,
              device: str = "cpu", seed: int = 0) -> Base:
    """The parts of a base, frozen, in the file's type where `dtype` is None. `name`: a one-file model, or see `find`.
    A base whose `model_index.json` says `"initialise": "random"` has no weights: they are drawn from `seed`. The parts
    that a lone transformer lacks are PixArt's; those that a folder lacks, of the base that its index calls "rest"."""
    if is_file(name):
        return load_one_file(name, parts, dtype, device)
    index, alone = read_index(name)
    is_pixart, base = alone or "transformer" in index, Base(name, random=index.get("initialise") == "random")
    for part in parts:
        mark = dict(tokenizer="tokenizer/tokenizer_config.json", schedule="scheduler/scheduler_config.json").get(
            part, f"{part}/config.json")
        home = "pixart512" if alone else name
        if "rest" in index and not find(name, [mark]):
            setattr(base, part, getattr(load_base(index["rest"], (part,), dtype, device, seed), part))
        elif part == "tokenizer":
            base.tokenizer = load_t5_tokenizer(home) if is_pixart else load_tokenizer(home)
        elif part == "schedule":
            values = read_json(path := find(home, ["scheduler/scheduler_config.json"], LAYOUT))
            values |= YOSO if name in ("yoso512", "yoso1024") or name in (BASES["yoso512"], BASES["yoso1024"]) else {}
            with reading(path, "a scheduler of Stable Diffusion or PixArt"):
                base.schedule = Schedule.from_config(values)
        else:
            owner, folder = (name, "") if alone and part == "transformer" else (home, f"{part}/")
            path = find(owner, [f"{folder}config.json"], LAYOUT)
            cls, config_cls, fixed, stem, _ = T5 if is_pixart and part == "text_encoder" else IDENTITY if \
                part == "vae" and read_json(path).get("_class_name") == "Identity" else PARTS[part]
            config = read_config(config_cls, fixed, path)
            if base.random:
                with reading(path, "sizes that make a network"), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    network = cls(config).requires_grad_(False).to(device=device, dtype=dtype)
            else:
                files = weight_files(owner, folder, stem)
                network = load_network(build(cls, config, path), part, files, dtype, device)
            setattr(base, part, network)
    return check_words(base)


def check_words(base: Base) -> Base:
    """Refuses a tokenizer of more pieces or longer texts than the text encoder has rows for: else the first prompt that
    has them fails."""
    if base.tokenizer and base.text_encoder:
        config, last = base.text_encoder.config, max(base.tokenizer.pieces.get_vocab().values())
        positions = getattr(config, "max_position_embeddings", base.tokenizer.length)  # T5 has no last one
        if last >= config.vocab_size or base.tokenizer.length > positions:
            raise ValueError(f"{base.name}: the tokenizer's last piece is {last}, its length {base.tokenizer.length},"
                             f" but the text encoder has {config.vocab_size} pieces and a length of {positions};"
                             " expected both of one model: copy tokenizer/ and text_encoder/ again")
    return base


def original_configs(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, object], str]:
    """The configurations of a one-file model, from the shapes of its tensors, and the folder base that it matches:
    SD 1.x has CLIP's text encoder and 8 heads, SD 2.x OpenCLIP's (whose last block it does not run) and heads of 64."""
    def numbers(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    blocks, first, text = r"model\.diffusion_model\.input_blocks\.", "first_stage_model.encoder.", "cond_stage_model."
    levels = numbers(blocks + r"(\d+)\.0\.op\.weight") + 1
    layers = numbers(blocks + r"(\d+)\.") // levels - 1
    starts = [f"model.diffusion_model.input_blocks.{level * (layers + 1) + 1}." for level in range(levels)]
    widths = tuple(shapes[start + "0.out_layers.3.weight"][0] for start in starts)
    attention = [start + "1.proj_in.weight" in shapes for start in starts]
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    open_clip = text + "model.positional_embedding" in shapes
    text += "model." if open_clip else "transformer.text_model.embeddings."
    vocabulary, width = shapes[text + "token_embedding.weight"]
    layer = r"cond_stage_model\.(?:model\.transformer\.resblocks|transformer\.text_model\.encoder\.layers)\.(\d+)\."
    hidden = next(shape[0] for name, shape in shapes.items() if re.match(layer + r"mlp\.(?:c_fc|fc1)\.weight", name))
    levels_vae = numbers(r"first_stage_model\.encoder\.down\.(\d+)\.")
    return {
        "unet": unet.UNetConfig(
            block_out_channels=widths, layers_per_block=layers, cross_attention_dim=context,
            use_linear_projection=open_clip, sample_size=96 if open_clip else 64,
            attention_head_dim=tuple(width // 64 for width in widths) if open_clip else 8,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))),
        "vae": vae.VAEConfig(
            block_out_channels=tuple(shapes[f"{first}down.{i}.block.0.conv2.weight"][0] for i in range(levels_vae)),
            layers_per_block=numbers(r"first_stage_model\.encoder\.down\.0\.block\.(\d+)\."),
            down_block_types=("DownEncoderBlock2D",) * levels_vae, up_block_types=("UpDecoderBlock2D",) * levels_vae),
        "text_encoder": clip.TextConfig(
            vocab_size=vocabulary, hidden_size=width, num_attention_heads=width // 64,
            intermediate_size=hidden, num_hidden_layers=numbers(layer) - open_clip,
            hidden_act="gelu" if open_clip else "quick_gelu", eos_token_id=vocabulary - 1),
    }, "sd21" if open_clip else "sd15"


def load_one_file(name: str, parts: tuple[str, ...], dtype: torch.dtype | None, device: str) -> Base:
    """A base from one file in the layout of the original code; its tokenizer and schedule are those of the folder that
    it matches."""
    path = pathlib.Path(name).expanduser()
    with reading(path, f"{LAYOUT}, or {ONE_FILE}"):
        tensors = read_tensors(path, ONE_FILE)[0]
        tensors = tensors.get("state_dict", tensors)
        for begin in ("model.diffusion_model.input_blocks.", "first_stage_model.encoder.", "cond_stage_model."):
            if not any(key.startswith(begin) for key in tensors):
                raise ValueError(f"{path} is a file without a tensor {begin}...; expected {LAYOUT}, or {ONE_FILE}")
        configs, folder = original_configs({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    base = load_base(folder, tuple(part for part in parts if part in ("tokenizer", "schedule")))
    base.name = name
    for part in (part for part in parts if part in configs):
        own = dict(unet=unet, vae=vae, text_encoder=clip)[part].from_original(tensors, configs[part])
        network = build(PARTS[part][0], configs[part], path)
        found = [(ours, ours, str(t.dtype)[6:], tuple(t.shape), path) for ours, t in own.items()]
        compare(found, network.state_dict(), f"the {part} of its sizes", path)
        network.load_state_dict({ours: t.to(device=device, dtype=dtype) for ours, t in own.items()}, assign=True)
        setattr(base, part, network.requires_grad_(False))
    return base


def load_merged(formula: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Base:
    """A base whose denoiser is a sum of bases', "a + b - c" (with spaces), made tensor by tensor from the mapped files.
    A tensor that one of them alone has is taken from it, as is the configuration of the largest; all other parts are
    those of the first. YOSO at 1024 is "yoso512 + pixart1024 - pixart512"."""
    names = re.split(r"\s+([+-])\s+", formula.strip())
    signs, names, parts = [1, *(1 if sign == "+" else -1 for sign in names[1::2])], names[::2], parts_of(names[0])
    part = "transformer" if parts is PIXART else "unet"
    networks = [getattr(load_base(name, (part,)), part) for name in names]
    states, merged = [network.state_dict() for network in networks], {}
    largest = max(range(len(states)), key=lambda i: len(states[i]))
    for key in dict.fromkeys(key for state in states for key in state):
        terms = [(sign, state[key], name) for sign, state, name in zip(signs, states, names) if key in state]
        if key not in states[largest] or any(t.shape != terms[0][1].shape for _, t, _ in terms) or (
                len(terms) not in (1, len(names))):
            raise ValueError(f"--merge: {key} is {', '.join(f'{list(t.shape)} in {name}' for _, t, name in terms)};"
                             " expected it in one of the models, or in all in one shape")
        (_, total, _), *others = terms
        kept, fine = dtype or total.dtype, torch.promote_types(total.dtype, torch.float32)
        if others:
            total = sum((sign * t.to(fine) for sign, t, _ in others), signs[0] * total.to(fine))
        merged[key] = total.to(device=device, dtype=kept)
    base = load_base(names[0], tuple(other for other in parts if other != part), dtype, device)
    base.name = formula
    with torch.device("meta"):
        network = type(networks[largest])(networks[largest].config)
    network.load_state_dict(merged, strict=True, assign=True)
    setattr(base, part, network.requires_grad_(False))
    return base


# ---------------------------------------------------------------------------------------------- what is put on a base


def load_lora(spec: str, base: Base) -> None:
    """Adds the LoRA of a file, a folder or a Hub id to the networks of a base. spec: FILE, or FILE:SCALE."""
    name, _, end = spec.rpartition(":")
    scale = float(end) if name and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", end) else None
    name, scale = (spec, 1.0) if scale is None else (name, scale)
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        if not path.is_dir() and (path.suffix or not re.fullmatch(HUB_ID, name)):
            raise ValueError(f"there is no LoRA {name}; expected a file, a folder or a Hub id, with :SCALE after it or"
                             " without")
        path = find(name, ["pytorch_lora_weights.safetensors", "lora.safetensors"], "a LoRA as safetensors")
    networks = {part: network for part in ("unet", "transformer", "text_encoder") if (network := getattr(base, part))}
    expected = f"a LoRA for the base {base.name}"
    with reading(path, expected):
        tensors, metadata = read_tensors(path, expected)
        pairs, unknown = read_lora(tensors, metadata, networks)
        if not pairs:
            raise ValueError(f"none of its {len(tensors)} tensors, {next(iter(tensors), 'none')} the first, belongs to"
                             f" a layer of {' or '.join(networks)}")
        if unknown:
            print(f"{path}: {len(unknown)} of {len(tensors)} tensors belong to no layer here and are left out,"
                  f" {unknown[0]} the first", file=sys.stderr)
        for part, own in pairs.items():
            apply_lora(networks[part], own, scale)


def load_controlnet(name: str, network: unet.UNet, dtype: torch.dtype | None = None, device: str = "cpu"
                    ) -> controlnet.ControlNet:
    """A ControlNet, from its folder or Hub id, for one U-Net."""
    path = find(name, ["config.json"], "a ControlNet's folder: config.json and diffusion_pytorch_model.safetensors")
    config = read_config(controlnet.ControlNetConfig, controlnet.FIXED, path)
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types"):
        if getattr(config, key) != getattr(network.config, key):
            raise ValueError(f"{path}: the ControlNet's {key} is {getattr(config, key)}, the base's"
                             f" {getattr(network.config, key)}; expected a ControlNet that was made for this base")
    return load_network(build(controlnet.ControlNet, config, path), "ControlNet",
                        weight_files(name, "", "diffusion_pytorch_model"), dtype, device)


def save_prior(path: pathlib.Path, mean: Tensor, std: Tensor) -> None:
    """Mean and deviation [4, h, w] of the scaled latents of real pictures."""
    save_tensors(path, dict(mean=mean.float(), std=std.float()), {"format": "pt"})


def load_prior(path: pathlib.Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What `save_prior` wrote, for latents of this shape."""
    header = read_header(path)[0]
    for name in ("mean", "std"):
        _, found = header.get(name, (None, None))
        if found != shape or len(header) != 2:
            held = ", ".join(f"{key} {list(size)}" for key, (_, size) in header.items())
            raise ValueError(f"{path} holds {held}; expected mean and std {list(shape)}, as these pictures' latents:"
                             " estimate a prior of this size (python data.py prior)")
    tensors = safetensors.torch.load_file(path)
    return tensors["mean"], tensors["std"]


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Stores the frozen weights of linear layers and convolutions in `dtype` (for autocast); norms stay as they are."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
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


def save_tensors(path: pathlib.Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode  # any new file's; left alone, safetensors makes the user its only reader
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); make room, and run the command again") from error
    path.chmod(mode)


def save_folder(folder: pathlib.Path, base: Base, dtype: torch.dtype | None = None, rest: str | None = None) -> None:
    """Writes what there is of a base back in the Stable Diffusion layout, which `diffusers` reads too. With the name of
    the base that the `rest` is of, no more than denoiser and schedule are written, unless that has no weights."""
    if rest and not base.random:
        base = Base(base.name, unet=base.unet, transformer=base.transformer, schedule=base.schedule)
        rest = str(pathlib.Path(rest).resolve()) if rest not in BASES and pathlib.Path(rest).exists() else rest
        rest = rest if is_file(rest) else read_index(rest)[0].get("rest", rest)
    index = dict(rest=rest) if rest and not base.random else {}
    index |= dict(_class_name="PixArtAlphaPipeline") if base.transformer else dict(
        _class_name="StableDiffusionPipeline", feature_extractor=(None, None), safety_checker=(None, None),
        requires_safety_checker=False)

    def write(name: str, text: str | dict) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text, indent=2), encoding="utf-8")

    for part, row in PARTS.items():
        if network := getattr(base, part):
            own = isinstance(network, t5.T5Encoder)
            _, _, fixed, stem, peer = T5 if own else IDENTITY if isinstance(network, vae.Identity) else row
            index[part] = peer
            write(f"{part}/config.json", {"_class_name": peer[1], **asdict(network.config), **(fixed if own else {})})
            save_tensors(folder / part / f"{stem}.safetensors",
                         {name: t.to(dtype) for name, t in network.state_dict().items()}, {"format": "pt"})
    if base.schedule:
        index["scheduler"] = ("diffusers", base.schedule.config.get("_class_name", "DDIMScheduler"))
        write("scheduler/scheduler_config.json", base.schedule.config)
    if isinstance(base.tokenizer, t5.T5Tokenizer):
        index["tokenizer"] = ("transformers", "T5Tokenizer")
        write("tokenizer/tokenizer.json", base.tokenizer.pieces.to_str())
        write("tokenizer/tokenizer_config.json", dict(tokenizer_class="T5Tokenizer", pad_token="<pad>",
                                                      eos_token="</s>", unk_token="<unk>", model_max_length=512))
    elif base.tokenizer:
        index["tokenizer"] = ("transformers", "CLIPTokenizer")
        model, tokens = json.loads(base.tokenizer.pieces.to_str())["model"], base.tokenizer.tokens
        write("tokenizer/vocab.json", model["vocab"])
        write("tokenizer/merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]))
        write("tokenizer/tokenizer_config.json", dict(
            tokenizer_class="CLIPTokenizer", model_max_length=base.tokenizer.length, pad_token=tokens["pad"],
            bos_token=tokens["start"], eos_token=tokens["end"], unk_token=tokens["end"]))
    write("model_index.json", index)


# -------------------------------------------------------------------------------------------------------- generators


@dataclass
class Loaded:
    """A generator ready to run, and what its checkpoint says of itself."""
    generator: pix2pix_turbo.Pix2PixTurbo | cyclegan_turbo.CycleGANTurbo
    text_encoder: clip.TextEncoder
    tokenizer: clip.Tokenizer
    kind: str
    base: str
    prompts: list[str]  # the one caption of all pairs; of two domains a's and b's
    r: float | None  # of a stochastic model


def save_generator(path: pathlib.Path, generator: nn.Module, kind: str, base: str, prompts: list[str],
                   text_encoder: clip.TextEncoder | None = None, tokenizer: clip.Tokenizer | None = None) -> None:
    """Writes what was trained, with all that sampling needs to know in the metadata. Where everything was trained the
    file also takes the text encoder, all configurations and the tokenizer, and opens no base."""
    tensors = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    config = dict(generator=asdict(generator.config))
    if generator.config.train == "all":
        tensors |= dict(generator.named_buffers())  # what the twin of `conv_in` was before
        tensors |= {f"text_encoder.{name}": p for name, p in text_encoder.named_parameters()}
        config |= dict(vae=asdict(generator.vae.config), unet=asdict(generator.unet.config),
                       schedule=generator.schedule.config, text_encoder=asdict(text_encoder.config),
                       tokenizer=tokenizer.to_json())
    save_tensors(path, tensors, dict(format=FORMAT, kind=kind, base=base, config=json.dumps(config),
                                     prompts=json.dumps(prompts)))


def save_yoso(path: pathlib.Path, base: Base, base_name: str, trained: dict[str, Tensor],
              prior: tuple[Tensor, Tensor], lora_rank: int | None) -> None:
    """Writes what was trained of a one-step generator ("unet.NAME": its LoRA, or all), its prior and its schedule. A
    base without weights goes into the file too: then that opens no base."""
    tensors = {**trained, "prior.mean": prior[0], "prior.std": prior[1]}
    config = dict(schedule=base.schedule.config, lora_rank=lora_rank or None, lora_alpha=8.0)
    if getattr(base, "random", False) and not lora_rank:
        networks = {part: network for part in PARTS if (network := getattr(base, part))}
        config |= {part: asdict(network.config) for part, network in networks.items()}
        config |= dict(tokenizer=base.tokenizer.to_json())
        tensors |= nn.ModuleDict(networks).state_dict()
    save_tensors(path, tensors, dict(format=FORMAT, kind="yoso", base=base_name, config=json.dumps(config),
                                     prompts="[]"))


def load_yoso(path: pathlib.Path, base: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu",
              strength: float = 1.0) -> tuple[Base, tuple[Tensor, Tensor]]:
    """What `save_yoso` wrote: the base with the trained change added `strength` times, and the prior."""
    expected = f"a one-step generator of train_yoso.py ({FORMAT})"
    metadata = read_header(path)[1]
    with reading(path, expected):
        tensors = safetensors.torch.load_file(path)
        name, config = base or metadata["base"], json.loads(metadata["config"])
        prior = tensors.pop("prior.mean"), tensors.pop("prior.std")
        schedule = Schedule.from_config(config["schedule"])
        if name == "gaussians":
            raise ValueError("it draws points in the plane, not pictures")
        whole = "tokenizer" in config
        if whole and strength != 1:
            raise ValueError("it holds every weight and knows no other; strength works for those on a base")
        found = Base(name, tokenizer=clip.Tokenizer.from_json(config["tokenizer"])) if whole else None
        for part in (part for part in PARTS if whole and part in config):
            cls, config_cls, *_ = IDENTITY if part == "vae" and "latent_channels" not in config[part] else PARTS[part]
            setattr(found, part, build(cls, from_json(config_cls, config[part]), path).requires_grad_(True))
    found = found or load_base(name, parts_of(name), dtype, device)
    found.schedule = schedule
    with reading(path, f"{expected} for the base {name}"):
        if config["lora_rank"]:
            scale = strength * config["lora_alpha"] / config["lora_rank"]
            pairs, unknown = read_lora(tensors, None, {"transformer" if found.transformer else "unet": found.denoiser})
            if unknown or not pairs:
                raise ValueError(f"{(unknown or ['no tensor'])[0]} belongs to a layer of it")
            for own in pairs.values():
                apply_lora(found.denoiser, {layer: (A, B, scale) for layer, (A, B, _) in own.items()}, 1.0)
        else:
            found.denoiser.requires_grad_(True)
            parts = nn.ModuleDict({part: network for part in PARTS if (network := getattr(found, part))})
            assign(parts, tensors, path, strength)
            check_words(found)
    for network in filter(None, (getattr(found, part) for part in PARTS)):
        network.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return found, prior


def read_pkl(path: pathlib.Path, expected: str = "a checkpoint of img2img-turbo") -> dict:
    """A file of torch.save: tensors, numbers, names; one that would run code is refused, and one that is packed, which
    torch.save never does: it may unpack to a thousand times its size. So may a tensor whose rows are one."""
    try:
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is packed")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for part in (saved, *saved.values()) if isinstance(saved, dict) else ():
            for t in part.values() if isinstance(part, dict) else ():
                if isinstance(t, Tensor) and t.numel() * t.element_size() > t.untyped_storage().nbytes():
                    raise ValueError("a tensor is larger than its data")
        return saved
    except Exception as error:  # of many kinds, whose texts advise to let the code run
        raise ValueError(f"{path} is no file of torch.save, or one with code in it ({type(error).__name__}); expected"
                         f" {expected}: tensors, numbers and names") from error


def find_checkpoint(name: str) -> pathlib.Path:
    """A file, a run's folder, a Hub id, the name of an adapter of tiny-turbo, or of a released file, which is
    downloaded once."""
    path, own = pathlib.Path(name).expanduser(), ADAPTERS / f"{name}.safetensors"
    if path.is_dir():
        path = path / "model.safetensors"
    elif not path.is_file() and own.is_file():
        path = own
    elif not path.is_file() and name in CHECKPOINTS:
        url, path = f"{RELEASED}/{CHECKPOINTS[name][0]}", hub_cache().parent / "img2img-turbo" / CHECKPOINTS[name][0]
        if not path.is_file() and download(url, path) is None:
            raise ValueError(f"{url} does not exist any more; look for it at the img2img-turbo project")
    elif not path.suffix and not path.parent.is_dir() and re.fullmatch(HUB_ID, name):
        path = find(name, ["model.safetensors"], "a model that a trainer here wrote")
    if not path.is_file():
        known = [*sorted(file.stem for file in ADAPTERS.glob("*.safetensors")), *CHECKPOINTS]
        raise ValueError(f"there is no checkpoint {path}; expected a file, a run's folder, a Hub id or one of"
                         f" {', '.join(known)}")
    return path


def kind_of(checkpoint: str) -> str | None:
    """"pix2pix_turbo", "cyclegan_turbo", "yoso", or None for a file that is not of a trainer here."""
    path = None if checkpoint in CHECKPOINTS else find_checkpoint(checkpoint)
    return read_header(path)[1].get("kind") if path and path.suffix == ".safetensors" else None


def load_generator(checkpoint: str, base: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu",
                   r: float | None = None, strength: float = 1.0, merged: bool = True) -> Loaded:
    """A trained generator on its base, from a file of ours or an official `.pkl` (whose base is SD-Turbo unless one
    is named). `strength` takes the trained change that many times, `r` sets a stochastic model's adapters; `merged`
    adds the LoRA to the weights, for inference only."""
    path, prompts = find_checkpoint(checkpoint), []
    with reading(path, f"a checkpoint of a translator: a trainer's model.safetensors ({FORMAT}) or img2img-turbo's"
                 " .pkl"):
        if path.suffix != ".safetensors":
            saved = read_pkl(path)
            kind = "cyclegan_turbo" if "sd_encoder" in saved else "pix2pix_turbo"
            base, (config, tensors) = base or "sd-turbo", KINDS[kind][2](saved, path)
            values = vars(config)
        else:
            metadata, tensors = read_header(path)[1], safetensors.torch.load_file(path)
            kind = metadata.get("kind")
            if metadata.get("format") != FORMAT or kind not in KINDS:
                raise ValueError(f"its format is {metadata.get('format')!r}, its kind {kind!r}")
            saved, base = json.loads(metadata["config"]), base or metadata["base"]
            prompts = [str(prompt) for prompt in json.loads(metadata["prompts"])]
            values = saved["generator"]
        config = from_json(KINDS[kind][1], values)
        ranks, largest = (config.lora_rank_unet, config.lora_rank_vae), max(
            (len(t) for key, t in tensors.items() if key.endswith(".lora_A.weight")), default=0)
        if config.train == "lora" and max(ranks) > max(largest, 128):  # whose weights would be made before the file's
            raise ValueError(f"its LoRA is said to be of the ranks {ranks}, its tensors are of {largest} at most")
        if config.train == "all":
            networks = Base(base, tokenizer=clip.Tokenizer.from_json(saved["tokenizer"]),
                            schedule=Schedule.from_config(saved["schedule"]))
            for part in ("vae", "unet", "text_encoder"):
                cls, config_cls, *_ = PARTS[part]
                setattr(networks, part, build(cls, from_json(config_cls, saved[part]), path))
    if config.train == "all":
        if strength != 1:
            raise ValueError(f"{path} holds every weight and knows no other; strength works for LoRA checkpoints only")
        own = {k.removeprefix("text_encoder."): tensors.pop(k) for k in [*tensors] if k.startswith("text_encoder.")}
        assign(networks.text_encoder, own, path)
        check_words(networks)
    else:
        networks = load_base(base, dtype=dtype, device=device)
    with reading(path, f"a checkpoint for the base {base}"):
        if not 0 <= config.timestep < len(networks.schedule.alpha):
            raise ValueError(f"its timestep is {config.timestep}, of {len(networks.schedule.alpha)}")
        generator = KINDS[kind][0](networks.vae, networks.unet, networks.schedule, config)
    assign(generator, tensors, path, strength)
    for layer in generator.modules():
        if isinstance(layer, LoRALinear | LoRAConv2d):
            layer.full_scale *= strength
    stochastic = getattr(config, "stochastic", False)
    if r is not None and not stochastic:
        raise ValueError(f"{path} is not a stochastic model and has no r; leave --r out")
    r = 0.4 if r is None and stochastic else r
    set_scale(generator, 1.0 if r is None else r)
    if merged:
        merge(generator)
    for network in (generator, networks.text_encoder):
        network.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return Loaded(generator, networks.text_encoder, networks.tokenizer, kind, base, prompts, r)


def assign(network: nn.Module, tensors: dict[str, Tensor], path: pathlib.Path, strength: float = 1.0) -> None:
    """Puts a checkpoint's tensors in place of the network's trainable ones, and of buffers without a value: exactly
    those, in their shapes. Tensors that were trained in full go `strength` of the way from their value before."""
    expected = {name: p for name, p in network.named_parameters() if p.requires_grad}
    expected |= {name: b for name, b in network.named_buffers() if b.is_meta}
    with reading(path, "tensors under all names"):
        found = [(name, name, str(t.dtype)[6:], tuple(t.shape), path) for name, t in tensors.items()]
    compare(found, expected, "the generator on this base", path)
    for name, tensor in tensors.items():
        before, (parent, _, leaf) = expected[name], name.rpartition(".")
        tensor = tensor if before.is_meta else tensor.to(before.device)
        if strength != 1 and ".lora_" not in name:
            tensor = torch.lerp(before.detach().to(tensor.dtype), tensor, strength)
        setattr(network.get_submodule(parent), leaf, nn.Parameter(tensor) if before.requires_grad else tensor)


# ------------------------------------------------------------------------------------------------------------- judges


@dataclass
class Judge:
    """A network that judges pictures, frozen; `hash` tells its files from others."""
    network: nn.Module
    hash: str
    tokenizer: clip.Tokenizer | None = None  # of CLIP


def judge_files(name: str, fetch: bool = True) -> list[pathlib.Path]:
    """The files of a judge, downloaded where they are not here, if `fetch`."""
    files = []
    for source in JUDGES[name]:
        if "://" in source:
            path = hub_cache().parent / "judges" / source.rpartition("/")[2]
            if not path.is_file() and fetch and not offline():
                download(source, path)
            place, path = path, path if path.is_file() else None
        else:
            path = find(source, ["model.safetensors", "pytorch_model.bin"], fetch=fetch)
            place = hub_cache() / f"models--{source.replace('/', '--')}"
        if path is None:
            raise ValueError(f"the weights of {name} are not here; expected {source} at {place}")
        files.append(path)
    return files


def has_judge(name: str) -> bool:
    """Whether a judge's files are on this machine."""
    try:
        return bool(judge_files(name, fetch=False))
    except ValueError:
        return False


def load_judge(name: str, device: str = "cpu") -> Judge:
    """"lpips", "clip", "dino" or "inception", in float32."""
    files = judge_files(name)
    read = [read_tensors(path, f"{name}'s weights")[0] for path in files]
    module = dict(lpips=lpips, clip=clip, dino=dino, inception=inception)[name]
    with reading(files[0], f"the weights of {name}"):
        network = module.from_state_dict(*read).float().to(device)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    tokenizer = load_tokenizer(JUDGES[name][0], "") if name == "clip" else None
    return Judge(network, hashlib.sha256("".join(hashes).encode()).hexdigest()[:16], tokenizer)
