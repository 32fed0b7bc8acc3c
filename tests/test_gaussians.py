"""tiny/gaussians.py: the points, their measure, the picture, the networks."""

import math

import pytest
import torch

from tiny import gaussians


def test_points_are_25_gaussians_of_deviation_0_05_and_every_draw_is_its_seeds():
    points = gaussians.draw(50_000, torch.Generator().manual_seed(0))
    centre = (points / 2).round() * 2
    assert {tuple(c) for c in centre.tolist()} == {(x, y) for x in (-4, -2, 0, 2, 4) for y in (-4, -2, 0, 2, 4)}
    assert (points - centre).std().item() == pytest.approx(0.05, rel=0.01)
    counts = torch.unique(centre, dim=0, return_counts=True)[1]
    assert counts.min() > 1800 and counts.max() < 2200
    train, again, test = (gaussians.Points(split, 3, 100) for split in ("train", "train", "test"))
    assert torch.equal(train.points, again.points) and not torch.isin(test.points, train.points).any()
    assert torch.equal(train[7]["target"], train[7, (3, 0, 1)]["target"])


def test_the_measure_counts_good_samples_and_covered_modes():
    real = gaussians.measure(gaussians.draw(10_000, torch.Generator().manual_seed(0)))
    assert real["modes"] == 25 and real["good"] == pytest.approx(1 - math.exp(-4.5), abs=0.002)  # of radius 3, in 2-d
    centre = gaussians.CENTRES[:2]
    on, off = torch.tensor([0.149, 0.0]), torch.tensor([0.0, 0.151])
    samples = torch.cat([place.expand(n, 2) for place, n in [
        (centre[0] + on, 20), (centre[1] + on, 19), (centre[0] + off, 61), (torch.ones(2), 9900)]])
    assert gaussians.measure(samples) == dict(modes=1, good=39 / 10_000)
    assert gaussians.measure(samples.repeat(2, 1))["modes"] == 1  # in proportion


def test_the_scatter_shows_samples_where_they_are_and_survives_any():
    empty = gaussians.scatter(torch.empty(0, 2))
    shown = gaussians.scatter(torch.tensor([[1.0, 3.0]]))
    row, column = (shown != empty).any(0).nonzero()[0].tolist()
    assert column == pytest.approx(200 + 400 / 11, abs=1.5) and row == pytest.approx(200 - 3 * 400 / 11, abs=1.5)
    odd = gaussians.scatter(torch.tensor([[math.nan, 0], [math.inf, -math.inf]]))
    assert odd.shape == (3, 400, 400) and odd.min() >= -1 and odd.max() <= 1


def test_networks_take_points_and_times_like_the_large_ones():
    base = gaussians.load_base(0, torch.float64, torch.device("cpu"))
    x = torch.randn(5, 2, dtype=torch.float64)
    one, each = base.denoiser(x, 7, None), base.denoiser(x, torch.full((5,), 7))
    assert one.shape == (5, 2) and torch.equal(one, each) and not torch.equal(one, base.denoiser(x, 8))
    assert gaussians.MLP(1)(x.float(), 0).shape == (5, 1)
    again = gaussians.load_base(0, torch.float64, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(base.denoiser.parameters(), again.denoiser.parameters()))
