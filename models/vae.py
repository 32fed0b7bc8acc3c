"""The Stable Diffusion autoencoder (`AutoencoderKL`), with the skips of the one-step translators as arguments.

A picture [B, 3, H, W] in [-1, 1] becomes a latent [B, 4, H/8, W/8] and back (the factor follows from the
configuration). Module names are those of the `vae/` folder of a `diffusers` checkpoint, so its state dictionary loads
as it is. Source: Rombach et al. 2022; the skips: Parmar et al. 2024, "One-Step Image Translation with Text-to-Image
Models", 3.2."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Options of `vae/config.json` that other autoencoders use and this file does not build: each must have this value.
FIXED = dict(act_fn="silu", shift_factor=None, latents_mean=None, latents_std=None, use_quant_conv=True,
             use_post_quant_conv=True, mid_block_add_attention=True)


@dataclass
class VAEConfig:
    """Defaults are those of Stable Diffusion."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4

    def __post_init__(self):
        n = len(self.block_out_channels)
        if set(self.down_block_types) != {"DownEncoderBlock2D"} or set(self.up_block_types) != {"UpDecoderBlock2D"}:
            raise ValueError(f"the VAE's blocks are {[*self.down_block_types, *self.up_block_types]};"
                             " built here are DownEncoderBlock2D and UpDecoderBlock2D: take a Stable Diffusion VAE")
        if len(self.down_block_types) != n or len(self.up_block_types) != n:
            raise ValueError(f"the VAE has {n} widths in block_out_channels, but {len(self.down_block_types)} down and"
                             f" {len(self.up_block_types)} up blocks: config.json must name one block a width")


class GroupNorm(nn.GroupNorm):
    """Under autocast, too, in its input's type. Autocast on a GPU would go through float32, and keep twice the memory
    for the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ResBlock(nn.Module):
    """[B, c_in, h, w] -> [B, c_out, h, w]."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list, because the checkpoint's name is to_out.0

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (f(h).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))  # [B, 1, HW, C]
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class MidBlock(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(c, groups)])
        self.resnets = nn.ModuleList([ResBlock(c, c, groups), ResBlock(c, c, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only: the original's asymmetric padding


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """A level of the encoder, halving height and width where `down`."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, down: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """A level of the decoder, doubling height and width where `up`."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, up: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


def run(block: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """Checkpointed, a block keeps only its input for the backward pass and is computed again there."""
    return checkpoint(block, x, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else block(x)


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] -> moments [B, 2 C, h, w], and the inputs of the down blocks as skips."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, n = c.block_out_channels, len(c.block_out_channels)
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            DownBlock(widths[max(i - 1, 0)], widths[i], c.layers_per_block, c.norm_num_groups, down=i < n - 1)
            for i in range(n)
        ])
        self.mid_block = MidBlock(widths[-1], c.norm_num_groups)
        self.conv_norm_out = GroupNorm(c.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)
        self.checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, skips = self.conv_in(x.to(self.conv_in.weight.dtype)), []
        for block in self.down_blocks:
            skips.append(x)
            x = run(block, x, self.checkpointing)
        x = run(self.mid_block, x, self.checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x))), skips


class Decoder(nn.Module):
    """Latents [B, C, h, w] -> pictures [B, 3, H, W]."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        widths, n = c.block_out_channels[::-1], len(c.block_out_channels)
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList([
            UpBlock(widths[max(i - 1, 0)], widths[i], c.layers_per_block + 1, c.norm_num_groups, up=i < n - 1)
            for i in range(n)
        ])
        self.mid_block = MidBlock(widths[0], c.norm_num_groups)
        self.conv_norm_out = GroupNorm(c.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)
        self.checkpointing = False

    def forward(self, z: Tensor, skips: list[Tensor] | None = None) -> Tensor:
        x = self.conv_in(z)
        x = run(self.mid_block, x, self.checkpointing)
        for i, block in enumerate(self.up_blocks):
            if skips is not None:
                x = x + skips[i]
            x = run(block, x, self.checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Module names are those of `diffusers`' `AutoencoderKL`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """How many pixels a side one latent stands for (8 in Stable Diffusion)."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Picture [B, 3, H, W] in [-1, 1], H and W multiples of the factor -> mean and log-variance
        [B, 4, H/factor, W/factor], not yet times `config.scaling_factor`, and the skips: the input of each down block,
        first (full size) to last."""
        h, skips = self.encoder(x)
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0), skips

    def decode(self, z: Tensor, skips: list[Tensor] | None = None) -> Tensor:
        """Latent [B, 4, h, w], already divided by `config.scaling_factor` -> picture [B, 3, H, W] around [-1, 1], not
        clamped. `skips`, one an up block in their order, already convolved to its width, are added to its input."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)), skips)


def tiled(network: Callable[..., Tensor], inputs: Sequence[Tensor], size: tuple[int, int], tile: int) -> Tensor:
    """network(*inputs), by squares of `tile` latents a side where `size`, (h, w) in latents, is more: for pictures
    beyond memory. Inputs and result [B, C, H, W] are latents or pictures. The squares overlap by a quarter at least,
    and fade into each other linearly; none sees beyond its own edge."""
    (h, w), overlap, total = size, max(tile // 4, 1), None
    if max(h, w) <= tile:
        return network(*inputs)

    def cut(x: Tensor, top: int, left: int) -> Tensor:
        scale = x.shape[-1] // w
        return x[..., scale * top:scale * (top + tile), scale * left:scale * (left + tile)]

    def starts(side: int) -> list[int]:
        last = max(side - tile, 0)
        n = -(-last // (tile - overlap))
        return [last * i // max(n, 1) for i in range(n + 1)]

    for top, left in itertools.product(starts(h), starts(w)):
        part = network(*(cut(x, top, left) for x in inputs))
        scale = part.shape[-1] // min(tile, w)
        if total is None:
            fine = dict(device=part.device, dtype=torch.promote_types(part.dtype, torch.float32))
            total, weight = (torch.zeros(*n, scale * h, scale * w, **fine) for n in (part.shape[:2], (1, 1)))
        rows, columns = (torch.arange(1, n + 1, **fine) for n in part.shape[-2:])
        rows, columns = (torch.minimum(i, i.flip(0)).clamp(max=scale * overlap) for i in (rows, columns))
        cut(total, top, left).add_(part * rows[:, None] * columns)
        cut(weight, top, left).add_(rows[:, None] * columns)
    return total / weight


@dataclass
class IdentityConfig:
    scaling_factor: float = 1.0
    sample_size: int = 32


class Identity(nn.Module):
    """In place of a VAE where a model works on pictures, or points, themselves: the latent is x."""

    factor = 1

    def __init__(self, config: IdentityConfig):
        super().__init__()
        self.config = config

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return x, torch.full_like(x, -torch.inf), []

    def decode(self, z: Tensor, skips: None = None) -> Tensor:
        return z


def latent_size(sides: tuple[int, int], factor: int) -> list[int]:
    """[h, w] of the latent of a picture of [H, W]; ValueError where it has no whole one."""
    if any(side % factor for side in sides):
        raise ValueError(f"pictures of {sides[1]}x{sides[0]} pixels; expected sides that are multiples of {factor}:"
                         " choose another --resolution or --train_image_prep")
    return [side // factor for side in sides]
