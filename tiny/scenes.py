"""A small drawn world: houses, trees, cars and boats on grass, on sand and by a lake.

A scene is a description and a random seed. Time and weather are fields of it that move nothing:
`replace(scene, time="night")` is the same place in another light, so the true translation of
every picture is known. One combination in ten of (colour, object, time, weather) is held out of
training, and every test scene contains one of these.

    python -m tiny.scenes OUT --task edges --n 500        pairs of outlines and pictures, captions
    python -m tiny.scenes OUT --task day2night --n 500    unpaired; test_A's true nights beside it
    python -m tiny.scenes OUT --task clear2rain --n 500   the same for rain
    python -m tiny.scenes OUT.png --sheet                 one page of scenes to look at
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
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import training

KINDS = ("house", "tree", "car", "boat")
GROUNDS = ("grass", "sand", "lake")
TIMES = ("day", "night", "dusk")
WEATHERS = ("clear", "rain", "snow", "fog")

RGB = tuple[int, int, int]
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)

# Colours of objects.
COLOURS = {
    "red": (208, 32, 42),
    "orange": (246, 130, 20),
    "yellow": (255, 226, 70),
    "green": (16, 146, 70),
    "blue": (34, 96, 226),
    "purple": (134, 54, 176),
    "pink": (252, 146, 200),
    "white": (246, 246, 246),
}
# Colours of the land, which snow covers and darkness dims.
LAND = {
    "grass": (136, 190, 84),
    "sand": (238, 208, 146),
    "lake": (72, 142, 196),
    "hill": (112, 160, 112),
    "mountain": (126, 156, 172),
    "dune": (214, 176, 122),
    "mesa": (190, 150, 128),
    "ripple": (226, 192, 134),
    "tuft": (94, 142, 66),
    "wave": (126, 174, 212),
}
# Colours of the parts of objects that do not take the object's own colour.
MATERIALS = {
    "roof": (112, 82, 84),
    "wood": (116, 78, 52),
    "door": (92, 58, 44),
    "frame": (250, 248, 240),
    "bar": (250, 248, 240),
    "sail": (250, 240, 216),
    "flower": (250, 240, 216),
    "pane": (176, 214, 232),
    "glass": (176, 214, 232),
    "lamp": (176, 214, 232),
    "tyre": (38, 38, 46),
    "metal": (196, 200, 206),
}
# Materials that shine at dusk and at night, and their colours then.
LIT = {"glass": (255, 214, 112), "lamp": (255, 240, 176)}
# The sky at the top, in the middle and at the horizon. Distant land fades to the last colour.
SKY = {
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
# How a time of day changes a colour: factors per channel, then what is added.
LIGHT = {
    "day": ((1, 1, 1), (0, 0, 0)),
    "dusk": ((0.88, 0.8, 0.78), (26, 6, 18)),
    "night": ((0.72, 0.72, 0.76), (0, 2, 24)),
}
# Land is dimmed further than the objects on it, so that their colours stay distinguishable.
DIM = {"day": 1, "dusk": 0.88, "night": 0.5}
# How far weather fades every colour towards the horizon's.
HAZE = {"clear": 0, "rain": 0.12, "snow": 0.08, "fog": 0.2}
# Unpaired tasks: (time, weather) of domain A and of domain B.
TASKS = {
    "day2night": (("day", "clear"), ("night", "clear")),
    "clear2rain": (("day", "clear"), ("day", "rain")),
}


# -------------------- Descriptions

@dataclass(frozen=True)
class Scene:
    """One scene. ValueError for a word that the drawn world does not have.

    `objects` holds (colour, kind) from left to right, one to three. Everything else, such as
    hills, positions, shapes, stars and raindrops, is drawn from `seed`.
    """
    objects: tuple[tuple[str, str], ...]
    ground: str
    time: str
    weather: str
    seed: int

    def __post_init__(self):
        self._check("ground", self.ground, GROUNDS)
        self._check("time", self.time, TIMES)
        self._check("weather", self.weather, WEATHERS)
        for colour, kind in self.objects:
            self._check("colour", colour, COLOURS)
            self._check("object", kind, KINDS)

        if not 1 <= len(self.objects) <= 3:
            raise ValueError(f"found {len(self.objects)} objects in a scene, expected 1 to 3")
        if self.ground != "lake" and _has_boat(self.objects):
            raise ValueError(f"found a boat on {self.ground}: boats need ground='lake'")

    def _check(self, field: str, value: str, known) -> None:
        if value not in known:
            raise ValueError(
                f"scenes have no {field} '{value}': expected one of {', '.join(known)}"
            )


def _has_boat(objects: tuple[tuple[str, str], ...]) -> bool:
    return any(kind == "boat" for _, kind in objects)


def _rng(*key) -> np.random.Generator:
    """A random generator for one purpose. The key may hold integers of any size and sign."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def sample(rng: np.random.Generator, **fixed) -> Scene:
    """A scene whose fields are drawn from rng, apart from the `fixed` ones."""
    objects = fixed.get("objects", ())
    if _has_boat(objects):
        ground = "lake"
    else:
        # Drawn even if the ground is fixed: later numbers then do not depend on that.
        ground = GROUNDS[rng.integers(3)]
    ground = fixed.get("ground", ground)
    if not objects:
        objects = _sample_objects(rng, ground)

    fields = dict(
        objects=objects,
        ground=ground,
        time=TIMES[rng.integers(3)],
        weather=WEATHERS[rng.integers(4)],
        seed=int(rng.integers(2**62)),
    )
    return Scene(**fields | fixed)


def _sample_objects(rng: np.random.Generator, ground: str) -> tuple[tuple[str, str], ...]:
    """One to three different (colour, kind)."""
    # Cumulative probabilities of KINDS.
    chances = (1 / 3, 2 / 3, 1.0)
    if ground == "lake":
        chances = (0.18, 0.37, 0.55, 1.0)

    count = 1 + np.searchsorted((0.35, 0.75), rng.random())
    objects = ()
    while len(objects) < count:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        kind = KINDS[np.searchsorted(chances, rng.random(), "right")]
        if (colour, kind) not in objects:
            objects += ((colour, kind),)
    return objects


def left_out(scene: Scene) -> bool:
    """Whether the scene contains a held-out combination of colour, kind, time and weather.

    One in ten is held out, spread so that training still sees every colour and every kind at
    every time and in every weather.
    """
    light = 4 * TIMES.index(scene.time) + WEATHERS.index(scene.weather)
    for colour, kind in scene.objects:
        number = list(COLOURS).index(colour) + 3 * KINDS.index(kind) + light
        if number % 10 == 0:
            return True
    return False


def light_phrase(time: str, weather: str) -> str:
    """Time and weather as captions say them, "at night in the rain"."""
    when = "in the day" if time == "day" else f"at {time}"
    how = "in clear weather" if weather == "clear" else f"in the {weather}"
    return f"{when} {how}"


def caption(scene: Scene) -> str:
    """The scene in words, "a red house and an orange car on grass at dusk in the fog"."""
    things = []
    for colour, kind in scene.objects:
        article = "an" if colour[0] in "aeiou" else "a"
        things.append(f"{article} {colour} {kind}")
    place = "by a lake" if scene.ground == "lake" else f"on {scene.ground}"
    return f"{' and '.join(things)} {place} {light_phrase(scene.time, scene.weather)}"


# What people write in place of the words of `caption`. "" leaves the thing out.
OTHER_WORDS = {
    "red": ("red", "crimson"),
    "purple": ("purple", "violet"),
    "car": ("car", "small car", "old car"),
    "house": ("house", "little house", "building"),
    "tree": ("tree", "big tree", "tall tree"),
    "boat": ("boat", "small boat"),
    "grass": ("on grass", "on the grass", "in a field", "grass", ""),
    "sand": ("on sand", "on the sand", "on a beach", "beach", ""),
    "lake": ("by a lake", "by the lake", "on the water", "near water", "lake", ""),
    "day": ("in the day", "day", "noon", "in the morning", ""),
    "night": ("at night", "night", "in the dark", "under the stars"),
    "dusk": ("at dusk", "dusk", "in the evening", "evening"),
    "clear": ("in clear weather", "clear sky", "clear", "no clouds", ""),
    "rain": ("in the rain", "rain", "rainy", "heavy rain"),
    "snow": ("in the snow", "snow", "snowy", "winter"),
    "fog": ("in the fog", "fog", "foggy", "mist"),
}
OPENINGS = ("", "", "", "a photo of", "a picture of", "a drawing of", "image of", "view of")
JOINS = (" and ", ", ", " with ", " beside ", " ")
ENDINGS = ("", "", "", ".", "!", "!!")
# Words that stand for nothing in this world.
STRANGERS = ("dog", "person", "cat", "bridge", "bird", "flower", "city", "warm", "lamp", "street")


def loose_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene as somebody in a hurry would describe it: "red house, orange car, evening!!".

    Place, day and clear weather may be missing. One in five has a word that means nothing here,
    one in ten a typing error.
    """
    def choose(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    things = []
    for colour, kind in scene.objects:
        article = choose(("", "a ", "one ", "the "))
        colour = choose(OTHER_WORDS.get(colour, (colour,)))
        things.append(f"{article}{colour} {choose(OTHER_WORDS[kind])}")
    rng.shuffle(things)
    what = choose(JOINS).join(things)

    around = [choose(OTHER_WORDS[word]) for word in (scene.ground, scene.time, scene.weather)]
    if rng.random() < 0.2:
        around.append(choose(STRANGERS))
    rng.shuffle(around)
    separator = choose((" ", ", "))
    words = separator.join([what, *filter(None, around)])
    if rng.random() < 0.1:
        words = _misspelled(words, rng)
    return f"{choose(OPENINGS)} {words}{choose(ENDINGS)}".strip()


def _misspelled(words: str, rng: np.random.Generator) -> str:
    """One letter is missing, or stands there twice."""
    i = int(rng.integers(len(words)))
    copies = 2 * int(rng.integers(2))
    return words[:i] + copies * words[i] + words[i + 1:]


# -------------------- Geometry: what stands where, whatever the time and weather

# A material and a polygon. The material is a colour or a key of one of the tables above, perhaps
# with "light " or "dark " before it. "~MATERIAL" is its reflection in the lake, "cap" is snow
# lying on an object, "glow" a halo (its centre, and a point on its edge), "beam" a headlight.
Point = tuple[float, float]
Shape = tuple[str, list[Point]]

# Directions of the corners of a circle.
CIRCLE = [(math.cos(i * math.tau / 20), math.sin(i * math.tau / 20)) for i in range(20)]

# Materials that get no outline: they are not solid, or too fine.
NO_OUTLINE = {
    "haze",
    "ripple",
    "flower",
    "tuft",
    "cap",
    "bar",
    "glow",
    "beam",
    "shadow",
    "wave",
}


def _box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _ellipse(x: float, y: float, rx: float, ry: float | None = None) -> list[Point]:
    """An ellipse around (x, y); a circle without `ry`."""
    return [(x + rx * cos, y + (ry or rx) * sin) for cos, sin in CIRCLE]


# The four kinds of object. `u` holds random numbers in [0, 1] that choose a variant. x goes from
# -0.5 to 0.5, and y upwards from the ground.

def _house(u: np.ndarray, colour: str) -> list[Shape]:
    # Half the width, the height of the walls, that of the roof above them, and the chimney's side.
    w = 0.34 + 0.08 * u[0]
    h = 0.4 + 0.1 * u[1]
    top = 0.24 + 0.12 * u[2]
    side = 1 if u[3] < 0.5 else -1
    flat = 0.45 * w if u[4] < 0.4 else 0  # half the width of the roof's ridge
    door = -0.5 * w * side if u[5] < 0.6 else 0
    chimney = 0.55 * w * side
    eaves = w + 0.06
    snow = h + 0.38 * top

    parts = [
        ("dark roof", _box(chimney - 0.055, h, chimney + 0.055, h + top)),
        (colour, _box(-w, 0, w, h)),
        ("roof", [(-eaves, h), (-flat, h + top), (flat, h + top), (eaves, h)]),
        ("cap", [
            (-0.62 * eaves, snow),
            (-flat, h + top),
            (flat, h + top),
            (0.62 * eaves, snow),
        ]),
        ("door", _box(door - 0.07, 0, door + 0.07, 0.26)),
    ]

    # One large window beside a door at the side, or a small one on each side of a central door.
    windows = (-0.9 * door,) if door else (-0.6 * w, 0.6 * w)
    r = 0.12 if door else 0.085
    for x in windows:
        parts += [
            ("glow", [(x, 0.26), (x + 0.34, 0.26)]),
            ("frame", _box(x - r - 0.025, 0.24 - r, x + r + 0.025, 0.29 + r)),
            ("glass", _box(x - r, 0.265 - r, x + r, 0.265 + r)),
            ("bar", _box(x - 0.012, 0.265 - r, x + 0.012, 0.265 + r)),
        ]
    if not flat:
        parts += [
            ("frame", _ellipse(0, h + 0.34 * top, 0.075)),
            ("glass", _ellipse(0, h + 0.34 * top, 0.055)),
        ]
    return parts


def _tree(u: np.ndarray, colour: str) -> list[Shape]:
    if u[0] < 0.4:
        return _fir(colour)

    wide = 0.9 + 0.2 * u[1]
    high = 0.64 + 0.1 * u[2]
    parts = [("wood", [(-0.075, 0), (-0.04, 0.5), (0.04, 0.5), (0.075, 0)])]
    for x, y, r in [(-0.21 * wide, -0.08, 0.21), (0.21 * wide, -0.08, 0.21), (0, 0.1, 0.28)]:
        parts.append((colour, _ellipse(x, high + y, r)))
    parts.append((f"light {colour}", _ellipse(-0.08, high + 0.17, 0.13, 0.11)))
    snow = [
        (0, 0.29, 0.19, 0.09),
        (-0.24 * wide, 0.07, 0.12, 0.06),
        (0.25 * wide, 0.07, 0.12, 0.06),
    ]
    for x, y, rx, ry in snow:
        parts.append(("cap", _ellipse(x, high + y, rx, ry)))
    return parts


def _fir(colour: str) -> list[Shape]:
    parts = [("wood", _box(-0.055, 0, 0.055, 0.22))]
    tiers = [("", 0.18, 0.6, 0.38), ("dark ", 0.42, 0.84, 0.31), ("", 0.66, 1.08, 0.23)]
    for tone, low, high, w in tiers:
        snow = high - 0.45 * (high - low)
        parts += [
            (tone + colour, [(-w, low), (0, high), (w, low)]),
            ("cap", [(-0.45 * w, snow), (0, high), (0.45 * w, snow)]),
        ]
    return parts


def _car(u: np.ndarray, colour: str) -> list[Shape]:
    # The roof's height and its rear and front ends: a van or a saloon.
    roof, back, front = (0.6, -0.44, 0.22) if u[0] < 0.4 else (0.54, -0.26, 0.14)
    body = [
        (-0.49, 0.12),
        (-0.49, 0.27),
        (-0.44, 0.34),
        (back - 0.06, 0.34),
        (back, roof),
        (front, roof),
        (front + 0.13, 0.34),
        (0.42, 0.31),
        (0.49, 0.25),
        (0.49, 0.12),
    ]
    rear_window = [
        (back - 0.01, 0.35),
        (back + 0.04, roof - 0.05),
        (-0.08, roof - 0.05),
        (-0.08, 0.35),
    ]
    front_window = [
        (-0.03, 0.35),
        (-0.03, roof - 0.05),
        (front - 0.02, roof - 0.05),
        (front + 0.07, 0.35),
    ]
    parts = [
        (colour, body),
        ("cap", _box(back + 0.01, roof - 0.02, front - 0.01, roof + 0.045)),
        ("pane", rear_window),
        ("pane", front_window),
        (f"dark {colour}", _box(-0.49, 0.12, 0.49, 0.165)),
    ]
    for x in (-0.27, 0.28):
        parts += [
            ("tyre", _ellipse(x, 0.115, 0.115)),
            ("metal", _ellipse(x, 0.115, 0.05)),
        ]
    return parts + [
        ("beam", [(0.48, 0.25), (1.0, 0.36), (1.0, -0.02)]),
        ("lamp", _ellipse(0.455, 0.235, 0.04)),
    ]


def _boat(u: np.ndarray, colour: str) -> list[Shape]:
    high = 0.92 + 0.16 * u[0]
    return [
        ("wood", _box(-0.02, 0.15, 0.02, high + 0.05)),
        (colour, [(0.05, 0.3), (0.05, high), (0.27, 0.55), (0.42, 0.3)]),
        ("sail", [(-0.05, 0.3), (-0.05, high - 0.12), (-0.34, 0.3)]),
        (colour, [(-0.48, 0.24), (0.5, 0.24), (0.38, 0), (-0.36, 0)]),
        (f"dark {colour}", _box(-0.37, 0, 0.39, 0.05)),
        ("glow", [(0, high + 0.06), (0.22, high + 0.06)]),
        ("lamp", _ellipse(0, high + 0.06, 0.035)),
    ]


OBJECTS = dict(house=_house, tree=_tree, car=_car, boat=_boat)


def _ridge(rng: np.random.Generator, y: float, height: float, wavelength: float) -> list[Point]:
    """A range of hills above y, three waves added up, closed below the picture's lower edge."""
    x = np.linspace(-0.05, 1.05, 34)
    waves = []
    for frequency, amplitude in ((1, 1), (1.9, 0.6), (4.1, 0.25)):
        phase = rng.uniform(0, math.tau)
        waves.append(amplitude * np.sin(frequency * wavelength * x + phase))
    up = (2 + sum(waves)) / 3.6
    outline = zip(x.tolist(), (y - height * up).tolist())
    return [*outline, (1.05, 1.05), (-0.05, 1.05)]


def _land(scene: Scene, horizon: float) -> list[Shape]:
    """Mountains, hills and ground, with tufts, flowers or ripples on it."""
    rng = _rng(scene.seed, "land")
    sand = scene.ground == "sand"
    lake = scene.ground == "lake"

    height = rng.uniform(0.14, 0.24)
    wavelength = rng.uniform(5, 9)
    far = _ridge(rng, horizon, height, wavelength)
    hills = _ridge(rng, horizon + 0.02, 0.1, 6)
    ground = _ridge(rng, horizon + 0.02, 0.03, 4)
    parts = [
        ("mesa" if sand else "mountain", far),
        ("dune" if sand else "hill", hills),
        ("grass" if lake else scene.ground, ground),
        ("haze", []),
    ]
    if lake:
        return parts

    for x, y, size in rng.random((26, 3)):
        y = horizon + 0.05 + (0.97 - horizon) * y
        parts.append(_ground_detail(x, y, size, sand))
    return parts


def _ground_detail(x: float, y: float, size: float, sand: bool) -> Shape:
    """A ripple in the sand, or a flower or a tuft in the grass."""
    r = 0.4 + y  # nearer things are larger
    if sand:
        return "ripple", _ellipse(x, y, 0.07 * r * (0.4 + size), 0.006 * r)
    if size < 0.3:
        return "flower", _ellipse(x, y, 0.009 * r)
    blades = [
        (-0.016, -0.026),
        (0, 0),
        (0.002, -0.04),
        (0.006, 0),
        (0.02, -0.024),
        (0.012, 0),
    ]
    return "tuft", [(x + dx * r, y + dy * r) for dx, dy in blades]


def shapes(scene: Scene) -> list[Shape]:
    """Everything but the sky, from back to front. Coordinates in [0, 1], from the upper left."""
    rng = _rng(scene.seed, "things")
    horizon = rng.uniform(0.5, 0.55)
    shore = horizon + 0.11
    placed = []
    for i, (colour, kind) in enumerate(scene.objects):
        placed.append(_place(rng.random(12), scene, i, colour, kind, shore))

    # What stands on land before what floats; in each, from far to near.
    placed.sort(key=lambda one: one[:2])
    ashore, afloat = [], []
    for floats, _, own in placed:
        if floats:
            afloat += own
        else:
            ashore += own

    water = _waves(scene, shore) if scene.ground == "lake" else []
    return [*_land(scene, horizon), *ashore, *water, *afloat]


def _place(
    u: np.ndarray,
    scene: Scene,
    i: int,
    colour: str,
    kind: str,
    shore: float,
) -> tuple[bool, float, list[Shape]]:
    """The i-th object in its place: whether it floats, the height of its base, its shapes."""
    n = len(scene.objects)
    floats = kind == "boat"
    if floats:
        near, far = 0.87, shore + 0.1
    elif scene.ground == "lake":
        near, far = shore - 0.012, shore
    else:
        near, far = 0.92, 0.72
    base = far + (near - far) * u[1]
    scale = (0.5, 0.42, 0.315)[n - 1] * (0.86 + 0.14 * u[0])
    x = (i + 0.5) / n + max(0, 1 / n - scale) * (u[2] - 0.5)
    flip = 1 if u[3] < 0.5 else -1

    own = []
    for material, points in OBJECTS[kind](u[4:], colour):
        moved = [(x + flip * scale * px, base - scale * py) for px, py in points]
        own.append((material, moved))

    if not floats:
        shadow = _ellipse(x, base, 0.5 * scale, 0.03 * scale + 0.004)
        return floats, base, [("shadow", shadow), *own]
    reflection = []  # upside down and foreshortened
    for material, points in own:
        if material not in ("glow", "lamp"):
            mirrored = [(px, 1.7 * base - 0.7 * py) for px, py in points]
            reflection.append((f"~{material}", mirrored))
    return floats, base, reflection + own


def _waves(scene: Scene, shore: float) -> list[Shape]:
    """The lake, and the waves on it."""
    parts = [("water", _box(-0.05, shore, 1.05, 1.05))]
    for x, y, r in _rng(scene.seed, "waves").random((20, 3)):
        rx = (0.02 + 0.05 * r) * (0.5 + y)
        ry = 0.003 + 0.004 * y
        parts.append(("wave", _ellipse(x, shore + 0.03 + (1 - shore) * y, rx, ry)))
    return parts


# -------------------- Drawing

class Canvas:
    """A square picture with corners (0, 0) and (1, 1).

    It is drawn larger and reduced at the end, which smooths the edges.
    """

    def __init__(self, size: int):
        self.size = size
        self.side = size * (3 if size < 100 else 2)
        self.picture = Image.new("RGB", (self.side, self.side))
        # In mode RGBA, a colour with a fourth number is blended.
        self.pen = ImageDraw.Draw(self.picture, "RGBA")

    def _pixels(self, points: list[Point]) -> list[Point]:
        return [(x * self.side, y * self.side) for x, y in points]

    def polygon(self, points: list[Point], colour: tuple[int, ...]) -> None:
        self.pen.polygon(self._pixels(points), colour)

    def line(self, points: list[Point], colour: tuple[int, ...], width: int) -> None:
        self.pen.line(self._pixels(points), colour, width)

    def glow(self, x: float, y: float, radius: float, colour: RGB, strength: float) -> None:
        """A halo that is strongest at its centre."""
        r = max(2, round(radius * self.side))
        corner = (round(x * self.side) - r, round(y * self.side) - r)
        self.picture.paste(colour, corner, _halo(r, strength))

    def mist(self, colour: RGB, middle: float, peak: float) -> None:
        """A bank of fog across the picture, densest at height `middle`."""
        y = (np.arange(self.side) + 0.5) / self.side
        density = peak * np.exp(-(((y - middle) / 0.2) ** 2))
        column = Image.fromarray((255 * density).astype(np.uint8)[:, None])
        self.picture.paste(colour, mask=column.resize((self.side, self.side)))

    def finished(self) -> Image.Image:
        return self.picture.resize((self.size, self.size), Image.Resampling.BOX)


@lru_cache(maxsize=64)
def _halo(radius: int, strength: float) -> Image.Image:
    y, x = np.mgrid[-1:1:2j * radius, -1:1:2j * radius]
    falling = np.clip(1 - np.hypot(x, y), 0, 1) ** 2
    return Image.fromarray((255 * strength * falling).astype(np.uint8))


@lru_cache(maxsize=64)
def _gradient(colours: tuple[RGB, ...], stops: tuple[float, ...], size: int) -> Image.Image:
    """A vertical gradient through these colours at these heights, size x size."""
    y = (np.arange(size) + 0.5) / size
    channels = [np.interp(y, stops, channel) for channel in zip(*colours)]
    column = np.stack(channels, axis=1)[:, None]
    return Image.fromarray(column.round().astype(np.uint8)).resize((size, size))


def outlines(scene: Scene, size: int) -> Image.Image:
    """The edges of hills, ground, water and objects, white on black. RGB, size x size."""
    canvas = Canvas(size)
    width = 2 * max(2, round(canvas.side / 150))  # the inner half is painted over below
    solid = []
    for material, points in shapes(scene):
        if material not in NO_OUTLINE and not material.startswith("~"):
            solid.append((material.split()[-1], points))

    # Neighbours of one material share an outline: first all their lines, then all their insides.
    for _, group in groupby(solid, key=lambda shape: shape[0]):
        polygons = [points for _, points in group]
        for points in polygons:
            canvas.line([*points, *points[:2]], WHITE, width)
        for points in polygons:
            canvas.polygon(points, BLACK)
    return canvas.finished()


# -------------------- Light: what everything looks like

def _mix(a: RGB, b: RGB, t: float) -> RGB:
    """a at t = 0, b at t = 1."""
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b))


@lru_cache(maxsize=4096)
def shade(material: str, time: str, weather: str) -> RGB:
    """What a material or colour, perhaps "light " or "dark ", looks like in this light."""
    tone, _, name = material.rpartition(" ")
    if name in LIT and time != "day":
        return LIT[name]

    rgb = LAND.get(name) or COLOURS.get(name) or MATERIALS[name]
    if tone == "dark":
        rgb = _mix(rgb, BLACK, 0.28)
    elif tone == "light":
        rgb = _mix(rgb, WHITE, 0.3)

    haze = HAZE[weather]
    dim = 1
    if name in LAND:
        haze = HAZE[weather] * 1.5
        dim = DIM[time]
        if weather == "snow" and name not in ("lake", "wave"):
            rgb = _mix(rgb, (246, 249, 255), 0.5 if name == "tuft" else 0.72)
            dim = DIM[time] ** 0.5  # snow keeps more light

    gains, lifts = LIGHT[time]
    rgb = tuple((value * gain + lift) * dim for value, gain, lift in zip(rgb, gains, lifts))
    far = {"mountain": 0.3, "mesa": 0.3, "hill": 0.12, "dune": 0.1}.get(name, 0)
    return _mix(rgb, SKY[time, weather][2], far + haze)


def _fill(material: str, time: str, weather: str) -> tuple[int, ...] | None:
    """The colour of a shape, with a fourth number if it is blended; None if it is hidden."""
    if material == "shadow":
        return 10, 20, 40, 70
    if material == "beam":
        strength = dict(day=0, dusk=50, night=90)[time]
        return (*LIT["lamp"], strength) if strength else None
    if material == "cap":
        return shade("frame", time, weather) if weather == "snow" else None
    if material.startswith("~"):
        own = shade(material[1:], time, weather)
        return *_mix(own, shade("lake", time, weather), 0.35), 150
    return shade(material, time, weather)


def _sky(canvas: Canvas, scene: Scene) -> float:
    """Draws sun or moon, stars and clouds. Returns the x of the sun or moon."""
    rng = _rng(scene.seed, "sky")
    x = rng.uniform(0.14, 0.86)
    y = rng.uniform(0.12, 0.26)
    crescent = rng.random() < 0.6

    if scene.weather == "fog":
        canvas.glow(x, y, 0.2, (255, 255, 245), 0.5 if scene.time == "day" else 0.3)
        return x
    if scene.weather != "clear":
        _overcast(canvas, scene)
        return x

    _stars(canvas, scene)
    if scene.time == "night":
        _moon(canvas, x, y, crescent)
    elif scene.time == "dusk":
        canvas.glow(x, 0.4, 0.42, (255, 214, 130), 0.9)
        canvas.polygon(_ellipse(x, 0.4, 0.1), (255, 226, 120))
    else:
        canvas.glow(x, y, 0.26, (255, 248, 205), 0.9)
        canvas.polygon(_ellipse(x, y, 0.08), (255, 240, 150))
    _clouds(canvas, scene)
    return x


def _overcast(canvas: Canvas, scene: Scene) -> None:
    """A dark cover of clouds along the upper edge."""
    top, middle, _ = SKY[scene.time, scene.weather]
    for i, (px, py, r) in enumerate(_rng(scene.seed, "cover").random((16, 3))):
        cloud = _ellipse((i + px) / 15, 0.02 + 0.13 * py, 0.1 + 0.09 * r, 0.05 + 0.05 * r)
        canvas.polygon(cloud, _mix(top, middle, 0.3 * (i % 4)))


def _stars(canvas: Canvas, scene: Scene) -> None:
    count = dict(day=0, dusk=7, night=34)[scene.time]
    lowest = 0.42 if scene.time == "night" else 0.2
    for x, y, r in _rng(scene.seed, "stars").random((34, 3))[:count]:
        r = 0.006 + 0.01 * r**3
        y = lowest * y
        canvas.polygon([(x - r, y), (x, y - r), (x + r, y), (x, y + r)], (255, 250, 220))


def _moon(canvas: Canvas, x: float, y: float, crescent: bool) -> None:
    canvas.glow(x, y, 0.24, (190, 205, 255), 0.5)
    moon = _ellipse(x, y, 0.075)
    if crescent:
        inner = [(x + 0.45 * (px - x), py) for px, py in moon[15:4:-1]]
        moon = [*moon[5:16], *inner]
    canvas.polygon(moon, (250, 246, 222))


def _clouds(canvas: Canvas, scene: Scene) -> None:
    """Two or three clouds of four puffs each."""
    middle = SKY[scene.time, scene.weather][1]
    tint = {"day": WHITE, "dusk": (255, 170, 150), "night": (70, 82, 140)}[scene.time]
    tint = _mix(tint, middle, 0.1)
    rng = _rng(scene.seed, "clouds")
    count = 2 + rng.integers(2)
    for x, y, w, *puffs in rng.random((count, 7)):
        y = 0.08 + 0.26 * y
        w = 0.07 + 0.05 * w
        for i, puff in enumerate(puffs):
            px = x + 0.8 * (i - 1.5) * w
            py = y - 0.02 if i in (1, 2) else y
            shape = _ellipse(px, py, w * (0.45 + 0.4 * puff), w * (0.3 + 0.25 * puff))
            canvas.polygon(shape, tint)


def _water(canvas: Canvas, scene: Scene, shore: float, light: float) -> None:
    """The lake: a mirror of what lies above it, and glitter below the light at x = `light`."""
    side = canvas.side
    y = round(shore * side)
    mirror = canvas.picture.crop((0, 2 * y - side, side, y))
    mirror = mirror.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    own = shade("lake", scene.time, scene.weather)
    lake = _gradient((own, _mix(own, (8, 24, 60), 0.35)), (0.0, 1.0), side)
    lake = lake.crop((0, 0, side, side - y))
    opacity = 0.55 if scene.weather == "clear" else 0.7
    canvas.picture.paste(Image.blend(mirror, lake, opacity), (0, y))

    if scene.weather != "clear":
        return
    colour = {
        "day": (255, 255, 250, 120),
        "dusk": (255, 200, 120, 190),
        "night": (228, 232, 255, 190),
    }[scene.time]
    for k, (x, w) in enumerate(_rng(scene.seed, "glitter").random((11, 2))):
        px = light + 0.06 * (x - 0.5)
        py = shore + (1 - shore) * (0.06 + k / 12)
        canvas.polygon(_ellipse(px, py, 0.015 + 0.05 * w, 0.006), colour)


def _falling(canvas: Canvas, scene: Scene) -> None:
    """Rain or snow in front of everything."""
    rng = _rng(scene.seed, "falling")
    lean = 0.012 + rng.uniform(-0.03, 0.03)
    drops = rng.random((70, 3))
    if scene.weather == "rain":
        colour = {
            "day": (226, 236, 246, 170),
            "dusk": (246, 218, 216, 170),
            "night": (150, 166, 204, 170),
        }[scene.time]
        width = max(1, round(canvas.side / 110))
        for x, y, r in 1.1 * drops:
            start = (x, y - 0.06 - 0.05 * r)
            end = (x - lean * (0.7 + r), y)
            canvas.line([start, end], colour, width)
    elif scene.weather == "snow":
        colour = {
            "day": (255, 255, 255, 235),
            "dusk": (255, 240, 240, 235),
            "night": (226, 232, 255, 235),
        }[scene.time]
        for x, y, r in drops:
            canvas.polygon(_ellipse(x, y, 0.006 + 0.009 * r * r), colour)


def draw(scene: Scene, size: int) -> Image.Image:
    """The picture of a scene, RGB, size x size."""
    canvas = Canvas(size)
    time, weather = scene.time, scene.weather
    sky = SKY[time, weather]
    canvas.picture.paste(_gradient(sky, (0.0, 0.3, 0.55), canvas.side))
    light = _sky(canvas, scene)

    for material, points in shapes(scene):
        if material == "glow":
            _window_glow(canvas, points, time)
        elif material == "haze":
            if weather == "fog":
                canvas.mist(sky[2], 0.48, 0.86)
        elif material == "water":
            _water(canvas, scene, points[0][1], light)
        else:
            colour = _fill(material, time, weather)
            if colour:
                canvas.polygon(points, colour)

    if weather == "fog":
        canvas.mist(sky[2], 0.62, 0.3)
    _falling(canvas, scene)
    return canvas.finished()


def _window_glow(canvas: Canvas, points: list[Point], time: str) -> None:
    """Light around a window or lamp, from dusk on."""
    if time == "day":
        return
    (x, y), (edge, _) = points
    canvas.glow(x, y, abs(edge - x), LIT["glass"], 0.65 if time == "night" else 0.4)


# -------------------- Data sets: each picture depends on (seed, index) alone

def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, H, W] in [0, 1], as `dataset.pictures` does."""
    levels = torch.from_numpy(np.array(picture))  # [H, W, 3]
    return levels.permute(2, 0, 1).contiguous().float() / 255


def nth_scene(split: str, seed: int, index: int, domain: str = "a", **fixed) -> Scene:
    """The index-th scene of a split and domain.

    Training scenes contain no held-out combination, and each test scene contains one. No drawing
    is in two splits or domains, because their scene seeds differ modulo 4.
    """
    if split not in ("train", "test"):
        raise ValueError(f"the scenes have no split '{split}': known are train, test")
    rng = _rng(split, seed, index, domain)
    test = split == "test"
    residue = 0
    if test:
        residue += 2
    if domain == "b":
        residue += 1
    while True:
        scene_seed = 4 * int(rng.integers(2**60)) + residue
        scene = sample(rng, seed=scene_seed, **fixed)
        if left_out(scene) == test:
            return scene


def _index(item: int | tuple[int, tuple[int, ...]], length: int) -> int:
    """The index of an item. Loaders ask for (index, augmentation key); drawings need no key."""
    if isinstance(item, tuple):
        item = item[0]
    return range(length)[item]


class Paired(Dataset):
    """Outlines and pictures. Items are those of `dataset.folders.PairedFolder`.

    With `loose`, one training caption in five is a loose one.
    """

    def __init__(self, split: str, size: int = 64, seed: int = 0, loose: bool = False):
        self.scene = partial(nth_scene, split, seed)
        self.size = size
        self.seed = seed
        self.loose = loose and split == "train"
        self.length = 20_000 if split == "train" else 200

    def __len__(self) -> int:
        return self.length

    def caption(self, index: int) -> str:
        scene = self.scene(index)
        if self.loose and index % 5 == 0:
            return loose_caption(scene, _rng("loose", self.seed, index))
        return caption(scene)

    @cached_property
    def captions(self) -> list[str]:
        return [self.caption(i) for i in range(self.length)]

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        index = _index(item, self.length)
        scene = self.scene(index)
        return dict(
            input=to_tensor(outlines(scene, self.size)),
            target=to_tensor(draw(scene, self.size)) * 2 - 1,
            caption=self.caption(index),
            name=f"{index}.png",
        )


class Unpaired(Dataset):
    """One of TASKS. Items are those of `dataset.folders.UnpairedFolder`.

    The two scenes of an item have nothing in common.
    """

    def __init__(self, task: str, split: str, size: int = 64, seed: int = 0):
        if task not in TASKS:
            known = ", ".join(f"drawn:{name}" for name in TASKS)
            raise ValueError(f"there are no unpaired drawings '{task}': known are {known}")
        self.split = split
        self.seed = seed
        self.size = size
        self.length = 20_000 if split == "train" else 200
        self.lights = dict(zip("ab", TASKS[task]))
        self.prompts = tuple(f"a scene {light_phrase(*light)}" for light in TASKS[task])

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int, domain: str, light_of: str) -> Scene:
        """The index-th scene of a domain, "a" or "b", in the light of one of the two."""
        time, weather = self.lights[domain]
        scene = nth_scene(self.split, self.seed, index, domain, time=time, weather=weather)
        time, weather = self.lights[light_of]
        return replace(scene, time=time, weather=weather)

    def _picture(self, index: int, domain: str, light_of: str) -> Tensor:
        picture = draw(self.scene(index, domain, light_of), self.size)
        return to_tensor(picture) * 2 - 1

    def __getitem__(self, item: int | tuple[int, tuple[int, ...]]) -> dict:
        index = _index(item, self.length)
        return dict(
            a=self._picture(index, "a", "a"),
            b=self._picture(index, "b", "b"),
            name_a=f"{index}.png",
            name_b=f"{index}.png",
        )

    def truth(self, index: int, direction: str) -> Tensor:
        """The true translation of item `index`, of its a for "a2b" and of its b for "b2a".

        [3, H, W] in [-1, 1].
        """
        return self._picture(index, direction[0], direction[2])


# -------------------- Command line

def write(out: pathlib.Path, task: str, n: int, size: int, seed: int) -> None:
    """Writes n training pictures per side, and a tenth as many for the test.

    The layouts are those of `dataset.folders`. An unpaired task also gets truth_A and truth_B,
    the true translations of test_A and test_B.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: give a new name, or remove it")
    for split, count in (("train", n), ("test", max(n // 10, 1))):
        if task == "edges":
            write_paired(out, split, count, Paired(split, size, seed))
        else:
            write_unpaired(out, split, count, Unpaired(task, split, size, seed))


def write_paired(out: pathlib.Path, split: str, count: int, world: Paired) -> None:
    captions = {}
    for i in tqdm(range(count), desc=split, unit=" scenes"):
        scene = world.scene(i)
        captions[f"{i}.png"] = caption(scene)
        _save(outlines(scene, world.size), out / f"{split}_A" / f"{i}.png")
        _save(draw(scene, world.size), out / f"{split}_B" / f"{i}.png")
    (out / f"{split}_prompts.json").write_text(json.dumps(captions, indent=1))


def write_unpaired(out: pathlib.Path, split: str, count: int, world: Unpaired) -> None:
    for i in tqdm(range(count), desc=split, unit=" scenes"):
        for domain, other in ("ab", "ba"):
            side = domain.upper()
            own = draw(world.scene(i, domain, light_of=domain), world.size)
            _save(own, out / f"{split}_{side}" / f"{i}.png")
            if split == "test":
                truth = draw(world.scene(i, domain, light_of=other), world.size)
                _save(truth, out / f"truth_{side}" / f"{i}.png")
    for domain, prompt in zip("ab", world.prompts):
        (out / f"fixed_prompt_{domain}.txt").write_text(prompt + "\n")


def _save(picture: Image.Image, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def sheet(size: int, seed: int, rows: int = 9) -> Image.Image:
    """One row per scene: its outlines, then day, dusk and night, each in the four weathers."""
    page = Image.new("RGB", (13 * size, rows * size))
    for row in range(rows):
        scene = sample(_rng("sheet", seed, row), ground=GROUNDS[row % 3])
        pictures = [outlines(scene, size)]
        for time, weather in product(("day", "dusk", "night"), WEATHERS):
            pictures.append(draw(replace(scene, time=time, weather=weather), size))
        for column, picture in enumerate(pictures):
            page.paste(picture, (column * size, row * size))
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tiny.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("out", type=pathlib.Path, help="a new folder; with --sheet, a picture file")
    add("--task", choices=("edges", *TASKS), default="edges")
    add("--n", type=int, default=500, help="training pictures per side; test: a tenth [500]")
    add("--size", type=int, help="width and height in pixels [64; with --sheet 128]")
    add("--seed", type=int, default=0, help="random seed [0]")
    add("--sheet", action="store_true", help="only draw one page of scenes to look at")
    args = training.parse_args(parser, argv)

    size = args.size
    if size is None:
        size = 128 if args.sheet else 64
    if size < 8:
        raise ValueError(f"found --size {size}: expected at least 8 pixels")
    if args.sheet:
        sheet(size, args.seed).save(args.out)
    else:
        write(args.out, args.task, args.n, size, args.seed)
    print(args.out)


if __name__ == "__main__":
    training.run_script(main)
