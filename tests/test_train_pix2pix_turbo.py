"""The paired trainer, run as users run it, on the drawn scenes and on folders."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train_pix2pix_turbo as trainer
import training
from files import bases, checkpoints, metrics, tokenizers
from models import clip, dino, lpips

torch.set_num_threads(1)  # of two, one would only wait
ROOT = pathlib.Path(__file__).parent.parent
SMALL = ["--train_batch_size", "2", "--num_samples_eval", "2", "--viz_freq", "1000", "--eval_freq", "1000", "--device",
         "cpu", "--resolution", "24", "--disc_width", "8"]


def from_nothing(argv):
    """The flags, with the base of random weights where they name none."""
    return [*([] if {"--base", "--resume"} & set(argv) else ["--base", "tiny"]), *map(str, argv)]


def train(monkeypatch, *argv):
    """Runs the trainer in this process; signal handlers are put back."""
    monkeypatch.setattr(sys, "argv", ["train_pix2pix_turbo.py", *from_nothing(argv)])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        training.run(trainer.main)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def command(*argv, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *torchrun, str(ROOT / "train_pix2pix_turbo.py"), *from_nothing(argv)]


ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def assert_same_bits(a: pathlib.Path, b: pathlib.Path):
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Six pairs of noise in the official layout."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split, n in [("train", 6), ("test", 2)]:
        for side in "AB":
            (folder / f"{split}_{side}").mkdir()
            for i in range(n):
                picture = Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8))
                picture.save(folder / f"{split}_{side}" / f"{i}.png")
        (folder / f"{split}_prompts.json").write_text(json.dumps({f"{i}.png": "noise" for i in range(n)}))
    return folder


# ------------------------------------------------------------------------------------------------------------- losses


def test_losses_are_their_formulas_and_so_are_their_gradients():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    x = a.clone().requires_grad_()
    loss = trainer.reconstruction_loss(x, b, 0.3)
    loss.backward()
    assert torch.allclose(loss, 0.3 * ((a - b) ** 2).sum() / a.numel(), rtol=1e-12)
    assert torch.allclose(x.grad, 0.3 * 2 * (a - b) / a.numel(), rtol=1e-9)

    for real in (0.8, 1.0):
        x = a.clone().requires_grad_()
        loss = trainer.generator_gan_loss([x, x[:1]], real)  # two levels
        loss.backward()
        p = 1 / (1 + torch.exp(-a))
        entropy, own = -(real * p.log() + (1 - real) * (1 - p).log()), torch.tensor([2.0, 0]).view(2, 1, 1, 1)
        assert torch.allclose(loss, entropy.mean() + entropy[:1].mean(), rtol=1e-9)
        assert torch.allclose(x.grad, (p - real) * (1 + own) / a.numel(), rtol=1e-9)

        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        trainer.discriminator_loss([x], [y], real).backward()
        assert torch.allclose(x.grad, (torch.sigmoid(a) - real) / a.numel(), rtol=1e-9)
        assert torch.allclose(y.grad, torch.sigmoid(b) / b.numel(), rtol=1e-9)


def test_learning_rates_follow_their_schedules():
    def rate(name, step, last=110):
        config = trainer.Config(lr_scheduler=name, learning_rate=1.0, lr_warmup_steps=10)
        return trainer.learning_rate(step, config, last)

    assert rate("constant", 0) == rate("constant", 100) == 1
    assert rate("constant_with_warmup", 4) == 0.5 and rate("constant_with_warmup", 50) == 1
    assert rate("linear", 60) == 0.5 and rate("linear", 4) == 0.5
    assert rate("cosine", 60) == pytest.approx(0.5) and rate("cosine", 110) == pytest.approx(0)


# --------------------------------------------------------------------------------------------------------- who learns


@pytest.mark.parametrize("extra", [[], ["--stochastic"], ["--conv_in", "off"], ["--train", "all"]],
                         ids=["lora", "stochastic", "conv_in frozen", "all"])
def test_ten_steps_change_all_that_trains_and_nothing_else(monkeypatch, tmp_path, pairs, extra):
    made = {}

    def recorded(name):
        cls = getattr(trainer, name)

        def build(*args, **kwargs):
            made[name] = cls(*args, **kwargs)
            made[name + " before"] = {k: v.detach().clone() for k, v in made[name].state_dict().items()}
            return made[name]

        monkeypatch.setattr(trainer, name, build)

    recorded("Pix2PixTurbo")
    recorded("PatchDiscriminator")
    calls, average = [], training.average_gradients

    def watch(parameters):
        parameters = list(parameters)
        calls.append(len(parameters))
        if len(calls) % 2 == 1:  # the generator's step: the discriminator has let the gradient through and kept none
            assert all(p.grad is None for p in made["PatchDiscriminator"].parameters())
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
        else:  # the discriminator's step: the generator's gradients are gone
            assert all(p.grad is None for p in made["Pix2PixTurbo"].parameters())
            assert all(p.grad is not None for p in parameters)
        average(parameters)

    monkeypatch.setattr(training, "average_gradients", watch)
    train(monkeypatch, "--train", "lora", *extra, "--dataset_folder", pairs, "--output_dir", tmp_path / "run", *SMALL,
          "--max_train_steps", 10, "--lr_warmup_steps", 1, "--lr_scheduler", "constant", "--lambda_gan", "0.5")
    assert len(calls) == 20
    for name in ("Pix2PixTurbo", "PatchDiscriminator"):
        trains = {n for n, p in made[name].named_parameters() if p.requires_grad}
        for k, v in made[name].state_dict().items():
            same = torch.equal(v, made[name + " before"][k])
            buffer = k not in dict(made[name].named_parameters())
            assert same != (k in trains) or (buffer and name == "PatchDiscriminator"), k
    if "all" not in extra:
        saved = load_file(tmp_path / "run" / "model.safetensors")
        names = {n for n, p in made["Pix2PixTurbo"].named_parameters() if p.requires_grad}
        assert saved.keys() == names and "vae.decoder.skip_conv_1.weight" in names
        assert ("unet.conv_in.weight" in names) == ("--conv_in" not in extra)


def test_half_precision_stores_what_is_frozen_in_half_and_trains_in_float32(monkeypatch, tmp_path, pairs):
    made, seen = [], []
    build, look = trainer.Pix2PixTurbo, trainer.PatchDiscriminator.forward
    monkeypatch.setattr(trainer, "Pix2PixTurbo", lambda *a, **k: made.append(build(*a, **k)) or made[0])
    monkeypatch.setattr(trainer.PatchDiscriminator, "forward", lambda d, x, *a: seen.append(x.dtype) or look(d, x, *a))
    train(monkeypatch, "--train", "lora", "--mixed_precision", "bf16", "--gradient_checkpointing", "--dataset_folder",
          pairs, "--output_dir", tmp_path / "run", *SMALL, "--max_train_steps", 1, "--lambda_gan", 0.5)
    assert seen == [torch.float32] * 3  # made ones and real ones alike
    q = made[0].unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert (q.weight.dtype, q.lora_A.weight.dtype) == (torch.bfloat16, torch.float32)


@pytest.fixture
def judges(monkeypatch):
    """Small random networks in place of the downloaded VGG and CLIP."""
    torch.manual_seed(0)
    vision = clip.VisionConfig(24, 40, 3, 3, image_size=32, patch_size=8, projection_dim=20)
    tokenizer = tokenizers.load_tokenizer("tiny")
    text = clip.TextConfig(len(tokenizer.pieces.get_vocab()), 24, 40, 2, 3, eos_token_id=tokenizer.end)
    made = dict(clip=clip.CLIP(vision, text), lpips=lpips.LPIPS(), dino=dino.DINO(dino.DINOConfig(12, 2, 2, side=4)),
                inception=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    for network in made.values():
        network.requires_grad_(False).eval()
    for lin in (made["lpips"].lin0, made["lpips"].lin4):
        lin.model[1].weight.abs_()
    monkeypatch.setattr(metrics, "load_metric_network", lambda name, device: metrics.MetricNetwork(made[name], "0", tokenizer))
    return made


def test_all_losses_of_the_paper_train_in_slices_as_in_one_batch(monkeypatch, tmp_path, pairs, judges):
    before = {name: {k: v.clone() for k, v in network.state_dict().items()} for name, network in judges.items()}
    for name, flags in [("one", ["4"]), ("slices", ["2", "--gradient_accumulation_steps", "2"])]:
        train(monkeypatch, "--dataset_folder", pairs, "--output_dir", tmp_path / name, *SMALL[2:], "--dtype", "float64",
              "--lambda_lpips", 5, "--lambda_clipsim", 5, "--lambda_gan", 0.5, "--gan_disc_type", "vagan_clip",
              "--max_train_steps", 2, "--eval_freq", 1, "--num_samples_eval", 2, "--track_val_fid",
              "--train_batch_size", *flags)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "slices"))
    assert max(((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-12)).item() for k in one) < 1e-10
    for name, network in judges.items():
        assert all(torch.equal(v.double(), before[name][k].double()) for k, v in network.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert {"l2", "lpips", "clipsim", "gan", "disc", "disc_right_on_real", "disc_right_on_fake", "change", "drift",
            "grad_norm", "val_lpips", "val_clipsim", "val_fid"} <= lines[0].keys()
    best = min(range(2), key=lambda i: lines[i]["val_lpips"])
    kept = load_file(tmp_path / "one" / "best.safetensors")
    assert all(torch.equal(kept[k], one[k]) for k in one) == (best == 1)


def test_weights_that_are_not_here_are_named_with_what_does_without(monkeypatch, capsys, tmp_path, pairs):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for flags, words in [(["--lambda_lpips", 5], ["vgg16", "--lambda_lpips 0"]),
                         (["--lambda_clipsim", 5], ["openai/clip-vit-base-patch32", "--lambda_clipsim 0"]),
                         (["--lambda_gan", 1, "--gan_disc_type", "vagan_clip"], ["--gan_disc_type patch"])]:
        with pytest.raises(SystemExit) as caught:
            train(monkeypatch, "--dataset_folder", pairs, "--output_dir", tmp_path / "run", *SMALL, *flags)
        error = capsys.readouterr().err.splitlines()[-1]
        assert caught.value.code == 2 and all(word in error for word in words), error


def test_training_every_weight_of_a_folder_leaves_its_files_as_they_were_and_needs_no_captions(
        monkeypatch, tmp_path, pairs):
    base, data = tmp_path / "tiny-base", tmp_path / "data"
    bases.save_folder(base, bases.load_base("tiny"))
    subprocess.run(["cp", "-r", pairs, data], check=True)
    for path in data.glob("*.json"):
        path.unlink()
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    train(monkeypatch, "--base", base, "--train", "all", "--dataset_folder", data, "--output_dir", tmp_path / "run",
          *SMALL, "--max_train_steps", 2, "--learning_rate", 1e-3, "--lambda_gan", 0, "--lambda_lpips", 0,
          "--lambda_clipsim", 0)
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    loaded = checkpoints.load_generator(str(tmp_path / "run"))
    changed = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert loaded.prompts == [""] and not torch.equal(loaded.generator.unet.conv_in.weight, changed)


# ------------------------------------------------------------------------------------- the same computation, otherwise


def test_two_processes_accumulation_and_one_batch_are_one_computation(tmp_path, pairs):
    """float64, five steps, all weights: largest difference 1e-10 of the largest value."""
    common = ["--dataset_folder", pairs, "--dtype", "float64", "--max_train_steps", "5", "--num_samples_eval", "1",
              "--viz_freq", "1000", "--device", "cpu", "--lambda_gan", "0.5", "--disc_width", "8", "--resolution", "24"]
    ways = {"one": (["--train_batch_size", 4], 1), "two": (["--train_batch_size", 2], 2),
            "slices": (["--train_batch_size", 2, "--gradient_accumulation_steps", 2], 1)}
    for name, (flags, processes) in ways.items():
        subprocess.run(command(*common, *flags, "--output_dir", tmp_path / name, processes=processes), env=ENV,
                       check=True, capture_output=True)
    one = load_file(tmp_path / "one" / "model.safetensors")
    for name in ("two", "slices"):
        other = load_file(tmp_path / name / "model.safetensors")
        worst = max(((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-12)).item() for k in one)
        assert 0 <= worst < 1e-10, (name, worst)


def killed_at(step: int, folder: pathlib.Path, *argv):
    """Starts a run and kills it, as a power cut would, when its log reaches `step`."""
    process = subprocess.Popen(command(*argv), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < step):
        pass
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_resumed_ends_in_the_same_bits(monkeypatch, tmp_path, pairs):
    flags = ["--dataset_folder", pairs, *SMALL, "--max_train_steps", "8", "--checkpointing_steps", "2"]
    subprocess.run(command(*flags, "--output_dir", tmp_path / "whole"), env=ENV, check=True, capture_output=True)
    killed_at(3, tmp_path / "cut", *flags, "--output_dir", tmp_path / "cut")
    killed_at(6, tmp_path / "cut", "--resume", tmp_path / "cut")
    subprocess.run(command("--resume", tmp_path / "cut"), env=ENV, check=True, capture_output=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_what_is_there_and_says_how_to_go_on(tmp_path, pairs, number):
    folder = tmp_path / "run"
    flags = ["--dataset_folder", pairs, *SMALL, "--output_dir", folder, "--max_train_steps", "1000"]
    process = subprocess.Popen(command(*flags), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and f"go on with --resume {folder}" in error and "Traceback" not in error
    assert training.torch.load(folder / "state.pt", weights_only=True)["step"] >= 1


# ---------------------------------------------------------------------------------------------------------- bad input


def wide(folder):
    Image.new("RGB", (50, 40)).save(folder / "train_B" / "0.png")


def alone(folder):
    (folder / "train_B" / "3.png").unlink()


def no_caption(folder):
    (folder / "train_prompts.json").write_text('{"0.png": "a"}')


def broken_json(folder):
    (folder / "train_prompts.json").write_text('{"0.png": "a",')


def no_picture(folder):
    (folder / "train_A" / "0.png").write_text("<html>")


def cut_picture(folder):
    path = folder / "train_A" / "0.png"
    path.write_bytes(path.read_bytes()[:200])


def no_test(folder):
    (folder / "test_A").rename(folder / "elsewhere")


def empty(folder):
    for path in (folder / "train_A").iterdir():
        path.unlink()


BAD = {  # what is wrong: (the flags, what is done to the folder before, words of the one line)
    "unknown flag": (["--lerning_rate", "1"], None, ["--lerning_rate", "--learning_rate"]),
    "not a number": (["--learning_rate", "fast"], None, ["--learning_rate", "fast"]),
    "unknown choice": (["--gan_disc_type", "vgg"], None, ["--gan_disc_type", "patch"]),
    "flag without meaning": (["--enable_xformers_memory_efficient_attention"], None, ["fused"]),
    "no such folder": (["--dataset_folder", "/nowhere"], None, ["/nowhere", "train_A"]),
    "no such drawing": (["--dataset_folder", "drawn:cats"], None, ["cats", "drawn:scenes"]),
    "no such base": (["--base", "/nowhere"], None, ["/nowhere", "expected a folder"]),
    "base without index": (["--base", "{tmp}"], None, ["model_index.json"]),
    "no such device": (["--device", "warp"], None, ["--device warp"]),
    "unknown preparation": (["--train_image_prep", "crop"], None, ["crop", "resized_crop_N"]),
    "unknown preparation of drawings": (["--train_image_prep", "crop", "--dataset_folder", "drawn:scenes"], None,
                                        ["crop", "resized_crop_N"]),
    "resume from nothing": (["--resume", "/nowhere"], None, ["/nowhere", "config.json"]),
    "sizes without a latent": (["--train_image_prep", "resized_crop_17"], None, ["17x17", "multiples of"]),
    "batch of nothing": (["--train_batch_size", "0"], None, ["--train_batch_size", "1 or more"]),
    "no steps": (["--max_train_steps", "-1"], None, ["--max_train_steps", "1 or more"]),
    "rank of nothing": (["--train", "lora", "--lora_rank_unet", "0"], None, ["--lora_rank_unet", "1 or more"]),
    "sizes of a pair differ": ([], wide, ["0.png", "50x40", "32x40"]),
    "partner missing": ([], alone, ["3.png", "partner"]),
    "caption missing": ([], no_caption, ["train_prompts.json", "1.png"]),
    "captions cut": ([], broken_json, ["train_prompts.json", "line 1"]),
    "not a picture": ([], no_picture, ["0.png", "not a picture"]),
    "picture cut": ([], cut_picture, ["0.png"]),
    "no test pictures": ([], no_test, ["test_A"]),
    "empty folder": ([], empty, ["train_A", "no picture"]),
    "run in the way": (["--output_dir", "{taken}"], None, ["holds a run already", "--resume"]),
    "report to nobody": (["--report_to", "printer"], None, ["--report_to printer", "tensorboard"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(monkeypatch, capsys, tmp_path, pairs, case):
    flags, spoil, words = BAD[case]
    folder, taken = tmp_path / "data", tmp_path / "taken"
    subprocess.run(["cp", "-r", pairs, folder], check=True)
    taken.mkdir()
    (taken / "state.pt").write_text("{}")
    if spoil:
        spoil(folder)
    flags = [f.format(tmp=tmp_path, taken=taken) for f in flags]
    defaults = [] if "--resume" in flags else ["--dataset_folder", folder, "--output_dir", tmp_path / "run", *SMALL]
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, *defaults, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line or "Traceback" in line]
    assert caught.value.code == 2 and len(lines) == 1 and "Traceback" not in lines[0]
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.glob("**/*.tmp")) and not list(tmp_path.glob("**/*.safetensors"))
    assert (taken / "state.pt").read_text() == "{}"


def test_a_loss_that_is_no_number_stops_at_once_and_keeps_the_last_state(monkeypatch, capsys, tmp_path, pairs):
    real = F.mse_loss

    def failing(a, b, calls=[0]):  # noqa: B006  the list counts the calls
        calls[0] += 1
        return real(a, b) * (float("nan") if calls[0] == 4 else 1)

    monkeypatch.setattr(trainer.F, "mse_loss", failing)
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, "--dataset_folder", pairs, "--output_dir", tmp_path / "run", *SMALL,
              "--checkpointing_steps", "1")
    assert caught.value.code == 2
    assert "step 3: the loss became {'l2': nan} on" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3
