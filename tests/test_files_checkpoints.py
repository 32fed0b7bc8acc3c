"""files/checkpoints.py refuses damaged and foreign checkpoints in one line that names the file.

What it reads and writes when all is well is in the tests of the generators and the trainers.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from pipelines import VAE, refusal, tiny_pipeline, weight_file
from safetensors.torch import load_file, save_file

from files import checkpoints
from files.bases import load_base
from files.checkpoints import load_generator
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small Stable Diffusion as `diffusers` writes it."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["lora", "all"])
def checkpoint(request, saved, tmp_path_factory) -> Path:
    """An undamaged checkpoint of ours. If it is a LoRA, its base is `saved`."""
    path = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    base = load_base(str(saved))
    config = Pix2PixTurboConfig(train=request.param)
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, config)
    checkpoints.save_generator(
        path,
        generator,
        "pix2pix_turbo",
        str(saved),
        ["a cat"],
        base.text_encoder,
        base.tokenizer,
    )
    assert load_generator(str(path)).prompts == ["a cat"]
    return path


def unchanged(values: dict) -> dict:
    return values


def rewrite(
    path: Path,
    target: Path,
    metadata: Callable[[dict], dict] = unchanged,
    tensors: Callable[[dict], dict] = unchanged,
) -> str:
    """Writes a checkpoint to `target` with its metadata or its tensors changed."""
    with safetensors.safe_open(path, "pt") as file:
        before = dict(file.metadata())
    changed = {name: t.clone() for name, t in tensors(load_file(path)).items()}
    save_file(changed, target, metadata(before))
    return str(target)


# -------------------- broken metadata

def without(key: str) -> Callable[[dict], dict]:
    return lambda values: {k: v for k, v in values.items() if k != key}


def having(**changes) -> Callable[[dict], dict]:
    return lambda values: values | changes


def config_with(**changes) -> Callable[[dict], dict]:
    """Other entries of the `config` in the metadata; None removes one."""

    def change(metadata: dict[str, str]) -> dict[str, str]:
        entries = json.loads(metadata["config"]) | changes
        entries = {key: value for key, value in entries.items() if value is not None}
        return metadata | {"config": json.dumps(entries)}

    return change


def generator_with(**changes) -> Callable[[dict], dict]:
    """Other settings of the generator."""

    def change(metadata: dict[str, str]) -> dict[str, str]:
        settings = json.loads(metadata["config"])["generator"]
        return config_with(generator=settings | changes)(metadata)

    return change


def with_half_a_config(metadata: dict[str, str]) -> dict[str, str]:
    return metadata | dict(config=metadata["config"][:50])


METADATA = {
    "none": lambda metadata: {},
    "no format": without("format"),
    "a later format": having(format="one 2"),
    "another kind": having(kind="yoso"),
    "no config": without("config"),
    "config cut": with_half_a_config,
    "config a list": having(config="[]"),
    "config null": having(config="null"),
    "config deep": having(config="[" * 100_000),
    "no generator": config_with(generator=None),
    "a generator of words": config_with(generator="small"),
    "an unknown option": generator_with(wings=2),
    "a rank in words": generator_with(lora_rank_unet="eight", train="lora"),
    "a rank of 0": generator_with(lora_rank_vae=0, train="lora"),
    "a rank of -1": generator_with(lora_rank_vae=-1, train="lora"),
    "targets of nothing": generator_with(unet_targets=["wings"], train="lora"),
    "no prompts": without("prompts"),
    "prompts cut": having(prompts='["a'),
    "prompts a number": having(prompts="3"),
    "no base": without("base"),
}
# What only a checkpoint of all weights has.
EMBEDDED = {
    "no unet": config_with(unet=None),
    "a unet of words": config_with(unet="large"),
    "a size in words": config_with(vae=dict(norm_num_groups="four")),
    "a size that nothing has": config_with(text_encoder=dict(wings=2)),
    "no schedule": config_with(schedule=None),
    "another schedule": config_with(schedule=dict(beta_schedule="mine")),
    "no tokenizer": config_with(tokenizer=None),
    "a tokenizer of words": config_with(tokenizer="words"),
    "a tokenizer of nothing": config_with(tokenizer='{"pieces": "{}"}'),
    "other sizes": config_with(vae={}),
}


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA.keys())
def test_broken_metadata_is_refused(checkpoint, tmp_path, change):
    target = tmp_path / "model.safetensors"
    message = refusal(lambda: load_generator(rewrite(checkpoint, target, change)))
    assert str(target) in message


@pytest.mark.parametrize("checkpoint", ["all"], indirect=True)
@pytest.mark.parametrize("change", EMBEDDED.values(), ids=EMBEDDED.keys())
def test_broken_configurations_in_a_checkpoint_of_all_weights_are_refused(
    checkpoint, tmp_path, change,
):
    target = tmp_path / "model.safetensors"
    message = refusal(lambda: load_generator(rewrite(checkpoint, target, change)))
    assert str(target) in message


# -------------------- other tensors and bases

SKIP = "vae.decoder.skip_conv_1.weight"


def with_skip(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda tensors: tensors | {SKIP: change(tensors[SKIP])}


@pytest.mark.parametrize(
    "change, says",
    [
        (without(SKIP), f"lacks {SKIP} [16, 8, 1, 1]"),
        (lambda tensors: {}, "lacks"),
        (having(odd=torch.ones(2)), "holds odd"),
        (
            with_skip(lambda t: t[:3]),
            f"{SKIP} is float32 [3, 8, 1, 1]; expected floating point [16, 8, 1, 1]",
        ),
        (with_skip(lambda t: t.long()), f"{SKIP} is int64"),
    ],
)
def test_other_tensors_are_refused_by_name(checkpoint, tmp_path, change, says):
    target = tmp_path / "model.safetensors"
    message = refusal(lambda: load_generator(rewrite(checkpoint, target, tensors=change)))
    assert str(target) in message
    assert says in message


@pytest.mark.parametrize("checkpoint", ["lora"], indirect=True)
def test_another_base_is_refused_and_a_missing_one_can_be_replaced(checkpoint, saved, tmp_path):
    other = Path(shutil.copytree(saved, tmp_path / "base"))
    narrow = dict(VAE, block_out_channels=(8, 12))
    tiny_pipeline(vae=narrow).vae.save_pretrained(other / "vae")
    message = refusal(lambda: load_generator(str(checkpoint), str(other)))
    assert str(checkpoint) in message
    assert "[16" in message
    assert "[12" in message

    orphan = rewrite(checkpoint, tmp_path / "model.safetensors", having(base="gone"))
    assert "gone is no folder here" in refusal(lambda: load_generator(orphan))
    assert load_generator(orphan, base=str(saved)).base == str(saved)


@pytest.mark.parametrize("checkpoint", ["all"], indirect=True)
def test_a_checkpoint_of_all_weights_has_no_strength(checkpoint):
    def load() -> None:
        load_generator(str(checkpoint), strength=0.5)

    assert "LoRA" in refusal(load, expects=False)


# -------------------- files of others

class Marker:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch.save", "pickle"])
def test_code_in_a_pkl_is_refused_and_does_not_run(tmp_path, writer):
    path = tmp_path / "bad.pkl"
    marker = tmp_path / "marker"
    contents = dict(rank_unet=8, state_dict_unet={"conv_in.weight": Marker(marker)})
    if writer == "torch.save":
        torch.save(contents, path)
    else:
        path.write_bytes(pickle.dumps(contents))
    message = refusal(lambda: load_generator(str(path)))
    assert str(path) in message
    assert "code" in message
    assert "weights_only" not in message
    assert not marker.exists()


def test_the_marker_of_the_test_above_works(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Marker(marker)))
    assert marker.exists()


OFFICIAL = dict(
    rank_unet=8,
    rank_vae=4,
    unet_lora_target_modules=["to_k"],
    vae_lora_target_modules=["conv1"],
    state_dict_unet={},
    state_dict_vae={},
)


@pytest.mark.parametrize(
    "contents, says",
    [
        ([1, 2], "list"),
        ({}, "rank_unet"),
        (OFFICIAL | {"state_dict_unet": []}, "img2img-turbo"),
        (OFFICIAL | {"rank_unet": "eight"}, "'eight'"),
        (OFFICIAL | {"unet_lora_target_modules": 3}, "img2img-turbo"),
        (OFFICIAL | {"state_dict_unet": {"conv_in.weight": 3}}, "tensors"),
        (OFFICIAL | {"state_dict_unet": {3: torch.ones(2)}}, "img2img-turbo"),
        (OFFICIAL, "lacks"),
    ],
    ids=str,
)
def test_a_pkl_of_something_else_is_refused(saved, tmp_path, contents, says):
    path = tmp_path / "model.pkl"
    torch.save(contents, path)
    message = refusal(lambda: load_generator(str(path), base=str(saved)))
    assert str(path) in message
    assert says in message


@pytest.mark.parametrize(
    "content",
    [b"", b"just words\n" * 20, b"PK\x03\x04" + bytes(50), bytes(5000)],
    ids=len,
)
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content):
    for name in ("model.pkl", "model.txt", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        assert str(path) in refusal(lambda path=path: load_generator(str(path)))


def test_safetensors_of_others_are_refused_by_their_format(saved):
    path = weight_file(saved, "unet")
    message = refusal(lambda: load_generator(str(path)))
    assert str(path) in message
    assert "its format is 'pt', its kind None" in message
