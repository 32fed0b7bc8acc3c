"""Trains pix2pix-Turbo: a one-step text-to-image model learns image translation from pairs.

    python train_pix2pix_turbo.py                  # outlines to drawn scenes, tiny-turbo, CPU
    python train_pix2pix_turbo.py --base tiny      # the same from random weights, CPU
    python train_pix2pix_turbo.py --base sd-turbo --dataset_folder DATA --mixed_precision bf16
    torchrun --nproc_per_node=4 train_pix2pix_turbo.py --base sd-turbo --dataset_folder DATA ...
    python train_pix2pix_turbo.py --init runs/NAME --dataset_folder OTHER ...   # a new run
    python train_pix2pix_turbo.py --resume runs/NAME                            # the same one

DATA holds train_A, train_B, test_A, test_B (inputs and targets under the same file names),
and captions, if any, in train_prompts.json and test_prompts.json or in a .txt beside each
picture. Check it with `python -m dataset check DATA`.

The run's folder gets log.jsonl, losses.png, samples/STEP.png, state.pt (to resume),
model.safetensors, and best.safetensors: the weights of the best validation, by LPIPS or else
by L2. Sample with `python sample.py --checkpoint runs/NAME --input PICTURE "PROMPT"`.

VGG (0.5 GB; for LPIPS and the Gram loss) and CLIP (0.6 GB; for CLIP similarity and the vision-aided
discriminator) are downloaded once. --lambda_lpips 0, --lambda_clipsim 0 and --gan_disc_type patch
do without.

Paper: Parmar et al. 2024, "One-Step Image Translation with Text-to-Image Models", section 3.
Differences from the released script:
- generator and discriminator take one step each per iteration, on the sum of their losses, the
  generator's from one forward pass, as in the paper's formula. The released script takes two each:
  the generator for L2, LPIPS and CLIP, then, after a second forward pass, for the GAN loss; the
  discriminator for real pictures, then for G's;
- the two pictures of a pair get the same crop and flip: drawn apart, they would not match;
- CLIP similarity compares each picture with its own caption, not with all of the batch;
- training stops at max_train_steps, where the released script goes on to the end of its epochs.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import evaluate
import training
from dataset.check import captions_of, check_readable, report_cut
from dataset.folders import PairedFolder, check_preparation, open_paired
from dataset.loader import batches
from dataset.pictures import pad_to_multiple
from files import bases, checkpoints, metrics
from files.tensors import cast_frozen, fingerprint
from models.clip import CLIP, Tokenizer
from models.discriminator import (
    PatchDiscriminator,
    VisionAidedDiscriminator,
    draw_augmentation,
    spectral_step,
)
from models.lora import set_scale
from models.lpips import LPIPS
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig
from models.vae import latent_size

GanLoss = Literal["multilevel_sigmoid_s", "multilevel_sigmoid"]


@dataclass
class Config:
    # data
    dataset_folder: str = "drawn:scenes"  # a folder of pairs, or drawn:scenes
    train_image_prep: str | None = None  # how pictures are resized and cropped [resized_crop_N]
    test_image_prep: str | None = None  # the same for test pictures [resized_crop_N]
    resolution: int = 512  # N of the default preparation
    dataloader_num_workers: int = 0  # processes that load pictures
    # model
    base: str = "tiny-turbo"  # folder, Hub id, or tiny-turbo, tiny (random), sd-turbo, sd15, sd21
    train: Literal["lora", "all"] = "lora"  # LoRA, conv_in and skips; or every weight (small bases)
    lora_rank_unet: int = 8  # rank of the U-Net's LoRA
    lora_rank_vae: int = 4  # rank of the VAE's LoRA
    init: str | None = None  # checkpoint whose weights a new run starts from: file, run, name
    stochastic: bool = False  # outputs vary with a noise map, the more the lower r (section 3.4)
    timestep: int = 999  # the timestep that the U-Net is given, whatever the picture
    skips: bool = True  # skip connections from encoder to decoder
    conv_in: bool = True  # also train the U-Net's first convolution in full
    # losses
    lambda_l2: float = 1.0  # weight of the squared difference to the target
    lambda_lpips: float = 5.0  # weight of the perceptual distance to the target; 0 needs no VGG
    lambda_gram: float = 0.0  # weight of the distance to the target's textures; needs VGG
    lambda_clipsim: float = 5.0  # weight of CLIP's distance to the caption; 0 needs no CLIP
    lambda_gan: float = 0.5  # weight of the adversarial loss; 0 trains no discriminator
    gan_disc_type: Literal["vagan_clip", "patch"] = "vagan_clip"  # on CLIP features, or patches
    gan_loss_type: GanLoss = "multilevel_sigmoid_s"  # label of real pictures: 0.8 with _s, else 1
    gan_augment: bool = True  # augment what the discriminator sees: colour, shift, cutout
    disc_width: int = 64  # channels of the patch discriminator's first layer
    # optimisation
    learning_rate: float = 5e-6  # learning rate of generator and discriminator
    lr_scheduler: training.Scheduler = "constant"  # linear and cosine fall to 0
    lr_warmup_steps: int = 500  # linear warm-up; "constant" has none
    adam_beta1: float = 0.9  # AdamW's decay of the mean gradient
    adam_beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    adam_weight_decay: float = 1e-2  # weight decay
    adam_epsilon: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    train_batch_size: int = 2  # pictures per process and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per step
    max_train_steps: int = 10_000  # optimizer steps
    max_train_epochs: int | None = None  # end earlier, after this many passes over the data
    gradient_checkpointing: bool = False  # less memory for a third more time
    mixed_precision: training.Precision = "no"  # autocast, and the type of frozen weights
    dtype: Literal["float32", "float64"] = "float32"  # type of trained weights (float64 for tests)
    # the run
    seed: int = 42  # random seed
    device: str = "auto"  # auto, cpu, cuda, mps
    output_dir: str | None = None  # default runs/pix2pix_turbo-DATE
    resume: str | None = None  # folder of a run to resume
    viz_freq: int = 100  # steps between sample grids
    validation_steps: int = 100  # steps between validations
    validation_num_images: int = 100  # test pictures per validation
    track_val_fid: bool = False  # FID at each validation; needs Inception's weights
    checkpointing_steps: int = 500  # steps between saves
    plan: bool = False  # run three steps, write nothing: print memory, time, what flags would save
    plan_steps: int | None = None  # set by --plan: stop after this many steps, write no files
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # where else to log
    tracker_project_name: str = "train_pix2pix_turbo"  # W&B project


# Defaults for a tiny base with random weights: every weight trains, on small pictures.
TINY = dict(
    train="all",
    resolution=32,
    learning_rate=1e-3,
    lr_scheduler="cosine",
    lr_warmup_steps=200,
    adam_beta2=0.99,
    train_batch_size=16,
    max_train_steps=1500,
    lambda_lpips=0.0,
    lambda_clipsim=0.0,
    lambda_gan=0.0,
    gan_disc_type="patch",
    disc_width=16,
    checkpointing_steps=200,
)
# Defaults for a tiny base that has learned to draw: LoRA.
PRETRAINED = TINY | dict(
    train="lora",
    resolution=64,
    lr_warmup_steps=100,
    train_batch_size=8,
    max_train_steps=600,
    lora_rank_unet=4,
    lambda_gan=0.1,
    disc_width=32,
)
TABLES = {"tiny-turbo": PRETRAINED, "tiny-sd": PRETRAINED, "tiny": TINY}
ALIASES = dict(
    pretrained_model_name_or_path="base",
    resume_from_checkpoint="resume",
    num_training_epochs="max_train_epochs",
    eval_freq="validation_steps",
    num_samples_eval="validation_num_images",
)


# ----------------------------------------------------------------------------------- losses
# |a|^2 is the mean over all values of a tensor, not their sum.

def l2_loss(fake: Tensor, target: Tensor, r: float) -> Tensor:
    """L_2 = r |G(x) - y|^2. At r = 0 a stochastic model need not match the target."""
    return r * F.mse_loss(fake, target)


def lpips_loss(
    lpips: LPIPS, features: list[Tensor], target_features: list[Tensor], r: float
) -> Tensor:
    """L_LPIPS = r LPIPS(G(x), y), from VGG's features of both. (The paper's L_rec is
    L_2 + L_LPIPS.)"""
    return r * lpips.distance(features, target_features).mean()


# Weights of VGG's five stages in the Gram loss. Source: `loss.py` of Difix3D.
GRAM_WEIGHTS = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)


def gram_loss(features: list[Tensor], target_features: list[Tensor], r: float) -> Tensor:
    """L_gram = r sum_l w_l / (C h w) mean_ij (M_ij - M'_ij)^2: the same textures, in any place.

    M = F F^T [C, C] of VGG's features F [C, h w] of stage l; M' is the target's. As the sums run
    over all pixels, the loss grows with their number. Source: the third loss of Difix3D (Wu et al.
    2025). Differences: there M is of a whole batch and of a random crop, and the loss starts after
    2,000 steps.
    """
    losses = []
    for weight, f, f_target in zip(GRAM_WEIGHTS, features, target_features):
        error = (gram_matrix(f) - gram_matrix(f_target)).square().mean()
        losses.append(weight * error / f[0].numel())
    return r * torch.stack(losses).sum()


def gram_matrix(f: Tensor) -> Tensor:
    """Features [B, C, h, w] -> inner products of all pairs of channels over pixels, [B, C, C]."""
    f = f.flatten(2)
    with torch.autocast(f.device.type, enabled=False):  # sums over pixels overflow half precision
        return f @ f.transpose(1, 2)


def clip_loss(clip: CLIP, fake: Tensor, captions: Tensor) -> Tensor:
    """L_CLIP = 1 - cos(picture, caption), each picture with its own caption, embedded [B, 512]."""
    return (1 - clip.similarity(fake, captions)).mean()


def cross_entropy(logits: list[Tensor], label: float) -> Tensor:
    """Binary cross-entropy with one label for all. `logits` has one tensor for each level of the
    discriminator: mean over a level, sum over levels."""
    losses = []
    for level in logits:
        labels = torch.full_like(level, label)
        losses.append(F.binary_cross_entropy_with_logits(level, labels))
    return torch.stack(losses).sum()


def real_label(cfg: Config) -> float:
    """The label of real pictures: 1, or 0.8 with label smoothing. Fakes have 0."""
    return 0.8 if cfg.gan_loss_type == "multilevel_sigmoid_s" else 1.0


def generator_gan_loss(logits_fake: list[Tensor], cfg: Config) -> Tensor:
    """L_GAN = BCE(D(G(x)), label of real pictures): D should take G's pictures for real."""
    return cross_entropy(logits_fake, real_label(cfg))


def discriminator_loss(
    logits_real: list[Tensor], logits_fake: list[Tensor], cfg: Config
) -> Tensor:
    """L_D = BCE(D(y), label of real pictures) + BCE(D(G(x)), 0): D should tell real from fake."""
    return cross_entropy(logits_real, real_label(cfg)) + cross_entropy(logits_fake, 0.0)


def pix2pix_losses(
    G: Callable,
    D: Callable | None,
    x: Tensor,
    target: Tensor,
    context: Tensor,
    cfg: Config,
    *,
    r: float | None = None,
    noise: Tensor | None = None,
    latent_noise: Tensor | None = None,
    lpips: LPIPS | None = None,
    clip: CLIP | None = None,
    caption_embeddings: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The weighted losses of one micro-batch.

    L = lambda_l2 L_2 + lambda_lpips L_LPIPS + lambda_gram L_gram + lambda_clipsim L_CLIP
        + lambda_gan L_GAN.

    x [B, 3, H, W] in [0, 1], target [B, 3, H, W] in [-1, 1]. context [B, N, C]: the captions from
    the text encoder, N tokens each (77; of tiny-turbo 24); for CLIP, their embeddings [B, 512].
    D(picture) -> a list of logits. r, noise, latent_noise: see Pix2PixTurbo; for an r call
    lora.set_scale(G, r) first.
    Returns the weighted terms by name, and G's picture.
    """
    fake = G(x, context, r, noise, latent_noise=latent_noise)
    # Under autocast G's picture comes out in half precision, while targets are float32. It is cast
    # to their type, so that augmentation and losses round both sides alike.
    fake = fake.to(target.dtype)
    weight = 1.0 if r is None else r

    terms = {"l2": cfg.lambda_l2 * l2_loss(fake, target, weight)}
    if lpips is not None:
        features = lpips.vgg_features(fake)
        target_features = lpips.vgg_features(target)
        if cfg.lambda_lpips:
            lpips_term = lpips_loss(lpips, features, target_features, weight)
            terms["lpips"] = cfg.lambda_lpips * lpips_term
        if cfg.lambda_gram:
            terms["gram"] = cfg.lambda_gram * gram_loss(features, target_features, weight)
    if clip is not None:
        terms["clipsim"] = cfg.lambda_clipsim * clip_loss(clip, fake, caption_embeddings)
    if D is not None:
        terms["gan"] = cfg.lambda_gan * generator_gan_loss(D(fake), cfg)
    return terms, fake


def signals(fake: Tensor, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """For the log, of pictures in [-1, 1]. change: mean absolute difference of output and input, 0
    if G copies; drift: that of the mean colours of each output and its target."""
    return {
        "change": (fake - (2 * x - 1)).abs().mean(),
        "drift": (fake.mean((2, 3)) - target.mean((2, 3))).abs().mean(),
    }


# --------------------------------------------------------------------------------- building

@dataclass
class Networks:
    G: Pix2PixTurbo
    D: PatchDiscriminator | VisionAidedDiscriminator | None
    encode: Callable[[list[str]], Tensor]  # captions -> contexts [B, N, C]
    trained: dict[str, nn.Parameter]  # of G and, with --train all, of the text encoder
    frozen_fingerprint: str  # of all weights that are not trained
    lpips: LPIPS | None = None
    clip: CLIP | None = None
    clip_tokenizer: Tokenizer | None = None
    inception: nn.Module | None = None
    text_encoder: nn.Module | None = None  # with --train all, to be saved
    tokenizer: Tokenizer | None = None
    prompts: tuple[str, ...] = ()  # the caption, if all training pictures have the same


def open_data(cfg: Config) -> tuple[PairedFolder, PairedFolder]:
    """The training and the test set: folders, or drawings with the same interface."""
    n = cfg.resolution
    train_prep = cfg.train_image_prep or f"resized_crop_{n}"
    test_prep = cfg.test_image_prep or f"resized_crop_{n}"
    check_preparation(cfg.dataset_folder, cfg.train_image_prep, cfg.test_image_prep)
    train_set = open_paired(cfg.dataset_folder, "train", train_prep, cfg.seed, n)
    test_set = open_paired(cfg.dataset_folder, "test", test_prep, cfg.seed, n)
    check_readable(test_set, max(cfg.validation_num_images, 16))
    return train_set, test_set


def build_networks(
    cfg: Config, run: training.Run, train_set: PairedFolder, test_set: PairedFolder
) -> Networks:
    """The generator on its base, the discriminator, and the networks of the losses.

    Trained weights are in run.dtype, frozen ones may be stored in half precision.
    """
    training.check_losses(cfg)
    # LoRA checkpoints must rebuild the same random base, so its seed is fixed.
    seed = cfg.seed if cfg.train == "all" else 0
    with run.first_process_first():
        base = bases.load_base(cfg.base, device=str(run.device), dtype=run.dtype, seed=seed)
    report_cut(cfg.dataset_folder, captions_of(train_set), base.tokenizer)
    text_encoder = base.text_encoder.requires_grad_(cfg.train == "all")
    G = build_generator(cfg, run, base)

    trained = {name: p for name, p in G.named_parameters() if p.requires_grad}
    frozen_fingerprint = fingerprint(G, trained)
    if cfg.train == "all":
        for name, p in text_encoder.named_parameters():
            trained[f"text_encoder.{name}"] = p
    else:
        frozen_fingerprint += fingerprint(text_encoder)
    if run.half:
        cast_frozen(G, run.half)
    for network in (G.unet, G.vae.encoder, G.vae.decoder):
        network.checkpointing = cfg.gradient_checkpointing

    encode = partial(encode_captions, base.tokenizer, text_encoder)
    if cfg.train == "lora":
        captions = [*train_set.captions, *test_set.captions]
        encode = cache_contexts(encode, captions, run.device)
    nets = Networks(
        G=G,
        D=None,
        encode=encode,
        trained=trained,
        frozen_fingerprint=frozen_fingerprint,
    )
    if len(set(train_set.captions)) == 1:
        nets.prompts = (train_set.captions[0],)
    if cfg.train == "all":
        nets.text_encoder = text_encoder
        nets.tokenizer = base.tokenizer
    vision = load_metric_networks(nets, cfg, run)
    if cfg.lambda_gan:
        nets.D = build_discriminator(cfg, run, vision)
    return nets


def build_generator(cfg: Config, run: training.Run, base: bases.Base) -> Pix2PixTurbo:
    """The generator on its base, with random adapters or the weights of --init."""
    if cfg.train == "all" and not cfg.conv_in:
        raise ValueError("--conv_in off has no meaning with --train all; leave it out")
    config = Pix2PixTurboConfig(
        lora_rank_unet=cfg.lora_rank_unet,
        lora_rank_vae=cfg.lora_rank_vae,
        stochastic=cfg.stochastic,
        skips=cfg.skips,
        conv_in=cfg.conv_in,
        train=cfg.train,
        timestep=cfg.timestep,
        prediction_type=base.schedule.prediction_type,
    )
    lora_rng = training.rng(cfg.seed, 0, "lora")
    G = Pix2PixTurbo(base.vae, base.unet, base.schedule, config, lora_rng).train()
    # state.pt lacks conv_in's frozen half, which a stochastic --init may have changed. So a resumed
    # stochastic run reads its own model.safetensors as well.
    if cfg.init and (cfg.stochastic or not cfg.resume):
        checkpoint = cfg.resume or cfg.init
        with run.first_process_first():
            started = checkpoints.start_from(
                checkpoint, G, "pix2pix_turbo", cfg.base, base.text_encoder
            )
        if run.rank == 0 and not cfg.resume:
            print(started, file=sys.stderr)
    return G


def encode_captions(tokenizer: Tokenizer, text_encoder: nn.Module, captions: list[str]) -> Tensor:
    """Captions -> contexts [B, N, C]."""
    device = next(text_encoder.parameters()).device
    return text_encoder(tokenizer(captions).to(device))


def cache_contexts(encode: Callable, captions: list[str], device: torch.device) -> Callable:
    """Encodes each of up to 2,000 captions once, so that the frozen encoder can be freed.

    Returns the function that replaces `encode`; of more captions, `encode` itself.
    """
    captions = sorted(set(captions))
    if len(captions) > 2000:
        return encode
    with torch.no_grad():
        contexts = {caption: encode([caption])[0].cpu() for caption in captions}

    def cached(captions: list[str]) -> Tensor:
        return torch.stack([contexts[caption] for caption in captions]).to(device)

    return cached


def load_metric_networks(nets: Networks, cfg: Config, run: training.Run) -> nn.Module | None:
    """The frozen networks of the losses and of validation, downloaded where they are missing.

    Returns CLIP's image encoder if the discriminator needs it.
    """
    vision = None
    on_clip = cfg.lambda_gan and cfg.gan_disc_type == "vagan_clip"
    device = str(run.device)
    load = partial(training.load_or_explain, metrics.load_metric_network)
    with run.first_process_first():
        if cfg.lambda_lpips or cfg.lambda_gram:
            flags = "--lambda_lpips 0 --lambda_gram 0"
            nets.lpips = load("lpips", device, without=flags).network.to(run.dtype)
        if cfg.lambda_clipsim or on_clip:
            found = load("clip", device, without="--lambda_clipsim 0 --gan_disc_type patch")
            clip = found.network.to(run.dtype)
            if cfg.lambda_clipsim:
                nets.clip, nets.clip_tokenizer = clip, found.tokenizer
            if on_clip:
                vision = clip.image
        if cfg.track_val_fid:
            nets.inception = load("inception", device, without="leave --track_val_fid out").network
    return vision


def build_discriminator(cfg: Config, run: training.Run, vision: nn.Module | None) -> nn.Module:
    torch.manual_seed(cfg.seed)  # its first weights depend on nothing that came before
    if vision is not None:
        D = VisionAidedDiscriminator(vision)
    else:
        D = PatchDiscriminator(cfg.disc_width)
    return D.to(run.device, run.dtype)


def build_optimizers(
    cfg: Config, run: training.Run, nets: Networks
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
    adam = partial(
        torch.optim.AdamW,
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_epsilon,
        weight_decay=cfg.adam_weight_decay,
        fused=run.device.type == "cuda",
    )
    optimizer_g = adam(nets.trained.values())
    optimizer_d = adam(nets.D.parameters()) if nets.D else None
    return optimizer_g, optimizer_d


# ---------------------------------------------------------------------------- parts of a step

def draw_r(cfg: Config, step: int) -> float | None:
    """r of this step, uniform in [0, 1); None for a deterministic model."""
    if not cfg.stochastic:
        return None
    return torch.rand((), generator=training.rng(cfg.seed, step, "r")).item()


def augmented(
    D: nn.Module | None, run: training.Run, step: int, what: str, rows: list[int]
) -> Callable | None:
    """D with the augmentation of these rows of the global batch."""
    if D is None or not run.cfg.gan_augment:
        return D
    numbers = draw_augmentation(run.global_batch, training.rng(run.cfg.seed, step, what))
    return partial(D, draws={name: values[rows] for name, values in numbers.items()})


def discriminate(
    D: nn.Module, run: training.Run, step: int, rows: list[int], target: Tensor, fake: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The discriminator's weighted loss on real and fake pictures, and its accuracy."""
    logits_real = augmented(D, run, step, "augment real", rows)(target)
    logits_fake = augmented(D, run, step, "augment fake", rows)(fake)
    # Scaled as in the released script. To AdamW the factor makes next to no difference.
    loss = run.cfg.lambda_gan * discriminator_loss(logits_real, logits_fake, run.cfg)
    return loss, training.accuracy(logits_real, logits_fake)


def loss_inputs(
    nets: Networks, run: training.Run, step: int, rows: list[int], micro_batch: dict
) -> dict:
    """What pix2pix_losses takes for one micro-batch, apart from G, D and the settings."""
    height, width = latent_size(micro_batch["input"].shape[2:], nets.G.vae.factor)
    latent = (nets.G.vae.config.latent_channels, height, width)
    return dict(
        x=micro_batch["input"],
        target=micro_batch["target"],
        context=nets.encode(micro_batch["caption"]),
        noise=run.normal(step, "noise", rows, latent),
        latent_noise=run.normal(step, "latent", rows, latent),
        lpips=nets.lpips,
        clip=nets.clip,
        caption_embeddings=embed_captions(nets, micro_batch["caption"], run.device),
    )


# ------------------------------------------------------------- validating, showing, writing

@torch.inference_mode()
def translate(nets: Networks, run: training.Run, item: dict) -> Tensor:
    """A test item of any size -> output [3, H, W] in [-1, 1]; at r = 1, without noise."""
    set_scale(nets.G, 1.0)
    x = item["input"][None].to(run.device, run.dtype)
    x, (height, width) = pad_to_multiple(x, nets.G.vae.factor)
    with run.autocast:
        fake = nets.G(x, nets.encode([item["caption"]]))
    return fake[0, :, :height, :width].float().cpu()


@torch.inference_mode()
def validate(nets: Networks, run: training.Run, test_set: Dataset) -> dict[str, float]:
    """L2, PSNR and, where their networks are loaded, LPIPS, CLIP similarity and FID."""
    count = min(run.cfg.validation_num_images, len(test_set))
    items = [test_set[i] for i in range(count)]
    fakes = [translate(nets, run, item) for item in items]
    targets = [item["target"] for item in items]
    pairs = list(zip(fakes, targets))
    errors = torch.stack([(fake - target).square().mean() for fake, target in pairs])
    psnr = 10 * torch.log10(4 / errors)
    values = {"val_l2": errors.mean().item(), "val_psnr": psnr.mean().item()}

    def on_device(picture: Tensor) -> Tensor:  # [3, H, W] -> [1, 3, H, W]
        return picture[None].to(run.device, run.dtype)

    if nets.lpips:
        found = [nets.lpips(on_device(fake), on_device(target)) for fake, target in pairs]
        values["val_lpips"] = torch.cat(found).mean().item()
    if nets.clip:
        captions = embed_captions(nets, [item["caption"] for item in items], run.device)
        found = []
        for i, fake in enumerate(fakes):
            found.append(nets.clip.similarity(on_device(fake), captions[i:i + 1]))
        values["val_clipsim"] = torch.cat(found).mean().item()
    if nets.inception:
        values["val_fid"] = evaluate.fid(nets.inception, targets, fakes, run.device)
    return values


@torch.no_grad()
def embed_captions(nets: Networks, captions: list[str], device: torch.device) -> Tensor | None:
    """Captions -> CLIP's embeddings [B, 512]; None without CLIP similarity."""
    if nets.clip is None:
        return None
    return nets.clip.embed_captions(nets.clip_tokenizer(captions).to(device))


def choose_preview(test_set: Dataset) -> list[dict]:
    """Up to 16 test items. A grid has pictures of one size."""
    items = [test_set[i] for i in range(min(16, len(test_set)))]
    size = items[0]["target"].shape
    return [item for item in items if item["target"].shape == size]


def preview(
    nets: Networks, run: training.Run, items: list[dict], step: int
) -> dict[str, float]:
    """Writes a grid: input, output, target. Returns signals for the log."""
    inputs = torch.stack([2 * item["input"] - 1 for item in items])
    outputs = torch.stack([translate(nets, run, item) for item in items])
    targets = torch.stack([item["target"] for item in items])
    path = run.folder / "samples" / f"{step + 1:06d}.png"
    training.save_grid(path, [inputs, outputs, targets])
    return training.preview_signals(outputs, inputs, targets)


def validate_and_keep_best(
    nets: Networks, run: training.Run, test_set: Dataset
) -> dict[str, float]:
    """Writes best.safetensors if this validation is the best so far, by LPIPS or else by L2."""
    values = validate(nets, run, test_set)
    if run.improves(values.get("val_lpips", values["val_l2"])):
        save_weights(nets, run, "best.safetensors")
    return values


def save_weights(nets: Networks, run: training.Run, name: str) -> None:
    """Writes what was trained, and the prompt that sampling uses by default."""

    def write(path: Path) -> None:
        checkpoints.save_generator(
            path,
            nets.G,
            "pix2pix_turbo",
            run.cfg.base,
            nets.prompts,
            nets.text_encoder,
            nets.tokenizer,
        )

    run.write(name, write)


# ------------------------------------------------------------------------------------- main

def main() -> None:
    cfg = training.parse(Config, TABLES, ALIASES, __doc__)
    if cfg.plan:
        training.print_plan(cfg, __file__)
        return
    run = training.Run(cfg, "pix2pix_turbo")
    train_set, test_set = open_data(cfg)
    run.prepare(train_set, test_set)
    nets = build_networks(cfg, run, train_set, test_set)
    G, D = nets.G, nets.D
    optimizer_g, optimizer_d = build_optimizers(cfg, run, nets)

    run.open_folder()
    state = dict(
        trained=nets.trained,
        optimizer=optimizer_g,
        scaler=run.scaler,
        discriminator=D,
        optimizer_d=optimizer_d,
    )
    if cfg.resume:
        run.restore(nets.frozen_fingerprint, state)

    def save(step: int) -> None:
        save_weights(nets, run, "model.safetensors")
        run.save_state(step, nets.frozen_fingerprint, state)

    preview_items = choose_preview(test_set)
    run.start(nets, state, "pairs", len(preview_items))
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
        run.set_learning_rate(step, optimizer_g, optimizer_d)
        r = draw_r(cfg, step)
        set_scale(G, 1.0 if r is None else r)  # of all adapters, until the step is over

        # The generator's turn. The discriminator only passes the gradient on.
        losses, fakes = {}, []
        training.set_trainable(D, False)
        for rows, micro_batch in run.split(batch):
            with run.autocast:
                D_augmented = augmented(D, run, step, "augment", rows)
                inputs = loss_inputs(nets, run, step, rows, micro_batch)
                terms, fake = pix2pix_losses(G, D_augmented, **inputs, cfg=cfg, r=r)
            run.backward(sum(terms.values()))
            fake = fake.detach()
            run.record(losses, terms | signals(fake, inputs["x"], inputs["target"]))
            fakes.append(fake)
        losses["grad_norm"] = run.update(optimizer_g, cfg.max_grad_norm)
        run.check_finite(losses, step, batch)

        # The discriminator's turn: targets against the pictures just made.
        if D:
            training.set_trainable(D, True)
            spectral_step(D)
            for (rows, micro_batch), fake in zip(run.split(batch), fakes):
                with run.autocast:
                    loss, accuracy = discriminate(D, run, step, rows, micro_batch["target"], fake)
                run.backward(loss)
                run.record(losses, {"disc": loss} | accuracy)
            losses["disc_grad_norm"] = run.update(optimizer_d, cfg.max_grad_norm)
            run.check_finite(losses, step, batch)
        run.scaler.update()

        # Log, validate, preview, save.
        stopping = run.stop_requested()
        losses = training.mean_over_ranks(losses)
        with training.saved_on_failure(save, step):
            if run.due("validation", step):
                losses |= validate_and_keep_best(nets, run, test_set)
            if run.due("preview", step, also=step == 0):
                losses |= preview(nets, run, preview_items, step)
        run.log(step, losses)
        if run.due("save", step, also=stopping):
            save(step)
        if stopping:
            raise run.stopped(step)
    run.finish()


if __name__ == "__main__":
    training.run_script(main)
