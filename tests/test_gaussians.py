"""tiny/gaussians.py: the points, their measure, the picture, the networks, a short training."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import training
from models.diffusion import Schedule
from tiny import gaussians

torch.set_num_threads(1)
PLACES = (-4, -2, 0, 2, 4)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_points_are_25_gaussians_of_standard_deviation_0_05_drawn_from_the_seed():
    points = gaussians.data_points(50_000, generator(0))
    centre = (points / 2).round() * 2
    assert {tuple(c) for c in centre.tolist()} == {(x, y) for x in PLACES for y in PLACES}
    assert (points - centre).std().item() == pytest.approx(0.05, rel=0.01)
    _, counts = torch.unique(centre, dim=0, return_counts=True)
    assert counts.min() > 1800 and counts.max() < 2200
    assert torch.equal(points, gaussians.data_points(50_000, generator(0)))
    others = gaussians.data_points(50_000, generator(1))
    assert {tuple(p) for p in points.tolist()}.isdisjoint(tuple(p) for p in others.tolist())


def test_the_measure_counts_good_samples_and_covered_modes():
    real = gaussians.measure(gaussians.data_points(10_000, generator(0)))
    # The share of a Gaussian in the plane within three standard deviations.
    inside = 1 - math.exp(-4.5)
    assert real["modes"] == 25 and real["good"] == pytest.approx(inside, abs=0.002)

    one, other = gaussians.CENTRES[:2]
    on, off = torch.tensor([0.149, 0.0]), torch.tensor([0.0, 0.151])
    places = [(one + on, 20), (other + on, 19), (one + off, 61), (torch.ones(2), 9900)]
    samples = torch.cat([place.expand(count, 2) for place, count in places])
    assert gaussians.measure(samples) == dict(modes=1, good=39 / 10_000)
    # The number that covers a mode is in proportion to the samples.
    assert gaussians.measure(samples.repeat(2, 1))["modes"] == 1


def test_the_scatter_shows_samples_where_they_are_and_survives_any():
    empty = gaussians.scatter(torch.empty(0, 2))
    shown = gaussians.scatter(torch.tensor([[1.0, 3.0]]))
    row, column = (shown != empty).any(0).nonzero()[0].tolist()
    assert column == pytest.approx(200 + 400 / 11, abs=1.5)
    assert row == pytest.approx(200 - 3 * 400 / 11, abs=1.5)
    odd = gaussians.scatter(torch.tensor([[math.nan, 0], [math.inf, -math.inf]]))
    assert odd.shape == (3, 400, 400) and odd.min() >= -1 and odd.max() <= 1


def test_networks_take_points_and_their_timesteps():
    torch.manual_seed(0)
    network = gaussians.MLP(2).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    sevens = torch.full((5,), 7)
    whole = network(x, sevens)
    assert whole.shape == (5, 2) and torch.equal(whole, network(x, sevens, None))
    assert torch.allclose(network(x[2:3], sevens[:1]), whole[2:3], rtol=1e-12)
    assert not torch.equal(whole, network(x, sevens + 1))
    assert gaussians.MLP(1)(x.float(), sevens).shape == (5, 1)


@torch.no_grad()
def test_samples_of_a_perfect_denoiser_are_the_prior_on_the_way_to_the_data():
    """It predicts the v of the mean of all data, 0: so samples are near 0 where x was noise."""
    schedule = Schedule.from_config(gaussians.SCHEDULE)
    alpha, sigma = schedule.alpha[-1].item(), schedule.sigma[-1].item()

    def denoiser(x, t):
        return alpha / sigma * x  # x0 = alpha x - sigma v = 0

    points = gaussians.sample(denoiser, schedule, 100, seed=3)
    assert points.shape == (100, 2) and points.abs().max() < 1e-3
    raw = gaussians.sample(lambda x, t: 0 * x, schedule, 20_000, seed=3)  # x0 = alpha x
    # x is the noised prior, whose variance is that of data from 5 x 5 places, and of noise.
    variance = alpha**2 * (8 + gaussians.STD**2) + sigma**2
    assert raw.var().item() == pytest.approx(alpha**2 * variance, rel=0.05)


@pytest.mark.parametrize("kind", ["coop", "data", "noisy"])
def test_a_training_depends_on_its_seed_alone_and_moves_towards_the_data(monkeypatch, kind):
    build, made = gaussians.MLP, []

    def build_and_keep(c_out):
        made.append(build(c_out))
        return made[-1]

    monkeypatch.setattr(gaussians, "MLP", build_and_keep)

    def train(seed):
        cfg = gaussians.Config(adversarial=kind, max_train_steps=30, lambda_con=0.1, seed=seed)
        return gaussians.train(cfg)

    first, schedule = train(0)
    torch.manual_seed(5)
    again, _ = train(0)
    other, _ = train(1)
    for one, same, different in zip(first.parameters(), again.parameters(), other.parameters()):
        assert torch.equal(one, same) and not torch.equal(one, different)
    torch.manual_seed(0)
    start, start_of_d = build(2), build(1)  # what training began with
    for p, q in zip(start_of_d.parameters(), made[1].parameters()):
        assert not torch.equal(p, q)

    def error(denoiser):  # of predictions at little noise
        rng = generator(2)
        x0, noise = gaussians.data_points(500, rng), torch.randn(500, 2, generator=rng)
        t = torch.full((500,), 300)
        x = schedule.alpha[300].float() * x0 + schedule.sigma[300].float() * noise
        with torch.no_grad():
            made = gaussians.generated(denoiser(x, t), x, t, schedule)
        return (made - x0).square().mean()

    assert error(first) < error(start)


def test_a_training_returns_the_ema_of_the_weights(monkeypatch):
    averages, weights, decays, update = [], [], [], gaussians.update_ema

    def watched(ema, trained, decay):
        update(ema, trained, decay)
        averages.append({name: p.clone() for name, p in ema.items()})
        weights.append({name: p.detach().clone() for name, p in trained.items()})
        decays.append(decay)

    monkeypatch.setattr(gaussians, "update_ema", watched)
    denoiser, _ = gaussians.train(gaussians.Config(max_train_steps=3, ema_decay=0.2))
    for name, p in denoiser.named_parameters():
        assert torch.equal(p, averages[-1][name]) and not torch.equal(p, weights[-1][name])
    assert decays == [1 / 10, 2 / 11, 0.2]  # a warm-up


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["gaussians.py", *map(str, argv)])
    training.run_script(gaussians.main)


def test_each_real_side_has_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for side in ("coop", "data"):
        run(monkeypatch, "--max_train_steps", 1, "--adversarial", side)
        assert (tmp_path / f"runs/gaussians-{side}" / "figures.json").is_file()


def test_the_command_writes_a_picture_and_figures(monkeypatch, capsys, tmp_path):
    flags = ["--max_train_steps", 30, "--seed", 3]
    run(monkeypatch, *flags, "--output_dir", tmp_path / "one")
    run(monkeypatch, *flags, "--output_dir", tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["figures.json", "samples.png"]
    for name in ("figures.json", "samples.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    denoiser, schedule = gaussians.train(gaussians.Config(max_train_steps=30, seed=3))
    samples = gaussians.sample(denoiser, schedule, 10_000, 3)
    figures = json.loads((tmp_path / "one" / "figures.json").read_text())
    assert figures == gaussians.measure(samples)
    # True points to the left, samples to the right.
    page = np.asarray(Image.open(tmp_path / "one" / "samples.png"))
    assert page.shape == (400, 800, 3)
    wanted = ((gaussians.scatter(samples) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert (page[:, 400:] == wanted).all() and not (page[:, :400] == wanted).all()
    out = capsys.readouterr().out.splitlines()
    assert f"{figures['modes']} of 25 modes" in out[0]
    assert out[1] == str(tmp_path / "one" / "samples.png")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--adversarial", "teacher"], ["--adversarial", "'coop', 'data', 'noisy'"]),
        (["--seeed", "1"], ["unknown argument --seeed", "--seed"]),
        (["--max_train_steps", "0"], ["--max_train_steps 0", "1 or more"]),
        (["--learning_rate", "-1"], ["--learning_rate -1.0", "0 or more"]),
        (["--lr_scheduler", "steps"], ["--lr_scheduler", "cosine"]),
    ],
    ids=["adversary", "unknown", "no steps", "negative", "schedule"],
)
def test_bad_flags_are_one_line_and_write_nothing(monkeypatch, capsys, tmp_path, flags, words):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines
    assert not (tmp_path / "run").exists()
