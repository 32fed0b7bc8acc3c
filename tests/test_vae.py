"""models/vae.py agrees with its peer, `diffusers`' AutoencoderKL, and its skips are used as in the
official translators (img2img-turbo)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, normal, parameters, randomise, relative
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models import unet, vae
from models.pix2pix_turbo import add_skip_convs, convolved_skips
from models.vae import VAE, VAEConfig, latent_size, tiled

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = {
    "four levels, as in Stable Diffusion": (8, 16, 24, 24),
    "two levels, factor 2": (8, 16),
}
SD = (128, 256, 512, 512)


def peer_vae(widths: tuple[int, ...], layers: int = 2, groups: int = 4) -> AutoencoderKL:
    levels = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )


def ours_like(peer: AutoencoderKL) -> VAE:
    """Our network with the peer's own tensors. Names and shapes must be the same."""
    c = peer.config
    config = VAEConfig(
        block_out_channels=tuple(c.block_out_channels),
        layers_per_block=c.layers_per_block,
        norm_num_groups=c.norm_num_groups,
        down_block_types=tuple(c.down_block_types),
        up_block_types=tuple(c.up_block_types),
    )
    with torch.device("meta"):
        vae = VAE(config)
    vae.load_state_dict(peer.state_dict(), strict=True, assign=True)
    return vae


@pytest.fixture(params=WIDTHS.values(), ids=WIDTHS.keys())
def pair(request) -> tuple[VAE, AutoencoderKL]:
    peer = randomise(peer_vae(request.param).double())
    return ours_like(peer), peer


def official_decode(
    peer: AutoencoderKL,
    z: Tensor,
    skips: list[Tensor],
    convs: list[nn.Module],
    gamma: float,
) -> Tensor:
    """The decoder's forward pass in img2img-turbo, written with the peer's modules."""
    decoder = peer.decoder
    x = decoder.mid_block(decoder.conv_in(peer.post_quant_conv(z)))
    for i, block in enumerate(decoder.up_blocks):
        x = block(x + convs[i](skips[::-1][i] * gamma))
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))


def peer_skips(peer: AutoencoderKL, x: Tensor) -> list[Tensor]:
    """The inputs of the peer's down blocks, from first to last."""
    seen = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for block in peer.encoder.down_blocks
    ]
    peer.encode(x)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_encode_gives_the_peers_mean_and_log_variance(pair, size):
    vae, peer = pair
    x = normal(2, 3, *size)
    mean, logvar, _ = vae.encode(x)
    theirs = peer.encode(x).latent_dist
    assert mean.shape[-2:] == (size[0] // vae.factor, size[1] // vae.factor)
    assert relative(mean, theirs.mean) < 1e-9
    assert relative(logvar, theirs.logvar) < 1e-9


@torch.no_grad()
def test_log_variance_is_clamped_on_both_sides(pair):
    vae, peer = pair
    vae.quant_conv.weight.data *= 1e3  # these tensors are shared with the peer
    x = normal(2, 3, 16, 16)
    logvar = vae.encode(x)[1]
    assert logvar.min() == -30 and logvar.max() == 20
    assert relative(logvar, peer.encode(x).latent_dist.logvar) < 1e-9


@torch.no_grad()
def test_skips_are_the_inputs_of_the_down_blocks_first_to_last(pair):
    vae, peer = pair
    x = normal(2, 3, 16, 24)
    skips = vae.encode(x)[2]
    theirs = peer_skips(peer, x)
    assert len(skips) == len(theirs) == len(vae.config.block_out_channels)
    assert max(relative(a, b) for a, b in zip(skips, theirs)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_decode_gives_the_peers_picture(pair, size):
    vae, peer = pair
    z = normal(2, 4, *size)
    assert relative(vae.decode(z), peer.decode(z).sample) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_decode_with_skips_is_the_official_arrangement(pair, gamma):
    vae, peer = pair
    add_skip_convs(vae)
    levels = len(vae.config.block_out_channels)
    convs = [getattr(vae.decoder, f"skip_conv_{i + 1}") for i in range(levels)]
    for i, conv in enumerate(convs):
        randomise(conv, seed=i)
    x = normal(2, 3, 16, 24)
    mean, _, skips = vae.encode(x)

    theirs = peer.encode(x).latent_dist.mean
    theirs = official_decode(peer, theirs, peer_skips(peer, x), convs, gamma)
    assert relative(vae.decode(mean, convolved_skips(vae, skips, gamma)), theirs) < 1e-9
    assert relative(vae.decode(mean), theirs) > 1e-3  # the skips make a difference


def test_skip_convolutions_of_stable_diffusion_have_the_official_shapes():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
        add_skip_convs(vae)
    convs = [getattr(vae.decoder, f"skip_conv_{i}") for i in (1, 2, 3, 4)]
    shapes = [tuple(conv.weight.shape) for conv in convs]
    assert shapes == [(512, 512, 1, 1), (512, 256, 1, 1), (512, 128, 1, 1), (256, 128, 1, 1)]
    assert all(conv.bias is None for conv in convs)


def test_skip_convolutions_start_at_the_official_constant():
    vae = ours_like(peer_vae((8, 16)))
    add_skip_convs(vae)
    assert torch.equal(vae.decoder.skip_conv_1.weight, torch.full((16, 8, 1, 1), 1e-5))


def test_checkpointing_recomputes_blocks_and_changes_neither_picture_nor_gradients(pair):
    vae, _ = pair
    add_skip_convs(vae)
    randomise(vae).requires_grad_(True)
    x = normal(1, 3, 16, 24)
    calls = []
    encoder, decoder = vae.encoder, vae.decoder
    blocks = [*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks]
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))

    def run() -> tuple[Tensor, dict[str, Tensor], int]:
        calls.clear()
        mean, logvar, skips = vae.encode(x)
        picture = vae.decode(mean, convolved_skips(vae, skips, 1.0))
        result = gradients(vae, (picture**2).sum() + logvar.sum())
        return picture, result, len(calls)

    picture, expected, once = run()
    vae.encoder.checkpointing = True
    vae.decoder.checkpointing = True
    again, found, twice = run()
    assert twice == 2 * once
    assert relative(again, picture) < 1e-12
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-12


def test_other_autoencoders_are_refused_by_name():
    with pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
        VAEConfig(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    with pytest.raises(ValueError, match="3 widths.*4 down and 4 up"):
        VAEConfig(block_out_channels=(8, 8, 8))


@pytest.mark.slow
@torch.no_grad()
def test_full_size_vae_agrees_in_float32():
    peer = randomise(peer_vae(SD, groups=32))
    vae = ours_like(peer)
    assert round(parameters(vae) / 1e6, 1) == 83.7
    x = normal(1, 3, 128, 192, dtype=torch.float32)
    mean, logvar, skips = vae.encode(x)
    theirs = peer.encode(x).latent_dist
    assert relative(mean, theirs.mean) < 1e-4
    assert relative(logvar, theirs.logvar) < 1e-4
    assert max(relative(a, b) for a, b in zip(skips, peer_skips(peer, x), strict=True)) < 1e-4
    assert relative(vae.decode(mean), peer.decode(mean).sample) < 1e-4


@pytest.mark.parametrize("kind", [unet.GroupNorm, vae.GroupNorm])
def test_a_norm_under_autocast_keeps_the_type_of_its_input_and_its_weights_learn(kind):
    norm = randomise(kind(4, 8))
    x = normal(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x.bfloat16())
    y.float().square().sum().backward()

    exact = copy.deepcopy(norm).double()
    exact.zero_grad()
    expected = exact(x.bfloat16().double())
    expected.square().sum().backward()

    assert y.dtype == torch.bfloat16
    assert relative(y.double(), expected) < 0.01
    assert norm.weight.grad.dtype == torch.float32
    assert relative(norm.weight.grad.double(), exact.weight.grad) < 0.02


# ------------------------------------------------------------------------------ sizes and tiles


def test_a_latent_is_smaller_by_the_factor_and_other_sizes_are_refused():
    assert latent_size((32, 48), 8) == [4, 6]
    assert latent_size((31, 7), 1) == [31, 7]
    with pytest.raises(ValueError, match="12x10 pixels; expected sides that are multiples of 4"):
        latent_size((10, 12), 4)


@pytest.mark.parametrize("size", [(40, 25), (7, 33), (16, 17)])
def test_tiles_cover_the_picture_with_weights_that_sum_to_one_and_none_is_larger(size):
    """The inputs are noise, and a picture four times as large. The network mixes no pixels."""
    latent = normal(2, 3, *size)
    picture = F.interpolate(latent, scale_factor=4)
    seen = set()

    def network(x: Tensor, noise: Tensor) -> Tensor:
        seen.update([x.shape[-2:], noise.shape[-2:]])
        return F.interpolate(noise, scale_factor=4) + x

    made = tiled(network, [picture, latent], size, 8)
    assert (made - 2 * picture).abs().max() < 1e-12
    assert len(seen) == 2
    h, w = min(seen)
    assert max(seen) == (4 * h, 4 * w)
    assert min(6, min(size)) <= min(h, w) <= max(h, w) <= 8


@torch.no_grad()
def test_a_tiled_picture_has_no_seam_and_a_small_one_is_the_same_bits():
    network = randomise(nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 3, 3, padding=1),
    ))
    z = normal(1, 4, 12, 12, dtype=torch.float32)
    z = F.interpolate(z, size=(96, 96), mode="bicubic")
    whole = network(z)
    assert torch.equal(tiled(network, [z], (96, 96), 96), whole)

    made = tiled(network, [z], (96, 96), 40)
    assert (made - whole).abs().mean() < 0.02 * whole.std()

    # Without the picture's edge, where the padding shows, neighbouring pixels differ by no more
    # than in the whole picture.
    inner = slice(1, -1)
    steps = [x[..., inner, inner].diff(dim=-1).abs().amax() for x in (made, whole)]
    assert steps[0] < 1.1 * steps[1]
