"""Trains CycleGAN-Turbo: a one-step text-to-image model learns to translate between two domains.

    python train_cyclegan_turbo.py                  # drawn days and nights, tiny-turbo, CPU
    python train_cyclegan_turbo.py --base tiny      # the same from random weights, CPU
    python train_cyclegan_turbo.py --base sd-turbo --dataset_folder DATA --mixed_precision bf16
    torchrun --nproc_per_node=4 train_cyclegan_turbo.py --base sd-turbo --dataset_folder DATA ...
    python train_cyclegan_turbo.py --init runs/NAME --dataset_folder OTHER ...  # a new run
    python train_cyclegan_turbo.py --resume runs/NAME                           # the same one

DATA holds train_A, train_B, test_A, test_B (two unpaired sets of pictures, any file names),
fixed_prompt_a.txt and fixed_prompt_b.txt (one caption each). Check it with
`python -m dataset check DATA`.

The run's folder gets the same files as that of train_pix2pix_turbo.py. best.safetensors holds the
weights of the best validation: by PSNR where the true translation is known, else by FID
(--track_val_fid). Sample with `python sample.py --checkpoint runs/NAME --input PICTURE`.

VGG (0.5 GB; for LPIPS) and CLIP (0.6 GB; for the vision-aided discriminators) are downloaded once.
--lambda_cycle_lpips 0, --lambda_idt_lpips 0 and --gan_disc_type patch do without.

Paper: Parmar et al. 2024, "One-Step Image Translation with Text-to-Image Models", section 3.3:
    L = lambda_cycle L_cycle + lambda_gan L_GAN + lambda_idt L_idt, over both directions,
where L_cycle and L_idt each have an LPIPS beside them, with a weight of its own.
Differences from the released script:
- generator and discriminators take one step each per iteration, on the sum of their losses, as in
  the paper; the released script takes three (cycle, GAN, identity, each with forward passes of its
  own) and two (fake, real). To save memory, the losses are backpropagated one after the other, and
  fake_b = G_ab(a) is computed once: the gradients of cycle and GAN loss add up at fake_b, and go
  through G once;
- both directions share one frozen VAE and have adapters of their own, to save memory;
- the checkpoint holds conv_in, which was trained too and which the released script leaves out.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
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
from dataset.check import check_readable, report_cut
from dataset.folders import UnpairedFolder, check_preparation, open_unpaired
from dataset.loader import batches
from dataset.pictures import pad_to_multiple
from files import bases, checkpoints, metrics
from files.tensors import cast_frozen, fingerprint
from models.clip import Tokenizer
from models.cyclegan_turbo import DIRECTIONS, CycleGANTurbo, CycleGANTurboConfig
from models.dino import structure_distance
from models.discriminator import (
    PatchDiscriminator,
    VisionAidedDiscriminator,
    draw_augmentation,
    spectral_step,
)
from models.vae import latent_size

GanLoss = Literal["multilevel_sigmoid", "multilevel_sigmoid_s"]


@dataclass
class Config:
    # data
    dataset_folder: str = "drawn:day2night"  # two domains, or drawn:day2night, drawn:clear2rain
    train_image_prep: str | None = None  # resize and crop [to N * 286/256 square, random N, flip]
    test_image_prep: str | None = None  # the same for test pictures [resize_N]
    resolution: int = 256  # N of the default preparations
    dataloader_num_workers: int = 0  # processes that load pictures
    # model
    base: str = "tiny-turbo"  # folder, Hub id, or tiny-turbo, tiny (random), sd-turbo, sd15, sd21
    train: Literal["lora", "all"] = "lora"  # LoRA, conv_in and skips; or every weight (small bases)
    lora_rank_unet: int = 128  # rank of the U-Net's LoRA
    lora_rank_vae: int = 4  # rank of the VAEs' LoRA
    init: str | None = None  # checkpoint whose weights a new run starts from: file, run, name
    timestep: int = 999  # the timestep that the U-Net is given, whatever the picture
    skips: bool = True  # skip connections from encoder to decoder
    conv_in: bool = True  # also train the U-Net's first convolution in full
    # losses
    lambda_cycle: float = 1.0  # weight of the cycle loss |G_ba(G_ab(a)) - a|
    lambda_idt: float = 1.0  # weight of the identity loss |G_ba(a) - a|
    lambda_cycle_lpips: float = 10.0  # weight of the cycle's perceptual distance; 0 needs no VGG
    lambda_idt_lpips: float = 1.0  # weight of the identity's perceptual distance; 0 needs no VGG
    lambda_gan: float = 0.5  # weight of the adversarial loss; 0 trains no discriminators
    gan_disc_type: Literal["vagan_clip", "patch"] = "vagan_clip"  # on CLIP features, or patches
    gan_loss_type: GanLoss = "multilevel_sigmoid"  # label of real pictures: 0.8 with _s, else 1
    gan_augment: bool = True  # augment what the discriminators see: colour, shift, cutout
    disc_width: int = 64  # channels of the patch discriminators' first layer
    # optimisation
    learning_rate: float = 1e-5  # learning rate of generator and discriminators
    lr_scheduler: training.Scheduler = "constant"  # linear and cosine fall to 0
    lr_warmup_steps: int = 500  # linear warm-up; "constant" has none
    adam_beta1: float = 0.9  # AdamW's decay of the mean gradient
    adam_beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    adam_weight_decay: float = 1e-2  # weight decay
    adam_epsilon: float = 1e-8  # AdamW's epsilon
    max_grad_norm: float = 10.0  # gradients are clipped to this norm
    train_batch_size: int = 1  # pictures per domain, process and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per step
    max_train_steps: int = 25_000  # optimizer steps
    max_train_epochs: int | None = None  # end after this many passes over the larger domain
    gradient_checkpointing: bool = False  # less memory for a third more time
    mixed_precision: training.Precision = "no"  # autocast, and the type of frozen weights
    dtype: Literal["float32", "float64"] = "float32"  # type of trained weights (float64 for tests)
    # the run
    seed: int = 42  # random seed
    device: str = "auto"  # auto, cpu, cuda, mps
    output_dir: str | None = None  # default runs/cyclegan_turbo-DATE
    resume: str | None = None  # folder of a run to resume
    viz_freq: int = 100  # steps between sample grids
    validation_steps: int = 500  # steps between validations
    validation_num_images: int = 50  # test pictures per validation
    track_val_fid: bool = False  # FID and DINO structure at validation (downloads both)
    checkpointing_steps: int = 500  # steps between saves
    plan: bool = False  # run three steps, write nothing: print memory, time, what flags would save
    plan_steps: int | None = None  # set by --plan: stop after this many steps, write no files
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # where else to log
    tracker_project_name: str = "train_cyclegan_turbo"  # W&B project


# Defaults for a tiny base with random weights: every weight trains, on small pictures.
TINY = dict(
    train="all",
    resolution=64,
    learning_rate=1e-3,
    lr_scheduler="cosine",
    lr_warmup_steps=200,
    adam_beta1=0.5,
    adam_beta2=0.99,
    train_batch_size=1,
    max_train_steps=1200,
    lambda_cycle=10.0,
    lambda_idt=5.0,
    lambda_gan=1.0,
    lambda_cycle_lpips=0.0,
    lambda_idt_lpips=0.0,
    gan_disc_type="patch",
    gan_augment=False,
    disc_width=16,
    validation_steps=100,
    validation_num_images=16,
    checkpointing_steps=100,
)
# Defaults for a tiny base that has learned to draw: LoRA.
PRETRAINED = TINY | dict(
    train="lora",
    lora_rank_unet=4,
    learning_rate=5e-4,
    lr_warmup_steps=100,
    train_batch_size=4,
    max_train_steps=350,
    disc_width=32,
)
TABLES = {"tiny-turbo": PRETRAINED, "tiny-sd": PRETRAINED, "tiny": TINY}
ALIASES = dict(
    pretrained_model_name_or_path="base",
    resume_from_checkpoint="resume",
    num_training_epochs="max_train_epochs",
    eval_freq="validation_steps",
    num_samples_eval="validation_num_images",
    train_img_prep="train_image_prep",
    val_img_prep="test_image_prep",
)


# ----------------------------------------------------------------------------------- losses
# |a| is the mean over all values of a tensor, not their sum.

def cycle_loss(returned: Tensor, x: Tensor) -> Tensor:
    """L_cycle = |G_ba(G_ab(a)) - a|: there and back again, the picture is unchanged."""
    return F.l1_loss(returned, x)


def identity_loss(same: Tensor, x: Tensor) -> Tensor:
    """L_idt = |G_ba(a) - a|: a picture that is already in G's target domain is unchanged."""
    return F.l1_loss(same, x)


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
    """L_D = (BCE(D(y), label of real pictures) + BCE(D(G(x)), 0)) / 2; halved, as in CycleGAN."""
    loss = cross_entropy(logits_real, real_label(cfg)) + cross_entropy(logits_fake, 0.0)
    return 0.5 * loss


def cyclegan_losses(
    translate: Callable,
    D: Callable | None,
    x: Tensor,
    fake: Tensor,
    direction: str,
    noises: dict[str, Tensor],
    cfg: Config,
    lpips: nn.Module | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The weighted losses of one direction and one micro-batch, one after the other. From a to b:

    L = lambda_cycle |G_ba(fake) - a| + lambda_cycle_lpips LPIPS(G_ba(fake), a)
        + lambda_gan L_GAN(D_b(fake))
        + lambda_idt |G_ba(a) - a| + lambda_idt_lpips LPIPS(G_ba(a), a),    fake = G_ab(a).

    x [B, 3, H, W] in [-1, 1] is from the source domain (a in the formula), and fake is its
    translation, translate(x, direction, noise), made by the caller. D(picture) -> a list of logits
    is the discriminator of the target domain (b). `noises` sample the latents of x's way back,
    G_ba(fake), under "returned", and of the identity, G_ba(a), under "same". `autocast` is entered
    for the losses alone: `translate` enters it itself.

    Each loss must be backpropagated before the next is asked for:
        for name, loss in cyclegan_losses(...):
            loss.backward()
    so that memory holds the graph of `fake` and one other. Cycle and GAN loss leave their
    gradients at `fake`; before the identity loss, this function passes them on to G.
    """
    autocast = autocast or contextlib.nullcontext()
    back = opposite(direction)
    leaf = fake.detach().requires_grad_(True)  # collects the gradients of cycle and GAN loss

    returned = translate(leaf, back, noises["returned"])
    with autocast:
        loss = cfg.lambda_cycle * cycle_loss(returned, x)
        if lpips is not None and cfg.lambda_cycle_lpips:
            loss = loss + cfg.lambda_cycle_lpips * lpips(returned, x).mean()
    yield "cycle", loss

    if D is not None:
        with autocast:
            loss = cfg.lambda_gan * generator_gan_loss(D(leaf), cfg)
        yield "gan", loss

    if leaf.grad is None:
        raise ValueError("cyclegan_losses: call backward on each loss before asking for the next")
    fake.backward(leaf.grad)  # both gradients, once through the first translation

    same = translate(x, back, noises["same"])  # x is in the domain that `back` leads to
    with autocast:
        loss = cfg.lambda_idt * identity_loss(same, x)
        if lpips is not None and cfg.lambda_idt_lpips:
            loss = loss + cfg.lambda_idt_lpips * lpips(same, x).mean()
    yield "idt", loss


def opposite(direction: str) -> str:
    return {"a2b": "b2a", "b2a": "a2b"}[direction]


# Signals for the log.

def change(fake: Tensor, x: Tensor) -> Tensor:
    """Mean absolute difference of pictures in [-1, 1]: 0 if G only copies its input, 2 at most."""
    return (fake - x).abs().mean()


def drift(fake: Tensor, real: Tensor) -> Tensor:
    """Mean absolute difference of the channels' means over a micro-batch, for [-1, 1]."""
    return (fake.mean((0, 2, 3)) - real.mean((0, 2, 3))).abs().mean()


# --------------------------------------------------------------------------------- building

@dataclass
class Networks:
    G: CycleGANTurbo
    D: nn.ModuleDict | None  # a discriminator for each domain, "a" and "b"
    context: Callable[[str], Tensor]  # direction -> context [1, N, C] of its target's caption
    trained: dict[str, nn.Parameter]  # of G and, with --train all, of the text encoder
    frozen_fingerprint: str  # of all weights that are not trained
    prompts: tuple[str, str]  # the captions of a and b
    lpips: nn.Module | None = None
    inception: nn.Module | None = None
    dino: nn.Module | None = None
    text_encoder: nn.Module | None = None  # with --train all, to be saved
    tokenizer: Tokenizer | None = None


def open_data(cfg: Config) -> tuple[UnpairedFolder, UnpairedFolder]:
    """The training and the test set. Training pictures are stretched to a square of 286 / 256 of
    the resolution, cropped at random and mirrored; test pictures are stretched to the resolution.
    """
    n = cfg.resolution
    train_prep = cfg.train_image_prep or f"resize_{n * 286 // 256}_randomcrop_{n}x{n}_hflip"
    test_prep = cfg.test_image_prep or f"resize_{n}"
    check_preparation(cfg.dataset_folder, cfg.train_image_prep, cfg.test_image_prep)
    train_set = open_unpaired(cfg.dataset_folder, "train", train_prep, cfg.seed, n)
    test_set = open_unpaired(cfg.dataset_folder, "test", test_prep, cfg.seed, n)
    check_readable(test_set, max(cfg.validation_num_images, 16))
    return train_set, test_set


def build_networks(cfg: Config, run: training.Run, prompts: tuple[str, str]) -> Networks:
    """The generator on its base, the discriminators, and the networks of the losses.

    Trained weights are in run.dtype, frozen ones may be stored in half precision.
    """
    training.check_losses(cfg)
    # LoRA checkpoints must rebuild the same random base, so its seed is fixed.
    seed = cfg.seed if cfg.train == "all" else 0
    with run.first_process_first():
        base = bases.load_base(cfg.base, device=str(run.device), dtype=run.dtype, seed=seed)
    report_cut(cfg.dataset_folder, prompts, base.tokenizer)
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
    vaes = [part for vae in (G.vae_a2b, G.vae_b2a) for part in (vae.encoder, vae.decoder)]
    for network in (G.unet, *vaes):
        network.checkpointing = cfg.gradient_checkpointing

    encode = partial(encode_target, base.tokenizer, text_encoder, prompts)
    if cfg.train == "lora":  # the frozen encoder is used once, then freed
        with torch.no_grad():
            contexts = {direction: encode(direction) for direction in DIRECTIONS}
        encode = contexts.__getitem__
    nets = Networks(
        G=G,
        D=None,
        context=encode,
        trained=trained,
        frozen_fingerprint=frozen_fingerprint,
        prompts=prompts,
    )
    if cfg.train == "all":
        nets.text_encoder = text_encoder
        nets.tokenizer = base.tokenizer
    vision = load_metric_networks(nets, cfg, run)
    if cfg.lambda_gan:
        nets.D = build_discriminators(cfg, run, vision)
    return nets


def build_generator(cfg: Config, run: training.Run, base: bases.Base) -> CycleGANTurbo:
    """The generator on its base, with random adapters or the weights of --init."""
    if cfg.train == "all" and not cfg.conv_in:
        raise ValueError("--conv_in off has no meaning with --train all; leave it out")
    config = CycleGANTurboConfig(
        lora_rank_unet=cfg.lora_rank_unet,
        lora_rank_vae=cfg.lora_rank_vae,
        skips=cfg.skips,
        conv_in=cfg.conv_in,
        train=cfg.train,
        timestep=cfg.timestep,
        prediction_type=base.schedule.prediction_type,
    )
    lora_rng = training.rng(cfg.seed, 0, "lora")
    G = CycleGANTurbo(base.vae, base.unet, base.schedule, config, lora_rng).train()
    if cfg.init and not cfg.resume:
        with run.first_process_first():
            started = checkpoints.start_from(
                cfg.init, G, "cyclegan_turbo", cfg.base, base.text_encoder
            )
        if run.rank == 0:
            print(started, file=sys.stderr)
    return G


def encode_target(
    tokenizer: Tokenizer, text_encoder: nn.Module, prompts: tuple[str, str], direction: str
) -> Tensor:
    """The context [1, N, C] of the caption of the domain that a direction leads to."""
    prompt = prompts[1] if direction == "a2b" else prompts[0]
    device = next(text_encoder.parameters()).device
    return text_encoder(tokenizer(prompt).to(device))


def load_metric_networks(nets: Networks, cfg: Config, run: training.Run) -> nn.Module | None:
    """The frozen networks of the losses and of validation, downloaded where they are missing.

    Returns CLIP's image encoder if the discriminators need it.
    """
    device = str(run.device)
    load = partial(training.load_or_explain, metrics.load_metric_network)
    with run.first_process_first():
        if cfg.lambda_cycle_lpips or cfg.lambda_idt_lpips:
            flags = "--lambda_cycle_lpips 0 --lambda_idt_lpips 0"
            nets.lpips = load("lpips", device, without=flags).network.to(run.dtype)
        if cfg.track_val_fid:
            nets.inception = load("inception", device, without="leave --track_val_fid out").network
            nets.dino = load("dino", device, without="leave --track_val_fid out").network
        if cfg.lambda_gan and cfg.gan_disc_type == "vagan_clip":
            clip = load("clip", device, without="--gan_disc_type patch").network
            return clip.image.to(run.dtype)
    return None


def build_discriminators(
    cfg: Config, run: training.Run, vision: nn.Module | None
) -> nn.ModuleDict:
    torch.manual_seed(cfg.seed)  # their first weights depend on nothing that came before
    D = nn.ModuleDict()
    for domain in "ab":
        if vision is not None:
            D[domain] = VisionAidedDiscriminator(vision)
        else:
            D[domain] = PatchDiscriminator(cfg.disc_width)
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

def translate_batch(
    nets: Networks, run: training.Run, x: Tensor, direction: str, noise: Tensor | None = None
) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], translated. `noise` samples the VAE's latent.

    Under autocast G's pictures come out in half precision, while real ones are float32. They are
    cast to that type, so that augmentation and losses round both sides alike.
    """
    context = nets.context(direction).expand(len(x), -1, -1)
    with run.autocast:
        made = nets.G(x, context, direction, latent_noise=noise)
    return made.to(run.dtype)


def latent_noises(
    nets: Networks, run: training.Run, step: int, direction: str, rows: list[int], x: Tensor
) -> dict[str, Tensor]:
    """Noise for the latents of the three passes of one direction: fake, returned, same."""
    source, _ = direction.split("2")
    vae = nets.G.vae_a2b
    shape = (vae.config.latent_channels, *latent_size(x.shape[2:], vae.factor))
    purposes = dict(
        fake=direction,
        returned=f"{direction} {opposite(direction)}",
        same=f"{source} identity",
    )
    return {name: run.normal(step, what, rows, shape) for name, what in purposes.items()}


def augmented(
    D: nn.ModuleDict | None, domain: str, run: training.Run, step: int, what: str, rows: list[int]
) -> Callable | None:
    """A domain's D with the augmentation of these rows of the global batch."""
    if D is None:
        return None
    if not run.cfg.gan_augment:
        return D[domain]
    generator = training.rng(run.cfg.seed, step, f"augment {what} {domain}")
    numbers = draw_augmentation(run.global_batch, generator)
    return partial(D[domain], draws={name: values[rows] for name, values in numbers.items()})


def discriminate(
    D: nn.ModuleDict,
    domain: str,
    run: training.Run,
    step: int,
    rows: list[int],
    real: Tensor,
    fake: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """A domain's discriminator: its weighted loss, and its accuracy, halved because the log
    adds up both domains."""
    logits_real = augmented(D, domain, run, step, "real", rows)(real)
    logits_fake = augmented(D, domain, run, step, "fake", rows)(fake)
    # Scaled as in the released script. To AdamW the factor makes next to no difference.
    loss = run.cfg.lambda_gan * discriminator_loss(logits_real, logits_fake, run.cfg)
    accuracy = training.accuracy(logits_real, logits_fake)
    return loss, {name: value / 2 for name, value in accuracy.items()}


# ------------------------------------------------------------- validating, showing, writing

@torch.inference_mode()
def translate_item(nets: Networks, run: training.Run, item: dict, direction: str) -> Tensor:
    """A test item's picture of any size, translated: [3, H, W] in [-1, 1]."""
    source, _ = direction.split("2")
    x = item[source][None].to(run.device, run.dtype)
    x, (height, width) = pad_to_multiple(x, nets.G.vae_a2b.factor)
    return translate_batch(nets, run, x, direction)[0, :, :height, :width].float().cpu()


@torch.inference_mode()
def validate(nets: Networks, run: training.Run, test_set: Dataset) -> dict[str, float]:
    """Measures of both directions; see validate_direction."""
    values = {}
    for direction in DIRECTIONS:
        found = validate_direction(nets, run, test_set, direction)
        values |= {f"val_{name}_{direction}": value for name, value in found.items()}
    return values


def validate_direction(
    nets: Networks, run: training.Run, test_set: Dataset, direction: str
) -> dict[str, float]:
    """change: mean distance of output and input, 0 for a model that only copies.

    Where the drawings know the true translation, PSNR to it, beside that of the unchanged
    input; with --track_val_fid, FID to the target domain and DINO structure distance.
    """
    source, target = direction.split("2")
    count = min(run.cfg.validation_num_images, len(test_set))
    items = [test_set[i] for i in range(count)]
    inputs = [item[source] for item in items]
    outputs = [translate_item(nets, run, item, direction) for item in items]
    changes = [(y - x).abs().mean().item() for x, y in zip(inputs, outputs)]
    values = {"change": sum(changes) / count}
    if hasattr(test_set, "truth"):
        truth = torch.stack([test_set.truth(i, direction) for i in range(count)])
        values["psnr_unchanged"] = psnr(torch.stack(inputs), truth)
        values["psnr"] = psnr(torch.stack(outputs), truth)
    if nets.inception:
        real = [item[target] for item in items]
        values["fid"] = evaluate.fid(nets.inception, real, outputs, run.device)
        distances = []
        for x, y in zip(inputs, outputs):
            x, y = x[None].to(run.device), y[None].to(run.device)
            distances.append(structure_distance(nets.dino, x, y).mean().item())
        values["structure"] = sum(distances) / count
    return values


def psnr(pictures: Tensor, truth: Tensor) -> float:
    """Mean PSNR in dB of pictures [N, 3, H, W] in [-1, 1]."""
    error = (pictures - truth).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()


def validate_and_keep_best(
    nets: Networks, run: training.Run, test_set: Dataset
) -> dict[str, float]:
    """Writes best.safetensors if this validation is the best so far, by PSNR or else by FID."""
    values = validate(nets, run, test_set)
    score = math.inf
    if "val_psnr_a2b" in values:
        score = -(values["val_psnr_a2b"] + values["val_psnr_b2a"]) / 2
    elif "val_fid_a2b" in values:
        score = (values["val_fid_a2b"] + values["val_fid_b2a"]) / 2
    if run.improves(score):
        save_weights(nets, run, "best.safetensors")
    return values


def preview(
    nets: Networks, run: training.Run, items: list[dict], step: int
) -> dict[str, float]:
    """Writes a grid: a, a translated, b, b translated. Returns signals for the log."""
    if not items:
        return {}
    columns, values = [], {}
    for direction in DIRECTIONS:
        source, target = direction.split("2")
        inputs = torch.stack([item[source] for item in items])
        outputs = torch.stack([translate_item(nets, run, item, direction) for item in items])
        targets = torch.stack([item[target] for item in items])
        columns += [inputs, outputs]
        values |= training.preview_signals(outputs, inputs, targets, f"_{direction}")
    training.save_grid(run.folder / "samples" / f"{step + 1:06d}.png", columns)
    return values


def choose_preview(test_set: Dataset) -> list[dict]:
    """Up to eight test items. A grid has pictures of one size."""
    items = [test_set[i] for i in range(min(8, len(test_set)))]
    size = items[0]["a"].shape
    return [item for item in items if item["a"].shape == size and item["b"].shape == size]


def save_weights(nets: Networks, run: training.Run, name: str) -> None:
    """Writes what was trained, with the captions of both domains."""

    def write(path: Path) -> None:
        checkpoints.save_generator(
            path,
            nets.G,
            "cyclegan_turbo",
            run.cfg.base,
            list(nets.prompts),
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
    run = training.Run(cfg, "cyclegan_turbo")
    train_set, test_set = open_data(cfg)
    run.prepare(train_set, test_set)
    nets = build_networks(cfg, run, test_set.prompts)
    translate, D = partial(translate_batch, nets, run), nets.D
    optimizer_g, optimizer_d = build_optimizers(cfg, run, nets)

    run.open_folder()
    state = dict(
        trained=nets.trained,
        optimizer=optimizer_g,
        scaler=run.scaler,
        discriminators=D,
        optimizer_d=optimizer_d,
    )
    if cfg.resume:
        run.restore(nets.frozen_fingerprint, state)

    def save(step: int) -> None:
        save_weights(nets, run, "model.safetensors")
        run.save_state(step, nets.frozen_fingerprint, state)

    preview_items = choose_preview(test_set)
    if not preview_items:
        run.say(
            "the test pictures of A and B differ in size: there will be no sample grids and no"
            " warnings from them; choose a --test_image_prep"
        )

    run.start(nets, state, "pictures", len(preview_items))
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

        # The generator's turn. The discriminators only pass the gradient on.
        losses, fakes = {}, []
        training.set_trainable(D, False)
        for rows, micro_batch in run.split(batch):
            for direction in DIRECTIONS:
                source, domain = direction.split("2")
                x, real = micro_batch[source], micro_batch[domain]
                D_augmented = augmented(D, domain, run, step, "made", rows)
                noises = latent_noises(nets, run, step, direction, rows, x)
                fake = translate(x, direction, noises["fake"])
                terms = cyclegan_losses(
                    translate,
                    D_augmented,
                    x,
                    fake,
                    direction,
                    noises,
                    cfg,
                    nets.lpips,
                    run.autocast,
                )
                for name, loss in terms:
                    run.backward(loss)
                    run.record(losses, {name: loss})
                run.record(losses, {f"change_{direction}": change(fake.detach(), x)})
                fakes.append((domain, rows, real, fake.detach()))
        losses["grad_norm"] = run.update(optimizer_g, cfg.max_grad_norm)
        run.check_finite(losses, step, batch)

        # The discriminators' turn: pictures of each domain against those just made.
        if D:
            training.set_trainable(D, True)
            spectral_step(D)
            for domain, rows, real, fake in fakes:
                with run.autocast:
                    loss, accuracy = discriminate(D, domain, run, step, rows, real, fake)
                run.backward(loss)
                run.record(losses, {"disc": loss, f"drift_{domain}": drift(fake, real)} | accuracy)
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
