"""From a batch of pictures, captions or a cache to what a latent model trains on: clean latents x0 and contexts of the
captions. The networks that do it are frozen."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from models import diffusion
from models.weights import Base, fingerprint


def check_data(items: Dataset, where: str, base: Base, base_name: str, teacher: str | None, other_captions: str | bool
               ) -> None:
    """Refuses a data set that the base cannot train on, or not in this way."""
    pictures, facts = {"target", "mean"} & items[0].keys(), getattr(items, "facts", {})
    if not pictures and not teacher:
        raise ValueError(f"{where} holds captions alone; expected --teacher, a one-step base that draws their pictures"
                         " (sd-turbo), or pictures")
    if pictures and teacher:
        raise ValueError(f"{where} holds pictures; leave --teacher out")
    if facts and other_captions:
        raise ValueError(f"{where} holds captions that are encoded already; leave --validation_prompts and"
                         " --unconditional out")
    for part in ("vae", "text_encoder") if facts.get("dtype") == "float32" else ("vae",) if facts else ():
        network = getattr(base, part)  # the VAE is of float32 whatever the cache's type
        if network and facts[part] != fingerprint(network):
            raise ValueError(f"{where} is a cache of {facts['base']}, whose {part} is not that of {base_name} here;"
                             " make a cache of this base")


def latent_size(sides: tuple[int, int], factor: int) -> list[int]:
    """[h, w] of the latent of a picture of [H, W]; ValueError where it has no whole one."""
    if any(side % factor for side in sides):
        raise ValueError(f"pictures of {sides[1]}x{sides[0]} pixels; expected sides that are multiples of {factor}:"
                         " choose another --resolution or --train_image_prep")
    return [side // factor for side in sides]


def latent_shape(base: Base, item: dict, resolution: int) -> tuple[int, ...]:
    """[C, h, w] of the latent of a data set's item, of captions of a picture of that resolution; of points [2]."""
    if "mean" in item:
        return item["mean"].shape
    sides = item["target"].shape[1:] if "target" in item else (resolution, resolution)
    return base.denoiser.config.in_channels, *latent_size(sides, base.vae.factor)


def one_step(base: Base, captions: list[str], noise: Tensor) -> Tensor:
    """The latents [B, C, h, w] that a one-step base makes of noise."""
    schedule, t = base.schedule, len(base.schedule.alpha) - 1
    x = diffusion.start(noise, t, schedule)
    return diffusion.predict_x0(base.denoiser(x, t, *base.encode(captions)), x, t, schedule, schedule.prediction_type)


def remembering(base: Base, autocast: torch.autocast) -> Callable[[list[str]], list[Tensor]]:
    """base.encode, which is asked once for a caption and keeps what it says of 2,000."""

    @functools.lru_cache(maxsize=2000)
    def encoded(caption: str) -> list[Tensor]:
        with torch.no_grad(), autocast:
            return [c[0].cpu() for c in base.encode([caption])]

    return lambda captions: [torch.stack(c) for c in zip(*map(encoded, captions))]


@dataclass
class Reader:
    """read(batch, rows, noise) -> x0 [B, *shape], the denoiser's contexts, and the critic's context; in the type and on
    the device of the noise [B, *shape], which places x0 in the encoder's spread, or is what a teacher begins from."""
    base: Base
    critic: Base  # whose U-Net looks at latents; the base itself where that has one
    teacher: Base | None  # the one-step base that draws the pictures of captions alone
    shape: tuple[int, ...]  # of every latent
    unconditional: bool  # to all but the teacher captions are empty
    autocast: torch.autocast

    def __post_init__(self):
        self.encode = remembering(self.base, self.autocast)
        self.encode_for_critic = remembering(self.critic, self.autocast)

    def __call__(self, batch: dict, rows: slice, noise: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        texts = batch["caption"][rows]
        captions = [""] * len(texts) if self.unconditional else texts
        cached = [batch[name][rows] for name in ("context_0", "context_1") if name in batch]
        contexts = [c.to(noise) for c in cached or self.encode(captions)]
        seen = contexts[0] if self.critic is self.base else self.encode_for_critic(captions)[0].to(noise)
        if "mean" in batch:
            return batch["mean"][rows].to(noise) + batch["std"][rows].to(noise) * noise, contexts, seen
        with torch.no_grad(), self.autocast:
            if self.teacher:
                return one_step(self.teacher, texts, noise).to(noise), contexts, seen
            pictures = batch["target"][rows].to(noise)
            if pictures.shape[2:] != tuple(side * self.base.vae.factor for side in self.shape[1:]):
                raise ValueError(f"'{batch['name'][rows][0]}' is not of the size of the first training picture,"
                                 " expected one size for all: choose --train_image_prep and --test_image_prep for it")
            mean, logvar, _ = self.base.vae.encode(pictures)
            x0 = mean.to(noise) + (0.5 * logvar.to(noise)).exp() * noise
            return x0 * self.base.vae.config.scaling_factor, contexts, seen
