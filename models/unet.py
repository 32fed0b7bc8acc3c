"""The U-Net of Stable Diffusion 1.x, 2.x and SD-Turbo (`UNet2DConditionModel`): one class, told apart by
`config.json`.

A noised latent [B, 4, h, w], a timestep and a text context [B, N, C] become a prediction [B, 4, h, w]: of the noise
(epsilon) or of v = alpha eps - sigma x0, as the checkpoint was trained. Module names are those of the `unet/` folder
of a `diffusers` checkpoint, so its state dictionary loads as it is. Source: Rombach et al. 2022."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Options of `unet/config.json` that other models (SDXL, Kandinsky, ...) use and this file does not build.
FIXED = dict(act_fn="silu", addition_embed_type=None, attention_type="default", center_input_sample=False,
             class_embed_type=None, class_embeddings_concat=False, conv_in_kernel=3, conv_out_kernel=3,
             cross_attention_norm=None, downsample_padding=1, dual_cross_attention=False, encoder_hid_dim_type=None,
             mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn", mid_block_only_cross_attention=None,
             num_class_embeds=None, only_cross_attention=False, resnet_out_scale_factor=1.0,
             resnet_skip_time_act=False, resnet_time_scale_shift="default", time_cond_proj_dim=None,
             time_embedding_act_fn=None, time_embedding_dim=None, time_embedding_type="positional",
             timestep_post_act=None, transformer_layers_per_block=1, reverse_transformer_layers_per_block=None,
             flip_sin_to_cos=True, freq_shift=0)


@dataclass
class UNetConfig:
    """Defaults are those of SD 1.5, or what `config.json` says."""
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads, of all levels or each: the files' misnomer
    num_attention_heads: int | tuple[int, ...] | None = None  # the same under its right name, in newer files
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3

    def __post_init__(self):
        n = len(self.block_out_channels)
        known = {"CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
        if unknown := {*self.down_block_types, *self.up_block_types} - known:
            raise ValueError(f"the U-Net has blocks {sorted(unknown)}; built here are {sorted(known)}:"
                             " take a Stable Diffusion 1.x or 2.x U-Net")
        if len(self.down_block_types) != n or len(self.up_block_types) != n or len(self.heads) != n:
            raise ValueError(f"the U-Net has {n} widths in block_out_channels, but {len(self.down_block_types)} down"
                             f" blocks, {len(self.up_block_types)} up blocks and {len(self.heads)} head counts:"
                             " one each is needed")

    @property
    def heads(self) -> tuple[int, ...]:
        heads = self.num_attention_heads or self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else tuple(heads)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Timesteps [B] -> [B, dim] in float32: cosines, then sines, of t / 10000^(2i / dim)."""
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GroupNorm(nn.GroupNorm):
    """Under autocast, too, in its input's type. Autocast on a GPU would go through float32, and keep twice the memory
    for the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class TimeEmbedding(nn.Module):
    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """[B, c_in, h, w] and the time embedding [B, c_time] -> [B, c_out, h, w]."""

    def __init__(self, c_in: int, c_out: int, c_time: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] to a context [B, M, D], itself when there is none."""

    def __init__(self, c: int, c_context: int, heads: int):
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"{c} channels are to be {heads} heads of one width")
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_context, c, bias=False)
        self.to_v = nn.Linear(c_context, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list, because the checkpoint's name is to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, heads, N, C / heads]
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)])  # names net.0.proj and net.2

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


@torch.no_grad()
def start_louder(layer: nn.Module) -> None:
    """Three times PyTorch's first weights on the caption's way into the picture. With those as they are, another
    caption changes an untrained network's prediction by 2%, and training from nothing first learns to ignore it."""
    layer.weight *= 3


class TransformerBlock(nn.Module):
    """[B, N, C] -> [B, N, C]: attention to itself, to the caption, then an MLP, norms first."""

    def __init__(self, c: int, c_context: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn1 = Attention(c, c, heads)
        self.attn2 = Attention(c, c_context, heads)
        for layer in (self.attn2.to_v, self.attn2.to_out[0]):
            start_louder(layer)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A transformer block over a feature map's pixels, between two projections: 1x1 convolutions or linear layers."""

    def __init__(self, c: int, c_context: int, heads: int, groups: int, linear: bool):
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c) if linear else nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, c_context, heads)])
        self.proj_out = nn.Linear(c, c) if linear else nn.Conv2d(c, c, 1)
        start_louder(self.proj_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(h.flatten(2).transpose(1, 2)) if self.linear else self.proj_in(h).flatten(2).transpose(1, 2)
        h = self.transformer_blocks[0](h, context)  # [B, HW, C]
        h = self.proj_out(h).transpose(1, 2).unflatten(-1, (H, W)) if self.linear else \
            self.proj_out(h.transpose(1, 2).unflatten(-1, (H, W)))
        return x + h


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        # To the size of the next skip, not twice: a side that is no multiple of 8 was rounded up on its way down.
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class DownBlock(nn.Module):
    """A level on the way down -> its result and the skips that it leaves."""

    def __init__(self, c_in: int, c_out: int, c_time: int, heads: int, attention: bool, down: bool, c: UNetConfig):
        super().__init__()
        n = c.layers_per_block
        self.resnets = nn.ModuleList([
            ResBlock(c_in if i == 0 else c_out, c_out, c_time, c.norm_num_groups, c.norm_eps) for i in range(n)
        ])
        self.attentions = nn.ModuleList([
            Transformer(c_out, c.cross_attention_dim, heads, c.norm_num_groups, c.use_linear_projection)
            for _ in range(n if attention else 0)
        ])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        """All that goes to the up path; the last is also the block's result."""
        out = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            out.append(x)
        return out + [down(x) for down in self.downsamplers]


class MidBlock(nn.Module):
    """The lowest level: residual block, transformer, residual block."""

    def __init__(self, width: int, c_time: int, heads: int, c: UNetConfig):
        super().__init__()
        self.attentions = nn.ModuleList([
            Transformer(width, c.cross_attention_dim, heads, c.norm_num_groups, c.use_linear_projection)
        ])
        self.resnets = nn.ModuleList([ResBlock(width, width, c_time, c.norm_num_groups, c.norm_eps) for _ in range(2)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UpBlock(nn.Module):
    """A level on the way up, which takes as many skips as it has residual blocks."""

    def __init__(self, c_below: int, c_out: int, c_skips: list[int], c_time: int, heads: int, attention: bool, up: bool,
                 c: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList([
            ResBlock((c_below if i == 0 else c_out) + c_skip, c_out, c_time, c.norm_num_groups, c.norm_eps)
            for i, c_skip in enumerate(c_skips)
        ])
        self.attentions = nn.ModuleList([
            Transformer(c_out, c.cross_attention_dim, heads, c.norm_num_groups, c.use_linear_projection)
            for _ in (c_skips if attention else [])
        ])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor, size: Sequence[int]) -> Tensor:
        """`skips` in the order of use, `size` that of the block above."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[i]], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        for up in self.upsamplers:
            x = up(x, size)
        return x


class UNet(nn.Module):
    """Module names are those of `diffusers`' `UNet2DConditionModel`."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        widths, n, layers = c.block_out_channels, len(c.block_out_channels), c.layers_per_block
        c_time = 4 * widths[0]
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], c_time)
        self.down_blocks = nn.ModuleList([
            DownBlock(widths[max(i - 1, 0)], widths[i], c_time, c.heads[i], "CrossAttn" in c.down_block_types[i],
                      i < n - 1, c)
            for i in range(n)
        ])
        self.mid_block = MidBlock(widths[-1], c_time, c.heads[-1], c)
        up = []
        for i in range(n):  # up block i stands at level n - 1 - i
            level = n - 1 - i
            c_skips = [widths[level]] * layers + [widths[max(level - 1, 0)]]  # the last is what entered that level
            up.append(UpBlock(widths[min(level + 1, n - 1)], widths[level], c_skips, c_time, c.heads[level],
                              "CrossAttn" in c.up_block_types[i], i < n - 1, c))
        self.up_blocks = nn.ModuleList(up)
        self.conv_norm_out = GroupNorm(c.norm_num_groups, widths[0], eps=c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)
        self.checkpointing = False

    def _run(self, block: nn.Module, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _time(self, x: Tensor, t: Tensor | int) -> Tensor:
        t = torch.full((), t, device=x.device) if isinstance(t, int) else t.to(x.device)  # a copy would make it wait
        embedding = timestep_embedding(t.expand(len(x)), self.config.block_out_channels[0])
        return self.time_embedding(embedding.to(self.time_embedding.linear_1.weight.dtype))

    def _down(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = [self.conv_in(x.to(self.conv_in.weight.dtype))]
        for block in self.down_blocks:
            skips += self._run(block, skips[-1], time, context)
        return self._run(self.mid_block, skips[-1], time, context), skips

    def features(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        """[B, 4, h, w] -> the result of the middle block [B, 1280, h/8, w/8] (of the widest and smallest level)."""
        return self._down(x, self._time(x, t), context)[0]

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor, residuals: Sequence[Tensor] | None = None) -> Tensor:
        """x [B, 4, h, w] of any size, t one timestep or [B] in 0 ... 999, context [B, N, cross_attention_dim] -> as x.
        `residuals`, of a ControlNet, are added: one a skip, in the order of the way down, the last to the middle."""
        time = self._time(x, t)
        x, skips = self._down(x, time, context)
        if residuals is not None:
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
            x = x + residuals[-1]
        for block in self.up_blocks:
            n = len(block.resnets)
            skips, mine = skips[:-n], skips[:-n - 1:-1]
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = self._run(block, x, mine, time, context, size)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
