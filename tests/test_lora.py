"""models/lora.py agrees with its peer, `peft`: in which layers it takes, in their outputs, and in
their merged weights. The twin convolution is checked against its formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, normal, randomise, relative
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from models.lora import LoRAConv2d, LoRALinear, TwinConv2d, add_lora, merge, replace, set_scale
from models.pix2pix_turbo import UNET_TARGETS, VAE_TARGETS
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")

UNET = dict(
    block_out_channels=(16, 24, 32),
    layers_per_block=2,
    norm_num_groups=8,
    cross_attention_dim=20,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)
VAE_SIZES = dict(
    block_out_channels=(8, 16, 16),
    layers_per_block=2,
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
)
SKIP_CONVS = ("skip_conv_1", "skip_conv_2", "skip_conv_3")
# Some layers' names end in `v` or `onv1`, but not after a dot, so these two select nothing.
MIXED = ("conv_in", "down_blocks.0.resnets.1.conv1", "resnets.0.conv2", "v", "onv1", "ff.net.2")
LISTS = {
    "unet, convolutions": ("unet", dict(UNET), UNET_TARGETS),
    "unet, linear projections": ("unet", dict(UNET, use_linear_projection=True), UNET_TARGETS),
    "vae": ("vae", VAE_SIZES, (*VAE_TARGETS, *SKIP_CONVS)),
    "unet, whole names and parts of words": ("unet", dict(UNET), MIXED),
}


class Bare(nn.Module):
    """Every kind of layer that can have a LoRA, one after the other."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(5, 6, 3, padding=1)
        self.strided = nn.Conv2d(6, 7, 3, stride=2)
        self.oblong = nn.Conv2d(7, 7, (1, 3), stride=(2, 1), padding=(0, 1), bias=False)
        self.point = nn.Conv2d(7, 8, 1)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.same(x))
        x = F.silu(self.strided(x))
        x = F.silu(self.oblong(x))
        x = self.point(x).flatten(2).transpose(1, 2)
        x = F.silu(self.up(x))
        return self.down(x)


LAYERS = ("same", "strided", "oblong", "point", "up", "down")
LORA_NAMES = {f"{name}.lora_{part}.weight" for name in LAYERS for part in "AB"}


def config(targets: tuple[str, ...], rank: int, alpha: float) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )


def copy_adapters(ours: nn.Module, peer: nn.Module) -> None:
    """Draws the peer's A and B at random, and copies them to ours."""
    for name, layer in peer.named_modules():
        if isinstance(layer, LoraLayer):
            A = randomise(layer.lora_A["default"], seed=1)
            B = randomise(layer.lora_B["default"], seed=2)
            mine = ours.get_submodule(name)
            mine.lora_A.weight.data = A.weight.data.clone()
            mine.lora_B.weight.data = B.weight.data.clone()


def adapted_pair(rank: int, alpha: float) -> tuple[nn.Module, nn.Module]:
    ours = randomise(Bare().double())
    peer = inject_adapter_in_model(config(LAYERS, rank, alpha), copy.deepcopy(ours)).double()
    add_lora(ours, LAYERS, rank, alpha)
    copy_adapters(ours, peer)
    return ours, peer


def adapters(network: nn.Module, kind: type | tuple[type, ...]) -> dict[str, nn.Module]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, kind)}


@pytest.mark.parametrize("part, sizes, targets", LISTS.values(), ids=LISTS.keys())
def test_the_layers_are_those_that_peft_takes(part, sizes, targets):
    if part == "unet":
        ours = UNet(UNetConfig(**sizes))
        peer = UNet2DConditionModel(**sizes)
    else:
        ours = VAE(VAEConfig(**sizes))
        peer = AutoencoderKL(latent_channels=4, **sizes)
        for network in (ours, peer):
            for name in SKIP_CONVS:
                setattr(network.decoder, name, nn.Conv2d(16, 16, 1, bias=False))
    add_lora(ours, targets, 4, 8)
    inject_adapter_in_model(config(targets, 4, 8), peer)
    mine = adapters(ours, (LoRALinear, LoRAConv2d))
    theirs = adapters(peer, LoraLayer)
    assert mine.keys() == theirs.keys()
    assert not any("quant_conv" in name for name in mine)
    for name, layer in mine.items():
        assert layer.lora_A.weight.shape == theirs[name].lora_A["default"].weight.shape
        assert layer.lora_B.weight.shape == theirs[name].lora_B["default"].weight.shape


def test_the_official_lists_take_these_layers_and_no_others():
    unet = UNet(UNetConfig(**UNET))
    vae = VAE(VAEConfig(**VAE_SIZES))
    add_lora(unet, UNET_TARGETS, 4, 8)
    add_lora(vae, VAE_TARGETS, 4, 8)

    plain = set()
    for network in (unet, vae):
        layers = adapters(network, (nn.Linear, nn.Conv2d))
        plain |= layers.keys() - adapters(network, (LoRALinear, LoRAConv2d)).keys()
    plain = {name for name in plain if ".lora_" not in name and "time_emb_proj" not in name}
    assert plain == {
        "conv_in",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "quant_conv",
        "post_quant_conv",
    }


@torch.no_grad()
@pytest.mark.parametrize("rank, alpha", [(4, 4), (4, 8), (8, 3), (1, 8)])
def test_outputs_are_pefts(rank, alpha):
    ours, peer = adapted_pair(rank, alpha)
    x = normal(2, 5, 13, 9)
    assert relative(ours(x), peer(x)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("r", [0.0, 0.4, 1.0, 1.7])
def test_set_scale_is_a_share_of_the_full_strength_as_in_peft(r):
    ours, peer = adapted_pair(4, 8)
    set_scale(ours, 0.1)  # the second call does not multiply the first
    set_scale(ours, r)
    for layer in adapters(peer, LoraLayer).values():
        layer.set_scale("default", r)
    x = normal(2, 5, 13, 9)
    assert relative(ours(x), peer(x)) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("rank, alpha", [(4, 8), (8, 3)])
def test_merged_weights_are_pefts(rank, alpha):
    ours, peer = adapted_pair(rank, alpha)
    before = {name: ours.get_submodule(name).weight.clone() for name in LAYERS}
    changes = {}
    for name, layer in adapters(peer, LoraLayer).items():
        changes[name] = layer.get_delta_weight("default")
        layer.merge()
    merge(ours)
    assert not adapters(ours, (LoRALinear, LoRAConv2d, TwinConv2d))
    for name in LAYERS:
        layer = ours.get_submodule(name)
        assert type(layer) in (nn.Linear, nn.Conv2d)
        assert relative(layer.weight, before[name] + changes[name]) < 1e-9
        assert relative(layer.weight, peer.get_submodule(name).base_layer.weight) < 1e-9


@torch.no_grad()
def test_a_merged_unet_is_what_peft_merges_and_unloads():
    peer = randomise(UNet2DConditionModel(**UNET).double())
    ours = UNet(UNetConfig(**UNET)).double()
    ours.load_state_dict(peer.state_dict())
    peer = get_peft_model(peer, config(UNET_TARGETS, 8, 8)).double()
    add_lora(ours, UNET_TARGETS, 8, 8)
    copy_adapters(ours, peer.base_model.model)
    x = normal(1, 4, 8, 12)
    context = normal(1, 7, 20)
    adapted = peer(x, 999, context).sample
    assert relative(ours(x, 999, context), adapted) < 1e-9
    merge(ours)
    theirs = peer.merge_and_unload()
    mine = ours.state_dict()
    assert mine.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert relative(mine[name], tensor) < 1e-9, name
    assert relative(ours(x, 999, context), adapted) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_merging_keeps_the_scale_that_was_set(r):
    ours, _ = adapted_pair(4, 8)
    replace(ours, "same", TwinConv2d(nn.Conv2d(5, 6, 3, padding=1).double()))
    randomise(ours.same, seed=5)
    set_scale(ours, r)
    x = normal(2, 5, 13, 9)
    before = ours(x)
    assert relative(merge(ours)(x), before) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_merging_into_half_precision_rounds_once(stored):
    network = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(64, 64, 3)).to(torch.bfloat16)
    add_lora(network, ("0", "1"), 4, 8)
    for layer in network:
        assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
        randomise(layer.lora_A.to(stored), seed=1)
        randomise(layer.lora_B.to(stored), seed=2)

    expected = []
    for layer in network:
        A = layer.lora_A.weight.double().flatten(1)
        B = layer.lora_B.weight.double().flatten(1)
        expected.append(layer.weight.double() + 2 * (B @ A).view_as(layer.weight))
    merge(network)

    for layer, exact in zip(network, expected):
        assert layer.weight.dtype == torch.bfloat16
        # A few float32 sums round to the other side of a tie. If the product were rounded to
        # bfloat16 too, 10% of the values would differ.
        assert (layer.weight != exact.to(torch.bfloat16)).float().mean() < 1e-3


def test_replaced_layers_keep_the_very_same_parameters():
    network = Bare()
    before = dict(network.named_parameters())
    add_lora(network, LAYERS, 4, 8)
    after = dict(network.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert after.keys() - before.keys() == LORA_NAMES


def test_two_networks_may_share_frozen_weights_under_adapters_of_their_own():
    first = Bare().requires_grad_(False)
    second = copy.deepcopy(first)
    for name, parameter in first.named_parameters():
        parent, _, leaf = name.rpartition(".")
        setattr(second.get_submodule(parent), leaf, parameter)
    for i, network in enumerate((first, second)):
        add_lora(network, LAYERS, 4, 8, torch.Generator().manual_seed(i))
    assert first.up.weight is second.up.weight
    assert not torch.equal(first.up.lora_A.weight, second.up.lora_A.weight)
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert trained == LORA_NAMES


def test_a_is_drawn_with_standard_deviation_one_over_rank_and_b_is_zero():
    for rank in (4, 16):
        network = nn.Sequential(nn.Linear(3000, 10), nn.Conv2d(300, 10, 3))
        x = normal(1, 3000, dtype=torch.float32)
        before = network[0](x)
        add_lora(network, ("0", "1"), rank, 8)
        for layer in network:
            assert layer.lora_A.weight.std().item() == pytest.approx(1 / rank, rel=0.03)
            assert abs(layer.lora_A.weight.mean().item()) < 0.03 / rank
            assert not layer.lora_B.weight.any()
        assert torch.equal(network[0](x), before)


def test_the_generator_alone_decides_the_first_weights():
    def drawn(seed: int, elsewhere: int) -> list[Tensor]:
        torch.manual_seed(elsewhere)
        network = Bare()
        add_lora(network, LAYERS, 4, 8, torch.Generator().manual_seed(seed))
        return [network.get_submodule(name).lora_A.weight for name in LAYERS]

    assert all(torch.equal(a, b) for a, b in zip(drawn(1, 5), drawn(1, 6)))
    assert not any(torch.equal(a, b) for a, b in zip(drawn(1, 5), drawn(2, 5)))


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="no layer of the network is called to_q, to_k"):
        add_lora(Bare(), ("to_q", "to_k"), 4, 8)


# ----------------------------------------------------------------------------- twin convolution


def twin() -> tuple[TwinConv2d, nn.Conv2d]:
    """A twin whose trained half differs from the original, and the original."""
    layer = randomise(nn.Conv2d(4, 6, 3, stride=2, padding=1).double())
    original = copy.deepcopy(layer).requires_grad_(False)
    return randomise(TwinConv2d(layer), seed=7), original


@torch.no_grad()
@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_a_twin_blends_the_original_into_the_trained(r):
    layer, original = twin()
    trained = copy.deepcopy(original)
    trained.load_state_dict(layer.state_dict())  # holds only the trained half
    set_scale(layer, r)
    x = normal(2, 4, 9, 7)
    assert relative(layer(x), (1 - r) * original(x) + r * trained(x)) < 1e-12


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_no_gradient_goes_through_the_twins_original(r):
    layer, original = twin()
    set_scale(layer, r)
    x = normal(2, 4, 9, 7).requires_grad_()
    weight = normal(2, 6, 5, 4, seed=1)
    found = gradients(layer, (layer(x) * weight).sum())
    (found["x"],) = torch.autograd.grad((layer(x) * weight).sum(), x)

    trained = nn.Conv2d(4, 6, 3, stride=2, padding=1).double()
    trained.load_state_dict(layer.state_dict())
    expected = gradients(trained, r * (trained(x) * weight).sum())
    (expected["x"],) = torch.autograd.grad(r * (trained(x) * weight).sum(), x)

    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if r == 0:
            assert not gradient.any()
        else:
            assert relative(gradient, expected[name]) < 1e-12


def test_a_twin_of_a_half_precision_layer_merges_in_the_trained_precision():
    layer = TwinConv2d(randomise(nn.Conv2d(4, 6, 3)).to(torch.bfloat16))
    weight = normal(6, 4, 3, 3, dtype=torch.float32)
    bias = normal(6, dtype=torch.float32)
    layer.weight = nn.Parameter(weight)  # float32, as loading a checkpoint leaves them
    layer.bias = nn.Parameter(bias)
    set_scale(layer, 0.25)
    merged = layer.merged()
    assert merged.weight.dtype == merged.bias.dtype == torch.float32
    assert relative(merged.weight, 0.75 * layer.weight0.float() + 0.25 * weight) < 1e-6
    assert relative(merged.bias, 0.75 * layer.bias0.float() + 0.25 * bias) < 1e-6
