"""Tokenizers from their files: CLIP's and T5's vocabularies in the layouts in use."""

import base64
import json
import struct
from collections.abc import Iterator

from tokenizers import Tokenizer as Pieces

from files.hub import find
from files.tensors import read_json, reading
from models import clip, t5
from models.t5 import t5_pieces

# What is read of a `spiece.model`: in each protobuf message the numbers, names and types of the fields. Source:
# sentencepiece_model.proto of google/sentencepiece.
MODEL = {1: ("piece", bytes), 2: ("trainer", bytes), 3: ("normalizer", bytes)}
PIECE = {1: ("text", bytes), 2: ("score", float), 3: ("type", int)}
TRAINER = {3: ("model_type", int), 24: ("treat_whitespace_as_suffix", int), 35: ("byte_fallback", int)}
NORMALIZER = {2: ("charsmap", bytes), 3: ("add_dummy_prefix", int), 4: ("remove_extra_whitespaces", int),
              5: ("escape_whitespaces", int)}
# What sentencepiece takes for an absent option, and the only values that T5 has and this file builds.
OPTIONS = dict(model_type=1, treat_whitespace_as_suffix=0, byte_fallback=0, add_dummy_prefix=1,
               remove_extra_whitespaces=1, escape_whitespaces=1)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces

def pieces_from_json(text: str) -> Pieces:
    """From the text of a T5 `tokenizer.json`: its vocabulary, table of characters and special pieces. How they are
    put together is T5's way, whatever else the file says: so does `transformers`."""
    try:
        file = json.loads(text)
        kind, vocab, normalizer = file["model"]["type"], file["model"]["vocab"], file.get("normalizer") or {}
        if kind != "Unigram":
            raise ValueError(f"a model of the type {kind}, not Unigram")
        steps = [step.get("precompiled_charsmap") for step in [normalizer, *normalizer.get("normalizers", [])]]
        charsmap = base64.b64decode(next(filter(None, steps), ""), validate=True)
        special = {token["content"]: token["id"] for token in file.get("added_tokens", [])}
        pieces = t5_pieces([(str(piece), float(score)) for piece, score in vocab], file["model"]["unk_id"], charsmap,
                           list(special))
        if wrong := next((name for name, i in special.items() if pieces.token_to_id(name) != i), None):
            raise ValueError(f"its piece {wrong} is number {pieces.token_to_id(wrong)}, not {special[wrong]}")
    except Exception as error:  # whatever it holds in place of what was expected
        raise ValueError(f"this is no tokenizer.json of T5 ({type(error).__name__}: {error})") from error
    return pieces


def read_varint(data: bytes, i: int) -> tuple[int, int]:
    """The number at byte i, seven bits a byte, and where the next byte is."""
    value = 0
    for k in range(10):
        if i + k >= len(data):
            raise ValueError("it ends in the middle of a number")
        value |= (data[i + k] & 127) << 7 * k
        if data[i + k] < 128:
            return value, i + k + 1
    raise ValueError(f"no number ends within ten bytes of byte {i}")


def read_message(data: bytes, known: dict[int, tuple[str, type]]) -> Iterator[tuple[str, int | float | bytes]]:
    """Names and values of a protobuf message's known fields, in their order."""
    i = 0
    while i < len(data):
        tag, i = read_varint(data, i)
        number, wire = tag >> 3, tag & 7
        if wire not in (0, 1, 2, 5):
            raise ValueError(f"byte {i} begins a field of the unknown type {wire}")
        value, i = read_varint(data, i) if wire in (0, 2) else ({1: 8, 5: 4}[wire], i)
        if wire:  # then the value is the length of what follows
            if value > len(data) - i:
                raise ValueError(f"a field of {value} bytes begins {len(data) - i} bytes before the end")
            value, i = data[i:i + value], i + value
        if number in known:
            name, kind = known[number]
            if kind is not {0: int, 1: None, 2: bytes, 5: float}[wire]:
                raise ValueError(f"its {name} has the type {wire}")
            yield name, struct.unpack("<f", value)[0] if kind is float else value


def pieces_from_spiece(data: bytes, extra: int = 100) -> Pieces:
    """From the bytes of T5's `spiece.model`, to which T5 adds `extra` pieces that mark gaps, the last first."""
    try:
        vocab, types, found = [], [], {}
        for name, value in read_message(data, MODEL):
            if name == "piece":
                piece = dict(read_message(value, PIECE))
                vocab.append((piece.get("text", b"").decode(), piece.get("score", 0.0)))
                types.append(piece.get("type", NORMAL))
            else:
                found |= read_message(value, TRAINER if name == "trainer" else NORMALIZER)
        for name, built in OPTIONS.items():
            if found.get(name, built) != built:
                raise ValueError(f"its {name} is {found[name]}, and T5's is {built}")
        if not {*types} <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED} or types.count(UNKNOWN) != 1:
            raise ValueError(f"its {len(types)} pieces have the types {sorted({*types})}, unknown (2) {types.count(2)}"
                             " times; T5's have 1 to 4, and one is unknown")
        gaps = [f"<extra_id_{i}>" for i in reversed(range(extra))]
        special = [text for (text, _), kind in zip(vocab, types) if kind != NORMAL]
        return t5_pieces(vocab + [(gap, 0.0) for gap in gaps], types.index(UNKNOWN), found.get("charsmap", b""),
                         special + gaps)
    except ValueError as error:
        raise ValueError(f"this is no spiece.model of T5 ({error})") from error


def load_t5_tokenizer(base: str) -> t5.T5Tokenizer:
    path = find(base, ["tokenizer/spiece.model", "tokenizer/tokenizer.json"], "it or tokenizer.json, T5's vocabulary")
    with reading(path, "the vocabulary of T5: copy it again"):
        return t5.T5Tokenizer(pieces_from_spiece(path.read_bytes()) if path.suffix == ".model" else
                              pieces_from_json(path.read_text(encoding="utf-8")))


def load_tokenizer(base: str, folder: str = "tokenizer/") -> clip.Tokenizer:
    """From vocab.json and merges.txt, or tokenizer.json; the padding from the configuration files."""
    path = find(base, [f"{folder}tokenizer_config.json"])
    config = read_json(path) if path else {}
    # As in transformers: the second file overrules the first, unless that is of the newer kind. SD 2.1 needs it.
    if "added_tokens_decoder" not in config and (path := find(base, [f"{folder}special_tokens_map.json"])):
        config |= read_json(path)
    path = find(base, [f"{folder}vocab.json", f"{folder}tokenizer.json"], "it and merges.txt, or tokenizer.json")
    vocab = read_json(path)
    if path.name == "vocab.json":
        path = find(base, [f"{folder}merges.txt"], "it beside vocab.json: copy it too")
    with reading(path, "CLIP's byte-level BPE, with all files of one model: copy them again"):
        if path.name == "merges.txt":
            merges = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#version")]
        else:
            vocab, merges = vocab["model"]["vocab"], vocab["model"]["merges"]
        pairs = [tuple(pair.split() if isinstance(pair, str) else pair) for pair in merges if pair]
        tokens = [config.get(f"{name}_token") or default for name, default in
                  dict(pad="<|endoftext|>", bos="<|startoftext|>", eos="<|endoftext|>").items()]
        tokens = [token["content"] if isinstance(token, dict) else token for token in tokens]
        return clip.Tokenizer(clip.clip_pieces(vocab, pairs), min(config.get("model_max_length", 77), 77), *tokens)
