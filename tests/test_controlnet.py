"""models/controlnet.py agrees with `diffusers`' ControlNetModel, and steers the U-Net as in `diffusers`."""

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
TINY = dict(block_out_channels=(16, 24, 32, 32), layers_per_block=2, norm_num_groups=8, cross_attention_dim=20,
            down_block_types=DOWN)
KINDS = {
    "as SD 1.5": dict(TINY, attention_head_dim=4, conditioning_embedding_out_channels=(4, 6, 8, 10)),
    "as SD 2.1": dict(TINY, attention_head_dim=(2, 4, 8, 8), use_linear_projection=True),
    "two levels, one layer, eps 1e-2, one channel, factor 4": dict(
        TINY, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=(4, 2), norm_eps=1e-2,
        down_block_types=DOWN[:2], conditioning_embedding_out_channels=(4, 6, 8), conditioning_channels=1),
}


def ours_like(peer: ControlNetModel, sizes: dict) -> ControlNet:
    """Our network over the peer's own tensors: names and shapes must be the same."""
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
    c = pair[0].config
    sizes = dict(block_out_channels=c.block_out_channels, layers_per_block=c.layers_per_block, norm_eps=c.norm_eps,
                 norm_num_groups=c.norm_num_groups, cross_attention_dim=c.cross_attention_dim,
                 attention_head_dim=c.attention_head_dim, use_linear_projection=c.use_linear_projection,
                 down_block_types=c.down_block_types, up_block_types=UP[-len(c.down_block_types):])
    peer = randomise(UNet2DConditionModel(**sizes).double(), seed=1)
    unet = UNet(UNetConfig(**sizes)).double()
    unet.load_state_dict(peer.state_dict(), strict=True)
    return unet, peer


def inputs(network: ControlNet, height: int, width: int, batch: int = 2, dtype=torch.float64) -> tuple[Tensor, ...]:
    """Latent, context, condition in [0, 1]."""
    c = network.config
    factor = 2 ** (len(c.conditioning_embedding_out_channels) - 1)
    condition = normal(batch, c.conditioning_channels, factor * height, factor * width, seed=2, dtype=dtype).sigmoid()
    return (normal(batch, 4, height, width, dtype=dtype),
            normal(batch, 7, c.cross_attention_dim, seed=1, dtype=dtype), condition)


def theirs(peer: ControlNetModel, x: Tensor, t: Tensor | int, context: Tensor, condition: Tensor,
           scale: float = 1.0) -> list[Tensor]:
    down, middle = peer(x, t, context, controlnet_cond=condition, conditioning_scale=scale, return_dict=False)
    return [*down, middle]


def worst(ours: list[Tensor], peers: list[Tensor]) -> float:
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
    assert worst(network(x, 999, context, condition), theirs(peer, x, 999, context, condition)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("size", [(8, 16), (9, 13)], ids=str)
def test_the_steered_unet_is_the_peers(pair, unets, size, scale):
    (network, peer), (unet, peer_unet) = pair, unets
    x, context, condition = inputs(network, *size)
    residuals = theirs(peer, x, 999, context, condition, scale)
    expected = peer_unet(x, 999, context, down_block_additional_residuals=residuals[:-1],
                         mid_block_additional_residual=residuals[-1]).sample
    prediction = unet(x, 999, context, network(x, 999, context, condition, scale))
    assert relative(prediction, expected) < 1e-9
    assert relative(unet(x, 999, context), expected) > 1e-3
    assert relative(unet(x, 999, context, network(x, 999, context, 1 - condition, scale)), expected) > 1e-4


def test_a_copy_of_a_unet_begins_as_the_peers_and_adds_nothing(unets):
    unet, peer_unet = unets
    network = ControlNet.from_unet(unet).double()
    peer = ControlNetModel.from_unet(peer_unet)
    x, context, condition = inputs(network, 8, 8)
    residuals = network(x, 999, context, condition)
    assert not any(residual.any() for residual in residuals)
    assert torch.equal(unet(x, 999, context, residuals), unet(x, 999, context))
    tensors = peer.state_dict()
    assert network.state_dict().keys() == tensors.keys()
    for name, tensor in network.state_dict().items():  # what is drawn anew is not the same, the rest is
        if name.startswith("controlnet_cond_embedding.") and "conv_out" not in name:
            assert tensor.any() and tensor.shape == tensors[name].shape
        else:
            assert torch.equal(tensor, tensors[name]), name
    network.conv_in.weight.data.zero_()
    assert unet.conv_in.weight.any()  # a copy, whose training leaves the U-Net alone


def test_what_adds_nothing_learns_all_the_same(unets):
    network = ControlNet.from_unet(unets[0]).double()
    x, context, condition = inputs(network, 8, 8)
    loss = sum((residual - 1).square().sum() for residual in network(x, 999, context, condition))
    found = gradients(network, loss)
    learning = {name.split(".")[0] for name, gradient in found.items() if gradient.any()}
    assert learning == {"controlnet_down_blocks", "controlnet_mid_block"}


def test_gradients_are_the_peers(pair):
    network, peer = (copy.deepcopy(which).requires_grad_(True) for which in pair)
    x, context, condition = inputs(network, 8, 16)  # so that the middle has more than one pixel
    ours = gradients(network, sum((r**2).sum() for r in network(x, 999, context, condition)))
    expected = gradients(peer, sum((r**2).sum() for r in theirs(peer, x, 999, context, condition)))
    assert ours.keys() == expected.keys()
    assert max(relative(ours[name], expected[name]) for name in ours) < 1e-9


def test_checkpointing_computes_blocks_again_and_changes_neither_residuals_nor_gradients(pair):
    network, calls = copy.deepcopy(pair[0]).requires_grad_(True), []
    for block in [*network.down_blocks, network.mid_block]:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    x, context, condition = inputs(network, 8, 9, batch=1)

    def run() -> tuple[list[Tensor], dict[str, Tensor], int]:
        calls.clear()
        residuals = network(x, 999, context, condition)
        return residuals, gradients(network, sum((r**2).sum() for r in residuals)), len(calls)

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
    with pytest.raises(ValueError, match=rf"{H}x{W} pixels .* latent 16x8; expected a condition of {W}x{H}$"):
        network(x, 999, context, condition.mT)


def test_configurations_are_read_and_other_controlnets_refused_by_name(tmp_path):
    path, sizes = tmp_path / "config.json", KINDS["as SD 1.5"]
    ControlNetModel(**sizes).save_config(tmp_path)
    assert read_config(ControlNetConfig, FIXED, path) == ControlNetConfig(**sizes)
    for change in (dict(controlnet_conditioning_channel_order="bgr"), dict(global_pool_conditions=True)):
        ControlNetModel(**sizes, **change).save_config(tmp_path)
        with pytest.raises(ValueError, match=f"{next(iter(change))} is "):
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
