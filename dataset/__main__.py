"""The command `python -m dataset check|cache|prior`."""

import argparse
import sys
from pathlib import Path

import training
from dataset.cache import estimate_prior, write_cache
from dataset.check import TRAINERS, check


def main() -> None:
    """Runs the command that sys.argv names. Status 2 if `check` found problems."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset",
        description="Checks data sets and prepares them for training.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_check(commands)
    _add_cache(commands)
    _add_prior(commands)

    args = training.parse_args(parser, sys.argv[1:] or ["--help"])
    if args.command == "check":
        problems = check(args.folder, args.output, args.trainer, args.base)
        sys.exit(2 if problems else 0)
    elif args.command == "cache":
        check_cache(args)
        size = args.size or 512
        write_cache(
            source=args.data,
            base_name=args.base,
            output=args.output,
            prep=args.prep or f"resized_crop_{size}",
            size=size,
            column=args.caption_column,
            seed=args.seed,
            batch=args.batch,
            device=str(training.pick_device(args.device)),
            dtype=args.dtype,
        )
    else:
        device = str(training.pick_device(args.device))
        estimate_prior(args.folder, args.base, args.size, args.output, device)


def check_cache(args: argparse.Namespace) -> None:
    """ValueError for flags of `cache` that would have no effect."""
    if args.prep and args.data.startswith("drawn:"):
        raise ValueError(f"{args.data} is drawn in the size of --size; leave --prep out")
    if args.prep and args.size:
        raise ValueError(f"--size has no effect beside --prep {args.prep}; leave it out")


def _add_check(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "check",
        help="print counts, sizes, captions and problems of a data set, and write a contact sheet",
    )
    command.add_argument(
        "folder",
        help="a folder with train_A, train_B and so on, or what train_yoso.py accepts",
    )
    command.add_argument(
        "--for",
        dest="trainer",
        choices=TRAINERS,
        help="the trainer whose code opens the data set [guessed from the layout]",
    )
    command.add_argument(
        "--base",
        help="model whose tokenizer counts the tokens of the captions [they are not counted]",
    )
    command.add_argument("--output", help="file of the contact sheet [FOLDER_check.png]")


def _add_cache(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "cache",
        help="compute latents and text contexts of a data set once, for train_yoso.py",
    )
    add = command.add_argument
    add("data", help="a folder, a .zip, a .txt of captions, digits, or drawn:scenes")
    add(
        "--base",
        default="sd15",
        help="model whose VAE and text encoder encode the data set [sd15]",
    )
    add(
        "--output",
        type=Path,
        required=True,
        help="folder of the cache; a stopped run continues in it",
    )
    add("--prep", help="preparation of the pictures [resized_crop_SIZE]")
    add("--size", type=int, help="side of the prepared pictures in pixels, without --prep [512]")
    add(
        "--caption_column",
        default="text",
        help="field of metadata.jsonl that holds the captions [text]",
    )
    add(
        "--seed",
        type=int,
        default=42,
        help="random seed of crops and flips, which are drawn once [42]",
    )
    add("--batch", type=int, default=8, help="items that are encoded at a time [8]")
    add("--device", default="auto", help="auto, cpu, cuda or mps [auto]")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type of the text encoder's weights [float32]",
    )


def _add_prior(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "prior",
        help="estimate mean and standard deviation of the latents of a folder's pictures",
    )
    add = command.add_argument
    add("folder", help="a folder of pictures")
    add("--base", default="sd-turbo", help="model whose VAE encodes the pictures [sd-turbo]")
    add("--size", type=int, default=512, help="side of the pictures to sample, in pixels [512]")
    add("--output", default="prior.safetensors", help="file of the prior [prior.safetensors]")
    add("--device", default="auto", help="auto, cpu, cuda or mps [auto]")


if __name__ == "__main__":
    training.run_script(main)
