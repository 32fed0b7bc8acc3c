"""DINO's vision transformer, and the structure distance: how far the arrangement of a picture's parts is from that of
another, whatever their looks. Sources: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
Transformers"; Tumanyan et al. 2022, "Splicing ViT Features for Semantic Appearance Transfer", as the validation of
img2img-turbo has it."""

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
    """Multi-head attention of [B, N, C] to itself."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({name: nn.Linear(c, c) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(c, c)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self.attention.values())
        return self.output["dense"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """[B, N, C] -> [B, N, C], norms first."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(c, eps=1e-6), nn.LayerNorm(c, eps=1e-6)
        self.attention = Attention(c, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c, 4 * c)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * c, c)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class Embeddings(nn.Module):
    """Normalised pixels [B, 3, H, W] -> tokens [B, 1 + (H / 8) (W / 8), C], the class token first. What is left at the
    right and at the bottom is not seen."""

    def __init__(self, c: DINOConfig):
        super().__init__()
        self.patch, self.side = c.patch, c.side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + c.side ** 2, c.width))
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, c.width, c.patch, stride=c.patch)})

    def positions(self, H: int, W: int) -> Tensor:
        """Of a picture of H x W pixels, [1, 1 + h w, C]: the learned ones, but interpolated bicubically where it is not
        a square of their grid.

        The original interpolates by the factor (h + 0.1) / 28, so that rounding never loses a row; `transformers` by
        h / 28. The released evaluation loads the original from torch.hub, so the tenth is here too, and so is that a
        picture of 224 x 230 is interpolated although its grid is the learned one's."""
        learned, side, patch = self.position_embeddings, self.side, self.patch
        if H == W and H // patch == side:
            return learned
        grid = learned[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        factors = ((H // patch + 0.1) / side, (W // patch + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([learned[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
        return x + self.positions(*pixels.shape[2:])


class DINO(nn.Module):
    """Module names are those of the Hub's file."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList([Layer(config.width, config.heads) for _ in range(config.depth)])})
        self.layernorm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> tokens after the last norm."""
        x = self.embeddings(pixels)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.layernorm(x)

    def keys(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> keys of the last layer, of all heads one behind the other:
        [B, 1 + (H / 8) (W / 8), C]."""
        x, (*layers, last) = self.embeddings(pixels), self.encoder["layer"]
        for layer in layers:
            x = layer(x)
        return last.attention.attention["key"](last.layernorm_before(x))


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


def from_state_dict(tensors: dict[str, Tensor], config: DINOConfig = VIT_B8) -> DINO:
    """DINO, frozen, made of the tensors of the Hub's file (`facebook/dino-vitb8`)."""
    with torch.device("meta"):
        network = DINO(config)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
