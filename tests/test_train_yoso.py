"""The trainer of one-step models: its losses, and runs on small folders as users start them."""

# ruff: noqa: F811  (a fixture is imported, and arguments have its name)

import functools
import json
import math
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trainer_helpers as helpers
from conftest import normal, randomise, relative
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_helpers import pairs  # noqa: F401  (a fixture)

import sample
import train_yoso as trainer
import training
from dataset.cache import write_cache
from dataset.folders import Captioned, open_paired
from dataset.loader import batches
from dataset.pictures import open_picture, to_tensor
from files import bases, checkpoints, tokenizers
from models import clip, diffusion, pixart, t5, unet, vae
from models.diffusion import Schedule, add_noise, zero_terminal_snr

SCHEDULE = Schedule.from_config(
    dict(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
    )
)
QUIET = ["--viz_freq", "1000", "--device", "cpu"]
SMALL = [*QUIET, "--prior_pictures", "3", "--validation_num_images", "2"]
TWO = [*SMALL, "--train_batch_size", "2"]
SMALL_PICTURES = [*TWO, "--resolution", "24"]
CENTRED = ["--train_image_prep", "resized_crop_24"]


def train(monkeypatch, *argv):
    helpers.train(monkeypatch, trainer, *argv)


def text_file(folder: Path) -> Path:
    captions = ["a cat", "a dog by a lake", "rain", "a boat", "fog"]
    captions += ["snow", "a car", "a tree", "night", "day"]
    (folder / "captions.txt").write_text("\n".join(captions))
    return folder / "captions.txt"


def labelled_zip(folder: Path) -> None:
    """set.zip: 20 pictures of 16 x 16 pixels and three classes."""
    labels = []
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for i in range(20):
            name = f"00000/img{i:08d}.png"
            labels.append([name, i % 3])
            Image.new("RGB", (16, 16), (10 * i, 100, 0)).save(folder / "one.png")
            archive.write(folder / "one.png", name)
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    """A small Stable Diffusion in a folder."""
    folder = tmp_path_factory.mktemp("sd")
    bases.save_folder(folder, bases.load_base("tiny", seed=5))
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    """A small PixArt in a folder, which predicts epsilon."""
    folder = tmp_path_factory.mktemp("dit")
    config = pixart.PixArtConfig(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=24,
        sample_size=8,
    )
    pieces = letters("abcdefghiklnorstuwy")
    text_config = t5.T5Config(
        vocab_size=pieces.get_vocab_size(),
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=4,
    )
    base = bases.Base(
        "",
        vae=bases.load_base("tiny").vae,
        transformer=randomise(pixart.PixArt(config)),
        text_encoder=randomise(t5.T5Encoder(text_config)),
        tokenizer=t5.T5Tokenizer(pieces),
        schedule=Schedule.from_config(
            dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
        ),
    )
    bases.save_folder(folder, base)
    return folder


def letters(alphabet: str) -> tokenizers.Pieces:
    """T5's word pieces, each a single letter."""
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -2.0]]
    pieces += [[letter, -3.0] for letter in alphabet]
    model = dict(type="Unigram", vocab=pieces, unk_id=2)
    return tokenizers.pieces_from_json(json.dumps(dict(model=model)))


# ----------------------------------------------------------------------------------- losses

def tables(t: list[int]) -> tuple[list[float], list[float]]:
    """alpha_t and sigma_t, computed anew."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = [math.prod((1 - betas[:u + 1]).tolist()) for u in t]
    return [a**0.5 for a in alpha_bar], [(1 - a) ** 0.5 for a in alpha_bar]


def columns(t: Tensor) -> list[Tensor]:
    """alpha_t and sigma_t as tensors [B, 1, 1, 1]."""
    values = tables(t.tolist())
    return [torch.tensor(value, dtype=torch.float64).view(-1, 1, 1, 1) for value in values]


T = torch.tensor([0, 3, 260, 700, 999])
GAMMA = 5.0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", [(5, 2), (5, 4, 3, 3)], ids=str)
def test_the_generator_keeps_what_has_no_noise_and_predicts_x0_elsewhere(kind, shape):
    schedule = Schedule.from_config(SCHEDULE.config | dict(prediction_type=kind))
    prediction, x = normal(*shape, seed=1).requires_grad_(), normal(*shape)
    G = trainer.generated(prediction, x, T, schedule)
    G.sum().backward()
    for i, (t, alpha, sigma) in enumerate(zip(T.tolist(), *tables(T.tolist()))):
        c_skip = 0.25 / ((10 * t) ** 2 + 0.25)
        c_out = 10 * t / math.sqrt((10 * t) ** 2 + 0.25)
        if kind == "epsilon":
            x0 = (x[i] - sigma * prediction[i]) / alpha
            slope = -c_out * sigma / alpha
        else:
            x0 = alpha * x[i] - sigma * prediction[i]
            slope = -c_out * sigma
        assert relative(G[i], c_skip * x[i] + c_out * x0) < 1e-9
        assert torch.allclose(prediction.grad[i], torch.full_like(x[i], slope), rtol=1e-9)
    assert torch.equal(G[0], x[0])


def test_adversarial_losses_are_softplus_per_sample_and_so_are_their_gradients():
    real, fake = normal(6, 1).requires_grad_(), normal(6, 1, seed=1).requires_grad_()
    loss = trainer.discriminator_loss(real, fake)
    loss.backward()
    expected = 0.0
    for r, f in zip(real.flatten().tolist(), fake.flatten().tolist()):
        expected += (math.log1p(math.exp(-r)) + math.log1p(math.exp(f))) / 6
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
    w = torch.tensor(w, dtype=torch.float64).view(-1, 1, 1, 1)
    difference = fake.detach() - x0
    expected = (w * difference**2).sum().item() / 180
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert relative(fake.grad, 2 * w * difference / 180) < 1e-9


def test_consistency_pulls_the_noisier_side_only_and_with_the_weight_of_the_paper():
    here, goal = normal(5, 7).requires_grad_(), normal(5, 7, seed=1).requires_grad_()
    s = diffusion.less_noisy(T, 25)
    assert s.tolist() == [0, 0, 235, 675, 974]
    loss = trainer.consistency_loss(here, goal, T, s, SCHEDULE, GAMMA)
    loss.backward()
    w = []
    for (a_t, s_t), (a_s, s_s) in zip(zip(*tables(T.tolist())), zip(*tables(s.tolist()))):
        difference = s_t / a_t - s_s / a_s
        w.append(min(1 / difference, GAMMA) if difference else GAMMA)
    assert GAMMA in w[1:] and w[-1] < 1  # both sides of the minimum
    w = torch.tensor(w, dtype=torch.float64)[:, None]
    difference = (here - goal).detach()
    assert loss.item() == pytest.approx((w * difference**2).sum().item() / 35, rel=1e-9)
    assert relative(here.grad, 2 * w * difference / 35) < 1e-9 and goal.grad is None
    # In pure noise the weight vanishes, and is a number.
    t, s = torch.full((5,), 999), torch.full((5,), 974)
    end = trainer.consistency_loss(here, goal, t, s, zero_terminal_snr(SCHEDULE), GAMMA)
    assert end.item() == 0


def test_a_floor_keeps_consistency_alive_in_pure_noise():
    here, goal = normal(5, 7), normal(5, 7, seed=1)
    s, schedule = diffusion.less_noisy(T, 25), zero_terminal_snr(SCHEDULE)
    distances = (here - goal).square().mean(1)
    last = here[-1:], goal[-1:], T[-1:], s[-1:]
    for floor in (0.5, 2.0):
        loss = trainer.consistency_loss(*last, schedule, GAMMA, floor)
        assert relative(loss, floor * distances[-1]) < 1e-9
    everywhere = trainer.consistency_loss(here, goal, T, s, schedule, GAMMA, GAMMA)
    assert relative(everywhere, GAMMA * distances.mean()) < 1e-9


def test_the_v_adaption_asks_for_the_v_of_the_teachers_epsilon():
    v, eps, x = [normal(5, 4, 2, 2, seed=i) for i in range(3)]
    v.requires_grad_()
    old = Schedule.from_config(SCHEDULE.config | dict(prediction_type="epsilon"))
    loss = trainer.adapt_loss(v, eps, x, x, T, old, SCHEDULE)
    loss.backward()
    alpha, sigma = columns(T)
    target = alpha * eps - sigma * (x - sigma * eps) / alpha
    assert loss.item() == pytest.approx(((v - target) ** 2).mean().item(), rel=1e-9)
    assert relative(v.grad, 2 * (v.detach() - target) / v.numel()) < 1e-9


def test_the_zero_snr_adaption_asks_for_the_teachers_picture_on_the_new_schedule():
    v, teacher_prediction, x0, eps = [normal(5, 4, 2, 2, seed=i) for i in range(4)]
    v.requires_grad_()
    new = zero_terminal_snr(SCHEDULE)
    x, x_new = add_noise(x0, eps, T, SCHEDULE), add_noise(x0, eps, T, new)
    loss = trainer.adapt_loss(v, teacher_prediction, x, x_new, T, SCHEDULE, new)
    loss.backward()
    alpha, sigma = columns(T)
    first, last = tables([0, 999])[0]
    alpha_new = (alpha - last) * first / (first - last)
    predicted = alpha * x - sigma * teacher_prediction
    target = (alpha_new * x_new - predicted) / (1 - alpha_new**2).sqrt()
    # At the last timestep x is the noise, and the target -x0.
    assert relative(target[-1], -predicted[-1]) < 1e-9 and relative(x_new[-1], eps[-1]) < 1e-9
    # Near t = 0, 1 - alpha^2 loses digits.
    assert loss.item() == pytest.approx(((v - target) ** 2).mean().item(), rel=1e-7)
    assert relative(v.grad, 2 * (v.detach() - target) / v.numel()) < 1e-7


# ----------------------------------------------------- the losses of a micro-batch, with toys

def toy_generator(x, t, context):
    return torch.tanh(2 * x + t.to(x).view(-1, 1, 1, 1) / 1000 + context)


def toy_discriminator(x, t, context):
    return x.mean((1, 2, 3))[:, None] + t.to(x)[:, None] / 1000 + context


def toy_features(x, context):
    return x.square() + context


def test_yoso_losses_are_the_weighted_terms_of_the_paper():
    cfg = trainer.Config(lambda_gan=2, lambda_kl=3, lambda_con=5, snr_floor=0.7, con_floor=0.6)
    x0, eps, s = normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=1), diffusion.less_noisy(T, 25)
    networks = toy_generator, toy_discriminator, toy_features
    terms, fake, real = trainer.yoso_losses(*networks, x0, 0.1, 0.2, T, eps, SCHEDULE, cfg)
    G = [toy_generator(add_noise(x0, eps, u, SCHEDULE), u, 0.1) for u in (T, s)]
    gan, distance = F.softplus(-toy_discriminator(G[0], T, 0.2)).mean(), [g**2 + 0.2 for g in G]
    kl = trainer.kl_loss(G[0], x0, T, SCHEDULE, GAMMA, floor=0.7)
    con = trainer.consistency_loss(*distance, T, s, SCHEDULE, GAMMA, floor=0.6)
    assert torch.equal(fake, G[0]) and list(terms) == ["gan", "kl", "con"]
    for name, wanted in dict(gan=2 * gan, kl=3 * kl, con=5 * con).items():
        assert relative(terms[name], wanted) < 1e-12, name


@pytest.mark.parametrize("kind", ["coop", "data", "noisy", "no discriminator"])
def test_yoso_losses_show_the_discriminator_what_adversarial_says(kind):
    seen, D = [], None
    cfg = trainer.Config(lambda_con=0)
    if kind != "no discriminator":
        cfg.adversarial = kind

        def D(x, t, context):
            seen.append((x.detach(), t, context))
            return toy_discriminator(x, t, context)

    x0, eps, noise, other = [normal(5, 4, 3, 3, seed=i) for i in range(4)]
    terms, fake, real = trainer.yoso_losses(
        toy_generator, D, None, x0, 0.1, 0.2, T, eps, SCHEDULE, cfg, noise
    )
    k = diffusion.less_noisy(T, 250)
    assert k.tolist() == [0, 0, 10, 450, 749]
    if kind == "coop":
        assert torch.equal(real, toy_generator(add_noise(x0, eps, k, SCHEDULE), k, 0.1))
    else:
        assert torch.equal(real, x0)
    if D is None:
        assert list(terms) == ["kl"] and not fake.requires_grad
        return

    # The loop hands both sides to `logits_of`, each with noise of its own.
    for side, again in [(real, other), (fake, noise)]:
        trainer.logits_of(D, side, T, 0.2, SCHEDULE, cfg, again)
    through, of_real, of_fake = seen
    if kind == "noisy":
        assert torch.equal(of_real[0], add_noise(x0, other, k, SCHEDULE))
        assert torch.equal(of_fake[0], add_noise(fake, noise, k, SCHEDULE))
    else:
        assert torch.equal(of_real[0], real) and torch.equal(of_fake[0], fake)
    assert torch.equal(through[0], of_fake[0]) and not real.requires_grad
    for _, t, context in seen:
        assert torch.equal(t, k if kind == "noisy" else T) and context == 0.2


def test_gradients_of_yoso_losses_go_through_the_noisier_generator_alone():
    weight, calls = torch.ones((), dtype=torch.float64, requires_grad=True), []

    def G(x, t, context):
        calls.append((t.tolist(), torch.is_grad_enabled()))
        return weight * x

    x0, eps, cfg = normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=1), trainer.Config()
    terms, _, real = trainer.yoso_losses(
        G, toy_discriminator, None, x0, None, 0.2, T, eps, SCHEDULE, cfg
    )
    coop, con = [diffusion.less_noisy(T, steps).tolist() for steps in (250, 25)]
    # With gradient first: autocast would use weights again that were cast without one.
    assert calls == [(T.tolist(), True), (coop, False), (con, False)]
    x = add_noise(x0, eps, T, SCHEDULE)
    x_con = add_noise(x0, eps, diffusion.less_noisy(T, 25), SCHEDULE)
    other = weight.detach().clone().requires_grad_()
    kl = trainer.kl_loss(other * x, x0, T, SCHEDULE, GAMMA)
    wanted = torch.autograd.grad(cfg.lambda_kl * kl, other)[0]
    assert relative(torch.autograd.grad(terms["kl"], weight, retain_graph=True)[0], wanted) < 1e-12
    s = diffusion.less_noisy(T, 25)
    goal_is_fixed = trainer.consistency_loss(other * x, x_con, T, s, SCHEDULE, GAMMA)
    wanted = torch.autograd.grad(cfg.lambda_con * goal_is_fixed, other)[0]
    assert relative(torch.autograd.grad(terms["con"], weight)[0], wanted) < 1e-12


def test_adapt_losses_compare_student_and_teacher_on_their_own_schedules():
    x0, eps, new = normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=1), zero_terminal_snr(SCHEDULE)
    x_old, x_new = add_noise(x0, eps, T, SCHEDULE), add_noise(x0, eps, T, new)
    terms, fake, real = trainer.adapt_losses(
        toy_generator, lambda x, t, context: 3 * x, x0, [0.1], T, eps, SCHEDULE, new
    )
    v = toy_generator(x_new, T, 0.1)
    wanted = trainer.adapt_loss(v, 3 * x_old, x_old, x_new, T, SCHEDULE, new)
    assert list(terms) == ["adapt"] and relative(terms["adapt"], wanted) < 1e-12
    alpha, sigma = new.at(T, x0)
    assert relative(fake, alpha * x_new - sigma * v) < 1e-12 and real is x0


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_last_noise_level_gets_its_share_of_the_batch(share):
    run = SimpleNamespace(cfg=trainer.Config(last_share=share), global_batch=2000)
    nets = SimpleNamespace(schedule=SCHEDULE, last_timestep=999)
    t = trainer.draw_timesteps(nets, run, step=3)
    assert abs((t == 999).float().mean() - share) < 0.04
    assert abs(t[t < 999].float().mean() - 500) < 30
    assert torch.equal(t, trainer.draw_timesteps(nets, run, step=3))
    assert not torch.equal(t, trainer.draw_timesteps(nets, run, step=4))


@pytest.mark.parametrize("coop_steps, first", [(250, 750), (1, 998), (2000, 0)])
def test_the_noisy_levels_before_the_last_get_their_share_of_the_batch(coop_steps, first):
    cfg = trainer.Config(last_share=0.25, high_share=0.75, coop_steps=coop_steps)
    run = SimpleNamespace(cfg=cfg, global_batch=2000)
    nets = SimpleNamespace(schedule=SCHEDULE, last_timestep=999)
    t = trainer.draw_timesteps(nets, run, step=3)
    high = t[t < 999]
    assert abs(len(high) / len(t) - 0.75) < 0.04
    assert first <= high.min() < first + 10 and 990 < high.max() <= 998

    cfg.denoising_steps = 4
    denoising = trainer.draw_timesteps(nets, run, step=3)
    assert abs(denoising.float().mean() - 500) < 30 and denoising.min() < 10


def test_the_floor_of_the_weights_reaches_the_loss():
    x0, eps = normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=1)
    found = []
    for floor in (0.0, 0.7):
        cfg = trainer.Config(snr_floor=floor, lambda_kl=1.0, lambda_con=0)
        terms, fake, _ = trainer.yoso_losses(
            toy_generator, None, None, x0, 0.1, 0.2, T, eps, SCHEDULE, cfg
        )
        wanted = trainer.kl_loss(fake, x0, T, SCHEDULE, GAMMA, floor)
        assert relative(terms["kl"], wanted) < 1e-12
        found.append(terms["kl"])
    assert found[1] > found[0]


# ------------------------------------------------------------------------------- who learns

@pytest.mark.parametrize(
    "flags",
    [
        ["--train", "lora"],
        ["--train", "lora", "--adversarial", "noisy", "--consistency", "mse"],
        ["--adversarial", "data"],
        ["--disc_random"],
    ],
    ids=["lora", "noisy", "all, data", "random"],
)
def test_generator_and_discriminator_take_turns_and_nothing_else_changes(
    monkeypatch, tmp_path, pairs, flags
):
    made, before, average, calls, first = {}, {}, training.average_gradients, [], []
    load_base, lower_half = bases.load_base, trainer.lower_half
    build = trainer.LatentDiscriminator

    def keep(name, network):
        made[name] = network
        before[name] = {k: v.detach().clone() for k, v in network.state_dict().items()}
        return network

    def load_and_keep(*args, **kwargs):
        base = load_base(*args, **kwargs)
        for part in ("unet", "vae", "text_encoder"):
            keep(part, getattr(base, part))
        return base

    def build_and_keep(network):
        return keep("discriminator", build(network))

    def halve_and_keep(*args, **kwargs):
        return keep("feature network", lower_half(*args, **kwargs))

    def watch(parameters):
        parameters = list(parameters)
        calls.append(parameters)
        state = made["discriminator"].unet.state_dict()
        first.append({k: v.clone() for k, v in state.items()})
        idle = made["discriminator" if len(calls) % 2 else "unet"]
        assert all(p.grad is None for p in idle.parameters())
        assert all(p.grad is not None for p in parameters)
        average(parameters)

    monkeypatch.setattr(bases, "load_base", load_and_keep)
    monkeypatch.setattr(trainer, "LatentDiscriminator", build_and_keep)
    monkeypatch.setattr(trainer, "lower_half", halve_and_keep)
    monkeypatch.setattr(training.run, "average_gradients", watch)
    more = ["--dataset_folder", pairs, *SMALL_PICTURES, "--max_train_steps", 3]
    more += ["--learning_rate", 1e-3, "--output_dir", tmp_path / "run"]
    train(monkeypatch, *flags, *more)

    of_d = {id(p) for p in made["discriminator"].parameters()}
    assert len(calls) == 6 and {id(p) for p in calls[1]} == of_d
    # The discriminator's half begins as the base's own, unless it is to be random.
    for k, v in first[0].items():
        if v.ndim > 1:
            assert torch.equal(v, before["unet"][k]) == ("--disc_random" not in flags)
    trained = {id(p) for p in calls[0] + calls[1]}
    for name, network in made.items():
        for k, p in network.named_parameters():
            if k in before[name]:
                assert torch.equal(p, before[name][k]) != (id(p) in trained), (name, k)
    names = [k for k, p in made["unet"].named_parameters() if id(p) in trained]
    assert ("lora" in flags) == all(".lora_" in k for k in names)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    if "lora" in flags:
        assert saved.keys() == {f"unet.{k}" for k in names} | {"prior.mean", "prior.std"}


class FirstStep:
    """The tensors of the first step on `pairs`, computed anew, with --dtype float64."""

    def __init__(self, folder: Path):
        self.base = bases.load_base("tiny", dtype=torch.float64, seed=42)
        items = open_paired(folder, "train", "resized_crop_24")
        batch = next(batches(items, 2, 42))
        assert batch["caption"] == ["noise"] * 2
        mean, logvar, _ = self.base.vae.encode(batch["target"].double())
        latents = mean + (logvar / 2).exp() * self.noise("latent")
        self.x0 = latents * self.base.vae.config.scaling_factor
        self.t = torch.randint(1000, (2,), generator=training.rng(42, 0, "t"))

    def noise(self, purpose: str) -> Tensor:
        return torch.randn(2, 4, 6, 6, generator=training.rng(42, 0, purpose)).double()

    def add_noise(self, x: Tensor, purpose: str, t: Tensor) -> Tensor:
        return add_noise(x, self.noise(purpose), t, self.base.schedule)

    def G(self, t: Tensor, caption: str = "noise") -> Tensor:
        x = self.add_noise(self.x0, "noise", t)
        prediction = self.base.unet(x, t, *self.base.encode([caption] * 2))
        return trainer.generated(prediction, x, t, self.base.schedule)


@pytest.mark.parametrize("kind", ["coop", "data", "noisy"])
@torch.no_grad()
def test_a_step_shows_the_discriminator_what_the_flag_says(monkeypatch, tmp_path, pairs, kind):
    """What D sees as real and as fake in the first step, and at which noise levels."""
    seen, forward = [], trainer.LatentDiscriminator.forward

    def watched(D, x, t, context):
        seen.append((x.detach().clone(), t.clone()))
        return forward(D, x, t, context)

    monkeypatch.setattr(trainer.LatentDiscriminator, "forward", watched)
    flags = ["--dataset_folder", pairs, *CENTRED, *SMALL_PICTURES, "--dtype", "float64"]
    flags += ["--adversarial", kind, "--lambda_con", 0, "--max_train_steps", 1]
    with torch.enable_grad():
        train(monkeypatch, *flags, "--output_dir", tmp_path / "run")

    (through, _), (real, t_real), (fake, t_fake) = seen
    step = FirstStep(pairs)
    s = (step.t - 250).clamp(min=0)
    wanted = dict(real=step.x0, fake=step.G(step.t), t=step.t)
    if kind == "coop":
        wanted["real"] = step.G(s)
    if kind == "noisy":
        wanted["real"] = step.add_noise(step.x0, "again real", s)
        wanted["fake"] = step.add_noise(wanted["fake"], "again fake", s)
        wanted["t"] = s
    assert relative(real, wanted["real"]) < 1e-9 and relative(fake, wanted["fake"]) < 1e-9
    assert torch.equal(t_real, wanted["t"]) and torch.equal(t_fake, wanted["t"])
    assert torch.equal(through, fake)


def test_the_mismatch_loss_is_the_mean_over_captions_that_differ():
    context = normal(4, 3, 2)
    context[1] = context[0]
    others, differs = trainer.other_captions(context)
    for i in range(4):
        assert torch.equal(others[i], context[i - 1])
    assert differs.tolist() == [True, False, True, True]
    logits = normal(4, 1, seed=1)
    wanted = F.softplus(logits[[0, 2, 3]]).mean()
    assert relative(trainer.mismatch_loss(logits, differs), wanted) < 1e-12
    # One caption alone: nothing to learn, and no NaN.
    assert trainer.mismatch_loss(logits, torch.zeros(4, dtype=torch.bool)) == 0


@torch.no_grad()
def test_a_step_shows_the_discriminator_wrong_captions_on_request(
    monkeypatch, capsys, tmp_path, pairs
):
    """D sees its real side once more, with the neighbours' captions, and calls that fake."""
    seen, forward = [], trainer.LatentDiscriminator.forward

    def watched(D, x, t, context):
        logits = forward(D, x, t, context)
        seen.append((x.detach().clone(), context.clone(), logits.detach()))
        return logits

    monkeypatch.setattr(trainer.LatentDiscriminator, "forward", watched)
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    words = ["fog", "fog", "rain", "snow", "ice", "sun"]
    captions = {f"{i}.png": word for i, word in enumerate(words)}
    (data / "train_prompts.json").write_text(json.dumps(captions))
    flags = ["--dataset_folder", data, *CENTRED, *SMALL_PICTURES, "--dtype", "float64"]
    flags += ["--lambda_gan", 0.5, "--lambda_mismatch", 2, "--max_train_steps", 1]
    with torch.enable_grad():
        train(monkeypatch, *flags, "--output_dir", tmp_path / "run")

    _, (real, context, right), (_, _, fake), (again, others, wrong) = seen
    assert torch.equal(again, real) and torch.equal(others, context.roll(1, dims=0))
    log = helpers.read_log(tmp_path / "run")[0]
    differs = trainer.other_captions(context)[1]
    assert differs.any()
    mismatch = 0.5 * 2 * F.softplus(wrong[differs]).mean()
    disc = 0.5 * (F.softplus(-right) + F.softplus(fake)).mean()
    assert log["mismatch"] == pytest.approx(mismatch.item(), rel=1e-9)
    assert log["disc"] == pytest.approx(disc.item(), rel=1e-9)
    # Neighbours are those of a micro-batch, whose size then decides what is learned.
    with pytest.raises(SystemExit):
        train(monkeypatch, "--resume", tmp_path / "run", "--train_batch_size", 1)
    assert "takes captions within such a batch" in capsys.readouterr().err


@torch.no_grad()
def test_captions_are_left_out_on_request(monkeypatch, tmp_path, pairs):
    flags = ["--dataset_folder", pairs, *CENTRED, *SMALL_PICTURES, "--dtype", "float64"]
    flags += ["--lambda_gan", 0, "--lambda_con", 0, "--max_train_steps", 1]
    with torch.enable_grad():
        train(monkeypatch, *flags, "--unconditional", "--output_dir", tmp_path / "run")
    log = helpers.read_log(tmp_path / "run")[0]
    step = FirstStep(pairs)
    kl = []
    for caption in ("", "noise"):
        fake = step.G(step.t, caption)
        loss = trainer.kl_loss(fake, step.x0, step.t, step.base.schedule, GAMMA)
        kl.append(0.5 * loss.item())
    assert log["kl"] == pytest.approx(kl[0], rel=1e-9)
    assert log["kl"] != pytest.approx(kl[1], rel=1e-9)


@torch.no_grad()
def test_every_validation_prompt_is_drawn_even_beside_few_test_pictures():
    items = [dict(caption="a", target=0), dict(caption="b", target=1)]
    cfg = trainer.Config(validation_prompts="fog|rain|snow")
    chosen = [(item["caption"], item["target"]) for item in trainer.choose_preview(cfg, items)]
    assert chosen == [("fog", 0), ("rain", 1), ("snow", 0)]
    assert trainer.choose_preview(trainer.Config(), items) == items
    assert len(trainer.choose_preview(trainer.Config(validation_prompts=20 * "a|"), items)) == 16


def test_one_test_picture_has_no_variety(monkeypatch, tmp_path, pairs):
    flags = ["--dataset_folder", pairs, *CENTRED, *SMALL_PICTURES, "--max_train_steps", 1]
    flags += ["--validation_num_images", 1, "--validation_steps", 1, "--lambda_gan", 0]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert "val_variety" not in helpers.read_log(tmp_path / "run")[0]


def test_the_grid_shows_the_validation_prompts(monkeypatch, tmp_path, pairs):
    grids = []
    monkeypatch.setattr(training, "save_grid", lambda path, columns: grids.append(columns))
    flags = ["--dataset_folder", pairs, "--validation_prompts", "fog|rain", *SMALL_PICTURES]
    flags += ["--dtype", "float64", "--max_train_steps", 1]
    with torch.enable_grad():
        train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    # One column of samples: no picture of the data set has these captions.
    ((made,),) = grids
    base, prior = checkpoints.load_yoso(str(tmp_path / "run"), dtype=torch.float64)
    t = torch.tensor([len(base.schedule.alpha) - 1])
    assert len(made) == 2
    for i, (own, other) in enumerate([("fog", "rain"), ("rain", "fog")]):
        noise, (generator,) = training.draw_noise([i], (4, 6, 6))
        again = torch.randn(1, 4, 6, 6, generator=generator)
        x = diffusion.start_from_prior(
            noise.double(), again.double(), *prior, t.item(), base.schedule
        )
        expected = []
        for caption in (own, other):
            prediction = base.unet(x, t, *base.encode([caption]))
            latents = trainer.generated(prediction, x, t, base.schedule)
            picture = base.vae.decode(latents / base.vae.config.scaling_factor)
            expected.append(picture[0].float())
        assert relative(made[i], expected[0]) < 1e-6 < relative(made[i], expected[1])


def test_the_average_moves_slowly_towards_the_weights():
    weight = torch.nn.Parameter(torch.ones(2))
    ema = {"weight": torch.zeros(2)}
    trainer.update_ema(ema, {"weight": weight}, decay=0.75)
    assert ema["weight"].tolist() == [0.25, 0.25] and weight.tolist() == [1, 1]


def test_each_network_has_its_own_rate_decay_and_bound(monkeypatch, tmp_path, pairs):
    updates = []
    update = training.Run.update

    def watched(run, optimizer, max_norm=math.inf):
        group = optimizer.param_groups[0]
        updates.append((group["lr"], group["betas"][0], max_norm))
        return update(run, optimizer, max_norm)

    monkeypatch.setattr(training.Run, "update", watched)
    flags = ["--dataset_folder", pairs, *SMALL_PICTURES, "--max_train_steps", 1]
    flags += ["--learning_rate", 0.25, "--disc_lr_ratio", 0.5, "--max_grad_norm", 0.5]
    flags += ["--adam_beta1", 0.8, "--disc_adam_beta1", 0.3]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert updates == [(0.25, 0.8, 0.5), (0.125, 0.3, math.inf)]


def test_the_teacher_of_an_adaption_stays_and_the_next_base_is_the_ema(
    monkeypatch, tmp_path, pairs
):
    calls = []
    adapt_losses = trainer.adapt_losses

    def watched(student, teacher, *args):
        calls.append((teacher.conv_in.weight.detach().clone(), *args[-2:]))
        return adapt_losses(student, teacher, *args)

    monkeypatch.setattr(trainer, "adapt_losses", watched)
    flags = ["--dataset_folder", pairs, *SMALL_PICTURES, "--train", "all"]
    flags += ["--stage", "adapt_zsnr", "--max_train_steps", 2, "--learning_rate", 1e-2]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    (first, old, new), (second, _, _) = calls
    assert torch.equal(first, second)
    assert old.alpha[-1] > 0 == new.alpha[-1]
    state = helpers.read_state(tmp_path / "run")
    weight = bases.load_base(str(tmp_path / "run" / "base")).unet.conv_in.weight
    assert torch.equal(weight, state["ema"]["unet.conv_in.weight"])
    assert not torch.equal(weight, state["trained"]["unet.conv_in.weight"])


def test_the_network_of_the_perceptual_distance_does_not_learn(monkeypatch, tmp_path, pairs):
    made = []
    lower_half = trainer.lower_half

    def watched(*args, **kwargs):
        half = lower_half(*args, **kwargs)
        made.append((half, [p.detach().clone() for p in half.parameters()]))
        return half

    monkeypatch.setattr(trainer, "lower_half", watched)
    flags = ["--dataset_folder", pairs, *SMALL_PICTURES, "--train", "all"]
    flags += ["--max_train_steps", 1, "--learning_rate", 1e-2]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    ((half, before),) = made
    assert all(torch.equal(p, was) for p, was in zip(half.parameters(), before, strict=True))


def test_features_are_those_of_clean_latents():
    network = SimpleNamespace(features=lambda *args: args)
    nets = SimpleNamespace(feature_network=network, last_timestep=9)
    assert trainer.Networks.features(nets, "x", "context") == ("x", 0, "context")


def test_the_variety_is_below_1_for_samples_too_much_alike(monkeypatch):
    real = normal(4, 3, 8, 8)
    monkeypatch.setattr(trainer, "draw", lambda *_: (real, 0.5 * real))
    nets = SimpleNamespace(base=SimpleNamespace(vae=None), inception=None)
    run = SimpleNamespace(cfg=trainer.Config(validation_num_images=4))
    assert trainer.validate(nets, run, None, range(9)) == {"val_variety": pytest.approx(0.5)}


# ------------------------------------------------------------------------- stages and files

def test_the_quick_adaption_leads_from_epsilon_to_v_to_pure_noise_and_each_result_is_a_base(
    monkeypatch, tmp_path
):
    base = bases.load_base("tiny")
    base.schedule.config["prediction_type"] = "epsilon"
    bases.save_folder(tmp_path / "tiny-epsilon", base)
    flags = ["--train", "all", "--dataset_folder", "drawn:scenes", *SMALL_PICTURES]
    flags += ["--max_train_steps", 2, "--learning_rate", 1e-4]
    one, two, three = [tmp_path / name for name in ("one", "two", "three")]

    start = ["--base", tmp_path / "tiny-epsilon", "--stage", "adapt_v"]
    train(monkeypatch, *start, *flags, "--output_dir", one)
    v = bases.load_base(str(one / "base"))
    assert v.schedule.prediction_type == "v_prediction" and v.schedule.alpha[-1] > 0

    start = ["--base", one / "base", "--stage", "adapt_zsnr"]
    train(monkeypatch, *start, *flags, "--output_dir", two)
    pure = bases.load_base(str(two / "base"))
    assert pure.schedule.alpha[-1] == 0
    assert not torch.equal(pure.unet.conv_in.weight, v.unet.conv_in.weight)
    assert torch.equal(pure.vae.decoder.conv_in.weight, base.vae.decoder.conv_in.weight)

    train(monkeypatch, "--base", two / "base", *flags, "--output_dir", three)
    adaption, last = helpers.read_log(one)[-1], helpers.read_log(three)[-1]
    assert "adapt" in adaption and "gan" not in adaption
    losses = {"gan", "kl", "con", "disc", "grad_norm"}
    signals = {"logit_gap", "latent_contrast", "disc_right_on_real", "val_variety"}
    assert losses | signals <= last.keys()
    assert all(math.isfinite(value) for value in last.values())


def test_the_checkpoint_is_the_ema_of_the_weights_and_carries_the_prior(
    monkeypatch, tmp_path, pairs
):
    run = tmp_path / "run"
    flags = ["--train", "lora", "--dataset_folder", pairs, *SMALL_PICTURES, "--dtype", "float64"]
    flags += ["--max_train_steps", 3, "--learning_rate", 1e-3]
    train(monkeypatch, *flags, "--output_dir", run)
    state = helpers.read_state(run)
    with safe_open(run / "model.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["kind"], facts["base"]) == ("yoso", "tiny")
    assert json.loads(facts["config"])["lora_rank"] == 64
    saved = load_file(run / "model.safetensors")
    name = "unet.mid_block.resnets.0.conv1.lora_B.weight"
    assert torch.equal(saved[name], state["ema"][name])
    assert not torch.equal(saved[name], state["trained"][name])

    # The prior: mean and standard deviation over latents of randomly chosen pictures.
    base = bases.load_base("tiny", dtype=torch.float64)
    pictures = open_paired(pairs, "train", "resized_crop_24")
    chosen = torch.randperm(6, generator=training.rng(42, 0, "prior"))[:3].tolist()
    chosen = torch.stack([pictures[i]["target"] for i in chosen]).double()
    with torch.no_grad():
        latents, _, _ = base.vae.encode(chosen)
    assert relative(saved["prior.mean"], latents.mean(0)) < 1e-9
    assert relative(saved["prior.std"], latents.std(0, correction=0)) < 1e-9
    _, std = bases.load_prior(run / "prior.safetensors", (4, 6, 6))
    assert relative(std.double(), saved["prior.std"]) < 1e-6

    # The LoRA in the formats of others: alpha is 8, so the scale alpha / rank is 1/8.
    lora = load_file(run / "lora.safetensors")
    assert relative(lora[name] * 8, saved[name]) < 1e-9
    layer = base.unet.mid_block.resnets[0].conv1
    before = layer.weight.detach().clone()
    bases.load_lora(str(run), base)
    A = saved[name.replace("lora_B", "lora_A")].flatten(1)
    change = base.unet.mid_block.resnets[0].conv1.weight.detach() - before
    assert relative(change.flatten(1), saved[name].flatten(1) @ A / 8) < 1e-6
    assert len(load_file(run / "lora_kohya.safetensors")) == 1.5 * len(lora)


def test_pixart_goes_the_whole_way_beside_a_stable_diffusion_critic(
    monkeypatch, tmp_path, pairs, dit, sd
):
    """Its bases hold the transformer alone, and take all else from the first; then a LoRA."""
    flags = ["--dataset_folder", pairs, *TWO, "--resolution", 32]
    flags += ["--max_train_steps", 2, "--learning_rate", 1e-4]
    base = dit
    for stage in ("adapt_v", "adapt_zsnr", "yoso"):
        # The adaption stages have no critic.
        critic = sd if stage == "yoso" else "/nowhere"
        more = ["--base", base, "--disc_base", critic, "--train", "all", "--stage", stage]
        train(monkeypatch, *flags, *more, "--output_dir", tmp_path / stage)
        base = tmp_path / stage / "base"
        names = sorted(path.name for path in base.iterdir())
        assert names == ["model_index.json", "scheduler", "transformer"]

    last, first = [bases.load_base(str(folder), bases.PIXART) for folder in (base, dit)]
    assert last.schedule.alpha[-1] == 0 and last.schedule.prediction_type == "v_prediction"
    assert not torch.equal(last.transformer.proj_out.weight, first.transformer.proj_out.weight)
    assert torch.equal(last.vae.decoder.conv_in.weight, first.vae.decoder.conv_in.weight)

    more = ["--base", base, "--disc_base", sd, "--train", "lora", "--lora_rank", 4]
    train(monkeypatch, *flags, *more, "--output_dir", tmp_path / "lora")
    trained, _ = checkpoints.load_yoso(str(tmp_path / "lora"))
    bases.load_lora(str(tmp_path / "lora"), last)
    for name, p in last.transformer.state_dict().items():
        assert relative(p + 1, trained.transformer.state_dict()[name] + 1) < 1e-6, name


@torch.no_grad()
def test_a_teacher_draws_the_pictures_of_captions_alone(monkeypatch, tmp_path, sd):
    captions = text_file(tmp_path)
    flags = ["--dataset_folder", captions, "--teacher", sd, "--dtype", "float64", *SMALL]
    flags += ["--train_batch_size", 3, "--resolution", 32, "--max_train_steps", 1]
    with torch.enable_grad():
        more = ["--lambda_gan", 0, "--lambda_con", 0, "--output_dir", tmp_path / "run"]
        train(monkeypatch, *flags, *more)
    log = helpers.read_log(tmp_path / "run")[0]

    teacher = bases.load_base(str(sd), dtype=torch.float64)
    base = bases.load_base("tiny", dtype=torch.float64, seed=42)
    texts = next(batches(Captioned(captions, "train", "no_resize"), 3, 42))["caption"]

    def noise(purpose):
        return torch.randn(3, 4, 8, 8, generator=training.rng(42, 0, purpose)).double()

    x = diffusion.start(noise("latent"), 999, teacher.schedule)
    prediction = teacher.unet(x, 999, *teacher.encode(texts))
    kind = teacher.schedule.prediction_type
    x0 = diffusion.predict_x0(prediction, x, 999, teacher.schedule, kind)
    t = torch.randint(1000, (3,), generator=training.rng(42, 0, "t"))
    x_t = add_noise(x0, noise("noise"), t, base.schedule)
    prediction = base.unet(x_t, t, *base.encode(texts))
    fake = trainer.generated(prediction, x_t, t, base.schedule)
    kl = trainer.kl_loss(fake, x0, t, base.schedule, GAMMA)
    assert log["kl"] == pytest.approx(0.5 * kl.item(), rel=1e-9)


def make_cache(source: Path, folder: Path, base: str = "tiny", side: int = 24, shard: int = 256):
    write_cache(
        str(source),
        base,
        folder,
        prep=f"resized_crop_{side}",
        size=side,
        column="text",
        seed=42,
        batch=4,
        device="cpu",
        dtype="float32",
        shard_items=shard,
    )


def test_a_cache_trains_what_its_pictures_train(monkeypatch, tmp_path, pairs):
    make_cache(pairs, tmp_path / "cache", shard=4)
    flags = ["--train", "lora", *SMALL_PICTURES, "--max_train_steps", 3]
    sources = {"pictures": [pairs, *CENTRED], "cached": [tmp_path / "cache"]}
    for name, source in sources.items():
        run = ["--dataset_folder", *source, "--output_dir", tmp_path / name]
        train(monkeypatch, *flags, *run)
    one, other = [helpers.read_state(tmp_path / name) for name in sources]
    for part in ("prior", "trained", "ema"):
        assert_same(one[part], other[part], 1e-3)
    # With --train all the checkpoint holds the text encoder, which a cache does without.
    flags = ["--seed", 0, "--dataset_folder", tmp_path / "cache", *SMALL_PICTURES]
    train(monkeypatch, *flags, "--max_train_steps", 1, "--output_dir", tmp_path / "all")
    base, _ = checkpoints.load_yoso(str(tmp_path / "all"))
    assert base.encode(["noise"])[0].isfinite().all()


@pytest.mark.parametrize(
    "flags",
    [
        ["--train_image_prep", "resized_crop_24"],
        ["--train_image_prep", "resize_24"],
        ["--test_image_prep", "resized_crop_24"],
    ],
    ids=["cropped", "resized", "test"],
)
def test_a_cache_is_not_cropped_again(monkeypatch, capsys, tmp_path, pairs, flags):
    make_cache(pairs, tmp_path / "cache")
    run = ["--dataset_folder", tmp_path / "cache", *SMALL_PICTURES]
    with pytest.raises(SystemExit):
        train(monkeypatch, *run, *flags, "--output_dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert "is a cache, whose pictures were cropped when it was made" in error
    assert not (tmp_path / "run").exists()


def test_wrong_captions_need_two_of_them(monkeypatch, capsys, tmp_path, pairs):
    flags = [*SMALL_PICTURES, "--dataset_folder", pairs, "--lambda_mismatch", 1]
    with pytest.raises(SystemExit):
        train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert "--lambda_mismatch shows a picture with a" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_cache_keeps_its_size_whatever_the_resolution(capsys, monkeypatch, tmp_path, pairs):
    make_cache(pairs, tmp_path / "cache")
    run = [*SMALL_PICTURES, "--seed", 0, "--dataset_folder", tmp_path / "cache"]
    run += ["--max_train_steps", 1]
    train(monkeypatch, *run, "--resolution", 24, "--output_dir", tmp_path / "same")
    assert "has no effect" not in capsys.readouterr().err
    train(monkeypatch, *run, "--resolution", 48, "--output_dir", tmp_path / "other")
    assert "of 24 x 24; these are trained on, and --resolution 48 has" in capsys.readouterr().err
    same = load_file(tmp_path / "same" / "model.safetensors")
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(tensor, other[name]) for name, tensor in same.items())


@torch.no_grad()
def test_raw_pictures_and_classes_train_from_scratch_and_the_file_draws_alone(
    monkeypatch, tmp_path
):
    labelled_zip(tmp_path)
    flags = ["--base", "pixels", "--dataset_folder", tmp_path / "set.zip", *QUIET]
    flags += ["--train_batch_size", 2, "--validation_num_images", 2, "--resolution", 16]
    with torch.enable_grad():
        train(monkeypatch, *flags, "--max_train_steps", 2, "--output_dir", tmp_path / "run")

    base, prior = checkpoints.load_yoso(str(tmp_path / "run"))
    assert base.schedule.alpha[-1] == 0 and prior[0].shape == (3, 16, 16)
    made = sample.text_to_image(base, "class 2", [5], (16, 16), sampler="lcm")
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([999])
    prediction = base.unet(noise, t, *base.encode(["class 2"]))
    x0 = trainer.generated(prediction, noise, t, base.schedule)
    assert relative(made, (x0 / 2).clamp(-1, 1)) < 1e-5
    other = sample.text_to_image(base, "class 1", [5], (16, 16), sampler="lcm")
    assert not torch.equal(made, other)  # the class matters


def test_the_first_steps_denoise_and_resuming_among_them_gives_the_same_bits(
    monkeypatch, tmp_path
):
    labelled_zip(tmp_path)
    flags = ["--base", "pixels", "--dataset_folder", tmp_path / "set.zip", *QUIET]
    flags += ["--train_batch_size", 2, "--validation_num_images", 2, "--resolution", 16]
    flags += ["--denoising_steps", 2]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(monkeypatch, *flags, "--max_train_steps", 4, "--output_dir", whole)
    train(monkeypatch, *flags, "--max_train_steps", 1, "--output_dir", cut)
    train(monkeypatch, "--resume", cut, "--max_train_steps", 4)
    helpers.assert_same_bits(whole, cut)

    log = helpers.read_log(whole)
    terms = [{"gan", "kl", "con", "disc"} & line.keys() for line in log]
    assert terms == [{"kl"}] * 2 + [{"gan", "kl", "con", "disc"}] * 2


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_denoising_is_the_kl_term_alone(floor):
    x0, eps = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    t = torch.tensor([999, 10])
    schedule = Schedule.from_config(SCHEDULE.config | {"rescale_betas_zero_snr": True})

    def nothing(x, t, context):
        return torch.zeros_like(x)

    cfg = trainer.Config(snr_gamma=5.0, snr_floor=floor)
    terms, fake, real = trainer.denoising_losses(nothing, x0, [], t, eps, schedule, cfg)
    squares = x0.square().mean((1, 2, 3))
    assert terms.keys() == {"kl"} and real is x0 and (fake == 0).all()
    assert relative(terms["kl"], (floor * squares[0] + 5 * squares[1]) / 2) < 1e-9


@pytest.mark.parametrize("way", ["lora", "all"])
def test_a_checkpoint_draws_what_the_grid_showed(monkeypatch, tmp_path, pairs, way):
    """At the size it was trained at, without --size; and senseless strengths are refused."""
    grids, save_grid = [], training.save_grid

    def save_and_keep(path, columns):
        grids.append(columns)
        save_grid(path, columns)

    monkeypatch.setattr(training, "save_grid", save_and_keep)
    run, out = tmp_path / "run", tmp_path / "out.png"
    flags = ["--train", way, "--dataset_folder", pairs, *SMALL_PICTURES]
    more = ["--max_train_steps", 2, "--learning_rate", 1e-2, "--output_dir", run]
    train(monkeypatch, *flags, *more)
    _, samples = grids[-1]

    def draw(*argv):
        how = ["--seed", "0", "--output", out, "--dtype", "float32"]
        words = ["sample.py", "noise", *how, *argv]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        sample.main()
        return to_tensor(open_picture(out)) * 2 - 1

    checkpoint = ["--checkpoint", run]
    made = draw(*checkpoint)
    assert (made - samples[0].clamp(-1, 1)).abs().max() < 1.5 / 127.5
    # Saved as a folder, with the prior beside it, it draws the same.
    saved = tmp_path / "saved"
    draw(*checkpoint, "--save", saved)
    _, height, width = made.shape
    prior = ["--prior", saved / "prior.safetensors", "--size", f"{width}x{height}"]
    again = draw("--base", saved, *prior)
    assert (again - made).abs().max() < 1.5 / 127.5
    # It edits a picture; --strength is then the noise level.
    edit = ["--input", pairs / "test_B" / "0.png", "--strength"]
    with pytest.raises(ValueError, match="above 0"):
        draw(*checkpoint, *edit, "-1")
    if way == "all":
        with pytest.raises(ValueError, match="holds every weight"):
            draw(*checkpoint, "--strength", "0.5")
        with pytest.raises(ValueError, match="leave --base out"):
            draw(*checkpoint, "--base", "tiny")
    draw(*checkpoint, *edit, "0.5")
    assert Image.open(out).text["checkpoint"] == str(run)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_precision_and_checkpointing_train_every_lora(monkeypatch, tmp_path, pairs, half):
    """Weights that autocast cast without gradient must not be used again with one; and a
    gradient beyond float16 leaves out a step, and does not end the run."""
    seen, average = [], training.average_gradients
    # At first the scale is too large.
    scaler = functools.partial(
        torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-30
    )
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)

    def watch(parameters):
        parameters = list(parameters)
        assert all(p.grad is not None for p in parameters)
        seen.append(parameters)
        average(parameters)

    monkeypatch.setattr(training.run, "average_gradients", watch)
    flags = ["--train", "lora", "--mixed_precision", half, "--gradient_checkpointing"]
    flags += ["--dataset_folder", pairs, *SMALL_PICTURES, "--max_train_steps", 3]
    train(monkeypatch, *flags, "--learning_rate", 1e-3, "--output_dir", tmp_path / "run")
    state = helpers.read_state(tmp_path / "run")
    assert len(seen) == 6
    assert all(tensor.dtype == torch.float32 for tensor in state["trained"].values())
    for name, tensor in state["trained"].items():
        if name.endswith("lora_B.weight"):
            assert tensor.abs().max() > 0, name
    first = helpers.read_log(tmp_path / "run")[0]
    assert math.isfinite(first["grad_norm"]) == (half == "bf16")


@pytest.mark.parametrize("which, name", [(2, "grad_norm"), (3, "disc_grad_norm")])
def test_a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    monkeypatch, capsys, tmp_path, pairs, which, name
):
    calls = []

    def spoil(parameters):
        parameters = list(parameters)
        calls.append(parameters)
        if len(calls) == which + 1:
            parameters[0].grad[0] = math.nan

    monkeypatch.setattr(training.run, "average_gradients", spoil)
    flags = ["--dataset_folder", pairs, *SMALL_PICTURES, "--lambda_con", 0]
    flags += ["--max_train_steps", 3, "--checkpointing_steps", 1]
    with pytest.raises(SystemExit):
        train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert f"step 2: the loss became {{'{name}': nan}}" in capsys.readouterr().err
    assert helpers.read_state(tmp_path / "run")["step"] == 1
    assert all(p.isfinite().all() for p in calls[which])


# -------------------------------------------------------------------------------- full size

def peak_of(*argv) -> float:
    """Peak memory of one run of the trainer, in GB."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *helpers.command(trainer, *argv)],
        env={name: value for name, value in helpers.ENV.items() if "THREADS" not in name},
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.split()[-1]) / 1e6


def save_full_size_bases(sd15: Path, dit: Path) -> None:
    """SD 1.5, and PixArt with all its 28 blocks, but with two layers of T5's 24: random weights,
    in half precision."""
    schedule = Schedule.from_config(
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    clip_l = clip.TextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_act="quick_gelu",
    )
    base = bases.Base(
        "",
        vae.VAE(vae.VAEConfig()),
        unet.UNet(unet.UNetConfig()),
        text_encoder=clip.TextEncoder(clip_l),
        tokenizer=clip.Tokenizer(tokenizers.load_tokenizer("tiny").pieces),
        schedule=schedule,
    )
    bases.save_folder(sd15, base, torch.float16)
    text_config = t5.T5Config(d_model=4096, d_ff=10240, num_heads=64, num_layers=2)
    base = bases.Base(
        "",
        vae.VAE(vae.VAEConfig()),
        transformer=pixart.PixArt(pixart.PixArtConfig(sample_size=64)),
        text_encoder=t5.T5Encoder(text_config),
        tokenizer=t5.T5Tokenizer(letters("abcdefghinopst")),
        schedule=schedule,
    )
    bases.save_folder(dit, base, torch.float16)


@pytest.mark.slow
def test_a_step_at_full_size_runs_on_this_machine(tmp_path, pairs):
    """A LoRA step at 256 px on SD 1.5, and one on PixArt with cached contexts.

    Prints peak memory (pytest -s).
    """
    sd15, dit = tmp_path / "sd15", tmp_path / "dit"
    save_full_size_bases(sd15, dit)
    flags = ["--train_batch_size", 1, "--max_train_steps", 1, "--prior_pictures", 1]
    flags += ["--validation_num_images", 1, "--resolution", 256, "--device", "cpu"]
    flags += ["--gradient_checkpointing"]
    run = ["--base", sd15, "--dataset_folder", pairs, "--output_dir", tmp_path / "one"]
    peak = peak_of(*run, *flags)
    print(f"SD 1.5, LoRA of rank 64, 256 px, batch 1, float32: {peak:.1f} GB")
    make_cache(pairs, tmp_path / "cache", str(dit), side=256)
    run = ["--base", dit, "--disc_base", sd15, "--dataset_folder", tmp_path / "cache"]
    peak = peak_of(*run, *flags, "--output_dir", tmp_path / "two")
    print(f"PixArt, LoRA of rank 64, 256 px, batch 1, float32, cached contexts: {peak:.1f} GB")
    for name in ("one", "two"):
        log = helpers.read_log(tmp_path / name)[0]
        assert all(math.isfinite(log[k]) for k in ("gan", "kl", "con", "disc", "grad_norm"))


# ---------------------------------------------------------------- one computation, many ways

def assert_same(a, b, bound: float) -> None:
    """Of tensors the largest difference over the largest value; 0 asks for the same bits."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], bound)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other, bound)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b) or (a - b).abs().max() <= bound * a.abs().max()
    else:
        assert a == b


def test_killed_and_resumed_ends_in_the_same_bits(monkeypatch, tmp_path, pairs):
    """Generator, EMA, discriminator, both optimizers, prior."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--dataset_folder", pairs, *SMALL_PICTURES, "--validation_steps", "1000"]
    flags += ["--max_train_steps", "10", "--checkpointing_steps", "3"]
    train(monkeypatch, *flags, "--output_dir", whole)
    helpers.kill_at(5, cut, trainer, *flags, "--output_dir", cut)
    train(monkeypatch, "--resume", cut)
    helpers.assert_same_bits(whole, cut)
    assert_same(helpers.read_state(whole), helpers.read_state(cut), 0)
    assert [line["step"] for line in helpers.read_log(cut)] == list(range(1, 11))


def change_a_weight(folder: Path) -> None:
    """Changes the first tensor of a network's only file."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, path, dict(format="pt"))


@pytest.mark.parametrize("stage", ["adapt_zsnr", "yoso"])
def test_resuming_with_all_weights_beside_another_base_is_refused(
    monkeypatch, capsys, tmp_path, sd, pairs, stage
):
    """Its U-Net trains, but the first stage's target and the perceptual distance are copies of
    it as it was."""
    base = tmp_path / "other"
    shutil.copytree(sd, base)
    flags = ["--stage", stage, "--base", base, "--train", "all", "--dataset_folder", pairs]
    flags += [*CENTRED, *TWO, "--resolution", 16, "--prior_pictures", 0, "--lambda_gan", 0]
    train(monkeypatch, *flags, "--max_train_steps", 1, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "prior.safetensors").exists()  # of no pictures

    change_a_weight(base / "unet")
    with pytest.raises(SystemExit):
        train(monkeypatch, "--resume", tmp_path / "run", "--max_train_steps", 2)
    assert "fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--base", "--teacher", "--disc_base"])
def test_resuming_beside_other_frozen_weights_is_refused(
    monkeypatch, capsys, tmp_path, dit, sd, flag
):
    """The base, the teacher and the base of the discriminator."""
    folders = {"--base": dit, "--teacher": sd, "--disc_base": sd}
    shutil.copytree(folders[flag], tmp_path / "other")
    folders[flag] = tmp_path / "other"
    flags = ["--train", "lora", "--lora_rank", 2, "--dataset_folder", text_file(tmp_path)]
    for name, folder in folders.items():
        flags += [name, folder]
    flags += [*TWO, "--resolution", 16, "--prior_pictures", 0, "--lambda_con", 0]
    train(monkeypatch, *flags, "--max_train_steps", 1, "--output_dir", tmp_path / "run")

    change_a_weight(tmp_path / "other" / ("transformer" if flag == "--base" else "unet"))
    with pytest.raises(SystemExit):
        train(monkeypatch, "--resume", tmp_path / "run", "--max_train_steps", 2)
    assert "fingerprint" in capsys.readouterr().err


def test_a_validation_that_fails_costs_no_step(monkeypatch, capsys, tmp_path, pairs):
    """Weights and EMA are in their places again before the state is saved."""
    flags = ["--dataset_folder", pairs, *SMALL_PICTURES]
    whole, cut = helpers.train_with_failing_validation(monkeypatch, trainer, tmp_path, *flags)
    assert "error: a test picture cannot be read" in capsys.readouterr().err
    helpers.assert_same_bits(whole, cut)
    assert_same(helpers.read_state(whole), helpers.read_state(cut), 0)


def test_resuming_makes_good_a_last_save_that_failed(monkeypatch, tmp_path, pairs):
    save, calls = checkpoints.save_yoso, []

    def fail_the_second_time(path, *rest):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("disk full")
        save(path, *rest)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--dataset_folder", pairs, *SMALL_PICTURES]
    flags += ["--max_train_steps", 2, "--checkpointing_steps", 1]
    train(monkeypatch, *flags, "--output_dir", whole)
    monkeypatch.setattr(checkpoints, "save_yoso", fail_the_second_time)
    with pytest.raises(SystemExit):
        train(monkeypatch, *flags, "--output_dir", cut)
    assert helpers.read_state(cut)["step"] == 1
    train(monkeypatch, "--resume", cut)
    helpers.assert_same_bits(whole, cut)


def test_an_epoch_sees_every_item(monkeypatch, tmp_path, pairs):
    flags = ["--dataset_folder", pairs, *SMALL, "--resolution", 16, "--lambda_gan", 0]
    flags += ["--train_batch_size", 4, "--num_train_epochs", 1, "--max_train_steps", 5]
    train(monkeypatch, *flags, "--output_dir", tmp_path / "run")
    assert len(helpers.read_log(tmp_path / "run")) == 2  # of six items


def test_two_processes_and_accumulation_are_one_computation(monkeypatch, tmp_path, pairs):
    flags = ["--train", "lora", "--dataset_folder", pairs, *SMALL, "--resolution", 24]
    flags += ["--dtype", "float64", "--max_train_steps", 3]
    folders = helpers.train_in_three_ways(monkeypatch, trainer, tmp_path, 4, *flags)
    one, two, slices = [helpers.read_state(folder) for folder in folders.values()]
    for part in ("trained", "ema", "discriminator", "prior"):
        assert_same(one[part], two[part], 1e-10)
        assert_same(one[part], slices[part], 1e-10)


def test_a_run_begun_under_older_names_of_settings_goes_on(monkeypatch, tmp_path, pairs):
    run = tmp_path / "run"
    flags = ["--train_data_dir", pairs, *SMALL_PICTURES, "--max_train_steps", 1]
    old = ["--eval_freq", 1, "--num_samples_eval", 2, "--num_train_epochs", 3]
    train(monkeypatch, *flags, *old, "--lambda_gan", 0, "--output_dir", run)
    settings = helpers.read_settings(run)
    assert settings["dataset_folder"] == str(pairs) and settings["validation_steps"] == 1
    helpers.rename_settings(
        run,
        dataset_folder="train_data_dir",
        validation_steps="eval_freq",
        validation_num_images="num_samples_eval",
        max_train_epochs="num_train_epochs",
    )
    train(monkeypatch, "--resume", run, "--max_train_steps", 2)
    changed = dict(max_train_steps=2, resume=str(run))
    assert helpers.read_settings(run) == settings | changed
    assert ["val_variety" in line for line in helpers.read_log(run)] == [True, True]


# -------------------------------------------------------------------------------- bad input

def test_pictures_are_of_one_size_in_training_and_in_the_grid(
    monkeypatch, capsys, tmp_path, pairs
):
    flags = ["--dataset_folder", pairs, *TWO, "--max_train_steps", 1]
    train(monkeypatch, *flags, *CENTRED, "--output_dir", tmp_path / "one")
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    Image.new("RGB", (20, 24)).save(sizes / "00.png")
    for i in range(1, 10):
        Image.new("RGB", (24, 20)).save(sizes / f"{i:02d}.png")
    of_test = [*CENTRED, "--test_image_prep", "resize_16"]
    of_training = ["--train_image_prep", "no_resize", "--dataset_folder", sizes]
    for i, preparation in enumerate((of_test, of_training)):
        with pytest.raises(SystemExit):
            train(monkeypatch, *flags, *preparation, "--output_dir", tmp_path / f"bad{i}")
        error = capsys.readouterr().err
        assert "expected one size" in error and "Traceback" not in error
        if i == 0:
            assert "'0.png' is not of the size" in error


# What is wrong: the flags, and words of the one line.
NO_LOSS = ["--lambda_gan", "0", "--lambda_kl", "0", "--lambda_con", "0"]
NO_U_NET = ["--base", "pixels", "--consistency", "perceptual"]
BAD = {
    "no such base": (["--base", "/nowhere"], ["/nowhere", "expected a folder"]),
    "points are no base": (["--base", "gaussians"], ["gaussians", "expected a folder"]),
    "no such data": (["--dataset_folder", "/nowhere"], ["/nowhere", "a folder of pictures"]),
    "no such drawing": (["--dataset_folder", "drawn:cats"], ["cats", "drawn:scenes"]),
    "a stage that is done": (["--stage", "adapt_v"], ["adapt_v", "predicts v already"]),
    "a stage too early": (
        ["--stage", "adapt_zsnr", "--prediction_type", "epsilon"],
        ["--stage adapt_v first"],
    ),
    "no prediction": (["--prediction_type", "x0"], ["x0", "v_prediction"]),
    "denoising below nothing": (["--denoising_steps", "-1"], ["--denoising_steps", "0 or more"]),
    "denoising and adapting": (
        ["--stage", "adapt_zsnr", "--denoising_steps", "5"],
        ["--denoising_steps", "--stage yoso"],
    ),
    "no U-Net for features": (NO_U_NET, ["--train all", "--consistency mse"]),
    "no base for a LoRA": (["--base", "pixels", "--train", "lora"], ["--train all"]),
    "unknown adversary": (["--adversarial", "teacher"], ["--adversarial", "coop"]),
    "more than the batch": (
        ["--last_share", "0.6", "--high_share", "0.5"],
        ["--last_share 0.6", "--high_share 0.5", "at most 1"],
    ),
    "a floor above the ceiling": (["--con_floor", "6"], ["--snr_gamma 5.0", "found 6.0"]),
    "a ceiling of nothing": (["--snr_gamma", "0"], ["--snr_gamma 0.0", "more than 0"]),
    "an average that never moves": (["--ema_decay", "1"], ["--ema_decay 1.0", "below 1"]),
    "a mean that never forgets": (["--adam_beta2", "1"], ["--adam_beta2 1.0", "below 1"]),
    "captions for samples without": (
        ["--unconditional", "--validation_prompts", "a|b"],
        ["--validation_prompts has no meaning with --unconditional"],
    ),
    "a preparation of drawings": (
        ["--dataset_folder", "drawn:scenes", "--test_image_prep", "resize_16"],
        ["drawn:scenes is drawn in the size of --resolution"],
    ),
    "no neighbour to mismatch": (
        ["--lambda_mismatch", "1", "--train_batch_size", "1"],
        ["--lambda_mismatch", "2 or more"],
    ),
    "nobody to see the mismatch": (
        ["--lambda_mismatch", "1", "--lambda_gan", "0"],
        ["--lambda_mismatch", "--lambda_gan above 0"],
    ),
    "no captions to mismatch": (
        ["--lambda_mismatch", "1", "--unconditional"],
        ["--lambda_mismatch", "--unconditional"],
    ),
    "no whole latents": (["--resolution", "30"], ["30x30", "multiples of 4"]),
    "no loss": (NO_LOSS, ["--lambda_kl"]),
    "captions and no teacher": (
        ["--dataset_folder", "{captions}"],
        ["captions.txt", "--teacher"],
    ),
    "a teacher and pictures": (["--teacher", "tiny"], ["leave --teacher out"]),
    "a teacher of other latents": (
        ["--dataset_folder", "{captions}", "--teacher", "pixels"],
        ["--teacher pixels", "3 channels, factor 1", "4 channels, factor 4", "the same VAE"],
    ),
    "nothing left of the gradients": (["--max_grad_norm", "0"], ["--max_grad_norm 0", "1e9"]),
    "a rank that no checkpoint has": (["--lora_rank", "1001"], ["--lora_rank 1001", "1000"]),
    "double precision in half": (
        ["--dtype", "float64", "--mixed_precision", "bf16"],
        ["--dtype float64", "--mixed_precision bf16", "leave one"],
    ),
    "not a zip": (["--dataset_folder", "{taken}/a.zip"], ["a.zip", "dataset.json"]),
    "a prior of -1 pictures": (["--prior_pictures", "-1"], ["--prior_pictures", "0 or more"]),
    "the paired trainer's flag": (["--lambda_l2", "1"], ["--lambda_l2", "unknown"]),
    "a flag that is gone": (["--center_crop"], ["not needed: crops", "--train_image_prep"]),
    "run in the way": (["--output_dir", "{taken}"], ["holds a run already", "--resume"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_half_written(
    monkeypatch, capsys, tmp_path, case
):
    flags, words = BAD[case]
    taken, captions = tmp_path / "taken", text_file(tmp_path)
    taken.mkdir()
    (taken / "state.pt").write_text("{}")
    (taken / "a.zip").write_text("no zip")
    flags = [flag.format(taken=taken, captions=captions) for flag in flags]
    run = ["--dataset_folder", "drawn:scenes", *SMALL_PICTURES, "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, *run, *flags)
    lines = helpers.error_lines(capsys.readouterr().err)
    assert caught.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines
    helpers.assert_nothing_half_written(tmp_path)
    assert (taken / "state.pt").read_text() == "{}"
