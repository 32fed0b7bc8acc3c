"""`python -m dataset check`: what a data set holds, and what is wrong with it.

At their start trainers read their test pictures with check_readable, and say with report_cut how
many captions are too long.
"""

import heapq
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from tqdm import tqdm

import training
from dataset.cache import Cached, check_shard
from dataset.folders import (
    Captioned,
    PairedFolder,
    UnpairedFolder,
    composed,
    find_caption,
    list_folder,
    match_partners,
    open_captioned,
    open_paired,
    open_unpaired,
    read_prompts,
    read_text,
    report_left_out,
)
from dataset.pictures import SUFFIXES, Preparation, open_picture, prepare

if TYPE_CHECKING:
    from models.clip import Tokenizer
    from models.t5 import T5Tokenizer

TRAINERS = ("pix2pix", "cyclegan", "yoso")
SPLITS = ("train", "test")
FIXED_PROMPTS = ("fixed_prompt_a.txt", "fixed_prompt_b.txt")

# Captions whose tokens a trainer counts at its start, the longest: half a second on a slow CPU.
MOST_COUNTED = 2000

# The data sets that are read from files. Others are drawn, or come with this code.
FILES = (PairedFolder, UnpairedFolder, Captioned, Cached)

# The default preparations of the trainers, of training and of test pictures.
PREPS = {
    "pix2pix": ("resized_crop_512", "resized_crop_512"),
    "cyclegan": ("resize_286_randomcrop_256x256_hflip", "resize_256"),
    "yoso": ("resized_randomcrop_512", "resized_crop_512"),
}


class Facts(NamedTuple):
    """What is remembered of a picture once it has been opened."""

    size: tuple[int, int]
    fingerprint: int

    def __str__(self) -> str:
        return "{}x{}".format(*self.size)


class Pair(NamedTuple):
    """The files of two pictures for the contact sheet."""

    a: Path
    b: Path
    caption: str


class Tile(NamedTuple):
    """One place of the contact sheet: thumbnails side by side, and the caption below them."""

    pictures: list[Image.Image]
    caption: str


def check(
    folder: str | Path,
    output: str | Path | None = None,
    trainer: str | None = None,
    base: str | None = None,
) -> list[str]:
    """Prints what a data set holds and its problems, and writes a contact sheet.

    `trainer` is one of TRAINERS, by default the one that the layout is for. Its own code opens
    both splits, with its default preparation, so whatever it would refuse is a problem. Every
    file is read. With `base` the tokens of the captions are counted as that model does. The sheet
    is `output`, by default FOLDER_check.png in the current folder. Returns the problems.
    ValueError if the folder holds no data set, or there is no such base.
    """
    if str(folder) == "digits" or str(folder).startswith("drawn:"):
        raise ValueError(f"{folder} is part of this code, and has no files to check")
    folder = Path(folder)
    trainer = trainer or guess_trainer(folder)
    sheet = Path(output) if output else _sheet_path(folder)
    _check_output(sheet, folder)
    tokenizer = _load_tokenizer(base) if base else None
    print(f"{folder}: checked for {trainer}")

    problems = []
    opened = _open_splits(folder, trainer, problems)
    for split, items in opened.items():
        if items is not None:
            _check_letters(split, captions_of(items), problems)
        if items is not None and tokenizer is not None:
            _attempt(problems, _print_tokens, split, captions_of(items), tokenizer)
    if trainer == "yoso" and not (folder / "train_B").is_dir():
        tiles = _check_captioned(opened, problems)
    else:
        tiles = _check_two_sides(folder, trainer, opened, problems)

    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("no problems")
    if tiles:
        kind = "PNG" if sheet.suffix.lower() == ".png" else "JPEG"
        picture = _contact_sheet(tiles)
        training.write_file(sheet, lambda path: picture.save(path, format=kind))
        print(sheet)
    return problems


def _check_output(sheet: Path, folder: Path) -> None:
    """ValueError for a contact sheet that would be no picture, or among those of the data set."""
    if sheet.suffix.lower() not in (".png", ".jpg", ".jpeg") or sheet.is_dir():
        raise ValueError(f"--output {sheet}: expected a name ending in .png or .jpg")
    if folder.is_dir() and sheet.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--output {sheet} is inside the data set; expected a name elsewhere")


def _sheet_path(folder: Path) -> Path:
    """FOLDER_check.png in the current folder; above the data set, if we are in it."""
    source = folder.resolve()
    name = f"{source.name}_check.png"
    if len(os.fsencode(name)) > 255:
        name = "check.png"
    is_inside = source.is_dir() and Path.cwd().is_relative_to(source)
    return source.parent / name if is_inside else Path(name)


def _check_letters(split: str, captions: list[str], problems: list[str]) -> None:
    """Adds a problem if a caption cannot be encoded, as tokenizers need it."""
    for caption in captions:
        try:
            caption.encode()
        except UnicodeEncodeError:
            problems.append(
                f"{split}: the caption {caption!r:.100} contains a lone surrogate"
                " (half a character); expected text that can be encoded as UTF-8"
            )
            return


def guess_trainer(folder: Path) -> str:
    """The trainer that a data set's layout is for. ValueError if it is no data set.

    Two sides are unpaired if there is a fixed prompt and no SPLIT_prompts.json.
    """
    sides = [folder / f"{split}_{side}" for split in SPLITS for side in "AB"]
    if any(side.is_dir() for side in sides):
        has_fixed_prompt = any((folder / name).exists() for name in FIXED_PROMPTS)
        if has_fixed_prompt and not any(folder.glob("*_prompts.json")):
            return "cyclegan"
        return "pix2pix"

    if folder.is_file() and folder.suffix.lower() in (".zip", ".txt"):
        return "yoso"
    if folder.is_dir():
        has_splits = all((folder / split).is_dir() for split in SPLITS)
        names = [path.name for path in folder.iterdir()]
        has_pictures = any(Path(name).suffix.lower() in SUFFIXES for name in names)
        if has_splits or has_pictures or {"index.json", "metadata.jsonl"} & {*names}:
            return "yoso"
    raise ValueError(
        f"{folder} is not a data set: expected a folder with train_A and train_B inside, a folder"
        " of pictures, a .zip of pictures, a .txt of captions, or a cache"
    )


def _open_splits(folder: Path, trainer: str, problems: list[str]) -> dict[str, Dataset | None]:
    """Opens both splits as the trainer does; None is one that it refuses."""
    functions = {
        "pix2pix": open_paired,
        "cyclegan": open_unpaired,
        "yoso": open_captioned,
    }
    opened = {}
    for split, prep in zip(SPLITS, PREPS[trainer], strict=True):
        opened[split] = _attempt(problems, functions[trainer], folder, split, prep)
    return opened


def _attempt(problems: list[str], function: Callable, *arguments):
    """The function's result. Of a ValueError the message becomes a problem and the result None.

    What opening a split has found already is not said again.
    """
    try:
        return function(*arguments)
    except ValueError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None


def _try_preparation(
    prep: Preparation,
    name: object,
    picture: Image.Image,
    problems: list[str],
) -> None:
    """Adds a problem if a picture can be read but not prepared."""
    try:
        prep([picture])
    except ValueError as error:
        problems.append(f"{name}: {error}")


def _print_sizes(name: str, count: int, sizes: list[tuple[int, int]]) -> None:
    """Prints the number of pictures, and the sizes of those that can be read."""
    if not sizes:
        return
    by_area = sorted(sizes, key=math.prod)
    distinct = len(set(sizes))
    smallest = "{}x{}".format(*by_area[0])
    median = "{}x{}".format(*by_area[len(by_area) // 2])
    largest = "{}x{}".format(*by_area[-1])
    print(
        f"{name}: {count} pictures, distinct sizes {distinct},"
        f" min {smallest}, median {median}, max {largest}"
    )


# -------------------- at the start of a run

def check_readable(items: Dataset, count: int) -> None:
    """Reads and prepares the first `count` items, as validation and preview will.

    Trainers call it at their start, so that a broken test picture costs no steps. Drawings are
    not read, since they cannot be broken. ValueError names the first item that cannot be used and
    says how many there are.
    """
    if not isinstance(items, FILES):
        return
    count = min(count, len(items))
    errors = []
    for index in tqdm(range(count), desc="test pictures", unit=" items", leave=False):
        _attempt(errors, items.__getitem__, index)
    if len(errors) > 1:
        raise ValueError(
            f"{errors[0]} ({len(errors)} of the {count} test items that are read have problems:"
            " python -m dataset check names them all)"
        )
    if errors:
        raise ValueError(errors[0])


def report_cut(
    source: object,
    captions: Sequence[str],
    tokenizer: "Tokenizer | T5Tokenizer | None",
) -> None:
    """Says on stderr how many captions are longer than the text encoder reads, if any are.

    The tokens of only the longest captions are counted (MOST_COUNTED of them, by their bytes), so
    that a large set does not delay the start of a run. Without a tokenizer, as for captions that
    are encoded already, nothing is said.
    """
    if tokenizer is None:
        return
    counts = count_tokens(heapq.nlargest(MOST_COUNTED, captions, key=_bytes_of), tokenizer)
    cut = [caption for caption, count in counts if count > tokenizer.limit]
    if cut:
        least = "at least " if len(cut) == MOST_COUNTED else ""
        training.say_once(
            f"{source}: {least}{len(cut)} of {len(captions)} captions are longer than the text"
            f" encoder's {tokenizer.length} tokens; their ends have no effect"
            f" ({textwrap.shorten(cut[0], 60, placeholder=' ...')})"
        )


def captions_of(items: Dataset) -> list[str]:
    """All captions of a data set from files; of two domains, the two fixed prompts."""
    if isinstance(items, UnpairedFolder):
        return list(items.prompts)
    if isinstance(items, PairedFolder | Cached):
        return items.captions
    captions = []
    if isinstance(items, Captioned):
        for _, caption in items.items:
            captions += [caption] if isinstance(caption, str) else caption
    return captions


def _bytes_of(caption: str) -> int:
    return len(caption.encode(errors="replace"))


def count_tokens(
    captions: list[str],
    tokenizer: "Tokenizer | T5Tokenizer",
) -> list[tuple[str, int]]:
    """Each caption and how many tokens it has, besides the start and the end token."""
    from models import t5

    texts = captions
    if isinstance(tokenizer, t5.T5Tokenizer):
        texts = [t5.clean(caption) for caption in captions]
    counts = [len(ids) for ids in tokenizer.encode(texts)]
    return list(zip(captions, counts, strict=True))


# -------------------- pictures with captions

def _check_captioned(
    opened: dict[str, Captioned | Cached | None], problems: list[str]
) -> list[Tile]:
    """Reads every item of a folder, a zip, a caption file or a cache. Returns the sheet's tiles."""
    tiles = []
    for split, items in opened.items():
        if items is None:
            continue
        if isinstance(items, Cached):
            print(f"{split}: {len(items)} items in {len(items.shards)} shards")
            for shard in tqdm(items.shards, desc=split, unit=" shards"):
                _attempt(problems, check_shard, items.folder, shard)
        elif items.kind != ".txt":
            tiles += _read_pictures(split, items, problems)
        _print_captions(split, items.captions)
    return tiles


def _read_pictures(split: str, items: Captioned, problems: list[str]) -> list[Tile]:
    """Reads and prepares every picture of a split. Returns tiles of up to eight of them."""
    shown = _spread(len(items), 8)
    sizes = []
    tiles = []
    for i in tqdm(range(len(items)), desc=split, unit=" pictures"):
        picture = _attempt(problems, items.read_picture, i)
        if picture is None:
            continue
        sizes.append(picture.size)
        name, _ = items.items[i]
        _try_preparation(items.prepare, items.folder / name, picture, problems)
        if i in shown:
            tiles.append(Tile([_thumbnail(picture)], items.captions[i]))
    _print_sizes(split, len(items), sizes)
    return tiles


# -------------------- two sides

def _check_two_sides(
    folder: Path,
    trainer: str,
    opened: dict[str, Dataset | None],
    problems: list[str],
) -> list[Tile]:
    """Reads every picture of A and B, paired or not. Returns the sheet's tiles."""
    pairs = []
    for split, name in zip(SPLITS, PREPS[trainer], strict=True):
        a = folder / f"{split}_A"
        b = folder / f"{split}_B"
        if not a.is_dir() and not b.is_dir():
            continue

        # What is left out has been named already where opening went well.
        report = opened[split] is None
        prep = prepare(name)
        facts_a = _survey(a, prep, report, problems)
        facts_b = _survey(b, prep, report, problems)
        if trainer == "cyclegan":
            pairs += _side_by_side(a, b, facts_a, facts_b)
        else:
            pairs += _check_pairs(a, b, facts_a, facts_b, problems)

    if trainer == "cyclegan":
        _check_fixed_prompts(folder, problems)
    tiles = []
    for i in _spread(len(pairs), 16):
        a, b, caption = pairs[i]
        pictures = [_thumbnail(open_picture(a)), _thumbnail(open_picture(b))]
        tiles.append(Tile(pictures, caption))
    return tiles


def _check_fixed_prompts(folder: Path, problems: list[str]) -> None:
    for name in FIXED_PROMPTS:
        prompt = _attempt(problems, read_text, folder / name)
        if prompt is None:
            continue
        print(f"{name}: {prompt.strip()}")
        if not prompt.strip():
            problems.append(f"{folder / name} is empty: expected a caption of the domain")


def _survey(
    side: Path,
    prep: Preparation,
    report: bool,
    problems: list[str],
) -> dict[str, Facts | None]:
    """Reads and prepares every picture of one folder, and prints their number and sizes.

    With `report`, names on stderr what the folder holds besides pictures. Returns
    {file name: facts}, with None for a picture that cannot be read.
    """
    listed = _attempt(problems, list_folder, side)
    if listed is None:
        return {}
    names, left_out = listed
    if report:
        report_left_out(side, left_out)

    found = {}
    for name in tqdm(names, desc=side.name, unit=" pictures"):
        found[name] = None
        picture = _attempt(problems, open_picture, side / name)
        if picture is not None:
            found[name] = Facts(picture.size, hash(picture.tobytes()))
            _try_preparation(prep, side / name, picture, problems)

    sizes = [facts.size for facts in found.values() if facts is not None]
    _print_sizes(side.name, len(found), sizes)
    return found


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
    known = {composed(name) for name in (*facts_a, *facts_b)}
    unused = [name for name in prompts or {} if name not in known]
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


def _load_tokenizer(base: str) -> "Tokenizer | T5Tokenizer":
    from files.bases import load_base

    return load_base(base, ("tokenizer",)).tokenizer


def _print_tokens(
    split: str,
    captions: list[str],
    tokenizer: "Tokenizer | T5Tokenizer",
) -> None:
    """Prints how many tokens the longest caption has, how many captions are cut, and three."""
    counts = count_tokens(captions, tokenizer)
    cut = [(caption, count) for caption, count in counts if count > tokenizer.limit]
    longest = max((count for _, count in counts), default=0)
    room = tokenizer.limit
    print(f"{split} tokens: longest caption {longest}, room for {room}, {len(cut)} captions cut")
    for caption, _ in cut[:3]:
        end = tokenizer.cut_off(caption)
        print(f"    without effect: {textwrap.shorten(end, 200, placeholder=' ...')}")


# -------------------- the contact sheet

def _spread(count: int, most: int) -> list[int]:
    """Up to `most` indices, spread over a list of `count`."""
    shown = min(most, count)
    return [i * count // shown for i in range(shown)]


def _contact_sheet(tiles: list[Tile], side: int = 192) -> Image.Image:
    """The pictures of each tile beside each other, the caption below them."""
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)

    margin = 8
    across = len(tiles[0].pictures)
    width = across * side + 2 * margin
    height = side + 48
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        left = column * width + margin
        top = row * height + margin
        for place, picture in enumerate(tile.pictures):
            sheet.paste(picture, (left + place * side, top))

        lines = textwrap.wrap(tile.caption, 32 * across, max_lines=2, placeholder=" ...")
        draw.multiline_text((left, top + side + 4), "\n".join(lines), fill="black")
    return sheet


def _thumbnail(picture: Image.Image, side: int = 192) -> Image.Image:
    """The picture, made smaller to fit into a square."""
    picture.thumbnail((side, side))
    return picture
