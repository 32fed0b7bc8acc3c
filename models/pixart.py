"""The transformer of PixArt-alpha (`PixArtTransformer2DModel`), the 512 and the 1024 model.

A noised latent [B, 4, h, w], a timestep and a caption [B, N, 4096] with its mask become a
prediction [B, 4, h, w]. Module names are those of the `transformer/` folder of a `diffusers`
checkpoint, so its state dictionary loads as it is. One class covers both models; `config.json`
tells them apart.

Source: Chen et al. 2023, "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic
Text-to-Image Synthesis". The network is DiT (Peebles and Xie 2022) with cross-attention.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Options of `transformer/config.json` that are supported with this value only.
FIXED = dict(
    activation_fn="gelu-approximate",
    attention_bias=True,
    attention_type="default",
    double_self_attention=False,
    dropout=0.0,
    norm_elementwise_affine=False,
    norm_type="ada_norm_single",
    num_vector_embeds=None,
    only_cross_attention=False,
)

# Pixels per latent of Stable Diffusion's VAE, along one side. The 1024 model is told the
# resolution in pixels.
PIXELS = 8


@dataclass
class PixArtConfig:
    """The defaults are the 1024 model."""
    in_channels: int = 4
    out_channels: int = 8  # the prediction, and a variance that one-step sampling does not use
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_layers: int = 28
    cross_attention_dim: int = 1152
    caption_channels: int = 4096
    sample_size: int = 128  # side of the latents that the model was trained on
    patch_size: int = 2
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None  # None: sample_size // 64, at least 1
    use_additional_conditions: bool | None = None  # None: where sample_size is 128

    def __post_init__(self):
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"PixArt has {self.out_channels} out_channels; expected the number of in_channels,"
                f" {self.in_channels}, or twice that"
            )
        if self.cross_attention_dim != self.width or not self.caption_channels:
            raise ValueError(
                f"PixArt has a cross_attention_dim of {self.cross_attention_dim} and"
                f" {self.caption_channels} caption_channels; expected {self.width} (heads times"
                " head width) and the width of the text encoder"
            )
        if self.width % 4 or (self.conditioned and self.width % 3):
            raise ValueError(
                f"PixArt is {self.width} wide; expected a multiple of 4 for the positions, and of"
                " 3 if it is conditioned on the resolution"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def conditioned(self) -> bool:
        """Whether the model is told the resolution and the aspect ratio."""
        if self.use_additional_conditions is None:
            return self.sample_size == 128
        return self.use_additional_conditions


# -------------------- embeddings

def sinusoids(t: Tensor, dim: int = 256) -> Tensor:
    """Numbers [B] -> [B, dim] in float32: cosines, then sines, of t / 10000^(2i / dim)."""
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * i / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def positions(
    h: int,
    w: int,
    dim: int,
    base: int,
    scale: float,
    device: torch.device | None = None,
) -> Tensor:
    """Position embeddings [h * w, dim] in float32 of a grid of h x w patches.

    The grid is stretched over `base` x `base`, the grid of training, and divided by `scale`. The
    first half of the channels encodes the column and the second half the row: sines, then cosines,
    of the coordinate times 10000^(-4i / dim).
    """
    # MPS has no float64.
    on_mps = device is not None and device.type == "mps"
    double = torch.float32 if on_mps else torch.float64
    i = torch.arange(dim // 4, dtype=double, device=device)
    omega = 1.0 / 10000 ** (i / (dim / 4))

    def encode(n: int) -> Tensor:
        place = torch.arange(n, dtype=torch.float32, device=device) / (n / base) / scale
        angles = torch.outer(place, omega)
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()  # [n, dim / 2]

    columns = encode(w)[None].expand(h, -1, -1)  # [h, w, dim / 2]
    rows = encode(h)[:, None].expand(-1, w, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Latent [B, c_in, H, W] -> tokens [B, HW / patch^2, C]."""

    def __init__(self, c_in: int, c: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(c_in, c, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class CaptionProjection(nn.Module):
    """T5's context [B, N, c_caption] -> [B, N, C]."""

    def __init__(self, c_caption: int, c: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_caption, c)
        self.linear_2 = nn.Linear(c, c)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))


class Embedder(nn.Module):
    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class Conditions(nn.Module):
    """Timestep [B] and, in the 1024 model, resolution and aspect ratio -> [B, C]."""

    def __init__(self, c: int, conditioned: bool):
        super().__init__()
        self.timestep_embedder = Embedder(256, c)
        self.resolution_embedder = None
        self.aspect_ratio_embedder = None
        if conditioned:
            self.resolution_embedder = Embedder(256, c // 3)
            self.aspect_ratio_embedder = Embedder(256, c // 3)

    def forward(self, t: Tensor, resolution: Tensor, aspect_ratio: Tensor) -> Tensor:
        """t [B], resolution [B, 2] as height and width in pixels, aspect_ratio [B, 1]."""
        time = self.timestep_embedder(sinusoids(t))
        if self.resolution_embedder is None:
            return time
        size = self.resolution_embedder(sinusoids(resolution.flatten()))  # [2B, C / 3]
        size = size.reshape(len(t), -1)  # [B, 2C / 3]: height, then width
        ratio = self.aspect_ratio_embedder(sinusoids(aspect_ratio.flatten()))  # [B, C / 3]
        return time + torch.cat([size, ratio], dim=1)


class AdaLayerNormSingle(nn.Module):
    """The modulation [B, 6, C] that all blocks share (adaLN-single), and its embedding [B, C].

    Each block adds a table of its own to the modulation.
    """

    def __init__(self, c: int, conditioned: bool):
        super().__init__()
        self.emb = Conditions(c, conditioned)
        self.linear = nn.Linear(c, 6 * c)

    def forward(
        self,
        t: Tensor,
        resolution: Tensor,
        aspect_ratio: Tensor,
    ) -> tuple[Tensor, Tensor]:
        embedding = self.emb(t, resolution, aspect_ratio)
        modulation = self.linear(F.silu(embedding)).unflatten(1, (6, -1))
        return modulation, embedding


# -------------------- transformer blocks

def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of x [B, N, C] to a context [B, M, C], or to x itself without one.

    `bias` [B, 1, 1, M] is added to the scores.
    """

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list for the checkpoint's name to_out.0

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if context is None:
            context = x
        q = split_heads(self.to_q(x), self.heads)  # [B, heads, N, C / heads]
        k = split_heads(self.to_k(context), self.heads)  # [B, heads, M, C / heads]
        v = split_heads(self.to_v(context), self.heads)
        if bias is not None:
            bias = bias.to(q.dtype)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out[0](h.transpose(1, 2).flatten(2))  # [B, N, C]


class GELU(nn.Module):
    """A linear layer and the tanh approximation of GELU."""

    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        # The checkpoint's names are net.0.proj and net.2; net.1 was a dropout.
        self.net = nn.ModuleList([GELU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """[B, N, C] -> [B, N, C]: self-attention, cross-attention to the caption, MLP.

    The timestep modulates self-attention and MLP, as in DiT. Cross-attention has neither norm nor
    modulation.
    """

    def __init__(self, c: int, heads: int, eps: float):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, c) / c**0.5)
        self.norm1 = nn.LayerNorm(c, eps=eps, elementwise_affine=False)
        self.attn1 = Attention(c, heads)
        self.attn2 = Attention(c, heads)
        self.norm2 = nn.LayerNorm(c, eps=eps, elementwise_affine=False)
        self.ff = FeedForward(c)

    def forward(
        self, x: Tensor, modulation: Tensor, context: Tensor, bias: Tensor | None
    ) -> Tensor:
        """modulation [B, 6, C] of AdaLayerNormSingle, context [B, M, C], bias [B, 1, 1, M]."""
        parts = (self.scale_shift_table + modulation).chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts  # each [B, 1, C]
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.attn2(x, context, bias)
        return x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)


# -------------------- the whole network

class PixArt(nn.Module):
    """Module names are those of `diffusers`' `PixArtTransformer2DModel`.

    With `checkpointing`, blocks are computed again in the backward pass, which saves memory.
    """

    def __init__(self, config: PixArtConfig):
        super().__init__()
        c = config
        self.config = config
        self.pos_embed = PatchEmbed(c.in_channels, c.width, c.patch_size)
        self.adaln_single = AdaLayerNormSingle(c.width, c.conditioned)
        self.caption_projection = CaptionProjection(c.caption_channels, c.width)
        self.transformer_blocks = nn.ModuleList(
            [Block(c.width, c.num_attention_heads, c.norm_eps) for _ in range(c.num_layers)]
        )
        self.norm_out = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, c.width) / c.width**0.5)
        self.proj_out = nn.Linear(c.width, c.patch_size**2 * c.out_channels)
        self.checkpointing = False

    def forward(
        self,
        x: Tensor,
        t: Tensor | int,
        context: Tensor,
        mask: Tensor | None = None,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Latent [B, 4, h, w] -> prediction [B, 4, h, w], without the variance.

        h and w are multiples of the patch size (2). t: one timestep or [B], in 0 ... 999.
        context [B, N, 4096]: T5's, with its mask [B, N], 0 at padding. The 1024 model also reads
        resolution [B, 2] (height and width in pixels) and aspect_ratio [B, 1] (height / width);
        by default they are the picture's own.
        """
        c = self.config
        B, _, h, w = x.shape
        p = c.patch_size
        if h % p or w % p:
            raise ValueError(
                f"the latent is {w}x{h} (width x height), and PixArt cuts it into patches of"
                f" {p}x{p}; expected a picture whose sides are multiples of {PIXELS * p} pixels"
            )
        if isinstance(t, int):
            t = torch.full((), t, device=x.device)
        t = t.to(x.device).expand(B)
        if resolution is None:
            resolution = torch.tensor([PIXELS * h, PIXELS * w], device=x.device).expand(B, 2)
        if aspect_ratio is None:
            aspect_ratio = torch.tensor([h / w], device=x.device).expand(B, 1)

        x = self._embed_patches(x)  # [B, hw / p^2, C]
        # [B, 6, C], [B, C]
        modulation, embedding = self.adaln_single(t, resolution, aspect_ratio)
        context = self.caption_projection(context)  # [B, N, C]
        bias = None
        if mask is not None:
            bias = (1 - mask[:, None, None].to(x.dtype)) * -10000.0  # [B, 1, 1, N]

        for block in self.transformer_blocks:
            x = self._run(block, x, modulation, context, bias)

        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)  # [B, hw / p^2, p^2 * c_out]
        return self._join_patches(x, h, w)

    def _embed_patches(self, x: Tensor) -> Tensor:
        """Latent [B, c_in, h, w] -> patches with their positions [B, hw / p^2, C]."""
        c = self.config
        h, w = x.shape[2:]
        p = c.patch_size
        scale = c.interpolation_scale
        if scale is None:
            scale = max(c.sample_size // 64, 1)
        x = self.pos_embed(x)
        table = positions(h // p, w // p, c.width, c.sample_size // p, scale, x.device)
        return (x + table).to(x.dtype)

    def _join_patches(self, x: Tensor, h: int, w: int) -> Tensor:
        """Patches [B, hw / p^2, p^2 * c_out] -> [B, c_in, h, w], the variance left out."""
        c_in = self.config.in_channels
        p = self.config.patch_size
        x = x.unflatten(1, (h // p, w // p))
        x = x.unflatten(-1, (p, p, -1))[..., :c_in]  # [B, h / p, w / p, p, p, c_in]
        x = torch.einsum("bhwpqc->bchpwq", x)
        return x.reshape(len(x), c_in, h, w)

    def _run(self, block: nn.Module, *inputs) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
