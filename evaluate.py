"""Measures generated pictures: FID and KID between two folders; DINO structure, LPIPS, PSNR and
SSIM of pairs; CLIP score.

    python evaluate.py --real FOLDER --fake FOLDER             # every metric that is possible here
    python evaluate.py --real FOLDER --fake FOLDER --paired    # pictures of the same stem are pairs
    python evaluate.py --real FOLDER --fake FOLDER --metrics fid,kid --stats real.npz --json
    python evaluate.py --fake FOLDER --metrics clip --captions captions.json

Without --metrics, a metric is left out, with the reason on stderr, if its weights are not on this
machine or if it has no meaning for these folders. A metric asked for by name is computed, and its
weights are downloaded; if that is not possible, it is an error. Without --paired, folders are
taken as pairs if all their stems are the same.

A picture that cannot be read or computed is left out of the figures and named in the end, and the
exit status is 2. It is also 2 if a metric asked for by name could not be computed for every pair.

For trainers: the functions take pictures [B, 3, H, W] in [-1, 1] and, except for LPIPS, round
them to 8 bits, as a file holds them. So validation gives the same numbers as this script (on a
GPU up to TF32, which trainers allow).
"""

import difflib
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import training
from dataset import folders
from dataset.pictures import open_picture, to_picture, to_tensor
from files import metrics
from models import clip, dino, inception


@dataclass(frozen=True)
class Metric:
    """What the table and the JSON say about a metric."""

    network: str | None  # its metric network, as files/metrics.py calls it
    description: str | None  # the network, and which of its outputs is used
    better: str  # "lower" or "higher"
    preparation: str  # of the pictures
    paired: bool = False


CLEAN = "each channel to 299x299 as float, Pillow bicubic, clipped; (x - 128) / 128 (clean-fid)"
METRICS = {
    "fid": Metric("inception", "Inception 2015, pool3", "lower", CLEAN),
    "kid": Metric("inception", "Inception 2015, pool3", "lower", CLEAN),
    "structure": Metric(
        network="dino",
        description="DINO ViT-B/8, last keys",
        better="lower",
        preparation="short side 224, Pillow bilinear; ImageNet mean/std",
        paired=True,
    ),
    "lpips": Metric("lpips", "VGG16, LPIPS v0.1", "lower", "full size, [-1, 1]", paired=True),
    "clip": Metric(
        network="clip",
        description="CLIP ViT-B/32",
        better="higher",
        preparation="short side 224, Pillow bicubic, centre crop; CLIP mean/std",
    ),
    "psnr": Metric(
        network=None,
        description=None,
        better="higher",
        preparation="full size, 0 to 255, all channels together",
        paired=True,
    ),
    "ssim": Metric(
        network=None,
        description=None,
        better="higher",
        preparation="full size, [0, 1], mean of channels;"
        " Gaussian window 11, sigma 1.5, no padding",
        paired=True,
    ),
}
PAIRED = {name for name, metric in METRICS.items() if metric.paired}


# ---------------------------------------------------------------------------------- the metrics

def as_levels(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> 0 to 255, rounded, in float64 on the CPU (not every GPU has that)."""
    x = x.detach().cpu().double().clamp(-1, 1)
    return ((x + 1) * 127.5).round()


def check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"pictures of shapes {list(a.shape)} and {list(b.shape)} are not pairs; expected equal"
            " shapes"
        )


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """10 log10(255^2 / mean squared difference) in dB, [B]; infinite for equal pictures."""
    check_shapes(a, b)
    mean_square = (as_levels(a) - as_levels(b)).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mean_square)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity [B] at full size, the mean over channels and positions.

    Equation 13 of Wang et al. 2004, "Image Quality Assessment", with K = 0.01 and 0.03 and a
    Gaussian window of 11 x 11 with sigma 1.5, at the positions where it lies inside the picture.
    """
    height, width = a.shape[2:]
    if min(height, width) < 11:
        raise ValueError(
            f"SSIM was given pictures of {width}x{height}; its window takes 11 pixels a side"
        )
    check_shapes(a, b)
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(x: Tensor) -> Tensor:
        rows = F.conv2d(x, window.view(1, 1, 1, 11))
        return F.conv2d(rows, window.view(1, 1, 11, 1))

    def channels(x: Tensor) -> Tensor:
        return as_levels(x).flatten(0, 1).unsqueeze(1) / 255  # [3 B, 1, H, W] in [0, 1]

    x = channels(a)
    y = channels(b)
    mx = mean(x)
    my = mean(y)
    vx = mean(x * x) - mx * mx
    vy = mean(y * y) - my * my
    vxy = mean(x * y) - mx * my
    c1 = 0.01**2
    c2 = 0.03**2
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.unflatten(0, (-1, 3)).mean((1, 2, 3, 4))


def fid(
    network: nn.Module,
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    device: torch.device,
) -> float:
    """FID of pictures [3, H, W] of any sizes, which go through Inception one at a time."""

    def statistics_of(pictures: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        rows = [features(network, x[None].to(device)) for x in pictures]
        return statistics(torch.cat(rows))

    return frechet_distance(*statistics_of(real), *statistics_of(fake))


@torch.no_grad()
def features(network: nn.Module, x: Tensor) -> Tensor:
    """Pictures -> Inception's features [B, 2048], float32, on the CPU."""
    return network(inception.prepare(x)).float().cpu()


def statistics(f: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] -> their mean [D] and unbiased covariance [D, D], in float64."""
    if len(f) < 2 or not f.isfinite().all():
        raise ValueError(
            f"the statistics of {len(f)} features cannot be computed; expected two or more, and all"
            " of them finite"
        )
    return f.double().mean(0), torch.cov(f.double().T)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2)) in float64.

    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule". With S = A A^T, the
    trace of the last root is the sum of the singular values of A1^T A2. So no root is taken of a
    zero with rounding errors, and fewer pictures than features only make A narrower.
    """
    roots = []
    for cov in (cov1.double(), cov2.double()):
        values, vectors = torch.linalg.eigh(cov)
        rounding = len(values) * torch.finfo(torch.float64).eps * values.max()
        kept = values > rounding
        roots.append(vectors[:, kept] * values[kept].sqrt())

    root_trace = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    between_means = (mean1 - mean2).double().square().sum()
    distance = between_means + cov1.trace() + cov2.trace() - 2 * root_trace
    return distance.clamp(min=0).item()


def kid(
    f1: Tensor,
    f2: Tensor,
    generator: torch.Generator,
    subsets: int = 100,
    size: int = 1000,
) -> Tensor:
    """Squared MMD between pairs of random subsets of features [N, D]: [subsets], in float64.

    Their mean is the KID (Binkowski et al. 2018, "Demystifying MMD GANs"). The kernel is
    (x.y / D + 1)^3, the estimate is unbiased, and a subset has `size` features, or as many as
    there are.
    """
    n = min(size, len(f1), len(f2))
    if n < 2:
        raise ValueError(
            f"KID was given {len(f1)} and {len(f2)} features; expected two or more of each"
        )
    if n == len(f1) == len(f2):
        subsets = 1  # all would be the same

    def subset(f: Tensor) -> Tensor:
        return f[torch.randperm(len(f), generator=generator)[:n]].double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (n * (n - 1))

    values = []
    for _ in range(subsets):
        x = subset(f1)
        y = subset(f2)
        values.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    return torch.stack(values)


def clip_pixels(x: Tensor, size: int = 224) -> Tensor:
    """Pictures -> pixels [B, 3, size, size], as CLIP's own preprocessing makes them of a file.

    The short side is scaled to `size` by Pillow's bicubic filter, then a centre crop, then CLIP's
    mean and standard deviation. (The trainers' loss stretches instead, see `clip.prepare`.)
    """
    cropped = []
    for picture in map(to_picture, x):
        short = min(picture.size)
        width = size * picture.width // short
        height = size * picture.height // short
        left = round((width - size) / 2)
        top = round((height - size) / 2)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        cropped.append(to_tensor(resized.crop((left, top, left + size, top + size))))
    return clip.normalise(torch.stack(cropped).to(x) * 2 - 1)


@torch.no_grad()
def clip_score(metric: metrics.MetricNetwork, x: Tensor, captions: list[str]) -> Tensor:
    """100 times the cosine of each picture with its own caption, [B]; below 0 counts as 0.

    Source: Hessel et al. 2021, "CLIPScore".
    """
    network = metric.network
    words = network.embed_captions(metric.tokenizer(captions).to(x.device))
    pictures = network.image(clip_pixels(x, network.image.config.image_size))
    return 100 * F.cosine_similarity(pictures, words).clamp(min=0)


# -------------------------------------------------------------------------------------- folders

@dataclass(frozen=True)
class Failures:
    """What could not be computed; filled while pictures are read and measured."""

    # Why a picture is missing from the figures, in a sentence that names it.
    pictures: dict[Path, str] = field(default_factory=dict)
    # What a metric could not be computed for, and why.
    metrics: dict[str, str] = field(default_factory=dict)


def explain_failure(path: Path, error: Exception) -> str | None:
    """What went wrong with a picture, in a sentence that names it; None for a bug."""
    if training.out_of_memory(error):
        return (
            f"{path} needs too much memory ({training.first_line(error)}): make it smaller, or"
            " choose fewer --metrics"
        )
    if not isinstance(error, (ValueError, OSError)):
        return None
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def list_pictures(folder: Path) -> list[Path]:
    return [folder / name for name in folders.pictures_in(folder)]


def match(
    real: list[Path],
    fake: list[Path],
    failures: Failures,
    are_pairs: bool,
) -> list[tuple[Path, Path]]:
    """Pairs of pictures of the same stem, without those that cannot be read.

    ValueError if a picture has no partner. One that is not of its partner's size is a failure if
    the folders are known to hold pairs, and else a ValueError too.
    """
    real_stems = by_stem(real)
    fake_stems = by_stem(fake)
    alone = sorted(real_stems.keys() ^ fake_stems.keys())
    if alone:
        stem = alone[0]
        path = (real_stems | fake_stems)[stem]
        others = fake if stem in real_stems else real
        raise ValueError(
            f"{path} has no partner of its stem in {others[0].parent} ({len(alone)} of"
            f" {len(real) + len(fake)} pictures are alone); expected the same stems in both folders"
        )

    candidates = [(path, fake_stems[path.stem]) for path in real]
    pairs = []
    for a, b in tqdm(candidates, desc="sizes", leave=False, disable=None):
        size = read_size(a, failures)
        other_size = read_size(b, failures)
        if size is None or other_size is None:
            continue
        if size != other_size:
            width, height = size
            other_width, other_height = other_size
            reason = (
                f"{a} is {width}x{height} pixels and its partner {b} {other_width}x{other_height};"
                " make them equal"
            )
            if not are_pairs:
                raise ValueError(reason)
            failures.pictures[b] = reason
            continue
        pairs.append((a, b))
    return pairs


def read_size(path: Path, failures: Failures) -> tuple[int, int] | None:
    """(width, height) of a picture, or None if it cannot be read."""
    try:
        return open_picture(path).size
    except ValueError as error:
        failures.pictures[path] = explain_failure(path, error)
        return None


def by_stem(paths: list[Path]) -> dict[str, Path]:
    """The pictures by their names without suffix. ValueError if two share one."""
    stems = {path.stem: path for path in paths}
    for path in paths:
        if stems[path.stem] != path:
            raise ValueError(
                f"{path} shares its stem with another picture there; rename or remove one of them"
            )
    return stems


def read_batches(
    rows: list[tuple[Path, ...]],
    batch: int,
    device: torch.device,
    title: str,
    failures: Failures,
) -> Iterator[tuple[list[tuple[Path, ...]], list[Tensor]]]:
    """Rows of paths, and the pictures of each of their columns, [B, 3, H, W] in [-1, 1].

    B is up to `batch` neighbouring rows of one size. Rows that cannot be read are left out.
    `title` is for the progress bar.
    """

    def load(row: tuple[Path, ...]) -> list[Tensor]:
        """The pictures of a row; none if one cannot be read."""
        pictures = []
        for path in row:
            try:
                pictures.append(to_tensor(open_picture(path)) * 2 - 1)
            except (ValueError, MemoryError) as error:
                failures.pictures[path] = explain_failure(path, error)
                return []
        return pictures

    def shapes(item: tuple[tuple[Path, ...], list[Tensor]]) -> list[torch.Size]:
        return [x.shape for x in item[1]]

    starts = range(0, len(rows), batch)
    with ThreadPoolExecutor() as pool:
        for start in tqdm(starts, desc=title, unit="batch", leave=False, disable=None):
            chunk = rows[start : start + batch]
            loaded = zip(chunk, pool.map(load, chunk))
            for found, group in itertools.groupby(loaded, key=shapes):
                if not found:
                    continue
                paths, pictures = zip(*group)
                yield list(paths), [torch.stack(column).to(device) for column in zip(*pictures)]


def measure(
    score: Callable[..., Tensor],
    rows: list[tuple[Path, ...]],
    pictures: list[Tensor],
    failures: Failures,
) -> tuple[list[Tensor], list[str]]:
    """score(rows, *pictures), one value or vector per row, and why some have none.

    Rows that fail together are tried one by one. A picture that the score refuses (ValueError) is
    not among the failures, as other metrics may take it.
    """
    try:
        return [score(rows, *pictures).cpu()], []
    except Exception as error:
        reason = explain_failure(rows[0][-1], error)
        if reason is None:
            raise
        if len(rows) == 1:
            if not isinstance(error, ValueError):
                failures.pictures[rows[0][-1]] = reason
            return [], [reason]

    # Only here has Python let go of the error, and with it of what was in memory.
    scores = []
    reasons = []
    for i, row in enumerate(rows):
        alone = [x[i : i + 1] for x in pictures]
        found, why = measure(score, [row], alone, failures)
        scores += found
        reasons += why
    return scores, reasons


def folder_features(
    paths: list[Path],
    metric: metrics.MetricNetwork,
    batch: int,
    device: torch.device,
    stats: Path | None = None,
    failures: Failures | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Inception's features [N, D] of the pictures, their mean [D] and covariance [D, D].

    None if fewer than two can be computed. With `stats` they are kept in that file, if all could
    be, or read from it if it exists. ValueError if it was made from other pictures, Inception
    weights or image preparation.
    """
    failures = failures or Failures()
    folder = paths[0].parent
    key = stats_key(paths, metric)
    if stats and stats.exists():
        kept = read_stats(stats, key, folder)
        print(f"features of {folder} are read from {stats}", file=sys.stderr)
        return kept

    def score(rows: list[tuple[Path]], x: Tensor) -> Tensor:
        return features(metric.network, x)

    parts = []
    for rows, pictures in read_batches(
        [(path,) for path in paths], batch, device, str(folder), failures
    ):
        found, _ = measure(score, rows, pictures, failures)
        parts += found
    if sum(map(len, parts)) < 2:
        return None

    f = torch.cat(parts)
    mean, cov = statistics(f)
    if stats and len(f) == len(paths):
        write_stats(stats, key, f, mean, cov)
    return f, mean, cov


def stats_key(paths: list[Path], metric: metrics.MetricNetwork) -> str:
    """A hash of all that the features depend on."""
    lines = [metric.hash, CLEAN]
    for path in paths:
        facts = path.stat()
        lines.append(f"{path.name} {facts.st_size} {facts.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_stats(stats: Path, key: str, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Features, mean and covariance of a --stats file."""
    try:
        with np.load(stats) as file:  # without pickle, so it runs no code
            found = str(file["key"])
            arrays = [torch.from_numpy(file[name]) for name in ("features", "mu", "sigma")]
    except Exception as error:  # zipfile and numpy raise errors of their own
        raise ValueError(
            f"{stats} is not a file of --stats ({training.first_line(error)}); name another file"
        ) from None
    if found != key:
        raise ValueError(
            f"{stats} is stale: {folder} holds other pictures (names, sizes or dates), or the"
            " Inception weights have changed; remove it, or name another file"
        )
    return tuple(arrays)


def write_stats(stats: Path, key: str, f: Tensor, mean: Tensor, cov: Tensor) -> None:
    def write(path: Path) -> None:
        with path.open("wb") as file:  # given a name, savez would add .npz to it
            np.savez(file, key=key, features=f.numpy(), mu=mean.numpy(), sigma=cov.numpy())

    training.write_file(stats, write)


def read_captions(path: Path, fake: list[Path]) -> list[str]:
    """The caption of each generated picture, found by its file name or by its stem."""
    prompts = folders.read_prompts(path)
    if prompts is None:
        raise ValueError(
            f'{path} does not exist; expected a JSON file {{"file name": "caption"}}'
        )
    stems = {Path(name).stem: caption for name, caption in prompts.items()}
    captions = []
    for picture in fake:
        by_stem = stems.get(folders.composed(picture.stem))
        captions.append(prompts.get(folders.composed(picture.name), by_stem))
    if None in captions:
        first = fake[captions.index(None)]
        raise ValueError(
            f"{path} has no caption for {first.name} ({captions.count(None)} of {len(fake)} have"
            " none); expected one for every picture of --fake"
        )
    broken = [caption for caption in captions if not is_utf8(caption)]
    if broken:
        raise ValueError(
            f"{path}: {broken[0]!r:.60} contains a lone surrogate (half a character); expected"
            " text that can be encoded as UTF-8"
        )
    return captions


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded. JSON may hold lone surrogates, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --------------------------------------------------------------------------------- command line

@dataclass(frozen=True)
class Options:
    """The command line: one flag per field, whose comment is its help text."""

    real: Path | None = None  # folder of real pictures (for structure: of inputs)
    fake: Path | None = None  # folder of generated pictures
    paired: bool = False  # pictures of the same stem are pairs; one without a partner is an error
    metrics: str | None = None  # names with commas: fid,kid,structure,lpips,clip,psnr,ssim
    captions: Path | None = None  # JSON, {"file name": "caption"}, of the generated pictures
    stats: Path | None = None  # keep what FID and KID need of --real in this file, or read it
    json: bool = False  # print JSON in place of the table
    seed: int = 0  # random seed of KID's subsets
    batch: int = 16  # pictures at a time
    device: str = "auto"  # auto, cpu, cuda, mps

    @property
    def asked(self) -> list[str] | None:
        """The metrics asked for by name; None for all that are possible."""
        if self.metrics is None:
            return None
        return self.metrics.replace(" ", "").split(",")


@dataclass(frozen=True)
class Choice:
    """The metrics to compute, the pairs for them, and why others are left out."""

    names: list[str]
    pairs: list[tuple[Path, Path]]
    skipped: dict[str, str]


def parse(argv: list[str] | None = None) -> Options:
    parser = training.build_parser(Options, aliases={}, description=__doc__)
    options = Options(**training.given_values(parser, argv))
    check(options)
    return options


def check(options: Options) -> None:
    """ValueError for a flag that is missing, wrong, or without a meaning for these metrics."""
    if options.fake is None:
        raise ValueError("--fake is missing; expected a folder of generated pictures")
    for name in options.asked or []:
        if name not in METRICS:
            near = difflib.get_close_matches(name.lower(), METRICS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {','.join(METRICS)}"
            raise ValueError(f"there is no metric '{name}'; {hint}")
    if options.real is None and options.asked != ["clip"]:
        raise ValueError("--real is missing; expected a folder of pictures to compare with")

    users = {"captions": {"clip"}, "stats": {"fid", "kid"}, "paired": PAIRED}
    for flag, names in users.items():
        if getattr(options, flag) and options.asked and not names & set(options.asked):
            raise ValueError(
                f"--{flag} has no meaning for --metrics {','.join(options.asked)}; leave it out"
            )
    if options.stats and not options.stats.parent.is_dir():
        raise ValueError(
            f"--stats {options.stats}: there is no folder {options.stats.parent}; make it first"
        )


def choose(
    options: Options,
    real: list[Path],
    fake: list[Path],
    failures: Failures,
) -> Choice:
    """Which metrics to compute. ValueError if one was asked for that is not possible."""
    wanted = options.asked or list(METRICS)
    pairs = []
    reasons = {}
    if PAIRED & set(wanted):
        try:
            pairs = match(real, fake, failures, are_pairs=bool(options.paired or options.asked))
        except ValueError as error:
            if options.paired or options.asked:
                raise
            reasons = dict.fromkeys(PAIRED, f"the folders are not pairs ({error})")
    if "clip" in wanted and options.captions is None:
        reasons["clip"] = "it needs --captions"
    if {"fid", "kid"} & set(wanted) and min(len(real), len(fake)) < 2:
        reasons |= dict.fromkeys(("fid", "kid"), "it takes two pictures or more in each folder")

    refused = [f"{name} cannot be computed: {reasons[name]}" for name in wanted if name in reasons]
    if options.asked and refused:
        raise ValueError("; ".join(refused))
    if not options.asked:
        reasons |= missing_weights(set(METRICS) - set(reasons))

    names = [name for name in METRICS if name in wanted and name not in reasons]
    skipped = {name: reasons[name] for name in METRICS if name in reasons}
    return Choice(names, pairs, skipped)


def missing_weights(names: set[str]) -> dict[str, str]:
    """Why some of these metrics cannot be computed without a download."""
    reasons = {}
    for name in names:
        network = METRICS[name].network
        if network is not None and not metrics.has_metric_network(network):
            reasons[name] = (
                f"the weights of {network} are not on this machine; --metrics {name} fetches them"
            )
    return reasons


def compute(
    options: Options,
    choice: Choice,
    real: list[Path],
    fake: list[Path],
    device: torch.device,
    failures: Failures,
) -> dict[str, dict]:
    """For each chosen metric its value, standard deviation, and all that it depends on.

    Metrics that could not be computed for any picture are missing.
    """
    captions = read_captions(options.captions, fake) if "clip" in choice.names else []
    networks = load_networks(choice.names, device)

    values = {}
    notes = {}
    counts = {}
    if {"fid", "kid"} & set(choice.names):
        values, notes, count = compare_folders(
            options, choice, real, fake, networks["inception"], device, failures
        )
        counts = dict.fromkeys(values, count)
    values |= compare_pairs(options, choice, networks, device, failures)
    if "clip" in choice.names:
        values |= score_captions(options, fake, captions, networks["clip"], device, failures)
        notes["clip"] = describe_cut(networks["clip"].tokenizer, captions)

    results = {}
    for name in choice.names:
        if name not in values:
            continue
        metric = METRICS[name]
        found = values[name].double()
        remarks = [notes.get(name), failures.metrics.get(name)]
        value, deviation = mean_and_deviation(found)
        if value is None:
            equal = int(found.isinf().sum())
            mean = found[~found.isinf()].mean().item()
            others = f"; the others' mean is {mean:.5g}" if equal < len(found) else ""
            remarks.insert(0, f"infinite: {equal} of {len(found)} pairs are equal{others}")
        results[name] = dict(
            value=value,
            deviation=deviation,
            better=metric.better,
            n=counts.get(name, dict(pairs=len(found))),
            seed=options.seed if name == "kid" else None,
            weights=networks[metric.network].hash if metric.network else None,
            network=metric.description,
            preparation=metric.preparation,
            note="; ".join(filter(None, remarks)) or None,
        )
    return results


def load_networks(names: list[str], device: torch.device) -> dict[str, metrics.MetricNetwork]:
    """The metric networks that these metrics need, each once."""
    needed = {METRICS[name].network for name in names} - {None}
    return {network: metrics.load_metric_network(network, str(device)) for network in needed}


def compare_folders(
    options: Options,
    choice: Choice,
    real: list[Path],
    fake: list[Path],
    metric: metrics.MetricNetwork,
    device: torch.device,
    failures: Failures,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, int]]:
    """FID [1] and KID [subsets], those of them that were chosen.

    Also notes on them, and how many pictures of each folder they are computed from.
    """
    computed = []
    for paths, stats in ((real, options.stats), (fake, None)):
        found = folder_features(paths, metric, options.batch, device, stats, failures)
        if found is None:
            reason = f"needs two pictures that can be read in {paths[0].parent}"
            failures.metrics.update(dict.fromkeys({"fid", "kid"} & set(choice.names), reason))
            return {}, {}, {}
        computed.append(found)

    (real_features, *real_stats), (fake_features, *fake_stats) = computed
    n = min(len(real_features), len(fake_features))
    length = real_features.shape[1]

    values = {}
    notes = {}
    if "fid" in choice.names:
        distance = frechet_distance(*real_stats, *fake_stats)
        values["fid"] = torch.tensor([distance], dtype=torch.float64)
        if n < length:
            notes["fid"] = (
                f"N = {n} is below the {length} features: the covariance is not of full rank, and"
                " FID is too high, more so the smaller N; compare FIDs of equal N, or KID, which is"
                " unbiased"
            )
    if "kid" in choice.names:
        generator = torch.Generator().manual_seed(options.seed)
        values["kid"] = kid(real_features, fake_features, generator)
        notes["kid"] = "of all pictures"
        if len(values["kid"]) > 1:
            notes["kid"] = f"{len(values['kid'])} random subsets of {min(n, 1000)} pictures"
    return values, notes, dict(real=len(real_features), fake=len(fake_features))


@torch.no_grad()
def compare_pairs(
    options: Options,
    choice: Choice,
    networks: dict[str, metrics.MetricNetwork],
    device: torch.device,
    failures: Failures,
) -> dict[str, Tensor]:
    """The chosen metrics of pairs, one value for each pair that they could be computed for."""

    def score_by(name: str) -> Callable[..., Tensor]:
        def score(rows: list[tuple[Path, Path]], a: Tensor, b: Tensor) -> Tensor:
            if name == "psnr":
                return psnr(a, b)
            if name == "ssim":
                return ssim(a, b)
            if name == "lpips":
                return networks["lpips"].network(a, b)
            return dino.structure_distance(networks["dino"].network, a, b)

        return score

    names = [name for name in choice.names if name in PAIRED]
    values = {name: [] for name in names}
    reasons = {name: [] for name in names}
    for rows, pictures in read_batches(choice.pairs, options.batch, device, "pairs", failures):
        for name in names:
            found, why = measure(score_by(name), rows, pictures, failures)
            values[name] += found
            reasons[name] += why
    return gather(values, reasons, len(choice.pairs), failures)


def score_captions(
    options: Options,
    fake: list[Path],
    captions: list[str],
    metric: metrics.MetricNetwork,
    device: torch.device,
    failures: Failures,
) -> dict[str, Tensor]:
    """The CLIP scores of the generated pictures, as {"clip": [N]}."""
    caption_of = dict(zip(fake, captions))

    def score(rows: list[tuple[Path]], x: Tensor) -> Tensor:
        return clip_score(metric, x, [caption_of[path] for (path,) in rows])

    values = []
    reasons = []
    for rows, pictures in read_batches(
        [(path,) for path in fake], options.batch, device, "clip", failures
    ):
        found, why = measure(score, rows, pictures, failures)
        values += found
        reasons += why
    return gather(dict(clip=values), dict(clip=reasons), len(fake), failures)


def describe_cut(tokenizer: clip.Tokenizer, captions: list[str]) -> str | None:
    """How many captions are longer than the text encoder reads; None if none is."""
    cut = sum(len(ids) > tokenizer.limit for ids in tokenizer.encode(captions))
    if not cut:
        return None
    return (
        f"{cut} of {len(captions)} captions are longer than {tokenizer.length} tokens; what is"
        " beyond has no effect"
    )


def gather(
    values: dict[str, list[Tensor]],
    reasons: dict[str, list[str]],
    total: int,
    failures: Failures,
) -> dict[str, Tensor]:
    """The values of each metric in one tensor; what it has no value for goes to the failures."""
    for name, why in reasons.items():
        if why:
            listed = "; ".join(why)
            failures.metrics[name] = f"not computed for {len(why)} of {total}: {listed}"
    return {name: torch.cat(found) for name, found in values.items() if found}


def mean_and_deviation(values: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard deviation over KID's subsets or over pictures.

    The deviation of one value is None. Infinite values make both None, as JSON has no infinity.
    """
    if values.isinf().any():
        return None, None
    if len(values) < 2:
        return values.mean().item(), None
    return values.mean().item(), values.std().item()


def table(results: dict[str, dict]) -> str:
    """The results as aligned columns, and the notes below them."""
    header = "metric,value,deviation,better,N,seed,weights,network,image preparation"
    rows = [header.split(",")]
    for name, result in results.items():
        value = "inf" if result["value"] is None else f"{result['value']:.5g}"
        deviation = "-" if result["deviation"] is None else f"{result['deviation']:.3g}"
        count = ", ".join(f"{number} {of}" for of, number in result["n"].items())
        cells = [name, value, deviation, result["better"], count]
        cells.append("-" if result["seed"] is None else str(result["seed"]))
        cells += [result["weights"] or "-", result["network"] or "-", result["preparation"]]
        rows.append(cells)

    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    for name, result in results.items():
        if result["note"]:
            lines.append(f"{name}: {result['note']}")
    return "\n".join(lines)


def main() -> None:
    options = parse()
    device = training.pick_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # published features are computed in float32
    real = list_pictures(options.real) if options.real else []
    fake = list_pictures(options.fake)

    failures = Failures()
    choice = choose(options, real, fake, failures)
    left_out = [f"{name} is left out: {reason}" for name, reason in choice.skipped.items()]
    if not choice.names:
        print("\n".join(left_out), file=sys.stderr)
        raise ValueError(
            "no metric can be computed for these folders on this machine; the lines above say why"
        )
    results = compute(options, choice, real, fake, device, failures)

    problems = list(failures.pictures.values())
    incomplete = [f"{name}: {reason}" for name, reason in failures.metrics.items()]
    if options.asked or not results:
        problems += incomplete
    else:
        left_out += incomplete
    if not results:
        raise ValueError("; ".join(problems))

    for line in left_out:
        print(line, file=sys.stderr)
    if options.json:
        report = dict(
            real=str(options.real) if options.real else None,
            fake=str(options.fake),
            metrics=results,
            skipped=choice.skipped,
            failed=problems,
        )
        print(json.dumps(report, indent=1))
    else:
        print(table(results))
    if problems:
        raise ValueError("; ".join(problems))


if __name__ == "__main__":
    training.run_script(main)
