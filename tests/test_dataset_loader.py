"""dataset/loader.py: the batches of each training step."""

import itertools
import signal

import numpy as np
import pytest
import torch
from pictures_helpers import make_pairs, noise, refused

from dataset.folders import PairedFolder
from dataset.loader import batches


class Numbers(torch.utils.data.Dataset):
    """Items that report their index, their key and whether their process ignores Ctrl-C."""

    def __init__(self, length: int, broken: int | None = None):
        self.length = length
        self.broken = broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple) -> dict:
        index, key = item
        if index == self.broken:
            try:
                raise ValueError("inner")
            except ValueError:
                raise ValueError(f"picture {index} is broken: replace it") from None

        signals = (signal.SIGINT, signal.SIGTERM)
        ignores = all(signal.getsignal(number) is signal.SIG_IGN for number in signals)
        draw = torch.tensor([np.random.default_rng(key).random()] * 3).view(3, 1, 1)
        return dict(
            input=draw,
            target=draw,
            caption=f"ignores {ignores}",
            name=f"{index} {key}",
        )


def names(iterator) -> list[list[str]]:
    return [batch["name"] for batch in iterator]


def indices(names: list[str]) -> list[int]:
    return [int(name.split()[0]) for name in names]


def test_every_sample_is_seen_once_an_epoch_and_none_is_dropped():
    steps = names(batches(Numbers(10), 4, 0, end_step=10))
    taken = indices(itertools.chain(*steps))
    epochs = [taken[i : i + 10] for i in range(0, 40, 10)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_be_larger_than_the_data_set():
    (batch,) = names(batches(Numbers(3), 8, 0, end_step=1))
    taken = indices(batch)
    assert sorted(taken[:3]) == sorted(taken[3:6]) == [0, 1, 2]
    assert len(taken) == 8


def test_row_j_of_step_s_has_the_key_seed_s_j():
    steps = names(batches(Numbers(5), 3, 9, start_step=2, end_step=4))
    keys = [[name.partition(" ")[2] for name in step] for step in steps]
    assert keys == [
        ["(9, 2, 0)", "(9, 2, 1)", "(9, 2, 2)"],
        ["(9, 3, 0)", "(9, 3, 1)", "(9, 3, 2)"],
    ]


def test_the_seed_decides_the_order():
    one = names(batches(Numbers(50), 50, seed=1, end_step=1))
    same = names(batches(Numbers(50), 50, seed=1, end_step=1))
    other = names(batches(Numbers(50), 50, seed=2, end_step=1))
    assert one == same != other


def test_resuming_at_any_step_continues_the_same_run():
    whole = names(batches(Numbers(7), 3, 5, end_step=12))
    for start in (0, 1, 5, 11):
        resumed = names(batches(Numbers(7), 3, 5, start_step=start, end_step=12))
        assert resumed == whole[start:]
    endless = batches(Numbers(7), 3, 5, start_step=4)
    assert names(itertools.islice(endless, 5)) == whole[4:9]


def test_the_rows_of_several_processes_are_those_of_one():
    whole = names(batches(Numbers(7), 4, 5, end_step=6))
    ranks = []
    for rows in ([0, 2], [1], [3]):
        ranks.append(names(batches(Numbers(7), 4, 5, end_step=6, rows=rows)))
    for step in range(6):
        (a, c), (b,), (d,) = (rank[step] for rank in ranks)
        assert [a, b, c, d] == whole[step]


def test_batches_of_a_folder_are_the_same_with_and_without_workers(tmp_path):
    pairs = PairedFolder(make_pairs(tmp_path), "train", "resize_40_randomcrop_32x32_hflip")
    one = list(batches(pairs, 2, 3, end_step=5, num_workers=0))
    other = list(batches(pairs, 2, 3, end_step=5, num_workers=2))
    assert len(one) == len(other) == 5
    for a, b in zip(one, other, strict=True):
        assert a["input"].shape == a["target"].shape == (2, 3, 32, 32)
        assert torch.equal(a["input"], b["input"])
        assert torch.equal(a["target"], b["target"])
        assert a["caption"] == b["caption"]
        assert a["name"] == b["name"]
        assert isinstance(a["caption"], list)
    blue = (one[0]["input"][:, 2, 0, 0] * 255).round().int().tolist()
    assert [f"{i:03}.png" for i in blue] == one[0]["name"]


def test_the_order_of_an_epoch_does_not_share_random_numbers_with_a_crop():
    """numpy pads short keys with zeros, so (seed, epoch) would be (seed, step, row 0)."""
    steps = names(batches(Numbers(100), 100, 3, end_step=1))
    with_short_key = np.random.default_rng((3, 0)).permutation(100).tolist()
    assert indices(steps[0]) != with_short_key
    assert np.random.default_rng((3, 0)).random() == np.random.default_rng((3, 0, 0)).random()


def test_loading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(batches(Numbers(4), 2, 0, end_step=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_sample_surfaces_as_its_one_sentence(workers):
    with pytest.raises(ValueError) as caught:
        list(batches(Numbers(6, broken=4), 2, 0, end_step=3, num_workers=workers))
    assert str(caught.value) == "picture 4 is broken: replace it"


def test_an_unreadable_file_met_by_a_worker_is_named(tmp_path):
    make_pairs(tmp_path)
    path = tmp_path / "train_B" / "002.png"
    noise(40, 40).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    pairs = PairedFolder(tmp_path, "train", "no_resize")
    iterator = batches(pairs, 5, 0, end_step=1, num_workers=1)
    refused(list, iterator, match=f"{path} is not a readable picture")


def test_pictures_of_several_sizes_in_one_batch_are_refused_by_name(tmp_path):
    make_pairs(tmp_path, 1)
    for side in "AB":
        noise(20, 40).save(tmp_path / f"train_{side}" / "001.png")
    (tmp_path / "train_prompts.json").unlink()
    pairs = PairedFolder(tmp_path, "train", "no_resize")
    refused(list, batches(pairs, 2, 0, end_step=1), match="differ in size")
    assert len(list(batches(pairs, 1, 0, end_step=2))) == 2


def test_workers_ignore_stop_signals_and_the_main_process_does_not():
    # A background job of a shell may have been started with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for workers, ignores in ((1, True), (0, False)):
            (batch,) = batches(Numbers(2), 2, 0, end_step=1, num_workers=workers)
            assert batch["caption"] == [f"ignores {ignores}"] * 2
    finally:
        signal.signal(signal.SIGINT, before)
