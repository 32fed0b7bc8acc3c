"""Trains an unpaired translator in float32 and in bf16, and prints how good both become.

    python tests/campaign_precision.py --output out/precision     # hours: half an hour a run

This is no test of pytest. Each run is the default run of train_cyclegan_turbo.py, day to night on
the embedded base, with a validation every 50 steps. A run that was stopped goes on.

Without instructions for bf16, PyTorch multiplies in it 60 times as slowly as in float32. On such a
processor this script rounds what goes into a convolution, a linear layer or an attention to bf16,
computes in float32 and rounds the result, and so in the backward pass. That is what the
instructions do, but for the order of sums.
"""

import argparse
import json
import runpy
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sampling.precision import computes_in_bf16  # noqa: E402
from tiny import plates  # noqa: E402

TRAINER = str(ROOT / "train_cyclegan_turbo.py")
PRECISIONS = ("no", "bf16")
SIGNALS = ("val_psnr_a2b", "val_psnr_b2a", "val_change_a2b", "val_change_b2a")


# ------------------------------------------------------------ bf16 without instructions for it

def emulate_bf16() -> None:
    """Replaces the functions of torch that autocast would run in bf16."""
    for name in ("conv2d", "linear", "scaled_dot_product_attention"):
        setattr(F, name, partial(in_bf16, getattr(F, name)))


def in_bf16(compute: Callable[..., Tensor], x: Tensor, *args, **settings) -> Tensor:
    """compute(x, ...) as under autocast: bf16 values go in and come out, sums are in float32."""
    if x.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
        return compute(x, *args, **settings)
    with torch.autocast("cpu", enabled=False):
        inputs = [rounded(value) for value in (x, *args)]
        return compute(*inputs, **settings).to(torch.bfloat16)


def rounded(value: object) -> object:
    """The nearest bf16 values, as float32. Gradients are rounded on the way back."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.bfloat16).float()
    return value


# ------------------------------------------------------------------------------------- runs

def train(folder: Path, precision: str, seed: int) -> None:
    """Runs the trainer in a process of its own. A run that is there goes on, or is at its end."""
    flags = ["--resume", str(folder)]
    if not (folder / "state.pt").is_file():
        flags = ["--mixed_precision", precision, "--seed", str(seed)]
        flags += ["--validation_steps", "50", "--output_dir", str(folder)]
    subprocess.run([sys.executable, __file__, "--train", *flags], check=True)


def run_trainer(flags: list[str]) -> None:
    if not computes_in_bf16(torch.device("cpu")):
        emulate_bf16()
    sys.argv = [TRAINER, *flags]
    runpy.run_path(TRAINER, run_name="__main__")


def validations(folder: Path) -> dict[int, dict[str, float]]:
    """{step: SIGNALS} of a run's log."""
    found = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        values = json.loads(line)
        if SIGNALS[0] in values:
            found[values["step"]] = {name: values[name] for name in SIGNALS}
    return found


def over_seeds(values: list[float]) -> str:
    """Mean, and range."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    if "--train" in sys.argv:
        run_trainer(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each precision")
    args = parser.parse_args()

    for precision in PRECISIONS:
        folders = [args.output / f"{precision}-{seed}" for seed in range(args.seeds)]
        for seed, folder in enumerate(folders):
            train(folder, precision, seed)

        print(f"\n--mixed_precision {precision}, seeds 0 to {args.seeds - 1}: mean (range)")
        of_runs = [validations(folder) for folder in folders]
        for step in of_runs[0]:
            columns = []
            for name in SIGNALS:
                columns.append(f"{name} {over_seeds([run[step][name] for run in of_runs])}")
            print(f"step {step:3}: ", ", ".join(columns))
        # The last weights, on 200 held-out drawings.
        measured = [plates.measure_unpaired(str(folder))[0] for folder in folders]
        for name in measured[0]:
            print(f"{name}: {over_seeds([figures[name] for figures in measured])}", flush=True)


if __name__ == "__main__":
    main()
