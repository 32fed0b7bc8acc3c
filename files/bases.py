"""Bases: folders in the diffusers layout and one-file models, and what is added to them."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from files import kinds
from files.formats import (
    apply_lora,
    clip_from_original,
    read_lora,
    unet_from_original,
    vae_from_original,
)
from files.hub import BASES, LAYOUT, find, home_path, locate
from files.tensors import (
    build,
    fill,
    read_config,
    read_json,
    read_tensors,
    read_weights,
    reading,
    save_tensors,
)
from files.tokenizers import added_tokens_decoder, load_t5_tokenizer, load_tokenizer
from models import clip, controlnet, pixart, t5, taesd, unet, vae
from models.diffusion import Schedule

STABLE_DIFFUSION = ("vae", "unet", "text_encoder", "tokenizer", "schedule")
PIXART = ("vae", "transformer", "text_encoder", "tokenizer", "schedule")

# The configuration files of the parts that are not networks.
OTHER_CONFIGS = dict(
    tokenizer="tokenizer/tokenizer_config.json",
    schedule="scheduler/scheduler_config.json",
)
# The two YOSO bases of the Hub are transformers alone, which need another scheduler than PixArt's.
YOSO_SCHEDULER = dict(_class_name="LCMScheduler", prediction_type="v_prediction")
YOSO_NAMES = ("yoso_pixart512", "yoso_pixart1024")
# Where a one-file model has OpenCLIP's text encoder, and which family that is. sd_turbo.safetensors
# has the names of SDXL's code.
OPEN_CLIP = {
    "cond_stage_model.model": "sd21",
    "conditioner.embedders.0.model": "sd-turbo",
}
# In SD 2.x's one-file models, a bias that tells which of them predict v.
SD2_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
# The kinds of model whose U-Net takes more channels than those of the latent.
LARGER_INPUTS = {
    5: "a depth model (latent and depth map)",
    7: "an upscaler (latent and small picture)",
    8: "an InstructPix2Pix or another editing model (two latents)",
    9: "an inpainting model (two latents and a mask)",
}
# The names of LoRA files in a folder: of diffusers, of train_yoso.py, and of peft.
LORA_FILES = [
    "pytorch_lora_weights.safetensors",
    "lora.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
]
ONE_FILE = (
    "a one-file checkpoint of Stable Diffusion 1.x or 2.x (model.diffusion_model...,"
    " first_stage_model...)"
)


class NetworkFiles(NamedTuple):
    """How a network is stored in the diffusers layout."""

    config: type  # the dataclass of its config.json
    fixed: dict  # options of config.json for which only one value is supported
    stem: str  # the weight files' name, without its ending
    entry: tuple[str, str]  # the one in model_index.json: library and class


NETWORKS = {
    vae.VAE: NetworkFiles(
        vae.VAEConfig,
        vae.FIXED,
        "diffusion_pytorch_model",
        ("diffusers", "AutoencoderKL"),
    ),
    taesd.TAESD: NetworkFiles(
        taesd.TAESDConfig,
        taesd.FIXED,
        "diffusion_pytorch_model",
        ("diffusers", "AutoencoderTiny"),
    ),
    vae.Identity: NetworkFiles(
        vae.IdentityConfig,
        {},
        "diffusion_pytorch_model",
        ("models.vae", "Identity"),
    ),
    unet.UNet: NetworkFiles(
        unet.UNetConfig,
        unet.FIXED,
        "diffusion_pytorch_model",
        ("diffusers", "UNet2DConditionModel"),
    ),
    pixart.PixArt: NetworkFiles(
        pixart.PixArtConfig,
        pixart.FIXED,
        "diffusion_pytorch_model",
        ("diffusers", "PixArtTransformer2DModel"),
    ),
    clip.TextEncoder: NetworkFiles(
        clip.TextConfig,
        clip.FIXED,
        "model",
        ("transformers", "CLIPTextModel"),
    ),
    t5.T5Encoder: NetworkFiles(
        t5.T5Config,
        t5.FIXED,
        "model",
        ("transformers", "T5EncoderModel"),
    ),
}


@dataclass
class Base:
    """The loaded parts of a base; the others are None.

    Stable Diffusion has a U-Net and CLIP's text encoder, PixArt a transformer and T5.
    """

    name: str
    vae: vae.VAE | taesd.TAESD | None = None
    unet: unet.UNet | None = None
    transformer: pixart.PixArt | None = None
    text_encoder: clip.TextEncoder | t5.T5Encoder | None = None
    tokenizer: clip.Tokenizer | t5.T5Tokenizer | None = None
    schedule: Schedule | None = None
    random: bool = False  # whether the weights are random, drawn from a seed

    @property
    def denoiser(self) -> nn.Module:
        """The U-Net or the transformer."""
        return self.transformer or self.unet

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The loaded networks, by part."""
        return {part: value for part, value in vars(self).items() if isinstance(value, nn.Module)}

    @property
    def multiple(self) -> int:
        """The sides of a picture must be multiples of this."""
        if self.transformer:
            return self.vae.factor * self.transformer.config.patch_size
        return self.vae.factor

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, ...]:
        """The denoiser's arguments after x and t: the context [n, N, C], and T5's mask [n, N]."""
        device = next(self.text_encoder.parameters()).device
        if isinstance(self.tokenizer, t5.T5Tokenizer):
            ids, mask = self.tokenizer([t5.clean(text) for text in texts])
            ids = ids.to(device)
            mask = mask.to(device)
            return self.text_encoder(ids, mask), mask
        ids = self.tokenizer(texts).to(device)
        return (self.text_encoder(ids),)

# -------------------- what a base is

def is_one_file(name: str) -> bool:
    """Whether a base is a one-file model."""
    path = home_path(name)
    return path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") and path.is_file()


def parts_of(name: str, encoded: bool = False) -> tuple[str, ...]:
    """STABLE_DIFFUSION or PIXART, whichever the base is.

    If the captions are `encoded` already, PixArt is loaded without T5, which is larger than all the
    rest.
    """
    if is_one_file(name) or not has_transformer(read_index(name)):
        return STABLE_DIFFUSION
    if encoded:
        return ("vae", "transformer", "schedule")
    return PIXART


def has_transformer(index: dict) -> bool:
    """Whether a base is PixArt, by its index. A part that a pipeline lacks is [null, null]."""
    return index.get("transformer") not in (None, [], [None, None])


def read_index(name: str) -> dict:
    """The `model_index.json` of a base.

    A base may be PixArt's transformer alone. Its other parts are those of pixart512.
    """
    path = find(name, ["model_index.json", "config.json"], LAYOUT)
    index = read_json(path)
    if path.name == "model_index.json":
        return index
    kind = index.get("_class_name")
    if kind is None and "dataset_folder" in index:
        raise ValueError(
            f"{name} is the folder of a training run, which is for --checkpoint; expected {LAYOUT}"
        )
    if kind not in ("Transformer2DModel", "PixArtTransformer2DModel"):
        raise ValueError(f"{path} is of {kind!r}; expected {LAYOUT}, or PixArt's transformer")
    return dict(transformer="alone", rest="pixart512")


def class_of(part: str, config: dict) -> type:
    """The class of a part's network. `config` holds the values of its `config.json`."""
    if part == "vae":
        if "encoder_block_out_channels" in config:
            return taesd.TAESD
        return vae.VAE if "latent_channels" in config else vae.Identity
    if part == "text_encoder":
        return t5.T5Encoder if config.get("model_type") == "t5" else clip.TextEncoder
    if part == "unet":
        return unet.UNet
    return pixart.PixArt


def read_network(part: str, path: Path) -> tuple[type, object]:
    """The class of a part's network and its configuration, from its `config.json`."""
    cls = class_of(part, read_json(path))
    return cls, read_config(NETWORKS[cls].config, NETWORKS[cls].fixed, path)

# -------------------- loading

def load_base(
    name: str,
    parts: tuple[str, ...] = STABLE_DIFFUSION,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Base:
    """Some parts of a base, with frozen weights.

    `name` is a one-file model, or a folder, name or Hub id as in `find`. If `dtype` is None the
    weights keep the type of their file.

    Two entries of a folder's `model_index.json` are our own. With `"initialise": "random"` the base
    has no weights: they are drawn from `seed`. Parts that the folder lacks are taken from the base
    that `"rest"` names. ValueError for files that are damaged or do not belong together.
    """
    if is_one_file(name):
        return _load_one_file(name, parts, dtype, device)

    index = read_index(name)
    base = Base(name, random=index.get("initialise") == "random")
    for part in parts:
        setattr(base, part, _load_part(name, index, part, dtype, device, seed))
    if base.schedule and index.get("transformer") == "alone":
        base.schedule = _schedule_of_alone(name, base.schedule)
    check_tokenizer(base)
    check_networks(base)
    return base


def _schedule_of_alone(name: str, schedule: Schedule) -> Schedule:
    """The schedule of a transformer that came without one: YOSO's, or PixArt's as it is.

    YOSO's is known by its name: of the Hub, of a copy, or of a snapshot in the Hub's cache.
    """
    parts = home_path(BASES.get(name, name)).resolve().parts
    if any(part.endswith(YOSO_NAMES) for part in parts):
        return Schedule.from_config(schedule.config | YOSO_SCHEDULER)
    print(
        f"{name} has no scheduler and gets PixArt's; for YOSO's transformer name the folder"
        f" {YOSO_NAMES[0]}",
        file=sys.stderr,
    )
    return schedule


def _load_part(
    name: str,
    index: dict,
    part: str,
    dtype: torch.dtype | None,
    device: str,
    seed: int,
) -> object:
    """One part of a base: a network, a tokenizer or a schedule."""
    folder = "" if index.get(part) == "alone" else f"{part}/"
    config_name = OTHER_CONFIGS.get(part, f"{folder}config.json")
    is_optional = "rest" in index or part == "tokenizer"
    path = find(name, [config_name], expected=None if is_optional else LAYOUT)

    if path is None and "rest" in index:
        rest = index["rest"]
        if not isinstance(rest, str) or Path(rest).resolve() == Path(name).resolve():
            raise ValueError(
                f"{name}/model_index.json: the {part} is not here, and rest is {rest!r}; expected"
                " the name of another base, which has it"
            )
        return getattr(load_base(rest, (part,), dtype, device, seed), part)
    if part == "tokenizer":
        return load_t5_tokenizer(name) if has_transformer(index) else load_tokenizer(name)
    if part == "schedule":
        with reading(path, "a scheduler of Stable Diffusion or PixArt"):
            return Schedule.from_config(_scheduler_config(read_json(path), index))

    cls, config = read_network(part, path)
    if index.get("initialise") == "random":
        network = _random_network(cls, config, path, seed)
        return network.to(device=device, dtype=dtype)
    files = read_weights(name, folder, NETWORKS[cls].stem)
    network = build(cls, config, path)
    return fill(network, files, f"the {part} of its config.json", dtype, device)


def _scheduler_config(config: dict, index: dict) -> dict:
    """A scheduler's configuration as the pipelines of `diffusers` take it."""
    entry = index.get("scheduler")
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        # The index decides on the class, whatever the scheduler's own file says.
        config = config | {"_class_name": entry[1]}
    if not has_transformer(index):
        # Files older than these two settings lack them, and StableDiffusionPipeline corrects them.
        config = config | dict(steps_offset=1, clip_sample=False)
    return config


def _random_network(cls: type, config: object, path: Path, seed: int) -> nn.Module:
    """A network whose weights depend on the seed only; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(cls, config, path, device="cpu")
    return network.requires_grad_(False)


def check_tokenizer(base: Base) -> None:
    """ValueError if the tokenizer has more pieces, or makes longer texts, than the text encoder
    has embeddings for."""
    if not base.tokenizer or not base.text_encoder:
        return
    config = base.text_encoder.config
    last = max(base.tokenizer.pieces.get_vocab().values())
    length = base.tokenizer.length
    # T5's positions are relative, so its texts may have any length.
    positions = getattr(config, "max_position_embeddings", length)
    if last >= config.vocab_size or length > positions:
        raise ValueError(
            f"{base.name}: the tokenizer's pieces have numbers up to {last}, and its texts a length"
            f" of {length}; expected numbers below the text encoder's {config.vocab_size} and no"
            f" more than a length of {positions}: copy both from one model"
        )


def check_networks(base: Base) -> None:
    """ValueError if the networks of a base do not fit each other; those not loaded do not count.

    The denoiser takes the VAE's latents, and the context of the text encoder.
    """
    if base.denoiser is None:
        return
    config = base.denoiser.config
    if base.unet:
        _check_channels(base.name, config.in_channels, config.out_channels)
    if base.vae:
        # Where the VAE is the identity, the latents are the pictures themselves.
        latent = getattr(base.vae.config, "latent_channels", 3)
        if latent != config.in_channels:
            raise ValueError(
                f"{base.name}: the VAE's latents have {latent} channels; expected"
                f" {config.in_channels}, which the denoiser takes: copy both from one model"
            )
    if base.text_encoder:
        is_t5 = isinstance(base.text_encoder, t5.T5Encoder)
        text_config = base.text_encoder.config
        width = text_config.d_model if is_t5 else text_config.hidden_size
        wanted = config.caption_channels if base.transformer else config.cross_attention_dim
        if width != wanted:
            raise ValueError(
                f"{base.name}: the text encoder has a width of {width}; expected {wanted}, which"
                " the denoiser's cross-attention takes: copy both from one model"
            )


def _check_channels(name: str, n_in: int, n_out: int) -> None:
    """ValueError for a U-Net that takes more, or less, than the latent that it predicts."""
    if n_in != n_out:
        kind = LARGER_INPUTS.get(n_in, "a model of an unknown kind")
        raise ValueError(
            f"{name}: the U-Net is that of {kind}, with {n_in} input channels, which is not"
            f" supported; expected a text-to-image model, with {n_out} input channels"
        )


def _load_one_file(
    name: str,
    parts: tuple[str, ...],
    dtype: torch.dtype | None,
    device: str,
) -> Base:
    """Some parts of a one-file model in the layout of the original code.

    The file holds weights only. Configurations, tokenizer and schedule are those of its family's
    folder: of SD-Turbo or SD 2.x if the text encoder is OpenCLIP's, else of SD 1.x.
    """
    path = home_path(name)
    tensors = _read_one_file(path)
    first = tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    if "unet" in parts and isinstance(first, Tensor) and first.ndim == 4:
        _check_channels(name, n_in=first.shape[1], n_out=4)
    family = "sd15"
    for stem, its_family in OPEN_CLIP.items():
        if f"{stem}.positional_embedding" in tensors:
            family = its_family

    others = tuple(part for part in parts if part in OTHER_CONFIGS)
    base = load_base(family, others)
    base.name = name
    if family == "sd21" and base.schedule:
        base.schedule = _schedule_of_sd2(name, tensors, base.schedule)
    for part, from_original in [
        ("vae", vae_from_original),
        ("unet", unet_from_original),
        ("text_encoder", clip_from_original),
    ]:
        if part not in parts:
            continue
        config_file = find(family, [f"{part}/config.json"], LAYOUT)
        cls, config = read_network(part, config_file)
        network = build(cls, config, config_file)
        with reading(path, ONE_FILE):
            own = from_original(tensors, config)
        fill(network, {path: own}, f"the {part} of {family}", dtype, device)
        setattr(base, part, network)
    check_networks(base)
    return base


def _schedule_of_sd2(name: str, tensors: dict[str, Tensor], schedule: Schedule) -> Schedule:
    """The schedule for what a one-file model of SD 2.x predicts, which the file does not say.

    Those of 768 px predict v, those of 512 px ("base") epsilon. Their tensors have equal names and
    shapes. That the spread of one bias tells them apart was found by ComfyUI.
    """
    bias = tensors.get(SD2_BIAS)
    if not isinstance(bias, Tensor):
        return schedule
    predicted = "v_prediction" if bias.float().std(correction=0) > 0.09 else "epsilon"
    print(f"{name} is taken for a model that predicts {predicted}", file=sys.stderr)
    return Schedule.from_config(schedule.config | {"prediction_type": predicted})


def _read_one_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a one-file model. ValueError if one of its three networks is missing."""
    tensors, metadata = read_tensors(path, ONE_FILE)
    with reading(path, f"{LAYOUT}, or {ONE_FILE}"):
        kind = kinds.of_tensors(tensors, metadata) or "a file"
        tensors = tensors.get("state_dict", tensors)
        for prefixes in (
            ("model.diffusion_model.input_blocks.",),
            ("first_stage_model.encoder.",),
            ("cond_stage_model.", *OPEN_CLIP),
        ):
            if not any(key.startswith(prefixes) for key in tensors):
                raise ValueError(f"it is {kind} without a tensor {prefixes[0]}...")
    return tensors

# -------------------- merging

def load_merged(formula: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Base:
    """A base whose denoiser's weights are a sum of bases, "a + b - c", with the spaces.

    YOSO at 1024 px is "yoso512 + pixart1024 - pixart512". A tensor must be in all the bases, or in
    one only. The denoiser's configuration is that of the largest; all other parts are the first
    base's.
    """
    names, signs = _parse_formula(formula)
    parts = parts_of(names[0])
    denoiser = "transformer" if "transformer" in parts else "unet"
    networks = [getattr(load_base(name, (denoiser,)), denoiser) for name in names]
    states = [network.state_dict() for network in networks]
    merged = _merge_states(states, signs, dtype, device)

    others = tuple(part for part in parts if part != denoiser)
    base = load_base(names[0], others, dtype, device)
    base.name = formula
    largest = max(networks, key=lambda network: len(network.state_dict()))
    source = Path(formula)  # stands for the file in error messages
    network = build(type(largest), largest.config, source)
    fill(network, {source: merged}, "the largest of them", device=device)
    setattr(base, denoiser, network)
    check_networks(base)
    return base


def _parse_formula(formula: str) -> tuple[list[str], list[int]]:
    """The names and the signs of a formula: [a, b, c] and [1, 1, -1] of "a + b - c"."""
    pieces = re.split(r"\s+([+-])\s+", formula.strip())
    names = pieces[::2]
    signs = [1]
    for operator in pieces[1::2]:
        signs.append(1 if operator == "+" else -1)
    return names, signs


def _merge_states(
    states: list[dict[str, Tensor]],
    signs: list[int],
    dtype: torch.dtype | None,
    device: str,
) -> dict[str, Tensor]:
    """The signed sum of state dictionaries, computed in float32.

    The result is of `dtype`, or of the first summand's type if that is None.
    """
    keys = dict.fromkeys(key for state in states for key in state)
    merged = {}
    for key in keys:
        terms = [(sign, state[key]) for sign, state in zip(signs, states) if key in state]
        shapes = [list(tensor.shape) for _, tensor in terms]
        in_one_or_all = len(terms) in (1, len(states))
        if not in_one_or_all or any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"--merge: {key} is in {len(terms)} of {len(states)} models, in the shapes"
                f" {shapes}; expected it in one, or in all in one shape"
            )
        total = sum(sign * tensor.float() for sign, tensor in terms)
        _, first = terms[0]
        merged[key] = total.to(device=device, dtype=dtype or first.dtype)
    return merged

# -------------------- LoRA and ControlNets

def load_lora(spec: str, base: Base) -> None:
    """Adds a LoRA to the weights of a base's networks.

    `spec` is FILE or FILE:SCALE, with a file, a folder or a Hub id for FILE. Keys that are left out
    are reported on stderr. ValueError if the LoRA is for another base, or another kind of adapter.
    """
    name, scale = _split_scale(spec)
    name = _adapter_folder(name)
    path = locate(name, LORA_FILES, "a LoRA as safetensors")
    networks = {part: network for part, network in base.networks.items() if part != "vae"}
    expected = f"a LoRA for the base {base.name}"
    with reading(path, expected):
        tensors, metadata = read_tensors(path, expected)
        if not isinstance(tensors, dict):
            raise ValueError(f"it holds a {type(tensors).__name__}")
        tensors = tensors.get("state_dict", tensors)
        settings = None
        is_peft = any(str(key).startswith("base_model.model.") for key in tensors)
        if path.stem == "adapter_model" or (is_peft and "lora_adapter_metadata" not in metadata):
            settings = _peft_settings(name, path)
        if settings:
            metadata = dict(lora_adapter_metadata=json.dumps(settings))
        pairs, unused = read_lora(tensors, metadata, networks)
        if not pairs:
            first = next(iter(tensors), "none")
            raise ValueError(f"no tensor, {first} the first, is of {' or '.join(networks)}")
        if unused:
            print(
                f"{path}: {len(unused)} of {len(tensors)} tensors are not needed and are left out:"
                f" {unused[0]} ...",
                file=sys.stderr,
            )
        for part, own in pairs.items():
            apply_lora(networks[part], own, scale)


def _adapter_folder(name: str) -> str:
    """The folder of an adapter that peft saved under a name of its own, if it is the only one."""
    folder = home_path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in LORA_FILES):
        adapters = [path.parent for path in folder.glob("*/adapter_config.json")]
        if len(adapters) == 1:
            return str(adapters[0])
    return name


def _peft_settings(name: str, path: Path) -> dict | None:
    """The `adapter_config.json` beside peft's file of an adapter.

    If it is missing, alpha is taken for the rank, and a line on stderr says so.
    """
    config = path.with_name("adapter_config.json")
    if not home_path(name).exists():
        # A Hub id, whose files are downloaded one by one.
        config = find(name, [config.name]) or config
    if not config.is_file():
        print(
            f"{path}: there is no adapter_config.json beside it, so its alpha is taken to be its"
            " rank",
            file=sys.stderr,
        )
        return None
    return dict(lora_alpha=8) | read_json(config)  # 8 is peft's default


def _split_scale(spec: str) -> tuple[str, float]:
    """The name and the scale of FILE:SCALE; the scale is 1 if there is none."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+))", spec)
    if match:
        return match[1], float(match[2])
    return spec, 1.0


def load_controlnet(
    name: str,
    network: unet.UNet,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> controlnet.ControlNet:
    """A ControlNet from its folder or Hub id. ValueError if it is for another kind of U-Net than
    `network`."""
    expected = "a ControlNet's folder: config.json and diffusion_pytorch_model.safetensors"
    if home_path(name).is_file():
        raise ValueError(
            f"{name} is a file; expected {expected}, or its Hub id. ControlNets in one file are not"
            " supported"
        )
    path = find(name, ["config.json"], expected)
    config = read_config(controlnet.ControlNetConfig, controlnet.FIXED, path)
    if config.conditioning_channels != 3:
        raise ValueError(
            f"{path}: conditioning_channels is {config.conditioning_channels}; expected 3: choose a"
            " ControlNet whose condition is a picture"
        )
    for key in (
        "in_channels",
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "down_block_types",
    ):
        found = getattr(config, key)
        wanted = getattr(network.config, key)
        if found != wanted:
            raise ValueError(
                f"{path}: {key} is {found}; expected {wanted}, as in this base: choose a"
                " ControlNet that was made for it"
            )
    files = read_weights(name, "", "diffusion_pytorch_model")
    built = build(controlnet.ControlNet, config, path)
    return fill(built, files, "the ControlNet of its config.json", dtype, device)

# -------------------- priors

def save_prior(path: Path, mean: Tensor, std: Tensor) -> None:
    """Writes mean and standard deviation [4, h, w] of the scaled latents of real pictures."""
    save_tensors(path, dict(mean=mean.float(), std=std.float()), {"format": "pt"})


def load_prior(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation that `save_prior` wrote. ValueError if they are not of
    `shape`, the shape of the latents to draw."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a prior (python -m dataset prior)")
    tensors, _ = read_tensors(path, "a prior")
    expected = (
        f"mean and std {list(shape)}, as these pictures' latents: estimate a prior of this size"
        " (python -m dataset prior)"
    )
    with reading(path, expected):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes.keys() != {"mean", "std"}:
            raise ValueError(f"it is {kinds.of_tensors(tensors) or 'a file of other tensors'}")
        if shapes != dict(mean=shape, std=shape):
            found = ", ".join(f"{name} {list(size)}" for name, size in shapes.items())
            raise ValueError(f"it holds {found}")
    return tensors["mean"], tensors["std"]

# -------------------- saving

def save_folder(
    folder: Path,
    base: Base,
    dtype: torch.dtype | None = None,
    rest: str | None = None,
) -> None:
    """Writes the parts that a base has into a folder that `diffusers` can read.

    With `rest`, the name of the base that the other parts come from, only the denoiser and the
    schedule are written; of a base with random weights, everything is.
    """
    index = {}
    if rest and not base.random:
        base = Base(
            base.name,
            unet=base.unet,
            transformer=base.transformer,
            schedule=base.schedule,
        )
        index["rest"] = _name_of_rest(rest)
    if base.transformer:
        index["_class_name"] = "PixArtAlphaPipeline"
    else:
        index["_class_name"] = "StableDiffusionPipeline"
        index["feature_extractor"] = (None, None)
        index["safety_checker"] = (None, None)
        index["requires_safety_checker"] = False

    for part, network in base.networks.items():
        index[part] = NETWORKS[type(network)].entry
        save_network(folder / part, network, dtype)
    if base.schedule:
        kind = base.schedule.config.get("_class_name", "DDIMScheduler")
        index["scheduler"] = ("diffusers", kind)
        _write_json(folder / OTHER_CONFIGS["schedule"], base.schedule.config)
    if isinstance(base.tokenizer, t5.T5Tokenizer):
        index["tokenizer"] = ("transformers", "T5Tokenizer")
        _save_t5_tokenizer(folder, base.tokenizer)
    elif base.tokenizer:
        index["tokenizer"] = ("transformers", "CLIPTokenizer")
        _save_tokenizer(folder, base.tokenizer)
    # The last file: a folder without it is not taken for a base.
    _write_json(folder / "model_index.json", index)


def _name_of_rest(rest: str) -> str:
    """The base that an index names for the other parts; of a base that has a rest itself, that."""
    if rest not in BASES and Path(rest).exists():
        rest = str(Path(rest).resolve())
    if is_one_file(rest):
        return rest
    return read_index(rest).get("rest", rest)


def save_network(folder: Path, network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Writes a network's `config.json` and weights."""
    kind = NETWORKS[type(network)]
    _, class_name = kind.entry
    config = {"_class_name": class_name, **asdict(network.config)}
    if isinstance(network, t5.T5Encoder):
        # Its model_type is among these, without which no reader takes the network for T5.
        config |= kind.fixed
    _write_json(folder / "config.json", config)
    tensors = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    save_tensors(folder / f"{kind.stem}.safetensors", tensors, {"format": "pt"})


def _save_tokenizer(folder: Path, tokenizer: clip.Tokenizer) -> None:
    model = json.loads(tokenizer.pieces.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    _write_json(folder / "tokenizer" / "vocab.json", model["vocab"])
    _write_text(
        folder / "tokenizer" / "merges.txt",
        "\n".join(["#version: 0.2", *merges, ""]),
    )
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=tokenizer.length,
        pad_token=tokenizer.tokens["pad"],
        bos_token=tokenizer.tokens["start"],
        eos_token=tokenizer.tokens["end"],
        unk_token=tokenizer.tokens["end"],
        added_tokens_decoder=added_tokens_decoder(tokenizer.pieces),
    )
    _write_json(folder / OTHER_CONFIGS["tokenizer"], config)


def _save_t5_tokenizer(folder: Path, tokenizer: t5.T5Tokenizer) -> None:
    _write_text(folder / "tokenizer" / "tokenizer.json", tokenizer.pieces.to_str())
    config = dict(
        tokenizer_class="T5Tokenizer",
        model_max_length=512,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    _write_json(folder / OTHER_CONFIGS["tokenizer"], config)


def _write_json(path: Path, value: dict) -> None:
    _write_text(path, json.dumps(value, indent=2))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
