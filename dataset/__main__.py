"""Looks at pictures, and prepares them."""

import argparse
import sys
from pathlib import Path

import training
from dataset.check import check


def main() -> None:
    parser = argparse.ArgumentParser(prog="data.py", description="Looks at pictures, and prepares them.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="print counts, sizes, captions and problems, write a contact sheet")
    command.add_argument("folder", help="holds train_A, train_B and so on")
    command.add_argument("--output", help="the contact sheet (default: FOLDER_check.png)")
    command = commands.add_parser("prior", help="estimate mean and deviation of the latents of a folder's pictures")
    command.add_argument("folder", help="holds pictures")
    command.add_argument("--base", default="sd-turbo", help="whose VAE [sd-turbo]")
    command.add_argument("--size", type=int, default=512, help="of the pictures to be drawn [512]")
    command.add_argument("--output", default="prior.safetensors")
    command = commands.add_parser("cache", help="compute latents and text contexts of a data set once")
    command.add_argument("data", help="a folder, a .zip, a .txt of captions, or drawn:scenes")
    command.add_argument("--base", default="sd15", help="whose VAE and text encoder [sd15]")
    command.add_argument("--output", type=Path, required=True, help="a folder; one that was stopped goes on")
    command.add_argument("--prep", help="the preparation of the pictures [resized_crop_SIZE]")
    command.add_argument("--size", type=int, default=512, help="[512]")
    command.add_argument("--caption_column", default="text", help="of metadata.jsonl [text]")
    command.add_argument("--seed", type=int, default=42, help="of random crops and flips, drawn once [42]")
    command.add_argument("--batch", type=int, default=8, help="items at a time [8]")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                         help="of the text encoder [float32]")
    args = training.parse_args(parser, sys.argv[1:] or ["--help"])
    if args.command == "check":
        sys.exit(2 if check(args.folder, args.output) else 0)
    if args.command == "prior":
        estimate_prior(args.folder, args.base, args.size, args.output)
    else:
        write_cache(args.data, args.base, args.output, args.prep or f"resized_crop_{args.size}", args.size,
              args.caption_column, args.seed, args.batch, str(training.pick_device(args.device)), args.dtype)


if __name__ == "__main__":
    training.run(main)
