"""DINO's vision transformer, and the structure distance: how far the arrangement of a picture's parts is from that of
another, whatever their looks. Sources: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
Transformers"; Tumanyan et al. 2022, "Splicing ViT Features for Semantic Appearance Transfer", as the validation of
img2img-turbo has it."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class DINOConfig:
    """ViT-B/8."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 8
    side: int = 28  # of the grid of learned positions


VIT_B8 = DINOConfig()


class Attention(nn.Module):
    """Multi-head attention of [B, N, C] to itself; one matrix gives q, k and v."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(c, 3 * c)
        self.proj = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def keys(self, x: Tensor) -> Tensor:
        """Of all heads, one behind the other: [B, N, C]."""
        c = x.shape[-1]
        return F.linear(x, self.qkv.weight[c:2 * c], self.qkv.bias[c:2 * c])


class MLP(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """[B, N, C] -> [B, N, C], norms first."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c, eps=1e-6), nn.LayerNorm(c, eps=1e-6)
        self.attn = Attention(c, heads)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, c: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, c, patch, stride=patch)  # what is left at the right and at the bottom is not seen


class DINO(nn.Module):
    """Module names are those of the original repository."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.config = c = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c.side ** 2, c.width))
        self.patch_embed = PatchEmbed(c.width, c.patch)
        self.blocks = nn.ModuleList([Block(c.width, c.heads) for _ in range(c.depth)])
        self.norm = nn.LayerNorm(c.width, eps=1e-6)

    def positions(self, H: int, W: int) -> Tensor:
        """Of a picture of H x W pixels, [1, 1 + h w, C]: the learned ones, but interpolated bicubically where it is not
        a square of their grid.

        The original interpolates by the factor (h + 0.1) / 28, so that rounding never loses a row; `transformers` by
        h / 28. The released evaluation loads the original from torch.hub, so the tenth is here too, and so is that a
        picture of 224 x 230 is interpolated although its grid is the learned one's."""
        side, patch = self.config.side, self.config.patch
        if H == W and H // patch == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        factors = ((H // patch + 0.1) / side, (W // patch + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> tokens [B, 1 + (H / 8) (W / 8), C], the class token first."""
        patches = self.patch_embed.proj(pixels)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return x + self.positions(*pixels.shape[2:])

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> tokens after the last norm."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def keys(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> keys of the last block [B, 1 + (H / 8) (W / 8), C]."""
        x = self.embed(pixels)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].attn.keys(self.blocks[-1].norm1(x))


def pillow_weights(n_in: int, n_out: int) -> Tensor:
    """What each of n_in pixels gives to each of n_out, [n_out, n_in], in whole parts of 2^22, as Pillow computes it: a
    triangle as wide as the shrinkage."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    centre = (torch.arange(n_out, dtype=torch.float64) + 0.5) * scale
    weights = (1 - ((torch.arange(n_in) + 0.5 - centre[:, None]) / support).abs()).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True) * 2 ** 22 + 0.5).floor()


def prepare(x: Tensor, short: int = 224) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> normalised pixels, their short side 224: to the last level what torchvision's
    `Resize(224), ToTensor(), Normalize(...)` makes of the 8-bit Pillow picture. No gradient flows. (Pillow 13 goes down
    before across where a picture is more than twice as high as wide, and differs by a level there; the released
    figures are older.)"""
    H, W = x.shape[2:]
    h, w = short * H // min(H, W), short * W // min(H, W)
    levels = ((x.detach().cpu().double().clamp(-1, 1) + 1) * 127.5).round()  # on the CPU: not every device has float64
    for n, dim in ((w, 3), (h, 2)):  # Pillow rounds to whole levels in between too
        weights = pillow_weights(levels.shape[dim], n)
        levels = (levels.movedim(dim, 3) @ weights.T / 2 ** 22 + 0.5).floor().clamp(0, 255).movedim(3, dim)
    mean, std = (levels.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((levels / 255 - mean) / std).to(x)


def self_similarity(keys: Tensor) -> Tensor:
    """Keys [B, N, C] -> the cosines of every two, [B, N, N]."""
    norm = keys.norm(dim=2, keepdim=True)
    return keys @ keys.mT / (norm @ norm.mT).clamp(min=1e-8)


def structure_distance(network: DINO, a: Tensor, b: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], both of one size -> mean squared difference of their keys' self-similarities,
    [B]. The paper prints it times 100, the released script logs it as it is."""
    if a.shape != b.shape:
        raise ValueError(f"the structure of pictures of shapes {list(a.shape)} and {list(b.shape)} cannot be compared;"
                         " both must be of one size")
    difference = self_similarity(network.keys(prepare(a))) - self_similarity(network.keys(prepare(b)))
    return (difference ** 2).mean((1, 2))


HUB = [  # the names of the Hub's files -> the original's
    (r"^embeddings\.cls_token", "cls_token"), (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"), (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."), (r"^layernorm\.", "norm."),
    (r"\.attention\.attention\.", ".attn."), (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"\.output\.dense\.", ".mlp.fc2."),
]


def from_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Hub file's names -> the original's, query, key and value joined."""
    ours = {}
    for name, t in tensors.items():
        for pattern, replacement in HUB:
            name = re.sub(pattern, replacement, name)
        ours[name] = t
    for name in [name for name in ours if ".attn.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in ours for part in parts):
            ours[name.replace("query", "qkv")] = torch.cat([ours.pop(part) for part in parts])
    return ours


def from_state_dict(tensors: dict[str, Tensor], config: DINOConfig = VIT_B8) -> DINO:
    """DINO, frozen, made of the tensors of the original's file or of the Hub's (`facebook/dino-vitb8`)."""
    with torch.device("meta"):
        network = DINO(config)
    if any(name.startswith("embeddings.") for name in tensors):
        tensors = from_hub(tensors)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
