"""Trains YOSO: a diffusion model becomes one that draws a picture in one step, by chasing its own better guesses.

    python train_yoso.py --base gaussians                 # points in the plane, CPU, three minutes
    python train_yoso.py                                  # drawn scenes, tiny base from random weights, CPU
    python train_yoso.py --base sd15 --train_data_dir DATA --mixed_precision bf16
    python train_yoso.py --base BASE --train all --stage adapt_v ...; then --base runs/NAME/base --stage adapt_zsnr ...
    torchrun --nproc_per_node=4 train_yoso.py --base sd15 --train_data_dir DATA ...
    python train_yoso.py --resume runs/NAME

DATA is a folder as for train_pix2pix_turbo.py, of which the targets (train_B, test_B) and captions are taken. The run's
folder is that of train_pix2pix_turbo.py too. A LoRA also goes to lora.safetensors and lora_kohya.safetensors, the prior
to prior.safetensors: `python sample.py "PROMPT" --base BASE --sampler lcm --lora runs/NAME --prior THAT`. Where all was
trained, the whole model at last goes to runs/NAME/base: a base for sample.py --sampler lcm and for the next stage.

Paper: Luo et al. 2024, "You Only Sample Once: Taming One-Step Text-to-Image Synthesis by Self-Cooperative Diffusion
GANs". One generator G(x_t, t) predicts x0, x_t = alpha_t x0 + sigma_t eps, for every t:
    L = lambda_gan L_adv + lambda_kl L_KL + lambda_con L_con.
Unlike in the released script, the softplus is taken of each sample's logit, not of their mean; the generator steps
first; and what the discriminator takes for real is G too, c_skip and c_out included.
"""

import copy
import functools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import evaluate
import training
from models import diffusion, weights
from models.diffusion import Schedule, add_noise, predict_x0
from models.discriminator import LatentDiscriminator, lower_half, share_right
from models.lora import add_lora, write_lora
from tiny import gaussians

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


@dataclass
class Config:
    # data
    train_data_dir: str = "drawn:scenes"  # a folder as of train_pix2pix_turbo.py, drawn:scenes or drawn:circles
    train_image_prep: str | None = None  # resized_crop_N, resize_N, resize_M_randomcrop_NxN_hflip, no_resize
    test_image_prep: str | None = None  # the same for the test pictures
    resolution: int = 512  # N of the default preparation, resized_crop_N
    dataloader_num_workers: int = 0  # processes that prepare pictures
    # model
    base: str = "tiny"  # a folder, a Hub id or a name: gaussians, tiny, sd15, sd21
    stage: Literal["yoso", "adapt_v", "adapt_zsnr"] = "yoso"  # or first: predict v; then: begin at pure noise
    train: Literal["lora", "all"] = "lora"  # LoRA, or every weight of the U-Net
    lora_rank: int = 64  # rank of the U-Net's LoRA
    prediction_type: str | None = None  # epsilon or v_prediction, where the base's scheduler does not say so
    prior_pictures: int = 1000  # whose latents' mean and deviation sampling begins from (section 4.2)
    # losses
    lambda_gan: float = 1.0  # weight of the adversarial loss; 0 trains no discriminator
    lambda_kl: float = 0.5  # weight of the distance to the data
    lambda_con: float = 2.0  # weight of the distance to G a little earlier
    adversarial: Literal["coop", "data", "noisy"] = "coop"  # real: G's better guess, the data, or the data noised again
    consistency: Literal["perceptual", "mse"] = "perceptual"  # distance of a frozen U-Net's features, or of latents
    snr_gamma: float = 5.0  # the largest weight of a noise level
    coop_steps: int = 250  # how much earlier the better guess is
    con_steps: int = 25  # how much earlier the consistent one
    # optimisation
    learning_rate: float = 2e-5  # of the generator
    disc_lr_ratio: float = 1.0  # the discriminator's learning rate over the generator's
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"  # last two: to zero
    lr_warmup_steps: int = 500  # linear rise; "constant" has none
    adam_beta1: float = 0.9  # of the generator; the discriminator's is 0
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # gradients of the generator longer than this are shortened to it
    use_ema: bool = True  # write the running mean of the weights
    ema_decay: float = 0.999  # what of the mean is kept a step
    train_batch_size: int = 16  # pictures a process and slice
    gradient_accumulation_steps: int = 1  # slices a step
    max_train_steps: int = 5000  # optimizer steps
    num_train_epochs: int | None = None  # ends earlier, after so many passes over the data
    gradient_checkpointing: bool = False  # less memory, a third more time
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # autocast and the type of frozen weights
    dtype: Literal["float32", "float64"] = "float32"  # of what is trained (float64 for tests)
    # the run
    seed: int = 42  # of every draw
    device: str = "auto"  # auto, cpu, cuda, mps
    output_dir: str | None = None  # default runs/yoso-DATE
    resume: str | None = None  # a run's folder, to go on from its state.pt
    viz_freq: int = 100  # steps between sample grids
    eval_freq: int = 500  # steps between validations
    num_samples_eval: int = 100  # pictures of a validation
    track_val_fid: bool = False  # FID at each validation; needs Inception's weights
    checkpointing_steps: int = 500  # steps between saves
    report_to: str = "none"  # none, tensorboard, wandb
    tracker_project_name: str = "train_yoso"  # W&B project


# Where the base is tiny every weight trains, on small pictures, faster; the points are more so.
TINY = dict(train="all", resolution=32, learning_rate=2e-4, disc_lr_ratio=0.5, lr_warmup_steps=200, adam_beta2=0.99,
            train_batch_size=16, max_train_steps=2000, prior_pictures=200, checkpointing_steps=200)
GAUSSIANS = dict(train="all", learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=100, adam_weight_decay=0.0,
                 adam_beta1=0.5, adam_beta2=0.99, train_batch_size=128, max_train_steps=8000, lambda_con=0.0,
                 consistency="mse", viz_freq=1000, eval_freq=1000, checkpointing_steps=1000, prior_pictures=10_000,
                 num_samples_eval=10_000)
ALIASES = dict(pretrained_model_name_or_path="base", resume_from_checkpoint="resume", dataset_folder="train_data_dir",
               num_training_epochs="num_train_epochs")


# --------------------------------------------------------------------------------------------------------------- losses


def generated(prediction: Tensor, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """G(x_t, t) = c_skip x_t + c_out x0_theta(x_t, t), c_skip = 0.25 / (s^2 + 0.25), c_out = s / sqrt(s^2 + 0.25), s =
    10 t: what has no noise stays as it is."""
    s = 10.0 * t.to(x).view(-1, *[1] * (x.ndim - 1))
    c_skip, c_out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt()
    return c_skip * x + c_out * predict_x0(prediction, x, t, schedule, schedule.prediction_type)


def earlier(t: Tensor, steps: int) -> Tensor:
    """The lower noise level whose G knows more."""
    return (t - steps).clamp(min=0)


def generator_gan_loss(logits_fake: Tensor) -> Tensor:
    """L_adv = softplus(-D(G(x_t), t)), the non-saturating loss, of each sample."""
    return F.softplus(-logits_fake).mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """softplus(-D(real, t)) + softplus(D(G(x_t), t)). Self-cooperation: real is G(x_{t-k}), not data."""
    return (F.softplus(-logits_real) + F.softplus(logits_fake)).mean()


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return (a - b).to(torch.promote_types(a.dtype, torch.float32)).square().flatten(1).mean(1)


def kl_loss(fake: Tensor, x0: Tensor, t: Tensor, schedule: Schedule, gamma: float) -> Tensor:
    """L_KL = min(SNR_t, gamma) |G(x_t) - x0|^2, SNR = alpha^2 / sigma^2."""
    snr = (schedule.alpha[t] / schedule.sigma[t]) ** 2
    return (snr.clamp(max=gamma).to(x0) * mean_square(fake, x0)).mean()


def consistency_loss(seen: Tensor, goal: Tensor, t: Tensor, s: Tensor, schedule: Schedule, gamma: float) -> Tensor:
    """L_con = w |f(G(x_t)) - f(G(x_s))|^2, s < t, same eps, no gradient to the right; f: features of a frozen U-Net
    (latent perceptual loss), or nothing; w = min(1 / (sigma_t / alpha_t - sigma_s / alpha_s), gamma)."""
    here, there = (schedule.sigma[u] / schedule.alpha[u] for u in (t, s))
    weight = (1 / (here - there)).clamp(max=gamma)  # at t = s = 0: gamma times 0
    return (weight.to(seen) * mean_square(seen, goal.detach())).mean()


def adapt_v_loss(v: Tensor, teacher_eps: Tensor, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Stage I: |v_theta(x_t) - v|^2 with the v that the frozen model's epsilon stands for, alpha eps - sigma x0."""
    alpha, sigma = schedule.at(t, x)
    x0 = predict_x0(teacher_eps, x, t, schedule, "epsilon")
    return mean_square(v, alpha * teacher_eps - sigma * x0).mean()


def adapt_zsnr_loss(v: Tensor, teacher_v: Tensor, x: Tensor, x_new: Tensor, t: Tensor, old: Schedule, new: Schedule
                    ) -> Tensor:
    """Stage II: |v_theta(x'_t) - v'|^2, x'_t noised by the schedule that ends in pure noise, v' = (alpha' x'_t - x0) /
    sigma' of the x0 that the frozen model sees in x_t, noised by the old one. At T: -x0, from pure noise."""
    x0 = predict_x0(teacher_v, x, t, old, "v_prediction")
    alpha, sigma = new.at(t, x_new)
    return mean_square(v, (alpha * x_new - x0) / sigma).mean()


def learning_rate(step: int, config: Config, last: int) -> float:
    rise = 1.0 if config.lr_scheduler == "constant" else min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
    done = max(0.0, (step - config.lr_warmup_steps) / max(last - config.lr_warmup_steps, 1))
    fall = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}.get(config.lr_scheduler, 1.0)
    return config.learning_rate * rise * fall


def open_data(cfg: Config, split: str, prep: str | None):
    if cfg.base == "gaussians":
        return gaussians.Points(split, cfg.seed)
    prep = prep or f"resized_crop_{cfg.resolution}"
    return data.open_paired(cfg.train_data_dir, split, prep, cfg.seed, cfg.resolution)


def check_stage(cfg: Config, schedule: Schedule) -> None:
    """Refuses a stage that the base has behind it, or that is not its turn."""
    v, zero = schedule.prediction_type == "v_prediction", schedule.alpha[-1] == 0
    if cfg.stage == "adapt_v" and v:
        raise ValueError(f"--stage adapt_v: {cfg.base} predicts v already; go on with --stage adapt_zsnr or yoso")
    if cfg.stage == "adapt_zsnr" and (zero or not v):
        raise ValueError(f"--stage adapt_zsnr: {cfg.base} " + (
            "begins at pure noise already; go on with --stage yoso" if zero else
            "predicts epsilon, which says nothing of the picture in pure noise; run --stage adapt_v first"))
    if not (cfg.lambda_gan or cfg.lambda_kl or cfg.lambda_con):
        raise ValueError("--lambda_gan, --lambda_kl and --lambda_con are 0; expected a loss to learn from")
    if cfg.base == "gaussians" and (cfg.train == "lora" or cfg.consistency == "perceptual"):
        raise ValueError("the base gaussians has no U-Net; expected --train all --consistency mse")


def main() -> None:
    table = GAUSSIANS if {"gaussians", "--base=gaussians"} & {*sys.argv} else TINY  # before --base is read
    cfg = training.parse(Config, table, ALIASES, __doc__)
    rank, world, device = training.start_ranks(cfg.device)
    dtype, points = getattr(torch, cfg.dtype), cfg.base == "gaussians"
    half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.mixed_precision]
    torch.manual_seed(cfg.seed)

    # ---- data: step s takes rows of a global batch, of which this process has its share, in slices
    train_set, test_set = open_data(cfg, "train", cfg.train_image_prep), open_data(cfg, "test", cfg.test_image_prep)
    global_batch = world * cfg.train_batch_size * cfg.gradient_accumulation_steps
    slices = training.my_rows(rank, world, cfg.train_batch_size, cfg.gradient_accumulation_steps)
    last_step = cfg.max_train_steps
    if cfg.num_train_epochs:
        last_step = min(last_step, cfg.num_train_epochs * len(train_set) // global_batch)

    # ---- networks: what is trained stays in float32, what is frozen may be stored in half
    base_seed = cfg.seed if cfg.train == "all" else 0  # a base without weights: what carries LoRA must be found again
    base = gaussians.load_base(base_seed, dtype, device) if points else \
        weights.load_base(cfg.base, device=str(device), dtype=dtype, seed=base_seed)
    if cfg.prediction_type:
        base.schedule = Schedule.from_config(base.schedule.config | {"prediction_type": cfg.prediction_type})
    check_stage(cfg, base.schedule)
    generator, old, teacher, judge, inception, discriminator = base.unet, base.schedule, *[None] * 4
    if cfg.stage != "yoso":
        teacher = copy.deepcopy(generator, {id(p): p for p in generator.parameters() if cfg.train == "lora"})
        base.schedule = Schedule.from_config(old.config | {"prediction_type": "v_prediction"} | (
            {"rescale_betas_zero_snr": True} if cfg.stage == "adapt_zsnr" else {}))
    elif cfg.lambda_con and cfg.consistency == "perceptual":
        judge = lower_half(generator, share=cfg.train == "lora")
    if cfg.stage == "yoso" and cfg.lambda_gan:
        torch.manual_seed(cfg.seed)  # the first weights depend on nothing that came before
        discriminator = (gaussians.MLP(1) if points else LatentDiscriminator(generator)).to(device, dtype)
        discriminator.requires_grad_(True)
    schedule, T, scaling = base.schedule, len(base.schedule.alpha), base.vae.config.scaling_factor
    if cfg.train == "lora":
        add_lora(generator, TARGETS, cfg.lora_rank, 8.0, training.rng(cfg.seed, 0, "lora"))  # peft's default alpha
    for name, p in generator.named_parameters():
        p.requires_grad_(cfg.train == "all" or ".lora_" in name)
    parts = nn.ModuleDict(dict(unet=generator, vae=base.vae, text_encoder=base.text_encoder))
    trained = {n: p for n, p in parts.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in trained.items() if cfg.use_ema}
    frozen = weights.fingerprint(parts, trained.keys())
    for network in filter(None, (parts, teacher, judge) if half else ()):
        weights.cast_frozen(network, half)
    for network in filter(None, (generator, getattr(discriminator, "unet", None))):
        network.checkpointing = cfg.gradient_checkpointing
    if cfg.track_val_fid:
        inception = training.needed(weights.load_judge, "inception", str(device), without="no --track_val_fid").network

    # ---- captions and latents: what encodes them is frozen
    @functools.lru_cache(maxsize=2000)
    def encoded(caption: str) -> Tensor:
        with torch.no_grad(), autocast:
            return base.text_encoder(base.tokenizer(caption).to(device))[0].to("cpu", dtype)

    def encode(captions: list[str]) -> Tensor:  # -> [B, 77, C]
        return torch.stack([encoded(c) for c in captions]).to(device)

    def to_latent(x: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        with torch.no_grad(), autocast:
            mean, logvar, _ = base.vae.encode(x)
            return (mean.to(dtype) + (0.5 * logvar.to(dtype)).exp() * noise) * scaling

    def G(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return generated(generator(x, t.to(device), context), x, t, schedule)

    # ---- optimizers
    adam = dict(eps=cfg.adam_epsilon, weight_decay=cfg.adam_weight_decay, fused=device.type == "cuda")
    optimizer, optimizer_d = torch.optim.AdamW(trained.values(), betas=(cfg.adam_beta1, cfg.adam_beta2), **adam), None
    if discriminator:
        optimizer_d = torch.optim.AdamW(discriminator.parameters(), betas=(0.0, cfg.adam_beta2), **adam)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.mixed_precision == "fp16")
    autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)

    # ---- the run's folder, and where it stood
    folder = training.open_run(cfg, "yoso", rank)
    start, best = 0, math.inf
    if cfg.resume:
        state = training.load_state(folder, frozen)
        start, best, prior = state["step"], state["best"], state["prior"]
        ema = {n: mean.to(device) for n, mean in state["ema"].items()}
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if discriminator:
            discriminator.load_state_dict(state["discriminator"])
            optimizer_d.load_state_dict(state["optimizer_d"])
    else:  # mean and deviation of the latents: where one step begins (section 4.2)
        chosen = tqdm(range(min(cfg.prior_pictures, len(train_set))), "prior", disable=rank != 0)
        prior = diffusion.mean_and_std(to_latent(train_set[i]["target"][None].to(device, dtype))[0] for i in chosen)

    def swap() -> None:
        """EMA and weights change places: what is shown, measured and written is the EMA."""
        for name, mean in ema.items():
            trained[name].data, ema[name] = mean, trained[name].data

    def save(step: int) -> None:
        training.save_state(folder / "state.pt", dict(
            step=step, best=best, base=frozen, prior=prior, trained={n: p.detach() for n, p in trained.items()},
            ema=ema, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            discriminator=discriminator.state_dict() if discriminator else None,
            optimizer_d=optimizer_d.state_dict() if discriminator else None))
        swap()
        export("model.safetensors")
        training.write_file(folder / "prior.safetensors", lambda path: weights.save_prior(path, *prior))
        for name, kohya in (("lora.safetensors", False), ("lora_kohya.safetensors", True)):
            if cfg.train == "lora":
                training.write_file(folder / name, lambda path, kohya=kohya: weights.save_tensors(
                    path, write_lora(generator, "unet", kohya), {"format": "pt"}))
        swap()

    def export(name: str) -> None:
        config = dict(train=cfg.train, stage=cfg.stage, lora_rank=cfg.lora_rank, lora_alpha=8.0, targets=TARGETS)
        if cfg.train == "all" and not points:
            config |= {part: asdict(network.config) for part, network in parts.items()}
            config |= dict(schedule=schedule.config, tokenizer=base.tokenizer.to_json())
        tensors = {**(parts.state_dict() if cfg.train == "all" else trained), "prior.mean": prior[0],
                   "prior.std": prior[1]}
        training.write_file(folder / name, lambda path: weights.save_tensors(path, tensors, dict(
            format=weights.FORMAT, kind="yoso", base=cfg.base, config=json.dumps(config), prompts="[]")))

    @torch.inference_mode()
    def drawn(items: list[dict]) -> Tensor:
        """One-step samples of the items' captions, item i from the noise of seed i: pictures [N, 3, H, W] or points."""
        made = []
        for first in range(0, len(items), cfg.train_batch_size):
            some = items[first:first + cfg.train_batch_size]
            rngs = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
            noise, n = (torch.stack([torch.randn(prior[0].shape, generator=g) for g in rngs]).to(device, dtype)
                        for _ in range(2))
            x, t = diffusion.start_from_prior(noise, n, *prior, T - 1, schedule), torch.full((len(some),), T - 1)
            context = encode([item["caption"] for item in some])
            with autocast:
                made.append(base.vae.decode(G(x, t, context) / scaling).float())
        return torch.cat(made).cpu()

    def validate() -> dict[str, float]:
        items = [test_set[i] for i in range(min(cfg.num_samples_eval, len(test_set)))]
        fakes, real = drawn(items), torch.stack([item["target"] for item in items])
        values = {"val_spread": (fakes.std(0).mean() / real.std(0).mean()).item()}  # less than 1: too much the same
        if inception:
            made, true = (evaluate.statistics(torch.cat([evaluate.features(inception, x[None].to(device)) for x in xs]))
                          for xs in (fakes.clamp(-1, 1), real))
            values["val_fid"] = evaluate.frechet_distance(*true, *made)
        if points:
            values |= {f"val_{k}": v for k, v in gaussians.measure(fakes).items()}
        return values

    # ---- the loop
    if rank == 0:
        n = sum(p.numel() for p in trained.values())
        print(f"training {n / 1e6:.2f} M weights on {len(train_set)} items, {device}; {folder}", file=sys.stderr)
    log = training.open_log(folder, start) if rank == 0 else None
    report = training.open_reporter(cfg.report_to if rank == 0 else None, folder, cfg.tracker_project_name)
    shown = [test_set[i] for i in range(min(cfg.num_samples_eval if points else 16, len(test_set)))]
    stop, clock = training.catch_stop(), time.monotonic()
    batches = data.batches(train_set, global_batch, cfg.seed, start, last_step,
                           [row for rows in slices for row in rows], cfg.dataloader_num_workers)
    bar = tqdm(total=last_step, initial=start, disable=rank != 0, unit="step")
    for step in range(start, last_step):
        batch = next(batches)
        for one, ratio in ((optimizer, 1.0), (optimizer_d, cfg.disc_lr_ratio)):
            for group in one.param_groups if one else ():
                group["lr"] = ratio * learning_rate(step, cfg, last_step)
        times = torch.randint(T, (global_batch,), generator=training.rng(cfg.seed, step, "t"))

        def draw(what: str, rows: list[int], step: int = step) -> Tensor:
            every = torch.randn(global_batch, *prior[0].shape, generator=training.rng(cfg.seed, step, what))
            return every[rows].to(device, dtype)

        def judged(sample: Tensor, t: Tensor, context: Tensor, rows: list[int], what: str) -> Tensor:
            """The discriminator's logits, of the sample at its t; or noised again, to a lower level, as in UFOGen."""
            if cfg.adversarial == "noisy":
                t = earlier(t, cfg.coop_steps)
                sample = add_noise(sample, draw(f"again {what}", rows), t, schedule)
            return discriminator(sample, t.to(device), context)

        # Generator: past the discriminator, to the data, in agreement with itself. The discriminator only passes the
        # gradient on. G runs with a gradient first: autocast would reuse the weights cast in a pass without.
        losses, sides = {}, []

        def add(name: str, value: float, losses: dict[str, float] = losses) -> None:
            losses[name] = losses.get(name, 0.0) + value / len(slices)

        if discriminator:
            discriminator.requires_grad_(False)
        for i, rows in enumerate(slices):
            mine, t = slice(i * len(rows), (i + 1) * len(rows)), times[rows]
            context, target = encode(batch["caption"][mine]), batch["target"][mine].to(device, dtype)
            x0, eps = to_latent(target, draw("latent", rows)), draw("noise", rows)
            x, terms = add_noise(x0, eps, t, schedule), {}
            with autocast:
                if teacher:
                    v, x_old = generator(x, t.to(device), context), add_noise(x0, eps, t, old)
                    fake = predict_x0(v, x, t, schedule, "v_prediction")
                    with torch.no_grad():
                        told = teacher(x_old, t.to(device), context)
                    terms["adapt"] = adapt_v_loss(v, told, x, t, old) if cfg.stage == "adapt_v" else \
                        adapt_zsnr_loss(v, told, x_old, x, t, old, schedule)
                else:
                    fake = G(x, t, context)
                if discriminator:
                    with torch.no_grad():
                        k = earlier(t, cfg.coop_steps)
                        real = G(add_noise(x0, eps, k, schedule), k, context) if cfg.adversarial == "coop" else x0
                    terms["gan"] = cfg.lambda_gan * generator_gan_loss(judged(fake, t, context, rows, "fake"))
                    sides.append((real, fake.detach(), t, context))
                if cfg.lambda_kl and not teacher:
                    terms["kl"] = cfg.lambda_kl * kl_loss(fake, x0, t, schedule, cfg.snr_gamma)
                if cfg.lambda_con and not teacher:
                    with torch.no_grad():
                        s = earlier(t, cfg.con_steps)
                        goal = G(add_noise(x0, eps, s, schedule), s, context)
                    seen, goal = (judge.features(y, 0, context) if judge else y for y in (fake, goal))
                    terms["con"] = cfg.lambda_con * consistency_loss(seen, goal, t, s, schedule, cfg.snr_gamma)
            scaler.scale(sum(terms.values()) / len(slices)).backward()
            for name, value in terms.items():
                add(name, value.item())
            add("spread", (fake.detach().std() / x0.std()).item())  # less than 1: blobs, or too few kinds of sample
        training.check_finite(losses, step, batch["name"])
        training.average_gradients(trained.values())
        scaler.unscale_(optimizer)
        losses["grad_norm"] = nn.utils.clip_grad_norm_(trained.values(), cfg.max_grad_norm).item()
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        keep = min(cfg.ema_decay, (1 + step) / (10 + step))  # at first the mean forgets faster
        for name, mean in ema.items():
            mean.lerp_(trained[name].detach(), 1 - keep)

        # Discriminator: better guesses, or the data, against what was made of more noise. Not clipped.
        if discriminator:
            discriminator.requires_grad_(True)
            for (real, fake, t, context), rows in zip(sides, slices):
                with autocast:
                    logits_real = judged(real, t, context, rows, "real")
                    logits_fake = judged(fake, t, context, rows, "fake")
                    loss = cfg.lambda_gan * discriminator_loss(logits_real, logits_fake)
                scaler.scale(loss / len(slices)).backward()
                add("disc", loss.item())  # 2 ln 2 = 1.386 is chance
                add("disc_right_on_real", share_right([logits_real], True))
                add("disc_right_on_fake", share_right([logits_fake], False))
                add("logit_gap", (logits_real - logits_fake).mean().item())  # 0 for long: it sees nothing
            training.check_finite(losses, step, batch["name"])
            training.average_gradients(discriminator.parameters())
            scaler.unscale_(optimizer_d)
            scaler.step(optimizer_d)
            optimizer_d.zero_grad(set_to_none=True)
        scaler.update()

        # What came out. A stop that was asked for is taken here, with everything saved.
        done = step + 1
        losses = training.mean_over_ranks(losses)
        stopping = stop()
        if rank == 0:
            swap()
            if done % cfg.eval_freq == 0 or done == last_step:
                losses |= validate()
                covered = losses.get("val_modes", -math.inf) + losses.get("val_good", 0.0)
                if (value := losses.get("val_fid", -covered)) < best:
                    best = value
                    export("best.safetensors")
            if done % cfg.viz_freq == 0 or done == 1 or done == last_step:
                columns = [torch.stack([item["target"] for item in shown]), drawn(shown)]
                columns = [gaussians.scatter(c)[None] for c in columns] if points else columns
                training.save_grid(folder / "samples" / f"{done:06d}.png", columns)
            swap()
            training.append_log(log, done, losses)
            report(done, losses)
            rate = (done - start) * global_batch / (time.monotonic() - clock)
            bar.set_postfix({k: f"{losses[k]:.3g}" for k in ("gan", "kl", "con", "adapt", "disc") if k in losses}
                            | {"items/s": f"{rate:.1f}"}, refresh=False)
            bar.update()
            if done % cfg.checkpointing_steps == 0 or done == last_step or stopping:
                save(done)
                training.plot_losses(log, folder / "losses.png")
        if stopping:
            if rank == 0:
                print(f"stopped after step {done}, saved; go on with --resume {folder}", file=sys.stderr)
            raise KeyboardInterrupt
    if rank == 0:
        if cfg.train == "all" and not points:
            swap()
            weights.save_folder(folder / "base", base)
        print(folder / "model.safetensors")


if __name__ == "__main__":
    training.run(main)
