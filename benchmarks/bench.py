"""Measures this code beside other libraries on the same work, alternately, in one run.

    B="python -m benchmarks.bench"
    $B --what modules --size 512              # U-Net, VAE and text encoder, beside diffusers
    $B --what translate --size 512            # a paired translation, beside the official style
    $B --what translate --against diffusers   # beside diffusers, LoRA fused, caption encoded once
    $B --what text --size 512                 # text to picture in one step, beside diffusers
    $B --what taesd --size 512                # the same with TAESD, beside diffusers with it
    $B --what taesd --against vae             # beside this code with the VAE
    $B --what train --size 256 [--gan]        # a paired training step, beside the official style
    $B --what lora --size 256                 # LoRA as a branch, beside LoRA as a weight
    $B --what load                            # cold start to the first picture, beside diffusers
    $B --what memory --size 192 --batch 2     # an unpaired step, tiny base, beside the official one
    $B --what memory --device cuda --dtype bf16 --sizes 256,512,1024     # both trainers, full size
    $B --what growth --sizes 256,512,1024,2048 --batches 1,2,4,8,16      # this code, and a plot

Run it from the root of the repository. Networks have SD-Turbo's size and random weights (5 GB,
written to --scratch, where they stay for the next run), or are those of --base FOLDER. Each side
runs in a process of its own, is loaded once, and takes turns with the other. Prints JSON, and
adds a table of medians to benchmarks/README.md.

"official-style" is the arrangement of the img2img-turbo repository, assembled from `diffusers`
and `peft` (benchmarks/peers.py). Needs Linux and the test extras.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch

import training
from benchmarks import ours, peers, report
from benchmarks.inputs import (
    PROMPT,
    ROOT,
    write_checkpoint,
    write_data,
    write_random_base,
    write_random_taesd,
)
from benchmarks.workers import Job, Side, Worker

RUNS = 5  # timed runs per side, unless --runs says otherwise
# The first side is ours; --against picks the other, by default the next one.
SIDES: dict[str, dict[str, Side | None]] = {
    "modules": {"ours": ours.modules, "diffusers": peers.diffusers_modules},
    "translate": {
        "ours": ours.translation,
        "official-style": peers.official_translation,
        "diffusers": peers.official_translation,
    },
    "text": {"ours": ours.text, "diffusers": peers.diffusers_text},
    "taesd": {"ours": ours.text, "diffusers": peers.diffusers_text, "vae": ours.text_with_vae},
    "growth": {"ours": ours.translation},
    "train": {"ours": ours.training_steps, "official-style": peers.official_training},
    "lora": {"ours": ours.training_steps, "as a weight": peers.training_of_weights},
    "memory": {"ours": ours.training_steps, "official-style": peers.released_unpaired_training},
    "load": {"ours": None, "diffusers": None},  # whole processes, see measure_load
}
# The sides that --fast and --compile change, and what is then computed in more than one type.
OUR_SIDES = ("ours", "vae", "as a weight")
MIXED = ("translate", "text", "taesd", "growth")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
Task = str | tuple[int, int]  # in words, or (size, batch)


# -------------------- workers that take turns

def compare(job: Job, sides: dict[str, Side], tasks: list[Task], runs: int) -> list[dict]:
    """Measures all sides on the same tasks, alternately. One row per task and side."""
    dtypes = {job.our_dtype, job.dtype}
    peaks = {dtype: matrix_peak(dtype, job) for dtype in dtypes}
    workers = {}
    rows = []
    try:
        for name, side in sides.items():
            workers[name] = Worker(name, side, job)
        for task in tasks:
            new = measure_task(job, workers, task, runs, peaks)
            for row in new:
                memory = f", {row['peak_gb']:.3g} GB" if "peak_gb" in row else ""
                print(f"{task} {row['side']}: {row['seconds']:.3g} s{memory}", file=sys.stderr)
            rows += new
    finally:
        for worker in workers.values():
            worker.stop()
    return rows


def measure_task(
    job: Job,
    workers: dict[str, Worker],
    task: Task,
    runs: int,
    peaks: dict[torch.dtype, float],
) -> list[dict]:
    """One task: an inspected run of each side, then `runs` runs alternately."""
    inspected = {name: worker.ask(task, inspect=True) for name, worker in workers.items()}
    if job.compiled or job.device == "cuda":  # to compile, and to record graphs
        for _ in range(3):
            for worker in workers.values():
                worker.ask(task)

    timed = {name: [] for name in workers}
    for _ in range(runs):
        for name, worker in workers.items():
            timed[name].append(worker.ask(task))
    if runs == 0:
        timed = {name: [answer] for name, answer in inspected.items()}

    rows = summary(task, timed)
    for row in rows:
        row["tflop"] = inspected[row["side"]]["tflop"]
        is_ours = row["side"] in OUR_SIDES
        if not (is_ours and job.fast and job.what in MIXED):
            dtype = job.our_dtype if is_ours else job.dtype
            row["of_peak"] = row["tflop"] / row["seconds"] / peaks[dtype]
        if job.what == "modules":
            del row["peak_gb"]  # of all networks together
    if len(rows) == 2:
        mine, theirs = (answer["result"] for answer in inspected.values())
        if mine is not None and theirs is not None:
            off = np.abs(mine - theirs) / np.abs(theirs).max()
            rows[1]["difference"] = [float(off.max()), float(off.mean())]
    return rows


def summary(task: Task, timed: dict[str, list[dict]]) -> list[dict]:
    """One row per side: median of its seconds, and its largest memory.

    The second side also has its ratios to the first, run by run: median, smallest, largest.
    """
    rows = []
    for side, answers in timed.items():
        row = dict(
            task=task,
            side=side,
            seconds=statistics.median(answer["seconds"] for answer in answers),
            peak_gb=max(answer["peak_gb"] for answer in answers),
        )
        rows.append(row)
    if len(timed) == 2:
        mine, theirs = timed.values()
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(mine, theirs)]
        rows[1]["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return rows


def matrix_peak(dtype: torch.dtype, job: Job) -> float:
    """TFLOP per second of large matrix products, the best of five runs of four products each."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as in the workers
    n = 8192 if job.device == "cuda" else 2048
    if job.tiny:
        n = 128
    a = torch.randn(n, n, device=job.device).to(dtype)
    b = torch.randn(n, n, device=job.device).to(dtype)
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(4):
            c = a @ b
        c[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 4 * 2 * n**3 / best / 1e12


# -------------------- measurements that need more than that

def measure_load(job: Job, runs: int, scratch: pathlib.Path) -> list[dict]:
    """A cold start to the first picture: whole processes, one after the other."""
    our_dtype = "auto" if job.fast else name_of(job.dtype)
    their_dtype = name_of(job.dtype)
    size = str(job.size)
    our_command = [
        sys.executable,
        str(ROOT / "sample.py"),
        PROMPT,
        *("--base", job.base),
        *("--size", size),
        *("--dtype", our_dtype),
        *("--device", job.device),
        *("--output", str(scratch / "ours.png")),
    ]
    if job.compiled:
        our_command.append("--compile")
    their_command = [
        sys.executable,
        "-c",
        peers.DIFFUSERS_LOAD,
        job.base,
        their_dtype,
        job.device,
        size,
        str(scratch / "theirs.png"),
    ]
    commands = {"ours": our_command, "diffusers": their_command}

    if not job.tiny:  # not timed: the files come into the disk cache
        for command in commands.values():
            time_process(command)
    timed = {side: [] for side in commands}
    for _ in range(runs):
        for side, command in commands.items():
            timed[side].append(time_process(command))
    return summary("cold start to the first picture", timed)


def time_process(command: list[str]) -> dict:
    """Seconds and peak memory of one process."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)[:200]} failed: {error[-2000:]}")
    return dict(seconds=time.perf_counter() - begin, peak_gb=usage.ru_maxrss * 1024 / 1e9)


def measure_tiny_memory(job: Job, runs: int) -> list[dict]:
    """On the CPU: an unpaired training step of the tiny base."""
    job = replace(job, base="tiny", kind="cyclegan_turbo")
    write_data(pathlib.Path(job.data), job.size, job.batch)
    task = f"a CycleGAN-Turbo step, {job.size} px, batch {job.batch}"
    return compare(job, SIDES["memory"], [task], runs)


def measure_memory(job: Job, runs: int, sizes: list[int], scratch: pathlib.Path) -> list[dict]:
    """On a GPU: steps of both trainers at full size, ours alone."""
    rows = []
    for kind in ("pix2pix_turbo", "cyclegan_turbo"):
        for size in sizes:
            for checkpointing in (False, True):
                task = f"{kind}, {size} px, batch {job.batch}"
                if checkpointing:
                    task += ", checkpointing"
                variant = replace(
                    job,
                    kind=kind,
                    size=size,
                    checkpointing=checkpointing,
                    data=str(scratch / task / "data"),
                    run_folder=str(scratch / task / "run"),
                )
                write_data(pathlib.Path(variant.data), size, job.batch)
                try:
                    rows += compare(variant, {"ours": ours.training_steps}, [task], runs)
                except ChildProcessError:
                    rows.append(dict(task=f"{task}: failed, see above", side="ours"))
    return rows


# -------------------- command line

def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--what", choices=SIDES, required=True, help="what is measured, see above")
    add("--against", metavar="SIDE", help="official-style, diffusers or vae [as above]")
    add("--base", help="a folder [random weights of SD-Turbo's size]")
    add("--size", type=int, default=256, help="pixels a side [256]")
    add("--batch", type=int, default=1, help="pictures at a time [1]")
    add("--sizes", type=numbers, metavar="N,N",
        help="for growth, and for memory on CUDA [256,512,1024]")
    add("--batches", type=numbers, metavar="N,N",
        help="for growth, text, taesd and translate, at --size [growth: 1,2,4; else --batch]")
    add("--dtype", choices=DTYPES, default="float32", help="of both sides [float32]")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--fast", action="store_true",
        help="our side in the types that sample.py chooses; modules and train: bf16")
    add("--compile", action="store_true", help="our side compiled")
    add("--gan", action="store_true", help="train: with a patch discriminator on both sides")
    add("--runs", type=int, default=RUNS,
        help="timed runs per side; 0: take the run that counts FLOPs, for very slow tasks [5]")
    add("--scratch", help="folder where the random weights are kept (5 GB) [a temporary folder]")
    add("--table", type=pathlib.Path, default=ROOT / "benchmarks" / "README.md",
        help="file that the table is added to [benchmarks/README.md]")
    add("--plot", type=pathlib.Path, default=ROOT / "assets" / "growth.png",
        help="plot of growth [assets/growth.png]")
    add("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests: small networks
    args = parser.parse_args(argv)

    check(parser, args)
    args.sizes = args.sizes or [256, 512, 1024]
    if args.batches is None:
        args.batches = [1, 2, 4] if args.what == "growth" else [args.batch]
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses flags that do not go together, and chooses the side to measure against."""
    peers_of_it = [side for side in SIDES[args.what] if side != "ours"]
    if args.against is None and peers_of_it:
        args.against = peers_of_it[0]
    if args.against is not None and args.against not in peers_of_it:
        known = " or ".join(peers_of_it) or "nothing"
        parser.error(f"--what {args.what} is measured against {known}")
    if args.compile and args.what in ("train", "lora", "memory"):
        parser.error(f"--what {args.what} compiles nothing; leave --compile out")
    if args.gan and args.what != "train":
        parser.error(f"--gan is of --what train, not of {args.what}; leave it out")
    if args.sizes and args.what != "growth" and (args.what, args.device) != ("memory", "cuda"):
        parser.error("--sizes is for growth, and for memory on CUDA; give --size")
    if args.batches and args.what not in ("growth", "text", "taesd", "translate"):
        parser.error(f"--batches has no meaning for --what {args.what}; give --batch")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda cannot be used: torch finds no GPU here")
    for path in (args.table, args.plot):
        if not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} for {path.name}; make it first")
    if args.runs < 0 or min(args.batch, *(args.batches or [1])) < 1:
        parser.error("expected --runs of 0 or more, and --batch and --batches of 1 or more")
    if args.what == "load" and args.runs == 0:
        parser.error("--what load needs --runs of 1 or more")
    if args.what == "memory" and args.device == "cpu" and args.dtype != "float32":
        parser.error("--what memory on a CPU is of float32; leave --dtype out")


def tasks_of(args: argparse.Namespace) -> list[Task]:
    if args.what == "modules":
        return ["U-Net", "VAE encode", "VAE decode", "text encoder"]
    if args.what in ("train", "lora"):
        return [(args.size, args.batch)]
    tasks = [(args.size, batch) for batch in args.batches]
    if args.what == "growth":
        tasks = [(size, 1) for size in args.sizes] + tasks
    return list(dict.fromkeys(tasks))


def random_base(args: argparse.Namespace, scratch: pathlib.Path) -> str:
    """The folder of the base with random weights, written if it is not there yet."""
    prefix = "random-tiny" if args.tiny else "random"
    dtype = DTYPES[args.dtype]
    folder = scratch / f"{prefix}-{name_of(dtype)}"
    if not (folder / "model_index.json").is_file():
        write_random_base(folder, args.tiny, dtype, args.device)
    return str(folder)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(args: argparse.Namespace, scratch: pathlib.Path) -> list[dict]:
    """Writes what the sides work on to `scratch`, and measures."""
    job = Job(
        what=args.what,
        against=args.against,
        size=args.size,
        batch=args.batch,
        dtype=DTYPES[args.dtype],
        device=args.device,
        fast=args.fast,
        compiled=args.compile,
        gan=args.gan,
        tiny=args.tiny,
        checkpoint=str(scratch / "model.safetensors"),
        data=str(scratch / "data"),
        run_folder=str(scratch / "run"),
    )
    if args.what == "memory" and args.device == "cpu":
        return measure_tiny_memory(job, args.runs)

    lasting = pathlib.Path(args.scratch) if args.scratch else scratch
    job = replace(job, base=args.base or random_base(args, lasting))
    if args.what == "taesd":
        job = replace(job, vae=str(scratch / "taesd"))
        write_random_taesd(pathlib.Path(job.vae), job.dtype)
    if args.what == "memory":
        return measure_memory(job, args.runs, args.sizes, scratch)
    if args.what == "load":
        return measure_load(job, args.runs, scratch)

    if args.what in ("translate", "growth", "train"):
        write_checkpoint(pathlib.Path(job.checkpoint), job.base)
    if args.what in ("train", "lora"):
        write_data(pathlib.Path(job.data), job.size, job.batch)
    sides = {"ours": SIDES[args.what]["ours"]}
    if args.against:
        sides[args.against] = SIDES[args.what][args.against]
    return compare(job, sides, tasks_of(args), args.runs)


def title_of(args: argparse.Namespace) -> str:
    title = args.what
    if args.against and not (args.what == "memory" and args.device == "cuda"):
        title += f" against {args.against}"
    if args.what == "memory" and args.device == "cpu":
        title += ", the tiny base"
    elif args.base:
        title += f", {args.base}"
    has_sizes = args.what == "growth" or (args.what, args.device) == ("memory", "cuda")
    if not has_sizes:
        title += f", {args.size} px"
        if len(args.batches) == 1:
            title += f", batch {args.batches[0]}"
    if args.gan:
        title += ", with a patch discriminator"
    title += f", {name_of(DTYPES[args.dtype])}"
    whose = "both sides" if args.against in OUR_SIDES else "ours"
    if args.fast:
        title += f" ({whose} fast)"
    if args.compile:
        title += f" ({whose} compiled)"
    title += f", {args.device.upper()}"
    if args.runs not in (0, RUNS):
        title += f", {args.runs} runs"
    return title


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.scratch:
        pathlib.Path(args.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        rows = measure(args, pathlib.Path(scratch))

    title = title_of(args)
    machine = report.machine(args.device)
    command = f"python -m benchmarks.bench {' '.join(argv)}"
    result = dict(title=title, command=command, runs=args.runs, machine=machine, rows=rows)
    print(json.dumps(result, indent=1))
    runs = f"medians of {args.runs} runs, alternately" if args.runs else "one run each"
    report.write_table(args.table, title, rows, f"`{command}`: {runs}; {machine}.")
    if args.what == "growth":
        report.plot(args.plot, rows, args.sizes, args.batches, args.size)


if __name__ == "__main__":
    training.run_script(main)
