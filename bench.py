"""Measures this code beside other libraries on the same work, alternately, in one run.

    python bench.py --what load                # cold start to the first picture, beside diffusers; random weights
    python bench.py --what load --base FOLDER  # the same with real ones
    python bench.py --what memory --size 256   # peak memory of a CycleGAN-Turbo step, beside the official arrangement

Prints medians and the ratio of each pair, and adds a table to BENCHMARKS.md. Needs the test extras.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import torch

ROOT = pathlib.Path(__file__).parent
SD_TURBO = dict(
    unet=dict(block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024,
              use_linear_projection=True, sample_size=64),
    vae=dict(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
             up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=32, sample_size=512),
    text_encoder=dict(vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                      num_attention_heads=16, hidden_act="gelu", projection_dim=512))
PEER = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
size = int(sys.argv[2])
picture = pipe("a cat", num_inference_steps=1, guidance_scale=0.0, height=size, width=size).images[0]
picture.save(sys.argv[3])
"""
# The official arrangement of a step: two whole VAEs, and all losses of both directions in one graph.
JOINT = """
import copy, sys, torch
import data, train_cyclegan_turbo as trainer
from models import weights
from models.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig
from models.discriminator import PatchDiscriminator
size, batch = int(sys.argv[1]), int(sys.argv[2])
if size:
    base = weights.load_base("tiny")
    generator = CycleGANTurbo(base.vae, base.unet, base.schedule, CycleGANTurboConfig()).train()
    generator.vae_b2a = copy.deepcopy(generator.vae_b2a)
    d_a, d_b = PatchDiscriminator(16), PatchDiscriminator(16)
    x = next(data.batches(data.open_unpaired("drawn:day2night", "train", "no_resize", 0, size), batch, 0))
    context = base.text_encoder(base.tokenizer("night")).expand(batch, -1, -1)
    total = 0
    for there, back, here, judge in [("a2b", "b2a", "a", d_b), ("b2a", "a2b", "b", d_a)]:
        noise = torch.randn(batch, 4, size // 4, size // 4)
        fake = generator(x[here], context, there, latent_noise=noise)
        total = total + trainer.cycle_loss(generator(fake, context, back, latent_noise=noise), x[here])
        total = total + trainer.identity_loss(generator(x[here], context, back, latent_noise=noise), x[here])
        total = total + trainer.generator_gan_loss(judge(fake), 1.0)
    total.backward()
"""


def write_random_folder(folder: pathlib.Path, dtype: torch.dtype) -> None:
    """A full-size SD-Turbo folder with random weights, written by `diffusers` and `transformers` themselves. The
    vocabulary is the tiny base's: cutting a prompt into pieces takes no measurable time."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    tokenizer = ROOT / "tiny" / "tiny" / "tokenizer"
    StableDiffusionPipeline(
        vae=AutoencoderKL(**SD_TURBO["vae"]).to(dtype), unet=UNet2DConditionModel(**SD_TURBO["unet"]).to(dtype),
        text_encoder=CLIPTextModel(CLIPTextConfig(**SD_TURBO["text_encoder"])).to(dtype),
        tokenizer=CLIPTokenizer(str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt"), model_max_length=77),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                         timestep_spacing="trailing"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)


def process_figures(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in GB of one process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)[:200]} failed: {error[-2000:]}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1e6


def bench_load(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = pathlib.Path(args.base or scratch)
        if not args.base:
            write_random_folder(folder, torch.float32)
        sides = {
            "ours": [sys.executable, str(ROOT / "sample.py"), "a cat", "--base", str(folder), "--size", str(args.size),
                     "--dtype", "float32", "--device", "cpu", "--output", f"{scratch}/ours.png"],
            "diffusers": [sys.executable, "-c", PEER, str(folder), str(args.size), f"{scratch}/peer.png"]}
        for command in sides.values():  # once uncounted: the files come into the disk cache
            process_figures(command)
        runs = {name: [] for name in sides}
        for _ in range(args.runs):
            for name, command in sides.items():
                runs[name].append(process_figures(command))
    ratios = [peer[0] / ours[0] for ours, peer in zip(runs["ours"], runs["diffusers"])]
    seconds = {name: statistics.median(s for s, _ in values) for name, values in runs.items()}
    memory = {name: max(m for _, m in values) for name, values in runs.items()}
    return dict(what=f"cold start to first picture, SD-Turbo size, {args.size} px, float32, CPU", runs=args.runs,
                seconds=seconds, peak_gb=memory, ratio=statistics.median(ratios), ratios=[min(ratios), max(ratios)],
                of=("seconds", "diffusers / ours"))


def bench_memory(args: argparse.Namespace) -> dict:
    """Peak memory of processes that take one step, less that of one that only imports; batch 2, LoRA on the tiny
    base."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        ours = [sys.executable, str(ROOT / "train_cyclegan_turbo.py"), "--train", "lora", "--resolution",
                str(args.size), "--train_batch_size", "2", "--max_train_steps", "1", "--validation_num_images", "1",
                "--device", "cpu"]
        joint = [sys.executable, "-c", JOINT]
        runs = {"ours": [], "official": []}
        for i in range(args.runs):
            idle = process_figures([*joint, "0", "2"])[1]
            for name, command in [("ours", [*ours, "--output_dir", f"{scratch}/{i}"]),
                                  ("official", [*joint, str(args.size), "2"])]:
                seconds, peak = process_figures(command)
                runs[name].append((seconds, peak - idle))
    ratios = [ours[1] / official[1] for ours, official in zip(*runs.values())]
    return dict(what=f"peak memory of a CycleGAN-Turbo step, tiny base, LoRA, batch 2, {args.size} px, float32, CPU",
                runs=args.runs, seconds={name: statistics.median(s for s, _ in v) for name, v in runs.items()},
                peak_gb={name: statistics.median(m for _, m in v) for name, v in runs.items()},
                ratio=statistics.median(ratios), ratios=[min(ratios), max(ratios)], of=("peak_gb", "ours / official"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["load", "memory"], required=True)
    parser.add_argument("--base", help="a folder; random weights of full size without it")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scratch", help="where the random folder (5 GB) is written for the time being")
    args = parser.parse_args()
    result = dict(load=bench_load, memory=bench_memory)[args.what](args)
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.get_num_threads()} threads"
    result |= dict(machine=machine, versions=versions)
    print(json.dumps(result, indent=1))
    (ours, peer), (of, which) = result["seconds"], result["of"]
    rows = [f"| {name} | {result[key][ours]:.2f} | {result[key][peer]:.2f} | "
            + (f"{result['ratio']:.2f} ({result['ratios'][0]:.2f} to {result['ratios'][1]:.2f})" if key == of else "")
            + " |" for key, name in [("seconds", "seconds"), ("peak_gb", "peak memory, GB")]]
    with (ROOT / "BENCHMARKS.md").open("a") as file:
        file.write(f"\n## {result['what']}\n\n`python bench.py {' '.join(sys.argv[1:])}`: medians of {args.runs} runs,"
                   f" alternately; {machine}; {', '.join(f'{k} {v}' for k, v in versions.items())}.\n\n"
                   f"| | {ours} | {peer} | {which} (smallest to largest) |\n| --- | --- | --- | --- |\n"
                   + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
