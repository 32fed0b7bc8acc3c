"""Measures this code beside other libraries on the same work, alternately, in one run.

    python bench.py --what modules --size 512            # U-Net, VAE and text encoder, beside diffusers
    python bench.py --what translate --size 512          # a paired translation, beside the official arrangement
    python bench.py --what translate --against diffusers # beside diffusers with fused LoRA and a kept context
    python bench.py --what text --size 512               # text to picture in one step, beside diffusers
    python bench.py --what train --size 256 [--gan]      # a paired training step, beside the official arrangement
    python bench.py --what lora --size 256               # the same step with LoRA as a weight, beside LoRA as a branch
    python bench.py --what load                          # cold start to the first picture, beside diffusers
    python bench.py --what memory --size 192 --batch 2   # a CycleGAN-Turbo step on the tiny base
    python bench.py --what memory --device cuda --dtype bf16 --sizes 256,512,1024    # both trainers, SD-Turbo size
    python bench.py --what growth --sizes 256,512,1024,2048 --batches 1,2,4,8,16     # this code alone, and a plot

Networks are of SD-Turbo's size with random weights (5 GB, written to --scratch, where they stay for the next run), or
of --base FOLDER. Each side is loaded once into a process of its own; the two then take turns, so that neither disturbs
the other's caches and both see the same machine. Prints JSON, and adds a table of medians to BENCHMARKS.md.
"official-style" is the arrangement of the img2img-turbo repository, assembled here of `diffusers` and `peft`. Needs
Linux and the test extras.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Generator
from importlib import metadata
from multiprocessing.connection import Connection

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils import flop_counter

import sample
import training
from dataset import loader
from dataset.pictures import to_picture, to_tensor
from files import bases, checkpoints, metrics, tokenizers
from models import clip, cyclegan_turbo, lora, lpips, pix2pix_turbo
from models.discriminator import PatchDiscriminator, spectral_step

ROOT = pathlib.Path(__file__).parent
PROMPT = "a cat"
SD_TURBO = dict(
    unet=dict(block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
              use_linear_projection=True, sample_size=64),
    vae=dict(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
             up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=32, sample_size=512),
    text_encoder=dict(vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                      num_attention_heads=16, hidden_act="gelu", projection_dim=512))
TINY = dict(unet=dict(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=2,
                      cross_attention_dim=32),
            vae=dict(block_out_channels=(32,) * 4, layers_per_block=1),
            text_encoder=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
DIFFUSERS_LOAD = """
import sys, torch
from diffusers import StableDiffusionPipeline
folder, dtype, device, size, output = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
pipe("a cat", num_inference_steps=1, guidance_scale=0.0, height=int(size), width=int(size)).images[0].save(output)
"""


# ---------------------------------------------------------------------------------------------- what both sides work on


def write_random_folder(folder: pathlib.Path, tiny: bool, dtype: torch.dtype, device: str) -> None:
    """A base with random weights, written by `diffusers` and `transformers` themselves. The vocabulary is the tiny
    base's: cutting a prompt into pieces takes no measurable time."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    unet, vae, text = ({**sizes, **(TINY[part] if tiny else {})} for part, sizes in SD_TURBO.items())
    tokenizer = ROOT / "tiny" / "tiny" / "tokenizer"
    torch.manual_seed(0)
    with torch.device(device):
        vae, unet, text = AutoencoderKL(**vae), UNet2DConditionModel(**unet), CLIPTextModel(CLIPTextConfig(**text))
    StableDiffusionPipeline(
        vae=vae.to(dtype), unet=unet.to(dtype), text_encoder=text.to(dtype),
        tokenizer=CLIPTokenizer(str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt"), model_max_length=77),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                         timestep_spacing="trailing", steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)


def write_checkpoint(path: str, folder: str) -> None:
    """A pix2pix-Turbo checkpoint for the base in `folder`, its LoRA drawn so that the picture feels it."""
    base, draws = bases.load_base(folder, ("vae", "unet", "schedule")), torch.Generator().manual_seed(0)
    config = pix2pix_turbo.Pix2PixTurboConfig(prediction_type=base.schedule.prediction_type)
    generator = pix2pix_turbo.Pix2PixTurbo(base.vae, base.unet, base.schedule, config, draws)
    for name, p in generator.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02, generator=draws)
    checkpoints.save_generator(pathlib.Path(path), generator, "pix2pix_turbo", folder, [PROMPT])


@functools.cache
def pictures(size: int, batch: int) -> list[Image.Image]:
    levels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    return [Image.fromarray(picture) for picture in levels]


def write_data(folder: str, size: int, batch: int) -> None:
    """A data set for both trainers, with one test picture: they draw samples of all."""
    for name, n in [("train_A", max(batch, 2)), ("train_B", max(batch, 2)), ("test_A", 1), ("test_B", 1)]:
        pathlib.Path(folder, name).mkdir(parents=True, exist_ok=True)
        pathlib.Path(folder, f"fixed_prompt_{name[-1].lower()}.txt").write_text(PROMPT)
        for i, picture in enumerate(pictures(size, n)):
            picture.save(pathlib.Path(folder, name, f"{i}.png"))


# -------------------------------------------------------------------------------------------------------------- workers


def peak_gb(device: str, reset: bool = False) -> float:
    """The largest memory of this process since the last reset: allocated on the GPU, else resident (Linux)."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e9
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def count_flops() -> flop_counter.FlopCounterMode:
    """torch's counter, and what it passes over: attention on the CPU."""
    attention, back = (getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}")
                       for end in ("", "_backward"))
    return flop_counter.FlopCounterMode(display=False, custom_mapping={
        attention: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
        back: lambda gradient, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(gradient, q, k, v)})


def requests(pipe: Connection, args: argparse.Namespace, idle: float) -> Generator:
    """Yields the tasks that are asked for, one at a time, and answers what the caller's work on each took; the work's
    result may be sent to the `yield`. A request is (task, look): to look is to count FLOPs and to hand over the
    result, and its time does not count. Memory is what came on top of the `idle` process, before loading."""
    device = args.device
    while request := pipe.recv():
        task, look = request
        peak_gb(device, reset=True)
        with contextlib.ExitStack() as stack:
            if look:
                if args.compile:
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                counter = stack.enter_context(count_flops())
            begin = time.perf_counter()
            result = yield task
            if device == "cuda":
                torch.cuda.synchronize()
            answer = dict(seconds=time.perf_counter() - begin, peak_gb=peak_gb(device) - idle)
        if look:
            answer |= dict(tflop=counter.get_total_flops() / 1e12,
                           result=None if result is None else result.float().cpu().numpy())
        pipe.send(answer)


def answer(asked: Generator, work: Callable[[object], Tensor | None]) -> None:
    result = None
    while True:
        result = work(asked.send(result))


def serve(pipe: Connection, side: Callable, args: argparse.Namespace) -> None:
    """The life of a worker: `side` loads what it needs, and answers until it is killed."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.empty(0, device=args.device)  # before anything asks for its memory
    asked = requests(pipe, args, peak_gb(args.device, reset=True))
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        side(args, asked)


# ----------------------------------------------------------------------------------------------------------- this code


def our_dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.fast else args.dtype


def quicken(network: nn.Module, args: argparse.Namespace) -> None:
    if args.fast and (args.device == "cpu" or args.compile):  # as sample.py
        network.to(memory_format=torch.channels_last)
    if args.compile:
        network.compile(mode="reduce-overhead" if args.device == "cuda" else None)


def as_sampled(args: argparse.Namespace, vae: nn.Module, unet: nn.Module, graphs: list[nn.Module]) -> None:
    """--fast is what sample.py does where no --dtype is given, with a model of one epsilon step."""
    how = argparse.Namespace(dtype="auto" if args.fast else "float32", compile=args.compile)
    sample.quicken(how, torch.device(args.device), [vae], unet, True, graphs)


def module_inputs(args: argparse.Namespace, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Picture, latent of an eighth of its size, context [B, 77, width], token ids."""
    rng, B, n = torch.Generator().manual_seed(0), args.batch, args.size
    shapes = [(B, 3, n, n), (B, 4, n // 8, n // 8), (B, 77, width)]
    ids = torch.randint(0, 900, (B, 77), generator=rng).to(args.device)
    return *(torch.randn(shape, generator=rng).to(args.device, dtype) for shape in shapes), ids


@torch.inference_mode()
def our_modules(args: argparse.Namespace, asked: Generator) -> None:
    base = bases.load_base(args.base, dtype=our_dtype(args), device=args.device)
    for network in (base.unet, base.vae.encoder, base.vae.decoder, base.text_encoder):
        quicken(network, args)
    x, z, context, ids = module_inputs(args, base.unet.config.cross_attention_dim, our_dtype(args))
    tasks = {"U-Net": lambda: base.unet(z, 999, context), "VAE encode": lambda: base.vae.encode(x)[0],
             "VAE decode": lambda: base.vae.decode(z), "text encoder": lambda: base.text_encoder(ids)}
    answer(asked, lambda task: tasks[task]())


@torch.inference_mode()
def our_translation(args: argparse.Namespace, asked: Generator) -> None:
    model = checkpoints.load_generator(args.checkpoint, dtype=args.dtype, device=args.device)
    as_sampled(args, model.generator.vae, model.generator.unet, [model.generator])
    context = model.text_encoder(model.tokenizer(PROMPT).to(args.device)).to(model.generator.unet.conv_in.weight)

    def translate(task: tuple[int, int]) -> Tensor:
        made = sample.translate_pictures(model, pictures(*task), context, 0, None)
        [to_picture(picture) for picture in made]
        return made

    answer(asked, translate)


def our_text(args: argparse.Namespace, asked: Generator) -> None:
    base = bases.load_base(args.base, dtype=args.dtype, device=args.device)
    as_sampled(args, base.vae, base.unet, [base.unet, base.vae.decoder])
    answer(asked, lambda task: sample.text_to_image(base, PROMPT, list(range(task[1])), (task[0], task[0])))


def random_judge(name: str, device: str) -> metrics.MetricNetwork:
    network = lpips.LPIPS() if name == "lpips" else clip.CLIP(clip.VISION_B32, clip.TEXT_B32)
    network = network.eval().requires_grad_(False).to(device)
    return metrics.MetricNetwork(network, "random", tokenizers.load_tokenizer(str(ROOT / "tiny" / "tiny")))


def our_training(args: argparse.Namespace, asked: Generator) -> None:
    """The trainer itself: each request is the next batch of its loop. --what train takes its losses that need no
    download, --what memory all of the default ones, with judges of random weights."""
    batches = loader.batches

    def asked_for(*arguments):
        yield (batch := next(batches(*arguments)))  # uncounted: the first step also draws samples
        for _ in asked:
            yield batch

    loader.batches, metrics.load_metric_network = asked_for, random_judge
    flags = dict(base=args.base, dataset_folder=args.data, train="lora", train_image_prep="no_resize",
                 test_image_prep="no_resize", train_batch_size=args.batch, device=args.device,
                 mixed_precision="no" if our_dtype(args) is torch.float32 else "bf16", output_dir=args.run_folder,
                 gradient_checkpointing="on" if args.checkpointing else "off", max_train_steps=10**9,
                 eval_freq=10**9, viz_freq=10**9, checkpointing_steps=10**9)
    if args.what != "memory":
        flags |= dict(lambda_lpips=0, lambda_clipsim=0, lambda_gan=0.5 * args.gan, gan_disc_type="patch",
                      gan_augment="off")
    sys.argv = ["", *(str(text) for name, value in flags.items() for text in (f"--{name}", value))]
    importlib.import_module(f"train_{args.kind}").main()


def formed(layer: nn.Module) -> Tensor:
    return layer.weight + layer.scale * (layer.lora_B.weight.flatten(1) @ layer.lora_A.weight.flatten(1)
                                         ).view_as(layer.weight)


def training_of_weights(args: argparse.Namespace, asked: Generator) -> None:
    """The same trainer with W + scale B A formed at each use, in place of a branch beside W."""
    lora.LoRALinear.forward = lambda layer, x: F.linear(x, formed(layer), layer.bias)
    lora.LoRAConv2d.forward = lambda layer, x: layer._conv_forward(x, formed(layer), layer.bias)
    args.run_folder += "-as-a-weight"
    our_training(args, asked)


# ------------------------------------------------------------------------------------- the arrangement of img2img-turbo


def encode_keeping_skips(encoder: nn.Module, x: Tensor) -> Tensor:
    x, encoder.skips = encoder.conv_in(x), []
    for block in encoder.down_blocks:
        encoder.skips.append(x)
        x = block(x)
    return encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(x))))


def decode_adding_skips(decoder: nn.Module, z: Tensor, latent_embeds: None = None) -> Tensor:
    x = decoder.mid_block(decoder.conv_in(z), latent_embeds)
    for i, (block, skip) in enumerate(zip(decoder.up_blocks, reversed(decoder.skips)), start=1):
        x = block(x + getattr(decoder, f"skip_conv_{i}")(skip * decoder.gamma), latent_embeds)
    return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))


class Official(nn.Module):
    """Networks of `diffusers` with `peft` adapters beside their layers, a VAE whose halves hand the skips on as
    attributes, a scheduler object for the one step, the text encoder at each call. With `merged`, as a careful user
    of `diffusers` would have it: the LoRA fused. In eval mode the latent is the encoder's mean (the repository draws
    it), so that pictures can be compared."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype, merged: bool = False):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from peft import LoraConfig
        from transformers import CLIPTextModel, CLIPTokenizer
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(args.base, subfolder="tokenizer")
        self.scheduler = DDPMScheduler.from_pretrained(args.base, subfolder="scheduler", clip_sample=False)
        self.text_encoder = CLIPTextModel.from_pretrained(args.base, subfolder="text_encoder")
        self.vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae")
        self.unet = UNet2DConditionModel.from_pretrained(args.base, subfolder="unet")
        widths, skips = self.vae.config.block_out_channels, [f"skip_conv_{i}" for i in range(1, 5)]
        for name, c_in, c_out in zip(skips, [*widths[-2::-1], widths[0]], [widths[-1], *widths[:0:-1]]):
            setattr(self.vae.decoder, name, nn.Conv2d(c_in, c_out, 1, bias=False))
        self.vae.encoder.forward = types.MethodType(encode_keeping_skips, self.vae.encoder)
        self.vae.decoder.forward = types.MethodType(decode_adding_skips, self.vae.decoder)
        self.vae.decoder.gamma = 1
        self.requires_grad_(False)
        self.vae.add_adapter(LoraConfig(r=4, target_modules=[*pix2pix_turbo.VAE_TARGETS, *skips]), "vae_skip")
        self.unet.add_adapter(LoraConfig(r=8, target_modules=list(pix2pix_turbo.UNET_TARGETS)))
        trained = safetensors.torch.load_file(args.checkpoint)
        for network, part, adapter in [(self.unet, "unet.", "default"), (self.vae, "vae.", "vae_skip")]:
            own = {}
            for name in (name for name in trained if name.startswith(part)):
                theirs = re.sub(r"(lora_[AB])", rf"\1.{adapter}", name.removeprefix(part))
                own[re.sub(r"(skip_conv_\d)\.weight", r"\1.base_layer.weight", theirs)] = trained[name]
            if unexpected := network.load_state_dict(own, strict=False).unexpected_keys:
                raise ValueError(f"{unexpected[0]} of the checkpoint has no place in this arrangement")
            for name, p in network.named_parameters():
                p.requires_grad_(name in own)
            if merged:
                network.fuse_lora()
                network.unload_lora()
        self.to(args.device, dtype).eval()
        self.scheduler.set_timesteps(1, device=args.device)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(args.device)
        self.t = torch.tensor([999], device=args.device)

    def encode(self, prompts: list[str]) -> Tensor:
        ids = self.tokenizer(prompts, max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(ids.input_ids.to(self.t.device))[0]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, H, W] in [-1, 1]."""
        context, scaling = context, self.vae.config.scaling_factor
        if context is None:
            context = self.encode([PROMPT] * len(x))
        latent = self.vae.encode(x).latent_dist
        z = (latent.sample() if self.training else latent.mode()) * scaling
        prediction = self.unet(z, self.t, encoder_hidden_states=context).sample
        x0 = self.scheduler.step(prediction, self.t, z).prev_sample.to(prediction.dtype)
        self.vae.decoder.skips = self.vae.encoder.skips
        return self.vae.decode(x0 / scaling).sample.clamp(-1, 1)


@torch.inference_mode()
def official_translation(args: argparse.Namespace, asked: Generator) -> None:
    """Against "diffusers" its LoRA is fused and its context kept."""
    merged = args.against == "diffusers"
    model = Official(args, args.dtype, merged)
    context = model.encode([PROMPT]) if merged else None

    def translate(task: tuple[int, int]) -> Tensor:
        x = torch.stack([to_tensor(picture) for picture in pictures(*task)]).to(args.device, args.dtype)
        made = model(x, context.expand(len(x), -1, -1) if merged else None)
        [to_picture(picture) for picture in made]
        return made

    answer(asked, translate)


def official_training(args: argparse.Namespace, asked: Generator) -> None:
    """One iteration of the released script: with a discriminator it takes a reconstruction step and, from a forward
    pass of its own, an adversarial step, then one on real and one on made pictures."""
    model, judge = Official(args, torch.float32).train(), PatchDiscriminator().to(args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, optimizer_d = (torch.optim.AdamW(p, lr=5e-6, fused=args.device == "cuda")
                              for p in (trained, judge.parameters()))
    x = torch.stack([to_tensor(p) for p in pictures(args.size, args.batch)]).to(args.device)
    target = 2 * x - 1

    def descend(optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype is torch.bfloat16):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # for the log

    def adversarial(pictures: Tensor, wanted: float) -> Tensor:
        logits, = judge(pictures)
        return 0.5 * F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, wanted))

    def step(task: str) -> None:
        descend(optimizer, lambda: F.mse_loss(model(x), target))
        if args.gan:
            fakes = []

            def fooled() -> Tensor:
                fakes.append(model(x))
                return adversarial(fakes[0], 0.8)

            judge.requires_grad_(False)
            descend(optimizer, fooled)
            judge.requires_grad_(True)
            spectral_step(judge)
            descend(optimizer_d, lambda: adversarial(target, 0.8))
            descend(optimizer_d, lambda: adversarial(fakes[0].detach(), 0.0))

    answer(asked, step)


def joint_training(args: argparse.Namespace, asked: Generator) -> None:
    """Unpaired, on our networks: two whole VAEs, and all losses of both directions in one graph."""
    import train_cyclegan_turbo as trainer
    base = bases.load_base(args.base)
    generator = cyclegan_turbo.CycleGANTurbo(base.vae, base.unet, base.schedule, cyclegan_turbo.CycleGANTurboConfig())
    generator.vae_b2a = copy.deepcopy(generator.vae_b2a)
    judge = PatchDiscriminator(16)
    x = 2 * torch.stack([to_tensor(p) for p in pictures(args.size, args.batch)]) - 1
    context = base.text_encoder(base.tokenizer(PROMPT)).expand(args.batch, -1, -1)

    def step(task: str) -> None:
        total = 0
        for there, back in ("a2b", "b2a"), ("b2a", "a2b"):
            noise = torch.randn(args.batch, 4, *(side // generator.vae.factor for side in x.shape[2:]))
            fake = generator(x, context, there, latent_noise=noise)
            total = total + trainer.cycle_loss(generator(fake, context, back, latent_noise=noise), x)
            total = total + trainer.identity_loss(generator(x, context, back, latent_noise=noise), x)
            total = total + trainer.generator_gan_loss(judge(fake), 1.0)
        total.backward()

    answer(asked, step)


# ------------------------------------------------------------------------------------------------------------ diffusers


@torch.inference_mode()
def diffusers_modules(args: argparse.Namespace, asked: Generator) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel
    vae, unet, text = (cls.from_pretrained(args.base, subfolder=name).to(args.device, args.dtype) for cls, name in [
        (AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")])
    x, z, context, ids = module_inputs(args, unet.config.cross_attention_dim, args.dtype)
    tasks = {"U-Net": lambda: unet(z, 999, context).sample, "VAE encode": lambda: vae.encode(x).latent_dist.mean,
             "VAE decode": lambda: vae.decode(z).sample, "text encoder": lambda: text(ids)[0]}
    answer(asked, lambda task: tasks[task]())


def diffusers_text(args: argparse.Namespace, asked: Generator) -> None:
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(args.base, torch_dtype=args.dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)

    def draw(task: tuple[int, int]) -> Tensor:
        size, batch = task
        noise = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        return 2 * pipe([PROMPT] * batch, num_inference_steps=1, guidance_scale=0.0, height=size, width=size,
                        generator=noise, output_type="pt").images - 1

    answer(asked, draw)


# --------------------------------------------------------------------------------------------------------- measurements

SIDES = {"modules": {"ours": our_modules, "diffusers": diffusers_modules},
         "translate": {"ours": our_translation, "official-style": official_translation,
                       "diffusers": official_translation},
         "text": {"ours": our_text, "diffusers": diffusers_text}, "growth": {"ours": our_translation},
         "train": {"ours": our_training, "official-style": official_training},
         "lora": {"ours": our_training, "as a weight": training_of_weights},
         "memory": {"ours": our_training, "official-style": joint_training}, "load": {"ours": None, "diffusers": None}}


def matrix_peak(dtype: torch.dtype, args: argparse.Namespace) -> float:
    """TFLOP a second of products of two large square matrices: the best of five times four."""
    n, best = 128 if args.tiny else 8192 if args.device == "cuda" else 2048, math.inf
    a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(4):
            c = a @ b
        c[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 4 * 2 * n**3 / best / 1e12


def summary(task: object, runs: dict[str, list[dict]]) -> list[dict]:
    """A row a side: the median of its seconds, its largest memory; for the second the ratios to the first, run by run:
    median, smallest, largest."""
    rows = [dict(task=task, side=side, seconds=statistics.median(run["seconds"] for run in own),
                 peak_gb=max(run["peak_gb"] for run in own)) for side, own in runs.items()]
    if len(runs) == 2:
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(*runs.values())]
        rows[1]["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return rows


def compare(args: argparse.Namespace, sides: dict[str, Callable], tasks: list) -> list[dict]:
    """All sides on the same tasks, in turns."""
    dtypes = {side: our_dtype(args) if side == "ours" else args.dtype for side in sides}
    peaks = {dtype: matrix_peak(dtype, args) for dtype in {*dtypes.values()}}
    context = multiprocessing.get_context("fork" if args.tiny else "spawn")  # spawned: nothing is shared
    processes, pipes, rows = [], {}, []

    def ask(side: str, task: object, look: bool = False) -> dict:
        try:
            pipes[side].send((task, look))
            return pipes[side].recv()
        except (EOFError, ConnectionError):
            raise ChildProcessError(f"the worker of {side} ended at {task}: for the reason above, or memory was short"
                                    ) from None

    try:
        for side, work in sides.items():
            pipes[side], there = context.Pipe()
            processes.append(context.Process(target=serve, args=(there, work, args)))
            processes[-1].start()
            there.close()  # so that its end is noticed
        for task in tasks:
            looks = {side: ask(side, task, look=True) for side in sides}
            for side in 3 * [*sides] if args.compile or args.device == "cuda" else []:  # it compiles, it records graphs
                ask(side, task)
            runs = {side: [] if args.runs else [look] for side, look in looks.items()}
            for _ in range(args.runs):
                for side in sides:
                    runs[side].append(ask(side, task))
            new = summary(task, runs)
            for row, look, dtype in zip(new, looks.values(), dtypes.values()):
                row |= dict(tflop=look["tflop"], of_peak=look["tflop"] / row["seconds"] / peaks[dtype])
            first, last = looks[new[0]["side"]]["result"], looks[new[-1]["side"]]["result"]
            if len(new) == 2 and first is not None:
                off = np.abs(first - last) / np.abs(last).max()
                new[1]["difference"] = [float(off.max()), float(off.mean())]
            print(*(f"{task} {row['side']}: {row['seconds']:.3g} s, {row['peak_gb']:.3g} GB" for row in new), sep="; ",
                  file=sys.stderr)
            rows += new
    finally:
        for process in processes:
            process.kill()
            process.join()
    return rows


def process_figures(command: list[str]) -> dict:
    """Wall seconds and peak memory of one process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)[:200]} failed: {error[-2000:]}")
    return dict(seconds=time.perf_counter() - begin, peak_gb=usage.ru_maxrss / 1e6)


def load(args: argparse.Namespace) -> list[dict]:
    ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (our_dtype(args), args.dtype))
    commands = {
        "ours": [sys.executable, str(ROOT / "sample.py"), PROMPT, "--base", args.base, "--size", str(args.size),
                 "--dtype", ours, "--device", args.device, "--output", f"{args.here}/ours.png"],
        "diffusers": [sys.executable, "-c", DIFFUSERS_LOAD, args.base, theirs, args.device, str(args.size),
                      f"{args.here}/theirs.png"]}
    for command in commands.values() if not args.tiny else ():  # uncounted: the files come into the disk cache
        process_figures(command)
    runs = {side: [] for side in commands}
    for _ in range(args.runs):
        for side, command in commands.items():
            runs[side].append(process_figures(command))
    return summary("cold start to the first picture", runs)


def memory(args: argparse.Namespace) -> list[dict]:
    """On the CPU, of an unpaired step of the tiny base. On a GPU, of both trainers' steps at full size."""
    if args.device == "cpu":
        args.base, args.kind = "tiny", "cyclegan_turbo"
        write_data(args.data, args.size, args.batch)
        return compare(args, SIDES["memory"], [f"a CycleGAN-Turbo step, {args.size} px, batch {args.batch}"])
    rows = []
    for args.kind in ("pix2pix_turbo", "cyclegan_turbo"):
        for size in args.sizes:
            args.size = size
            for args.checkpointing in (False, True):
                task = f"{args.kind}, {args.size} px, batch {args.batch}" + ", checkpointing" * args.checkpointing
                args.data, args.run_folder = (f"{args.here}/{task}/{name}" for name in ("data", "run"))
                write_data(args.data, args.size, args.batch)
                try:
                    rows += compare(args, {"ours": our_training}, [task])
                except ChildProcessError:
                    rows.append(dict(task=f"{task}: does not fit", side="ours"))
    return rows


# -------------------------------------------------------------------------------------------------------------- reports


def machine(args: argparse.Namespace) -> str:
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    gpu = f"{torch.cuda.get_device_name()}, " if args.device == "cuda" else ""
    return (f"{gpu}{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
            + ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "transformers", "peft")))


def write_table(path: pathlib.Path, title: str, rows: list[dict], note: str) -> None:
    lines = [f"\n## {title}\n", f"{note}\n",
             "| | | seconds | / ours (smallest to largest) | TFLOP | of the peak | memory, GB |"
             " difference: largest (mean) |",
             "| --- |" + " --- |" * 7]
    for row in rows:
        name = row["task"] if isinstance(row["task"], str) else "{} px, batch {}".format(*row["task"])
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]) if "ratio" in row else ""
        off = "{:.1g} ({:.1g})".format(*row["difference"]) if "difference" in row else ""
        seconds, *texts = (f"{row[key]:{form}}" if key in row else "" for key, form in [
            ("seconds", ".3g"), ("tflop", ".3g"), ("of_peak", ".0%"), ("peak_gb", ".3g")])
        lines.append(f"| {' | '.join([name, row['side'], seconds, ratio, *texts, off])} |")
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")


def plot(path: pathlib.Path, rows: list[dict], args: argparse.Namespace) -> None:
    """Time and memory against size and batch, both axes logarithmic."""
    width, height, margin = 400, 220, 60
    page = Image.new("RGB", (2 * (width + 2 * margin), 2 * (height + 2 * margin)), "white")
    pen = ImageDraw.Draw(page)
    columns = [("pixels a side, batch 1", 0, [(n, 1) for n in args.sizes]),
               (f"batch, {args.size} px", 1, [(args.size, n) for n in args.batches])]

    def share(value: float, values: list[float]) -> float:
        """0 at the smallest, 1 at the largest."""
        return math.log(value / min(values)) / (math.log(max(values) / min(values)) or 1)

    for across, (label, axis, tasks) in enumerate(columns):
        for down, (key, title) in enumerate([("seconds", "seconds"), ("peak_gb", "memory, GB")]):
            xs, ys = zip(*sorted((row["task"][axis], row[key]) for row in rows if row["task"] in tasks))
            left, top = margin + across * (width + 2 * margin), margin + down * (height + 2 * margin)
            pen.rectangle([left - 18, top - 18, left + width + 18, top + height + 18], outline="#bbbbbb")
            pen.text((left, top - 34), f"{title} against {label}", fill="black")
            line = [(left + width * share(x, xs), top + height * (1 - share(y, ys))) for x, y in zip(xs, ys)]
            pen.line(line, fill="#1f5fa8", width=2)
            for (i, j), x, y in zip(line, xs, ys):
                pen.ellipse([i - 3, j - 3, i + 3, j + 3], fill="#1f5fa8")
                pen.text((i - 12, j + 5), f"{y:.3g}", fill="#1f5fa8")
                pen.text((i - 8, top + height + 22), str(x), fill="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    training.write_file(path, lambda temporary: page.save(temporary, format="PNG"))


def parse(argv: list[str]) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--what", choices=SIDES, required=True)
    add("--against", metavar="SIDE", help="official-style, diffusers [the first that --what has, as above]")
    add("--base", help="a folder; random weights of SD-Turbo's size without it")
    add("--size", type=int, default=256, help="pixels a side [256]")
    add("--batch", type=int, default=1)
    add("--sizes", type=numbers, default=[256, 512, 1024], metavar="N,N", help="of growth, and of memory on CUDA")
    add("--batches", type=numbers, metavar="N,N", help="of growth, text and translate, at --size [--batch]")
    add("--dtype", choices=["float32", "bf16"], default="float32")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--fast", action="store_true", help="our side as sample.py chooses; of other whats in bf16 and channels_last")
    add("--compile", action="store_true", help="our side compiled")
    add("--gan", action="store_true", help="train: with a patch discriminator on both sides")
    add("--runs", type=int, default=5, help="0: one, the very run that counts FLOPs; for what takes minutes [5]")
    add("--scratch", help="where the random weights (5 GB) are written, and stay [a temporary folder]")
    add("--table", type=pathlib.Path, default=ROOT / "BENCHMARKS.md", help="the file that the table is added to")
    add("--plot", type=pathlib.Path, default=ROOT / "assets" / "growth.png", help="the picture of growth")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests: small networks, in forked workers
    args = parser.parse_args(argv)
    known = [side for side in SIDES[args.what] if side != "ours"]
    args.against = args.against or next(iter(known), None)
    if args.against not in [*known, None]:
        parser.error(f"--what {args.what} is measured against {' or '.join(known) or 'nothing'}")
    args.batches = args.batches or ([1, 2, 4] if args.what == "growth" else [args.batch])
    args.dtype, args.kind, args.checkpointing = sample.DTYPES[args.dtype], "pix2pix_turbo", False
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    dtype, of = str(args.dtype).removeprefix("torch."), args.base or "random weights of SD-Turbo's size"
    tasks = dict(modules=["U-Net", "VAE encode", "VAE decode", "text encoder"], growth=[*dict.fromkeys(
        [*((n, 1) for n in args.sizes), *((args.size, n) for n in args.batches)])])
    with tempfile.TemporaryDirectory(dir=args.scratch) as args.here:
        for name, file in dict(checkpoint="model.safetensors", data="data", run_folder="run").items():
            setattr(args, name, f"{args.here}/{file}")
        if args.what == "memory" and args.device == "cpu":
            of = "the tiny base"
        elif not args.base:
            args.base = f"{args.scratch or args.here}/random-{'tiny-' * args.tiny}{dtype}"
            if not pathlib.Path(args.base, "model_index.json").is_file():
                write_random_folder(pathlib.Path(args.base), args.tiny, args.dtype, args.device)
        if args.what in ("translate", "growth", "train", "lora"):
            write_checkpoint(args.checkpoint, args.base)
            write_data(args.data, args.size, args.batch)
        if args.what in ("load", "memory"):
            rows = dict(load=load, memory=memory)[args.what](args)
        else:
            sides = {side: work for side, work in SIDES[args.what].items() if side in ("ours", args.against)}
            rows = compare(args, sides, tasks.get(args.what, [(args.size, n) for n in args.batches]))
    size = f", {args.size} px, batch {args.batch}" if args.what in ("load", "modules") else ""
    quick = " (ours fast)" * args.fast + " (ours compiled)" * args.compile
    title = f"{args.what}: {of}{size}, {dtype}{quick}, {args.device.upper()}"
    command = f"python bench.py {' '.join(argv)}"
    print(json.dumps(dict(title=title, command=command, runs=args.runs, machine=machine(args), rows=rows), indent=1))
    runs = f"medians of {args.runs} runs, alternately" if args.runs else "one run each"
    write_table(args.table, title, rows, f"`{command}`: {runs}; {machine(args)}.")
    if args.what == "growth":
        plot(args.plot, rows, args)


if __name__ == "__main__":
    training.run(main)
