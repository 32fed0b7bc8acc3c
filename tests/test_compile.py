"""Each network is a single graph: torch.export accepts it, torch.compile does not break it in two,
and the results are those of the network itself."""

import pytest
import torch
from conftest import normal, randomise, relative
from torch import Tensor, nn

from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig
from models.diffusion import Schedule
from models.lora import merge
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")

UNET_SIZES = dict(
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=32,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
VAE_SIZES = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
NAMES = ["U-Net", "VAE encode", "VAE decode", "pix2pix-Turbo", "CycleGAN-Turbo"]


class Method(nn.Module):
    """A method as the forward pass of a module, because torch.export takes modules only."""

    def __init__(self, network: nn.Module, name: str):
        super().__init__()
        self.network = network
        self.name = name

    def forward(self, *inputs):
        return getattr(self.network, self.name)(*inputs)


def make_network(name: str) -> nn.Module:
    """A tiny network in float64, with random weights and merged adapters."""
    vae = VAE(VAEConfig(**VAE_SIZES))
    unet = UNet(UNetConfig(**UNET_SIZES))
    schedule = Schedule.from_config(SCHEDULE)
    if name == "U-Net":
        network = unet
    elif name == "VAE encode":
        network = Method(vae, "encode")
    elif name == "VAE decode":
        network = Method(vae, "decode")
    elif name == "pix2pix-Turbo":
        network = Pix2PixTurbo(vae, unet, schedule, Pix2PixTurboConfig(stochastic=True))
    else:
        network = CycleGANTurbo(vae, unet, schedule, CycleGANTurboConfig(lora_rank_unet=4))
    return merge(randomise(network.double())).requires_grad_(False)


def inputs(name: str, seed: int) -> tuple:
    """What the network of this name takes: two pictures or two latents of 8x8."""
    z = normal(2, 4, 8, 8, seed=seed)
    x = normal(2, 3, 16, 16, seed=seed)
    context = normal(2, 5, UNET_SIZES["cross_attention_dim"], seed=seed)
    return {
        "U-Net": (z, 999, context),
        "VAE encode": (x,),
        "VAE decode": (z,),
        "pix2pix-Turbo": (x, context, 0.4, z),
        "CycleGAN-Turbo": (x, context, "b2a"),
    }[name]


def first(result: Tensor | tuple) -> Tensor:
    """The result, or the first of several."""
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_exported_program_is_the_network_on_other_inputs_too(name):
    network = make_network(name)
    program = torch.export.export(network, inputs(name, seed=0)).module()
    expected = first(network(*inputs(name, seed=1)))
    assert expected.std() > 0.01
    assert relative(first(program(*inputs(name, seed=1))), expected) < 1e-9


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_network_compiles_as_one_graph(name, backend):
    torch._dynamo.reset()
    network = make_network(name)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend=backend)
    # The timestep's sinusoids are float32, and those of inductor differ in the last bits.
    bound = 1e-6 if backend == "inductor" else 1e-9
    for seed in (0, 1):
        expected = first(network(*inputs(name, seed)))
        assert relative(first(compiled(*inputs(name, seed))), expected) < bound
