"""Makes pictures: from a prompt, or from pictures with a trained translator.

    python sample.py "a cat on a sofa" --base stabilityai/sd-turbo
    python sample.py "a cat on a sofa" --base sd15 --steps 25 --guidance 7.5
    python sample.py --checkpoint runs/NAME --input picture.png "a cat"
    python sample.py --checkpoint edge_to_image --input photo.jpg --preprocess canny "a cat" --output cat.png
    python sample.py --checkpoint day_to_night --input photo.jpg --output night.png
    python sample.py --checkpoint runs/NAME --direction b2a --input FOLDER --output FOLDER2

Noise is drawn on the CPU, picture i with its own generator of seed + i (all files of an input folder use the same
seed): the same seed gives the same picture on every device, in every batch. Paths of what was written go to stdout.
"""

import argparse
import pathlib
from collections.abc import Iterator
from importlib import metadata

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

import data
import training
from models import diffusion, weights

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16,
          "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
# What has a meaning for one of the two uses alone.
OF_A_PROMPT = ("n", "steps", "sampler", "guidance", "negative", "size")
OF_A_CHECKPOINT = ("direction", "r", "strength", "skip_scale", "preprocess", "low_threshold", "high_threshold")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw; a checkpoint that knows its caption needs none")
    add("--base", help=f"a diffusers folder, a Hub id, or {', '.join(weights.BASES)} [sd-turbo; the checkpoint's own]")
    add("--checkpoint", help="a trained translator: model.safetensors, a run's folder, an official .pkl or its name: "
        + ", ".join(weights.CHECKPOINTS))
    add("--input", type=pathlib.Path, help="a picture or a folder of pictures to translate")
    add("--output", type=pathlib.Path, help="a .png file, or a folder [out.png, for several pictures out/]")
    add("--seed", type=int, default=42)
    add("--n", type=int, default=1, help="pictures of the prompt [1]")
    add("--steps", type=int, default=1, help="network evaluations [1]")
    add("--sampler", choices=["ddim", "lcm"], default="ddim")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance; none up to 1 [1]")
    add("--negative", default="", help="what guidance leads away from")
    add("--size", help="N or WIDTHxHEIGHT of a picture from a prompt [the base's]")
    add("--direction", choices=["a2b", "b2a"], help="between two domains [the released file's own, or a2b]")
    add("--r", type=float, help="stochastic translators: 1 follows the input, 0 the noise [0.4]")
    add("--strength", type=float, default=1.0, help="how much of the trained change is applied [1]")
    add("--skip_scale", type=float, default=1.0, help="gamma, the strength of the skips [1]")
    add("--preprocess", choices=["canny", "sketch"], help="what is done to an input picture first")
    add("--low_threshold", type=float, default=100, help="of canny [100]")
    add("--high_threshold", type=float, default=200, help="of canny [200]")
    add("--batch", type=int, default=1, help="pictures at a time [1]")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", choices=DTYPES, default="float32", help="of the networks")
    args = training.parse_args(parser, argv)
    if (args.checkpoint is None) != (args.input is None):
        raise ValueError("--checkpoint and --input belong together; expected a translator and what it translates")
    if args.checkpoint is None and args.prompt is None:
        raise ValueError('nothing to draw: expected a prompt, as in python sample.py "a cat on a sofa"')
    for name in OF_A_PROMPT if args.checkpoint else OF_A_CHECKPOINT:
        if getattr(args, name) != parser.get_default(name):
            where = "with" if args.checkpoint else "without"
            raise ValueError(f"--{name} has no meaning {where} --checkpoint; leave it out")
    for name, low in [("n", 1), ("steps", 1), ("batch", 1), ("seed", 0)]:
        if getattr(args, name) < low:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {low} or more")
    if args.r is not None and not 0 <= args.r <= 1:
        raise ValueError(f"--r {args.r}: expected a number from 0 to 1")
    return args


# ------------------------------------------------------------------------------------------------------- what comes out


def is_file(output: pathlib.Path) -> bool:
    """Whether --output names one picture, not a folder."""
    if output.suffix.lower() in data.SUFFIXES - {".png"} and not output.is_dir():
        raise ValueError(f"--output {output}: pictures are written as PNG; expected a name ending in .png, or a folder")
    return output.suffix.lower() == ".png" and not output.is_dir()


def save(picture: Tensor, path: pathlib.Path, args: argparse.Namespace, **facts) -> None:
    """An 8-bit PNG that says how it was made; its path on stdout."""
    try:
        version = metadata.version("one-step-diffusion")
    except metadata.PackageNotFoundError:
        version = "source"
    facts |= {name: getattr(args, name) for name in (OF_A_CHECKPOINT if args.checkpoint else OF_A_PROMPT)}
    text = PngImagePlugin.PngInfo()
    for key, value in {"prompt": args.prompt, **facts, "dtype": args.dtype, "version": version}.items():
        if value is not None:
            text.add_itxt(key, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = data.to_picture(picture.float().cpu())
    training.write_file(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=text))
    print(path)


# ---------------------------------------------------------------------------------------------------- text to picture


def draw_noise(seeds: list[int], shape: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
    """One generator a seed, and the first draw [len(seeds), *shape] of each, in float32 on the CPU."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randn(1, *shape, generator=g) for g in generators]), generators


@torch.inference_mode()
def text_to_image(base: weights.Base, prompt: str, seeds: list[int], size: tuple[int, int], steps: int = 1,
                  sampler: str = "ddim", guidance: float = 1.0, negative: str = "") -> Tensor:
    """Pictures [len(seeds), 3, H, W] in [-1, 1] of one prompt; size is (width, height)."""
    like, schedule, factor = base.unet.conv_in.weight, base.schedule, base.vae.factor
    context = base.text_encoder(base.tokenizer([prompt, negative]).to(like.device))  # [2, 77, C]

    def model(x: Tensor, t: int) -> Tensor:
        if guidance <= 1:
            return base.unet(x, t, context[:1].expand(len(x), -1, -1))
        wanted, unwanted = base.unet(torch.cat([x, x]), t, context.repeat_interleave(len(x), dim=0)).chunk(2)
        return unwanted + guidance * (wanted - unwanted)

    shape = (base.unet.config.in_channels, size[1] // factor, size[0] // factor)
    noise, generators = draw_noise(seeds, shape)
    ts = (diffusion.lcm_timesteps if sampler == "lcm" else diffusion.timesteps)(schedule, steps)
    x = diffusion.start(noise, ts[0], schedule).to(like)
    if sampler == "lcm":
        z = diffusion.lcm(model, x, ts, schedule,
                          lambda: torch.cat([torch.randn(1, *shape, generator=g) for g in generators]).to(like))
    else:
        z = diffusion.ddim(model, x, ts, schedule)
    return base.vae.decode(z / base.vae.config.scaling_factor).clamp(-1, 1)


def parse_size(text: str | None, base: weights.Base) -> tuple[int, int]:
    """(width, height)."""
    factor = base.vae.factor
    sides = str(text or base.unet.config.sample_size * factor).lower().split("x")
    if len(sides) > 2 or not all(s.isdigit() and int(s) > 0 and int(s) % factor == 0 for s in sides):
        raise ValueError(f"--size {text}: expected N or WIDTHxHEIGHT, multiples of {factor}, as in 512 or 512x768")
    return int(sides[0]), int(sides[-1])


def draw(args: argparse.Namespace, device: torch.device) -> None:
    output, several = args.output or pathlib.Path("out" if args.n > 1 else "out.png"), args.n > 1
    one = is_file(output)
    if one and several:
        raise ValueError(f"--output {output} is one file for {args.n} pictures; expected a folder")
    base = weights.load_base(args.base or "sd-turbo", dtype=DTYPES[args.dtype], device=str(device))
    size = parse_size(args.size, base)
    for first in tqdm(range(0, args.n, args.batch), disable=not several, unit="batch"):
        seeds = [args.seed + i for i in range(first, min(first + args.batch, args.n))]
        pictures = text_to_image(base, args.prompt, seeds, size, args.steps, args.sampler, args.guidance, args.negative)
        for picture, seed in zip(pictures, seeds):
            save(picture, output if one else output / f"{seed}.png", args, seed=seed, base=base.name)


# ------------------------------------------------------------------------------------------------- picture to picture


def read_batches(paths: list[pathlib.Path], args: argparse.Namespace, problems: list[str]
                 ) -> Iterator[tuple[list[pathlib.Path], list[Image.Image]]]:
    """Prepared pictures of one size, up to --batch at a time. A file that cannot be read is a line in `problems`."""
    group: list[tuple[pathlib.Path, Image.Image]] = []
    for path in paths:
        try:
            picture = data.open_picture(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        if args.preprocess == "canny":
            picture = data.canny(picture, args.low_threshold, args.high_threshold)
        elif args.preprocess == "sketch":
            picture = data.sketch(picture)
        if group and (len(group) == args.batch or picture.size != group[0][1].size):
            yield tuple(map(list, zip(*group)))
            group = []
        group.append((path, picture))
    if group:
        yield tuple(map(list, zip(*group)))


@torch.inference_mode()
def translate_pictures(model: weights.Loaded, pictures: list[Image.Image], context: Tensor, seed: int, r: float | None,
                       skip_scale: float = 1.0, direction: str | None = None) -> Tensor:
    """Pictures of any one size, padded to the VAE's factor, translated, cut back: [B, 3, H, W] in [-1, 1]."""
    like, factor = next(model.generator.parameters()), model.generator.vae.factor
    x, (H, W) = data.pad_to_multiple(torch.stack([data.to_tensor(p) for p in pictures]).to(like), factor)
    if model.kind == "cyclegan_turbo":
        return model.generator(2 * x - 1, context.expand(len(x), -1, -1), direction, skip_scale)[:, :, :H, :W]
    shape = (model.generator.unet.config.in_channels, x.shape[2] // factor, x.shape[3] // factor)
    noise = None if r is None else draw_noise([seed] * len(x), shape)[0].to(like)
    return model.generator(x, context.expand(len(x), -1, -1), r, noise, skip_scale)[:, :, :H, :W]


def plan(args: argparse.Namespace) -> dict[pathlib.Path, pathlib.Path]:
    """Input pictures, and where each one's translation goes."""
    if not args.input.is_dir():
        data.open_picture(args.input)  # a bad file is known before the networks are loaded
        output = args.output or pathlib.Path("out.png")
        targets = {args.input: output if is_file(output) else output / f"{args.input.stem}.png"}
    else:
        paths = sorted(p for p in args.input.iterdir() if p.suffix.lower() in data.SUFFIXES and p.name[0] != ".")
        if not paths:
            raise ValueError(f"--input {args.input} holds no picture; expected files ending in"
                             f" {', '.join(sorted(data.SUFFIXES))}")
        output = args.output or pathlib.Path("out")
        if is_file(output):
            raise ValueError(f"--output {output} is one file for a folder of pictures; expected a folder")
        stems = [p.stem for p in paths]  # of a.jpg and a.png neither may overwrite the other
        targets = {p: output / f"{p.stem if stems.count(p.stem) == 1 else p.name}.png" for p in paths}
    inputs = {path.resolve() for path in targets}
    if over := next((target for target in targets.values() if target.resolve() in inputs), None):
        raise ValueError(f"--output would write over the input {over}; expected another name or folder")
    return targets


def translate(args: argparse.Namespace, device: torch.device) -> None:
    targets, problems = plan(args), []
    model = weights.load_generator(args.checkpoint, args.base, DTYPES[args.dtype], str(device), args.r, args.strength)
    if model.kind == "cyclegan_turbo":
        _, own, caption = weights.CHECKPOINTS.get(args.checkpoint, (None, None, None))
        args.direction = args.direction or own or "a2b"
        known = caption if args.direction == own else None
        if model.prompts:
            known = model.prompts[args.direction == "a2b"]  # a2b goes where b's caption says
    else:
        if args.direction:
            raise ValueError(f"{args.checkpoint} translates one way; leave --direction out")
        known = model.prompts[0] if len(model.prompts) == 1 else None
    args.prompt = known if args.prompt is None else args.prompt
    if args.prompt is None:
        raise ValueError(f'{args.checkpoint} names no caption; expected one: --input {args.input} "..."')
    args.r = model.r
    with torch.inference_mode():
        context = model.text_encoder(model.tokenizer(args.prompt).to(device))
    for paths, pictures in tqdm(read_batches([*targets], args, problems), disable=len(targets) == 1):
        made = translate_pictures(model, pictures, context, args.seed, model.r, args.skip_scale, args.direction)
        for path, picture in zip(paths, made):
            save(picture, targets[path], args, seed=args.seed, base=model.base, checkpoint=args.checkpoint)
    if problems:
        raise ValueError("; ".join(problems))


def main() -> None:
    args = parse()
    device = training.pick_device(args.device)
    (translate if args.checkpoint else draw)(args, device)


if __name__ == "__main__":
    training.run(main)
