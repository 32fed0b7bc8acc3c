"""Measures generated digits: which digit they show, how good and how varied they are.

    python -m tiny.digits measure runs/NAME/model.safetensors     # of train_yoso.py
    python -m tiny.digits train         the classifier that measures: minutes
    python -m tiny.digits sheet FILE    tiny/digits.png of a zip of MNIST in EDM's layout

Everything is read off a small classifier of digits, trained on the 9,000 training digits of
dataset/digits.py. Its features must also redraw a digit, so that they hold how it is written and
not only which it is. The other side of each comparison is the 1,000 test digits, and beside each
figure stands that of 1,000 training digits, which is as good as samples can get.
"""

import argparse
import functools
import json
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import evaluate
import sample
import training
from dataset.digits import ACROSS, CLASSES, PADDED, ROWS, SHEET, SIDE, Digits
from dataset.folders import reading
from dataset.pictures import to_picture
from files import checkpoints
from files.tensors import save_tensors
from tiny import recipe

WEIGHTS = pathlib.Path(__file__).parent / "digits_classifier.safetensors"
PER_CLASS = 100  # samples of a measurement, as many as the test has


# -------------------- The classifier

class DigitClassifier(nn.Module):
    """Digits [B, 1, 32, 32] in [-1, 1] -> features [B, 64]; `logits` [B, 10] of these."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 48), features: int = 64):
        super().__init__()
        inputs = (1, *widths)
        self.convs = nn.ModuleList(
            [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, widths)]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(8, width) for width in widths])
        self.features = nn.Linear(widths[-1] * 4 * 4, features)
        self.last = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.silu(norm(conv(x)))
            if i < len(self.convs) - 1:
                x = F.max_pool2d(x, 2)
        return self.features(x.flatten(1))

    def logits(self, features: Tensor) -> Tensor:
        return self.last(F.silu(features))


@functools.cache
def load_classifier() -> DigitClassifier:
    """The trained classifier, frozen, in float32."""
    classifier = DigitClassifier()
    tensors = safetensors.torch.load_file(WEIGHTS)
    classifier.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def features_of(x: Tensor) -> Tensor:
    """Digits [N, 1, H, W] in [-1, 1] -> features [N, 64]. Other sizes than 32 are resized."""
    if x.shape[-1] != PADDED:
        x = F.interpolate(x, (PADDED, PADDED), mode="bilinear", antialias=True)
    classifier = load_classifier()
    return torch.cat([classifier(batch) for batch in x.split(100)])


def recognised(features: Tensor) -> Tensor:
    """The digits [N] that the classifier sees."""
    with torch.no_grad():
        return load_classifier().logits(features).argmax(1)


# -------------------- Training the classifier

def warp(x: Tensor, rng: torch.Generator) -> Tensor:
    """Digits [B, 1, H, W], turned, scaled, slanted and shifted a little at random."""

    def draw(most: float) -> Tensor:
        return (2 * torch.rand(len(x), generator=rng) - 1) * most

    angle = draw(0.2)
    width = 1 + draw(0.1)
    height = 1 + draw(0.1)
    slant = draw(0.15)
    rows = [
        torch.stack([width * angle.cos(), slant - angle.sin(), draw(0.12)], dim=1),
        torch.stack([angle.sin(), height * angle.cos(), draw(0.12)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), x.shape, align_corners=False)
    # What comes from outside the picture is 0, so black must be.
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train_classifier(steps: int = 3000, batch: int = 64, seed: int = 0) -> None:
    """Cross-entropy + the mean squared error of digits at 16 x 16, redrawn from the features.

    Inputs are blurred and get noise at random, so that the classifier recognises what generated
    digits show in spite of their flaws; what is redrawn is free of both.
    """
    torch.manual_seed(seed)
    network = DigitClassifier()
    redraw = nn.Linear(network.features.out_features, 16 * 16)
    trained = nn.ModuleDict({"network": network, "redraw": redraw})
    digits = Digits("train", "no_resize")
    pictures = digits.pictures()
    labels = torch.tensor(digits.labels)
    test = Digits("test", "no_resize")
    test_pictures = test.pictures()
    test_labels = torch.tensor(test.labels)

    def loss(step: int) -> Tensor:
        rng = training.rng(seed, step, "digits")
        rows = torch.randint(len(pictures), (batch,), generator=rng)
        clean = warp(pictures[rows], rng)
        features = network(recipe.blur_and_noise(clean, rng))
        wrong = F.cross_entropy(network.logits(features), labels[rows])
        small = F.avg_pool2d(clean, 2).flatten(1)
        return wrong + F.mse_loss(redraw(features), small)

    @torch.no_grad()
    def validate(step: int) -> dict:
        found = torch.cat([network.logits(network(x)) for x in test_pictures.split(100)])
        return {"right": (found.argmax(1) == test_labels).float().mean().item()}

    recipe.train("digits", trained, loss, validate, steps, rate=3e-3)
    tensors = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_tensors(WEIGHTS, tensors, {})


# -------------------- Measures

def density_and_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Of features real [N, D] and fake [M, D].

    B_i is the ball around real_i that reaches to its k-th nearest neighbour of the real ones.
        density  = sum_j sum_i [fake_j in B_i] / (k M)
        coverage = sum_i [some fake_j in B_i] / N
    Density is near 1 for real features, and higher for samples that crowd where real ones do.
    Coverage is the share of real features that have a sample near: for M = N from the same
    distribution about 1 - 2^-k.

    Source: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models".
    """
    real = real.double()
    fake = fake.double()
    distances = torch.cdist(real, real).fill_diagonal_(torch.inf)
    radius = distances.kthvalue(k, dim=1).values                       # [N]
    inside = torch.cdist(real, fake) < radius[:, None]                 # [N, M]
    density = inside.sum().item() / (k * len(fake))
    coverage = inside.any(1).double().mean().item()
    return density, coverage


def nearest(x: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [N] and index [N] of the nearest of digits [M, 1, H, W] to each of x [N, 1, H, W].

    The distance is the root of the mean squared difference of pixels, in a range of 2.
    """
    distances, indices = torch.cdist(x.flatten(1), digits.flatten(1)).min(dim=1)
    return distances / x[0].numel() ** 0.5, indices


class References(NamedTuple):
    """What samples are compared with, each [N, 1, side, side] or [N, 64]."""

    test: Tensor
    test_features: Tensor
    training: Tensor


@functools.cache
def references(side: int) -> References:
    test = Digits("test", f"resize_{side}").pictures()
    digits = Digits("train", f"resize_{side}").pictures()
    return References(test, features_of(test), digits)


def measure(samples: Tensor, asked: Tensor) -> dict[str, float]:
    """Figures of samples [N, C, H, W] in [-1, 1], grey or RGB, and the digits [N] asked for.

    right       the share in which the classifier sees the digit that was asked for
    frechet     Frechet distance to the test digits in the classifier's features. It is no FID,
                which is of Inception's features, and only comparable with others of this file.
    density, coverage       of the test digits' features, see density_and_coverage
    nearest     the median distance to the nearest training digit, see nearest

    Samples of another size than 32 x 32 are compared with digits of their size. All figures are
    meant for 1,000 samples, a hundred of each digit, as the test has them. `limits` says what
    real digits get. ValueError for other shapes and for NaN.
    """
    asked = torch.as_tensor(asked).cpu()
    if samples.ndim != 4 or samples.shape[:1] != asked.shape:
        raise ValueError(
            f"found samples of shape {list(samples.shape)} and digits of {list(asked.shape)};"
            " expected [N, C, H, W] and [N]"
        )
    x = as_grey(samples)
    if not x.isfinite().all():
        raise ValueError("the samples hold NaN or infinity; expected pictures in [-1, 1]")
    real = references(x.shape[-1])
    features = features_of(x)
    density, coverage = density_and_coverage(real.test_features, features)
    distance = evaluate.frechet_distance(
        *evaluate.statistics(features), *evaluate.statistics(real.test_features)
    )
    return dict(
        right=(recognised(features) == asked).double().mean().item(),
        frechet=distance,
        density=density,
        coverage=coverage,
        nearest=nearest(x, real.training)[0].median().item(),
    )


@functools.cache
def limits(side: int = PADDED) -> dict[str, float]:
    """What digits that people wrote get, of side x side pixels: as good as samples can be.

    frechet, density and coverage are those of 1,000 training digits, a hundred of each digit.
    The other two are the test digits': the classifier's accuracy, and how far digits are from
    the training digits that are no copies of them. Samples far nearer than that are copies.
    """
    real = references(side)
    digits = torch.arange(len(real.test)) % CLASSES  # classes take turns in both
    figures = measure(real.training[:len(digits)], digits)
    of_test = measure(real.test, digits)
    return figures | {name: of_test[name] for name in ("right", "nearest")}


def as_grey(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 1, H, W] in [-1, 1], in float32 on the CPU."""
    return x.detach().float().cpu().mean(1, keepdim=True).clamp(-1, 1)


# -------------------- Samples of a checkpoint, and pages of them

@torch.inference_mode()
def draw_samples(checkpoint: str, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """One-step samples [10 count, C, H, W] of a checkpoint of train_yoso.py, and their digits.

    Sample i is drawn from seed + i. The first `count` are of digit 0.
    """
    base, prior = checkpoints.load_yoso(checkpoint, dtype=torch.float32)
    height, width = (side * base.vae.factor for side in prior[0].shape[1:])
    drawn = []
    for digit in tqdm(range(CLASSES), f"seed {seed}"):
        first = seed + digit * count
        seeds = list(range(first, first + count))
        size = (width, height)
        pictures = sample.text_to_image(
            base, str(digit), seeds, size, sampler="lcm", prior=prior
        )
        drawn.append(pictures)
    return torch.cat(drawn), torch.arange(CLASSES).repeat_interleave(count)


def page(rows: list[Tensor], zoom: int = 2) -> Image.Image:
    """Rows of digits, each [N, 1, H, W], enlarged."""
    lines = [torch.cat(list(row), dim=2) for row in rows]
    picture = to_picture(torch.cat(lines, dim=1).expand(3, -1, -1))
    size = (picture.width * zoom, picture.height * zoom)
    return picture.resize(size, Image.Resampling.NEAREST)


def samples_page(samples: Tensor, asked: Tensor, across: int = 10) -> Image.Image:
    """The first ten samples of each digit, a digit a row."""
    x = as_grey(samples)
    return page([x[asked == digit][:across] for digit in range(CLASSES)])


def neighbours_page(samples: Tensor, asked: Tensor, across: int = 10) -> Image.Image:
    """The same samples, each followed by its nearest training digit, which is black on white."""
    x = as_grey(samples)
    digits = references(x.shape[-1]).training
    rows = []
    for digit in range(CLASSES):
        own = x[asked == digit][:across]
        _, indices = nearest(own, digits)
        pairs = torch.stack([own, -digits[indices]], dim=1)            # [N, 2, 1, H, W]
        rows.append(pairs.flatten(0, 1))
    return page(rows)


# -------------------- Commands

def measure_checkpoint(checkpoint: str, seeds: list[int], output: pathlib.Path) -> dict:
    """The figures of 1,000 samples for each seed; the pages are of the first seed."""
    results = {}
    for seed in seeds:
        samples, asked = draw_samples(checkpoint, seed, PER_CLASS)
        results[f"seed {seed}"] = measure(samples, asked)
        if seed == seeds[0]:
            pages = {
                "samples.png": samples_page(samples, asked),
                "neighbours.png": neighbours_page(samples, asked),
            }
    results["digits that people wrote"] = limits(samples.shape[-1])

    output.mkdir(parents=True, exist_ok=True)
    for name, picture in pages.items():
        picture.save(output / name)
    return results


def write_sheet(source: str, output: pathlib.Path) -> None:
    """The sheet that dataset/digits.py describes, of a zip of MNIST in EDM's layout."""
    bands = np.zeros((CLASSES, ROWS * ACROSS, SIDE, SIDE), np.uint8)
    used = [0] * CLASSES
    with reading(source, "a zip of MNIST in EDM's layout"), zipfile.ZipFile(source) as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
        for name, label in tqdm(labels, "digits"):
            with archive.open(name) as file, Image.open(file) as picture:
                bands[label, used[label]] = np.asarray(picture)
            used[label] += 1
    rows = bands.reshape(CLASSES * ROWS, ACROSS, SIDE, SIDE).swapaxes(1, 2)
    sheet = Image.fromarray(rows.reshape(CLASSES * ROWS * SIDE, ACROSS * SIDE))
    sheet.save(output, format="PNG", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("measure", help="figures of a checkpoint, as JSON")
    command.add_argument("checkpoint", help="model.safetensors of train_yoso.py")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1000, 2000])
    command.add_argument(
        "--output", type=pathlib.Path, default="out", help="folder of the pages [out]"
    )
    commands.add_parser("train", help="train the classifier")
    command = commands.add_parser("sheet", help="make tiny/digits.png")
    command.add_argument("source", help="a zip of MNIST in EDM's layout")
    args = training.parse_args(parser)

    torch.set_num_threads(1)  # more threads do not help such small networks
    if args.command == "measure":
        print(json.dumps(measure_checkpoint(args.checkpoint, args.seeds, args.output), indent=1))
    elif args.command == "train":
        train_classifier()
        print(json.dumps(limits(), indent=1))
    else:
        write_sheet(args.source, SHEET)
        print(SHEET)


if __name__ == "__main__":
    training.run_script(main)
