"""Commands, data and small networks that the tests of the three trainers share."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import training
from files import metrics, tokenizers
from models import clip, dino, lpips

torch.set_num_threads(1)  # tiny networks gain nothing from a second thread
ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------- running trainers

def with_base(argv) -> list[str]:
    """The flags as strings, with --base tiny (random weights) where they name no base."""
    flags = [str(word) for word in argv]
    if "--base" not in flags and "--resume" not in flags:
        flags = ["--base", "tiny", *flags]
    return flags


def train(monkeypatch, trainer: ModuleType, *argv) -> None:
    """Runs a trainer in this process, then puts the signal handlers back."""
    monkeypatch.setattr(sys, "argv", [f"{trainer.__name__}.py", *with_base(argv)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        training.run_script(trainer.main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(trainer: ModuleType, *argv, processes: int = 1) -> list[str]:
    """The command line that runs a trainer, with torchrun if there are several processes."""
    launcher = []
    if processes > 1:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    script = str(ROOT / f"{trainer.__name__}.py")
    return [sys.executable, *launcher, script, *with_base(argv)]


def run_command(trainer: ModuleType, *argv, processes: int = 1) -> None:
    """Runs a trainer in processes of its own. An error shows what it printed."""
    done = subprocess.run(
        command(trainer, *argv, processes=processes),
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def kill_at(step: int, folder: Path, trainer: ModuleType, *argv) -> None:
    """Starts a run and kills it, as a power cut would, when its log reaches `step`."""
    process = subprocess.Popen(
        command(trainer, *argv),
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = folder / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < step:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()


def train_in_three_ways(
    monkeypatch, trainer: ModuleType, folder: Path, batch: int, *argv
) -> dict[str, Path]:
    """Trains with one global batch, in one piece, by two processes, and accumulated.

    Returns the folders of the runs "one", "two" and "slices".
    """
    folders = {name: folder / name for name in ("one", "two", "slices")}
    one = ["--train_batch_size", batch]
    half = ["--train_batch_size", batch // 2]
    slices = [*half, "--gradient_accumulation_steps", 2]
    train(monkeypatch, trainer, *argv, *one, "--output_dir", folders["one"])
    train(monkeypatch, trainer, *argv, *slices, "--output_dir", folders["slices"])
    run_command(trainer, *argv, *half, "--output_dir", folders["two"], processes=2)
    return folders


def train_with_failing_validation(
    monkeypatch, trainer: ModuleType, folder: Path, *argv
) -> tuple[Path, Path]:
    """Trains for three steps, undisturbed, and again with a validation that fails after the
    second, resumed. Returns the folders of both runs."""
    whole, cut = folder / "whole", folder / "cut"
    flags = [*argv, "--max_train_steps", 3, "--validation_steps", 2]
    train(monkeypatch, trainer, *flags, "--output_dir", whole)

    def fail(*_):
        raise ValueError("a test picture cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "validate", fail)
        with pytest.raises(SystemExit) as caught:
            train(patch, trainer, *flags, "--output_dir", cut)
    assert caught.value.code == 2 and read_state(cut)["step"] == 2
    train(monkeypatch, trainer, "--resume", cut)
    return whole, cut


def rename_settings(folder: Path, **old_names: str) -> None:
    """Rewrites a run's config.json with the older names of settings, given by new name."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for new, old in old_names.items():
        settings[old] = settings.pop(new)
    path.write_text(json.dumps(settings))


# -------------------------------------------------------------------------------- comparing

def read_log(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def read_settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def read_state(folder: Path) -> dict:
    return torch.load(folder / "state.pt", weights_only=True)


def assert_same_bits(a: Path, b: Path) -> None:
    """Two runs wrote the same tensors."""
    one = load_file(a / "model.safetensors")
    other = load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(a: Path, b: Path) -> float:
    """Over all tensors of two runs: largest difference, relative to the largest value."""
    one = load_file(a / "model.safetensors")
    other = load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    found = []
    for name in one:
        scale = one[name].abs().max().clamp(min=1e-12)
        found.append((one[name] - other[name]).abs().max() / scale)
    return torch.stack(found).max().item()


def error_lines(text: str) -> list[str]:
    """The lines of stderr that report an error."""
    return [line for line in text.splitlines() if "error: " in line or "Traceback" in line]


def assert_nothing_half_written(folder: Path) -> None:
    """There is nothing, or the whole save of the steps before a broken picture."""
    assert not list(folder.glob("**/*.tmp"))
    for weights in folder.glob("**/model.safetensors"):
        load_file(weights)
        state = torch.load(weights.with_name("state.pt"), weights_only=True)
        assert state["step"] >= 1


# --------------------------------------------------------------------------------- fixtures

@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A paired data set of noise: six pairs for training, two for the test."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for split, count in [("train", 6), ("test", 2)]:
        for side in "AB":
            (folder / f"{split}_{side}").mkdir()
            for i in range(count):
                picture = Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8))
                picture.save(folder / f"{split}_{side}" / f"{i}.png")
        captions = {f"{i}.png": "noise" for i in range(count)}
        (folder / f"{split}_prompts.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture
def metric_networks(monkeypatch) -> dict[str, nn.Module]:
    """Small random networks in place of those that would be downloaded."""
    torch.manual_seed(0)
    tokenizer = tokenizers.load_tokenizer("tiny")
    vision = clip.VisionConfig(24, 40, 3, 3, image_size=32, patch_size=8, projection_dim=20)
    words = len(tokenizer.pieces.get_vocab())
    text = clip.TextConfig(words, 24, 40, 2, 3, eos_token_id=tokenizer.end)
    networks = {
        "clip": clip.CLIP(vision, text),
        "lpips": lpips.LPIPS(),
        "dino": dino.DINO(dino.DINOConfig(12, 2, 2, side=4)),
        "inception": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    }
    for network in networks.values():
        network.requires_grad_(False).eval()
    for layer in (networks["lpips"].lin0, networks["lpips"].lin4):
        layer.model[1].weight.abs_()

    def load(name: str, device: str) -> metrics.MetricNetwork:
        return metrics.MetricNetwork(networks[name], "0", tokenizer)

    monkeypatch.setattr(metrics, "load_metric_network", load)
    return networks
