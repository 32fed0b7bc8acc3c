"""This code's side of the benchmarks."""

import importlib
import sys
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import sample
from benchmarks.inputs import PROMPT, ROOT, module_inputs, pictures
from benchmarks.workers import Job, Requests, answer
from dataset.pictures import to_picture
from files import bases, checkpoints, metrics, tokenizers
from files.autoencoders import load_autoencoder
from models import clip, lpips
from sampling import precision

# -------------------- networks and pictures

@torch.inference_mode()
def modules(job: Job, requests: Requests) -> None:
    base = bases.load_base(job.base, dtype=job.our_dtype, device=job.device)
    for network in (base.unet, base.vae.encoder, base.vae.decoder, base.text_encoder):
        speed_up(network, job)
    width = base.unet.config.cross_attention_dim
    x, z, context, ids = module_inputs(job.size, job.batch, width, job.our_dtype, job.device)

    def work(task: str) -> Tensor:
        if task == "U-Net":
            return base.unet(z, 999, context)
        if task == "VAE encode":
            return base.vae.encode(x)[0]
        if task == "VAE decode":
            return base.vae.decode(z)
        return base.text_encoder(ids)

    answer(requests, work)


def speed_up(network: nn.Module, job: Job) -> None:
    """What sample.py does to one network."""
    if job.fast and (job.device == "cpu" or job.compiled):
        network.to(memory_format=torch.channels_last)
    if job.compiled:
        network.compile(mode="reduce-overhead" if job.device == "cuda" else None)


def speed_up_as_sample(job: Job, vae: nn.Module, unet: nn.Module, graphs: list[nn.Module]) -> None:
    """With --fast, what sample.py does by default with a model of one epsilon step."""
    device = torch.device(job.device)
    requested = "auto" if job.fast else "float32"
    chosen = precision.choose_precision(requested, device, amplified=True)
    precision.speed_up([vae], unet, graphs, chosen, device, job.compiled)


@torch.inference_mode()
def translation(job: Job, requests: Requests) -> None:
    model = checkpoints.load_generator(job.checkpoint, dtype=job.dtype, device=job.device)
    speed_up_as_sample(job, model.generator.vae, model.generator.unet, [model.generator])
    context = model.text_encoder(model.tokenizer(PROMPT).to(job.device))
    context = context.to(model.generator.unet.conv_in.weight)

    def translate(task: tuple[int, int]) -> Tensor:
        size, batch = task
        own = pictures(size, batch)
        translated = sample.translate_pictures(model, own, context, seed=0)
        for picture in translated:
            to_picture(picture)
        return translated

    answer(requests, translate)


def text(job: Job, requests: Requests) -> None:
    base = bases.load_base(job.base, dtype=job.dtype, device=job.device)
    if job.vae:
        base.vae = load_autoencoder(job.vae, base, job.dtype, job.device)
    speed_up_as_sample(job, base.vae, base.unet, [base.unet, base.vae.decoder])

    def draw(task: tuple[int, int]) -> Tensor | None:
        size, batch = task
        drawn = sample.text_to_image(base, PROMPT, list(range(batch)), (size, size))
        # With random weights, TAESD's pictures are not those of the VAE.
        return None if job.against == "vae" else drawn

    answer(requests, draw)


def text_with_vae(job: Job, requests: Requests) -> None:
    text(replace(job, vae=""), requests)


# -------------------- training

def training_steps(job: Job, requests: Requests) -> None:
    """The steps of a trainer itself, one for each request.

    The trainer runs as from the command line. A hook of torch.optim tells when an iteration has
    taken its last optimizer step; the trainer is held there until the next request. So an
    iteration is measured from the end of one update to the end of the next.
    """
    trains_discriminator = job.gan or job.what == "memory"
    steps_per_iteration = 2 if trains_discriminator else 1
    taken = 0

    def after_optimizer_step(*_) -> None:
        nonlocal taken
        taken += 1
        iterations, rest = divmod(taken, steps_per_iteration)
        if rest:
            return
        # The first iteration allocates memory and ends with a preview, so two go unmeasured.
        if iterations > 2:
            requests.finish()
        if iterations >= 2:
            requests.begin()

    register_optimizer_step_post_hook(after_optimizer_step)
    if job.what == "memory":
        # The default losses look through LPIPS and CLIP. No flag of the trainers takes random
        # weights in place of the downloaded ones, so their loader is replaced in this process.
        metrics.load_metric_network = random_metric_network
    sys.argv = [f"train_{job.kind}.py", *trainer_flags(job)]
    importlib.import_module(f"train_{job.kind}").main()


def trainer_flags(job: Job) -> list[str]:
    """A run without end that only trains. "memory" has the default losses; others need no file."""
    never = 10**9
    flags = dict(
        base=job.base,
        dataset_folder=job.data,
        train="lora",
        train_image_prep="no_resize",
        test_image_prep="no_resize",
        train_batch_size=job.batch,
        device=job.device,
        mixed_precision="no" if job.our_dtype is torch.float32 else "bf16",
        output_dir=job.run_folder,
        gradient_checkpointing="on" if job.checkpointing else "off",
        max_train_steps=never,
        validation_steps=never,
        viz_freq=never,
        checkpointing_steps=never,
    )
    if job.what != "memory":
        flags |= dict(
            lambda_lpips=0,
            lambda_clipsim=0,
            lambda_gan=0.5 if job.gan else 0,
            gan_disc_type="patch",
            gan_augment="off",
        )
    words = []
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words


def random_metric_network(name: str, device: str) -> metrics.MetricNetwork:
    """LPIPS or CLIP with random weights, in place of `files.metrics.load_metric_network`."""
    if name == "lpips":
        network = lpips.LPIPS()
    else:
        network = clip.CLIP(clip.VISION_B32, clip.TEXT_B32)
    network = network.eval().requires_grad_(False).to(device)
    tokenizer = tokenizers.load_tokenizer(str(ROOT / "tiny" / "tiny"))
    return metrics.MetricNetwork(network, "random", tokenizer)
