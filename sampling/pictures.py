"""Plans where results go, reads pictures in batches, writes the results, collects what failed.

One batch is read and one written while one is computed. If one picture of several fails, the
others are still made, and all that failed are named at the end.
"""

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

import training
from dataset.folders import pictures_in
from dataset.pictures import SUFFIXES, open_picture, to_picture
from sampling.pace import Pace
from sampling.precision import DTYPES

# Paths to write to, pictures [B, 3, H, W] in [-1, 1], and what their files say of them.
Batches = Iterator[tuple[list[Path], Tensor, list[dict[str, object]]]]


def is_png(output: Path) -> bool:
    """Whether --output names one picture rather than a folder. ValueError for another format."""
    if output.is_dir():
        return False
    suffix = output.suffix.lower()
    if suffix in SUFFIXES - {".png"}:
        raise ValueError(
            f"--output {output}: pictures are written as PNG; expected a name ending in .png, or a"
            " folder"
        )
    return suffix == ".png"


def check_overwriting(inputs: Iterable[Path], targets: Iterable[Path]) -> None:
    """ValueError if a picture that is read would be written over."""
    read = {path.resolve() for path in inputs}
    for target in targets:
        if target.resolve() in read:
            raise ValueError(
                f"--output would write over the input {target}; expected another name or folder"
            )


def check_folders(targets: Iterable[Path], flag: str = "output") -> None:
    """ValueError if a result's folder is there and cannot be written to, or cannot be made."""
    for folder in {target.parent for target in targets}:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"--{flag}: {folder} is a file; expected the name of a folder")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--{flag}: {folder} cannot be written to; expected another folder")


def plan_targets(
    source: Path,
    output: Path | None,
    also_read: Iterable[Path] = (),
) -> dict[Path, Path]:
    """The pictures of a file or folder, and the file that each result is written to.

    ValueError if a result would write over one of them or over a file that is `also_read`.
    """
    if source.is_dir():
        targets = plan_folder(source, output or Path("out"))
    else:
        open_picture(source)  # a bad file is an error before the networks are loaded
        output = output or Path("out.png")
        target = output if is_png(output) else output / f"{source.stem}.png"
        targets = {source: target}
    check_overwriting([*targets, *also_read], targets.values())
    check_folders(targets.values())
    return targets


def plan_folder(folder: Path, output: Path) -> dict[Path, Path]:
    if is_png(output):
        raise ValueError(
            f"--output {output} is one file for a folder of pictures; expected a folder"
        )
    if output.resolve() == folder.resolve():
        raise ValueError(f"--output {output} is the folder of the input; expected another folder")
    paths = [folder / name for name in pictures_in(folder)]
    names = output_names(paths)
    return {path: output / f"{name}.png" for path, name in zip(paths, names)}


def output_names(paths: list[Path]) -> list[str]:
    """For each picture of a folder a name of its own: the stem or, where that is shared, all of it.

    The results of a.png, a.jpg and a.png.jpg must not overwrite each other.
    """
    names = [path.stem for path in paths]
    while len(set(names)) < len(names):
        # A full name may be the stem of another picture, whose full name is then taken next.
        counts = Counter(names)
        names = [path.name if counts[name] > 1 else name for path, name in zip(paths, names)]
    return names


def read_batches(
    paths: list[Path],
    read: Callable[[Path], Image.Image],
    batch: int,
    problems: list[str],
) -> Iterator[tuple[list[Path], list[Image.Image]]]:
    """Neighbouring pictures of one size, up to `batch` at a time, with their paths.

    What is wrong with files that cannot be read goes to `problems`.
    """
    group = []
    pictures = []
    for path in paths:
        try:
            picture = read(path)
        except Exception as error:
            problems.append(explain_failure(path, error))
            continue
        full = len(group) == batch
        if group and (full or picture.size != pictures[0].size):
            yield group, pictures
            group = []
            pictures = []
        group.append(path)
        pictures.append(picture)
    if group:
        yield group, pictures


def prefetch(items: Iterator) -> Iterator:
    """The same items, each computed in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, items, None)
        while True:
            item = following.result()
            if item is None:
                return
            following = thread.submit(next, items, None)
            yield item


def transform_all(
    targets: dict[Path, Path],
    read: Callable[[Path], Image.Image],
    transform: Callable[[list[Image.Image]], Tensor],
    batch: int,
    pace: Pace,
    facts: dict[str, object],
) -> None:
    """Transforms pictures, and writes each result to its target with `facts`.

    `transform` takes up to `batch` pictures of one size and returns [B, 3, H, W] in [-1, 1].
    ValueError at the end, which names the pictures that failed.
    """
    problems = []

    def batches() -> Batches:
        groups = read_batches(list(targets), read, batch, problems)
        for paths, pictures in prefetch(groups):
            which = str(paths[0])
            if len(paths) > 1:
                which += f" and {len(paths) - 1} more at a time"
            small = partial(transform_corner, transform, pictures[0])
            pace.estimate(which, pictures[0].size, len(paths), small)
            how = facts | pace.facts(pictures[0].size)
            for made, transformed in transform_group(paths, pictures, transform, problems):
                yield [targets[path] for path in made], transformed, [how] * len(made)

    save_all(batches(), len(targets), problems)


def transform_corner(
    transform: Callable[[list[Image.Image]], Tensor],
    picture: Image.Image,
    side: int,
) -> Tensor:
    """transform() of a picture's upper left corner, black where a narrow picture ends."""
    return transform([picture.crop((0, 0, side, side))])


def transform_group(
    paths: list[Path],
    pictures: list[Image.Image],
    transform: Callable[[list[Image.Image]], Tensor],
    problems: list[str],
) -> Iterator[tuple[list[Path], Tensor]]:
    """Pictures that were transformed together, with their paths.

    If they fail together, for want of memory or because of one of them, each is tried alone.
    """
    transformed = None
    try:
        transformed = transform(pictures).cpu()
    except Exception as error:
        if len(paths) == 1:
            problems.append(explain_failure(paths[0], error))

    # Only here has Python let go of the error, and with it of what was in memory.
    if transformed is not None:
        yield paths, transformed
    elif len(paths) > 1:
        for path, picture in zip(paths, pictures):
            yield from transform_group([path], [picture], transform, problems)


def explain_failure(path: Path, error: Exception) -> str:
    """What went wrong with a picture, in a sentence that names it. A bug shows its traceback."""
    if training.out_of_memory(error):
        return (
            f"{path} needs too much memory ({training.first_line(error)}): compute it in tiles"
            " (--tile 512), or make it smaller"
        )
    if not isinstance(error, (ValueError, OSError)):
        tqdm.write("".join(traceback.format_exception(error)), file=sys.stderr)
        return f"{path} failed with {type(error).__name__} ({training.first_line(error)})"
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def save(picture: Tensor, path: Path, facts: dict[str, object]) -> None:
    """Writes [3, H, W] in [-1, 1] as an 8-bit PNG with its facts. ValueError for NaN."""
    if picture.isnan().any():
        advice = "try --dtype float32"
        if DTYPES.get(facts["dtype"]) in (torch.float32, torch.float64):
            advice = "the weights of the base, the checkpoint or a LoRA may be damaged"
        raise ValueError(f"{path} was not written, as the picture holds NaN: {advice}")

    text = PngImagePlugin.PngInfo()
    for name, value in facts.items():
        # Names of files may hold lone surrogates, which UTF-8 cannot say.
        encoded = str(value).encode(errors="backslashreplace")
        text.add_itxt(name, encoded.decode())
    image = to_picture(picture.float().cpu())

    def write(temporary: Path) -> None:
        image.save(temporary, format="PNG", pnginfo=text)

    path.parent.mkdir(parents=True, exist_ok=True)
    training.write_file(path, write)


def save_all(batches: Batches, total: int, problems: list[str]) -> None:
    """Writes each batch while the next one is computed, and prints the paths.

    `problems` grows while `batches` is read. ValueError in the end, with all of them.
    """
    with tqdm(total=total, disable=total == 1, unit="picture") as progress:
        for paths, pictures, facts in prefetch(batches):
            for path, picture, picture_facts in zip(paths, pictures, facts):
                try:
                    save(picture, path, picture_facts)
                except Exception as error:
                    problems.append(explain_failure(path, error))
                    continue
                progress.update()
                print(path)

    if problems and total == 1:
        raise ValueError(problems[0])
    if problems:
        listed = "; ".join(problems)
        raise ValueError(f"{len(problems)} of {total} pictures were not made: {listed}")


def version() -> str:
    try:
        return metadata.version("one-step-diffusion")
    except metadata.PackageNotFoundError:
        return "source"
