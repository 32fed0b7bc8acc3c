"""The data set `digits`: 10,000 handwritten digits out of one picture, tiny/digits.png.

MNIST, by Yann LeCun, Corinna Cortes and Christopher J. C. Burges; licence CC BY-SA 3.0.

The picture itself says what a digit is and what it is for. It has a band of 12 rows for each
digit, 0 to 9 from top to bottom, and 100 digits of 28 x 28 pixels in a row. The first row of a
band is for the test, the others are for training; places that are left over at the end of a band
are black. So a test has exactly a hundred digits a class, and training has 9,000 in all.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dataset.folders import Item, reading, split_item
from dataset.pictures import prepare, to_tensor

SHEET = Path(__file__).parent.parent / "tiny" / "digits.png"
CLASSES = 10
ROWS = 12  # of a band
ACROSS = 100  # digits in a row
SIDE = 28  # pixels of a digit
PADDED = 32  # with its black margin


class Digits(Dataset):
    """The digits of one split.

    An item holds target [3, H, W] in [-1, 1], white on black; caption, "0" to "9"; and name.
    Digits are padded to 32 x 32 before they are prepared. The classes take turns: item i of the
    test shows the digit i % 10, and so does training until the rarest digit has run out.
    """

    def __init__(self, split: str, prep: str):
        self.prepare = prepare(prep)
        self.levels, self.labels, self.names = read_sheet(SHEET, split)
        self.captions = [str(label) for label in self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: Item) -> dict:
        index, rng = split_item(item)
        (picture,) = self.prepare([self.padded(index)], rng)
        return dict(
            target=to_tensor(picture.convert("RGB")) * 2 - 1,
            caption=self.captions[index],
            name=self.names[index],
        )

    def padded(self, index: int) -> Image.Image:
        """A digit before it is prepared, grey."""
        margin = (PADDED - SIDE) // 2
        return Image.fromarray(np.pad(self.levels[index], margin))

    def pictures(self) -> torch.Tensor:
        """All digits at once, [N, 1, H, W] in [-1, 1]."""
        prepared = []
        for index in range(len(self)):
            (picture,) = self.prepare([self.padded(index)])
            prepared.append(np.asarray(picture))
        levels = torch.from_numpy(np.stack(prepared))                  # [N, H, W]
        return levels[:, None].float() / 255 * 2 - 1


def read_sheet(path: Path, split: str) -> tuple[np.ndarray, list[int], list[str]]:
    """Digits uint8 [N, 28, 28], their labels, and names that tell their places in the sheet.

    ValueError if the picture is damaged or is no sheet of digits.
    """
    width = ACROSS * SIDE
    height = CLASSES * ROWS * SIDE
    expected = "the digits of this repository: git checkout tiny/digits.png brings them back"
    with reading(str(path), expected):  # str: of a Path, `reading` would say that it is a PNG
        with Image.open(path, formats=["PNG"]) as file:
            file.verify()  # its checksums, which loading passes over
        with Image.open(path, formats=["PNG"]) as file:
            if file.size != (width, height) or file.mode != "L":
                found = f"{file.width}x{file.height} {file.mode}"
                raise ValueError(f"it is {found}, not {width}x{height} L")
            sheet = np.asarray(file)
    bands = sheet.reshape(CLASSES, ROWS, SIDE, ACROSS, SIDE).swapaxes(2, 3)

    rows = slice(0, 1) if split == "test" else slice(1, ROWS)
    first = rows.start * ACROSS
    digits = bands[:, rows].reshape(CLASSES, -1, SIDE, SIDE)
    places = np.nonzero(digits.any((2, 3)).T)                          # place by place
    labels = places[1].tolist()
    names = [f"{label}-{first + place:04d}" for place, label in zip(*places, strict=True)]
    return digits[places[1], places[0]], labels, names
