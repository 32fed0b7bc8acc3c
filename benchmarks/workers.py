"""Processes that take turns: each loads one side of a benchmark and does the tasks asked for.

Every side has a process of its own, so that neither disturbs the other's caches, and both are
measured on the same machine at the same time.
"""

import contextlib
import multiprocessing
import pathlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.utils import flop_counter


@dataclass(frozen=True)
class Job:
    """What a worker is told. `fast`, `compiled` and `checkpointing` concern our side only."""
    what: str
    against: str | None
    size: int
    batch: int
    dtype: torch.dtype
    device: str
    fast: bool = False
    compiled: bool = False
    gan: bool = False
    checkpointing: bool = False
    kind: str = "pix2pix_turbo"  # which trainer
    tiny: bool = False
    base: str = ""  # folder of the networks
    vae: str = ""  # folder of an autoencoder in the place of the base's VAE
    checkpoint: str = ""  # a pix2pix-Turbo checkpoint for that base
    data: str = ""  # folder of a data set for the trainers
    run_folder: str = ""  # where a trainer writes

    @property
    def our_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.fast else self.dtype


# -------------------- measuring

def peak_gb(device: str) -> float:
    """The process's peak memory since the last reset: allocated on the GPU, or resident (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = pathlib.Path("/proc/self/status").read_text()
    kilobytes = re.search(r"VmHWM:\s+(\d+)", status)[1]
    return int(kilobytes) * 1024 / 1e9


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def count_flops() -> flop_counter.FlopCounterMode:
    """torch's counter of FLOPs, extended by what it leaves out: attention on the CPU."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward_flops(q, k, v, *_, **__) -> int:
        return flop_counter.sdpa_flop_count(q, k, v)

    def backward_flops(gradient, q, k, v, *_, **__) -> int:
        return flop_counter.sdpa_backward_flop_count(gradient, q, k, v)

    mapping = {forward: forward_flops, backward: backward_flops}
    return flop_counter.FlopCounterMode(display=False, custom_mapping=mapping)


# -------------------- the worker's end

class Requests:
    """The tasks that a worker is asked for, one at a time, and what each of them took.

    A worker calls `begin`, does the task, and calls `finish`. The first run of a task is
    inspected: its FLOPs are counted and its result is returned, so its time does not count.
    Memory is measured on top of the idle process, before anything was loaded.
    """

    def __init__(self, pipe: Connection, job: Job):
        self.pipe = pipe
        self.device = job.device
        self.compiled = job.compiled
        torch.empty(0, device=job.device)  # the device itself takes memory
        reset_peak(job.device)
        self.idle_gb = peak_gb(job.device)

    def begin(self) -> object:
        """Waits for a task, returns it, and starts the clock."""
        task, inspect = self.pipe.recv()
        reset_peak(self.device)
        self.counter = None
        self.inspection = contextlib.ExitStack()
        if inspect:
            if self.compiled:
                eager = torch.compiler.set_stance("force_eager")
                self.inspection.enter_context(eager)
            self.counter = self.inspection.enter_context(count_flops())
        self.started = time.perf_counter()
        return task

    def finish(self, result: Tensor | None = None) -> None:
        """Stops the clock and reports."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        report = dict(seconds=seconds, peak_gb=peak_gb(self.device) - self.idle_gb)
        self.inspection.close()
        if self.counter:
            report["tflop"] = self.counter.get_total_flops() / 1e12
            report["result"] = None if result is None else result.float().cpu().numpy()
        self.pipe.send(report)


def answer(requests: Requests, work: Callable[[object], Tensor | None]) -> None:
    """Does one task after the other, until the process is ended."""
    while True:
        task = requests.begin()
        requests.finish(work(task))


Side = Callable[[Job, Requests], None]


def serve(pipe: Connection, side: Side, job: Job) -> None:
    """The life of a worker: `side` loads what it needs and answers requests."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        side(job, Requests(pipe, job))


# -------------------- the other end

class Worker:
    """A running process that does one side's work."""

    def __init__(self, name: str, side: Side, job: Job):
        # A spawned process shares nothing with this one. Forked ones start faster, for tests.
        context = multiprocessing.get_context("fork" if job.tiny else "spawn")
        self.name = name
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(other_end, side, job))
        self.process.start()
        other_end.close()  # so that the end of the process is noticed

    def ask(self, task: object, inspect: bool = False) -> dict:
        """Has a task done: its `seconds`, `peak_gb` and, if inspected, `tflop` and `result`."""
        try:
            self.pipe.send((task, inspect))
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            raise ChildProcessError(
                f"the worker of {self.name} ended at {task}: see its message above, if there is"
                " none it ran out of memory"
            ) from None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
