"""T5's encoder and tokenizer agree with `transformers`' T5EncoderModel and T5Tokenizer.

The tokenizer also agrees with the sentencepiece package, except for texts where `transformers`
differs from it.
"""

import base64
import io
import json
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import randomise, relative
from test_clip import odd_strings
from torch import Tensor
from transformers import T5Config as PeerConfig
from transformers import T5EncoderModel
from transformers import T5Tokenizer as PeerTokenizer
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from files.tensors import read_config
from files.tokenizers import pieces_from_json, pieces_from_spiece, read_message, read_varint
from models.t5 import (
    FIXED,
    RMSNorm,
    T5Config,
    T5Encoder,
    T5Tokenizer,
    clean,
    position_buckets,
)

TINY = dict(vocab_size=99, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=4)
SMALLEST = dict(
    TINY,
    d_kv=16,
    num_heads=1,
    num_layers=1,
    relative_attention_num_buckets=6,
    relative_attention_max_distance=9,
    layer_norm_epsilon=1e-2,
)
KINDS = {
    "heads wider than the model": TINY,
    "one head, one layer, few buckets, eps 1e-2": SMALLEST,
}


# -------------------- text encoder

def pair(sizes: dict, dtype: torch.dtype = torch.float64) -> tuple[T5Encoder, T5EncoderModel]:
    """Our network with the peer's tensors, and the peer. Names and shapes must be the same."""
    peer = T5EncoderModel(PeerConfig(feed_forward_proj="gated-gelu", **sizes)).eval()
    peer = randomise(peer.to(dtype))
    with torch.device("meta"):
        encoder = T5Encoder(T5Config(**sizes))
    tensors = peer.state_dict()
    tensors.pop("encoder.embed_tokens.weight")  # repeats shared.weight
    encoder.load_state_dict(tensors, strict=True, assign=True)
    return encoder, peer


def captions(vocab: int, n: int) -> tuple[Tensor, Tensor]:
    """Ids [6, n], with six different masks."""
    ids = torch.randint(0, vocab, (6, n), generator=torch.Generator().manual_seed(n))
    i = torch.arange(n)
    masks = [
        i >= 0,  # all tokens
        i < 1,  # the first one
        i < (n + 1) // 2,  # half
        i < max(n - 1, 1),  # all but the last
        i >= n // 2,  # padding in front
        i % 3 != 1,  # holes
    ]
    return ids, torch.stack(masks).long()


@pytest.fixture
def exact_norm(monkeypatch):
    """Removes the peer's cast to float32 in its RMS norm."""

    def forward(self, x):
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.variance_epsilon))

    monkeypatch.setattr(T5LayerNorm, "forward", forward)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 17, 120, 300])
@pytest.mark.parametrize("sizes", KINDS.values(), ids=KINDS.keys())
def test_context_is_the_peers(sizes, n, exact_norm):
    encoder, peer = pair(sizes)
    ids, mask = captions(99, n)
    theirs = peer(ids, attention_mask=mask).last_hidden_state
    # Row by row, so that no row hides an error in another.
    for ours, expected in zip(encoder(ids, mask), theirs):
        assert relative(ours, expected) < 1e-9
    if n > 2:
        assert relative(encoder(ids, torch.ones_like(mask)), theirs) > 1e-3


@torch.no_grad()
def test_context_is_the_peers_with_its_cast_in_the_norm():
    encoder, peer = pair(TINY)
    ids, mask = captions(99, 60)
    theirs = peer(ids, attention_mask=mask).last_hidden_state
    assert relative(encoder(ids, mask), theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_the_peers_in_every_type(dtype):
    peer = randomise(T5LayerNorm(24, 1e-3)).to(dtype)
    norm = RMSNorm(24, 1e-3).to(dtype)
    norm.load_state_dict(peer.state_dict())
    # The squares are beyond the range of float16.
    x = 300 * torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x.to(dtype)), peer(x.to(dtype)))
    assert torch.isfinite(norm(x.to(dtype))).all()


@torch.no_grad()
def test_sums_beyond_float16_are_computed_in_float32_as_in_the_peer():
    encoder, peer = pair(TINY, torch.float16)
    for block in peer.encoder.block:
        block.layer[1].DenseReluDense.wo.weight *= 3e4  # it is our network's tensor too
    ids, mask = captions(99, 9)
    ours = encoder(ids, mask)
    assert torch.isfinite(ours).all()
    with torch.autocast("cpu", torch.float16):
        assert torch.isfinite(encoder(ids, mask)).all()
    for block in peer.encoder.block:  # from_pretrained keeps it in float32
        block.layer[1].DenseReluDense.wo.float()
    theirs = peer(ids, attention_mask=mask).last_hidden_state
    assert relative(ours.float(), theirs.float()) < 5e-3


@pytest.mark.parametrize("buckets, distance", [(32, 128), (6, 9), (4, 2), (64, 20), (32, 1000)])
def test_buckets_of_distances_are_the_peers(buckets, distance):
    position = torch.arange(400)
    theirs = T5Attention._relative_position_bucket(
        position - position[:, None], True, buckets, distance
    )
    assert torch.equal(position_buckets(400, buckets, distance), theirs)


@torch.no_grad()
def test_masked_tokens_do_not_change_the_others():
    encoder, _ = pair(TINY)
    ids, mask = captions(99, 30)
    other = torch.where(mask == 1, ids, 5)
    seen = mask.bool()
    assert torch.equal(encoder(ids, mask)[seen], encoder(other, mask)[seen])
    alone = encoder(ids[2:3, :15], mask[2:3, :15])
    assert relative(encoder(ids, mask)[2:3, :15], alone) < 1e-12


def test_the_whole_network_learns():
    encoder, _ = pair(TINY)
    encoder.requires_grad_(True)
    ids, mask = captions(99, 30)
    encoder(ids, mask).square().sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_the_peers_configuration_is_read_and_other_kinds_of_t5_are_refused(tmp_path):
    PeerConfig(feed_forward_proj="gated-gelu", **TINY).save_pretrained(tmp_path)
    assert read_config(T5Config, FIXED, tmp_path / "config.json") == T5Config(**TINY)
    PeerConfig(feed_forward_proj="gated-silu", **TINY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="feed_forward_proj is 'gated-silu'"):
        read_config(T5Config, FIXED, tmp_path / "config.json")


def test_impossible_relative_positions_are_refused():
    for sizes in (
        dict(relative_attention_num_buckets=5),
        dict(relative_attention_num_buckets=2),
        dict(relative_attention_max_distance=8),
    ):
        with pytest.raises(ValueError, match="relative positions up to a distance"):
            T5Config(**sizes)


@pytest.mark.slow
@torch.no_grad()
def test_the_width_of_xxl_agrees_in_float32():
    sizes = dict(d_model=4096, d_ff=10240, num_heads=64, num_layers=2)
    encoder, peer = pair(sizes, torch.float32)
    ids, mask = captions(32128, 120)
    theirs = peer(ids, attention_mask=mask).last_hidden_state
    assert relative(encoder(ids, mask), theirs) < 1e-4


# -------------------- tokenizer

FRAGMENTS = [
    "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "<extra_id_>", "a<extra_id_7>b",
    " <extra_id_7> ",
    "<EXTRA_ID_0>", "<pad>", "</s>", "<unk>", "a</s>b", "<s>", "▁", "▁▁a", "a▁b", "_",
    "<p>one<br/>two</p>", "&quot;q&quot;", "&#39;", "https://a.b/c?d=e&f#g",
    "10.5281/zenodo.123", "\x00", "\x01\x02", "\x1b[31mred\x1b[0m", "\x7f", "\x85", "a\x85b",
    "\u2028", "\u200b", "\ufeff", "\t\t", "a\tb", "a\u00a0b", "a\u3000b", "  two  spaces  ", "ﬀ",
    "㍿", "½", "①", "Å", "A\u030a", "e\u0301e\u0323\u0302", "U\u0308\u0304", "क्षि", "กำ",
    "ᄒ\u1161ᆫ", "ﷺ", "𝕳", "👩‍👩‍👧‍👦", "🏳️‍🌈",
    "漢字かな交じり文", "…", "``quoted''", "—", "a" * 500, "🙂" * 200, "(((tie)))",
]
TEXTS = ["", " ", "\n", *FRAGMENTS, " ".join(FRAGMENTS), "".join(FRAGMENTS), "a photo " * 100]


def strings() -> list[str]:
    """A thousand texts: every fragment alone, random mixtures of them, and those of CLIP's test."""
    draw = random.Random(0)
    texts = [*TEXTS]
    while len(texts) < 400:
        parts = draw.choices([*FRAGMENTS, "a red car", "Über", "l'été"], k=draw.randrange(2, 9))
        text = draw.choice(["", " ", "  "]).join(parts)
        if draw.random() < 0.3:
            text = unicodedata.normalize(draw.choice(["NFC", "NFD"]), text)
        texts.append(text)
    return texts + odd_strings(600)


def train(**options) -> bytes:
    """A small `spiece.model` like T5's, trained by the sentencepiece package on odd texts."""
    texts = odd_strings(300)
    sentences = []
    for i in range(100):
        sentence = " ".join(texts[i:i + 3])
        sentences.append(sentence.replace("\x00", "").replace("\n", " "))
    defaults = dict(
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=3,
    )
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=file, **(defaults | options)
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def small() -> bytes:
    return train()


def peer_of(folder: Path, data: bytes | str) -> PeerTokenizer:
    """The peer's tokenizer, from a folder with one file: a spiece.model or a tokenizer.json."""
    folder.mkdir()
    if isinstance(data, str):
        (folder / "tokenizer.json").write_text(data)
    else:
        (folder / "spiece.model").write_bytes(data)
    return PeerTokenizer.from_pretrained(folder)


def assert_same_ids(ours: T5Tokenizer, peer: PeerTokenizer) -> None:
    texts = strings()
    assert len(texts) == 1000
    ids, mask = ours(texts)
    assert ids.dtype == mask.dtype == torch.long
    theirs = peer(
        texts, padding="max_length", max_length=120, truncation=True, return_tensors="pt"
    )
    wrong = [t for t, a, b in zip(texts, ids, theirs.input_ids) if not torch.equal(a, b)]
    assert not wrong, f"{len(wrong)} texts differ, the first {wrong[0]!r}"
    assert torch.equal(mask, theirs.attention_mask)


def test_a_thousand_odd_texts_have_the_peers_ids_from_the_real_spiece_model(shared, tmp_path):
    data = (shared / "tokenizers" / "t5" / "spiece.model").read_bytes()
    assert_same_ids(T5Tokenizer(pieces_from_spiece(data)), peer_of(tmp_path / "peer", data))


def test_a_thousand_odd_texts_have_the_peers_ids_from_the_real_tokenizer_json(
    shared, tmp_path
):
    text = (shared / "tokenizers" / "t5" / "tokenizer.json").read_text()
    assert_same_ids(T5Tokenizer(pieces_from_json(text)), peer_of(tmp_path / "peer", text))


TRAINED_WITH = [
    dict(),
    dict(user_defined_symbols=["photo", "::"]),
    dict(normalization_rule_name="identity"),
    dict(control_symbols=["<ctrl>"], normalization_rule_name="nfkc_cf"),
]


@pytest.mark.parametrize("options", TRAINED_WITH, ids=str)
def test_models_trained_by_the_test_have_the_peers_ids_too(tmp_path, options):
    data = train(**options)
    tokenizer = T5Tokenizer(pieces_from_spiece(data))
    peer = peer_of(tmp_path / "peer", data)
    assert_same_ids(tokenizer, peer)
    for symbol in options.get("user_defined_symbols", []):
        assert sentencepiece_of(data).piece_to_id(symbol) in tokenizer(f"a{symbol}b")[0]


def sentencepiece_of(data: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def differs_by_design(text: str) -> bool:
    """Whether `transformers` differs from sentencepiece here; then we follow `transformers`.

    It does for letters with several marks (normalised together), a space that the table of
    characters does not know (\\x85), sums of scores that tie, and special pieces in a text.
    """
    categories = [unicodedata.category(c)[0] for c in unicodedata.normalize("NFKD", text)]
    several_marks = "MM" in "".join(categories)
    other = ("\x85", ")))", "<extra_id_", "</s>", "<pad>", "<unk>")
    return several_marks or any(part in text for part in other)


def test_other_texts_have_the_ids_of_the_sentencepiece_package(shared):
    data = (shared / "tokenizers" / "t5" / "spiece.model").read_bytes()
    peer = sentencepiece_of(data)
    texts = [text for text in strings() if not differs_by_design(text)]
    assert len(texts) > 600
    ids, mask = T5Tokenizer(pieces_from_spiece(data))(texts)
    wrong = []
    for text, row, seen in zip(texts, ids, mask):
        if row[:seen.sum()].tolist() != [*peer.encode(text)[:119], 1]:
            wrong.append(text)
    assert not wrong, f"{len(wrong)} texts differ, the first {wrong[0]!r}"


def test_rows_end_in_the_end_and_are_padded_with_zero(small):
    tokenizer = T5Tokenizer(pieces_from_spiece(small))
    ids, mask = tokenizer("")
    assert ids[0].tolist() == [1] + [0] * 119 and mask[0].tolist() == [1] + [0] * 119
    ids, mask = tokenizer("a red circle " * 100)
    assert ids.shape == mask.shape == (1, 120)
    assert ids[0, -1] == 1 and 1 not in ids[0, :-1] and mask.all()
    longer = T5Tokenizer(pieces_from_spiece(small), length=300)("a red circle " * 100)[0]
    assert longer.shape == (1, 300) and torch.equal(longer[0, :119], ids[0, :119])


def test_a_tokenizer_saved_as_a_file_comes_back_the_same(small, tmp_path):
    tokenizer = T5Tokenizer(pieces_from_spiece(small), length=77)
    again = T5Tokenizer(pieces_from_json(tokenizer.pieces.to_str()), length=77)
    texts = strings()
    assert all(map(torch.equal, again(texts), tokenizer(texts)))
    peer = peer_of(tmp_path / "peer", tokenizer.pieces.to_str())
    assert_same_ids(T5Tokenizer(tokenizer.pieces), peer)


def test_captions_are_cleaned_as_in_the_pipeline_without_bs4_and_ftfy():
    from diffusers import PixArtAlphaPipeline

    for text in [
        "  A Photo\n",
        "ÜBER İstanbul ΟΔΟΣ",
        "<b>Bold</b> &amp; HTTP://A.B",
        "",
        "\u3000x\x85",
        "a  B",
    ]:
        theirs = PixArtAlphaPipeline._text_preprocessing(None, text, clean_caption=False)
        assert [clean(text)] == theirs


# -------------------- damaged files

def refused(read, data) -> str | None:
    """The one-line error of a reader about damaged data. None if it is read; then it must work."""
    try:
        pieces = read(data)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400, str(error)
        return str(error)
    pieces.encode("a red circle")
    pieces.encode("U\u0308\u0304 ½ ① 漢字 <extra_id_3> \x85")
    pieces.encode("".join(map(chr, range(1, 0x2000))))
    return None


def damaged(data: bytes, n: int, seed: int = 0) -> list[bytes]:
    """n copies that are cut short, or have bytes changed, left out, repeated or set to 255."""
    draw = random.Random(seed)
    copies = []
    for _ in range(n):
        anywhere = draw.randrange(len(data))
        # Near the end are the options and the head of the table of characters.
        near_the_end = draw.randrange(len(data) * 39 // 40, len(data))
        i = draw.choice([anywhere, near_the_end])
        size = draw.choice([1, 2, 5, 100])
        kind = draw.randrange(5)
        before, after = data[:i], data[i + size:]
        kinds = [
            before,
            before + draw.randbytes(size) + after,
            before + after,
            before + data[max(i - size, 0):],
            before + b"\xff" * size + after,
        ]
        copies.append(kinds[kind])
    return copies


def charsmap(data: bytes) -> tuple[int, int]:
    """Where the table of characters begins and ends in a `spiece.model`."""
    normalizer = json.loads(pieces_from_spiece(data).to_str())["normalizer"]
    table = base64.b64decode(normalizer["precompiled_charsmap"])
    start = data.index(table)
    return start, start + len(table)


def test_damaged_spiece_models_are_refused_in_one_sentence_or_work(small):
    start, end = charsmap(small)
    files = damaged(small, 150)
    for table in damaged(small[start:end], 30):
        files.append(small[:start] + table + small[end:])
    for head in damaged(small[start:start + 200], 120):
        files.append(small[:start] + head + small[start + len(head):])
    messages = [refused(pieces_from_spiece, file) for file in files]
    errors = [message for message in messages if message]
    assert 100 < len(errors) < len(messages)
    assert all(error.startswith("this is not a spiece.model of T5") for error in errors)


def test_damaged_tokenizer_json_is_refused_in_one_sentence_or_works(small):
    good = pieces_from_spiece(small).to_str()
    for text in [
        good[:1000],
        "",
        "[]",
        "null",
        "[" * 100000,
        "{}",
        '{"model": 1}',
        good.replace("Unigram", "BPE"),
    ]:
        message = refused(pieces_from_json, text)
        assert message.startswith("this is not a tokenizer.json of T5")

    file = json.loads(good)
    model = file["model"]
    table = file["normalizer"]["precompiled_charsmap"]
    for place, name, values in [
        (model, "unk_id", [70000, -1, None, "2", 1.5]),
        (model, "vocab", [{}, [], 3, [["a"]], [["", 0.0]], [["a", "b"]]]),
        (model["vocab"], 9, [["x", float("nan")], ["x", None], 5, [None], ["x", 10**400]]),
        (
            file["added_tokens"],
            1,
            [{"content": "</s>", "id": 7}, {"content": "new", "id": 1}, {}, 5],
        ),
        (
            file["normalizer"],
            "precompiled_charsmap",
            [table[:1000], "!" + table[1:], "AAAA", 5, table[:-5] + "é"],
        ),
    ]:
        before = place[name]
        for value in values:
            place[name] = value
            assert refused(pieces_from_json, json.dumps(file)), (name, value)
        place[name] = before
    assert refused(pieces_from_json, json.dumps(file)) is None
    for damage in damaged(base64.b64decode(table), 40):
        file["normalizer"]["precompiled_charsmap"] = base64.b64encode(damage).decode()
        refused(pieces_from_json, json.dumps(file))


def field(number: int, data: bytes | int) -> bytes:
    """One protobuf field, whose value is a number below 128 or bytes."""
    if isinstance(data, int):
        return bytes([*varint(number << 3), data])
    return bytes([*varint(number << 3 | 2), *varint(len(data))]) + data


def varint(value: int) -> list[int]:
    return [value] if value < 128 else [value & 127 | 128, *varint(value >> 7)]


def test_errors_about_a_spiece_model_name_what_is_wrong(small):
    start, end = charsmap(small)
    n = len(list(read_message(small, {1: ("piece", bytes)})))
    trie = int.from_bytes(small[start:start + 4], "little")
    table = bytearray(small[start:end])
    table[4:8] = (0x3FFFFF << 10).to_bytes(4, "little")
    away = bytearray(small[start:end])
    away[4:8] = b"\xff\xff\xff\xff"
    cut_in_a_character = small[start:start + 4 + trie] + b"ab\0"
    for data, text in {
        b"": "have the types",
        b"\x0b": "unknown type 3",
        b"\x0a\xff\xff\xff\xff\x0f": "a field of 4294967295 bytes begins 0 bytes before the end",
        b"\x80": "ends in the middle of a number",
        b"\x80" * 20: "no number ends within ten bytes of byte 0",
        b"\x0d1234": "its piece has the type 5",
        small + field(1, b""): f"piece {n} has 0 characters",
        small + field(1, field(1, b"\xff")): "utf-8",
        small + field(1, field(1, b"x" * 2000)): f"piece {n} has 2000 characters",
        small + field(1, field(1, b"x") + b"\x15\x00\x00\xc0\x7f"): "the score nan",
        small + field(1, field(1, b"x") + field(3, 6)): "the types [1, 2, 3, 6]",
        small + field(1, field(1, b"x") + field(3, 2)): "unknown (2) 2 times",
        small + field(2, field(3, 2)): "its model_type is 2",
        small + field(2, field(35, 1)): "its byte_fallback is 1",
        small + field(3, field(3, 0)): "its add_dummy_prefix is 0",
        small + field(3, field(4, 0)): "its remove_extra_whitespaces is 0",
        small + field(3, field(2, b"abc")): "the table of characters has 3 bytes",
        small + field(3, field(2, small[start:start + 4 + trie])): f"and a trie of {trie}",
        small + field(3, field(2, bytes(table))): "points outside its trie",
        small + field(3, field(2, bytes(away))): "points outside its trie",
        small + field(3, field(2, cut_in_a_character)): "points outside its texts",
    }.items():
        assert text in str(refused(pieces_from_spiece, data)), text


def test_other_kinds_of_sentencepiece_models_are_refused_by_name():
    for options, name in [
        (dict(model_type="bpe"), "model_type is 2"),
        (dict(byte_fallback=True), "byte_fallback is 1"),
        (dict(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix is 1"),
        (dict(remove_extra_whitespaces=False), "remove_extra_whitespaces is 0"),
    ]:
        with pytest.raises(ValueError, match=name):
            pieces_from_spiece(train(vocab_size=600, **options))


def test_a_tokenizer_without_end_or_padding_is_refused_by_name(small):
    for name, other in [(b"<pad>", b"<mad>"), (b"</s>", b"</x>")]:
        with pytest.raises(ValueError, match=f"no piece {name.decode()}"):
            T5Tokenizer(pieces_from_spiece(small.replace(name, other)))


def test_protobuf_numbers_are_read_to_their_end():
    for value in (0, 1, 127, 128, 300, 2**32, 2**64 - 1):
        data = bytes(varint(value))
        assert read_varint(b"x" + data + b"y", 1) == (value, 1 + len(data))
