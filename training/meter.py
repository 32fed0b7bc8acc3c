"""What one process of --plan measures: weights, memory and seconds of a few steps of a trainer.

It is the trainer itself with --plan_steps, whose `Run` writes no file, asks this meter what is due,
and prints two lines of JSON: what is known before the first step, and all of it at the end.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

# How long and on how many items reading alone is timed.
READING_SECONDS = 2.0
READING_ITEMS = 64


class Meter:
    """Times the steps of a run and the validation after the last of them."""

    def __init__(self, device: torch.device, steps: int):
        self.device = device
        self.steps = steps
        self.facts: dict[str, float] = {}
        self.ends: list[float] = []  # when each step was over

    def start(self, nets, state: dict, loading: float, **facts: float) -> None:
        """Before the first step. `loading` is in items a second, `state` what would be saved."""
        self.state = state
        self.trained = nets.trained
        self.facts |= facts | count_weights(nets) | {"loading": loading}
        print(json.dumps(self.facts), flush=True)
        self.started = self.now()

    def due(self, job: str, step: int) -> bool:
        """Whether a periodic job is done: only the validation after the last step.

        The loop asks for the validation first, when a step is over, and for the preview next.
        """
        now = self.now()
        if job == "validation":
            self.ends.append(now)
        if job == "preview":
            self.validated = now
        return job == "validation" and step + 1 == self.steps

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def finish(self, validated: int) -> None:
        """After the last step: prints everything. `validated` is the number of items."""
        first, last = self.ends[0], self.ends[-1]
        self.facts |= dict(
            first_step=first - self.started,
            step=(last - first) / max(len(self.ends) - 1, 1),
            validation=(self.validated - last) / validated,
            seconds=self.now() - self.started,
            weights_bytes=count_bytes(self.trained),
            state_bytes=count_bytes(self.state),
        )
        self.facts |= memory(self.device)
        print(json.dumps(self.facts), flush=True)


def reading_speed(items: Sequence, seed: int) -> float:
    """Training items a second of one process that only reads and prepares them."""
    started = time.monotonic()
    count = 0
    seconds = 0.0
    while count < READING_ITEMS and (seconds < READING_SECONDS or count == 0):
        items[count % len(items), (seed, 0, count)]
        count += 1
        seconds = time.monotonic() - started
    return count / max(seconds, 1e-6)


def count_weights(nets) -> dict[str, int]:
    """How many weights are trained, are the discriminator's, and are frozen.

    `nets` is a dataclass of networks, with the fields `trained` and `D`.
    """
    everything = {id(p): p.numel() for network in networks_of(nets) for p in network.parameters()}
    trained = {id(p): p.numel() for p in nets.trained.values()}
    of_discriminator = {}
    if nets.D is not None:
        of_discriminator = {id(p): p.numel() for p in nets.D.parameters() if p.requires_grad}
    changing = trained | of_discriminator
    frozen = {key: count for key, count in everything.items() if key not in changing}
    return dict(
        trained=sum(trained.values()),
        discriminator=sum(of_discriminator.values()),
        frozen=sum(frozen.values()),
    )


def networks_of(nets) -> Iterator[nn.Module]:
    """The networks in a dataclass, and in the dataclasses in it."""
    for field in fields(nets):
        value = getattr(nets, field.name)
        if isinstance(value, nn.Module):
            yield value
        elif is_dataclass(value):
            yield from networks_of(value)


def count_bytes(state) -> int:
    """Bytes of all tensors in dictionaries, lists, and what has a state dictionary."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if hasattr(state, "state_dict"):
        return count_bytes(state.state_dict())
    if isinstance(state, dict):
        return sum(count_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(count_bytes(value) for value in state)
    return 0


def memory(device: torch.device) -> dict[str, float]:
    """Bytes at the peak and in all: the GPU's, or the process's resident memory."""
    if device.type == "cuda":
        return dict(
            allocated=torch.cuda.max_memory_allocated(device),
            reserved=torch.cuda.max_memory_reserved(device),
            total=torch.cuda.get_device_properties(device).total_memory,
        )
    return dict(resident=peak_resident(), total=physical_memory())


def peak_resident() -> int:
    """The most bytes of memory that this process has held so far; 0 where nobody counts."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def physical_memory() -> int:
    """Bytes of this machine's memory; 0 where it is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
