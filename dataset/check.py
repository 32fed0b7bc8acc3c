"""`python -m dataset check`: what a data set holds, and what is wrong with it."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

from dataset.folders import find_caption, match_partners, pictures_in, read_prompts, read_text
from dataset.pictures import open_picture


class Facts(NamedTuple):
    """What is remembered of a picture once it has been opened."""

    size: tuple[int, int]
    fingerprint: int

    def __str__(self) -> str:
        return "{}x{}".format(*self.size)


class Pair(NamedTuple):
    """Two pictures for the contact sheet."""

    a: Path
    b: Path
    caption: str


def check(folder: str | Path, output: str | Path | None = None) -> list[str]:
    """Prints what a data set holds and its problems, and writes a contact sheet.

    The data set is unpaired if it has a fixed_prompt_a.txt or fixed_prompt_b.txt and no
    SPLIT_prompts.json. The sheet is `output`, by default FOLDER_check.png in the current folder.
    Returns the problems. ValueError if the folder holds no data set.
    """
    folder = Path(folder)
    splits = []
    for split in ("train", "test"):
        a = folder / f"{split}_A"
        b = folder / f"{split}_B"
        if a.is_dir() or b.is_dir():
            splits.append((a, b))
    if not splits:
        raise ValueError(
            f"{folder} is not a data set: expected a folder with train_A and train_B inside"
        )

    fixed_prompts = [folder / "fixed_prompt_a.txt", folder / "fixed_prompt_b.txt"]
    has_fixed_prompt = any(path.exists() for path in fixed_prompts)
    paired = any(folder.glob("*_prompts.json")) or not has_fixed_prompt

    problems = []
    pairs = []
    for a, b in splits:
        facts_a = _survey(a, problems)
        facts_b = _survey(b, problems)
        if paired:
            pairs += _check_pairs(a, b, facts_a, facts_b, problems)
        else:
            pairs += _side_by_side(a, b, facts_a, facts_b)
    if not paired:
        for path in fixed_prompts:
            prompt = _attempt(problems, read_text, path) or ""
            print(f"{path.name}: {prompt.strip()}")

    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("no problems")
    if pairs:
        path = Path(output or f"{folder.resolve().name}_check.png")
        _contact_sheet(pairs).save(path)
        print(path)
    return problems


def _attempt(problems: list[str], function: Callable, *arguments):
    """The function's result. Of a ValueError the message becomes a problem and the result None."""
    try:
        return function(*arguments)
    except ValueError as error:
        problems.append(str(error))
        return None


def _survey(side: Path, problems: list[str]) -> dict[str, Facts | None]:
    """Opens every picture of one folder, and prints their number and sizes.

    Returns {file name: facts}, with None for a picture that cannot be read.
    """
    names = _attempt(problems, pictures_in, side) or []
    found = {}
    for name in tqdm(names, desc=side.name, unit=" pictures"):
        found[name] = None
        picture = _attempt(problems, open_picture, side / name)
        if picture is not None:
            found[name] = Facts(picture.size, hash(picture.tobytes()))

    by_area = [facts for facts in found.values() if facts is not None]
    by_area.sort(key=lambda facts: math.prod(facts.size))
    if by_area:
        distinct = len({facts.size for facts in by_area})
        smallest = by_area[0]
        median = by_area[len(by_area) // 2]
        largest = by_area[-1]
        print(
            f"{side.name}: {len(found)} pictures, distinct sizes {distinct},"
            f" min {smallest}, median {median}, max {largest}"
        )
    return found


# -------------------- pairs

def _side_by_side(
    a: Path,
    b: Path,
    facts_a: dict[str, Facts | None],
    facts_b: dict[str, Facts | None],
) -> list[Pair]:
    """Readable pictures of two domains, which have nothing to do with each other."""
    pairs = []
    for name_a, name_b in zip(facts_a, facts_b, strict=False):
        if facts_a[name_a] and facts_b[name_b]:
            pairs.append(Pair(a / name_a, b / name_b, caption=""))
    return pairs


def _check_pairs(
    a: Path,
    b: Path,
    facts_a: dict[str, Facts | None],
    facts_b: dict[str, Facts | None],
    problems: list[str],
) -> list[Pair]:
    """Finds what is wrong between two folders and with their captions.

    Returns the pairs of which both pictures can be read.
    """
    prompts_path = a.with_name(a.name.removesuffix("_A") + "_prompts.json")
    prompts = _attempt(problems, read_prompts, prompts_path)
    partners = match_partners(list(facts_a), list(facts_b))
    captions = {}
    pairs = []
    for name, partner in partners.items():
        one = facts_a[name]
        other = facts_b.get(partner)
        if partner is None:
            problems.append(f"{a / name} has no partner in {b.name}")
        elif one and other and one.size != other.size:
            problems.append(f"{a / name} is {one} pixels but its partner {other}")
        elif one and one == other:
            problems.append(f"{a / name} and its partner are identical")

        beside = b / (partner or name)
        captions[name] = _attempt(problems, find_caption, a / name, beside, prompts)
        if one and other:
            pairs.append(Pair(a / name, b / partner, captions[name] or ""))

    taken = set(partners.values())
    for name in facts_b:
        if name not in taken:
            problems.append(f"{b / name} has no partner in {a.name}")

    _check_captions(a, captions, prompts, problems)
    unused = [name for name in prompts or {} if name not in facts_a and name not in facts_b]
    if unused:
        problems.append(
            f"{prompts_path} has {len(unused)} entries without a picture, the first '{unused[0]}'"
        )
    _print_captions(a.name.removesuffix("_A"), list(captions.values()))
    return pairs


def _check_captions(
    a: Path,
    captions: dict[str, str | None],
    prompts: dict[str, str] | None,
    problems: list[str],
) -> None:
    # A folder without any caption is meant to have none; one in which only some are missing is not.
    if prompts is None and not any(captions.values()):
        return
    for name, caption in captions.items():
        if caption is None:
            problems.append(f"{a / name} has no caption")


def _print_captions(split: str, captions: list[str | None]) -> None:
    """Prints how many captions a split has, their length, and three of them."""
    given = [caption for caption in captions if caption]
    empty = len(captions) - len(given)
    longest = max((len(caption) for caption in given), default=0)
    print(f"{split} captions: {len(given)}, {empty} empty, longest {longest} characters")

    distinct = list(dict.fromkeys(given))
    for caption in distinct[:3]:
        print(f"    {caption}")


# -------------------- the contact sheet

def _contact_sheet(pairs: list[Pair], side: int = 192) -> Image.Image:
    """Up to 16 pairs, spread over the list: A beside B, the caption below them."""
    count = min(16, len(pairs))
    pairs = [pairs[i * len(pairs) // count] for i in range(count)]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)

    margin = 8
    width = 2 * side + 2 * margin
    height = side + 48
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pair in enumerate(pairs):
        row, column = divmod(i, columns)
        left = column * width + margin
        top = row * height + margin
        sheet.paste(_thumbnail(pair.a, side), (left, top))
        sheet.paste(_thumbnail(pair.b, side), (left + side, top))

        lines = textwrap.wrap(pair.caption, 64, max_lines=2, placeholder=" ...")
        draw.multiline_text((left, top + side + 4), "\n".join(lines), fill="black")
    return sheet


def _thumbnail(path: Path, side: int) -> Image.Image:
    picture = open_picture(path)
    picture.thumbnail((side, side))
    return picture
