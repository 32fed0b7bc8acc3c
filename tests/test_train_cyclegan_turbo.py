"""The unpaired trainer, run as users run it, on two small domains."""

import json
import pathlib
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train_pix2pix_turbo import ENV, ROOT, assert_same_bits, from_nothing, judges  # noqa: F401

import train_cyclegan_turbo as trainer
import training

torch.set_num_threads(1)
SMALL = ["--train_batch_size", "1", "--validation_num_images", "1", "--viz_freq", "1000", "--device", "cpu",
         "--resolution", "24", "--disc_width", "8"]


def command(*argv, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *torchrun, str(ROOT / "train_cyclegan_turbo.py"), *from_nothing(argv)]


def train(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train_cyclegan_turbo.py", *from_nothing(argv)])
    monkeypatch.setattr(training, "catch_stop", lambda: lambda: False)
    training.run(trainer.main)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(0)
    for side, n in [("A", 5), ("B", 4)]:
        (folder / f"fixed_prompt_{side.lower()}.txt").write_text(f"a picture of {side}")
        for split in ("train", "test"):
            (folder / f"{split}_{side}").mkdir()
            for i in range(n):
                pixels = rng.integers(0, 128, (30, 26, 3), np.uint8) + (128 if side == "B" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}_{side}" / f"{side}{i}.png")
    return folder


def test_losses_are_their_formulas():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    for loss in (trainer.cycle_loss, trainer.identity_loss):
        x = a.clone().requires_grad_()
        value = loss(x, b)
        value.backward()
        assert torch.allclose(value, (a - b).abs().mean(), rtol=1e-12)
        assert torch.allclose(x.grad, (a - b).sign() / a.numel(), rtol=1e-12)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    trainer.discriminator_loss([x], [y], 1.0).backward()
    assert torch.allclose(x.grad, 0.5 * (torch.sigmoid(a) - 1) / a.numel(), rtol=1e-9)
    assert torch.allclose(y.grad, 0.5 * torch.sigmoid(b) / b.numel(), rtol=1e-9)


def test_gradients_through_the_cut_are_those_of_one_joint_backward(monkeypatch, tmp_path, domains):
    """A step's generator gradients, piece by piece, are those of the sum of the paper's losses in one graph."""
    pieces, made = [], dict(CycleGANTurbo=[], PatchDiscriminator=[])
    monkeypatch.setattr(training, "average_gradients",
                        lambda parameters: pieces.append([p.grad.clone() for p in parameters]))

    def build(cls, name, *args, **kwargs):
        made[name].append(cls(*args, **kwargs))
        return made[name][-1]

    for name in made:
        monkeypatch.setattr(trainer, name, partial(build, getattr(trainer, name), name))
    monkeypatch.setattr(trainer.weights, "save_generator", lambda path, *a, **k: path.write_text(""))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)  # so the graph can be built again
    monkeypatch.setattr(trainer, "spectral_step", lambda discriminators: None)
    train(monkeypatch, "--train", "lora", "--dataset_folder", domains, "--output_dir", tmp_path / "run", *SMALL,
          "--dtype", "float64", "--max_train_steps", "1", "--lambda_gan", "0.5")

    generator, (d_a, d_b) = made["CycleGANTurbo"][0], made["PatchDiscriminator"]
    base = trainer.weights.load_base("tiny", dtype=torch.float64)
    cfg = trainer.Config(**{**trainer.TINY, "resolution": 24, "train": "lora", "lambda_gan": 0.5})
    prep = "resize_26_randomcrop_24x24_hflip"
    batch = next(trainer.data.batches(trainer.data.open_unpaired(domains, "train", prep), 1, 42))
    x = {k: batch[k].double() for k in "ab"}
    context = dict(a2b=base.text_encoder(base.tokenizer("a picture of B")),
                   b2a=base.text_encoder(base.tokenizer("a picture of A")))

    def go(picture, direction, noise):
        noise = torch.randn(1, 4, 6, 6, generator=training.rng(42, 0, noise)).double()
        return generator(picture, context[direction], direction, latent_noise=noise)

    total = 0
    for there, back, here, judge in [("a2b", "b2a", "a", d_b), ("b2a", "a2b", "b", d_a)]:
        fake = go(x[here], there, there)
        total = total + cfg.lambda_cycle * (go(fake, back, f"{there} {back}") - x[here]).abs().mean()
        total = total + cfg.lambda_idt * (go(x[here], back, f"{here} identity") - x[here]).abs().mean()
        total = total - cfg.lambda_gan * torch.log(torch.sigmoid(judge(fake)[0])).mean()
    joint = torch.autograd.grad(total, [p for p in generator.parameters() if p.requires_grad])
    assert len(joint) == len(pieces[0]) and max(g.abs().max() for g in joint) > 0
    for piece, whole in zip(pieces[0], joint):
        assert (piece - whole).abs().max() <= 1e-9 * max(whole.abs().max(), 1e-12)


@pytest.mark.parametrize("flags", [["--train", "lora"], ["--train", "lora", "--skips", "off"],
                                   ["--train", "lora", "--conv_in", "off"], ["--train", "all"]],
                         ids=["lora", "no skips", "conv_in frozen", "all"])
def test_ten_steps_change_all_that_trains_and_nothing_else(monkeypatch, tmp_path, domains, flags):
    made, calls, average = [], [], training.average_gradients

    def recorded(name):
        cls = getattr(trainer, name)

        def build(*args, **kwargs):
            network = cls(*args, **kwargs)
            made.append((name, network, {k: v.detach().clone() for k, v in network.named_parameters()}))
            return network

        monkeypatch.setattr(trainer, name, build)

    recorded("CycleGANTurbo")
    recorded("PatchDiscriminator")

    def watch(parameters):
        parameters = list(parameters)
        calls.append(len(parameters))
        idle = "PatchDiscriminator" if len(calls) % 2 else "CycleGANTurbo"  # generator and discriminators take turns
        assert all(p.grad is None for name, network, _ in made if name == idle for p in network.parameters())
        assert all(p.grad is not None for p in parameters) or "all" in flags
        average(parameters)

    monkeypatch.setattr(training, "average_gradients", watch)
    train(monkeypatch, *flags, "--dataset_folder", domains, "--output_dir", tmp_path / "run", *SMALL,
          "--max_train_steps", 10, "--lr_warmup_steps", 1, "--lr_scheduler", "constant")
    assert len(calls) == 20 and len(made) == 3
    for name, network, before in made:
        for k, p in network.named_parameters():
            assert torch.equal(p, before[k]) != (p.requires_grad or name == "PatchDiscriminator"), (name, k)
            assert k != "unet.conv_in.weight" or p.requires_grad == ("--conv_in" not in flags)


def test_killed_half_way_and_resumed_ends_in_the_same_bits(tmp_path, domains):
    flags = ["--dataset_folder", domains, *SMALL, "--lr_scheduler", "constant"]
    quiet = dict(env=ENV, check=True, capture_output=True)
    for name, steps in [("whole", 4), ("cut", 2)]:
        subprocess.run(command(*flags, "--max_train_steps", steps, "--output_dir", tmp_path / name), **quiet)
    subprocess.run(command("--resume", tmp_path / "cut", "--max_train_steps", "4"), **quiet)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_and_accumulation_are_one_computation(tmp_path, domains):
    common = ["--dataset_folder", domains, *SMALL[2:], "--dtype", "float64", "--max_train_steps", "5"]
    ways = {"one": (["--train_batch_size", 2], 1), "two": (["--train_batch_size", 1], 2),
            "slices": (["--train_batch_size", 1, "--gradient_accumulation_steps", 2], 1)}
    for name, (flags, processes) in ways.items():
        subprocess.run(command(*common, *flags, "--output_dir", tmp_path / name, processes=processes), env=ENV,
                       check=True, capture_output=True)
    one = load_file(tmp_path / "one" / "model.safetensors")
    for name in ("two", "slices"):
        other = load_file(tmp_path / name / "model.safetensors")
        worst = max(((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-12)).item() for k in one)
        assert worst < 1e-10, (name, worst)


def test_the_log_tells_copying_and_the_discriminators_state(monkeypatch, tmp_path, domains):
    train(monkeypatch, "--dataset_folder", domains, "--output_dir", tmp_path / "run", *SMALL, "--max_train_steps", "2")
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"cycle", "idt", "gan", "disc", "grad_norm", "disc_right_on_real", "disc_right_on_fake",
            "val_change_a2b"} <= last.keys()
    assert 0 <= last["disc_right_on_real"] <= 1 and last["val_change_a2b"] > 0
    assert pathlib.Path(tmp_path / "run" / "samples" / "000001.png").exists()


def test_all_losses_of_the_paper_and_both_measures_run_on_judges(monkeypatch, tmp_path, domains, judges):  # noqa: F811
    for name, flags in [("one", ["2"]), ("slices", ["1", "--gradient_accumulation_steps", "2"])]:
        train(monkeypatch, "--dataset_folder", domains, "--output_dir", tmp_path / name, *SMALL[4:],
              "--dtype", "float64", "--lambda_cycle_lpips", 10, "--lambda_idt_lpips", 1, "--gan_augment",
              "--gan_disc_type", "vagan_clip", "--max_train_steps", 2, "--validation_steps", 1,
              "--validation_num_images", 2, "--track_val_fid", "--train_batch_size", *flags)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "slices"))
    assert max(((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-12)).item() for k in one) < 1e-10
    lines = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    fids = [line["val_fid_a2b"] + line["val_fid_b2a"] for line in lines]
    assert all(line["val_structure_a2b"] > 0 for line in lines)
    kept = load_file(tmp_path / "one" / "best.safetensors")
    assert all(torch.equal(kept[k], one[k]) for k in one) == (fids[1] < fids[0])


def test_resuming_asks_for_the_same_text_encoder_and_lets_the_intervals_change(monkeypatch, tmp_path, domains):
    base = trainer.weights.load_base("tiny", dtype=torch.float32, seed=0)
    trainer.weights.save_folder(tmp_path / "base", base)
    train(monkeypatch, "--base", tmp_path / "base", "--dataset_folder", domains, *SMALL, "--lambda_cycle_lpips", 0,
          "--lambda_idt_lpips", 0, "--gan_disc_type", "patch", "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    more = ["--resume", tmp_path / "run", "--max_train_steps", 2, "--validation_steps", 2]
    train(monkeypatch, *more)
    next(base.text_encoder.parameters()).data.mul_(2)
    trainer.weights.save_folder(tmp_path / "base", base)
    with pytest.raises(SystemExit):
        train(monkeypatch, *more[:2], "--max_train_steps", 3)
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_half_precision_shows_the_discriminators_made_and_real_pictures_alike(monkeypatch, tmp_path, domains):
    seen, look = [], trainer.PatchDiscriminator.forward
    monkeypatch.setattr(trainer.PatchDiscriminator, "forward", lambda d, x, *a: seen.append(x.dtype) or look(d, x, *a))
    train(monkeypatch, "--train", "lora", "--mixed_precision", "bf16", "--dataset_folder", domains, *SMALL,
          "--max_train_steps", "1", "--output_dir", tmp_path / "run")
    assert seen == [torch.float32] * 6


def test_domains_may_be_of_different_sizes(monkeypatch, tmp_path, domains):
    folder = tmp_path / "data"
    subprocess.run(["cp", "-r", domains, folder], check=True)
    for path in folder.glob("*/*.png"):
        Image.open(path).resize((32, 24) if path.name[0] == "A" else (24, 40)).save(path)
    train(monkeypatch, "--dataset_folder", folder, *SMALL, "--train_img_prep", "no_resize", "--val_img_prep",
          "no_resize", "--max_train_steps", "2", "--output_dir", tmp_path / "run")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert not [*(tmp_path / "run").glob("samples/*.png")]  # a grid is of one size


BAD = {
    "no second domain": (lambda folder: subprocess.run(["rm", "-r", folder / "train_B"], check=True), [], ["train_B"]),
    "no caption": (lambda folder: (folder / "fixed_prompt_b.txt").unlink(), [], ["fixed_prompt_b.txt"]),
    "no picture": (lambda folder: [p.unlink() for p in (folder / "test_A").iterdir()], [], ["test_A", "no picture"]),
    "not a picture": (lambda folder: (folder / "train_A" / "A0.png").write_text("x"), [], ["A0.png", "not a picture"]),
    "too small for patches": (None, ["--resolution", "16"], ["16x16", "--lambda_gan 0"]),
    "no such drawing": (None, ["--dataset_folder", "drawn:squares"], ["squares", "drawn:day2night"]),
    "the paired trainer's flag": (None, ["--lambda_l2", "1"], ["--lambda_l2", "unknown"]),
    "neither on nor off": (None, ["--skips", "maybe"], ["--skips", "on or off"]),
    "unknown discriminator": (None, ["--gan_disc_type", "vgg"], ["--gan_disc_type", "patch"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(monkeypatch, capsys, tmp_path, domains, case):
    spoil, flags, words = BAD[case]
    folder = tmp_path / "data"
    subprocess.run(["cp", "-r", domains, folder], check=True)
    if spoil:
        spoil(folder)
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, "--dataset_folder", folder, "--output_dir", tmp_path / "run", *SMALL, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line or "Traceback" in line]
    assert caught.value.code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not list(tmp_path.glob("**/*.tmp")) and not list(tmp_path.glob("**/*.safetensors"))


def test_a_drawn_world_knows_how_far_the_truth_is(monkeypatch, tmp_path):
    train(monkeypatch, "--output_dir", tmp_path / "run", *SMALL, "--max_train_steps", "1")
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["val_psnr_doing_nothing_a2b"] < 12 and "val_psnr_b2a" in last
    assert (tmp_path / "run" / "best.safetensors").exists()
