"""Trains YOSO: a diffusion model becomes one that draws a picture in one step, by chasing its own better guesses.

    python train_yoso.py --base gaussians                 # points in the plane, CPU, two minutes
    python train_yoso.py                                  # drawn scenes, LoRA on tiny-sd, CPU
    python train_yoso.py --base pixels --train_data_dir cifar10.zip       # raw pictures, from scratch
    python train_yoso.py --base sd15 --train_data_dir DATA --mixed_precision bf16
    python train_yoso.py --base sd15 --train_data_dir captions.txt --teacher sd-turbo --mixed_precision bf16
    python train_yoso.py --base pixart512 --train all --stage adapt_v ...
    python train_yoso.py --base runs/NAME/base --train all --stage adapt_zsnr ...
    torchrun --nproc_per_node=4 train_yoso.py --base sd15 --train_data_dir DATA ...
    python train_yoso.py --resume runs/NAME

DATA: see data.py. The run's folder is that of train_pix2pix_turbo.py; `python sample.py "PROMPT" --checkpoint
runs/NAME` draws with it. A LoRA also goes to lora.safetensors (for diffusers) and lora_kohya.safetensors, the prior to
prior.safetensors. Where all was trained, the whole model at last goes to runs/NAME/base: the base of the next stage.

Paper: Luo et al. 2024, "You Only Sample Once: Taming One-Step Text-to-Image Synthesis by Self-Cooperative Diffusion
GANs". One generator G(x_t, t) predicts x0, x_t = alpha_t x0 + sigma_t eps, for every t:
    L = lambda_gan L_adv + lambda_kl L_KL + lambda_con L_con.
Unlike in the released script, the softplus is of each sample's logit, not of their mean; the generator steps first; and
what the discriminator takes for real is G too, c_skip and c_out included."""

import collections
import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import evaluate
import training
from dataset import cache, folders, loader
from files import bases, checkpoints, metrics
from files.bases import Base
from files.formats import write_lora
from files.tensors import cast_frozen, fingerprint, save_tensors
from models import diffusion
from models.diffusion import Schedule, add_noise, predict_x0
from models.discriminator import LatentDiscriminator, PixelDiscriminator, lower_half
from models.lora import add_lora
from models.vae import latent_size
from tiny import gaussians

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


@dataclass
class Config:
    # data
    train_data_dir: str = "drawn:scenes"  # a folder, .zip, .txt of captions or cache (see data.py), or drawn:scenes
    train_image_prep: str | None = None  # resized_(random)crop_N, resize_N, resize_M_randomcrop_NxN, no_resize; _hflip
    test_image_prep: str | None = None  # of test pictures, to the same size [the training's, crops central, no flips]
    resolution: int = 512  # N of the default preparation, resized_randomcrop_N
    center_crop: bool = False  # the default preparation is resized_crop_N
    random_flip: bool = False  # and mirrors every other picture
    caption_column: str = "text"  # of metadata.jsonl
    unconditional: bool = False  # leave the captions out
    teacher: str | None = None  # a one-step base that draws the pictures of captions alone: sd-turbo
    dataloader_num_workers: int = 0  # processes that prepare pictures
    # model
    base: str = "tiny-sd"  # a folder, a Hub id or a name: tiny-sd, tiny (random), gaussians, pixels, sd15, pixart512
    disc_base: str = "sd15"  # whose U-Net looks at latents where the base is PixArt
    disc_random: bool = False  # the discriminator begins at random weights, not at a U-Net's
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
    snr_floor: float = 0.0  # its smallest in the distance to the data
    coop_steps: int = 250  # how much earlier the better guess is
    con_steps: int = 25  # how much earlier the consistent one
    last_share: float = 0.0  # of the batch that begins where one step does, at the last noise level; the rest anywhere
    noise_offset: float = 0.0  # the weight of more noise, one value for a whole channel
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
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # autocast, frozen weights; bf16 is slow on a CPU without it
    dtype: Literal["float32", "float64"] = "float32"  # of what is trained (float64 for tests)
    # the run
    seed: int = 42  # of every draw
    device: str = "auto"  # auto, cpu, cuda, mps
    output_dir: str | None = None  # default runs/yoso-DATE
    resume: str | None = None  # a run's folder, to go on from its state.pt
    viz_freq: int = 100  # steps between sample grids
    eval_freq: int = 500  # steps between validations
    num_samples_eval: int = 100  # pictures of a validation
    validation_prompts: str | None = None  # captions of the sample grid, with | between, up to 16 and to the test items
    track_val_fid: bool = False  # FID at each validation; needs Inception's weights
    checkpointing_steps: int = 500  # steps between saves
    report_to: str = "none"  # none, tensorboard, wandb
    tracker_project_name: str = "train_yoso"  # W&B project


# Where the base is tiny and starts from nothing every weight trains, on small pictures, faster; where it has learned
# to draw, LoRA does.
TINY = dict(train="all", resolution=32, learning_rate=2e-4, disc_lr_ratio=0.5, lr_warmup_steps=200, adam_beta2=0.99,
            train_batch_size=16, max_train_steps=2000, prior_pictures=200, checkpointing_steps=200)
PRETRAINED = TINY | dict(train="lora", resolution=64, lora_rank=16, learning_rate=5e-4, disc_lr_ratio=1.0,
                         max_train_steps=300)
PIXELS = TINY | dict(train_data_dir="cifar10.zip", learning_rate=1e-4, disc_lr_ratio=2.0, adam_weight_decay=0.0,
                     lr_scheduler="constant_with_warmup", lr_warmup_steps=50, adam_beta1=0.5, train_batch_size=32,
                     max_train_steps=1500, prior_pictures=0, lambda_kl=1.0, consistency="mse", last_share=0.25,
                     viz_freq=200)
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


def kl_loss(fake: Tensor, x0: Tensor, t: Tensor, schedule: Schedule, gamma: float, floor: float = 0.0) -> Tensor:
    """L_KL = min(max(SNR_t, floor), gamma) |G(x_t) - x0|^2, SNR = alpha^2 / sigma^2. Pure noise has SNR 0 and weighs
    nothing; with floor 1 it weighs 1, as in a loss on v, whose weight is SNR + 1."""
    snr = (schedule.alpha[t] / schedule.sigma[t]) ** 2
    return (snr.clamp(floor, gamma).to(x0) * mean_square(fake, x0)).mean()


def consistency_loss(seen: Tensor, goal: Tensor, t: Tensor, s: Tensor, schedule: Schedule, gamma: float) -> Tensor:
    """L_con = w |f(G(x_t)) - f(G(x_s))|^2, s < t, same eps, no gradient to the right; f: features of a frozen U-Net
    (latent perceptual loss), or nothing; w = min(1 / (sigma_t / alpha_t - sigma_s / alpha_s), gamma)."""
    here, there = (schedule.sigma[u] / schedule.alpha[u] for u in (t, s))
    weight = (1 / (here - there)).clamp(max=gamma)  # at t = s = 0: gamma times 0
    distance = mean_square(seen, goal.detach())
    return (weight.to(distance) * distance).mean()


def adapt_loss(v: Tensor, told: Tensor, x: Tensor, x_new: Tensor, t: Tensor, old: Schedule, new: Schedule) -> Tensor:
    """|v_theta(x'_t) - v'|^2, v' = (alpha' x'_t - x0) / sigma', of the x0 that the frozen model sees in x_t: the same
    picture and eps on the old schedule and on the new. Stage I: the frozen model tells eps, and both schedules are the
    same. Stage II: it tells v, and the new one ends in pure noise, where v' is -x0."""
    x0 = predict_x0(told, x, t, old, old.prediction_type)
    alpha, sigma = new.at(t, x_new)
    return mean_square(v, (alpha * x_new - x0) / sigma).mean()


def learning_rate(step: int, config: Config, last: int) -> float:
    rise = 1.0 if config.lr_scheduler == "constant" else min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
    done = max(0.0, (step - config.lr_warmup_steps) / max(last - config.lr_warmup_steps, 1))
    fall = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}.get(config.lr_scheduler, 1.0)
    return config.learning_rate * rise * fall


def check_data(items: Dataset, where: str, base: Base, base_name: str, teacher: str | None, other_captions: str | bool
               ) -> None:
    """Refuses a data set that the base cannot train on, or not in this way."""
    pictures, facts = {"target", "mean"} & items[0].keys(), getattr(items, "facts", {})
    if not pictures and not teacher:
        raise ValueError(f"{where} holds captions alone; expected --teacher, a one-step base that draws their pictures"
                         " (sd-turbo), or pictures")
    if pictures and teacher:
        raise ValueError(f"{where} holds pictures; leave --teacher out")
    if facts and other_captions:
        raise ValueError(f"{where} holds captions that are encoded already; leave --validation_prompts and"
                         " --unconditional out")
    for part in ("vae", "text_encoder") if facts.get("dtype") == "float32" else ("vae",) if facts else ():
        network = getattr(base, part)  # the VAE is of float32 whatever the cache's type
        if network and facts[part] != fingerprint(network):
            raise ValueError(f"{where} is a cache of {facts['base']}, whose {part} is not that of {base_name} here;"
                             " make a cache of this base")


def latent_shape(base: Base, item: dict, resolution: int) -> tuple[int, ...]:
    """[C, h, w] of the latent of a data set's item, of captions of a picture of that resolution; of points [2]."""
    if "mean" in item:
        return item["mean"].shape
    sides = item["target"].shape[1:] if "target" in item else (resolution, resolution)
    return base.denoiser.config.in_channels, *latent_size(sides, base.vae.factor)


def one_step(base: Base, captions: list[str], noise: Tensor) -> Tensor:
    """The latents [B, C, h, w] that a one-step base makes of noise."""
    schedule, t = base.schedule, len(base.schedule.alpha) - 1
    x = diffusion.start(noise, t, schedule)
    return diffusion.predict_x0(base.denoiser(x, t, *base.encode(captions)), x, t, schedule, schedule.prediction_type)


def remembering(base: Base, autocast: torch.autocast) -> Callable[[list[str]], list[Tensor]]:
    """base.encode, which is asked once for a caption and keeps what it says of 2,000."""

    @functools.lru_cache(maxsize=2000)
    def encoded(caption: str) -> list[Tensor]:
        with torch.no_grad(), autocast:
            return [c[0].cpu() for c in base.encode([caption])]

    return lambda captions: [torch.stack(c) for c in zip(*map(encoded, captions))]


@dataclass
class Reader:
    """read(batch, rows, noise) -> x0 [B, *shape], the denoiser's contexts, and the critic's context; in the type and on
    the device of the noise [B, *shape], which places x0 in the encoder's spread, or is what a teacher begins from."""
    base: Base
    critic: Base  # whose U-Net looks at latents; the base itself where that has one
    teacher: Base | None  # the one-step base that draws the pictures of captions alone
    shape: tuple[int, ...]  # of every latent
    unconditional: bool  # to all but the teacher captions are empty
    autocast: torch.autocast

    def __post_init__(self):
        self.encode = remembering(self.base, self.autocast)
        self.encode_for_critic = remembering(self.critic, self.autocast)

    def __call__(self, batch: dict, rows: slice, noise: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        texts = batch["caption"][rows]
        captions = [""] * len(texts) if self.unconditional else texts
        cached = [batch[name][rows] for name in ("context_0", "context_1") if name in batch]
        contexts = [c.to(noise) for c in cached or self.encode(captions)]
        seen = contexts[0] if self.critic is self.base else self.encode_for_critic(captions)[0].to(noise)
        if "mean" in batch:
            return batch["mean"][rows].to(noise) + batch["std"][rows].to(noise) * noise, contexts, seen
        with torch.no_grad(), self.autocast:
            if self.teacher:
                return one_step(self.teacher, texts, noise).to(noise), contexts, seen
            pictures = batch["target"][rows].to(noise)
            if pictures.shape[2:] != tuple(side * self.base.vae.factor for side in self.shape[1:]):
                raise ValueError(f"'{batch['name'][rows][0]}' is not of the size of the first training picture,"
                                 " expected one size for all: choose --train_image_prep and --test_image_prep for it")
            mean, logvar, _ = self.base.vae.encode(pictures)
            x0 = mean.to(noise) + (0.5 * logvar.to(noise)).exp() * noise
            return x0 * self.base.vae.config.scaling_factor, contexts, seen


def open_data(cfg: Config, split: str, prep: str | None):
    if cfg.base == "gaussians":
        return gaussians.Points(split, cfg.seed)
    asked = cfg.train_image_prep or cfg.test_image_prep or cfg.center_crop or cfg.random_flip
    random = split == "train" and not cfg.center_crop
    prep = prep or f"resized_{'random' * random}crop_{cfg.resolution}{'_hflip' * cfg.random_flip}"
    items = folders.open_captioned(cfg.train_data_dir, split, prep, cfg.seed, cfg.resolution, cfg.caption_column)
    if asked and isinstance(items, cache.Cached):
        raise ValueError(f"{cfg.train_data_dir} is a cache, whose pictures were cropped when it was made; leave out"
                         " what is said of crops and flips (python data.py cache has --prep)")
    return items


def check(cfg: Config, schedule: Schedule) -> None:
    """Refuses a stage that is over, or not yet its turn, and what has nothing to learn from."""
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


def main() -> None:
    tables = {"tiny-": PRETRAINED, "tiny": TINY, "pixels": PIXELS, "gaussians": GAUSSIANS}
    cfg = training.parse(Config, tables, ALIASES, __doc__)
    rank, world, device = training.start_ranks(cfg.device)
    dtype, points = getattr(torch, cfg.dtype), cfg.base == "gaussians"
    half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.mixed_precision]
    autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)
    torch.manual_seed(cfg.seed)

    # ---- data: step s takes rows of a global batch, of which this process has its share, in slices
    train_set = open_data(cfg, "train", cfg.train_image_prep)
    test_set = open_data(cfg, "test", cfg.test_image_prep or cfg.train_image_prep)  # crops are central there
    global_batch, slices, last_step = training.plan(cfg, rank, world, len(train_set), cfg.num_train_epochs)

    # ---- networks: what is trained stays in float32, what is frozen may be stored in half
    seed = cfg.seed if cfg.train == "all" else 0  # a base without weights: what carries LoRA must be found again
    with training.first_alone(rank):
        base = gaussians.load_base(seed, dtype, device) if points else bases.load_base(
            cfg.base, bases.parts_of(cfg.base, isinstance(train_set, cache.Cached)), dtype, str(device), seed)
        critic, teacher, inception = base, None, None
        if cfg.stage == "yoso" and base.transformer:  # only a U-Net looks at latents
            critic = bases.load_base(cfg.disc_base, ("unet", "text_encoder", "tokenizer"), dtype, str(device))
        if cfg.teacher:
            teacher = bases.load_base(cfg.teacher, bases.parts_of(cfg.teacher), dtype, str(device))
        if cfg.track_val_fid:
            inception = training.needed(metrics.load_metric_network, "inception", str(device), without="no --track_val_fid"
                                        ).network
    if cfg.prediction_type:
        base.schedule = Schedule.from_config(base.schedule.config | {"prediction_type": cfg.prediction_type})
    check(cfg, base.schedule)
    check_data(train_set, cfg.train_data_dir, base, cfg.base, cfg.teacher, cfg.validation_prompts or cfg.unconditional)
    generator, shape = base.denoiser, latent_shape(base, train_set[0], cfg.resolution)
    old = base.schedule
    pretrained = judge = discriminator = None
    if cfg.stage != "yoso":  # what it was, and what it is to be
        pretrained = copy.deepcopy(generator, {id(p): p for p in generator.parameters() if cfg.train == "lora"})
        base.schedule = Schedule.from_config(old.config | {"prediction_type": "v_prediction"} | (
            {"rescale_betas_zero_snr": True} if cfg.stage == "adapt_zsnr" else {}))
    if cfg.stage == "yoso" and cfg.lambda_con and cfg.consistency == "perceptual":
        judge = lower_half(critic.unet, share=cfg.train == "lora" or critic is not base)
    if cfg.stage == "yoso" and cfg.lambda_gan:
        torch.manual_seed(cfg.seed)  # the first weights depend on nothing that came before
        discriminator = (gaussians.MLP(1) if points else LatentDiscriminator(critic.unet) if base.vae.factor > 1 else
                         PixelDiscriminator(shape[0], cfg.resolution, generator.config.cross_attention_dim))
        for layer in getattr(discriminator, "unet", nn.Module()).modules() if cfg.disc_random else ():
            getattr(layer, "reset_parameters", lambda: None)()
        discriminator.to(device, dtype).requires_grad_(True)
    schedule, T, scaling = base.schedule, len(base.schedule.alpha), base.vae.config.scaling_factor
    if cfg.train == "lora":
        add_lora(generator, TARGETS, cfg.lora_rank, 8.0, training.rng(cfg.seed, 0, "lora"))  # peft's default alpha
    for name, p in generator.named_parameters():
        p.requires_grad_(cfg.train == "all" or ".lora_" in name)
    part = "transformer" if base.transformer else "unet"
    parts = nn.ModuleDict({part: generator, "vae": base.vae} | (
        {"text_encoder": base.text_encoder} if base.text_encoder else {}))
    trained = {n: p for n, p in parts.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in trained.items() if cfg.use_ema}
    beside = nn.ModuleList([network for other in (teacher, critic) if other and other is not base
                            for network in (other.denoiser, other.text_encoder)])
    frozen = "".join(fingerprint(network, trained) for network in (parts, beside) if len(network))
    for network in filter(None, (parts, beside, pretrained, judge) if half else ()):
        cast_frozen(network, half)
    for network in filter(None, (generator, getattr(discriminator, "unet", None), judge)):
        network.checkpointing = cfg.gradient_checkpointing

    # ---- what the losses are made of
    read = Reader(base, critic, teacher, shape, cfg.unconditional, autocast)

    def draw(step: int, what: str, rows: list[int], shape: tuple[int, ...] = shape) -> Tensor:
        every = torch.randn(global_batch, *shape, generator=training.rng(cfg.seed, step, what))
        return every[rows].to(device, dtype)

    def G(x: Tensor, t: Tensor, context: list[Tensor]) -> Tensor:
        return generated(generator(x, t.to(device), *context), x, t, schedule)

    def judged(sample: Tensor, t: Tensor, seen: Tensor, step: int, what: str, rows: list[int]) -> Tensor:
        """The discriminator's logits, of the sample at its t; or noised again, to a lower level, as in UFOGen."""
        if cfg.adversarial == "noisy":
            t = earlier(t, cfg.coop_steps)
            sample = add_noise(sample, draw(step, f"again {what}", rows), t, schedule)
        return discriminator(sample, t.to(device), seen).to(dtype)  # autocast's are too coarse for a softplus

    # ---- optimizers
    adam = dict(eps=cfg.adam_epsilon, weight_decay=cfg.adam_weight_decay, fused=device.type == "cuda")
    optimizer, optimizer_d = torch.optim.AdamW(trained.values(), betas=(cfg.adam_beta1, cfg.adam_beta2), **adam), None
    if discriminator:
        optimizer_d = torch.optim.AdamW(discriminator.parameters(), betas=(0.0, cfg.adam_beta2), **adam)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.mixed_precision == "fp16")

    # ---- the run's folder, and where it stood
    folder = training.open_run(cfg, "yoso", rank)
    start, best, prior = 0, math.inf, torch.zeros(2, *shape, dtype=torch.float64).unbind()
    kept = dict(trained=trained, ema=ema, optimizer=optimizer, scaler=scaler, discriminator=discriminator,
                optimizer_d=optimizer_d)
    if cfg.resume:
        start, best, prior = training.restore(folder, frozen, kept, "step", "best", "prior", batch=global_batch)
    elif cfg.prior_pictures:  # mean and deviation of the latents: where one step begins (section 4.2)
        order = torch.randperm(len(train_set), generator=training.rng(cfg.seed, 0, "prior"))[:cfg.prior_pictures]
        prior = diffusion.mean_and_std(  # of a sorted folder the first are alike
            z for group in tqdm(order.split(cfg.train_batch_size), "prior", disable=rank != 0)
            for z in read(loader.collate([train_set[i] for i in group.tolist()]), slice(None),  # the means, without noise
                          bool(teacher) * training.draw_noise(group.tolist(), shape)[0].to(device, dtype))[0])

    def swap() -> None:
        """EMA and weights change places: what is shown, measured and written is the EMA."""
        for name, mean in ema.items():
            trained[name].data, ema[name] = mean, trained[name].data

    def save(step: int) -> None:
        """The state last: what a resumed run takes for done has been written."""
        swap()
        export("model.safetensors")
        training.write_file(folder / "prior.safetensors", lambda path: bases.save_prior(path, *prior))
        for name in ("lora.safetensors", "lora_kohya.safetensors") if cfg.train == "lora" else ():
            training.write_file(folder / name, lambda path, name=name: save_tensors(
                path, write_lora(generator, part, "kohya" in name), {"format": "pt"}))
        swap()
        training.save_state(folder / "state.pt", dict(
            step=step, best=best, base=frozen, batch=global_batch, prior=prior, **kept))

    def export(name: str) -> None:
        training.write_file(folder / name, lambda path: checkpoints.save_yoso(
            path, base, cfg.base, trained, prior, cfg.train == "lora" and cfg.lora_rank))

    @torch.inference_mode()
    def drawn(items: list[dict]) -> tuple[Tensor, Tensor]:
        """The items' own pictures (of captions alone, the teacher's) and one-step samples of their captions, item i
        from the noise of seed i: each [N, 3, H, W], or points."""
        made = []
        for i in range(0, len(items), cfg.train_batch_size):
            some = loader.collate(items[i:i + cfg.train_batch_size])
            n = len(some["caption"])
            noise, generators = training.draw_noise(range(i, i + n), shape)
            again = torch.cat([torch.randn(1, *shape, generator=g) for g in generators])
            noise, again = (z.to(device, dtype) for z in (noise, again))
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
            values["val_fid"] = evaluate.fid(inception, real.clamp(-1, 1), fakes.clamp(-1, 1), device)
        if points:
            values |= {f"val_{k}": v for k, v in gaussians.measure(fakes).items()}
        return values

    # ---- the loop
    shown = [test_set[i] for i in range(min(cfg.num_samples_eval if points else 16, len(test_set)))]
    if cfg.validation_prompts:
        shown = [item | {"caption": caption} for item, caption in zip(shown, cfg.validation_prompts.split("|"))]
    training.announce(rank, trained, f"{len(train_set)} items", device, folder)
    report = training.open_report(cfg, rank, folder, start, last_step, global_batch)
    stop = training.catch_stop()
    batches = loader.batches(train_set, global_batch, cfg.seed, start, last_step,
                           [row for rows in slices for row in rows], cfg.dataloader_num_workers)
    for step in range(start, last_step):
        batch, losses, pairs = next(batches), collections.defaultdict(float), []
        for one, ratio in ((optimizer, 1.0), (optimizer_d, cfg.disc_lr_ratio)):
            for group in one.param_groups if one else ():
                group["lr"] = ratio * learning_rate(step, cfg, last_step)
        rng = training.rng(cfg.seed, step, "t")
        times = torch.randint(T, (global_batch,), generator=rng)
        times[torch.rand(global_batch, generator=rng) < cfg.last_share] = T - 1

        # Generator: past the discriminator, to the data, in agreement with itself. The discriminator only passes the
        # gradient on. G runs with a gradient first: autocast would reuse the weights cast in a pass without.
        if discriminator:
            discriminator.requires_grad_(False)
        for i, rows in enumerate(slices):
            t, mine = times[rows], slice(i * len(rows), (i + 1) * len(rows))
            x0, context, seen = read(batch, mine, draw(step, "latent", rows))
            eps = draw(step, "noise", rows) + cfg.noise_offset * draw(
                step, "offset", rows, (shape[0], *[1] * (len(shape) - 1)))
            x, terms = add_noise(x0, eps, t, schedule), {}
            with autocast:
                if pretrained:
                    v, x_old = generator(x, t.to(device), *context), add_noise(x0, eps, t, old)
                    fake = predict_x0(v, x, t, schedule, "v_prediction")
                    with torch.no_grad():
                        told = pretrained(x_old, t.to(device), *context)
                    terms["adapt"] = adapt_loss(v, told, x_old, x, t, old, schedule)
                else:
                    fake = G(x, t, context)
                    k, s = earlier(t, cfg.coop_steps), earlier(t, cfg.con_steps)
                    with torch.no_grad():  # its better guesses, from less of the same noise
                        coop = discriminator and cfg.adversarial == "coop"
                        real = G(add_noise(x0, eps, k, schedule), k, context) if coop else x0
                        goal = G(add_noise(x0, eps, s, schedule), s, context) if cfg.lambda_con else x0
                    if discriminator:
                        terms["gan"] = cfg.lambda_gan * generator_gan_loss(judged(fake, t, seen, step, "fake", rows))
                        pairs.append((real, fake.detach(), t, seen))
                    if cfg.lambda_kl:
                        terms["kl"] = cfg.lambda_kl * kl_loss(fake, x0, t, schedule, cfg.snr_gamma, cfg.snr_floor)
                    if cfg.lambda_con:
                        sides = [judge.features(y, 0, seen) if judge else y for y in (fake, goal)]
                        terms["con"] = cfg.lambda_con * consistency_loss(*sides, t, s, schedule, cfg.snr_gamma)
            scaler.scale(sum(terms.values()) / len(slices)).backward()
            spread = fake.detach().std() / x0.std().clamp(min=1e-6)  # under 1: blobs, or too few kinds
            for name, value in (terms | {"spread": spread}).items():
                losses[name] += value.item() / len(slices)
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
                    logits_real = judged(real, t, seen, step, "real", rows)
                    logits_fake = judged(fake, t, seen, step, "fake", rows)
                    loss = cfg.lambda_gan * discriminator_loss(logits_real, logits_fake)
                scaler.scale(loss / len(slices)).backward()
                losses["disc"] += loss.item() / len(slices)  # lambda_gan times 2 ln 2 = 1.386 is chance
                losses["disc_right_on_real"] += training.share_right([logits_real], True) / len(slices)
                losses["disc_right_on_fake"] += training.share_right([logits_fake], False) / len(slices)
                losses["logit_gap"] += (logits_real - logits_fake).mean().item() / len(slices)  # 0: it sees nothing
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
                columns = drawn(shown)[bool(cfg.validation_prompts and not teacher):]  # no picture has these captions
                columns = [gaussians.scatter(c)[None] if points else c for c in columns]
                training.save_grid(folder / "samples" / f"{done:06d}.png", columns)
            swap()
            report(done, losses)
            if done % cfg.checkpointing_steps == 0 or done == last_step or stopping:
                save(done)
                training.plot_losses(folder / "log.jsonl", folder / "losses.png")
        if stopping:
            raise training.stopped(done, folder)
    if rank == 0:
        if cfg.train == "all" and not points:
            swap()
            bases.save_folder(folder / "base", base, rest=cfg.base)
        print(folder / "model.safetensors")


if __name__ == "__main__":
    training.run(main)
