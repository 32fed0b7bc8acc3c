"""models/controlnet.py agrees with its peer, `diffusers`' ControlNetModel, and steers the U-Net as
there."""

import copy

import pytest
import torch
from conftest import gradients, normal, parameters, randomise, relative
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from files.tensors import read_config
from models.controlnet import FIXED, ControlNet, ControlNetConfig
from models.unet import UNet, UNetConfig

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
TINY = dict(
    block_out_channels=(16, 24, 32, 32),
    layers_per_block=2,
    norm_num_groups=8,
    cross_attention_dim=20,
    down_block_types=DOWN,
)
KINDS = {
    "as SD 1.5": dict(
        TINY,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 6, 8, 10),
    ),
    "as SD 2.1": dict(TINY, attention_head_dim=(2, 4, 8, 8), use_linear_projection=True),
    "two levels, one layer, eps 1e-2, one channel, factor 4": dict(
        TINY,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=(4, 2),
        norm_eps=1e-2,
        down_block_types=DOWN[:2],
        conditioning_embedding_out_channels=(4, 6, 8),
        conditioning_channels=1,
    ),
}


def ours_like(peer: ControlNetModel, sizes: dict) -> ControlNet:
    """Our network with the peer's own tensors. Names and shapes must be the same."""
    with torch.device("meta"):
        network = ControlNet(ControlNetConfig(**sizes))
    network.load_state_dict(peer.state_dict(), strict=True, assign=True)
    return network


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def pair(request) -> tuple[ControlNet, ControlNetModel]:
    peer = randomise(ControlNetModel(**request.param).double())
    return ours_like(peer, request.param), peer


@pytest.fixture(scope="module")
def unets(pair) -> tuple[UNet, UNet2DConditionModel]:
    """A U-Net of the ControlNet's sizes, ours and the peer's."""
    c = pair[0].config
    sizes = dict(
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        norm_eps=c.norm_eps,
        norm_num_groups=c.norm_num_groups,
        cross_attention_dim=c.cross_attention_dim,
        attention_head_dim=c.attention_head_dim,
        use_linear_projection=c.use_linear_projection,
        down_block_types=c.down_block_types,
        up_block_types=UP[-len(c.down_block_types):],
    )
    peer = randomise(UNet2DConditionModel(**sizes).double(), seed=1)
    unet = UNet(UNetConfig(**sizes)).double()
    unet.load_state_dict(peer.state_dict(), strict=True)
    return unet, peer


def inputs(
    network: ControlNet,
    height: int,
    width: int,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """A random latent, a random context, and a random condition in [0, 1]."""
    c = network.config
    factor = 2 ** (len(c.conditioning_embedding_out_channels) - 1)
    sides = (factor * height, factor * width)
    x = normal(batch, 4, height, width, dtype=dtype)
    context = normal(batch, 7, c.cross_attention_dim, seed=1, dtype=dtype)
    condition = normal(batch, c.conditioning_channels, *sides, seed=2, dtype=dtype).sigmoid()
    return x, context, condition


def theirs(
    peer: ControlNetModel,
    x: Tensor,
    t: Tensor | int,
    context: Tensor,
    condition: Tensor,
    scale: float = 1.0,
) -> list[Tensor]:
    """The peer's residuals, in the order of ours."""
    down, middle = peer(
        x,
        t,
        context,
        controlnet_cond=condition,
        conditioning_scale=scale,
        return_dict=False,
    )
    return [*down, middle]


def worst(ours: list[Tensor], peers: list[Tensor]) -> float:
    """The largest relative difference of any residual."""
    return max(relative(a, b) for a, b in zip(ours, peers, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("t", [0, 500, torch.tensor(999), torch.tensor([37, 961])], ids=str)
def test_residuals_are_the_peers_one_for_each_skip_and_the_middle(pair, t, scale):
    network, peer = pair
    x, context, condition = inputs(network, 8, 16)
    residuals = network(x, t, context, condition, scale)
    assert len(residuals) == len(peer.controlnet_down_blocks) + 1
    assert worst(residuals, theirs(peer, x, t, context, condition, scale)) < 1e-9
    if scale == 1:
        assert worst(network(x, t, context, condition), residuals) == 0


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 8), (9, 13), (1, 3)], ids=str)
def test_latents_of_any_size_go_through_as_in_the_peer(pair, size):
    network, peer = pair
    x, context, condition = inputs(network, *size)
    residuals = network(x, 999, context, condition)
    assert worst(residuals, theirs(peer, x, 999, context, condition)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("size", [(8, 16), (9, 13)], ids=str)
def test_the_steered_unet_is_the_peers(pair, unets, size, scale):
    network, peer = pair
    unet, peer_unet = unets
    x, context, condition = inputs(network, *size)
    residuals = theirs(peer, x, 999, context, condition, scale)
    expected = peer_unet(
        x,
        999,
        context,
        down_block_additional_residuals=residuals[:-1],
        mid_block_additional_residual=residuals[-1],
    ).sample

    steered = unet(x, 999, context, network(x, 999, context, condition, scale))
    alone = unet(x, 999, context)
    otherwise = unet(x, 999, context, network(x, 999, context, 1 - condition, scale))
    assert relative(steered, expected) < 1e-9
    assert relative(alone, expected) > 1e-3
    assert relative(otherwise, expected) > 1e-4


def test_a_copy_of_a_unet_begins_as_the_peers_and_adds_nothing(unets):
    unet, peer_unet = unets
    network = ControlNet.from_unet(unet).double()
    peer = ControlNetModel.from_unet(peer_unet)
    x, context, condition = inputs(network, 8, 8)
    residuals = network(x, 999, context, condition)
    assert not any(residual.any() for residual in residuals)
    assert torch.equal(unet(x, 999, context, residuals), unet(x, 999, context))

    # The condition's embedding is drawn at random; all else must be equal.
    tensors = peer.state_dict()
    assert network.state_dict().keys() == tensors.keys()
    for name, tensor in network.state_dict().items():
        if name.startswith("controlnet_cond_embedding.") and "conv_out" not in name:
            assert tensor.any() and tensor.shape == tensors[name].shape
        else:
            assert torch.equal(tensor, tensors[name]), name

    network.conv_in.weight.data.zero_()
    assert unet.conv_in.weight.any()  # training the copy leaves the U-Net alone


def test_zero_residuals_still_have_gradients(unets):
    network = ControlNet.from_unet(unets[0]).double()
    x, context, condition = inputs(network, 8, 8)
    residuals = network(x, 999, context, condition)
    loss = sum((residual - 1).square().sum() for residual in residuals)
    found = gradients(network, loss)
    learning = {name.split(".")[0] for name, gradient in found.items() if gradient.any()}
    assert learning == {"controlnet_down_blocks", "controlnet_mid_block"}


def test_gradients_are_the_peers(pair):
    network, peer = (copy.deepcopy(which).requires_grad_(True) for which in pair)
    x, context, condition = inputs(network, 8, 16)  # so that the middle has more than one pixel
    residuals = network(x, 999, context, condition)
    ours = gradients(network, sum((r**2).sum() for r in residuals))
    residuals = theirs(peer, x, 999, context, condition)
    expected = gradients(peer, sum((r**2).sum() for r in residuals))
    assert ours.keys() == expected.keys()
    assert max(relative(ours[name], expected[name]) for name in ours) < 1e-9


def test_checkpointing_recomputes_blocks_and_changes_neither_residuals_nor_gradients(pair):
    network = copy.deepcopy(pair[0]).requires_grad_(True)
    calls = []
    for block in [*network.down_blocks, network.mid_block]:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    x, context, condition = inputs(network, 8, 9, batch=1)

    def run() -> tuple[list[Tensor], dict[str, Tensor], int]:
        calls.clear()
        residuals = network(x, 999, context, condition)
        loss = sum((r**2).sum() for r in residuals)
        return residuals, gradients(network, loss), len(calls)

    residuals, expected, once = run()
    network.checkpointing = True
    again, found, twice = run()
    assert twice == 2 * once
    assert worst(again, residuals) < 1e-12
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-12


@torch.no_grad()
def test_a_condition_of_another_size_is_refused_in_a_sentence(pair):
    network, _ = pair
    x, context, condition = inputs(network, 8, 16)
    H, W = condition.shape[-2:]
    message = rf"{H}x{W} pixels .* latent 16x8; expected a condition of {W}x{H}$"
    with pytest.raises(ValueError, match=message):
        network(x, 999, context, condition.mT)


def test_configurations_are_read_and_other_controlnets_refused_by_name(tmp_path):
    path = tmp_path / "config.json"
    sizes = KINDS["as SD 1.5"]
    ControlNetModel(**sizes).save_config(tmp_path)
    assert read_config(ControlNetConfig, FIXED, path) == ControlNetConfig(**sizes)

    unsupported = dict(controlnet_conditioning_channel_order="bgr", global_pool_conditions=True)
    for name, value in unsupported.items():
        ControlNetModel(**sizes, **{name: value}).save_config(tmp_path)
        with pytest.raises(ValueError, match=f"{name} is "):
            read_config(ControlNetConfig, FIXED, path)

    with pytest.raises(ValueError, match="AttnDownBlock2D"):
        ControlNetConfig(down_block_types=("AttnDownBlock2D",) * 4)
    with pytest.raises(ValueError, match="4 down blocks and 3 head counts"):
        ControlNetConfig(attention_head_dim=(1, 2, 3))


@pytest.mark.slow
@torch.no_grad()
def test_the_controlnet_of_sd15_agrees_in_float32():
    sizes = dict(cross_attention_dim=768)
    peer = randomise(ControlNetModel(**sizes))
    network = ours_like(peer, sizes)
    assert round(parameters(network) / 1e6, 1) == 361.3
    for size in [(16, 24), (9, 13)]:
        x, context, condition = inputs(network, *size, batch=1, dtype=torch.float32)
        residuals = network(x, 999, context, condition)
        assert len(residuals) == 13
        assert worst(residuals, theirs(peer, x, 999, context, condition)) < 1e-4
