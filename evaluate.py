"""Judges made pictures: FID and KID between two folders, DINO structure, LPIPS, PSNR and SSIM of pairs, CLIP score.

    python evaluate.py --real FOLDER --fake FOLDER                       # every metric that can be had here
    python evaluate.py --real FOLDER --fake FOLDER --paired              # pictures of the same stem are pairs
    python evaluate.py --real FOLDER --fake FOLDER --metrics fid,kid --stats real.npz --json
    python evaluate.py --fake FOLDER --metrics clip --captions captions.json

Without --metrics, a metric whose weights are not on this machine, or that has no meaning for these folders, is left out
and stderr says why; one asked for by name is computed (its weights are fetched) or is an error. Without --paired,
folders whose stems are all the same are taken as pairs.

For trainers: the functions take pictures [B, 3, H, W] in [-1, 1] and round them to 8 bits, as a file has them (LPIPS
alone does not), so that validation and this script give the same number (on a GPU up to TF32, which trainers allow)."""

import argparse
import difflib
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

CLEAN = "each channel to 299x299 as float, Pillow bicubic, clipped; (x - 128) / 128 (clean-fid)"
METRICS = {  # name: its judge in weights.py, the network and what is taken of it, what is better, image preparation
    "fid": ("inception", "Inception 2015, pool3", "lower", CLEAN),
    "kid": ("inception", "Inception 2015, pool3", "lower", CLEAN),
    "structure": ("dino", "DINO ViT-B/8, last keys", "lower", "short side 224, Pillow bilinear; ImageNet mean/std"),
    "lpips": ("lpips", "VGG16, LPIPS v0.1", "lower", "full size, [-1, 1]"),
    "clip": ("clip", "CLIP ViT-B/32", "higher", "short side 224, Pillow bicubic, centre crop; CLIP mean/std"),
    "psnr": (None, None, "higher", "full size, 0 to 255, all channels together"),
    "ssim": (None, None, "higher", "full size, [0, 1], mean of channels; Gaussian window 11, sigma 1.5, no padding"),
}
PAIRED = {"structure", "lpips", "psnr", "ssim"}


# --------------------------------------------------------------------------------------------------------- the metrics

def as_levels(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures -> 0 to 255, rounded, in float64; on the CPU: not every device has that."""
    if a.shape != b.shape:
        raise ValueError(f"pictures of shapes {list(a.shape)} and {list(b.shape)} are no pairs; make them equal")
    return tuple(((x.detach().cpu().double().clamp(-1, 1) + 1) * 127.5).round() for x in (a, b))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """10 log10(255^2 / mean squared difference) in dB, [B]; infinite where the pictures are equal."""
    a, b = as_levels(a, b)
    return 10 * torch.log10(255 ** 2 / (a - b).square().mean((1, 2, 3)))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity [B] (Wang et al. 2004, equation 13) at full size, mean over channels and places: Gaussian
    window of 11 x 11 with sigma 1.5 where it lies in the picture, K = 0.01 and 0.03."""
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM was given pictures of {a.shape[3]}x{a.shape[2]}; its window takes 11 pixels a side")
    window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64) ** 2 / (2 * 1.5 ** 2))
    window /= window.sum()

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, 1, 11)), window.view(1, 1, 11, 1))

    x, y = (p.flatten(0, 1).unsqueeze(1) / 255 for p in as_levels(a, b))  # [3 B, 1, H, W]
    mx, my, c1, c2 = mean(x), mean(y), 0.01 ** 2, 0.03 ** 2
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    index = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return index.unflatten(0, (-1, 3)).mean((1, 2, 3, 4))


def fid(network: nn.Module, real: Iterable[Tensor], fake: Iterable[Tensor], device: torch.device) -> float:
    """FID of pictures [3, H, W] of any sizes, which go through Inception one at a time."""
    statistics_of = [statistics(torch.cat([features(network, x[None].to(device)) for x in pictures]))
                     for pictures in (real, fake)]
    return frechet_distance(*statistics_of[0], *statistics_of[1])


@torch.no_grad()
def features(network: nn.Module, x: Tensor) -> Tensor:
    """Pictures -> Inception's features [B, 2048], float32, on the CPU."""
    return network(inception.prepare(x)).float().cpu()


def statistics(f: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D], two rows or more -> mean [D] and unbiased covariance [D, D], float64."""
    if len(f) < 2 or not f.isfinite().all():
        raise ValueError(f"statistics were asked of {len(f)} features; expected two or more, and all of them finite")
    return f.double().mean(0), torch.cov(f.double().T)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2)) in float64 (Heusel et al. 2017).

    With S = A A^T the last root's trace is the sum of the singular values of A1^T A2: no root of a rounded zero is
    taken, and fewer pictures than features only make A narrower."""
    roots = []
    for cov in (cov1.double(), cov2.double()):
        values, vectors = torch.linalg.eigh(cov)
        kept = values > len(values) * torch.finfo(torch.float64).eps * values.max()  # the others are rounding
        roots.append(vectors[:, kept] * values[kept].sqrt())
    root = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return ((mean1 - mean2).double().square().sum() + cov1.trace() + cov2.trace() - 2 * root).clamp(min=0).item()


def kid(f1: Tensor, f2: Tensor, generator: torch.Generator, subsets: int = 100, size: int = 1000) -> Tensor:
    """Squared MMD of features [N, D] with the kernel (x.y / D + 1)^3, unbiased, of pairs of random subsets of `size`
    (or as many as there are) -> [subsets], whose mean is the KID (Binkowski et al. 2018)."""
    n = min(size, len(f1), len(f2))
    if n < 2:
        raise ValueError(f"KID was given {len(f1)} and {len(f2)} features; expected two or more of each")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    values = []
    for _ in range(1 if n == len(f1) == len(f2) else subsets):  # where a subset is the whole, one
        x, y = (f[torch.randperm(len(f), generator=generator)[:n]].double() for f in (f1, f2))
        within = sum((k.sum() - k.trace()) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
        values.append(within - 2 * kernel(x, y).mean())
    return torch.stack(values)


def clip_pixels(x: Tensor, size: int = 224) -> Tensor:
    """Pictures -> pixels [B, 3, size, size] as CLIP's own preprocessing makes them of an 8-bit picture: short side to
    `size` by Pillow's bicubic, centre crop, normalised. (The trainers' loss stretches: `clip.prepare`.)"""
    cropped = []
    for picture in map(to_picture, x):
        W, H = picture.size
        w, h = size * W // min(W, H), size * H // min(W, H)
        left, top = round((w - size) / 2), round((h - size) / 2)
        resized = picture.resize((w, h), Image.Resampling.BICUBIC)
        cropped.append(to_tensor(resized.crop((left, top, left + size, top + size))))
    return clip.normalise(torch.stack(cropped).to(x) * 2 - 1)


@torch.no_grad()
def clip_score(judge: metrics.MetricNetwork, x: Tensor, captions: list[str]) -> Tensor:
    """100 times the cosine of each picture with its own caption, [B], negative ones as 0 (Hessel et al. 2021)."""
    captions = judge.network.embed_captions(judge.tokenizer(captions).to(x.device))
    pictures = judge.network.image(clip_pixels(x, judge.network.image.config.image_size))
    return 100 * F.cosine_similarity(pictures, captions).clamp(min=0)


# ------------------------------------------------------------------------------------------------------------ folders

def list_pictures(folder: Path) -> list[Path]:
    return [folder / name for name in folders.pictures_in(folder)]


def match(real: list[Path], fake: list[Path]) -> list[tuple[Path, Path]]:
    """Pairs of the same stem. ValueError where a picture is alone, not of its partner's size, or cannot be read."""
    stems = [{p.stem: p for p in paths} for paths in (real, fake)]
    for twin in (p for paths, known in zip((real, fake), stems) for p in paths if known[p.stem] != p):
        raise ValueError(f"{twin} shares its stem with another picture there; rename or remove one of them")
    if alone := sorted(stems[0].keys() ^ stems[1].keys()):
        path, other = (stems[0] | stems[1])[alone[0]], real if alone[0] in stems[1] else fake
        raise ValueError(f"{path} has no partner of its stem in {other[0].parent} ({len(alone)} of"
                         f" {len(real) + len(fake)} pictures are alone); expected the same stems in both folders")
    pairs = [(path, stems[1][path.stem]) for path in real]
    for pair in tqdm(pairs, desc="sizes", leave=False, disable=None):  # before networks are loaded
        a, b = ("{}x{}".format(*open_picture(path).size) for path in pair)
        if a != b:
            raise ValueError(f"{pair[0]} is {a} pixels and its partner {pair[1]} {b}; make them equal")
    return pairs


def read_batches(rows: list[tuple[Path, ...]], batch: int, device: torch.device, what: str) -> Iterator[list[Tensor]]:
    """The files, column by column, as pictures [B, 3, H, W] in [-1, 1]; B is up to `batch` neighbours of one size."""
    def load(row: tuple[Path, ...]) -> list[Tensor]:
        return [to_tensor(open_picture(path)) * 2 - 1 for path in row]

    with ThreadPoolExecutor() as pool:
        for first in tqdm(range(0, len(rows), batch), desc=what, unit="batch", leave=False, disable=None):
            loaded = pool.map(load, rows[first:first + batch])
            for _, group in itertools.groupby(loaded, key=lambda row: [x.shape for x in row]):
                yield [torch.stack(column).to(device) for column in zip(*group)]


def folder_features(paths: list[Path], judge: metrics.MetricNetwork, batch: int, device: torch.device,
                    stats: Path | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D] of the files, their mean and covariance. With `stats` they are kept in that file (features, mu,
    sigma), or read from it; ValueError where it was made of other pictures, Inception weights or preparation."""
    files = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths]
    key = hashlib.sha256("\n".join([judge.hash, CLEAN, *files]).encode()).hexdigest()
    if stats and stats.exists():
        try:
            with np.load(stats) as file:  # without pickle: no code
                found, *arrays = file["key"], *(torch.from_numpy(file[name]) for name in ("features", "mu", "sigma"))
        except Exception as error:  # zip and numpy have their own kinds
            raise ValueError(f"{stats} is not of --stats ({training.first_line(error)}); name another file") from None
        if str(found) != key:
            raise ValueError(f"{stats} is stale: {paths[0].parent} holds other pictures (names, sizes or dates), or the"
                             " Inception weights are others; remove it, or name another file")
        print(f"features of {paths[0].parent} are read from {stats}", file=sys.stderr)
        return tuple(arrays)
    batches = read_batches([(path,) for path in paths], batch, device, str(paths[0].parent))
    f = torch.cat([features(judge.network, x) for (x,) in batches])
    mean, cov = statistics(f)

    def write(path: Path) -> None:
        with path.open("wb") as file:  # savez would add .npz to a name
            np.savez(file, key=key, features=f.numpy(), mu=mean.numpy(), sigma=cov.numpy())

    if stats:
        training.write_file(stats, write)
    return f, mean, cov


def read_captions(path: Path, fake: list[Path]) -> list[str]:
    """The caption of each made picture, under its file name or one of the same stem."""
    prompts = folders.read_prompts(path)
    if prompts is None:
        raise ValueError(f'{path} does not exist; expected a JSON file {{"file name": "caption"}}')
    stems = {Path(name).stem: caption for name, caption in prompts.items()}
    found = [prompts.get(p.name, stems.get(p.stem)) for p in fake]
    if None in found:
        raise ValueError(f"{path} has no caption for {fake[found.index(None)].name} ({found.count(None)} of"
                         f" {len(fake)} have none); expected one for every picture of --fake")
    return found


# ------------------------------------------------------------------------------------------------------- command line

def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--real", type=Path, help="folder of true pictures (for structure: of inputs)")
    add("--fake", type=Path, required=True, help="folder of made pictures")
    add("--paired", action="store_true", help="pictures of the same stem are pairs: an error where one has no partner")
    add("--metrics", help=f"some of {','.join(METRICS)} [all that can be had]")
    add("--captions", type=Path, help='JSON, {"file name": "caption"}, of the made pictures')
    add("--stats", type=Path, help="keep what FID and KID need of the real folder in this file, or read it there")
    add("--json", action="store_true", help="print JSON in place of the table")
    add("--seed", type=int, default=0, help="of KID's subsets [0]")
    add("--batch", type=int, default=16, help="pictures at a time [16]")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    args = training.parse_args(parser, argv)
    args.metrics = args.metrics if args.metrics is None else args.metrics.replace(" ", "").split(",")
    for name in args.metrics or []:
        if name not in METRICS:
            near = difflib.get_close_matches(name.lower(), METRICS, n=1)
            raise ValueError(f"there is no metric '{name}'; "
                             + (f"did you mean {near[0]}?" if near else f"expected some of {','.join(METRICS)}"))
    if args.real is None and args.metrics != ["clip"]:
        raise ValueError("--real is missing; expected a folder of pictures to compare with")
    for flag, users in [("captions", {"clip"}), ("stats", {"fid", "kid"}), ("paired", PAIRED)]:
        if getattr(args, flag) and args.metrics and not users & set(args.metrics):
            raise ValueError(f"--{flag} has no meaning for --metrics {','.join(args.metrics)}; leave it out")
    if args.stats and not args.stats.parent.is_dir():
        raise ValueError(f"--stats {args.stats}: there is no folder {args.stats.parent}; make it first")
    return args


def choose(args: argparse.Namespace, real: list[Path], fake: list[Path]) -> tuple[list[str], list, dict[str, str]]:
    """Metrics to compute, the pairs for them, and why others are left out. ValueError where one was asked for."""
    asked, pairs, reasons = args.metrics or [*METRICS], [], {}
    if PAIRED & set(asked):
        try:
            pairs = match(real, fake)
        except ValueError as error:
            if args.paired or args.metrics:
                raise
            reasons = dict.fromkeys(PAIRED, f"the folders are no pairs ({error})")
    if "clip" in asked and args.captions is None:
        reasons["clip"] = "it needs --captions"
    if {"fid", "kid"} & set(asked) and min(len(real), len(fake)) < 2:
        reasons |= dict.fromkeys(("fid", "kid"), "it takes two pictures or more in each folder")
    if args.metrics and reasons:
        raise ValueError("; ".join(f"{name} cannot be computed: {reasons[name]}" for name in asked if name in reasons))
    for name, (judge, *_) in METRICS.items():
        if not args.metrics and judge and name not in reasons and not metrics.has_metric_network(judge):
            reasons[name] = f"the weights of {judge} are not on this machine; --metrics {name} fetches them"
    chosen = [name for name in METRICS if name in asked and name not in reasons]
    return chosen, pairs, {name: reasons[name] for name in METRICS if name in reasons}


def compute(args: argparse.Namespace, chosen: list[str], real: list[Path], fake: list[Path], pairs: list,
            device: torch.device) -> dict[str, dict]:
    """name -> value, its deviation over KID's subsets or over pictures, and all that it depends on."""
    captions = read_captions(args.captions, fake) if "clip" in chosen else []
    judges = {judge: metrics.load_metric_network(judge, str(device)) for judge in {METRICS[name][0] for name in chosen} - {None}}
    values, notes = {name: [] for name in chosen}, {}
    if {"fid", "kid"} & set(chosen):
        f1, *stats1 = folder_features(real, judges["inception"], args.batch, device, args.stats)
        f2, *stats2 = folder_features(fake, judges["inception"], args.batch, device)
        n, length = min(len(f1), len(f2)), f1.shape[1]
        if "fid" in chosen:
            values["fid"] = [torch.tensor([frechet_distance(*stats1, *stats2)], dtype=torch.float64)]
            if n < length:
                notes["fid"] = (f"N = {n} is below the {length} features: the covariance is not of full rank, FID is"
                                " too high, more so the smaller N; compare FIDs of equal N, or KID, which is unbiased")
        if "kid" in chosen:
            values["kid"] = [kid(f1, f2, torch.Generator().manual_seed(args.seed))]
            subsets = len(values["kid"][0])
            notes["kid"] = f"{subsets} random subsets of {min(n, 1000)} pictures" if subsets > 1 else "of all pictures"
    functions = dict(psnr=psnr, ssim=ssim, lpips=lambda a, b: judges["lpips"].network(a, b),
                     structure=lambda a, b: dino.structure_distance(judges["dino"].network, a, b))
    with torch.no_grad():
        for a, b in read_batches(pairs, args.batch, device, "pairs"):
            for name in PAIRED & set(chosen):
                values[name].append(functions[name](a, b).cpu())
        for (x,) in read_batches([(path,) for path, _ in zip(fake, captions)], args.batch, device, "clip"):
            done = sum(map(len, values["clip"]))
            values["clip"].append(clip_score(judges["clip"], x, captions[done:done + len(x)]).cpu())
    results = {}
    for name in chosen:
        (judge, network, better, preparation), found = METRICS[name], torch.cat(values[name]).double()
        if equal := int(found.isinf().sum()):  # JSON has no infinity
            notes[name] = f"infinite: {equal} of {len(found)} pairs are equal"
        results[name] = dict(
            value=None if equal else found.mean().item(),
            deviation=None if equal or len(found) < 2 else found.std().item(), better=better,
            n=dict(real=len(real), fake=len(fake)) if judge == "inception" else dict(pairs=len(found)),
            seed=args.seed, weights=judge and judges[judge].hash, network=network, preparation=preparation,
            note=notes.get(name))
    return results


def table(results: dict[str, dict]) -> str:
    rows = [("metric", "value", "deviation", "better", "N", "seed", "weights", "network", "image preparation")]
    for name, r in results.items():
        rows.append((name, "inf" if r["value"] is None else f"{r['value']:.5g}",
                     "-" if r["deviation"] is None else f"{r['deviation']:.3g}", r["better"],
                     ", ".join(f"{count} {what}" for what, count in r["n"].items()), str(r["seed"]),
                     r["weights"] or "-", r["network"] or "-", r["preparation"]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines + [f"{name}: {r['note']}" for name, r in results.items() if r["note"]])


def main() -> None:
    args = parse()
    device = training.pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # published features are float32's
    real, fake = list_pictures(args.real) if args.real else [], list_pictures(args.fake)
    chosen, pairs, skipped = choose(args, real, fake)
    for name, reason in skipped.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if not chosen:
        raise ValueError("no metric can be computed for these folders on this machine; the lines above say why")
    results = compute(args, chosen, real, fake, pairs, device)
    folders = dict(real=args.real and str(args.real), fake=str(args.fake))
    print(json.dumps(dict(**folders, metrics=results, skipped=skipped), indent=1) if args.json else table(results))


if __name__ == "__main__":
    training.run(main)
