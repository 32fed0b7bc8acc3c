"""CycleGAN-Turbo: a one-step text-to-image model that translates between two sets of pictures.

It is trained without pairs. One U-Net serves both directions, and the caption tells them apart.
Each direction has a VAE with its own adapters and skip convolutions; the frozen weights of both
VAEs are the same in memory. What is trained: LoRA on the U-Net and the VAEs, the U-Net's first
convolution and the skip convolutions; or every weight, with `train="all"`, for small bases.

Source: Parmar et al. 2024, "One-Step Image Translation with Text-to-Image Models", section 3.3.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.diffusion import Schedule, predict_x0
from models.lora import add_lora
from models.pix2pix_turbo import (
    VAE_TARGETS,
    add_skip_convs,
    check_official,
    check_timestep,
    check_vae,
    convolved_skips,
    skip_conv_names,
)
from models.unet import UNet
from models.vae import VAE

# Layers of the U-Net with LoRA: those whose names contain one of these.
UNET_PATTERNS = (
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "proj_in",
    "proj_out",
    "ff.net.2",
    "ff.net.0.proj",
)

DIRECTIONS = ("a2b", "b2a")


@dataclass
class CycleGANTurboConfig:
    """lora_alpha_vae 8 is peft's default: scale 8/4 in the VAEs."""
    lora_rank_unet: int = 128
    lora_rank_vae: int = 4
    lora_alpha_unet: float | None = None  # None: the rank, so that the scale is 1
    lora_alpha_vae: float = 8.0
    skips: bool = True
    conv_in: bool = True  # the U-Net's first convolution is trained in full
    train: str = "lora"  # "lora" | "all"
    timestep: int = 999
    prediction_type: str = "epsilon"  # of the base


class CycleGANTurbo(nn.Module):
    """The generator. It changes the given networks in place: they belong to it from now on.

    Exactly the parameters to be trained have `requires_grad`. `rng` draws the initial LoRA weights.
    ValueError for a VAE or a timestep that does not suit.
    """

    def __init__(
        self,
        vae: VAE,
        unet: UNet,
        schedule: Schedule,
        config: CycleGANTurboConfig,
        rng: torch.Generator | None = None,
    ):
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.config = config
        check_vae(vae)
        check_timestep(config.timestep, schedule, config.prediction_type)

        # While the VAE is frozen, the copy has modules of its own around the same Parameters.
        shared = {}
        if config.train == "lora":
            shared = {id(p): p for p in vae.parameters()}
        self.vae_a2b = vae
        self.vae_b2a = copy.deepcopy(vae, shared)

        self.requires_grad_(config.train == "all")
        if config.skips:
            add_skip_convs(self.vae_a2b)
            add_skip_convs(self.vae_b2a)
        if config.train == "lora":
            self._add_lora(rng)

        # Beside their LoRA, these convolutions are trained in full.
        for name, parameter in self.named_parameters():
            if "skip_conv" in name or (config.conv_in and name.startswith("unet.conv_in.")):
                parameter.requires_grad_(True)

    def _add_lora(self, rng: torch.Generator | None) -> None:
        config = self.config
        vae_targets = list(VAE_TARGETS)
        if config.skips:
            vae_targets += skip_conv_names(self.vae)
        for vae in (self.vae_a2b, self.vae_b2a):
            add_lora(vae, vae_targets, config.lora_rank_vae, config.lora_alpha_vae, rng)

        unet_targets = []
        for name, layer in self.unet.named_modules():
            matches = any(pattern in name for pattern in UNET_PATTERNS)
            if matches and isinstance(layer, nn.Linear | nn.Conv2d):
                unet_targets.append(name)
        alpha = config.lora_alpha_unet
        if alpha is None:
            alpha = config.lora_rank_unet
        add_lora(self.unet, unet_targets, config.lora_rank_unet, alpha, rng)

    @property
    def vae(self) -> VAE:
        """One of the two VAEs, for what they have in common: configuration and factor."""
        return self.vae_a2b

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        direction: str,
        skip_scale: float = 1.0,
        latent_noise: Tensor | None = None,
    ) -> Tensor:
        """Picture [B, 3, H, W] in [-1, 1], context [B, N, C] -> picture [B, 3, H, W] in [-1, 1].

        H and W are multiples of the VAE's factor. The context is that of the caption of the set
        that the picture is translated to: b's for "a2b". `skip_scale` is gamma.

        With latent_noise [B, 4, h, w] the latent is a sample of the encoder's distribution,
        without it the mean.
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"the direction is {direction!r}; expected {' or '.join(DIRECTIONS)}")
        vae = self.vae_a2b if direction == "a2b" else self.vae_b2a
        t = self.config.timestep
        scaling = vae.config.scaling_factor

        mean, logvar, skips = vae.encode(x)
        z = mean  # [B, 4, h, w]
        if latent_noise is not None:
            z = mean + (0.5 * logvar).exp() * latent_noise
        z = z * scaling

        prediction = self.unet(z, t, context)
        z = predict_x0(prediction, z, t, self.schedule, self.config.prediction_type)
        skips = convolved_skips(vae, skips, skip_scale) if self.config.skips else None
        return vae.decode(z / scaling, skips).clamp(-1, 1)


def from_official(saved: dict, path: object) -> tuple[CycleGANTurboConfig, dict[str, Tensor]]:
    """An official `.pkl` file's contents -> our configuration, and the tensors by our names.

    The official trainer trains `conv_in` but does not save it, so that it is not among them.
    Source: img2img-turbo's `train_cyclegan_turbo.py`. ValueError if it is another file.
    """
    keys = {
        "rank_unet",
        "rank_vae",
        "sd_encoder",
        "sd_decoder",
        "sd_other",
        "sd_vae_enc",
        "sd_vae_dec",
    }
    check_official(saved, keys, "CycleGAN-Turbo", path)

    tensors = {}
    for adapters in (saved["sd_encoder"], saved["sd_decoder"], saved["sd_other"]):
        for name, tensor in adapters.items():
            tensors[f"unet.{name}"] = tensor
    for half in (saved["sd_vae_enc"], saved["sd_vae_dec"]):
        for name, tensor in half.items():
            if "lora" not in name and "skip" not in name:
                continue  # the base's own, which we have
            part, _, name = name.partition(".")
            part = "vae_a2b" if part == "vae" else part
            name = name.replace(".vae_skip.weight", ".weight")
            name = name.replace(".base_layer.", ".")
            tensors[f"{part}.{name}"] = tensor

    config = CycleGANTurboConfig(
        lora_rank_unet=saved["rank_unet"],
        lora_rank_vae=saved["rank_vae"],
        conv_in=False,
    )
    return config, tensors
