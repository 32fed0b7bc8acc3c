"""DINO's vision transformer, and the structure distance between two pictures.

The structure distance compares how the parts of a picture are arranged, whatever they look like.

Sources: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers"; Tumanyan
et al. 2022, "Splicing ViT Features for Semantic Appearance Transfer", as img2img-turbo computes it
in its validation.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Mean and standard deviation of ImageNet, per channel, in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SHORT = 224  # pixels of the short side


@dataclass
class DINOConfig:
    """The defaults are ViT-B/8."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 8
    side: int = 28  # of the square grid of learned positions, in patches


VIT_B8 = DINOConfig()


# -------------------- network

def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention of [B, N, C]."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({
            "query": nn.Linear(c, c),
            "key": nn.Linear(c, c),
            "value": nn.Linear(c, c),
        })
        self.output = nn.ModuleDict({"dense": nn.Linear(c, c)})

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.attention["query"](x), self.heads)  # [B, heads, N, C / heads]
        k = split_heads(self.attention["key"](x), self.heads)
        v = split_heads(self.attention["value"](x), self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.output["dense"](h.transpose(1, 2).flatten(2))  # [B, N, C]


class Layer(nn.Module):
    """[B, N, C] -> [B, N, C]: pre-norm attention and MLP."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(c, eps=1e-6)
        self.layernorm_after = nn.LayerNorm(c, eps=1e-6)
        self.attention = Attention(c, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c, 4 * c)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * c, c)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        h = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](h)


class Embeddings(nn.Module):
    """Normalised pixels [B, 3, H, W] -> tokens [B, 1 + h w, C], the class token first.

    h = H // 8 and w = W // 8: pixels beyond the last whole patch are not seen.
    """

    def __init__(self, c: DINOConfig):
        super().__init__()
        self.patch = c.patch
        self.side = c.side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + c.side**2, c.width))
        projection = nn.Conv2d(3, c.width, c.patch, stride=c.patch)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})

    def positions(self, H: int, W: int) -> Tensor:
        """Position embeddings [1, 1 + h w, C] of a picture of H x W pixels.

        They are the learned ones for a square with the learned grid (224 x 224), and interpolated
        bicubically for all other sizes.

        The original interpolates by the factor (h + 0.1) / 28, so that rounding never loses a row;
        `transformers` uses h / 28. The released evaluation loads the original from torch.hub, so
        that this code follows the original. For the same reason a picture of 224 x 230 is
        interpolated, although it has the learned grid.
        """
        learned = self.position_embeddings
        h = H // self.patch
        w = W // self.patch
        if H == W and h == self.side:
            return learned
        grid = learned[:, 1:].unflatten(1, (self.side, self.side))
        grid = grid.permute(0, 3, 1, 2)  # [1, C, 28, 28]
        factors = ((h + 0.1) / self.side, (w + 0.1) / self.side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")  # [1, C, h, w]
        return torch.cat([learned[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](pixels)  # [B, C, h, w]
        patches = patches.flatten(2).transpose(1, 2)  # [B, h w, C]
        class_token = self.cls_token.expand(len(pixels), -1, -1)
        tokens = torch.cat([class_token, patches], dim=1)
        return tokens + self.positions(*pixels.shape[2:])


class DINO(nn.Module):
    """Module names are those of the Hub's file (`facebook/dino-vitb8`)."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = [Layer(config.width, config.heads) for _ in range(config.depth)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.layernorm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> tokens [B, 1 + h w, C] after the last norm."""
        x = self.embeddings(pixels)
        for layer in self.encoder["layer"].children():
            x = layer(x)
        return self.layernorm(x)

    def keys(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> keys of the last layer [B, 1 + h w, C].

        The keys of all heads are concatenated.
        """
        *layers, last = self.encoder["layer"].children()
        x = self.embeddings(pixels)
        for layer in layers:
            x = layer(x)
        return last.attention.attention["key"](last.layernorm_before(x))


def from_state_dict(tensors: dict[str, Tensor], config: DINOConfig = VIT_B8) -> DINO:
    """A frozen DINO from the tensors of the Hub's file (`facebook/dino-vitb8`)."""
    with torch.device("meta"):
        network = DINO(config)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


# -------------------- preparation of pictures

def pillow_weights(n_in: int, n_out: int) -> Tensor:
    """Pillow's bilinear resizing from n_in to n_out pixels as a matrix [n_out, n_in].

    A triangle filter, as wide as the shrinkage. Pillow computes with integers: the weights are in
    units of 2^-22.
    """
    scale = n_in / n_out
    support = max(scale, 1.0)
    centre = (torch.arange(n_out, dtype=torch.float64) + 0.5) * scale
    distance = torch.arange(n_in) + 0.5 - centre[:, None]  # [n_out, n_in]
    weights = (1 - (distance / support).abs()).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True) * 2**22 + 0.5).floor()


def prepare(x: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> normalised pixels whose short side is 224.

    Equals torchvision's `Resize(224), ToTensor(), Normalize(...)` of the 8-bit Pillow picture, to
    the last level. No gradient flows.

    Pillow 13 resizes the height first where a picture is more than twice as high as wide, and
    differs by one level there. The released figures come from older versions.
    """
    H, W = x.shape[2:]
    h = SHORT * H // min(H, W)
    w = SHORT * W // min(H, W)
    # On the CPU, because not every device has float64.
    levels = ((x.detach().cpu().double().clamp(-1, 1) + 1) * 127.5).round()
    levels = _resize_levels(levels, w, dim=3)
    levels = _resize_levels(levels, h, dim=2)
    mean = levels.new_tensor(MEAN).view(3, 1, 1)
    std = levels.new_tensor(STD).view(3, 1, 1)
    return ((levels / 255 - mean) / std).to(x)


def _resize_levels(levels: Tensor, n: int, dim: int) -> Tensor:
    """Resizes one dimension of 8-bit levels to n and rounds to whole levels, as Pillow does."""
    weights = pillow_weights(levels.shape[dim], n)
    resized = levels.movedim(dim, 3) @ weights.T / 2**22
    return (resized + 0.5).floor().clamp(0, 255).movedim(3, dim)


# -------------------- structure distance

def self_similarity(keys: Tensor) -> Tensor:
    """Keys [B, N, C] -> cosine similarities of every two, [B, N, N]."""
    norm = keys.norm(dim=2, keepdim=True)  # [B, N, 1]
    return keys @ keys.mT / (norm @ norm.mT).clamp(min=1e-8)


def structure_distance(network: DINO, a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of the self-similarities of two pictures' keys, [B].

    a and b: pictures [B, 3, H, W] in [-1, 1] of the same size. The paper prints the distance
    times 100; the released script logs it as it is.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"pictures of shapes {list(a.shape)} and {list(b.shape)} have no structure distance;"
            " both must be of one size"
        )
    similarity_a = self_similarity(network.keys(prepare(a)))
    similarity_b = self_similarity(network.keys(prepare(b)))
    return ((similarity_a - similarity_b) ** 2).mean((1, 2))
