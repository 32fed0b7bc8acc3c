"""pix2pix-Turbo: a one-step text-to-image model turned into a one-step translator of pictures (paired).

Parmar et al. 2024, section 3. The condition goes in where the noise did: VAE encoder -> U-Net at the last timestep ->
VAE decoder, with four skips from encoder to decoder that carry detail past the latent. Trained are LoRA on the U-Net
and VAE, the U-Net's first convolution and the skip convolutions; with `train="all"`, for small bases, every weight."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.diffusion import Schedule, predict_x0
from models.lora import TwinConv2d, add_lora, replace
from models.unet import UNet
from models.vae import VAE

UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_out", "proj_in",
                "proj_out", "ff.net.2", "ff.net.0.proj")
VAE_TARGETS = ("conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0")


@dataclass
class Pix2PixTurboConfig:
    """lora_alpha 8 is peft's default whatever the rank: scale 8 / 8 = 1 in the U-Net, 8 / 4 = 2 in the VAE."""
    lora_rank_unet: int = 8
    lora_rank_vae: int = 4
    lora_alpha: float = 8.0
    stochastic: bool = False  # r, the noise map and the twin conv_in
    conv_in: bool = True  # trained in full
    train: str = "lora"  # "lora" | "all"
    timestep: int = 999
    prediction_type: str = "epsilon"  # of the base
    unet_targets: tuple[str, ...] = UNET_TARGETS
    vae_targets: tuple[str, ...] = VAE_TARGETS


def add_skip_convs(vae: VAE) -> None:
    """`vae.decoder.skip_conv_1` ... `_n`: 1x1, from the width entering down block n + 1 - i to the width entering up
    block i, all weights 1e-5: nearly nothing at first, and yet with a gradient for both sides."""
    widths = vae.config.block_out_channels
    enters_down = [widths[0], *widths[:-1]]
    enters_up = [widths[-1], *widths[:0:-1]]
    weight = vae.decoder.conv_in.weight
    fine = torch.promote_types(weight.dtype, torch.float32)
    for i, (c_in, c_out) in enumerate(zip(reversed(enters_down), enters_up), start=1):
        conv = nn.Conv2d(c_in, c_out, 1, bias=False, device=weight.device, dtype=fine)
        if not weight.is_meta:
            nn.init.constant_(conv.weight, 1e-5)
        setattr(vae.decoder, f"skip_conv_{i}", conv)


def convolved_skips(vae: VAE, skips: list[Tensor], skip_scale: float) -> list[Tensor]:
    """The encoder's skips, first to last, as the decoder wants them: deepest first, times gamma, convolved."""
    convs = [getattr(vae.decoder, f"skip_conv_{i}") for i in range(1, len(skips) + 1)]
    return [conv(skip if skip_scale == 1 else skip * skip_scale) for conv, skip in zip(convs, reversed(skips))]


class Pix2PixTurbo(nn.Module):
    """Adapts the given networks in place: they belong to the generator from here on.

    What is to be trained has `requires_grad`, all else has not. `generator` seeds the first LoRA weights."""

    def __init__(self, vae: VAE, unet: UNet, schedule: Schedule, config: Pix2PixTurboConfig,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.vae, self.unet, self.schedule, self.config = vae, unet, schedule, config
        self.requires_grad_(config.train == "all")
        add_skip_convs(vae)
        if config.train == "lora":
            skip_convs = tuple(f"skip_conv_{i}" for i in range(1, len(vae.config.block_out_channels) + 1))
            add_lora(vae, (*config.vae_targets, *skip_convs), config.lora_rank_vae, config.lora_alpha, generator)
            add_lora(unet, config.unet_targets, config.lora_rank_unet, config.lora_alpha, generator)
        if config.stochastic:
            replace(unet, "conv_in", TwinConv2d(unet.conv_in))
        for name, parameter in vae.named_parameters():
            if "skip_conv" in name:
                parameter.requires_grad_(True)
        if config.conv_in:
            unet.conv_in.requires_grad_(True)

    def forward(self, x: Tensor, context: Tensor, r: float | None = None, noise: Tensor | None = None,
                skip_scale: float = 1.0, latent_noise: Tensor | None = None) -> Tensor:
        """Condition [B, 3, H, W] in [0, 1], H and W multiples of the VAE's factor, context [B, N, C] -> picture
        [B, 3, H, W] in [-1, 1].

        Stochastic models take r in [0, 1] and a noise map [B, 4, h, w]: 1 follows the condition, 0 is the base's own
        picture of the noise. The adapters' strength is not forward's business: `lora.set_scale(self, r)` comes before
        it. `latent_noise` [B, 4, h, w] draws the latent from the encoder's distribution; without it, the mean."""
        t, scaling = self.config.timestep, self.vae.config.scaling_factor
        mean, logvar, skips = self.vae.encode(x)
        z = mean if latent_noise is None else mean + (0.5 * logvar).exp() * latent_noise
        z = z * scaling
        if r is not None:
            z = r * z + (1 - r) * noise
            skip_scale = skip_scale * r
        z = predict_x0(self.unet(z, t, context), z, t, self.schedule, self.config.prediction_type)
        skips = convolved_skips(self.vae, skips, skip_scale)
        return self.vae.decode(z / scaling, skips).clamp(-1, 1)


def from_official(saved: dict, path: object) -> tuple[Pix2PixTurboConfig, dict[str, Tensor]]:
    """An official `.pkl`'s contents (img2img-turbo's `save_model`) -> our configuration and tensors, by our names."""
    known = {"unet_lora_target_modules", "vae_lora_target_modules", "rank_unet", "rank_vae", "state_dict_unet",
             "state_dict_vae"}
    if not isinstance(saved, dict) or not known <= saved.keys():
        found = ", ".join(map(str, saved))[:100] if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path} holds {found}; expected a pix2pix-Turbo file with {', '.join(sorted(known))}")
    tensors = {}
    for part, adapter in [("unet", "default"), ("vae", "vae_skip")]:
        for name, tensor in saved[f"state_dict_{part}"].items():
            name = name.replace(f".{adapter}.weight", ".weight").replace(".base_layer.", ".")
            name = name.replace("conv_in_curr.", "")
            if "conv_in_pretrained" not in name:  # the base's own, which we have
                tensors[f"{part}.{name}"] = tensor
    stochastic = "conv_in.conv_in_curr.weight" in saved["state_dict_unet"]
    return Pix2PixTurboConfig(saved["rank_unet"], saved["rank_vae"], stochastic=stochastic,
                              unet_targets=tuple(saved["unet_lora_target_modules"]),
                              vae_targets=tuple(saved["vae_lora_target_modules"])), tensors
