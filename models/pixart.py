"""The transformer of PixArt-alpha (`PixArtTransformer2DModel`): one class for the 512 and the 1024 model, told apart by
`config.json`.

A noised latent [B, 4, h, w], a timestep and a caption [B, N, 4096] with its mask become a prediction [B, 4, h, w].
Module names are those of the `transformer/` folder of a `diffusers` checkpoint, so its state dictionary loads as it is.
Source: Chen et al. 2023, "PixArt-alpha"; the network is the DiT of Peebles and Xie 2022 with a cross attention."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Options of `transformer/config.json` that other models use and this file does not build.
FIXED = dict(activation_fn="gelu-approximate", attention_bias=True, attention_type="default",
             double_self_attention=False, dropout=0.0, norm_elementwise_affine=False, norm_type="ada_norm_single",
             num_vector_embeds=None, only_cross_attention=False)
PIXELS = 8  # a side of one latent of Stable Diffusion's VAE: the 1024 model is told its resolution in pixels


@dataclass
class PixArtConfig:
    """Defaults are those of the 1024 model."""
    in_channels: int = 4
    out_channels: int = 8  # twice those in: the rest is a variance, which one-step sampling has no use for
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_layers: int = 28
    cross_attention_dim: int = 1152
    caption_channels: int = 4096
    sample_size: int = 128  # latents a side, at which the positions are whole numbers over the scale
    patch_size: int = 2
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None  # resolution and aspect ratio; None: where sample_size is 128

    def __post_init__(self):
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(f"PixArt has {self.out_channels} out_channels; expected as many as the {self.in_channels}"
                             " in_channels, or twice as many")
        if self.cross_attention_dim != self.width or not self.caption_channels:
            raise ValueError(f"PixArt has a cross_attention_dim of {self.cross_attention_dim} and"
                             f" {self.caption_channels} caption_channels; expected {self.width} (heads times their"
                             " width) and the text encoder's width")
        if self.width % 4 or (self.conditioned and self.width % 3):
            raise ValueError(f"PixArt is {self.width} wide; expected a multiple of 4 for the positions, and of 3 where"
                             " it is told the resolution")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def conditioned(self) -> bool:
        use = self.use_additional_conditions
        return self.sample_size == 128 if use is None else use


def sinusoids(t: Tensor, dim: int = 256) -> Tensor:
    """Numbers [B] -> [B, dim] in float32: cosines, then sines, of t / 10000^(2i / dim)."""
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * i / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def positions(h: int, w: int, dim: int, base: int, scale: float, device: torch.device | None = None) -> Tensor:
    """[h w, dim] in float32, for a grid of h x w patches stretched over `base` x `base`: the first half of the values
    encodes the column, the second the row; in each, sines, then cosines, of 10000^(-4i / dim)."""
    double = torch.float32 if device is not None and device.type == "mps" else torch.float64
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=double, device=device) / (dim / 4))

    def encode(n: int) -> Tensor:  # [n, dim / 2]
        angles = torch.outer(torch.arange(n, dtype=torch.float32, device=device) / (n / base) / scale, omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    columns, rows = encode(w)[None].expand(h, -1, -1), encode(h)[:, None].expand(-1, w, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class Embedder(nn.Module):
    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class Conditions(nn.Module):
    """Timestep and, in the 1024 model, resolution and aspect ratio -> [B, C]."""

    def __init__(self, c: int, conditioned: bool):
        super().__init__()
        self.timestep_embedder = Embedder(256, c)
        self.resolution_embedder = Embedder(256, c // 3) if conditioned else None
        self.aspect_ratio_embedder = Embedder(256, c // 3) if conditioned else None

    def forward(self, t: Tensor, resolution: Tensor, aspect_ratio: Tensor) -> Tensor:
        time = self.timestep_embedder(sinusoids(t))
        if self.resolution_embedder is None:
            return time
        size = self.resolution_embedder(sinusoids(resolution.flatten())).reshape(len(t), -1)  # height, then width
        return time + torch.cat([size, self.aspect_ratio_embedder(sinusoids(aspect_ratio.flatten()))], dim=1)


class AdaLayerNormSingle(nn.Module):
    """The one modulation of all blocks, to which each adds a table of its own."""

    def __init__(self, c: int, conditioned: bool):
        super().__init__()
        self.emb = Conditions(c, conditioned)
        self.linear = nn.Linear(c, 6 * c)

    def forward(self, t: Tensor, resolution: Tensor, aspect_ratio: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.emb(t, resolution, aspect_ratio)
        return self.linear(F.silu(embedding)).unflatten(1, (6, -1)), embedding


class CaptionProjection(nn.Module):
    def __init__(self, c_caption: int, c: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_caption, c)
        self.linear_2 = nn.Linear(c, c)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))


class PatchEmbed(nn.Module):
    def __init__(self, c_in: int, c: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(c_in, c, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, hw / patch^2, C]


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] to a context [B, M, C], else itself; `bias` [B, 1, 1, M] joins the scores."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list, because the checkpoint's name is to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, heads, N, C / heads]
        bias = None if bias is None else bias.to(q.dtype)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out[0](h.transpose(1, 2).flatten(2))


class GELU(nn.Module):
    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.net = nn.ModuleList([GELU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)])  # names net.0.proj and net.2

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """[B, N, C] -> [B, N, C]: attention, cross attention to the caption, MLP; the time modulates first and last."""

    def __init__(self, c: int, heads: int, eps: float):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, c) / c**0.5)
        self.norm1 = nn.LayerNorm(c, eps=eps, elementwise_affine=False)
        self.attn1 = Attention(c, heads)
        self.attn2 = Attention(c, heads)
        self.norm2 = nn.LayerNorm(c, eps=eps, elementwise_affine=False)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + time).chunk(6, dim=1)  # each [B, 1, C]
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.attn2(x, context, bias)  # neither norm nor modulation here
        return x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)


class PixArt(nn.Module):
    """Module names are those of `diffusers`' `PixArtTransformer2DModel`."""

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.config = c = config
        self.pos_embed = PatchEmbed(c.in_channels, c.width, c.patch_size)
        self.adaln_single = AdaLayerNormSingle(c.width, c.conditioned)
        self.caption_projection = CaptionProjection(c.caption_channels, c.width)
        self.transformer_blocks = nn.ModuleList([
            Block(c.width, c.num_attention_heads, c.norm_eps) for _ in range(c.num_layers)
        ])
        self.norm_out = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, c.width) / c.width**0.5)
        self.proj_out = nn.Linear(c.width, c.patch_size**2 * c.out_channels)
        self.checkpointing = False

    def _run(self, block: nn.Module, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor, mask: Tensor | None = None,
                resolution: Tensor | None = None, aspect_ratio: Tensor | None = None) -> Tensor:
        """x [B, 4, h, w], h and w multiples of the patch (2), t one timestep or [B] in 0 ... 999, context [B, N, 4096]
        of T5 with its mask [B, N], 0 where there is padding -> [B, 4, h, w], the variance left out. The 1024 model
        also reads `resolution` [B, 2], height and width in pixels, and `aspect_ratio` [B, 1], height / width; without
        them it takes the picture's own."""
        c, (B, _, H, W) = self.config, x.shape
        p, h, w = c.patch_size, H // c.patch_size, W // c.patch_size
        if H % p or W % p:
            raise ValueError(f"the latent is {W}x{H} (width x height) and PixArt cuts it into patches of {p}x{p};"
                             f" expected a picture whose sides are multiples of {PIXELS * p} pixels")
        t = (torch.full((), t, device=x.device) if isinstance(t, int) else t.to(x.device)).expand(B)
        if resolution is None:
            resolution = torch.tensor([PIXELS * H, PIXELS * W], device=x.device).expand(B, 2)
        if aspect_ratio is None:
            aspect_ratio = torch.tensor([H / W], device=x.device).expand(B, 1)
        scale = max(c.sample_size // 64, 1) if c.interpolation_scale is None else c.interpolation_scale
        x = self.pos_embed(x)
        x = (x + positions(h, w, c.width, c.sample_size // p, scale, x.device)).to(x.dtype)
        time, embedding = self.adaln_single(t, resolution, aspect_ratio)  # [B, 6, C], [B, C]
        context = self.caption_projection(context)
        bias = None if mask is None else (1 - mask[:, None, None].to(x.dtype)) * -10000.0
        for block in self.transformer_blocks:
            x = self._run(block, x, time, context, bias)
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        x = x.unflatten(1, (h, w)).unflatten(-1, (p, p, -1))[..., :c.in_channels]  # [B, h, w, p, q, 4]
        return torch.einsum("bhwpqc->bchpwq", x).reshape(B, c.in_channels, H, W)
