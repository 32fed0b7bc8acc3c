"""Grids of pictures, and the curves of a log."""

import json
import math
import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from training.folders import write_file


def save_grid(path: pathlib.Path, columns: list[Tensor], at_least: int = 96) -> None:
    """Writes a grid: row i shows the i-th picture of each column, small ones enlarged.

    columns: pictures [N, 3, H, W] in [-1, 1]. The rows are in two stacks side by side, so that
    the page is not too tall. Pictures are at least `at_least` pixels wide.
    """
    columns = [column.detach().float().cpu().clamp(-1, 1) for column in columns]
    rows = torch.cat(columns, dim=3)  # [N, 3, H, columns * W]
    levels = ((rows + 1) * 127.5).round().to(torch.uint8)
    levels = levels.permute(0, 2, 3, 1).numpy()
    half = (len(levels) + 1) // 2
    stacks = [np.concatenate(list(levels[:half]))]
    if len(levels) > 1:
        stacks.append(np.concatenate(list(levels[half:])))

    gap = 4
    height, width, _ = stacks[0].shape
    page = np.full((height, len(stacks) * (width + gap) - gap, 3), 255, np.uint8)
    for i, stack in enumerate(stacks):
        left = i * (width + gap)
        page[:len(stack), left:left + width] = stack

    picture = Image.fromarray(page)
    zoom = max(1, at_least // columns[0].shape[-1])
    size = (picture.width * zoom, picture.height * zoom)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    write_file(path, lambda temporary: picture.save(temporary, format="PNG"))


def plot_losses(log: pathlib.Path, path: pathlib.Path) -> None:
    """Plots every number of the log against the step, one small panel each, and smoothed."""
    series = read_series(log)
    width, height, across = 360, 200, 3
    rows = max(1, math.ceil(len(series) / across))
    page = Image.new("RGB", (width * across, height * rows), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, points) in enumerate(series.items()):
        left = i % across * width
        top = i // across * height
        plot_panel(pen, name, points, left, top, width, height)
    write_file(path, lambda temporary: page.save(temporary, format="PNG"))


def read_series(log: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """The log's numbers by name: lists of (step, value)."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append((step, value))
    return series


def plot_panel(
    pen: ImageDraw.ImageDraw,
    name: str,
    points: list[tuple[int, float]],
    left: float,
    top: float,
    width: float,
    height: float,
) -> None:
    """One panel: the points in light blue, their smoothed line in dark blue, name and range."""
    margin = 34
    left, top = left + margin, top + margin
    right = left + width - 1.5 * margin
    bottom = top + height - 1.8 * margin
    smooth = smoothed(points)
    values = [value for _, value in points]
    low, high = min(values), max(values)
    last_step = max(points[-1][0], 1)

    pen.rectangle([left, top, right, bottom], outline="#bbbbbb")
    for line, colour in [(points, "#c9dcf0"), (smooth, "#1f5fa8")]:
        places = []
        for step, value in line:
            x = left + (right - left) * step / last_step
            y = bottom - (bottom - top) * (value - low) / (high - low or 1)
            places.append((x, y))
        pen.line(places, fill=colour, width=2)
    pen.text((left, top - 22), f"{name}: {smooth[-1][1]:.4g}", fill="black")
    limits = f"{low:.3g} ... {high:.3g}, {last_step} steps"
    pen.text((left, bottom + 3), limits, fill="#666666")


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential moving average. The few points of a validation stay as they are."""
    keep = 0.9 if len(points) > 100 else 0.0
    smooth = []
    mean = points[0][1]
    for step, value in points:
        mean = keep * mean + (1 - keep) * value
        smooth.append((step, mean))
    return smooth
