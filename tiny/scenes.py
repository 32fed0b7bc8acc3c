"""A small world drawn from a description and a seed: houses, trees, cars and boats on grass, on sand and by a lake.

Time and weather are fields of a scene that move nothing: `replace(scene, time="night")` is the same place in another
light, so the true translation of every picture is known. One combination in ten of (colour, object, time, weather) is
left out of training, and the test pictures are made of these.

    python -m tiny.scenes OUT --task edges --n 500             pairs: outlines and pictures, with captions
    python -m tiny.scenes OUT --task day2night --n 500         unpaired, with the true nights of test_A (or clear2rain)
    python -m tiny.scenes OUT.png --sheet                      a page of scenes to look at
"""

import argparse
import json
import math
import pathlib
import sys
import textwrap
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, product

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

COLOURS = {
    "red": (208, 32, 42), "orange": (242, 126, 22), "yellow": (255, 226, 70), "green": (16, 140, 70),
    "blue": (40, 92, 222), "purple": (134, 54, 176), "pink": (252, 150, 200), "white": (246, 246, 246),
}
KINDS, GROUNDS = ("house", "tree", "car", "boat"), ("grass", "sand", "lake")
TIMES, WEATHERS = ("day", "night", "dusk"), ("clear", "rain", "snow", "fog")
MATERIALS = {
    "grass": (136, 190, 84), "sand": (238, 208, 146), "lake": (72, 142, 196), "hill": (112, 160, 112),
    "mountain": (126, 156, 172), "dune": (214, 176, 122), "mesa": (190, 150, 128), "roof": (112, 82, 84),
    "wood": (116, 78, 52), "door": (92, 58, 44), "frame": (250, 248, 240), "sail": (250, 240, 216),
    "pane": (176, 214, 232), "tyre": (38, 38, 46), "metal": (196, 200, 206), "stone": (172, 160, 150),
}
LIT = {"glass": (255, 214, 112), "lamp": (255, 240, 176)}  # what shines by itself when the sun is gone
SKY = {  # above, in the middle, at the horizon; the last is also the colour of what lies far away
    ("day", "clear"): ((66, 138, 226), (120, 180, 240), (204, 230, 248)),
    ("day", "rain"): ((84, 98, 116), (122, 136, 150), (158, 168, 178)),
    ("day", "snow"): ((158, 172, 192), (190, 202, 216), (222, 228, 236)),
    ("day", "fog"): ((176, 188, 196), (200, 208, 212), (218, 222, 224)),
    ("dusk", "clear"): ((62, 52, 128), (206, 98, 132), (255, 178, 98)),
    ("dusk", "rain"): ((66, 56, 88), (124, 84, 104), (178, 120, 104)),
    ("dusk", "snow"): ((112, 96, 142), (178, 136, 160), (232, 180, 164)),
    ("dusk", "fog"): ((150, 118, 142), (196, 148, 152), (224, 178, 156)),
    ("night", "clear"): ((8, 12, 44), (22, 32, 84), (54, 72, 134)),
    ("night", "rain"): ((14, 18, 32), (28, 34, 50), (48, 56, 74)),
    ("night", "snow"): ((30, 36, 64), (52, 60, 92), (84, 94, 126)),
    ("night", "fog"): ((48, 54, 70), (72, 80, 96), (98, 106, 122)),
}
LIGHT = {"day": ((1, 1, 1), (0, 0, 0)), "dusk": ((0.82, 0.64, 0.66), (34, 12, 28)), "night": ((0.66, 0.66, 0.7), (0, 2, 28))}
LAND = {"day": 1, "dusk": 0.88, "night": 0.5}  # land keeps less light than the things on it: they stay tell-apart
HAZE = {"clear": 0, "rain": 0.12, "snow": 0.08, "fog": 0.26}


@dataclass(frozen=True)
class Scene:
    """objects: (colour, kind) from left to right. The seed draws all else: hills, places, shapes, stars, drops."""
    objects: tuple[tuple[str, str], ...]
    ground: str
    time: str
    weather: str
    seed: int

    def __post_init__(self):
        for what, value, known in [("ground", self.ground, GROUNDS), ("time", self.time, TIMES),
                                   ("weather", self.weather, WEATHERS), *(("colour", c, COLOURS) for c, _ in self.objects),
                                   *(("object", kind, KINDS) for _, kind in self.objects)]:
            if value not in known:
                raise ValueError(f"there is no {what} '{value}' in the scenes: known are {', '.join(known)}")
        if not 1 <= len(self.objects) <= 3 or self.ground != "lake" and "boat" in (kind for _, kind in self.objects):
            raise ValueError(f"{self.objects} on {self.ground}: expected one to three objects, and boats on a lake only")


def sample(rng: np.random.Generator, **fixed) -> Scene:
    """A scene whose fields come from rng, but for those given."""
    objects = fixed.get("objects", ())
    boat = any(kind == "boat" for _, kind in objects)
    ground = fixed.get("ground", "lake" if boat else GROUNDS[rng.integers(3)])
    chances = (0.18, 0.37, 0.55, 1.0) if ground == "lake" else (1 / 3, 2 / 3, 1.0)  # summed up, over KINDS
    for _ in range(0 if objects else 1 + int(np.searchsorted((0.35, 0.75), rng.random()))):
        thing = objects[0] if objects else None
        while thing is None or thing in objects:
            thing = list(COLOURS)[rng.integers(len(COLOURS))], KINDS[np.searchsorted(chances, rng.random(), "right")]
        objects += thing,
    drawn = dict(objects=objects, ground=ground, time=TIMES[rng.integers(3)], weather=WEATHERS[rng.integers(4)],
                 seed=int(rng.integers(2**31)))
    return Scene(**drawn | fixed)


def LEFT_OUT(scene: Scene) -> bool:
    """Whether an object is of a combination (colour, kind, time, weather) that training never draws: one in ten, spread
    so that every colour and every kind is seen at every time and in every weather."""
    light = 4 * TIMES.index(scene.time) + WEATHERS.index(scene.weather)
    return any((list(COLOURS).index(c) + 3 * KINDS.index(kind) + light) % 10 == 0 for c, kind in scene.objects)


def caption(scene: Scene) -> str:
    things = " and ".join(f"{'an' if c[0] in 'aeiou' else 'a'} {c} {kind}" for c, kind in scene.objects)
    return f"{things} {'by a lake' if scene.ground == 'lake' else f'on {scene.ground}'} {_light(scene.time, scene.weather)}"


def _light(time: str, weather: str) -> str:
    return f"{'in the day' if time == 'day' else f'at {time}'} {'in clear weather' if weather == 'clear' else f'in the {weather}'}"


# -------------------- Geometry: what stands where. Light and weather have no say in it.

Shape = tuple[str, list[tuple[float, float]]]  # material, polygon
TURN = [(math.cos(i * math.tau / 20), math.sin(i * math.tau / 20)) for i in range(20)]


def _box(x0: float, y0: float, x1: float, y1: float) -> list:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _round(x: float, y: float, rx: float, ry: float | None = None) -> list:
    return [(x + rx * c, y + (ry or rx) * s) for c, s in TURN]


def _house(u: np.ndarray, c: str) -> list[Shape]:  # u: numbers in [0, 1] that choose the variant; x in +-0.5, y upward
    w, h, top, side = 0.34 + 0.08 * u[0], 0.4 + 0.1 * u[1], 0.24 + 0.12 * u[2], 1 if u[3] < 0.5 else -1
    flat, x, door = (0.45 * w if u[4] < 0.4 else 0), 0.55 * w * side, -0.5 * w * side if u[5] < 0.6 else 0
    parts = [("dark roof", _box(x - 0.055, h, x + 0.055, h + top)), (c, _box(-w, 0, w, h)),
             ("roof", roof := [(-w - 0.06, h), (-flat, h + top), (flat, h + top), (w + 0.06, h)]),
             ("cap", [(0.7 * x, h + top - 0.36 * (h + top - y)) if False else (x * (0.62 if y == h else 1), y if y > h else h + 0.38 * top)
                      for x, y in roof]),
             ("door", _box(door - 0.07, 0, door + 0.07, 0.26))]
    for x in (0.45 * w, ) if door and door < 0 else (-0.45 * w, ) if door else (-0.6 * w, 0.6 * w):
        r = 0.12 if door else 0.085
        parts += [("glow", [(x, 0.26), (x + 0.34, 0.26)]), ("frame", _box(x - r - 0.025, 0.24 - r, x + r + 0.025, 0.29 + r)),
                  ("glass", _box(x - r, 0.265 - r, x + r, 0.265 + r)),
                  ("bar", _box(x - 0.012, 0.265 - r, x + 0.012, 0.265 + r))]
    return parts if flat else [*parts, ("frame", _round(0, h + 0.34 * top, 0.075)), ("glass", _round(0, h + 0.34 * top, 0.055))]


def _tree(u: np.ndarray, c: str) -> list[Shape]:
    if u[0] < 0.4:  # a fir
        tiers = [(0.18, 0.60, 0.38), (0.42, 0.84, 0.31), (0.66, 1.08, 0.23)]
        parts = [("wood", _box(-0.055, 0, 0.055, 0.22))]
        for i, (low, high, w) in enumerate(tiers):
            parts += [(c if i != 1 else f"dark {c}", [(-w, low), (0, high), (w, low)]),
                      ("cap", [(-0.45 * w, high - 0.45 * (high - low)), (0, high), (0.45 * w, high - 0.45 * (high - low))])]
        return parts
    wide, high = 0.9 + 0.2 * u[1], 0.64 + 0.1 * u[2]
    return [("wood", [(-0.075, 0), (-0.04, 0.5), (0.04, 0.5), (0.075, 0)]),
            *((c, _round(x * wide, high + y, r)) for x, y, r in [(-0.21, -0.08, 0.21), (0.21, -0.08, 0.21), (0, 0.1, 0.28)]),
            (f"light {c}", _round(-0.08, high + 0.17, 0.13, 0.11)),
            ("cap", _round(0, high + 0.29, 0.19, 0.09)), ("cap", _round(-0.24 * wide, high + 0.07, 0.12, 0.06)),
            ("cap", _round(0.25 * wide, high + 0.07, 0.12, 0.06))]


def _car(u: np.ndarray, c: str) -> list[Shape]:
    roof, back, front = (0.6, -0.44, 0.22) if u[0] < 0.4 else (0.54, -0.26, 0.14)  # a van, a saloon
    return [(c, [(-0.49, 0.12), (-0.49, 0.27), (-0.44, 0.34), (back - 0.06, 0.34), (back, roof), (front, roof), (front + 0.13, 0.34),
                 (0.42, 0.31), (0.49, 0.25), (0.49, 0.12)]),
            ("cap", _box(back + 0.01, roof - 0.02, front - 0.01, roof + 0.045)),
            ("pane", [(back - 0.01, 0.35), (back + 0.04, roof - 0.05), (-0.08, roof - 0.05), (-0.08, 0.35)]),
            ("pane", [(-0.03, 0.35), (-0.03, roof - 0.05), (front - 0.02, roof - 0.05), (front + 0.07, 0.35)]),
            (f"dark {c}", _box(-0.49, 0.12, 0.49, 0.165)),
            *((m, _round(x, 0.115, r)) for x in (-0.27, 0.28) for m, r in [("tyre", 0.115), ("metal", 0.05)]),
            ("beam", [(0.48, 0.25), (1.0, 0.36), (1.0, -0.02)]), ("lamp", _round(0.455, 0.235, 0.04))]


def _boat(u: np.ndarray, c: str) -> list[Shape]:
    high = 0.92 + 0.16 * u[0]
    return [("wood", _box(-0.02, 0.15, 0.02, high + 0.05)), (c, [(0.05, 0.3), (0.05, high), (0.27, 0.55), (0.42, 0.3)]),
            ("sail", [(-0.05, 0.3), (-0.05, high - 0.12), (-0.34, 0.3)]),
            (c, [(-0.48, 0.24), (0.5, 0.24), (0.38, 0), (-0.36, 0)]), (f"dark {c}", _box(-0.37, 0, 0.39, 0.05)),
            ("glow", [(0, high + 0.06), (0.22, high + 0.06)]), ("lamp", _round(0, high + 0.06, 0.035))]


BUILD = dict(house=_house, tree=_tree, car=_car, boat=_boat)


def _ridge(rng: np.random.Generator, y: float, height: float, wavelength: float) -> list:
    a, b, c = rng.uniform(0, math.tau, 3)
    x = np.linspace(-0.05, 1.05, 34)
    up = (2 + np.sin(x * wavelength + a) + 0.6 * np.sin(1.9 * x * wavelength + b) + 0.25 * np.sin(4.1 * x * wavelength + c)) / 3.6
    return [*zip(x.tolist(), (y - height * up).tolist()), (1.05, 1.05), (-0.05, 1.05)]


def shapes(scene: Scene) -> list[Shape]:
    """Everything but the sky, from back to front, in [0, 1] from the left and from above."""
    rng = np.random.default_rng([scene.seed, 1])
    n, lake = len(scene.objects), scene.ground == "lake"
    horizon = rng.uniform(0.5, 0.55)
    shore = horizon + 0.11
    far, near = ("mesa", "dune") if scene.ground == "sand" else ("mountain", "hill")
    found = [(far, _ridge(rng, horizon, rng.uniform(0.14, 0.24), rng.uniform(5, 9))), (near, _ridge(rng, horizon + 0.02, 0.1, 6)),
             ("grass" if lake else scene.ground, _ridge(rng, horizon + 0.02, 0.03, 4)), ("haze", [])]
    for x, y, size in rng.uniform(0, 1, (0 if lake else 26, 3)):
        y = horizon + 0.05 + (0.97 - horizon) * y
        r = 0.4 + y
        if scene.ground == "sand":
            found.append(("ripple", _round(x, y, 0.07 * r * (0.4 + size), 0.006 * r)))
        elif size < 0.3:
            found.append(("flower", _round(x, y, 0.009 * r)))
        else:
            found.append(("tuft", [(x - 0.016 * r, y - 0.026 * r), (x, y), (x + 0.002, y - 0.04 * r), (x + 0.006 * r, y), (x + 0.02 * r, y - 0.024 * r), (x + 0.012, y)]))
    placed = []
    for i, (c, kind) in enumerate(scene.objects):
        u = rng.random(12)
        scale = (0.5, 0.42, 0.315)[n - 1] * (0.86 + 0.14 * u[0])
        base = shore - 0.012 * u[1] if lake else 0.72 + 0.2 * u[1]
        if kind == "boat":
            base = shore + 0.1 + (0.86 - shore) * 0.9 * u[1]
        slack = max(0, 1 / n - scale)
        x, flip = (i + 0.5) / n + slack * (u[2] - 0.5), 1 if u[3] < 0.5 else -1
        own = [(m, [(x + flip * scale * px, base - scale * py) for px, py in points]) for m, points in BUILD[kind](u[4:], c)]
        if kind == "boat":
            own[:0] = [(f"~{m}", [(px, 1.7 * base - 0.7 * py) for px, py in points]) for m, points in own if m not in ("glow", "lamp")]
        else:
            own.insert(0, ("shadow", _round(x, base, 0.5 * scale, 0.03 * scale + 0.004)))
        placed.append((kind == "boat", base, own))
    ashore, afloat = ([shape for boat, _, own in sorted(placed, key=lambda p: p[1]) if boat == b for shape in own] for b in (0, 1))
    if lake:
        waves = [("wave", _round(x, shore + 0.03 + (1 - shore) * y, (0.02 + 0.05 * r) * (0.5 + y), 0.003 + 0.004 * y))
                 for x, y, r in rng.uniform(0, 1, (20, 3))]
        return [*found, *ashore, ("water", _box(-0.05, shore, 1.05, 1.05)), *waves, *afloat]
    return [*found, *ashore]


def outlines(scene: Scene, size: int) -> Image.Image:
    """White lines on black: the edges of hills, ground, water and objects."""
    s = size * (3 if size < 100 else 2)
    picture = Image.new("RGB", (s, s))
    d, width = ImageDraw.Draw(picture), 2 * max(1, round(s / 150)) + 1
    solid = [(m, [(x * s, y * s) for x, y in p]) for m, p in shapes(scene) if m not in UNSEEN and m[0] != "~"]
    for _, group in groupby(solid, key=lambda shape: shape[0].split()[-1]):  # one edge around all of one material
        group = [points for _, points in group]
        for points in group:
            d.line([*points, points[0], points[1]], fill="white", width=width, joint="curve")
        for points in group:
            d.polygon(points, fill="black")
    return picture.resize((size, size), Image.Resampling.BOX)


# -------------------- Light: how it looks

UNSEEN = {"haze", "ripple", "flower", "tuft", "cap", "bar", "glow", "beam", "shadow", "wave"}  # not in the outlines


def _mix(a: tuple, b: tuple, t: float) -> tuple[int, int, int]:
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b))


@lru_cache(maxsize=4096)
def shade(material: str, time: str, weather: str) -> tuple[int, int, int]:
    """RGB of a material or a colour (also "light red", "dark red") as it looks in that light."""
    tone, _, name = material.rpartition(" ")
    if name in LIT and time != "day":
        return LIT[name]
    thing = name not in ("grass", "sand", "lake", "hill", "mountain", "dune", "mesa")
    rgb = COLOURS.get(name) or MATERIALS.get(name) or MATERIALS["pane"]
    rgb = _mix(rgb, (0, 0, 0), 0.28) if tone == "dark" else _mix(rgb, (255, 255, 255), 0.3) if tone == "light" else rgb
    if weather == "snow" and not thing and name != "lake":
        rgb = _mix(rgb, (246, 249, 255), 0.72)
    gain, lift = LIGHT[time]
    rgb = tuple((v * g + k) * (1 if thing else LAND[time]) for v, g, k in zip(rgb, gain, lift))
    far = {"mountain": 0.3, "mesa": 0.3, "hill": 0.12, "dune": 0.1}.get(name, 0)
    return _mix(rgb, SKY[time, weather][2], min(1, far + HAZE[weather] * (1 if thing else 1.5)))


@lru_cache(maxsize=64)
def _halo(radius: int, strength: float) -> Image.Image:
    y, x = np.mgrid[-1:1:2j * radius, -1:1:2j * radius]
    return Image.fromarray((255 * strength * np.clip(1 - np.hypot(x, y), 0, 1) ** 2).astype(np.uint8))


@lru_cache(maxsize=64)
def _gradient(colours: tuple, stops: tuple, size: int) -> Image.Image:
    y = (np.arange(size) + 0.5) / size
    column = np.stack([np.interp(y, stops, channel) for channel in zip(*colours)], axis=1)[:, None]
    return Image.fromarray(column.round().astype(np.uint8)).resize((size, size))


def _glow(picture: Image.Image, x: float, y: float, radius: float, colour: tuple, strength: float) -> None:
    r = max(2, round(radius))
    picture.paste(colour, (round(x) - r, round(y) - r), _halo(r, strength))


def _sky(picture: Image.Image, d: ImageDraw.ImageDraw, scene: Scene, s: int) -> float:
    """Sun or moon, stars, clouds; returns where the light stands, from the left."""
    rng = np.random.default_rng([scene.seed, 2])
    time, weather, x, y = scene.time, scene.weather, rng.uniform(0.14, 0.86), rng.uniform(0.12, 0.26)
    stars, clouds, dark = rng.random((34, 3)), rng.random((2 + int(rng.integers(2)), 8)), rng.random((16, 3))
    if time != "day" and weather == "clear":
        for px, py, r in stars if time == "night" else stars[:7]:
            r, py = (0.004 + 0.007 * r**3) * s, (0.42 if time == "night" else 0.2) * py * s
            d.polygon([(px * s + dx * r, py + dy * r) for dx, dy in ((-1.5, 0), (0, -1.5), (1.5, 0), (0, 1.5))], fill=(255, 250, 220, 255))
    if weather == "clear":
        if time == "night":
            _glow(picture, x * s, y * s, 0.24 * s, (190, 205, 255), 0.5)
            moon = _round(x * s, y * s, 0.075 * s)
            d.polygon([*moon[5:16], *((px * 0.45 + x * s * 0.55, py) for px, py in moon[15:4:-1])] if rng.random() < 0.6 else moon, fill=(250, 246, 222))
        else:
            low = time == "dusk"
            y = 0.4 if low else y
            _glow(picture, x * s, y * s, (0.42 if low else 0.26) * s, (255, 214, 130) if low else (255, 248, 205), 0.9)
            d.polygon(_round(x * s, y * s, (0.1 if low else 0.08) * s), fill=(255, 226, 120) if low else (255, 240, 150))
    elif weather == "fog":
        _glow(picture, x * s, y * s, 0.2 * s, (255, 255, 245), 0.5 if time == "day" else 0.3)
    if weather == "clear":
        tint = _mix({"day": (255, 255, 255), "dusk": (255, 170, 150), "night": (70, 82, 140)}[time], SKY[time, weather][1], 0.1)
        for px, py, *bumps in clouds:
            px, py, w = px, 0.08 + 0.26 * py, 0.07 + 0.05 * bumps[0]
            for i, bump in enumerate(bumps[1:5]):
                d.polygon(_round((px + (i - 1.5) * w * 0.8) * s, (py - 0.02 * (i in (1, 2))) * s, w * (0.45 + 0.4 * bump) * s, w * (0.3 + 0.25 * bump) * s),
                          fill=tint)
    elif weather != "fog":
        for i, (px, py, r) in enumerate(dark):
            tint = _mix(SKY[time, weather][0], SKY[time, weather][1], 0.9 * (i % 4) / 3)
            d.polygon(_round(((i + px) / 15) * s, (0.02 + 0.13 * py) * s, (0.1 + 0.09 * r) * s, (0.05 + 0.05 * r) * s), fill=tint)
    return x


def _water(picture: Image.Image, d: ImageDraw.ImageDraw, scene: Scene, s: int, shore: int, light: float) -> None:
    """The lake: what lies above it upside down, blended with its own colour, and the glitter of sun or moon."""
    time, weather = scene.time, scene.weather
    mirror = picture.crop((0, 2 * shore - s, s, shore)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    lake = _gradient((shade("lake", time, weather), _mix(shade("lake", time, weather), (8, 24, 60), 0.35)), (0.0, 1.0), s)
    picture.paste(Image.blend(mirror, lake.crop((0, 0, s, s - shore)), 0.55 if weather == "clear" else 0.7), (0, shore))
    if weather == "clear":
        colour = {"day": (255, 255, 250), "dusk": (255, 200, 120), "night": (228, 232, 255)}[time]
        for k, (x, w) in enumerate(np.random.default_rng([scene.seed, 3]).random((11, 2))):
            y = shore + (s - shore) * (0.06 + k / 12)
            d.polygon(_round((light + 0.06 * (x - 0.5)) * s, y, (0.015 + 0.05 * w) * s, 0.006 * s), fill=(*colour, 120 if time == "day" else 190))


def _falling(d: ImageDraw.ImageDraw, scene: Scene, s: int) -> None:
    rng = np.random.default_rng([scene.seed, 4])
    if scene.weather == "rain":
        lean, colour = rng.uniform(-0.03, 0.03), {"day": (226, 236, 246), "dusk": (246, 218, 216), "night": (150, 166, 204)}[scene.time]
        for x, y, r in rng.random((64, 3)):
            dx, dy = (lean + 0.012) * (0.7 + r) * s, (0.06 + 0.05 * r) * s
            d.line([(x * 1.1 * s, y * 1.1 * s - dy), (x * 1.1 * s - dx, y * 1.1 * s)], fill=(*colour, 170), width=max(1, round(s / 110)))
    elif scene.weather == "snow":
        colour = {"day": (255, 255, 255), "dusk": (255, 240, 240), "night": (226, 232, 255)}[scene.time]
        for x, y, r in rng.random((70, 3)):
            r = (0.006 + 0.009 * r * r) * s
            d.ellipse([x * s - r, y * s - r, x * s + r, y * s + r], fill=(*colour, 235))


def _mist(picture: Image.Image, colour: tuple, middle: float, width: float, peak: float) -> None:
    """A bank of fog across the picture, densest at height `middle`."""
    y = (np.arange(picture.height) + 0.5) / picture.height
    mask = Image.fromarray((255 * peak * np.exp(-(((y - middle) / width) ** 2))).astype(np.uint8)[:, None])
    picture.paste(colour, mask=mask.resize(picture.size))


def draw(scene: Scene, size: int) -> Image.Image:
    s = size * (3 if size < 100 else 2)
    time, weather = scene.time, scene.weather
    picture = _gradient(SKY[time, weather], (0.0, 0.3, 0.55), s).copy()
    d = ImageDraw.Draw(picture, "RGBA")  # fills with a fourth number are blended
    light = _sky(picture, d, scene, s)
    for material, points in shapes(scene):
        points = [(x * s, y * s) for x, y in points]
        if material in ("glow", "beam"):
            if time == "day":
                continue
            (x, y), (edge, _), *_ = points
            if material == "glow":
                _glow(picture, x, y, abs(edge - x), LIT["glass"], 0.65 if time == "night" else 0.4)
            else:
                d.polygon(points, fill=(*LIT["lamp"], 90 if time == "night" else 50))
        elif material == "haze":
            if weather == "fog":
                _mist(picture, SKY[time, weather][2], 0.48, 0.2, 0.86)
        elif material == "water":
            _water(picture, d, scene, s, round(points[0][1]), light)
        elif material == "cap":
            if weather == "snow":
                d.polygon(points, fill=shade("frame", time, weather))
        elif material == "shadow":
            d.polygon(points, fill=(10, 20, 40, 70))
        elif material == "wave":
            d.polygon(points, fill=(*_mix(shade("lake", time, weather), (255, 255, 255), 0.5), 130 if time == "day" else 70))
        elif material == "ripple":
            d.polygon(points, fill=_mix(shade("sand", time, weather), shade("dune", time, weather), 0.5))
        elif material == "tuft":
            d.polygon(points, fill=_mix(shade("grass", time, weather), (30, 70, 40), 0.4))
        elif material == "flower":
            d.polygon(points, fill=shade("sail", time, weather))
        elif material[0] == "~":
            d.polygon(points, fill=(*_mix(shade(material[1:], time, weather), shade("lake", time, weather), 0.35), 150))
        else:
            d.polygon(points, fill=shade("frame" if material == "bar" else material, time, weather))
    if weather == "fog":
        _mist(picture, SKY[time, weather][2], 0.62, 0.2, 0.3)
    _falling(d, scene, s)
    return picture.resize((size, size), Image.Resampling.BOX)


# -------------------- Data sets
