"""The paired trainer: its losses, and runs on small folders as users start them."""

# ruff: noqa: F811  (a fixture is imported, and arguments have its name)

import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trainer_helpers as helpers
from conftest import normal, relative
from PIL import Image
from safetensors.torch import load_file
from test_pix2pix_turbo import Official
from trainer_helpers import metric_networks, pairs  # noqa: F401  (fixtures)

import train_pix2pix_turbo as trainer
import training
from files import bases, checkpoints
from models.lora import ADAPTERS
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig, from_official

QUIET = ["--viz_freq", "1000", "--validation_steps", "1000", "--validation_num_images", "2"]
SMALL = [*QUIET, "--device", "cpu", "--resolution", "24", "--disc_width", "8"]
PAIRS_OF_TWO = [*SMALL, "--train_batch_size", "2"]


def train(monkeypatch, *argv):
    helpers.train(monkeypatch, trainer, *argv)


# ----------------------------------------------------------------------------------- losses

def test_reconstruction_is_the_square_weighted_by_r_and_so_is_its_gradient():
    a, b = normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=1)
    fake = a.clone().requires_grad_()
    loss = trainer.l2_loss(fake, b, 0.3)
    loss.backward()
    assert torch.allclose(loss, 0.3 * ((a - b) ** 2).sum() / a.numel(), rtol=1e-12)
    assert torch.allclose(fake.grad, 0.3 * 2 * (a - b) / a.numel(), rtol=1e-9)


@pytest.mark.parametrize(
    "kind, label", [("multilevel_sigmoid_s", 0.8), ("multilevel_sigmoid", 1.0)]
)
def test_adversarial_losses_are_cross_entropies_and_so_are_their_gradients(kind, label):
    cfg = trainer.Config(gan_loss_type=kind)
    a, b = normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=1)
    fake = a.clone().requires_grad_()
    loss = trainer.generator_gan_loss([fake, fake[:1]], cfg)  # two levels
    loss.backward()
    p = 1 / (1 + torch.exp(-a))
    entropy = -(label * p.log() + (1 - label) * (1 - p).log())
    # The second level is the first picture alone, so a mean over it counts that twice.
    times = torch.tensor([3.0, 1.0]).view(2, 1, 1, 1)
    assert torch.allclose(loss, entropy.mean() + entropy[:1].mean(), rtol=1e-9)
    assert torch.allclose(fake.grad, (p - label) * times / a.numel(), rtol=1e-9)

    real, fake = a.clone().requires_grad_(), b.clone().requires_grad_()
    trainer.discriminator_loss([real], [fake], cfg).backward()
    assert torch.allclose(real.grad, (torch.sigmoid(a) - label) / a.numel(), rtol=1e-9)
    assert torch.allclose(fake.grad, torch.sigmoid(b) / b.numel(), rtol=1e-9)


def gram_by_definition(vgg, picture, target):
    """Difix3D's loss of one picture: its layers, weights and divisors, in sums over channels."""
    def features(x):
        mean = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225], dtype=x.dtype).view(3, 1, 1)
        x = (x * 0.5 + 0.5 - mean) / std
        found = []
        for n in range(30):
            if f"{n}.weight" in vgg:
                x = F.conv2d(x[None], vgg[f"{n}.weight"], vgg[f"{n}.bias"], padding=1)[0]
            elif n in (4, 9, 16, 23):
                x = F.max_pool2d(x, 2)
            else:
                x = x * (x > 0)
            if n in (3, 8, 15, 22, 29):
                found.append(x)
        return found

    total = 0
    weights = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
    for weight, f, g in zip(weights, features(picture), features(target)):
        channels, height, width = f.shape
        error = torch.einsum("chw,dhw->cd", f, f) - torch.einsum("chw,dhw->cd", g, g)
        total = total + weight * (error**2).mean() / (channels * height * width)
    return total


def test_gram_loss_and_its_gradient_are_difix3ds_of_each_picture(metric_networks):
    lpips = metric_networks["lpips"].double()
    x, y = normal(2, 3, 24, 16).tanh().requires_grad_(), normal(2, 3, 24, 16, seed=1).tanh()
    loss = trainer.gram_loss(lpips.vgg_features(x), lpips.vgg_features(y), r=0.3)
    vgg = lpips.features.state_dict()
    wanted = [gram_by_definition(vgg, picture, target) for picture, target in zip(x, y)]
    wanted = 0.3 * torch.stack(wanted).mean()
    assert relative(loss, wanted) < 1e-9
    (ours,), (theirs,) = torch.autograd.grad(loss, x), torch.autograd.grad(wanted, x)
    assert relative(ours, theirs) < 1e-9

    # Only textures count, not where they are; and sums are never taken in half precision.
    turned = [f.flip(2, 3) for f in lpips.vgg_features(y)]
    assert trainer.gram_loss(turned, lpips.vgg_features(y), r=1.0) < 1e-12 * wanted
    large = [200 * normal(1, 3, 4, 4, dtype=torch.float32)]
    with torch.autocast("cpu", torch.float16):
        half = trainer.gram_loss(large, [0 * large[0]], r=1.0)
    assert torch.equal(half, trainer.gram_loss(large, [0 * large[0]], r=1.0))


def test_lpips_and_gram_loss_share_one_pass_through_vgg(metric_networks):
    lpips, passes = metric_networks["lpips"], []
    lpips.features[0].register_forward_hook(lambda *_: passes.append(1))
    x = normal(1, 3, 16, 16, dtype=torch.float32).sigmoid()
    for weights in (dict(lambda_gram=1.0), dict(lambda_lpips=0.0, lambda_gram=1.0), {}):
        passes.clear()
        cfg = trainer.Config(**weights)
        terms, _ = trainer.pix2pix_losses(triple, None, x, x, None, cfg, lpips=lpips)
        assert len(passes) == 2  # of the output and of the target
        assert ("lpips" in terms) == bool(cfg.lambda_lpips)
        assert ("gram" in terms) == bool(cfg.lambda_gram)


def triple(x, *_, **__):
    return 3 * x


def one_level(picture):
    return [picture]


def test_pix2pix_losses_are_the_weighted_terms_of_the_paper():
    x, y, captions = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1), normal(2)
    cfg = trainer.Config(lambda_l2=2, lambda_lpips=3, lambda_clipsim=5, lambda_gan=7)
    cfg.lambda_gram = 11
    lpips = SimpleNamespace(vgg_features=one_level, distance=lambda a, b: a[0] - b[0])
    clip = SimpleNamespace(similarity=lambda fake, captions: fake.mean((1, 2, 3)) * captions)
    losses = dict(lpips=lpips, clip=clip, caption_embeddings=captions)
    terms, fake = trainer.pix2pix_losses(triple, one_level, x, y, None, cfg, r=0.5, **losses)
    cross_entropy = -0.8 * F.logsigmoid(3 * x) - 0.2 * F.logsigmoid(-3 * x)
    similarity = ((3 * x).mean((1, 2, 3)) * captions).mean()
    gram = trainer.gram_loss([3 * x], [y], r=0.5)
    assert torch.equal(fake, 3 * x) and list(terms) == ["l2", "lpips", "gram", "clipsim", "gan"]
    assert relative(terms["gram"], 11 * gram) < 1e-12
    assert relative(terms["l2"], 2 * 0.5 * (3 * x - y).square().mean()) < 1e-12
    assert relative(terms["lpips"], 3 * 0.5 * (3 * x - y).mean()) < 1e-12
    assert relative(terms["clipsim"], 5 * (1 - similarity)) < 1e-12
    assert relative(terms["gan"], 7 * cross_entropy.mean()) < 1e-12


def test_pix2pix_losses_hand_r_and_noise_to_the_generator_and_keep_the_targets_type():
    given = []

    def G(x, context, r, noise, latent_noise):
        given.append((context, r, noise, latent_noise))
        return x.to(torch.bfloat16)

    seen = []

    def D(picture):
        seen.append(picture.dtype)
        return [picture]

    x, cfg = normal(1, 3, 8, 8, dtype=torch.float32), trainer.Config(lambda_l2=2.0)
    terms, fake = trainer.pix2pix_losses(G, D, x, x, "context", cfg, noise="a", latent_noise="b")
    assert given == [("context", None, "a", "b")]
    # A deterministic model has full weights, and absent networks no terms.
    assert relative(terms["l2"], 2 * (x.to(torch.bfloat16) - x).square().mean()) < 1e-6
    assert list(terms) == ["l2", "gan"] and fake.dtype == torch.float32 and seen == [fake.dtype]


# ------------------------------------------------------------------------------- who learns

@pytest.mark.parametrize(
    "extra",
    [[], ["--stochastic"], ["--conv_in", "off"], ["--skips", "off"], ["--train", "all"]],
    ids=["lora", "stochastic", "conv_in frozen", "no skips", "all"],
)
def test_three_steps_change_all_that_trains_and_nothing_else(monkeypatch, tmp_path, pairs, extra):
    made, before = {}, {}

    def recorded(name):
        cls = getattr(trainer, name)

        def build(*args, **kwargs):
            made[name] = cls(*args, **kwargs)
            state = made[name].state_dict()
            before[name] = {k: v.detach().clone() for k, v in state.items()}
            return made[name]

        monkeypatch.setattr(trainer, name, build)

    recorded("Pix2PixTurbo")
    recorded("PatchDiscriminator")
    calls, average = [], training.average_gradients

    def watch(parameters):
        parameters = list(parameters)
        calls.append(len(parameters))
        # The generator goes first: the discriminator passes its gradient on and keeps none.
        # When it is the discriminator's turn, the generator's gradients are cleared.
        idle = "PatchDiscriminator" if len(calls) % 2 == 1 else "Pix2PixTurbo"
        assert all(p.grad is None for p in made[idle].parameters())
        if idle == "Pix2PixTurbo":
            assert all(p.grad is not None for p in parameters)
        else:
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
        average(parameters)

    monkeypatch.setattr(training.run, "average_gradients", watch)
    flags = ["--train", "lora", *extra, "--dataset_folder", pairs, *PAIRS_OF_TWO]
    flags += ["--max_train_steps", 3, "--lr_warmup_steps", 1, "--lr_scheduler", "constant"]
    train(monkeypatch, *flags, "--lambda_gan", "0.5", "--output_dir", tmp_path / "run")

    assert len(calls) == 6
    for name, network in made.items():
        parameters = dict(network.named_parameters())
        for k, v in network.state_dict().items():
            changes = k in parameters and parameters[k].requires_grad
            if name == "PatchDiscriminator" and k not in parameters:
                changes = v.numel() > 1  # the vectors of spectral norms, by power iteration
            assert torch.equal(v, before[name][k]) != changes, k
    if "all" not in extra:
        saved = load_file(tmp_path / "run" / "model.safetensors")
        generator = made["Pix2PixTurbo"]
        names = {name for name, p in generator.named_parameters() if p.requires_grad}
        originals = {name for name, _ in generator.named_buffers()}
        assert saved.keys() == names | originals
        assert bool(originals) == ("--stochastic" in extra)
        assert ("vae.decoder.skip_conv_1.weight" in names) == ("--skips" not in extra)
        assert ("unet.conv_in.weight" in names) == ("--conv_in" not in extra)


def test_half_precision_stores_frozen_weights_in_half_and_trains_in_float32(
    monkeypatch, tmp_path, pairs
):
    made, seen = [], []
    build, forward = trainer.Pix2PixTurbo, trainer.PatchDiscriminator.forward

    def build_and_keep(*args, **kwargs):
        made.append(build(*args, **kwargs))
        return made[0]

    def watched(D, x, *args, **kwargs):
        seen.append(x.dtype)
        return forward(D, x, *args, **kwargs)

    monkeypatch.setattr(trainer, "Pix2PixTurbo", build_and_keep)
    monkeypatch.setattr(trainer.PatchDiscriminator, "forward", watched)
    flags = ["--train", "lora", "--mixed_precision", "bf16", "--gradient_checkpointing"]
    flags += ["--dataset_folder", pairs, *PAIRS_OF_TWO, "--max_train_steps", 1]
    train(monkeypatch, *flags, "--lambda_gan", 0.5, "--output_dir", tmp_path / "run")
    assert seen == [torch.float32] * 3  # fake and real pictures alike
    q = made[0].unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert (q.weight.dtype, q.lora_A.weight.dtype) == (torch.bfloat16, torch.float32)


def test_all_losses_of_the_paper_train_in_slices_as_in_one_batch(
    monkeypatch, tmp_path, pairs, metric_networks
):
    before = {}
    for name, network in metric_networks.items():
        before[name] = {k: v.clone() for k, v in network.state_dict().items()}
    flags = ["--dataset_folder", pairs, *SMALL, "--dtype", "float64", "--lambda_lpips", 5]
    flags += ["--lambda_clipsim", 5, "--lambda_gan", 0.5, "--gan_disc_type", "vagan_clip"]
    flags += ["--max_train_steps", 2, "--validation_steps", 1, "--track_val_fid"]
    ways = {"one": [4], "slices": [2, "--gradient_accumulation_steps", 2]}
    for name, batch in ways.items():
        folder = tmp_path / name
        train(monkeypatch, *flags, "--train_batch_size", *batch, "--output_dir", folder)
    assert helpers.largest_difference(tmp_path / "one", tmp_path / "slices") < 1e-10

    for name, network in metric_networks.items():
        for k, v in network.state_dict().items():
            assert torch.equal(v.double(), before[name][k].double())
    lines = helpers.read_log(tmp_path / "one")
    losses = {"l2", "lpips", "clipsim", "gan", "disc"}
    signals = {"disc_right_on_real", "disc_right_on_fake", "change", "drift", "grad_norm"}
    assert losses | signals | {"val_lpips", "val_clipsim", "val_fid"} <= lines[0].keys()
    # best.safetensors is of the best validation.
    best = min(range(2), key=lambda i: lines[i]["val_lpips"])
    last = load_file(tmp_path / "one" / "model.safetensors")
    kept = load_file(tmp_path / "one" / "best.safetensors")
    assert all(torch.equal(kept[k], last[k]) for k in last) == (best == 1)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lambda_lpips", 5], ["vgg16", "--lambda_lpips 0"]),
        (["--lambda_gram", 1], ["vgg16", "--lambda_gram 0"]),
        (["--lambda_clipsim", 5], ["openai/clip-vit-base-patch32", "--lambda_clipsim 0"]),
        (["--lambda_gan", 1, "--gan_disc_type", "vagan_clip"], ["--gan_disc_type patch"]),
    ],
    ids=["LPIPS", "Gram", "CLIP", "CLIP's discriminator"],
)
def test_missing_weights_are_named_with_the_flag_that_does_without(
    monkeypatch, capsys, tmp_path, pairs, flags, words
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    flags = [*PAIRS_OF_TWO, *flags, "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, "--dataset_folder", pairs, *flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and all(word in error for word in words), error


def test_training_every_weight_of_a_folder_leaves_its_files_alone_and_needs_no_captions(
    monkeypatch, tmp_path, pairs
):
    base, data = tmp_path / "tiny-base", tmp_path / "data"
    bases.save_folder(base, bases.load_base("tiny"))
    shutil.copytree(pairs, data)
    for path in data.glob("*.json"):
        path.unlink()
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    flags = ["--base", base, "--train", "all", "--dataset_folder", data, *PAIRS_OF_TWO]
    flags += ["--lambda_gan", 0, "--lambda_lpips", 0, "--lambda_clipsim", 0]
    flags += ["--max_train_steps", 2, "--learning_rate", 1e-3]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    after = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    assert after == before
    loaded = checkpoints.load_generator(str(tmp_path / "run"))
    first = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert loaded.prompts == [""]
    assert not torch.equal(loaded.generator.unet.conv_in.weight, first)


def test_r_of_a_step_is_the_strength_of_all_adapters(monkeypatch, tmp_path, pairs):
    seen = []
    pix2pix_losses = trainer.pix2pix_losses

    def watched(G, *args, r, **kwargs):
        seen.append(r)
        adapters = [layer for layer in G.modules() if isinstance(layer, ADAPTERS)]
        assert adapters and all(layer.scale == r * layer.full_scale for layer in adapters)
        return pix2pix_losses(G, *args, r=r, **kwargs)

    monkeypatch.setattr(trainer, "pix2pix_losses", watched)
    flags = ["--train", "lora", "--stochastic", "--dataset_folder", pairs, *PAIRS_OF_TWO]
    train(monkeypatch, *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "run")
    assert len(set(seen)) == 2 and all(0 <= r < 1 for r in seen)


def test_the_discriminator_tells_real_from_fake_with_the_weight_of_the_flag():
    real, fake = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    cfg = trainer.Config(lambda_gan=3, gan_augment=False, gan_loss_type="multilevel_sigmoid")
    run = SimpleNamespace(cfg=cfg)
    loss, _ = trainer.discriminate(lambda x: [x], run, 0, [0, 1], real, fake)
    wanted = 3 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    assert relative(loss, wanted) < 1e-12


# ---------------------------------------------------------------- one computation, many ways

def test_two_processes_accumulation_and_one_batch_are_one_computation(
    monkeypatch, tmp_path, pairs
):
    """float64, five steps, all weights: largest difference 1e-10 of the largest value."""
    flags = ["--dataset_folder", pairs, *SMALL, "--dtype", "float64", "--max_train_steps", 5]
    flags += ["--lambda_gan", "0.5"]
    folders = helpers.train_in_three_ways(monkeypatch, trainer, tmp_path, 4, *flags)
    assert helpers.largest_difference(folders["one"], folders["two"]) < 1e-10
    assert helpers.largest_difference(folders["one"], folders["slices"]) < 1e-10


def test_killed_and_resumed_ends_in_the_same_bits(monkeypatch, tmp_path, pairs):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--dataset_folder", pairs, *PAIRS_OF_TWO]
    flags += ["--max_train_steps", "8", "--checkpointing_steps", "2"]
    train(monkeypatch, *flags, "--output_dir", whole)
    helpers.kill_at(3, cut, trainer, *flags, "--output_dir", cut)
    helpers.kill_at(6, cut, trainer, "--resume", cut)
    train(monkeypatch, "--resume", cut)
    helpers.assert_same_bits(whole, cut)
    assert [line["step"] for line in helpers.read_log(cut)] == list(range(1, 9))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_what_is_there_and_says_how_to_go_on(tmp_path, pairs, number):
    folder = tmp_path / "run"
    flags = ["--dataset_folder", pairs, *PAIRS_OF_TWO, "--max_train_steps", "1000"]
    process = subprocess.Popen(
        helpers.command(trainer, *flags, "--output_dir", folder),
        env=helpers.ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"go on with --resume {folder}" in error and "Traceback" not in error
    assert helpers.read_state(folder)["step"] >= 1


def test_a_validation_that_fails_costs_no_step(monkeypatch, capsys, tmp_path, pairs):
    flags = ["--dataset_folder", pairs, *PAIRS_OF_TWO]
    runs = helpers.train_with_failing_validation(monkeypatch, trainer, tmp_path, *flags)
    assert "error: a test picture cannot be read" in capsys.readouterr().err
    helpers.assert_same_bits(*runs)


def test_a_run_begun_under_older_names_of_settings_goes_on(monkeypatch, tmp_path, pairs):
    run = tmp_path / "run"
    flags = ["--dataset_folder", pairs, *PAIRS_OF_TWO, "--max_train_steps", 1]
    old = ["--eval_freq", 1, "--num_samples_eval", 1, "--num_training_epochs", 2]
    train(monkeypatch, *flags, *old, "--output_dir", run)
    settings = helpers.read_settings(run)
    assert settings["validation_steps"] == 1 and settings["max_train_epochs"] == 2
    helpers.rename_settings(
        run,
        validation_steps="eval_freq",
        validation_num_images="num_samples_eval",
        max_train_epochs="num_training_epochs",
    )
    train(monkeypatch, "--resume", run, "--max_train_steps", 2)
    changed = dict(max_train_steps=2, resume=str(run))
    assert helpers.read_settings(run) == settings | changed
    assert ["val_l2" in line for line in helpers.read_log(run)] == [True, True]


@pytest.mark.parametrize(
    "extra",
    [
        ["--skips", "off", "--timestep", 199, "--lambda_gram", 1],
        ["--init", "{start}", "--stochastic"],
        ["--init", "{start}"],
    ],
    ids=["skips, timestep and Gram loss", "init, stochastic", "init"],
)
def test_runs_with_these_flags_resume_to_the_same_bits(
    monkeypatch, tmp_path, pairs, metric_networks, other_runs, extra
):
    whole, cut, start = tmp_path / "whole", tmp_path / "cut", tmp_path / "start.safetensors"
    shutil.copy(other_runs / "good.safetensors", start)
    flags = ["--train", "lora", "--dataset_folder", pairs, *PAIRS_OF_TWO]
    flags += [str(word).format(start=start) for word in extra]
    flags += ["--lr_scheduler", "constant"]
    train(monkeypatch, *flags, "--max_train_steps", 4, "--output_dir", whole)
    train(monkeypatch, *flags, "--max_train_steps", 2, "--output_dir", cut)
    start.unlink()  # a resumed run needs only its own folder
    if "--stochastic" not in extra:
        (cut / "model.safetensors").unlink()
        (cut / "best.safetensors").unlink()
    train(monkeypatch, "--resume", cut, "--max_train_steps", 4)
    helpers.assert_same_bits(whole, cut)


# ----------------------------------------------------------------- starting from a checkpoint

def read_back(official, tensors):
    """Puts the tensors of a checkpoint of ours into the official generator, by its own names."""
    _, places = from_official(official.contents(), "")
    assert places.keys() == tensors.keys()
    for name, place in places.items():
        place.copy_(tensors[name])


@torch.no_grad()
@pytest.mark.parametrize("stochastic", [False, True], ids=["deterministic", "stochastic"])
def test_an_official_file_trains_on_and_is_read_by_the_official_code_again(
    monkeypatch, tmp_path, pairs, stochastic
):
    official = Official(tmp_path / "official", stochastic)
    if stochastic:  # the original half need not be the base's
        official.unet.conv_in.conv_in_pretrained.weight *= 2
    official.save()
    r = [0.4] if stochastic else []
    x, noise = normal(1, 3, 16, 24).sigmoid(), normal(1, 4, 2, 3, seed=1)
    context = bases.load_base(str(official.base)).encode(["noise"])[0]
    args = (x, context, 0.4, noise) if stochastic else (x, context)
    before = official(*args)

    run = tmp_path / "run"
    flags = ["--base", official.base, "--init", official.pkl, "--dataset_folder", pairs]
    flags += ["--stochastic", "on" if stochastic else "off", "--dtype", "float64", *PAIRS_OF_TWO]
    flags += ["--lambda_lpips", 0, "--lambda_clipsim", 0, "--lambda_gan", 0]
    with torch.enable_grad():
        train(monkeypatch, *flags, "--max_train_steps", 9, "--output_dir", run)
        official.pkl.unlink()  # a resumed run needs only its own folder
        train(monkeypatch, "--resume", run, "--max_train_steps", 10)
    read_back(official, load_file(run / "model.safetensors"))
    ours = checkpoints.load_generator(str(run), r=r[0] if r else None).generator(*args)
    assert relative(ours, official(*args)) < 1e-9
    assert 1e-4 < relative(ours, before) < 0.3  # ten steps at 5e-6 change a little


@pytest.mark.parametrize("mode", ["lora", "all"])
def test_a_new_run_starts_from_the_best_weights_of_another(
    monkeypatch, capsys, tmp_path, pairs, mode
):
    old, new, last = tmp_path / "old", tmp_path / "new", tmp_path / "last"
    flags = ["--train", mode, "--dataset_folder", pairs, *PAIRS_OF_TWO, "--max_train_steps", 1]
    train(monkeypatch, *flags, "--output_dir", old)
    train(monkeypatch, *flags, "--seed", 3, "--output_dir", last)
    shutil.copy(last / "model.safetensors", old / "model.safetensors")
    # At a learning rate of 0 the weights stay what they were.
    still = [*flags, "--learning_rate", 0, "--seed", 7]
    capsys.readouterr()
    train(monkeypatch, *still, "--init", old, "--output_dir", new)
    assert f"starting from {old / 'best.safetensors'}\n" in capsys.readouterr().err
    assert helpers.read_settings(new)["init"] == str(old)
    shutil.copy(old / "best.safetensors", tmp_path / "model.safetensors")
    helpers.assert_same_bits(new, tmp_path)

    file = old / "model.safetensors"
    train(monkeypatch, *still, "--init", file, "--output_dir", tmp_path / "third")
    helpers.assert_same_bits(tmp_path / "third", last)


def test_a_deterministic_model_may_become_stochastic_and_the_reverse(
    monkeypatch, tmp_path, pairs
):
    flags = ["--train", "lora", "--dataset_folder", pairs, *PAIRS_OF_TWO, "--learning_rate", 1e-3]
    flags += ["--max_train_steps", 2, "--lr_warmup_steps", 1]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "deterministic")
    flags += ["--learning_rate", 0]
    first = load_file(tmp_path / "deterministic" / "best.safetensors")
    more = ["--init", tmp_path / "deterministic", "--stochastic"]
    train(monkeypatch, *flags, *more, "--output_dir", tmp_path / "stochastic")
    second = load_file(tmp_path / "stochastic" / "best.safetensors")
    base = bases.load_base("tiny", ("unet",), torch.float32)
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert torch.equal(second["unet.conv_in.weight0"], base.unet.conv_in.weight)

    more = ["--init", tmp_path / "stochastic"]
    train(monkeypatch, *flags, *more, "--output_dir", tmp_path / "again")
    again = load_file(tmp_path / "again" / "best.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


# -------------------------------------------------------------------------------- bad input

@pytest.fixture(scope="module")
def other_runs(tmp_path_factory) -> Path:
    """Checkpoints for a run with --train lora --base tiny: a good one, and others by what is
    wrong with them."""
    folder = tmp_path_factory.mktemp("others")
    options = dict(
        rank=dict(lora_rank_unet=3),
        skips=dict(skips=False),
        all=dict(train="all"),
        good={},
    )
    for name, changes in options.items():
        base = bases.load_base("tiny", dtype=torch.float32)
        config = Pix2PixTurboConfig(prediction_type=base.schedule.prediction_type, **changes)
        G = Pix2PixTurbo(base.vae, base.unet, base.schedule, config)
        path = folder / f"{name}.safetensors"
        text = (base.text_encoder, base.tokenizer)
        checkpoints.save_generator(path, G, "pix2pix_turbo", "tiny", [], *text)
        if name == "good":
            path = folder / "base.safetensors"
            checkpoints.save_generator(path, G, "pix2pix_turbo", "runs/z/base", [], *text)
    return folder


def wider(folder):
    Image.new("RGB", (50, 40)).save(folder / "train_B" / "0.png")


def without_partner(folder):
    (folder / "train_B" / "3.png").unlink()


def without_caption(folder):
    (folder / "train_prompts.json").write_text('{"0.png": "a"}')


def with_broken_json(folder):
    (folder / "train_prompts.json").write_text('{"0.png": "a",')


def with_a_web_page(folder):
    (folder / "train_A" / "0.png").write_text("<html>")


def with_a_cut_picture(folder):
    path = folder / "train_A" / "0.png"
    path.write_bytes(path.read_bytes()[:200])


def without_test(folder):
    (folder / "test_A").rename(folder / "elsewhere")


def without_pictures(folder):
    for path in (folder / "train_A").iterdir():
        path.unlink()


# What is wrong: the flags, what is done to the folder before, and words of the one line.
CROP = ["--train_image_prep", "crop"]
INIT = ["--train", "lora", "--init"]
BAD = {
    "unknown flag": (["--lerning_rate", "1"], None, ["--lerning_rate", "--learning_rate"]),
    "no loss": (
        ["--lambda_l2", "0", "--lambda_gan", "0"],
        None,
        ["--lambda_l2", "--lambda_gan", "are 0; expected a loss"],
    ),
    "not a number": (["--learning_rate", "fast"], None, ["--learning_rate", "fast"]),
    "unknown choice": (["--gan_disc_type", "vgg"], None, ["--gan_disc_type", "patch"]),
    "needless flag": (["--enable_xformers_memory_efficient_attention"], None, ["fused"]),
    "no such folder": (["--dataset_folder", "/nowhere"], None, ["/nowhere", "train_A"]),
    "no such drawing": (["--dataset_folder", "drawn:cats"], None, ["cats", "drawn:scenes"]),
    "no circles": (["--dataset_folder", "drawn:circles"], None, ["circles", "drawn:scenes"]),
    "no such base": (["--base", "/nowhere"], None, ["/nowhere", "expected a folder"]),
    "base without index": (["--base", "{tmp}"], None, ["model_index.json"]),
    "a base without VAE": (["--base", "pixels"], None, ["Identity", "AutoencoderKL"]),
    "no such device": (["--device", "warp"], None, ["--device warp"]),
    "unknown preparation": (CROP, None, ["crop", "resized_crop_N"]),
    "unknown preparation of drawings": (
        [*CROP, "--dataset_folder", "drawn:scenes"],
        None,
        ["drawn:scenes is drawn in the size of --resolution", "leave --train_image_prep"],
    ),
    "resume from nothing": (["--resume", "/nowhere"], None, ["/nowhere", "config.json"]),
    "sizes without a latent": (
        ["--train_image_prep", "resized_crop_17"],
        None,
        ["17x17", "multiples of"],
    ),
    "init from nothing": ([*INIT, "/nowhere"], None, ["/nowhere", "day2night", "(file, folder"]),
    "init of another kind": (
        [*INIT, "day2night"],
        None,
        ["day2night", "cyclegan_turbo", "train_cyclegan_turbo.py"],
    ),
    "init of another base": (
        [*INIT, "{others}/base.safetensors"],
        None,
        ["runs/z/base", "--base runs/z/base"],
    ),
    "init of another rank": (
        [*INIT, "{others}/rank.safetensors"],
        None,
        ["lora_rank_unet 3 (this run: 8)"],
    ),
    "init without skips": ([*INIT, "{others}/skips.safetensors"], None, ["skips off", "on"]),
    "init of all weights": ([*INIT, "{others}/all.safetensors"], None, ["train all", "lora"]),
    "a frozen conv_in of all weights": (
        ["--train", "all", "--conv_in", "off"],
        None,
        ["--conv_in off has no meaning with --train all"],
    ),
    "init and a frozen conv_in": (
        [*INIT, "{others}/good.safetensors", "--conv_in", "off"],
        None,
        ["conv_in on (this run: off)"],
    ),
    "init of base weights": (
        [*INIT, "tiny/tiny-turbo/unet/diffusion_pytorch_model.safetensors"],
        None,
        ["diffusion_pytorch_model", "expected a checkpoint of a translator"],
    ),
    "init and resume": (
        ["--resume", "{begun}", "--init", "{others}/good.safetensors"],
        None,
        ["--init", "differs from the None", "leave it out"],
    ),
    "timestep of none": (["--timestep", "1000"], None, ["timestep is 1000", "0 to 999"]),
    "timestep of 0": (["--timestep", "0"], None, ["--timestep 0", "1 or more"]),
    "stochastic at an earlier timestep": (
        ["--timestep", "199", "--stochastic"],
        None,
        ["timestep", "199", "the last, 999"],
    ),
    "negative weight": (["--lambda_gram", "-1"], None, ["--lambda_gram -1", "0 or more"]),
    "neither on nor off": (["--skips", "none"], None, ["--skips", "on or off"]),
    "empty batch": (["--train_batch_size", "0"], None, ["--train_batch_size", "1 or more"]),
    "no steps": (["--max_train_steps", "-1"], None, ["--max_train_steps", "1 or more"]),
    "rank of 0": (
        ["--train", "lora", "--lora_rank_unet", "0"],
        None,
        ["--lora_rank_unet", "1 or more"],
    ),
    "sizes of a pair differ": ([], wider, ["0.png", "50x40", "32x40"]),
    "partner missing": ([], without_partner, ["3.png", "partner"]),
    "caption missing": ([], without_caption, ["train_prompts.json", "1.png"]),
    "captions cut": ([], with_broken_json, ["train_prompts.json", "line 1"]),
    "not a picture": ([], with_a_web_page, ["0.png", "not a picture"]),
    "picture cut": ([], with_a_cut_picture, ["0.png"]),
    "no test pictures": ([], without_test, ["test_A"]),
    "empty folder": ([], without_pictures, ["train_A", "no picture"]),
    "run in the way": (["--output_dir", "{taken}"], None, ["holds a run already", "--resume"]),
    "unknown reporter": (
        ["--report_to", "printer"],
        None,
        ["--report_to", "'printer'", "tensorboard"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(
    monkeypatch, capsys, tmp_path, pairs, other_runs, case
):
    flags, spoil, words = BAD[case]
    folder, taken, begun = tmp_path / "data", tmp_path / "taken", tmp_path / "begun"
    shutil.copytree(pairs, folder)
    taken.mkdir()
    begun.mkdir()
    (begun / "config.json").write_text('{"base": "tiny"}')
    (taken / "state.pt").write_text("{}")
    if spoil:
        spoil(folder)
    places = dict(tmp=tmp_path, taken=taken, begun=begun, others=other_runs)
    flags = [flag.format(**places) for flag in flags]
    if "--resume" not in flags:
        run = ["--dataset_folder", folder, "--output_dir", tmp_path / "run", *PAIRS_OF_TWO]
        flags = [*run, *flags]
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, *flags)
    lines = helpers.error_lines(capsys.readouterr().err)
    assert caught.value.code == 2 and len(lines) == 1 and "Traceback" not in lines[0]
    assert all(word in lines[0] for word in words), lines[0]
    helpers.assert_nothing_half_written(tmp_path)
    assert (taken / "state.pt").read_text() == "{}"


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_last_state(
    monkeypatch, capsys, tmp_path, pairs
):
    mse_loss, calls = F.mse_loss, []

    def failing(a, b):
        calls.append(1)
        return mse_loss(a, b) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(trainer.F, "mse_loss", failing)
    flags = ["--dataset_folder", pairs, *PAIRS_OF_TWO, "--checkpointing_steps", "1"]
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert caught.value.code == 2
    assert "step 4: the loss became {'l2': nan" in capsys.readouterr().err
    assert helpers.read_state(tmp_path / "run")["step"] == 3


def test_a_discriminators_gradient_that_is_not_finite_stops_at_once(
    monkeypatch, capsys, tmp_path, pairs
):
    """Its weights stay as they are: a saved one that is not finite could not be resumed."""
    calls = []

    def spoil(parameters):
        parameters = list(parameters)
        calls.append(parameters)
        if len(calls) == 4:  # of the second step, the discriminator's
            parameters[0].grad.fill_(float("nan"))

    monkeypatch.setattr(training.run, "average_gradients", spoil)
    flags = ["--dataset_folder", pairs, *PAIRS_OF_TWO, "--checkpointing_steps", "1"]
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, *flags, "--lambda_gan", 0.5, "--output_dir", tmp_path / "run")
    assert caught.value.code == 2
    assert "step 2: the loss became {'disc_grad_norm': nan}" in capsys.readouterr().err
    assert helpers.read_state(tmp_path / "run")["step"] == 1
    assert all(p.isfinite().all() for p in calls[3])


def test_a_broken_test_picture_is_found_before_the_first_step(monkeypatch, capsys, tmp_path, pairs):
    folder = tmp_path / "data"
    shutil.copytree(pairs, folder)
    (folder / "test_B" / "1.png").write_text("<html>")
    with pytest.raises(SystemExit):
        train(monkeypatch, "--dataset_folder", folder, "--output_dir", tmp_path / "run", *SMALL)
    assert "1.png is not a picture" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
