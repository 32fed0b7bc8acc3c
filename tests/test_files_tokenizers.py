"""files/tokenizers.py reads CLIP's tokenizer as `transformers` does, from every layout in use."""

import json
import shutil

import pytest
import torch
from pipelines import TEXTS, tokenizer_folder
from transformers import CLIPTokenizer

from files.tokenizers import load_tokenizer

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
