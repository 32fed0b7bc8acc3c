"""The order of training: batches by step."""

import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate


def _steps(length: int, batch: int, seed: int, start: int, end: int | None, rows: Sequence[int]) -> Iterator[list]:
    @lru_cache(maxsize=2)  # a step may reach over the end of an epoch
    def order(epoch: int) -> np.ndarray:
        # (seed, epoch) alone would be the stream of the key (seed, step, 0): numpy fills short keys up with zeros
        return np.random.default_rng((seed, epoch, 0, 1)).permutation(length)

    for step in count(start) if end is None else range(start, end):
        places = [(row, divmod(step * batch + row, length)) for row in rows]
        yield [(int(order(epoch)[place]), (seed, step, row)) for row, (epoch, place) in places]


def collate(items: list[dict]) -> dict:
    def shapes(item: dict) -> list[torch.Size]:
        return [value.shape for value in item.values() if isinstance(value, torch.Tensor)]

    if odd := next((item for item in items if shapes(item) != shapes(items[0])), None):
        names = [item.get("name") or item["name_a"] for item in (items[0], odd)]
        raise ValueError(f"'{names[0]}' and '{names[1]}' differ in size, expected one size a batch: "
                         "choose a preparation that makes them equal, or a batch size of 1")
    return default_collate(items)


def _leave_stops_to_the_trainer(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or torchrun tells every process; one saves the state
        signal.signal(number, signal.SIG_IGN)


def batches(dataset: Dataset, batch: int, seed: int, start_step: int = 0, end_step: int | None = None,
            rows: Sequence[int] | None = None, num_workers: int = 0) -> Iterator[dict]:
    """One dictionary a step (tensors [B, ...], lists of strings) with this process's `rows` of a global batch.

    The samples are one endless row of permutations of the data set, each drawn from (seed, epoch), of which step s
    takes the places s * batch to (s + 1) * batch - 1; row j of step s draws its crop from (seed, s, j). So nothing is
    dropped, a run may begin at any step, and N processes with a part of the rows each are one with all of them.
    ValueError, one sentence, also when a worker met the picture."""
    steps = _steps(len(dataset), batch, seed, start_step, end_step, range(batch) if rows is None else rows)
    loader = DataLoader(dataset, batch_sampler=steps, num_workers=num_workers, collate_fn=collate,
                        pin_memory=torch.cuda.is_initialized(), worker_init_fn=_leave_stops_to_the_trainer,
                        generator=torch.Generator())  # its own: a loader draws a number from the global one otherwise
    iterator = iter(loader)  # named, so that it is there until what comes of a lost worker has been dealt with
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:  # of its pipe, before the signal of its end is heard
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise RuntimeError(f"DataLoader worker is lost: {error or 'end of its pipe'}") from None
    except ValueError as error:  # from a worker it comes as its whole traceback, the sentence last
        error.__traceback__ = iterator = None  # a cycle around the loader, whose workers would end seconds later
        raise ValueError(str(error).rpartition("\nValueError: ")[2].strip()) from None
