"""Makes pictures: from a prompt, or from pictures with a trained translator.

    python sample.py                                     # a page of what the embedded base, tiny-turbo, does
    python sample.py "a red house and a blue car on grass at night in the snow"
    python sample.py "a cat on a sofa" --base stabilityai/sd-turbo
    python sample.py "a cat on a sofa" --base sd15 --steps 25 --guidance 7.5
    python sample.py "a cat on a sofa" --base yoso512
    python sample.py "a cat on a sofa" --merge "yoso512 + pixart1024 - pixart512" --save FOLDER
    python sample.py "a cat on a sofa" --base model.safetensors --lora FILE:0.8 --sampler lcm --steps 2 --guidance 1.5
    python sample.py "a cat on a sofa" --base sd15 --controlnet lllyasviel/sd-controlnet-canny --control_image edges.png
    python sample.py "a cat on a sofa" --base sd-turbo --input photo.jpg --strength 0.6
    python sample.py "a cat on a sofa" --checkpoint runs/YOSO
    python sample.py --checkpoint runs/NAME --input picture.png "a cat"
    python sample.py --checkpoint edge_to_image --input photo.jpg --preprocess canny "a cat" --output cat.png
    python sample.py --checkpoint day_to_night --input photo.jpg --output night.png
    python sample.py --checkpoint runs/NAME --direction b2a --input FOLDER --output FOLDER2
    python sample.py --checkpoint day2night --input picture.png --export night.pt2

Noise is drawn on the CPU, picture i with its own generator of seed + i (all files of an input folder use the same
seed): the same seed gives the same picture on every device, in every batch. Paths of what was written go to stdout."""

import argparse
import io
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

import training
from dataset import folders
from dataset.pictures import SUFFIXES, canny, open_picture, pad_to_multiple, sketch, to_picture, to_tensor
from files import bases, checkpoints, hub
from models import controlnet, diffusion, vae

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16,
          "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
Batches = Iterator[tuple[list[pathlib.Path], Tensor, list[int]]]  # where they go, pictures, their seeds
# By their names: which timesteps they take.
SAMPLERS: dict[str, Callable[[diffusion.Schedule, int], list[int]]] = {
    "ddim": diffusion.timesteps, "lcm": diffusion.lcm_timesteps, "dpm": diffusion.dpm_timesteps}
# What has a meaning for one of the two uses alone.
OF_A_PROMPT = ("n", "steps", "sampler", "prediction_type", "guidance", "negative", "size", "prior", "merge", "save",
               "lora", "controlnet", "control_image", "control_scale")
OF_A_CHECKPOINT = ("direction", "r", "skip_scale")
OF_A_PICTURE = ("strength", "preprocess", "low_threshold", "high_threshold")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw; a checkpoint that knows its caption needs none")
    add("--base", help="a diffusers folder, a one-file checkpoint, a Hub id, or "
        f"{', '.join(hub.BASES)} [tiny-turbo; the checkpoint's own]")
    add("--merge", metavar="'A + B - C'", help="in place of --base: the sum of bases' denoisers, tensor by tensor")
    add("--lora", action="append", metavar="FILE[:SCALE]", help="added to the base; may be given several times")
    add("--controlnet", help="a ControlNet's folder or Hub id, for what --control_image shows")
    add("--control_image", type=pathlib.Path, help="edges, depth, poses: what the ControlNet was trained for")
    add("--control_scale", type=float, default=1.0, help="how much of the ControlNet is added [1]")
    add("--prior", type=pathlib.Path, help="begin at noised latents of these statistics (python data.py prior)")
    add("--save", type=pathlib.Path, help="also write the base with its LoRA as a folder in the diffusers layout,"
        " and a one-step generator's prior into it")
    add("--checkpoint", help="what a trainer made: model.safetensors, a run's folder; or an official .pkl or its name: "
        + ", ".join(checkpoints.CHECKPOINTS))
    add("--input", type=pathlib.Path, help="a picture or a folder of pictures to translate or, without a checkpoint,"
        " to edit")
    add("--output", type=pathlib.Path, help="a .png file, or a folder [out.png, for several pictures out/]")
    add("--seed", type=int, default=42)
    add("--n", type=int, default=1, help="pictures of the prompt [1]")
    add("--steps", type=int, default=1, help="network evaluations [1]")
    add("--sampler", choices=SAMPLERS, help="[the one of the base's scheduler, ddim for others]")
    add("--prediction_type", choices=diffusion.KINDS, help="what the network predicts [what the base says]")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance; none up to 1 [1]")
    add("--negative", default="", help="what guidance leads away from")
    add("--size", help="N or WIDTHxHEIGHT of a picture from a prompt [the base's, or that of the"
        " checkpoint's training]")
    add("--direction", choices=["a2b", "b2a"], help="between two domains [the released file's own, or a2b]")
    add("--r", type=float, help="stochastic translators: 1 follows the input, 0 the noise [0.4]")
    add("--strength", type=float, help="how much of a checkpoint's trained change is"
        " applied; of editing, how much noise: at 1 nothing of the input is left [1, of editing 0.6]")
    add("--skip_scale", type=float, default=1.0, help="gamma, the strength of the skips [1]")
    add("--preprocess", choices=["canny", "sketch"], help="what is done to an input or control picture first")
    add("--low_threshold", type=float, default=100, help="of canny [100]")
    add("--high_threshold", type=float, default=200, help="of canny [200]")
    add("--batch", type=int, default=1, help="pictures at a time [1]")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of the networks [bf16 where the processor computes"
        " in it and the picture keeps 40 dB, else float32]")
    add("--tile", type=int, help="pixels: translate, or decode, larger pictures by overlapping squares of this side")
    add("--compile", action="store_true", help="the networks by torch.compile: minutes once, then faster")
    add("--export", type=pathlib.Path, help="also write the translation with this caption as a program, for this"
        " device and the input's size, rounded up to the VAE's factor: torch.export.load(FILE).module()(x) takes"
        " [1, 3, H, W] in [0, 1] and, with r, noise")
    args = training.parse_args(parser, argv)
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses flags that do not go together. Sets what follows from them: translator, page, strength."""
    args.translator = bool(args.checkpoint) and checkpoints.checkpoint_kind(args.checkpoint) != "yoso"
    if (args.translator and not args.input) or (args.input and not args.translator and args.prompt is None):
        raise ValueError("a translator (--checkpoint) and --input belong together; expected both, or a prompt to edit"
                         " the input by")
    args.page = all(getattr(args, name) == parser.get_default(name) for name in vars(args)
                    if name not in ("output", "seed", "device", "dtype", "compile", "translator"))
    if not args.translator and args.prompt is None and args.save is None and not args.page:
        raise ValueError('nothing to draw: expected a prompt, as in python sample.py "a cat on a sofa"')
    if (args.controlnet is None) != (args.control_image is None):
        raise ValueError("--controlnet and --control_image belong together; expected both")
    if args.save and args.save.exists() and not (args.save.is_dir() and not any(args.save.iterdir())):
        raise ValueError(f"--save {args.save}: there is something already; expected a new or an empty folder")
    if args.base and args.merge:
        raise ValueError("--merge names its bases; leave --base out")
    unused = {"with a translator": OF_A_PROMPT if args.translator else (),
              "without a translator": () if args.translator else (*OF_A_CHECKPOINT, "export"),
              "for a folder": ("export",) if args.input and args.input.is_dir() else (),
              "with --export": ("tile", "compile") if args.export else (),
              "with --checkpoint": ("merge", "prior", "prediction_type") if args.checkpoint else (),
              "without a translator or --control_image": () if args.translator or args.control_image else
              OF_A_PICTURE[1:],
              "without --preprocess canny": OF_A_PICTURE[2:] if args.preprocess != "canny" else (),
              "without --controlnet": ("control_scale",) if args.controlnet is None else (),
              "without a --guidance above 1": ("negative",) if args.guidance <= 1 else (),
              "with --input": ("n", "size", "prior") if args.input else (),
              "without --input or --checkpoint": () if args.input or args.checkpoint else ("strength",)}
    for where, names in unused.items():
        for name in names:
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--{name} has no meaning {where}; leave it out")
    if args.strength is None:
        args.strength = 0.6 if args.input and not args.translator else 1.0
    if not args.translator and (args.input or not args.checkpoint) and not 0 < args.strength <= 1:
        raise ValueError(f"--strength {args.strength}: expected a number above 0, up to 1")
    if args.r is not None and not 0 <= args.r <= 1:
        raise ValueError(f"--r {args.r}: expected a number from 0 to 1")


# ------------------------------------------------------------------------------------------------------- what comes out

def is_file(output: pathlib.Path) -> bool:
    """Whether --output names one picture, not a folder."""
    if output.suffix.lower() in SUFFIXES - {".png"} and not output.is_dir():
        raise ValueError(f"--output {output}: pictures are written as PNG; expected a name ending in .png, or a folder")
    return output.suffix.lower() == ".png" and not output.is_dir()


def save(picture: Tensor, path: pathlib.Path, args: argparse.Namespace, **facts) -> None:
    """An 8-bit PNG that says how it was made; its path on stdout."""
    try:
        version = metadata.version("one-step-diffusion")
    except metadata.PackageNotFoundError:
        version = "source"
    names = OF_A_CHECKPOINT if args.translator else OF_A_PROMPT
    names += OF_A_PICTURE if args.input or args.control_image else ()
    facts |= {name: getattr(args, name) for name in names}
    text = PngImagePlugin.PngInfo()
    for key, value in {"prompt": args.prompt, **facts, "dtype": args.dtype, "version": version}.items():
        if value is not None:
            text.add_itxt(key, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = to_picture(picture.float().cpu())
    training.write_file(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=text))
    print(path)


def ahead(items: Iterator) -> Iterator:
    """The same items, each made in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def save_all(batches: Batches, args: argparse.Namespace, base: str, several: bool) -> None:
    """Each batch is written while the next is made."""
    for paths, pictures, seeds in tqdm(ahead(batches), disable=not several, unit="batch"):
        for path, picture, seed in zip(paths, pictures, seeds):
            save(picture, path, args, seed=seed, base=base, checkpoint=args.checkpoint)


# ------------------------------------------------------------------------------------------------------ types and speed

def computes_in_bf16(device: torch.device) -> bool:
    """Whether the processor itself does; elsewhere bf16 is slower than float32. A PyTorch that cannot tell: no."""
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) or (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def quicken(args: argparse.Namespace, device: torch.device, vaes: list[nn.Module], denoiser: nn.Module,
            one_epsilon: bool, graphs: Iterable[nn.Module]) -> None:
    """--dtype auto, channels_last, and --compile of each of `graphs`. A denoiser in bf16 loses too much where x0 comes
    of one epsilon, whose errors 1 / alpha multiplies: in bf16 tiny-sd's pictures are 37 dB from float32's, whichever
    layer is left in float32; in float16, with three bits more, 59 dB; with bf16 in the VAE alone 60 dB."""
    if args.dtype == "auto" and not computes_in_bf16(device):
        args.dtype = "float32"
    elif args.dtype == "auto":
        fine = "float16" if device.type == "cuda" else "float32"  # float16 is slow on a CPU
        for network in vaes:
            network.to(torch.bfloat16)
        denoiser.to(DTYPES[fine] if one_epsilon else torch.bfloat16)
        args.dtype = f"bf16, denoiser {fine}" if one_epsilon else "bf16"
    # float32 stays mapped from its file. Group norms on a GPU take channels_last apart again, but not when compiled.
    for network in (*vaes, denoiser) if args.dtype != "float32" and (device.type == "cpu" or args.compile) else ():
        network.to(memory_format=torch.channels_last)
    for network in graphs if args.compile else ():  # once for each size of picture; on a GPU as CUDA graphs
        network.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)


# ---------------------------------------------------------------------------------------------------- text to picture

@dataclass
class Control:
    """A ControlNet and its condition [1, 3, H, W] in [0, 1], as large as the picture."""
    network: controlnet.ControlNet
    condition: Tensor
    scale: float = 1.0


def bind(base: bases.Base, contexts: tuple[Tensor, ...], guidance: float, control: Control | None
         ) -> diffusion.Model:
    """The network as the samplers call it: all but the latent and the timestep is bound. The contexts are of what is
    wanted and, for guidance above 1, of what is not."""
    n, dtype = 2 if guidance > 1 else 1, next(base.denoiser.parameters()).dtype

    def predict(x: Tensor, t: int) -> Tensor:
        h, w = x.shape[-2:]
        each = [context[:n].repeat_interleave(len(x), dim=0).to(dtype) for context in contexts]
        x = x.repeat(n, 1, 1, 1).to(dtype)
        t = torch.full((len(x),), t, device=x.device)  # as a number it would be compiled anew for each
        if base.transformer:
            size = torch.tensor([[h, w]], device=x.device).expand(len(x), 2) * base.vae.factor
            return base.transformer(x, t, *each, size, size[:, :1] / size[:, 1:])
        condition = control and control.condition.expand(len(x), -1, -1, -1)
        residuals = control and control.network(x, t, *each, condition, control.scale)
        return base.unet(x, t, *each, residuals)

    def guided(x: Tensor, t: int) -> Tensor:
        if n == 1:
            return predict(x, t)
        wanted, unwanted = predict(x, t).chunk(2)
        return unwanted + guidance * (wanted - unwanted)

    return guided


@torch.inference_mode()
def text_to_image(base: bases.Base, prompt: str, seeds: list[int], size: tuple[int, int], steps: int = 1,
                  sampler: str = "ddim", guidance: float = 1.0, negative: str = "", *, control: Control | None = None,
                  prior: tuple[Tensor, Tensor] | None = None, pictures: Tensor | None = None, strength: float = 1.0,
                  contexts: tuple[Tensor, ...] | None = None, tile: int | None = None) -> Tensor:
    """Pictures [len(seeds), 3, H, W] in [-1, 1] of one prompt; size is (width, height). `pictures`, as many in [0, 1]
    and of that size, are edited: noised to the level `strength`. `contexts`: of prompt and, for guidance, negative, if
    known. The VAE works by squares of `tile` pixels."""
    schedule, factor, like = base.schedule, base.vae.factor, next(base.denoiser.parameters())
    fine = dict(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))  # of all between the networks
    model = bind(base, contexts or base.encode([prompt, negative][:1 + (guidance > 1)]), guidance, control)
    shape = (base.denoiser.config.in_channels, size[1] // factor, size[0] // factor)
    side = (tile or max(size)) // factor
    noise, generators = training.draw_noise(seeds, shape)

    def again() -> Tensor:  # the next draw of each generator
        return torch.cat([torch.randn(1, *shape, generator=g) for g in generators]).to(**fine)

    noise, ts = noise.to(**fine), SAMPLERS[sampler](schedule, steps)
    if pictures is not None and strength < 1:
        ts = diffusion.at_strength(ts, strength)
        z = vae.tiled(lambda x: base.vae.encode(2 * x - 1)[0], [pictures.to(**fine)], shape[1:], side)
        z = z * base.vae.config.scaling_factor
        x = diffusion.add_noise(z, noise, ts[0], schedule)
    elif prior:
        x = diffusion.start_from_prior(noise, again(), *prior, ts[0], schedule)
    else:
        x = diffusion.start(noise, ts[0], schedule)
    if sampler == "lcm":
        z = diffusion.lcm(model, x, ts, schedule, again)
    else:
        z = (diffusion.dpm if sampler == "dpm" else diffusion.ddim)(model, x, ts, schedule)
    return vae.tiled(base.vae.decode, [z / base.vae.config.scaling_factor], shape[1:], side).clamp(-1, 1)


def load(args: argparse.Namespace, device: torch.device) -> bases.Base:
    """The base, merged, with its LoRA, or a one-step generator; written where --save says. Sets sampler and prior."""
    how = dict(dtype=DTYPES.get(args.dtype, torch.float32), device=str(device))
    name = args.base or "tiny-turbo"
    if args.checkpoint:
        strength = 1.0 if args.input else args.strength  # of an edit it is the noise
        base, args.own_prior = checkpoints.load_yoso(checkpoints.find_checkpoint(args.checkpoint), args.base, **how,
                                                 strength=strength)
    elif args.merge:
        base = bases.load_merged(args.merge, **how)
    else:
        base = bases.load_base(name, bases.parts_of(name), **how)
    if args.prediction_type:
        base.schedule = diffusion.Schedule.from_config(base.schedule.config | {"prediction_type": args.prediction_type})
    for spec in args.lora or []:
        bases.load_lora(spec, base)
    if args.controlnet and base.unet is None:
        raise ValueError(f"--controlnet steers a U-Net, and {base.name} is PixArt; expected a Stable Diffusion base")
    if args.save:
        bases.save_folder(args.save, base)
        print(args.save)
        if args.checkpoint and base.schedule.alpha[-1] > 0:
            bases.save_prior(args.save / "prior.safetensors", *args.own_prior)
            print(args.save / "prior.safetensors")
    known = {"LCM": "lcm", "DPM": "dpm"}  # by the begin of the scheduler's class
    args.sampler = args.sampler or known.get(base.schedule.config.get("_class_name", "")[:3], "ddim")
    graphs = base.denoiser, *(part for name, part in base.vae.named_children() if name in ("encoder", "decoder"))
    one_epsilon = args.steps == 1 and base.schedule.prediction_type == "epsilon"
    quicken(args, device, [base.vae], base.denoiser, one_epsilon, graphs)
    return base


def parse_size(text: str | None, base: bases.Base) -> tuple[int, int]:
    """(width, height)."""
    multiple = base.multiple
    sides = str(text or base.denoiser.config.sample_size * base.vae.factor).lower().split("x")
    if len(sides) > 2 or not all(s.isdigit() and int(s) > 0 and int(s) % multiple == 0 for s in sides):
        raise ValueError(f"--size {text}: expected N or WIDTHxHEIGHT, multiples of {multiple}, as in 512 or 512x768")
    return int(sides[0]), int(sides[-1])


def read_condition(args: argparse.Namespace, base: bases.Base, size: tuple[int, int] | None) -> Tensor:
    """--control_image [1, 3, H, W] in [0, 1], scaled to a size (width, height) if one is given, else padded."""
    picture = preprocess(open_picture(args.control_image), args)
    picture = picture.resize(size, Image.Resampling.LANCZOS) if size else picture
    return pad_to_multiple(to_tensor(picture)[None], base.multiple)[0].to(next(base.unet.parameters()))


def load_control(args: argparse.Namespace, base: bases.Base, size: tuple[int, int] | None) -> Control | None:
    if args.controlnet is None:
        return None
    condition = read_condition(args, base, size)
    network = bases.load_controlnet(args.controlnet, base.unet, condition.dtype, str(condition.device))
    return Control(network, condition, args.control_scale)


def draw(args: argparse.Namespace, device: torch.device) -> None:
    output, several = args.output or pathlib.Path("out" if args.n > 1 else "out.png"), args.n > 1
    one = is_file(output)
    if one and several:
        raise ValueError(f"--output {output} is one file for {args.n} pictures; expected a folder")
    picture = open_picture(args.control_image) if args.control_image else None
    base = load(args, device)
    if args.prompt is None:
        return
    if args.checkpoint and not args.size:  # as large as it was trained
        h, w = (base.vae.factor * side for side in args.own_prior[0].shape[1:])
        args.size = f"{w}x{h}"
    control = load_control(args, base, parse_size(args.size, base) if args.size else None)
    size = parse_size(args.size, base) if control is None else tuple(control.condition.shape[:1:-1])
    W, H = size if args.size or control is None else picture.size
    shape = (base.denoiser.config.in_channels, size[1] // base.vae.factor, size[0] // base.vae.factor)
    prior = bases.load_prior(args.prior, shape) if args.prior else None
    if args.checkpoint and base.schedule.alpha[-1] > 0:  # else one step begins at pure noise, of any size
        prior = args.own_prior
        if prior[0].shape != shape:
            h, w = (base.vae.factor * side for side in prior[0].shape[1:])
            raise ValueError(f"--size {args.size}: {args.checkpoint} was trained to begin at pictures of {w}x{h};"
                             " expected that size")
    contexts = base.encode([args.prompt, args.negative][:1 + (args.guidance > 1)])
    base.text_encoder = None  # T5 is larger than all the rest

    def batches() -> Batches:
        for first in range(args.seed, args.seed + args.n, args.batch):
            seeds = list(range(first, min(first + args.batch, args.seed + args.n)))
            made = text_to_image(base, args.prompt, seeds, size, args.steps, args.sampler, args.guidance,
                                 args.negative, control=control, prior=prior, contexts=contexts, tile=args.tile)
            yield [output if one else output / f"{seed}.png" for seed in seeds], made[:, :, :H, :W].cpu(), seeds

    save_all(batches(), args, base.name, several)


def edit(args: argparse.Namespace, device: torch.device) -> None:
    """Pictures of --input drawn anew from their latents with noise of the level --strength."""
    targets, base = plan(args), load(args, device)
    control = load_control(args, base, None)
    contexts = base.encode([args.prompt, args.negative][:1 + (args.guidance > 1)])
    base.text_encoder = None

    def batches() -> Batches:
        for paths, pictures in ahead(read_batches([*targets], args)):
            x, (H, W) = pad_to_multiple(torch.stack([to_tensor(p) for p in pictures]), base.multiple)
            size, seeds = tuple(x.shape[:1:-1]), [args.seed] * len(x)
            if control:
                control.condition = read_condition(args, base, size)
            made = text_to_image(base, args.prompt, seeds, size, args.steps, args.sampler, args.guidance,
                                 args.negative, control=control, pictures=x.to(device), strength=args.strength,
                                 contexts=contexts, tile=args.tile)
            yield [targets[path] for path in paths], made[:, :, :H, :W].cpu(), seeds

    save_all(batches(), args, base.name, len(targets) > 1)


def draw_page(args: argparse.Namespace, device: torch.device) -> None:
    """What the embedded base does in one step, on one page."""
    from tiny import page
    picture = page.draw(load(args, device), args.sampler, args.seed)
    args.prompt = "twelve captions and four translations"
    save(picture, args.output or pathlib.Path("out.png"), args, seed=args.seed, base="tiny-turbo")


# ------------------------------------------------------------------------------------------------- picture to picture

def preprocess(picture: Image.Image, args: argparse.Namespace) -> Image.Image:
    if args.preprocess == "canny":
        return canny(picture, args.low_threshold, args.high_threshold)
    return sketch(picture) if args.preprocess == "sketch" else picture


def read_batches(paths: list[pathlib.Path], args: argparse.Namespace
                 ) -> Iterator[tuple[list[pathlib.Path], list[Image.Image]]]:
    """Prepared pictures of one size, up to --batch at a time. Files that cannot be read are an error at the end."""
    group, problems = [], []
    for path in paths:
        try:
            picture = open_picture(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        picture = preprocess(picture, args) if args.translator else picture
        if group and (len(group) == args.batch or picture.size != group[0][1].size):
            yield tuple(map(list, zip(*group)))
            group = []
        group.append((path, picture))
    if group:
        yield tuple(map(list, zip(*group)))
    if problems:
        raise ValueError("; ".join(problems))


class Translator(nn.Module):
    """A generator with all but pictures [B, 3, H, W] in [0, 1] and, with r, noise given."""

    def __init__(self, model: checkpoints.LoadedGenerator, context: Tensor, r: float | None, skip_scale: float,
                 direction: str | None):
        super().__init__()
        self.generator, self.r, self.skip_scale = model.generator, r, skip_scale
        self.direction = direction if model.kind == "cyclegan_turbo" else None
        self.register_buffer("context", context)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        words = self.context.expand(len(x), -1, -1)
        if self.direction:
            return self.generator(2 * x - 1, words, self.direction, self.skip_scale)
        return self.generator(x, words, self.r, noise, self.skip_scale)


@torch.inference_mode()
def translate_pictures(model: checkpoints.LoadedGenerator, pictures: list[Image.Image], context: Tensor, seed: int, r: float | None,
                       skip_scale: float = 1.0, direction: str | None = None, tile: int | None = None,
                       export: pathlib.Path | None = None) -> Tensor:
    """Pictures of any one size, padded to the VAE's factor, translated, by squares of `tile` pixels where they are
    larger, cut back: [B, 3, H, W] in [-1, 1]. The program that did it goes to `export`."""
    factor, channels = model.generator.vae.factor, model.generator.unet.config.in_channels
    x, (H, W) = pad_to_multiple(torch.stack([to_tensor(p) for p in pictures]).to(context.device), factor)
    size = x.shape[2] // factor, x.shape[3] // factor
    inputs = [x] if r is None else [x, training.draw_noise([seed] * len(x), (channels, *size))[0].to(x)]

    translator = Translator(model, context, r, skip_scale, direction)
    if export:
        translator.to(memory_format=torch.contiguous_format)  # others cannot be saved on a GPU
        program = torch.export.export(translator, tuple(inputs))
        torch.export.save(program, contents := io.BytesIO())  # which takes names in .pt2 alone
        training.write_file(export, lambda temporary: temporary.write_bytes(contents.getbuffer()))
        print(export)
    return vae.tiled(translator, inputs, size, (tile or max(x.shape)) // factor)[:, :, :H, :W]


def plan(args: argparse.Namespace) -> dict[pathlib.Path, pathlib.Path]:
    """Input pictures, and where each one's translation goes."""
    if not args.input.is_dir():
        open_picture(args.input)  # a bad file is known before the networks are loaded
        output = args.output or pathlib.Path("out.png")
        targets = {args.input: output if is_file(output) else output / f"{args.input.stem}.png"}
    else:
        paths = [args.input / name for name in folders.pictures_in(args.input)]
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
    targets = plan(args)
    model = checkpoints.load_generator(args.checkpoint, args.base, DTYPES.get(args.dtype, torch.float32), str(device),
                                   args.r, args.strength)
    vaes = [part for name, part in model.generator.named_children() if name.startswith("vae")]
    one_epsilon = model.generator.config.prediction_type == "epsilon"
    quicken(args, device, vaes, model.generator.unet, one_epsilon, [model.generator])
    if model.kind == "cyclegan_turbo":
        _, own, caption = next((released for name, released in checkpoints.CHECKPOINTS.items()
                                if args.checkpoint == name or pathlib.Path(args.checkpoint).name == released[0]),
                               (None, None, None))
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
    with torch.no_grad():
        context = model.text_encoder(model.tokenizer(args.prompt).to(device)).to(model.generator.unet.conv_in.weight)

    def batches() -> Batches:
        for paths, pictures in ahead(read_batches([*targets], args)):
            made = translate_pictures(model, pictures, context, args.seed, model.r, args.skip_scale, args.direction,
                                      args.tile, args.export)
            yield [targets[path] for path in paths], made.cpu(), [args.seed] * len(paths)

    save_all(batches(), args, model.base, len(targets) > 1)


def main() -> None:
    args = parse()
    device = training.pick_device(args.device)
    (draw_page if args.page else translate if args.translator else edit if args.input else draw)(args, device)


if __name__ == "__main__":
    training.run(main)
