"""files/tokenizers.py reads tokenizers as `transformers` does, from every layout in use."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import relative
from pipelines import TEXTS, TOKENIZER, refusal, tiny_pipeline, tokenizer_folder
from transformers import CLIPTokenizer, T5Tokenizer

from files.bases import load_base, save_folder
from files.tokenizers import (
    load_t5_tokenizer,
    load_tokenizer,
    tokenizer_from_json,
    tokenizer_to_json,
)

pytestmark = pytest.mark.usefixtures("one_thread")

END = "<|endoftext|>"
START = "<|startoftext|>"
NEW = {"added_tokens_decoder": {}}  # makes a configuration one of the newer kind
AS_TOKEN = dict(content="!", lstrip=False, normalized=False, rstrip=False, single_word=False)


def assert_same_ids(ours, peer: CLIPTokenizer, pad: str) -> None:
    theirs = peer(
        TEXTS,
        padding="max_length",
        max_length=77,
        truncation=True,
        return_tensors="pt",
    )
    assert torch.equal(ours(TEXTS), theirs.input_ids)
    assert ours(TEXTS)[0, -1] == peer.get_vocab()[pad]


@pytest.mark.parametrize(
    "config, tokens, pad",
    [
        ({}, {}, END),
        (dict(pad_token="!"), None, "!"),
        ({}, dict(pad_token="!"), "!"),
        ({}, dict(pad_token=AS_TOKEN), "!"),
        (dict(pad_token=END), dict(pad_token="!"), "!"),  # the files of SD 2.1
        (dict(pad_token="!"), dict(pad_token=END), END),
        (dict(pad_token="!", **NEW), dict(pad_token=END), "!"),  # those of SD-Turbo
        (dict(model_max_length=10**30), None, END),
        (dict(model_max_length=None), None, END),
        (dict(pad_token=None), dict(pad_token=END), END),
    ],
    ids=str,
)
def test_padding_is_read_from_the_files_that_transformers_reads_it_from(
    tmp_path, config, tokens, pad,
):
    peer = CLIPTokenizer.from_pretrained(tokenizer_folder(tmp_path, config, tokens))
    assert_same_ids(load_tokenizer(str(tmp_path)), peer, pad)


def test_a_tokenizer_without_configuration_is_clips(tmp_path):
    tokenizer_folder(tmp_path, None, None)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.length == 77
    assert tokenizer.tokens == dict(pad=END, start=START, end=END)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_byte_order_mark_is_harmless(tmp_path, name):
    folder = tokenizer_folder(tmp_path, dict(pad_token="!"), None)
    expected = load_tokenizer(str(tmp_path))(TEXTS)
    path = folder / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert torch.equal(load_tokenizer(str(tmp_path))(TEXTS), expected)


@pytest.mark.parametrize("merges", [str, list])
def test_tokenizer_json_alone_is_read_with_merges_in_both_notations(tmp_path, merges):
    peer = CLIPTokenizer.from_pretrained(tokenizer_folder(tmp_path, dict(pad_token="!"), None))
    shutil.rmtree(tmp_path / "tokenizer")
    peer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    assert not (tmp_path / "tokenizer" / "vocab.json").exists()

    whole = json.loads(path.read_text())
    if merges is str:
        whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
    path.write_text(json.dumps(whole))
    assert_same_ids(load_tokenizer(str(tmp_path)), peer, "!")


# -------------------- added tokens

CAT = "<cat-toy>"
NEXT = 979  # the first number behind the vocabulary
# Texts in which flags decide: case, spaces around a token, and letters beside it.
WITH_TOKENS = [
    *TEXTS,
    "a <cat-toy> on grass",
    "a<cat-toy>b",
    "A <CAT-TOY>.",
    "<cat-toy><cat-toy>",
    "   <cat-toy>   x",
    "sksthing sks sks's SKS sks_1",
    "e\u0301clair éclair ÉCLAIR éclairs",
    "a <|endoftext|> b <|EndOfText|> c <|STARTOFTEXT|>",
    "!a! wow! !!!",
    "hello <s> <unk> <pad> <mask>",
    " <extra_id_0> x<extra_id_1>y",
]


def token(content: str, **flags) -> dict:
    """A token as a configuration describes it."""
    plain = dict(lstrip=False, normalized=True, rstrip=False, single_word=False, special=False)
    return dict(content=content) | plain | flags


def decoder(**flags) -> dict:
    """The tokenizer_config.json of a tokenizer to which three tokens were added."""
    tokens = {
        NEXT - 2: token(START, normalized=False, special=True),
        NEXT - 1: token(END, normalized=False, special=True),
        NEXT: token(CAT, **flags),
        NEXT + 1: token("sks", **flags),
        NEXT + 2: token("éclair", **flags),
    }
    return dict(
        added_tokens_decoder={str(number): value for number, value in tokens.items()},
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token="!",
    )


OLDER_TOKENS = dict(
    bos_token=token(START),
    eos_token=token(END),
    unk_token=token(END),
    pad_token=END,
)
# The files beside the vocabulary, without their endings.
ADDED = {
    "added_tokens.json alone": dict(added_tokens={CAT: NEXT}),
    "in another order": dict(
        added_tokens={"sks": NEXT + 1, CAT: NEXT},
        special_tokens_map=OLDER_TOKENS,
    ),
    "as SD 1.5 names its own": dict(
        special_tokens_map=OLDER_TOKENS,
        tokenizer_config={key: token(END, __type="AddedToken") for key in ("eos_token",)},
    ),
    "as SD-Turbo names its own": dict(
        tokenizer_config=dict(
            added_tokens_decoder={
                "0": token("!", normalized=False, special=True),
                str(NEXT - 2): token(START, special=True),
                str(NEXT - 1): token(END, normalized=False, special=True),
            },
            pad_token="!",
        ),
    ),
    "special": dict(
        added_tokens={CAT: NEXT},
        special_tokens_map=OLDER_TOKENS | dict(additional_special_tokens=[CAT]),
    ),
    "special alone": dict(special_tokens_map=dict(additional_special_tokens=[CAT, "sks"])),
    "extra in the configuration": dict(tokenizer_config=dict(extra_special_tokens=[CAT])),
    "extra by their purposes": dict(
        tokenizer_config=dict(extra_special_tokens=dict(cat_token=CAT, dog_token="sks")),
    ),
    "plain": dict(tokenizer_config=decoder()),
    "lstrip": dict(tokenizer_config=decoder(lstrip=True)),
    "rstrip": dict(tokenizer_config=decoder(rstrip=True)),
    "single_word": dict(tokenizer_config=decoder(single_word=True)),
    "not normalized": dict(tokenizer_config=decoder(normalized=False)),
    "special and not normalized": dict(tokenizer_config=decoder(special=True, normalized=False)),
    "several flags": dict(
        tokenizer_config=decoder(lstrip=True, rstrip=True, single_word=True, normalized=False),
    ),
    "pieces of the vocabulary": dict(
        tokenizer_config=dict(
            added_tokens_decoder={"0": token("!", special=True), "65": token("b")},
        ),
    ),
}


def write_tokenizer(base: Path, files: dict[str, dict]) -> Path:
    """A new tokenizer/ in `base` with the tiny base's vocabulary and these files."""
    config = files.get("tokenizer_config")
    folder = tokenizer_folder(base, config, files.get("special_tokens_map"))
    if "added_tokens" in files:
        (folder / "added_tokens.json").write_text(json.dumps(files["added_tokens"]))
    return folder


def assert_ids_of_added_tokens(base: Path, peer: CLIPTokenizer) -> None:
    theirs = peer(WITH_TOKENS, padding="max_length", max_length=77, truncation=True).input_ids
    ours = load_tokenizer(str(base))(WITH_TOKENS).tolist()
    for text, our_ids, their_ids in zip(WITH_TOKENS, ours, theirs, strict=True):
        assert our_ids == their_ids, text


@pytest.mark.parametrize("files", ADDED.values(), ids=ADDED.keys())
def test_added_tokens_have_the_ids_of_the_peer(tmp_path, files):
    peer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path, files))
    assert_ids_of_added_tokens(tmp_path, peer)
    # The peer writes a tokenizer.json that names all added tokens.
    peer.save_pretrained(tmp_path / "again" / "tokenizer")
    assert not (tmp_path / "again" / "tokenizer" / "vocab.json").exists()
    assert_ids_of_added_tokens(tmp_path / "again", peer)


def test_added_tokens_of_a_tokenizer_json_beside_the_vocabulary_are_read(tmp_path):
    peer = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path, dict(added_tokens={CAT: NEXT})))
    peer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "added_tokens.json").unlink()
    assert (tmp_path / "tokenizer" / "vocab.json").exists()
    assert_ids_of_added_tokens(tmp_path, peer)


@pytest.mark.parametrize("files", [ADDED["several flags"], ADDED["special"]], ids=["new", "old"])
def test_added_tokens_come_through_a_checkpoint_and_a_written_folder(tmp_path, files):
    folder = tmp_path / "base"
    tiny_pipeline().save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    peer = CLIPTokenizer.from_pretrained(write_tokenizer(folder, files))
    tokenizer = load_tokenizer(str(folder))
    expected = tokenizer(WITH_TOKENS)
    assert torch.equal(tokenizer_from_json(tokenizer_to_json(tokenizer))(WITH_TOKENS), expected)

    base = load_base(str(folder), ("vae",))
    base.tokenizer = tokenizer
    save_folder(tmp_path / "written", base)
    assert torch.equal(load_tokenizer(str(tmp_path / "written"))(WITH_TOKENS), expected)
    again = CLIPTokenizer.from_pretrained(tmp_path / "written" / "tokenizer")
    length = tokenizer.length
    for one in (peer, again):
        rows = one(WITH_TOKENS, padding="max_length", max_length=length, truncation=True)
        assert rows.input_ids == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("spare_rows", [0, 5])
def test_a_textual_inversion_saved_in_a_pipeline_means_the_same(tmp_path, spare_rows):
    """Equal hidden states of equal ids, also where the table has rows that no token has."""
    pipe = tiny_pipeline()
    pipe.tokenizer.add_tokens([CAT, f"{CAT}_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer) + spare_rows)
    table = pipe.text_encoder.get_input_embeddings().weight
    table[NEXT:] = torch.randn(table[NEXT:].shape, generator=torch.Generator().manual_seed(0))
    pipe.save_pretrained(tmp_path)
    # Older versions of the peer wrote the token here alone.
    shutil.rmtree(tmp_path / "tokenizer")
    own = pipe.tokenizer
    config = dict(pad_token=own.pad_token, model_max_length=own.model_max_length)
    added = {CAT: NEXT, f"{CAT}_1": NEXT + 1}
    write_tokenizer(tmp_path, dict(added_tokens=added, tokenizer_config=config))

    pipe.to(torch.float64)
    base = load_base(str(tmp_path), dtype=torch.float64)
    assert base.text_encoder.config.vocab_size == NEXT + 2 + spare_rows
    for text in ("a <cat-toy> on grass", "<cat-toy>", "a red circle"):
        theirs, _ = pipe.encode_prompt(text, "cpu", 1, False)
        (ours,) = base.encode([text])
        assert relative(ours, theirs) < 1e-9, text
    ids = base.tokenizer(["a <cat-toy> on"])[0]
    assert ids[2:4].tolist() == [NEXT, NEXT + 1]


@pytest.mark.parametrize(
    "files, says",
    [
        (dict(added_tokens={CAT: NEXT + 1}), ["'<cat-toy>' has the number 980", "979 after"]),
        (dict(added_tokens={CAT: NEXT, "sks": NEXT + 5}), ["'sks' has the number 984", "980"]),
        (dict(added_tokens={START: 3}), ["has the number 3", "977"]),
        (dict(added_tokens={CAT: "many"}), ["added_tokens.json", "'many'"]),
        (dict(added_tokens={CAT: None}), ["added_tokens.json", "{token: number}"]),
        (dict(added_tokens={"": NEXT}), ["the added token ''"]),
        (dict(added_tokens={"x" * 2000: NEXT}), ["the added token 'xxx"]),
        (dict(tokenizer_config=dict(added_tokens_decoder=["<cat>"])), ["list", "BPE"]),
        (dict(tokenizer_config=dict(added_tokens_decoder={"979": "<cat>"})), ["BPE"]),
        (dict(tokenizer_config=dict(added_tokens_decoder={"979": {}})), ["content"]),
        (dict(special_tokens_map=dict(additional_special_tokens=[3])), ["added token 3"]),
    ],
    ids=str,
)
def test_damaged_lists_of_added_tokens_are_refused_in_one_line(tmp_path, files, says):
    write_tokenizer(tmp_path, files)
    message = refusal(lambda: load_tokenizer(str(tmp_path)))
    assert all(words in message for words in says), message


# -------------------- T5

GAPS = {f"<extra_id_{i}>": 32099 - i for i in range(100)}


def t5_decoder(added: dict[str, dict]) -> dict:
    """The tokenizer_config.json of PixArt's tokenizer, with tokens behind its vocabulary."""
    tokens = {}
    for number, name in enumerate(["<pad>", "</s>", "<unk>"]):
        tokens[number] = token(name, normalized=False, special=True)
    for name, number in GAPS.items():
        gap = token(name, normalized=False, special=True, lstrip=True, rstrip=True)
        tokens[number] = gap
    for number, value in enumerate(added.values(), start=32100):
        tokens[number] = value
    listed = {str(number): value for number, value in tokens.items()}
    return dict(added_tokens_decoder=listed, additional_special_tokens=list(GAPS))


T5_ADDED = {
    "none": (["spiece.model"], {}),
    "PixArt's": (["spiece.model"], dict(tokenizer_config=t5_decoder({}))),
    "PixArt's, older": (
        ["spiece.model"],
        dict(added_tokens=GAPS, special_tokens_map=dict(additional_special_tokens=list(GAPS))),
    ),
    "more": (
        ["spiece.model"],
        dict(
            tokenizer_config=t5_decoder(
                {CAT: token(CAT), "sks": token("sks", single_word=True, lstrip=True)}
            )
        ),
    ),
    "more, older": (["spiece.model"], dict(added_tokens=GAPS | {CAT: 32100})),
    "more, beside tokenizer.json": (
        ["tokenizer.json"],
        dict(tokenizer_config=t5_decoder({CAT: token(CAT, normalized=False)})),
    ),
}


@pytest.mark.parametrize("vocabulary, files", T5_ADDED.values(), ids=T5_ADDED.keys())
def test_added_tokens_of_t5_have_the_ids_of_the_peer(shared, tmp_path, vocabulary, files):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in vocabulary:
        shutil.copy(shared / "tokenizers" / "t5" / name, folder)
    for name, value in files.items():
        if name == "tokenizer_config":
            value = value | dict(tokenizer_class="T5Tokenizer", model_max_length=512)
        (folder / f"{name}.json").write_text(json.dumps(value))

    peer = T5Tokenizer.from_pretrained(folder)
    theirs = peer(WITH_TOKENS, padding="max_length", max_length=120, truncation=True)
    ids, mask = load_t5_tokenizer(str(tmp_path))(WITH_TOKENS)
    assert ids.tolist() == theirs.input_ids
    assert mask.tolist() == theirs.attention_mask


def test_the_vocabulary_of_the_tests_ends_where_they_say():
    assert len(json.loads((TOKENIZER / "vocab.json").read_text())) == NEXT
