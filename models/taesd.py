"""TAESD, a tiny autoencoder in the latent space of Stable Diffusion (`AutoencoderTiny`).

It takes the place of the VAE where speed counts more than detail: previews, text to image, and
editing. It has plain convolutions only, without norms or attention. A picture [B, 3, H, W] in
[-1, 1] becomes a latent [B, 4, H/8, W/8] that is already scaled as the U-Net expects it.

Module names are those of a `diffusers` checkpoint. `from_pth` renames the tensors of the original
pair of files.

Source: https://github.com/madebyollin/taesd
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Options of `config.json` for which only this value is supported.
FIXED = dict(
    act_fn="relu",
    upsample_fn="nearest",
    upsampling_scaling_factor=2,
    shift_factor=0.0,
)


@dataclass
class TAESDConfig:
    """The options of an AutoencoderTiny's `config.json`. The defaults are those of TAESD."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    # The range in which other programs store latents as bytes. The networks do not use it.
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5

    def __post_init__(self):
        widths = dict(
            encoder=self.encoder_block_out_channels,
            decoder=self.decoder_block_out_channels,
        )
        blocks = [self.num_encoder_blocks, self.num_decoder_blocks]
        lengths = [len(values) for values in [*widths.values(), *blocks]]
        if len(set(lengths)) > 1 or 0 in lengths:
            raise ValueError(
                f"the tiny autoencoder has widths and numbers of blocks for {lengths} levels:"
                " config.json must have one of each per level, as many in the encoder as in the"
                " decoder"
            )
        for part, values in widths.items():
            if len(set(values)) > 1:
                raise ValueError(
                    f"the tiny autoencoder's {part}_block_out_channels is {list(values)}, but only"
                    " one width for all levels is supported: use a checkpoint of TAESD"
                )


class Block(nn.Module):
    """A residual block that keeps the shape [B, C, h, w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x, inplace=True)


class Encoder(nn.Module):
    """Picture [B, 3, H, W] in [-1, 1] -> latent [B, 4, h, w]."""

    def __init__(self, config: TAESDConfig):
        super().__init__()
        width = config.encoder_block_out_channels[0]

        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, width, 3, padding=1)]
        for level, blocks in enumerate(config.num_encoder_blocks):
            if level > 0:  # [B, C, h, w] -> [B, C, h/2, w/2]
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [Block(width) for _ in range(blocks)]
        layers.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layers[0].weight.dtype)
        return self.layers((x + 1) / 2)


class Decoder(nn.Module):
    """Latent [B, 4, h, w] -> picture [B, 3, H, W], meant to be in [-1, 1] but not clamped."""

    def __init__(self, config: TAESDConfig):
        super().__init__()
        width = config.decoder_block_out_channels[0]

        layers = [
            nn.Conv2d(config.latent_channels, width, 3, padding=1),
            nn.ReLU(inplace=True),
        ]
        for level, blocks in enumerate(config.num_decoder_blocks):
            if level > 0:  # [B, C, h, w] -> [B, C, 2h, 2w]
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
                layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
            layers += [Block(width) for _ in range(blocks)]
        layers.append(nn.Conv2d(width, config.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        z = z.to(self.layers[0].weight.dtype)
        z = 3 * torch.tanh(z / 3)  # outliers of the U-Net are pulled into the range of training
        return 2 * self.layers(z) - 1


class TAESD(nn.Module):
    """The encoder and the decoder, with the methods of `vae.VAE` but without skips."""

    def __init__(self, config: TAESDConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        """The side of a picture over the side of its latent (8 in TAESD)."""
        return 2 ** (len(self.config.num_encoder_blocks) - 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Picture [B, 3, H, W] in [-1, 1] -> mean, log-variance, skips, as in `vae.VAE.encode`.

        H and W must be multiples of `factor`. The mean is the latent [B, 4, H/factor, W/factor]
        itself. Its variance is zero, so the log-variance is -inf. The list of skips is empty.
        """
        z = self.encoder(x)
        return z, torch.full_like(z, -torch.inf), []

    def decode(self, z: Tensor, skips: None = None) -> Tensor:
        """Latent [B, 4, h, w], divided by `config.scaling_factor` -> picture [B, 3, H, W].

        The picture is meant to be in [-1, 1] but is not clamped. ValueError if there are skips.
        """
        if skips is not None:
            raise ValueError(
                "the tiny autoencoder has no skips, but this translator needs those of the VAE:"
                " use the VAE of its base"
            )
        return self.decoder(z)


def from_pth(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, by name, from those of `taesd_encoder.pth` and `taesd_decoder.pth`.

    The original names are "NUMBER.REST". Its decoder counts the tanh at its beginning as layer 0,
    so its numbers are one higher than ours. ValueError for any other name.
    """
    result = {}
    for part, tensors, first in [("encoder", encoder, 0), ("decoder", decoder, 1)]:
        for name, tensor in tensors.items():
            number, _, rest = name.partition(".")
            if not (number.isdecimal() and int(number) >= first and rest):
                raise ValueError(
                    f"the {part} has a tensor {name!r}; expected names such as"
                    f" '{first}.weight': use the file taesd_{part}.pth"
                )
            result[f"{part}.layers.{int(number) - first}.{rest}"] = tensor
    return result
