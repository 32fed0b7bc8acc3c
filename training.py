"""Plumbing of the trainers, without mathematics: flags, ranks, draws, state files, logs, grids and plots.

If a line here were deleted, a file, a log or a process would be lost, but nothing else learned. It knows no network."""

import argparse
import contextlib
import datetime
import difflib
import hashlib
import inspect
import json
import math
import os
import pathlib
import re
import signal
import sys
import time
import types
import typing
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

MAY_CHANGE = {"max_train_steps", "checkpointing_steps", "viz_freq", "eval_freq", "validation_steps", "resume",
              "dataloader_num_workers"}
AT_LEAST = {"seed": 0, "dataloader_num_workers": 0, "lr_warmup_steps": 0, "prior_pictures": 0, "tile": 32}  # others: 1
REFUSED = {
    "--enable_xformers_memory_efficient_attention": "attention is always fused here (scaled_dot_product_attention)",
    "--allow_tf32": "TF32 is always allowed for float32 matrix products on CUDA",
    "--checkpoints_total_limit": "one state.pt is kept, and replaced only by a whole one",
    "--set_grads_to_none": "gradients are always set to None",
    "--revision": "name a local folder to choose a version",
    "--variant": "the files that are there are taken, full precision first",
    "--local_rank": "torchrun says it through the environment",
}
SHOWN = ("l2", "cycle", "idt", "gan", "kl", "con", "adapt", "disc")  # on the bar, where a trainer has them


def parse(cls: type, tables: dict[str, dict], aliases: dict[str, str], description: str,
          argv: list[str] | None = None):
    """A settings dataclass filled from the command line: one flag a field, its comment as help.

    Values come from, in this order: the flag, the table of the base (whose name begins with the table's), the
    dataclass. With --resume O they are those of O's config.json, and of the flags only `MAY_CHANGE` may differ."""
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        kind, choices = f.type, None
        if isinstance(kind, types.UnionType):  # T | None
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is typing.Literal:
            choices, kind = typing.get_args(kind), str
        names = [f"--{f.name}", *(f"--{old}" for old, new in aliases.items() if new == f.name)]
        text = f"{comments.get(f.name, '')} [{f.default}]".strip().replace("%", "%%")
        how = dict(nargs="?", const=True, type=on_or_off, metavar="on|off") if kind is bool else \
            dict(type=kind, choices=choices)
        parser.add_argument(*names, dest=f.name, default=None, help=text, **how)
    given = given_values(parser, argv)
    if "resume" in given:
        return resumed(cls, given, parser)
    base = given.get("base") or next(f.default for f in fields(cls) if f.name == "base")
    names = str(base), pathlib.Path(base).name  # as it is written, and what a path leads to
    table = next((table for prefix, table in tables.items() if any(name.startswith(prefix) for name in names)), {})
    small = {k: v for k, v in table.items() if k not in given}
    if small and int(os.environ.get("RANK", 0)) == 0:
        print(f"defaults of the base {base}: " + " ".join(f"--{k} {v}" for k, v in small.items()), file=sys.stderr)
    return cls(**{**small, **given})


def given_values(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """The flags of a trainer, whose weights and rates are never below 0."""
    given = {k: v for k, v in vars(parse_args(parser, argv)).items() if v is not None}
    if below := next((name for name, value in given.items() if type(value) is float and value < 0), None):
        raise ValueError(f"--{below} {given[below]}: expected 0 or more")
    return given


def on_or_off(text: str) -> bool:
    """The value of a switch; the flag alone is "on"."""
    if text.lower() not in ("on", "off", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: expected on or off")
    return text.lower() in ("on", "true")


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """parser.parse_args, whose errors are ValueErrors of one line, with the nearest flag, or why one is refused."""

    def refuse(message: str):
        raise ValueError(message)

    parsers = [parser]
    for action in parser._actions:
        parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else ()
    for one in parsers:
        one.error = refuse
    given, unknown = parser.parse_known_args(argv)
    known = [name for one in parsers for action in one._actions for name in action.option_strings]
    for flag in unknown:
        name = flag.split("=")[0]
        if name in REFUSED:
            refuse(f"{name} is not needed: {REFUSED[name]}; leave it out")
        near = difflib.get_close_matches(name, known, n=1)
        refuse(f"unknown argument {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    for name, value in vars(given).items():
        if type(value) is int and not AT_LEAST.get(name, 1) <= value < 2**63:
            refuse(f"--{name} {value}: expected {AT_LEAST.get(name, 1)} or more, below 2^63")
        if type(value) is float and not math.isfinite(value):
            refuse(f"--{name} {value}: expected a finite number")
    return given


def resumed(cls: type, given: dict, parser: argparse.ArgumentParser):
    path = pathlib.Path(given["resume"]) / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {given['resume']} has no config.json; expected the --output_dir of an earlier run")
    try:  # what was saved is checked as flags are
        saved = {k: v for k, v in json.loads(path.read_text()).items() if k in {f.name for f in fields(cls)}}
        saved = given_values(parser, [f"--{k}={v}" for k, v in saved.items() if v is not None])
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the settings of a run ({first_line(error)}); copy it again, or start a"
                         " new run") from None
    for name in given.keys() - MAY_CHANGE:
        if given[name] != saved.get(name):
            raise ValueError(f"--{name} {given[name]} differs from the {saved.get(name)} that the run {given['resume']}"
                             f" began with; only {', '.join(sorted(MAY_CHANGE - {'resume'}))} may change:"
                             " leave it out")
    return cls(**{**saved, **given, "output_dir": given["resume"]})


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def run(main: Callable[[], None]) -> None:
    """Calls a script's `main`. What the user must change is one line on stderr and exit status 2; Ctrl-C is 130; any
    other exception is a bug and keeps its traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())  # a name in a file may hold what it likes
        tqdm.write(f"{pathlib.Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)  # not into a bar
        sys.exit(2)
    except RuntimeError as error:
        short = "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"  # of the CPU, of a GPU's library that begins last
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in short):
            tqdm.write(f"{pathlib.Path(sys.argv[0]).name}: error: memory was short ({first_line(error)}); make pictures"
                       " or batches smaller (--size, --batch, --tile; of a trainer --train_batch_size, --resolution),"
                       " or train with --gradient_checkpointing", file=sys.stderr)
            sys.exit(2)
        if not str(error).startswith("DataLoader worker"):  # raised between any two lines, by a child's end
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the ends of the others would raise it anew
        tqdm.write(f"{pathlib.Path(sys.argv[0]).name}: error: a process that prepares pictures was lost"
                   f" ({first_line(error)}); the last saved state is whole: go on with --resume, and where memory was"
                   " short with fewer --dataloader_num_workers", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if stop.args and int(os.environ.get("RANK", 0)) == 0:
            tqdm.write(stop.args[0], file=sys.stderr)
        sys.exit(130)


# --------------------------------------------------------------------------------------------------- devices and ranks

def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used ({first_line(error)}); expected auto, or"
                         " cpu, cuda or mps as this machine has it") from None
    return device


def start_ranks(device_name: str) -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and its device. Under `torchrun` the processes are joined."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device_name == "cuda" or device_name == "auto" and torch.cuda.is_available():
        device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # before anything takes room on the first GPU
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=2))  # the others wait while rank 0 validates
    return rank, world, device


@contextlib.contextmanager
def first_alone(rank: int):
    """The first process goes before the others, who find what it downloaded."""
    if rank:
        dist.barrier()
    yield
    if not rank and dist.is_initialized():
        dist.barrier()


def my_rows(rank: int, world: int, batch: int, accumulation: int) -> list[list[int]]:
    """Rows of the global batch that this process takes, a list for each accumulation slice."""
    return [[(a * world + rank) * batch + i for i in range(batch)] for a in range(accumulation)]


def plan(cfg, rank: int, world: int, items: int, epochs: int | None) -> tuple[int, list[list[int]], int]:
    """Pictures in the global batch, this process's rows of it, and the number of steps."""
    batch = world * cfg.train_batch_size * cfg.gradient_accumulation_steps
    last = min(cfg.max_train_steps, math.ceil(epochs * items / batch)) if epochs else cfg.max_train_steps
    return batch, my_rows(rank, world, cfg.train_batch_size, cfg.gradient_accumulation_steps), last


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over all processes, in one bucket. Nothing to do for one process."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    bucket = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(bucket)
    bucket /= dist.get_world_size()
    for g, mean in zip(grads, bucket.split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    if not dist.is_initialized():
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(means)
    return dict(zip(values, (means / dist.get_world_size()).tolist()))


def rng(seed: int, step: int, what: str) -> torch.Generator:
    """The CPU generator of one purpose at one step. What is drawn depends on nothing else: not on ranks, not on what
    was drawn before, so resuming and splitting change nothing."""
    digest = hashlib.sha256(f"{seed} {step} {what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw_noise(seeds: Iterable[int], shape: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
    """One generator a seed, and the first draw [len(seeds), *shape] of each, in float32 on the CPU."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randn(1, *shape, generator=g) for g in generators]), generators


def catch_stop() -> Callable[[], bool]:
    """Makes the first Ctrl-C or SIGTERM a request: the returned function says whether one came, on any rank. A second
    Ctrl-C stops at once."""
    asked = []

    def handler(number, frame):
        if asked and number == signal.SIGINT:  # of SIGTERMs several come, from a scheduler and from torchrun
            raise KeyboardInterrupt
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return lambda: mean_over_ranks({"stop": float(bool(asked))})["stop"] > 0


def stopped(step: int, folder: pathlib.Path) -> KeyboardInterrupt:
    """What a trainer raises when all is saved. No process ends before the others: its end would have them killed."""
    if dist.is_initialized():
        dist.barrier()
    return KeyboardInterrupt(f"stopped after step {step}, saved; go on with --resume {folder}")


# ---------------------------------------------------------------------------------------------------------------- files

def open_run(config, kind: str, rank: int) -> pathlib.Path:
    """The run's folder with its config.json. An earlier run in the same place is never overwritten."""
    if config.output_dir is None:
        name = [f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}"]
        if dist.is_initialized():
            dist.broadcast_object_list(name)
        config.output_dir = name[0]
    folder = pathlib.Path(config.output_dir)
    if rank == 0:
        if not config.resume and any((folder / name).exists() for name in ("state.pt", "model.safetensors")):
            raise ValueError(f"{folder} holds a run already; continue it with --resume {folder}, or choose another"
                             " --output_dir")
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        if not config.resume:  # of one that ended before its first save
            (folder / "log.jsonl").unlink(missing_ok=True)
        write_file(folder / "config.json", lambda path: path.write_text(json.dumps(asdict(config), indent=1)))
    return folder


def write_file(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """`write` fills a temporary file beside `path`, which takes the name once all of it is on the disk: whatever
    happens, `path` is the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        raise OSError(f"{path} could not be written ({first_line(error)}); the file that was there is untouched:"
                      " make room, and run the command again (a trainer's with --resume)") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def needed(load: Callable, *args, without: str):
    """load(*args), whose failure also says which flags do without it."""
    try:
        return load(*args)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; or do without: {without}") from None


def save_state(path: pathlib.Path, state: dict) -> None:
    """Of networks, optimizers and scalers what is inside; `restore` puts it back."""
    state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
    write_file(path, lambda temporary: torch.save(state, temporary))


@torch.no_grad()
def restore(folder: pathlib.Path, base: str, parts: dict, *names: str, batch: int | None = None) -> list:
    """Puts what `save_state` wrote back into the parts (networks, optimizers, dictionaries of tensors, None), and
    returns the values of these names; tensors and plain values only, no code. `base`: what is frozen's fingerprint;
    `batch`: of how many items a step is, of all processes."""
    path = folder / "state.pt"
    if not path.is_file():
        raise ValueError(f"{folder} has no state.pt to resume from: the run ended before its first save: start again")
    try:
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is packed, as torch.save never does it")
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["base"]
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage
        raise ValueError(f"{path} is damaged ({first_line(error)}); the trained weights so far are in"
                         f" {folder / 'model.safetensors'}: copy state.pt again, or start a new run") from None
    if found != base:
        raise ValueError(f"{path} was trained beside frozen weights with fingerprint {found}, and these have {base};"
                         " put the original base back, or whatever else is frozen")
    if (before := state.get("batch", batch)) != batch:
        raise ValueError(f"{path} is of steps of {before} items and these would be of {batch}; start as many processes"
                         " as before")
    try:
        if not isinstance(state["step"], int):
            raise TypeError(f"its step is {state['step']!r:.100}")
        for name, part in parts.items():
            if isinstance(part, dict):
                for key, tensor in part.items():
                    tensor.copy_(state[name][key])
            elif part:
                part.load_state_dict(state[name])
        return [state[name] for name in names]
    except Exception as error:  # other tensors, other shapes, an entry that is not there
        raise ValueError(f"{path} is not of this run ({type(error).__name__}: {first_line(error)}); put its own"
                         " state.pt back, or start a new run") from error


# ----------------------------------------------------------------------------------------------------------------- logs

def check_finite(losses: dict[str, float], step: int, names: list[str]) -> None:
    bad = {k: v for k, v in losses.items() if not math.isfinite(v)}
    if bad:
        raise ValueError(f"step {step}: the loss became {bad} on {', '.join(names)}; the last saved state is untouched:"
                         " look at these pictures, try --mixed_precision no or bf16, or a lower --learning_rate")


def share_right(logits: list[Tensor], real: bool) -> float:
    """The share of a discriminator's verdicts that are right, of pictures that are `real` or not. 0.5 is chance; near 1
    for long, the generator has lost."""
    return (torch.cat([level.detach().flatten() > 0 for level in logits]) == real).float().mean().item()


def open_log(folder: pathlib.Path, step: int) -> pathlib.Path:
    """log.jsonl without the lines of steps that will be run again."""
    path = folder / "log.jsonl"
    if path.is_file():
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):  # a line cut by a kill
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        write_file(path, lambda temporary: temporary.write_text("".join(kept)))
    return path


def append_log(path: pathlib.Path, step: int, values: dict) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
    except OSError as error:
        raise OSError(f"{path} could not be written ({first_line(error)}); the last saved state is whole: make room,"
                      f" and go on with --resume {path.parent}") from error


def open_reporter(report_to: str | None, folder: pathlib.Path, project: str) -> Callable[[int, dict], None]:
    """TensorBoard or W&B beside the log, for those who ask and have it."""
    if report_to in (None, "none"):
        return lambda step, values: None
    try:
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(folder))
            return lambda step, values: [writer.add_scalar(k, v, step) for k, v in values.items()]
        if report_to == "wandb":
            import wandb
            wandb.init(project=project, dir=str(folder), name=folder.name)
            return lambda step, values: wandb.log(values, step=step)
    except ImportError:
        raise ValueError(f"--report_to {report_to} needs a package of that name; pip install {report_to}, or leave the"
                         " flag out") from None
    raise ValueError(f"--report_to {report_to}: expected tensorboard, wandb or none")


def announce(rank: int, trained: dict[str, Tensor], items: str, device: torch.device, folder: pathlib.Path) -> None:
    if rank == 0:
        n = sum(p.numel() for p in trained.values())
        print(f"training {n / 1e6:.2f} M weights on {items}, {device}; {folder}", file=sys.stderr)


def open_report(cfg, rank: int, folder: pathlib.Path, start: int, last: int, items: int
                ) -> Callable[[int, dict[str, float]], None]:
    """report(done, values): the values of step `done`, of `items` items, go to log.jsonl and to --report_to, the losses
    to the progress bar."""
    if rank != 0:
        return lambda done, values: None
    log, tell = open_log(folder, start), open_reporter(cfg.report_to, folder, cfg.tracker_project_name)
    bar, clock = tqdm(total=last, initial=start, unit="step"), time.monotonic()

    def report(done: int, values: dict[str, float]) -> None:
        append_log(log, done, values)
        tell(done, values)
        rate = (done - start) * items / (time.monotonic() - clock)
        bar.set_postfix({k: f"{values[k]:.3g}" for k in SHOWN if k in values} | {"items/s": f"{rate:.1f}"},
                        refresh=False)
        bar.update()

    return report


def save_grid(path: pathlib.Path, columns: list[Tensor], at_least: int = 96) -> None:
    """Pictures [N, 3, H, W] in [-1, 1], a list of columns: row i shows the i-th of each. Small ones are enlarged."""
    rows = torch.cat([c.detach().float().cpu().clamp(-1, 1) for c in columns], dim=3)  # [N, 3, H, columns * W]
    levels = ((rows + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    half = (len(levels) + 1) // 2  # two stacks side by side, so that the page is not a ribbon
    stacks = [np.concatenate(list(levels[i:i + half])) for i in (0, half) if i < len(levels)]
    gap, width = 4, stacks[0].shape[1]
    page = np.full((stacks[0].shape[0], len(stacks) * (width + gap) - gap, 3), 255, np.uint8)
    for i, stack in enumerate(stacks):
        page[:stack.shape[0], i * (width + gap):i * (width + gap) + width] = stack
    picture = Image.fromarray(page)
    zoom = max(1, at_least // columns[0].shape[-1])
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    write_file(path, lambda temporary: picture.save(temporary, format="PNG"))


def plot_losses(log: pathlib.Path, path: pathlib.Path) -> None:
    """Every number of the log against the step, one small panel each, smoothed."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text().splitlines():
        values = json.loads(line)
        for key, value in values.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(key, []).append((values["step"], value))
    W, H, margin, across = 360, 200, 34, 3
    page = Image.new("RGB", (W * across, H * max(1, math.ceil(len(series) / across))), "white")
    pen = ImageDraw.Draw(page)
    for i, (key, points) in enumerate(series.items()):
        left, top = i % across * W + margin, i // across * H + margin
        right, bottom = left + W - 1.5 * margin, top + H - 1.8 * margin
        mean, smooth, keep = None, [], 0.9 if len(points) > 100 else 0.0  # the few of validations stay as they are
        for step, value in points:
            mean = value if mean is None else keep * mean + (1 - keep) * value
            smooth.append((step, mean))
        low, high = (f(v for _, v in points) for f in (min, max))
        last = max(points[-1][0], 1)

        pen.rectangle([left, top, right, bottom], outline="#bbbbbb")
        for line, colour in [(points, "#c9dcf0"), (smooth, "#1f5fa8")]:
            places = [(left + (right - left) * s / last, bottom - (bottom - top) * (v - low) / (high - low or 1))
                      for s, v in line]
            pen.line(places, fill=colour, width=2)
        pen.text((left, top - 22), f"{key}: {smooth[-1][1]:.4g}", fill="black")
        pen.text((left, bottom + 3), f"{low:.3g} ... {high:.3g}, {last} steps", fill="#666666")
    write_file(path, lambda temporary: page.save(temporary, format="PNG"))
