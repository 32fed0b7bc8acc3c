"""The U-Net of Stable Diffusion 1.x, 2.x and SD-Turbo (`UNet2DConditionModel`).

From a noisy latent [B, 4, h, w], a timestep and a text context [B, N, C] it predicts [B, 4, h, w]:
either the noise epsilon, or v = alpha eps - sigma x0, depending on how the checkpoint was trained.
All versions are one class; `config.json` holds what differs.

Module names are those of the `unet/` folder of a `diffusers` checkpoint, so its state dict loads
without renaming.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Options of `unet/config.json` for which only this value is supported. Other models (SDXL,
# Kandinsky, ...) use others.
FIXED = dict(
    act_fn="silu",
    addition_embed_type=None,
    attention_type="default",
    center_input_sample=False,
    class_embed_type=None,
    class_embeddings_concat=False,
    conv_in_kernel=3,
    conv_out_kernel=3,
    cross_attention_norm=None,
    downsample_padding=1,
    dual_cross_attention=False,
    encoder_hid_dim_type=None,
    mid_block_scale_factor=1,
    mid_block_type="UNetMidBlock2DCrossAttn",
    mid_block_only_cross_attention=None,
    num_class_embeds=None,
    only_cross_attention=False,
    resnet_out_scale_factor=1.0,
    resnet_skip_time_act=False,
    resnet_time_scale_shift="default",
    time_cond_proj_dim=None,
    time_embedding_act_fn=None,
    time_embedding_dim=None,
    time_embedding_type="positional",
    timestep_post_act=None,
    transformer_layers_per_block=1,
    reverse_transformer_layers_per_block=None,
    flip_sin_to_cos=True,
    freq_shift=0,
)


@dataclass
class UNetConfig:
    """The options of `unet/config.json`. The defaults are those of SD 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    # The number of heads, for all levels or for each. The name is a mistake of `diffusers`; newer
    # files have num_attention_heads instead.
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3

    def __post_init__(self):
        levels = len(self.block_out_channels)
        down = self.down_block_types
        up = self.up_block_types

        supported = {"CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
        unknown = {*down, *up} - supported
        if unknown:
            raise ValueError(
                f"the U-Net has the blocks {sorted(unknown)}, but only {sorted(supported)} are"
                " supported: use a Stable Diffusion 1.x or 2.x U-Net"
            )
        if not len(down) == len(up) == len(self.heads) == levels:
            raise ValueError(
                f"the U-Net has {levels} widths in block_out_channels, but {len(down)} down blocks,"
                f" {len(up)} up blocks and {len(self.heads)} head counts: config.json must name"
                " one of each per width"
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of attention heads of each level, highest resolution first."""
        heads = self.num_attention_heads or self.attention_head_dim
        if isinstance(heads, int):
            return (heads,) * len(self.block_out_channels)
        return tuple(heads)

    @property
    def time_width(self) -> int:
        """The width of the time embedding."""
        return 4 * self.block_out_channels[0]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Timesteps [B] -> [B, dim] in float32: cosines, then sines, of t / 10000^(2i / dim)."""
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Timesteps [B] -> [B, c_out]: sinusoids of width c, then an MLP."""

    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, t: Tensor) -> Tensor:
        h = timestep_embedding(t, self.linear_1.in_features)
        h = self.linear_1(h.to(self.linear_1.weight.dtype))
        return self.linear_2(F.silu(h))


def one_per_row(t: Tensor | int, x: Tensor) -> Tensor:
    """A timestep, or one for each row of x -> timesteps [B] on the device of x."""
    if isinstance(t, int):
        # Filled on the device: a copy from the CPU would make the CPU wait for the GPU.
        t = torch.full((), t, device=x.device)
    return t.to(x.device).expand(len(x))


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
    """[B, c_in, h, w] and the time embedding [B, time_width] -> [B, c_out, h, w]."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        groups = config.norm_num_groups
        eps = config.norm_eps
        self.norm1 = GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_width, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return h + x


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] to a context [B, M, D], or to itself without one."""

    def __init__(self, c: int, c_context: int, heads: int):
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(
                f"{c} channels cannot be split into {heads} attention heads of equal width: check"
                " attention_head_dim and num_attention_heads in config.json"
            )
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_context, c, bias=False)
        self.to_v = nn.Linear(c_context, c, bias=False)
        # A list of one, because the checkpoint calls this layer to_out.0.
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def split(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            context = x
        q = self.to_q(x)
        k = self.to_k(context)
        v = self.to_v(context)
        h = F.scaled_dot_product_attention(self.split(q), self.split(k), self.split(v))
        h = h.transpose(1, 2).flatten(2)  # [B, N, C]
        return self.to_out[0](h)


class GEGLU(nn.Module):
    """[B, N, C] -> [B, N, c_out]: a linear layer, gated by the GELU of another one."""

    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """[B, N, C] -> [B, N, C]: the MLP of a transformer block, four times as wide inside."""

    def __init__(self, c: int):
        super().__init__()
        # The checkpoint's names are net.0.proj and net.2. Its net.1 is a dropout.
        self.net = nn.ModuleList([GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


@torch.no_grad()
def triple_initial_weight(layer: nn.Module) -> None:
    """Multiplies PyTorch's initial weight by 3, for the layers that carry the caption into the
    picture.

    With PyTorch's own weights, another caption changes the prediction of an untrained network by
    only 2%, and training from scratch first learns to ignore the caption. A checkpoint overwrites
    these weights.
    """
    layer.weight *= 3


class TransformerBlock(nn.Module):
    """[B, N, C] -> [B, N, C]: self-attention, cross-attention to the caption, MLP; pre-norm."""

    def __init__(self, c: int, c_context: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.norm2 = nn.LayerNorm(c)
        self.norm3 = nn.LayerNorm(c)
        self.attn1 = Attention(c, c, heads)
        self.attn2 = Attention(c, c_context, heads)
        self.ff = FeedForward(c)

        triple_initial_weight(self.attn2.to_v)
        triple_initial_weight(self.attn2.to_out[0])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """[B, C, h, w] -> [B, C, h, w]: a transformer block over its pixels, between two projections.

    The projections are linear layers (SD 2.x) or 1x1 convolutions (SD 1.x).
    """

    def __init__(self, c: int, heads: int, config: UNetConfig):
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = GroupNorm(config.norm_num_groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c) if self.linear else nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(c, config.cross_attention_dim, heads)
        ])
        self.proj_out = nn.Linear(c, c) if self.linear else nn.Conv2d(c, c, 1)
        triple_initial_weight(self.proj_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y = self.norm(x)

        # The convolutions work on [B, C, h, w], all else on [B, hw, C].
        if self.linear:
            y = self.proj_in(y.flatten(2).transpose(1, 2))
        else:
            y = self.proj_in(y).flatten(2).transpose(1, 2)

        y = self.transformer_blocks[0](y, context)

        if self.linear:
            y = self.proj_out(y).transpose(1, 2).unflatten(-1, (h, w))
        else:
            y = self.proj_out(y.transpose(1, 2).unflatten(-1, (h, w)))
        return x + y


class Downsample(nn.Module):
    """[B, C, h, w] -> [B, C, h/2, w/2], rounded up."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """[B, C, h, w] -> [B, C, *size]."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        # To the size of the next skip rather than twice as large: an odd side was rounded up on
        # the way down.
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class DownBlock(nn.Module):
    """One level of the way down. All but the lowest halve height and width at their end.

    A ControlNet has the same blocks, and passes its own configuration here.
    """

    def __init__(self, level: int, config: UNetConfig):
        super().__init__()
        widths = config.block_out_channels
        c_in = widths[max(level - 1, 0)]
        c_out = widths[level]
        layers = config.layers_per_block
        attention = "CrossAttn" in config.down_block_types[level]
        lowest = level == len(widths) - 1

        self.resnets = nn.ModuleList([
            ResBlock(c_in if i == 0 else c_out, c_out, config)
            for i in range(layers)
        ])
        self.attentions = nn.ModuleList([
            Transformer(c_out, config.heads[level], config)
            for _ in range(layers if attention else 0)
        ])
        self.downsamplers = nn.ModuleList([] if lowest else [Downsample(c_out)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """The skips that this level leaves for the way up. The last is also the block's result."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            skips.append(downsample(x))
        return skips


class MidBlock(nn.Module):
    """The lowest resolution: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.attentions = nn.ModuleList([Transformer(width, config.heads[-1], config)])
        self.resnets = nn.ModuleList([
            ResBlock(width, width, config),
            ResBlock(width, width, config),
        ])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level of the way up. Each residual block takes one skip.

    All but the highest level enlarge their result to the size of the level above.
    """

    def __init__(self, level: int, config: UNetConfig):
        super().__init__()
        widths = config.block_out_channels
        c_below = widths[min(level + 1, len(widths) - 1)]
        c_out = widths[level]
        attention = "CrossAttn" in config.up_block_types[-1 - level]

        # On the way down every layer of this level left a skip of width c_out. One more is taken,
        # last: what entered the level there, the result of the level above or of conv_in.
        c_entered = widths[max(level - 1, 0)]
        c_skips = [c_out] * config.layers_per_block + [c_entered]

        self.resnets = nn.ModuleList([
            ResBlock((c_below if i == 0 else c_out) + c_skip, c_out, config)
            for i, c_skip in enumerate(c_skips)
        ])
        self.attentions = nn.ModuleList([
            Transformer(c_out, config.heads[level], config)
            for _ in (c_skips if attention else [])
        ])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level > 0 else [])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: Tensor,
        context: Tensor,
        size: Sequence[int],
    ) -> Tensor:
        """`skips` in the order in which they are taken; `size` is (h, w) of the level above."""
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips[i]], dim=1)
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


def run_block(block: nn.Module, *inputs, checkpointing: bool) -> Tensor | list[Tensor]:
    """block(*inputs). With gradient checkpointing, the block's activations are recomputed in the
    backward pass, and only its inputs are kept until then."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class UNet(nn.Module):
    """The way down, the middle block, and the way up, which takes the skips of the way down."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels = range(len(widths))

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], config.time_width)
        self.down_blocks = nn.ModuleList([DownBlock(level, config) for level in levels])
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList([UpBlock(level, config) for level in reversed(levels)])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self.checkpointing = False

    def way_down(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The result of the middle block, and the skips, from first (full size) to last."""
        skips = [self.conv_in(x.to(self.conv_in.weight.dtype))]
        for block in self.down_blocks:
            x = skips[-1]
            skips += run_block(block, x, time, context, checkpointing=self.checkpointing)
        x = skips[-1]
        x = run_block(self.mid_block, x, time, context, checkpointing=self.checkpointing)
        return x, skips

    def features(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        """The result of the middle block, [B, 1280, h/8, w/8] in Stable Diffusion.

        The arguments are those of `forward`.
        """
        time = self.time_embedding(one_per_row(t, x))
        x, _ = self.way_down(x, time, context)
        return x

    def forward(
        self,
        x: Tensor,
        t: Tensor | int,
        context: Tensor,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The prediction, of the shape of x.

        x is [B, 4, h, w] of any size, t is one timestep or [B] of them in 0 ... 999, and context is
        [B, N, cross_attention_dim]. `residuals` come from a ControlNet: one for each skip, in the
        order of the way down, and one more for the result of the middle block, to which they are
        added.
        """
        time = self.time_embedding(one_per_row(t, x))
        x, skips = self.way_down(x, time, context)

        if residuals is not None:
            *of_skips, of_middle = residuals
            skips = [skip + residual for skip, residual in zip(skips, of_skips, strict=True)]
            x = x + of_middle

        for block in self.up_blocks:
            # The skips that were left last are taken first.
            n = len(block.resnets)
            taken = skips[-n:][::-1]
            skips = skips[:-n]

            # The highest level does not enlarge its result, so its size does not matter.
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = run_block(block, x, taken, time, context, size, checkpointing=self.checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
