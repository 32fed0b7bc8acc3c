"""Checkpoints: what the trainers write, and the official .pkl files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from files.bases import NETWORKS, Base, check_words, class_of, load_base, parts_of
from files.formats import apply_lora, read_lora
from files.hub import ROOT, find_url, locate
from files.tensors import assign, build, from_json, read_tensors, reading, save_tensors
from models import clip, cyclegan_turbo, pix2pix_turbo
from models.diffusion import Schedule
from models.lora import LoRAConv2d, LoRALinear, merge, set_scale

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
# Kinds of generator: the class, its settings, and what reads an official file of its kind.
KINDS = {
    "pix2pix_turbo": (pix2pix_turbo.Pix2PixTurbo, pix2pix_turbo.Pix2PixTurboConfig, pix2pix_turbo.from_official),
    "cyclegan_turbo": (cyclegan_turbo.CycleGANTurbo, cyclegan_turbo.CycleGANTurboConfig, cyclegan_turbo.from_official),
}
FORMAT = "one-step-diffusion 1"

@dataclass
class LoadedGenerator:
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


def checkpoint_kind(checkpoint: str) -> str | None:
    """"pix2pix_turbo", "cyclegan_turbo", "yoso", or None for a file that is not of a trainer here."""
    path = None if checkpoint in CHECKPOINTS else find_checkpoint(checkpoint)
    return read_tensors(path)[1].get("kind") if path and path.suffix == ".safetensors" else None


def load_generator(checkpoint: str, base: str | None = None, dtype: torch.dtype | None = None, device: str = "cpu",
                   r: float | None = None, strength: float = 1.0, merged: bool = True) -> LoadedGenerator:
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
    return LoadedGenerator(generator, networks.text_encoder, networks.tokenizer, kind, base, prompts, r)
