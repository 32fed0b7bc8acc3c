"""What the tests share: how close two tensors are, random weights, the folder of real data."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


def pytest_configure(config: pytest.Config) -> None:
    """Everywhere but in `pytest -m gpu` the tests see the same machine: one without a GPU."""
    pytest.register_assert_rewrite("pipelines", "pictures_helpers", "trainer_helpers")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a thread each
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def relative(ours: Tensor, peer: Tensor) -> float:
    """Largest absolute difference over largest absolute value, of tensors of the same shape."""
    assert ours.shape == peer.shape, f"{list(ours.shape)} and {list(peer.shape)}"
    value = ((ours - peer).abs().max() / peer.abs().max()).item()
    # max() over several values would pass over NaN.
    assert math.isfinite(value), "not a number, or all zeros"
    return value


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter at random.

    So no norm's 1, no bias's 0 and no zero convolution hides a mistake. Matrices are scaled to
    keep the size of what goes through them.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.copy_(p + 0.3 * noise if p.ndim == 1 else noise / p[0].numel() ** 0.5)
    return network


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, trained = zip(*[(name, p) for name, p in network.named_parameters() if p.requires_grad])
    return dict(zip(names, torch.autograd.grad(loss, trained)))


@pytest.fixture
def shared() -> Path:
    if "SHARED_DATA" not in os.environ:
        pytest.skip("SHARED_DATA does not name the folder of real pictures and vocabularies")
    return Path(os.environ["SHARED_DATA"])


@pytest.fixture
def one_thread(request):
    """Runs a test on one thread.

    Tiny networks gain nothing from a second one and wait for it on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(threads)
