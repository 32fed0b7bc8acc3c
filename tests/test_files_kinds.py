"""Messages say what a file is, if it can be known, and give advice that helps with it.

Whoever downloads models gets pointers of Git LFS, web pages, and files of another kind than the one
asked for. They are whole, so copying them again would not help.
"""

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import normal
from pictures_helpers import cache_settings, make_pairs, refused
from PIL import Image
from pipelines import UNET, refusal, tiny_pipeline, weight_file
from safetensors.torch import load_file, save_file

from dataset.cache import write_cache
from dataset.folders import open_captioned, open_paired
from dataset.pictures import open_picture, to_picture
from files import kinds
from files.bases import load_base, load_lora, load_prior
from files.checkpoints import load_generator, load_yoso
from files.embeddings import add_embedding
from files.formats import read_lora
from files.tensors import from_json, read_json, read_tensors, reading, save_tensors
from files.tokenizers import load_t5_tokenizer, load_tokenizer
from models.unet import UNet, UNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small Stable Diffusion as `diffusers` writes it, never to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


# -------------------- first bytes

def picture_bytes(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format=format)
    return file.getvalue()


def zip_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/model.safetensors", "x" * 1000)
    return file.getvalue()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 492265\n"
)
UNAUTHORIZED = b'{"error":"Unauthorized","message":"You must be logged in to download it"}'
BYTES = {
    "LFS pointer": (LFS, "a pointer of Git LFS"),
    "annex pointer": (b"/annex/objects/MD5E-s12--abc.safetensors\n", "a pointer of git-annex"),
    "web page": (b"\n <!DOCTYPE html>\n<html><head><title>Sign in</title>", "a web page"),
    "web page without a type": (b"<HTML><body>403</body></HTML>", "a web page"),
    "answer of S3": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "in XML"),
    "empty": (b"", "is empty"),
    "PNG": (picture_bytes("PNG"), "a PNG picture"),
    "JPEG": (picture_bytes("JPEG"), "a JPEG picture"),
    "WebP": (picture_bytes("WEBP"), "a WebP picture"),
    "GIF": (picture_bytes("GIF"), "a GIF picture"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    "zip": (zip_bytes(), "an archive (zip)"),
    "gzip": (gzip.compress(b"x" * 100), "an archive (gzip)"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c\0\4", "an archive (7-Zip)"),
    "RAR": (b"Rar!\x1a\7\1\0", "an archive (RAR)"),
    "GGUF": (b"GGUF\3\0\0\0", "a GGUF file"),
    "Keras": (b"\x89HDF\r\n\x1a\n", "Keras"),
    "video": (b"\0\0\0\x20ftypisom\0\0", "a video"),
    "program": (b"\x7fELF\2\1\1", "a program"),
    "an answer": (UNAUTHORIZED, 'text, which begins with \'{"error":"Unauthorized"'),
    "noise": (bytes(range(255, 128, -1)) * 4, "of an unknown kind"),
}
ENDINGS = ("safetensors", "pt", "bin", "ckpt", "pkl")


@pytest.mark.parametrize("content, says", BYTES.values(), ids=BYTES.keys())
def test_weights_that_are_none_are_named(tmp_path, content, says):
    for ending in ENDINGS[1:]:
        path = tmp_path / f"file.{ending}"
        path.write_bytes(content)
        message = refusal(lambda path=path: read_tensors(path, "a LoRA"))
        assert message.startswith(f"{path} is ")
        assert says in message, message
        assert "expected a LoRA" in message
        assert "again" not in message

    # Under this ending text and noise may be what is left of a damaged file.
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    message = refusal(lambda: read_tensors(path))
    if "text" not in says and "unknown" not in says:
        assert says in message, message
        assert "again" not in message


@pytest.mark.parametrize("name", ["LFS pointer", "web page", "empty", "answer of S3"])
@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_every_file_of_a_base_is_named_as_what_it_is(saved, tmp_path, name, file):
    content, says = BYTES[name]
    for path in saved.rglob("*.*"):
        copy = tmp_path / path.relative_to(saved)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(content)
    message = refusal(lambda: load_base(str(tmp_path)))
    assert str(tmp_path / file) in message
    assert says in message, message


@pytest.mark.parametrize("name", ["LFS pointer", "web page", "PNG", "empty"])
def test_tokenizers_are_named_as_what_they_are(tmp_path, name):
    content, says = BYTES[name]
    (tmp_path / "tokenizer").mkdir()
    for file, load in [("spiece.model", load_t5_tokenizer), ("vocab.json", load_tokenizer)]:
        (tmp_path / "tokenizer" / file).write_bytes(content)
        message = refusal(lambda load=load: load(str(tmp_path)))
        assert file in message
        assert says in message, message


@pytest.mark.parametrize("name", ["PNG", "zip", "GGUF", "web page"])
def test_a_base_that_is_a_file_is_named(tmp_path, name):
    content, says = BYTES[name]
    path = tmp_path / "model.file"
    path.write_bytes(content)
    message = refusal(lambda: load_base(str(path)))
    assert says in message, message
    assert "expected a folder in the diffusers layout" in message


@pytest.mark.parametrize(
    "names, says",
    [
        ([], "has no model_index.json (the folder is empty); expected"),
        (["a.png"], "has no model_index.json beside a.png; expected"),
        (list("abcde"), "has no model_index.json beside a, b, c and 2 more; expected"),
    ],
)
def test_a_folder_without_the_file_says_what_it_holds(tmp_path, names, says):
    for name in names:
        (tmp_path / name).touch()
    assert says in refusal(lambda: load_base(str(tmp_path)))


def test_weights_that_are_there_under_another_name_are_named(saved, tmp_path):
    for path in saved.rglob("*.*"):
        copy = tmp_path / path.relative_to(saved)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    path = weight_file(tmp_path, "unet")
    path.rename(path.with_suffix(".bin"))
    message = refusal(lambda: load_base(str(tmp_path)))
    assert "beside config.json, diffusion_pytorch_model.bin; expected weights" in message
    (tmp_path / "unet" / "config.json").unlink()
    path.with_suffix(".bin").unlink()
    (tmp_path / "unet").rmdir()
    assert "(there is no folder unet)" in refusal(lambda: load_base(str(tmp_path)))


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("layers_per_block", [1, 2], "(1, 2), not a whole number"),
        ("layers_per_block", "two", "'two', not a whole number"),
        ("layers_per_block", 10**9, "1000000000, not a whole number up to 1000"),
        ("norm_eps", "1e-5", "'1e-5', not a number"),
        ("block_out_channels", 16, "16, not a list of whole numbers"),
        ("down_block_types", [1, 2], "(1, 2), not a list of texts"),
    ],
)
def test_a_value_of_a_configuration_is_told_with_what_it_should_be(key, value, says):
    with pytest.raises(ValueError, match="^" + re.escape(f"{key} is {says}") + "$"):
        from_json(UNetConfig, {key: value})


# -------------------- pictures and captions

PICTURES = {
    "LFS pointer": (LFS, "a pointer of Git LFS"),
    "web page": (BYTES["web page"][0], "a web page"),
    "empty": (b"", "but empty"),
    "HEIC": (b"\0\0\0\x24ftypheic\0\0\0\0", "a HEIC picture"),
    "video": (BYTES["video"][0], "a video"),
    "drawing": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "(SVG)"),
    "PDF": (BYTES["PDF"][0], "a PDF"),
    "text": (b"not a picture", "text, which begins with 'not a picture'"),
    "damaged PNG": (picture_bytes("PNG")[:8] + bytes(40), "its header is damaged"),
}


@pytest.mark.parametrize("content, says", PICTURES.values(), ids=PICTURES.keys())
def test_pictures_that_are_none_are_named(tmp_path, content, says):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    refused(open_picture, path, match=says)
    # Pictures in a zip arrive as open files.
    refused(open_picture, io.BytesIO(content), "set.zip/a.png", match=says)


def test_a_pointer_does_not_become_a_caption(tmp_path):
    folder = make_pairs(tmp_path / "set", 3)
    (folder / "train_prompts.json").write_bytes(LFS)
    refused(open_paired, folder, "train", "no_resize", match="prompts.json is a pointer of Git LFS")
    (folder / "train_prompts.json").unlink()
    (folder / "train_A" / "001.txt").write_bytes(LFS)
    refused(open_paired, folder, "train", "no_resize", match="001.txt is a pointer of Git LFS")
    for name in ("captions.txt", "set.zip"):
        (tmp_path / name).write_bytes(LFS)
        refused(open_captioned, tmp_path / name, "train", "no_resize", match=f"{name} is a pointer")


def test_of_two_caches_the_first_difference_is_shown(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        levels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(levels).save(folder / f"{i}.png")
    settings = cache_settings(folder, tmp_path / "cache")
    write_cache(**settings)
    message = "its seed is 0, and this one's would be 1"
    refused(write_cache, **settings | dict(seed=1), match=message)


# -------------------- files of another kind

VECTOR = torch.ones(32)
TENSORS = {
    "an embedding": ({"<cat>": VECTOR}, "an embedding (textual inversion, for --embedding)"),
    "kohya's embedding": ({"emb_params": VECTOR}, "an embedding"),
    "an embedding for SDXL": ({"clip_l": VECTOR, "clip_g": VECTOR}, "an embedding for SDXL"),
    "a VAE": ({"decoder.mid_block.a": VECTOR, "encoder.b": VECTOR}, "a VAE"),
    "an original VAE": ({"encoder.down.0.a": VECTOR, "b": VECTOR}, "a VAE in the names of"),
    "a U-Net": ({"time_embedding.a": VECTOR, "conv_in.weight": VECTOR}, "a U-Net"),
    "a text encoder": ({"text_model.a": VECTOR, "text_model.b": VECTOR}, "text encoder"),
    "T5": ({"encoder.block.0.layer.0.SelfAttention.q": VECTOR, "shared.weight": VECTOR}, "T5"),
    "PixArt": ({"adaln_single.a": VECTOR, "pos_embed.proj": VECTOR}, "a transformer of PixArt"),
    "a ControlNet": ({"controlnet_cond_embedding.a": VECTOR, "b": VECTOR}, "a ControlNet"),
    "an IP-Adapter": ({"image_proj.a": VECTOR, "ip_adapter.b": VECTOR}, "an IP-Adapter"),
    "an upscaler": ({"body.0.rdb1.a": VECTOR, "conv_first": VECTOR}, "an upscaler"),
    "SDXL": ({"conditioner.embedders.1.a": VECTOR, "model.diffusion_model.b": VECTOR}, "SDXL"),
    "Flux": ({"double_blocks.0.a": VECTOR, "single_blocks.0.b": VECTOR}, "Flux"),
    "Stable Diffusion 3": ({"model.joint_blocks.0.a": VECTOR, "b": VECTOR}, "Diffusion 3"),
    "a prior": ({"mean": VECTOR, "std": VECTOR}, "a prior"),
    "nothing": ({}, "without tensors"),
}
WITH_LORA = TENSORS | {
    "a LoRA": ({"unet.a.lora_A.weight": VECTOR, "unet.a.lora_B.weight": VECTOR}, "a LoRA"),
    "LoHa": ({"lora_unet_a.hada_w1_a": VECTOR, "lora_unet_a.hada_w1_b": VECTOR}, "a LoRA"),
    "SD 1.x": (
        {"cond_stage_model.transformer.a": VECTOR, "model.diffusion_model.b": VECTOR},
        "a one-file model of Stable Diffusion 1.x",
    ),
    "SD 2.x": (
        {"cond_stage_model.model.a": VECTOR, "model.diffusion_model.b": VECTOR},
        "a one-file model of Stable Diffusion 2.x",
    ),
}


def refusal_of(load: Callable, tensors: dict, folder: Path) -> str:
    path = folder / "file.safetensors"
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    message = refusal(lambda: load(str(path)))
    assert str(path) in message
    assert "again" not in message
    return message


@pytest.mark.parametrize("tensors, says", TENSORS.values(), ids=TENSORS.keys())
def test_in_place_of_a_lora_the_file_is_named(saved, tmp_path, tensors, says):
    base = load_base(str(saved), ("unet", "text_encoder"))
    message = refusal_of(lambda path: load_lora(path, base), tensors, tmp_path)
    assert says in message, message
    assert "expected a LoRA" in message


@pytest.mark.parametrize("tensors, says", WITH_LORA.values(), ids=WITH_LORA.keys())
def test_in_place_of_a_checkpoint_a_base_or_a_prior_the_file_is_named(tmp_path, tensors, says):
    loads = {
        "expected a checkpoint": load_generator,
        "expected a one-step generator": load_yoso,
        "expected a folder": load_base,
        "expected mean and std": lambda path: load_prior(Path(path), (4, 8, 8)),
    }
    for expected, load in loads.items():
        if says == "a prior" and "mean and std" in expected:
            continue  # of another shape, which the message says
        message = refusal_of(load, tensors, tmp_path)
        assert says in message, message
        assert expected in message, message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_in_place_of_one_network_another_is_named(saved, tmp_path, part):
    networks = {"unet": "a U-Net", "vae": "a VAE", "text_encoder": "CLIP's text encoder"}
    for path in saved.rglob("*.*"):
        copy = tmp_path / path.relative_to(saved)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    for other, kind in networks.items():
        if other == part:
            continue
        path = weight_file(tmp_path, part)
        path.unlink()
        path.symlink_to(weight_file(saved, other))
        message = refusal(lambda: load_base(str(tmp_path), (part,)))
        assert f"it is {kind}" in message, message
        assert f"tensors of the {part}" in message
        assert "again" not in message


def test_an_incomplete_file_is_to_be_copied_again_and_one_of_another_size_is_not(saved, tmp_path):
    for path in saved.rglob("*.*"):
        copy = tmp_path / path.relative_to(saved)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    path = weight_file(tmp_path, "unet")
    tensors = load_file(path)
    path.unlink()
    one = {name: tensor for name, tensor in tensors.items() if name != "conv_in.bias"}
    save_file(one, path)
    message = refusal(lambda: load_base(str(tmp_path), ("unet",)))
    assert "it is incomplete and lacks conv_in.bias [16]" in message
    assert message.endswith(": copy it again")

    save_file(dict(list(tensors.items())[:-3]), path)
    assert " and 2 more)" in refusal(lambda: load_base(str(tmp_path), ("unet",)))
    save_file(tensors | {"conv_in.bias": torch.ones(3)}, path)
    message = refusal(lambda: load_base(str(tmp_path), ("unet",)))
    assert message.endswith(": take both from one model")


OWN = {
    "pix2pix_turbo": "a translator of train_pix2pix_turbo.py",
    "cyclegan_turbo": "a translator of train_cyclegan_turbo.py",
    "yoso": "a one-step generator of train_yoso.py",
}


@pytest.mark.parametrize("kind, says", OWN.items())
def test_our_own_checkpoints_are_named_where_others_are_expected(saved, tmp_path, kind, says):
    path = tmp_path / "model.safetensors"
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "prior.mean": VECTOR}
    save_tensors(path, tensors, dict(format="one-step-diffusion 1", kind=kind, base="tiny"))
    base = load_base(str(saved), ("unet", "text_encoder", "tokenizer"))
    loads = [
        lambda: load_lora(str(path), base),
        lambda: load_base(str(path)),
        lambda: add_embedding(str(path), base),
    ]
    if kind == "yoso":
        loads.append(lambda: load_generator(str(path)))
    else:
        loads.append(lambda: load_yoso(str(path)))
    for load in loads:
        assert f"it is {says}" in refusal(load)


def test_what_the_file_is_shows_in_its_bytes_not_in_its_name(tmp_path):
    tensors = {"a": torch.ones(3)}
    for ending in ENDINGS:
        path = tmp_path / f"of_torch.{ending}"
        torch.save(tensors, path)
        read, _ = read_tensors(path)
        assert torch.equal(read["a"], tensors["a"])
        path = tmp_path / f"safe.{ending}"
        save_tensors(path, tensors, {"format": "pt"})
        read, metadata = read_tensors(path)
        assert torch.equal(read["a"], tensors["a"])
        assert metadata == {"format": "pt"}


@pytest.mark.parametrize("older", [False, True])
def test_code_is_named_and_a_damaged_file_is_told_from_it(tmp_path, older):
    path = tmp_path / "a.ckpt"
    torch.save(
        dict(state_dict={}, callbacks={Path: 3}),
        path,
        _use_new_zipfile_serialization=not older,
    )
    message = refusal(lambda: read_tensors(path, "a base"))
    assert "has code in it (pathlib." in message
    assert "weights_only" not in message

    torch.save({"a": torch.ones(999)}, path, _use_new_zipfile_serialization=not older)
    path.write_bytes(path.read_bytes()[:-300])
    message = refusal(lambda: read_tensors(path, "a base"))
    assert "is damaged (" in message
    assert message.endswith("expected a base: copy it again")


# -------------------- NaN, and the point of a long message

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["lora_A", "lora_B", "alpha", "lora_magnitude_vector"])
def test_numbers_that_are_none_are_found_in_a_lora(key, value):
    stem = f"lora_unet_{Q.replace('.', '_')}"
    good = {f"{stem}.lora_down.weight": normal(2, 16), f"{stem}.lora_up.weight": normal(16, 2)}
    names = {
        "lora_A": f"{stem}.lora_down.weight",
        "lora_B": f"{stem}.lora_up.weight",
        "alpha": f"{stem}.alpha",
        "lora_magnitude_vector": f"unet.{Q}.lora_magnitude_vector",
    }
    name = names[key]
    file = good | {name: torch.full_like(good.get(name, torch.ones(16)), value)}
    if key == "alpha":
        file[name] = torch.tensor(value)
    networks = {"unet": UNet(UNetConfig(**UNET))}
    with pytest.raises(ValueError) as refused_one:
        read_lora(file, None, networks)
    assert name in str(refused_one.value)
    assert "learning" not in str(refused_one.value)


def test_a_picture_of_nan_gets_no_advice_for_a_trainer():
    with pytest.raises(ValueError, match="NaN; expected numbers") as refused_one:
        to_picture(torch.full((3, 4, 4), float("nan")))
    assert "learning rate" not in str(refused_one.value)


@pytest.mark.parametrize("length", [10, 100, 399, 400, 401, 5000])
def test_both_ends_of_a_long_message_are_shown(length):
    middle = "x" * (length - 10)
    with pytest.raises(ValueError) as refused_one, reading("the file", "another: copy it again"):
        raise ValueError(f"start{middle}point")
    message = str(refused_one.value)
    assert "(start" in message
    assert "point); expected another: copy it again" in message
    assert len(message) < 500
    assert (" ... " in message) == (length > 400)


def test_half_a_pair_of_a_long_name_is_told_to_its_end(saved, tmp_path):
    path = tmp_path / "lora.safetensors"
    layer = f"base_model.model.{Q}"
    save_file({f"unet.{layer}.lora_A.weight": torch.ones(2, 16)}, path)
    base = load_base(str(saved), ("unet", "text_encoder"))
    message = refusal(lambda: load_lora(str(path), base))
    assert "without the B that belongs to it" in message


def test_broken_json_is_still_told_by_its_place(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1,\n "b": }')
    message = refusal(lambda: read_json(path))
    assert "JSONDecodeError" in message and "line 2" in message
    assert message.endswith("expected a JSON object: copy it again")
    path.write_text(json.dumps([1]))
    assert "it holds a list" in refusal(lambda: read_json(path))


def test_texts_and_noise_are_told_apart():
    assert kinds.of_text("żółć 猫".encode()[:-1]).startswith("text")
    for start in (bytes(40), b"\x80\x02}q\x00", b"   \n", np.float32([1.5, -2e9]).tobytes()):
        assert kinds.of_text(start) is None
