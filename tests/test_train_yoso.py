"""The trainer of one-step models: its losses against the formulas, and run as users run it, on points and latents."""

import functools
import json
import math
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import normal, relative
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_bases import dit, sd  # noqa: F401 (fixtures)
from test_train_pix2pix_turbo import ENV, ROOT, assert_same_bits, from_nothing, pairs  # noqa: F401

import sample
import train_yoso as trainer
import training
from files import bases, checkpoints, tokenizers
from models import clip, diffusion, pixart, t5, unet, vae
from models.diffusion import Schedule, zero_terminal_snr

torch.set_num_threads(1)
SCHEDULE = Schedule.from_config(dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                     prediction_type="v_prediction"))
POINTS = ["--base", "gaussians", "--train_batch_size", "8", "--prior_pictures", "50", "--num_samples_eval", "200",
          "--device", "cpu"]
SMALL = ["--train_batch_size", "2", "--prior_pictures", "3", "--num_samples_eval", "2", "--viz_freq", "1000",
         "--resolution", "24", "--device", "cpu"]


def command(*argv, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *torchrun, str(ROOT / "train_yoso.py"), *from_nothing(argv)]


def train(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train_yoso.py", *from_nothing(argv)])
    monkeypatch.setattr(training, "catch_stop", lambda: lambda: False)
    training.run(trainer.main)


# ------------------------------------------------------------------------------------------------------------- losses


def tables(t):
    """alpha_t and sigma_t of the list t, computed anew."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = [math.prod((1 - betas[:u + 1]).tolist()) for u in t]
    return [a**0.5 for a in alpha_bar], [(1 - a) ** 0.5 for a in alpha_bar]


T = torch.tensor([0, 3, 260, 700, 999])
GAMMA = 5.0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", [(5, 2), (5, 4, 3, 3)], ids=str)
def test_the_generator_keeps_what_has_no_noise_and_is_x0_elsewhere(kind, shape):
    schedule = Schedule.from_config(SCHEDULE.config | dict(prediction_type=kind))
    prediction, x = normal(*shape, seed=1).requires_grad_(), normal(*shape)
    G = trainer.generated(prediction, x, T, schedule)
    G.sum().backward()
    for i, (t, alpha, sigma) in enumerate(zip(T.tolist(), *tables(T.tolist()))):
        c_skip, c_out = 0.25 / ((10 * t) ** 2 + 0.25), 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        x0 = (x[i] - sigma * prediction[i]) / alpha if kind == "epsilon" else alpha * x[i] - sigma * prediction[i]
        assert relative(G[i], c_skip * x[i] + c_out * x0) < 1e-9
        slope = -c_out * sigma * (1 / alpha if kind == "epsilon" else 1)
        assert torch.allclose(prediction.grad[i], torch.full_like(x[i], slope), rtol=1e-9)
    assert torch.equal(G[0], x[0])


def test_adversarial_losses_are_softplus_of_each_sample_and_so_are_their_gradients():
    real, fake = normal(6, 1).requires_grad_(), normal(6, 1, seed=1).requires_grad_()
    loss = trainer.discriminator_loss(real, fake)
    loss.backward()
    expected = sum(math.log1p(math.exp(-r)) + math.log1p(math.exp(f))
                   for r, f in zip(real.flatten().tolist(), fake.flatten().tolist())) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert relative(real.grad, -1 / (1 + real.detach().exp()) / 6) < 1e-12
    assert relative(fake.grad, 1 / (1 + (-fake.detach()).exp()) / 6) < 1e-12
    fake.grad = None
    trainer.generator_gan_loss(fake).backward()
    assert relative(fake.grad, -1 / (1 + fake.detach().exp()) / 6) < 1e-12


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_kl_is_the_square_weighted_by_snr_between_floor_and_gamma(floor):
    fake, x0 = normal(5, 4, 3, 3).requires_grad_(), normal(5, 4, 3, 3, seed=1)
    loss = trainer.kl_loss(fake, x0, T, SCHEDULE, GAMMA, floor)
    loss.backward()
    w = [min(max((a / s) ** 2, floor), GAMMA) for a, s in zip(*tables(T.tolist()))]
    assert w[0] == GAMMA and floor <= w[-1] < floor + 0.005
    expected = sum(wi * ((f - x) ** 2).sum().item() / 36 for wi, f, x in zip(w, fake, x0)) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    w = torch.tensor(w, dtype=torch.float64).view(-1, 1, 1, 1)
    assert relative(fake.grad, 2 * w * (fake.detach() - x0) / 180) < 1e-9


def test_consistency_pulls_the_noisier_side_only_and_with_the_weight_of_the_paper():
    seen, goal = normal(5, 7).requires_grad_(), normal(5, 7, seed=1).requires_grad_()
    s = trainer.earlier(T, 25)
    assert s.tolist() == [0, 0, 235, 675, 974]
    loss = trainer.consistency_loss(seen, goal, T, s, SCHEDULE, GAMMA)
    loss.backward()
    here, there = ([a / b for a, b in zip(*tables(u.tolist()))] for u in (T, s))  # snr, not squared
    w = [min(1 / (1 / h - 1 / e), GAMMA) if h != e else GAMMA for h, e in zip(here, there)]
    assert GAMMA in w[1:] and w[-1] < 1  # both sides of the minimum
    expected = sum(wi * ((a - b) ** 2).mean().item() for wi, a, b in zip(w, seen, goal)) / 5
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    w = torch.tensor(w, dtype=torch.float64)[:, None]
    assert relative(seen.grad, 2 * w * (seen - goal).detach() / 35) < 1e-9 and goal.grad is None
    end = trainer.consistency_loss(seen, goal, torch.tensor([999] * 5), torch.tensor([974] * 5),
                                   zero_terminal_snr(SCHEDULE), GAMMA)
    assert end.item() == 0  # pure noise: the weight vanishes, and is a number


def test_the_v_adaptation_asks_for_the_v_of_the_teachers_epsilon():
    v, eps, x = normal(5, 4, 2, 2).requires_grad_(), normal(5, 4, 2, 2, seed=1), normal(5, 4, 2, 2, seed=2)
    old = Schedule.from_config(SCHEDULE.config | dict(prediction_type="epsilon"))
    loss = trainer.adapt_loss(v, eps, x, x, T, old, SCHEDULE)
    loss.backward()
    alpha, sigma = (torch.tensor(u, dtype=torch.float64).view(-1, 1, 1, 1) for u in tables(T.tolist()))
    target = alpha * eps - sigma * (x - sigma * eps) / alpha
    assert loss.item() == pytest.approx(((v - target) ** 2).mean().item(), rel=1e-9)
    assert relative(v.grad, 2 * (v.detach() - target) / v.numel()) < 1e-9


def test_the_zero_snr_adaptation_asks_for_the_teachers_picture_on_the_new_schedule():
    v, told, x0, eps = (normal(5, 4, 2, 2, seed=i) for i in range(4))
    v.requires_grad_()
    new = zero_terminal_snr(SCHEDULE)
    x, x_new = (diffusion.add_noise(x0, eps, T, schedule) for schedule in (SCHEDULE, new))
    loss = trainer.adapt_loss(v, told, x, x_new, T, SCHEDULE, new)
    loss.backward()
    alpha, sigma = (torch.tensor(u, dtype=torch.float64).view(-1, 1, 1, 1) for u in tables(T.tolist()))
    first, last = tables([0, 999])[0]
    alpha_new = (alpha - last) * first / (first - last)
    seen = alpha * x - sigma * told
    target = (alpha_new * x_new - seen) / (1 - alpha_new**2).sqrt()
    assert relative(target[-1], -seen[-1]) < 1e-9 and relative(x_new[-1], eps[-1]) < 1e-9  # at T: -x0, from noise
    assert loss.item() == pytest.approx(((v - target) ** 2).mean().item(), rel=1e-7)
    assert relative(v.grad, 2 * (v.detach() - target) / v.numel()) < 1e-7  # near t = 0 1 - alpha^2 loses digits


# --------------------------------------------------------------------------------------------------------- who learns


@pytest.mark.parametrize("flags", [["--train", "lora"], ["--train", "lora", "--adversarial", "noisy", "--consistency",
                                   "mse"], ["--adversarial", "data"], ["--disc_random"]],
                         ids=["lora", "noisy", "all, data", "random"])
def test_generator_and_discriminator_take_turns_and_nothing_else_changes(monkeypatch, tmp_path, pairs, flags):  # noqa: F811
    made, average, calls, first = {}, training.average_gradients, [], []
    load, build, half = trainer.weights.load_base, trainer.LatentDiscriminator, trainer.lower_half

    def keep(name, network):
        made[name] = network, {k: v.detach().clone() for k, v in network.state_dict().items()}
        return network

    def load_base(*args, **kwargs):
        base = load(*args, **kwargs)
        for part in ("unet", "vae", "text_encoder"):
            keep(part, getattr(base, part))
        return base

    monkeypatch.setattr(trainer.weights, "load_base", load_base)
    monkeypatch.setattr(trainer, "LatentDiscriminator", lambda *a: keep("discriminator", build(*a)))
    monkeypatch.setattr(trainer, "lower_half", lambda *a, **k: keep("judge", half(*a, **k)))

    def watch(parameters):
        parameters = list(parameters)
        calls.append(parameters)
        first.append({k: v.clone() for k, v in made["discriminator"][0].unet.state_dict().items()})
        idle = made["discriminator" if len(calls) % 2 else "unet"][0]
        assert all(p.grad is None for p in idle.parameters())
        assert all(p.grad is not None for p in parameters)
        average(parameters)

    monkeypatch.setattr(training, "average_gradients", watch)
    train(monkeypatch, "--train_data_dir", pairs, "--output_dir", tmp_path / "run", *SMALL, *flags,
          "--max_train_steps", 3, "--learning_rate", 1e-3)
    assert len(calls) == 6 and {id(p) for p in calls[1]} == {id(p) for p in made["discriminator"][0].parameters()}
    trained = {id(p) for p in calls[0] + calls[1]}
    assert all(torch.equal(v, made["unet"][1][k]) == ("--disc_random" not in flags) for k, v in first[0].items()
               if v.ndim > 1)  # the discriminator's half begins as the base's own
    for name, (network, before) in made.items():
        for k, p in network.named_parameters():
            if k in before:
                assert torch.equal(p, before[k]) != (id(p) in trained), (name, k)
    lora = [k for k, p in made["unet"][0].named_parameters() if id(p) in trained]
    assert ("lora" in flags) == all(".lora_" in k for k in lora)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    if "lora" in flags:
        assert saved.keys() == {f"unet.{k}" for k in lora} | {"prior.mean", "prior.std"}


@pytest.mark.parametrize("kind", ["coop", "data", "noisy"])
def test_the_discriminators_real_side_is_what_the_flag_says(monkeypatch, tmp_path, kind):
    """The first step written out: what D is shown as real and as fake, and at which noise levels."""
    seen, network = [], trainer.gaussians.MLP

    class Watched(network):
        def forward(self, x, t, context=None):
            seen.append((x.detach().clone(), t.clone()))
            return super().forward(x, t, context)

    monkeypatch.setattr(trainer.gaussians, "MLP", lambda c: Watched(c) if c == 1 else network(c))
    train(monkeypatch, *POINTS, "--adversarial", kind, "--dtype", "float64", "--max_train_steps", 1, "--output_dir",
          tmp_path / "run")
    (through, _), (real, t_real), (fake, t_fake) = seen
    base = trainer.gaussians.load_base(42, torch.float64, torch.device("cpu"))
    batch = next(trainer.data.batches(trainer.gaussians.Points("train", 42), 8, 42))
    x0 = batch["target"].double()

    def draw(what):
        return torch.randn(8, 2, generator=training.rng(42, 0, what)).double()

    t = torch.randint(1000, (8,), generator=training.rng(42, 0, "t"))
    s = (t - 250).clamp(min=0)

    def G(u):
        x = diffusion.add_noise(x0, draw("noise"), u, base.schedule)
        return trainer.generated(base.denoiser(x, u), x, u, base.schedule)

    wanted = G(s) if kind == "coop" else x0
    if kind == "noisy":
        assert relative(real, diffusion.add_noise(x0, draw("again real"), s, base.schedule)) < 1e-12
        assert relative(fake, diffusion.add_noise(G(t), draw("again fake"), s, base.schedule)) < 1e-12
        assert torch.equal(t_real, s) and torch.equal(t_fake, s)
    else:
        assert relative(real, wanted) < 1e-12 and relative(fake, G(t)) < 1e-12
        assert torch.equal(t_real, t) and torch.equal(t_fake, t)
    assert torch.equal(through, fake)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_last_noise_level_gets_its_share_of_the_batch(monkeypatch, tmp_path, share):
    seen, kl_loss = [], trainer.kl_loss
    monkeypatch.setattr(trainer, "kl_loss", lambda fake, x0, t, *rest: seen.append(t) or kl_loss(fake, x0, t, *rest))
    train(monkeypatch, *POINTS, "--train_batch_size", 1000, "--max_train_steps", 1, "--last_share", share,
          "--output_dir", tmp_path / "run")
    t, = seen
    assert abs((t == 999).float().mean() - share) < 0.05
    assert abs(t[t < 999].float().mean() - 500) < 40


def test_the_floor_of_the_weights_reaches_the_loss(monkeypatch, tmp_path):
    seen, kl_loss = [], trainer.kl_loss
    monkeypatch.setattr(trainer, "kl_loss", lambda *args: seen.append(args[-1]) or kl_loss(*args))
    train(monkeypatch, *POINTS, "--max_train_steps", 1, "--snr_floor", 0.7, "--output_dir", tmp_path / "run")
    assert seen == [0.7]


@pytest.mark.parametrize("flag, offset, text", [(["--noise_offset", 0.5], 0.5, "noise"),
                                                (["--unconditional"], 0.0, "")], ids=["offset", "no captions"])
def test_noise_is_offset_and_captions_are_left_out_on_request(monkeypatch, tmp_path, pairs, flag, offset, text):  # noqa: F811
    """The first step written out, whose noise has one more value a channel, or whose captions are empty."""
    train(monkeypatch, "--train_data_dir", pairs, *flag, "--dtype", "float64", "--train_batch_size", 2,
          "--max_train_steps", 1, "--resolution", 24, "--center_crop", "--prior_pictures", 0, "--num_samples_eval", 1,
          "--lambda_gan", 0, "--lambda_con", 0, "--device", "cpu", "--output_dir", tmp_path / "run")
    log = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    base = bases.load_base("tiny", dtype=torch.float64, seed=42)
    batch = next(trainer.data.batches(trainer.data.open_paired(pairs, "train", "resized_crop_24"), 2, 42))
    assert batch["caption"] == ["noise"] * 2

    def draw(what, *shape):
        return torch.randn(2, 4, *shape, generator=training.rng(42, 0, what)).double()

    mean, logvar, _ = base.vae.encode(batch["target"].double())
    x0 = (mean + (logvar / 2).exp() * draw("latent", 6, 6)) * base.vae.config.scaling_factor
    t = torch.randint(1000, (2,), generator=training.rng(42, 0, "t"))
    x = diffusion.add_noise(x0, draw("noise", 6, 6) + offset * draw("offset", 1, 1), t, base.schedule)
    kl = [trainer.kl_loss(trainer.generated(base.unet(x, t, *base.encode(texts)), x, t, base.schedule), x0, t,
                          base.schedule, 5.0).item() / 2 for texts in ([text] * 2, ["another"] * 2)]
    assert log["kl"] == pytest.approx(kl[0], rel=1e-9) and log["kl"] != pytest.approx(kl[1], rel=1e-9)


def test_the_grid_shows_the_validation_prompts(monkeypatch, tmp_path, pairs):  # noqa: F811
    seen = []
    monkeypatch.setattr(training, "save_grid", lambda path, columns: seen.append(columns))
    train(monkeypatch, "--train_data_dir", pairs, "--validation_prompts", "fog|rain", *SMALL, "--dtype", "float64",
          "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    made, = (columns[0] for columns in seen if len(columns) == 1)  # no picture of the set has these captions
    base, prior = checkpoints.load_yoso(tmp_path / "run" / "model.safetensors", dtype=torch.float64)
    assert len(made) == 2
    for i, (own, other) in enumerate([("fog", "rain"), ("rain", "fog")]):
        (noise, again), T = training.draw_noise([i], (4, 6, 6)), len(base.schedule.alpha)
        again = torch.randn(1, 4, 6, 6, generator=again[0])
        x = diffusion.start_from_prior(noise.double(), again.double(), *prior, T - 1, base.schedule)
        t = torch.tensor([T - 1])
        expected = [base.vae.decode(trainer.generated(base.unet(x, t, *base.encode([text])), x, t, base.schedule)
                                    / base.vae.config.scaling_factor)[0].float() for text in (own, other)]
        assert relative(made[i], expected[0]) < 1e-6 < relative(made[i], expected[1])


# -------------------------------------------------------------------------------------------------- stages and files


def test_the_quick_adaption_leads_from_epsilon_to_v_to_pure_noise_and_each_result_is_a_base(monkeypatch, tmp_path):
    epsilon = tmp_path / "tiny-epsilon"
    base = bases.load_base("tiny")
    base.schedule.config["prediction_type"] = "epsilon"
    bases.save_folder(epsilon, base)
    common = ["--train", "all", "--train_data_dir", "drawn:scenes", *SMALL, "--max_train_steps", 2]
    flags = ["--learning_rate", 1e-4, *common]
    train(monkeypatch, "--base", epsilon, "--stage", "adapt_v", "--output_dir", tmp_path / "one", *flags)
    v = bases.load_base(str(tmp_path / "one" / "base"))
    assert v.schedule.prediction_type == "v_prediction" and v.schedule.alpha[-1] > 0
    train(monkeypatch, "--base", tmp_path / "one" / "base", "--stage", "adapt_zsnr", "--output_dir", tmp_path / "two",
          *flags)
    pure = bases.load_base(str(tmp_path / "two" / "base"))
    assert pure.schedule.alpha[-1] == 0
    assert not torch.equal(pure.unet.conv_in.weight, v.unet.conv_in.weight)
    assert torch.equal(pure.vae.decoder.conv_in.weight, base.vae.decoder.conv_in.weight)
    train(monkeypatch, "--base", tmp_path / "two" / "base", "--output_dir", tmp_path / "three", *flags)
    logs = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in ("one", "three")]
    assert "adapt" in logs[0] and "gan" not in logs[0]
    assert {"gan", "kl", "con", "disc", "logit_gap", "spread", "grad_norm", "disc_right_on_real", "val_spread"
            } <= logs[1].keys() and all(math.isfinite(value) for value in logs[1].values())


def test_the_checkpoint_is_the_mean_of_the_weights_and_carries_the_prior(monkeypatch, tmp_path, pairs):  # noqa: F811
    train(monkeypatch, "--train", "lora", "--train_data_dir", pairs, "--output_dir", tmp_path / "run", *SMALL,
          "--max_train_steps", 3, "--dtype", "float64", "--learning_rate", 1e-3)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        config, saved = json.loads(file.metadata()["config"]), {k: file.get_tensor(k) for k in file.keys()}
        assert (file.metadata()["kind"], file.metadata()["base"], config["lora_rank"]) == ("yoso", "tiny", 64)
    name = next(k for k in state["trained"] if k.endswith("mid_block.resnets.0.conv1.lora_B.weight"))
    assert torch.equal(saved[name], state["ema"][name]) and not torch.equal(saved[name], state["trained"][name])
    base = bases.load_base("tiny", dtype=torch.float64)
    pictures = trainer.data.open_paired(pairs, "train", "resized_crop_24")
    chosen = torch.randperm(6, generator=training.rng(42, 0, "prior"))[:3].tolist()
    z = torch.stack([base.vae.encode(pictures[i]["target"][None].double())[0][0] for i in chosen])
    assert relative(saved["prior.mean"], z.mean(0)) < 1e-9 and relative(saved["prior.std"], z.std(0, False)) < 1e-9
    prior = bases.load_prior(tmp_path / "run" / "prior.safetensors", (4, 6, 6))
    assert relative(prior[1].double(), saved["prior.std"]) < 1e-6
    lora = load_file(tmp_path / "run" / "lora.safetensors")
    assert relative(lora[name] * 8, saved[name]) < 1e-9  # times alpha / rank = 1 / 8
    before = base.unet.mid_block.resnets[0].conv1.weight.clone()
    bases.load_lora(str(tmp_path / "run"), base)
    A = saved[name.replace("lora_B", "lora_A")].flatten(1)
    change = base.unet.mid_block.resnets[0].conv1.weight - before
    assert relative(change.flatten(1), saved[name].flatten(1) @ A / 8) < 1e-6
    assert len(load_file(tmp_path / "run" / "lora_kohya.safetensors")) == 1.5 * len(lora)


def text_file(folder):
    (folder / "captions.txt").write_text("a cat\na dog by a lake\nrain\na boat\nfog\nsnow\na car\na tree\nnight\nday")
    return folder / "captions.txt"


def test_pixart_goes_the_whole_way_and_the_critic_is_stable_diffusions(monkeypatch, tmp_path, pairs, dit, sd):  # noqa: F811
    """Its bases hold the transformer alone, and take all else from where they began; then a LoRA of it."""
    common = ["--disc_base", sd, "--train_data_dir", pairs, *SMALL[:-4], "--resolution", 32, "--device", "cpu",
              "--max_train_steps", 2, "--learning_rate", 1e-4]
    base = dit["512"]
    for stage in ("adapt_v", "adapt_zsnr", "yoso"):
        train(monkeypatch, "--base", base, "--train", "all", "--stage", stage, "--output_dir", tmp_path / stage,
              *common, *(["--disc_base", "/nowhere"] if stage != "yoso" else []))  # nothing looks through it
        base = tmp_path / stage / "base"
        assert sorted(p.name for p in base.iterdir()) == ["model_index.json", "scheduler", "transformer"]
    made, began = (bases.load_base(str(name), bases.PIXART) for name in (base, dit["512"]))
    assert made.schedule.alpha[-1] == 0 and made.schedule.prediction_type == "v_prediction"
    assert not torch.equal(made.transformer.proj_out.weight, began.transformer.proj_out.weight)
    assert torch.equal(made.vae.decoder.conv_in.weight, began.vae.decoder.conv_in.weight)
    train(monkeypatch, "--base", base, "--train", "lora", "--lora_rank", 4, "--output_dir", tmp_path / "lora", *common)
    drawn, _ = checkpoints.load_yoso(tmp_path / "lora" / "model.safetensors")
    bases.load_lora(str(tmp_path / "lora"), made)
    for name, p in made.transformer.state_dict().items():
        assert relative(p + 1, drawn.transformer.state_dict()[name] + 1) < 1e-6, name


def test_a_teacher_draws_the_pictures_of_captions_alone(monkeypatch, tmp_path, sd):  # noqa: F811
    captions = text_file(tmp_path)
    train(monkeypatch, "--train_data_dir", captions, "--teacher", sd, "--dtype", "float64", "--train_batch_size", 3,
          "--max_train_steps", 1, "--resolution", 32, "--prior_pictures", 2, "--num_samples_eval", 1, "--lambda_gan", 0,
          "--lambda_con", 0, "--device", "cpu", "--output_dir", tmp_path / "run")
    log = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    teacher, base = (bases.load_base(str(name), dtype=torch.float64, seed=42) for name in (sd, "tiny"))
    texts = next(trainer.data.batches(trainer.data.Captioned(captions, "train", "no_resize"), 3, 42))["caption"]

    def draw(what):
        side = 32 // base.vae.factor
        return torch.randn(3, 4, side, side, generator=training.rng(42, 0, what)).double()

    x = diffusion.start(draw("latent"), 999, teacher.schedule)
    x0 = diffusion.predict_x0(teacher.unet(x, 999, *teacher.encode(texts)), x, 999, teacher.schedule,
                              teacher.schedule.prediction_type)
    t = torch.randint(1000, (3,), generator=training.rng(42, 0, "t"))
    x_t = diffusion.add_noise(x0, draw("noise"), t, base.schedule)
    fake = trainer.generated(base.unet(x_t, t, *base.encode(texts)), x_t, t, base.schedule)
    assert log["kl"] == pytest.approx(0.5 * trainer.kl_loss(fake, x0, t, base.schedule, 5.0).item(), rel=1e-9)


def test_a_cache_trains_what_its_pictures_train(monkeypatch, tmp_path, pairs):  # noqa: F811
    trainer.data.cache(str(pairs), "tiny", tmp_path / "cache", "resized_crop_24", 24, "text", 42, 4, "cpu", "float32",
                       shard_items=4)
    for name, *where in (("pictures", pairs, "--center_crop"), ("cached", tmp_path / "cache")):
        train(monkeypatch, "--train", "lora", "--train_data_dir", *where, *SMALL, "--max_train_steps", 3,
              "--output_dir", tmp_path / name)
    a, b = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("pictures", "cached"))
    for part in ("prior", "trained", "ema"):
        assert_same(a[part], b[part], 1e-3)
    train(monkeypatch, "--seed", 0, "--train_data_dir", tmp_path / "cache", *SMALL, "--max_train_steps", 1,
          "--output_dir", tmp_path / "all")
    assert checkpoints.load_yoso(tmp_path / "all" / "model.safetensors")[0].encode(["noise"])[0].isfinite().all()


@pytest.mark.parametrize("flags", [["--center_crop"], ["--random_flip"], ["--train_image_prep", "resize_24"]])
def test_a_cache_is_not_cropped_again(monkeypatch, capsys, tmp_path, pairs, flags):  # noqa: F811
    trainer.data.cache(str(pairs), "tiny", tmp_path / "cache", "resized_crop_24", 24, "text", 42, 4, "cpu", "float32")
    with pytest.raises(SystemExit):
        train(monkeypatch, "--train_data_dir", tmp_path / "cache", *flags, *SMALL, "--output_dir", tmp_path / "run")
    assert "is a cache, whose pictures were cropped when it was made" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_raw_pictures_and_classes_train_from_scratch_and_the_file_draws_alone(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        names = [f"00000/img{i:08d}.png" for i in range(20)]
        for i, name in enumerate(names):
            Image.new("RGB", (16, 16), (10 * i, 100, 0)).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", name)
        archive.writestr("dataset.json", json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}))
    train(monkeypatch, "--base", "pixels", "--train_data_dir", tmp_path / "set.zip", "--train_batch_size", 2,
          "--resolution", 16, "--max_train_steps", 2, "--num_samples_eval", 2, "--device", "cpu", "--output_dir",
          tmp_path / "run")
    base, prior = checkpoints.load_yoso(tmp_path / "run" / "model.safetensors")
    assert base.schedule.alpha[-1] == 0 and prior[0].shape == (3, 16, 16)
    made = sample.text_to_image(base, "class 2", [5], (16, 16), sampler="lcm")
    noise, t = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)), torch.tensor([999])
    x0 = trainer.generated(base.unet(noise, t, *base.encode(["class 2"])), noise, t, base.schedule)
    assert relative(made, (x0 / 2).clamp(-1, 1)) < 1e-5
    other = sample.text_to_image(base, "class 1", [5], (16, 16), sampler="lcm")
    assert not torch.equal(made, other)  # it hears its class


@pytest.mark.parametrize("way", ["lora", "all"])
def test_a_checkpoint_draws_what_the_grid_showed(monkeypatch, tmp_path, pairs, way):  # noqa: F811
    """As large as it was trained, with nothing said; and a strength that has no meaning is refused."""
    seen, save = [], training.save_grid
    monkeypatch.setattr(training, "save_grid", lambda path, columns: (seen.append(columns), save(path, columns)))
    train(monkeypatch, "--train", way, "--train_data_dir", pairs, *SMALL, "--max_train_steps", 2,
          "--learning_rate", 1e-2, "--output_dir", tmp_path / "run")
    argv = ["sample.py", "noise", "--checkpoint", str(tmp_path / "run"), "--seed", "0", "--output",
            str(tmp_path / "out.png"), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", argv)
    sample.main()
    made = trainer.data.to_tensor(trainer.data.open_picture(tmp_path / "out.png")) * 2 - 1
    assert (made - seen[-1][1][0].clamp(-1, 1)).abs().max() < 1.5 / 127.5
    monkeypatch.setattr(sys, "argv", [*argv, "--save", str(tmp_path / "saved")])
    sample.main()  # a folder that draws the same, with the prior beside
    size = argv.copy()
    size[2:4] = ["--base", str(tmp_path / "saved"), "--prior", str(tmp_path / "saved" / "prior.safetensors"), "--size",
                 "x".join(str(side) for side in made.shape[:0:-1])]
    monkeypatch.setattr(sys, "argv", size)
    sample.main()
    again = trainer.data.to_tensor(trainer.data.open_picture(tmp_path / "out.png")) * 2 - 1
    assert (again - made).abs().max() < 1.5 / 127.5
    edit = ["--input", str(pairs / "test_B" / "0.png"), "--strength"]
    refused = {"above 0": [*edit, "-1"]} | ({"holds every weight": ["--strength", "0.5"]} if way == "all" else {})
    for words, flags in refused.items():
        monkeypatch.setattr(sys, "argv", argv + flags)
        with pytest.raises(ValueError, match=words):
            sample.main()
    monkeypatch.setattr(sys, "argv", [*argv, *edit, "0.5"])
    sample.main()
    assert Image.open(tmp_path / "out.png").text["checkpoint"] == str(tmp_path / "run")


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_precision_and_checkpointing_train_every_lora(monkeypatch, tmp_path, pairs, half):  # noqa: F811
    """A pass without gradient must not leave its cast weights to one with; a gradient beyond float16 is a step left
    out, not the end."""
    seen, average = [], training.average_gradients
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-30)  # too large at first
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(training, "average_gradients", lambda ps: average(seen.append(ps := [*ps]) or [
        p for p in ps if p.grad.abs().sum() >= 0]))
    train(monkeypatch, "--train", "lora", "--mixed_precision", half, "--gradient_checkpointing", "--train_data_dir",
          pairs, "--output_dir", tmp_path / "run", *SMALL, "--max_train_steps", 3, "--learning_rate", 1e-3)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert len(seen) == 6 and all(t.dtype == torch.float32 for t in state["trained"].values())
    moved = [k for k, t in state["trained"].items() if k.endswith("lora_B.weight") and t.abs().max() == 0]
    assert not moved, moved
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert math.isfinite(first["grad_norm"]) == (half == "bf16")


def test_a_gradient_that_is_no_number_ends_the_run_before_it_reaches_the_weights(monkeypatch, capsys, tmp_path):
    calls = []

    def spoil(parameters):
        parameters = list(parameters)
        calls.append(parameters)
        if len(calls) == 3:
            parameters[0].grad[0] = math.nan

    monkeypatch.setattr(training, "average_gradients", spoil)
    with pytest.raises(SystemExit):
        train(monkeypatch, *POINTS, "--lambda_gan", 0, "--max_train_steps", 5, "--checkpointing_steps", 1,
              "--output_dir", tmp_path / "run")
    assert "step 2: the loss became {'grad_norm': nan}" in capsys.readouterr().err
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 2 and all(p.isfinite().all() for p in calls[0])


# ------------------------------------------------------------------------------------------------------- full size


def peak_of(*argv):
    """Peak memory of one run of the trainer, in GB, and its log."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); " \
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    threads = {k: v for k, v in ENV.items() if "THREADS" not in k}
    out = subprocess.run([sys.executable, "-c", code, *command(*argv)], env=threads, check=True, capture_output=True,
                         text=True).stdout
    return int(out.split()[-1]) / 1e6


@pytest.mark.slow
def test_a_step_at_full_size_runs_on_this_machine(tmp_path, pairs):  # noqa: F811
    """A LoRA step on SD 1.5 in its published sizes at 256 px; and one on PixArt with all its 28 blocks, whose T5 is of
    full width and of two layers of its 24, before the cache. Random weights; prints peak memory (pytest -s)."""
    schedule = Schedule.from_config(dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    clip_l = clip.TextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                             hidden_act="quick_gelu")
    words = clip.Tokenizer(tokenizers.load_tokenizer("tiny").pieces)
    bases.save_folder(tmp_path / "sd15", bases.Base(
        "", vae.VAE(vae.VAEConfig()), unet.UNet(unet.UNetConfig()), text_encoder=clip.TextEncoder(clip_l),
        tokenizer=words, schedule=schedule), torch.float16)
    one = ["--train_batch_size", 1, "--max_train_steps", 1, "--prior_pictures", 1, "--num_samples_eval", 1,
           "--resolution", 256, "--gradient_checkpointing", "--device", "cpu"]
    peak = peak_of("--base", tmp_path / "sd15", "--train_data_dir", pairs, *one, "--output_dir", tmp_path / "one")
    print(f"SD 1.5, LoRA of rank 64, 256 px, batch 1, float32: {peak:.1f} GB")
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -2.0], *([c, -3.0] for c in "abcdefghinopst")]
    letters = tokenizers.pieces_from_json(json.dumps(dict(model=dict(type="Unigram", vocab=pieces, unk_id=2))))
    bases.save_folder(tmp_path / "dit", bases.Base(
        "", vae.VAE(vae.VAEConfig()), transformer=pixart.PixArt(pixart.PixArtConfig(sample_size=64)),
        text_encoder=t5.T5Encoder(t5.T5Config(d_model=4096, d_ff=10240, num_heads=64, num_layers=2)),
        tokenizer=t5.T5Tokenizer(letters), schedule=schedule), torch.float16)
    trainer.data.cache(str(pairs), str(tmp_path / "dit"), tmp_path / "cache", "resized_crop_256", 256, "text", 42, 1,
                       "cpu", "float32")
    peak = peak_of("--base", tmp_path / "dit", "--disc_base", tmp_path / "sd15", "--train_data_dir", tmp_path / "cache",
                   *one, "--output_dir", tmp_path / "two")
    print(f"PixArt, LoRA of rank 64, 256 px, batch 1, float32, cached contexts: {peak:.1f} GB")
    for run in ("one", "two"):
        log = json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[0])
        assert all(math.isfinite(log[k]) for k in ("gan", "kl", "con", "disc", "grad_norm"))


# ------------------------------------------------------------------------------------- the same computation, otherwise


def test_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    """Generator, mean of the weights, discriminator, both optimizers, prior."""
    flags = [*POINTS, "--max_train_steps", "90", "--checkpointing_steps", "20", "--eval_freq", "1000"]
    subprocess.run(command(*flags, "--output_dir", tmp_path / "whole"), env=ENV, check=True, capture_output=True)
    process = subprocess.Popen(command(*flags, "--output_dir", tmp_path / "cut"), env=ENV, stderr=subprocess.DEVNULL)
    log = tmp_path / "cut" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 30:
        assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    process.wait()
    subprocess.run(command("--resume", tmp_path / "cut"), env=ENV, check=True, capture_output=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    assert_same(*(torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "cut")), 0)


@pytest.mark.parametrize("flag", ["--base", "--teacher", "--disc_base"])
def test_resuming_beside_other_frozen_weights_is_refused(monkeypatch, capsys, tmp_path, dit, sd, flag):  # noqa: F811
    """The base, what draws the pictures, and what looks at latents."""
    places = {"--base": dit["512"], "--teacher": sd, "--disc_base": sd}
    shutil.copytree(places[flag], tmp_path / "other")
    train(monkeypatch, *(word for pair in (places | {flag: tmp_path / "other"}).items() for word in pair),
          "--train", "lora", "--lora_rank", 2, "--train_data_dir", text_file(tmp_path), *SMALL[:-4], "--resolution", 16,
          "--prior_pictures", 0, "--lambda_con", 0, "--device", "cpu", "--max_train_steps", 1, "--output_dir",
          tmp_path / "run")
    path, = (tmp_path / "other" / ("transformer" if flag == "--base" else "unet")).glob("*.safetensors")
    tensors = load_file(path)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, path, dict(format="pt"))
    with pytest.raises(SystemExit):
        train(monkeypatch, "--resume", tmp_path / "run", "--max_train_steps", 2)
    assert "fingerprint" in capsys.readouterr().err


def test_a_last_save_that_failed_is_made_good_by_resuming(monkeypatch, tmp_path):
    save, calls = checkpoints.save_yoso, []

    def full(path, *rest):
        calls.append("model" in path.name)  # not the best
        if calls[-1] and sum(calls) == 2:
            raise OSError("disk full")
        save(path, *rest)

    flags = [*POINTS, "--max_train_steps", 2, "--checkpointing_steps", 1]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "whole")
    monkeypatch.setattr(checkpoints, "save_yoso", full)
    with pytest.raises(SystemExit):
        train(monkeypatch, *flags, "--output_dir", tmp_path / "cut")
    train(monkeypatch, "--resume", tmp_path / "cut")
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_an_epoch_sees_every_item(monkeypatch, tmp_path):
    train(monkeypatch, *POINTS, "--train_batch_size", 40_000, "--num_train_epochs", 1, "--max_train_steps", 5,
          "--output_dir", tmp_path / "run")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2  # of 50,000 points


def test_two_processes_and_accumulation_are_one_computation(tmp_path, pairs):  # noqa: F811
    common = ["--train", "lora", "--train_data_dir", pairs, *SMALL[2:], "--dtype", "float64", "--max_train_steps", 5]
    ways = {"one": (["--train_batch_size", 4], 1), "two": (["--train_batch_size", 2], 2),
            "slices": (["--train_batch_size", 2, "--gradient_accumulation_steps", 2], 1)}
    for name, (batch, processes) in ways.items():
        subprocess.run(command(*common, *batch, "--output_dir", tmp_path / name, processes=processes), env=ENV,
                       check=True, capture_output=True)
    one, *others = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ways)
    for other in others:
        for part in ("trained", "ema", "discriminator", "prior"):
            assert_same(one[part], other[part], 1e-10)


def assert_same(a, b, bound):
    """Of tensors the largest difference over the largest value; 0 asks for the same bits."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], bound)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_same(*pair, bound)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b) or (a - b).abs().max() <= bound * a.abs().max()
    else:
        assert a == b


# ---------------------------------------------------------------------------------------------------------- bad input


BAD = {  # what is wrong: the flags, words of the one line
    "no such base": (["--base", "/nowhere"], ["/nowhere", "expected a folder"]),
    "no such data": (["--train_data_dir", "/nowhere"], ["/nowhere", "a folder of pictures"]),
    "no such drawing": (["--train_data_dir", "drawn:cats"], ["cats", "drawn:scenes"]),
    "a stage that is over": (["--stage", "adapt_v"], ["adapt_v", "predicts v already"]),
    "a stage too early": (["--stage", "adapt_zsnr", "--prediction_type", "epsilon"], ["--stage adapt_v first"]),
    "no prediction": (["--prediction_type", "x0"], ["x0", "v_prediction"]),
    "no U-Net to look through": (["--base", "gaussians", "--consistency", "perceptual"], ["--consistency mse"]),
    "no layer for LoRA": (["--base", "gaussians", "--train", "lora"], ["--train all"]),
    "unknown adversary": (["--adversarial", "teacher"], ["--adversarial", "coop"]),
    "no whole latents": (["--resolution", "30"], ["30x30", "multiples of 4"]),
    "no loss": (["--lambda_gan", "0", "--lambda_kl", "0", "--lambda_con", "0"], ["--lambda_kl"]),
    "captions and no teacher": (["--train_data_dir", "{captions}"], ["captions.txt", "--teacher"]),
    "a teacher of pictures": (["--teacher", "tiny"], ["leave --teacher out"]),
    "a zip that is none": (["--train_data_dir", "{taken}/a.zip"], ["a.zip", "dataset.json"]),
    "pixels through a U-Net": (["--base", "pixels", "--consistency", "perceptual"], ["--consistency mse"]),
    "no prior of fewer than none": (["--prior_pictures", "-1"], ["--prior_pictures", "0 or more"]),
    "the paired trainer's flag": (["--lambda_l2", "1"], ["--lambda_l2", "unknown"]),
    "run in the way": (["--output_dir", "{taken}"], ["holds a run already", "--resume"]),
}


def test_pictures_are_of_one_size_in_training_and_in_the_grid(monkeypatch, capsys, tmp_path, pairs):  # noqa: F811
    flags = ["--train_data_dir", pairs, *SMALL[:-4], "--device", "cpu", "--max_train_steps", 1]
    train(monkeypatch, *flags, "--train_image_prep", "resized_crop_24", "--output_dir", tmp_path / "one")
    Image.new("RGB", (20, 24)).save(tmp_path / "00.png")
    for i in range(1, 10):
        Image.new("RGB", (24, 20)).save(tmp_path / f"{i:02d}.png")
    for i, (preps, words) in enumerate({
            ("--train_image_prep", "resized_crop_24", "--test_image_prep", "resize_16"): "'0.png' is not of the size",
            ("--train_image_prep", "no_resize", "--train_data_dir", str(tmp_path)): "expected one size"}.items()):
        with pytest.raises(SystemExit):
            train(monkeypatch, *flags, *preps, "--output_dir", tmp_path / f"bad{i}")
        err = capsys.readouterr().err
        assert words in err and " size" in err and "Traceback" not in err


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(monkeypatch, capsys, tmp_path, case):
    flags, words = BAD[case]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "state.pt").write_text("{}")
    (tmp_path / "taken" / "a.zip").write_text("no zip")
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, "--train_data_dir", "drawn:scenes", *SMALL, "--output_dir", tmp_path / "run",
              *(flag.format(taken=tmp_path / "taken", captions=text_file(tmp_path)) for flag in flags))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line or "Traceback" in line]
    assert caught.value.code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not list(tmp_path.glob("**/*.tmp")) and not list(tmp_path.glob("**/*.safetensors"))
