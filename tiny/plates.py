"""Turns off one idea of the papers at a time, and measures and shows what changes.

    python -m tiny.plates --list               # the names of the ideas
    python -m tiny.plates skips cycle          # two of them, three random seeds each
    python -m tiny.plates --seeds 1            # all, one seed: about two hours of one core
    python -m tiny.plates --page               # only rewrite plates and tables from stored results

Each idea is a comparison of runs of the ordinary trainers: equal steps, equal seeds, and one
setting changed. They train in bf16 where the machine computes in it, and otherwise in float32.
Runs are kept in runs/plates and shared between ideas. A run that was stopped continues, and one
that was measured is not repeated.

Figures are of 200 held-out drawings and go to assets/plates/results.json. The pictures of an
idea's first seed become a plate beside it. IDEAS.md explains the ideas; this script only rewrites
its tables, between the markers `<!-- figures: NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import sample
import training
from dataset.pictures import to_picture, to_tensor
from files import bases, checkpoints
from files.tensors import read_tensors
from models import diffusion
from tiny import gaussians, measure, recipe, scenes

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "IDEAS.md"
PLATES = ROOT / "assets" / "plates"
FOLDER = ROOT / "runs" / "plates"
SHOWN = [0, 3, 5, 8, 11, 14, 17]  # held-out drawings on a plate
R_VALUES = (1.0, 0.7, 0.4, 0.0)


# -------------------- Runs

@dataclass(frozen=True)
class Run:
    """A run of one of SCRIPTS, with `flags` besides those of SHARED.

    It starts from the base that the run `after` wrote.
    """
    kind: str
    flags: dict[str, object] = field(default_factory=dict)
    after: str | None = None


SCRIPTS = {
    "unpaired": "train_cyclegan_turbo.py",
    "paired": "train_pix2pix_turbo.py",
    "yoso": "train_yoso.py",
    "gaussians": "tiny.gaussians",
}
# Flags of all runs of a kind.
SHARED = {
    "unpaired": dict(
        base="tiny-turbo",
        dataset_folder="drawn:day2night",
        lr_warmup_steps=20,
        max_train_steps=100,
    ),
    "paired": dict(
        base="tiny-turbo",
        dataset_folder="drawn:scenes",
        lr_warmup_steps=20,
        max_train_steps=200,
    ),
    "yoso": recipe.YOSO_COMMON | dict(
        base="tiny-sd",
        # YOSO's terms have weight 0 in pure noise; with the floor, the data teach there, too.
        snr_floor=1,
        last_share=0.25,
        lambda_gan=0.1,
        learning_rate=2e-4,
        disc_adam_beta1=0.5,
        max_train_steps=200,
        lr_warmup_steps=50,
        ema_decay=0.99,
    ),
    "gaussians": {},
}
RANDOM_BASE = dict(
    base="tiny",
    train="lora",
    lora_rank_unet=4,
    learning_rate=5e-4,
    train_batch_size=4,
    disc_width=32,
)
ADAPTION = dict(learning_rate=3e-4, max_train_steps=250)
DATA_ALONE = dict(
    lambda_gan=0,
    lambda_con=0,
    max_train_steps=1000,
    learning_rate=5e-4,
    ema_decay=0.995,
)
YOSO_LORA = dict(train="lora", lora_rank=16, learning_rate=5e-4)
RUNS = {
    "unpaired": Run("unpaired"),
    "no-skips": Run("unpaired", dict(skips="off")),
    "random-base": Run("unpaired", RANDOM_BASE),
    "no-cycle": Run("unpaired", dict(lambda_cycle=0)),
    "no-identity": Run("unpaired", dict(lambda_idt=0)),
    "no-gan": Run("unpaired", dict(lambda_gan=0)),

    "paired": Run("paired"),
    "all-weights": Run("paired", dict(train="all")),
    "conv-in-frozen": Run("paired", dict(conv_in="off")),
    "stochastic": Run("paired", dict(stochastic="on")),
    "paired-no-skips": Run("paired", dict(skips="off")),
    "timestep-199": Run("paired", dict(timestep=199)),

    "v": Run("yoso", dict(stage="adapt_v", **ADAPTION)),
    "zero-snr": Run("yoso", dict(stage="adapt_zsnr", **ADAPTION), after="v"),
    "data-alone": Run("yoso", DATA_ALONE, after="zero-snr"),
    "yoso": Run("yoso", after="data-alone"),
    "real-is-data": Run("yoso", dict(adversarial="data"), after="data-alone"),
    "real-is-noisy": Run("yoso", dict(adversarial="noisy"), after="data-alone"),
    "no-discriminator": Run("yoso", dict(lambda_gan=0), after="data-alone"),
    "no-kl": Run("yoso", dict(lambda_kl=0), after="data-alone"),
    "no-consistency": Run("yoso", dict(lambda_con=0), after="data-alone"),
    "mse": Run("yoso", dict(consistency="mse"), after="data-alone"),
    "random-discriminator": Run("yoso", dict(disc_random="on"), after="data-alone"),
    "wrong-captions": Run("yoso", dict(lambda_mismatch=1), after="data-alone"),
    "adapted": Run("yoso", after="zero-snr"),
    "not-adapted": Run("yoso"),
    "prior": Run("yoso", YOSO_LORA | dict(prior_pictures=1000)),
    "no-prior": Run("yoso", YOSO_LORA),

    "gaussians-coop": Run("gaussians"),
    "gaussians-data": Run("gaussians", dict(adversarial="data")),
    "gaussians-noisy": Run("gaussians", dict(adversarial="noisy")),
}


# -------------------- Ideas

@dataclass(frozen=True)
class Idea:
    """A comparison. `runs` maps a label to a run, `figures` a key of the results to its name."""
    runs: dict[str, str]
    figures: dict[str, str]


IDEAS = {
    "skips": Idea(
        runs={"with": "unpaired", "without": "no-skips"},
        figures={"edges": "F-score of edges", "psnr": "PSNR, dB"},
    ),
    "base": Idea(
        runs={"with": "unpaired", "without": "random-base"},
        figures={"psnr": "PSNR, dB", "edges": "F-score of edges"},
    ),
    "lora": Idea(
        runs={"LoRA": "paired", "all weights": "all-weights"},
        figures={
            "psnr": "PSNR, dB",
            "trained": "trained weights, M",
            "words": "text-to-image attributes right",
        },
    ),
    "conv_in": Idea(
        runs={"trained": "paired", "frozen": "conv-in-frozen"},
        figures={"psnr": "PSNR, dB"},
    ),
    "r": Idea(
        runs={"with r": "stochastic", "without": "paired"},
        figures={
            "psnr_1.0": "PSNR, r = 1.0",
            "apart_1.0": "difference of seeds, r = 1.0",
            "psnr_0.7": "PSNR, r = 0.7",
            "apart_0.7": "difference of seeds, r = 0.7",
            "psnr_0.4": "PSNR, r = 0.4",
            "apart_0.4": "difference of seeds, r = 0.4",
            "psnr_0.0": "PSNR, r = 0.0",
            "apart_0.0": "difference of seeds, r = 0.0",
        },
    ),
    "paired_skips": Idea(
        runs={"with": "paired", "without": "paired-no-skips"},
        figures={"psnr": "PSNR, dB", "edges": "F-score of edges"},
    ),
    "timestep": Idea(
        runs={"999": "paired", "199": "timestep-199"},
        figures={"psnr": "PSNR, dB", "edges": "F-score of edges"},
    ),
    "cycle": Idea(
        runs={"with": "unpaired", "without": "no-cycle"},
        figures={"edges": "F-score of edges", "psnr": "PSNR, dB"},
    ),
    "identity": Idea(
        runs={"with": "unpaired", "without": "no-identity"},
        figures={"drift": "colour drift of nights, of 2", "psnr": "PSNR, dB"},
    ),
    "gan": Idea(
        runs={"with": "unpaired", "without": "no-gan"},
        figures={"night": "classified as night", "psnr": "PSNR, dB"},
    ),
    "coop": Idea(
        runs={
            "coop": "yoso",
            "data": "real-is-data",
            "noisy": "real-is-noisy",
            "none": "no-discriminator",
        },
        figures={
            "all": "attributes right",
            "sharp": "sharpness",
            "disc_right": "discriminator accuracy",
        },
    ),
    "gaussians": Idea(
        runs={"coop": "gaussians-coop", "data": "gaussians-data", "noisy": "gaussians-noisy"},
        figures={"modes": "modes of 25", "good": "within three standard deviations"},
    ),
    "kl": Idea(
        runs={"with": "yoso", "without": "no-kl"},
        figures={"all": "attributes right", "sharp": "sharpness"},
    ),
    "consistency": Idea(
        runs={"with": "yoso", "without": "no-consistency"},
        figures={"all": "attributes right", "neighbours": "distance of neighbouring steps"},
    ),
    "perceptual": Idea(
        runs={"with": "yoso", "without": "mse"},
        figures={"all": "attributes right", "sharp": "sharpness"},
    ),
    "disc_init": Idea(
        runs={"from the U-Net": "yoso", "random": "random-discriminator"},
        figures={
            "all": "attributes right",
            "sharp": "sharpness",
            "disc_right": "discriminator accuracy",
        },
    ),
    "mismatch": Idea(
        runs={"with": "wrong-captions", "without": "yoso"},
        figures={"all": "attributes right", "colour": "colours right", "sharp": "sharpness"},
    ),
    "prior": Idea(
        runs={"with": "prior", "without": "no-prior"},
        figures={"all": "attributes right", "brightness": "standard deviation of brightness"},
    ),
    "adaption": Idea(
        runs={"with": "adapted", "without": "not-adapted"},
        figures={
            "all": "attributes right",
            "darkest": "darkest tenth",
            "brightest": "brightest tenth",
        },
    ),
}


# -------------------- Measures: a run's folder -> its figures, and the pictures for a plate

Measured = tuple[dict[str, float], dict[str, Tensor]]


def measure_unpaired(folder: str) -> Measured:
    """Days translated to nights, and nights that should stay as they are."""
    n = measure.N
    world = scenes.Unpaired("day2night", "test")
    day = torch.stack([world[i]["a"] for i in range(n)])
    night = torch.stack([world[i]["b"] for i in range(n)])
    truth = torch.stack([world.truth(i, "a2b") for i in range(n)])
    captions = [world.prompts[1]] * n
    translated = measure.translate(folder, day, captions, "a2b")
    unmoved = measure.translate(folder, night, captions, "a2b")

    edges = measure.edge_f(measure.edges(translated), measure.edges(day))
    drift = unmoved.mean((2, 3)) - night.mean((2, 3))
    _, times, _, _ = measure.predict(measure.load_classifier(), translated)
    is_night = times.argmax(1) == scenes.TIMES.index("night")
    figures = dict(
        psnr=measure.psnr(translated, truth).mean().item(),
        edges=edges.mean().item(),
        drift=drift.abs().mean().item(),
        night=is_night.double().mean().item(),
    )
    return figures, {"": translated}


def measure_paired(folder: str) -> Measured:
    """Outlines to scenes, and what the base makes of captions once the adapters are gone."""
    described, truth = measure.held_out()
    lines = [to_tensor(scenes.outlines(scene, measure.SIZE)) * 2 - 1 for scene in described]
    x = torch.stack(lines)
    captions = [scenes.caption(scene) for scene in described]
    model = checkpoints.load_generator(folder, dtype=torch.float32)
    tensors, _ = read_tensors(checkpoints.find_checkpoint(folder))
    figures = dict(trained=sum(tensor.numel() for tensor in tensors.values()) / 1e6)

    pictures = {}
    if model.r is None:
        translated = measure.translate(folder, x, captions)
        figures["psnr_1.0"] = measure.psnr(translated, truth).mean().item()
        figures["apart_1.0"] = 0.0
        edges = measure.edge_f(measure.edges(translated), measure.edges(truth))
        figures["edges"] = edges.mean().item()
        pictures[""] = translated
    else:
        for r in R_VALUES:
            several = [measure.translate(folder, x, captions, seed=seed, r=r) for seed in range(4)]
            figures[f"psnr_{r}"] = measure.psnr(several[0], truth).mean().item()
            figures[f"apart_{r}"] = measure.mean_difference(several)
            pictures[f"r = {r}"] = several[0]
    figures["psnr"] = figures["psnr_1.0"]

    base = bases.load_base("tiny-turbo", dtype=torch.float32)
    if model.generator.config.train == "all":
        base.unet = model.generator.unet
        base.vae = model.generator.vae
        base.text_encoder = model.text_encoder
    figures["words"] = attribute_accuracy(draw_captions(base))["all"]
    return figures, pictures


def draw_captions(base: bases.Base, prior: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The held-out captions in one step, picture i from seed i: [N, 3, 64, 64]."""
    drawn = []
    for i, scene in enumerate(measure.held_out()[0]):
        picture = sample.text_to_image(
            base,
            scenes.caption(scene),
            [i],
            (measure.SIZE, measure.SIZE),
            prior=prior,
        )
        drawn.append(picture)
    return torch.cat(drawn)


def attribute_accuracy(pictures: Tensor) -> dict[str, float]:
    described, _ = measure.held_out()
    return measure.attribute_accuracy(measure.load_classifier(), pictures, described)


@torch.inference_mode()
def measure_yoso(folder: str) -> Measured:
    """Captions in one step; sharpness and the std of brightness are relative to the drawings'."""
    _, truth = measure.held_out()
    base, prior = checkpoints.load_yoso(folder, dtype=torch.float32)
    has_prior = prior[1].any()
    drawn = draw_captions(base, prior if has_prior else None)

    brightness = drawn.mean((1, 2, 3))
    true_brightness = truth.mean((1, 2, 3))
    order = true_brightness.argsort()
    tenth = max(len(order) // 10, 1)
    figures = attribute_accuracy(drawn)
    figures |= dict(
        sharp=measure.gradient_energy(drawn, truth),
        brightness=(brightness.std() / true_brightness.std()).item(),
        darkest=brightness[order[:tenth]].mean().item(),
        brightest=brightness[order[-tenth:]].mean().item(),
        neighbours=neighbour_distance(base),
    )
    figures |= discriminator_accuracy(pathlib.Path(folder) / "log.jsonl")
    return figures, {"": drawn}


def neighbour_distance(base: bases.Base) -> float:
    """Mean squared difference of x0 predicted at t and at t - 25, from the same noise."""
    described, truth = measure.held_out()
    z = torch.cat([base.vae.encode(x)[0] for x in truth.split(50)])
    z = z * base.vae.config.scaling_factor
    contexts = base.encode([scenes.caption(scene) for scene in described])[0]
    eps, _ = training.draw_noise(range(len(z)), z.shape[1:])
    distances = []
    for t in (999, 750, 500, 250):
        here = predicted_x0(base, z, eps, contexts, t)
        less_noisy = predicted_x0(base, z, eps, contexts, t - 25)
        distances.append((here - less_noisy).square().mean().item())
    return statistics.mean(distances)


def predicted_x0(base: bases.Base, z: Tensor, eps: Tensor, contexts: Tensor, t: int) -> Tensor:
    """z noised to level t -> the U-Net's x0, 50 at a time."""
    levels = torch.full((len(z),), t)
    x = diffusion.add_noise(z, eps, levels, base.schedule)
    predictions = []
    for rows, context in zip(x.split(50), contexts.split(50)):
        predictions.append(base.unet(rows, t, context))
    prediction = torch.cat(predictions)
    return diffusion.predict_x0(
        prediction, x, levels, base.schedule, base.schedule.prediction_type
    )


def discriminator_accuracy(
    log: pathlib.Path, first: int = 0, last: float = math.inf
) -> dict[str, float]:
    """disc_right: mean accuracy over the steps after `first` up to `last`, on real and fake
    together. Empty if there was no discriminator."""
    accuracies = []
    for line in log.read_text().splitlines():
        values = json.loads(line)
        if "disc" in values and first < values["step"] <= last:
            accuracies.append((values["disc_right_on_real"] + values["disc_right_on_fake"]) / 2)
    return {"disc_right": statistics.mean(accuracies)} if accuracies else {}


def measure_gaussians(folder: str) -> Measured:
    """The figures that tiny/gaussians.py wrote, and its scatter plot of the samples."""
    figures = json.loads((pathlib.Path(folder) / "figures.json").read_text())
    page = Image.open(pathlib.Path(folder) / "samples.png").convert("RGB")
    # The true points are on the left, the samples on the right.
    samples = page.crop((page.width - page.height, 0, page.width, page.height))
    pictures = to_tensor(samples)[None] * 2 - 1
    return dict(modes=figures["modes"], good=figures["good"]), {"": pictures}


MEASURES: dict[str, Callable[[str], Measured]] = {
    "unpaired": measure_unpaired,
    "paired": measure_paired,
    "yoso": measure_yoso,
    "gaussians": measure_gaussians,
}


# -------------------- Training and results

def folder_of(name: str, seed: int, steps: int | None = None) -> pathlib.Path:
    suffix = f"-{steps}steps" if steps else ""
    return FOLDER / f"{name}-seed{seed}{suffix}"


def execute(
    name: str, seed: int, steps: int | None = None
) -> tuple[pathlib.Path, dict[str, float]]:
    """Trains a run to its end, after the run that it builds on.

    Returns its folder and, if it was not interrupted, the minutes of processor time it took.
    """
    run = RUNS[name]
    folder = folder_of(name, seed, steps)
    flags = SHARED[run.kind] | run.flags | dict(seed=seed)
    if run.kind != "gaussians":
        flags["mixed_precision"] = recipe.mixed_precision(training.pick_device("auto"))
    if run.after:
        flags["base"] = folder_of(run.after, seed, steps) / "base"
        if not flags["base"].is_dir():
            execute(run.after, seed, steps)

    if steps:
        flags["max_train_steps"] = steps

    is_new = not folder.exists()
    before = child_seconds()
    if run.kind == "gaussians":
        train_gaussians(folder, flags)
    else:
        recipe.run_or_resume(SCRIPTS[run.kind], folder, **flags)
    minutes = (child_seconds() - before) / 60
    return folder, {"minutes": minutes} if is_new else {}


def child_seconds() -> float:
    """Processor time of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def train_gaussians(folder: pathlib.Path, flags: dict[str, object]) -> None:
    """Runs tiny/gaussians.py, unless its figures exist. It takes a minute and cannot resume."""
    if not (folder / "figures.json").is_file():
        flags = flags | dict(output_dir=folder)
        recipe.run("-m", SCRIPTS["gaussians"], *recipe.command_line(flags))


def read_results(path: pathlib.Path) -> dict:
    """The stored results in a JSON file; empty if it is not there. ValueError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold results ({error}): fix or remove it"
        ) from None


def measure_runs(names: list[str], seeds: int, steps: int | None, store: pathlib.Path) -> None:
    """Trains and measures the runs of some ideas that have no results yet."""
    runs = [run for name in names for run in IDEAS[name].runs.values()]
    todo = [(run, seed) for seed in range(seeds) for run in dict.fromkeys(runs)]
    for run, seed in tqdm(todo, "runs"):
        stored = read_results(store).get(run, {}).get(str(seed))
        if stored and stored.get("steps") != steps:
            raise ValueError(
                f"{store} has results of {run} after {stored.get('steps') or 'all'} steps, not"
                f" {steps or 'all'}; choose another --output"
            )
        if stored:
            continue
        folder, minutes = execute(run, seed, steps)
        figures, pictures = MEASURES[RUNS[run].kind](str(folder))
        if seed == 0:
            save_shown(folder / "shown.pt", pictures)
        trial = {"steps": steps} if steps else {}
        add_result(store, run, seed, figures | minutes | trial)


def save_shown(path: pathlib.Path, pictures: dict[str, Tensor]) -> None:
    """Keeps the pictures for a plate: those of SHOWN, or the only one."""
    shown = {}
    for label, x in pictures.items():
        shown[label] = x[SHOWN].clone() if len(x) > 1 else x
    torch.save(shown, path)


def add_result(store: pathlib.Path, run: str, seed: int, figures: dict[str, float]) -> None:
    results = read_results(store)  # another process may have added to it
    results.setdefault(run, {})[str(seed)] = figures
    text = json.dumps(results, indent=1)
    training.write_file(store, lambda path: path.write_text(text))


# -------------------- Figures and the page

def mean_and_range(values: list[float]) -> str:
    """The mean over seeds, and the range if there is one."""
    def short(x: float) -> str:
        return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3g}"

    mean = short(statistics.mean(values))
    low, high = short(min(values)), short(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def common_seeds(idea: Idea, results: dict) -> list[str]:
    """The seeds of which every run of an idea has results. Runs are shared between ideas."""
    seeds = [set(results.get(run, {})) for run in idea.runs.values()]
    return sorted(set.intersection(*seeds))


def figures_of(idea: Idea, results: dict, label: str) -> dict[str, str]:
    """What was measured of one run of an idea: a figure's name -> its mean and range."""
    of_seeds = results.get(idea.runs[label], {})
    measured = [of_seeds[seed] for seed in common_seeds(idea, results)]
    figures = {}
    for key, name in idea.figures.items():
        values = [one[key] for one in measured if key in one]
        if values:
            figures[name] = mean_and_range(values)
    return figures


def minutes_of(idea: Idea, results: dict) -> float | None:
    """Minutes for one seed of all sides, mean over seeds. None if a side was never timed."""
    total = 0
    for run in idea.runs.values():
        seeds = results.get(run, {}).values()
        minutes = [measured["minutes"] for measured in seeds if "minutes" in measured]
        if not minutes:
            return None
        total += statistics.mean(minutes)
    return total


def table(idea: Idea, results: dict) -> str:
    """The figures of an idea in Markdown, a column per side, and how they were obtained."""
    seeds = len(common_seeds(idea, results))
    if seeds == 0:
        return "Not measured yet.\n"
    sides = {label: figures_of(idea, results, label) for label in idea.runs}
    lines = ["| | " + " | ".join(sides) + " |", "| --- |" + " --- |" * len(sides)]
    for name in idea.figures.values():
        cells = [figures.get(name, "") for figures in sides.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    minutes = minutes_of(idea, results)
    note = f"Seeds: {seeds}."
    if minutes is not None:
        note += f" Minutes per seed: {minutes:.0f}."
    return "\n".join([*lines, "", note, ""])


def update_page(text: str, results: dict) -> str:
    """IDEAS.md with the table of each idea rewritten between its markers."""
    for name, idea in IDEAS.items():
        start = f"<!-- figures: {name} -->\n"
        end = "<!-- end -->"
        before, found_start, rest = text.partition(start)
        old, found_end, after = rest.partition(end)
        if not found_start or not found_end or "<!-- figures:" in old:
            raise ValueError(
                f"IDEAS.md has no place for the figures of '{name}': expected a line"
                f" {start.strip()} and, below it, a line {end}"
            )
        text = before + start + table(idea, results) + end + after
    return text


# -------------------- Plates

MARGIN = 190  # for labels and figures
GAP = 4


def around(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The rows of a plate above and below the outputs: the input, and the truth."""
    if kind == "unpaired":
        world = scenes.Unpaired("day2night", "test")
        inputs = torch.stack([world[i]["a"] for i in SHOWN])
        truth = torch.stack([world.truth(i, "a2b") for i in SHOWN])
        return {"input": inputs}, {"truth": truth}
    if kind == "gaussians":
        points = gaussians.data_points(50_000, torch.Generator().manual_seed(1))
        return {}, {"truth": gaussians.scatter(points)[None]}

    described, truth = measure.held_out()
    below = {"a drawing of the caption": truth[SHOWN]}
    if kind == "yoso":
        return {}, below
    lines = [to_tensor(scenes.outlines(described[i], measure.SIZE)) * 2 - 1 for i in SHOWN]
    return {"input": torch.stack(lines)}, below


def blank_plate(labels: dict[str, list[str]], across: int, side: int) -> Image.Image:
    """A plate without its pictures: one row per label, with lines of text below the label."""
    cell = side + GAP
    page = Image.new("RGB", (MARGIN + across * cell, len(labels) * cell), "white")
    pen = ImageDraw.Draw(page)
    for i, (label, lines) in enumerate(labels.items()):
        pen.multiline_text((6, GAP + i * cell), "\n".join([label, *lines]), fill="black")
    return page


def plate(rows: dict[str, Tensor], lines: dict[str, list[str]]) -> Image.Image:
    """Rows of pictures [n, 3, H, W] by label, with lines of text for some labels."""
    first = next(iter(rows.values()))
    side = 320 if len(first) == 1 else 96
    across = max(len(pictures) for pictures in rows.values())
    labels = {label: lines.get(label, []) for label in rows}
    page = blank_plate(labels, across, side)
    for i, pictures in enumerate(rows.values()):
        for j, x in enumerate(pictures):
            picture = to_picture(x).resize((side, side), Image.Resampling.BICUBIC)
            page.paste(picture, (MARGIN + j * (side + GAP), i * (side + GAP)))
    return page


def write_plate(path: pathlib.Path, page: Image.Image) -> None:
    """Writes a PNG of at most 150 KB, if 64 colours are few enough for that."""
    for colours in (256, 128, 64):
        training.write_file(path, partial(save_png, page, colours))
        if path.stat().st_size <= 150_000:
            return


def save_png(page: Image.Image, colours: int, path: pathlib.Path) -> None:
    small = page.quantize(colours, dither=Image.Dither.NONE)
    small.save(path, format="PNG", optimize=True)


def figure_lines(figures: dict[str, str], part: str) -> list[str]:
    """Figures as short lines of text; with `part` such as "r = 0.4", only its own."""
    lines = []
    for name, value in figures.items():
        if part in name:
            lines += textwrap.wrap(f"{name}: {value}", 30)
    return lines


def make_plate(name: str, steps: int | None, results: dict) -> Image.Image | None:
    """The plate of an idea. None if the pictures of one of its runs are not on this machine."""
    idea = IDEAS[name]
    outputs, lines = {}, {}
    for label, run in idea.runs.items():
        path = folder_of(run, 0, steps) / "shown.pt"
        if not path.is_file():
            return None
        figures = figures_of(idea, results, label)
        # A run has one row of pictures, or one for each r.
        for part, pictures in torch.load(path, weights_only=True).items():
            outputs[part or label] = pictures
            lines[part or label] = figure_lines(figures, part)

    first_run = next(iter(idea.runs.values()))
    above, below = around(RUNS[first_run].kind)
    return plate(above | outputs | below, lines)


# -------------------- Command line

def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("idea", nargs="*", help="names of ideas, see --list [all]")
    add("--seeds", type=int, default=3, help="random seeds per run: 0, 1, ... [3]")
    add("--steps", type=int, help="steps of every run, for a trial; needs --output")
    add("--output", type=pathlib.Path, default=PLATES, help="folder of results [assets/plates]")
    add("--list", action="store_true", help="only list the ideas and their sides")
    add("--page", action="store_true", help="only rewrite plates and tables from stored results")
    args = training.parse_args(parser)
    names = args.idea or [*IDEAS]
    check(args, names)
    if args.list:
        for name in names:
            print(f"{name:12} {', '.join(IDEAS[name].runs)}")
        return

    args.output.mkdir(parents=True, exist_ok=True)
    store = args.output / "results.json"
    if not args.page:
        measure_runs(names, args.seeds, args.steps, store)

    results = read_results(store)
    for name in names:
        page = make_plate(name, args.steps, results)
        if page:
            write_plate(args.output / f"{name}.png", page)
            print(args.output / f"{name}.png")
    if args.output.resolve() == PLATES:
        text = update_page(PAGE.read_text(), results)
        training.write_file(PAGE, lambda path: path.write_text(text))


def check(args: argparse.Namespace, names: list[str]) -> None:
    """ValueError for flags that do not go together."""
    for name in names:
        if name not in IDEAS:
            raise ValueError(f"there is no idea called {name}; expected {', '.join(IDEAS)}")
    if args.steps and args.output.resolve() == PLATES:
        raise ValueError(
            "--steps is for trials: choose another --output, so that no trial passes for a result"
        )


if __name__ == "__main__":
    training.run_script(main)
