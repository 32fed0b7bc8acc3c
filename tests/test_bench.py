"""bench.py runs each of its measurements on small networks: both sides do the same work, and the table says what was
measured. How long anything took is asserted nowhere."""

import json
import multiprocessing
import re
import runpy
import sys

import diffusers  # noqa: F401  the workers are forked, and find it imported
import pytest
import torch
import torch._dynamo  # noqa: F401  of torch's counter of FLOPs
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks import bench
from models import lora

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD = "| | | seconds | / ours (smallest to largest) | TFLOP | of the peak | memory, GB | difference: largest (mean) |"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Where the first test leaves the random weights for the others."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def measure(scratch, tmp_path, capsys):
    def measure(flags: str) -> tuple[list[dict], list[list[str]]]:
        """The rows of the JSON on stdout, and the cells of the table."""
        table = tmp_path / "table.md"
        bench.main([*flags.split(), "--tiny", "--scratch", str(scratch), "--table", str(table), "--plot",
                    str(tmp_path / "plot.png")])
        result = json.loads(capsys.readouterr().out)
        empty, title, _, command, _, head, rule, *lines = table.read_text().splitlines()
        assert (empty, title, head) == ("", f"## {result['title']}", HEAD)
        assert all(part in command for part in (result["command"], f"{result['runs']} runs", "torch 2", "threads"))
        assert rule.count("---") == 8 and len(lines) == len(result["rows"])
        return result["rows"], [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    return measure


@pytest.mark.parametrize("flags, peer, tasks", [
    ("translate", "official-style", 1), ("translate --against diffusers", "diffusers", 1),
    ("text", "diffusers", 1), ("modules", "diffusers", 4)])
def test_both_sides_give_the_same_numbers(measure, flags, peer, tasks):
    rows, cells = measure(f"--size 32 --batch 2 --runs 2 --what {flags}")
    assert [row["side"] for row in rows] == ["ours", peer] * tasks
    for ours, theirs in zip(rows[::2], rows[1::2]):
        assert theirs["difference"][0] < 1e-4
        low, high = theirs["ratio"][1:]
        assert 0 < low <= theirs["ratio"][0] <= high
        # The official adapters stand beside the layers, and it asks the text encoder each time.
        assert theirs["tflop"] > (1.1 if peer == "official-style" else 0.99) * ours["tflop"] > 0
    for row in cells:
        assert len(row) == 8 and re.fullmatch(r"[\d.e-]+", row[2]) and re.fullmatch(r"\d+%", row[5])


def test_our_side_may_be_in_bf16_alone(measure, monkeypatch):
    monkeypatch.setattr(bench.sample, "computes_in_bf16", lambda device: True)  # whatever this processor does
    (_, theirs), _ = measure("--size 32 --runs 1 --what translate --fast")
    assert 1e-4 < theirs["difference"][1] < 0.05


@pytest.mark.parametrize("gan", ["", "--gan"])
def test_a_training_step(measure, gan):
    (ours, theirs), _ = measure(f"--size 32 --runs 1 --what train {gan}")
    # With a discriminator the released script takes two forward passes of the generator, we one.
    assert 1.3 < theirs["tflop"] / ours["tflop"] < 2 if gan else 0.95 < theirs["tflop"] / ours["tflop"] < 1.05


def test_growth_is_drawn(measure, tmp_path):
    rows, cells = measure("--size 32 --runs 1 --what growth --sizes 32,64 --batches 1,2")
    assert [row[0] for row in cells] == ["32 px, batch 1", "64 px, batch 1", "32 px, batch 2"]
    assert len(Image.open(tmp_path / "plot.png").convert("RGB").getcolors(10**6)) > 3
    assert rows[1]["tflop"] > 2 * rows[0]["tflop"]


def test_memory_of_a_training_step(measure):
    (ours, theirs), _ = measure("--size 64 --runs 1 --what memory")
    assert 0 < ours["peak_gb"] < theirs["peak_gb"]


def in_a_fork(command: list[str]) -> dict:
    """In place of `process_figures`: the same work without the seconds of the imports."""
    def work():
        file, *_ = sys.argv = command[1:]  # the rest are its arguments
        if file == "-c":
            sys.argv = command[2:]
            exec(command[2], {})
        else:
            runpy.run_path(file, run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    return dict(seconds=1.0, peak_gb=2.0)


def test_a_cold_start(measure, monkeypatch):
    monkeypatch.setattr(bench, "process_figures", in_a_fork)
    _, cells = measure("--size 32 --runs 1 --what load")
    assert [row[:5] for row in cells] == [["cold start to the first picture", "ours", "1", "", ""],
                                          ["cold start to the first picture", "diffusers", "1",
                                           "1.00 (1.00 to 1.00)", ""]]


def test_lora_as_a_weight_is_the_same_step(measure):
    for layer, x in ((nn.Linear(6, 5), torch.randn(3, 6)), (nn.Conv2d(6, 5, 3, padding=1), torch.randn(2, 6, 7, 8))):
        network = nn.Sequential(layer)
        lora.add_lora(network, ["0"], 2, alpha=6)
        nn.init.normal_(network[0].lora_B.weight)
        plain = F.linear if isinstance(layer, nn.Linear) else network[0]._conv_forward
        torch.testing.assert_close(plain(x, bench.formed(network[0]), layer.bias), network(x))
    (branch, weight), _ = measure("--size 32 --runs 1 --what lora")
    assert weight["side"] == "as a weight" and weight["tflop"] != branch["tflop"]  # its classes were replaced


def test_what_has_no_such_peer_is_refused(measure, capsys):
    with pytest.raises(SystemExit):
        measure("--what text --against official-style")
    assert "text is measured against diffusers" in capsys.readouterr().err


def test_a_worker_that_ends_is_named(measure):
    with pytest.raises(ChildProcessError, match=r"worker of diffusers ended at \(36, 1\)"):
        measure("--what text --size 36 --runs 1")
