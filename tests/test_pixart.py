"""models/pixart.py agrees with `diffusers`' PixArtTransformer2DModel."""

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

TINY = dict(num_attention_heads=3, attention_head_dim=8, num_layers=3, cross_attention_dim=24, caption_channels=20)
KINDS = {
    "as the 512 model": dict(TINY, sample_size=64),
    "as the 1024 model": dict(TINY, sample_size=128),
    "no conditions at 128, its own scale, eps 1e-2, no variance": dict(
        TINY, sample_size=128, use_additional_conditions=False, interpolation_scale=1.5, norm_eps=1e-2, out_channels=4),
    "conditions at 8, patches of 4, 6 channels": dict(
        TINY, sample_size=8, use_additional_conditions=True, patch_size=4, in_channels=6, out_channels=12),
}


def ours_like(peer: PixArtTransformer2DModel, sizes: dict) -> PixArt:
    """Our network over the peer's own tensors: names and shapes must be the same."""
    with torch.device("meta"):
        network = PixArt(PixArtConfig(**sizes))
    network.load_state_dict(peer.state_dict(), strict=True, assign=True)
    return network


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def pair(request) -> tuple[PixArt, PixArtTransformer2DModel]:
    peer = randomise(PixArtTransformer2DModel(**request.param).double())
    return ours_like(peer, request.param), peer


def inputs(network: PixArt, height: int, width: int, batch: int = 2, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Latent, context of 7 tokens, its mask: 7, 1, 4, ... tokens are seen."""
    c = network.config
    mask = torch.arange(7) < torch.tensor([7, 1, 4]).repeat(batch)[:batch, None]
    return (normal(batch, c.in_channels, height, width, dtype=dtype),
            normal(batch, 7, c.caption_channels, seed=1, dtype=dtype), mask.long())


def theirs(peer: PixArtTransformer2DModel, x: Tensor, t: Tensor | int, context: Tensor, mask: Tensor | None,
           resolution: Tensor | None = None, aspect_ratio: Tensor | None = None) -> Tensor:
    """The peer's prediction without its variance, told what the pipeline tells it: the picture's height and width."""
    B, C, h, w = x.shape
    if resolution is None:
        resolution, aspect_ratio = torch.tensor([[8 * h, 8 * w]]).repeat(B, 1), torch.tensor([[h / w]]).repeat(B, 1)
    out = peer(x, encoder_hidden_states=context, timestep=torch.as_tensor(t).expand(B), encoder_attention_mask=mask,
               added_cond_kwargs=dict(resolution=resolution, aspect_ratio=aspect_ratio)).sample
    return out[:, :C]


@torch.no_grad()
@pytest.mark.parametrize("t", [0, 1, 999, torch.tensor(500), torch.tensor([37, 961])], ids=str)
def test_prediction_is_the_peers_at_one_timestep_or_one_a_row(pair, t):
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
    assert relative(seen, network(x, 999, torch.where(mask[..., None] == 1, context, 9.0), mask)) < 1e-12
    assert relative(seen[1:], whole[1:]) > 1e-3
    assert relative(seen[2:], network(x[2:], 999, context[2:, :4])) < 1e-9


@torch.no_grad()
def test_conditions_are_the_peers_and_by_default_the_pictures_own_size(pair):
    network, peer = pair
    x, context, mask = inputs(network, 8, 12)
    resolution, aspect_ratio = torch.tensor([[512.0, 768.0], [1024.0, 300.0]]), torch.tensor([[0.7], [3.4]])
    told = network(x, 999, context, mask, resolution, aspect_ratio)
    assert relative(told, theirs(peer, x, 999, context, mask, resolution, aspect_ratio)) < 1e-9
    default = network(x, 999, context, mask)
    own = network(x, 999, context, mask, torch.tensor([[64, 96]] * 2), torch.tensor([[64 / 96]] * 2))
    assert torch.equal(own, default)
    if network.config.conditioned:
        assert relative(told, default) > 1e-3
        assert relative(network(x, 999, context, mask, resolution.flip(1), aspect_ratio), told) > 1e-3
    else:
        assert torch.equal(told, default)


def test_only_the_model_of_sample_size_128_is_conditioned_unless_it_says_otherwise():
    conditioned = [kind for kind, sizes in KINDS.items() if PixArtConfig(**sizes).conditioned]
    assert conditioned == ["as the 1024 model", "conditions at 8, patches of 4, 6 channels"]


@torch.no_grad()
def test_a_batch_is_its_rows(pair):
    network, _ = pair
    x, context, mask = inputs(network, 8, 8, batch=3)
    t = torch.tensor([3, 500, 999])
    rows = torch.cat([network(x[i:i + 1], int(t[i]), context[i:i + 1], mask[i:i + 1]) for i in range(3)])
    assert relative(network(x, t, context, mask), rows) < 1e-9


@pytest.mark.parametrize("size", [(7, 8), (8, 5), (3, 3)], ids=str)
def test_sides_that_are_no_multiple_of_the_patch_are_refused_in_a_sentence(pair, size):
    network, _ = pair
    x, context, mask = inputs(network, *size)
    p = network.config.patch_size
    with pytest.raises(ValueError, match=rf"{size[1]}x{size[0]} \(width x height\).*{p}x{p}.*multiples of {8 * p} pix"):
        network(x, 999, context, mask)


@pytest.mark.parametrize("h, w", [(32, 32), (64, 64), (16, 16), (20, 13), (1, 50)])
@pytest.mark.parametrize("base, scale", [(32, 1), (64, 2), (64, 1.5)])
def test_positions_are_the_peers_to_the_bit(h, w, base, scale):
    table = get_2d_sincos_pos_embed(24, (h, w), base_size=base, interpolation_scale=scale, output_type="pt")
    assert torch.equal(positions(h, w, 24, base, scale), table.float())


def test_sinusoids_are_the_peers_to_the_bit():
    for numbers in (torch.arange(1000), torch.tensor([512, 1024.0, 0.7, 1304])):
        assert torch.equal(sinusoids(numbers), get_timestep_embedding(numbers, 256, True, 0))


def test_checkpointing_computes_blocks_again_and_changes_neither_prediction_nor_gradients(pair):
    network, calls = copy.deepcopy(pair[0]).requires_grad_(True), []
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
    # Keys have a bias that attention does not see, so its gradient is no number to compare.
    names = [name for name in expected if not name.endswith("to_k.bias")]
    assert max(relative(found[name], expected[name]) for name in names) < 1e-12


def test_gradients_are_the_peers(pair):
    network, peer = copy.deepcopy(pair[0]).requires_grad_(True), copy.deepcopy(pair[1]).requires_grad_(True)
    x, context, mask = inputs(network, 8, 12)
    ours = gradients(network, (network(x, 500, context, mask)**2).sum())
    expected = gradients(peer, (theirs(peer, x, 500, context, mask)**2).sum())
    assert ours.keys() == expected.keys()
    assert max(relative(ours[name], expected[name]) for name in ours if not name.endswith("to_k.bias")) < 1e-9


# As published for PixArt-XL-2-512x512, under its class's older name.
OLDER = dict(_class_name="Transformer2DModel", activation_fn="gelu-approximate", attention_bias=True,
             attention_head_dim=72, attention_type="default", caption_channels=4096, cross_attention_dim=1152,
             double_self_attention=False, dropout=0.0, in_channels=4, norm_elementwise_affine=False, norm_eps=1e-6,
             norm_num_groups=32, norm_type="ada_norm_single", num_attention_heads=16, num_embeds_ada_norm=1000,
             num_layers=28, num_vector_embeds=None, only_cross_attention=False, out_channels=8, patch_size=2,
             sample_size=64, upcast_attention=False, use_linear_projection=False)


def test_configurations_are_read_and_other_transformers_refused_by_name(tmp_path):
    path, sizes = tmp_path / "config.json", KINDS["as the 1024 model"]
    PixArtTransformer2DModel(**sizes).save_config(tmp_path)
    assert read_config(PixArtConfig, FIXED, path) == PixArtConfig(**sizes)
    path.write_text(json.dumps(OLDER))
    assert read_config(PixArtConfig, FIXED, path) == PixArtConfig(sample_size=64)
    path.write_text(json.dumps(OLDER | dict(norm_type="ada_norm_zero")))
    with pytest.raises(ValueError, match="norm_type is 'ada_norm_zero'"):
        read_config(PixArtConfig, FIXED, path)
    for change, text in [(dict(out_channels=5), "5 out_channels"), (dict(cross_attention_dim=20), "expected 24"),
                         (dict(caption_channels=None), "None caption_channels"),
                         (dict(num_attention_heads=2, cross_attention_dim=16, sample_size=128), "16 wide")]:
        with pytest.raises(ValueError, match=text):
            PixArtConfig(**(TINY | change))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("sizes, millions", [
    (dict(num_layers=4, sample_size=128), None), (dict(sample_size=64), 610.9),
], ids=["four layers of the 1024 model", "the 512 model"])
def test_full_width_agrees_in_float32(sizes, millions):
    sizes = dict(sizes, caption_channels=4096)
    peer = randomise(PixArtTransformer2DModel(**sizes))
    network = ours_like(peer, sizes)
    if millions:
        assert round(parameters(network) / 1e6, 1) == millions
    for size in [(16, 24), (64, 64) if not millions else (20, 12)]:
        x, context, mask = inputs(network, *size, dtype=torch.float32)
        assert relative(network(x, 999, context, mask), theirs(peer, x, 999, context, mask)) < 1e-4
