"""Draws pictures from a prompt, edits pictures, and translates them with a trained model.

    python sample.py                         # a page of what the embedded base, tiny-turbo, draws
    python sample.py "a red house and a blue car on grass at night in the snow"
    python sample.py "a cat on a sofa" --base stabilityai/sd-turbo
    python sample.py "a cat on a sofa" --base sd15 --steps 25 --guidance 7.5
    python sample.py "a cat on a sofa" --base sd-turbo --vae taesd
    python sample.py "a <cat-toy> on a sofa" --base sd15 --steps 25 --embedding cat-toy.safetensors
    python sample.py "a cat on a sofa" --base yoso512
    python sample.py "a cat" --merge "yoso512 + pixart1024 - pixart512" --save FOLDER
    python sample.py "a cat" --base model.safetensors --lora FILE:0.8 --sampler lcm --steps 2
    python sample.py "a cat" --base sd15 --controlnet lllyasviel/sd-controlnet-canny \\
        --control_image edges.png
    python sample.py "a cat on a sofa" --base sd-turbo --input photo.jpg --strength 0.6
    python sample.py "a cat on a sofa" --checkpoint runs/YOSO
    python sample.py --checkpoint runs/NAME --input picture.png "a cat"
    python sample.py --checkpoint edge_to_image --input photo.jpg --preprocess canny "a cat"
    python sample.py --checkpoint day_to_night --input photo.jpg --output night.png
    python sample.py --checkpoint runs/NAME --direction b2a --input FOLDER --output FOLDER2
    python sample.py --checkpoint day2night --input picture.png --export night.pt2

Noise is drawn on the CPU. Picture i of a prompt has its own generator with seed + i, and all
files of an input folder use the same seed, so a seed gives the same picture on every device and
in every batch. The paths of the files that were written go to stdout. If one input picture of
several fails, the others are still made, and all that failed are named at the end.

--export writes the translation with this caption as a program for this device and the input's
size, rounded up to the VAE's factor. torch.export.load(FILE).module()(x) takes x [1, 3, H, W]
in [0, 1] and, for a stochastic model, noise [1, 4, h, w], and returns a picture in [-1, 1].
"""

import argparse
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import training
from dataset.pictures import canny, open_picture, pad_to_multiple, sketch, to_tensor
from files import autoencoders, bases, checkpoints, embeddings, hub
from models import clip, controlnet, diffusion, t5, vae
from sampling.pace import Pace, at_a_time, parse_tile, timed
from sampling.pictures import (
    Batches,
    check_folders,
    check_overwriting,
    is_png,
    plan_targets,
    save,
    save_all,
    transform_all,
    version,
)
from sampling.precision import DTYPES, amplifies_errors, choose_precision, speed_up

# The timesteps that each sampler visits.
SAMPLERS: dict[str, Callable[[diffusion.Schedule, int], list]] = {
    "ddim": diffusion.timesteps,
    "euler": diffusion.euler_timesteps,
    "lcm": diffusion.lcm_timesteps,
    "dpm": diffusion.dpm_timesteps,
}


# ------------------------------------------------------------------------------------ flags

@dataclass(frozen=True)
class Options:
    """The command line: one flag per field, whose comment is its help text."""

    prompt: str | None = None  # what to draw; not needed where the checkpoint knows its caption
    # networks
    base: str | None = None  # folder, one-file model, Hub id or name [tiny-turbo; the checkpoint's]
    merge: str | None = None  # "A + B - C", in place of --base: sums denoisers tensor by tensor
    lora: list[str] | None = None  # FILE or FILE:SCALE, added to the base; may be repeated
    embedding: list[str] | None = None  # FILE or FILE:TOKEN, a word for prompts; may be repeated
    controlnet: str | None = None  # a ControlNet's folder or Hub id, for --control_image
    control_image: Path | None = None  # edges, depth, poses: what the ControlNet was trained for
    control_scale: float = 1.0  # how strongly the ControlNet steers
    vae: str | None = None  # autoencoder in place of the base's: taesd, a folder, file or Hub id
    prior: Path | None = None  # file of python -m dataset prior: start from noise added to it
    save: Path | None = None  # also write the base, with LoRA and embeddings, as a diffusers folder
    checkpoint: str | None = None  # a trainer's model.safetensors or run folder, a .pkl, or a name
    # pictures
    input: Path | None = None  # picture or folder, to translate or, without a translator, to edit
    output: Path | None = None  # a .png file or a folder [out.png; out/ for several pictures]
    seed: int = 42  # random seed
    n: int = 1  # pictures of the prompt
    steps: int = 1  # network evaluations
    sampler: str | None = None  # how noise is removed [as the base's scheduler does]
    prediction_type: str | None = None  # what the network predicts [what the base says]
    guidance: float = 1.0  # classifier-free guidance; 1 or less: off
    negative: str = ""  # what pictures should not show; with --guidance above 1
    size: str | None = None  # N or WIDTHxHEIGHT [the base's, or that of the checkpoint's training]
    # translating and editing
    direction: str | None = None  # between two domains [the released file's own, or a2b]
    r: float | None = None  # stochastic translators: 1 follows the input, 0 the noise [0.4]
    strength: float | None = None  # how much of the trained change [1]; of an edit, of noise [0.6]
    skip_scale: float = 1.0  # gamma, the strength of the skip connections
    preprocess: str | None = None  # what is done to an input or control picture first
    low_threshold: float = 100  # lower threshold of canny edges
    high_threshold: float = 200  # upper threshold of canny edges
    # computing
    batch: int = 1  # pictures at a time
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # networks' type; auto: bf16 where it is fast and keeps 40 dB PSNR
    tile: str | None = None  # compute in squares of this side, or off [huge ones on a CPU]
    compile: bool = False  # torch.compile the networks: takes minutes once, then faster
    export: Path | None = None  # also write the translation as a program, see above


# The values that a flag may have, where they are few.
CHOICES = {
    "sampler": SAMPLERS,
    "prediction_type": diffusion.PREDICTION_TYPES,
    "direction": ("a2b", "b2a"),
    "preprocess": ("canny", "sketch"),
    "dtype": ("auto", *DTYPES),
}

# Flags that have a meaning for one use only. A PNG lists those of its own use.
PROMPT_FLAGS = (
    "n", "steps", "sampler", "prediction_type", "guidance", "negative", "size", "prior",
    "merge", "save", "lora", "embedding", "controlnet", "control_image", "control_scale", "vae",
)
# Flags of a picture, which have no meaning where only --save is asked for.
DRAWING_FLAGS = (
    "n", "steps", "sampler", "guidance", "negative", "size", "prior", "vae", "controlnet",
    "control_image", "control_scale", "output", "seed", "batch", "tile", "compile",
)
TRANSLATOR_FLAGS = ("direction", "r", "skip_scale")
CANNY_FLAGS = ("low_threshold", "high_threshold")

LARGEST = 2**16  # pixels a side

# Flags with which `python sample.py` still draws its overview page.
PAGE_FLAGS = {"output", "seed", "device", "dtype", "compile"}


def parse(argv: list[str] | None = None) -> Options:
    return Options(**vars(training.parse_args(build_parser(), argv)))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"names for --base: {', '.join(hub.BASES)}\n"
        f"names for --checkpoint: {', '.join(checkpoints.known_names())}\n"
        f"names for --vae: {', '.join(autoencoders.AUTOENCODERS)}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comments = training.field_comments(Options)
    for field in fields(Options):
        text = comments[field.name]
        if field.default not in (None, False, ""):
            text += f" [{field.default}]"

        if field.name == "prompt":
            parser.add_argument("prompt", nargs="?", help=text)
        elif field.name in ("lora", "embedding"):
            parser.add_argument(f"--{field.name}", action="append", help=text)
        elif field.name == "compile":
            parser.add_argument("--compile", action="store_true", help=text)
        else:
            parser.add_argument(
                f"--{field.name}",
                default=field.default,
                choices=CHOICES.get(field.name),
                help=text,
                **training.kind_of(field.type),
            )
    return parser


def changed_flags(options: Options) -> set[str]:
    """The flags that were given another value than their default."""
    changed = set()
    for field in fields(Options):
        if getattr(options, field.name) != field.default:
            changed.add(field.name)
    return changed


def choose_use(options: Options) -> str:
    """What the flags ask for: "translate", "edit", "page" or "draw".

    ValueError if a prompt or an input is missing for that.
    """
    translator = False
    if options.checkpoint:
        translator = checkpoints.checkpoint_kind(options.checkpoint) != "yoso"

    if translator:
        if not options.input:
            raise ValueError(
                f"{options.checkpoint} translates pictures; expected --input, a picture or a folder"
            )
        return "translate"
    if options.input:
        if options.prompt is None:
            raise ValueError(
                f"nothing to do with {options.input}: expected a translator (--checkpoint), or a"
                " prompt to edit it by"
            )
        return "edit"
    if changed_flags(options) <= PAGE_FLAGS:
        return "page"
    if options.prompt is None and options.save is None:
        raise ValueError(
            'nothing to draw: expected a prompt, as in python sample.py "a cat on a sofa"'
        )
    return "draw"


def check_empty(options: Options) -> None:
    """ValueError for a flag with an empty text, as an unset variable of the shell leaves it."""
    for field in fields(Options):
        value = getattr(options, field.name)
        texts = value if isinstance(value, list) else [value]
        if "" in texts and field.name not in ("prompt", "negative"):
            raise ValueError(f"--{field.name} is empty; expected a value, or leave it out")


def check(options: Options, use: str) -> None:
    """ValueError for flags that do not go together, or for a value out of its range."""
    if (options.controlnet is None) != (options.control_image is None):
        raise ValueError("--controlnet and --control_image belong together; expected both")
    if options.save and options.save.exists() and not is_empty_folder(options.save):
        raise ValueError(
            f"--save {options.save} exists and is not an empty folder; expected a new or empty one"
        )
    for name, path in (("save", options.save), ("export", options.export)):
        if path is not None:
            check_folders([path], name)
    if options.base and options.merge:
        raise ValueError("--merge names its bases; leave --base out")

    check_unused(options, use)
    parse_tile(options.tile)

    strength = strength_of(options, use)
    if use == "edit" and not 0 < strength <= 1:
        raise ValueError(f"--strength {strength}: expected a number above 0, up to 1")
    if not 0 <= strength <= 10:
        raise ValueError(f"--strength {strength}: expected a number from 0 to 10")
    if options.r is not None and not 0 <= options.r <= 1:
        raise ValueError(f"--r {options.r}: expected a number from 0 to 1")


def check_unused(options: Options, use: str) -> None:
    """ValueError for a flag that was given but would have no effect."""
    translating = use == "translate"
    from_folder = options.input is not None and options.input.is_dir()
    # A condition, the same in words, and the flags that have no meaning under it.
    rules = [
        (translating, "with a translator, whose skips need the VAE of its base", ("vae",)),
        (translating, "with a translator", PROMPT_FLAGS),
        (not translating, "without a translator", (*TRANSLATOR_FLAGS, "export")),
        (from_folder, "for a folder", ("export",)),
        (options.export, "with --export", ("tile", "compile")),
        (options.checkpoint, "with --checkpoint", ("merge", "prior", "prediction_type")),
        (
            not translating and not options.control_image,
            "without a translator or --control_image",
            ("preprocess", *CANNY_FLAGS),
        ),
        (options.preprocess != "canny", "without --preprocess canny", CANNY_FLAGS),
        (options.controlnet is None, "without --controlnet", ("control_scale",)),
        (options.guidance <= 1, "without a --guidance above 1", ("negative",)),
        (options.input, "with --input", ("n", "size", "prior")),
        (use == "draw" and options.prompt is None, "without a prompt", DRAWING_FLAGS),
        (
            not options.input and not options.checkpoint,
            "without --input or --checkpoint",
            ("strength",),
        ),
    ]
    changed = changed_flags(options)
    for holds, where, names in rules:
        for name in names:
            if holds and name in changed:
                raise ValueError(f"--{name} has no meaning {where}; leave it out")


def strength_of(options: Options, use: str) -> float:
    """--strength, or its default for this use."""
    if options.strength is not None:
        return options.strength
    return 0.6 if use == "edit" else 1.0


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


# -------------------------------------------------------------------------- prompt to pictures

@dataclass(frozen=True)
class LoadedBase:
    """A base that is ready to draw, and what loading it found out."""

    base: bases.Base
    sampler: str
    precision: str  # in words, for the PNG
    prior: tuple[Tensor, Tensor] | None  # of a one-step generator: mean and std [4, h, w]


@dataclass(frozen=True)
class Control:
    """A ControlNet and its condition [1, 3, H, W] in [0, 1], as large as the picture."""

    network: controlnet.ControlNet
    condition: Tensor
    scale: float = 1.0


def draw(options: Options, device: torch.device) -> None:
    """Draws --n pictures of the prompt. Without a prompt it only writes what --save asks for."""
    targets = plan_drawings(options)
    control_picture = read_control_picture(options)
    strength = strength_of(options, "draw")
    loaded = prepare_base(options, device, strength)
    if options.prompt is None:
        return

    base = loaded.base
    size_flag = choose_size(options, loaded)
    size, crop = plan_size(size_flag, control_picture, base)
    control = load_control(options, base, control_picture, crop)
    prior = choose_prior(options, loaded, size)
    contexts = encode_prompt(base, options.prompt, options.negative, options.guidance)
    warn_of_cut_texts(base.tokenizer, options.prompt, options.negative)
    base.text_encoder = None  # T5 is larger than all other networks together
    pace = choose_pace(options, "draw", base.vae.factor, device)

    paint = partial(
        text_to_image,
        base,
        options.prompt,
        steps=options.steps,
        sampler=loaded.sampler,
        guidance=options.guidance,
        negative=options.negative,
        contexts=contexts,
        tile=pace.tile_of(size),
    )

    def paint_small(side: int) -> Tensor:
        return paint([options.seed], (side, side), control=crop_control(control, side))

    found = facts_of_base(loaded) | dict(size=size_flag, strength=strength)
    facts = png_facts(options, "draw", found)

    def batches() -> Batches:
        width, height = crop
        for first in range(0, options.n, options.batch):
            seeds = list(targets)[first:first + options.batch]
            pace.estimate(at_a_time(len(seeds)), size, len(seeds), paint_small)
            announce = partial(pace.announce, at_a_time(len(seeds)), size)
            pictures = paint(seeds, size, control=control, prior=prior, announce=announce)
            paths = [targets[seed] for seed in seeds]
            pictures = pictures[:, :, :height, :width].cpu()
            how = facts | pace.facts(size)
            yield paths, pictures, [how | dict(seed=seed) for seed in seeds]

    save_all(batches(), options.n, problems=[])


def plan_drawings(options: Options) -> dict[int, Path]:
    """The random seeds to draw from, and the file that each picture is written to."""
    several = options.n > 1
    output = options.output or Path("out" if several else "out.png")
    one_file = is_png(output)
    if one_file and several:
        raise ValueError(
            f"--output {output} is one file for {options.n} pictures; expected a folder"
        )
    seeds = range(options.seed, options.seed + options.n)
    targets = {seed: output if one_file else output / f"{seed}.png" for seed in seeds}
    check_folders(targets.values())
    if options.control_image:
        check_overwriting([options.control_image], targets.values())
    return targets


def prepare_base(options: Options, device: torch.device, strength: float = 1.0) -> LoadedBase:
    """The base, the sum of bases or the one-step generator, with its LoRA, ready to draw.

    `strength` is how much of a one-step generator's trained change is applied. With --save the
    base is also written.
    """
    dtype = DTYPES.get(options.dtype, torch.float32)
    base, prior = load_weights(options, dtype, str(device), strength)
    add_to_base(options, base)
    sampler = choose_sampler(options, base)
    amplified = amplifies_errors(base.schedule.prediction_type, options.steps, options.guidance)
    precision = choose_precision(options.dtype, device, amplified)
    loaded = LoadedBase(base, sampler, precision.name, prior)
    if options.save:
        if options.prompt is not None:
            check_drawing(options, loaded)  # first, because saving writes gigabytes
        save_base(options.save, base, prior)
    if options.vae:
        base.vae = autoencoders.load_autoencoder(options.vae, base, dtype, str(device))

    graphs = [base.denoiser]
    for name, part in base.vae.named_children():
        if name in ("encoder", "decoder"):
            graphs.append(part)
    speed_up([base.vae], base.denoiser, graphs, precision, device, options.compile)
    return loaded


def load_weights(
    options: Options, dtype: torch.dtype, device: str, strength: float
) -> tuple[bases.Base, tuple[Tensor, Tensor] | None]:
    """What --checkpoint, --merge or --base name, and the prior of a one-step generator."""
    if options.checkpoint:
        return checkpoints.load_yoso(options.checkpoint, options.base, dtype, device, strength)
    if options.merge:
        return bases.load_merged(options.merge, dtype, device), None
    name = options.base or "tiny-turbo"
    return bases.load_base(name, bases.parts_of(name), dtype, device), None


def add_to_base(options: Options, base: bases.Base) -> None:
    """Adds --lora, --embedding and --prediction_type. ValueError for a ControlNet for PixArt."""
    if base.random and not (options.checkpoint or options.lora):
        print(
            f"{base.name}: its weights are random, so it draws noise; train it first, and then give"
            " the --checkpoint",
            file=sys.stderr,
        )
    if options.prediction_type:
        config = base.schedule.config | {"prediction_type": options.prediction_type}
        base.schedule = diffusion.Schedule.from_config(config)
    for spec in options.embedding or []:
        embeddings.add_embedding(spec, base)
    for spec in options.lora or []:
        bases.load_lora(spec, base)
    if options.controlnet and base.unet is None:
        raise ValueError(
            f"--controlnet steers a U-Net, but {base.name} is PixArt; expected a Stable Diffusion"
            " base"
        )


def check_drawing(options: Options, loaded: LoadedBase) -> None:
    """ValueError for a size, a prior or a ControlNet that does not suit the base."""
    if options.controlnet:
        load_controlnet(options, loaded.base)
    if options.input is None:
        control_picture = read_control_picture(options)
        size, _ = plan_size(choose_size(options, loaded), control_picture, loaded.base)
        choose_prior(options, loaded, size)


def save_base(folder: Path, base: bases.Base, prior: tuple[Tensor, Tensor] | None) -> None:
    """Writes the base as a folder and, if sampling starts from it, the prior into it."""
    bases.save_folder(folder, base)
    print(folder)
    if prior is not None and not ends_in_noise(base.schedule):
        path = folder / "prior.safetensors"
        bases.save_prior(path, *prior)
        print(path)
        print(f"to draw from it: --base {folder} --prior {path}", file=sys.stderr)


def ends_in_noise(schedule: diffusion.Schedule) -> bool:
    """Whether the last timestep is pure noise. If not, YOSO starts from its prior."""
    return bool(schedule.alpha[-1] <= 0)


def choose_sampler(options: Options, base: bases.Base) -> str:
    """The sampler asked for, or that of the base's scheduler; stderr says if it only stands in.

    Raises ValueError if the scheduler has a setting that this sampler does not support.
    """
    sampler = options.sampler or diffusion.sampler_of(base.schedule)
    if options.prompt is None:  # nothing is drawn
        return sampler
    try:
        schedule = diffusion.for_sampler(base.schedule, sampler, options.steps)
        SAMPLERS[sampler](schedule, options.steps)
    except ValueError as error:
        raise ValueError(f"{base.name}: {error} (--steps, --sampler)") from error
    replaced = diffusion.replaced_scheduler(base.schedule)
    if replaced and not options.sampler:
        print(
            f"{base.name}: its scheduler, {replaced}, is not implemented; the sampler {sampler}"
            " stands in for it (--sampler)",
            file=sys.stderr,
        )
    return sampler


def parse_size(text: str | None, base: bases.Base) -> tuple[int, int]:
    """(width, height) of "N" or "WIDTHxHEIGHT", by default the base's own."""
    text = str(text or base.denoiser.config.sample_size * base.vae.factor)
    sides = text.lower().split("x")
    multiple = base.multiple
    good = [
        side.isdecimal() and 0 < int(side) <= LARGEST and int(side) % multiple == 0
        for side in sides
    ]
    if len(sides) > 2 or not all(good):
        raise ValueError(
            f"--size {text}: expected N or WIDTHxHEIGHT, multiples of {multiple} up to {LARGEST},"
            " as in 512 or 512x768"
        )
    return int(sides[0]), int(sides[-1])


def choose_size(options: Options, loaded: LoadedBase) -> str | None:
    """--size, or what a one-step generator was trained on; None for the base's own."""
    if options.checkpoint and not options.size:
        return trained_size(loaded)
    return options.size


def trained_size(loaded: LoadedBase) -> str:
    """WIDTHxHEIGHT of the pictures that a one-step generator was trained on."""
    mean, _ = loaded.prior
    height, width = (loaded.base.vae.factor * side for side in mean.shape[1:])
    return f"{width}x{height}"


def plan_size(
    size_flag: str | None,
    control_picture: Image.Image | None,
    base: bases.Base,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size to compute pictures in and the size to crop them to, each (width, height).

    Without --size, a picture is as large as its control picture, whatever size that is.
    """
    if control_picture is None or size_flag:
        size = parse_size(size_flag, base)
        return size, size
    width, height = control_picture.size
    padded = (width + -width % base.multiple, height + -height % base.multiple)
    return padded, (width, height)


def latent_shape(base: bases.Base, size: tuple[int, int]) -> tuple[int, int, int]:
    """[C, h, w] of the latent of a picture of `size` (width, height).

    ValueError if the sides are no multiples of the VAE's factor.
    """
    width, height = size
    return base.denoiser.config.in_channels, *vae.latent_size((height, width), base.vae.factor)


def choose_prior(
    options: Options,
    loaded: LoadedBase,
    size: tuple[int, int],
) -> tuple[Tensor, Tensor] | None:
    """Mean and std [4, h, w] of the latents that sampling starts from; None for noise alone."""
    shape = latent_shape(loaded.base, size)
    if options.prior and ends_in_noise(loaded.base.schedule):
        raise ValueError(
            f"--prior has no meaning for {loaded.base.name}, which starts from pure noise; leave it"
            " out"
        )
    if options.prior:
        return bases.load_prior(options.prior, shape)
    if loaded.prior is None or ends_in_noise(loaded.base.schedule):
        return None
    if loaded.prior[0].shape != shape:
        raise ValueError(
            f"{size[0]}x{size[1]}: {options.checkpoint} was trained to start from pictures of"
            f" {trained_size(loaded)}; expected that size"
        )
    return loaded.prior


def read_control_picture(options: Options) -> Image.Image | None:
    return read_preprocessed(options, options.control_image) if options.control_image else None


def load_control(
    options: Options,
    base: bases.Base,
    picture: Image.Image | None,
    size: tuple[int, int],
) -> Control | None:
    """The ControlNet with its picture scaled to `size` (width, height), if there is one."""
    if picture is None:
        return None
    condition = make_condition(picture, size, base)
    return Control(load_controlnet(options, base), condition, options.control_scale)


def load_controlnet(options: Options, base: bases.Base) -> controlnet.ControlNet:
    weight = next(base.unet.parameters())
    device = str(weight.device)
    network = bases.load_controlnet(options.controlnet, base.unet, weight.dtype, device)
    wanted = network.config.condition_factor
    if wanted != base.vae.factor:
        raise ValueError(
            f"{options.controlnet} is for a VAE of factor {wanted}, and that of {base.name} has"
            f" factor {base.vae.factor}; choose a ControlNet that was made for it"
        )
    return network


def make_condition(picture: Image.Image, size: tuple[int, int], base: bases.Base) -> Tensor:
    """A control picture scaled to `size` and padded for the base: [1, 3, H, W] in [0, 1]."""
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    condition, _ = pad_to_multiple(to_tensor(picture)[None], base.multiple)
    return condition.to(next(base.unet.parameters()))


def encode_prompt(
    base: bases.Base,
    prompt: str,
    negative: str,
    guidance: float,
) -> tuple[Tensor, ...]:
    """What the denoiser takes of the prompt and, for guidance above 1, of the negative one.

    Tensors with one row per text.
    """
    if guidance > 1:
        return base.encode([prompt, negative])
    return base.encode([prompt])


def warn_of_cut_texts(tokenizer: clip.Tokenizer | t5.T5Tokenizer, *texts: str) -> None:
    """Says on stderr what the text encoder does not see, as it is beyond the tokenizer's length."""
    for text in texts:
        cut = cut_off(tokenizer, text)
        if cut is not None:
            shown = " ".join(cut.split())
            if len(shown) > 200:
                shown = f"{shown[:200]}..."
            print(
                f"the text encoder takes {tokenizer.length} tokens; this was cut off and has no"
                f" effect: {shown}",
                file=sys.stderr,
            )


def cut_off(tokenizer: clip.Tokenizer | t5.T5Tokenizer, text: str) -> str | None:
    """The end of a text that its tokenizer cuts off, or None if all of it is kept."""
    if isinstance(tokenizer, t5.T5Tokenizer):
        text = t5.clean(text)
    return tokenizer.cut_off(text)


@torch.inference_mode()
def text_to_image(
    base: bases.Base,
    prompt: str,
    seeds: list[int],
    size: tuple[int, int],
    steps: int = 1,
    sampler: str | None = None,
    guidance: float = 1.0,
    negative: str = "",
    *,
    control: Control | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    pictures: Tensor | None = None,
    strength: float = 1.0,
    contexts: tuple[Tensor, ...] | None = None,
    tile: int | None = None,
    announce: Callable[[float], None] | None = None,
) -> Tensor:
    """Pictures [len(seeds), 3, H, W] in [-1, 1] of one prompt; `size` is (width, height).

    `pictures`, as many in [0, 1] and of that size, are edited: sampling starts from their latents
    with noise of the level `strength`, and at 1 from noise alone. `prior` is what else it may start
    from, see `diffusion.start_from_prior`. `contexts` are what `encode_prompt` made of the prompt,
    which is then not read again. The VAE works in squares of `tile` pixels. The sampler is by
    default that of the base's scheduler. With several steps, `announce` is told about how many
    seconds they will take.
    """
    if contexts is None:
        contexts = encode_prompt(base, prompt, negative, guidance)
    sampler = sampler or diffusion.sampler_of(base.schedule)
    schedule = diffusion.for_sampler(base.schedule, sampler, steps)
    model = make_model(base, contexts, guidance, control)
    shape = latent_shape(base, size)
    tile_latents = (tile or max(size)) // base.vae.factor

    # Between the networks everything is computed in float32 at least.
    weight = next(base.denoiser.parameters())
    fine = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    noise, generators = training.draw_noise(seeds, shape)
    noise = noise.to(**fine)

    def next_noise() -> Tensor:
        draws = [torch.randn(1, *shape, generator=generator) for generator in generators]
        return torch.cat(draws).to(**fine)

    ts = SAMPLERS[sampler](schedule, steps)
    diffusion.check_prediction(schedule.prediction_type, ts[0], schedule)
    z = None
    if pictures is not None and strength < 1:
        ts = diffusion.at_strength(ts, strength)
        z = encode_pictures(base.vae, pictures.to(**fine), tile_latents)
    x = first_latents(z, prior, noise, next_noise, ts[0], schedule)
    if announce is not None:
        model = timed(model, len(ts), announce)
    z = diffusion.denoise(sampler, model, x, ts, schedule, next_noise)
    z = z / base.vae.config.scaling_factor
    return vae.tiled(base.vae.decode, [z], shape[1:], tile_latents).clamp(-1, 1)


def first_latents(
    z: Tensor | None,
    prior: tuple[Tensor, Tensor] | None,
    noise: Tensor,
    next_noise: Callable[[], Tensor],
    t: float,
    schedule: diffusion.Schedule,
) -> Tensor:
    """Where sampling starts, at timestep t: latents z with noise, the prior, or noise alone."""
    if z is not None:
        return diffusion.add_noise(z, noise, t, schedule)
    if prior is not None:
        mean, std = prior
        return diffusion.start_from_prior(noise, next_noise(), mean, std, t, schedule)
    return diffusion.start(noise, t, schedule)


def encode_pictures(network: vae.VAE, pictures: Tensor, tile: int) -> Tensor:
    """Scaled latents [B, C, h, w] of pictures [B, 3, H, W] in [0, 1]; `tile` is in latents."""

    def encode(x: Tensor) -> Tensor:
        mean, *_ = network.encode(2 * x - 1)
        return mean

    size = vae.latent_size(pictures.shape[2:], network.factor)
    return vae.tiled(encode, [pictures], size, tile) * network.config.scaling_factor


def make_model(
    base: bases.Base,
    contexts: tuple[Tensor, ...],
    guidance: float,
    control: Control | None,
) -> diffusion.Model:
    """The denoiser as the samplers call it, model(x, t), with guidance and control.

    `contexts` are those of `encode_prompt` for this guidance.
    """
    rows = 2 if guidance > 1 else 1
    dtype = next(base.denoiser.parameters()).dtype

    def predict(x: Tensor, t: float) -> Tensor:
        h, w = x.shape[-2:]
        inputs = [c[:rows].repeat_interleave(len(x), dim=0).to(dtype) for c in contexts]
        x = x.repeat(rows, 1, 1, 1).to(dtype)
        # As a number, t would be compiled anew for each timestep.
        t = torch.full((len(x),), t, device=x.device)

        if base.transformer:
            size = torch.tensor([[h, w]], device=x.device).expand(len(x), 2) * base.vae.factor
            aspect_ratio = size[:, :1] / size[:, 1:]
            return base.transformer(x, t, *inputs, size, aspect_ratio)

        residuals = None
        if control is not None:
            condition = control.condition.expand(len(x), -1, -1, -1)
            residuals = control.network(x, t, *inputs, condition, control.scale)
        return base.unet(x, t, *inputs, residuals)

    def guided(x: Tensor, t: float) -> Tensor:
        if rows == 1:
            return predict(x, t)
        wanted, unwanted = predict(x, t).chunk(2)
        return unwanted + guidance * (wanted - unwanted)

    return guided


def crop_control(control: Control | None, side: int) -> Control | None:
    if control is None:
        return None
    return replace(control, condition=control.condition[..., :side, :side])


# ------------------------------------------------------------------------- picture to picture

def translate(options: Options, device: torch.device) -> None:
    """Translates the pictures of --input with a trained generator."""
    targets = plan_targets(options.input, options.output)
    check_export(options, targets)
    model, precision = load_translator(options, device)
    direction = choose_direction(options, model)
    caption = choose_caption(options, model, direction)
    context = encode_caption(model, caption)
    warn_of_cut_texts(model.tokenizer, caption)
    model.text_encoder = None  # SD-Turbo's takes 1.4 GB

    if options.export:
        translator = Translator(model, context, options.skip_scale, direction)
        picture = read_preprocessed(options, options.input)
        export_program(options.export, translator, picture, options.seed)
    pace = choose_pace(options, "translate", model.generator.vae.factor, device)

    def transform(pictures: list[Image.Image]) -> Tensor:
        return translate_pictures(
            model,
            pictures,
            context,
            options.seed,
            skip_scale=options.skip_scale,
            direction=direction,
            tile=pace.tile_of(pictures[0].size),
        )

    found = dict(
        prompt=caption,
        base=model.base,
        direction=direction,
        r=model.r,
        strength=strength_of(options, "translate"),
        dtype=precision,
    )
    facts = png_facts(options, "translate", found)
    read = partial(read_preprocessed, options)
    transform_all(targets, read, transform, options.batch, pace, facts)


def check_export(options: Options, targets: dict[Path, Path]) -> None:
    """ValueError if --export is no FILE.pt2, or would write over an input or an output."""
    if options.export is None:
        return
    if options.export.suffix != ".pt2":
        raise ValueError(f"--export {options.export}: expected a name ending in .pt2")
    taken = {path.resolve() for pair in targets.items() for path in pair}
    if options.export.resolve() in taken:
        raise ValueError(
            f"--export {options.export}: that is the input or the output; expected another name"
        )


def load_translator(
    options: Options,
    device: torch.device,
) -> tuple[checkpoints.LoadedGenerator, str]:
    """Loads a translator with its LoRA merged for --r and --strength.

    Also returns the precision in words.
    """
    model = checkpoints.load_generator(
        options.checkpoint,
        base=options.base,
        dtype=DTYPES.get(options.dtype, torch.float32),
        device=str(device),
        r=options.r,
        strength=strength_of(options, "translate"),
    )
    return model, speed_up_translator(model, options, device)


@torch.no_grad()
def encode_caption(model: checkpoints.LoadedGenerator, caption: str) -> Tensor:
    """The context [1, N, C] of a caption, in the type of the translator's U-Net."""
    weight = model.generator.unet.conv_in.weight
    context = model.text_encoder(model.tokenizer(caption).to(weight.device))
    return context.to(weight)


class Translator(nn.Module):
    """A generator that has its caption and settings already, so that only tensors remain to be
    passed: `torch.export` and `vae.tiled` need that.

    Pictures [B, 3, H, W] in [0, 1] and, for a stochastic model, noise [B, 4, h, w] -> pictures in
    [-1, 1]. `r` is that of the model, whose LoRA was merged at this strength.
    """

    def __init__(
        self,
        model: checkpoints.LoadedGenerator,
        context: Tensor,
        skip_scale: float,
        direction: str | None,
    ):
        super().__init__()
        self.generator = model.generator
        self.r = model.r
        self.skip_scale = skip_scale
        self.direction = direction if model.kind == "cyclegan_turbo" else None
        self.register_buffer("context", context)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        context = self.context.expand(len(x), -1, -1)
        if self.direction:  # unpaired generators take pictures in [-1, 1]
            made = self.generator(2 * x - 1, context, self.direction, self.skip_scale)
        else:
            made = self.generator(x, context, self.r, noise, self.skip_scale)
        return made.float()  # the networks may compute in bf16, which NumPy does not know


@torch.inference_mode()
def translate_pictures(
    model: checkpoints.LoadedGenerator,
    pictures: list[Image.Image],
    context: Tensor,
    seed: int,
    skip_scale: float = 1.0,
    direction: str | None = None,
    tile: int | None = None,
) -> Tensor:
    """Translates pictures of one size, whatever it is: [B, 3, H, W] in [-1, 1].

    They are padded to the VAE's factor and the result is cropped. Pictures larger than `tile`
    pixels are translated in squares of that side.
    """
    translator = Translator(model, context, skip_scale, direction)
    inputs, (height, width) = translator_inputs(translator, pictures, seed)
    x = inputs[0]
    factor = model.generator.vae.factor
    size = vae.latent_size(x.shape[2:], factor)
    tile_latents = (tile or max(x.shape[2:])) // factor
    translated = vae.tiled(translator, inputs, size, tile_latents)
    return translated[:, :, :height, :width]


def translator_inputs(
    translator: Translator,
    pictures: list[Image.Image],
    seed: int,
) -> tuple[list[Tensor], tuple[int, int]]:
    """What a translator takes, and the (H, W) to crop the result to.

    Padded pictures [B, 3, H, W] in [0, 1] and, for a stochastic model, noise [B, 4, h, w].
    """
    generator = translator.generator
    factor = generator.vae.factor
    x = torch.stack([to_tensor(picture) for picture in pictures])
    x, crop = pad_to_multiple(x.to(translator.context.device), factor)
    if translator.r is None:
        return [x], crop
    shape = (generator.unet.config.in_channels, *vae.latent_size(x.shape[2:], factor))
    noise, _ = training.draw_noise([seed] * len(x), shape)
    return [x, noise.to(x)], crop


@torch.inference_mode()
def export_program(path: Path, translator: Translator, picture: Image.Image, seed: int) -> None:
    """Writes the translation of pictures of this size as a program for torch.export.load."""
    translator.to(memory_format=torch.contiguous_format)  # on a GPU, others cannot be saved
    inputs, _ = translator_inputs(translator, [picture], seed)
    program = torch.export.export(translator, tuple(inputs))
    # Given a path, torch.export.save wants a name in .pt2, which a temporary file has not.
    contents = io.BytesIO()
    torch.export.save(program, contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    training.write_file(path, lambda temporary: temporary.write_bytes(contents.getbuffer()))
    print(path)


def speed_up_translator(
    model: checkpoints.LoadedGenerator,
    options: Options,
    device: torch.device,
) -> str:
    """Applies --dtype and --compile to a translator. Returns the precision in words."""
    generator = model.generator
    amplified = amplifies_errors(generator.config.prediction_type)
    precision = choose_precision(options.dtype, device, amplified)
    vaes = [part for name, part in generator.named_children() if name.startswith("vae")]
    speed_up(vaes, generator.unet, [generator], precision, device, options.compile)
    return precision.name


def choose_direction(options: Options, model: checkpoints.LoadedGenerator) -> str | None:
    """"a2b" or "b2a" of an unpaired model; None for a paired one, which goes one way."""
    if model.kind == "cyclegan_turbo":
        own_direction, _ = released_facts(options.checkpoint)
        return options.direction or own_direction or "a2b"
    if options.direction:
        raise ValueError(f"{options.checkpoint} translates one way; leave --direction out")
    return None


def choose_caption(
    options: Options,
    model: checkpoints.LoadedGenerator,
    direction: str | None,
) -> str:
    """The prompt or, without one, the caption that the checkpoint was trained with."""
    known = None
    if model.kind == "cyclegan_turbo" and model.prompts:
        # The captions of domains a and b; the translation goes to the other domain.
        known = model.prompts[1] if direction == "a2b" else model.prompts[0]
    elif model.kind == "cyclegan_turbo":
        own_direction, own_caption = released_facts(options.checkpoint)
        known = own_caption if direction == own_direction else None
    elif len(model.prompts) == 1:
        known = model.prompts[0]

    caption = known if options.prompt is None else options.prompt
    if caption is None:
        raise ValueError(
            f"{options.checkpoint} names no caption; expected a prompt that says what the result"
            " shows"
        )
    return caption


def released_facts(checkpoint: str) -> tuple[str | None, str | None]:
    """The direction and caption of a released checkpoint, by its name or file; else None."""
    for name, (file, direction, caption) in checkpoints.CHECKPOINTS.items():
        is_name = checkpoint == name and not Path(checkpoint).exists()
        if is_name or Path(checkpoint).name == file:
            return direction, caption
    return None, None


def read_preprocessed(options: Options, path: Path) -> Image.Image:
    """A picture, after --preprocess."""
    picture = open_picture(path)
    if options.preprocess == "canny":
        return canny(picture, options.low_threshold, options.high_threshold)
    if options.preprocess == "sketch":
        return sketch(picture)
    return picture


# ----------------------------------------------------------------------------- editing pictures

def edit(options: Options, device: torch.device) -> None:
    """Redraws the pictures of --input by the prompt, from their latents with noise."""
    also_read = [options.control_image] if options.control_image else []
    targets = plan_targets(options.input, options.output, also_read)
    strength = strength_of(options, "edit")
    control_picture = read_control_picture(options)
    loaded = prepare_base(options, device)
    base = loaded.base
    network = load_controlnet(options, base) if control_picture else None
    contexts = encode_prompt(base, options.prompt, options.negative, options.guidance)
    warn_of_cut_texts(base.tokenizer, options.prompt, options.negative)
    base.text_encoder = None  # T5 is larger than all other networks together
    pace = choose_pace(options, "edit", base.vae.factor, device)

    def transform(pictures: list[Image.Image]) -> Tensor:
        x = torch.stack([to_tensor(picture) for picture in pictures])
        x, (height, width) = pad_to_multiple(x, base.multiple)
        size = (x.shape[3], x.shape[2])
        control = None
        if network is not None:
            condition = make_condition(control_picture, (width, height), base)
            control = Control(network, condition, options.control_scale)
        edited = text_to_image(
            base,
            options.prompt,
            [options.seed] * len(x),
            size,
            options.steps,
            loaded.sampler,
            options.guidance,
            options.negative,
            control=control,
            prior=choose_prior(options, loaded, size) if strength == 1 else None,
            pictures=x.to(device),
            strength=strength,
            contexts=contexts,
            tile=pace.tile_of(size),
            announce=partial(pace.announce, at_a_time(len(x)), size),
        )
        return edited[:, :, :height, :width]

    found = facts_of_base(loaded) | dict(strength=strength)
    facts = png_facts(options, "edit", found)
    transform_all(targets, open_picture, transform, options.batch, pace, facts)


# ------------------------------------------------------------------------------------- the page

def draw_page(options: Options, device: torch.device) -> None:
    """Draws what the embedded base and its adapters do in one step, on one page."""
    from tiny import page

    output = options.output or Path("out.png")
    target = output if is_png(output) else output / "page.png"
    check_folders([target])
    loaded = prepare_base(options, device)
    cells = []
    for i, caption in enumerate(page.captions()):
        pictures = text_to_image(
            loaded.base,
            caption,
            [options.seed + i],
            (page.PICTURE_SIZE, page.PICTURE_SIZE),
            sampler=loaded.sampler,
        )
        cells.append((pictures[0], caption))

    for name, picture, caption in page.translations():
        model, _ = load_translator(replace(options, checkpoint=name), device)
        if caption is None:
            caption = choose_caption(options, model, "a2b")
        context = encode_caption(model, caption)
        pictures = translate_pictures(model, [picture], context, options.seed, direction="a2b")
        cells.append((to_tensor(picture) * 2 - 1, f"{name}: from"))
        # With --compile on a GPU, the next translator overwrites what this one returned.
        cells.append((pictures[0].cpu(), f"to: {caption}"))

    found = facts_of_base(loaded) | dict(prompt="twelve captions and four translations")
    facts = png_facts(options, "page", found)
    save(page.lay_out(cells), target, facts)
    print(target)


# ------------------------------------------------------------------------ the same for all uses

def choose_pace(options: Options, use: str, factor: int, device: torch.device) -> Pace:
    """`factor` is the VAE's. With several steps, the first of them are timed, see `timed`."""
    # --compile would compile for a small picture, too.
    return Pace(
        parse_tile(options.tile),
        factor,
        tiles_all=use == "translate",
        tiles_unasked=device.type == "cpu" and not options.compile,
        times_small=options.steps == 1 and not options.compile,
    )


def facts_of_base(loaded: LoadedBase) -> dict[str, object]:
    """What a PNG says of the base and how it was sampled."""
    return dict(base=loaded.base.name, sampler=loaded.sampler, dtype=loaded.precision)


def png_facts(options: Options, use: str, found: dict[str, object]) -> dict[str, object]:
    """What a PNG says about how it was made: the flags of its use and the version.

    `found` holds the values that were found out after parsing. Nothing is said of a flag that is
    None.
    """
    names = ["prompt", "seed", "base", "checkpoint"]
    names += TRANSLATOR_FLAGS if use == "translate" else PROMPT_FLAGS
    if options.input or options.checkpoint:
        names.append("strength")
    names.append("preprocess")
    if options.preprocess == "canny":
        names += CANNY_FLAGS
    names.append("dtype")

    facts = {name: found.get(name, getattr(options, name)) for name in names}
    facts["version"] = version()
    return {name: value for name, value in facts.items() if value is not None}


def main() -> None:
    options = parse()
    check_empty(options)
    use = choose_use(options)
    check(options, use)
    device = training.pick_device(options.device)
    if DTYPES.get(options.dtype) == torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # whose ten bits are float16's
    if use == "draw":
        draw(options, device)
    elif use == "translate":
        translate(options, device)
    elif use == "edit":
        edit(options, device)
    else:
        draw_page(options, device)


if __name__ == "__main__":
    training.run_script(main)
