"""Devices and processes: ranks, their rows of a batch, means over them, requests to stop."""

import datetime
import os
import signal
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from training.exits import first_line


def pick_device(name: str) -> torch.device:
    """The named device, or the best one for "auto". ValueError where it cannot be used."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used ({first_line(error)}); expected auto, or cpu, cuda"
            " or mps if this machine has it"
        ) from None
    return device


def start_ranks(device_name: str) -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and its device. Joins them under torchrun."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device_name == "auto" and torch.cuda.is_available():
        device_name = "cuda"
    if device_name == "cuda":  # each process its own GPU, before anything allocates on the first
        device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # The other processes wait while rank 0 validates.
        wait = datetime.timedelta(hours=2)
        own = device if backend == "nccl" else None  # else its barriers guess the GPU
        dist.init_process_group(backend, timeout=wait, device_id=own)
    return rank, world, device


def leave_ranks() -> None:
    """Waits for all processes, then ends their connections.

    Without the wait, torchrun would kill the others once one has ended. And a process that ends
    with its connections open is sometimes aborted by one of their threads.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def my_rows(rank: int, world: int, batch: int, accumulation: int) -> list[list[int]]:
    """Rows of the global batch that this process takes, one list per micro-batch."""
    rows = []
    for slice_number in range(accumulation):
        first = (slice_number * world + rank) * batch
        rows.append(list(range(first, first + batch)))
    return rows


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over all processes, in one bucket."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    bucket = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(bucket)
    bucket /= dist.get_world_size()
    for grad, mean in zip(grads, bucket.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    if not dist.is_initialized():
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(means)
    means /= dist.get_world_size()
    return dict(zip(values, means.tolist()))


def catch_stop() -> Callable[[], bool]:
    """Makes the first Ctrl-C or SIGTERM a request.

    The returned function says whether one came, on any rank. A second Ctrl-C stops at once.
    """
    requests = []

    def handler(number, frame):
        # SIGTERM comes several times, from a scheduler and again from torchrun.
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return lambda: mean_over_ranks({"stop": float(bool(requests))})["stop"] > 0
