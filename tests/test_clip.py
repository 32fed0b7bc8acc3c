"""CLIP's text encoder and tokenizer agree with `transformers`' CLIPTextModel and CLIPTokenizer."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import parameters, randomise, relative
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from files.hub import ROOT
from files.tokenizers import load_tokenizer, tokenizer_from_json, tokenizer_to_json
from models.clip import TextConfig, TextEncoder, Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=56,
    num_attention_heads=4,
    max_position_embeddings=77,
)
VIT_L = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    hidden_act="quick_gelu",
)
VIT_H = dict(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
FULL = {"CLIP ViT-L of SD 1.5": VIT_L, "OpenCLIP ViT-H of SD-Turbo": VIT_H}


# -------------------- text encoder

def peer_encoder(sizes: dict, eos: int) -> CLIPTextModel:
    config = CLIPTextConfig(**sizes, eos_token_id=eos, bos_token_id=0, pad_token_id=1)
    return CLIPTextModel(config).eval()


def ours_like(peer: CLIPTextModel, sizes: dict, eos: int) -> TextEncoder:
    """Our network with the peer's tensors.

    The files, and older versions of the peer, have the prefix `text_model.`; transformers 5 leaves
    it out.
    """
    with torch.device("meta"):
        encoder = TextEncoder(TextConfig(**sizes, eos_token_id=eos))
    tensors = {}
    for name, tensor in peer.state_dict().items():
        tensors["text_model." + name.removeprefix("text_model.")] = tensor
    encoder.load_state_dict(tensors, strict=True, assign=True)
    return encoder


def prompts(vocab: int, eos: int) -> torch.Tensor:
    """Ids of 0, 1, 20 and 75 pieces and the end token, padded with the end and with another id."""
    rows = []
    for pad in (eos, 0):
        for i, n in enumerate((0, 1, 20, 75)):
            pieces = torch.randint(
                3, vocab - 2, (n,), generator=torch.Generator().manual_seed(i)
            )
            start = torch.tensor([vocab - 2])
            rest = torch.tensor([eos] + [pad] * (75 - n))
            rows.append(torch.cat([start, pieces, rest]))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_context_is_the_peers(act, layers, eps):
    sizes = dict(TINY, hidden_act=act, num_hidden_layers=layers, layer_norm_eps=eps)
    peer = randomise(peer_encoder(sizes, 98).double())
    encoder = ours_like(peer, sizes, 98)
    ids = prompts(99, 98)
    assert relative(encoder(ids), peer(ids).last_hidden_state) < 1e-9
    short = ids[:, :9]  # fewer positions than the encoder has
    assert relative(encoder(short), peer(short).last_hidden_state) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("eos", [2, 98, 50])
def test_pooled_is_the_context_at_the_first_end_of_text(eos):
    """eos_token_id 2 in a configuration means the highest id; any other value means itself."""
    sizes = dict(TINY, hidden_act="gelu", num_hidden_layers=2)
    peer = randomise(peer_encoder(sizes, eos).double())
    encoder = ours_like(peer, sizes, eos)
    ids = prompts(99, 98 if eos == 2 else eos)
    assert relative(encoder.pooled(ids), peer(ids).pooler_output) < 1e-9
    if eos != 50:
        ends = torch.tensor([1, 2, 21, 76, 1, 2, 21, 76])
        assert relative(encoder.pooled(ids), encoder(ids)[torch.arange(8), ends]) < 1e-9


@torch.no_grad()
def test_later_words_do_not_change_earlier_ones():
    sizes = dict(TINY, hidden_act="gelu", num_hidden_layers=2)
    encoder = ours_like(randomise(peer_encoder(sizes, 98).double()), sizes, 98)
    ids = prompts(99, 98)[3:4]
    other = ids.clone()
    other[:, 40:] = 5
    a = encoder(ids)
    b = encoder(other)
    assert relative(a[:, :40], b[:, :40]) < 1e-12
    assert relative(a[:, 40:], b[:, 40:]) > 1e-3


def test_unknown_activations_are_refused_by_name():
    with pytest.raises(ValueError, match="'relu'.*gelu.*quick_gelu"):
        TextConfig(hidden_act="relu")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("sizes", FULL.values(), ids=FULL.keys())
def test_full_size_text_encoder_agrees_in_float32(sizes):
    peer = randomise(peer_encoder(sizes, 2))
    encoder = ours_like(peer, sizes, 2)
    ids = prompts(49408, 49407)
    if sizes is VIT_H:
        assert round(parameters(encoder) / 1e6, 1) == 340.4
    theirs = peer(ids)
    assert relative(encoder(ids), theirs.last_hidden_state) < 1e-4
    assert relative(encoder.pooled(ids), theirs.pooler_output) < 1e-4


# -------------------- tokenizer

FRAGMENTS = [
    "a photo of a cat", "Violet Circle", "with ORANGE background", "driving in the night",
    "isn't", "it's", "we've", "I'LL", "he'd", "they're", "I'm", "'s 't 're", "' s", "’s",
    "rock'n'roll", "don''t", "!", "!!!", "wow!", "a!b", "! !", "?!?!", "...", "…", "--", "—",
    "/\\", "#tag", "@user", "$3.50", "50%", "1", "12", "1234567890", "3.14", "2nd", "x2", "½",
    "²", "Ⅳ", "٣", "１２", "①", "<b>bold</b>", "&amp; &lt;", "<br/>", "<a href='x'>y</a>",
    "<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "<|endoftext|", "a<|endoftext|>b",
    "<|endoftext|><|endoftext|>", "</w>", "a</w>", "é", "e\u0301", "ñandú", "n\u0303", "Å",
    "A\u030a", "ｆｕｌｌ", "ﬁ", "ß", "ẞ", "İstanbul", "ǅ", "Σίσυφος", "ΟΔΟΣ", "Привет", "ЁЛКА",
    "猫の写真", "日本語",
    "한국어", "한국", "中文字符", "ไทย", "हिन्दी", "العربية", "עברית", "ⵣ",
    "𝔘𝔫𝔦", "🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷", "❤️", "\u200d", "\u200b",
    "\ufeff", "\u00ad", "\x00", "\x01", "\x1b[0m", "\x7f",
    "\x85", "\u2028", "\ud7ff", "\ue000", "\ufffd", "\U0010ffff",
    "\t", "\n", "\r\n", "\u00a0", "\u3000", "   ", "_", "__init__", "snake_case", "C++", "e.g.",
    "http://example.com/?q=1&r=2", "mail@example.com", "(((masterpiece:1.3)))", "[a|b]", "{}", "~",
    "`code`", "supercalifragilisticexpialidocious", "a" * 32, "zzzzqqqqxxxx", "ＡＢＣ", "\u0300",
    "\u1160",
]


def odd_strings(n: int = 1000) -> list[str]:
    """Texts that are hard to tokenize.

    Every fragment alone, long and empty texts, then random mixtures of fragments and letters of
    all Unicode planes, in several normal forms.
    """
    texts = ["", " ", "\n", "\t \n", "!", "!" * 100, "a " * 100, "a" * 300, "🙂" * 40, "1" * 90]
    texts += [" padded ", *FRAGMENTS, " ".join(FRAGMENTS), "".join(FRAGMENTS)]
    draw = random.Random(0)
    while len(texts) < n:
        parts = draw.choices(FRAGMENTS, k=draw.choice([1, 2, 3, 5, 8, 30]))
        if draw.random() < 0.5:
            letters = [random_letter(draw) for _ in range(draw.randrange(1, 12))]
            parts.insert(draw.randrange(len(parts) + 1), "".join(letters))
        text = draw.choice(["", " ", " ", "  ", ", "]).join(parts)
        case = draw.choice([str, str, str.upper, str.title])
        form = draw.choice(["", "", "NFC", "NFD", "NFKD"])
        text = case(text)
        if form:
            text = unicodedata.normalize(form, text)
        texts.append(text)
    return texts


def random_letter(draw: random.Random) -> str:
    """A character of ASCII, of the Latin alphabets, or of any plane but the surrogates."""
    codes = [
        draw.randrange(0x20, 0x7F),
        draw.randrange(0x250),
        draw.randrange(0xD800),
        draw.randrange(0xE000, 0x110000),
    ]
    return chr(draw.choice(codes))


def clip_folder(vocabulary: Path, base: Path, pad: str) -> Path:
    """Writes a base's tokenizer as it is published: SD 1.x pads with <|endoftext|>, 2.x with !."""
    folder = base / "tokenizer"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(vocabulary / name, folder)
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=77)
    tokens = dict(
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token=pad,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    return folder


def ids_of(peer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return peer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def assert_same_ids(ours: Tokenizer, peer: CLIPTokenizer, length: int = 77) -> None:
    texts = odd_strings()
    assert len(texts) == 1000
    mine = ours(texts)
    theirs = ids_of(peer, texts)
    assert mine.shape == (1000, length) and mine.dtype == torch.long
    wrong = [text for text, a, b in zip(texts, mine, theirs) if not torch.equal(a, b)]
    assert not wrong, f"{len(wrong)} texts differ, the first {wrong[0]!r}"


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_a_thousand_odd_texts_have_the_peers_ids(shared, tmp_path, pad):
    folder = clip_folder(shared / "tokenizers" / "clip", tmp_path, pad)
    assert_same_ids(load_tokenizer(str(tmp_path)), CLIPTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_a_tokenizer_json_written_by_the_peer_gives_the_same_ids(shared, tmp_path, pad):
    (tmp_path / "files").mkdir()
    folder = clip_folder(shared / "tokenizers" / "clip", tmp_path / "files", pad)
    peer = CLIPTokenizer.from_pretrained(folder)
    peer.save_pretrained(tmp_path / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer" / name).unlink(missing_ok=True)
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert_same_ids(load_tokenizer(str(tmp_path)), peer)


def test_the_tiny_bases_tokenizer_is_the_peers_on_the_same_files():
    tokenizer = load_tokenizer("tiny")
    peer = CLIPTokenizer.from_pretrained(ROOT / "tiny" / "tiny" / "tokenizer")
    assert_same_ids(tokenizer, peer, tokenizer.length)


def test_a_tokenizer_saved_in_a_checkpoint_comes_back_the_same():
    tokenizer = load_tokenizer("tiny")
    again = tokenizer_from_json(tokenizer_to_json(tokenizer))
    assert torch.equal(again(odd_strings()), tokenizer(odd_strings()))
    assert [again.length, again.pad, again.end] == [tokenizer.length, tokenizer.pad, tokenizer.end]


def test_one_text_is_one_row_and_long_texts_keep_their_end():
    tokenizer = Tokenizer(load_tokenizer("tiny").pieces)
    row = tokenizer("a red circle " * 50)
    assert row.shape == (1, 77)
    assert row[0, 0] == tokenizer.start and row[0, -1] == tokenizer.end
    assert tokenizer.end not in row[0, :-1]
    assert tokenizer("")[0].tolist() == [tokenizer.start] + [tokenizer.end] * 76


def test_the_ends_of_long_texts_are_what_the_ids_leave_out():
    tokenizer = load_tokenizer("tiny")
    words = [f"a red circle{mark}" for mark in ("", "!", "?!", " é", "🙂")] * 10
    ids = tokenizer.encode(["", " ".join(words)])
    assert ids[0] == []
    assert len(ids[1]) > tokenizer.limit == tokenizer.length - 2
    row = tokenizer(" ".join(words))[0, 1:-1].tolist()
    assert row == ids[1][:tokenizer.limit]

    for n in range(1, len(words)):
        text = " ".join(words[:n])
        end = tokenizer.cut_off(text)
        fits = len(tokenizer.encode([text])[0]) <= tokenizer.limit
        assert (end is None) == fits
        if end is not None:
            assert text.endswith(end)
            kept = text.removesuffix(end)
            (kept_ids,) = tokenizer.encode([kept])
            assert len(kept_ids) <= tokenizer.limit
            # Without its end the text means the same, unless a word was cut in two.
            if kept.endswith(" "):
                assert torch.equal(tokenizer(kept), tokenizer(text))


def test_a_token_of_several_vectors_brings_all_their_ids():
    tokenizer = load_tokenizer("tiny")
    assert tokenizer.add_token("<cat>", 3) == [979, 980, 981]
    assert tokenizer.add_token("<dog>", 1) == [982]
    a, b = tokenizer.encode(["a b"])[0]
    assert tokenizer.encode(["a <cat> b", "<dog>", "a<CAT>b"]) == [
        [a, 979, 980, 981, b],
        [982],
        [a, 979, 980, 981, b],
    ]
    for token, vectors in [("<cat>", 1), ("<cat>_2", 1), ("<dog>", 5), ("red</w>", 1)]:
        with pytest.raises(ValueError, match="already"):
            tokenizer.add_token(token, vectors)


def test_rows_of_the_table_are_replaced_or_added():
    sizes = dict(TINY, hidden_act="gelu", num_hidden_layers=1)
    encoder = ours_like(randomise(peer_encoder(sizes, 98).double()), sizes, 98)
    before = encoder.text_model.embeddings.token_embedding.weight.clone()
    vectors = torch.arange(64.0).reshape(2, 32)
    encoder.set_embeddings([3, 100], vectors)
    after = encoder.text_model.embeddings.token_embedding.weight
    assert after.shape == (101, 32) and after.dtype == torch.float64
    assert encoder.config.vocab_size == 101
    assert torch.equal(after[[3, 100]], vectors.double())
    others = [row for row in range(99) if row != 3]
    assert torch.equal(after[others], before[others])


def test_a_padding_outside_the_vocabulary_is_refused_by_name():
    pieces = load_tokenizer("tiny").pieces
    with pytest.raises(ValueError, match="no piece '<pad>'"):
        Tokenizer(pieces, pad="<pad>")
