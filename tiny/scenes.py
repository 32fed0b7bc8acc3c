"""A small world drawn from a description and a seed: houses, trees, cars and boats on grass, on sand and by a lake.

Time and weather are fields of a scene that move nothing: `replace(scene, time="night")` is the same place in another
light, so the true translation of every picture is known. One combination in ten of (colour, object, time, weather) is
left out of training, and the test pictures are made of these.

    python -m tiny.scenes OUT --task edges --n 500             pairs: outlines and pictures, with captions
    python -m tiny.scenes OUT --task day2night --n 500         unpaired, with the true nights of test_A (or clear2rain)
    python -m tiny.scenes OUT.png --sheet                      a page of scenes to look at
"""

import argparse
import hashlib
import json
import math
import pathlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import groupby, product

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import training
from dataset.pictures import to_tensor

KINDS, GROUNDS = ("house", "tree", "car", "boat"), ("grass", "sand", "lake")
TIMES, WEATHERS = ("day", "night", "dusk"), ("clear", "rain", "snow", "fog")
RGB = tuple[int, int, int]
COLOURS = {
    "red": (208, 32, 42), "orange": (246, 130, 20), "yellow": (255, 226, 70), "green": (16, 146, 70),
    "blue": (34, 96, 226), "purple": (134, 54, 176), "pink": (252, 146, 200), "white": (246, 246, 246),
}
LAND = {
    "grass": (136, 190, 84), "sand": (238, 208, 146), "lake": (72, 142, 196), "hill": (112, 160, 112),
    "mountain": (126, 156, 172), "dune": (214, 176, 122), "mesa": (190, 150, 128), "ripple": (226, 192, 134),
    "tuft": (94, 142, 66), "wave": (126, 174, 212),
}
MATERIALS = {
    "roof": (112, 82, 84), "wood": (116, 78, 52), "door": (92, 58, 44), "frame": (250, 248, 240),
    "bar": (250, 248, 240), "sail": (250, 240, 216), "flower": (250, 240, 216), "pane": (176, 214, 232),
    "glass": (176, 214, 232), "lamp": (176, 214, 232), "tyre": (38, 38, 46), "metal": (196, 200, 206),
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
LIGHT = {  # what a colour is multiplied with, and what is added
    "day": ((1, 1, 1), (0, 0, 0)), "dusk": ((0.88, 0.8, 0.78), (26, 6, 18)), "night": ((0.72, 0.72, 0.76), (0, 2, 24)),
}
DIM = {"day": 1, "dusk": 0.88, "night": 0.5}  # land keeps less light than the things on it, which so stay tell-apart
HAZE = {"clear": 0, "rain": 0.12, "snow": 0.08, "fog": 0.2}
WHITE = (255, 255, 255)
TASKS = {  # time and weather of domain A, and of B
    "day2night": (("day", "clear"), ("night", "clear")), "clear2rain": (("day", "clear"), ("day", "rain")),
}


@dataclass(frozen=True)
class Scene:
    """objects: (colour, kind) from left to right. The seed draws all else: hills, places, shapes, stars, drops."""
    objects: tuple[tuple[str, str], ...]
    ground: str
    time: str
    weather: str
    seed: int

    def __post_init__(self):
        for what, value, known in [
                ("ground", self.ground, GROUNDS), ("time", self.time, TIMES), ("weather", self.weather, WEATHERS),
                *(("colour", colour, COLOURS) for colour, _ in self.objects),
                *(("object", kind, KINDS) for _, kind in self.objects)]:
            if value not in known:
                raise ValueError(f"there is no {what} '{value}' in the scenes: known are {', '.join(known)}")
        if not 1 <= len(self.objects) <= 3:
            raise ValueError(f"found {len(self.objects)} objects in a scene, expected one to three")
        if self.ground != "lake" and "boat" in (kind for _, kind in self.objects):
            raise ValueError(f"found a boat on {self.ground}: boats need ground='lake'")


def _rng(*what) -> np.random.Generator:
    """The draws of one purpose, named by anything; whole numbers of any size and sign are welcome."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def sample(rng: np.random.Generator, **fixed) -> Scene:
    """A scene whose fields come from rng, but for those given."""
    objects = fixed.get("objects", ())
    boat = any(kind == "boat" for _, kind in objects)
    ground = fixed.get("ground", "lake" if boat else GROUNDS[rng.integers(3)])
    chances = (0.18, 0.37, 0.55, 1.0) if ground == "lake" else (1 / 3, 2 / 3, 1.0)  # of KINDS, summed up
    for _ in range(0 if objects else 1 + np.searchsorted((0.35, 0.75), rng.random())):
        thing = None
        while thing is None or thing in objects:
            thing = list(COLOURS)[rng.integers(len(COLOURS))], KINDS[np.searchsorted(chances, rng.random(), "right")]
        objects += (thing,)
    drawn = dict(objects=objects, ground=ground, time=TIMES[rng.integers(3)], weather=WEATHERS[rng.integers(4)],
                 seed=int(rng.integers(2**62)))
    return Scene(**drawn | fixed)


def left_out(scene: Scene) -> bool:
    """Whether an object is of a combination (colour, kind, time, weather) that training never draws: one in ten, spread
    so that every colour and every kind is seen at every time and in every weather."""
    light = 4 * TIMES.index(scene.time) + WEATHERS.index(scene.weather)
    return any((list(COLOURS).index(c) + 3 * KINDS.index(kind) + light) % 10 == 0 for c, kind in scene.objects)


def light_phrase(time: str, weather: str) -> str:
    when = "in the day" if time == "day" else f"at {time}"
    return f"{when} {'in clear weather' if weather == 'clear' else f'in the {weather}'}"


def caption(scene: Scene) -> str:
    things = " and ".join(f"{'an' if c[0] in 'aeiou' else 'a'} {c} {kind}" for c, kind in scene.objects)
    where = "by a lake" if scene.ground == "lake" else f"on {scene.ground}"
    return f"{things} {where} {light_phrase(scene.time, scene.weather)}"


# -------------------- Geometry: what stands where. Light and weather have no say in it.

Shape = tuple[str, list[tuple[float, float]]]  # material, polygon
TURN = [(math.cos(i * math.tau / 20), math.sin(i * math.tau / 20)) for i in range(20)]
# Materials that are no solid colour, or too fine for an outline. "~MATERIAL" is its reflection.
UNSEEN = {"haze", "ripple", "flower", "tuft", "cap", "bar", "glow", "beam", "shadow", "wave"}


def _box(x0: float, y0: float, x1: float, y1: float) -> list:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _round(x: float, y: float, rx: float, ry: float | None = None) -> list:
    return [(x + rx * c, y + (ry or rx) * s) for c, s in TURN]


# An object: u are numbers in [0, 1] that choose its variant; x goes from -0.5 to 0.5, y from the ground upward. "cap"
# is snow that lies on it, "glow" a halo (its centre and a point at its edge).

def _house(u: np.ndarray, c: str) -> list[Shape]:
    w, h, top, side = 0.34 + 0.08 * u[0], 0.4 + 0.1 * u[1], 0.24 + 0.12 * u[2], 1 if u[3] < 0.5 else -1
    flat, door = 0.45 * w if u[4] < 0.4 else 0, -0.5 * w * side if u[5] < 0.6 else 0
    chimney, eaves, snow = 0.55 * w * side, w + 0.06, h + 0.38 * top
    parts = [("dark roof", _box(chimney - 0.055, h, chimney + 0.055, h + top)), (c, _box(-w, 0, w, h)),
             ("roof", [(-eaves, h), (-flat, h + top), (flat, h + top), (eaves, h)]),
             ("cap", [(-0.62 * eaves, snow), (-flat, h + top), (flat, h + top), (0.62 * eaves, snow)]),
             ("door", _box(door - 0.07, 0, door + 0.07, 0.26))]
    for x in (-0.9 * door,) if door else (-0.6 * w, 0.6 * w):
        r = 0.12 if door else 0.085
        parts += [("glow", [(x, 0.26), (x + 0.34, 0.26)]),
                  ("frame", _box(x - r - 0.025, 0.24 - r, x + r + 0.025, 0.29 + r)),
                  ("glass", _box(x - r, 0.265 - r, x + r, 0.265 + r)),
                  ("bar", _box(x - 0.012, 0.265 - r, x + 0.012, 0.265 + r))]
    attic = [(m, _round(0, h + 0.34 * top, r)) for m, r in (("frame", 0.075), ("glass", 0.055))]
    return parts if flat else parts + attic


def _tree(u: np.ndarray, c: str) -> list[Shape]:
    if u[0] < 0.4:  # a fir
        parts = [("wood", _box(-0.055, 0, 0.055, 0.22))]
        for tone, low, high, w in (("", 0.18, 0.6, 0.38), ("dark ", 0.42, 0.84, 0.31), ("", 0.66, 1.08, 0.23)):
            snow = high - 0.45 * (high - low)
            parts += [(tone + c, [(-w, low), (0, high), (w, low)]),
                      ("cap", [(-0.45 * w, snow), (0, high), (0.45 * w, snow)])]
        return parts
    wide, high = 0.9 + 0.2 * u[1], 0.64 + 0.1 * u[2]
    crown = [(-0.21 * wide, -0.08, 0.21), (0.21 * wide, -0.08, 0.21), (0, 0.1, 0.28)]
    snow = [(0, 0.29, 0.19, 0.09), (-0.24 * wide, 0.07, 0.12, 0.06), (0.25 * wide, 0.07, 0.12, 0.06)]
    return [("wood", [(-0.075, 0), (-0.04, 0.5), (0.04, 0.5), (0.075, 0)]),
            *((c, _round(x, high + y, r)) for x, y, r in crown), (f"light {c}", _round(-0.08, high + 0.17, 0.13, 0.11)),
            *(("cap", _round(x, high + y, rx, ry)) for x, y, rx, ry in snow)]


def _car(u: np.ndarray, c: str) -> list[Shape]:
    roof, back, front = (0.6, -0.44, 0.22) if u[0] < 0.4 else (0.54, -0.26, 0.14)  # a van, a saloon
    return [(c, [(-0.49, 0.12), (-0.49, 0.27), (-0.44, 0.34), (back - 0.06, 0.34), (back, roof), (front, roof),
                 (front + 0.13, 0.34), (0.42, 0.31), (0.49, 0.25), (0.49, 0.12)]),
            ("cap", _box(back + 0.01, roof - 0.02, front - 0.01, roof + 0.045)),
            ("pane", [(back - 0.01, 0.35), (back + 0.04, roof - 0.05), (-0.08, roof - 0.05), (-0.08, 0.35)]),
            ("pane", [(-0.03, 0.35), (-0.03, roof - 0.05), (front - 0.02, roof - 0.05), (front + 0.07, 0.35)]),
            (f"dark {c}", _box(-0.49, 0.12, 0.49, 0.165)),
            *((m, _round(x, 0.115, r)) for x in (-0.27, 0.28) for m, r in (("tyre", 0.115), ("metal", 0.05))),
            ("beam", [(0.48, 0.25), (1.0, 0.36), (1.0, -0.02)]), ("lamp", _round(0.455, 0.235, 0.04))]


def _boat(u: np.ndarray, c: str) -> list[Shape]:
    high = 0.92 + 0.16 * u[0]
    return [("wood", _box(-0.02, 0.15, 0.02, high + 0.05)), (c, [(0.05, 0.3), (0.05, high), (0.27, 0.55), (0.42, 0.3)]),
            ("sail", [(-0.05, 0.3), (-0.05, high - 0.12), (-0.34, 0.3)]),
            (c, [(-0.48, 0.24), (0.5, 0.24), (0.38, 0), (-0.36, 0)]), (f"dark {c}", _box(-0.37, 0, 0.39, 0.05)),
            ("glow", [(0, high + 0.06), (0.22, high + 0.06)]), ("lamp", _round(0, high + 0.06, 0.035))]


def _ridge(rng: np.random.Generator, y: float, height: float, wavelength: float) -> list:
    waves = [(k, a, rng.uniform(0, math.tau)) for k, a in ((1, 1), (1.9, 0.6), (4.1, 0.25))]
    x = np.linspace(-0.05, 1.05, 34)
    up = (2 + sum(a * np.sin(k * wavelength * x + phase) for k, a, phase in waves)) / 3.6
    return [*zip(x.tolist(), (y - height * up).tolist()), (1.05, 1.05), (-0.05, 1.05)]


def _land(scene: Scene, horizon: float) -> list[Shape]:
    rng, sand, lake = _rng(scene.seed, "land"), scene.ground == "sand", scene.ground == "lake"
    found = [("mesa" if sand else "mountain", _ridge(rng, horizon, rng.uniform(0.14, 0.24), rng.uniform(5, 9))),
             ("dune" if sand else "hill", _ridge(rng, horizon + 0.02, 0.1, 6)),
             ("grass" if lake else scene.ground, _ridge(rng, horizon + 0.02, 0.03, 4)), ("haze", [])]
    for x, y, size in rng.random((0 if lake else 26, 3)):
        y = horizon + 0.05 + (0.97 - horizon) * y
        r = 0.4 + y  # what is nearer is larger
        if sand:
            found.append(("ripple", _round(x, y, 0.07 * r * (0.4 + size), 0.006 * r)))
        elif size < 0.3:
            found.append(("flower", _round(x, y, 0.009 * r)))
        else:
            blades = [(-0.016, -0.026), (0, 0), (0.002, -0.04), (0.006, 0), (0.02, -0.024), (0.012, 0)]
            found.append(("tuft", [(x + dx * r, y + dy * r) for dx, dy in blades]))
    return found


def shapes(scene: Scene) -> list[Shape]:
    """Everything but the sky, from back to front, in [0, 1] from the left and from above."""
    rng, n, lake = _rng(scene.seed, "things"), len(scene.objects), scene.ground == "lake"
    horizon = rng.uniform(0.5, 0.55)
    shore, things = horizon + 0.11, []
    for i, (c, kind) in enumerate(scene.objects):
        u, afloat = rng.random(12), kind == "boat"
        near, far = (0.87, shore + 0.1) if afloat else (shore - 0.012, shore) if lake else (0.92, 0.72)
        base = far + (near - far) * u[1]
        scale = (0.5, 0.42, 0.315)[n - 1] * (0.86 + 0.14 * u[0])
        x, flip = (i + 0.5) / n + max(0, 1 / n - scale) * (u[2] - 0.5), 1 if u[3] < 0.5 else -1
        own = [(m, [(x + flip * scale * px, base - scale * py) for px, py in points])
               for m, points in dict(house=_house, tree=_tree, car=_car, boat=_boat)[kind](u[4:], c)]
        below = [("shadow", _round(x, base, 0.5 * scale, 0.03 * scale + 0.004))]
        if afloat:  # upside down and foreshortened
            below = [(f"~{m}", [(px, 1.7 * base - 0.7 * py) for px, py in points])
                     for m, points in own if m not in ("glow", "lamp")]
        things.append((afloat, base, below + own))
    things.sort(key=lambda thing: thing[:2])
    ashore, afloat = ([shape for wet, _, own in things if wet == boat for shape in own] for boat in (False, True))
    water = [("water", _box(-0.05, shore, 1.05, 1.05))]
    for x, y, r in _rng(scene.seed, "waves").random((20, 3)):
        size = (0.02 + 0.05 * r) * (0.5 + y), 0.003 + 0.004 * y
        water.append(("wave", _round(x, shore + 0.03 + (1 - shore) * y, *size)))
    return [*_land(scene, horizon), *ashore, *(water if lake else []), *afloat]


# -------------------- Drawing

class Canvas:
    """A square picture whose corners are (0, 0) and (1, 1). It is drawn larger and reduced in the end: smooth edges."""

    def __init__(self, size: int):
        self.size, self.s = size, size * (3 if size < 100 else 2)
        self.picture = Image.new("RGB", (self.s, self.s))
        self.pen = ImageDraw.Draw(self.picture, "RGBA")  # a colour with a fourth number is blended

    def polygon(self, points: list, colour: tuple) -> None:
        self.pen.polygon([(x * self.s, y * self.s) for x, y in points], colour)

    def line(self, points: list, colour: tuple, width: int) -> None:
        self.pen.line([(x * self.s, y * self.s) for x, y in points], colour, width)

    def glow(self, x: float, y: float, radius: float, colour: RGB, strength: float) -> None:
        r = max(2, round(radius * self.s))
        self.picture.paste(colour, (round(x * self.s) - r, round(y * self.s) - r), _halo(r, strength))

    def mist(self, colour: RGB, middle: float, peak: float) -> None:
        """A bank of fog from left to right, densest at height `middle`."""
        y = (np.arange(self.s) + 0.5) / self.s
        mask = Image.fromarray((255 * peak * np.exp(-(((y - middle) / 0.2) ** 2))).astype(np.uint8)[:, None])
        self.picture.paste(colour, mask=mask.resize((self.s, self.s)))

    def finished(self) -> Image.Image:
        return self.picture.resize((self.size, self.size), Image.Resampling.BOX)


@lru_cache(maxsize=64)
def _halo(radius: int, strength: float) -> Image.Image:
    y, x = np.mgrid[-1:1:2j * radius, -1:1:2j * radius]
    return Image.fromarray((255 * strength * np.clip(1 - np.hypot(x, y), 0, 1) ** 2).astype(np.uint8))


@lru_cache(maxsize=64)
def _gradient(colours: tuple[RGB, ...], stops: tuple[float, ...], size: int) -> Image.Image:
    y = (np.arange(size) + 0.5) / size
    column = np.stack([np.interp(y, stops, channel) for channel in zip(*colours)], axis=1)[:, None]
    return Image.fromarray(column.round().astype(np.uint8)).resize((size, size))


def outlines(scene: Scene, size: int) -> Image.Image:
    """White lines on black, size x size, RGB: the edges of hills, ground, water and objects."""
    canvas = Canvas(size)
    width = 2 * max(2, round(canvas.s / 150))  # of which the inner half is painted over
    solid = [shape for shape in shapes(scene) if shape[0] not in UNSEEN and shape[0][0] != "~"]
    for _, group in groupby(solid, key=lambda shape: shape[0].split()[-1]):  # one edge around all of one material
        group = [points for _, points in group]
        for points in group:
            canvas.line([*points, *points[:2]], WHITE, width)
        for points in group:
            canvas.polygon(points, (0, 0, 0))
    return canvas.finished()


# -------------------- Light: how it looks

def _mix(a: RGB, b: RGB, t: float) -> RGB:
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b))


@lru_cache(maxsize=4096)
def shade(material: str, time: str, weather: str) -> RGB:
    """A material or a colour (also "light red", "dark red") as it looks in that light."""
    tone, _, name = material.rpartition(" ")
    if name in LIT and time != "day":
        return LIT[name]
    rgb = LAND.get(name) or COLOURS.get(name) or MATERIALS[name]
    rgb = _mix(rgb, (0, 0, 0), 0.28) if tone == "dark" else _mix(rgb, WHITE, 0.3) if tone == "light" else rgb
    snowy = weather == "snow" and name in LAND and name not in ("lake", "wave")
    if snowy:
        rgb = _mix(rgb, (246, 249, 255), 0.5 if name == "tuft" else 0.72)
    dim = DIM[time] ** (0.5 if snowy else 1) if name in LAND else 1
    rgb = tuple((v * gain + lift) * dim for v, gain, lift in zip(rgb, *LIGHT[time]))
    far = {"mountain": 0.3, "mesa": 0.3, "hill": 0.12, "dune": 0.1}.get(name, 0)
    return _mix(rgb, SKY[time, weather][2], far + HAZE[weather] * (1.5 if name in LAND else 1))


def _fill(material: str, time: str, weather: str) -> tuple[int, ...] | None:
    """The colour of a shape, a fourth number where it is blended, None where this light hides it."""
    if material == "shadow":
        return 10, 20, 40, 70
    if material == "beam":
        return None if time == "day" else (*LIT["lamp"], 90 if time == "night" else 50)
    if material == "cap":
        return shade("frame", time, weather) if weather == "snow" else None
    if material[0] == "~":
        return *_mix(shade(material[1:], time, weather), shade("lake", time, weather), 0.35), 150
    return shade(material, time, weather)


def _sky(canvas: Canvas, scene: Scene) -> float:
    """Sun or moon, stars, clouds; returns where the light stands, from the left."""
    rng, time, weather = _rng(scene.seed, "sky"), scene.time, scene.weather
    x, y, crescent = rng.uniform(0.14, 0.86), rng.uniform(0.12, 0.26), rng.random() < 0.6
    above, middle, _ = SKY[time, weather]
    if weather == "fog":
        canvas.glow(x, y, 0.2, (255, 255, 245), 0.5 if time == "day" else 0.3)
        return x
    if weather != "clear":  # a dark cover
        for i, (px, py, r) in enumerate(_rng(scene.seed, "cover").random((16, 3))):
            cloud = _round((i + px) / 15, 0.02 + 0.13 * py, 0.1 + 0.09 * r, 0.05 + 0.05 * r)
            canvas.polygon(cloud, _mix(above, middle, 0.3 * (i % 4)))
        return x
    for px, py, r in _rng(scene.seed, "stars").random((34, 3))[:dict(day=0, dusk=7, night=34)[time]]:
        r, py = 0.006 + 0.01 * r**3, (0.42 if time == "night" else 0.2) * py
        canvas.polygon([(px - r, py), (px, py - r), (px + r, py), (px, py + r)], (255, 250, 220))
    if time == "night":
        canvas.glow(x, y, 0.24, (190, 205, 255), 0.5)
        moon = _round(x, y, 0.075)
        inner = [(x + 0.45 * (px - x), py) for px, py in moon[15:4:-1]]
        canvas.polygon([*moon[5:16], *inner] if crescent else moon, (250, 246, 222))
    elif time == "dusk":
        canvas.glow(x, 0.4, 0.42, (255, 214, 130), 0.9)
        canvas.polygon(_round(x, 0.4, 0.1), (255, 226, 120))
    else:
        canvas.glow(x, y, 0.26, (255, 248, 205), 0.9)
        canvas.polygon(_round(x, y, 0.08), (255, 240, 150))
    tint = _mix({"day": WHITE, "dusk": (255, 170, 150), "night": (70, 82, 140)}[time], middle, 0.1)
    clouds = _rng(scene.seed, "clouds")
    for px, py, w, *puffs in clouds.random((2 + clouds.integers(2), 7)):
        py, w = 0.08 + 0.26 * py, 0.07 + 0.05 * w
        for i, puff in enumerate(puffs):
            place = px + 0.8 * (i - 1.5) * w, py - 0.02 * (i in (1, 2))
            canvas.polygon(_round(*place, w * (0.45 + 0.4 * puff), w * (0.3 + 0.25 * puff)), tint)
    return x


def _water(canvas: Canvas, scene: Scene, shore: float, light: float) -> None:
    """The lake: what lies above it upside down, blended with its own colour, and the glitter of sun or moon."""
    s, y, own = canvas.s, round(shore * canvas.s), shade("lake", scene.time, scene.weather)
    mirror = canvas.picture.crop((0, 2 * y - s, s, y)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    lake = _gradient((own, _mix(own, (8, 24, 60), 0.35)), (0.0, 1.0), s).crop((0, 0, s, s - y))
    canvas.picture.paste(Image.blend(mirror, lake, 0.55 if scene.weather == "clear" else 0.7), (0, y))
    if scene.weather == "clear":
        colour = {"day": (255, 255, 250, 120), "dusk": (255, 200, 120, 190), "night": (228, 232, 255, 190)}[scene.time]
        for k, (x, w) in enumerate(_rng(scene.seed, "glitter").random((11, 2))):
            place = light + 0.06 * (x - 0.5), shore + (1 - shore) * (0.06 + k / 12)
            canvas.polygon(_round(*place, 0.015 + 0.05 * w, 0.006), colour)


def _falling(canvas: Canvas, scene: Scene) -> None:
    rng = _rng(scene.seed, "falling")
    lean, drops = 0.012 + rng.uniform(-0.03, 0.03), rng.random((70, 3))
    if scene.weather == "rain":
        colour = {"day": (226, 236, 246, 170), "dusk": (246, 218, 216, 170), "night": (150, 166, 204, 170)}[scene.time]
        for x, y, r in 1.1 * drops:
            canvas.line([(x, y - 0.06 - 0.05 * r), (x - lean * (0.7 + r), y)], colour, max(1, round(canvas.s / 110)))
    elif scene.weather == "snow":
        colour = {"day": (255, 255, 255, 235), "dusk": (255, 240, 240, 235), "night": (226, 232, 255, 235)}[scene.time]
        for x, y, r in drops:
            canvas.polygon(_round(x, y, 0.006 + 0.009 * r * r), colour)


def draw(scene: Scene, size: int) -> Image.Image:
    """The picture, size x size, RGB."""
    canvas, time, weather = Canvas(size), scene.time, scene.weather
    canvas.picture.paste(_gradient(SKY[time, weather], (0.0, 0.3, 0.55), canvas.s))
    light = _sky(canvas, scene)
    for material, points in shapes(scene):
        if material == "glow":
            if time != "day":
                (x, y), (edge, _) = points
                canvas.glow(x, y, abs(edge - x), LIT["glass"], 0.65 if time == "night" else 0.4)
        elif material == "haze":
            if weather == "fog":
                canvas.mist(SKY[time, weather][2], 0.48, 0.86)
        elif material == "water":
            _water(canvas, scene, points[0][1], light)
        elif colour := _fill(material, time, weather):
            canvas.polygon(points, colour)
    if weather == "fog":
        canvas.mist(SKY[time, weather][2], 0.62, 0.3)
    _falling(canvas, scene)
    return canvas.finished()


# -------------------- Data sets: every picture from (seed, index) alone

def nth_scene(split: str, seed: int, index: int, domain: str = "a", **fixed) -> Scene:
    """Training scenes hold no combination that is left out, each test scene one. No drawing is in two splits or
    domains: they take different scene seeds modulo 4."""
    if split not in ("train", "test"):
        raise ValueError(f"there is no split '{split}' of the scenes: known are train, test")
    rng, test = _rng(split, seed, index, domain), split == "test"
    while True:
        scene = sample(rng, seed=4 * int(rng.integers(2**60)) + 2 * test + (domain == "b"), **fixed)
        if left_out(scene) == test:
            return scene


class Paired(Dataset):
    """Items as of `data.PairedFolder`: outlines and picture. Of an item (i, key) the key has no say."""

    def __init__(self, split: str, size: int = 64, seed: int = 0):
        self.scene, self.size = partial(nth_scene, split, seed), size
        self.n = 20_000 if split == "train" else 200

    def __len__(self) -> int:
        return self.n

    @cached_property
    def captions(self) -> list[str]:
        return [caption(self.scene(i)) for i in range(self.n)]

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        index = range(self.n)[item[0] if isinstance(item, tuple) else item]
        scene = self.scene(index)
        return dict(input=to_tensor(outlines(scene, self.size)), target=to_tensor(draw(scene, self.size)) * 2 - 1,
                    caption=caption(scene), name=f"{index}.png")


class Unpaired(Dataset):
    """Items as of `data.UnpairedFolder`, for one of TASKS. The two scenes of an item have nothing in common."""

    def __init__(self, task: str, split: str, size: int = 64, seed: int = 0):
        if task not in TASKS:
            known = ", ".join(f"drawn:{known}" for known in TASKS)
            raise ValueError(f"there are no unpaired drawings '{task}': known are {known}")
        self.split, self.seed, self.size = split, seed, size
        self.n = 20_000 if split == "train" else 200
        self.lights = dict(zip("ab", TASKS[task]))
        self.prompts = tuple(f"a scene {light_phrase(*light)}" for light in TASKS[task])

    def __len__(self) -> int:
        return self.n

    def scene(self, index: int, domain: str, seen_in: str) -> Scene:
        """The index-th scene of a domain, in the light of that domain or of the other."""
        (time, weather), (new_time, new_weather) = self.lights[domain], self.lights[seen_in]
        scene = nth_scene(self.split, self.seed, index, domain, time=time, weather=weather)
        return replace(scene, time=new_time, weather=new_weather)

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        index = range(self.n)[item[0] if isinstance(item, tuple) else item]
        a, b = (to_tensor(draw(self.scene(index, domain, domain), self.size)) * 2 - 1 for domain in "ab")
        return dict(a=a, b=b, name_a=f"{index}.png", name_b=f"{index}.png")

    def truth(self, index: int, direction: str) -> Tensor:
        """What item `index` becomes, "a2b" its a, "b2a" its b: [3, H, W] in [-1, 1]."""
        return to_tensor(draw(self.scene(index, direction[0], direction[2]), self.size)) * 2 - 1


# -------------------- Command line

def write(out: pathlib.Path, task: str, n: int, size: int, seed: int) -> None:
    """n training pictures a side and a tenth as many for the test, in the layouts that `data.py` describes; for an
    unpaired task also truth_A and truth_B, what the pictures of test_A and test_B become."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there and not an empty folder: name a new one, or remove it")
    for split, count in (("train", n), ("test", max(n // 10, 1))):
        world, captions = Paired(split, size, seed) if task == "edges" else Unpaired(task, split, size, seed), {}
        for i in tqdm(range(count), desc=split, unit=" scenes"):
            if task == "edges":
                scene = world.scene(i)
                captions[f"{i}.png"] = caption(scene)
                pictures = {f"{split}_A": outlines(scene, size), f"{split}_B": draw(scene, size)}
            else:
                pictures = {f"{split}_{d.upper()}": draw(world.scene(i, d, d), size) for d in "ab"}
                if split == "test":
                    pictures |= {f"truth_{d.upper()}": draw(world.scene(i, d, e), size) for d, e in ("ab", "ba")}
            for folder, picture in pictures.items():
                (out / folder).mkdir(parents=True, exist_ok=True)
                picture.save(out / folder / f"{i}.png")
        if task == "edges":
            (out / f"{split}_prompts.json").write_text(json.dumps(captions, indent=1))
        else:
            for domain, prompt in zip("ab", world.prompts):
                (out / f"fixed_prompt_{domain}.txt").write_text(prompt + "\n")


def sheet(size: int, seed: int, rows: int = 9) -> Image.Image:
    """A row a scene: its outlines, then day, dusk and night, each in four weathers."""
    page = Image.new("RGB", (13 * size, rows * size))
    for row in range(rows):
        scene = sample(_rng("sheet", seed, row), ground=GROUNDS[row % 3])
        seen = [draw(replace(scene, time=t, weather=w), size) for t, w in product(("day", "dusk", "night"), WEATHERS)]
        for column, picture in enumerate([outlines(scene, size), *seen]):
            page.paste(picture, (column * size, row * size))
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tiny.scenes", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path, help="a new folder, or a picture with --sheet")
    parser.add_argument("--task", choices=("edges", *TASKS), default="edges")
    parser.add_argument("--n", type=int, default=500, help="training pictures a side [500]; the test has a tenth")
    parser.add_argument("--size", type=int, help="width and height in pixels [64; on the sheet 128]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", action="store_true", help="only a page of scenes to look at")
    args = training.parse_args(parser, argv)
    size = (128 if args.sheet else 64) if args.size is None else args.size
    if args.n < 1 or size < 8:
        raise ValueError(f"found --n {args.n} --size {size}: expected at least 1 picture of at least 8 pixels")
    if args.sheet:
        sheet(size, args.seed).save(args.out)
    else:
        write(args.out, args.task, args.n, size, args.seed)
    print(args.out)


if __name__ == "__main__":
    training.run(main)
