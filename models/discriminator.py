"""What tells real pictures from made ones: the patch discriminator, which needs no download, and the vision-aided one,
which looks through a frozen CLIP. Both give a list of logits, one tensor a level. For YOSO, what tells latents apart,
half a U-Net, and what tells small pictures apart: one logit each.

The weights of the first two are spectrally normalised (Miyato et al. 2018): divided by their largest singular value,
which a power iteration follows. The iteration is not hidden in the forward pass: `spectral_step` takes one, once an
optimizer step, so that the same step in more pieces, or on more processes, stays the same computation."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models import clip
from models.unet import UNet, timestep_embedding


class PatchDiscriminator(nn.Module):
    """Picture [B, 3, H, W] in [-1, 1] -> logits [[B, 1, ~H/8, ~W/8]], one a patch of 70 x 70 pixels. Source: Isola et
    al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks"; spectral norms for batch norms."""

    def __init__(self, width: int = 64, in_channels: int = 3):
        super().__init__()
        widths, strides = [in_channels, width, 2 * width, 4 * width, 8 * width], [2, 2, 2, 1]
        self.layers = nn.ModuleList([
            spectral_norm(nn.Conv2d(widths[i], widths[i + 1], 4, strides[i], padding=1)) for i in range(4)
        ])
        self.last = spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.eval()  # in training mode every forward pass would take a power step of its own

    def train(self, mode: bool = True) -> "PatchDiscriminator":
        return super().train(False)

    def forward(self, x: Tensor, draws: dict[str, Tensor] | None = None) -> list[Tensor]:
        """`draws`, of `draw_augmentation`, augment the pictures first."""
        if min(x.shape[2:]) < 24:
            raise ValueError(f"pictures of {x.shape[3]}x{x.shape[2]} are too small for the patch discriminator;"
                             " expected 24 pixels a side or more, or no adversarial loss (--lambda_gan 0)")
        x = x if draws is None else diff_augment(x, draws)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return [self.last(x)]


@torch.no_grad()
def spectral_step(discriminator: nn.Module) -> None:
    """One power iteration of every spectral norm under `discriminator`."""
    for module in discriminator.modules():
        if hasattr(module, "parametrizations"):
            module.parametrizations.train()
            module.weight  # noqa: B018  computing it in training mode takes the step
            module.parametrizations.eval()


DRAWS = ("brightness", "saturation", "contrast", "shift_y", "shift_x", "cut_y", "cut_x")


def draw_augmentation(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The chances of `diff_augment` for n pictures, whatever their size: of each kind n numbers in [0, 1)."""
    return dict(zip(DRAWS, torch.rand(n, len(DRAWS), generator=generator).unbind(1)))


def shift(x: Tensor, by: Tensor, dim: int) -> Tensor:
    """Picture i moved by `by[i]` pixels up (dim 2) or left (dim 3); what comes in is 0."""
    shape, n = [1, 1, 1, 1], x.shape[dim]
    shape[0], shape[dim] = len(x), n
    source = torch.arange(n, device=x.device) + by[:, None]  # [B, n]
    inside = (source >= 0) & (source < n)
    return torch.take_along_dim(x, source.clamp(0, n - 1).view(shape), dim) * inside.view(shape)


def diff_augment(x: Tensor, draws: dict[str, Tensor]) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] with another brightness, saturation and contrast, shifted by up to 1/8 of each
    side, with a grey hole of half of each side (less at the border). Gradients flow. Source: Zhao et al. 2020,
    "Differentiable Augmentation for Data-Efficient GAN Training"; the policy color,translation,cutout."""
    brightness, saturation, contrast = (draws[name].to(x).view(-1, 1, 1, 1) for name in DRAWS[:3])
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (contrast + 0.5) + mean

    def integer(name: str, low: int, high: int) -> Tensor:  # uniform over low, ..., high; in float64 it is never more
        return ((draws[name].double() * (high - low + 1)).floor().long() + low).to(x.device)

    hole = []
    for axis, dim in (("y", 2), ("x", 3)):
        n = x.shape[dim]
        reach, cut = int(n / 8 + 0.5), int(n / 2 + 0.5)
        x = shift(x, integer(f"shift_{axis}", -reach, reach), dim)
        start = integer(f"cut_{axis}", 0, n - cut % 2) - cut // 2
        offset = torch.arange(n, device=x.device) - start[:, None]  # [B, n]
        hole.append((offset >= 0) & (offset < cut))
    return x * ~(hole[0][:, None, :, None] & hole[1][:, None, None, :])


def blur(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, h - 1, w - 1]: the binomial 1 3 3 1 in both directions, zeros around."""
    kernel = x.new_tensor([1, 3, 3, 1]) / 8
    kernel = (kernel[:, None] * kernel).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


class MapHead(nn.Module):
    """Feature map [B, C, 7, 7] -> logits [B, 1, 3, 3]."""

    def __init__(self, c_in: int, c: int):
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(c_in, c, 3, padding=1))
        self.last = spectral_norm(nn.Conv2d(c, 1, 1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(blur(F.leaky_relu(self.conv(x), 0.2)))


class VisionAidedDiscriminator(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> logits of three levels, [B, 1, 3, 3], [B, 1, 3, 3], [B, 1]: heads on what a
    frozen CLIP sees after a third and two thirds of its layers, and on its embedding. Source: Kumari et al. 2022,
    "Ensembling Off-the-shelf Models for GAN Training"; `vision_aided_loss` with `cv_type="clip"`."""

    def __init__(self, vision: clip.ImageEncoder, width: int = 256):
        super().__init__()
        # In a tuple it is no submodule: not trained, saved, moved or unfrozen with the heads.
        self.vision = (vision.eval().requires_grad_(False),)
        c = vision.config
        self.after = (c.num_hidden_layers // 3, 2 * c.num_hidden_layers // 3)
        self.maps = nn.ModuleList([MapHead(c.hidden_size, width) for _ in self.after])
        self.vector = nn.Sequential(spectral_norm(nn.Linear(c.projection_dim, width)), nn.LeakyReLU(0.2),
                                    spectral_norm(nn.Linear(width, 1)))  # [B, C] -> [B, 1]
        self.eval()  # in training mode every forward pass would take a power step of its own

    def train(self, mode: bool = True) -> "VisionAidedDiscriminator":
        return super().train(False)

    def forward(self, x: Tensor, draws: dict[str, Tensor] | None = None) -> list[Tensor]:
        """`draws`, of `draw_augmentation`, augment the pictures first."""
        (vision,) = self.vision
        x = x if draws is None else diff_augment(x, draws)
        side = vision.config.image_size
        pixels = clip.normalise(F.interpolate(x, (side, side), mode="area"))
        *maps, embedding = vision.levels(pixels.to(vision.visual_projection.weight.dtype), self.after)
        return [*(head(m.to(x.dtype)) for head, m in zip(self.maps, maps)), self.vector(embedding.to(x.dtype))]


# ---------------------------------------------------------------------------------------- of latents, through a U-Net

def lower_half(network: UNet, share: bool = False) -> UNet:
    """A U-Net's way down and middle, of which only `features` works: a copy, or with `share` the same Parameters."""
    kept_out = {id(part): nn.Identity() for part in (network.up_blocks, network.conv_norm_out, network.conv_out)}
    return copy.deepcopy(network, kept_out | ({id(p): p for p in network.parameters()} if share else {}))


class AttentionPool(nn.Module):
    """Feature map [B, C, h, w] -> [B, c_out]: its mean looks at the mean and at every place, in heads of 16 channels.
    Positions are learned for a grid of `side` x `side` and interpolated for others. Source: Radford et al. 2021
    (CLIP's ResNets), in the form of guided-diffusion's `AttentionPool2d`."""

    def __init__(self, c: int, c_out: int, side: int):
        super().__init__()
        self.heads = max(c // 16, 1) if c % 16 == 0 else 1
        self.position_mean = nn.Parameter(torch.randn(c, 1) / c**0.5)
        self.positions = nn.Parameter(torch.randn(1, c, side, side) / c**0.5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.Linear(c, c_out)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions
        if positions.shape[2:] != x.shape[2:]:
            positions = F.interpolate(positions, x.shape[2:], mode="bicubic")
        mean = x.mean((2, 3))[:, :, None] + self.position_mean  # [B, C, 1]
        tokens = torch.cat([mean, (x + positions).flatten(2)], dim=2).transpose(1, 2)  # [B, 1 + hw, C]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for y in (self.to_q(tokens[:, :1]), self.to_k(tokens), self.to_v(tokens)))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


class LatentDiscriminator(nn.Module):
    """Latent [B, 4, h, w], the timestep [B] that it was made from and the caption's context -> logit [B, 1]. Its first
    half is a diffusion model's own, a copy that is trained on. Source: Luo et al. 2024, "You Only Sample Once"."""

    def __init__(self, network: UNet, width: int = 512):
        super().__init__()
        self.unet = lower_half(network)
        c, config = network.config.block_out_channels[-1], network.config
        side = max(config.sample_size // 2 ** (len(config.block_out_channels) - 1), 1)
        self.norm = nn.GroupNorm(config.norm_num_groups, c)
        self.pool = AttentionPool(c, width, side)
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        h = F.silu(self.norm(self.unet.features(x, t, context)))
        return self.last(F.silu(self.pool(h)))


class PixelDiscriminator(nn.Module):
    """The same for small pictures, which need no U-Net: picture [B, C, H, W] -> logit [B, 1]. Convolutions halve it
    until 4 to 7 places a side are left; the timestep shifts each level; the context's mean joins by a product (Miyato
    and Koyama 2018, "cGANs with Projection Discriminator")."""

    def __init__(self, in_channels: int, side: int, c_context: int, width: int = 64):
        super().__init__()
        levels = max(side // 4, 1).bit_length() - 1
        widths = [in_channels, *(width * min(2**i, 4) for i in range(levels + 1))]
        self.conv_in = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.down = nn.ModuleList([nn.Conv2d(a, b, 4, 2, padding=1) for a, b in zip(widths[1:], widths[2:])])
        self.time = nn.ModuleList([nn.Linear(width, c) for c in widths[1:]])
        self.last, self.context = nn.Linear(widths[-1], 1), nn.Linear(c_context, widths[-1])
        for conv in (self.conv_in, *self.down):  # PyTorch's own beginning loses half of the picture at each level
            nn.init.kaiming_normal_(conv.weight, 0.2)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor) -> Tensor:
        t = torch.full((), t, device=x.device) if isinstance(t, int) else t.to(x.device)
        t = timestep_embedding(t.expand(len(x)), self.time[0].in_features).to(x.dtype)
        h = self.conv_in(x)
        for down, time in zip(self.down, self.time):
            h = down(F.leaky_relu(h + time(t)[:, :, None, None], 0.2))
        h = F.leaky_relu(h + self.time[-1](t)[:, :, None, None], 0.2).mean((2, 3))  # [B, C]
        return self.last(h) + (h * self.context(context.mean(1))).mean(1, keepdim=True)
