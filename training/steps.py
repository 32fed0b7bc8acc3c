"""Parts of a step: random numbers, learning rate, swapping in the EMA, checks, accuracy."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def rng(seed: int, step: int, what: str) -> torch.Generator:
    """The CPU random generator for one purpose at one step.

    It depends on nothing else, neither on ranks nor on earlier draws, so resuming a run or
    splitting a batch changes no random number.
    """
    digest = hashlib.sha256(f"{seed} {step} {what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw_noise(
    seeds: Iterable[int], shape: tuple[int, ...]
) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal noise [len(seeds), *shape] in float32 on the CPU, one generator per seed.

    Also returns the generators, for whatever each picture draws next.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, *shape, generator=g) for g in generators])
    return noise, generators


def learning_rate(step: int, cfg, last_step: int) -> float:
    """The learning rate of a step: constant; or a linear warm-up, and then constant
    (constant_with_warmup) or falling to 0 (linear, cosine)."""
    rise = 1.0
    if cfg.lr_scheduler != "constant":
        rise = min(1.0, (step + 1) / max(cfg.lr_warmup_steps, 1))
    steps = max(last_step - cfg.lr_warmup_steps, 1)
    progress = max(0.0, (step - cfg.lr_warmup_steps) / steps)
    fall = 1.0
    if cfg.lr_scheduler == "linear":
        fall = 1 - progress
    if cfg.lr_scheduler == "cosine":
        fall = 0.5 + 0.5 * math.cos(math.pi * progress)
    return cfg.learning_rate * rise * fall


def set_learning_rate(optimizer: torch.optim.Optimizer | None, rate: float) -> None:
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate


@contextlib.contextmanager
def swapped(trained: dict[str, Tensor], ema: dict[str, Tensor]) -> Iterator[None]:
    """Within this context the trained weights hold their EMA. Without an EMA nothing changes."""
    swap(trained, ema)
    try:
        yield
    finally:
        swap(trained, ema)


def swap(trained: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
    for name, average in ema.items():
        weights = trained[name].data
        trained[name].data = average
        ema[name] = weights


@contextlib.contextmanager
def saved_on_failure(save: Callable[[int], None], step: int) -> Iterator[None]:
    """Calls save(step) before an error inside this context ends the run, so that no step is lost.

    A test picture that cannot be read, or memory that only validation needs, costs no training.
    """
    try:
        yield
    except Exception:
        save(step)
        raise


def check_finite(losses: dict[str, float], step: int, names: list[str]) -> None:
    """ValueError where a value is not finite, with the names of the step's pictures."""
    bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
    if not bad:
        return
    advice = (
        "the last saved state is untouched: look at these pictures, try --mixed_precision no or"
        " bf16, or a lower --learning_rate"
    )
    if step == 0:
        advice = (
            "nothing is trained yet, so it is not the learning rate: look at these pictures, try"
            " --mixed_precision no, and see whether the base's weights hold NaN (python sample.py"
            " --base BASE draws with them)"
        )
    raise ValueError(f"step {step + 1}: the loss became {bad} on {', '.join(names)}; {advice}")


def set_trainable(network: nn.Module | None, trainable: bool) -> None:
    if network is not None:
        network.requires_grad_(trainable)


def accuracy(logits_real: list[Tensor], logits_fake: list[Tensor]) -> dict[str, float]:
    """How often a discriminator is right about real pictures and about fakes, for the log."""
    return {
        "disc_right_on_real": share_right(logits_real, True),
        "disc_right_on_fake": share_right(logits_fake, False),
    }


def share_right(logits: list[Tensor], real: bool) -> float:
    """The share of logits with the right sign for pictures that are `real` or not.

    0.5 is chance. If it stays near 1, the discriminator has won.
    """
    verdicts = torch.cat([level.detach().flatten() > 0 for level in logits])
    return (verdicts == real).float().mean().item()
