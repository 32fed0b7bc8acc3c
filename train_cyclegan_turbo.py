"""Trains CycleGAN-Turbo: a one-step text-to-image model becomes a translator between two sets of unpaired pictures.

    python train_cyclegan_turbo.py                        # drawn days and nights, LoRA on tiny-turbo, CPU
    python train_cyclegan_turbo.py --base tiny            # the same from random weights, CPU, ten minutes
    python train_cyclegan_turbo.py --base stabilityai/sd-turbo --dataset_folder DATA --mixed_precision bf16
    torchrun --nproc_per_node=4 train_cyclegan_turbo.py --base stabilityai/sd-turbo --dataset_folder DATA ...
    python train_cyclegan_turbo.py --resume runs/NAME

DATA holds train_A train_B test_A test_B (two sets of pictures, of any names), fixed_prompt_a.txt and fixed_prompt_b.txt
(a caption each); look at it with `python data.py check DATA`. The run's folder is that of train_pix2pix_turbo.py.
LPIPS and the vision-aided discriminators look through networks that are downloaded once (0.5 + 0.6 GB);
--lambda_cycle_lpips 0, --lambda_idt_lpips 0 and --gan_disc_type patch do without. Of the validations the best one's
weights are kept in best.safetensors: by PSNR where the drawing knows the truth, else by FID (--track_val_fid).

Paper: Parmar et al. 2024, "One-Step Image Translation with Text-to-Image Models", section 3.3:
    L = lambda_cycle L_cycle + lambda_gan L_gan + lambda_idt L_idt, over both directions.
The released script takes three generator steps an iteration (cycle, GAN, identity), each with forward passes of its
own; this one takes the paper's: one step on the sum. Memory is held down all the same: fake_b = G(a) is computed once
and cut off; cycle and GAN leave their gradients at the cut, one after the other, and these go once through G."""

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
from models.cyclegan_turbo import DIRECTIONS, CycleGANTurbo, CycleGANTurboConfig
from models.dino import structure_distance
from models.discriminator import PatchDiscriminator, VisionAidedDiscriminator, draw_augmentation, spectral_step
from models.vae import latent_size


@dataclass
class Config:
    # data
    dataset_folder: str = "drawn:day2night"  # a folder of two domains, drawn:day2night or drawn:clear2rain
    train_img_prep: str | None = None  # resized_(random)crop_N, resize_N, resize_M_randomcrop_NxN, no_resize; _hflip
    val_img_prep: str | None = None  # the same for the test pictures
    resolution: int = 256  # N of the default preparation, resize_286_randomcrop_256x256_hflip in this proportion
    dataloader_num_workers: int = 0  # processes that prepare pictures
    # model
    base: str = "tiny-turbo"  # a folder, a Hub id or a name: tiny-turbo, tiny (random), sd-turbo, sd15, sd21
    train: Literal["lora", "all"] = "lora"  # LoRA, conv_in and skips, or every weight (for small bases)
    lora_rank_unet: int = 128  # rank of the U-Net's LoRA
    lora_rank_vae: int = 4  # rank of the VAEs' LoRA
    skips: bool = True  # skip connections from encoder to decoder
    conv_in: bool = True  # beside the LoRA, train the U-Net's first convolution in full
    # losses
    lambda_cycle: float = 1.0  # weight of |G(G(a)) - a|
    lambda_idt: float = 1.0  # weight of |G(b) - b| for b that is already where G leads
    lambda_cycle_lpips: float = 10.0  # weight of G(G(a)) against a as VGG sees them; 0 needs no VGG
    lambda_idt_lpips: float = 1.0  # weight of G(b) against b as VGG sees them; 0 needs no VGG
    lambda_gan: float = 0.5  # weight of the adversarial loss; 0 trains no discriminator
    gan_disc_type: Literal["vagan_clip", "patch"] = "vagan_clip"  # look through CLIP, or need no download
    gan_loss_type: Literal["multilevel_sigmoid", "multilevel_sigmoid_s"] = "multilevel_sigmoid"  # "real" is 1, or 0.8
    gan_augment: bool = True  # what the discriminators see: other colours, shifted, with a hole
    disc_width: int = 64  # channels of the patch discriminators' first layer
    # optimisation
    learning_rate: float = 1e-5  # of generator and discriminators
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"  # last two: to zero
    lr_warmup_steps: int = 500  # linear rise; "constant" has none
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 10.0  # gradients longer than this are shortened to it
    train_batch_size: int = 1  # pictures of each domain, a process and slice
    gradient_accumulation_steps: int = 1  # slices a step
    max_train_steps: int = 25_000  # optimizer steps
    num_training_epochs: int | None = None  # ends earlier, after so many passes over the larger domain
    gradient_checkpointing: bool = False  # less memory, a third more time
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # autocast, frozen weights; bf16 is slow on a CPU without it
    dtype: Literal["float32", "float64"] = "float32"  # of what is trained (float64 for tests)
    # the run
    seed: int = 42  # of every draw
    device: str = "auto"  # auto, cpu, cuda, mps
    output_dir: str | None = None  # default runs/cyclegan_turbo-DATE
    resume: str | None = None  # a run's folder, to go on from its state.pt
    viz_freq: int = 100  # steps between sample grids
    validation_steps: int = 500  # steps between validations
    validation_num_images: int = 50  # test pictures of a validation
    track_val_fid: bool = False  # FID and DINO structure at each validation; needs the weights of Inception and DINO
    checkpointing_steps: int = 500  # steps between saves
    report_to: str = "none"  # none, tensorboard, wandb
    tracker_project_name: str = "train_cyclegan_turbo"  # W&B project


# Where the base is tiny and starts from nothing: every weight trains, on small pictures, faster.
TINY = dict(train="all", resolution=64, learning_rate=1e-3, lr_scheduler="cosine", lr_warmup_steps=200,
            adam_beta1=0.5, adam_beta2=0.99, train_batch_size=1, max_train_steps=1200, lambda_cycle=10.0,
            lambda_idt=5.0, lambda_gan=1.0, lambda_cycle_lpips=0.0, lambda_idt_lpips=0.0, gan_disc_type="patch",
            gan_augment=False, disc_width=16, validation_steps=100, validation_num_images=16, checkpointing_steps=100)
# Where it has learned to draw, LoRA does.
PRETRAINED = TINY | dict(train="lora", lora_rank_unet=4, learning_rate=5e-4, train_batch_size=4, max_train_steps=350,
                         lr_warmup_steps=100, disc_width=32)
ALIASES = dict(pretrained_model_name_or_path="base", resume_from_checkpoint="resume", eval_freq="validation_steps",
               num_samples_eval="validation_num_images", train_image_prep="train_img_prep",
               test_image_prep="val_img_prep")


# --------------------------------------------------------------------------------------------------------------- losses

def cycle_loss(back: Tensor, x: Tensor) -> Tensor:
    """L_cycle = |G_ba(G_ab(a)) - a|: what went there and back is what it was."""
    return F.l1_loss(back, x)


def identity_loss(same: Tensor, x: Tensor) -> Tensor:
    """L_idt = |G_ba(a) - a|: a picture that is already where G leads stays as it is."""
    return F.l1_loss(same, x)


def generator_gan_loss(logits: list[Tensor], real: float) -> Tensor:
    """Binary cross-entropy towards "real" (1, or 0.8: label smoothing), mean over a level's places, summed over levels:
    the generator wants its pictures taken for real."""
    return sum(F.binary_cross_entropy_with_logits(level, torch.full_like(level, real)) for level in logits)


def discriminator_loss(logits_real: list[Tensor], logits_fake: list[Tensor], real: float) -> Tensor:
    """The same, halved: real pictures towards "real", made ones towards 0."""
    return 0.5 * (generator_gan_loss(logits_real, real) + generator_gan_loss(logits_fake, 0.0))


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
    n = cfg.resolution
    train_set = folders.open_unpaired(cfg.dataset_folder, "train",
                                   cfg.train_img_prep or f"resize_{n * 286 // 256}_randomcrop_{n}x{n}_hflip",
                                   cfg.seed, n)
    test_set = folders.open_unpaired(cfg.dataset_folder, "test", cfg.val_img_prep or f"resize_{n}", cfg.seed, n)
    global_batch, slices, last_step = training.plan(cfg, rank, world, len(train_set), cfg.num_training_epochs)

    # ---- networks: what is trained stays in float32, what is frozen may be stored in half
    base_seed = cfg.seed if cfg.train == "all" else 0  # a base without weights: what carries LoRA must be found again
    with training.first_alone(rank):
        base = bases.load_base(cfg.base, device=str(device), dtype=dtype, seed=base_seed)
    generator = CycleGANTurbo(base.vae, base.unet, base.schedule, CycleGANTurboConfig(
        lora_rank_unet=cfg.lora_rank_unet, lora_rank_vae=cfg.lora_rank_vae, skips=cfg.skips, conv_in=cfg.conv_in,
        train=cfg.train, prediction_type=base.schedule.prediction_type), training.rng(cfg.seed, 0, "lora")).train()
    tokenizer, text_encoder = base.tokenizer, base.text_encoder.requires_grad_(cfg.train == "all")
    trained = {n: p for n, p in generator.named_parameters() if p.requires_grad}
    trained |= {f"text_encoder.{n}": p for n, p in text_encoder.named_parameters() if p.requires_grad}
    frozen = fingerprint(generator, trained)
    frozen += fingerprint(text_encoder) if cfg.train == "lora" else ""
    if half:
        cast_frozen(generator, half)
    for network in (generator.unet, *(part for vae in (generator.vae_a2b, generator.vae_b2a)
                                      for part in (vae.encoder, vae.decoder))):
        network.checkpointing = cfg.gradient_checkpointing
    factor, channels = generator.vae_a2b.factor, generator.vae_a2b.config.latent_channels
    lpips = inception = dino = vision = discriminators = None
    with training.first_alone(rank):
        if cfg.lambda_cycle_lpips or cfg.lambda_idt_lpips:
            lpips = training.needed(metrics.load_metric_network, "lpips", str(device),
                                    without="--lambda_cycle_lpips 0 --lambda_idt_lpips 0").network.to(dtype)
        if cfg.track_val_fid:
            inception, dino = (training.needed(metrics.load_metric_network, name, str(device), without="no --track_val_fid"
                                               ).network for name in ("inception", "dino"))
        if cfg.lambda_gan and cfg.gan_disc_type == "vagan_clip":
            vision = training.needed(metrics.load_metric_network, "clip", str(device), without="--gan_disc_type patch"
                                     ).network.image.to(dtype)
    if cfg.lambda_gan:
        torch.manual_seed(cfg.seed)  # the first weights depend on nothing that came before
        discriminators = nn.ModuleDict({domain: VisionAidedDiscriminator(vision) if vision
                                        else PatchDiscriminator(cfg.disc_width) for domain in "ab"}).to(device, dtype)

    # ---- captions: a2b goes where b's caption says. A frozen encoder is asked once and then let go
    leads_to = dict(a2b=test_set.prompts[1], b2a=test_set.prompts[0])
    contexts = {}
    if cfg.train == "lora":
        with torch.no_grad():
            contexts = {d: text_encoder(tokenizer(prompt).to(device)) for d, prompt in leads_to.items()}
        text_encoder = base.text_encoder = None

    def translate(x: Tensor, direction: str, latent_noise: Tensor | None = None) -> Tensor:
        context = contexts[direction] if contexts else text_encoder(tokenizer(leads_to[direction]).to(device))
        with autocast:
            made = generator(x, context.expand(len(x), -1, -1), direction, latent_noise=latent_noise)
        return made.to(dtype)  # as real pictures are: rounded to half precision it would be known by that alone

    def judged(domain: str, pictures: Tensor, rows: list[int], step: int, what: str) -> list[Tensor]:
        """A discriminator's logits, of pictures augmented by the draws of their rows of the global batch."""
        rng = training.rng(cfg.seed, step, f"augment {what} {domain}")
        draws = draw_augmentation(global_batch, rng) if cfg.gan_augment else None
        return discriminators[domain](pictures, draws and {k: v[rows] for k, v in draws.items()})

    # ---- optimizers
    adam = dict(lr=cfg.learning_rate, betas=(cfg.adam_beta1, cfg.adam_beta2), eps=cfg.adam_epsilon,
                weight_decay=cfg.adam_weight_decay, fused=device.type == "cuda")
    optimizer = torch.optim.AdamW(trained.values(), **adam)
    optimizer_d = torch.optim.AdamW(discriminators.parameters(), **adam) if discriminators else None
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.mixed_precision == "fp16")
    autocast = torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None)
    real_target = 0.8 if cfg.gan_loss_type == "multilevel_sigmoid_s" else 1.0

    # ---- the run's folder, and where it stood
    folder = training.open_run(cfg, "cyclegan_turbo", rank)
    start, best = 0, math.inf
    kept = dict(trained=trained, optimizer=optimizer, scaler=scaler, discriminators=discriminators,
                optimizer_d=optimizer_d)
    if cfg.resume:
        start, best = training.restore(folder, frozen, kept, "step", "best", batch=global_batch)

    def export(name: str) -> None:
        training.write_file(folder / name, lambda path: checkpoints.save_generator(
            path, generator, "cyclegan_turbo", cfg.base, list(test_set.prompts), text_encoder, tokenizer))

    @torch.inference_mode()
    def translated(item: dict, direction: str) -> Tensor:
        """A test item's picture of the one domain, of any size, led to the other: [3, H, W] in [-1, 1]."""
        x, size = pad_to_multiple(item[direction[0]][None].to(device, dtype), factor)
        return translate(x, direction)[0, :, :size[0], :size[1]].float().cpu()

    @torch.inference_mode()
    def validate() -> dict[str, float]:
        """How far the output is from the input (a model that only copies: 0); where the drawing knows the true
        translation, PSNR to it, beside that of doing nothing; FID and DINO structure where asked for."""
        values, items = {}, [test_set[i] for i in range(min(cfg.validation_num_images, len(test_set)))]
        for direction in DIRECTIONS:
            pairs = [(item[direction[0]], translated(item, direction)) for item in items]
            values[f"val_change_{direction}"] = sum((y - x).abs().mean().item() for x, y in pairs) / len(pairs)
            if hasattr(test_set, "truth"):
                truth = torch.stack([test_set.truth(i, direction) for i in range(len(items))])
                for name, pictures in zip(("psnr_doing_nothing", "psnr"), zip(*pairs)):
                    error = (torch.stack(pictures) - truth).square().mean(dim=(1, 2, 3))
                    values[f"val_{name}_{direction}"] = (10 * torch.log10(4 / error)).mean().item()
            if inception:
                real, made = [item[direction[2]] for item in items], [y for _, y in pairs]
                values[f"val_fid_{direction}"] = evaluate.fid(inception, real, made, device)
                distances = [structure_distance(dino, x[None].to(device), y[None].to(device)).mean().item()
                             for x, y in pairs]
                values[f"val_structure_{direction}"] = sum(distances) / len(distances)
        return values

    def badness(values: dict[str, float]) -> float:
        """What best.safetensors goes by: less is better."""
        for name, sign in (("val_psnr", -1), ("val_fid", 1)):
            if f"{name}_a2b" in values:
                return sign * sum(values[f"{name}_{direction}"] for direction in DIRECTIONS) / 2
        return math.inf

    # ---- the loop
    shown = [test_set[i] for i in range(min(8, len(test_set)))]
    shown = [item for item in shown if {item[d].shape for d in "ab"} == {shown[0]["a"].shape}]  # a grid is of one size
    training.announce(rank, trained, f"{len(train_set)} pictures", device, folder)
    report = training.open_report(cfg, rank, folder, start, last_step, global_batch)
    stop = training.catch_stop()
    batches = loader.batches(train_set, global_batch, cfg.seed, start, last_step,
                           [row for rows in slices for row in rows], cfg.dataloader_num_workers)
    for step in range(start, last_step):
        batch = next(batches)
        for group in [g for o in (optimizer, optimizer_d) if o for g in o.param_groups]:
            group["lr"] = learning_rate(step, cfg, last_step)

        def latent_noise(x: Tensor, pass_name: str, rows: list[int], step: int = step) -> Tensor:
            size, rng = latent_size(x.shape[2:], factor), training.rng(cfg.seed, step, pass_name)
            return torch.randn(global_batch, channels, *size, generator=rng)[rows].to(device, dtype)

        # Generator: there and back, past the discriminator, and staying put. One backward pass a piece: a graph is
        # freed before the next begins. The discriminators only pass the gradient on.
        losses = collections.defaultdict(float)

        def backward(name: str, loss: Tensor, losses: dict[str, float] = losses) -> None:
            scaler.scale(loss / len(slices)).backward()
            losses[name] += loss.item() / len(slices)

        fakes: dict[str, list[Tensor]] = {"a": [], "b": []}
        if discriminators:
            discriminators.requires_grad_(False)

        for i, rows in enumerate(slices):
            for there in DIRECTIONS:
                here, other = there[0], there[2]
                back = f"{other}2{here}"
                x = batch[here][i * len(rows):(i + 1) * len(rows)].to(device, dtype)
                fake = translate(x, there, latent_noise(x, there, rows))
                cut = fake.detach().requires_grad_(True)
                returned = translate(cut, back, latent_noise(x, f"{there} {back}", rows))
                with autocast:
                    loss = cfg.lambda_cycle * cycle_loss(returned, x)
                    if cfg.lambda_cycle_lpips:
                        loss = loss + cfg.lambda_cycle_lpips * lpips(returned, x).mean()
                backward("cycle", loss)
                del returned, loss
                if discriminators:
                    with autocast:
                        logits = judged(other, cut, rows, step, "made")
                        loss = cfg.lambda_gan * generator_gan_loss(logits, real_target)
                    backward("gan", loss)
                    del logits, loss
                fake.backward(cut.grad)
                fakes[other].append(cut.detach())
                del fake
                same = translate(x, back, latent_noise(x, f"{here} identity", rows))
                with autocast:
                    loss = cfg.lambda_idt * identity_loss(same, x)
                    if cfg.lambda_idt_lpips:
                        loss = loss + cfg.lambda_idt_lpips * lpips(same, x).mean()
                backward("idt", loss)
                del same, loss
                losses[f"change_{there}"] += (cut.detach() - x).abs().mean().item() / len(slices)  # 0: it only copies
        training.check_finite(losses, step, [*batch["name_a"], *batch["name_b"]])
        training.average_gradients(trained.values())
        scaler.unscale_(optimizer)
        losses["grad_norm"] = nn.utils.clip_grad_norm_(trained.values(), cfg.max_grad_norm).item()
        if not scaler.is_enabled():  # which itself leaves out a step whose gradient overflows
            training.check_finite(losses, step, [*batch["name_a"], *batch["name_b"]])
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

        # Discriminators: real pictures of each domain against those just made.
        if discriminators:
            discriminators.requires_grad_(True)
            spectral_step(discriminators)
            for i, rows in enumerate(slices):
                for domain in "ab":
                    real = batch[domain][i * len(rows):(i + 1) * len(rows)].to(device, dtype)
                    with autocast:
                        logits_real = judged(domain, real, rows, step, "real")
                        logits_fake = judged(domain, fakes[domain][i], rows, step, "fake")
                        loss = cfg.lambda_gan * discriminator_loss(logits_real, logits_fake, real_target)
                    backward("disc", loss)
                    losses["disc_right_on_real"] += training.share_right(logits_real, True) / 2 / len(slices)
                    losses["disc_right_on_fake"] += training.share_right(logits_fake, False) / 2 / len(slices)
                    drift = (fakes[domain][i].mean((0, 2, 3)) - real.mean((0, 2, 3))).abs().mean()
                    losses[f"drift_{domain}"] += drift.item() / len(slices)  # of the mean colour
            training.check_finite({"disc": losses["disc"]}, step, [*batch["name_a"], *batch["name_b"]])
            training.average_gradients(discriminators.parameters())
            scaler.unscale_(optimizer_d)
            nn.utils.clip_grad_norm_(discriminators.parameters(), cfg.max_grad_norm)
            scaler.step(optimizer_d)
            optimizer_d.zero_grad(set_to_none=True)
        scaler.update()

        # What came out. A stop that was asked for is taken here, with everything saved.
        done = step + 1
        losses = training.mean_over_ranks(losses)
        stopping = stop()
        if rank == 0:
            if done % cfg.validation_steps == 0 or done == last_step:
                losses |= validate()
                if (value := badness(losses)) < best:
                    best = value
                    export("best.safetensors")
            if shown and (done % cfg.viz_freq == 0 or done == 1 or done == last_step):
                columns = [torch.stack(column) for d in DIRECTIONS for column in (
                    [item[d[0]] for item in shown], [translated(item, d) for item in shown])]
                training.save_grid(folder / "samples" / f"{done:06d}.png", columns)
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
