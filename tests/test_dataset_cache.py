"""dataset/cache.py: latents and text contexts that are computed once."""

from pathlib import Path

import pytest
import torch
from pictures_helpers import cache_settings, noise, refused

import files.tensors
from dataset.cache import Cached, estimate_prior, write_cache
from dataset.folders import Captioned, open_captioned
from files.bases import load_base
from files.tensors import save_tensors


def make_pictures(folder: Path, count: int) -> None:
    for i in range(count):
        noise(12, 12, i).save(folder / f"{i:02d}.png")


def settings(folder: Path, output: str = "cache", **changes) -> dict:
    """Arguments of `write_cache` for the pictures in `folder`."""
    return cache_settings(folder, folder / output) | changes


def test_a_cache_with_a_text_encoder_in_bfloat16_has_the_same_latents(tmp_path):
    make_pictures(tmp_path, 10)
    caches = []
    for dtype in ("float32", "bfloat16"):
        write_cache(**settings(tmp_path, output=dtype, dtype=dtype))
        caches.append(Cached(tmp_path / dtype, "train"))

    # The trainer compares the fingerprint of the VAE.
    assert caches[0].facts["vae"] == caches[1].facts["vae"]
    a = caches[0][3]
    b = caches[1][3]
    assert torch.equal(a["mean"], b["mean"])
    assert torch.equal(a["std"], b["std"])
    difference = (a["context_0"] - b["context_0"]).abs().max()
    assert difference < 0.1 < a["context_0"].abs().max()


def test_a_stopped_cache_continues_with_the_shards_that_are_whole(tmp_path, monkeypatch):
    make_pictures(tmp_path, 20)
    arguments = settings(tmp_path, shard_items=5)

    def stop_inside_a_file(path, *_, **__):
        path.write_bytes(b"half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(files.tensors, "save_tensors", stop_inside_a_file)
    with pytest.raises(KeyboardInterrupt):
        write_cache(**arguments)
    monkeypatch.setattr(files.tensors, "save_tensors", save_tensors)

    read = []
    read_item = Captioned.__getitem__

    def stop_at_the_twelfth(self, index):
        read.append(index)
        if len(read) == 12:
            raise KeyboardInterrupt
        return read_item(self, index)

    monkeypatch.setattr(Captioned, "__getitem__", stop_at_the_twelfth)
    with pytest.raises(KeyboardInterrupt):
        write_cache(**arguments)
    refused(open_captioned, tmp_path / "cache", "train", "", match="10 of 18")

    # Two shards of five were whole and are not encoded again.
    write_cache(**arguments)
    assert len(read) == 12 + 8 + 2
    cached = open_captioned(tmp_path / "cache", "train", "")
    assert len(cached) == 18
    assert cached[7]["name"] == "07.png"
    assert cached[17]["name"] == "18.png"


def test_a_damaged_shard_is_noticed_and_replaced(tmp_path):
    make_pictures(tmp_path, 20)
    arguments = settings(tmp_path, shard_items=5)
    write_cache(**arguments)
    whole = open_captioned(tmp_path / "cache", "train", "")[7]

    shard = tmp_path / "cache" / "train-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    damaged = open_captioned(tmp_path / "cache", "train", "")
    refused(lambda: damaged[7], match="train-00001.safetensors")

    write_cache(**arguments)
    mended = open_captioned(tmp_path / "cache", "train", "")
    assert torch.equal(mended[7]["mean"], whole["mean"])


def test_pictures_that_the_vae_would_cut_are_refused(tmp_path):
    make_pictures(tmp_path, 10)
    arguments = settings(tmp_path, prep="resized_crop_10", size=10)
    refused(write_cache, **arguments, match="10x10 pixels; expected sides that are multiples of 4")


def test_a_prior_of_broken_pictures_alone_names_them_and_is_not_written(tmp_path):
    make_pictures(tmp_path, 2)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(path.read_bytes()[:40])
    output = tmp_path / "new" / "prior.safetensors"
    refused(estimate_prior, tmp_path, "tiny", 8, output, match="no picture can be used: ")
    assert not output.exists()

    noise(12, 12, 7).save(tmp_path / "02.png")
    refused(estimate_prior, tmp_path, "tiny", 8, output, match="2 of 3 pictures are not in")
    assert output.is_file()


def test_a_cache_of_something_else_is_not_continued(tmp_path):
    make_pictures(tmp_path, 20)
    arguments = settings(tmp_path, shard_items=5)
    write_cache(**arguments)
    refused(write_cache, **arguments | dict(seed=1), match="choose another --output")
    refused(write_cache, **arguments | dict(column="caption"), match="choose another --output")

    second = settings(tmp_path, source=str(tmp_path / "cache"), output=tmp_path / "second")
    refused(write_cache, **second, match="a cache already")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("taken")
    refused(write_cache, **settings(tmp_path, output="other"), match="choose another --output")

    (tmp_path / "cache" / "index.json").write_text("[]")
    refused(open_captioned, tmp_path / "cache", "train", "", match="index.json cannot be used")


def test_what_has_changed_since_is_encoded_again_and_what_is_gone_is_dropped(tmp_path):
    make_pictures(tmp_path, 20)
    arguments = settings(tmp_path, shard_items=5)
    write_cache(**arguments)
    before = open_captioned(tmp_path / "cache", "train", "")
    old = [before[i] for i in range(len(before))]

    noise(12, 12, 99).save(tmp_path / "07.png")
    (tmp_path / "03.txt").write_text("a new caption")
    write_cache(**arguments)
    new = open_captioned(tmp_path / "cache", "train", "")
    changed = [i for i in range(18) if not torch.equal(new[i]["mean"], old[i]["mean"])]
    assert changed == [7]
    assert new[3]["caption"] == "a new caption"

    for number in range(10, 20):
        (tmp_path / f"{number}.png").unlink()
    write_cache(**arguments)
    left = open_captioned(tmp_path / "cache", "train", "")
    assert [left[i]["name"] for i in range(len(left))] == [f"{i:02d}.png" for i in range(9)]
    shards = sorted(path.name for path in (tmp_path / "cache").glob("train-*"))
    assert shards == ["train-00000.safetensors", "train-00001.safetensors"]


def test_a_cache_whose_update_was_stopped_is_not_opened(tmp_path, monkeypatch):
    make_pictures(tmp_path, 20)
    arguments = settings(tmp_path, shard_items=5)
    write_cache(**arguments)
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text("a new caption")
    read_item = Captioned.__getitem__

    def stop_at_the_eighth(self, index):
        if index[0] == 7:
            raise KeyboardInterrupt
        return read_item(self, index)

    monkeypatch.setattr(Captioned, "__getitem__", stop_at_the_eighth)
    with pytest.raises(KeyboardInterrupt):
        write_cache(**arguments)
    refused(open_captioned, tmp_path / "cache", "train", "", match="not brought up to date")

    monkeypatch.setattr(Captioned, "__getitem__", read_item)
    write_cache(**arguments)
    assert set(open_captioned(tmp_path / "cache", "train", "").captions) == {"a new caption"}


def test_pictures_of_several_sizes_are_refused_in_any_batches(tmp_path):
    for i in range(10):
        noise(8 * (1 + i // 5), 8, i).save(tmp_path / f"{i:02d}.png")
    for batch in (1, 5, 8):
        arguments = settings(tmp_path, output=f"cache{batch}", prep="no_resize", batch=batch)
        refused(write_cache, **arguments, match="differ in size")


def test_a_cache_that_failed_before_its_first_shard_is_begun_again(tmp_path):
    make_pictures(tmp_path, 10)
    refused(write_cache, **settings(tmp_path, prep="resized_crop_10", size=10), match="multiples")
    write_cache(**settings(tmp_path))
    assert len(open_captioned(tmp_path / "cache", "train", "")) == 9


def test_a_prior_is_written_over_nothing_but_a_prior(tmp_path):
    make_pictures(tmp_path, 2)
    picture = tmp_path / "00.png"
    refused(estimate_prior, tmp_path, "tiny", 8, picture, match="name ending in .safetensors")
    other = tmp_path / "weights.safetensors"
    save_tensors(other, {"a": torch.ones(1)}, {})
    content = other.read_bytes()
    refused(estimate_prior, tmp_path, "tiny", 8, other, match="exists and is not a prior")
    assert other.read_bytes() == content
    for _ in range(2):
        estimate_prior(tmp_path, "tiny", 8, tmp_path / "prior.safetensors")


@torch.inference_mode()
def test_each_item_has_the_crop_of_its_own_key(tmp_path):
    for i in range(10):
        noise(12, 40, i).save(tmp_path / f"{i:02d}.png")
    prep = "resized_randomcrop_8_hflip"
    write_cache(**settings(tmp_path, prep=prep, seed=3))
    cached = Cached(tmp_path / "cache", "train")
    pictures = open_captioned(tmp_path, "train", prep)
    vae = load_base("tiny", ("vae",), torch.float32).vae
    for i in range(9):
        mean, _, _ = vae.encode(pictures[i, (3, 0, i)]["target"][None])
        expected = mean[0] * vae.config.scaling_factor
        assert torch.allclose(cached[i]["mean"], expected, atol=1e-4)
