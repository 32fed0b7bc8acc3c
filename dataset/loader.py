"""The batches of each training step, in an order that depends on the random seed and the step."""

import itertools
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate


def batches(
    dataset: Dataset,
    batch: int,
    seed: int,
    start_step: int = 0,
    end_step: int | None = None,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
) -> Iterator[dict]:
    """Yields one batch a step, a dictionary of tensors [B, ...] and lists of strings.

    The samples form one endless sequence of epochs, each a permutation of the data set that
    depends on (seed, epoch). Step s takes positions s * batch to (s + 1) * batch - 1 of it, and
    row j of step s draws its crop from (seed, s, j). So no sample is dropped, a run may start at
    any step, and N processes that each take a part of the rows see what one process would.

    `batch` is the global batch size, and `rows` are the rows that this process takes of it
    (default: all). With end_step None the iterator is endless.

    ValueError of one sentence for a picture that cannot be used, also if a worker met it.
    RuntimeError ("DataLoader worker is lost") if a worker process was killed.
    """
    if rows is None:
        rows = range(batch)
    loader = DataLoader(
        dataset,
        batch_sampler=_steps(len(dataset), batch, seed, start_step, end_step, rows),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=_ignore_stop_signals,
        # Its own generator, because a loader would otherwise draw from the global one.
        generator=torch.Generator(),
    )

    # The iterator has a name so that it outlives the handling of a lost worker.
    iterator = iter(loader)
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:
        # A killed worker's pipe may break before the signal of its end arrives.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        reason = str(error) or "end of its pipe"
        raise RuntimeError(f"DataLoader worker is lost: {reason}") from None
    except ValueError as error:
        # The traceback would form a cycle with the loader, and keep its workers alive for seconds.
        error.__traceback__ = None
        iterator = None
        # A worker's error arrives as the text of its whole traceback, the message at the end.
        message = str(error).rpartition("\nValueError: ")[2]
        raise ValueError(message.strip()) from None


def _steps(
    length: int,
    batch: int,
    seed: int,
    start: int,
    end: int | None,
    rows: Sequence[int],
) -> Iterator[list]:
    """Yields for each step its items (index, key), those of `rows`."""

    # Two epochs are kept, because a batch may reach over the end of one.
    @lru_cache(maxsize=2)
    def order_of(epoch: int) -> np.ndarray:
        # numpy pads short keys with zeros, so (seed, epoch) alone would give the same random
        # numbers as the key (seed, step, 0) of a crop.
        return np.random.default_rng((seed, epoch, 0, 1)).permutation(length)

    steps = itertools.count(start) if end is None else range(start, end)
    for step in steps:
        items = []
        for row in rows:
            epoch, place = divmod(step * batch + row, length)
            index = int(order_of(epoch)[place])
            items.append((index, (seed, step, row)))
        yield items


def _ignore_stop_signals(worker: int) -> None:
    """A terminal or torchrun signals every process, but only the trainer may save and stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def collate(items: list[dict]) -> dict:
    """Items -> one batch. ValueError if their tensors differ in shape."""

    def shapes(item: dict) -> list[torch.Size]:
        return [value.shape for value in item.values() if isinstance(value, torch.Tensor)]

    def name(item: dict) -> str:
        return item.get("name") or item["name_a"]

    first = items[0]
    for item in items:
        if shapes(item) != shapes(first):
            raise ValueError(
                f"'{name(first)}' and '{name(item)}' differ in size, expected one size a batch:"
                " choose a preparation that makes them equal, or for training a batch size of 1"
            )
    return default_collate(items)
