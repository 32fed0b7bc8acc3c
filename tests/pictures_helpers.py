"""Pictures and folders that the tests of dataset/ share."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def coordinates(height: int, width: int, blue: int = 0) -> Image.Image:
    """Every pixel holds its column in red and its row in green, so a crop shows where it was."""
    rows, columns = np.mgrid[:height, :width]
    levels = np.stack([columns, rows, np.full_like(rows, blue)], axis=2)
    return Image.fromarray(levels.astype(np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    """The levels [H, W, 3] as int, so that differences do not wrap around."""
    return np.asarray(picture).astype(int)


def cache_settings(source: Path, output: Path, **changes) -> dict:
    """The arguments of `write_cache` for a small cache of 8 x 8 pictures."""
    settings = dict(
        source=str(source),
        base_name="tiny",
        output=output,
        prep="resized_crop_8",
        size=8,
        column="text",
        seed=0,
        batch=4,
        device="cpu",
        dtype="float32",
    )
    return settings | changes


def make_pairs(
    folder: Path,
    count: int = 5,
    size: tuple[int, int] = (40, 40),
    split: str = "train",
) -> Path:
    """Pairs that show where a pixel was and, in blue, which pair it belongs to."""
    side_a = folder / f"{split}_A"
    side_b = folder / f"{split}_B"
    side_a.mkdir(parents=True)
    side_b.mkdir(parents=True)
    captions = {}
    for i in range(count):
        name = f"{i:03}.png"
        coordinates(*size, blue=i).save(side_a / name)
        coordinates(*size, blue=i + 100).save(side_b / name)
        captions[name] = f"caption {i}"
    (folder / f"{split}_prompts.json").write_text(json.dumps(captions))
    return folder


def refused(function, *arguments, match: str, **named) -> None:
    """The call raises a ValueError of one line that contains the plain text `match`."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **named)
    assert match in str(caught.value)
    assert "\n" not in str(caught.value)
