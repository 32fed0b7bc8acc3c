"""Reading the tokenizers of CLIP and T5 from their files, and CLIP's from a checkpoint."""

import base64
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Pieces

from files.hub import find
from files.tensors import read_json, reading
from models import clip, t5

# The tokens that have a purpose, in the order in which `transformers` adds them.
PURPOSES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
CLIP_TOKENS = dict(
    bos_token="<|startoftext|>",
    eos_token="<|endoftext|>",
    unk_token="<|endoftext|>",
    pad_token="<|endoftext|>",
)
T5_TOKENS = dict(eos_token="</s>", unk_token="<unk>", pad_token="<pad>")

# -------------------- CLIP

def load_tokenizer(base: str, folder: str = "tokenizer/") -> clip.Tokenizer:
    """CLIP's tokenizer of a base, from vocab.json and merges.txt, or from tokenizer.json.

    Its special and added tokens and its length come from the files that `_tokenizer_config` reads,
    where they exist.
    """
    path = _find_vocabulary(
        base,
        folder,
        "vocab.json",
        "that file and merges.txt, or tokenizer.json",
    )
    config = CLIP_TOKENS | _tokenizer_config(base, folder)
    vocab = read_json(path)
    if path.name == "vocab.json":
        path = find(base, [f"{folder}merges.txt"], "it beside vocab.json: copy both")

    with reading(path, "CLIP's byte-level BPE, with all files of one model: copy them again"):
        if path.name == "merges.txt":
            merges = _merges_from_text(path)
        else:
            merges = vocab["model"]["merges"]
            vocab = vocab["model"]["vocab"]
        # A merge is a list of two pieces, or both in one string with a space between.
        pairs = []
        for merge in merges:
            if merge:
                pair = merge.split() if isinstance(merge, str) else merge
                pairs.append(tuple(pair))
        pieces = clip.clip_pieces(vocab, pairs)
        add_tokens(pieces, config)
        return clip.Tokenizer(
            pieces,
            length=min(config.get("model_max_length") or 77, 77),
            pad=_text_of(config["pad_token"] or CLIP_TOKENS["pad_token"]),
            start=_text_of(config["bos_token"] or CLIP_TOKENS["bos_token"]),
            end=_text_of(config["eos_token"] or CLIP_TOKENS["eos_token"]),
        )


def _find_vocabulary(base: str, folder: str, name: str, expected: str) -> Path:
    """The file `name` with a tokenizer's vocabulary, or tokenizer.json.

    An added_tokens.json, which few models have, is fetched first: once the vocabulary is in the
    Hub's cache nothing is missing, and the Hub is not asked again.
    """
    names = [folder + name, f"{folder}tokenizer.json"]
    if find(base, names, fetch=False) is None:
        find(base, [f"{folder}added_tokens.json"])
    return find(base, names, expected)


def _merges_from_text(path: Path) -> list[str]:
    """The lines of a merges.txt without its version line."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line for line in lines if not line.startswith("#version")]


def tokenizer_to_json(tokenizer: clip.Tokenizer) -> str:
    """CLIP's tokenizer as text, for the metadata of a checkpoint."""
    saved = dict(pieces=tokenizer.pieces.to_str(), length=tokenizer.length, **tokenizer.tokens)
    return json.dumps(saved)


def tokenizer_from_json(text: str) -> clip.Tokenizer:
    """The tokenizer that `tokenizer_to_json` wrote."""
    saved = json.loads(text)
    # Only vocabulary, merges and added tokens are read. How they are put together is always
    # CLIP's way.
    whole = json.loads(saved.pop("pieces"))
    model = whole["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    pieces = clip.clip_pieces(model["vocab"], merges)
    add_tokens(pieces, dict(added_tokens_decoder=_by_number(whole.get("added_tokens", []))))
    return clip.Tokenizer(pieces, **saved)


# -------------------- added tokens

# An added token is never split, wherever it stands in a text. Whoever trains a new word (textual
# inversion) adds its token to the tokenizer, and rows for it to the text encoder.

def _tokenizer_config(base: str, folder: str) -> dict:
    """The tokenizer's configuration, put together from its files as in `transformers`.

    Its added_tokens_decoder is {number: token}. A tokenizer_config.json with that entry is complete
    by itself. If it has none, special_tokens_map.json overrides it, and the added tokens are those
    of added_tokens.json and tokenizer.json. SD 2.1 needs special_tokens_map.json and
    added_tokens.json.
    """
    config = {}
    path = find(base, [f"{folder}tokenizer_config.json"])
    if path:
        config = read_json(path)
    if "added_tokens_decoder" in config:
        return config

    path = find(base, [f"{folder}special_tokens_map.json"])
    if path:
        config |= read_json(path)
    listed = {}
    path = find(base, [f"{folder}added_tokens.json"], fetch=False)
    if path:
        with reading(path, "{token: number}"):
            # Not additional_special_tokens, in transformers 5.
            named = [config.get(key) for key in PURPOSES]
            others = config.get("extra_special_tokens") or []
            special = {_text_of(token) for token in (*named, *others) if token}
            for content, number in read_json(path).items():
                is_special = content in special
                token = dict(content=content, normalized=not is_special, special=is_special)
                listed[int(number)] = token
    path = find(base, [f"{folder}tokenizer.json"], fetch=False)
    if path:
        with reading(path, "the tokens of a tokenizer.json in added_tokens"):
            listed |= _by_number(read_json(path).get("added_tokens", []))
    return config | dict(added_tokens_decoder=listed)


def _by_number(tokens: list[dict]) -> dict[int, dict]:
    """The added tokens of a tokenizer.json, by their numbers."""
    return {int(token["id"]): token for token in tokens}


def add_tokens(pieces: Pieces, config: dict) -> None:
    """Adds the tokens of a tokenizer's configuration to its pieces, as `transformers` does.

    ValueError if a token would get another number than the configuration says, because the text
    encoder would take the embedding of another one for it.
    """
    listed = {}
    for number, token in config["added_tokens_decoder"].items():
        listed[int(number)] = _added_token(token, is_special=token.get("special", False))
    numbers = sorted(listed)
    pieces.add_tokens([listed[number] for number in numbers])
    for number in numbers:
        content = listed[number].content
        found = pieces.token_to_id(content)
        if found != number:
            raise ValueError(
                f"its added token {content!r:.100} has the number {number} in the configuration,"
                f" but is number {found} after the vocabulary"
            )

    known = {token.content for token in listed.values()}
    named = _named_tokens(config)
    for token in named + _other_special_tokens(config):
        # One that is named for a purpose, such as padding, must be a piece of the vocabulary.
        is_piece = pieces.token_to_id(token.content) is not None
        if token.content not in known and (is_piece or token not in named):
            pieces.add_tokens([token])


def _named_tokens(config: dict) -> list[AddedToken]:
    """The tokens that a configuration names for a purpose: bos_token, pad_token and so on.

    If a token has several purposes, the flags of the last one count.
    """
    keys = [*PURPOSES, *(key for key in config if key not in PURPOSES and key.endswith("_token"))]
    values = [config.get(key) for key in keys]
    return [_added_token(value, is_special=True) for value in values if _is_token(value)]


def _is_token(value: object) -> bool:
    """Whether a value is a token, not an option such as "add_bos_token"."""
    return bool(value) and isinstance(value, str | dict)


def _other_special_tokens(config: dict) -> list[AddedToken]:
    tokens = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(tokens, dict):  # by their purposes
        tokens = list(tokens.values())
    return [_added_token(token, is_special=True) for token in tokens]


def _text_of(token: str | dict) -> str:
    """The text of a token. Configurations hold the text itself, or an object around it."""
    return token["content"] if isinstance(token, dict) else token


def _added_token(token: str | dict, is_special: bool) -> AddedToken:
    """A token from a configuration, which holds its text, or an object with text and flags."""
    flags = token if isinstance(token, dict) else {}
    content = _text_of(token)
    if not isinstance(content, str) or not 0 < len(content) <= 1000:
        raise ValueError(f"it has the added token {content!r:.100}")
    return AddedToken(
        content,
        single_word=bool(flags.get("single_word", False)),
        lstrip=bool(flags.get("lstrip", False)),
        rstrip=bool(flags.get("rstrip", False)),
        normalized=bool(flags.get("normalized", not is_special)),
        special=bool(is_special),
    )


def added_tokens_decoder(pieces: Pieces) -> dict[int, dict]:
    """The added tokens by their numbers, for a tokenizer_config.json."""
    listed = {}
    for token in json.loads(pieces.to_str())["added_tokens"]:
        listed[token.pop("id")] = token
    return listed


# -------------------- T5

def load_t5_tokenizer(base: str) -> t5.T5Tokenizer:
    """T5's tokenizer of a base, from spiece.model or tokenizer.json, with the added tokens."""
    path = _find_vocabulary(
        base,
        "tokenizer/",
        "spiece.model",
        "that file or tokenizer.json, with T5's vocabulary",
    )
    config = T5_TOKENS | _tokenizer_config(base, "tokenizer/")
    with reading(path, "the vocabulary of T5: copy it again"):
        if path.suffix == ".model":
            pieces = pieces_from_spiece(path.read_bytes())
        else:
            pieces = pieces_from_json(path.read_text(encoding="utf-8-sig"))
        add_tokens(pieces, config)
        return t5.T5Tokenizer(pieces)


def pieces_from_json(text: str) -> Pieces:
    """T5's pieces, from the text of a `tokenizer.json`. ValueError if it is damaged or not T5's.

    The vocabulary, the table of characters and the special pieces are read. As in `transformers`,
    they are always put together in T5's way, whatever else the file says.
    """
    try:
        return _pieces_from_parsed_json(json.loads(text))
    except Exception as error:
        # A damaged file may hold anything anywhere, so that any exception is possible.
        raise ValueError(
            f"this is not a tokenizer.json of T5 ({type(error).__name__}: {error})"
        ) from error


def _pieces_from_parsed_json(file: dict) -> Pieces:
    """T5's pieces, from the parsed `tokenizer.json`."""
    model = file["model"]
    if model["type"] != "Unigram":
        raise ValueError(f"its model has the type {model['type']}, not Unigram")
    vocab = [(str(piece), float(score)) for piece, score in model["vocab"]]

    # The table of characters is in the normalizer, or in one step of it.
    normalizer = file.get("normalizer") or {}
    charsmap = b""
    for step in (normalizer, *normalizer.get("normalizers", [])):
        encoded = step.get("precompiled_charsmap")
        if encoded:
            charsmap = base64.b64decode(encoded, validate=True)
            break

    special = {token["content"]: token["id"] for token in file.get("added_tokens", [])}
    pieces = _checked_t5_pieces(vocab, model["unk_id"], charsmap, list(special))
    for name, number in special.items():
        found = pieces.token_to_id(name)
        if found != number:
            raise ValueError(f"its piece {name} is number {found}, not {number}")
    return pieces


# Fields of the protobuf messages in a `spiece.model` that are read: number -> name and type.
# Source: sentencepiece_model.proto of google/sentencepiece.
MODEL_FIELDS = {
    1: ("piece", bytes),
    2: ("trainer", bytes),
    3: ("normalizer", bytes),
}
PIECE_FIELDS = {
    1: ("text", bytes),
    2: ("score", float),
    3: ("type", int),
}
TRAINER_FIELDS = {
    3: ("model_type", int),
    24: ("treat_whitespace_as_suffix", int),
    35: ("byte_fallback", int),
}
NORMALIZER_FIELDS = {
    2: ("charsmap", bytes),
    3: ("add_dummy_prefix", int),
    4: ("remove_extra_whitespaces", int),
    5: ("escape_whitespaces", int),
}

# The options of T5's model. They are sentencepiece's defaults, so that a file may omit them.
# Other values are not supported.
T5_OPTIONS = dict(
    model_type=1,
    treat_whitespace_as_suffix=0,
    byte_fallback=0,
    add_dummy_prefix=1,
    remove_extra_whitespaces=1,
    escape_whitespaces=1,
)

# The types of pieces that T5 has.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4


def pieces_from_spiece(data: bytes) -> Pieces:
    """T5's pieces, from the bytes of a `spiece.model`. ValueError if it is damaged or not T5's.

    T5 adds 100 pieces <extra_id_N>, which mark gaps in a text, with the highest N first.
    """
    try:
        vocab, types, options = _read_spiece(data)
        for name, expected in T5_OPTIONS.items():
            found = options.get(name, expected)
            if found != expected:
                raise ValueError(f"its {name} is {found}, and T5's is {expected}")
        if not set(types) <= {NORMAL, UNKNOWN, CONTROL, USER_DEFINED} or types.count(UNKNOWN) != 1:
            raise ValueError(
                f"its {len(types)} pieces have the types {sorted(set(types))},"
                f" unknown (2) {types.count(UNKNOWN)} times; T5's have 1 to 4, and one is unknown"
            )

        gaps = [f"<extra_id_{i}>" for i in reversed(range(100))]
        special = []
        for (text, _), kind in zip(vocab, types):
            if kind != NORMAL:
                special.append(text)
        return _checked_t5_pieces(
            vocab + [(gap, 0.0) for gap in gaps],
            unknown=types.index(UNKNOWN),
            charsmap=options.get("charsmap", b""),
            special=special + gaps,
        )
    except ValueError as error:
        raise ValueError(f"this is not a spiece.model of T5 ({error})") from error


def _read_spiece(data: bytes) -> tuple[list[tuple[str, float]], list[int], dict]:
    """A spiece.model's pieces with their scores, the pieces' types, and the options."""
    vocab = []
    types = []
    options = {}
    for name, value in read_message(data, MODEL_FIELDS):
        if name == "piece":
            piece = dict(read_message(value, PIECE_FIELDS))
            text = piece.get("text", b"").decode()
            vocab.append((text, piece.get("score", 0.0)))
            types.append(piece.get("type", NORMAL))
        elif name == "trainer":
            options.update(read_message(value, TRAINER_FIELDS))
        else:
            options.update(read_message(value, NORMALIZER_FIELDS))
    return vocab, types, options


def _checked_t5_pieces(
    vocab: list[tuple[str, float]],
    unknown: int,
    charsmap: bytes,
    special: list[str],
) -> Pieces:
    """`t5_pieces` of values from a file. ValueError if they are damaged."""
    if not 0 <= unknown < len(vocab):
        raise ValueError(f"the unknown piece is {unknown} of {len(vocab)}")
    for number, (piece, score) in enumerate(vocab):
        if not 0 < len(piece) <= 1000 or not math.isfinite(score):
            raise ValueError(f"piece {number} has {len(piece)} characters and the score {score}")
    if charsmap:
        check_charsmap(charsmap)
    return t5.t5_pieces(vocab, unknown, charsmap, special)


def check_charsmap(data: bytes) -> None:
    """Refuses a damaged table of characters (sentencepiece's precompiled_charsmap).

    The table is the trie's size in bytes, a double-array trie of 32-bit units, and the texts that
    the trie's leaves point to. The library that reads it trusts every offset, and a wrong one
    would crash the process. So all of them are checked here.
    """
    size = int.from_bytes(data[:4], "little")
    if not size or size % 1024 or size >= len(data) - 4:
        raise ValueError(f"the table of characters has {len(data)} bytes and a trie of {size}")
    data[4 + size:].decode()  # the texts are UTF-8

    trie = np.frombuffer(data, "<u4", size // 4, offset=4).astype(np.int64)
    texts = np.frombuffer(data, np.uint8, offset=4 + size)

    # A unit with the highest bit is a leaf. Leaves are reached from their nodes only.
    nodes = np.flatnonzero(trie < 1 << 31)
    units = trie[nodes]
    offsets = units >> 10 << ((units & 512) >> 6)
    children = nodes ^ offsets  # where the children of each node begin
    # The trie consists of blocks of 256 units, and all children of a node are in one block.
    if nodes[:1].tolist() != [0] or children.max() >= len(trie):
        raise ValueError("the table of characters points outside its trie")

    has_leaf = (units & 256) > 0
    leaves = trie[children[has_leaf]] & ((1 << 31) - 1)  # offsets into the texts
    # A byte 10xxxxxx is in the middle of a UTF-8 character.
    if leaves.max(initial=0) >= len(texts) or (texts[leaves] & 0xC0 == 0x80).any():
        raise ValueError("the table of characters points outside its texts")


# -------------------- protobuf

# The wire types of fields.
VARINT = 0
FIXED_64 = 1
BYTES = 2
FIXED_32 = 5


def read_message(data: bytes, known: dict[int, tuple[str, type]]) -> Iterator[tuple[str, Any]]:
    """The names and values of a protobuf message's known fields, in the order of the message.

    known: number -> name and type (int, float or bytes) of a field; others are skipped.
    ValueError if the message is damaged.
    """
    i = 0
    while i < len(data):
        tag, i = read_varint(data, i)
        number = tag >> 3
        wire = tag & 7
        if wire == VARINT:
            value, i = read_varint(data, i)
        elif wire in (FIXED_64, BYTES, FIXED_32):
            if wire == BYTES:
                size, i = read_varint(data, i)
            else:
                size = 8 if wire == FIXED_64 else 4
            if size > len(data) - i:
                raise ValueError(
                    f"a field of {size} bytes begins {len(data) - i} bytes before the end"
                )
            value = data[i:i + size]
            i += size
        else:
            raise ValueError(f"byte {i} begins a field of the unknown type {wire}")

        if number in known:
            name, kind = known[number]
            if kind is not {VARINT: int, BYTES: bytes, FIXED_32: float}.get(wire):
                raise ValueError(f"its {name} has the type {wire}")
            if kind is float:
                (value,) = struct.unpack("<f", value)
            yield name, value


def read_varint(data: bytes, i: int) -> tuple[int, int]:
    """The number that begins at byte i, of seven bits per byte, and the index of the next byte."""
    value = 0
    for k in range(10):
        if i + k >= len(data):
            raise ValueError("it ends in the middle of a number")
        byte = data[i + k]
        value |= (byte & 127) << 7 * k
        if byte < 128:
            return value, i + k + 1
    raise ValueError(f"no number ends within ten bytes of byte {i}")
