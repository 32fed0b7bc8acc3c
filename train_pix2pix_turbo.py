"""Trains pix2pix-Turbo: a one-step text-to-image model becomes a translator of pictures, from pairs.

    python train_pix2pix_turbo.py                         # drawn outlines to scenes, LoRA on tiny-turbo, CPU
    python train_pix2pix_turbo.py --base tiny             # the same from random weights, CPU
    python train_pix2pix_turbo.py --base stabilityai/sd-turbo --dataset_folder DATA --mixed_precision bf16
    torchrun --nproc_per_node=4 train_pix2pix_turbo.py --base stabilityai/sd-turbo --dataset_folder DATA ...
    python train_pix2pix_turbo.py --resume runs/NAME

DATA holds train_A train_B test_A test_B (input and target, same file names), train_prompts.json and test_prompts.json;
look at it with `python data.py check DATA`. The run's folder gets log.jsonl, losses.png, samples/STEP.png, state.pt and
model.safetensors, which `python sample.py --checkpoint runs/NAME --input PICTURE "PROMPT"` runs.

LPIPS, CLIP similarity and the vision-aided discriminator look through networks that are downloaded once (0.5 + 0.6 GB);
--lambda_lpips 0, --lambda_clipsim 0 and --gan_disc_type patch do without. Of the validations the best one's weights are
kept in best.safetensors (by LPIPS, else by L2).

Paper: Parmar et al. 2024, "One-Step Image Translation with Text-to-Image Models", section 3. Unlike in the
released script, the generator takes one step an iteration, on the sum of its losses and from one forward pass, not two;
the crop and flip of a pair are shared; and training stops at max_train_steps."""

import collections
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluate
import training
from dataset import folders, loader
from dataset.pictures import pad_to_multiple
from files import bases, checkpoints, metrics
from files.tensors import cast_frozen, fingerprint
from models.discriminator import PatchDiscriminator, VisionAidedDiscriminator, draw_augmentation, spectral_step
from models.lora import set_scale
from models.pix2pix_turbo import Pix2PixTurbo, Pix2PixTurboConfig
from models.vae import latent_size


@dataclass
class Config:
    # data
    dataset_folder: str = "drawn:scenes"  # a folder of pairs, or drawn:scenes
    train_image_prep: str | None = None  # resized_(random)crop_N, resize_N, resize_M_randomcrop_NxN, no_resize; _hflip
    test_image_prep: str | None = None  # the same for the test pictures
    resolution: int = 512  # N of the default preparation, resized_crop_N
    dataloader_num_workers: int = 0  # processes that prepare pictures
    # model
    base: str = "tiny-turbo"  # a folder, a Hub id or a name: tiny-turbo, tiny (random), sd-turbo, sd15, sd21
    train: Literal["lora", "all"] = "lora"  # LoRA, conv_in and skips, or every weight (for small bases)
    lora_rank_unet: int = 8  # rank of the U-Net's LoRA
    lora_rank_vae: int = 4  # rank of the VAE's LoRA
    stochastic: bool = False  # pictures that vary: r drawn at each step, a noise map, a twin conv_in (section 3.4)
    conv_in: bool = True  # beside the LoRA, train the U-Net's first convolution in full
    # losses
    lambda_l2: float = 1.0  # weight of the squared difference to the target
    lambda_lpips: float = 5.0  # weight of the perceptual distance to the target; 0 needs no VGG
    lambda_clipsim: float = 5.0  # weight of the distance to the caption, to CLIP's eye; 0 needs no CLIP
    lambda_gan: float = 0.5  # weight of the adversarial loss; 0 trains no discriminator
    gan_disc_type: Literal["vagan_clip", "patch"] = "vagan_clip"  # looks through CLIP, or needs no download
    gan_loss_type: Literal["multilevel_sigmoid_s", "multilevel_sigmoid"] = "multilevel_sigmoid_s"  # "real" is 0.8, or 1
    gan_augment: bool = True  # what the discriminator sees: other colours, shifted, with a hole
    disc_width: int = 64  # channels of the patch discriminator's first layer
    # optimisation
    learning_rate: float = 5e-6  # of generator and discriminator
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"  # last two: to zero
    lr_warmup_steps: int = 500  # linear rise; "constant" has none
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it
    train_batch_size: int = 2  # pictures a process and slice
    gradient_accumulation_steps: int = 1  # slices a step
    max_train_steps: int = 10_000  # optimizer steps
    num_training_epochs: int | None = None  # ends earlier, after so many passes over the data
    gradient_checkpointing: bool = False  # less memory, a third more time
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # autocast, frozen weights; bf16 is slow on a CPU without it
    dtype: Literal["float32", "float64"] = "float32"  # of what is trained (float64 for tests)
    # the run
    seed: int = 42  # of every draw
    device: str = "auto"  # auto, cpu, cuda, mps
    output_dir: str | None = None  # default runs/pix2pix_turbo-DATE
    resume: str | None = None  # a run's folder, to go on from its state.pt
    viz_freq: int = 100  # steps between sample grids
    eval_freq: int = 100  # steps between validations
    num_samples_eval: int = 100  # test pictures of a validation
    track_val_fid: bool = False  # FID at each validation; needs Inception's weights
    checkpointing_steps: int = 500  # steps between saves
    report_to: str = "none"  # none, tensorboard, wandb
    tracker_project_name: str = "train_pix2pix_turbo"  # W&B project


# Where the base is tiny and starts from nothing: every weight trains, on small pictures, faster, in larger batches.
TINY = dict(train="all", resolution=32, learning_rate=1e-3, lr_scheduler="cosine",
            lr_warmup_steps=200, train_batch_size=16, max_train_steps=1500, lambda_lpips=0.0, lambda_clipsim=0.0,
            lambda_gan=0.0, gan_disc_type="patch", disc_width=16, checkpointing_steps=200, adam_beta2=0.99)
# Where it has learned to draw, LoRA does.
PRETRAINED = TINY | dict(train="lora", resolution=64, train_batch_size=8,
                         lora_rank_unet=4, lambda_gan=0.1, disc_width=32, lr_warmup_steps=100, max_train_steps=600)
ALIASES = dict(pretrained_model_name_or_path="base", resume_from_checkpoint="resume")


# --------------------------------------------------------------------------------------------------------------- losses

def reconstruction_loss(fake: Tensor, target: Tensor, r: float) -> Tensor:
    """L_rec = r |G(x) - y|^2: at r = 0 a stochastic model owes nothing to the target and stays the base's own."""
    return r * F.mse_loss(fake, target)


def lpips_loss(lpips: nn.Module, fake: Tensor, target: Tensor, r: float) -> Tensor:
    """L_rec's other half: r times the distance of VGG features."""
    return r * lpips(fake, target).mean()


def clip_loss(clip: nn.Module, fake: Tensor, captions: Tensor) -> Tensor:
    """L_CLIP = 1 - cos(image, caption), each picture with its own caption, embedded [B, 512]."""
    return (1 - clip.similarity(fake, captions)).mean()


def generator_gan_loss(logits: list[Tensor], real: float) -> Tensor:
    """Binary cross-entropy towards "real" (1, or 0.8: label smoothing), mean over a level's places, summed over levels:
    the generator wants its pictures taken for real."""
    return sum(F.binary_cross_entropy_with_logits(level, torch.full_like(level, real)) for level in logits)


def discriminator_loss(logits_real: list[Tensor], logits_fake: list[Tensor], real: float) -> Tensor:
    """The same: real pictures towards "real", made ones towards 0."""
    return generator_gan_loss(logits_real, real) + generator_gan_loss(logits_fake, 0.0)


def learning_rate(step: int, config: Config, last: int) -> float:
    rise = 1.0 if config.lr_scheduler == "constant" else min(1.0, (step + 1) / max(config.lr_warmup_steps, 1))
    done = max(0.0, (step - config.lr_warmup_steps) / max(last - config.lr_warmup_steps, 1))
    fall = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}.get(config.lr_scheduler, 1.0)
    return config.learning_rate * rise * fall


def main() -> None:
    cfg = training.parse(Config, {"tiny-": PRETRAINED, "tiny": TINY}, ALIASES, __doc__)
    rank, world, device = training.start_ranks(cfg.device)
    dtype = getattr(torch, cfg.dtype)
    half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.mixed_precision]
    torch.manual_seed(cfg.seed)

    # ---- data: step s takes rows of a global batch, of which this process has its share, in slices
    prep = [name or f"resized_crop_{cfg.resolution}" for name in (cfg.train_image_prep, cfg.test_image_prep)]
    train_set = folders.open_paired(cfg.dataset_folder, "train", prep[0], cfg.seed, cfg.resolution)
    test_set = folders.open_paired(cfg.dataset_folder, "test", prep[1], cfg.seed, cfg.resolution)
    global_batch, slices, last_step = training.plan(cfg, rank, world, len(train_set), cfg.num_training_epochs)

    # ---- networks: what is trained stays in float32, what is frozen may be stored in half
    base_seed = cfg.seed if cfg.train == "all" else 0  # a base without weights: what carries LoRA must be found again
    with training.first_alone(rank):
        base = bases.load_base(cfg.base, device=str(device), dtype=dtype, seed=base_seed)
    prompts = sorted({*train_set.captions})
    generator = Pix2PixTurbo(base.vae, base.unet, base.schedule, Pix2PixTurboConfig(
        lora_rank_unet=cfg.lora_rank_unet, lora_rank_vae=cfg.lora_rank_vae, stochastic=cfg.stochastic,
        conv_in=cfg.conv_in, train=cfg.train, prediction_type=base.schedule.prediction_type),
        training.rng(cfg.seed, 0, "lora")).train()
    tokenizer, text_encoder = base.tokenizer, base.text_encoder.requires_grad_(cfg.train == "all")
    trained = {n: p for n, p in generator.named_parameters() if p.requires_grad}
    trained |= {f"text_encoder.{n}": p for n, p in text_encoder.named_parameters() if p.requires_grad}
    frozen = fingerprint(generator, trained)
    frozen += fingerprint(text_encoder) if cfg.train == "lora" else ""
    if half:
        cast_frozen(generator, half)
    for network in (generator.unet, generator.vae.encoder, generator.vae.decoder):
        network.checkpointing = cfg.gradient_checkpointing
    vagan = cfg.lambda_gan > 0 and cfg.gan_disc_type == "vagan_clip"
    lpips = clip = inception = discriminator = None
    with training.first_alone(rank):
        if cfg.lambda_lpips:
            lpips = training.needed(metrics.load_metric_network, "lpips", str(device), without="--lambda_lpips 0"
                                    ).network.to(dtype)
        if cfg.lambda_clipsim or vagan:
            judge = training.needed(metrics.load_metric_network, "clip", str(device),
                                    without="--lambda_clipsim 0 --gan_disc_type patch")
            clip, clip_tokenizer = judge.network.to(dtype), judge.tokenizer
        if cfg.track_val_fid:
            inception = training.needed(metrics.load_metric_network, "inception", str(device), without="no --track_val_fid"
                                        ).network
    if cfg.lambda_gan:
        torch.manual_seed(cfg.seed)  # the first weights depend on nothing that came before
        discriminator = VisionAidedDiscriminator(clip.image) if vagan else PatchDiscriminator(cfg.disc_width)
        discriminator.to(device, dtype)
    factor, channels = generator.vae.factor, generator.vae.config.latent_channels

    # ---- captions: of up to 2,000 a frozen encoder is asked once for each and then let go
    contexts = {}
    if cfg.train == "lora":
        captions = sorted({*train_set.captions, *test_set.captions})
        if len(captions) <= 2000:
            with torch.no_grad():
                contexts = {c: text_encoder(tokenizer(c).to(device))[0].cpu() for c in captions}
            text_encoder = base.text_encoder = None

    def encode(captions: list[str]) -> Tensor:  # -> [B, 77, C]
        if contexts:
            return torch.stack([contexts[c] for c in captions]).to(device)
        return text_encoder(tokenizer(captions).to(device))

    def judged(pictures: Tensor, rows: list[int], step: int, what: str) -> list[Tensor]:
        """The discriminator's logits, of pictures augmented by the draws of their rows of the global batch."""
        draws = draw_augmentation(global_batch, training.rng(cfg.seed, step, what)) if cfg.gan_augment else None
        return discriminator(pictures, draws and {k: v[rows] for k, v in draws.items()})

    # ---- optimizers
    adam = dict(lr=cfg.learning_rate, betas=(cfg.adam_beta1, cfg.adam_beta2), eps=cfg.adam_epsilon,
                weight_decay=cfg.adam_weight_decay, fused=device.type == "cuda")
    optimizer = torch.optim.AdamW(trained.values(), **adam)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), **adam) if discriminator else None
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.mixed_precision == "fp16")
    autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)
    real_target = 0.8 if cfg.gan_loss_type == "multilevel_sigmoid_s" else 1.0

    # ---- the run's folder, and where it stood
    folder = training.open_run(cfg, "pix2pix_turbo", rank)
    start, best = 0, math.inf
    kept = dict(trained=trained, optimizer=optimizer, scaler=scaler, discriminator=discriminator,
                optimizer_d=optimizer_d)
    if cfg.resume:
        start, best = training.restore(folder, frozen, kept, "step", "best", batch=global_batch)

    def export(name: str) -> None:
        training.write_file(folder / name, lambda path: checkpoints.save_generator(
            path, generator, "pix2pix_turbo", cfg.base, prompts if len(prompts) == 1 else [], text_encoder, tokenizer))

    @torch.inference_mode()
    def translate(item: dict) -> Tensor:
        """A test item of any size -> output [3, H, W] in [-1, 1]; of a stochastic model at r = 1, without noise."""
        set_scale(generator, 1.0)
        x, size = pad_to_multiple(item["input"][None].to(device, dtype), factor)
        with autocast:
            return generator(x, encode([item["caption"]]))[0, :, :size[0], :size[1]].float().cpu()

    @torch.inference_mode()
    def validate() -> dict[str, float]:
        items = [test_set[i] for i in range(min(cfg.num_samples_eval, len(test_set)))]
        pairs = [(translate(item), item["target"]) for item in items]
        errors = torch.stack([(fake - target).square().mean() for fake, target in pairs])
        values = {"val_l2": errors.mean().item(), "val_psnr": (10 * torch.log10(4 / errors)).mean().item()}
        if lpips:
            values["val_lpips"] = torch.cat([lpips(*(x[None].to(device, dtype) for x in pair)) for pair in pairs]
                                            ).mean().item()
        if cfg.lambda_clipsim:
            captions = clip.embed_captions(clip_tokenizer([item["caption"] for item in items]).to(device))
            values["val_clipsim"] = torch.cat([clip.similarity(fake[None].to(device, dtype), captions[i:i + 1])
                                               for i, (fake, _) in enumerate(pairs)]).mean().item()
        if inception:
            fakes, targets = zip(*pairs)
            values["val_fid"] = evaluate.fid(inception, targets, fakes, device)
        return values

    # ---- the loop
    shown = [test_set[i] for i in range(min(16, len(test_set)))]
    shown = [item for item in shown if item["target"].shape == shown[0]["target"].shape]  # a grid is of one size
    training.announce(rank, trained, f"{len(train_set)} pairs", device, folder)
    report = training.open_report(cfg, rank, folder, start, last_step, global_batch)
    stop = training.catch_stop()
    batches = loader.batches(train_set, global_batch, cfg.seed, start, last_step,
                           [row for rows in slices for row in rows], cfg.dataloader_num_workers)
    for step in range(start, last_step):
        batch = next(batches)
        for group in [g for o in (optimizer, optimizer_d) if o for g in o.param_groups]:
            group["lr"] = learning_rate(step, cfg, last_step)
        r = torch.rand((), generator=training.rng(cfg.seed, step, "r")).item() if cfg.stochastic else None
        share = 1.0 if r is None else r  # of the adapters, and of what is asked of the reconstruction
        set_scale(generator, share)
        size = latent_size(batch["input"].shape[2:], factor)
        latent_noise, noise = (torch.randn(global_batch, channels, *size, generator=training.rng(cfg.seed, step, what))
                               .to(dtype) for what in ("latent", "noise"))

        # Generator: reconstruction and adversarial loss. The discriminator only passes the gradient on.
        losses, fakes = collections.defaultdict(float), []
        if discriminator:
            discriminator.requires_grad_(False)
        for i, rows in enumerate(slices):
            mine = slice(i * len(rows), (i + 1) * len(rows))
            x, target = (batch[k][mine].to(device, dtype) for k in ("input", "target"))
            with autocast:
                fake = generator(x, encode(batch["caption"][mine]), r, noise[rows].to(device),
                                 latent_noise=latent_noise[rows].to(device))
                fake = fake.to(dtype)  # as targets are: rounded to half precision it would be known by that alone
                parts = {"l2": cfg.lambda_l2 * reconstruction_loss(fake, target, share)}
                if lpips:
                    parts["lpips"] = cfg.lambda_lpips * lpips_loss(lpips, fake, target, share)
                if cfg.lambda_clipsim:
                    with torch.no_grad():
                        captions = clip.embed_captions(clip_tokenizer(batch["caption"][mine]).to(device))
                    parts["clipsim"] = cfg.lambda_clipsim * clip_loss(clip, fake, captions)
                if discriminator:
                    logits = judged(fake, rows, step, "augment")
                    parts["gan"] = cfg.lambda_gan * generator_gan_loss(logits, real_target)
            scaler.scale(sum(parts.values()) / len(slices)).backward()
            fakes.append(fake.detach())
            parts["change"] = (fakes[i] - (2 * x - 1)).abs().mean()  # 0: the model only copies its input
            parts["drift"] = (fakes[i].mean((2, 3)) - target.mean((2, 3))).abs().mean()  # of the mean colour
            for name, value in parts.items():
                losses[name] += value.item() / len(slices)
        training.check_finite(losses, step, batch["name"])
        training.average_gradients(trained.values())
        scaler.unscale_(optimizer)
        losses["grad_norm"] = nn.utils.clip_grad_norm_(trained.values(), cfg.max_grad_norm).item()
        if not scaler.is_enabled():  # which itself leaves out a step whose gradient overflows
            training.check_finite(losses, step, batch["name"])
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

        # Discriminator: real targets against the pictures just made.
        if discriminator:
            discriminator.requires_grad_(True)
            spectral_step(discriminator)
            for i, rows in enumerate(slices):
                target = batch["target"][i * len(rows):(i + 1) * len(rows)].to(device, dtype)
                with autocast:
                    logits_real = judged(target, rows, step, "augment real")
                    logits_fake = judged(fakes[i], rows, step, "augment fake")
                    loss = cfg.lambda_gan * discriminator_loss(logits_real, logits_fake, real_target)
                scaler.scale(loss / len(slices)).backward()
                losses["disc"] += loss.item() / len(slices)
                losses["disc_right_on_real"] += training.share_right(logits_real, True) / len(slices)
                losses["disc_right_on_fake"] += training.share_right(logits_fake, False) / len(slices)
            training.check_finite({"disc": losses["disc"]}, step, batch["name"])
            training.average_gradients(discriminator.parameters())
            scaler.unscale_(optimizer_d)
            nn.utils.clip_grad_norm_(discriminator.parameters(), cfg.max_grad_norm)
            scaler.step(optimizer_d)
            optimizer_d.zero_grad(set_to_none=True)
        scaler.update()

        # What came out. A stop that was asked for is taken here, with everything saved.
        done = step + 1
        losses = training.mean_over_ranks(losses)
        stopping = stop()
        if rank == 0:
            if done % cfg.eval_freq == 0 or done == last_step:
                losses |= validate()
                if (value := losses.get("val_lpips", losses["val_l2"])) < best:
                    best = value
                    export("best.safetensors")
            if done % cfg.viz_freq == 0 or done == 1 or done == last_step:
                columns = zip(*((item["input"] * 2 - 1, translate(item), item["target"]) for item in shown))
                training.save_grid(folder / "samples" / f"{done:06d}.png", [torch.stack(c) for c in columns])
            report(done, losses)
            if done % cfg.checkpointing_steps == 0 or done == last_step or stopping:
                export("model.safetensors")  # the state last: what a resumed run takes for done has been written
                training.save_state(folder / "state.pt", dict(
                    step=done, best=best, base=frozen, batch=global_batch, **kept))
                training.plot_losses(folder / "log.jsonl", folder / "losses.png")
        if stopping:
            raise training.stopped(done, folder)
    if rank == 0:
        print(folder / "model.safetensors")


if __name__ == "__main__":
    training.run(main)
