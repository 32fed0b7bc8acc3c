"""The discriminators: spectral norms, heads on a frozen CLIP, augmentation, losses.

What the official packages compute is written out here by hand.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, parameters, randomise, relative
from torch import Tensor, nn

from models.clip import ImageEncoder, VisionConfig
from models.discriminator import (
    LatentDiscriminator,
    PatchDiscriminator,
    PixelDiscriminator,
    VisionAidedDiscriminator,
    blur,
    diff_augment,
    draw_augmentation,
    lower_half,
    spectral_step,
)
from models.unet import UNet, UNetConfig, timestep_embedding
from train_pix2pix_turbo import cross_entropy

# Small widths, and a grid of 7 x 7 tokens as in ViT-B/32.
VISION = VisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=56,
    patch_size=8,
    projection_dim=20,
)
LOGITS = [(2, 1, 3, 3), (2, 1, 3, 3), (2, 1)]


def tiny() -> VisionAidedDiscriminator:
    vision = randomise(ImageEncoder(VISION).double())
    return randomise(VisionAidedDiscriminator(vision, width=16).double(), seed=1)


def spectral_layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, "parametrizations")]


# -------------------- spectral norms

def patch() -> PatchDiscriminator:
    return PatchDiscriminator(4).double()


@torch.no_grad()
@pytest.mark.parametrize("make", [patch, tiny], ids=["patch", "vision-aided"])
def test_spectral_steps_bring_the_largest_singular_values_to_one_and_forward_passes_do_not(make):
    discriminator = randomise(make(), seed=1)
    x = normal(2, 3, 40, 40)
    layers = spectral_layers(discriminator)
    weighted = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == len(weighted)

    before = {name: t.clone() for name, t in discriminator.state_dict().items()}

    def changed() -> list[str]:
        state = discriminator.state_dict()
        return [name for name, t in state.items() if not torch.equal(t, before[name])]

    discriminator.train()
    assert not any(module.training for module in discriminator.modules())
    discriminator(x)
    assert changed() == []

    spectral_step(discriminator)
    # Each layer has two vectors _u and _v. The _u of a weight of one row is always 1.
    assert sum(name.endswith("_v") for name in changed()) == len(layers)
    assert all(name.endswith(("_u", "_v")) for name in changed())
    for _ in range(300):
        spectral_step(discriminator)
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert abs(largest - 1) < 1e-6


# -------------------- patch discriminator

def test_a_patch_logit_sees_70_pixels():
    discriminator = randomise(PatchDiscriminator(4).double())
    x = normal(1, 3, 128, 128).requires_grad_()
    (logits,) = discriminator(x)
    assert logits.shape == (1, 1, 14, 14)
    (gradient,) = torch.autograd.grad(logits[0, 0, 7, 7], x)
    seen = gradient[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]
    with pytest.raises(ValueError, match="23x64 are too small"):
        discriminator(torch.zeros(1, 3, 64, 23).double())


# -------------------- vision-aided discriminator

def test_blur_is_1_3_3_1_both_ways_with_zero_padding():
    x = torch.zeros(1, 2, 7, 7, dtype=torch.float64)
    x[0, 1, 3, 3] = 64
    x[0, 0, 0, 6] = 64
    line = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64)
    expected = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    expected[0, 1, 1:5, 1:5] = line[:, None] * line
    expected[0, 0, :2, 4:] = torch.tensor([[3.0, 9], [1, 3]])  # the part of the kernel inside
    assert torch.equal(blur(x), expected)


@torch.no_grad()
def test_logits_of_the_three_levels_are_the_heads_written_out():
    discriminator = tiny()
    for _ in range(300):
        spectral_step(discriminator)
    x = normal(2, 3, 80, 47).clamp(-1, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    pixels = F.adaptive_avg_pool2d(x * 0.5 + 0.5, 56)
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    # After a third and two thirds of the three layers.
    *maps, embedding = discriminator.vision[0].levels(pixels, (1, 2))

    def divided(layer: nn.Module) -> tuple[Tensor, Tensor]:
        weight = layer.parametrizations.weight.original
        return weight / torch.linalg.matrix_norm(weight.flatten(1), 2), layer.bias

    expected = []
    for head, m in zip(discriminator.maps, maps):
        weight, bias = divided(head.conv)
        m = F.leaky_relu(F.conv2d(m, weight, bias, padding=1), 0.2)  # [2, 16, 7, 7]
        blurred = torch.stack([blur(channel[None])[0] for channel in m.flatten(0, 1)[:, None]])
        blurred = blurred.view(2, 16, 6, 6)
        weight, bias = divided(head.last)
        expected.append((blurred[:, :, ::2, ::2] * weight).sum(1, keepdim=True) + bias)
    w1, b1 = divided(discriminator.vector[0])
    w2, b2 = divided(discriminator.vector[2])
    h = embedding @ w1.T + b1
    expected.append(torch.where(h > 0, h, 0.2 * h) @ w2.T + b2)
    logits = discriminator(x)
    assert [tuple(level.shape) for level in logits] == LOGITS
    assert max(relative(a, b) for a, b in zip(logits, expected)) < 1e-6


def test_the_frozen_clip_is_not_trained_saved_or_unfrozen():
    discriminator = tiny()
    vision = discriminator.vision[0]
    discriminator.requires_grad_(False).requires_grad_(True).train()
    assert not vision.training and not any(p.requires_grad for p in vision.parameters())
    map_head = 16 * 24 * 9 + 16 + 16 + 1
    vector_head = 16 * 20 + 16 + 16 + 1
    assert parameters(discriminator) == 2 * map_head + vector_head
    assert all(name.startswith(("maps.", "vector.")) for name in discriminator.state_dict())


def test_gradients_reach_the_picture_and_the_heads_through_clip():
    discriminator = tiny()
    draws = draw_augmentation(1, torch.Generator().manual_seed(0))
    x = normal(1, 3, 20, 24).requires_grad_()
    loss = cross_entropy(discriminator(x, draws), 0.8)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    heads = torch.autograd.grad(loss, list(discriminator.parameters()))
    assert all(g.abs().sum() > 0 for g in heads)

    direction = normal(1, 3, 20, 24, seed=1)
    step = 1e-6
    with torch.no_grad():
        after = cross_entropy(discriminator(x + step * direction, draws), 0.8)
        before = cross_entropy(discriminator(x - step * direction, draws), 0.8)
    slope = (after - before) / (2 * step)
    assert abs((gradient * direction).sum() / slope - 1) < 1e-6


# -------------------- augmentation

def augmented(x: Tensor, u: dict[str, float]) -> Tensor:
    """Augments one picture [3, H, W] pixel by pixel, with the numbers `u` in [0, 1)."""
    _, H, W = x.shape
    x = x + (u["brightness"] - 0.5)
    x = (x - x.mean(0)) * 2 * u["saturation"] + x.mean(0)
    x = (x - x.mean()) * (u["contrast"] + 0.5) + x.mean()

    dy = augmented_shift(u["shift_y"], H)
    dx = augmented_shift(u["shift_x"], W)
    top, bottom = augmented_cut(u["cut_y"], H)
    left, right = augmented_cut(u["cut_x"], W)
    out = torch.zeros_like(x)
    for i in range(H):
        for j in range(W):
            hole = top <= i < bottom and left <= j < right
            if 0 <= i + dy < H and 0 <= j + dx < W and not hole:
                out[:, i, j] = x[:, i + dy, j + dx]
    return out


def augmented_shift(u: float, side: int) -> int:
    """A shift of up to 1/8 of a side."""
    reach = int(side * 0.125 + 0.5)
    return math.floor(u * (2 * reach + 1)) - reach


def augmented_cut(u: float, side: int) -> tuple[int, int]:
    """Where a cutout of half of a side begins and ends."""
    cut = int(side * 0.5 + 0.5)
    start = math.floor(u * (side + 1 - cut % 2)) - cut // 2
    return start, start + cut


@pytest.mark.parametrize("size", [(16, 24), (13, 30), (9, 9)], ids=str)
def test_augmentation_is_color_translation_cutout(size):
    x = normal(6, 3, *size)
    draws = draw_augmentation(6, torch.Generator().manual_seed(0))
    # The smallest and the largest number that can be drawn.
    draws["shift_y"][0] = 0.0
    draws["shift_x"][0] = 0.0
    draws["cut_y"][1] = 0.0
    draws["cut_x"][1] = 0.0
    largest = 1 - 2**-24
    draws["shift_y"][2] = largest
    draws["shift_x"][2] = largest
    draws["cut_y"][3] = largest
    draws["cut_x"][3] = largest
    expected = []
    for i in range(6):
        expected.append(augmented(x[i], {name: u[i].item() for name, u in draws.items()}))
    assert relative(diff_augment(x, draws), torch.stack(expected)) < 1e-12


def test_shifts_and_holes_have_the_sizes_of_the_policy():
    n = 400
    draws = draw_augmentation(n, torch.Generator().manual_seed(0))
    for u in draws.values():
        assert u.shape == (n,)
        assert 0 <= u.min() < 0.02 and 0.98 < u.max() < 1
    x = normal(n, 3, 32, 48).abs() + 1
    # With 0.5 everywhere nothing changes, except for a hole in the middle.
    still = {name: torch.full_like(u, 0.5) for name, u in draws.items()}
    left = diff_augment(x, still | {"cut_y": draws["cut_y"]})[:, :, :, :12]
    assert relative(left, x[:, :, :, :12]) < 1e-12

    cuts = {"cut_y": draws["cut_y"], "cut_x": draws["cut_x"]}
    holes = (diff_augment(x, still | cuts) == 0).all(1)  # [n, 32, 48]
    assert holes.any(2).sum(1).unique().tolist() == list(range(8, 17))
    assert holes.any(1).sum(1).unique().tolist() == list(range(12, 25))

    shifts = {"shift_y": draws["shift_y"], "shift_x": draws["shift_x"]}
    corner = {"cut_y": torch.zeros(n), "cut_x": torch.zeros(n)}
    empty = (diff_augment(x, still | shifts | corner) == 0).all(1)
    assert empty[:, 20].all(1).sum() == 0
    assert empty[:, 8:, :].all(2).sum(1).unique().tolist() == [0, 1, 2, 3, 4]
    assert empty[:, :, 12:].all(1).sum(1).unique().tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_pictures_augmentation_is_its_row_of_the_global_batch():
    x = normal(6, 3, 16, 16)
    draws = draw_augmentation(6, torch.Generator().manual_seed(0))
    slices = []
    for i in (0, 2, 4):
        own = {name: u[i:i + 2] for name, u in draws.items()}
        slices.append(diff_augment(x[i:i + 2], own))
    assert torch.equal(torch.cat(slices), diff_augment(x, draws))
    again = draw_augmentation(6, torch.Generator().manual_seed(0))
    assert all(torch.equal(again[name], draws[name]) for name in draws)


def test_augmentation_lets_gradients_through():
    draws = draw_augmentation(2, torch.Generator().manual_seed(1))
    x = normal(2, 3, 6, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, draws), x)


# -------------------- losses

@pytest.mark.parametrize("target", [0.0, 0.8, 1.0])
def test_multilevel_loss_is_the_cross_entropy_summed_over_levels(target):
    logits = [normal(*shape, seed=i) for i, shape in enumerate(LOGITS)]
    expected = 0.0
    for level in logits:
        p = [1 / (1 + math.exp(-z)) for z in level.flatten().tolist()]
        expected += sum(-target * math.log(q) - (1 - target) * math.log(1 - q) for q in p) / len(p)
    assert cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-12)
    zeros = [torch.zeros(shape) for shape in LOGITS]
    assert cross_entropy(zeros, target).item() == pytest.approx(3 * math.log(2))


# -------------------- latents

UNET = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=12,
    norm_num_groups=4,
    sample_size=12,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


def latent() -> tuple[UNet, LatentDiscriminator]:
    network = randomise(UNet(UNET).double()).requires_grad_(False)
    return network, randomise(LatentDiscriminator(network).double(), seed=1)


@torch.no_grad()
@pytest.mark.parametrize("size", [(12, 12), (8, 14)], ids=str)
def test_the_latent_logit_is_the_head_written_out_on_the_middle_block(size):
    network, discriminator = latent()
    x = normal(2, 4, *size)
    t = torch.tensor([3, 700])
    context = normal(2, 5, 12)
    network.load_state_dict(discriminator.unet.state_dict(), strict=False)
    h = network.features(x, t, context)
    assert h.shape[1:] == (32, size[0] // 2, size[1] // 2)

    # Group norm, then SiLU.
    h = h.view(2, 4, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    norm = discriminator.norm
    h = h.view(2, 32, -1) * norm.weight[:, None] + norm.bias[:, None]
    h = h / (1 + (-h).exp())  # [2, 32, places]

    pool = discriminator.pool
    positions = pool.positions
    if size != (12, 12):
        positions = F.interpolate(positions, (size[0] // 2, size[1] // 2), mode="bicubic")
    mean = h.mean(2, keepdim=True) + pool.position_mean
    tokens = torch.cat([mean, h + positions[0].flatten(1)], dim=2)
    seen = []
    for head in range(2):  # of 16 channels
        rows = slice(16 * head, 16 * head + 16)
        q = pool.to_q.weight[rows] @ tokens + pool.to_q.bias[rows, None]
        k = pool.to_k.weight[rows] @ tokens + pool.to_k.bias[rows, None]
        v = pool.to_v.weight[rows] @ tokens + pool.to_v.bias[rows, None]
        attention = (k * q[:, :, :1]).sum(1).div(4).softmax(1)  # of the mean to every token
        seen.append((v * attention[:, None]).sum(2))
    y = torch.cat(seen, dim=1) @ pool.to_out.weight.T + pool.to_out.bias
    assert y.shape == (2, 512)
    expected = y / (1 + (-y).exp()) @ discriminator.last.weight.T + discriminator.last.bias
    logits = discriminator(x, t, context)
    assert logits.shape == (2, 1) and relative(logits, expected) < 1e-12
    # Timestep and caption make a difference.
    assert not torch.allclose(logits, discriminator(x, t + 1, context))
    assert not torch.allclose(logits, discriminator(x, t, context.flip(0)))


def test_the_lower_half_begins_as_the_networks_own_and_is_a_copy_unless_shared():
    network = UNet(UNET).double()
    x = normal(1, 4, 12, 12)
    context = normal(1, 5, 12)
    for share in (False, True):
        half = lower_half(network, share)
        assert torch.equal(half.features(x, 7, context), network.features(x, 7, context))
        own = dict(network.named_parameters())
        assert all((p is own[name]) == share for name, p in half.named_parameters())
        for name in half.state_dict():
            assert not name.startswith(("up_blocks", "conv_norm_out", "conv_out"))
    assert len(network.up_blocks) == 2 and network(x, 7, context).shape == x.shape


def test_every_weight_of_the_latent_discriminator_trains_and_none_of_the_base():
    network, discriminator = latent()
    discriminator.requires_grad_(True)
    x = normal(2, 4, 12, 12).requires_grad_()
    loss = F.softplus(-discriminator(x, torch.tensor([3, 700]), normal(2, 5, 12))).mean()
    tensors = {"x": x, **dict(discriminator.named_parameters())}
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    assert "pool.to_k.bias" in tensors
    for name, g in zip(tensors, gradients):
        # Adding a constant to all keys does not change attention.
        is_zero = name == "pool.to_k.bias"
        assert (g.abs().max() <= 1e-12) == is_zero, name
    assert not any(p.requires_grad for p in network.parameters())


# -------------------- small pictures

@torch.no_grad()
@pytest.mark.parametrize(("side", "levels"), [(32, 3), (48, 3), (8, 1), (4, 0)])
def test_the_pixel_logit_is_its_convolutions_and_a_product_with_the_caption(side, levels):
    discriminator = randomise(PixelDiscriminator(3, side, 12, width=8).double(), seed=1)
    discriminator.context_std.abs_()
    x = normal(2, 3, side, side)
    t = torch.tensor([3, 700])
    context = normal(2, 5, 12)
    assert len(discriminator.down) == levels
    time = timestep_embedding(t, 8).double()
    h = F.conv2d(x, discriminator.conv_in.weight, discriminator.conv_in.bias, padding=1)
    for i in range(levels + 1):
        if i > 0:
            down, norm = discriminator.down[i - 1], discriminator.norm[i - 1]
            h = F.conv2d(h, down.weight, down.bias, stride=2, padding=1)
            groups = h.view(2, 8, -1)
            variance = groups.var(2, correction=0, keepdim=True)
            groups = (groups - groups.mean(2, keepdim=True)) / (variance + 1e-5).sqrt()
            h = groups.view_as(h) * norm.weight[:, None, None] + norm.bias[:, None, None]
        added = time @ discriminator.time[i].weight.T + discriminator.time[i].bias
        h = h + added[:, :, None, None]
        h = torch.where(h > 0, h, 0.2 * h)
    assert 4 <= h.shape[-1] < 8
    h = h.flatten(1) @ discriminator.flat.weight.T + discriminator.flat.bias
    h = torch.where(h > 0, h, 0.2 * h)
    words = (context.mean(1) - discriminator.context_mean) / discriminator.context_std
    words = words @ discriminator.context.weight.T + discriminator.context.bias
    expected = h @ discriminator.last.weight.T + discriminator.last.bias
    expected = expected + (h * words).sum(1, keepdim=True)
    assert relative(discriminator(x, t, context), expected) < 1e-9
    assert relative(discriminator(x, 3, context)[:1], expected[:1]) < 1e-9


@torch.no_grad()
def test_what_all_captions_have_in_common_is_taken_off():
    discriminator = PixelDiscriminator(3, 8, 12, width=8).double()
    contexts = 10 + 0.1 * normal(6, 5, 12)
    discriminator.standardise(contexts)
    words = (contexts.mean(1) - discriminator.context_mean) / discriminator.context_std
    assert words.mean(0).abs().max() < 1e-9
    assert abs(words.square().mean() - 1) < 1e-9
    assert (discriminator(normal(6, 3, 8, 8), 3, contexts) == 0).all()  # heads begin at 0


@torch.no_grad()
def test_one_caption_for_all_divides_by_nothing():
    discriminator = PixelDiscriminator(3, 8, 12, width=8)
    discriminator.standardise(torch.ones(4, 5, 12))
    assert discriminator.context_std == 1
