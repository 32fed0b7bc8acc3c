"""How long a large picture takes, said before, and the tiles that it may be computed in."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from models import diffusion, vae

# Pictures of more latents than this may take long enough to say how long: see Pace.
# With Stable Diffusion's VAE, whose factor is 8, they are larger than 768 x 768 pixels.
LARGE = 96 * 96
# Latents a side of the small picture that is timed for it.
CORNER = 32
# Seconds that a picture may take without a word.
PATIENCE = 60
# Pictures of more pixels than this are computed in tiles on a CPU: see Pace.
TILED = 2304 * 2304
# Latents a side of these tiles.
TILE = 128


@dataclass
class Pace:
    """How large pictures are computed, and how long that takes. Sizes are (width, height).

    Convolutions take time in proportion to the pixels, attention to their square. With networks of
    Stable Diffusion's size, a translation of 1024 x 1024 pixels took 4.7 times as long as one of
    512 x 512 on one CPU, and 6 times on another; `cost` lies between the two.

    A tile does not see the rest of the picture. With the embedded base, tiles of TILE were 1.7
    times as fast as the whole at 1024 x 1024 pixels, and 2.6 times at 1448 x 1448. But colours
    drifted from tile to tile (26 and 25 dB to the whole). So tiles are chosen only where the whole
    does not fit into most machines: in float32, Stable Diffusion's VAE takes 3.8 GB per million
    pixels. In drawing and editing only the VAE works in tiles.
    """

    tile: int | None  # --tile; 0 for off
    factor: int  # of the VAE
    tiles_all: bool  # whether all networks work in tiles, not only the VAE
    tiles_unasked: bool  # whether very large pictures are computed in tiles without --tile
    times_small: bool  # whether a small picture is timed first
    rate: float | None = None  # seconds for one unit of cost, as soon as that was measured
    announced: float | None = None  # seconds that the user was told last

    def tile_of(self, size: tuple[int, int]) -> int | None:
        """Pixels a side of the tiles of a picture; None if it is computed whole."""
        if self.tile is not None:
            return self.tile or None
        width, height = size
        if self.tiles_unasked and width * height > TILED:
            return TILE * self.factor
        return None

    def facts(self, size: tuple[int, int]) -> dict[str, int]:
        """What the PNG of a picture of this size says of its tiles, if it has several."""
        tile = self.tile_of(size)
        if tile is None or max(size) <= tile:
            return {}
        return {"tile": tile}

    def latents(self, size: tuple[int, int]) -> float:
        width, height = size
        return width * height / self.factor**2

    def cost(self, size: tuple[int, int]) -> float:
        """The time for a picture, in units of that for 64 x 64 latents without attention."""
        tile = max(size)
        if self.tiles_all:
            tile = self.tile_of(size) or tile
        count = 1
        latents = 1
        for side in size:
            side = math.ceil(side / self.factor)
            starts, length = vae.tile_starts(side, math.ceil(tile / self.factor))
            count *= len(starts)
            latents *= length
        area = latents / 64**2
        return count * (area + 0.1 * area**2)

    def estimate(
        self,
        which: str,
        size: tuple[int, int],
        count: int,
        compute: Callable[[int], Tensor],
    ) -> None:
        """Says on stderr how long `count` pictures at a time take, if it is long.

        It is estimated from the time that compute(side), a small square picture, takes. Where
        memory runs short, the estimate is too low.
        """
        if not self.times_small or self.latents(size) <= LARGE:
            return
        if self.rate is None:
            side = CORNER * self.factor
            try:
                compute(side // 4).cpu()  # also reads the weights and sets up the device
                start = time.perf_counter()
                compute(side).cpu()
            except Exception:
                return  # the picture itself will say what is wrong
            seconds = time.perf_counter() - start
            self.rate = seconds / self.cost((side, side))
        self.announce(which, size, count * self.rate * self.cost(size))

    def announce(self, which: str, size: tuple[int, int], seconds: float) -> None:
        """Says how long pictures take, if that is long and twice as long as what was said before.

        Also says if they are computed in tiles without having been asked for that.
        """
        tile = self.tile_of(size)
        unasked = tile is not None and self.tile is None
        is_first = self.announced is None
        is_slow = seconds > PATIENCE and (is_first or seconds > 2 * self.announced)
        if not is_slow and not (unasked and is_first):
            return
        self.announced = seconds

        minutes = max(round(seconds / 60), 1)
        width, height = size
        if unasked:
            how = (
                f"computed in overlapping squares of {tile} pixels, whose colours may differ;"
                " --tile off computes it whole"
            )
        elif tile is not None:
            how = f"in overlapping squares of {tile} pixels (--tile)"
        else:
            side = TILE // 2 * self.factor
            how = f"--tile {side} computes it in overlapping squares, which takes less memory"
        tqdm.write(
            f"{which} ({width}x{height} pixels): about {minutes} min; {how}",
            file=sys.stderr,
        )


def timed(
    model: diffusion.Model,
    evaluations: int,
    announce: Callable[[float], None],
) -> diffusion.Model:
    """The same model. When one call was timed, `announce` is told how many seconds all will take.

    The second call is timed, as the first also reads the weights and sets up the device; of two
    calls the first.
    """
    marks = [time.perf_counter()] if evaluations == 2 else []

    def evaluate(x: Tensor, t: float) -> Tensor:
        prediction = model(x, t)
        if len(marks) < 2:
            prediction.cpu()  # waits for a GPU
            marks.append(time.perf_counter())
            if len(marks) == 2:
                announce(evaluations * (marks[1] - marks[0]))
        return prediction

    return evaluate


def parse_tile(text: str | None) -> int | None:
    """--tile in pixels; 0 for "off", None without the flag. ValueError for anything else."""
    if text is None:
        return None
    if text in ("off", "0"):
        return 0
    if not text.isdecimal() or int(text) < 32:
        raise ValueError(f"--tile {text}: expected a number of pixels, 32 or more, or off")
    return int(text)


def at_a_time(count: int) -> str:
    return "a picture" if count == 1 else f"{count} pictures at a time"
