"""Compares what the discriminator may take for real, over thousands of steps.

    python -m tiny.compare                                    # digits, three seeds: hours
    python -m tiny.compare --world scenes --seeds 0           # drawn scenes: hours
    python -m tiny.compare --sides coop data --seeds 42 --steps 1400 --output out
    python -m tiny.compare --page                             # only redraw the stored results

Each run is one of train_yoso.py with another real side. It stops at each of the world's marks, is
measured, and goes on. A run that was stopped continues, and what was measured is not measured
again. Results go to WORLD.json and curves to WORLD.png, in assets/plates or --output. A table of
means, with the range over training seeds, is printed.

Digits are learned from scratch, and measured as in tiny/digits.py. Drawn scenes are learned by
tiny-sd, after the stages that the runs of IDEAS.md share, and measured as `measure_scenes` says.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import evaluate
import sample
import training
from files import checkpoints
from tiny import digits, measure, plates, recipe, scenes
from tiny.plates import PLATES, discriminator_accuracy, read_results

ROOT = pathlib.Path(__file__).parent.parent
RUNS = ROOT / "runs" / "compare"
SIDES = {
    "coop": dict(adversarial="coop"),
    "data": dict(adversarial="data"),
    "noisy": dict(adversarial="noisy"),
    "none": dict(lambda_gan=0),
}


# -------------------- Digits

RESOLUTION = 16


def digits_flags(seed: int) -> dict[str, object]:
    return dict(base="pixels", resolution=RESOLUTION)


def measure_digits(folder: pathlib.Path) -> dict[str, float]:
    """Figures of 1,000 one-step samples."""
    samples, asked = digits.draw_samples(str(folder), seed=0, count=digits.PER_CLASS)
    figures = digits.measure(samples, asked)
    return figures | dict(wrong=100 * (1 - figures["right"]))


def digits_limits() -> dict[str, float]:
    limits = digits.limits(RESOLUTION)
    return limits | dict(wrong=100 * (1 - limits["right"]))


# -------------------- Drawn scenes

SCENES = 500  # held-out captions of a measurement
# A constant rate, so that a run may be measured and continued at any step.
CONSTANT = dict(lr_scheduler="constant_with_warmup", ema_decay=0.995)


def scenes_flags(seed: int) -> dict[str, object]:
    """Those of the YOSO runs of IDEAS.md, after the stages that these share."""
    base = plates.folder_of("data-alone", seed) / "base"
    if not base.is_dir():
        plates.execute("data-alone", seed)
    cache = RUNS / "scenes" / "cache"
    options = dict(base="tiny-sd", size=measure.SIZE, output=cache)
    recipe.run("-m", "dataset", "cache", "drawn:scenes", *recipe.command_line(options))
    return plates.SHARED["yoso"] | CONSTANT | dict(base=base, dataset_folder=cache)


@functools.cache
def drawings() -> tuple[list[scenes.Scene], Tensor, Tensor]:
    """Held-out scenes, and of each two drawings [SCENES, 3, 64, 64] in [-1, 1].

    They show the same objects in other places, below other clouds.
    """
    described, first = measure.held_out(SCENES)
    second = []
    for scene in described:
        other = dataclasses.replace(scene, seed=scene.seed + 4)  # of the test split, as it is
        second.append(scenes.to_tensor(scenes.draw(other, measure.SIZE)) * 2 - 1)
    return described, first, torch.stack(second)


@torch.inference_mode()
def measure_scenes(folder: pathlib.Path) -> dict[str, float]:
    """Figures of held-out captions, drawn in one step; see `scene_figures`."""
    base, _ = checkpoints.load_yoso(str(folder), dtype=torch.float32)
    size = (measure.SIZE, measure.SIZE)
    drawn = []
    for i, scene in enumerate(drawings()[0]):
        caption = scenes.caption(scene)
        drawn.append(sample.text_to_image(base, caption, [i, SCENES + i], size))
    first, second = torch.stack(drawn, dim=1)
    return scene_figures(first, second)


def scene_figures(pictures: Tensor, others: Tensor) -> dict[str, float]:
    """Figures of pictures [SCENES, 3, 64, 64] of the held-out scenes, and `others` of the same.

    wrong       attributes that are not as the caption says, in percent
    frechet     Frechet distance to the drawings in the attribute classifier's features; it is no
                FID, and only comparable with others of this file
    coverage    of the drawings' features, see digits.density_and_coverage
    variety     mean difference between two pictures of one caption, over that of two drawings
    sharp       energy of gradients over the drawings', see measure.gradient_energy
    """
    described, truth, others_drawn = drawings()
    classifier = measure.load_classifier()
    right = measure.attribute_accuracy(classifier, pictures, described)["all"]
    real = torch.cat([classifier.features(x) for x in truth.split(50)])
    made = torch.cat([classifier.features(x) for x in pictures.split(50)])
    _, coverage = digits.density_and_coverage(real, made)
    distance = evaluate.frechet_distance(*evaluate.statistics(made), *evaluate.statistics(real))
    true_difference = measure.mean_difference([truth, others_drawn])
    return dict(
        wrong=100 * (1 - right),
        frechet=distance,
        coverage=coverage,
        variety=measure.mean_difference([pictures, others]) / true_difference,
        sharp=measure.gradient_energy(pictures, truth),
    )


def scenes_limits() -> dict[str, float]:
    """What other drawings of the same scenes get: as good as samples can be."""
    _, first, second = drawings()
    return scene_figures(second, first)


# -------------------- Worlds

@dataclass(frozen=True)
class World:
    """What is drawn, by runs with which flags, at which steps it is measured, and how."""

    flags: Callable[[int], dict[str, object]]            # of the training seed
    measure: Callable[[pathlib.Path], dict[str, float]]  # of the run's folder
    limits: Callable[[], dict[str, float]]               # what true pictures get
    begin: int                                           # the discriminator's first step
    marks: tuple[int, ...]
    figures: dict[str, str]                              # titles of the diagrams
    logarithmic: tuple[str, ...] = ()


WORLDS = {
    "digits": World(
        flags=digits_flags,
        measure=measure_digits,
        limits=digits_limits,
        begin=600,  # steps of denoising
        marks=(800, 1000, 1200, 1400, 1700, 2000, 2300, 2600, 3000),
        figures={
            "wrong": "digits wrong, %",
            "frechet": "Frechet distance",
            "density": "density",
            "coverage": "coverage",
            "nearest": "nearest training digit",
            "disc_right": "discriminator accuracy",
        },
        logarithmic=("wrong", "frechet"),
    ),
    "scenes": World(
        flags=scenes_flags,
        measure=measure_scenes,
        limits=scenes_limits,
        begin=0,
        marks=(200, 500, 1000, 1500, 2000, 2500, 3000),
        figures={
            "wrong": "attributes wrong, %",
            "frechet": "Frechet distance",
            "coverage": "coverage",
            "variety": "variety",
            "sharp": "sharpness",
            "disc_right": "discriminator accuracy",
        },
    ),
}


# -------------------- Runs

def compare(name: str, side: str, seed: int, steps: int, store: pathlib.Path) -> None:
    """Trains to each mark up to `steps` and adds the figures to the file `store`."""
    world = WORLDS[name]
    folder = RUNS / name / f"{side}-{seed}"
    before = 0
    for mark in world.marks:
        key = f"{side}, seed {seed}, step {mark}"
        if mark <= steps and key not in read_results(store):
            if (folder / "state.pt").is_file():
                continue_to(mark, folder)
            else:
                flags = world.flags(seed) | SIDES[side]
                flags |= dict(seed=seed, output_dir=folder, max_train_steps=mark)
                recipe.run("train_yoso.py", *recipe.command_line(flags))
            figures = world.measure(folder)
            figures |= discriminator_accuracy(folder / "log.jsonl", before, mark)
            add_result(store, key, figures)
            print(key, json.dumps(figures), flush=True)
        before = mark


def continue_to(mark: int, folder: pathlib.Path) -> None:
    """Trains a run up to this step.

    ValueError if it is past that step: then its weights are those of a later one.
    """
    *_, last = (folder / "log.jsonl").read_text().splitlines()
    step = json.loads(last)["step"]
    if step > mark:
        raise ValueError(
            f"{folder} is at step {step}, and --output has no figures of step {mark}; remove"
            " the folder, or give the --output that it was measured for"
        )
    recipe.run("train_yoso.py", "--resume", folder, "--max_train_steps", mark)


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
    """The values of a figure by step, one for each training seed that has it."""
    found = {}
    for key, figures in results.items():
        own_side, _, mark = key.split(", ")
        if own_side == side and figure in figures:
            found.setdefault(int(mark.removeprefix("step ")), []).append(figures[figure])
    return dict(sorted(found.items()))


def draw_page(world: World, results: dict[str, dict[str, float]]) -> Image.Image:
    """A diagram for each figure: the mean over training seeds as a line, each seed as a dot.

    A grey line is what true pictures get.
    """
    limits = world.limits()
    width, height = WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN
    page = Image.new("RGB", (ACROSS * width, len(world.figures) // ACROSS * height), "white")
    pen = ImageDraw.Draw(page)
    for i, (figure, title) in enumerate(world.figures.items()):
        corner = (MARGIN + i % ACROSS * width, MARGIN + i // ACROSS * height)
        lines = {side: curves(results, side, figure) for side in SIDES}
        drawn = {side: line for side, line in lines.items() if line}
        pen.text((corner[0], corner[1] - 16), title, fill="black")
        diagram(pen, corner, drawn, world, limits.get(figure), figure in world.logarithmic)
    return page


def table(
    world: World, results: dict[str, dict[str, float]], marks: tuple[int, ...]
) -> str:
    """A table in Markdown: a line for each side and mark, a column for each figure."""
    lines = ["| | steps | " + " | ".join(world.figures.values()) + " |"]
    lines.append("| --- " * (2 + len(world.figures)) + "|")
    for side in SIDES:
        for mark in marks:
            columns = [curves(results, side, figure).get(mark) for figure in world.figures]
            if any(columns):
                cells = " | ".join(mean_and_range(column) if column else "" for column in columns)
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
    lines: dict[str, dict[int, list[float]]],
    world: World,
    limit: float | None,
    logarithmic: bool,
) -> None:
    """One diagram, from its lowest to its highest value, over the world's steps."""
    left, top = corner
    first, last = world.begin, world.marks[-1]
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
    pen.text((left - 34, top - 4), f"{highest:.3g}", fill="#666666")
    pen.text((left - 34, top + HEIGHT - 8), f"{lowest:.3g}", fill="#666666")
    for step in (1000, 2000, last):
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
    add("--world", choices=WORLDS, default="digits", help="what is drawn [digits]")
    add("--sides", nargs="+", choices=SIDES, default=[*SIDES], help="what D takes for real [all]")
    add("--seeds", type=int, nargs="+", default=[42, 1, 2], help="training seeds [42 1 2]")
    add("--steps", type=int, default=3000, help="the last step that is measured [3000]")
    add("--output", type=pathlib.Path, default=PLATES, help="folder of results and curves")
    add("--page", action="store_true", help="train nothing, only redraw the curves")
    args = training.parse_args(parser)
    world = WORLDS[args.world]
    marks = tuple(mark for mark in world.marks if mark <= args.steps)
    if not marks:
        raise ValueError(
            f"--steps {args.steps}: expected {world.marks[0]}, the first that is measured, or more"
        )

    torch.set_num_threads(1)  # more threads do not help to measure such small pictures
    args.output.mkdir(parents=True, exist_ok=True)
    store = args.output / f"{args.world}.json"
    if not args.page:
        for seed in args.seeds:
            for side in args.sides:
                compare(args.world, side, seed, args.steps, store)
    results = read_results(store)
    if not results:
        raise ValueError(f"found no results in {store}; expected those of a run without --page")
    page = draw_page(world, results)
    path = args.output / f"{args.world}.png"
    training.write_file(path, partial(page.save, format="PNG"))
    shown = tuple(dict.fromkeys((marks[len(marks) // 2], marks[-1])))  # one halfway, and the last
    print(table(world, results, shown))
    print(path)


if __name__ == "__main__":
    training.run_script(main)
