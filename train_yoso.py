"""Trains YOSO: a diffusion model becomes one that draws a picture in one step.

    python train_yoso.py                                  # LoRA on tiny-sd, drawn scenes, CPU
    python train_yoso.py --base pixels                    # handwritten digits from scratch, CPU
    python train_yoso.py --base sd15 --dataset_folder DATA --mixed_precision bf16
    python train_yoso.py --base sd15 --dataset_folder captions.txt --teacher sd-turbo ...
    torchrun --nproc_per_node=4 train_yoso.py --base sd15 --dataset_folder DATA ...
    python train_yoso.py --resume runs/NAME

To train every weight of a pretrained model, run two short stages first (all with the same flags
of size, data and precision):

    python train_yoso.py --base B --train all --stage adapt_v --output_dir runs/v ...
    python train_yoso.py --base runs/v/base --train all --stage adapt_zsnr --output_dir runs/z ...
    python train_yoso.py --base runs/z/base --train all --prior_pictures 0 ...

DATA: see dataset/__init__.py. The run's folder is that of train_pix2pix_turbo.py; draw with
`python sample.py "PROMPT" --checkpoint runs/NAME`. A LoRA is also written as lora.safetensors
(for diffusers) and lora_kohya.safetensors, the prior as prior.safetensors. With --train all the
whole model is written to runs/NAME/base at the end: the base of the next stage.

Paper: Luo et al. 2024, "You Only Sample Once: Taming One-Step Text-to-Image Synthesis by
Self-Cooperative Diffusion GANs". One generator G(x_t, t) predicts x0 from
x_t = alpha_t x0 + sigma_t eps, for every t:
    L = lambda_gan L_adv + lambda_kl L_KL + lambda_con L_con.
To see the method in the plane, read tiny/gaussians.py first.

Differences from the released script: the softplus is taken of each sample's logit, as the paper's
formula says, not of their mean over the batch; and the generator steps before the discriminator,
whose two sides are then at hand from the generator's step.
"""

import copy
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import evaluate
import training
from dataset.cache import Cached
from dataset.check import captions_of, check_readable, report_cut
from dataset.folders import check_preparation, open_captioned
from dataset.loader import batches, collate
from files import bases, checkpoints, metrics
from files.autoencoders import load_autoencoder
from files.formats import write_lora
from files.tensors import cast_frozen, fingerprint, save_tensors
from models import diffusion
from models.diffusion import Schedule, add_noise, less_noisy, predict_x0
from models.discriminator import LatentDiscriminator, PixelDiscriminator, lower_half
from models.lora import add_lora
from models.vae import latent_size

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


@dataclass
class Config:
    # data
    dataset_folder: str = "drawn:scenes"  # folder, .zip, .txt, cache, drawn:scenes, or digits
    train_image_prep: str | None = None  # how pictures are cropped [resized_randomcrop_N]
    test_image_prep: str | None = None  # the same for test pictures, always cropped in the centre
    resolution: int = 512  # side of the training pictures
    caption_column: str = "text"  # of metadata.jsonl
    unconditional: bool = False  # train without captions
    teacher: str | None = None  # a one-step base that draws pictures for captions alone: sd-turbo
    dataloader_num_workers: int = 0  # processes that load pictures
    # model
    base: str = "tiny-sd"  # folder, Hub id, or tiny-sd, tiny (random), pixels, sd15, pixart512
    disc_base: str = "sd15"  # for PixArt: the base whose U-Net serves D and the perceptual distance
    disc_random: bool = False  # the discriminator starts from random weights, not from a U-Net's
    stage: Literal["yoso", "adapt_v", "adapt_zsnr"] = "yoso"  # the adaption stages come first
    train: Literal["lora", "all"] = "lora"  # LoRA, or every weight of the denoiser
    lora_rank: int = 64  # rank of the LoRA; its scale is 8 / rank
    init: str | None = None  # checkpoint whose LoRA a new run starts from: file, run
    prediction_type: str | None = None  # epsilon, v_prediction [as the base's scheduler says]
    prior_pictures: int = 1000  # pictures to estimate the informative prior from; 0: no prior
    # losses
    lambda_gan: float = 1.0  # weight of the adversarial loss; 0 trains no discriminator
    lambda_kl: float = 0.5  # weight of the KL term, the distance to the data
    lambda_con: float = 2.0  # weight of the consistency term
    lambda_mismatch: float = 0.0  # real pictures with wrong captions, as fakes (times lambda_gan)
    adversarial: Literal["coop", "data", "noisy"] = "coop"  # real: G(x_{t-k}), data, noised data
    consistency: Literal["perceptual", "mse"] = "perceptual"  # in U-Net features, or latents
    snr_gamma: float = 5.0  # largest weight of a noise level in the KL and consistency terms
    snr_floor: float = 0.0  # smallest weight of a noise level in the KL term
    con_floor: float = 0.0  # smallest weight of a noise level in the consistency term
    coop_steps: int = 250  # k: D's real side is G(x_{t-k})
    con_steps: int = 25  # the consistency term compares with G this many timesteps lower
    last_share: float = 0.0  # share of items at the last timestep, where sampling starts
    high_share: float = 0.0  # share of items in the last --coop_steps timesteps, without the last
    denoising_steps: int = 0  # the first steps train the KL term alone; for random weights
    # optimisation
    learning_rate: float = 2e-5  # learning rate of the generator
    disc_lr_ratio: float = 1.0  # the discriminator's learning rate over the generator's
    lr_scheduler: training.Scheduler = "constant"  # linear and cosine fall to 0
    lr_warmup_steps: int = 500  # linear warm-up; "constant" has none
    adam_beta1: float = 0.9  # the generator's AdamW: decay of the mean gradient
    disc_adam_beta1: float = 0.0  # the same for the discriminator
    adam_beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    adam_weight_decay: float = 1e-2  # weight decay
    adam_epsilon: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float = 1.0  # the generator's gradients are clipped to this norm
    use_ema: bool = True  # write an exponential moving average (EMA) of the weights
    ema_decay: float = 0.999  # decay of the EMA per step
    train_batch_size: int = 16  # pictures per process and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per step
    max_train_steps: int = 5000  # optimizer steps
    max_train_epochs: int | None = None  # end earlier, after this many passes over the data
    gradient_checkpointing: bool = False  # less memory for a third more time
    mixed_precision: training.Precision = "no"  # autocast, and the type of frozen weights
    dtype: Literal["float32", "float64"] = "float32"  # type of trained weights (float64 for tests)
    # the run
    seed: int = 42  # random seed
    device: str = "auto"  # auto, cpu, cuda, mps
    output_dir: str | None = None  # default runs/yoso-DATE
    resume: str | None = None  # folder of a run to resume
    viz_freq: int = 100  # steps between sample grids
    preview_vae: str | None = None  # autoencoder for these grids, as taesd [the base's VAE]
    validation_steps: int = 500  # steps between validations
    validation_num_images: int = 100  # test pictures per validation
    validation_prompts: str | None = None  # up to 16 captions of the sample grids, joined by |
    track_val_fid: bool = False  # FID at each validation; needs Inception's weights
    checkpointing_steps: int = 500  # steps between saves
    plan: bool = False  # run three steps, write nothing: print memory, time, what flags would save
    plan_steps: int | None = None  # set by --plan: stop after this many steps, write no files
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # where else to log
    tracker_project_name: str = "train_yoso"  # W&B project


# Defaults for a tiny base with random weights: every weight trains, on small pictures.
TINY = dict(
    train="all",
    resolution=32,
    learning_rate=2e-4,
    disc_lr_ratio=0.5,
    adam_beta2=0.99,
    train_batch_size=16,
    max_train_steps=2000,
    prior_pictures=200,
    checkpointing_steps=200,
)
# Defaults for a tiny base that has learned to draw: LoRA.
PRETRAINED = TINY | dict(
    train="lora",
    resolution=64,
    lora_rank=16,
    learning_rate=5e-4,
    disc_lr_ratio=1.0,
    max_train_steps=300,
)
# Defaults for training from scratch on raw pictures. What gives variety: tiny/README.md.
PIXELS = TINY | dict(
    dataset_folder="digits",
    resolution=16,
    learning_rate=2e-4,
    disc_lr_ratio=2.0,
    lr_scheduler="constant_with_warmup",
    lr_warmup_steps=50,
    adam_beta1=0.5,
    disc_adam_beta1=0.5,
    adam_weight_decay=0.0,
    train_batch_size=32,
    denoising_steps=600,
    max_train_steps=1700,
    prior_pictures=0,
    lambda_kl=1.0,
    lambda_con=1.0,
    consistency="mse",
    con_floor=5.0,
    last_share=0.25,
    high_share=0.4,
    viz_freq=200,
)
# By how the base's name begins; the first that matches counts.
TABLES = {
    "tiny-turbo": PRETRAINED,
    "tiny-sd": PRETRAINED,
    "tiny": TINY,
    "pixels": PIXELS,
}
ALIASES = dict(
    pretrained_model_name_or_path="base",
    resume_from_checkpoint="resume",
    train_data_dir="dataset_folder",
    num_train_epochs="max_train_epochs",
    num_training_epochs="max_train_epochs",
    eval_freq="validation_steps",
    num_samples_eval="validation_num_images",
)


# ----------------------------------------------------------------------------------- losses
# |a|^2 is the mean over all values of a tensor, not their sum.

def generated(prediction: Tensor, x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """G(x_t, t) = c_skip x_t + c_out x0_theta(x_t, t).

    c_skip = 0.25 / (s^2 + 0.25), c_out = s / sqrt(s^2 + 0.25), s = 10 t: at t = 0 G(x) = x. From
    t = 1 on c_skip is below 0.003, and G is x0_theta. The same scalings as in LCM.
    """
    s = 10.0 * t.to(x).view(-1, *[1] * (x.ndim - 1))
    c_skip = 0.25 / (s**2 + 0.25)
    c_out = s / (s**2 + 0.25).sqrt()
    return c_skip * x + c_out * predict_x0(prediction, x, t, schedule, schedule.prediction_type)


def generator_gan_loss(logits_fake: Tensor) -> Tensor:
    """L_adv = softplus(-D(G(x_t), t)), the non-saturating loss, its mean over samples."""
    return F.softplus(-logits_fake).mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """softplus(-D(real, t)) + softplus(D(G(x_t), t)), its mean over samples.

    In self-cooperation the real side is G(x_{t-k}), not data: see yoso_losses.
    """
    return (F.softplus(-logits_real) + F.softplus(logits_fake)).mean()


def other_captions(context: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts [B, N, C] -> those of the neighbours in the batch, and whether they differ [B].

    Neighbours are those of a micro-batch. So this term, unlike all others, depends on how the
    batch is split.
    """
    others = context.roll(1, dims=0)
    return others, (others != context).flatten(1).any(1)


def mismatch_loss(logits: Tensor, differs: Tensor) -> Tensor:
    """softplus(D(real, t, another caption)), the mean over pairs whose captions differ.

    Without it, D may call a good picture real whatever its caption says. It is not in the paper.
    Source: Reed et al. 2016, "Generative Adversarial Text to Image Synthesis" (GAN-CLS).
    """
    return F.softplus(logits[differs]).sum() / differs.sum().clamp(min=1)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean square of a - b per sample [B], in float32 at least."""
    difference = (a - b).to(torch.promote_types(a.dtype, torch.float32))
    return difference.square().flatten(1).mean(1)


def kl_loss(
    fake: Tensor, x0: Tensor, t: Tensor, schedule: Schedule, gamma: float, floor: float = 0.0
) -> Tensor:
    """L_KL = min(max(SNR_t, floor), gamma) |G(x_t) - x0|^2.

    SNR_t = alpha_t^2 / sigma_t^2 is the signal-to-noise ratio. Two Gaussians of the standard
    deviation sigma_t around alpha_t G(x_t) and alpha_t x0 have the KL divergence
    SNR_t |G(x_t) - x0|^2 / 2: hence the name. Pure noise has SNR 0 and so weight 0. With floor 1
    its weight is 1, as in a loss on v.
    """
    snr = (schedule.alpha[t] / schedule.sigma[t]) ** 2
    weight = snr.clamp(floor, gamma).to(x0)
    return (weight * mean_square(fake, x0)).mean()


def consistency_loss(
    here: Tensor,
    goal: Tensor,
    t: Tensor,
    s: Tensor,
    schedule: Schedule,
    gamma: float,
    floor: float = 0.0,
) -> Tensor:
    """L_con = w |f(G(x_t)) - f(G(x_s))|^2, s < t, same eps, no gradient through the goal.

    f gives the features of a frozen U-Net (the latent perceptual loss), or is the identity.
    w = min(max(1 / (sigma_t / alpha_t - sigma_s / alpha_s), floor), gamma). The paper has no
    floor: in pure noise, w is then 0. With one, G learns there to follow its less noisy self.
    """
    ratio_t = schedule.sigma[t] / schedule.alpha[t]
    ratio_s = schedule.sigma[s] / schedule.alpha[s]
    weight = (1 / (ratio_t - ratio_s)).clamp(floor, gamma)  # t = s = 0: gamma times 0
    distance = mean_square(here, goal.detach())
    return (weight.to(distance) * distance).mean()


def adapt_loss(
    v: Tensor,
    teacher_prediction: Tensor,
    x_old: Tensor,
    x_new: Tensor,
    t: Tensor,
    old: Schedule,
    new: Schedule,
) -> Tensor:
    """|v_theta(x'_t) - v'|^2, v' = (alpha' x'_t - x0) / sigma', x0 from the teacher.

    x_t and x'_t are the same picture and eps on the old schedule and on the new one. Stage I:
    the teacher predicts eps, and the schedules are equal. Stage II: it predicts v, and the new
    schedule ends in pure noise, where v' = -x0.
    """
    x0 = predict_x0(teacher_prediction, x_old, t, old, old.prediction_type)
    alpha, sigma = new.at(t, x_new)
    return mean_square(v, (alpha * x_new - x0) / sigma).mean()


def logits_of(
    D: Callable,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    schedule: Schedule,
    cfg: Config,
    noise: Tensor | None = None,
) -> Tensor:
    """D's logits [B, 1] for x, real or fake. D is told t, the timestep of the fake side, for both.

    With --adversarial noisy (UFOGen, Xu et al. 2023), `noise` is added to x first, to timestep
    t - k, and D is told that.
    """
    if cfg.adversarial == "noisy":
        t = less_noisy(t, cfg.coop_steps)
        x = add_noise(x, noise, t, schedule)
    logits = D(x, t.to(x.device), context)
    return logits.to(x.dtype)  # half precision is too coarse for a softplus


def yoso_losses(
    G: Callable,
    D: Callable | None,
    features: Callable | None,
    x0: Tensor,
    context: list[Tensor],
    disc_context: Tensor,
    t: Tensor,
    eps: Tensor,
    schedule: Schedule,
    cfg: Config,
    noise: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """L = lambda_gan L_adv + lambda_kl L_KL + lambda_con L_con of one micro-batch.

    D's real side is G(x_{t-k}), without gradient. Where t <= k that is G(x_0) = x_0: the data, with
    next to no noise. At each higher t, G imitates what it makes already from k steps less noise,
    and so the distribution of the data spreads upwards, to pure noise.

    x0, eps [B, C, h, w]; t [B] on the CPU. G(x, t, context) predicts x0, with c_skip and c_out;
    D(x, t, disc_context) -> logits [B, 1], or None; features(x, disc_context) are those of the
    perceptual distance, None for latents. `noise` [B, C, h, w] is for --adversarial noisy alone.
    Returns the weighted terms by name, G's samples, and what D takes for real.
    """
    t_coop = less_noisy(t, cfg.coop_steps)
    t_con = less_noisy(t, cfg.con_steps)

    # The call with gradient comes first: autocast caches the weights that it casts, and weights
    # cast under no_grad would pass no gradient on.
    fake = G(add_noise(x0, eps, t, schedule), t, context)
    real = x0
    with torch.no_grad():  # G's better-informed predictions, from less of the same noise
        if D is not None and cfg.adversarial == "coop":
            real = G(add_noise(x0, eps, t_coop, schedule), t_coop, context)
        if cfg.lambda_con:
            goal = G(add_noise(x0, eps, t_con, schedule), t_con, context)

    terms = {}
    if D is not None:
        logits = logits_of(D, fake, t, disc_context, schedule, cfg, noise)
        terms["gan"] = cfg.lambda_gan * generator_gan_loss(logits)
    if cfg.lambda_kl:
        loss = kl_loss(fake, x0, t, schedule, cfg.snr_gamma, cfg.snr_floor)
        terms["kl"] = cfg.lambda_kl * loss
    if cfg.lambda_con:
        here = fake
        if features is not None:
            here = features(fake, disc_context)
            goal = features(goal, disc_context)
        loss = consistency_loss(here, goal, t, t_con, schedule, cfg.snr_gamma, cfg.con_floor)
        terms["con"] = cfg.lambda_con * loss
    return terms, fake.detach(), real


def denoising_losses(
    G: Callable,
    x0: Tensor,
    context: list[Tensor],
    t: Tensor,
    eps: Tensor,
    schedule: Schedule,
    cfg: Config,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The KL term alone, of one micro-batch: what a generator with random weights learns first.

    lambda_kl does not count here. Pure noise has weight 0, unless --snr_floor is above 0: then G
    learns to make the mean of a caption's pictures out of it, and to ignore which noise it is.
    Returns the term, G's samples, and x0.
    """
    fake = G(add_noise(x0, eps, t, schedule), t, context)
    loss = kl_loss(fake, x0, t, schedule, cfg.snr_gamma, cfg.snr_floor)
    return {"kl": loss}, fake.detach(), x0


def adapt_losses(
    student: Callable,
    teacher: Callable,
    x0: Tensor,
    context: list[Tensor],
    t: Tensor,
    eps: Tensor,
    old: Schedule,
    new: Schedule,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The loss of an adaption stage, of one micro-batch: see adapt_loss.

    Student and teacher are denoisers; they are called with (x, t, *context). Returns the term
    by name, the student's samples, and x0.
    """
    x_old = add_noise(x0, eps, t, old)
    x_new = add_noise(x0, eps, t, new)
    v = student(x_new, t.to(x0.device), *context)
    with torch.no_grad():
        teacher_prediction = teacher(x_old, t.to(x0.device), *context)
    loss = adapt_loss(v, teacher_prediction, x_old, x_new, t, old, new)
    fake = predict_x0(v, x_new, t, new, "v_prediction")
    return {"adapt": loss}, fake.detach(), x0


# ------------------------------------------------------------------------ what is refused

def check_stage(cfg: Config, schedule: Schedule) -> None:
    """ValueError for a stage out of order or done already, and for settings that do not fit."""
    predicts_v = schedule.prediction_type == "v_prediction"
    starts_from_noise = schedule.alpha[-1] == 0
    if cfg.stage == "adapt_v" and predicts_v:
        raise ValueError(
            f"--stage adapt_v: {cfg.base} predicts v already; go on with --stage adapt_zsnr or"
            " yoso"
        )
    diffusion.check_prediction(schedule.prediction_type, len(schedule.alpha) - 1, schedule)
    if cfg.stage == "adapt_zsnr" and starts_from_noise:
        raise ValueError(
            f"--stage adapt_zsnr: {cfg.base} starts from pure noise already; go on with"
            " --stage yoso"
        )
    if cfg.stage == "adapt_zsnr" and not predicts_v:
        raise ValueError(
            f"--stage adapt_zsnr: {cfg.base} predicts epsilon, which says nothing about the"
            " picture in pure noise; run --stage adapt_v first"
        )
    if cfg.denoising_steps and cfg.stage != "yoso":
        raise ValueError(
            f"--stage {cfg.stage} with --denoising_steps {cfg.denoising_steps}: expected them with"
            " --stage yoso alone; leave the flag out"
        )
    if cfg.stage == "yoso" and not (cfg.lambda_gan or cfg.lambda_kl or cfg.lambda_con):
        raise ValueError(
            "--lambda_gan, --lambda_kl and --lambda_con are 0; expected a loss to learn from"
        )
    if cfg.lambda_mismatch:
        check_mismatch(cfg)
    if cfg.base == "pixels" and (cfg.train == "lora" or cfg.consistency == "perceptual"):
        raise ValueError(
            f"the base {cfg.base} has no trained U-Net; expected --train all --consistency mse"
        )


def check_mismatch(cfg: Config) -> None:
    """ValueError where the discriminator cannot be shown the captions of neighbours."""
    if cfg.stage != "yoso" or not cfg.lambda_gan:
        raise ValueError(
            "--lambda_mismatch without a discriminator; expected --stage yoso and a --lambda_gan"
            " above 0, or leave the flag out"
        )
    if cfg.unconditional or cfg.train_batch_size == 1:
        raise ValueError(
            "--lambda_mismatch shows a picture with a neighbour's caption; expected captions (no"
            " --unconditional), and a --train_batch_size of 2 or more"
        )


def check_shares(cfg: Config) -> None:
    """ValueError for shares that are more than the whole batch, and floors above the ceiling."""
    floor = max(cfg.snr_floor, cfg.con_floor)
    if not floor <= cfg.snr_gamma or cfg.snr_gamma == 0:
        raise ValueError(
            f"--snr_gamma {cfg.snr_gamma} is the largest weight of a noise level; expected more"
            f" than 0, and --snr_floor and --con_floor up to it (found {floor})"
        )
    if cfg.last_share + cfg.high_share > 1:
        raise ValueError(
            f"--last_share {cfg.last_share} and --high_share {cfg.high_share}: expected shares of"
            " the batch, together at most 1"
        )


def check_data(items: Dataset, base: bases.Base, cfg: Config) -> None:
    """ValueError for a data set that the base cannot train on, or not with these settings."""
    folder = cfg.dataset_folder
    has_pictures = "target" in items[0] or "mean" in items[0]
    if not has_pictures and not cfg.teacher:
        raise ValueError(
            f"{folder} holds captions alone; expected --teacher, a one-step base that draws"
            " their pictures (sd-turbo), or pictures"
        )
    if has_pictures and cfg.teacher:
        raise ValueError(f"{folder} holds pictures; leave --teacher out")
    if cfg.unconditional and cfg.validation_prompts:
        raise ValueError("--validation_prompts has no meaning with --unconditional; leave it out")
    if cfg.lambda_mismatch and len(set(captions_of(items))) == 1:
        raise ValueError(
            f"--lambda_mismatch shows a picture with a neighbour's caption, and {folder} has only"
            " one; leave the flag out"
        )

    facts = getattr(items, "facts", None)  # of a cache
    if facts is None:
        return
    if cfg.validation_prompts or cfg.unconditional:
        raise ValueError(
            f"{folder} holds captions that are encoded already; leave --validation_prompts and"
            " --unconditional out"
        )
    compared = ["vae"]
    if facts.get("dtype") == "float32":  # else the cache's text encoder was cast
        compared.append("text_encoder")
    for part in compared:
        network = getattr(base, part)
        if network and facts[part] != fingerprint(network):
            raise ValueError(
                f"{folder} is a cache of {facts['base']}, whose {part} is not that of {cfg.base}"
                " here; make a cache of this base"
            )


# --------------------------------------------------------------------------------- building

@dataclass
class Networks:
    base: bases.Base  # its denoiser is trained; VAE and text encoder are frozen
    disc_base: bases.Base  # whose U-Net and text encoder D uses: the base; for PixArt --disc_base
    teacher: bases.Base | None  # the one-step base that draws pictures for captions alone
    shape: tuple[int, ...]  # [C, h, w] of latents
    old_schedule: Schedule  # of the frozen denoiser in an adaption stage
    frozen_denoiser: nn.Module | None = None  # what the denoiser was before an adaption stage
    D: nn.Module | None = None
    feature_network: nn.Module | None = None  # half a frozen U-Net: the perceptual distance
    inception: nn.Module | None = None
    preview_vae: nn.Module | None = None  # decodes the sample grids in place of the base's VAE
    trained: dict[str, nn.Parameter] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    frozen_fingerprint: str = ""  # of all frozen weights
    prior: tuple[Tensor, Tensor] | None = None  # mean and std of latents, where sampling starts

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    @property
    def last_timestep(self) -> int:
        return len(self.schedule.alpha) - 1

    def G(self, x: Tensor, t: Tensor, context: list[Tensor]) -> Tensor:
        prediction = self.base.denoiser(x, t.to(x.device), *context)
        return generated(prediction, x, t, self.schedule)

    def features(self, x: Tensor, context: Tensor) -> Tensor:
        """Of clean latents: at t = 0."""
        return self.feature_network.features(x, 0, context)


def open_data(cfg: Config) -> tuple[Dataset, Dataset]:
    """The training and the test set. Crops are random in training and central in the test."""
    n = cfg.resolution
    train_prep = cfg.train_image_prep or f"resized_randomcrop_{n}"
    test_prep = cfg.test_image_prep or cfg.train_image_prep or f"resized_crop_{n}"
    folder, column = cfg.dataset_folder, cfg.caption_column
    check_preparation(folder, cfg.train_image_prep, cfg.test_image_prep)
    train_set = open_captioned(folder, "train", train_prep, cfg.seed, n, column)
    test_set = open_captioned(folder, "test", test_prep, cfg.seed, n, column)
    if isinstance(train_set, Cached) and (cfg.train_image_prep or cfg.test_image_prep):
        raise ValueError(
            f"{folder} is a cache, whose pictures were cropped when it was made; leave"
            " --train_image_prep and --test_image_prep out (python -m dataset cache has --prep)"
        )
    check_readable(test_set, max(cfg.validation_num_images, 16))
    return train_set, test_set


def build_networks(cfg: Config, run: training.Run, train_set: Dataset) -> Networks:
    """All networks of a run. Trained weights are in run.dtype, frozen ones may be in half."""
    nets = load_bases(cfg, run, train_set)
    base = nets.base
    check_stage(cfg, base.schedule)
    check_shares(cfg)
    check_data(train_set, base, cfg)
    if not cfg.unconditional:
        report_cut(cfg.dataset_folder, captions_of(train_set), base.tokenizer)
    if cfg.validation_prompts:
        report_cut("--validation_prompts", cfg.validation_prompts.split("|"), base.tokenizer)
    if cfg.stage != "yoso":
        # With LoRA the frozen copy shares the base's weights, which do not change.
        shared = {id(p): p for p in base.denoiser.parameters() if cfg.train == "lora"}
        nets.frozen_denoiser = copy.deepcopy(base.denoiser, memo=shared)
        base.schedule = adapted_schedule(base.schedule, cfg.stage)
    if cfg.stage == "yoso" and cfg.lambda_con and cfg.consistency == "perceptual":
        trained_copy = cfg.train == "all" and nets.disc_base is base
        nets.feature_network = lower_half(nets.disc_base.unet, share=not trained_copy)
    if cfg.stage == "yoso" and cfg.lambda_gan:
        nets.D = build_discriminator(cfg, run, nets, train_set)
    choose_trained(cfg, run, nets)
    nets.frozen_fingerprint = fingerprint_frozen(cfg, nets)
    if run.half:
        cast_all_frozen(nets, run.half)
    set_checkpointing(nets, cfg.gradient_checkpointing)
    if nets.disc_base and nets.disc_base is not base:
        nets.disc_base.unet = None  # D and the perceptual distance have the half that they need
    return nets


def load_bases(cfg: Config, run: training.Run, train_set: Dataset) -> Networks:
    """The base, and beside it --disc_base, the teacher and Inception where they are needed."""
    # LoRA checkpoints must rebuild the same random base, so its seed is fixed.
    seed = cfg.seed if cfg.train == "all" else 0
    how = dict(dtype=run.dtype, device=str(run.device))
    with run.first_process_first():
        cached = isinstance(train_set, Cached)
        base = bases.load_base(cfg.base, bases.parts_of(cfg.base, cached), **how, seed=seed)
        disc_base, teacher, inception = base, None, None
        preview_vae = None
        if cfg.stage == "yoso" and base.transformer:  # only a U-Net can be the discriminator
            disc_base = bases.load_base(cfg.disc_base, ("unet", "text_encoder", "tokenizer"), **how)
        if cfg.teacher:
            teacher = bases.load_base(cfg.teacher, bases.parts_of(cfg.teacher), **how)
            check_teacher(teacher, base)
            teacher.vae = None  # it draws latents, which the base's VAE decodes
        if cfg.track_val_fid:
            inception = training.load_or_explain(
                metrics.load_metric_network,
                "inception",
                str(run.device),
                without="leave --track_val_fid out",
            ).network
        if cfg.preview_vae:
            preview_vae = load_autoencoder(cfg.preview_vae, base, **how)
    if cfg.prediction_type:
        settings = base.schedule.config | {"prediction_type": cfg.prediction_type}
        base.schedule = Schedule.from_config(settings)
    shape = latent_shape(base, train_set[0], cfg.resolution)
    if cached:
        report_resolution(cfg, shape, base.vae.factor)
    return Networks(
        base,
        disc_base,
        teacher,
        shape,
        base.schedule,
        inception=inception,
        preview_vae=preview_vae,
    )


def check_teacher(teacher: bases.Base, base: bases.Base) -> None:
    """ValueError for a teacher whose latents are not those of the base."""
    if kind_of_latents(teacher) != kind_of_latents(base):
        raise ValueError(
            f"--teacher {teacher.name} makes latents of {kind_of_latents(teacher)}; expected"
            f" {kind_of_latents(base)}, as those of {base.name}: choose a teacher with the same VAE"
        )


def kind_of_latents(base: bases.Base) -> str:
    channels = base.denoiser.config.in_channels
    scaling = base.vae.config.scaling_factor
    return f"{channels} channels, factor {base.vae.factor} and scale {scaling:g}"


def latent_shape(base: bases.Base, item: dict, resolution: int) -> tuple[int, ...]:
    """[C, h, w] of the latents: of a cache's item, of its picture, or of one to be drawn."""
    if "mean" in item:
        return tuple(item["mean"].shape)
    sides = (resolution, resolution)
    if "target" in item:
        sides = item["target"].shape[1:]
    return base.denoiser.config.in_channels, *latent_size(sides, base.vae.factor)


def report_resolution(cfg: Config, shape: tuple[int, ...], factor: int) -> None:
    """Says so where --resolution is not that of a cache, which holds pictures of one size."""
    height, width = (side * factor for side in shape[1:])
    if (height, width) != (cfg.resolution, cfg.resolution):
        training.say_once(
            f"{cfg.dataset_folder} is a cache of pictures of {width} x {height}; these are trained"
            f" on, and --resolution {cfg.resolution} has no effect"
        )


def adapted_schedule(old: Schedule, stage: str) -> Schedule:
    """The schedule that an adaption stage leads to."""
    settings = old.config | {"prediction_type": "v_prediction"}
    if stage == "adapt_zsnr":
        settings["rescale_betas_zero_snr"] = True
    return Schedule.from_config(settings)


def build_discriminator(
    cfg: Config, run: training.Run, nets: Networks, train_set: Dataset
) -> nn.Module:
    """Half a U-Net for latents, or a small network for pictures that have none."""
    torch.manual_seed(cfg.seed)  # its first weights depend on nothing that came before
    if nets.base.vae.factor > 1:
        D = LatentDiscriminator(nets.disc_base.unet)
        if cfg.disc_random:
            for layer in D.unet.modules():
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
    else:
        channels, height, width = nets.shape
        if height != width:
            raise ValueError(
                f"{cfg.dataset_folder} gives pictures of {width}x{height}; expected square ones,"
                " the only ones that the discriminator of pixels takes: choose --train_image_prep"
            )
        context_width = nets.base.denoiser.config.cross_attention_dim
        D = PixelDiscriminator(channels, height, context_width)
        D.standardise(some_contexts(nets.base, train_set))
    return D.to(run.device, run.dtype).requires_grad_(True)


def some_contexts(base: bases.Base, items: Dataset) -> Tensor:
    """The contexts [M, N, C] of the captions of about 200 items spread over the data."""
    stride = max(len(items) // 200, 1)
    chosen = [items[i] for i in range(0, len(items), stride)]
    if "context_0" in chosen[0]:  # of a cache
        return torch.stack([item["context_0"] for item in chosen])
    captions = {item["caption"] for item in chosen}
    with torch.no_grad():
        return base.encode(sorted(captions))[0]


def choose_trained(cfg: Config, run: training.Run, nets: Networks) -> None:
    """Adds the LoRA, and sets which parameters train and their EMA."""
    denoiser = nets.base.denoiser
    if cfg.train == "lora":
        lora_rng = training.rng(cfg.seed, 0, "lora")
        add_lora(denoiser, LORA_TARGETS, cfg.lora_rank, 8.0, lora_rng)  # alpha 8: peft's default
    if cfg.init and not cfg.resume:
        start_from_checkpoint(cfg, run, nets)
    for name, p in denoiser.named_parameters():
        p.requires_grad_(cfg.train == "all" or ".lora_" in name)
    for name, p in named_networks(nets).named_parameters():
        if p.requires_grad:
            nets.trained[name] = p
            if cfg.use_ema:
                nets.ema[name] = p.detach().clone()


def start_from_checkpoint(cfg: Config, run: training.Run, nets: Networks) -> None:
    """Puts the LoRA of --init in the place of the new one."""
    if cfg.train == "all":
        raise ValueError(
            f"--init {cfg.init} with --train all: expected --train lora; a whole model goes on as"
            " --base runs/NAME/base"
        )
    with run.first_process_first():
        started = checkpoints.start_yoso_from(
            cfg.init,
            named_networks(nets),
            cfg.lora_rank,
            nets.schedule.prediction_type,
            cfg.base,
        )
    if run.rank == 0:
        print(started, file=sys.stderr)


def named_networks(nets: Networks) -> nn.ModuleDict:
    """The base's networks under the names that checkpoints use."""
    part = "transformer" if nets.base.transformer else "unet"
    networks = {part: nets.base.denoiser, "vae": nets.base.vae}
    if nets.base.text_encoder:
        networks["text_encoder"] = nets.base.text_encoder
    return nn.ModuleDict(networks)


def other_networks(nets: Networks) -> nn.ModuleList:
    """The frozen networks of the teacher and of --disc_base, if that is not the base."""
    networks = []
    for other in (nets.teacher, nets.disc_base):
        if other is not None and other is not nets.base:
            networks += [other.denoiser, other.text_encoder]
    return nn.ModuleList(networks)


def fingerprint_frozen(cfg: Config, nets: Networks) -> str:
    text = fingerprint(named_networks(nets), nets.trained)
    others = other_networks(nets)
    if len(others):
        text += fingerprint(others)
    if cfg.train == "all":  # with LoRA these share the base's weights
        for copied in (nets.frozen_denoiser, nets.feature_network):
            if copied is not None:
                text += fingerprint(copied)
    return text


def cast_all_frozen(nets: Networks, half: torch.dtype) -> None:
    networks = [named_networks(nets), other_networks(nets)]
    networks += [nets.frozen_denoiser, nets.feature_network]
    for network in networks:
        if network is not None:
            cast_frozen(network, half)


def set_checkpointing(nets: Networks, on: bool) -> None:
    networks = [nets.base.denoiser, getattr(nets.D, "unet", None), nets.feature_network]
    for network in networks:
        if network is not None:
            network.checkpointing = on


def build_optimizers(
    cfg: Config, run: training.Run, nets: Networks
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
    adam = partial(
        torch.optim.AdamW,
        eps=cfg.adam_epsilon,
        weight_decay=cfg.adam_weight_decay,
        fused=run.device.type == "cuda",
    )
    optimizer_d = None
    optimizer_g = adam(nets.trained.values(), betas=(cfg.adam_beta1, cfg.adam_beta2))
    if nets.D:
        optimizer_d = adam(nets.D.parameters(), betas=(cfg.disc_adam_beta1, cfg.adam_beta2))
    return optimizer_g, optimizer_d


# ----------------------------------------------------- from a micro-batch to x0 and contexts

@dataclass
class Encoder:
    """encode(micro_batch, noise) -> x0 [B, *shape], context of the denoiser, context of D.

    The denoiser's context is a list of what it takes after x and t: the encoded captions [B, N, C]
    and, for PixArt, their mask. `micro_batch` is on the noise's device: pictures and captions,
    captions alone, or a cache's latents and contexts. noise [B, *shape] samples the VAE's latent,
    or is what the teacher draws from. With `unconditional` every caption is empty, except the
    teacher's.
    """

    base: bases.Base
    disc_base: bases.Base
    teacher: bases.Base | None
    shape: tuple[int, ...]
    unconditional: bool
    autocast: torch.autocast

    def __post_init__(self):
        self.encode_captions = cached_encoder(self.base, self.autocast)
        self.encode_for_disc = cached_encoder(self.disc_base, self.autocast)

    def __call__(self, micro_batch: dict, noise: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        captions = micro_batch["caption"]
        if self.unconditional:
            captions = [""] * len(captions)
        context = [micro_batch[name] for name in ("context_0", "context_1") if name in micro_batch]
        if not context:
            context = self.encode_captions(captions)
        context = [c.to(noise) for c in context]
        disc_context = context[0]
        if self.disc_base is not self.base:
            disc_context = self.encode_for_disc(captions)[0].to(noise)
        with torch.no_grad(), self.autocast:
            return self.latents(micro_batch, noise), context, disc_context

    def latents(self, micro_batch: dict, noise: Tensor) -> Tensor:
        if "mean" in micro_batch:  # of a cache, scaled
            return micro_batch["mean"].to(noise) + micro_batch["std"].to(noise) * noise
        if self.teacher:
            return one_step(self.teacher, micro_batch["caption"], noise).to(noise)
        pictures = micro_batch["target"].to(noise)
        sides = tuple(side * self.base.vae.factor for side in self.shape[1:])
        if pictures.shape[2:] != sides:
            raise ValueError(
                f"'{micro_batch['name'][0]}' is not of the size of the first training picture,"
                " expected one size for all: choose --train_image_prep and --test_image_prep for it"
            )
        mean, logvar, _ = self.base.vae.encode(pictures)
        x0 = mean.to(noise) + (0.5 * logvar.to(noise)).exp() * noise
        return x0 * self.base.vae.config.scaling_factor


def one_step(base: bases.Base, captions: list[str], noise: Tensor) -> Tensor:
    """The latents [B, C, h, w] that a one-step base makes of noise."""
    schedule = base.schedule
    t = len(schedule.alpha) - 1
    x = diffusion.start(noise, t, schedule)
    prediction = base.denoiser(x, t, *base.encode(captions))
    return predict_x0(prediction, x, t, schedule, schedule.prediction_type)


def cached_encoder(
    base: bases.Base, autocast: torch.autocast
) -> Callable[[list[str]], list[Tensor]]:
    """base.encode with a memory of 2,000 captions."""

    @functools.lru_cache(maxsize=2000)
    def encode_one(caption: str) -> list[Tensor]:
        with torch.no_grad(), autocast:
            return [context[0].cpu() for context in base.encode([caption])]

    def encode(captions: list[str]) -> list[Tensor]:
        encoded = [encode_one(caption) for caption in captions]
        return [torch.stack(contexts) for contexts in zip(*encoded)]

    return encode


def estimate_prior(
    nets: Networks, run: training.Run, encode: Encoder, train_set: Dataset
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents, where sampling starts: the paper's informative prior
    initialization (IPI, section 4.2).

    With --prior_pictures 0 both are 0: sampling starts from noise alone.
    """
    cfg = run.cfg
    if not cfg.prior_pictures:
        zeros = torch.zeros(2, *nets.shape, dtype=torch.float64)
        return zeros[0], zeros[1]
    # A random choice: the first pictures of a sorted folder are alike.
    order = torch.randperm(len(train_set), generator=training.rng(cfg.seed, 0, "prior"))
    groups = order[:cfg.prior_pictures].split(cfg.train_batch_size)

    def latents():
        for group in tqdm(groups, "prior", disable=run.rank != 0):
            indices = group.tolist()
            micro_batch = run.to_device(collate([train_set[i] for i in indices]))
            noise = torch.zeros(len(indices), *nets.shape)  # the latents' means
            if nets.teacher:
                noise, _ = training.draw_noise(indices, nets.shape)
            x0, _, _ = encode(micro_batch, noise.to(run.device, run.dtype))
            yield from x0

    return diffusion.mean_and_std(latents())


# ---------------------------------------------------------------------------- parts of a step

def draw_timesteps(nets: Networks, run: training.Run, step: int) -> Tensor:
    """Timesteps [global batch]: --last_share of them are the last one, --high_share are among the
    --coop_steps before it, the rest are uniform. While G only learns to denoise, all are uniform.
    """
    cfg, last = run.cfg, nets.last_timestep
    n = (run.global_batch,)
    generator = training.rng(cfg.seed, step, "t")
    t = torch.randint(last + 1, n, generator=generator)
    if step < cfg.denoising_steps:
        return t
    chance = torch.rand(n, generator=generator)
    first_high = min(max(last + 1 - cfg.coop_steps, 0), last - 1)
    high = torch.randint(first_high, last, n, generator=generator)
    t = torch.where(chance < cfg.last_share + cfg.high_share, high, t)
    return t.masked_fill(chance < cfg.last_share, last)


def noise_again(
    nets: Networks, run: training.Run, step: int, rows: list[int]
) -> dict[str, Tensor | None]:
    """With --adversarial noisy, the noise for D's real and fake side."""
    if run.cfg.adversarial != "noisy":
        return {"real": None, "fake": None}
    sides = ("real", "fake")
    return {side: run.normal(step, f"again {side}", rows, nets.shape) for side in sides}


def losses_of_stage(
    cfg: Config,
    nets: Networks,
    step: int,
    x0: Tensor,
    context: list[Tensor],
    disc_context: Tensor,
    t: Tensor,
    eps: Tensor,
    noise: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The losses of one micro-batch: of an adaption stage, of denoising, or of YOSO."""
    if cfg.stage != "yoso":
        student, teacher = nets.base.denoiser, nets.frozen_denoiser
        old, new = nets.old_schedule, nets.schedule
        return adapt_losses(student, teacher, x0, context, t, eps, old, new)
    if step < cfg.denoising_steps:
        return denoising_losses(nets.G, x0, context, t, eps, nets.schedule, cfg)
    return yoso_losses(
        nets.G,
        nets.D,
        nets.features if nets.feature_network else None,
        x0,
        context,
        disc_context,
        t,
        eps,
        nets.schedule,
        cfg,
        noise,
    )


def discriminate(
    D: nn.Module,
    nets: Networks,
    cfg: Config,
    real: Tensor,
    fake: Tensor,
    t: Tensor,
    context: Tensor,
    noise: dict[str, Tensor | None],
) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
    """The discriminator's weighted losses on one micro-batch by name, and signals for the log.

    To AdamW the factor lambda_gan makes next to no difference here.
    """
    logits = partial(logits_of, D, t=t, schedule=nets.schedule, cfg=cfg)
    logits_real = logits(x=real, context=context, noise=noise["real"])
    logits_fake = logits(x=fake, context=context, noise=noise["fake"])
    terms = {"disc": cfg.lambda_gan * discriminator_loss(logits_real, logits_fake)}
    if cfg.lambda_mismatch:
        others, differs = other_captions(context)
        logits_wrong = logits(x=real, context=others, noise=noise["real"])
        weight = cfg.lambda_gan * cfg.lambda_mismatch
        terms["mismatch"] = weight * mismatch_loss(logits_wrong, differs)
    return terms, signals(logits_real, logits_fake)


def update_ema(ema: dict[str, Tensor], trained: dict[str, Tensor], decay: float) -> None:
    for name, average in ema.items():
        average.lerp_(trained[name].detach(), 1 - decay)


# Signals for the log.

def contrast(fake: Tensor, x0: Tensor) -> Tensor:
    """Standard deviation of all values of the samples, over the data's. Under 1: too smooth."""
    return fake.std() / x0.std().clamp(min=1e-6)


def signals(logits_real: Tensor, logits_fake: Tensor) -> dict[str, Tensor | float]:
    """D's accuracy, and the mean difference of its logits: 0 if it sees nothing."""
    gap = (logits_real - logits_fake).mean()
    return {"logit_gap": gap} | training.accuracy([logits_real], [logits_fake])


# ------------------------------------------------------------- validating, showing, writing

@torch.inference_mode()
def draw(
    nets: Networks, run: training.Run, encode: Encoder, items: list[dict], vae: nn.Module
) -> tuple[Tensor, Tensor]:
    """The items' pictures and one-step samples of their captions, each [N, 3, H, W].

    Item i is drawn from the noise of seed i, and `vae` decodes it. For captions alone the
    pictures are the teacher's.
    """
    scaling = vae.config.scaling_factor
    size = run.cfg.train_batch_size
    real, fake = [], []
    for first in range(0, len(items), size):
        micro_batch = run.to_device(collate(items[first:first + size]))
        n = len(micro_batch["caption"])
        noise, generators = training.draw_noise(range(first, first + n), nets.shape)
        prior_noise = torch.cat([torch.randn(1, *nets.shape, generator=g) for g in generators])
        noise = noise.to(run.device, run.dtype)
        prior_noise = prior_noise.to(run.device, run.dtype)
        x = diffusion.start_from_prior(
            noise, prior_noise, *nets.prior, nets.last_timestep, nets.schedule
        )
        t = torch.full((n,), nets.last_timestep)
        x0, context, _ = encode(micro_batch, noise)
        with run.autocast:
            made = vae.decode(nets.G(x, t, context) / scaling)
            pictures = micro_batch.get("target")
            if pictures is None:
                pictures = vae.decode(x0 / scaling)
        real.append(pictures.float().cpu())
        fake.append(made.float().cpu())
    return torch.cat(real), torch.cat(fake)


def validate(
    nets: Networks, run: training.Run, encode: Encoder, test_set: Dataset
) -> dict[str, float]:
    """variety: the standard deviation over samples, over that of pictures; under 1, the samples
    are too much alike. With --track_val_fid, FID."""
    count = min(run.cfg.validation_num_images, len(test_set))
    items = [test_set[i] for i in range(count)]
    real, fake = draw(nets, run, encode, items, nets.base.vae)
    values = {}
    if count > 1:  # one sample has no variety
        variety_of_pictures = real.std(0, correction=0).mean()
        variety_of_samples = fake.std(0, correction=0).mean()
        values["val_variety"] = (variety_of_samples / variety_of_pictures).item()
    if nets.inception:
        real, fake = real.clamp(-1, 1), fake.clamp(-1, 1)
        values["val_fid"] = evaluate.fid(nets.inception, real, fake, run.device)
    return values


def validate_and_keep_best(
    nets: Networks, run: training.Run, encode: Encoder, test_set: Dataset
) -> dict[str, float]:
    """Writes best.safetensors if this validation's FID is the best so far."""
    values = validate(nets, run, encode, test_set)
    if run.improves(values.get("val_fid", math.inf)):
        save_generator(nets, run, "best.safetensors")
    return values


def choose_preview(cfg: Config, test_set: Dataset) -> list[dict]:
    """Up to 16 test items, or one for each of --validation_prompts, up to 16, with its caption."""
    if not cfg.validation_prompts:
        return [test_set[i] for i in range(min(16, len(test_set)))]
    items = []
    for i, prompt in enumerate(cfg.validation_prompts.split("|")[:16]):
        items.append(test_set[i % len(test_set)] | {"caption": prompt})
    return items


def preview(
    nets: Networks, run: training.Run, encode: Encoder, items: list[dict], step: int
) -> dict[str, float]:
    """Writes a grid: picture, sample. Returns signals for the log.

    Pictures do not belong to --validation_prompts: then samples stand alone and say nothing.
    """
    real, fake = draw(nets, run, encode, items, nets.preview_vae or nets.base.vae)
    path = run.folder / "samples" / f"{step + 1:06d}.png"
    if run.cfg.validation_prompts and not nets.teacher:
        training.save_grid(path, [fake])
        return {}
    training.save_grid(path, [real, fake])
    return training.preview_signals(outputs=fake, inputs=real, targets=real)


def save_generator(nets: Networks, run: training.Run, name: str) -> None:
    rank = run.cfg.lora_rank if run.cfg.train == "lora" else None

    def write(path: Path) -> None:
        checkpoints.save_yoso(path, nets.base, run.cfg.base, nets.trained, nets.prior, rank)

    run.write(name, write)


def save_weights(nets: Networks, run: training.Run) -> None:
    """Writes what was trained, the prior, and a LoRA also in the formats of others."""
    save_generator(nets, run, "model.safetensors")
    if run.cfg.prior_pictures:
        run.write("prior.safetensors", lambda path: bases.save_prior(path, *nets.prior))
    if run.cfg.train == "lora":
        save_lora(nets, run, "lora.safetensors", kohya=False)
        save_lora(nets, run, "lora_kohya.safetensors", kohya=True)


def save_lora(nets: Networks, run: training.Run, name: str, kohya: bool) -> None:
    part = "transformer" if nets.base.transformer else "unet"
    tensors = write_lora(nets.base.denoiser, part, kohya)
    run.write(name, lambda path: save_tensors(path, tensors, {"format": "pt"}))


# ------------------------------------------------------------------------------------- main

def main() -> None:
    cfg = training.parse(Config, TABLES, ALIASES, __doc__)
    if cfg.plan:
        training.print_plan(cfg, __file__)
        return
    run = training.Run(cfg, "yoso")
    train_set, test_set = open_data(cfg)
    run.prepare(train_set, test_set)
    nets = build_networks(cfg, run, train_set)
    D, trained, ema = nets.D, nets.trained, nets.ema
    optimizer_g, optimizer_d = build_optimizers(cfg, run, nets)
    encode = Encoder(
        nets.base, nets.disc_base, nets.teacher, nets.shape, cfg.unconditional, run.autocast
    )

    run.open_folder()
    state = dict(
        trained=trained,
        ema=ema,
        optimizer=optimizer_g,
        scaler=run.scaler,
        discriminator=D,
        optimizer_d=optimizer_d,
    )
    if cfg.resume:
        (nets.prior,) = run.restore(nets.frozen_fingerprint, state, "prior")
    else:
        nets.prior = estimate_prior(nets, run, encode, train_set)

    def save(step: int) -> None:
        with training.swapped(trained, ema):
            save_weights(nets, run)
        run.save_state(step, nets.frozen_fingerprint, state, prior=nets.prior)

    preview_items = choose_preview(cfg, test_set)
    run.start(nets, state, "items", len(preview_items))
    train_batches = batches(
        train_set,
        run.global_batch,
        cfg.seed,
        run.first_step,
        run.last_step,
        rows=run.rows,
        num_workers=cfg.dataloader_num_workers,
    )
    for step in range(run.first_step, run.last_step):
        batch = run.next_batch(train_batches, save, step)
        run.set_learning_rate(step, optimizer_g)
        run.set_learning_rate(step, optimizer_d, scale=cfg.disc_lr_ratio)
        timesteps = draw_timesteps(nets, run, step)

        # The generator's turn. The discriminator only passes the gradient on.
        losses, pairs = {}, []
        training.set_trainable(D, False)
        for rows, micro_batch in run.split(batch):
            t = timesteps[rows]
            eps = run.normal(step, "noise", rows, nets.shape)
            latent_noise = run.normal(step, "latent", rows, nets.shape)
            x0, context, disc_context = encode(micro_batch, latent_noise)
            disc_noise = noise_again(nets, run, step, rows)
            with run.autocast:
                terms, fake, real = losses_of_stage(
                    cfg, nets, step, x0, context, disc_context, t, eps, disc_noise["fake"]
                )
            run.backward(sum(terms.values()))
            run.record(losses, terms | {"latent_contrast": contrast(fake, x0)})
            pairs.append((real, fake, t, disc_context, disc_noise))
        losses["grad_norm"] = run.update(optimizer_g, cfg.max_grad_norm)
        run.check_finite(losses, step, batch)
        # Warm-up of the EMA: a smaller decay at first.
        update_ema(ema, trained, decay=min(cfg.ema_decay, (1 + step) / (10 + step)))

        # The discriminator's turn: its real side against G(x_t).
        if D and step >= cfg.denoising_steps:
            training.set_trainable(D, True)
            for real, fake, t, disc_context, disc_noise in pairs:
                with run.autocast:
                    terms, values = discriminate(
                        D, nets, cfg, real, fake, t, disc_context, disc_noise
                    )
                run.backward(sum(terms.values()))
                run.record(losses, terms | values)
            losses["disc_grad_norm"] = run.update(optimizer_d)
            run.check_finite(losses, step, batch)
        run.scaler.update()

        # Log, validate, preview, save: with the EMA of the weights.
        stopping = run.stop_requested()
        losses = training.mean_over_ranks(losses)
        with training.saved_on_failure(save, step), training.swapped(trained, ema):
            if run.due("validation", step):
                losses |= validate_and_keep_best(nets, run, encode, test_set)
            if run.due("preview", step, also=step == 0):
                losses |= preview(nets, run, encode, preview_items, step)
        run.log(step, losses)
        if run.due("save", step, also=stopping):
            save(step)
        if stopping:
            raise run.stopped(step)

    if run.rank == 0 and cfg.train == "all":  # the base of the next stage
        with training.swapped(trained, ema):
            bases.save_folder(run.folder / "base", nets.base, rest=cfg.base)
    run.finish()


if __name__ == "__main__":
    training.run_script(main)
