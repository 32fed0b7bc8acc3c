"""The autoencoder of Stable Diffusion (`AutoencoderKL`).

The encoder turns a picture [B, 3, H, W] in [-1, 1] into a latent [B, 4, H/8, W/8], the decoder
turns it back. The factor 8 follows from the configuration. The encoder also returns its skips, and
the decoder takes skips as an argument: the one-step translators connect the two.

Module names are those of the `vae/` folder of a `diffusers` checkpoint, so its state dict loads
without renaming.

Sources: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; for
the skips, Parmar et al. 2024, "One-Step Image Translation with Text-to-Image Models", section 3.2.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Options of `vae/config.json` for which only this value is supported. Other autoencoders use
# others.
FIXED = dict(
    act_fn="silu",
    shift_factor=None,
    latents_mean=None,
    latents_std=None,
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=True,
)


@dataclass
class VAEConfig:
    """The options of `vae/config.json`. The defaults are those of Stable Diffusion."""

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
        levels = len(self.block_out_channels)
        down = self.down_block_types
        up = self.up_block_types

        if set(down) != {"DownEncoderBlock2D"} or set(up) != {"UpDecoderBlock2D"}:
            raise ValueError(
                f"the VAE has the blocks {[*down, *up]}, but only DownEncoderBlock2D and"
                " UpDecoderBlock2D are supported: use a Stable Diffusion VAE"
            )
        if len(down) != levels or len(up) != levels:
            raise ValueError(
                f"the VAE has {levels} widths in block_out_channels, but {len(down)} down and"
                f" {len(up)} up blocks: config.json must name one block of each kind per width"
            )


class GroupNorm(nn.GroupNorm):
    """A group norm that stays in the type of its input under autocast.

    Autocast on a GPU would compute it in float32 and keep twice the memory for the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)

        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        with torch.autocast(device, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


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
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return h + x


class Attention(nn.Module):
    """[B, C, h, w] -> [B, C, h, w]: self-attention over all pixels, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list of one, because the checkpoint calls this layer to_out.0.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, hw, C]
        q = self.to_q(h).unsqueeze(1)  # [B, 1, hw, C]
        k = self.to_k(h).unsqueeze(1)
        v = self.to_v(h).unsqueeze(1)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # [B, hw, C]
        h = self.to_out[0](h)
        return x + h.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)])
        self.resnets = nn.ModuleList([
            ResBlock(channels, channels, groups),
            ResBlock(channels, channels, groups),
        ])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """[B, C, h, w] -> [B, C, h/2, w/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Stable Diffusion pads the right and the bottom edge only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """[B, C, h, w] -> [B, C, 2h, 2w]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """One level of the encoder. With `down` it halves height and width at its end."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, down: bool):
        super().__init__()
        self.resnets = nn.ModuleList([
            ResBlock(c_in if i == 0 else c_out, c_out, groups)
            for i in range(layers)
        ])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One level of the decoder. With `up` it doubles height and width at its end."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, up: bool):
        super().__init__()
        self.resnets = nn.ModuleList([
            ResBlock(c_in if i == 0 else c_out, c_out, groups)
            for i in range(layers)
        ])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


def run_block(block: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """block(x). With gradient checkpointing, the block's activations are recomputed in the backward
    pass, and only its input is kept until then."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


class Encoder(nn.Module):
    """Picture [B, 3, H, W] -> moments [B, 2 C, h, w], and the inputs of the down blocks."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels
        levels = len(widths)
        groups = config.norm_num_groups

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            DownBlock(
                c_in=widths[max(i - 1, 0)],
                c_out=widths[i],
                layers=config.layers_per_block,
                groups=groups,
                down=i < levels - 1,
            )
            for i in range(levels)
        ])
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)
        self.checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.conv_in(x.to(self.conv_in.weight.dtype))
        skips = []
        for block in self.down_blocks:
            skips.append(x)
            x = run_block(block, x, self.checkpointing)
        x = run_block(self.mid_block, x, self.checkpointing)
        moments = self.conv_out(F.silu(self.conv_norm_out(x)))
        return moments, skips


class Decoder(nn.Module):
    """Latent [B, C, h, w] -> picture [B, 3, H, W]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        levels = len(widths)
        groups = config.norm_num_groups

        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList([
            UpBlock(
                c_in=widths[max(i - 1, 0)],
                c_out=widths[i],
                layers=config.layers_per_block + 1,
                groups=groups,
                up=i < levels - 1,
            )
            for i in range(levels)
        ])
        self.mid_block = MidBlock(widths[0], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)
        self.checkpointing = False

    def forward(self, z: Tensor, skips: list[Tensor] | None = None) -> Tensor:
        x = self.conv_in(z)
        x = run_block(self.mid_block, x, self.checkpointing)
        for i, block in enumerate(self.up_blocks):
            if skips is not None:
                x = x + skips[i]
            x = run_block(block, x, self.checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The encoder, the decoder, and a 1x1 convolution on each side of the latent."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @property
    def factor(self) -> int:
        """The side of a picture over the side of its latent (8 in Stable Diffusion)."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Picture [B, 3, H, W] in [-1, 1] -> mean, log-variance, skips.

        H and W must be multiples of `factor`. Mean and log-variance are [B, 4, H/factor, W/factor],
        not yet multiplied by `config.scaling_factor`. The skips are the inputs of the down blocks,
        from first (full size) to last.
        """
        moments, skips = self.encoder(x)
        mean, logvar = self.quant_conv(moments).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0), skips

    def decode(self, z: Tensor, skips: list[Tensor] | None = None) -> Tensor:
        """Latent [B, 4, h, w], already divided by `config.scaling_factor` -> picture [B, 3, H, W].

        The picture is meant to be in [-1, 1] but is not clamped. `skips` are added to the inputs of
        the up blocks: one per block, in their order, already convolved to the block's width.
        """
        z = self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype))
        return self.decoder(z, skips)


@dataclass
class IdentityConfig:
    """The options of `Identity`."""

    scaling_factor: float = 1.0
    sample_size: int = 32


class Identity(nn.Module):
    """Takes the place of a VAE for models that work on pictures or points directly.

    The latent is x itself, with a variance of zero.
    """

    factor = 1

    def __init__(self, config: IdentityConfig):
        super().__init__()
        self.config = config

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        logvar = torch.full_like(x, -torch.inf)
        return x, logvar, []

    def decode(self, z: Tensor, skips: None = None) -> Tensor:
        return z


def latent_size(sides: Sequence[int], factor: int) -> list[int]:
    """[h, w] of the latent of a picture of sides [H, W].

    Raises ValueError if a side is not a multiple of `factor`.
    """
    if any(side % factor for side in sides):
        height, width = sides
        raise ValueError(
            f"the pictures are {width}x{height} pixels; expected sides that are multiples of"
            f" {factor}: choose another resolution or image preparation"
        )
    return [side // factor for side in sides]


def tile_starts(side: int, tile: int) -> tuple[list[int], int]:
    """Where the tiles along one side begin, and how long they are: at most `tile`.

    They are evenly spaced and overlap by a quarter of `tile` or more. There are as few as possible,
    and they are as short as that number allows.
    """
    if side <= tile:
        return [0], side
    overlap = max(tile // 4, 1)
    count = math.ceil((side - overlap) / (tile - overlap))
    length = math.ceil((side + (count - 1) * overlap) / count)
    return [(side - length) * i // (count - 1) for i in range(count)], length


def fade(length: int, margin: int, like: Tensor) -> Tensor:
    """Weights [length] along one side of a tile. From either end they rise from 1, by 1 a place, to
    at most `margin`. Type and device are those of `like`."""
    distance = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    distance = torch.minimum(distance, distance.flip(0))
    return distance.clamp(max=margin)


def tiled(
    network: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    size: tuple[int, int],
    tile: int,
) -> Tensor:
    """network(*inputs), computed in tiles, for pictures that take too much memory or time.

    `size` is (h, w) in latents, and a tile is at most `tile` latents wide and high. What fits into
    one tile is computed at once. Inputs and result are latents or pictures [B, C, H, W]. Tiles
    overlap by at least a quarter of `tile` and are blended linearly. No tile sees beyond its own
    edge.
    """
    h, w = size
    if max(h, w) <= tile:
        return network(*inputs)

    overlap = max(tile // 4, 1)
    tops, height = tile_starts(h, tile)
    lefts, width = tile_starts(w, tile)

    def cut(x: Tensor, top: int, left: int) -> Tensor:
        """The tile of x whose corner is at (top, left), in latents."""
        scale = x.shape[-1] // w  # 1 for a latent, the VAE's factor for a picture
        rows = slice(scale * top, scale * (top + height))
        columns = slice(scale * left, scale * (left + width))
        return x[..., rows, columns]

    total = None
    for top, left in itertools.product(tops, lefts):
        part = network(*(cut(x, top, left) for x in inputs))
        scale = part.shape[-1] // width

        # Only the first result tells how large the whole is.
        if total is None:
            whole = (scale * h, scale * w)
            dtype = torch.promote_types(part.dtype, torch.float32)
            total = torch.zeros(*part.shape[:2], *whole, device=part.device, dtype=dtype)
            weight = torch.zeros(1, 1, *whole, device=part.device, dtype=dtype)

        rows = fade(part.shape[-2], scale * overlap, like=total)[:, None]
        columns = fade(part.shape[-1], scale * overlap, like=total)
        cut(total, top, left).add_(part * rows * columns)
        cut(weight, top, left).add_(rows * columns)
    return total / weight
