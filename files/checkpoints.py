"""Checkpoints: those that the trainers write, and the official .pkl files of img2img-turbo."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from files import kinds
from files.bases import (
    NETWORKS,
    Base,
    check_networks,
    check_tokenizer,
    class_of,
    load_base,
    parts_of,
)
from files.formats import apply_lora, read_lora
from files.hub import BASES, ROOT, find_url, home_path, locate
from files.tensors import assign, build, fit, from_json, read_tensors, reading, save_tensors
from files.tokenizers import tokenizer_from_json, tokenizer_to_json
from models import clip, cyclegan_turbo, pix2pix_turbo
from models.diffusion import Schedule
from models.lora import LoRAConv2d, LoRALinear, merge, set_scale

FORMAT = "one-step-diffusion 1"

# Names for --checkpoint: the file of a released checkpoint and, for CycleGAN-Turbo, the direction
# and the caption that go with it.
RELEASED = "https://www.cs.cmu.edu/~img2img-turbo/models"
CHECKPOINTS: dict[str, tuple[str, str | None, str | None]] = {
    "edge_to_image": ("edge_to_image_loras.pkl", None, None),
    "sketch_to_image_stochastic": ("sketch_to_image_stochastic_lora.pkl", None, None),
    "day_to_night": ("day2night.pkl", "a2b", "driving in the night"),
    "night_to_day": ("night2day.pkl", "b2a", "driving in the day"),
    "clear_to_rainy": ("clear2rainy.pkl", "a2b", "driving in heavy rain"),
    "rainy_to_clear": ("rainy2clear.pkl", "b2a", "driving in the day"),
}
# The adapters of tiny-turbo, which are also names for --checkpoint.
ADAPTERS = ROOT / "tiny" / "adapters"

Config = pix2pix_turbo.Pix2PixTurboConfig | cyclegan_turbo.CycleGANTurboConfig


class Kind(NamedTuple):
    """A kind of generator: its class, its settings, and the reader of its official files."""

    generator: type
    config: type
    from_official: Callable


KINDS = {
    "pix2pix_turbo": Kind(
        pix2pix_turbo.Pix2PixTurbo,
        pix2pix_turbo.Pix2PixTurboConfig,
        pix2pix_turbo.from_official,
    ),
    "cyclegan_turbo": Kind(
        cyclegan_turbo.CycleGANTurbo,
        cyclegan_turbo.CycleGANTurboConfig,
        cyclegan_turbo.from_official,
    ),
}


@dataclass
class LoadedGenerator:
    """A generator that is ready to run, and what its checkpoint says about it."""

    generator: pix2pix_turbo.Pix2PixTurbo | cyclegan_turbo.CycleGANTurbo
    text_encoder: clip.TextEncoder
    tokenizer: clip.Tokenizer
    kind: str
    base: str
    prompts: list[str]  # the caption that all pairs share; or those of the domains a and b
    r: float | None  # for a stochastic model

# -------------------- saving

def save_generator(
    path: Path,
    generator: nn.Module,
    kind: str,
    base: str,
    prompts: list[str],
    text_encoder: clip.TextEncoder | None = None,
    tokenizer: clip.Tokenizer | None = None,
) -> None:
    """Writes the trained tensors of a translator, with all that sampling needs in the metadata.

    If everything was trained, the file also holds the text encoder, all configurations and the
    tokenizer, and needs no base.
    """
    tensors = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    # The only buffers are weight0 and bias0 of a stochastic model's conv_in (lora.TwinConv2d): its
    # frozen half, which need not be the base's.
    tensors |= dict(generator.named_buffers())
    config = dict(generator=asdict(generator.config))
    if generator.config.train == "all":
        for name, p in text_encoder.named_parameters():
            tensors[f"text_encoder.{name}"] = p
        networks = dict(vae=generator.vae, unet=generator.unet, text_encoder=text_encoder)
        config |= _self_contained_configs(networks, generator.schedule, tokenizer)
    save_checkpoint(path, kind, base, tensors, config, prompts)


def save_yoso(
    path: Path,
    base: Base,
    base_name: str,
    trained: dict[str, Tensor],
    prior: tuple[Tensor, Tensor],
    lora_rank: int | None,
) -> None:
    """Writes the trained tensors of a one-step generator, its prior and its schedule.

    `trained` holds the denoiser's LoRA, or all its weights, under names like "unet.NAME". `prior`
    is mean and standard deviation. If a base with random weights was trained in full, all its
    networks go into the file too, which then needs no base.
    """
    mean, std = prior
    tensors = {**trained, "prior.mean": mean, "prior.std": std}
    config = dict(schedule=base.schedule.config, lora_rank=lora_rank, lora_alpha=8.0)
    if base.random and not lora_rank:
        config |= _self_contained_configs(base.networks, base.schedule, base.tokenizer)
        tensors |= nn.ModuleDict(base.networks).state_dict()
    save_checkpoint(path, "yoso", base_name, tensors, config)


def save_checkpoint(
    path: Path,
    kind: str,
    base: str,
    tensors: dict[str, Tensor],
    config: dict,
    prompts: Iterable[str] = (),
) -> None:
    """Writes tensors, with the metadata of a checkpoint of ours."""
    metadata = dict(
        format=FORMAT,
        kind=kind,
        base=base,
        config=json.dumps(config),
        prompts=json.dumps([*prompts]),
    )
    save_tensors(path, tensors, metadata)


def _self_contained_configs(
    networks: dict[str, nn.Module],
    schedule: Schedule,
    tokenizer: clip.Tokenizer,
) -> dict:
    """The configurations in a checkpoint that holds every weight, for `_build_self_contained`."""
    configs = {part: asdict(network.config) for part, network in networks.items()}
    configs["schedule"] = schedule.config
    configs["tokenizer"] = tokenizer_to_json(tokenizer)
    return configs

# -------------------- finding

def find_checkpoint(name: str, files: Iterable[str] = ("model.safetensors",)) -> Path:
    """The file of a checkpoint.

    `name` is a file, the folder of a run, a Hub id, an adapter of tiny-turbo, or a released file,
    which is downloaded once. Of a folder or a Hub id it is the first of `files` that is there.
    ValueError if there is none.
    """
    known = known_names()
    expected = f"a checkpoint (model.safetensors of a trainer here), or one of {', '.join(known)}"
    if name not in known or Path(name).exists():
        return locate(name, [*files], expected + _hint(name, known))
    if name not in CHECKPOINTS:
        return ADAPTERS / f"{name}.safetensors"

    file, _, _ = CHECKPOINTS[name]
    path = find_url(f"{RELEASED}/{file}", "img2img-turbo")
    if path is None:
        raise ValueError(
            f"{name} is not on this machine, and HF_HUB_OFFLINE forbids a download;"
            f" expected {expected}"
        )
    return path


def _hint(name: str, known: list[str]) -> str:
    """What may be meant by a name that leads to no checkpoint, as an addition to a message."""
    if name in known:
        return f" ({name} in the current folder hides the checkpoint of that name)"
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def known_names() -> list[str]:
    """The adapters of tiny-turbo, and the released checkpoints."""
    adapters = sorted(file.stem for file in ADAPTERS.glob("*.safetensors"))
    return [*adapters, *CHECKPOINTS]


def checkpoint_kind(checkpoint: str) -> str | None:
    """The kind of a checkpoint, "pix2pix_turbo", "cyclegan_turbo" or "yoso".

    None for an official `.pkl`. ValueError for any other file that no trainer here wrote.
    """
    if checkpoint in CHECKPOINTS and not Path(checkpoint).exists():
        return None
    path = find_checkpoint(checkpoint)
    if path.suffix == ".pkl":
        return None
    expected = "a checkpoint: a trainer's model.safetensors, or img2img-turbo's .pkl"
    tensors, metadata = read_tensors(path, expected)
    if metadata.get("format") != FORMAT:
        what = _what_it_is(tensors, metadata)
        raise ValueError(f"--checkpoint {path}: it is {what}; expected {expected}")
    return metadata.get("kind")

# -------------------- loading

def load_yoso(
    checkpoint: str,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    strength: float = 1.0,
) -> tuple[Base, tuple[Tensor, Tensor]]:
    """The one-step generator that `save_yoso` wrote, as a base, and its prior (mean, std).

    `checkpoint` is a name as in `find_checkpoint`. `base` takes the place of the base that the file
    names. The trained change is added `strength` times. ValueError if the file is damaged, of
    another kind, or for another base.
    """
    path = find_checkpoint(checkpoint)
    expected = f"a one-step generator of train_yoso.py ({FORMAT})"
    tensors, metadata = read_tensors(path, expected)
    loaded = None
    with reading(path, expected):
        if metadata.get("kind") != "yoso":
            raise ValueError(f"it is {_what_it_is(tensors, metadata)}")
        name = base or metadata["base"]
        _warn_of_other_base(path, metadata["base"], name)
        config = json.loads(metadata["config"])
        if name == "gaussians":
            raise ValueError("it draws points in the plane, not pictures")
        prior = (tensors.pop("prior.mean"), tensors.pop("prior.std"))
        # Whatever the base was sampled with, a one-step generator is sampled with LCM.
        sampler = dict(_class_name="LCMScheduler", clip_sample=False)
        schedule = Schedule.from_config(config["schedule"] | sampler)
        if "tokenizer" in config:
            _check_no_base(base)
            loaded = _build_self_contained(name, config, path, strength)

    if loaded is None:
        loaded = load_base(name, parts_of(name), dtype, device)
    loaded.schedule = schedule
    with reading(path, f"{expected} for the base {name}"):
        if config["lora_rank"]:
            scale = strength * config["lora_alpha"] / config["lora_rank"]
            _add_denoiser_lora(loaded, tensors, scale)
        else:
            loaded.denoiser.requires_grad_(True)
            assign(nn.ModuleDict(loaded.networks), tensors, path, strength)
            check_tokenizer(loaded)
    for network in loaded.networks.values():
        _make_ready(network, dtype, device)
    return loaded, prior


def _add_denoiser_lora(base: Base, tensors: dict[str, Tensor], scale: float) -> None:
    """Adds the LoRA of a YOSO checkpoint to the denoiser's weights."""
    part = "transformer" if base.transformer else "unet"
    pairs, unused = read_lora(tensors, None, {part: base.denoiser})
    if unused:
        raise ValueError(f"{unused[0]} belongs to no layer of it")
    if not pairs:
        raise ValueError("no tensor belongs to a layer of it")
    apply_lora(base.denoiser, pairs[part], scale)


def load_generator(
    checkpoint: str,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    r: float | None = None,
    strength: float = 1.0,
    merged: bool = True,
) -> LoadedGenerator:
    """A trained translator on its base, frozen and ready to run.

    `checkpoint` is a name as in `find_checkpoint`. `base` takes the place of the base that the file
    names; an official `.pkl` names none, which means SD-Turbo. The trained change is added
    `strength` times. `r` in [0, 1] sets the scale of a stochastic model, 0.4 if it is None. With
    `merged` the LoRA is merged into the weights, which is for inference only.

    ValueError if the file is damaged, of another kind, or for another base.
    """
    path = find_checkpoint(checkpoint)
    saved = _read_translator(path, base, strength)
    kind = KINDS[saved.kind]
    config = saved.config

    if saved.loaded is None:
        loaded = load_base(saved.base, dtype=dtype, device=device)
    else:
        loaded = saved.loaded
        _assign_text_encoder(loaded, saved.tensors, path)

    with reading(path, f"a checkpoint for the base {saved.base}"):
        generator = kind.generator(loaded.vae, loaded.unet, loaded.schedule, config)
    assign(generator, saved.tensors, path, strength)

    for layer in generator.modules():
        if isinstance(layer, LoRALinear | LoRAConv2d):
            layer.full_scale *= strength
    r = _stochastic_scale(config, r, path)
    set_scale(generator, 1.0 if r is None else r)
    if merged:
        merge(generator)
    for network in (generator, loaded.text_encoder):
        _make_ready(network, dtype, device)
    return LoadedGenerator(
        generator,
        loaded.text_encoder,
        loaded.tokenizer,
        saved.kind,
        saved.base,
        saved.prompts,
        r,
    )


class SavedTranslator(NamedTuple):
    """What the file of a translator holds."""

    kind: str
    base: str
    config: Config
    prompts: list[str]
    tensors: dict[str, Tensor]
    loaded: Base | None  # built without weights, if the file holds all of them


def _read_translator(path: Path, base: str | None, strength: float) -> SavedTranslator:
    """Reads a checkpoint of ours or an official `.pkl`. ValueError if it is neither."""
    expected = (
        f"a checkpoint of a translator: a trainer's model.safetensors ({FORMAT}) or"
        " img2img-turbo's .pkl"
    )
    tensors, metadata = read_tensors(path, expected)
    with reading(path, expected):
        if path.suffix != ".safetensors":
            return _parse_official(tensors, path, base or "sd-turbo")

        kind = metadata.get("kind")
        if metadata.get("format") != FORMAT or kind not in KINDS:
            raise ValueError(f"it is {_what_it_is(tensors, metadata)}")
        base_name = base or metadata["base"]
        _warn_of_other_base(path, metadata["base"], base_name)
        configs = json.loads(metadata["config"])
        prompts = [str(prompt) for prompt in json.loads(metadata["prompts"])]
        config = from_json(KINDS[kind].config, configs["generator"])
        loaded = None
        if config.train == "all":
            _check_no_base(base)
            loaded = _build_self_contained(base_name, configs, path, strength)
        return SavedTranslator(kind, base_name, config, prompts, tensors, loaded)


def _check_no_base(base: str | None) -> None:
    """ValueError for a base that was asked for beside a checkpoint that holds every weight."""
    if base is not None:
        raise ValueError("it holds every weight, so that it needs no base; leave --base out")


def _what_it_is(tensors: object, metadata: dict[str, str]) -> str:
    """What a file is that is not the checkpoint asked for, in words."""
    found = f"of the format {metadata.get('format')!r} and the kind {metadata.get('kind')!r}"
    return kinds.of_tensors(tensors, metadata) or found


def _parse_official(saved: dict, path: Path, base: str) -> SavedTranslator:
    """The contents of an official `.pkl` file."""
    if kinds.of_tensors(saved) != kinds.OFFICIAL:
        raise ValueError(f"it is {_what_it_is(saved, {})}")
    kind = "cyclegan_turbo" if "sd_encoder" in saved else "pix2pix_turbo"
    config, tensors = KINDS[kind].from_official(saved, path)
    # The settings come from a file, so their types are checked.
    config = from_json(KINDS[kind].config, vars(config))
    return SavedTranslator(kind, base, config, [], tensors, loaded=None)


def _build_self_contained(name: str, config: dict, path: Path, strength: float) -> Base:
    """The networks that a checkpoint with every weight describes, still without their weights."""
    if strength != 1:
        raise ValueError(
            "it holds every weight and no base to start from; strength needs a checkpoint that"
            " changes a base"
        )
    base = Base(
        name,
        tokenizer=tokenizer_from_json(config["tokenizer"]),
        schedule=Schedule.from_config(config["schedule"]),
    )
    for part in ("vae", "unet", "text_encoder"):
        cls = class_of(part, config[part])
        own = from_json(NETWORKS[cls].config, config[part])
        setattr(base, part, build(cls, own, path))
    check_networks(base)
    return base


def _assign_text_encoder(loaded: Base, tensors: dict[str, Tensor], path: Path) -> None:
    """Takes the text encoder's weights out of a checkpoint's tensors."""
    prefix = "text_encoder."
    own = {}
    for key in [*tensors]:
        if key.startswith(prefix):
            own[key.removeprefix(prefix)] = tensors.pop(key)
    assign(loaded.text_encoder, own, path)
    check_tokenizer(loaded)


def _stochastic_scale(config: object, r: float | None, path: Path) -> float | None:
    """The r to use: 0.4 if a stochastic model was given none, None for a deterministic one."""
    if getattr(config, "stochastic", False):
        return 0.4 if r is None else r
    if r is not None:
        raise ValueError(f"{path} is not a stochastic model and has no r; leave --r out")
    return None


def _make_ready(network: nn.Module, dtype: torch.dtype | None, device: str) -> None:
    """Moves a network and freezes it, for inference."""
    network.to(device=device, dtype=dtype)
    network.requires_grad_(False)
    network.eval()

# -------------------- starting a new run from a checkpoint

# Of a run's folder, the file whose weights a new run starts from: the first that is there.
START_FILES = ("best.safetensors", "model.safetensors")
# Settings of a generator that decide on the tensors, or on what they mean. (Which layers have a
# LoRA shows in the tensors' names.)
KEPT = ("skips",)
KEPT_OF_LORA = (
    "skips",
    "lora_rank_unet",
    "lora_rank_vae",
    "lora_alpha",
    "lora_alpha_unet",
    "lora_alpha_vae",
)
# What may be trained in full of the U-Net's first convolution.
CONV_IN = ("unet.conv_in.weight", "unet.conv_in.bias")


def start_from(
    checkpoint: str,
    generator: pix2pix_turbo.Pix2PixTurbo | cyclegan_turbo.CycleGANTurbo,
    kind: str,
    base: str,
    text_encoder: clip.TextEncoder,
) -> str:
    """Puts the weights of a checkpoint into a new generator, which was built on the base `base`.

    `checkpoint` is a name as in `find_checkpoint`; of a run's folder it is best.safetensors, if it
    has one. If all weights are trained, the text encoder gets its own. A `conv_in` that the
    checkpoint lacks stays the base's.

    Returns what was read, in words. ValueError if the checkpoint is of another kind, for another
    base, or has other ranks.
    """
    path = find_checkpoint(checkpoint, START_FILES)
    saved = _read_translator(path, None, strength=1.0)
    config = generator.config
    if saved.kind != kind:
        raise ValueError(
            f"{path} is of the kind {saved.kind}; expected {kind}, or train_{saved.kind}.py"
        )
    if path.suffix == ".safetensors":  # official files name no base
        _check_same_base(saved.base, base, path)
    _check_settings(saved.config, config, path)

    tensors = _start_tensors(saved, config)
    expected: dict[str, Tensor] = {}
    for name, p in generator.named_parameters():
        if p.requires_grad:
            expected[name] = p
    for name, buffer in generator.named_buffers():
        if name in tensors:
            expected[name] = buffer
    if config.train == "all":
        for name, p in text_encoder.named_parameters():
            expected[f"text_encoder.{name}"] = p
    elif not saved.config.conv_in:
        for name in CONV_IN:
            expected.pop(name, None)
    _copy(generator, expected, tensors, path, base)

    if saved.config.timestep != config.timestep:
        return f"starting from {path}, which was trained at timestep {saved.config.timestep}"
    return f"starting from {path}"


def start_yoso_from(
    checkpoint: str, networks: nn.Module, rank: int, prediction_type: str, base: str
) -> str:
    """Puts the LoRA of a one-step generator into the new one of `networks`, on the base `base`.

    The layers of `networks` have the checkpoint's names, "unet.NAME". Returns what was read, in
    words. ValueError if the checkpoint is of another kind, rank or base.
    """
    path = find_checkpoint(checkpoint, START_FILES)
    expected = f"a LoRA of train_yoso.py of rank {rank} that predicts {prediction_type}"
    tensors, metadata = read_tensors(path, expected)
    with reading(path, expected):
        if metadata.get("kind") != "yoso":
            raise ValueError(f"its kind is {metadata.get('kind')!r}")
        config = json.loads(metadata["config"])
        predicted = Schedule.from_config(config["schedule"]).prediction_type
        if config["lora_rank"] != rank or predicted != prediction_type:
            raise ValueError(f"its rank is {config['lora_rank']}, and it predicts {predicted}")
        _check_same_base(metadata["base"], base, path)
    lora = {name: tensor for name, tensor in tensors.items() if not name.startswith("prior.")}
    trained = {name: p for name, p in networks.named_parameters() if ".lora_" in name}
    _copy(networks, trained, lora, path, base)
    return f"starting from {path}"


def _same_base(saved: str, base: str) -> bool:
    """Whether both names end alike, as those of copies in two folders do."""
    names = [home_path(BASES.get(name, name)).name for name in (saved, base)]
    return names[0] == names[1]


def _warn_of_other_base(path: Path, saved: str, base: str) -> None:
    """Says on stderr that a checkpoint is used with a base that it was not trained on."""
    if not _same_base(saved, base):
        print(
            f"{path} was trained on the base {saved}; on {base} it may mean nothing",
            file=sys.stderr,
        )


def _check_same_base(saved: str, base: str, path: Path) -> None:
    """ValueError unless a new run has the base that the checkpoint was trained on."""
    if not _same_base(saved, base):
        raise ValueError(
            f"{path} was trained on the base {saved}; expected {base}, that of this run:"
            f" give --base {saved}"
        )


def _check_settings(saved: Config, config: Config, path: Path) -> None:
    """ValueError for a setting in which a new run may not differ from the checkpoint."""
    if saved.prediction_type != config.prediction_type:
        raise ValueError(
            f"{path} is for a base that predicts {saved.prediction_type}; expected"
            f" {config.prediction_type}, as that of this run does: choose the checkpoint's --base"
        )
    names: tuple[str, ...] = ("train",)
    if saved.train == config.train:
        names = KEPT_OF_LORA if config.train == "lora" else KEPT
    differing = []
    for name in names:
        found = getattr(saved, name, None)
        wanted = getattr(config, name, None)
        if found != wanted:
            differing.append(f"{name} {_as_flag(found)} (this run: {_as_flag(wanted)})")
    # A trained conv_in would be frozen, and be lost, because only what is trained is saved.
    if config.train == "lora" and saved.conv_in and not config.conv_in:
        differing.append("conv_in on (this run: off)")
    if differing:
        raise ValueError(f"{path} was trained with {', '.join(differing)}; give the same flags")


def _as_flag(value: object) -> object:
    """A setting as its flag has it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


def _start_tensors(saved: SavedTranslator, config: Config) -> dict[str, Tensor]:
    """The checkpoint's tensors, with the original of `conv_in` only for a stochastic model.

    It is the checkpoint's, if that has one. Else the base's stays where a LoRA is trained; where
    every weight is, the checkpoint stands for the base, and its `conv_in` is the original.
    """
    tensors = dict(saved.tensors)
    for name in CONV_IN:
        original = tensors.pop(f"{name}0", None)
        if original is None and config.train == "all":
            original = tensors.get(name)
        if original is not None and getattr(config, "stochastic", False):
            tensors[f"{name}0"] = original
    return tensors


@torch.no_grad()
def _copy(
    network: nn.Module,
    expected: dict[str, Tensor],
    tensors: dict[str, Tensor],
    path: Path,
    base: str,
) -> None:
    """Copies a checkpoint's tensors into the network's own, which must have the same names."""
    fitted = fit(network, {path: tensors}, expected, f"the generator on the base {base}")
    for name, tensor in fitted.items():
        expected[name].copy_(tensor)
