"""CycleGAN-Turbo: a one-step text-to-image model turned into a one-step translator between two sets of pictures
(unpaired).

Parmar et al. 2024, section 3.3. One U-Net serves both directions, told apart by the caption. Each direction has
adapters and skip convolutions of its own on the VAE, over one frozen VAE in memory. Trained are LoRA on U-Net and
VAE, the U-Net's first convolution and the skip convolutions; with `train="all"`, for small bases, every weight."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.diffusion import Schedule, predict_x0
from models.lora import add_lora
from models.pix2pix_turbo import VAE_TARGETS, add_skip_convs, convolved_skips
from models.unet import UNet
from models.vae import VAE

UNET_PATTERNS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_in", "proj_out", "ff.net.2", "ff.net.0.proj")
DIRECTIONS = ("a2b", "b2a")


@dataclass
class CycleGANTurboConfig:
    """`lora_alpha_unet` None means the rank (scale 1); the VAE's 8 is peft's default (scale 8 / 4 = 2)."""
    lora_rank_unet: int = 128
    lora_rank_vae: int = 4
    lora_alpha_unet: float | None = None
    lora_alpha_vae: float = 8.0
    skips: bool = True
    conv_in: bool = True  # trained in full; official files do not hold it
    train: str = "lora"  # "lora" | "all"
    timestep: int = 999
    prediction_type: str = "epsilon"  # of the base


class CycleGANTurbo(nn.Module):
    """Adapts the given networks in place: they belong to the generator from here on.

    What is to be trained has `requires_grad`, all else has not. `generator` seeds the first LoRA weights."""

    def __init__(self, vae: VAE, unet: UNet, schedule: Schedule, config: CycleGANTurboConfig,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.unet, self.schedule, self.config = unet, schedule, config
        # The second VAE is a second set of modules around the very same Parameter objects, while these are frozen.
        shared = {id(p): p for p in vae.parameters()} if config.train == "lora" else {}
        self.vae_a2b, self.vae_b2a = vae, copy.deepcopy(vae, shared)
        self.requires_grad_(config.train == "all")
        skip_convs = []
        for part in (self.vae_a2b, self.vae_b2a) if config.skips else ():
            add_skip_convs(part)
            skip_convs = [f"skip_conv_{i + 1}" for i in range(len(vae.config.block_out_channels))]
        if config.train == "lora":
            for part in (self.vae_a2b, self.vae_b2a):
                add_lora(part, (*VAE_TARGETS, *skip_convs), config.lora_rank_vae, config.lora_alpha_vae, generator)
            alpha = config.lora_rank_unet if config.lora_alpha_unet is None else config.lora_alpha_unet
            targets = [name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
                       and any(pattern in name for pattern in UNET_PATTERNS)]
            add_lora(unet, targets, config.lora_rank_unet, alpha, generator)
        for name, parameter in self.named_parameters():
            if "skip_conv" in name or (config.conv_in and name.startswith("unet.conv_in.")):
                parameter.requires_grad_(True)

    @property
    def vae(self) -> VAE:
        """One of the two, for what they have in common: configuration and factor."""
        return self.vae_a2b

    def forward(self, x: Tensor, context: Tensor, direction: str, skip_scale: float = 1.0,
                latent_noise: Tensor | None = None) -> Tensor:
        """Picture [B, 3, H, W] in [-1, 1], H and W multiples of the VAE's factor, and the context [B, N, C] of the
        caption of where it goes ("a2b": b's) -> picture [B, 3, H, W] in [-1, 1]. `latent_noise` [B, 4, h, w] draws the
        latent from the encoder's distribution; without it the latent is the mean."""
        if direction not in DIRECTIONS:
            raise ValueError(f"the direction is {direction!r}; expected {' or '.join(DIRECTIONS)}")
        vae, t = {"a2b": self.vae_a2b, "b2a": self.vae_b2a}[direction], self.config.timestep
        mean, logvar, skips = vae.encode(x)
        z = mean if latent_noise is None else mean + (0.5 * logvar).exp() * latent_noise
        z = z * vae.config.scaling_factor
        z = predict_x0(self.unet(z, t, context), z, t, self.schedule, self.config.prediction_type)
        skips = convolved_skips(vae, skips, skip_scale) if self.config.skips else None
        return vae.decode(z / vae.config.scaling_factor, skips).clamp(-1, 1)


def from_official(saved: dict, path: object) -> tuple[CycleGANTurboConfig, dict[str, Tensor]]:
    """The contents of an official `.pkl` -> our configuration and the trained tensors under our names. Its `conv_in`
    was trained and is not in it. Source: the img2img-turbo repository's `train_cyclegan_turbo.py`."""
    known = {"rank_unet", "rank_vae", "sd_encoder", "sd_decoder", "sd_other", "sd_vae_enc", "sd_vae_dec"}
    if not isinstance(saved, dict) or not known <= saved.keys():
        found = ", ".join(map(str, saved))[:100] if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path} holds {found}; expected a CycleGAN-Turbo file with {', '.join(sorted(known))}")
    adapters = saved["sd_encoder"] | saved["sd_decoder"] | saved["sd_other"]
    tensors = {f"unet.{name}": tensor for name, tensor in adapters.items()}
    for name, tensor in {**saved["sd_vae_enc"], **saved["sd_vae_dec"]}.items():
        if "lora" in name or "skip" in name:  # the rest is the base's own
            part, _, name = name.partition(".")
            name = name.replace(".vae_skip.weight", ".weight").replace(".base_layer.", ".")
            tensors[f"{'vae_a2b' if part == 'vae' else part}.{name}"] = tensor
    return CycleGANTurboConfig(saved["rank_unet"], saved["rank_vae"], conv_in=False), tensors
