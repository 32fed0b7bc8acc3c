"""How the tiny bases were made: `python -m tiny.recipe tokenizer` writes the vocabulary.

The tokenizer is CLIP's format at a hundredth of its size: all bytes, so every text has ids, and merges that make one
piece of each word below; other words fall into letters."""

import argparse
import json
import pathlib
from collections import Counter

from tokenizers import pre_tokenizers

HERE = pathlib.Path(__file__).parent
WORDS = """
red green blue yellow orange purple pink brown cyan gray grey white black navy olive lime maroon gold silver teal
violet crimson beige turquoise magenta dark light pale bright deep soft warm cold circle square triangle star line
outline shape background foreground photo picture drawing painting image sketch of house houses tree trees car cars
boat boats hill hills mountain mountains road river lake sea water grass sand field beach snow rain fog mist storm
cloud clouds cloudy clear sunny rainy snowy foggy sky sun moon stars star lamp lamps window windows lit roof door
wall fence bridge flower flowers bush rock rocks bird birds cat dog man woman person child street city town village
forest garden building facade balcony day night dusk dawn morning evening noon summer winter spring autumn weather
driving heavy in the a an on at by near with without and or to from under over behind before between beside above
below left right middle centre front back side top bottom one two three four five six seven eight nine ten no many
few some big small large little tall short wide narrow round old new empty full scene view quiet under it is are
there that this its
""".split()


def learn_merges(words: list[str], suffix: str) -> list[tuple[str, str]]:
    """Byte-pair encoding: the most frequent pair of neighbours becomes one piece (of equals the first in the alphabet),
    until every word is one piece."""
    spellings, merges = [[*word[:-1], word[-1] + suffix] for word in words], []
    while counts := Counter(pair for pieces in spellings for pair in zip(pieces, pieces[1:])):
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((a, b))
        for pieces in spellings:
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == (a, b):
                    pieces[i:i + 2] = [a + b]
                i += 1
    return merges


def write_tokenizer(folder: pathlib.Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json in CLIP's order: 256 bytes, 256 bytes that end a word, merges,
    start and end token."""
    suffix, specials = "</w>", ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(list(dict.fromkeys(WORDS)), suffix)
    pieces = [*alphabet, *(letter + suffix for letter in alphabet), *dict.fromkeys(a + b for a, b in merges), *specials]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        dict(tokenizer_class="CLIPTokenizer", model_max_length=24, bos_token=specials[0], eos_token=specials[1],
             pad_token=specials[1], unk_token=specials[1], do_lower_case=True), indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["tokenizer"])
    parser.parse_args()
    write_tokenizer(HERE / "tiny" / "tokenizer")
