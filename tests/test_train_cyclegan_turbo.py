"""The unpaired trainer: its losses, and runs on two small domains as users start them."""

# ruff: noqa: F811  (a fixture is imported, and arguments have its name)

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trainer_helpers as helpers
from conftest import normal, relative
from PIL import Image
from safetensors.torch import load_file
from test_cyclegan_turbo import Official
from torch import nn
from trainer_helpers import metric_networks  # noqa: F401  (a fixture)

import train_cyclegan_turbo as trainer
import training
from dataset.folders import open_unpaired
from dataset.loader import batches
from files import bases, checkpoints
from models.cyclegan_turbo import from_official

SMALL = ["--validation_num_images", "1", "--viz_freq", "1000", "--device", "cpu"]
SMALL += ["--resolution", "24", "--disc_width", "8"]
ONE_PICTURE = [*SMALL, "--train_batch_size", "1"]


def train(monkeypatch, *argv):
    helpers.train(monkeypatch, trainer, *argv)


@pytest.fixture(scope="module")
def domains(tmp_path_factory) -> Path:
    """An unpaired data set of noise: five dark pictures in A, four bright ones in B."""
    folder = tmp_path_factory.mktemp("domains")
    rng = np.random.default_rng(0)
    for side, count in [("A", 5), ("B", 4)]:
        (folder / f"fixed_prompt_{side.lower()}.txt").write_text(f"a picture of {side}")
        darkest = 128 if side == "B" else 0
        for split in ("train", "test"):
            (folder / f"{split}_{side}").mkdir()
            for i in range(count):
                levels = rng.integers(0, 128, (30, 26, 3)) + darkest
                picture = Image.fromarray(levels.astype(np.uint8))
                picture.save(folder / f"{split}_{side}" / f"{side}{i}.png")
    return folder


# ----------------------------------------------------------------------------------- losses

def test_losses_are_their_formulas():
    a, b = normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=1)
    for loss in (trainer.cycle_loss, trainer.identity_loss):
        x = a.clone().requires_grad_()
        value = loss(x, b)
        value.backward()
        assert torch.allclose(value, (a - b).abs().mean(), rtol=1e-12)
        assert torch.allclose(x.grad, (a - b).sign() / a.numel(), rtol=1e-12)
    for kind, label in [("multilevel_sigmoid", 1.0), ("multilevel_sigmoid_s", 0.8)]:
        cfg = trainer.Config(gan_loss_type=kind)
        real, fake = a.clone().requires_grad_(), b.clone().requires_grad_()
        trainer.discriminator_loss([real], [fake], cfg).backward()
        assert torch.allclose(real.grad, 0.5 * (torch.sigmoid(a) - label) / a.numel(), rtol=1e-9)
        assert torch.allclose(fake.grad, 0.5 * torch.sigmoid(b) / b.numel(), rtol=1e-9)


def toy_problem():
    """Settings with a weight of its own for each loss, and what cyclegan_losses takes."""
    cfg = trainer.Config(lambda_cycle=2, lambda_cycle_lpips=3, lambda_gan=5, lambda_idt=7)
    cfg.lambda_idt_lpips = 11
    scale = nn.Parameter(normal(3, 1, 1))

    def G(picture, direction, noise):
        return torch.tanh(scale * picture + {"a2b": 0.5, "b2a": -0.5}[direction] + noise)

    def D(picture):
        return [picture, picture.square()]

    def lpips(one, other):
        return (one - other).square().mean((1, 2, 3))

    noises = {name: normal(1, seed=i) for i, name in enumerate(["fake", "returned", "same"])}
    return cfg, scale, G, D, lpips, noises


@pytest.mark.parametrize("direction, back", [("a2b", "b2a"), ("b2a", "a2b")])
def test_cyclegan_losses_are_the_weighted_terms_and_gradients_of_one_joint_graph(direction, back):
    cfg, scale, G, D, lpips, noises = toy_problem()
    x = normal(2, 3, 8, 8)
    terms = {}
    fake = G(x, direction, noises["fake"])
    for name, loss in trainer.cyclegan_losses(G, D, x, fake, direction, noises, cfg, lpips):
        terms[name] = loss.detach()
        loss.backward()

    fake = G(x, direction, noises["fake"])
    returned, same = G(fake, back, noises["returned"]), G(x, back, noises["same"])
    cycle = 2 * (returned - x).abs().mean() + 3 * lpips(returned, x).mean()
    gan = -5 * sum(F.logsigmoid(level).mean() for level in D(fake))
    idt = 7 * (same - x).abs().mean() + 11 * lpips(same, x).mean()
    for name, term in dict(cycle=cycle, gan=gan, idt=idt).items():
        assert relative(terms[name], term) < 1e-12, name
    joint = torch.autograd.grad(cycle + gan + idt, scale)[0]
    assert list(terms) == ["cycle", "gan", "idt"] and relative(scale.grad, joint) < 1e-12


def test_cyclegan_losses_do_without_a_discriminator_and_lpips_and_want_a_backward_for_each():
    cfg, _, G, _, _, noises = toy_problem()
    x = normal(2, 3, 8, 8)
    fake = G(x, "a2b", noises["fake"])
    losses = trainer.cyclegan_losses(G, None, x, fake, "a2b", noises, cfg)
    name, loss = next(losses)
    wanted = 2 * (G(fake, "b2a", noises["returned"]) - x).abs().mean()
    assert name == "cycle" and relative(loss, wanted) < 1e-12
    with pytest.raises(ValueError, match="call backward on each loss before asking for the next"):
        next(losses)


def test_gradients_of_a_step_are_those_of_one_joint_backward(monkeypatch, tmp_path, domains):
    """A step's generator gradients, loss by loss, are those of the sum of the paper's losses."""
    steps, made = [], dict(CycleGANTurbo=[], PatchDiscriminator=[])

    def record(parameters):
        steps.append([p.grad.clone() for p in parameters])

    def recorded(name):
        cls = getattr(trainer, name)

        def build(*args, **kwargs):
            made[name].append(cls(*args, **kwargs))
            return made[name][-1]

        monkeypatch.setattr(trainer, name, build)

    for name in made:
        recorded(name)
    monkeypatch.setattr(training.run, "average_gradients", record)
    # Nothing moves, so that the graph can be built again.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    monkeypatch.setattr(trainer, "spectral_step", lambda discriminators: None)
    flags = ["--train", "lora", "--dataset_folder", domains, *ONE_PICTURE]
    flags += ["--dtype", "float64", "--max_train_steps", "1", "--lambda_gan", "0.5"]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")

    generator, (d_a, d_b) = made["CycleGANTurbo"][0], made["PatchDiscriminator"]
    base = bases.load_base("tiny", dtype=torch.float64)
    cfg = trainer.Config(**trainer.TINY)
    prep = "resize_26_randomcrop_24x24_hflip"
    batch = next(batches(open_unpaired(domains, "train", prep), 1, 42))
    x = {domain: batch[domain].double() for domain in "ab"}
    captions = dict(a2b="a picture of B", b2a="a picture of A")
    context = {name: base.encode([caption])[0] for name, caption in captions.items()}

    def translate(picture, direction, purpose):
        noise = torch.randn(1, 4, 6, 6, generator=training.rng(42, 0, purpose)).double()
        return generator(picture, context[direction], direction, latent_noise=noise)

    total = 0
    for there, back, domain, D in [("a2b", "b2a", "a", d_b), ("b2a", "a2b", "b", d_a)]:
        fake = translate(x[domain], there, there)
        returned = translate(fake, back, f"{there} {back}")
        same = translate(x[domain], back, f"{domain} identity")
        total = total + cfg.lambda_cycle * (returned - x[domain]).abs().mean()
        total = total + cfg.lambda_idt * (same - x[domain]).abs().mean()
        total = total - 0.5 * F.logsigmoid(D(fake)[0]).mean()
    trained = [p for p in generator.parameters() if p.requires_grad]
    joint = torch.autograd.grad(total, trained)
    assert len(joint) == len(steps[0]) and max(g.abs().max() for g in joint) > 0
    for one, whole in zip(steps[0], joint):
        assert (one - whole).abs().max() <= 1e-9 * max(whole.abs().max(), 1e-12)


# ------------------------------------------------------------------------------- who learns

@pytest.mark.parametrize(
    "flags",
    [
        ["--train", "lora"],
        ["--train", "lora", "--skips", "off"],
        ["--train", "lora", "--conv_in", "off"],
        ["--train", "all"],
    ],
    ids=["lora", "no skips", "conv_in frozen", "all"],
)
def test_three_steps_change_all_that_trains_and_nothing_else(monkeypatch, tmp_path, domains, flags):
    made, calls, average = [], [], training.average_gradients

    def recorded(name):
        cls = getattr(trainer, name)

        def build(*args, **kwargs):
            network = cls(*args, **kwargs)
            before = {k: v.detach().clone() for k, v in network.named_parameters()}
            made.append((name, network, before))
            return network

        monkeypatch.setattr(trainer, name, build)

    recorded("CycleGANTurbo")
    recorded("PatchDiscriminator")

    def watch(parameters):
        parameters = list(parameters)
        calls.append(len(parameters))
        # Generator and discriminators take turns.
        idle = "PatchDiscriminator" if len(calls) % 2 else "CycleGANTurbo"
        for name, network, _ in made:
            if name == idle:
                assert all(p.grad is None for p in network.parameters())
        assert all(p.grad is not None for p in parameters) or "all" in flags
        average(parameters)

    monkeypatch.setattr(training.run, "average_gradients", watch)
    more = ["--max_train_steps", 3, "--lr_warmup_steps", 1, "--lr_scheduler", "constant"]
    more += ["--dataset_folder", domains, *ONE_PICTURE, "--output_dir", tmp_path / "run"]
    train(monkeypatch, *flags, *more)
    assert len(calls) == 6 and len(made) == 3
    for name, network, before in made:
        for k, p in network.named_parameters():
            trains = p.requires_grad or name == "PatchDiscriminator"
            assert torch.equal(p, before[k]) != trains, (name, k)
            if k == "unet.conv_in.weight":
                assert p.requires_grad == ("--conv_in" not in flags)


def test_half_precision_shows_the_discriminators_fake_and_real_pictures_alike(
    monkeypatch, tmp_path, domains
):
    seen, forward = [], trainer.PatchDiscriminator.forward

    def watched(D, x, *args, **kwargs):
        seen.append(x.dtype)
        return forward(D, x, *args, **kwargs)

    monkeypatch.setattr(trainer.PatchDiscriminator, "forward", watched)
    flags = ["--train", "lora", "--mixed_precision", "bf16", "--dataset_folder", domains]
    flags += [*ONE_PICTURE, "--max_train_steps", "1", "--output_dir", tmp_path / "run"]
    train(monkeypatch, *flags)
    assert seen == [torch.float32] * 6


def test_domains_may_be_of_different_sizes(monkeypatch, capsys, tmp_path, domains):
    folder = tmp_path / "data"
    shutil.copytree(domains, folder)
    for path in folder.glob("*/*.png"):
        size = (32, 24) if path.name[0] == "A" else (24, 40)
        Image.open(path).resize(size).save(path)
    flags = ["--dataset_folder", folder, *ONE_PICTURE, "--max_train_steps", "2"]
    flags += ["--train_img_prep", "no_resize", "--val_img_prep", "no_resize"]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert len(helpers.read_log(tmp_path / "run")) == 2
    # A grid has pictures of one size, so there is none.
    assert "there will be no sample grids" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("samples/*.png"))


# ------------------------------------------------------------------------------ what is told

def test_the_log_shows_copying_and_the_discriminators_state(monkeypatch, tmp_path, domains):
    flags = ["--dataset_folder", domains, *ONE_PICTURE, "--max_train_steps", "2"]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    last = helpers.read_log(tmp_path / "run")[-1]
    losses = {"cycle", "idt", "gan", "disc", "grad_norm"}
    signals = {"disc_right_on_real", "disc_right_on_fake", "val_change_a2b"}
    assert losses | signals <= last.keys()
    assert 0 <= last["disc_right_on_real"] <= 1 and last["val_change_a2b"] > 0
    assert (tmp_path / "run" / "samples" / "000001.png").exists()


def test_all_losses_and_both_measures_train_in_slices_as_in_one_batch(
    monkeypatch, tmp_path, domains, metric_networks
):
    flags = ["--dataset_folder", domains, *SMALL, "--dtype", "float64", "--gan_augment"]
    flags += ["--lambda_cycle_lpips", 10, "--lambda_idt_lpips", 1]
    flags += ["--gan_disc_type", "vagan_clip", "--max_train_steps", 2, "--track_val_fid"]
    flags += ["--validation_steps", 1, "--validation_num_images", 2]
    ways = {"one": [2], "slices": [1, "--gradient_accumulation_steps", 2]}
    for name, batch in ways.items():
        folder = tmp_path / name
        train(monkeypatch, *flags, "--train_batch_size", *batch, "--output_dir", folder)
    assert helpers.largest_difference(tmp_path / "one", tmp_path / "slices") < 1e-10
    lines = helpers.read_log(tmp_path / "one")
    fids = [line["val_fid_a2b"] + line["val_fid_b2a"] for line in lines]
    assert all(line["val_structure_a2b"] > 0 for line in lines)
    # best.safetensors is of the best validation.
    last = load_file(tmp_path / "one" / "model.safetensors")
    kept = load_file(tmp_path / "one" / "best.safetensors")
    assert all(torch.equal(kept[k], last[k]) for k in last) == (fids[1] < fids[0])


def test_drawn_worlds_know_the_true_translation(monkeypatch, tmp_path):
    train(monkeypatch, "--output_dir", tmp_path / "run", *ONE_PICTURE, "--max_train_steps", "1")
    last = helpers.read_log(tmp_path / "run")[-1]
    assert last["val_psnr_unchanged_a2b"] < 12 and "val_psnr_b2a" in last
    assert (tmp_path / "run" / "best.safetensors").exists()


# ------------------------------------------------------------------------ the discriminators

def test_each_discriminator_sees_pictures_of_its_own_domain(monkeypatch, tmp_path, domains):
    seen = []
    made = []
    translate_batch = trainer.translate_batch
    discriminate = trainer.discriminate

    def watched(nets, run, x, direction, noise=None):
        made.append((direction, translate_batch(nets, run, x, direction, noise)))
        return made[-1][1]

    def shown(D, domain, run, step, rows, real, fake):
        seen.append((domain, real.mean() > 0, fake))
        return discriminate(D, domain, run, step, rows, real, fake)

    monkeypatch.setattr(trainer, "translate_batch", watched)
    monkeypatch.setattr(trainer, "discriminate", shown)
    flags = ["--dataset_folder", domains, *ONE_PICTURE, "--max_train_steps", 1]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    (b, b_is_bright, to_b), (a, a_is_bright, to_a) = seen
    assert (b, a) == ("b", "a") and b_is_bright and not a_is_bright  # domain A is dark
    # The first of three passes of each direction.
    assert (made[0][0], made[3][0]) == ("a2b", "b2a")
    assert torch.equal(made[0][1], to_b) and torch.equal(made[3][1], to_a)


def test_a_discriminator_tells_real_from_fake_with_the_weight_of_the_flag():
    real, fake = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    run = SimpleNamespace(cfg=trainer.Config(lambda_gan=3, gan_augment=False))
    loss, _ = trainer.discriminate({"b": lambda x: [x]}, "b", run, 0, [0, 1], real, fake)
    wanted = 3 * 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    assert relative(loss, wanted) < 1e-12


def test_real_and_fake_pictures_are_augmented_each_with_its_own_draws():
    given = []

    def D(x, draws=None):
        given.append(draws)
        return [x]

    run = SimpleNamespace(cfg=trainer.Config(gan_augment=True), global_batch=4)
    trainer.discriminate({"b": D}, "b", run, 0, [1, 3], normal(2, 1), normal(2, 1))
    real, fake = given
    assert real["shift_x"].shape == (2,) and not torch.equal(real["shift_x"], fake["shift_x"])


def test_the_best_validation_has_the_highest_psnr_or_the_lowest_distance(monkeypatch):
    scores = []
    run = SimpleNamespace(improves=scores.append)
    psnr = {"val_psnr_a2b": 20, "val_psnr_b2a": 10}
    fid = {"val_fid_a2b": 5, "val_fid_b2a": 7}
    for values in (psnr, fid, {}):
        monkeypatch.setattr(trainer, "validate", lambda *_, values=values: values)
        trainer.validate_and_keep_best(None, run, None)
    assert scores == [-15, 6, math.inf]


# ---------------------------------------------------------------- one computation, many ways

def test_killed_half_way_and_resumed_ends_in_the_same_bits(monkeypatch, tmp_path, domains):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--dataset_folder", domains, *ONE_PICTURE, "--lr_scheduler", "constant"]
    train(monkeypatch, *flags, "--max_train_steps", 4, "--output_dir", whole)
    flags += ["--checkpointing_steps", 1]
    helpers.kill_at(2, cut, trainer, *flags, "--max_train_steps", 1000, "--output_dir", cut)
    train(monkeypatch, "--resume", cut, "--max_train_steps", 4)
    helpers.assert_same_bits(whole, cut)


def test_two_processes_and_accumulation_are_one_computation(monkeypatch, tmp_path, domains):
    flags = ["--dataset_folder", domains, *SMALL, "--dtype", "float64", "--max_train_steps", 3]
    folders = helpers.train_in_three_ways(monkeypatch, trainer, tmp_path, 2, *flags)
    assert helpers.largest_difference(folders["one"], folders["two"]) < 1e-10
    assert helpers.largest_difference(folders["one"], folders["slices"]) < 1e-10


def test_resuming_wants_the_same_text_encoder_and_lets_intervals_change(
    monkeypatch, capsys, tmp_path, domains
):
    base, run = bases.load_base("tiny", dtype=torch.float32, seed=0), tmp_path / "run"
    bases.save_folder(tmp_path / "base", base)
    flags = ["--base", tmp_path / "base", "--dataset_folder", domains, *ONE_PICTURE]
    flags += ["--lambda_cycle_lpips", 0, "--lambda_idt_lpips", 0, "--gan_disc_type", "patch"]
    train(monkeypatch, *flags, "--max_train_steps", 1, "--output_dir", run)
    train(monkeypatch, "--resume", run, "--max_train_steps", 2, "--validation_steps", 2)
    next(base.text_encoder.parameters()).data.mul_(2)
    bases.save_folder(tmp_path / "base", base)
    with pytest.raises(SystemExit):
        train(monkeypatch, "--resume", run, "--max_train_steps", 3)
    assert "fingerprint" in capsys.readouterr().err
    assert helpers.read_log(run)[-1]["step"] == 2


def test_a_validation_that_fails_costs_no_step(monkeypatch, capsys, tmp_path, domains):
    flags = ["--dataset_folder", domains, *ONE_PICTURE]
    runs = helpers.train_with_failing_validation(monkeypatch, trainer, tmp_path, *flags)
    assert "error: a test picture cannot be read" in capsys.readouterr().err
    helpers.assert_same_bits(*runs)


def test_a_run_begun_under_older_names_of_settings_goes_on(monkeypatch, tmp_path, domains):
    run = tmp_path / "run"
    flags = ["--dataset_folder", domains, *ONE_PICTURE, "--max_train_steps", 1]
    old = ["--train_img_prep", "resize_24", "--val_img_prep", "resize_24", "--eval_freq", 1]
    train(monkeypatch, *flags, *old, "--num_training_epochs", 2, "--output_dir", run)
    settings = helpers.read_settings(run)
    assert settings["train_image_prep"] == "resize_24" and settings["max_train_epochs"] == 2
    helpers.rename_settings(
        run,
        train_image_prep="train_img_prep",
        test_image_prep="val_img_prep",
        max_train_epochs="num_training_epochs",
    )
    train(monkeypatch, "--resume", run, "--max_train_steps", 2)
    changed = dict(max_train_steps=2, resume=str(run))
    assert helpers.read_settings(run) == settings | changed
    assert ["val_change_a2b" in line for line in helpers.read_log(run)] == [True, True]


def test_runs_with_these_flags_resume_to_the_same_bits(monkeypatch, tmp_path, domains):
    whole, cut, start = tmp_path / "whole", tmp_path / "cut", tmp_path / "start.safetensors"
    shutil.copy(checkpoints.find_checkpoint("day2night"), start)
    flags = ["--base", "tiny-turbo", "--init", start, "--timestep", 199]
    flags += ["--dataset_folder", domains, *ONE_PICTURE, "--lr_scheduler", "constant"]
    train(monkeypatch, *flags, "--max_train_steps", 2, "--output_dir", whole)
    train(monkeypatch, *flags, "--max_train_steps", 1, "--output_dir", cut)
    start.unlink()  # a resumed run needs only its own folder
    train(monkeypatch, "--resume", cut, "--max_train_steps", 2)
    helpers.assert_same_bits(whole, cut)


# ----------------------------------------------------------------- starting from a checkpoint

def test_a_new_run_starts_from_the_weights_of_a_named_checkpoint(
    monkeypatch, capsys, tmp_path, domains
):
    run, adapter = tmp_path / "run", checkpoints.find_checkpoint("day2night")
    flags = ["--base", "tiny-turbo", "--init", "day2night", "--dataset_folder", domains]
    # At a learning rate of 0 the weights stay what they were.
    flags += [*ONE_PICTURE, "--learning_rate", 0, "--max_train_steps", 1, "--timestep", 500]
    train(monkeypatch, *flags, "--output_dir", run)
    note = f"starting from {adapter}, which was trained at timestep 999\n"
    assert note in capsys.readouterr().err
    before, after = load_file(adapter), load_file(run / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].float()) for name in before)
    assert checkpoints.load_generator(str(run)).generator.config.timestep == 500
    assert helpers.read_settings(run)["init"] == "day2night"


@torch.no_grad()
def test_an_official_file_trains_on_and_is_read_by_the_official_code_again(
    monkeypatch, tmp_path, domains
):
    official, run = Official(tmp_path / "official"), tmp_path / "run"
    torch.save(official.saved(), official.pkl)
    context = bases.load_base(str(official.base)).encode(["a picture of B"])[0]
    args = (normal(1, 3, 16, 24).tanh(), context, "a2b")
    before = official(*args)
    flags = ["--base", official.base, "--init", official.pkl, "--dataset_folder", domains]
    flags += ["--lora_rank_unet", 6, "--dtype", "float64", *ONE_PICTURE]
    flags += ["--lambda_cycle_lpips", 0, "--lambda_idt_lpips", 0, "--lambda_gan", 0]
    with torch.enable_grad():
        train(monkeypatch, *flags, "--max_train_steps", 10, "--output_dir", run)

    tensors = load_file(run / "model.safetensors")
    # An official file has no conv_in: it was the base's, and ours trains it and saves it.
    for leaf, place in official.unet.conv_in.base_layer.named_parameters():
        trained = tensors.pop(f"unet.conv_in.{leaf}")
        assert 0 < relative(trained, place) < 0.1
        place.copy_(trained)
    _, places = from_official(official.saved(), "")
    assert places.keys() == tensors.keys()
    for name, place in places.items():
        place.copy_(tensors[name])
    ours = checkpoints.load_generator(str(run)).generator(*args)
    assert relative(ours, official(*args)) < 1e-9
    assert 1e-5 < relative(ours, before) < 0.3  # ten steps at 1e-5 change a little


# -------------------------------------------------------------------------------- bad input

def without_second_domain(folder):
    shutil.rmtree(folder / "train_B")


def without_caption(folder):
    (folder / "fixed_prompt_b.txt").unlink()


def without_pictures(folder):
    for path in (folder / "test_A").iterdir():
        path.unlink()


def with_a_text_for_a_picture(folder):
    (folder / "train_A" / "A0.png").write_text("x")


# What is wrong: what is done to the folder before, the flags, and words of the one line.
BAD = {
    "no second domain": (without_second_domain, [], ["train_B"]),
    "no caption": (without_caption, [], ["fixed_prompt_b.txt"]),
    "no picture": (without_pictures, [], ["test_A", "no picture"]),
    "not a picture": (with_a_text_for_a_picture, [], ["A0.png", "not a picture"]),
    "too small for patches": (None, ["--resolution", "16"], ["16x16", "--lambda_gan 0"]),
    "no such drawing": (
        None,
        ["--dataset_folder", "drawn:squares"],
        ["squares", "drawn:day2night"],
    ),
    "a base without VAE": (None, ["--base", "pixels"], ["Identity", "AutoencoderKL"]),
    "no loss": (
        None,
        ["--lambda_cycle", "0", "--lambda_idt", "0", "--lambda_gan", "0"],
        ["--lambda_cycle", "--lambda_gan", "are 0; expected a loss"],
    ),
    "the paired trainer's flag": (None, ["--lambda_l2", "1"], ["--lambda_l2", "unknown"]),
    "a frozen conv_in of all weights": (
        None,
        ["--train", "all", "--conv_in", "off"],
        ["--conv_in off has no meaning with --train all"],
    ),
    "a preparation of drawings": (
        None,
        ["--dataset_folder", "drawn:day2night", "--train_image_prep", "resize_16"],
        ["drawn:day2night is drawn in the size of --resolution"],
    ),
    "timestep of none": (None, ["--timestep", "1000"], ["timestep is 1000", "0 to 999"]),
    "init of another kind": (
        None,
        ["--base", "tiny-turbo", "--init", "edges2scene"],
        ["edges2scene", "pix2pix_turbo", "train_pix2pix_turbo.py"],
    ),
    "init of another base": (
        None,
        ["--init", "day2night", "--train", "lora"],
        ["trained on the base tiny-turbo", "--base tiny-turbo"],
    ),
    "init of another rank": (
        None,
        ["--base", "tiny-turbo", "--init", "day2night", "--lora_rank_unet", "8"],
        ["lora_rank_unet 4 (this run: 8)"],
    ),
    "init with skips, which are off": (
        None,
        ["--base", "tiny-turbo", "--init", "day2night", "--skips", "off"],
        ["skips on (this run: off)"],
    ),
    "neither on nor off": (None, ["--skips", "maybe"], ["--skips", "on or off"]),
    "unknown discriminator": (None, ["--gan_disc_type", "vgg"], ["--gan_disc_type", "patch"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(
    monkeypatch, capsys, tmp_path, domains, case
):
    spoil, flags, words = BAD[case]
    folder = tmp_path / "data"
    shutil.copytree(domains, folder)
    if spoil:
        spoil(folder)
    run = ["--dataset_folder", folder, "--output_dir", tmp_path / "run", *ONE_PICTURE]
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, *run, *flags)
    lines = helpers.error_lines(capsys.readouterr().err)
    assert caught.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines
    helpers.assert_nothing_half_written(tmp_path)
