"""PixArt's transformer agrees with `diffusers`' PixArtTransformer2DModel."""

import copy
import json

import pytest
import torch
from conftest import gradients, normal, parameters, randomise, relative
from diffusers import PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch import Tensor

from files.tensors import read_config
from models.pixart import FIXED, PixArt, PixArtConfig, positions, sinusoids

TINY = dict(
    num_attention_heads=3,
    attention_head_dim=8,
    num_layers=3,
    cross_attention_dim=24,
    caption_channels=20,
)
KINDS = {
    "like the 512 model": dict(TINY, sample_size=64),
    "like the 1024 model": dict(TINY, sample_size=128),
    "no conditions at 128, its own scale, eps 1e-2, no variance": dict(
        TINY,
        sample_size=128,
        use_additional_conditions=False,
        interpolation_scale=1.5,
        norm_eps=1e-2,
        out_channels=4,
    ),
    "conditions at 8, patches of 4, 6 channels": dict(
        TINY,
        sample_size=8,
        use_additional_conditions=True,
        patch_size=4,
        in_channels=6,
        out_channels=12,
    ),
}


def ours_like(peer: PixArtTransformer2DModel, sizes: dict) -> PixArt:
    """Our network with the peer's tensors. Names and shapes must be the same."""
    with torch.device("meta"):
        network = PixArt(PixArtConfig(**sizes))
    network.load_state_dict(peer.state_dict(), strict=True, assign=True)
    return network


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def pair(request) -> tuple[PixArt, PixArtTransformer2DModel]:
    peer = randomise(PixArtTransformer2DModel(**request.param).double())
    return ours_like(peer, request.param), peer


def inputs(
    network: PixArt,
    height: int,
    width: int,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """A latent, a context of 7 tokens, and its mask, which shows 7, 1, 4, ... of them."""
    c = network.config
    x = normal(batch, c.in_channels, height, width, dtype=dtype)
    context = normal(batch, 7, c.caption_channels, seed=1, dtype=dtype)
    seen = torch.tensor([7, 1, 4]).repeat(batch)[:batch]
    mask = torch.arange(7) < seen[:, None]
    return x, context, mask.long()


def theirs(
    peer: PixArtTransformer2DModel,
    x: Tensor,
    t: Tensor | int,
    context: Tensor,
    mask: Tensor | None,
    resolution: Tensor | None = None,
    aspect_ratio: Tensor | None = None,
) -> Tensor:
    """The peer's prediction without the variance; by default with the picture's own size."""
    B, C, h, w = x.shape
    if resolution is None:
        resolution = torch.tensor([[8 * h, 8 * w]]).repeat(B, 1)
        aspect_ratio = torch.tensor([[h / w]]).repeat(B, 1)
    prediction = peer(
        x,
        encoder_hidden_states=context,
        timestep=torch.as_tensor(t).expand(B),
        encoder_attention_mask=mask,
        added_cond_kwargs=dict(resolution=resolution, aspect_ratio=aspect_ratio),
    )
    return prediction.sample[:, :C]


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 1, 999, torch.tensor(500), torch.tensor([37, 961])], ids=str)
def test_prediction_is_the_peers_at_one_timestep_or_one_per_row(pair, t):
    network, peer = pair
    x, context, mask = inputs(network, 8, 16)
    assert relative(network(x, t, context, mask), theirs(peer, x, t, context, mask)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (12, 20), (4, 4), (4, 32), (64, 64)], ids=str)
def test_every_size_goes_through_as_in_the_peer(pair, size):
    network, peer = pair
    x, context, mask = inputs(network, *size)
    prediction = network(x, 999, context, mask)
    assert prediction.shape == x.shape
    assert relative(prediction, theirs(peer, x, 999, context, mask)) < 1e-9


@torch.no_grad()
def test_the_mask_hides_what_the_peers_hides(pair):
    network, peer = pair
    x, context, mask = inputs(network, 8, 12, batch=3)
    whole = network(x, 999, context)
    assert relative(whole, theirs(peer, x, 999, context, None)) < 1e-9
    assert relative(whole, network(x, 999, context, torch.ones_like(mask))) < 1e-12
    seen = network(x, 999, context, mask)
    assert relative(seen, theirs(peer, x, 999, context, mask)) < 1e-9
    changed = torch.where(mask[..., None] == 1, context, 9.0)
    assert relative(seen, network(x, 999, changed, mask)) < 1e-12
    assert relative(seen[1:], whole[1:]) > 1e-3
    assert relative(seen[2:], network(x[2:], 999, context[2:, :4])) < 1e-9


@torch.no_grad()
def test_conditions_are_the_peers_and_by_default_the_pictures_own_size(pair):
    network, peer = pair
    x, context, mask = inputs(network, 8, 12)
    resolution = torch.tensor([[512.0, 768.0], [1024.0, 300.0]])
    aspect_ratio = torch.tensor([[0.7], [3.4]])
    ours = network(x, 999, context, mask, resolution, aspect_ratio)
    expected = theirs(peer, x, 999, context, mask, resolution, aspect_ratio)
    assert relative(ours, expected) < 1e-9

    default = network(x, 999, context, mask)
    own_resolution = torch.tensor([[64, 96]] * 2)
    own_aspect_ratio = torch.tensor([[64 / 96]] * 2)
    own = network(x, 999, context, mask, own_resolution, own_aspect_ratio)
    assert torch.equal(own, default)
    if network.config.conditioned:
        assert relative(ours, default) > 1e-3
        flipped = network(x, 999, context, mask, resolution.flip(1), aspect_ratio)
        assert relative(flipped, ours) > 1e-3
    else:
        assert torch.equal(ours, default)


def test_only_models_of_sample_size_128_are_conditioned_unless_they_say_otherwise():
    conditioned = [kind for kind, sizes in KINDS.items() if PixArtConfig(**sizes).conditioned]
    assert conditioned == ["like the 1024 model", "conditions at 8, patches of 4, 6 channels"]


@torch.no_grad()
def test_rows_of_a_batch_do_not_affect_each_other(pair):
    network, _ = pair
    x, context, mask = inputs(network, 8, 8, batch=3)
    t = torch.tensor([3, 500, 999])
    rows = []
    for i in range(3):
        row = slice(i, i + 1)
        rows.append(network(x[row], int(t[i]), context[row], mask[row]))
    assert relative(network(x, t, context, mask), torch.cat(rows)) < 1e-9


@pytest.mark.parametrize("size", [(7, 8), (8, 5), (3, 3)], ids=str)
def test_sides_that_are_no_multiple_of_the_patch_are_refused(pair, size):
    network, _ = pair
    x, context, mask = inputs(network, *size)
    p = network.config.patch_size
    latent = rf"{size[1]}x{size[0]} \(width x height\)"
    with pytest.raises(ValueError, match=rf"{latent}.*{p}x{p}.*multiples of {8 * p} pix"):
        network(x, 999, context, mask)


@pytest.mark.parametrize("h, w", [(32, 32), (64, 64), (16, 16), (20, 13), (1, 50)])
@pytest.mark.parametrize("base, scale", [(32, 1), (64, 2), (64, 1.5)])
def test_positions_are_the_peers_to_the_bit(h, w, base, scale):
    table = get_2d_sincos_pos_embed(
        24, (h, w), base_size=base, interpolation_scale=scale, output_type="pt"
    )
    assert torch.equal(positions(h, w, 24, base, scale), table.float())


def test_sinusoids_are_the_peers_to_the_bit():
    for numbers in (torch.arange(1000), torch.tensor([512, 1024.0, 0.7, 1304])):
        assert torch.equal(sinusoids(numbers), get_timestep_embedding(numbers, 256, True, 0))


def test_checkpointing_computes_blocks_again_and_changes_neither_prediction_nor_gradients(pair):
    network = copy.deepcopy(pair[0]).requires_grad_(True)
    calls = []
    for block in network.transformer_blocks:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    x, context, mask = inputs(network, 8, 12)

    def run() -> tuple[Tensor, dict[str, Tensor], int]:
        calls.clear()
        prediction = network(x, 999, context, mask)
        return prediction, gradients(network, (prediction**2).sum()), len(calls)

    prediction, expected, once = run()
    network.checkpointing = True
    again, found, twice = run()
    assert (once, twice) == (3, 6)
    assert relative(again, prediction) < 1e-12
    assert largest_difference(found, expected) < 1e-12


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of gradients. Attention does not depend on a bias of the keys, whose gradient is noise."""
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if not name.endswith("to_k.bias")]
    return max(relative(ours[name], theirs[name]) for name in names)


def test_gradients_are_the_peers(pair):
    network = copy.deepcopy(pair[0]).requires_grad_(True)
    peer = copy.deepcopy(pair[1]).requires_grad_(True)
    x, context, mask = inputs(network, 8, 12)
    ours = gradients(network, (network(x, 500, context, mask)**2).sum())
    expected = gradients(peer, (theirs(peer, x, 500, context, mask)**2).sum())
    assert largest_difference(ours, expected) < 1e-9


# As published for PixArt-XL-2-512x512, under the older name of its class.
OLDER = dict(
    _class_name="Transformer2DModel",
    activation_fn="gelu-approximate",
    attention_bias=True,
    attention_head_dim=72,
    attention_type="default",
    caption_channels=4096,
    cross_attention_dim=1152,
    double_self_attention=False,
    dropout=0.0,
    in_channels=4,
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    norm_num_groups=32,
    norm_type="ada_norm_single",
    num_attention_heads=16,
    num_embeds_ada_norm=1000,
    num_layers=28,
    num_vector_embeds=None,
    only_cross_attention=False,
    out_channels=8,
    patch_size=2,
    sample_size=64,
    upcast_attention=False,
    use_linear_projection=False,
)


def test_configurations_are_read_and_other_transformers_are_refused(tmp_path):
    path = tmp_path / "config.json"
    sizes = KINDS["like the 1024 model"]
    PixArtTransformer2DModel(**sizes).save_config(tmp_path)
    assert read_config(PixArtConfig, FIXED, path) == PixArtConfig(**sizes)
    path.write_text(json.dumps(OLDER))
    assert read_config(PixArtConfig, FIXED, path) == PixArtConfig(sample_size=64)
    path.write_text(json.dumps(OLDER | dict(norm_type="ada_norm_zero")))
    with pytest.raises(ValueError, match="norm_type is 'ada_norm_zero'"):
        read_config(PixArtConfig, FIXED, path)
    for change, text in [
        (dict(out_channels=5), "5 out_channels"),
        (dict(cross_attention_dim=20), "expected 24"),
        (dict(caption_channels=None), "None caption_channels"),
        (dict(num_attention_heads=2, cross_attention_dim=16, sample_size=128), "16 wide"),
    ]:
        with pytest.raises(ValueError, match=text):
            PixArtConfig(**(TINY | change))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "sizes, millions, latents",
    [
        (dict(num_layers=4, sample_size=128), None, [(16, 24), (64, 64)]),
        (dict(sample_size=64), 610.9, [(16, 24), (20, 12)]),
    ],
    ids=["four layers of the 1024 model", "the 512 model"],
)
def test_full_width_agrees_in_float32(sizes, millions, latents):
    sizes = dict(sizes, caption_channels=4096)
    peer = randomise(PixArtTransformer2DModel(**sizes))
    network = ours_like(peer, sizes)
    if millions:
        assert round(parameters(network) / 1e6, 1) == millions
    for size in latents:
        x, context, mask = inputs(network, *size, dtype=torch.float32)
        expected = theirs(peer, x, 999, context, mask)
        assert relative(network(x, 999, context, mask), expected) < 1e-4
