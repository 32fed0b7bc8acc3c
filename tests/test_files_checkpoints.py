"""files/checkpoints.py refuses damaged and foreign checkpoints in one line that names the file.

What it reads and writes when all is well is in the tests of the generators and the trainers.
"""

# ruff: noqa: F811  (a fixture is imported, and arguments have its name)

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from PIL import Image
from pipelines import VAE, refusal, tiny_pipeline, weight_file
from safetensors.torch import load_file, save_file
from test_sample import command, levels, picture  # noqa: F401  (the first is a fixture)
from torch import Tensor
from trainer_helpers import pairs, train  # noqa: F401  (pairs is a fixture)

import sample
import train_yoso
from files import checkpoints
from files.bases import Base, load_base
from files.checkpoints import checkpoint_kind, load_generator
from files.hub import BASES
from models.cyclegan_turbo import CycleGANTurboConfig
from models.lora import add_lora
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

    assert "changes a base" in refusal(load, expects=False)


# -------------------- one-step generators

def save_every_weight(path: Path, base: Base, name: str, prior: tuple[Tensor, Tensor]) -> Path:
    """A checkpoint of --train all that changed nothing."""
    trained = {f"unet.{name}": p for name, p in base.unet.named_parameters()}
    checkpoints.save_yoso(path, base, name, trained, prior, None)
    return path


@torch.no_grad()
@pytest.mark.parametrize("way", ["lora", "all"])
def test_the_strength_of_a_one_step_generator_leads_from_its_base_to_it(tmp_path, way):
    base = load_base("tiny-turbo", ("unet", "schedule"), torch.float64)
    before = base.unet.conv_out.weight.clone()
    if way == "lora":
        add_lora(base.unet, ["conv_out"], 4, 8.0, torch.Generator().manual_seed(0))
        base.unet.conv_out.lora_B.weight.normal_()
        trained = {n: p for n, p in base.unet.named_parameters() if ".lora_" in n}
    else:
        trained = {n: p + 0.1 * torch.randn_like(p) for n, p in base.unet.named_parameters()}
    trained = {f"unet.{name}": p for name, p in trained.items()}
    prior = (torch.zeros(4, 16, 16), torch.ones(4, 16, 16))
    path = tmp_path / "model.safetensors"
    rank = 4 if way == "lora" else None
    checkpoints.save_yoso(path, base, "tiny-turbo", trained, prior, rank)

    def change(strength: float) -> Tensor:
        loaded, _ = checkpoints.load_yoso(str(path), dtype=torch.float64, strength=strength)
        return loaded.unet.conv_out.weight - before

    assert change(0.0).abs().max() == 0 and change(1.0).abs().max() > 1e-3
    assert torch.allclose(change(0.5), 0.5 * change(1.0), atol=1e-9)


def test_strength_is_that_of_the_change_for_a_prompt_and_of_the_noise_for_an_edit(
    tmp_path, command, monkeypatch
):
    base = load_base("tiny-turbo", ("unet", "schedule"))
    prior = (torch.zeros(4, 16, 16), torch.ones(4, 16, 16))
    path = save_every_weight(tmp_path / "model.safetensors", base, "tiny-turbo", prior)
    seen = []
    load_yoso = checkpoints.load_yoso
    text_to_image = sample.text_to_image

    def watch_load(*arguments):
        seen.append(arguments[4])
        return load_yoso(*arguments)

    def watch_draw(*arguments, strength=None, **rest):
        seen.append(strength)
        return text_to_image(*arguments, **rest)

    monkeypatch.setattr(checkpoints, "load_yoso", watch_load)
    monkeypatch.setattr(sample, "text_to_image", watch_draw)
    flags = ["a boat", "--checkpoint", path, "--strength", 0.5]
    assert command(*flags)[0] == 0
    assert command(*flags, "--input", picture(tmp_path / "in.png", 64, 64))[0] == 0
    assert seen == [0.5, None, 1.0, 0.5]


def test_an_edit_at_strength_1_is_drawn_from_the_prior_as_a_prompt_is(tmp_path, command):
    """tiny-sd's last timestep is not pure noise."""
    base = load_base("tiny-sd", ("unet", "schedule"))
    prior = (torch.ones(4, 16, 16), torch.ones(4, 16, 16))
    path = save_every_weight(tmp_path / "model.safetensors", base, "tiny-sd", prior)
    flags = ["a boat", "--checkpoint", path]
    assert command(*flags)[0] == 0
    assert Image.open("out.png").text["size"] == "64x64"  # of the prior, as no flag says
    edit = ["--input", picture(tmp_path / "in.png", 64, 64), "--strength", 1]
    assert command(*flags, *edit, "--output", "edited.png")[0] == 0
    assert (levels("edited.png") - levels("out.png")).abs().max() <= 1


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
        ({}, "without tensors"),
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


def test_safetensors_of_others_are_refused_by_what_they_are(saved):
    path = weight_file(saved, "unet")
    message = refusal(lambda: load_generator(str(path)))
    assert str(path) in message
    assert "it is a U-Net" in message


# -------------------- starting a new run

def test_of_a_runs_folder_the_best_weights_are_those_to_start_from(tmp_path):
    last = tmp_path / "model.safetensors"
    best = tmp_path / "best.safetensors"
    last.touch()
    assert checkpoints.find_checkpoint(str(tmp_path), checkpoints.START_FILES) == last
    best.touch()
    assert checkpoints.find_checkpoint(str(tmp_path), checkpoints.START_FILES) == best
    assert checkpoints.find_checkpoint(str(tmp_path)) == last


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("sd-turbo", "stabilityai/sd-turbo", True),
        ("/home/a/sd-turbo", "stabilityai/sd-turbo/", True),
        ("tiny-turbo", str(checkpoints.ROOT / "tiny" / "tiny-turbo"), True),
        ("tiny-turbo", "tiny-sd", False),
        ("sd15", "runs/z/base", False),
    ],
)
def test_bases_are_told_apart_by_the_last_part_of_their_names(one, other, same):
    path = Path("model.safetensors")
    if same:
        checkpoints._check_same_base(one, other, path)
        return
    with pytest.raises(ValueError, match=f"was trained on the base {one}; expected {other}"):
        checkpoints._check_same_base(one, other, path)


def yoso_lora(rank: int) -> torch.nn.ModuleDict:
    """A tiny one-step generator with a new LoRA, under the names of checkpoints."""
    unet = load_base("tiny", ("unet",)).unet
    add_lora(unet, ["to_q", "conv1"], rank, 8.0, torch.Generator().manual_seed(rank))
    return torch.nn.ModuleDict({"unet": unet})


def test_the_lora_of_a_one_step_generator_goes_on_where_rank_base_and_prediction_agree(tmp_path):
    before = yoso_lora(3)
    trained = {name: p for name, p in before.named_parameters() if ".lora_" in name}
    for p in trained.values():
        p.data.normal_()
    base = load_base("tiny", ("unet", "schedule"))
    prior = (torch.zeros(4, 8, 8), torch.ones(4, 8, 8))
    path = tmp_path / "model.safetensors"
    checkpoints.save_yoso(path, base, "tiny", trained, prior, lora_rank=3)
    predicted = base.schedule.prediction_type

    after = yoso_lora(3)
    found = checkpoints.start_yoso_from(str(tmp_path), after, 3, predicted, "tiny")
    assert found == f"starting from {path}"
    for name, p in after.named_parameters():
        if ".lora_" in name:
            assert torch.equal(p, trained[name])

    others = {
        "its rank is 3": (4, predicted, "tiny"),
        f"it predicts {predicted}": (3, "another", "tiny"),
        "trained on the base tiny; expected sd15": (3, predicted, "sd15"),
    }
    for says, (rank, prediction, name) in others.items():
        network = yoso_lora(rank)

        def start(network=network, rank=rank, prediction=prediction, name=name):
            checkpoints.start_yoso_from(str(path), network, rank, prediction, name)

        assert says in refusal(start)
    message = refusal(lambda: checkpoints.start_yoso_from("day2night", after, 3, "x0", "tiny"))
    assert "its kind is 'cyclegan_turbo'" in message


def test_a_new_run_of_the_one_step_trainer_starts_from_another(
    monkeypatch, capsys, tmp_path, pairs
):
    old, new = tmp_path / "old", tmp_path / "new"
    flags = ["--train", "lora", "--lora_rank", 2, "--dataset_folder", pairs, "--device", "cpu"]
    flags += ["--resolution", 24, "--train_batch_size", 2, "--prior_pictures", 3]
    flags += ["--validation_num_images", 2, "--viz_freq", 1000, "--max_train_steps", 1]
    train(monkeypatch, train_yoso, *flags, "--output_dir", old)
    # At a learning rate of 0 the weights stay what they were.
    more = ["--init", old, "--learning_rate", 0, "--seed", 7, "--output_dir", new]
    train(monkeypatch, train_yoso, *flags, *more)
    first, second = (load_file(run / "model.safetensors") for run in (old, new))
    lora = [name for name in first if ".lora_" in name]
    assert lora and all(torch.equal(first[name], second[name]) for name in lora)
    with pytest.raises(SystemExit):
        train(monkeypatch, train_yoso, *flags, "--train", "all", "--init", old)
    assert "--base runs/NAME/base" in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint_is_named_as_what_it_is(tmp_path):
    path = tmp_path / "lora.safetensors"
    names = [f"unet.down_blocks.0.attentions.0.proj_in.lora_{side}.weight" for side in "AB"]
    save_file({name: torch.ones(1, 1) for name in names}, path)
    message = refusal(lambda: checkpoint_kind(str(path)))
    assert "it is a LoRA (for --lora); expected a checkpoint" in message
    path = tmp_path / "notes.txt"
    path.write_text("words")
    assert "expected a checkpoint" in refusal(lambda: checkpoint_kind(str(path)))


def test_another_base_than_that_of_training_is_reported(capsys):
    load_generator("day2night", base=BASES["tiny-turbo"])
    assert "trained on" not in capsys.readouterr().err
    load_generator("day2night", base="tiny-sd")
    assert "was trained on the base tiny-turbo; on tiny-sd" in capsys.readouterr().err


def test_a_name_that_is_nearly_that_of_an_adapter_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "(did you mean day2night?)" in refusal(lambda: load_generator("day2nite"))
    (tmp_path / "day2night").mkdir()
    assert "hides the checkpoint of that name" in refusal(lambda: load_generator("day2night"))


@pytest.mark.parametrize(
    "config, name",
    [
        (Pix2PixTurboConfig, "lora_alpha"),
        (CycleGANTurboConfig, "lora_alpha_unet"),
        (CycleGANTurboConfig, "lora_alpha_vae"),
    ],
)
def test_a_lora_of_another_alpha_is_refused(config, name):
    saved, wanted = config(**{name: 4.0}), config(**{name: 2.0})
    with pytest.raises(ValueError, match=rf"was trained with {name} 4.0 \(this run: 2.0\)"):
        checkpoints._check_settings(saved, wanted, Path("model.safetensors"))
