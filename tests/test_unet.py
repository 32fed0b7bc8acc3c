"""models/unet.py agrees with its peer, `diffusers`' UNet2DConditionModel."""

import copy

import pytest
import torch
from conftest import gradients, normal, parameters, randomise, relative
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from models.unet import UNet, UNetConfig, timestep_embedding

pytestmark = pytest.mark.usefixtures("one_thread")

# Two levels with attention and two without; widths that change and widths that stay.
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
TINY = dict(
    block_out_channels=(16, 24, 32, 32),
    layers_per_block=2,
    norm_num_groups=8,
    cross_attention_dim=20,
    down_block_types=DOWN,
    up_block_types=UP,
)
KINDS = {
    "as SD 1.5": dict(TINY, attention_head_dim=4),
    "as SD 2.1": dict(TINY, attention_head_dim=(2, 4, 8, 8), use_linear_projection=True),
    "attention everywhere, one layer, eps 1e-2, 9 channels in": dict(
        TINY,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=(4, 2),
        norm_eps=1e-2,
        in_channels=9,
        down_block_types=DOWN[:2],
        up_block_types=UP[2:],
    ),
}
FULL = {
    "SD 1.5": dict(cross_attention_dim=768, attention_head_dim=8),
    "SD-Turbo": dict(
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ),
}


def ours_like(peer: UNet2DConditionModel, sizes: dict) -> UNet:
    """Our network with the peer's own tensors. Names and shapes must be the same."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(**sizes))
    unet.load_state_dict(peer.state_dict(), strict=True, assign=True)
    return unet


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def pair(request) -> tuple[UNet, UNet2DConditionModel]:
    peer = randomise(UNet2DConditionModel(**request.param).double())
    return ours_like(peer, request.param), peer


def inputs(
    unet: UNet,
    height: int,
    width: int,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """A random latent and a random context."""
    x = normal(batch, unet.config.in_channels, height, width, dtype=dtype)
    context = normal(batch, 7, unet.config.cross_attention_dim, seed=1, dtype=dtype)
    return x, context


def peer_skips(
    peer: UNet2DConditionModel,
    x: Tensor,
    context: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """The peer's skips, in the order of the way down, and the result of its middle block."""
    down = []
    middle = []
    hooks = [
        peer.conv_in.register_forward_hook(lambda _, __, out: down.append(out)),
        peer.mid_block.register_forward_hook(lambda _, __, out: middle.append(out)),
    ]
    for block in peer.down_blocks:
        hooks.append(block.register_forward_hook(lambda _, __, out: down.extend(out[1])))
    peer(x, 999, context)
    for hook in hooks:
        hook.remove()
    return down, middle[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "t",
    [0, 1, 500, 999, torch.tensor(999), torch.tensor([37, 961])],
    ids=str,
)
def test_prediction_is_the_peers_at_one_timestep_or_one_per_row(pair, t):
    unet, peer = pair
    x, context = inputs(unet, 8, 16)
    assert relative(unet(x, t, context), peer(x, t, context).sample) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 8), (9, 13), (1, 3), (10, 7)], ids=str)
def test_latents_of_any_size_go_through_as_in_the_peer(pair, size):
    unet, peer = pair
    x, context = inputs(unet, *size)
    prediction = unet(x, 999, context)
    assert prediction.shape == (2, 4, *size)
    assert relative(prediction, peer(x, 999, context).sample) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 16), (9, 13)], ids=str)
def test_controlnet_residuals_are_added_where_the_peer_adds_them(pair, size):
    unet, peer = pair
    x, context = inputs(unet, *size)
    down, middle = peer_skips(peer, x, context)
    residuals = [normal(*tensor.shape, seed=i) for i, tensor in enumerate([*down, middle])]
    theirs = peer(
        x,
        999,
        context,
        down_block_additional_residuals=residuals[:-1],
        mid_block_additional_residual=residuals[-1],
    ).sample
    assert relative(unet(x, 999, context, residuals), theirs) < 1e-9
    assert relative(unet(x, 999, context), theirs) > 1e-3
    with pytest.raises(ValueError, match="zip"):
        unet(x, 999, context, [*residuals[:-2], residuals[-1]])


@torch.no_grad()
def test_features_are_the_result_of_the_middle_block(pair):
    unet, peer = pair
    x, context = inputs(unet, 9, 13)
    _, middle = peer_skips(peer, x, context)
    assert relative(unet.features(x, 999, context), middle) < 1e-9


@torch.no_grad()
def test_the_rows_of_a_batch_do_not_depend_on_each_other(pair):
    unet, _ = pair
    x, context = inputs(unet, 8, 8, batch=3)
    t = torch.tensor([3, 500, 999])
    rows = [unet(x[i:i + 1], int(t[i]), context[i:i + 1]) for i in range(3)]
    assert relative(unet(x, t, context), torch.cat(rows)) < 1e-9


def test_head_counts_under_their_newer_name_give_the_same_network():
    kind = KINDS["as SD 2.1"]
    newer = dict(kind, num_attention_heads=kind["attention_head_dim"], attention_head_dim=8)
    assert UNetConfig(**newer).heads == UNetConfig(**kind).heads == (2, 4, 8, 8)
    assert UNetConfig(**KINDS["as SD 1.5"]).heads == (4, 4, 4, 4)


def test_timestep_sinusoids_are_cosines_then_sines_in_float32():
    table = timestep_embedding(torch.tensor([0, 999]), 320)
    i = torch.arange(160, dtype=torch.float64)
    angles = 999 * 10000 ** (-i / 160)
    assert table.dtype == torch.float32
    assert torch.equal(table[0], torch.cat([torch.ones(160), torch.zeros(160)]))
    assert relative(table[1].double(), torch.cat([angles.cos(), angles.sin()])) < 1e-4


@pytest.mark.parametrize("width", [16, 320])
def test_timestep_sinusoids_are_the_peers_to_the_bit(width):
    t = torch.arange(1000)
    assert torch.equal(timestep_embedding(t, width), get_timestep_embedding(t, width, True, 0))


def test_checkpointing_recomputes_blocks_and_changes_neither_prediction_nor_gradients(pair):
    unet = copy.deepcopy(pair[0]).requires_grad_(True)
    calls = []
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    x, context = inputs(unet, 8, 9, batch=1)

    def run() -> tuple[Tensor, dict[str, Tensor], int]:
        calls.clear()
        prediction = unet(x, 999, context)
        return prediction, gradients(unet, (prediction**2).sum()), len(calls)

    prediction, expected, once = run()
    unet.checkpointing = True
    again, found, twice = run()
    assert twice == 2 * once
    assert relative(again, prediction) < 1e-12
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-12


def test_other_unets_are_refused_by_name():
    with pytest.raises(ValueError, match="AttnDownBlock2D"):
        UNetConfig(**dict(TINY, down_block_types=("AttnDownBlock2D",) * 4))
    with pytest.raises(ValueError, match="4 down blocks, 4 up blocks and 3 head counts"):
        UNetConfig(**dict(TINY, attention_head_dim=(1, 2, 3)))


def test_channels_that_do_not_split_into_the_heads_are_refused():
    with pytest.raises(ValueError, match="16 channels cannot be split into 3 attention heads"):
        UNet(UNetConfig(**dict(TINY, attention_head_dim=3)))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("sizes", FULL.values(), ids=FULL.keys())
def test_full_size_unet_agrees_in_float32(sizes):
    peer = randomise(UNet2DConditionModel(**sizes))
    unet = ours_like(peer, sizes)
    if sizes is FULL["SD-Turbo"]:
        assert round(parameters(unet) / 1e6, 1) == 865.9
    x, context = inputs(unet, 16, 24, batch=1, dtype=torch.float32)
    assert relative(unet(x, 999, context), peer(x, 999, context).sample) < 1e-4
    x, context = inputs(unet, 9, 13, batch=1, dtype=torch.float32)
    assert relative(unet(x, 250, context), peer(x, 250, context).sample) < 1e-4
