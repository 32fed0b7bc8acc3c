"""Each benchmark on small networks: both sides do the same work, and the table says what was
measured. No test asserts how long anything took."""

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys

import diffusers  # noqa: F401  workers are forked, and find it imported
import pytest
import torch
import torch._dynamo  # noqa: F401  the counter of FLOPs uses it
import torch.nn.functional as F
from PIL import Image
from torch import nn

import sampling.precision
from benchmarks import bench, inputs, peers, report
from models import lora

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Where the first test leaves the random weights for the others."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture
def measure(scratch, tmp_path, capsys):
    """Runs bench.py on small networks."""
    table = tmp_path / "table.md"
    places = ["--scratch", scratch, "--table", table, "--plot", tmp_path / "plot.png"]

    def measure(flags: str) -> tuple[list[dict], list[list[str]]]:
        """The rows of the JSON on stdout, and the cells of the table."""
        bench.main([*flags.split(), "--tiny", *map(str, places)])
        result = json.loads(capsys.readouterr().out)
        empty, title, _, command, _, head, rule, *lines = table.read_text().splitlines()
        assert (empty, title, head) == ("", f"## {result['title']}", report.HEAD)
        assert result["command"].startswith("python -m benchmarks.bench --")
        for part in (result["command"], f"{result['runs']} runs", "torch 2", "threads"):
            assert part in command
        assert head.count("|") == rule.count("|") == 9 and len(lines) == len(result["rows"])
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        return result["rows"], cells

    return measure


@pytest.mark.parametrize("flags, peer, tasks", [
    ("translate", "official-style", 1),
    ("translate --against diffusers", "diffusers", 1),
    ("text", "diffusers", 1),
    ("taesd", "diffusers", 1),
    ("modules", "diffusers", 4),
])
def test_both_sides_give_the_same_numbers(measure, flags, peer, tasks):
    rows, cells = measure(f"--size 32 --batch 2 --runs 2 --what {flags}")
    assert [row["side"] for row in rows] == ["ours", peer] * tasks
    # The official adapters are beside the layers, and the text encoder is asked each time.
    extra = 1.1 if peer == "official-style" else 0.99
    for ours, theirs in zip(rows[::2], rows[1::2]):
        assert theirs["difference"][0] < 1e-4
        median, low, high = theirs["ratio"]
        assert 0 < low <= median <= high
        assert theirs["tflop"] > extra * ours["tflop"] > 0
    for row in cells:
        assert len(row) == 8
        assert re.fullmatch(r"[\d.e-]+", row[2]) and re.fullmatch(r"\d+%", row[5])


def test_our_side_alone_may_be_in_bf16(measure, monkeypatch):
    # Whatever this processor computes in.
    monkeypatch.setattr(sampling.precision, "computes_in_bf16", lambda device: True)
    (_, theirs), _ = measure("--size 32 --runs 1 --what translate --fast")
    assert 1e-4 < theirs["difference"][1] < 0.05


def test_with_taesd_less_is_computed_than_with_the_vae(measure):
    (ours, with_vae), _ = measure("--size 32 --runs 1 --what taesd --against vae")
    assert "difference" not in with_vae and with_vae["ratio"][0] > 0
    assert ours["tflop"] > 0 and with_vae["tflop"] > 0


@pytest.mark.parametrize("gan", ["", "--gan"])
def test_a_training_step(measure, gan):
    (ours, theirs), _ = measure(f"--size 32 --runs 1 --what train {gan}")
    # With a discriminator the released script takes two forward passes of the generator, we one.
    low, high = (1.3, 2) if gan else (0.95, 1.05)
    assert low < theirs["tflop"] / ours["tflop"] < high


def test_growth_is_drawn(measure, tmp_path):
    rows, cells = measure("--size 32 --runs 1 --what growth --sizes 32,64 --batches 1,2")
    tasks = [row[0] for row in cells]
    assert tasks == ["32 px, batch 1", "64 px, batch 1", "32 px, batch 2"]
    plot = Image.open(tmp_path / "plot.png").convert("RGB")
    assert len(plot.getcolors(10**6)) > 3
    assert rows[1]["tflop"] > 2 * rows[0]["tflop"]


def test_memory_of_a_training_step(measure):
    (ours, theirs), _ = measure("--size 64 --runs 1 --what memory")
    assert 0 < ours["peak_gb"] < theirs["peak_gb"]
    # The released script takes eight translations a step, this code six.
    assert 1.2 < theirs["tflop"] / ours["tflop"] < 1.4


def time_fork(command: list[str]) -> dict:
    """Replaces `time_process`: the same work, without the seconds that imports take."""
    def work():
        sys.argv = command[1:]
        if sys.argv[0] == "-c":
            sys.argv = command[2:]
            exec(command[2], {})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
    return dict(seconds=1.0, peak_gb=2.0)


def test_a_cold_start(measure, monkeypatch):
    monkeypatch.setattr(bench, "time_process", time_fork)
    _, cells = measure("--size 32 --runs 1 --what load")
    task = "cold start to the first picture"
    assert [row[:5] for row in cells] == [
        [task, "ours", "1", "", ""],
        [task, "diffusers", "1", "1.00 (1.00 to 1.00)", ""],
    ]


@pytest.mark.parametrize("layer, plain, x", [
    (nn.Linear(6, 5), F.linear, torch.randn(3, 6)),
    (nn.Conv2d(6, 5, 3, padding=1), None, torch.randn(2, 6, 7, 8)),
])
def test_a_layer_of_the_weight_with_lora_is_the_layer_with_a_branch(layer, plain, x):
    network = nn.Sequential(layer)
    lora.add_lora(network, ["0"], 2, alpha=6)
    nn.init.normal_(network[0].lora_B.weight)
    if plain is None:
        plain = network[0]._conv_forward
    weight = peers.weight_with_lora(network[0])
    torch.testing.assert_close(plain(x, weight, layer.bias), network(x))


def test_lora_as_a_weight_is_the_same_step(measure):
    (branch, weight), _ = measure("--size 32 --runs 1 --what lora")
    assert weight["side"] == "as a weight"
    assert weight["tflop"] != branch["tflop"]  # its forward methods were replaced


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--what text --against official-style", "text is measured against diffusers"),
        ("--what train --compile", "train compiles nothing"),
        ("--what text --gan", "--gan is of --what train, not of text"),
        ("--what text --runs -1", "expected --runs of 0 or more"),
        ("--what growth --batches 1,0", "--batches of 1 or more"),
        ("--what train --batches 2,4", "--batches has no meaning for --what train; give --batch"),
        ("--what translate --sizes 32,64", "--sizes is for growth, and for memory on CUDA"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, capsys, flags, says):
    with pytest.raises(SystemExit):
        measure(flags)
    assert says in capsys.readouterr().err


def test_a_worker_that_ends_is_named(measure):
    with pytest.raises(ChildProcessError, match=r"worker of ours ended at \(36, 1\)"):
        measure("--what text --size 36 --runs 1")


ASK = """
import torch
from benchmarks import ours
from benchmarks.workers import Job, Worker

if __name__ == "__main__":
    job = Job("modules", None, 32, 1, torch.float32, "cpu", base="no-such-base")
    try:
        Worker("ours", ours.modules, job).ask("U-Net")
    except ChildProcessError as error:
        print(error)
"""


def test_workers_outside_the_tests_find_their_imports(tmp_path):
    """They are fresh processes, which import their side by its name."""
    (tmp_path / "ask.py").write_text(ASK)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ask.py")],
        env=os.environ | {"PYTHONPATH": str(inputs.ROOT)},
        capture_output=True,
        text=True,
    )
    assert "no-such-base" in done.stderr and "ModuleNotFoundError" not in done.stderr
    assert "the worker of ours ended at U-Net" in done.stdout
