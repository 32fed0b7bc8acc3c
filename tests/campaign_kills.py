"""Kills a trainer at random moments and resumes it, many times. At the end its weights must be,
to the bit, those of a run that was left alone.

    python tests/campaign_kills.py --kills 5

This is no test of pytest: it takes minutes. It prints where each kill fell, and whether the
results agree.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FLAGS = ["--device", "cpu", "--train_batch_size", "2", "--checkpointing_steps", "1"]
FLAGS += ["--validation_num_images", "2", "--validation_steps", "5", "--viz_freq", "7"]


def start(trainer: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / trainer), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(process: subprocess.Popen, what: str) -> None:
    status = process.wait()
    if status:
        sys.exit(f"{what} failed with status {status}")


def run_alone(trainer: str, steps: int, folder: Path) -> tuple[float, float]:
    """Trains without a kill. Returns the seconds until the first save, and from there on."""
    began = time.monotonic()
    process = start(trainer, *FLAGS, "--max_train_steps", str(steps), "--output_dir", str(folder))
    while not (folder / "state.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    saved = time.monotonic()
    finish(process, "the run that was left alone")
    return saved - began, time.monotonic() - saved


def run_killed(
    trainer: str, steps: int, folder: Path, kills: int, moments: tuple[float, float]
) -> tuple[int, int]:
    """Trains, killed after a random time between two `moments` in seconds, until the run ends.

    Returns the numbers of kills and of starts.
    """
    killed, starts = 0, 0
    while killed < kills:
        if (folder / "state.pt").exists():
            flags = ["--resume", str(folder)]
        else:  # killed before its first save: there is nothing to lose
            shutil.rmtree(folder, ignore_errors=True)
            flags = [*FLAGS, "--max_train_steps", str(steps), "--output_dir", str(folder)]
        process = start(trainer, *flags)
        starts += 1
        try:
            process.wait(random.uniform(*moments))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            report_kill(killed, folder)
            continue
        finish(process, "a resumed run")
        break
    # To the end, if the last kill was before it.
    finish(start(trainer, "--resume", str(folder)), "the last run")
    return killed, starts


def report_kill(number: int, folder: Path) -> None:
    step = None
    if (folder / "state.pt").exists():
        step = torch.load(folder / "state.pt", weights_only=True)["step"]
    leftovers = sorted(path.name for path in folder.glob(".*"))
    print(f"kill {number}: saved step {step}, left behind: {leftovers}", flush=True)


def same_bits(a: Path, b: Path) -> bool:
    one = load_file(a / "model.safetensors")
    other = load_file(b / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trainer", default="train_pix2pix_turbo.py")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)

    folder = Path(tempfile.mkdtemp())
    whole, cut = folder / "whole", folder / "cut"
    first, rest = run_alone(args.trainer, args.steps, whole)
    moments = (0.3 * first, 1.2 * first + rest / args.kills)
    kills, starts = run_killed(args.trainer, args.steps, cut, args.kills, moments)

    same = same_bits(whole, cut)
    lines = (cut / "log.jsonl").read_text().splitlines()
    logged = [json.loads(line)["step"] for line in lines]
    complete = logged == list(range(1, args.steps + 1))
    print(
        f"{kills} kills in {starts} starts, {args.steps} steps:"
        f" same bits {same}, log complete {complete}"
    )
    sys.exit(0 if same and complete else 1)


if __name__ == "__main__":
    main()
