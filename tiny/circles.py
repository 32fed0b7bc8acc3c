"""Pairs drawn on the fly, in the spirit of fill50k: a circle's outline and "X circle with Y background" -> the
picture.

Colours are combined freely; one combination in nine is held out of training, so the test captions combine colours that
were never seen together in these roles. `python -m tiny.circles OUT --n 500` writes a folder in the paired layout.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (245, 220, 60),
    "orange": (250, 140, 30), "purple": (130, 50, 170), "pink": (255, 150, 190), "cyan": (60, 210, 220),
    "white": (250, 250, 250), "black": (20, 20, 20),
}
NAMES = list(COLOURS)
N = len(NAMES)
PAIRS = [(i, j) for i in range(N) for j in range(N) if i != j]  # (circle, background)
# One of every row and column is held out: each colour is seen in both roles, and beside eight of the nine others.
HELD_OUT = [(i, j) for i, j in PAIRS if (i - j) % N == 3]


def draw(circle: tuple[int, int], centre: tuple[float, float], radius: float, size: int) -> tuple[Image.Image, ...]:
    """Outline (white on black) and picture, drawn at four times the size and reduced: smooth edges."""
    s = 4 * size
    box = [(c + sign * radius) * s for sign in (-1, 1) for c in centre]
    outline, picture = Image.new("RGB", (s, s)), Image.new("RGB", (s, s), COLOURS[NAMES[circle[1]]])
    ImageDraw.Draw(outline).ellipse(box, outline="white", width=6)
    ImageDraw.Draw(picture).ellipse(box, fill=COLOURS[NAMES[circle[0]]])
    return tuple(p.resize((size, size), Image.Resampling.BOX) for p in (outline, picture))


class Circles(Dataset):
    """Items as of `data.PairedFolder`, drawn when asked for: by the key's numbers in training, by the index in the
    test."""

    def __init__(self, split: str, seed: int = 0, size: int = 32, n: int | None = None):
        self.split, self.seed, self.size = split, seed, size
        self.n = n or (20_000 if split == "train" else 10 * len(HELD_OUT))
        self.pairs = [p for p in PAIRS if p not in HELD_OUT] if split == "train" else HELD_OUT
        self.captions = [caption(pair) for pair in self.pairs]

    def __len__(self) -> int:
        return self.n

    def describe(self, item: int | tuple[int, tuple[int, ...]]) -> tuple[tuple[int, int], tuple[float, float], float]:
        index, key = item if isinstance(item, tuple) else (item, ())
        rng = np.random.default_rng([self.seed, *key] if key else [self.seed, index, 0, 0, self.split == "train"])
        pair = self.pairs[rng.integers(len(self.pairs)) if self.split == "train" else index % len(self.pairs)]
        radius = rng.uniform(0.25, 0.42)
        return pair, tuple(rng.uniform(radius + 0.02, 0.98 - radius, size=2)), radius

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        pair, centre, radius = self.describe(item)
        outline, picture = (torch.from_numpy(np.asarray(p, dtype=np.float32) / 255).permute(2, 0, 1)
                            for p in draw(pair, centre, radius, self.size))
        return dict(input=outline, target=picture * 2 - 1, caption=caption(pair),
                    name=f"{item if isinstance(item, int) else item[0]}.png")

    def judge(self, pictures: Tensor, indices: list[int]) -> dict[str, float]:
        """Pictures [B, 3, H, W] in [-1, 1] made for these indices -> the share whose circle, and whose background,
        has the caption's colour: the mean over the inner half of the shape lies nearer to it than to any other of the
        palette."""
        palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1
        axis = (torch.arange(self.size) + 0.5) / self.size
        right = np.zeros((len(indices), 2))
        for row, index in enumerate(indices):
            pair, (cx, cy), radius = self.describe(index)
            distance = ((axis[None, :] - cx) ** 2 + (axis[:, None] - cy) ** 2).sqrt() / radius
            for role, mask in enumerate([distance < 0.7, distance > 1.2]):
                colour = pictures[row].float().cpu()[:, mask].mean(dim=1)
                right[row, role] = (palette - colour).norm(dim=1).argmin() == pair[role]
        return dict(circle=right[:, 0].mean(), background=right[:, 1].mean(), both=right.all(axis=1).mean())


def caption(pair: tuple[int, int]) -> str:
    return f"{NAMES[pair[0]]} circle with {NAMES[pair[1]]} background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--n", type=int, default=500, help="training pairs; a tenth as many test pairs")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for split, n in [("train", args.n), ("test", max(args.n // 10, 1))]:
        world, captions = Circles(split, args.seed, args.size), {}
        for side in "AB":
            (args.out / f"{split}_{side}").mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pair, centre, radius = world.describe(i)
            for side, picture in zip("AB", draw(pair, centre, radius, args.size)):
                picture.save(args.out / f"{split}_{side}" / f"{i}.png")
            captions[f"{i}.png"] = caption(pair)
        (args.out / f"{split}_prompts.json").write_text(json.dumps(captions, indent=1))


if __name__ == "__main__":
    main()
