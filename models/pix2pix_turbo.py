"""pix2pix-Turbo: a one-step text-to-image model that translates pictures, trained on pairs.

    VAE encoder -> U-Net at one timestep, the last -> VAE decoder

The latent of the condition takes the place of the noise, and skip connections from encoder to
decoder, one for each block of the decoder, carry the detail that the latent loses. What is trained:
LoRA on the U-Net and the VAE, the U-Net's first convolution and the skip convolutions; or every
weight, with `train="all"`, for small bases.

Source: Parmar et al. 2024, "One-Step Image Translation with Text-to-Image Models", section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.diffusion import Schedule, check_prediction, predict_x0
from models.lora import TwinConv2d, add_lora, replace
from models.unet import UNet
from models.vae import VAE

# Layers with LoRA: those whose names are, or end in, one of these.
UNET_TARGETS = (
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv_out",
    "proj_in",
    "proj_out",
    "ff.net.2",
    "ff.net.0.proj",
)
VAE_TARGETS = (
    "conv1",
    "conv2",
    "conv_in",
    "conv_shortcut",
    "conv",
    "conv_out",
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
)


@dataclass
class Pix2PixTurboConfig:
    """lora_alpha 8 is peft's default for every rank: scale 8/8 in the U-Net, 8/4 in the VAE."""
    lora_rank_unet: int = 8
    lora_rank_vae: int = 4
    lora_alpha: float = 8.0
    stochastic: bool = False  # takes r and a noise map, with which pictures vary
    skips: bool = True
    conv_in: bool = True  # the U-Net's first convolution is trained in full
    train: str = "lora"  # "lora" | "all"
    timestep: int = 999
    prediction_type: str = "epsilon"  # of the base
    unet_targets: tuple[str, ...] = UNET_TARGETS
    vae_targets: tuple[str, ...] = VAE_TARGETS


# -------------------- skip connections

def skip_conv_names(vae: VAE) -> list[str]:
    """Names of the skip convolutions in the decoder, one for each of its blocks."""
    return [f"skip_conv_{i + 1}" for i in range(len(vae.config.block_out_channels))]


def add_skip_convs(vae: VAE) -> None:
    """Adds the 1x1 convolutions `skip_conv_1`, `skip_conv_2`, ... to the VAE's decoder.

    Convolution i leads from the input of an encoder block to the input of the decoder's block i,
    the deepest encoder block first. All weights begin at 1e-5: almost nothing at first, but not
    zero, so that gradients reach both sides.
    """
    widths = vae.config.block_out_channels
    encoder_widths = [widths[0], *widths[:-1]]  # of the inputs of the encoder's blocks
    decoder_widths = [widths[-1], *widths[:0:-1]]  # of the inputs of the decoder's blocks
    weight = vae.decoder.conv_in.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    pairs = zip(reversed(encoder_widths), decoder_widths)
    for name, (c_in, c_out) in zip(skip_conv_names(vae), pairs):
        conv = nn.Conv2d(c_in, c_out, 1, bias=False, device=weight.device, dtype=dtype)
        if not weight.is_meta:
            nn.init.constant_(conv.weight, 1e-5)
        setattr(vae.decoder, name, conv)


def convolved_skips(vae: VAE, skips: list[Tensor], skip_scale: float) -> list[Tensor]:
    """The encoder's skips, times gamma (`skip_scale`) and convolved, for the decoder's blocks.

    `skips` come first to last, as the encoder returns them; the result is deepest first.
    """
    result = []
    for name, skip in zip(skip_conv_names(vae), reversed(skips)):
        if skip_scale != 1:
            skip = skip * skip_scale
        result.append(getattr(vae.decoder, name)(skip))
    return result


# -------------------- generator

def check_vae(vae: nn.Module) -> None:
    """ValueError unless the autoencoder is a VAE: skips and adapters belong to its blocks."""
    if not isinstance(vae, VAE):
        raise ValueError(
            f"the base's autoencoder is {type(vae).__name__}; a translator needs a base with"
            " AutoencoderKL, as sd-turbo and tiny-turbo have"
        )


def check_timestep(timestep: int, schedule: Schedule, prediction_type: str) -> None:
    """ValueError unless the schedule has this timestep, and a prediction there tells x0."""
    last = len(schedule.alpha) - 1
    if not 0 <= timestep <= last:
        raise ValueError(f"the timestep is {timestep}; expected 0 to {last}, the base's last")
    check_prediction(prediction_type, timestep, schedule)


class Pix2PixTurbo(nn.Module):
    """The generator. It changes the given networks in place: they belong to it from now on.

    Exactly the parameters to be trained have `requires_grad`. `rng` draws the initial LoRA weights.
    ValueError for a VAE or a timestep that does not suit.
    """

    def __init__(
        self,
        vae: VAE,
        unet: UNet,
        schedule: Schedule,
        config: Pix2PixTurboConfig,
        rng: torch.Generator | None = None,
    ):
        super().__init__()
        self.vae = vae
        self.unet = unet
        self.schedule = schedule
        self.config = config
        check_vae(vae)
        check_timestep(config.timestep, schedule, config.prediction_type)
        if config.stochastic and config.timestep != len(schedule.alpha) - 1:
            raise ValueError(
                f"the timestep of a stochastic model is {config.timestep}; expected the last,"
                f" {len(schedule.alpha) - 1}, because at r = 0 it starts from pure noise"
            )

        self.requires_grad_(config.train == "all")
        if config.skips:
            add_skip_convs(vae)
        if config.train == "lora":
            vae_targets = list(config.vae_targets)
            if config.skips:
                vae_targets += skip_conv_names(vae)
            add_lora(vae, vae_targets, config.lora_rank_vae, config.lora_alpha, rng)
            add_lora(unet, config.unet_targets, config.lora_rank_unet, config.lora_alpha, rng)
        if config.stochastic:
            replace(unet, "conv_in", TwinConv2d(unet.conv_in))
        self.train_in_full()

    def train_in_full(self) -> None:
        """Trains all weights of conv_in, and those of the skip convolutions beside their LoRA."""
        for name, parameter in self.vae.named_parameters():
            if "skip_conv" in name:
                parameter.requires_grad_(True)
        if self.config.conv_in:
            self.unet.conv_in.requires_grad_(True)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        r: float | None = None,
        noise: Tensor | None = None,
        skip_scale: float = 1.0,
        latent_noise: Tensor | None = None,
    ) -> Tensor:
        """Condition [B, 3, H, W] in [0, 1], context [B, N, C] -> picture [B, 3, H, W] in [-1, 1].

        The condition goes into the encoder as it is, as in the official code. (CycleGANTurbo takes
        pictures in [-1, 1].) H and W are multiples of the VAE's factor. `skip_scale` is gamma.

        Stochastic models take r in [0, 1] and noise [B, 4, h, w]. At r = 1 the picture follows the
        condition. At r = 0 and with `train="lora"` it is what the base makes of the noise. The
        adapters' strength is not set here: call `lora.set_scale(self, r)` first.

        With latent_noise [B, 4, h, w] the latent is a sample of the encoder's distribution,
        without it the mean.
        """
        t = self.config.timestep
        scaling = self.vae.config.scaling_factor

        mean, logvar, skips = self.vae.encode(x)
        z = mean  # [B, 4, h, w]
        if latent_noise is not None:
            z = mean + (0.5 * logvar).exp() * latent_noise
        z = z * scaling
        if r is not None:
            z = r * z + (1 - r) * noise
            skip_scale = skip_scale * r

        prediction = self.unet(z, t, context)
        z = predict_x0(prediction, z, t, self.schedule, self.config.prediction_type)
        skips = convolved_skips(self.vae, skips, skip_scale) if self.config.skips else None
        return self.vae.decode(z / scaling, skips).clamp(-1, 1)


# -------------------- official files

def check_official(saved: object, keys: set[str], kind: str, path: object) -> None:
    """ValueError unless an official `.pkl` holds a dictionary with these keys."""
    if isinstance(saved, dict) and keys <= saved.keys():
        return
    found = type(saved).__name__
    if isinstance(saved, dict):
        found = ", ".join(map(str, saved))[:100]
    raise ValueError(f"{path} holds {found}; expected a {kind} file with {', '.join(sorted(keys))}")


def from_official(saved: dict, path: object) -> tuple[Pix2PixTurboConfig, dict[str, Tensor]]:
    """An official `.pkl` file's contents -> our configuration, and the tensors by our names.

    Source: `save_model` of img2img-turbo's `pix2pix_turbo.py`. ValueError if it is another file.
    """
    keys = {
        "unet_lora_target_modules",
        "vae_lora_target_modules",
        "rank_unet",
        "rank_vae",
        "state_dict_unet",
        "state_dict_vae",
    }
    check_official(saved, keys, "pix2pix-Turbo", path)

    tensors = {}
    for part, adapter in [("unet", "default"), ("vae", "vae_skip")]:
        for name, tensor in saved[f"state_dict_{part}"].items():
            name = name.replace(f".{adapter}.weight", ".weight")
            name = name.replace(".base_layer.", ".")
            name = name.replace("conv_in_curr.", "")
            # The frozen half of `TwinConv2d`, which need not be the base's own.
            if "conv_in_pretrained." in name:
                name = name.replace("conv_in_pretrained.", "") + "0"
            tensors[f"{part}.{name}"] = tensor

    original = [half for half in ("weight", "bias") if f"unet.conv_in.{half}0" in tensors]
    if len(original) == 1:
        raise ValueError(
            f"{path} is incomplete: of conv_in_pretrained it holds the {original[0]} alone;"
            " expected weight and bias"
        )

    config = Pix2PixTurboConfig(
        lora_rank_unet=saved["rank_unet"],
        lora_rank_vae=saved["rank_vae"],
        stochastic="conv_in.conv_in_curr.weight" in saved["state_dict_unet"],
        unet_targets=tuple(saved["unet_lora_target_modules"]),
        vae_targets=tuple(saved["vae_lora_target_modules"]),
    )
    return config, tensors
