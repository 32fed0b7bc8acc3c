"""Files: where checkpoints lie, what is in them, and the networks made of them.

The one module of `models/` that opens files. Weights are mapped, not read: a network is built without memory (device
"meta") and its tensors are then the file's pages, or copied from them one at a time into the type asked for. What is
wrong with a file is said in one line that names it."""

from __future__ import annotations  # a field called vae may be a vae.VAE

import contextlib
import hashlib
import json
import os
import re
import sys
import types
import typing
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import clip, controlnet, cyclegan_turbo, dino, inception, lpips, pix2pix_turbo, pixart, t5, unet, vae
from models.diffusion import Schedule
from models.lora import LoRAConv2d, LoRALinear, apply_lora, merge, read_lora, set_scale

ROOT = Path(__file__).parent.parent
# Names for --base: folders of this project and ids of the Hugging Face Hub.
BASES = {
    **{name: str(ROOT / "tiny" / name) for name in ("tiny", "tiny-sd", "tiny-turbo", "pixels")},
    "sd-turbo": "stabilityai/sd-turbo",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "pixart512": "PixArt-alpha/PixArt-XL-2-512x512",
    "pixart1024": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "yoso512": "Luo-Yihong/yoso_pixart512",
    "yoso1024": "Luo-Yihong/yoso_pixart1024",
}
# The last two are a transformer alone. The scheduler that comes with the rest, PixArt's, is another's in this:
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
# Networks that judge pictures: their file, and the addresses of their weights, or an id of the Hub.
JUDGES = {
    "lpips": (lpips, ["https://download.pytorch.org/models/vgg16-397923af.pth",
                      "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"]),
    "clip": (clip, ["openai/clip-vit-base-patch32"]),
    "dino": (dino, ["facebook/dino-vitb8"]),
    "inception": (inception, ["https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                              "pt_inception-2015-12-05-6726825d.pth"]),
}
# Kinds of generator: the class, its settings, and what reads an official file of its kind.
KINDS = {
    "pix2pix_turbo": (pix2pix_turbo.Pix2PixTurbo, pix2pix_turbo.Pix2PixTurboConfig, pix2pix_turbo.from_official),
    "cyclegan_turbo": (cyclegan_turbo.CycleGANTurbo, cyclegan_turbo.CycleGANTurboConfig, cyclegan_turbo.from_official),
}
# Networks of a base: class, its configuration, the options it must have, the stem of its files, its name in diffusers.
NETWORKS = {
    vae.VAE: (vae.VAEConfig, vae.FIXED, "diffusion_pytorch_model", ("diffusers", "AutoencoderKL")),
    vae.Identity: (vae.IdentityConfig, {}, "diffusion_pytorch_model", ("models.vae", "Identity")),  # of pixels
    unet.UNet: (unet.UNetConfig, unet.FIXED, "diffusion_pytorch_model", ("diffusers", "UNet2DConditionModel")),
    pixart.PixArt: (pixart.PixArtConfig, pixart.FIXED, "diffusion_pytorch_model",
                    ("diffusers", "PixArtTransformer2DModel")),
    clip.TextEncoder: (clip.TextConfig, clip.FIXED, "model", ("transformers", "CLIPTextModel")),
    t5.T5Encoder: (t5.T5Config, t5.FIXED, "model", ("transformers", "T5EncoderModel")),
}
OTHER_CONFIGS = dict(tokenizer="tokenizer/tokenizer_config.json", schedule="scheduler/scheduler_config.json")
STABLE_DIFFUSION = ("vae", "unet", "text_encoder", "tokenizer", "schedule")
PIXART = ("vae", "transformer", "text_encoder", "tokenizer", "schedule")
FORMAT = "one-step-diffusion 1"
LAYOUT = "a folder in the diffusers layout (model_index.json, scheduler/, tokenizer/, text_encoder/, unet/, vae/)"
ONE_FILE = "a one-file checkpoint of Stable Diffusion 1.x or 2.x (model.diffusion_model..., first_stage_model...)"
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ----------------------------------------------------------------------------------------------------- finding files

def hub_cache() -> Path:
    env = os.environ
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface").expanduser()
    return Path(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub"))


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def find(base: str, names: list[str], expected: str | None = None, fetch: bool = True) -> Path | None:
    """The first of `names` (relative paths) that a base has: a folder, a name of the table, or a Hub id, whose
    cache is filled (if `fetch`) where it has none of them. Without one: None, or an error that says `expected`."""
    base = BASES.get(base, base)
    folder = Path(base).expanduser()
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
        absent = repository / ".no_exist" / commit / name  # remembers what the Hub does not have
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


def locate(name: str, names: list[str], expected: str) -> Path:
    """A file by its path, or the first of `names` in a folder or of a Hub id."""
    path = Path(name).expanduser()
    if path.is_dir() or not path.suffix and not path.parent.is_dir() and re.fullmatch(HUB_ID, name):
        return find(name, names, expected)
    if not path.is_file():
        raise ValueError(f"there is no {name}; expected {expected}: a file, a folder or a Hub id")
    return path


def download(url: str, path: Path) -> str | None:
    """Fetches `url` to `path`, under another name until it is complete. Returns the commit that a Hub answer names
    ("main" without one), or None where there is no such file."""
    token, host = os.environ.get("HF_TOKEN"), urllib.parse.urlsplit(url).netloc
    commits, partial = [], path.with_name(f"{path.name}.{os.getpid()}.incomplete")

    def request(target: str) -> urllib.request.Request:  # the token goes to the host that was named and to no other
        named = urllib.parse.urlsplit(target).netloc == host
        return urllib.request.Request(target, headers={"Authorization": f"Bearer {token}"} if token and named else {})

    class Redirects(urllib.request.HTTPRedirectHandler):  # the Hub names the commit in the answer that redirects
        def redirect_request(self, _, file, code, message, headers, target):
            commits.append(headers.get("X-Repo-Commit"))
            return request(target)

    try:
        with urllib.request.build_opener(Redirects).open(request(url), timeout=60) as answer:
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
    except Exception as error:  # OSError and what http.client raises
        if getattr(error, "code", None) == 404:
            return None
        raise OSError(f"{url} could not be fetched ({str(error) or type(error).__name__}); run the command again, set"
                      " HF_TOKEN if it asks for a login, or copy the files to a folder and name that") from None
    finally:
        partial.unlink(missing_ok=True)
    return next(filter(None, commits), "main")


def find_url(url: str, folder: str, fetch: bool = True) -> Path | None:
    """The file of an address, downloaded once (if `fetch`) to a folder beside the Hub's cache; None without one."""
    path = hub_cache().parent / folder / url.rpartition("/")[2]
    if fetch and not path.is_file() and not offline():
        download(url, path)
    return path if path.is_file() else None


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
    def networks(self) -> dict[str, nn.Module]:
        """Those that are there, by part."""
        return {part: value for part, value in vars(self).items() if isinstance(value, nn.Module)}

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
    path = Path(name).expanduser()
    return path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") and path.is_file()


def read_index(name: str) -> dict:
    """The `model_index.json` of a base. A transformer that comes alone is one whose rest is PixArt's."""
    path = find(name, ["model_index.json", "config.json"], LAYOUT)
    index = read_json(path)
    if path.name == "config.json":
        if index.get("_class_name") not in ("Transformer2DModel", "PixArtTransformer2DModel"):
            raise ValueError(f"{path} is of {index.get('_class_name')!r}; expected {LAYOUT}, or PixArt's transformer")
        return dict(transformer="alone", rest="pixart512")
    return index


def parts_of(name: str, encoded: bool = False) -> tuple[str, ...]:
    """STABLE_DIFFUSION or PIXART, whichever a base is. Where captions are encoded already, PixArt needs no T5, which is
    larger than all the rest."""
    is_pixart = not is_file(name) and "transformer" in read_index(name)
    return ("vae", "transformer", "schedule") if is_pixart and encoded else PIXART if is_pixart else STABLE_DIFFUSION


def class_of(part: str, config: dict) -> type:
    """The class of a part's network, as its configuration tells it."""
    if part == "vae":
        return vae.VAE if "latent_channels" in config else vae.Identity
    if part == "text_encoder":
        return t5.T5Encoder if config.get("model_type") == "t5" else clip.TextEncoder
    return unet.UNet if part == "unet" else pixart.PixArt


def read_network(part: str, path: Path) -> tuple[type, object]:
    """The class of a part's network and its configuration, from its `config.json`."""
    cls = class_of(part, read_json(path))
    return cls, read_config(*NETWORKS[cls][:2], path)


def load_base(name: str, parts: tuple[str, ...] = STABLE_DIFFUSION, dtype: torch.dtype | None = None,
              device: str = "cpu", seed: int = 0) -> Base:
    """The parts of a base, frozen, in the file's type where `dtype` is None. `name`: a one-file model, or see `find`.
    A base whose `model_index.json` says `"initialise": "random"` has no weights: they are drawn from `seed`. The parts
    that a folder lacks are those of the base that its index calls "rest"."""
    if is_file(name):
        return load_one_file(name, parts, dtype, device)
    index = read_index(name)
    base = Base(name, random=index.get("initialise") == "random")
    for part in parts:
        folder = "" if index.get(part) == "alone" else f"{part}/"
        place = OTHER_CONFIGS.get(part, f"{folder}config.json")
        path = find(name, [place], None if "rest" in index or part == "tokenizer" else LAYOUT)
        if path is None and "rest" in index:
            value = getattr(load_base(str(index["rest"]), (part,), dtype, device, seed), part)
        elif part == "tokenizer":
            value = load_t5_tokenizer(name) if "transformer" in index else load_tokenizer(name)
        elif part == "schedule":
            with reading(path, "a scheduler of Stable Diffusion or PixArt"):
                value = Schedule.from_config(read_json(path))
        else:
            cls, config = read_network(part, path)
            if base.random:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    value = build(cls, config, path, "cpu").requires_grad_(False).to(device=device, dtype=dtype)
            else:
                files = read_weights(name, folder, NETWORKS[cls][2])
                value = fill(build(cls, config, path), files, f"the {part} of its config.json", dtype, device)
        setattr(base, part, value)
    if base.schedule and BASES.get(name, name) in (BASES["yoso512"], BASES["yoso1024"]):
        base.schedule = Schedule.from_config(base.schedule.config | YOSO)
    return check_words(base)


def check_words(base: Base) -> Base:
    """Refuses a tokenizer of more pieces or longer texts than the text encoder has rows for."""
    if base.tokenizer and base.text_encoder:
        config, last = base.text_encoder.config, max(base.tokenizer.pieces.get_vocab().values())
        positions = getattr(config, "max_position_embeddings", base.tokenizer.length)  # T5 has no last one
        if last >= config.vocab_size or base.tokenizer.length > positions:
            raise ValueError(f"{base.name}: the tokenizer's last piece is {last}, its length {base.tokenizer.length};"
                             f" expected no more pieces than the text encoder's {config.vocab_size} and no more than"
                             f" a length of {positions}: copy both from one model")
    return base


def load_one_file(name: str, parts: tuple[str, ...], dtype: torch.dtype | None, device: str) -> Base:
    """A base from one file in the layout of the original code. It holds weights alone: configurations, tokenizer and
    schedule are those of the folder of its family, SD 2.x where the text encoder is OpenCLIP's, else SD 1.x."""
    path = Path(name).expanduser()
    tensors, _ = read_tensors(path, ONE_FILE)
    with reading(path, f"{LAYOUT}, or {ONE_FILE}"):
        tensors = tensors.get("state_dict", tensors)
        for begin in ("model.diffusion_model.input_blocks.", "first_stage_model.encoder.", "cond_stage_model."):
            if not any(key.startswith(begin) for key in tensors):
                raise ValueError(f"it is a file without a tensor {begin}...")
    family = "sd21" if "cond_stage_model.model.positional_embedding" in tensors else "sd15"
    base = load_base(family, tuple(part for part in parts if part in OTHER_CONFIGS))
    base.name = name
    for part, module in dict(vae=vae, unet=unet, text_encoder=clip).items():
        if part in parts:
            place = find(family, [f"{part}/config.json"], LAYOUT)
            network = build(*read_network(part, place), place)
            with reading(path, ONE_FILE):
                own = module.from_original(tensors, network.config)
            setattr(base, part, fill(network, {path: own}, f"the {part} of {family}", dtype, device))
    return base


def load_merged(formula: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Base:
    """A base whose denoiser is a sum of bases', "a + b - c" (with spaces): YOSO at 1024 is "yoso512 + pixart1024 -
    pixart512". A tensor may be in one of them alone. Configuration is the largest's, all other parts the first's."""
    names = re.split(r"\s+([+-])\s+", formula.strip())
    signs, names = [1, *(int(f"{sign}1") for sign in names[1::2])], names[::2]
    parts = parts_of(names[0])
    part = parts[1]  # the denoiser
    networks = [getattr(load_base(name, (part,)), part) for name in names]
    states, merged = [network.state_dict() for network in networks], {}
    for key in dict.fromkeys(key for state in states for key in state):
        terms = [(sign, state[key]) for sign, state in zip(signs, states) if key in state]
        if len({t.shape for _, t in terms}) > 1 or len(terms) not in (1, len(names)):
            raise ValueError(f"--merge: {key} is in {len(terms)} of {len(names)} models, in the shapes"
                             f" {[[*t.shape] for _, t in terms]}; expected it in one, or in all in one shape")
        total = sum(sign * t.float() for sign, t in terms)
        merged[key] = total.to(device=device, dtype=dtype or terms[0][1].dtype)
    base = load_base(names[0], tuple(other for other in parts if other != part), dtype, device)
    base.name = formula
    largest = max(networks, key=lambda network: len(network.state_dict()))
    setattr(base, part, fill(build(type(largest), largest.config, formula), {formula: merged}, "the largest of them",
                             device=device))
    return base


# ---------------------------------------------------------------------------------------------- what is put on a base

def load_lora(spec: str, base: Base) -> None:
    """Adds the LoRA of a file, a folder or a Hub id to the networks of a base. spec: FILE, or FILE:SCALE."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+))", spec)
    name, scale = (match[1], float(match[2])) if match else (spec, 1.0)
    path = locate(name, ["pytorch_lora_weights.safetensors", "lora.safetensors"], "a LoRA as safetensors")
    networks = {part: network for part, network in base.networks.items() if part != "vae"}
    expected = f"a LoRA for the base {base.name}"
    with reading(path, expected):
        tensors, metadata = read_tensors(path, expected)
        pairs, unknown = read_lora(tensors, metadata, networks)
        if not pairs:
            raise ValueError(f"no tensor, {next(iter(tensors), 'none')} the first, is of {' or '.join(networks)}")
        if unknown:
            print(f"{path}: {len(unknown)} of {len(tensors)} tensors belong to no layer and are left out:"
                  f" {unknown[0]} ...", file=sys.stderr)
        for part, own in pairs.items():
            apply_lora(networks[part], own, scale)


def load_controlnet(name: str, network: unet.UNet, dtype: torch.dtype | None = None, device: str = "cpu"
                    ) -> controlnet.ControlNet:
    """A ControlNet, from its folder or Hub id, for one U-Net."""
    path = find(name, ["config.json"], "a ControlNet's folder: config.json and diffusion_pytorch_model.safetensors")
    config = read_config(controlnet.ControlNetConfig, controlnet.FIXED, path)
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "down_block_types"):
        if getattr(config, key) != getattr(network.config, key):
            raise ValueError(f"{path}: {key} is {getattr(config, key)}; expected a ControlNet that was made for this"
                             f" base, whose is {getattr(network.config, key)}")
    return fill(build(controlnet.ControlNet, config, path), read_weights(name, "", "diffusion_pytorch_model"),
                "the ControlNet of its config.json", dtype, device)


def save_prior(path: Path, mean: Tensor, std: Tensor) -> None:
    """Mean and deviation [4, h, w] of the scaled latents of real pictures."""
    save_tensors(path, dict(mean=mean.float(), std=std.float()), {"format": "pt"})


def load_prior(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What `save_prior` wrote, for latents of this shape."""
    tensors, _ = read_tensors(path, "a prior")
    with reading(path, f"mean and std {list(shape)}, as these pictures' latents: estimate a prior of this size"
                 " (python data.py prior)"):
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != dict(mean=shape, std=shape):
            raise ValueError("it holds " + ", ".join(f"{name} {list(size)}" for name, size in found.items()))
    return tensors["mean"], tensors["std"]


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


def save_folder(folder: Path, base: Base, dtype: torch.dtype | None = None, rest: str | None = None) -> None:
    """Writes what there is of a base back in the Stable Diffusion layout, which `diffusers` reads too. With the name of
    the base that the `rest` is of, no more than denoiser and schedule are written, unless that has no weights."""
    index = {}
    if rest and not base.random:
        base = Base(base.name, unet=base.unet, transformer=base.transformer, schedule=base.schedule)
        rest = str(Path(rest).resolve()) if rest not in BASES and Path(rest).exists() else rest
        index["rest"] = rest if is_file(rest) else read_index(rest).get("rest", rest)
    index |= dict(_class_name="PixArtAlphaPipeline") if base.transformer else dict(
        _class_name="StableDiffusionPipeline", feature_extractor=(None, None), safety_checker=(None, None),
        requires_safety_checker=False)

    def write(name: str, text: str | dict) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text, indent=2), encoding="utf-8")

    for part, network in base.networks.items():
        _, fixed, stem, index[part] = NETWORKS[type(network)]
        of_t5 = fixed if isinstance(network, t5.T5Encoder) else {}  # without which no reader takes it for T5
        write(f"{part}/config.json", {"_class_name": index[part][1], **asdict(network.config), **of_t5})
        save_tensors(folder / part / f"{stem}.safetensors",
                     {name: t.to(dtype) for name, t in network.state_dict().items()}, {"format": "pt"})
    if base.schedule:
        index["scheduler"] = ("diffusers", base.schedule.config.get("_class_name", "DDIMScheduler"))
        write(OTHER_CONFIGS["schedule"], base.schedule.config)
    if isinstance(base.tokenizer, t5.T5Tokenizer):
        index["tokenizer"] = ("transformers", "T5Tokenizer")
        write("tokenizer/tokenizer.json", base.tokenizer.pieces.to_str())
        write(OTHER_CONFIGS["tokenizer"], dict(tokenizer_class="T5Tokenizer", model_max_length=512, pad_token="<pad>",
                                               eos_token="</s>", unk_token="<unk>"))
    elif base.tokenizer:
        index["tokenizer"] = ("transformers", "CLIPTokenizer")
        model, tokens = json.loads(base.tokenizer.pieces.to_str())["model"], base.tokenizer.tokens
        write("tokenizer/vocab.json", model["vocab"])
        write("tokenizer/merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]))
        write(OTHER_CONFIGS["tokenizer"], dict(
            tokenizer_class="CLIPTokenizer", model_max_length=base.tokenizer.length, pad_token=tokens["pad"],
            bos_token=tokens["start"], eos_token=tokens["end"], unk_token=tokens["end"]))
    write("model_index.json", index)


# ------------------------------------------------------------------------------------------------------- checkpoints

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


def save_checkpoint(path: Path, kind: str, base: str, tensors: dict[str, Tensor], config: dict,
                    prompts: Iterable[str] = ()) -> None:
    save_tensors(path, tensors, dict(format=FORMAT, kind=kind, base=base, config=json.dumps(config),
                                     prompts=json.dumps([*prompts])))


def described(networks: dict[str, nn.Module], schedule: Schedule, tokenizer: clip.Tokenizer) -> dict:
    """What a checkpoint of everything says of its networks, for `embedded` to build."""
    configs = {part: asdict(network.config) for part, network in networks.items()}
    return configs | dict(schedule=schedule.config, tokenizer=tokenizer.to_json())


def embedded(name: str, config: dict, path: Path, strength: float) -> Base:
    """The networks that a checkpoint of everything describes, still without weights. It opens no base."""
    if strength != 1:
        raise ValueError("it holds every weight and knows no other; strength works for LoRA checkpoints only")
    base = Base(name, tokenizer=clip.Tokenizer.from_json(config["tokenizer"]),
                schedule=Schedule.from_config(config["schedule"]))
    for part in ("vae", "unet", "text_encoder"):
        cls = class_of(part, config[part])
        setattr(base, part, build(cls, from_json(NETWORKS[cls][0], config[part]), path))
    return base


def save_generator(path: Path, generator: nn.Module, kind: str, base: str, prompts: list[str],
                   text_encoder: clip.TextEncoder | None = None, tokenizer: clip.Tokenizer | None = None) -> None:
    """Writes what was trained, with all that sampling needs to know in the metadata. Where everything was trained the
    file also takes the text encoder, all configurations and the tokenizer, and opens no base."""
    tensors = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    config = dict(generator=asdict(generator.config))
    if generator.config.train == "all":
        tensors |= dict(generator.named_buffers())  # what the twin of `conv_in` was before
        tensors |= {f"text_encoder.{name}": p for name, p in text_encoder.named_parameters()}
        config |= described(dict(vae=generator.vae, unet=generator.unet, text_encoder=text_encoder),
                            generator.schedule, tokenizer)
    save_checkpoint(path, kind, base, tensors, config, prompts)


def save_yoso(path: Path, base: Base, base_name: str, trained: dict[str, Tensor],
              prior: tuple[Tensor, Tensor], lora_rank: int | None) -> None:
    """Writes what was trained of a one-step generator ("unet.NAME": its LoRA, or all), its prior and its schedule. A
    base without weights goes into the file too: then that opens no base."""
    tensors = {**trained, "prior.mean": prior[0], "prior.std": prior[1]}
    config = dict(schedule=base.schedule.config, lora_rank=lora_rank or None, lora_alpha=8.0)
    if getattr(base, "random", False) and not lora_rank:
        config |= described(base.networks, base.schedule, base.tokenizer)
        tensors |= nn.ModuleDict(base.networks).state_dict()
    save_checkpoint(path, "yoso", base_name, tensors, config)


def load_yoso(path: Path, base: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu",
              strength: float = 1.0) -> tuple[Base, tuple[Tensor, Tensor]]:
    """What `save_yoso` wrote: the base with the trained change added `strength` times, and the prior."""
    expected = f"a one-step generator of train_yoso.py ({FORMAT})"
    tensors, metadata = read_tensors(path, expected)
    with reading(path, expected):
        name, config = base or metadata["base"], json.loads(metadata["config"])
        if name == "gaussians":
            raise ValueError("it draws points in the plane, not pictures")
        prior = tensors.pop("prior.mean"), tensors.pop("prior.std")
        schedule = Schedule.from_config(config["schedule"] | dict(_class_name="LCMScheduler"))  # what samples it
        found = embedded(name, config, path, strength) if "tokenizer" in config else None
    found = found or load_base(name, parts_of(name), dtype, device)
    found.schedule = schedule
    with reading(path, f"{expected} for the base {name}"):
        if config["lora_rank"]:
            pairs, unknown = read_lora(tensors, None, {"transformer" if found.transformer else "unet": found.denoiser})
            if unknown or not pairs:
                raise ValueError(f"{(unknown or ['no tensor'])[0]} belongs to a layer of it")
            for own in pairs.values():
                apply_lora(found.denoiser, own, strength * config["lora_alpha"] / config["lora_rank"])
        else:
            found.denoiser.requires_grad_(True)
            assign(nn.ModuleDict(found.networks), tensors, path, strength)
            check_words(found)
    for network in found.networks.values():
        network.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return found, prior


def find_checkpoint(name: str) -> Path:
    """A file, a run's folder, a Hub id, or the name of an adapter of tiny-turbo or a released file (fetched once)."""
    known = [*sorted(file.stem for file in ADAPTERS.glob("*.safetensors")), *CHECKPOINTS]
    expected = f"a checkpoint, model.safetensors of a trainer here, or one of {', '.join(known)}"
    if name not in known or Path(name).exists():
        return locate(name, ["model.safetensors"], expected)
    own = ADAPTERS / f"{name}.safetensors"
    path = own if own.is_file() else find_url(f"{RELEASED}/{CHECKPOINTS[name][0]}", "img2img-turbo")
    if path is None:
        raise ValueError(f"{name} is not here and cannot be fetched; expected {expected}")
    return path


def kind_of(checkpoint: str) -> str | None:
    """"pix2pix_turbo", "cyclegan_turbo", "yoso", or None for a file that is not of a trainer here."""
    path = None if checkpoint in CHECKPOINTS else find_checkpoint(checkpoint)
    return read_tensors(path)[1].get("kind") if path and path.suffix == ".safetensors" else None


def load_generator(checkpoint: str, base: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu",
                   r: float | None = None, strength: float = 1.0, merged: bool = True) -> Loaded:
    """A trained generator on its base, from a file of ours or an official `.pkl` (whose base is SD-Turbo unless one
    is named). `strength` takes the trained change that many times, `r` sets a stochastic model's adapters; `merged`
    adds the LoRA to the weights, for inference only."""
    path, prompts, networks = find_checkpoint(checkpoint), [], None
    expected = f"a checkpoint of a translator: a trainer's model.safetensors ({FORMAT}) or img2img-turbo's .pkl"
    tensors, metadata = read_tensors(path, expected)
    with reading(path, expected):
        if path.suffix == ".safetensors":
            kind = metadata.get("kind")
            if metadata.get("format") != FORMAT or kind not in KINDS:
                raise ValueError(f"its format is {metadata.get('format')!r}, its kind {kind!r}")
            saved, base = json.loads(metadata["config"]), base or metadata["base"]
            prompts = [str(prompt) for prompt in json.loads(metadata["prompts"])]
            config = from_json(KINDS[kind][1], saved["generator"])
            networks = embedded(base, saved, path, strength) if config.train == "all" else None
        else:
            kind, base = "cyclegan_turbo" if "sd_encoder" in tensors else "pix2pix_turbo", base or "sd-turbo"
            config, tensors = KINDS[kind][2](tensors, path)
            config = from_json(KINDS[kind][1], vars(config))
    if networks:
        own = {k.removeprefix("text_encoder."): tensors.pop(k) for k in [*tensors] if k.startswith("text_encoder.")}
        assign(networks.text_encoder, own, path)
        check_words(networks)
    else:
        networks = load_base(base, dtype=dtype, device=device)
    with reading(path, f"a checkpoint for the base {base}"):
        if config.timestep >= len(networks.schedule.alpha):
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


# ------------------------------------------------------------------------------------------------------------- judges

@dataclass
class Judge:
    """A network that judges pictures, frozen; `hash` tells its files from others."""
    network: nn.Module
    hash: str
    tokenizer: clip.Tokenizer | None = None  # of CLIP


def judge_files(name: str, fetch: bool = True) -> list[Path | None]:
    """The files of a judge, downloaded (if `fetch`) where they are not here; None for one that is not to be had."""
    return [find_url(source, "judges", fetch) if "://" in source else
            find(source, ["model.safetensors", "pytorch_model.bin"], fetch=fetch) for source in JUDGES[name][1]]


def has_judge(name: str) -> bool:
    """Whether a judge's files are on this machine."""
    return None not in judge_files(name, fetch=False)


def load_judge(name: str, device: str = "cpu") -> Judge:
    """"lpips", "clip", "dino" or "inception", in float32."""
    files, (module, sources) = judge_files(name), JUDGES[name]
    if None in files:
        raise ValueError(f"the weights of {name} are not here; expected {' and '.join(sources)}, of the Hub in"
                         f" {hub_cache()}, others in {hub_cache().parent / 'judges'}")
    read = [read_tensors(path, f"{name}'s weights")[0] for path in files]
    with reading(files[0], f"the weights of {name}, {' and '.join(sources)}"):
        network = module.from_state_dict(*read).float().to(device)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    tokenizer = load_tokenizer(sources[0], "") if name == "clip" else None
    return Judge(network, hashlib.sha256("".join(hashes).encode()).hexdigest()[:16], tokenizer)
