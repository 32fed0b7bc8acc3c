"""Trains YOSO: a diffusion model becomes one that draws a picture in one step, by chasing its own better guesses.

    python train_yoso.py --base gaussians                 # points in the plane, CPU, two minutes
    python train_yoso.py                                  # drawn scenes, tiny base from random weights, CPU
    python train_yoso.py --base pixels --train_data_dir cifar10.zip       # raw pictures and classes, from scratch
    python train_yoso.py --base sd15 --train_data_dir DATA --mixed_precision bf16
    python train_yoso.py --base sd15 --train_data_dir captions.txt --teacher sd-turbo --mixed_precision bf16
    python train_yoso.py --base pixart512 --train all --stage adapt_v ...; then --base runs/NAME/base --stage adapt_zsnr
    torchrun --nproc_per_node=4 train_yoso.py --base sd15 --train_data_dir DATA ...
    python train_yoso.py --resume runs/NAME

DATA: see data.py. The run's folder is that of train_pix2pix_turbo.py; `python sample.py "PROMPT" --checkpoint
runs/NAME` draws with it. A LoRA also goes to lora.safetensors (for diffusers) and lora_kohya.safetensors, the prior to
prior.safetensors. Where all was trained, the whole model at last goes to runs/NAME/base: the base of the next stage.

Paper: Luo et al. 2024, "You Only Sample Once: Taming One-Step Text-to-Image Synthesis by Self-Cooperative Diffusion
GANs". One generator G(x_t, t) predicts x0, x_t = alpha_t x0 + sigma_t eps, for every t:
    L = lambda_gan L_adv + lambda_kl L_KL + lambda_con L_con.
Unlike in the released script, the softplus is taken of each sample's logit, not of their mean; the generator steps
first; and what the discriminator takes for real is G too, c_skip and c_out included.
"""

import copy
import functools
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
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
from models.discriminator import LatentDiscriminator, PixelDiscriminator, lower_half, share_right
from models.lora import add_lora, write_lora
from tiny import gaussians

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


@dataclass
class Config:
    # data
    train_data_dir: str = "drawn:scenes"  # a folder, .zip, .txt of captions or cache (see data.py), or drawn:scenes
    train_image_prep: str | None = None  # resized_crop_N, resize_N, resize_M_randomcrop_NxN_hflip, no_resize
    test_image_prep: str | None = None  # of the test pictures, to the same size [the training's, without chance]
    resolution: int = 512  # N of the default preparation, resized_randomcrop_N
    center_crop: bool = False  # the default preparation is resized_crop_N
    random_flip: bool = False  # and mirrors every other picture
    caption_column: str = "text"  # of metadata.jsonl
    unconditional: bool = False  # leave the captions out
    teacher: str | None = None  # a one-step base that draws the pictures of captions alone: sd-turbo
    dataloader_num_workers: int = 0  # processes that prepare pictures
    # model
    base: str = "tiny"  # a folder, a Hub id or a name: gaussians, pixels, tiny, sd15, sd21, pixart512
    disc_base: str = "sd15"  # whose U-Net looks at latents where the base is PixArt
    stage: Literal["yoso", "adapt_v", "adapt_zsnr"] = "yoso"  # or first: predict v; then: begin at pure noise
    train: Literal["lora", "all"] = "lora"  # LoRA, or every weight of the denoiser
    lora_rank: int = 64
    prediction_type: str | None = None  # epsilon or v_prediction, where the base's scheduler does not say so
    prior_pictures: int = 1000  # whose latents' statistics one step begins from (section 4.2); 0: from noise alone
    # losses
    lambda_gan: float = 1.0  # weight of the adversarial loss; 0 trains no discriminator
    lambda_kl: float = 0.5  # weight of the distance to the data
    lambda_con: float = 2.0  # weight of the distance to G a little earlier
    adversarial: Literal["coop", "data", "noisy"] = "coop"  # real: G's better guess, the data, or the data noised again
    consistency: Literal["perceptual", "mse"] = "perceptual"  # distance of a frozen U-Net's features, or of latents
    snr_gamma: float = 5.0  # the largest weight of a noise level
    coop_steps: int = 250  # how much earlier the better guess is
    con_steps: int = 25  # how much earlier the consistent one
    last_share: float = 0.0  # of the batch at the last noise level, where one step begins; the rest at any
    noise_offset: float = 0.0  # of a noise of one value a channel, added to the noise
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
    validation_prompts: str | None = None  # captions of the sample grid, with | between them; else the test's
    track_val_fid: bool = False  # FID at each validation; needs Inception's weights
    checkpointing_steps: int = 500  # steps between saves
    report_to: str = "none"  # none, tensorboard, wandb
    tracker_project_name: str = "train_yoso"  # W&B project


# Where the base is tiny every weight trains, on small pictures, faster; the points are more so.
PIXELS = dict(train="all", train_data_dir="cifar10.zip", resolution=32, learning_rate=1e-4, disc_lr_ratio=2.0,
              lr_scheduler="constant_with_warmup", lr_warmup_steps=50, adam_weight_decay=0.0, adam_beta1=0.5,
              adam_beta2=0.99, train_batch_size=32, max_train_steps=1500, prior_pictures=0, lambda_kl=1.0,
              consistency="mse", last_share=0.25, viz_freq=200, checkpointing_steps=200)
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
    random = split == "train" and not cfg.center_crop
    prep = prep or f"resized_{'random' * random}crop_{cfg.resolution}{'_hflip' * cfg.random_flip}"
    return data.open_captioned(cfg.train_data_dir, split, prep, cfg.seed, cfg.resolution, cfg.caption_column)


def check(cfg: Config, schedule: Schedule, item: dict) -> None:
    """Refuses a stage that the base has behind it, or that is not its turn, and what has nothing to learn from."""
    v, zero = schedule.prediction_type == "v_prediction", schedule.alpha[-1] == 0
    if cfg.stage == "adapt_v" and v:
        raise ValueError(f"--stage adapt_v: {cfg.base} predicts v already; go on with --stage adapt_zsnr or yoso")
    if cfg.stage == "adapt_zsnr" and (zero or not v):
        raise ValueError(f"--stage adapt_zsnr: {cfg.base} " + (
            "begins at pure noise already; go on with --stage yoso" if zero else
            "predicts epsilon, which says nothing of the picture in pure noise; run --stage adapt_v first"))
    if not (cfg.lambda_gan or cfg.lambda_kl or cfg.lambda_con):
        raise ValueError("--lambda_gan, --lambda_kl and --lambda_con are 0; expected a loss to learn from")
    if cfg.base in ("gaussians", "pixels") and (cfg.train == "lora" or cfg.consistency == "perceptual"):
        raise ValueError(f"the base {cfg.base} has no trained U-Net; expected --train all --consistency mse")
    if not {"target", "mean"} & item.keys() and not cfg.teacher:
        raise ValueError(f"{cfg.train_data_dir} holds captions alone; expected --teacher, a one-step base that draws"
                         " their pictures (sd-turbo), or pictures")
    if {"target", "mean"} & item.keys() and cfg.teacher:
        raise ValueError(f"{cfg.train_data_dir} holds pictures; leave --teacher out")


def main() -> None:
    cfg = training.parse(Config, dict(tiny=TINY, pixels=PIXELS, gaussians=GAUSSIANS), ALIASES, __doc__)
    rank, world, device = training.start_ranks(cfg.device)
    dtype, points = getattr(torch, cfg.dtype), cfg.base == "gaussians"
    half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.mixed_precision]
    torch.manual_seed(cfg.seed)

    # ---- data: step s takes rows of a global batch, of which this process has its share, in slices
    train_set = open_data(cfg, "train", cfg.train_image_prep)
    test_set = open_data(cfg, "test", cfg.test_image_prep or cfg.train_image_prep)  # crops are central there
    global_batch = world * cfg.train_batch_size * cfg.gradient_accumulation_steps
    slices = training.my_rows(rank, world, cfg.train_batch_size, cfg.gradient_accumulation_steps)
    last_step = cfg.max_train_steps
    if cfg.num_train_epochs:
        last_step = min(last_step, math.ceil(cfg.num_train_epochs * len(train_set) / global_batch))

    # ---- networks: what is trained stays in float32, what is frozen may be stored in half
    base_seed = cfg.seed if cfg.train == "all" else 0  # a base without weights: what carries LoRA must be found again
    if points:
        base = gaussians.load_base(base_seed, dtype, device)
    else:  # cached contexts need no T5, which is larger than all the rest
        cached, parts = isinstance(train_set, data.Cached), weights.parts_of(cfg.base)
        if cached and parts is weights.PIXART:
            parts = ("vae", "transformer", "schedule")
        base = weights.load_base(cfg.base, parts, dtype, str(device), base_seed)
        if cached and train_set.facts["vae"] != weights.fingerprint(base.vae):
            raise ValueError(f"{cfg.train_data_dir} holds latents of {train_set.facts['base']}, whose VAE is not that"
                             f" of {cfg.base} here; make a cache of this base")
        if cached and base.text_encoder and train_set.facts["dtype"] == "float32" and \
                train_set.facts["text_encoder"] != weights.fingerprint(base.text_encoder):
            raise ValueError(f"{cfg.train_data_dir} holds contexts of {train_set.facts['base']}, whose text encoder is"
                             f" not that of {cfg.base}; make a cache of this base")
        if cached and (cfg.validation_prompts or cfg.unconditional):
            raise ValueError(f"{cfg.train_data_dir} holds captions that are encoded already; leave --validation_prompts"
                             " and --unconditional out")
    if cfg.prediction_type:
        base.schedule = Schedule.from_config(base.schedule.config | {"prediction_type": cfg.prediction_type})
    first = train_set[0]
    check(cfg, base.schedule, first)
    generator, old, frozen_one, judge, inception, discriminator = base.denoiser, base.schedule, *[None] * 4
    critic = weights.load_base(cfg.disc_base, ("unet", "text_encoder", "tokenizer"), dtype, str(device)) if \
        base.transformer and cfg.stage == "yoso" else base  # whose U-Net sees latents
    painter = weights.load_base(cfg.teacher, weights.parts_of(cfg.teacher), dtype, str(device)) if cfg.teacher else None
    if cfg.stage != "yoso":
        frozen_one = copy.deepcopy(generator, {id(p): p for p in generator.parameters() if cfg.train == "lora"})
        base.schedule = Schedule.from_config(old.config | {"prediction_type": "v_prediction"} | (
            {"rescale_betas_zero_snr": True} if cfg.stage == "adapt_zsnr" else {}))
    elif cfg.lambda_con and cfg.consistency == "perceptual":
        judge = lower_half(critic.unet, share=cfg.train == "lora" or critic is not base)
    if cfg.stage == "yoso" and cfg.lambda_gan:
        torch.manual_seed(cfg.seed)  # the first weights depend on nothing that came before
        of_pixels = base.vae.factor == 1
        discriminator = (gaussians.MLP(1) if points else PixelDiscriminator(
            generator.config.in_channels, cfg.resolution, generator.config.cross_attention_dim) if of_pixels else
            LatentDiscriminator(critic.unet)).to(device, dtype)
        discriminator.requires_grad_(True)
    schedule, T, scaling = base.schedule, len(base.schedule.alpha), base.vae.config.scaling_factor
    sides = first["target"].shape[1:] if "target" in first else 2 * [cfg.resolution]
    if "mean" not in first and any(side % base.vae.factor for side in sides):
        raise ValueError(f"pictures of {sides[1]}x{sides[0]} pixels; expected sides that are multiples of"
                         f" {base.vae.factor}: choose another --resolution or --train_image_prep")
    shape = first["mean"].shape if "mean" in first else (2,) if points else \
        (generator.config.in_channels, *(side // base.vae.factor for side in sides))  # of a latent
    if cfg.train == "lora":
        add_lora(generator, TARGETS, cfg.lora_rank, 8.0, training.rng(cfg.seed, 0, "lora"))  # peft's default alpha
    for name, p in generator.named_parameters():
        p.requires_grad_(cfg.train == "all" or ".lora_" in name)
    part = "transformer" if base.transformer else "unet"
    parts = nn.ModuleDict({part: generator, "vae": base.vae} | (
        {"text_encoder": base.text_encoder} if base.text_encoder else {}))
    trained = {n: p for n, p in parts.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in trained.items() if cfg.use_ema}
    frozen = weights.fingerprint(parts, trained.keys())
    for network in (parts, frozen_one, judge, painter and painter.denoiser, base is not critic and critic.text_encoder):
        if half and network:
            weights.cast_frozen(network, half)
    for network in filter(None, (generator, getattr(discriminator, "unet", None), judge)):
        network.checkpointing = cfg.gradient_checkpointing
    if cfg.track_val_fid:
        inception = training.needed(weights.load_judge, "inception", str(device), without="no --track_val_fid").network

    # ---- captions and latents: what encodes them is frozen
    @functools.lru_cache(maxsize=2000)
    def encoded(caption: str, critics: bool) -> list[Tensor]:
        with torch.no_grad(), autocast:
            return [c[0].to("cpu", dtype) for c in (critic if critics else base).encode([caption])]

    def encode(captions: list[str], critics: bool = False) -> list[Tensor]:
        """What the denoiser, or the critic's U-Net, takes after x and t: contexts [B, N, C], of T5 also masks."""
        each = [encoded("" if cfg.unconditional else c, critics) for c in captions]
        return [torch.stack(c).to(device) for c in zip(*each)]

    def read(batch: dict, rows: slice, noise: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Latents, contexts, and the critic's context: of pictures, of a cache, or of captions and a teacher."""
        captions, cached = batch["caption"][rows], "context_0" in batch
        context = [batch[k][rows].to(device, dtype) for k in ("context_0", "context_1") if k in batch] if cached else \
            encode(captions)
        seen = context[0] if critic is base else encode(captions, True)[0]
        if "mean" in batch:
            return batch["mean"][rows].to(device, dtype) + batch["std"][rows].to(device, dtype) * noise, context, seen
        with torch.no_grad(), autocast:
            if painter:
                x, words = diffusion.start(noise, T - 1, painter.schedule), painter.encode(captions)
                x0 = predict_x0(painter.denoiser(x, T - 1, *words), x, T - 1, painter.schedule,
                                painter.schedule.prediction_type)
                return x0.to(dtype), context, seen
            pictures = batch["target"][rows].to(device, dtype)
            if pictures.shape[2:] != sides:
                raise ValueError(f"'{batch['name'][rows][0]}' is not of the size of the first training picture,"
                                 " expected one size for all: choose --train_image_prep and --test_image_prep for it")
            mean, logvar, _ = base.vae.encode(pictures)
            return (mean.to(dtype) + (0.5 * logvar.to(dtype)).exp() * noise) * scaling, context, seen

    def G(x: Tensor, t: Tensor, context: list[Tensor]) -> Tensor:
        return generated(generator(x, t.to(device), *context), x, t, schedule)

    def seeded(seeds: Iterable[int], draws: int = 1) -> Tensor:
        """The `draws`-th noise [B, *shape] of each seed's own generator."""
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        each = [torch.stack([torch.randn(shape, generator=g) for g in rngs]) for _ in range(draws)]
        return each[-1].to(device, dtype)

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
        with training.load_state(folder, frozen) as state:
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
    elif cfg.prior_pictures:  # mean and deviation of the latents: where one step begins (section 4.2)
        order = torch.randperm(len(train_set), generator=training.rng(cfg.seed, 0, "prior"))
        groups = order[:cfg.prior_pictures].split(cfg.train_batch_size)  # of a sorted folder the first are alike
        prior = diffusion.mean_and_std(
            z for group in tqdm(groups, "prior", disable=rank != 0)  # of pictures each latent's mean, without noise
            for z in read(data.collate([train_set[i] for i in group.tolist()]), slice(None),
                          bool(painter) * seeded(group.tolist()))[0])
    else:
        prior = torch.zeros(2, *shape, dtype=torch.float64).unbind()

    def swap() -> None:
        """EMA and weights change places: what is shown, measured and written is the EMA."""
        for name, mean in ema.items():
            trained[name].data, ema[name] = mean, trained[name].data

    def save(step: int) -> None:
        """The state last: what a resumed run takes for done has been written."""
        swap()
        export("model.safetensors")
        training.write_file(folder / "prior.safetensors", lambda path: weights.save_prior(path, *prior))
        for name, kohya in (("lora.safetensors", False), ("lora_kohya.safetensors", True)):
            if cfg.train == "lora":
                training.write_file(folder / name, lambda path, kohya=kohya: weights.save_tensors(
                    path, write_lora(generator, part, kohya), {"format": "pt"}))
        swap()
        training.save_state(folder / "state.pt", dict(
            step=step, best=best, base=frozen, prior=prior, trained={n: p.detach() for n, p in trained.items()},
            ema=ema, optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            discriminator=discriminator.state_dict() if discriminator else None,
            optimizer_d=optimizer_d.state_dict() if discriminator else None))

    def export(name: str) -> None:
        training.write_file(folder / name, lambda path: weights.save_yoso(
            path, base, cfg.base, trained, prior, cfg.train == "lora" and cfg.lora_rank))

    @torch.inference_mode()
    def drawn(items: list[dict]) -> tuple[Tensor, Tensor]:
        """The items' own pictures (of captions alone, the teacher's) and one-step samples of their captions, item i
        from the noise of seed i: each [N, 3, H, W], or points."""
        made = []
        for i in range(0, len(items), cfg.train_batch_size):
            some = data.collate(items[i:i + cfg.train_batch_size])
            n = len(some["caption"])
            noise, again = (seeded(range(i, i + n), draws) for draws in (1, 2))
            x, t = diffusion.start_from_prior(noise, again, *prior, T - 1, schedule), torch.full((n,), T - 1)
            x0, context, _ = read(some, slice(n), noise)
            with autocast:
                fake = base.vae.decode(G(x, t, context) / scaling)
                real = some["target"] if "target" in some else base.vae.decode(x0 / scaling)
                made.append((real.float().cpu(), fake.float().cpu()))
        return tuple(map(torch.cat, zip(*made)))

    def validate() -> dict[str, float]:
        real, fakes = drawn([test_set[i] for i in range(min(cfg.num_samples_eval, len(test_set)))])
        spreads = [pictures.std(0, correction=0).mean() for pictures in (fakes, real)]
        values = {"val_spread": (spreads[0] / spreads[1]).item()}  # less than 1: too much the same
        if inception:
            made, true = (evaluate.statistics(torch.cat([evaluate.features(inception, x[None].to(device)) for x in xs]))
                          for xs in (fakes.clamp(-1, 1), real.clamp(-1, 1)))
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
    if cfg.validation_prompts:
        shown = [item | {"caption": caption} for item, caption in zip(shown, cfg.validation_prompts.split("|"))]
    stop, clock = training.catch_stop(), time.monotonic()
    batches = data.batches(train_set, global_batch, cfg.seed, start, last_step,
                           [row for rows in slices for row in rows], cfg.dataloader_num_workers)
    bar = tqdm(total=last_step, initial=start, disable=rank != 0, unit="step")
    for step in range(start, last_step):
        batch = next(batches)
        for one, ratio in ((optimizer, 1.0), (optimizer_d, cfg.disc_lr_ratio)):
            for group in one.param_groups if one else ():
                group["lr"] = ratio * learning_rate(step, cfg, last_step)
        rng = training.rng(cfg.seed, step, "t")
        times = torch.randint(T, (global_batch,), generator=rng)
        times[torch.rand(global_batch, generator=rng) < cfg.last_share] = T - 1

        def draw(what: str, rows: list[int], shape: tuple[int, ...] = shape, step: int = step) -> Tensor:
            every = torch.randn(global_batch, *shape, generator=training.rng(cfg.seed, step, what))
            return every[rows].to(device, dtype)

        def judged(sample: Tensor, t: Tensor, seen: Tensor, rows: list[int], what: str) -> Tensor:
            """The discriminator's logits, of the sample at its t; or noised again, to a lower level, as in UFOGen."""
            if cfg.adversarial == "noisy":
                t = earlier(t, cfg.coop_steps)
                sample = add_noise(sample, draw(f"again {what}", rows), t, schedule)
            return discriminator(sample, t.to(device), seen).to(dtype)  # autocast's are too coarse for a softplus

        # Generator: past the discriminator, to the data, in agreement with itself. The discriminator only passes the
        # gradient on. G runs with a gradient first: autocast would reuse the weights cast in a pass without.
        losses, pairs = {}, []

        def add(name: str, value: float, losses: dict[str, float] = losses) -> None:
            losses[name] = losses.get(name, 0.0) + value / len(slices)

        if discriminator:
            discriminator.requires_grad_(False)
        for i, rows in enumerate(slices):
            mine, t = slice(i * len(rows), (i + 1) * len(rows)), times[rows]
            x0, context, seen = read(batch, mine, draw("latent", rows))
            eps = draw("noise", rows)
            if cfg.noise_offset:
                eps = eps + cfg.noise_offset * draw("offset", rows, (shape[0], *[1] * (len(shape) - 1)))
            x, terms = add_noise(x0, eps, t, schedule), {}
            with autocast:
                if frozen_one:
                    v, x_old = generator(x, t.to(device), *context), add_noise(x0, eps, t, old)
                    fake = predict_x0(v, x, t, schedule, "v_prediction")
                    with torch.no_grad():
                        told = frozen_one(x_old, t.to(device), *context)
                    terms["adapt"] = adapt_v_loss(v, told, x, t, old) if cfg.stage == "adapt_v" else \
                        adapt_zsnr_loss(v, told, x_old, x, t, old, schedule)
                else:
                    fake = G(x, t, context)
                if discriminator:
                    with torch.no_grad():
                        k = earlier(t, cfg.coop_steps)
                        real = G(add_noise(x0, eps, k, schedule), k, context) if cfg.adversarial == "coop" else x0
                    terms["gan"] = cfg.lambda_gan * generator_gan_loss(judged(fake, t, seen, rows, "fake"))
                    pairs.append((real, fake.detach(), t, seen))
                if cfg.lambda_kl and not frozen_one:
                    terms["kl"] = cfg.lambda_kl * kl_loss(fake, x0, t, schedule, cfg.snr_gamma)
                if cfg.lambda_con and not frozen_one:
                    with torch.no_grad():
                        s = earlier(t, cfg.con_steps)
                        goal = G(add_noise(x0, eps, s, schedule), s, context)
                    mine, goal = (judge.features(y, 0, seen) if judge else y for y in (fake, goal))
                    terms["con"] = cfg.lambda_con * consistency_loss(mine, goal, t, s, schedule, cfg.snr_gamma)
            scaler.scale(sum(terms.values()) / len(slices)).backward()
            for name, value in terms.items():
                add(name, value.item())
            add("spread", (fake.detach().std() / x0.std().clamp(min=1e-6)).item())  # under 1: blobs, or too few kinds
        training.check_finite(losses, step, batch["name"])
        training.average_gradients(trained.values())
        scaler.unscale_(optimizer)
        losses["grad_norm"] = nn.utils.clip_grad_norm_(trained.values(), cfg.max_grad_norm).item()
        if not scaler.is_enabled():  # which itself leaves out a step whose gradient overflows
            training.check_finite(losses, step, batch["name"])
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        keep = min(cfg.ema_decay, (1 + step) / (10 + step))  # at first the mean forgets faster
        for name, mean in ema.items():
            mean.lerp_(trained[name].detach(), 1 - keep)

        # Discriminator: better guesses, or the data, against what was made of more noise. Not clipped.
        if discriminator:
            discriminator.requires_grad_(True)
            for (real, fake, t, seen), rows in zip(pairs, slices):
                with autocast:
                    logits_real = judged(real, t, seen, rows, "real")
                    logits_fake = judged(fake, t, seen, rows, "fake")
                    loss = cfg.lambda_gan * discriminator_loss(logits_real, logits_fake)
                scaler.scale(loss / len(slices)).backward()
                add("disc", loss.item())  # 2 ln 2 = 1.386 is chance
                add("disc_right_on_real", share_right([logits_real], True))
                add("disc_right_on_fake", share_right([logits_fake], False))
                add("logit_gap", (logits_real - logits_fake).mean().item())  # 0 for long: it sees nothing
            training.check_finite({"disc": losses["disc"]}, step, batch["name"])
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
                columns = drawn(shown)
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
            weights.save_folder(folder / "base", base, rest=cfg.base)
        print(folder / "model.safetensors")


if __name__ == "__main__":
    training.run(main)
