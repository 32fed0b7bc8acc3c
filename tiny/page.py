"""The page that `python sample.py` draws: what it shows, and how it is laid out.

Above, twelve captions of combinations that training left out. Below, four translations by the
adapters of tiny-turbo, input and output side by side. sample.py makes the pictures. Also the
drawings that the page of demo.py begins with.
"""

import textwrap

from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor

from dataset.pictures import to_picture, to_tensor
from tiny import scenes

PICTURE_SIZE = 64  # pixels, of what the networks draw

COLUMNS = 4
SIDE = 160  # pixels of a picture on the page
MARGIN = 4  # on each side of a picture, and above it
ROW = SIDE + 40  # with room for the caption
CAPTION_WIDTH = 32  # characters


def captions() -> list[str]:
    """The captions to draw."""
    described = [scenes.nth_scene("test", 0, i) for i in range(12)]
    return [scenes.caption(scene) for scene in described]


def translations() -> list[tuple[str, Image.Image, str | None]]:
    """What to translate: the adapter, the input picture, and the caption.

    A caption of None stands for the adapter's own.
    """
    described = [scenes.nth_scene("test", 1, i, time="day", weather="clear") for i in range(4)]
    cells = [
        ("day2night", scenes.draw(described[0], PICTURE_SIZE), None),
        ("clear2rain", scenes.draw(described[1], PICTURE_SIZE), None),
    ]
    for scene in described[2:]:
        lines = scenes.outlines(scene, PICTURE_SIZE)
        cells.append(("edges2scene", lines, scenes.caption(scene)))
    return cells


def drawing(size: tuple[int, int]) -> tuple[Image.Image, str]:
    """Outlines to go on drawing from, black on white and (width, height) large, with a caption."""
    scene = scenes.nth_scene("test", 1, 4, time="day", weather="clear")
    lines = scenes.outlines(scene, max(size))
    lines = lines.filter(ImageFilter.MaxFilter(3))  # as thick as a pen's
    return ImageOps.invert(lines).resize(size), scenes.caption(scene)


def example(adapter: str, direction: str, index: int, size: tuple[int, int]) -> Image.Image:
    """The index-th scene to translate in this direction. An unknown adapter counts as day2night."""
    lights = dict(zip("ab", scenes.TASKS.get(adapter, scenes.TASKS["day2night"])))
    time, weather = lights[direction[0]]
    scene = scenes.nth_scene("test", 1, index, time=time, weather=weather)
    return scenes.draw(scene, max(size)).resize(size)


def lay_out(cells: list[tuple[Tensor, str]]) -> Tensor:
    """Pictures [3, H, W] with their captions, row by row -> the page [3, H, W], all in [-1, 1]."""
    rows = len(cells) // COLUMNS
    page = Image.new("RGB", (COLUMNS * (SIDE + 2 * MARGIN), rows * ROW), "white")
    pen = ImageDraw.Draw(page)
    for i, (picture, caption) in enumerate(cells):
        row, column = divmod(i, COLUMNS)
        left = column * (SIDE + 2 * MARGIN) + MARGIN
        top = row * ROW + MARGIN
        enlarged = to_picture(picture.float().cpu()).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
        page.paste(enlarged, (left, top))

        lines = textwrap.wrap(caption, CAPTION_WIDTH)
        pen.multiline_text(
            (left, top + SIDE + 1), "\n".join(lines), fill="black", font_size=9, spacing=1
        )
    return to_tensor(page) * 2 - 1
