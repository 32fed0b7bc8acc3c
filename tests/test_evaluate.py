"""evaluate.py's metrics agree with their definitions, and its command line says what was computed,
what was left out, and why."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from conftest import normal, randomise, relative
from PIL import Image
from torch import Tensor, nn

import evaluate
import training
from dataset.pictures import to_picture
from files import metrics, tokenizers
from models.clip import CLIP, TextConfig, VisionConfig
from models.dino import DINO, DINOConfig
from models.lpips import LPIPS

pytestmark = pytest.mark.usefixtures("one_thread")


class Corners(nn.Module):
    """Stands in for Inception: the mean colours of the four quarters, 12 features."""

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, 299, 299)
        return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


class Points(nn.Module):
    """Stands in for Inception: some pixels as they are, from the edges to the middle."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::149, ::149].flatten(1)


@pytest.fixture(scope="module")
def networks() -> dict[str, metrics.MetricNetwork]:
    """Small metric networks with random weights."""
    tokenizer = tokenizers.load_tokenizer("tiny")
    sides = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = TextConfig(
        **sides, vocab_size=tokenizer.pieces.get_vocab_size(), eos_token_id=tokenizer.end
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIP(VisionConfig(**sides, projection_dim=5), text)
        dino = DINO(DINOConfig(width=12, depth=2, heads=2))
        lpips = LPIPS()
    for network in (clip, dino, lpips):
        randomise(network).requires_grad_(False)
    return {
        "inception": metrics.MetricNetwork(Corners(), "1ncept"),
        "lpips": metrics.MetricNetwork(lpips, "l9195"),
        "dino": metrics.MetricNetwork(dino, "d1n0"),
        "clip": metrics.MetricNetwork(clip, "c119", tokenizer),
    }


@pytest.fixture
def available(networks, monkeypatch) -> dict[str, metrics.MetricNetwork]:
    """Puts the small networks in the place of the real ones. A test may remove or replace some."""
    here = dict(networks)

    def load(name: str, device: str = "cpu") -> metrics.MetricNetwork:
        if name not in here:
            raise ValueError(
                f"the weights of {name} are not here; expected https://example.org/{name}.pth"
            )
        return here[name]

    monkeypatch.setattr(metrics, "has_metric_network", lambda name: name in here)
    monkeypatch.setattr(metrics, "load_metric_network", load)
    return here


def picture(seed: int, width: int = 24, height: int = 20) -> Tensor:
    """A smooth picture with values between the 256 levels, [3, H, W] in [-1, 1]."""
    coarse = normal(1, 3, 4, 4, seed=seed)
    x = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return x.tanh().float()


def fill(folder: Path, pictures: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    for name, x in pictures.items():
        to_picture(x).save(folder / name)
    return folder


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Four pairs of two sizes. The partner of a .png may be a .bmp."""
    sizes = [(24, 20), (24, 20), (30, 18), (24, 20)]
    names = ["0.png", "1.bmp", "2.png", "3.png"]
    real = {f"{i}.png": picture(i, *size) for i, size in enumerate(sizes)}
    fake = {name: picture(10 + i, *sizes[i]) for i, name in enumerate(names)}
    return fill(tmp_path / "real", real), fill(tmp_path / "fake", fake)


@pytest.fixture
def command(available, tmp_path, monkeypatch, capsys):
    """`python evaluate.py ARGUMENTS` in this process: its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, arguments)])
        capsys.readouterr()
        try:
            training.run_script(evaluate.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def results(command):
    """`python evaluate.py ARGUMENTS --json`: the JSON that it printed."""

    def call(*arguments: object) -> dict:
        status, out, err = command(*arguments, "--json")
        assert status == 0, err
        return json.loads(out, parse_constant=pytest.fail)  # JSON has no infinity or NaN

    return call


def files(folder: Path) -> list[Tensor]:
    """The levels [3, H, W] of a folder's pictures, 0 to 255 in float64."""
    arrays = [np.array(Image.open(path)) for path in sorted(folder.iterdir())]
    return [torch.from_numpy(array).permute(2, 0, 1).double() for array in arrays]


def mean(values: list) -> float:
    return sum(map(float, values)) / len(values)


# -------------------- Frechet distance

def by_scipy(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy()).real
    return float(((mean1 - mean2) ** 2).sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root))


def correlated(n: int, d: int, seed: int) -> Tensor:
    """Features [n, d] that depend on each other, with a mean that is not 0."""
    mixing = normal(d, d, seed=100 + seed) / d**0.5
    return normal(n, d, seed=seed) @ mixing + normal(d, seed=200 + seed)


def test_statistics_are_the_mean_and_the_unbiased_covariance_in_float64():
    f = correlated(9, 4, 0).float() + 1000  # in float32, the covariance would be lost
    mean, cov = evaluate.statistics(f)
    assert mean.dtype == cov.dtype == torch.float64
    exact = f.numpy().astype(np.float64)
    assert relative(mean, torch.from_numpy(exact.mean(0))) < 1e-14
    assert relative(cov, torch.from_numpy(np.cov(exact, rowvar=False))) < 1e-12
    for bad in (f[:1], f.index_fill(0, torch.tensor([2]), math.nan)):
        with pytest.raises(ValueError, match="two or more, and all of them finite"):
            evaluate.statistics(bad)


def test_frechet_distance_agrees_with_scipy():
    a = evaluate.statistics(correlated(300, 40, 0))
    b = evaluate.statistics(correlated(200, 40, 1))
    assert evaluate.frechet_distance(*a, *b) == pytest.approx(by_scipy(*a, *b), rel=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features():
    """Here scipy takes roots of zeros that rounding made 1e-16, and is right to about 1e-6. The
    centred features themselves are factors of the covariances and give the exact trace."""
    x = correlated(15, 40, 0)
    y = correlated(12, 40, 1)
    a = evaluate.statistics(x)
    b = evaluate.statistics(y)
    ours = evaluate.frechet_distance(*a, *b)
    assert ours == pytest.approx(by_scipy(*a, *b), rel=1e-5)
    x_root, y_root = ((f - f.mean(0)).numpy() / (len(f) - 1) ** 0.5 for f in (x, y))
    trace = scipy.linalg.svdvals(x_root @ y_root.T).sum()
    between_means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    exact = float(between_means + a[1].trace() + b[1].trace()) - 2 * trace
    assert ours == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("n", [300, 12], ids=["full rank", "rank 11"])
def test_frechet_distance_to_itself_is_zero(n):
    a = evaluate.statistics(correlated(n, 40, 0))
    assert 0 <= evaluate.frechet_distance(*a, *a) < 1e-11 * a[1].trace()


def test_frechet_distance_of_known_gaussians():
    """For covariances that commute it is |m1 - m2|^2 + the sum of (s1 - s2)^2. Some variances
    here are zero."""
    axes = torch.linalg.qr(normal(7, 7))[0]
    s1 = torch.tensor([1, 2, 3, 0, 0.5, 0, 1e-3], dtype=torch.float64)
    s2 = torch.tensor([4, 2, 0, 1, 0.1, 0, 2], dtype=torch.float64)
    m1 = torch.zeros(7, dtype=torch.float64)
    m2 = torch.tensor([0, 0, 3, 0, 4, 0, 0], dtype=torch.float64)
    cov1 = (axes * s1**2) @ axes.T
    cov2 = (axes * s2**2) @ axes.T
    expected = 25 + 9 + 0 + 9 + 1 + 0.16 + 0 + 1.999**2
    assert evaluate.frechet_distance(m1, cov1, m2, cov2) == pytest.approx(expected, rel=1e-10)
    zero = torch.zeros(7, 7).double()  # all pictures of a folder are equal
    assert evaluate.frechet_distance(m1, zero, m2, zero) == pytest.approx(25)


# -------------------- KID

def mmd(x: Tensor, y: Tensor) -> float:
    """Squared MMD, unbiased, pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return (sum(float(u) * float(v) for u, v in zip(a, b)) / len(a) + 1) ** 3

    def within(rows: Tensor) -> float:
        n = len(rows)
        values = [k(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j]
        return sum(values) / (n * (n - 1))

    between = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * between


def test_kid_is_its_double_sum():
    x = normal(7, 5)
    y = normal(7, 5, seed=1) + 0.5
    values = evaluate.kid(x.float(), y.float(), torch.Generator().manual_seed(0))
    # One value, as all 100 subsets would be the same.
    assert values.dtype == torch.float64 and values.shape == (1,)
    assert values.item() == pytest.approx(mmd(x.float(), y.float()), rel=1e-12)


def test_kid_takes_random_subsets_of_both_sides_without_repetition():
    x = torch.arange(6.0).view(6, 1)
    y = torch.arange(10.0, 14).view(4, 1)
    possible = set()
    for i, j in itertools.combinations(range(6), 2):
        for k, m in itertools.combinations(range(4), 2):
            possible.add(mmd(x[[i, j]], y[[k, m]]))
    assert len(possible) == 15 * 6

    def kid(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return evaluate.kid(x, y, generator, subsets=1000, size=2)

    values = kid(0)
    found = [min(possible, key=lambda p: abs(p - v)) for v in values.tolist()]
    assert found == pytest.approx(values.tolist(), rel=1e-9) and set(found) == possible
    assert torch.equal(values, kid(0))
    assert not torch.equal(values, kid(1))
    assert len(evaluate.kid(x, y, torch.Generator())) == 100  # subsets of 4
    with pytest.raises(ValueError, match="1 and 4 features; expected two or more"):
        evaluate.kid(x[:1], y, torch.Generator())


def test_kid_is_unbiased():
    """For one distribution its mean is 0, whatever N. With the diagonal of the kernel matrix it
    would be about 0.5 at N = 10."""
    values = []
    for i in range(600):
        x = normal(10, 8, seed=2 * i)
        y = normal(10, 8, seed=2 * i + 1)
        values.append(evaluate.kid(x, y, torch.Generator())[0])
    values = torch.stack(values)
    error = (values.std() / len(values) ** 0.5).item()
    assert abs(values.mean().item()) < 4 * error < 0.1
    assert evaluate.kid(normal(100, 8), normal(100, 8, seed=1) + 1, torch.Generator()).item() > 1


# -------------------- pairs of pictures

def flat(*levels: float) -> Tensor:
    """A picture of one colour, given as levels 0 to 255 of its channels: [1, 3, 12, 12]."""
    return torch.tensor(levels).view(1, -1, 1, 1).expand(1, 3, 12, 12) / 127.5 - 1


def test_psnr_by_hand():
    a = torch.cat([flat(0.0), flat(100.0), flat(50.0), flat(0.0)])
    b = torch.cat([flat(255.0), flat(101.0), flat(50.0, 50.0, 53.0), flat(0.0)])
    expected = [0, 20 * math.log10(255), 20 * math.log10(255 / 3**0.5), math.inf]
    assert evaluate.psnr(a, b).tolist() == pytest.approx(expected, abs=1e-9)
    assert evaluate.psnr(flat(10.4), flat(9.6)).item() == math.inf  # a file has 8 bits
    assert evaluate.psnr(flat(255.0) + 9, flat(0.0) - 9).item() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="are not pairs"):
        evaluate.psnr(a, b[:1])


def test_ssim_by_hand():
    """For flat pictures only brightness counts: (2 x y + 0.01^2) / (x^2 + y^2 + 0.01^2) for each
    channel."""
    x = 51 / 255
    ys = (102 / 255, 51 / 255, 204 / 255)
    expected = mean([(2 * x * y + 1e-4) / (x * x + y * y + 1e-4) for y in ys])
    value = evaluate.ssim(flat(51.0), flat(102.0, 51.0, 204.0)).item()
    assert value == pytest.approx(expected, abs=1e-12)
    a = picture(0)[None]
    assert evaluate.ssim(a, a).item() == pytest.approx(1, abs=1e-12)
    assert evaluate.ssim(a, -a).item() < 0.1
    with pytest.raises(ValueError, match="24x10; its window takes 11"):
        evaluate.ssim(a[:, :, :10], a[:, :, :10])


def test_ssim_agrees_with_scipys_gaussian_filters():
    a = torch.stack([picture(i, 31, 19) for i in range(3)])
    b = a * 0.7 + 0.3 * torch.stack([picture(9 + i, 31, 19) for i in range(3)])

    def blur(x: np.ndarray) -> np.ndarray:
        # truncate cuts the window off at 5 pixels to each side.
        return scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    def index(x: np.ndarray, y: np.ndarray) -> float:
        """SSIM of one channel."""
        mx = blur(x)
        my = blur(y)
        vx = blur(x * x) - mx**2
        vy = blur(y * y) - my**2
        vxy = blur(x * y) - mx * my
        brightness = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
        contrast = (2 * vxy + 0.03**2) / (vx + vy + 0.03**2)
        return (brightness * contrast).mean()

    expected = []
    for pair in zip(a, b):
        x, y = (np.asarray(to_picture(p)) / 255 for p in pair)
        expected.append(mean([index(x[:, :, c], y[:, :, c]) for c in range(3)]))
    assert evaluate.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_validation_in_memory_gives_the_numbers_of_the_script_on_the_saved_pictures(
    results, networks, tmp_path
):
    a = torch.stack([picture(i) for i in range(4)])
    b = torch.stack([picture(50 + i) for i in range(4)])
    fill(tmp_path / "real", {f"{i}.png": x for i, x in enumerate(a)})
    fill(tmp_path / "fake", {f"{i}.png": x for i, x in enumerate(b)})
    captions = {f"{i}.png": "red circle" for i in range(4)}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    found = results("--real", "real", "--fake", "fake", "--captions", "captions.json")["metrics"]
    values = {name: metric["value"] for name, metric in found.items()}

    inception = networks["inception"].network
    f = evaluate.features(inception, a)
    g = evaluate.features(inception, b)
    fid = evaluate.frechet_distance(*evaluate.statistics(f), *evaluate.statistics(g))
    kid = evaluate.kid(f, g, torch.Generator())
    score = evaluate.clip_score(networks["clip"], b, ["red circle"] * 4)
    assert values["fid"] == pytest.approx(fid, rel=1e-10)
    one_by_one = evaluate.fid(inception, a, b, torch.device("cpu"))
    assert one_by_one == pytest.approx(fid, rel=1e-4)
    assert values["kid"] == pytest.approx(kid.item(), rel=1e-10)
    assert values["psnr"] == pytest.approx(evaluate.psnr(a, b).mean().item(), rel=1e-9)
    assert values["ssim"] == pytest.approx(evaluate.ssim(a, b).mean().item(), rel=1e-9)
    assert values["clip"] == pytest.approx(score.mean().item(), rel=1e-5)


# -------------------- what the networks see

def test_inception_sees_the_preparation_of_clean_fid(tmp_path):
    """Each channel goes as floats through Pillow's bicubic filter and is clipped but not rounded,
    whatever the file's mode."""
    checks = np.indices((40, 52)).sum(0) % 2 * 255  # the filter overshoots
    (tmp_path / "real").mkdir()
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "real" / "grey.png")
    to_picture(picture(0, 640, 351)).save(tmp_path / "real" / "large.jpg")
    to_picture(picture(1, 8, 9)).save(tmp_path / "real" / "small.gif")
    paths = evaluate.list_pictures(tmp_path / "real")
    network = metrics.MetricNetwork(Points(), "0")
    cpu = torch.device("cpu")
    f, mean, cov = evaluate.folder_features(paths, network, batch=2, device=cpu)

    def resize(channel: Image.Image) -> np.ndarray:
        floats = Image.fromarray(np.asarray(channel, dtype=np.float32))
        return np.asarray(floats.resize((299, 299), Image.BICUBIC))

    rows = []
    for path in paths:
        channels = Image.open(path).convert("RGB").split()
        resized = np.stack([resize(channel) for channel in channels])
        pixels = (resized.clip(0, 255) - 128) / 128
        rows.append(pixels[:, ::149, ::149].flatten())
    expected = torch.from_numpy(np.stack(rows))
    assert f.shape == (3, 27) and (f.abs() > 0.99).any()
    assert relative(f, expected) < 1e-6
    assert relative(mean, expected.double().mean(0)) < 1e-6
    assert relative(cov, torch.cov(expected.double().T)) < 1e-5


def short_side_224(width: int, height: int) -> tuple[int, int]:
    if width <= height:
        return 224, int(224 * height / width)
    return int(224 * width / height), 224


def as_picture(x: Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).byte().numpy())


def normalised(picture: Image.Image, mean: list[float], std: list[float]) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_structure_is_the_mean_over_pairs_of_what_dino_sees(results, folders, networks):
    network = networks["dino"].network

    def self_similarity(x: Tensor) -> Tensor:
        picture = as_picture(x)
        picture = picture.resize(short_side_224(*picture.size), Image.BILINEAR)
        pixels = normalised(picture, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        with torch.no_grad():
            keys = network.keys(pixels[None])[0]
        return torch.stack([torch.cosine_similarity(key[None], keys) for key in keys])

    expected = []
    for a, b in zip(*map(files, folders)):
        expected.append((self_similarity(a) - self_similarity(b)).square().mean())
    arguments = ("--real", folders[0], "--fake", folders[1], "--metrics", "structure")
    found = results(*arguments)["metrics"]["structure"]
    assert found["value"] == pytest.approx(mean(expected), rel=1e-4) and found["n"] == {"pairs": 4}
    assert found["deviation"] == pytest.approx(torch.stack(expected).std().item(), rel=1e-3)


def test_lpips_is_the_mean_over_pairs(results, folders, networks):
    expected = []
    for a, b in zip(*map(files, folders)):
        x = a[None].float() / 127.5 - 1
        y = b[None].float() / 127.5 - 1
        with torch.no_grad():
            expected.append(networks["lpips"].network(x, y))
    arguments = ("--real", folders[0], "--fake", folders[1], "--metrics", "lpips")
    found = results(*arguments)["metrics"]["lpips"]
    assert found["value"] == pytest.approx(mean(expected), rel=1e-5)


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(results, networks, tmp_path):
    """The preparation is OpenAI's: short side 224 by Pillow's bicubic filter, centre crop, mean and
    standard deviation. Captions are found by file name or by stem."""
    sizes = [(300, 250), (300, 250), (40, 61), (224, 224), (500, 224), (33, 33)]
    pictures = {f"{i}.png": picture(i, *size) for i, size in enumerate(sizes)}
    folder = fill(tmp_path / "fake", pictures)
    network = networks["clip"].network
    words = [
        "red circle",
        "blue circle with green background",
        "circle",
        "a",
        "green",
        "yellow background",
    ]
    names = ["0.png", "1.png", "2.jpg", "3.png", "4.png", "5.png", "unused.png"]
    captions = dict(zip(names, [*words, "x"]))
    (tmp_path / "captions.json").write_text(json.dumps(captions))

    mean_colour = [0.48145466, 0.4578275, 0.40821073]
    std_colour = [0.26862954, 0.26130258, 0.27577711]
    cosines = []
    for x, word in zip(files(folder), words):
        image = as_picture(x)
        width, height = short_side_224(*image.size)
        left = round((width - 224) / 2)
        top = round((height - 224) / 2)
        image = image.resize((width, height), Image.BICUBIC)
        image = image.crop((left, top, left + 224, top + 224))
        with torch.no_grad():
            u = network.image(normalised(image, mean_colour, std_colour)[None])[0]
            v = network.embed_captions(networks["clip"].tokenizer([word]))[0]
        cosines.append(float((u / u.norm()) @ (v / v.norm())))
    assert min(cosines) < -0.01 and max(cosines) > 0.01, cosines

    arguments = ("--fake", folder, "--metrics", "clip", "--captions", "captions.json")
    found = results(*arguments)["metrics"]["clip"]
    assert found["value"] == pytest.approx(mean([100 * max(c, 0) for c in cosines]), rel=1e-4)
    assert found["n"] == {"pairs": 6} and found["weights"] == "c119"


# -------------------- command line

def test_json_says_how_each_number_came_about(results, folders):
    report = results("--real", folders[0], "--fake", folders[1], "--seed", 7)
    assert report["real"] == str(folders[0]) and report["fake"] == str(folders[1])
    assert list(report["metrics"]) == ["fid", "kid", "structure", "lpips", "psnr", "ssim"]
    assert report["skipped"] == {"clip": "it needs --captions"}
    hashes = {"fid": "1ncept", "kid": "1ncept", "structure": "d1n0", "lpips": "l9195"}
    for name, found in report["metrics"].items():
        weights = hashes.get(name)
        assert found["weights"] == weights and bool(found["network"]) == bool(weights)
        assert found["seed"] == (7 if name == "kid" else None)
        assert found["preparation"] and math.isfinite(found["value"])
        assert found["n"] == (dict(real=4, fake=4) if name in ("fid", "kid") else dict(pairs=4))
        assert found["better"] == ("higher" if name in ("psnr", "ssim") else "lower")
    expected = []
    for a, b in zip(*map(files, folders)):
        expected.append(10 * math.log10(255**2 / float((a - b).square().mean())))
    found = report["metrics"]["psnr"]
    assert found["value"] == pytest.approx(mean(expected), rel=1e-12)
    assert found["deviation"] == pytest.approx(np.std(expected, ddof=1), rel=1e-12)


def test_the_table_says_the_same(command, results, folders):
    arguments = ("--real", folders[0], "--fake", folders[1])
    metrics = results(*arguments)["metrics"]
    status, out, err = command(*arguments)
    assert status == 0 and err == "clip is left out: it needs --captions\n"
    header, *rows = out.splitlines()
    expected = "metric value deviation better N seed weights network image preparation"
    assert header.split() == expected.split()
    for row, (name, found) in zip(rows, metrics.items()):
        cells = re.split(r" {2,}", row)
        assert cells[0] == name and float(cells[1]) == pytest.approx(found["value"], rel=1e-4)
        assert cells[4] == ("4 real, 4 fake" if name in ("fid", "kid") else "4 pairs")
        facts = [found["weights"] or "-", found["network"] or "-", found["preparation"]]
        assert cells[5:] == ["0" if name == "kid" else "-", *facts]
    assert [row.split(":")[0] for row in rows[len(metrics) :]] == ["fid", "kid"]  # their notes


def test_fid_of_fewer_pictures_than_features_says_what_that_means(results, tmp_path):
    """The stand-in has 12 features; Inception has 2048."""
    for folder, n in (("real", 13), ("enough", 12), ("few", 11)):
        fill(tmp_path / folder, {f"{i}.png": picture(i, 8, 8) for i in range(n)})

    def note(fake: str) -> str | None:
        report = results("--real", "real", "--fake", fake, "--metrics", "fid")
        return report["metrics"]["fid"]["note"]

    few = note("few")
    assert "N = 11 is below the 12 features" in few
    assert "not of full rank" in few and "too high" in few
    assert "KID, which is unbiased" in few
    assert note("enough") is None


def test_kid_depends_on_the_seed_alone(results, tmp_path):
    fill(tmp_path / "real", {f"{i}.png": picture(i) for i in range(5)})
    fill(tmp_path / "fake", {f"{i}.png": picture(20 + i) for i in range(3)})
    arguments = ("--real", "real", "--fake", "fake", "--metrics", "kid")

    def kid(seed: int, batch: int) -> dict:
        return results(*arguments, "--seed", seed, "--batch", batch)["metrics"]["kid"]

    first = kid(seed=0, batch=16)
    assert first["value"] == pytest.approx(kid(seed=0, batch=2)["value"], rel=1e-6)
    assert first["value"] != kid(seed=1, batch=16)["value"]
    assert first["note"] == "100 random subsets of 3 pictures" and first["deviation"] > 0
    assert first["n"] == dict(real=5, fake=3)


def test_equal_pairs_have_no_finite_psnr_and_json_says_null(results, command, tmp_path):
    pictures = {f"{i}.png": picture(i) for i in range(3)}
    fill(tmp_path / "real", pictures)
    fill(tmp_path / "fake", pictures | {"2.png": picture(9)})
    found = results("--real", "real", "--fake", "fake", "--metrics", "psnr")["metrics"]["psnr"]
    assert found["value"] is None
    assert found["note"].startswith("infinite: 2 of 3 pairs are equal; the others' mean is ")
    row = command("--real", "real", "--fake", "fake", "--metrics", "psnr")[1].splitlines()[1]
    assert row.split()[:3] == ["psnr", "inf", "-"]


def test_captions_longer_than_the_text_encoder_reads_are_counted(results, folders, networks):
    kept = networks["clip"].tokenizer.length - 2
    captions = {"0.png": "a " * kept, "1.bmp": "a " * kept + "red", "2.png": "a " * 999}

    def note() -> str | None:
        Path("c.json").write_text(json.dumps(captions))
        flags = ["--fake", folders[1], "--metrics", "clip", "--captions", "c.json"]
        return results(*flags)["metrics"]["clip"]["note"]

    captions["3.png"] = "red"
    assert note().startswith(f"2 of 4 captions are longer than {kept + 2} tokens")
    captions |= {"1.bmp": "red", "2.png": "a " * (kept - 1)}
    assert note() is None


def test_a_caption_of_half_a_character_is_refused_before_anything_is_measured(
    command, folders, networks
):
    captions = {"0.png": "red", "1.bmp": "\ud83d", "2.png": "red", "3.png": "red"}
    Path("c.json").write_text(json.dumps(captions))
    status, out, err = command("--fake", folders[1], "--metrics", "clip", "--captions", "c.json")
    assert (status, out) == (2, "") and "half a character" in err and err.count("\n") == 1


def first_words(rows: str) -> list[str]:
    return [row.split()[0] for row in rows.splitlines()]


def test_what_is_not_possible_is_left_out_with_its_reason(command, available, folders, tmp_path):
    del available["lpips"], available["dino"], available["clip"]
    (tmp_path / "captions.json").write_text(json.dumps({f"{i}.png": "red" for i in range(4)}))
    arguments = ("--real", folders[0], "--fake", folders[1], "--captions", "captions.json")
    status, out, err = command(*arguments)
    assert status == 0 and first_words(out)[1:5] == ["fid", "kid", "psnr", "ssim"]
    expected = set()
    for metric, network in (("lpips", "lpips"), ("structure", "dino"), ("clip", "clip")):
        expected.add(
            f"{metric} is left out: the weights of {network} are not on this machine;"
            f" --metrics {metric} fetches them"
        )
    assert set(err.splitlines()) == expected

    (folders[0] / "3.png").rename(folders[0] / "other.png")
    status, out, err = command(*arguments)
    assert status == 0 and first_words(out)[1:3] == ["fid", "kid"]
    alone = folders[1] / "3.png"
    for name in ("structure", "lpips", "psnr", "ssim"):
        reason = f"{name} is left out: the folders are not pairs ({alone} has no partner"
        assert reason in err

    del available["inception"]
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("evaluate.py: error: no metric can be computed")


def test_same_names_with_different_sizes_are_not_pairs_without_paired(command, folders):
    to_picture(picture(0, 10, 10)).save(folders[1] / "0.png")
    status, out, err = command("--real", folders[0], "--fake", folders[1])
    assert status == 0 and first_words(out)[1:3] == ["fid", "kid"]
    assert "psnr is left out: the folders are not pairs" in err
    assert "24x20 pixels and its partner" in err


# -------------------- pictures that fail

@pytest.mark.parametrize("content", [b"", b"not a picture", "cut short"])
def test_a_picture_that_cannot_be_read_is_left_out_of_all_figures_and_named(
    command, results, folders, tmp_path, content
):
    """The figures are those of the folders without it, whichever folder it lies in."""
    captions = {f"{i}.png": word for i, word in enumerate(("red", "a blue square", "a", "green"))}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    real, fake = folders
    names = ["--real", real, "--fake", fake, "--captions", "captions.json"]
    parts = [real / "1.png", fake / "1.bmp"]
    whole = [path.read_bytes() for path in parts]
    for path in parts:
        path.unlink()
    expected = results(*names)["metrics"]

    for bad in parts:
        for path, data in zip(parts, whole):
            path.write_bytes(data)
        bad.write_bytes(whole[0][: len(whole[0]) // 2] if content == "cut short" else content)
        status, out, err = command(*names, "--json")
        report = json.loads(out)
        assert status == 2 and err.count("\n") == 1 and err.count(str(bad)) == 1, err
        assert report["failed"][0].startswith(f"{bad} is not a")
        for name in ("psnr", "ssim", "lpips", "structure"):
            found = report["metrics"][name]
            assert found["value"] == pytest.approx(expected[name]["value"], rel=1e-5), name
            assert found["n"] == dict(pairs=3)
        assert report["metrics"]["fid"]["n"] == dict(
            real=3 + (bad != parts[0]), fake=3 + (bad != parts[1])
        )
        if bad == parts[1]:
            clip = report["metrics"]["clip"]
            assert clip["value"] == pytest.approx(expected["clip"]["value"], rel=1e-5)
            assert clip["n"] == dict(pairs=3)


@pytest.fixture
def uneven(tmp_path) -> list:
    """Pairs of several sizes. SSIM takes 11 pixels a side and LPIPS 16."""
    sizes = {"a": (24, 20), "b": (10, 40), "c": (15, 16), "d": (11, 11), "e": (16, 16), "f": (1, 1)}
    for folder, seed in (("real", 0), ("fake", 10)):
        pictures = {f"{name}.png": picture(seed, *size) for name, size in sizes.items()}
        fill(tmp_path / folder, pictures)
    return ["--real", "real", "--fake", "fake"]


TOO_SMALL = {"ssim": "bf", "lpips": "bcdf"}


@pytest.mark.parametrize("batch", [1, 16])
def test_a_metric_names_the_pairs_that_are_too_small_for_it(uneven, command, results, batch):
    arguments = [*uneven, "--batch", batch]
    found = results(*arguments)["metrics"]
    assert found["psnr"]["n"] == dict(pairs=6) and found["psnr"]["note"] is None
    assert {"fid", "kid", "structure"} < found.keys()
    status, _, err = command(*arguments)
    assert status == 0
    for name, small in TOO_SMALL.items():
        assert found[name]["n"] == dict(pairs=6 - len(small))
        assert f"not computed for {len(small)} of 6: fake/{small[0]}.png" in found[name]["note"]
        assert re.findall(r"fake/(.)", found[name]["note"]) == list(small)
        assert f"{name}: {found[name]['note']}" in err.splitlines()

    for name in small:
        for folder in ("real", "fake"):
            Path(folder, f"{name}.png").unlink()
    alone = results(*uneven)["metrics"]["lpips"]
    assert alone["value"] == pytest.approx(found["lpips"]["value"], rel=1e-5)
    assert alone["note"] is None


def test_a_metric_asked_for_that_some_pairs_are_too_small_for_ends_with_status_2(uneven, command):
    status, out, err = command(*uneven, "--metrics", "psnr,ssim,clip", "--captions", "c.json")
    assert status == 2 and out == ""  # there are no captions
    status, out, err = command(*uneven, "--metrics", "psnr,ssim")
    assert status == 2 and first_words(out)[1:3] == ["psnr", "ssim"]
    assert err.startswith("evaluate.py: error: ssim: not computed for 2 of 6: fake/b.png")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
])
@pytest.mark.parametrize("function", ["psnr", "ssim", "features", "clip_score"])
def test_a_picture_too_large_for_memory_is_left_out_and_named(
    function, error, command, folders, tmp_path, monkeypatch
):
    """The third pair is wider than the others."""
    (tmp_path / "c.json").write_text(json.dumps({f"{i}.png": "red" for i in range(4)}))
    compute = getattr(evaluate, function)

    def short_of_memory(*arguments):
        if any(isinstance(x, Tensor) and x.shape[-1] == 30 for x in arguments):
            raise error
        return compute(*arguments)

    monkeypatch.setattr(evaluate, function, short_of_memory)
    arguments = ["--real", folders[0], "--fake", folders[1], "--captions", "c.json"]
    status, out, err = command(*arguments, "--stats", "kept.npz")
    assert status == 2 and len(first_words(out)) >= 8, err
    assert f"{folders[1] / '2.png'} needs too much memory" in err.splitlines()[-1]
    # Statistics of a part of the pictures are not kept.
    assert Path("kept.npz").exists() == (function != "features")


def test_a_bug_keeps_its_traceback(command, folders, monkeypatch):
    def wrong(*arguments):
        raise RuntimeError("expected a tensor")

    monkeypatch.setattr(evaluate, "ssim", wrong)
    with pytest.raises(RuntimeError, match="expected a tensor"):
        command("--real", folders[0], "--fake", folders[1])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_that_stdout_cannot_say_are_printed_with_escapes(tmp_path, encoding):
    names = ["a", "\u0142\xf3d\u017a \u65e5\u672c", os.fsdecode(b"latin-\xe9")]
    for folder, seed in (("real", 0), ("fake", 10)):
        pictures = {f"{name}.png": picture(seed, 8, 8) for name in names[1:]}
        fill(tmp_path / folder, pictures | {"a.png": picture(seed)})
    flags = ["--real", "real", "--fake", "fake", "--metrics", "ssim,psnr", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, evaluate.__file__, *flags],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    out = done.stdout.decode(encoding)
    assert first_words(out) == ["metric", "psnr", "ssim", "ssim:"]
    for name in names[1:]:
        assert name.encode(encoding, errors="backslashreplace").decode(encoding) in out


# -------------------- kept statistics

def forge(path: Path) -> None:
    """Changes the content of a file, but not its size and date."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_kept_statistics_give_the_same_numbers_without_opening_a_picture(results, command, folders):
    arguments = ["--real", folders[0], "--fake", folders[1]]
    arguments += ["--metrics", "fid,kid", "--stats", "real.stats"]
    first = results(*arguments)
    kept = np.load("real.stats")
    mean, cov = evaluate.statistics(torch.from_numpy(kept["features"]))
    assert np.array_equal(kept["mu"], mean) and np.array_equal(kept["sigma"], cov)
    assert [p.name for p in Path().iterdir() if p.is_file()] == ["real.stats"]  # not real.stats.npz
    for path in folders[0].iterdir():
        forge(path)
    assert results(*arguments) == first
    assert command(*arguments)[2] == f"features of {folders[0]} are read from real.stats\n"


@pytest.mark.parametrize("what", ["date", "size", "name", "one more", "weights", "preparation"])
def test_stale_statistics_are_refused_by_name(what, command, available, folders, monkeypatch):
    arguments = ["--real", folders[0], "--fake", folders[1]]
    arguments += ["--metrics", "fid", "--stats", "real.npz"]
    assert command(*arguments)[0] == 0
    path = folders[0] / "0.png"
    if what == "date":
        os.utime(path, ns=(1, 1))
    elif what == "size":
        before = path.stat()
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif what == "name":
        path.rename(folders[0] / "00.png")
    elif what == "one more":
        to_picture(picture(8)).save(folders[0] / "4.png")
    elif what == "weights":
        available["inception"] = metrics.MetricNetwork(Corners(), "other")
    else:
        monkeypatch.setattr(evaluate, "CLEAN", "another")
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("evaluate.py: error: real.npz is stale") and err.count("\n") == 1


@pytest.mark.parametrize("content", ["empty", "cut short", "foreign", "an array", "a folder"])
def test_a_file_that_does_not_hold_kept_statistics_is_refused(content, command, folders):
    arguments = ["--real", folders[0], "--fake", folders[1]]
    arguments += ["--metrics", "fid", "--stats", "real.npz"]
    path = Path("real.npz")
    if content == "empty":
        path.touch()
    elif content == "cut short":
        command(*arguments)
        path.write_bytes(path.read_bytes()[:-300])
    elif content == "foreign":
        np.savez("real.npz", mu=np.zeros(12), sigma=np.eye(12))  # as pytorch-fid's
    elif content == "an array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.mkdir()
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("evaluate.py: error: real.npz is not a file of --stats")
    assert err.count("\n") == 1


# -------------------- a user's mistakes

@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("--real nowhere --fake FAKE", "nowhere is not a folder"),
        ("--real REAL --fake empty", "empty holds no picture: expected files ending in .bmp"),
        ("--real REAL", "--fake is missing; expected a folder"),
        ("--fake FAKE --metrics fid", "--real is missing"),
        ("--fake FAKE", "--real is missing"),
        (
            "--real REAL --fake FAKE --metrics fid,lpip",
            "there is no metric 'lpip'; did you mean lpips?",
        ),
        (
            "--real REAL --fake FAKE --metrics xyzzy",
            "there is no metric 'xyzzy'; expected some of fid,kid,structure",
        ),
        ("--real REAL --fake FAKE --metrics fid,", "there is no metric ''; expected"),
        (
            "--real REAL --fake FAKE --metric fid",
            "unknown argument --metric; did you mean --metrics?",
        ),
        ("--real REAL --fake FAKE --metrics clip", "clip cannot be computed: it needs --captions"),
        ("--real REAL --fake FAKE --captions nowhere.json", "nowhere.json does not exist"),
        (
            "--real REAL --fake FAKE --captions few.json",
            "few.json has no caption for 1.bmp (3 of 4 have none)",
        ),
        (
            "--real REAL --fake FAKE --captions list.json",
            "list.json cannot be used (it holds a list); expected JSON",
        ),
        ("--real REAL --fake FAKE --captions broken.json", "in double quotes: line 2"),
        (
            "--real REAL --fake FAKE --metrics psnr --captions few.json",
            "--captions has no meaning for --metrics psnr",
        ),
        (
            "--real REAL --fake FAKE --metrics psnr --stats s.npz",
            "--stats has no meaning for --metrics psnr",
        ),
        (
            "--real REAL --fake FAKE --metrics fid --paired",
            "--paired has no meaning for --metrics fid",
        ),
        (
            "--real REAL --fake FAKE --metrics fid --stats no/s.npz",
            "there is no folder no; make it first",
        ),
        ("--real REAL --fake FAKE --batch 0", "--batch 0: expected 1 or more"),
        ("--real REAL --fake FAKE --seed -1", "--seed -1: expected 0 or more"),
        ("--real REAL --fake FAKE --device abacus", "--device abacus cannot be used"),
        (
            "--real REAL --fake one --metrics fid,kid",
            "fid cannot be computed: it takes two pictures or more in each",
        ),
        (
            "--real REAL --fake one --paired",
            "1.png has no partner of its stem in one (3 of 5 pictures are alone)",
        ),
        (
            "--real REAL --fake one --metrics psnr",
            "1.png has no partner of its stem in one (3 of 5 pictures are alone)",
        ),
        (
            "--real one --fake REAL --paired",
            "1.png has no partner of its stem in one (3 of 5 pictures are alone)",
        ),
        ("--real twins --fake one --paired", "0.jpg shares its stem with another picture"),
        (
            "--real one --fake small --paired",
            "0.png is 24x20 pixels and its partner small/0.png 8x9; make them equal",
        ),
        (
            "--real small --fake small --metrics ssim",
            "pictures of 8x9; its window takes 11 pixels a side",
        ),
        ("--real small --fake small --metrics lpips", "16 pixels a side or more"),
        (
            "--real REAL --fake broken --metrics fid",
            "broken/0.png is not a picture of a known format",
        ),
        ("--real one --fake broken1 --paired", "broken1/0.png is not a readable picture"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, reason, command, folders, tmp_path):
    x = picture(0)
    fill(tmp_path / "one", {"0.png": x})
    fill(tmp_path / "small", {"0.png": picture(0, 8, 9)})
    fill(tmp_path / "twins", {"0.png": x, "0.jpg": x})
    fill(tmp_path / "broken", {"0.png": x, "1.png": x})
    fill(tmp_path / "broken1", {"0.png": x})
    fill(tmp_path / "empty", {})
    (tmp_path / "broken" / "0.png").write_text("not a picture")
    whole = (tmp_path / "broken1" / "0.png").read_bytes()
    (tmp_path / "broken1" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "few.json").write_text('{"0.png": "red", "7.png": "blue"}')
    (tmp_path / "list.json").write_text('["red"]')
    (tmp_path / "broken.json").write_text('{"0.png": "red",\n nonsense}')
    arguments = arguments.replace("REAL", str(folders[0])).replace("FAKE", str(folders[1])).split()
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and reason in err, err
    assert err.startswith("evaluate.py: error: ") and err.count("\n") == 1, err


def test_a_metric_asked_for_whose_weights_are_missing_is_an_error(command, available, folders):
    del available["dino"]
    arguments = ("--real", folders[0], "--fake", folders[1], "--metrics", "psnr,structure")
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    reason = "the weights of dino are not here; expected https://example.org/dino.pth"
    assert err == f"evaluate.py: error: {reason}\n"


def test_the_script_runs_by_itself(folders, tmp_path):
    flags = ["--real", folders[0], "--fake", folders[1], "--paired"]
    flags += ["--metrics", "ssim,psnr", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, evaluate.__file__, *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert first_words(done.stdout) == ["metric", "psnr", "ssim"]
