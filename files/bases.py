"""Bases: folders in the diffusers layout and one-file models, and what is put on them."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from files.formats import apply_lora, clip_from_original, read_lora, unet_from_original, vae_from_original
from files.hub import BASES, LAYOUT, find, locate
from files.tensors import build, fill, read_config, read_json, read_tensors, read_weights, reading, save_tensors
from files.tokenizers import load_t5_tokenizer, load_tokenizer
from models import clip, controlnet, pixart, t5, unet, vae
from models.diffusion import Schedule

# The last two are a transformer alone. The scheduler that comes with the rest, PixArt's, is another's in this:
YOSO = dict(_class_name="LCMScheduler", prediction_type="v_prediction")
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
ONE_FILE = "a one-file checkpoint of Stable Diffusion 1.x or 2.x (model.diffusion_model..., first_stage_model...)"

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


def is_one_file(name: str) -> bool:
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
    is_pixart = not is_one_file(name) and "transformer" in read_index(name)
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
    if is_one_file(name):
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
    for part, module in dict(vae=vae_from_original, unet=unet_from_original, text_encoder=clip_from_original).items():
        if part in parts:
            place = find(family, [f"{part}/config.json"], LAYOUT)
            network = build(*read_network(part, place), place)
            with reading(path, ONE_FILE):
                own = module(tensors, network.config)
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


def save_folder(folder: Path, base: Base, dtype: torch.dtype | None = None, rest: str | None = None) -> None:
    """Writes what there is of a base back in the Stable Diffusion layout, which `diffusers` reads too. With the name of
    the base that the `rest` is of, no more than denoiser and schedule are written, unless that has no weights."""
    index = {}
    if rest and not base.random:
        base = Base(base.name, unet=base.unet, transformer=base.transformer, schedule=base.schedule)
        rest = str(Path(rest).resolve()) if rest not in BASES and Path(rest).exists() else rest
        index["rest"] = rest if is_one_file(rest) else read_index(rest).get("rest", rest)
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
