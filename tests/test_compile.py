"""The networks are whole graphs: torch.export takes them, torch.compile needs no second piece, and what comes out is
the network's own."""

import pytest
import torch
from conftest import normal, randomise, relative
from test_weights import SCHEDULE, UNET, VAE
from torch import Tensor, nn

from models import unet, vae
from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig
from models.diffusion import Schedule
from models.lora import merge
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig

pytestmark = pytest.mark.usefixtures("one_thread")

B, SIDE = 2, 8  # of the latent
NAMES = ["U-Net", "VAE encode", "VAE decode", "pix2pix-Turbo", "CycleGAN-Turbo"]


class Method(nn.Module):
    """A method as a module's forward, which is what torch.export takes."""

    def __init__(self, network: nn.Module, name: str):
        super().__init__()
        self.network, self.name = network, name

    def forward(self, *inputs):
        return getattr(self.network, self.name)(*inputs)


def network(name: str) -> nn.Module:
    networks = vae.VAE(vae.VAEConfig(**VAE)), unet.UNet(unet.UNetConfig(**UNET)), Schedule.from_config(SCHEDULE)
    made = {"U-Net": lambda: networks[1],
            "VAE encode": lambda: Method(networks[0], "encode"), "VAE decode": lambda: Method(networks[0], "decode"),
            "pix2pix-Turbo": lambda: Pix2PixTurbo(*networks, Pix2PixTurboConfig(stochastic=True)),
            "CycleGAN-Turbo": lambda: CycleGANTurbo(*networks, CycleGANTurboConfig(lora_rank_unet=4))}[name]()
    return merge(randomise(made.double())).requires_grad_(False)


def inputs(name: str, seed: int) -> tuple:
    z, x = normal(B, 4, SIDE, SIDE, seed=seed), normal(B, 3, 2 * SIDE, 2 * SIDE, seed=seed)
    context = normal(B, 5, UNET["cross_attention_dim"], seed=seed)
    return {"U-Net": (z, 999, context), "VAE encode": (x,), "VAE decode": (z,),
            "pix2pix-Turbo": (x, context, 0.4, z), "CycleGAN-Turbo": (x, context, "b2a")}[name]


def first(result: Tensor | tuple) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_exported_program_is_the_network_on_other_inputs_too(name):
    here = network(name)
    program = torch.export.export(here, inputs(name, 0)).module()
    expected = first(here(*inputs(name, 1)))
    assert expected.std() > 0.01
    assert relative(first(program(*inputs(name, 1))), expected) < 1e-9


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_network_compiles_as_one_graph(name, backend):
    torch._dynamo.reset()
    here = network(name)
    compiled = torch.compile(here, fullgraph=True, dynamic=False, backend=backend)
    bound = 1e-6 if backend == "inductor" else 1e-9  # inductor's float32 sines, of the timestep, end in other bits
    for seed in (0, 1):
        assert relative(first(compiled(*inputs(name, seed))), first(here(*inputs(name, seed)))) < bound
