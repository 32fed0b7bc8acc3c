"""evaluate.py's metrics are their definitions, and its command line says what was computed, what was not, and why."""

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
    """In Inception's place: the mean colours of the four quarters, 12 features."""

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, 299, 299)
        return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


class Points(nn.Module):
    """In Inception's place: pixels as they are, from the edges to the middle."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::149, ::149].flatten(1)


@pytest.fixture(scope="module")
def networks() -> dict[str, metrics.MetricNetwork]:
    tokenizer = tokenizers.load_tokenizer("tiny")
    sides = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = TextConfig(**sides, vocab_size=tokenizer.pieces.get_vocab_size(), eos_token_id=tokenizer.end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, dino, lpips = (randomise(network).requires_grad_(False) for network in (
            CLIP(VisionConfig(**sides, projection_dim=5), text), DINO(DINOConfig(width=12, depth=2, heads=2)), LPIPS()))
    return {"inception": metrics.MetricNetwork(Corners(), "1ncept"), "lpips": metrics.MetricNetwork(lpips, "l9195"),
            "dino": metrics.MetricNetwork(dino, "d1n0"), "clip": metrics.MetricNetwork(clip, "c119", tokenizer)}


@pytest.fixture
def judges(networks, monkeypatch) -> dict[str, metrics.MetricNetwork]:
    """Small judges in the place of the real ones, all of them here; a test may take some away or put others in."""
    here = dict(networks)

    def load(name: str, device: str = "cpu") -> metrics.MetricNetwork:
        if name not in here:
            raise ValueError(f"the weights of {name} are not here; expected https://example.org/{name}.pth")
        return here[name]

    monkeypatch.setattr(metrics, "has_metric_network", lambda name: name in here)
    monkeypatch.setattr(metrics, "load_metric_network", load)
    return here


def picture(seed: int, width: int = 24, height: int = 20) -> Tensor:
    """Soft, with values between the 256 levels, [3, H, W] in [-1, 1]."""
    x = nn.functional.interpolate(normal(1, 3, 4, 4, seed=seed), (height, width), mode="bicubic")[0]
    return x.tanh().float()


def fill(folder: Path, pictures: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    for name, x in pictures.items():
        to_picture(x).save(folder / name)
    return folder


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Four pairs, of two sizes; the partner of a .png may be a .bmp."""
    sizes = [(24, 20), (24, 20), (30, 18), (24, 20)]
    real = {f"{i}.png": picture(i, *size) for i, size in enumerate(sizes)}
    fake = {f"{i}.{'bmp' if i == 1 else 'png'}": picture(10 + i, *size) for i, size in enumerate(sizes)}
    return fill(tmp_path / "real", real), fill(tmp_path / "fake", fake)


@pytest.fixture
def command(judges, tmp_path, monkeypatch, capsys):
    """python evaluate.py ..., within this process: status, stdout, stderr. A traceback fails the test."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu", *map(str, arguments)])
        capsys.readouterr()
        try:
            training.run(evaluate.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def results(command):
    def call(*arguments: object) -> dict:
        status, out, err = command(*arguments, "--json")
        assert status == 0, err
        return json.loads(out, parse_constant=pytest.fail)  # Infinity and NaN are no JSON
    return call


def files(folder: Path) -> list[Tensor]:
    return [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1).double() for p in sorted(folder.iterdir())]


def mean(values: list) -> float:
    return sum(map(float, values)) / len(values)


# -------------------------------------------------------------------------------------------------- Frechet distance


def by_scipy(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy()).real
    return float(((mean1 - mean2) ** 2).sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root))


def drawn(n: int, d: int, seed: int) -> Tensor:
    return normal(n, d, seed=seed) @ normal(d, d, seed=100 + seed) / d ** 0.5 + normal(d, seed=200 + seed)


def test_statistics_are_the_mean_and_the_unbiased_covariance_in_float64():
    f = drawn(9, 4, 0).float() + 1000  # float32 would lose it
    m, s = evaluate.statistics(f)
    assert m.dtype == s.dtype == torch.float64
    assert relative(m, torch.from_numpy(f.numpy().astype(np.float64).mean(0))) < 1e-14
    assert relative(s, torch.from_numpy(np.cov(f.numpy().astype(np.float64), rowvar=False))) < 1e-12
    for bad in (f[:1], f.index_fill(0, torch.tensor([2]), math.nan)):
        with pytest.raises(ValueError, match="two or more, and all of them finite"):
            evaluate.statistics(bad)


def test_frechet_distance_is_scipys():
    a, b = evaluate.statistics(drawn(300, 40, 0)), evaluate.statistics(drawn(200, 40, 1))
    assert evaluate.frechet_distance(*a, *b) == pytest.approx(by_scipy(*a, *b), rel=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features():
    """Here scipy takes roots of zeros that rounding made 1e-16, and is right to 1e-6 or so; the factors of the
    covariances, the centred features themselves, give the same trace exactly."""
    x, y = drawn(15, 40, 0), drawn(12, 40, 1)
    a, b = evaluate.statistics(x), evaluate.statistics(y)
    ours = evaluate.frechet_distance(*a, *b)
    assert ours == pytest.approx(by_scipy(*a, *b), rel=1e-5)
    x_root, y_root = ((f - f.mean(0)).numpy() / (len(f) - 1) ** 0.5 for f in (x, y))
    trace = scipy.linalg.svdvals(x_root @ y_root.T).sum()
    exact = float(((x.mean(0) - y.mean(0)) ** 2).sum() + a[1].trace() + b[1].trace()) - 2 * trace
    assert ours == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("n", [300, 12], ids=["full rank", "rank 11"])
def test_frechet_distance_to_itself_is_zero(n):
    a = evaluate.statistics(drawn(n, 40, 0))
    assert 0 <= evaluate.frechet_distance(*a, *a) < 1e-11 * a[1].trace()


def test_frechet_distance_of_known_gaussians():
    """Covariances that commute, some of their variances zero: |m1 - m2|^2 + the sum of (s1 - s2)^2."""
    axes = torch.linalg.qr(normal(7, 7))[0]
    s1, s2, m1, m2 = torch.tensor(
        [[1, 2, 3, 0, 0.5, 0, 1e-3], [4, 2, 0, 1, 0.1, 0, 2], [0] * 7, [0, 0, 3, 0, 4, 0, 0]], dtype=torch.float64)
    cov1, cov2 = ((axes * s ** 2) @ axes.T for s in (s1, s2))
    expected = 25 + 9 + 0 + 9 + 1 + 0.16 + 0 + 1.999 ** 2
    assert evaluate.frechet_distance(m1, cov1, m2, cov2) == pytest.approx(expected, rel=1e-10)
    nothing = torch.zeros(7, 7).double()  # pictures all alike
    assert evaluate.frechet_distance(m1, nothing, m2, nothing) == pytest.approx(25)


# --------------------------------------------------------------------------------------------------------------- KID


def mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased, pair by pair."""
    def k(a: Tensor, b: Tensor) -> float:
        return (sum(float(u) * float(v) for u, v in zip(a, b)) / len(a) + 1) ** 3
    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kid_is_its_double_sum():
    x, y = normal(7, 5), normal(7, 5, seed=1) + 0.5
    values = evaluate.kid(x.float(), y.float(), torch.Generator().manual_seed(0))
    assert values.dtype == torch.float64 and values.shape == (1,)  # all 100 subsets would be the same
    assert values.item() == pytest.approx(mmd(x.float(), y.float()), rel=1e-12)


def test_kid_takes_random_subsets_of_both_sides_without_repetition():
    x, y = torch.arange(6.0).view(6, 1), torch.arange(10.0, 14).view(4, 1)
    possible = {}
    for i in range(6):
        for j in range(i):
            for k in range(4):
                for m in range(k):
                    possible[mmd(x[[i, j]], y[[k, m]])] = (i, j, k, m)
    assert len(possible) == 15 * 6
    values = evaluate.kid(x, y, torch.Generator().manual_seed(0), subsets=1000, size=2)
    found = [min(possible, key=lambda p: abs(p - v)) for v in values.tolist()]
    assert found == pytest.approx(values.tolist(), rel=1e-9) and set(found) == set(possible)
    again = evaluate.kid(x, y, torch.Generator().manual_seed(0), subsets=1000, size=2)
    assert torch.equal(values, again)
    assert not torch.equal(values, evaluate.kid(x, y, torch.Generator().manual_seed(1), subsets=1000, size=2))
    assert len(evaluate.kid(x, y, torch.Generator())) == 100  # of 4
    with pytest.raises(ValueError, match="1 and 4 features; expected two or more"):
        evaluate.kid(x[:1], y, torch.Generator())


def test_kid_is_unbiased():
    """Of one distribution it is 0 in the mean, whatever N; with the diagonal it would be some 0.5 at N = 10."""
    values = torch.stack([evaluate.kid(normal(10, 8, seed=2 * i), normal(10, 8, seed=2 * i + 1), torch.Generator())[0]
                          for i in range(600)])
    error = (values.std() / len(values) ** 0.5).item()
    assert abs(values.mean().item()) < 4 * error < 0.1
    assert evaluate.kid(normal(100, 8), normal(100, 8, seed=1) + 1, torch.Generator()).item() > 1


# ------------------------------------------------------------------------------------------------- pairs of pictures


def flat(*levels: float) -> Tensor:
    """A picture of one colour a channel, 0 to 255, as [1, 3, 12, 12]."""
    return torch.tensor(levels).view(1, -1, 1, 1).expand(1, 3, 12, 12) / 127.5 - 1


def test_psnr_by_hand():
    a = torch.cat([flat(0.0), flat(100.0), flat(50.0), flat(0.0)])
    b = torch.cat([flat(255.0), flat(101.0), flat(50.0, 50.0, 53.0), flat(0.0)])
    expected = [0, 20 * math.log10(255), 20 * math.log10(255 / 3 ** 0.5), math.inf]
    assert evaluate.psnr(a, b).tolist() == pytest.approx(expected, abs=1e-9)
    assert evaluate.psnr(flat(10.4), flat(9.6)).item() == math.inf  # a file has 8 bits
    assert evaluate.psnr(flat(255.0) + 9, flat(0.0) - 9).item() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="are no pairs"):
        evaluate.psnr(a, b[:1])


def test_ssim_by_hand():
    """Of flat pictures only the brightness is left: (2 x y + 0.01^2) / (x^2 + y^2 + 0.01^2), a channel each."""
    x, ys = 51 / 255, (102 / 255, 51 / 255, 204 / 255)
    expected = mean([(2 * x * y + 1e-4) / (x * x + y * y + 1e-4) for y in ys])
    assert evaluate.ssim(flat(51.0), flat(102.0, 51.0, 204.0)).item() == pytest.approx(expected, abs=1e-12)
    a = picture(0)[None]
    assert evaluate.ssim(a, a).item() == pytest.approx(1, abs=1e-12)
    assert evaluate.ssim(a, -a).item() < 0.1
    with pytest.raises(ValueError, match="24x10; its window takes 11"):
        evaluate.ssim(a[:, :, :10], a[:, :, :10])


def test_ssim_is_scipys_gaussian_filters():
    a = torch.stack([picture(i, 31, 19) for i in range(3)])
    b = torch.stack([picture(i, 31, 19) * 0.7 + 0.3 * picture(9 + i, 31, 19) for i in range(3)])

    def blur(x: np.ndarray) -> np.ndarray:  # truncate: 5 pixels to each side
        return scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    expected = []
    for pair in zip(a, b):
        maps = []
        for c in range(3):
            x, y = (np.asarray(to_picture(p))[:, :, c] / 255 for p in pair)
            mx, my, c1, c2 = blur(x), blur(y), 0.01 ** 2, 0.03 ** 2
            vx, vy, vxy = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
            maps.append(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))).mean())
        expected.append(mean(maps))
    assert evaluate.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_validation_in_memory_gives_the_numbers_of_the_script_on_the_saved_pictures(results, networks, tmp_path):
    a, b = (torch.stack([picture(seed + i) for i in range(4)]) for seed in (0, 50))
    fill(tmp_path / "real", {f"{i}.png": x for i, x in enumerate(a)})
    fill(tmp_path / "fake", {f"{i}.png": x for i, x in enumerate(b)})
    (tmp_path / "captions.json").write_text(json.dumps({f"{i}.png": "red circle" for i in range(4)}))
    metrics = results("--real", "real", "--fake", "fake", "--captions", "captions.json")["metrics"]
    f, g = (evaluate.features(networks["inception"].network, x) for x in (a, b))
    fid = evaluate.frechet_distance(*evaluate.statistics(f), *evaluate.statistics(g))
    assert metrics["fid"]["value"] == pytest.approx(fid, rel=1e-10)
    assert evaluate.fid(networks["inception"].network, a, b, torch.device("cpu")) == pytest.approx(fid, rel=1e-4)
    assert metrics["kid"]["value"] == pytest.approx(evaluate.kid(f, g, torch.Generator()).item(), rel=1e-10)
    assert metrics["psnr"]["value"] == pytest.approx(evaluate.psnr(a, b).mean().item(), rel=1e-9)
    assert metrics["ssim"]["value"] == pytest.approx(evaluate.ssim(a, b).mean().item(), rel=1e-9)
    score = evaluate.clip_score(networks["clip"], b, ["red circle"] * 4)
    assert metrics["clip"]["value"] == pytest.approx(score.mean().item(), rel=1e-5)


# -------------------------------------------------------------------------------------- what the networks get to see


def test_inception_sees_the_clean_preparation_of_the_file(tmp_path):
    """clean-fid: each channel as floats through Pillow's bicubic, clipped, not rounded; whatever the file's mode."""
    checks = np.indices((40, 52)).sum(0) % 2 * 255  # overshoots
    (tmp_path / "real").mkdir()
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "real" / "grey.png")
    to_picture(picture(0, 640, 351)).save(tmp_path / "real" / "large.jpg")
    to_picture(picture(1, 8, 9)).save(tmp_path / "real" / "small.gif")
    paths = evaluate.list_pictures(tmp_path / "real")
    judge = metrics.MetricNetwork(Points(), "0")
    f, m, s = evaluate.folder_features(paths, judge, batch=2, device=torch.device("cpu"))
    rows = []
    for path in paths:
        channels = Image.open(path).convert("RGB").split()
        resized = [np.asarray(Image.fromarray(np.asarray(c, dtype=np.float32)).resize((299, 299), Image.BICUBIC))
                   for c in channels]
        rows.append(((np.stack(resized).clip(0, 255) - 128) / 128)[:, ::149, ::149].flatten())
    expected = torch.from_numpy(np.stack(rows))
    assert f.shape == (3, 27) and (f.abs() > 0.99).any()
    assert relative(f, expected) < 1e-6
    assert relative(m, expected.double().mean(0)) < 1e-6
    assert relative(s, torch.cov(expected.double().T)) < 1e-5


def test_structure_is_the_mean_over_pairs_of_what_dino_sees(results, folders, networks):
    network = networks["dino"].network

    def matrix(x: Tensor) -> Tensor:
        picture = Image.fromarray(x.permute(1, 2, 0).byte().numpy())
        W, H = picture.size
        size = (224, int(224 * H / W)) if W <= H else (int(224 * W / H), 224)
        pixels = torch.from_numpy(np.array(picture.resize(size, Image.BILINEAR))).permute(2, 0, 1) / 255
        shift, scale = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            keys = network.keys(((pixels - shift.view(3, 1, 1)) / scale.view(3, 1, 1))[None])[0]
        return torch.stack([torch.cosine_similarity(key[None], keys) for key in keys])

    expected = [(matrix(a) - matrix(b)).square().mean() for a, b in zip(*map(files, folders))]
    found = results("--real", folders[0], "--fake", folders[1], "--metrics", "structure")["metrics"]["structure"]
    assert found["value"] == pytest.approx(mean(expected), rel=1e-4) and found["n"] == {"pairs": 4}
    assert found["deviation"] == pytest.approx(torch.stack(expected).std().item(), rel=1e-3)


def test_lpips_is_the_mean_over_pairs(results, folders, networks):
    with torch.no_grad():
        expected = [networks["lpips"].network(a[None].float() / 127.5 - 1, b[None].float() / 127.5 - 1)
                    for a, b in zip(*map(files, folders))]
    found = results("--real", folders[0], "--fake", folders[1], "--metrics", "lpips")["metrics"]["lpips"]
    assert found["value"] == pytest.approx(mean(expected), rel=1e-5)


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative(results, networks, tmp_path):
    """The preparation is OpenAI's: short side 224 by Pillow's bicubic, centre crop, mean and deviation. Captions are
    found by file name, or by stem."""
    sizes = [(300, 250), (300, 250), (40, 61), (224, 224), (500, 224), (33, 33)]
    pictures = {f"{i}.png": picture(i, *size) for i, size in enumerate(sizes)}
    folder, network = fill(tmp_path / "fake", pictures), networks["clip"].network
    words = ["red circle", "blue circle with green background", "circle", "a", "green", "yellow background"]
    captions = {f"{i}.{'jpg' if i == 2 else 'png'}": word for i, word in enumerate(words)}
    (tmp_path / "captions.json").write_text(json.dumps(captions | {"unused.png": "x"}))
    cosines = []
    for x, word in zip(files(folder), words):
        image = Image.fromarray(x.permute(1, 2, 0).byte().numpy())
        W, H = image.size
        w, h = (224, int(224 * H / W)) if W <= H else (int(224 * W / H), 224)
        left, top = round((w - 224) / 2), round((h - 224) / 2)
        image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + 224, top + 224))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        shift = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        scale = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        with torch.no_grad():
            u = network.image(((pixels - shift.view(3, 1, 1)) / scale.view(3, 1, 1))[None])[0]
            v = network.embed_captions(networks["clip"].tokenizer([word]))[0]
        cosines.append(float((u / u.norm()) @ (v / v.norm())))
    assert min(cosines) < -0.01 and max(cosines) > 0.01, cosines
    found = results("--fake", folder, "--metrics", "clip", "--captions", tmp_path / "captions.json")["metrics"]["clip"]
    assert found["value"] == pytest.approx(mean([100 * max(c, 0) for c in cosines]), rel=1e-4)
    assert found["n"] == {"pairs": 6} and found["weights"] == "c119"


# ------------------------------------------------------------------------------------------------------ command line


def test_json_says_how_each_number_came_about(results, folders):
    said = results("--real", folders[0], "--fake", folders[1], "--seed", 7)
    assert said["real"] == str(folders[0]) and said["fake"] == str(folders[1])
    assert list(said["metrics"]) == ["fid", "kid", "structure", "lpips", "psnr", "ssim"]
    assert said["skipped"] == {"clip": "it needs --captions"}
    for name, found in said["metrics"].items():
        judge = {"fid": "1ncept", "kid": "1ncept", "structure": "d1n0", "lpips": "l9195"}.get(name)
        assert found["weights"] == judge and bool(found["network"]) == bool(judge)
        assert found["seed"] == 7 and found["preparation"] and math.isfinite(found["value"])
        assert found["n"] == (dict(real=4, fake=4) if name in ("fid", "kid") else dict(pairs=4))
        assert found["better"] == ("higher" if name in ("psnr", "ssim") else "lower")
    real, fake = map(files, folders)
    expected = [10 * math.log10(255 ** 2 / float((a - b).square().mean())) for a, b in zip(real, fake)]
    assert said["metrics"]["psnr"]["value"] == pytest.approx(mean(expected), rel=1e-12)
    assert said["metrics"]["psnr"]["deviation"] == pytest.approx(np.std(expected, ddof=1), rel=1e-12)


def test_the_table_says_the_same(command, results, folders):
    arguments = ("--real", folders[0], "--fake", folders[1])
    metrics = results(*arguments)["metrics"]
    status, out, err = command(*arguments)
    assert status == 0 and err == "clip is left out: it needs --captions\n"
    header, *rows = out.splitlines()
    assert header.split() == "metric value deviation better N seed weights network image preparation".split()
    for row, (name, found) in zip(rows, metrics.items()):
        cells = re.split(r" {2,}", row)
        assert cells[0] == name and float(cells[1]) == pytest.approx(found["value"], rel=1e-4)
        assert cells[4] == ("4 real, 4 fake" if name in ("fid", "kid") else "4 pairs")
        assert cells[5:] == ["0", found["weights"] or "-", found["network"] or "-", found["preparation"]]
    assert [row.split(":")[0] for row in rows[len(metrics):]] == ["fid", "kid"]  # their notes


def test_fid_of_fewer_pictures_than_features_says_what_that_means(results, tmp_path):
    """The stand-in has 12 features, Inception 2048."""
    for folder, n in (("real", 13), ("enough", 12), ("few", 11)):
        fill(tmp_path / folder, {f"{i}.png": picture(i, 8, 8) for i in range(n)})
    note = results("--real", "real", "--fake", "few", "--metrics", "fid")["metrics"]["fid"]["note"]
    assert "N = 11 is below the 12 features" in note and "not of full rank" in note and "too high" in note
    assert "KID, which is unbiased" in note
    assert results("--real", "real", "--fake", "enough", "--metrics", "fid")["metrics"]["fid"]["note"] is None


def test_kid_depends_on_the_seed_alone(results, tmp_path):
    fill(tmp_path / "real", {f"{i}.png": picture(i) for i in range(5)})
    fill(tmp_path / "fake", {f"{i}.png": picture(20 + i) for i in range(3)})
    arguments = ("--real", "real", "--fake", "fake", "--metrics", "kid")
    first, again, other = (results(*arguments, "--seed", s, "--batch", b)["metrics"]["kid"]
                           for s, b in ((0, 16), (0, 2), (1, 16)))
    assert first["value"] == pytest.approx(again["value"], rel=1e-6) and first["value"] != other["value"]
    assert first["note"] == "100 random subsets of 3 pictures" and first["deviation"] > 0
    assert first["n"] == dict(real=5, fake=3)


def test_equal_pairs_have_no_finite_psnr_and_json_says_null(results, command, tmp_path):
    pictures = {f"{i}.png": picture(i) for i in range(3)}
    fill(tmp_path / "real", pictures)
    fill(tmp_path / "fake", pictures | {"2.png": picture(9)})
    found = results("--real", "real", "--fake", "fake", "--metrics", "psnr")["metrics"]["psnr"]
    assert found["value"] is None and found["note"] == "infinite: 2 of 3 pairs are equal"
    row = command("--real", "real", "--fake", "fake", "--metrics", "psnr")[1].splitlines()[1]
    assert row.split()[:3] == ["psnr", "inf", "-"]


def test_what_cannot_be_had_is_left_out_with_its_reason(command, judges, folders, tmp_path):
    del judges["lpips"], judges["dino"], judges["clip"]
    (tmp_path / "captions.json").write_text(json.dumps({f"{i}.png": "red" for i in range(4)}))
    arguments = ("--real", folders[0], "--fake", folders[1], "--captions", "captions.json")
    status, out, err = command(*arguments)
    assert status == 0 and [row.split()[0] for row in out.splitlines()[1:5]] == ["fid", "kid", "psnr", "ssim"]
    expected = {f"{metric} is left out: the weights of {judge} are not on this machine; --metrics {metric} fetches them"
                for metric, judge in (("lpips", "lpips"), ("structure", "dino"), ("clip", "clip"))}
    assert set(err.splitlines()) == expected
    (folders[0] / "3.png").rename(folders[0] / "other.png")
    status, out, err = command(*arguments)
    assert status == 0 and [row.split()[0] for row in out.splitlines()[1:3]] == ["fid", "kid"]
    for name in ("structure", "lpips", "psnr", "ssim"):
        assert f"{name} is left out: the folders are no pairs ({folders[1] / '3.png'} has no partner" in err
    del judges["inception"]
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and err.splitlines()[-1].startswith("evaluate.py: error: no metric can be computed")


def test_matching_names_of_different_sizes_are_no_pairs_without_paired(command, folders):
    to_picture(picture(0, 10, 10)).save(folders[1] / "0.png")
    status, out, err = command("--real", folders[0], "--fake", folders[1])
    assert status == 0 and [row.split()[0] for row in out.splitlines()[1:3]] == ["fid", "kid"]
    assert "psnr is left out: the folders are no pairs" in err and "24x20 pixels and its partner" in err


# ---------------------------------------------------------------------------------------------------- kept statistics


def forge(path: Path) -> None:
    """Another content of the same size and date."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_kept_statistics_give_the_same_numbers_without_opening_a_picture(results, command, folders):
    arguments = ("--real", folders[0], "--fake", folders[1], "--metrics", "fid,kid", "--stats", "real.stats")
    first = results(*arguments)
    m, s = evaluate.statistics(torch.from_numpy(np.load("real.stats")["features"]))
    assert np.array_equal(np.load("real.stats")["mu"], m) and np.array_equal(np.load("real.stats")["sigma"], s)
    assert [p.name for p in Path().iterdir() if p.is_file()] == ["real.stats"]  # not real.stats.npz
    for path in folders[0].iterdir():
        forge(path)
    assert results(*arguments) == first
    assert command(*arguments)[2] == f"features of {folders[0]} are read from real.stats\n"


@pytest.mark.parametrize("what", ["date", "size", "name", "one more", "weights", "preparation"])
def test_stale_statistics_are_refused_by_name(what, command, judges, folders, monkeypatch):
    arguments = ("--real", folders[0], "--fake", folders[1], "--metrics", "fid", "--stats", "real.npz")
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
        judges["inception"] = metrics.MetricNetwork(Corners(), "other")
    else:
        monkeypatch.setattr(evaluate, "CLEAN", "another")
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and err.startswith("evaluate.py: error: real.npz is stale") and err.count("\n") == 1


@pytest.mark.parametrize("content", ["empty", "cut short", "foreign", "an array", "a folder"])
def test_a_file_that_is_no_kept_statistics_is_refused(content, command, folders):
    arguments = ("--real", folders[0], "--fake", folders[1], "--metrics", "fid", "--stats", "real.npz")
    path = Path("real.npz")
    if content == "empty":
        path.touch()
    elif content == "cut short":
        command(*arguments)
        path.write_bytes(path.read_bytes()[:-300])
    elif content == "foreign":
        np.savez("real.npz", mu=np.zeros(12), sigma=np.eye(12))  # pytorch-fid's: of which pictures?
    elif content == "an array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.mkdir()
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and err.startswith("evaluate.py: error: real.npz is not of --stats")
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize("arguments, reason", [
    ("--real nowhere --fake FAKE", "nowhere is not a folder"),
    ("--real REAL --fake empty", "empty holds no picture: expected files ending in .bmp"),
    ("--real REAL", "the following arguments are required: --fake"),
    ("--fake FAKE --metrics fid", "--real is missing"),
    ("--fake FAKE", "--real is missing"),
    ("--real REAL --fake FAKE --metrics fid,lpip", "there is no metric 'lpip'; did you mean lpips?"),
    ("--real REAL --fake FAKE --metrics xyzzy", "there is no metric 'xyzzy'; expected some of fid,kid,structure"),
    ("--real REAL --fake FAKE --metrics fid,", "there is no metric ''; expected"),
    ("--real REAL --fake FAKE --metric fid", "unknown argument --metric; did you mean --metrics?"),
    ("--real REAL --fake FAKE --metrics clip", "clip cannot be computed: it needs --captions"),
    ("--real REAL --fake FAKE --captions nowhere.json", "nowhere.json does not exist"),
    ("--real REAL --fake FAKE --captions few.json", "few.json has no caption for 1.bmp (3 of 4 have none)"),
    ("--real REAL --fake FAKE --captions list.json", "list.json cannot be used (it holds a list); expected JSON"),
    ("--real REAL --fake FAKE --captions broken.json", "in double quotes: line 2"),
    ("--real REAL --fake FAKE --metrics psnr --captions few.json", "--captions has no meaning for --metrics psnr"),
    ("--real REAL --fake FAKE --metrics psnr --stats s.npz", "--stats has no meaning for --metrics psnr"),
    ("--real REAL --fake FAKE --metrics fid --paired", "--paired has no meaning for --metrics fid"),
    ("--real REAL --fake FAKE --metrics fid --stats no/s.npz", "there is no folder no; make it first"),
    ("--real REAL --fake FAKE --batch 0", "--batch 0: expected 1 or more"),
    ("--real REAL --fake FAKE --seed -1", "--seed -1: expected 0 or more"),
    ("--real REAL --fake FAKE --device abacus", "--device abacus cannot be used"),
    ("--real REAL --fake one --metrics fid,kid", "fid cannot be computed: it takes two pictures or more in each"),
    ("--real REAL --fake one --paired", "1.png has no partner of its stem in one (3 of 5 pictures are alone)"),
    ("--real REAL --fake one --metrics psnr", "1.png has no partner of its stem in one (3 of 5 pictures are alone)"),
    ("--real one --fake REAL --paired", "1.png has no partner of its stem in one (3 of 5 pictures are alone)"),
    ("--real twins --fake one --paired", "0.jpg shares its stem with another picture"),
    ("--real one --fake small --paired", "0.png is 24x20 pixels and its partner small/0.png 8x9; make them equal"),
    ("--real small --fake small --metrics ssim", "pictures of 8x9; its window takes 11 pixels a side"),
    ("--real small --fake small --metrics lpips", "of 16 pixels a side or more"),
    ("--real REAL --fake broken --metrics fid", "broken/0.png is not a picture of a known format"),
    ("--real one --fake broken1 --paired", "broken1/0.png is not a readable picture"),
])
def test_bad_input_is_one_line_and_status_2(arguments, reason, command, folders, tmp_path):
    one = {"0.png": picture(0)}
    for name, pictures in (("one", one), ("small", {"0.png": picture(0, 8, 9)}), ("twins", one | {"0.jpg": picture(0)}),
                           ("broken", one | {"1.png": picture(0)}), ("broken1", one), ("empty", {})):
        fill(tmp_path / name, pictures)
    (tmp_path / "broken" / "0.png").write_text("no picture")
    whole = (tmp_path / "broken1" / "0.png").read_bytes()
    (tmp_path / "broken1" / "0.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "few.json").write_text('{"0.png": "red", "7.png": "blue"}')
    (tmp_path / "list.json").write_text('["red"]')
    (tmp_path / "broken.json").write_text('{"0.png": "red",\n nonsense}')
    arguments = arguments.replace("REAL", str(folders[0])).replace("FAKE", str(folders[1])).split()
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and reason in err, err
    assert err.startswith("evaluate.py: error: ") and err.count("\n") == 1, err


def test_a_metric_asked_for_whose_weights_cannot_be_had_is_an_error(command, judges, folders):
    del judges["dino"]
    status, out, err = command("--real", folders[0], "--fake", folders[1], "--metrics", "psnr,structure")
    assert (status, out) == (2, "")
    assert err == "evaluate.py: error: the weights of dino are not here; expected https://example.org/dino.pth\n"


def test_the_script_runs_by_itself(folders, tmp_path):
    done = subprocess.run([sys.executable, evaluate.__file__, "--real", folders[0], "--fake", folders[1], "--paired",
                           "--metrics", "ssim,psnr", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [row.split()[0] for row in done.stdout.splitlines()] == ["metric", "psnr", "ssim"]
