"""Trains healthy and sick tiny runs and prints which warnings came, and at which step.

    python tests/campaign_warnings.py --output out/warnings                # hours on two cores
    python tests/campaign_warnings.py --output out/warnings --small        # 24 px: about an hour
    python tests/campaign_warnings.py --output out/warnings --only unpaired "no adversarial loss"

This is no test of pytest. A healthy run must warn of nothing. A run that is made sick by a flag or
by its data must warn of one of the kinds that are named for it. The runs' logs are kept in
--output, and a run that is there is not trained again: after a change of a bound in
training/watch.py the same command prints the new table at once.

Exit status 1 if a healthy run warned or a sick one did not.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tiny import scenes  # noqa: E402
from training.watch import CHECKS, History, next_warning  # noqa: E402

PAIRED, UNPAIRED, YOSO = "train_pix2pix_turbo", "train_cyclegan_turbo", "train_yoso"
# Small enough for 240 steps in minutes, with previews often enough.
SMALL = dict(resolution=24, max_train_steps=240, viz_freq=30, validation_steps=30)
SMALL_BATCH = {PAIRED: 3, UNPAIRED: 1, YOSO: 4}
DIVERGED = ("gradient", "level", "contrast", "collapse", "drift", "validation")
BLIND = "the discriminator is blind"
WON = "the discriminator has won"


class Run(NamedTuple):
    """A trainer, its flags, and the kinds of warning of which one must come; none: no warning."""

    trainer: str
    flags: dict = {}
    kinds: tuple[str, ...] = ()


HEALTHY = {
    "paired": Run(PAIRED),
    "paired, random base": Run(PAIRED, dict(base="tiny")),
    "paired, stochastic": Run(PAIRED, dict(stochastic="on")),
    "unpaired": Run(UNPAIRED, dict(dataset_folder="drawn:day2night")),
    "unpaired, rain": Run(UNPAIRED, dict(dataset_folder="drawn:clear2rain")),
    "yoso": Run(YOSO),
}
# From random weights nothing is learned in 240 small steps, and the warnings that come are right.
NOT_SMALL = ("paired, random base",)
# DATA stands for the folder of a data set that this script makes; see `make_data`.
SICK = {
    # At 24 px the VAE's own error is a sixth of what there is to change: not yet a copy.
    "no adversarial loss": Run(UNPAIRED, dict(lambda_gan=0, resolution=48), ("copying",)),
    "adversarial loss too small": Run(UNPAIRED, dict(lambda_gan=0.001), (WON,)),
    "rate too high, paired": Run(PAIRED, dict(learning_rate=0.1), DIVERGED),
    "rate too high, unpaired": Run(UNPAIRED, dict(learning_rate=0.05), DIVERGED),
    "rate too high, yoso": Run(YOSO, dict(learning_rate=0.05), DIVERGED),
    "black targets": Run(PAIRED, dict(dataset_folder="DATA/black"), ("collapse",)),
    "dark targets": Run(PAIRED, dict(dataset_folder="DATA/dark"), ("level",)),
    "flat targets": Run(PAIRED, dict(dataset_folder="DATA/flat"), ("contrast",)),
    "red targets": Run(PAIRED, dict(dataset_folder="DATA/red"), ("drift",)),
    "one pair": Run(PAIRED, dict(dataset_folder="DATA/one"), ("short data",)),
    "few pairs": Run(PAIRED, dict(dataset_folder="DATA/few", train="all"), ("validation",)),
    "discriminator at rest": Run(YOSO, dict(disc_lr_ratio=0, disc_random="on"), (BLIND,)),
}


# ------------------------------------------------------------------------------------- data

def make_data(folder: Path, size: int) -> None:
    """Sets of drawn pairs whose training targets are not those of the test."""
    kinds = {
        "black": (64, lambda target: torch.full_like(target, -1.0)),
        "dark": (64, lambda target: 0.4 * target - 0.6),
        "flat": (64, lambda target: 0.1 * target),
        "red": (64, redden),
        "one": (1, lambda target: target),
        "few": (4, lambda target: target),
    }
    for kind, (count, change) in kinds.items():
        write_split(folder / kind, "train", count, size, change)
        write_split(folder / kind, "test", 32, size, lambda target: target)


def redden(target: torch.Tensor) -> torch.Tensor:
    """Moves the hue and keeps the mean level."""
    return (target + torch.tensor([0.8, -0.4, -0.4]).view(3, 1, 1)).clamp(-1, 1)


def write_split(folder: Path, split: str, count: int, size: int, change) -> None:
    pairs = scenes.Paired(split, size, 0)
    captions = {}
    for side in "AB":
        (folder / f"{split}_{side}").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        item = pairs[i]
        save(folder / f"{split}_A" / f"{i}.png", item["input"])
        save(folder / f"{split}_B" / f"{i}.png", (change(item["target"]) + 1) / 2)
        captions[f"{i}.png"] = item["caption"]
    (folder / f"{split}_prompts.json").write_text(json.dumps(captions))


def save(path: Path, picture: torch.Tensor) -> None:
    """picture [3, H, W] in [0, 1]."""
    levels = (picture * 255).round().to(torch.uint8)
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(path)


# ------------------------------------------------------------------------------------- runs

def train(run: Run, folder: Path, data: Path, seed: int, small: bool) -> None:
    """Trains, or goes on with a run that was stopped. A run that ends with an error may do so: NaN
    ends it in one line."""
    if (folder / "ended").is_file():
        return
    settings = dict(validation_num_images=8, seed=seed)
    if small:
        settings |= SMALL | dict(train_batch_size=SMALL_BATCH[run.trainer])
        if run.trainer == YOSO:
            settings["prior_pictures"] = 64
    settings |= run.flags
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", str(value).replace("DATA", str(data))]
    flags += ["--output_dir", str(folder)]
    if (folder / "state.pt").is_file():
        flags = ["--resume", str(folder)]
    words = [sys.executable, str(ROOT / f"{run.trainer}.py"), *flags]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        message = done.stderr.strip().splitlines()[-1]
        print(f"{folder.name}: {message}", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ended").write_text(message)


def warnings_of(folder: Path) -> tuple[int, dict[str, int]]:
    """The steps in a run's log, and the step at which each kind of warning comes by the present
    bounds."""
    log = folder / "log.jsonl"
    settings = json.loads((folder / "config.json").read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    items = 1000
    for line in lines:
        if line.get("warning", "").startswith("short data"):
            items = 1
    history = History(items, settings["max_train_steps"])
    found = {}
    for line in lines:
        history.add(line["step"], line)
        text = next_warning(history)
        if text:
            history.note(line["step"], text)
            found[text.partition(":")[0]] = line["step"]
    return len(lines), found


def verdict(run: Run, found: Iterable[str]) -> str:
    """ "" if all is as it should be."""
    if run.kinds and not set(run.kinds) & set(found):
        return "MISSED"
    if not run.kinds and found:
        return "FALSE ALARM"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--small", action="store_true", help="24 px and 240 steps")
    parser.add_argument("--seeds", type=int, default=3, help="of healthy runs; sick ones have one")
    names = [*HEALTHY, *SICK]
    help_only = "names of runs [all]"
    parser.add_argument("--only", nargs="*", choices=names, default=names, help=help_only)
    args = parser.parse_args()
    output = args.output.resolve() / ("small" if args.small else "full")
    data = output / "data"
    if not data.is_dir():
        make_data(data, size=24 if args.small else 64)

    wrong = 0
    seen = set()
    print(f"{'run':32} {'seed':>4} {'steps':>5}  warnings and their steps", flush=True)
    for name, run in (HEALTHY | SICK).items():
        if name not in args.only or (args.small and name in NOT_SMALL):
            continue
        for seed in range(args.seeds if name in HEALTHY else 1):
            folder = output / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            train(run, folder, data, seed, args.small)
            if not (folder / "log.jsonl").is_file():
                print(f"{name:32} {seed:4}  no log: FAILED", flush=True)
                wrong += 1
                continue
            steps, found = warnings_of(folder)
            seen |= found.keys()
            said = verdict(run, found)
            if name in HEALTHY and (folder / "ended").is_file():
                said = "FAILED"
            wrong += bool(said)
            listed = ", ".join(f"{kind} {step}" for kind, step in found.items()) or "none"
            print(f"{name:32} {seed:4} {steps:5}  {listed}  {said}", flush=True)
    print(f"wrong: {wrong}; kinds never seen: {', '.join(CHECKS.keys() - seen) or 'none'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
