"""`python -m dataset check`: what a folder holds and what is wrong with it."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from dataset.folders import _caption, _partners, _read_text, pictures_in, read_prompts
from dataset.pictures import open_picture


def _attempt(problems: list[str], function: Callable, *arguments):
    """The function's result, or None with the sentence of its ValueError among the problems."""
    try:
        return function(*arguments)
    except ValueError as error:
        problems.append(str(error))


def _survey(side: Path, problems: list[str]) -> dict[str, tuple | None]:
    """Opens every picture of one folder and prints count and sizes: name -> (size, fingerprint), None if unreadable."""
    seen = {}
    for name in tqdm(_attempt(problems, pictures_in, side) or [], desc=side.name, unit=" pictures"):
        picture = _attempt(problems, open_picture, side / name)
        seen[name] = (picture.size, hash(picture.tobytes())) if picture else None
    if sizes := sorted((found[0] for found in seen.values() if found), key=math.prod):
        low, middle, high = ("{}x{}".format(*sizes[i]) for i in (0, len(sizes) // 2, -1))
        print(f"{side.name}: {len(seen)} pictures, distinct sizes {len(set(sizes))}, "
              f"min {low}, median {middle}, max {high}")
    return seen


def _compare(a: Path, b: Path, seen_a: dict, seen_b: dict, problems: list[str]) -> list[tuple[Path, Path, str]]:
    """What can be wrong between two folders and with their captions; returns the pairs that can be shown."""
    partners, captions, pairs = _partners(list(seen_a), list(seen_b)), {}, []
    path = a.with_name(a.name[:-2] + "_prompts.json")
    prompts = _attempt(problems, read_prompts, path)
    for name, partner in partners.items():
        one, other = seen_a[name], seen_b.get(partner)
        if partner is None:
            problems.append(f"{a / name} has no partner in {b.name}")
        elif one and other and one[0] != other[0]:
            problems.append("{} is {}x{} pixels but its partner {}x{}".format(a / name, *one[0], *other[0]))
        elif one and one == other:
            problems.append(f"{a / name} and its partner are identical")
        captions[name] = _attempt(problems, _caption, a / name, b / (partner or name), prompts)
        if one and other:
            pairs.append((a / name, b / partner, captions[name] or ""))
    problems += [f"{b / name} has no partner in {a.name}" for name in seen_b if name not in partners.values()]

    given = [caption for caption in captions.values() if caption]
    if given or prompts is not None:  # a folder without any caption is meant so, one that lacks some is not
        problems += [f"{a / name} has no caption" for name, caption in captions.items() if caption is None]
    if extra := [name for name in prompts or () if name not in seen_a and name not in seen_b]:
        problems.append(f"{path} has {len(extra)} entries without a picture, the first '{extra[0]}'")
    print(f"{a.name[:-2]} captions: {len(given)}, {len(captions) - len(given)} empty, "
          f"longest {max(map(len, given), default=0)} characters")
    for caption in list(dict.fromkeys(given))[:3]:
        print(f"    {caption}")
    return pairs


def _contact_sheet(pairs: list[tuple[Path, Path, str]], side: int = 192) -> Image.Image:
    """Up to 16 pairs spread over the list, A beside B, the caption below."""
    pairs = [pairs[i * len(pairs) // min(16, len(pairs))] for i in range(min(16, len(pairs)))]
    columns = math.ceil(math.sqrt(len(pairs)))
    width, height = 2 * side + 16, side + 48
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pairs) / columns) * height), "white")
    for i, (a, b, caption) in enumerate(pairs):
        left, top = i % columns * width + 8, i // columns * height + 8
        for x, path in ((left, a), (left + side, b)):
            picture = open_picture(path)
            picture.thumbnail((side, side))
            sheet.paste(picture, (x, top))
        lines = textwrap.wrap(caption, 64, max_lines=2, placeholder=" ...")
        ImageDraw.Draw(sheet).multiline_text((left, top + side + 4), "\n".join(lines), fill="black")
    return sheet


def check(folder: str | Path, output: str | Path | None = None) -> list[str]:
    """Prints what a data folder holds, paired or unpaired (fixed_prompt_a.txt or _b.txt and no SPLIT_prompts.json), and
    its problems, which it returns; writes a contact sheet, FOLDER_check.png here unless told otherwise."""
    folder = Path(folder)
    splits = [(folder / f"{split}_A", folder / f"{split}_B") for split in ("train", "test")]
    splits = [(a, b) for a, b in splits if a.is_dir() or b.is_dir()]
    if not splits:
        raise ValueError(f"{folder} is not a data set: expected a folder with train_A and train_B inside")
    fixed = [folder / "fixed_prompt_a.txt", folder / "fixed_prompt_b.txt"]
    paired = any(folder.glob("*_prompts.json")) or not any(path.exists() for path in fixed)
    problems, pairs = [], []
    for a, b in splits:
        seen_a, seen_b = _survey(a, problems), _survey(b, problems)
        if paired:
            pairs += _compare(a, b, seen_a, seen_b, problems)
        else:
            pairs += [(a / x, b / y, "") for x, y in zip(seen_a, seen_b, strict=False) if seen_a[x] and seen_b[y]]
    for path in [] if paired else fixed:
        text = _attempt(problems, _read_text, path)
        print(f"{path.name}: {(text or '').strip()}")
    print("\n".join(f"problem: {problem}" for problem in problems) or "no problems")
    if pairs:
        output = Path(output or f"{folder.resolve().name}_check.png")
        _contact_sheet(pairs).save(output)
        print(output)
    return problems
