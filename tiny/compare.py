"""Compares what the discriminator may take for real, on digits, over thousands of steps.

    python -m tiny.compare                                    # every side, three seeds: hours
    python -m tiny.compare --sides coop data --seeds 42 --steps 1400 --output out
    python -m tiny.compare --page                             # only redraw the stored results

Each run is `python train_yoso.py --base pixels` with another real side. It stops at each of MARKS,
is measured as in tiny/digits.py (1,000 one-step samples), and goes on. A run that was stopped
continues, and what was measured is not measured again. Results: assets/plates/digits.json; curves:
assets/plates/digits.png. A table of means, with the range over training seeds, is printed.
"""

import argparse
import json
import math
import pathlib
import statistics
from functools import partial

import torch
from PIL import Image, ImageDraw

import training
from tiny import digits, recipe
from tiny.plates import PLATES, discriminator_accuracy, read_results

ROOT = pathlib.Path(__file__).parent.parent
RUNS = ROOT / "runs" / "compare"

RESOLUTION = 16
# The first 600 steps denoise, without a discriminator.
MARKS = (800, 1000, 1200, 1400, 1700, 2000, 2300, 2600, 3000)
SIDES = {
    "coop": dict(adversarial="coop"),
    "data": dict(adversarial="data"),
    "noisy": dict(adversarial="noisy"),
    "none": dict(lambda_gan=0),
}
FIGURES = {
    "wrong": "digits wrong, %",
    "frechet": "Frechet distance",
    "density": "density",
    "coverage": "coverage",
    "nearest": "nearest training digit",
    "disc_right": "discriminator accuracy",
}
LOGARITHMIC = ("wrong", "frechet")


# -------------------- Runs

def compare(side: str, seed: int, steps: int, store: pathlib.Path) -> None:
    """Trains to each mark up to `steps` and adds the figures to the file `store`."""
    folder = RUNS / f"{side}-{seed}"
    flags = dict(base="pixels", resolution=RESOLUTION, seed=seed, **SIDES[side])
    before = 0
    for mark in MARKS:
        key = f"{side}, seed {seed}, step {mark}"
        if mark <= steps and key not in read_results(store):
            train_to(mark, folder, flags)
            samples, asked = digits.draw_samples(str(folder), seed=0, count=digits.PER_CLASS)
            figures = digits.measure(samples, asked)
            figures["wrong"] = 100 * (1 - figures["right"])
            figures["disc_right"] = discriminator_accuracy(folder / "log.jsonl", before, mark)
            add_result(store, key, figures)
            print(key, json.dumps(figures), flush=True)
        before = mark


def train_to(mark: int, folder: pathlib.Path, flags: dict[str, object]) -> None:
    """Trains a run up to this step. It is a new one if the folder has no state.

    ValueError if it is past that step: then its weights are those of a later one.
    """
    if (folder / "state.pt").is_file():
        *_, last = (folder / "log.jsonl").read_text().splitlines()
        step = json.loads(last)["step"]
        if step > mark:
            raise ValueError(
                f"{folder} is at step {step}, and --output has no figures of step {mark}; remove"
                " the folder, or give the --output that it was measured for"
            )
        recipe.run("train_yoso.py", "--resume", folder, "--max_train_steps", mark)
    else:
        flags = dict(output_dir=folder, max_train_steps=mark, **flags)
        recipe.run("train_yoso.py", *recipe.command_line(flags))


def add_result(store: pathlib.Path, key: str, figures: dict[str, float]) -> None:
    """Adds to what the file holds by now, so that two processes may measure different runs."""
    results = read_results(store) | {key: figures}
    text = json.dumps(results, indent=1) + "\n"
    training.write_file(store, lambda temporary: temporary.write_text(text))


# -------------------- Curves and table

WIDTH, HEIGHT = 300, 200  # of one diagram
MARGIN = 40
ACROSS = 3
COLOURS = {"coop": "#c0392b", "data": "#1f5fa8", "noisy": "#888888", "none": "#222222"}


def curves(results: dict[str, dict[str, float]], side: str, figure: str) -> dict[int, list[float]]:
    """The values of a figure by step, one for each training seed."""
    found = {}
    for key, figures in results.items():
        own_side, _, mark = key.split(", ")
        if own_side == side:
            found.setdefault(int(mark.removeprefix("step ")), []).append(figures[figure])
    return dict(sorted(found.items()))


def draw_page(results: dict[str, dict[str, float]]) -> Image.Image:
    """A diagram for each figure: the mean over training seeds as a line, each seed as a dot.

    A grey line is what digits that people wrote get.
    """
    limits = digits.limits(RESOLUTION)
    limits = limits | {"wrong": 100 * (1 - limits["right"])}
    width, height = WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN
    page = Image.new("RGB", (ACROSS * width, len(FIGURES) // ACROSS * height), "white")
    pen = ImageDraw.Draw(page)
    for i, (figure, title) in enumerate(FIGURES.items()):
        corner = (MARGIN + i % ACROSS * width, MARGIN + i // ACROSS * height)
        lines = {side: curves(results, side, figure) for side in SIDES}
        drawn = {side: line for side, line in lines.items() if line}
        diagram(pen, corner, title, drawn, limits.get(figure), figure in LOGARITHMIC)
    return page


def table(results: dict[str, dict[str, float]], marks: tuple[int, ...]) -> str:
    """A table in Markdown: a line for each side and mark, a column for each figure."""
    lines = ["| | steps | " + " | ".join(FIGURES.values()) + " |"]
    lines.append("| --- " * (2 + len(FIGURES)) + "|")
    for side in SIDES:
        for mark in marks:
            columns = {figure: curves(results, side, figure).get(mark) for figure in FIGURES}
            if columns["wrong"]:
                cells = " | ".join(map(mean_and_range, columns.values()))
                lines.append(f"| `{side}` | {mark:,} | {cells} |")
    return "\n".join(lines)


def mean_and_range(values: list[float]) -> str:
    """Three digits, as 0.868 (0.85 to 0.872)."""
    mean = f"{statistics.mean(values):.3g}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.3g} to {max(values):.3g})"


def diagram(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    title: str,
    lines: dict[str, dict[int, list[float]]],
    limit: float | None,
    logarithmic: bool,
) -> None:
    """One diagram, from its lowest to its highest value, from the end of denoising to the end."""
    left, top = corner
    first, last = 600, MARKS[-1]
    values = [value for line in lines.values() for several in line.values() for value in several]
    if limit is not None:
        values.append(limit)
    lowest, highest = min(values), max(values)

    def height_of(value: float) -> float:
        return math.log(max(value, 1e-3)) if logarithmic else value

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + WIDTH * (step - first) / (last - first)
        below = height_of(highest) - height_of(value)
        return x, top + HEIGHT * below / (height_of(highest) - height_of(lowest) or 1)

    pen.rectangle([left, top, left + WIDTH, top + HEIGHT], outline="#bbbbbb")
    pen.text((left, top - 16), title, fill="black")
    pen.text((left - 34, top - 4), f"{highest:.3g}", fill="#666666")
    pen.text((left - 34, top + HEIGHT - 8), f"{lowest:.3g}", fill="#666666")
    for step in (1000, 1700, last):
        pen.text((place(step, lowest)[0] - 12, top + HEIGHT + 4), str(step), fill="#666666")

    if limit is not None:
        pen.line([place(first, limit), place(last, limit)], fill="#bbbbbb", width=2)
    for i, (side, line) in enumerate(lines.items()):
        colour = COLOURS[side]
        pen.text((left + WIDTH - 160 + 40 * i, top - 16), side, fill=colour)
        means = [place(step, statistics.mean(several)) for step, several in line.items()]
        pen.line(means, fill=colour, width=2)
        for step, several in line.items():
            for value in several:
                x, y = place(step, value)
                pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)


# -------------------- Command line

def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sides", nargs="+", choices=SIDES, default=[*SIDES], help="what D takes for real [all]")
    add("--seeds", type=int, nargs="+", default=[42, 1, 2], help="training seeds [42 1 2]")
    add("--steps", type=int, default=MARKS[-1], help=f"the last mark, of {MARKS} [3000]")
    add("--output", type=pathlib.Path, default=PLATES, help="folder of results and curves")
    add("--page", action="store_true", help="train nothing, only redraw the curves")
    args = training.parse_args(parser)
    if args.steps < MARKS[0]:
        raise ValueError(f"--steps {args.steps}: expected {MARKS[0]}, the first mark, or more")

    torch.set_num_threads(1)  # more threads do not help to measure such small pictures
    args.output.mkdir(parents=True, exist_ok=True)
    store = args.output / "digits.json"
    if not args.page:
        for seed in args.seeds:
            for side in args.sides:
                compare(side, seed, args.steps, store)
    results = read_results(store)
    if not results:
        raise ValueError(f"found no results in {store}; expected those of a run without --page")
    page = draw_page(results)
    training.write_file(args.output / "digits.png", partial(page.save, format="PNG"))
    last = max(mark for mark in MARKS if mark <= args.steps)
    print(table(results, tuple(sorted({1700, last}))))
    print(args.output / "digits.png")


if __name__ == "__main__":
    training.run_script(main)
