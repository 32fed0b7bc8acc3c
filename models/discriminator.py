"""Discriminators: networks that learn to tell real pictures from generated ones.

- PatchDiscriminator looks at patches of 70 x 70 pixels and needs no download.
- VisionAidedDiscriminator has small heads on the features of a frozen CLIP.
- LatentDiscriminator, for YOSO, looks at latents through the encoder of a U-Net.
- PixelDiscriminator, for YOSO without a VAE, looks at small pictures.

The first two return a list of logits, one tensor per level; the other two return one logit.

The weights of the first two are spectrally normalised (Miyato et al. 2018, "Spectral
Normalization for Generative Adversarial Networks"): divided by their largest singular value, which
power iteration tracks. No forward pass takes a power iteration step. `spectral_step` takes one,
and a trainer calls it once per optimizer step, so that gradient accumulation and several
processes do not change the computation.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models import clip
from models.unet import UNet, timestep_embedding

# -------------------- spectral normalisation

@torch.no_grad()
def spectral_step(discriminator: nn.Module) -> None:
    """Takes one power iteration step for every spectral norm in the network."""
    for module in discriminator.modules():
        if hasattr(module, "parametrizations"):
            module.parametrizations.train()
            module.weight  # noqa: B018  computing it in training mode takes the step
            module.parametrizations.eval()


# -------------------- augmentation

# What `diff_augment` draws at random for each picture.
DRAWS = ("brightness", "saturation", "contrast", "shift_y", "shift_x", "cut_y", "cut_x")


def draw_augmentation(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random numbers for `diff_augment` of n pictures of any size: n in [0, 1) by each name."""
    numbers = torch.rand(n, len(DRAWS), generator=generator)
    return dict(zip(DRAWS, numbers.unbind(1)))


def diff_augment(x: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Augments pictures [B, 3, H, W] in [-1, 1], differentiably.

    Changes brightness, saturation and contrast, shifts by up to 1/8 of each side, and cuts out a
    grey rectangle of half of each side (less where it crosses the border). The random numbers
    come from `draw_augmentation`.

    Source: Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training", the
    policy color,translation,cutout.
    """
    x = jitter_colour(x, draws)

    inside = []
    for axis, dim in (("y", 2), ("x", 3)):
        n = x.shape[dim]
        reach = int(n / 8 + 0.5)
        by = uniform_integer(draws[f"shift_{axis}"], -reach, reach)
        x = shift(x, by.to(x.device), dim)

        cut = int(n / 2 + 0.5)
        start = uniform_integer(draws[f"cut_{axis}"], 0, n - cut % 2) - cut // 2
        place = torch.arange(n, device=x.device) - start.to(x.device)[:, None]  # [B, n]
        inside.append((place >= 0) & (place < cut))
    inside_y, inside_x = inside
    hole = inside_y[:, None, :, None] & inside_x[:, None, None, :]  # [B, 1, H, W]
    return x * ~hole


def jitter_colour(x: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Pictures [B, 3, H, W] with random brightness, saturation and contrast."""
    brightness = draws["brightness"].to(x).view(-1, 1, 1, 1)
    saturation = draws["saturation"].to(x).view(-1, 1, 1, 1)
    contrast = draws["contrast"].to(x).view(-1, 1, 1, 1)
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def uniform_integer(u: Tensor, low: int, high: int) -> Tensor:
    """Uniform numbers in [0, 1) -> uniform integers low, ..., high.

    In float64, where rounding never gives high + 1.
    """
    return (u.double() * (high - low + 1)).floor().long() + low


def shift(x: Tensor, by: Tensor, dim: int) -> Tensor:
    """Moves picture i by `by[i]` pixels up (dim 2) or left (dim 3), and fills with zeros."""
    n = x.shape[dim]
    shape = [len(x), 1, 1, 1]
    shape[dim] = n
    source = torch.arange(n, device=x.device) + by[:, None]  # [B, n]
    inside = (source >= 0) & (source < n)
    moved = torch.take_along_dim(x, source.clamp(0, n - 1).view(shape), dim)
    return moved * inside.view(shape)


# -------------------- patches of pictures

class PatchDiscriminator(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> [logits [B, 1, ~H/8, ~W/8]].

    Each logit sees 70 x 70 pixels. Source: Isola et al. 2017, "Image-to-Image Translation with
    Conditional Adversarial Networks", with spectral norms in place of batch norms.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        strides = [2, 2, 2, 1]
        self.layers = nn.ModuleList()
        for i, stride in enumerate(strides):
            conv = nn.Conv2d(widths[i], widths[i + 1], 4, stride, padding=1)
            self.layers.append(spectral_norm(conv))
        self.last = spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.eval()

    def train(self, mode: bool = True) -> "PatchDiscriminator":
        """Stays in evaluation mode: in training mode, every forward pass takes a power step."""
        return super().train(False)

    def forward(self, x: Tensor, draws: dict[str, Tensor] | None = None) -> list[Tensor]:
        """With `draws` of `draw_augmentation`, augments the pictures first."""
        if min(x.shape[2:]) < 24:
            raise ValueError(
                f"pictures of {x.shape[3]}x{x.shape[2]} are too small for the patch discriminator;"
                " expected 24 pixels a side or more, or no adversarial loss (--lambda_gan 0)"
            )
        if draws is not None:
            x = diff_augment(x, draws)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return [self.last(x)]


# -------------------- features of a frozen CLIP

def blur(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, h - 1, w - 1]: binomial filter 1 3 3 1 both ways, zero padding."""
    C = x.shape[1]
    kernel = x.new_tensor([1, 3, 3, 1]) / 8
    kernel = (kernel[:, None] * kernel).expand(C, 1, 4, 4)
    return F.conv2d(x, kernel, padding=1, groups=C)


class MapHead(nn.Module):
    """Feature map [B, C, 7, 7] -> logits [B, 1, 3, 3]."""

    def __init__(self, c_in: int, c: int):
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(c_in, c, 3, padding=1))
        self.last = spectral_norm(nn.Conv2d(c, 1, 1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv(x), 0.2)  # [B, c, 7, 7]
        return self.last(blur(h))


class VisionAidedDiscriminator(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> logits [B, 1, 3, 3], [B, 1, 3, 3] and [B, 1].

    The heads see what a frozen CLIP computes after a third and two thirds of its layers, and its
    embedding. Source: Kumari et al. 2022, "Ensembling Off-the-shelf Models for GAN Training";
    `vision_aided_loss` with `cv_type="clip"`.
    """

    def __init__(self, vision: clip.ImageEncoder, width: int = 256):
        super().__init__()
        # In a tuple CLIP is no submodule: it is not trained, saved, moved or unfrozen with the
        # heads.
        self.vision = (vision.eval().requires_grad_(False),)
        config = vision.config
        layers = config.num_hidden_layers
        self.after = (layers // 3, 2 * layers // 3)
        self.maps = nn.ModuleList([MapHead(config.hidden_size, width) for _ in self.after])
        self.vector = nn.Sequential(
            spectral_norm(nn.Linear(config.projection_dim, width)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(width, 1)),
        )
        self.eval()

    def train(self, mode: bool = True) -> "VisionAidedDiscriminator":
        """Stays in evaluation mode: in training mode, every forward pass takes a power step."""
        return super().train(False)

    def forward(self, x: Tensor, draws: dict[str, Tensor] | None = None) -> list[Tensor]:
        """With `draws` of `draw_augmentation`, augments the pictures first."""
        (vision,) = self.vision
        if draws is not None:
            x = diff_augment(x, draws)
        side = vision.config.image_size
        # MPS has no area pooling to a size that does not divide the picture's.
        device = "cpu" if x.device.type == "mps" else x.device
        small = F.interpolate(x.to(device), (side, side), mode="area").to(x.device)
        pixels = clip.normalise(small).to(vision.visual_projection.weight.dtype)
        *maps, embedding = vision.levels(pixels, self.after)

        logits = []
        for head, features in zip(self.maps, maps):
            logits.append(head(features.to(x.dtype)))
        logits.append(self.vector(embedding.to(x.dtype)))
        return logits


# -------------------- latents, through a U-Net

def lower_half(network: UNet, share: bool = False) -> UNet:
    """The encoder and the middle block of a U-Net: a UNet of which only `features` works.

    It is a copy; with `share` it has the same Parameter objects instead.
    """
    # deepcopy leaves out what its memo knows, and puts the memo's value in its place.
    memo = {}
    for part in (network.up_blocks, network.conv_norm_out, network.conv_out):
        memo[id(part)] = nn.Identity()
    if share:
        for p in network.parameters():
            memo[id(p)] = p
    return copy.deepcopy(network, memo)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class AttentionPool(nn.Module):
    """Feature map [B, C, h, w] -> [B, c_out].

    The map's mean attends to itself and to every place, in heads of 16 channels (in one head if 16
    does not divide C). Positions are learned for a grid of `side` x `side` and interpolated for
    others. Source: Radford et al. 2021 (CLIP's ResNets), in the form of guided-diffusion's
    `AttentionPool2d`.
    """

    def __init__(self, c: int, c_out: int, side: int):
        super().__init__()
        self.heads = c // 16 if c % 16 == 0 else 1
        self.position_mean = nn.Parameter(torch.randn(c, 1) / c**0.5)
        self.positions = nn.Parameter(torch.randn(1, c, side, side) / c**0.5)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.Linear(c, c_out)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions
        if positions.shape[2:] != x.shape[2:]:
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic")
        mean = x.mean((2, 3))[:, :, None] + self.position_mean  # [B, C, 1]
        places = (x + positions).flatten(2)  # [B, C, hw]
        tokens = torch.cat([mean, places], dim=2).transpose(1, 2)  # [B, 1 + hw, C]

        q = split_heads(self.to_q(tokens[:, :1]), self.heads)  # [B, heads, 1, C / heads]
        k = split_heads(self.to_k(tokens), self.heads)  # [B, heads, 1 + hw, C / heads]
        v = split_heads(self.to_v(tokens), self.heads)
        h = F.scaled_dot_product_attention(q, k, v)  # [B, heads, 1, C / heads]
        return self.to_out(h.transpose(1, 2).flatten(1))


class LatentDiscriminator(nn.Module):
    """Latents [B, 4, h, w], a timestep each [B], and captions -> logits [B, 1].

    The latents are clean ones: data, or G's predictions of x0. The timestep is that of the noisy
    latents from which G made the fakes; train_yoso.py gives the real ones the same.

    It begins with a trainable copy of the encoder and middle block of a diffusion model's U-Net.
    Source: Luo et al. 2024, "You Only Sample Once".
    """

    def __init__(self, network: UNet, width: int = 512):
        super().__init__()
        self.unet = lower_half(network)
        config = network.config
        c = config.block_out_channels[-1]
        halvings = len(config.block_out_channels) - 1
        side = max(config.sample_size // 2**halvings, 1)
        self.norm = nn.GroupNorm(config.norm_num_groups, c)
        self.pool = AttentionPool(c, width, side)
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        """t: the timestep of what G made the fakes from. context [B, N, C]: the captions'."""
        h = self.unet.features(x, t, context)
        h = F.silu(self.norm(h))
        return self.last(F.silu(self.pool(h)))


# -------------------- small pictures

class PixelDiscriminator(nn.Module):
    """Pictures [B, C, side, side] in [-1, 1], timesteps [B] (see LatentDiscriminator) and captions
    [B, N, c_context] -> logits [B, 1].

    For pictures so small that no U-Net is needed. Convolutions halve them until 4 to 7 pixels a
    side are left. The timestep is added at each level, and the captions enter by an inner product
    (Miyato and Koyama 2018, "cGANs with Projection Discriminator").
    """

    def __init__(self, in_channels: int, side: int, c_context: int, width: int = 64):
        super().__init__()
        halvings = max(side // 4, 1).bit_length() - 1  # log2(side / 4), rounded down
        widths = [width * min(2**i, 4) for i in range(halvings + 1)]
        places = (side // 2**halvings) ** 2
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList([
            nn.Conv2d(c_in, c_out, 4, 2, padding=1) for c_in, c_out in zip(widths, widths[1:])
        ])
        self.norm = nn.ModuleList([nn.GroupNorm(8, c) for c in widths[1:]])
        self.time = nn.ModuleList([nn.Linear(width, c) for c in widths])
        self.flat = nn.Linear(places * widths[-1], widths[-1])
        self.last = nn.Linear(widths[-1], 1)
        self.context = nn.Linear(c_context, widths[-1])
        self.register_buffer("context_mean", torch.zeros(c_context))
        self.register_buffer("context_std", torch.ones(()))
        # With PyTorch's default initialisation, half of the signal would be lost at each level.
        for conv in (self.conv_in, *self.down):
            nn.init.kaiming_normal_(conv.weight, 0.2)
            nn.init.zeros_(conv.bias)
        # Logits begin at 0: those of random heads are noise, which takes long to unlearn.
        for head in (self.last, self.context):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    @torch.no_grad()
    def standardise(self, contexts: Tensor) -> None:
        """Takes mean and standard deviation of captions from contexts [M, N, C] of the data.

        What all captions have in common would drown what tells them apart: in the output of a
        random text encoder it is ten times as large.
        """
        means = contexts.mean(1).to(self.context_mean)  # [M, C]
        self.context_mean.copy_(means.mean(0))
        std = (means - self.context_mean).square().mean().sqrt()
        if std > 1e-6:  # else there is one caption alone
            self.context_std.copy_(std)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        """t: the timestep of what G made the fakes from. context [B, N, C]: the captions'."""
        if isinstance(t, int):
            t = torch.full((), t, device=x.device)
        t = t.to(x.device).expand(len(x))
        t = timestep_embedding(t, self.time[0].in_features).to(x.dtype)  # [B, width]

        h = self.conv_in(x) + self.time[0](t)[:, :, None, None]
        h = F.leaky_relu(h, 0.2)
        for down, norm, time in zip(self.down, self.norm, self.time[1:]):
            h = norm(down(h)) + time(t)[:, :, None, None]
            h = F.leaky_relu(h, 0.2)
        h = F.leaky_relu(self.flat(h.flatten(1)), 0.2)  # [B, C]

        words = (context.mean(1) - self.context_mean) / self.context_std
        match = (h * self.context(words)).sum(1, keepdim=True)  # [B, 1]
        return self.last(h) + match
