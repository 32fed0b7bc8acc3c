"""What the three trainers share: flags, processes, run folders, logs; and of a step the learning
rate, the averaging and clipping of gradients, and the random numbers.

Losses, networks, optimizers and the order of steps are in the trainers. This file knows no
network.
"""

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

# Settings that a resumed run may change. (max_train_steps also moves the end of a linear or cosine
# learning rate.)
MAY_CHANGE = {
    "max_train_steps",
    "checkpointing_steps",
    "viz_freq",
    "validation_steps",
    "resume",
    "dataloader_num_workers",
}
# The smallest value of integer flags. All others are at least 1.
AT_LEAST = {
    "seed": 0,
    "dataloader_num_workers": 0,
    "lr_warmup_steps": 0,
    "prior_pictures": 0,
    "tile": 32,
}
# Flags of other trainers that have no meaning here, and why.
REFUSED = {
    "--enable_xformers_memory_efficient_attention":
        "attention is always fused here (scaled_dot_product_attention)",
    "--allow_tf32": "TF32 is always allowed for float32 matrix products on CUDA",
    "--checkpoints_total_limit": "one state.pt is kept and only ever replaced by a complete one",
    "--set_grads_to_none": "gradients are always set to None",
    "--revision": "to choose a version, name a local folder",
    "--variant": "the files that exist are used, full precision first",
    "--local_rank": "torchrun passes it through the environment",
}
Scheduler = typing.Literal["constant", "constant_with_warmup", "linear", "cosine"]
Precision = typing.Literal["no", "bf16", "fp16"]
# Losses on the progress bar, in a trainer that has them.
ON_THE_BAR = ("l2", "cycle", "idt", "gan", "kl", "con", "adapt", "disc")


# ------------------------------------------------------------------------------------ flags

def parse(
    cls: type,
    tables: dict[str, dict],
    aliases: dict[str, str],
    description: str,
    argv: list[str] | None = None,
):
    """Fills a settings dataclass from the command line: one flag per field, its comment as help.

    `tables` maps the beginning of a base's name to defaults for such bases, `aliases` other
    spellings of a flag to the field. A value comes from the flag, else from the table, else from
    the dataclass. With --resume FOLDER all values come from FOLDER/config.json, and only those
    in `MAY_CHANGE` may be overridden.
    """
    parser = build_parser(cls, aliases, description)
    given = given_values(parser, argv)
    if "resume" in given:
        return resumed_settings(cls, given, aliases, parser)

    base = str(given.get("base", getattr(cls, "base", "")))
    table = defaults_of(base, tables)
    defaults = {name: value for name, value in table.items() if name not in given}
    if defaults and int(os.environ.get("RANK", 0)) == 0:
        listed = " ".join(f"--{name} {value}" for name, value in defaults.items())
        print(f"defaults of the base {base}: {listed}", file=sys.stderr)
    return cls(**{**defaults, **given})


def build_parser(cls: type, aliases: dict[str, str], description: str) -> argparse.ArgumentParser:
    comments = field_comments(cls)
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for field in fields(cls):
        names = [f"--{field.name}"]
        names += [f"--{alias}" for alias, name in aliases.items() if name == field.name]
        text = comments.get(field.name, "")
        if field.default is not None:
            text += f" [{field.default}]"
        text = text.strip().replace("%", "%%")
        parser.add_argument(*names, dest=field.name, default=None, help=text, **kind_of(field.type))
    return parser


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, which is its help text."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))


def kind_of(annotation: type) -> dict:
    """How argparse reads a value of this type: T, T | None, or Literal."""
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if annotation is bool:
        return dict(nargs="?", const=True, type=on_or_off, metavar="on|off")
    if typing.get_origin(annotation) is typing.Literal:
        return dict(type=str, choices=typing.get_args(annotation))
    return dict(type=annotation)


def on_or_off(text: str) -> bool:
    """The value of a switch. The flag without a value means "on"."""
    if text.lower() not in ("on", "off", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: expected on or off")
    return text.lower() in ("on", "true")


def defaults_of(base: str, tables: dict[str, dict]) -> dict:
    """The first table whose key is a prefix of the base's name, or of its last path component."""
    for prefix, table in tables.items():
        if base.startswith(prefix) or pathlib.Path(base).name.startswith(prefix):
            return table
    return {}


def given_values(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """The flags that were given. ValueError for a negative number among the floats."""
    parsed = vars(parse_args(parser, argv))
    given = {name: value for name, value in parsed.items() if value is not None}
    for name, value in given.items():
        if type(value) is float and value < 0:
            raise ValueError(f"--{name} {value}: expected 0 or more")
    return given


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """parser.parse_args, but errors are ValueErrors of one line that suggest the nearest flag."""

    def refuse(message: str):
        raise ValueError(message)

    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    for one in parsers:
        one.error = refuse

    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for one in parsers for name in one._option_string_actions]
        refuse(why_unknown(unknown[0], known))
    for name, value in vars(given).items():
        check_number(name, value)
    return given


def why_unknown(argument: str, known: list[str]) -> str:
    name = argument.split("=")[0]
    if name in REFUSED:
        return f"{name} is not needed: {REFUSED[name]}; leave it out"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return f"unknown argument {argument}; {hint}"


def check_number(name: str, value: object) -> None:
    """ValueError for an int below its least value or a float that is not finite."""
    if type(value) is int:
        least = AT_LEAST.get(name, 1)
        if not least <= value < 2**63:
            raise ValueError(f"--{name} {value}: expected {least} or more, below 2^63")
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"--{name} {value}: expected a finite number")


def resumed_settings(
    cls: type, given: dict, aliases: dict[str, str], parser: argparse.ArgumentParser
):
    """The settings that a run began with, and those of `MAY_CHANGE` that were given anew."""
    folder = given["resume"]
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--resume {folder} has no config.json; expected the --output_dir of an earlier run"
        )
    try:  # saved values are checked as flags are
        known = {field.name for field in fields(cls)} | set(aliases)
        values = json.loads(path.read_text()).items()
        flags = [f"--{k}={v}" for k, v in values if k in known and v is not None]
        saved = given_values(parser, flags)
        dropped = [f"{k:.40} {v!s:.40}" for k, v in values if k not in known and v]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not hold the settings of a run ({first_line(error)});"
            " copy it again, or start a new run"
        ) from None

    if dropped:  # of an older version; what is off changes nothing
        raise ValueError(
            f"{path} asks for {', '.join(dropped)}, which is no setting any more; go on with the"
            " version that the run began with, or start a new run"
        )
    for name in given.keys() - MAY_CHANGE:
        if given[name] != saved.get(name):
            raise ValueError(
                f"--{name} {given[name]} differs from the {saved.get(name)} that the run {folder}"
                f" began with; only {', '.join(sorted(MAY_CHANGE - {'resume'}))} may change on"
                " resuming: leave it out"
            )
    return cls(**{**saved, **given, "output_dir": folder})


def first_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:120]


# ------------------------------------------------------------------------------- exit status

def run_script(main: Callable[[], None]) -> None:
    """Calls a script's `main` and turns what it raises into an exit status.

    2, with one line on stderr: the user must change something. 130: Ctrl-C. Any other exception
    is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names and captions that an encoding does not have
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))  # file names may hold line breaks
    except RuntimeError as error:
        message = explain(error)
        if message is None:
            raise
        fail(message)
    except KeyboardInterrupt as stop:
        if stop.args and int(os.environ.get("RANK", 0)) == 0:
            tqdm.write(stop.args[0], file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> typing.NoReturn:
    """Prints one line without breaking a progress bar, and exits with status 2."""
    tqdm.write(f"{pathlib.Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def explain(error: RuntimeError) -> str | None:
    """What the user can do about a RuntimeError; None for one that is a bug."""
    cpu, cublas = "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
    if isinstance(error, torch.OutOfMemoryError) or cpu in str(error) or cublas in str(error):
        return (
            f"out of memory ({first_line(error)}); make pictures or batches smaller (--size,"
            " --batch, --tile; in a trainer --train_batch_size, --resolution), or train with"
            " --gradient_checkpointing"
        )
    if str(error).startswith("DataLoader worker"):
        # torch raises this from a handler of SIGCHLD. Without the reset, the exits of the other
        # workers would raise it again.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return (
            f"a process that loads pictures was lost ({first_line(error)}); the last saved state"
            " is complete: go on with --resume, and if memory was short, with fewer"
            " --dataloader_num_workers"
        )
    return None


# ----------------------------------------------------------------------- devices and processes

def pick_device(name: str) -> torch.device:
    """The named device, or the best one for "auto". ValueError where it cannot be used."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used ({first_line(error)}); expected auto, or cpu, cuda"
            " or mps if this machine has it"
        ) from None
    return device


def start_ranks(device_name: str) -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and its device. Joins them under torchrun."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device_name == "auto" and torch.cuda.is_available():
        device_name = "cuda"
    if device_name == "cuda":  # each process its own GPU, before anything allocates on the first
        device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # The other processes wait while rank 0 validates.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world, device


def my_rows(rank: int, world: int, batch: int, accumulation: int) -> list[list[int]]:
    """Rows of the global batch that this process takes, one list per micro-batch."""
    rows = []
    for slice_number in range(accumulation):
        first = (slice_number * world + rank) * batch
        rows.append(list(range(first, first + batch)))
    return rows


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over all processes, in one bucket."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    bucket = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(bucket)
    bucket /= dist.get_world_size()
    for grad, mean in zip(grads, bucket.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    if not dist.is_initialized():
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(means)
    means /= dist.get_world_size()
    return dict(zip(values, means.tolist()))


def rng(seed: int, step: int, what: str) -> torch.Generator:
    """The CPU random generator for one purpose at one step.

    It depends on nothing else, neither on ranks nor on earlier draws, so resuming a run or
    splitting a batch changes no random number.
    """
    digest = hashlib.sha256(f"{seed} {step} {what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw_noise(
    seeds: Iterable[int], shape: tuple[int, ...]
) -> tuple[Tensor, list[torch.Generator]]:
    """Standard normal noise [len(seeds), *shape] in float32 on the CPU, one generator per seed.

    Also returns the generators, for whatever each picture draws next.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, *shape, generator=g) for g in generators])
    return noise, generators


def catch_stop() -> Callable[[], bool]:
    """Makes the first Ctrl-C or SIGTERM a request.

    The returned function says whether one came, on any rank. A second Ctrl-C stops at once.
    """
    requests = []

    def handler(number, frame):
        # SIGTERM comes several times, from a scheduler and again from torchrun.
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return lambda: mean_over_ranks({"stop": float(bool(requests))})["stop"] > 0


# ---------------------------------------------------------------------------------- the run

class Run:
    """A training run: device, precision, the split of the batch, the folder and the log.

    Call plan, open_folder, restore (if resuming) and start, in this order. `autocast` and
    `scaler` follow --mixed_precision; `dtype` is the type of trained weights, `half` that of
    frozen ones (None: the same). `micro_batches` holds this process's rows of the global batch,
    one list per micro-batch. `best` is the score of the best validation so far.
    """

    def __init__(self, cfg, kind: str):
        self.cfg = cfg
        self.kind = kind
        self.rank, self.world, self.device = start_ranks(cfg.device)
        self.dtype = getattr(torch, cfg.dtype)
        self.half = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[cfg.mixed_precision]
        self.autocast = torch.autocast(
            self.device.type, self.half or torch.bfloat16, enabled=self.half is not None
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half == torch.float16)
        self.first_step = 0
        self.best = math.inf
        torch.manual_seed(cfg.seed)

    def plan(self, items: int) -> None:
        """Sets the global batch, this process's rows of it and the last step, for a data set."""
        cfg = self.cfg
        slices = cfg.gradient_accumulation_steps
        self.global_batch = self.world * cfg.train_batch_size * slices
        self.micro_batches = my_rows(self.rank, self.world, cfg.train_batch_size, slices)
        self.rows = [row for rows in self.micro_batches for row in rows]
        self.last_step = cfg.max_train_steps
        if cfg.max_train_epochs:
            steps = math.ceil(cfg.max_train_epochs * items / self.global_batch)
            self.last_step = min(steps, self.last_step)

    @contextlib.contextmanager
    def first_process_first(self) -> Iterator[None]:
        """The first process goes ahead; the others find what it downloaded."""
        if self.rank:
            dist.barrier()
        yield
        if not self.rank and dist.is_initialized():
            dist.barrier()

    def split(self, batch: dict) -> Iterator[tuple[list[int], dict]]:
        """For each micro-batch its rows of the global batch, and its part of `batch`."""
        for i, rows in enumerate(self.micro_batches):
            mine = slice(i * len(rows), (i + 1) * len(rows))
            piece = {name: values[mine] for name, values in batch.items()}
            yield rows, self.to_device(piece)

    def to_device(self, batch: dict) -> dict:
        """The batch with its tensors on the device, in the type of trained weights."""
        moved = dict(batch)
        for name, values in batch.items():
            if isinstance(values, Tensor):
                moved[name] = values.to(self.device, self.dtype)
        return moved

    def normal(self, step: int, what: str, rows: list[int], shape: Iterable[int]) -> Tensor:
        """Standard normal noise [len(rows), *shape] for these rows of the global batch."""
        generator = rng(self.cfg.seed, step, what)
        noise = torch.randn(self.global_batch, *shape, generator=generator)
        return noise[rows].to(self.device, self.dtype)

    def set_learning_rate(
        self, step: int, *optimizers: torch.optim.Optimizer | None, scale: float = 1.0
    ) -> None:
        """Sets the step's learning rate, times `scale`."""
        rate = scale * learning_rate(step, self.cfg, self.last_step)
        for optimizer in optimizers:
            set_learning_rate(optimizer, rate)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's loss."""
        self.scaler.scale(loss / len(self.micro_batches)).backward()

    def update(self, optimizer: torch.optim.Optimizer, max_norm: float = math.inf) -> float:
        """Averages gradients over processes, clips their norm, steps and clears them.

        Returns the norm before clipping. With a norm that is not finite no step is
        taken: under fp16 the scaler tries a smaller scale, else `check_finite` ends the run.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(parameters)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
        if self.scaler.is_enabled() or math.isfinite(norm):
            self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return norm

    def due(self, step: int, every: int, also: bool = False) -> bool:
        """Whether rank 0 does a periodic job now: every `every` steps, after the last step, or if
        `also`."""
        done = step + 1
        return self.rank == 0 and (done % every == 0 or done == self.last_step or also)

    def check_finite(self, losses: dict[str, float], step: int, batch: dict) -> None:
        """ValueError where a loss or gradient norm is not finite. The last saved state is kept.

        Under fp16 gradient norms may overflow: the scaler then skips the step by itself.
        """
        checked = dict(losses)
        if self.scaler.is_enabled():
            checked.pop("grad_norm", None)
            checked.pop("disc_grad_norm", None)
        names = [name for key in ("name", "name_a", "name_b") for name in batch.get(key, [])]
        check_finite(checked, step, names)

    def record(self, losses: dict[str, float], values: dict[str, Tensor | float]) -> None:
        """Adds one micro-batch's values to the means over the step's micro-batches."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.item()
            losses[name] = losses.get(name, 0.0) + value / len(self.micro_batches)

    # ------------------------------------------------------------ the folder and the state

    def open_folder(self) -> None:
        """Makes the run's folder with its config.json."""
        self.folder = open_run(self.cfg, self.kind, self.rank)

    def restore(self, frozen: str, parts: dict, *names: str) -> list:
        """Puts the saved state back into `parts`; returns the saved values of `names`.

        `frozen` is the fingerprint of all weights that are not trained.
        """
        step, best, *values = restore(
            self.folder, frozen, parts, "step", "best", *names, batch=self.global_batch
        )
        self.first_step = step
        self.best = best
        return values

    def save_state(self, step: int, frozen: str, parts: dict, **values) -> None:
        """Writes state.pt, from which `restore` goes on to the same bits, and plots the log.

        Save the weights first: a resumed run assumes that they were written.
        """
        state = dict(step=step + 1, best=self.best, base=frozen, batch=self.global_batch)
        save_state(self.folder / "state.pt", state | values | parts)
        log = self.folder / "log.jsonl"
        if log.is_file():  # there is none if the first step's validation failed
            plot_losses(log, self.folder / "losses.png")

    def write(self, name: str, write: Callable[[pathlib.Path], object]) -> None:
        """Writes a file of the run's folder, completely or not at all."""
        write_file(self.folder / name, write)

    def improves(self, score: float) -> bool:
        """Whether this validation is the best so far (lower is better). Remembers it."""
        if score >= self.best:
            return False
        self.best = score
        return True

    # ------------------------------------------------------------ logs

    def start(self, trained: dict[str, Tensor], items: str) -> None:
        """Says what is about to be trained on which items, opens the log and the progress bar,
        and makes Ctrl-C a request to stop."""
        self.stop_requested = catch_stop()
        if self.rank != 0:
            return
        millions = sum(p.numel() for p in trained.values()) / 1e6
        print(
            f"training {millions:.2f} M weights on {items}, {self.device}; {self.folder}",
            file=sys.stderr,
        )
        self.log_file = open_log(self.folder, self.first_step)
        self.report = open_reporter(self.cfg.report_to, self.folder, self.cfg.tracker_project_name)
        self.bar = tqdm(total=self.last_step, initial=self.first_step, unit="step")
        self.started = time.monotonic()

    def log(self, step: int, losses: dict[str, float]) -> None:
        """Writes a step's values to log.jsonl and --report_to, and the losses to the bar."""
        if self.rank != 0:
            return
        done = step + 1
        append_log(self.log_file, done, losses)
        self.report(done, losses)
        items = (done - self.first_step) * self.global_batch
        shown = {name: f"{losses[name]:.3g}" for name in ON_THE_BAR if name in losses}
        shown["items/s"] = f"{items / (time.monotonic() - self.started):.1f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def stopped(self, step: int) -> KeyboardInterrupt:
        """The exception that ends a run after a request to stop, once everything is saved."""
        if dist.is_initialized():
            dist.barrier()  # torchrun kills the others once one process exits
        return KeyboardInterrupt(
            f"stopped after step {step + 1}, saved; go on with --resume {self.folder}"
        )

    def finish(self) -> None:
        """Prints the path of the trained weights."""
        if self.rank == 0:
            print(self.folder / "model.safetensors")


# ------------------------------------------------------------------------- parts of a step

def learning_rate(step: int, cfg, last_step: int) -> float:
    """The learning rate of a step: linear warm-up, then constant, or to 0 (linear, cosine)."""
    rise = 1.0
    if cfg.lr_scheduler != "constant":
        rise = min(1.0, (step + 1) / max(cfg.lr_warmup_steps, 1))
    steps = max(last_step - cfg.lr_warmup_steps, 1)
    progress = max(0.0, (step - cfg.lr_warmup_steps) / steps)
    fall = 1.0
    if cfg.lr_scheduler == "linear":
        fall = 1 - progress
    if cfg.lr_scheduler == "cosine":
        fall = 0.5 + 0.5 * math.cos(math.pi * progress)
    return cfg.learning_rate * rise * fall


def set_learning_rate(optimizer: torch.optim.Optimizer | None, rate: float) -> None:
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate


@contextlib.contextmanager
def swapped(trained: dict[str, Tensor], ema: dict[str, Tensor]) -> Iterator[None]:
    """Within this context the trained weights hold their EMA. Without an EMA nothing changes."""
    swap(trained, ema)
    try:
        yield
    finally:
        swap(trained, ema)


def swap(trained: dict[str, Tensor], ema: dict[str, Tensor]) -> None:
    for name, average in ema.items():
        weights = trained[name].data
        trained[name].data = average
        ema[name] = weights


@contextlib.contextmanager
def saved_on_failure(save: Callable[[int], None], step: int) -> Iterator[None]:
    """Calls save(step) before an error inside this context ends the run, so that no step is lost.

    A test picture that cannot be read, or memory that only validation needs, costs no training.
    """
    try:
        yield
    except Exception:
        save(step)
        raise


def check_finite(losses: dict[str, float], step: int, names: list[str]) -> None:
    """ValueError where a value is not finite, with the names of the step's pictures."""
    bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
    if bad:
        raise ValueError(
            f"step {step}: the loss became {bad} on {', '.join(names)}; the last saved state is"
            " untouched: look at these pictures, try --mixed_precision no or bf16, or a lower"
            " --learning_rate"
        )


def set_trainable(network: nn.Module | None, trainable: bool) -> None:
    if network is not None:
        network.requires_grad_(trainable)


def accuracy(logits_real: list[Tensor], logits_fake: list[Tensor]) -> dict[str, float]:
    """How often a discriminator is right about real pictures and about fakes, for the log."""
    return {
        "disc_right_on_real": share_right(logits_real, True),
        "disc_right_on_fake": share_right(logits_fake, False),
    }


def share_right(logits: list[Tensor], real: bool) -> float:
    """The share of logits with the right sign for pictures that are `real` or not.

    0.5 is chance. If it stays near 1, the discriminator has won.
    """
    verdicts = torch.cat([level.detach().flatten() > 0 for level in logits])
    return (verdicts == real).float().mean().item()


# -------------------------------------------------------------------------------- run folders

def open_run(config, kind: str, rank: int) -> pathlib.Path:
    """The run's folder with its config.json. An earlier run there is never overwritten."""
    if config.output_dir is None:
        name = [f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}"]
        if dist.is_initialized():
            dist.broadcast_object_list(name)
        config.output_dir = name[0]
    folder = pathlib.Path(config.output_dir)
    if rank != 0:
        return folder

    results = [folder / "state.pt", folder / "model.safetensors"]
    if not config.resume and any(path.exists() for path in results):
        raise ValueError(
            f"{folder} holds a run already; continue it with --resume {folder}, or choose another"
            " --output_dir"
        )
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while writing
        leftover.unlink()
    if not config.resume:  # the log of a run that ended before its first save
        (folder / "log.jsonl").unlink(missing_ok=True)
    settings = json.dumps(asdict(config), indent=1)
    write_file(folder / "config.json", lambda path: path.write_text(settings))
    return folder


def write_file(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Calls `write` with a temporary file beside `path`, then renames that file.

    Whatever happens, `path` is the old file or the new one, complete.
    """
    # A short name: the file's own may be as long as the system allows.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    temporary = path.with_name(f".{digest}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:
        raise OSError(
            f"{path} could not be written ({first_line(error)}); the file that was there is"
            " untouched: make room, and run the command again (a trainer's with --resume)"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_or_explain(load: Callable, *args, without: str):
    """load(*args). If it fails, the error also says how to do `without` it."""
    try:
        return load(*args)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; to do without it: {without}") from None


def save_state(path: pathlib.Path, state: dict) -> None:
    """Writes values, tensors, and the state dictionaries of networks, optimizers and scalers."""
    saved = {}
    for name, part in state.items():
        saved[name] = part.state_dict() if hasattr(part, "state_dict") else part
    write_file(path, lambda temporary: torch.save(saved, temporary))


@torch.no_grad()
def restore(
    folder: pathlib.Path, base: str, parts: dict, *names: str, batch: int | None = None
) -> list:
    """Puts a saved state back into `parts` and returns the saved values of `names`.

    Parts are networks, optimizers, scalers, dictionaries of tensors, or None. Only tensors and
    plain values are read, never code. `base` is the fingerprint of the frozen weights, `batch`
    the number of items in a step, over all processes. ValueError where they differ.
    """
    path = folder / "state.pt"
    state = read_state(path)
    if state["base"] != base:
        raise ValueError(
            f"{path} was trained with frozen weights of fingerprint {state['base']}, and these"
            f" have {base}; restore the original frozen weights"
        )
    before = state.get("batch", batch)
    if before != batch:
        raise ValueError(
            f"{path} has steps of {before} items and these would be of {batch}; start as many"
            " processes as before"
        )
    try:
        if not isinstance(state["step"], int):
            raise TypeError(f"its step is {state['step']!r:.100}")
        for name, part in parts.items():
            if isinstance(part, dict):
                for key, tensor in part.items():
                    tensor.copy_(state[name][key])
            elif part is not None:
                part.load_state_dict(state[name])
        return [state[name] for name in names]
    except Exception as error:  # other tensors, other shapes, a missing entry
        raise ValueError(
            f"{path} is not of this run ({type(error).__name__}: {first_line(error)}); put its"
            " own state.pt back, or start a new run"
        ) from error


def read_state(path: pathlib.Path) -> dict:
    folder = path.parent
    if not path.is_file():
        raise ValueError(
            f"{folder} has no state.pt to resume from: the run ended before its first save;"
            " start again"
        )
    try:
        # torch.save never compresses. A compressed file may unpack to any size.
        if zipfile.is_zipfile(path):
            entries = zipfile.ZipFile(path).infolist()
            if any(entry.compress_type for entry in entries):
                raise ValueError("it is compressed, which torch.save never does")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["base"]  # noqa: B018  raises where the entry is missing
        return state
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage
        raise ValueError(
            f"{path} is damaged ({first_line(error)}); the trained weights so far are in"
            f" {folder / 'model.safetensors'}: copy state.pt again, or start a new run"
        ) from None


# --------------------------------------------------------------------------------------- logs

def open_log(folder: pathlib.Path, step: int) -> pathlib.Path:
    """log.jsonl, without the lines of steps after `step`, which will be run again."""
    path = folder / "log.jsonl"
    if not path.is_file():
        return path
    kept = []
    for line in path.read_text().splitlines():
        # A kill may have cut a line.
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_file(path, lambda temporary: temporary.write_text("".join(kept)))
    return path


def append_log(path: pathlib.Path, step: int, values: dict) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({first_line(error)}); the last saved state is complete:"
            f" make room, and go on with --resume {path.parent}"
        ) from error


def open_reporter(
    report_to: str | None, folder: pathlib.Path, project: str
) -> Callable[[int, dict], None]:
    """A function of (step, values) that logs to TensorBoard, W&B or nowhere."""
    if report_to not in (None, "none", "tensorboard", "wandb"):
        raise ValueError(f"--report_to {report_to}: expected tensorboard, wandb or none")
    try:
        if report_to == "tensorboard":
            return tensorboard_reporter(folder)
        if report_to == "wandb":
            return wandb_reporter(folder, project)
    except ImportError:
        raise ValueError(
            f"--report_to {report_to} needs a package of that name; pip install {report_to}, or"
            " leave the flag out"
        ) from None
    return lambda step, values: None


def tensorboard_reporter(folder: pathlib.Path) -> Callable[[int, dict], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def tell(step: int, values: dict) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return tell


def wandb_reporter(folder: pathlib.Path, project: str) -> Callable[[int, dict], None]:
    import wandb

    wandb.init(project=project, dir=str(folder), name=folder.name)
    return lambda step, values: wandb.log(values, step=step)


# ------------------------------------------------------------------------------------ pictures

def save_grid(path: pathlib.Path, columns: list[Tensor], at_least: int = 96) -> None:
    """Writes a grid: row i shows the i-th picture of each column, small ones enlarged.

    columns: pictures [N, 3, H, W] in [-1, 1]. The rows are in two stacks side by side, so that
    the page is not too tall. Pictures are at least `at_least` pixels wide.
    """
    columns = [column.detach().float().cpu().clamp(-1, 1) for column in columns]
    rows = torch.cat(columns, dim=3)  # [N, 3, H, columns * W]
    levels = ((rows + 1) * 127.5).round().to(torch.uint8)
    levels = levels.permute(0, 2, 3, 1).numpy()
    half = (len(levels) + 1) // 2
    stacks = [np.concatenate(list(levels[:half]))]
    if len(levels) > 1:
        stacks.append(np.concatenate(list(levels[half:])))

    gap = 4
    height, width, _ = stacks[0].shape
    page = np.full((height, len(stacks) * (width + gap) - gap, 3), 255, np.uint8)
    for i, stack in enumerate(stacks):
        left = i * (width + gap)
        page[:len(stack), left:left + width] = stack

    picture = Image.fromarray(page)
    zoom = max(1, at_least // columns[0].shape[-1])
    size = (picture.width * zoom, picture.height * zoom)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    write_file(path, lambda temporary: picture.save(temporary, format="PNG"))


def plot_losses(log: pathlib.Path, path: pathlib.Path) -> None:
    """Plots every number of the log against the step, one small panel each, and smoothed."""
    series = read_series(log)
    width, height, across = 360, 200, 3
    rows = max(1, math.ceil(len(series) / across))
    page = Image.new("RGB", (width * across, height * rows), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, points) in enumerate(series.items()):
        left = i % across * width
        top = i // across * height
        plot_panel(pen, name, points, left, top, width, height)
    write_file(path, lambda temporary: page.save(temporary, format="PNG"))


def read_series(log: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """The log's numbers by name: lists of (step, value)."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append((step, value))
    return series


def plot_panel(
    pen: ImageDraw.ImageDraw,
    name: str,
    points: list[tuple[int, float]],
    left: float,
    top: float,
    width: float,
    height: float,
) -> None:
    """One panel: the points in light blue, their smoothed line in dark blue, name and range."""
    margin = 34
    left, top = left + margin, top + margin
    right = left + width - 1.5 * margin
    bottom = top + height - 1.8 * margin
    smooth = smoothed(points)
    values = [value for _, value in points]
    low, high = min(values), max(values)
    last_step = max(points[-1][0], 1)

    pen.rectangle([left, top, right, bottom], outline="#bbbbbb")
    for line, colour in [(points, "#c9dcf0"), (smooth, "#1f5fa8")]:
        places = []
        for step, value in line:
            x = left + (right - left) * step / last_step
            y = bottom - (bottom - top) * (value - low) / (high - low or 1)
            places.append((x, y))
        pen.line(places, fill=colour, width=2)
    pen.text((left, top - 22), f"{name}: {smooth[-1][1]:.4g}", fill="black")
    limits = f"{low:.3g} ... {high:.3g}, {last_step} steps"
    pen.text((left, bottom + 3), limits, fill="#666666")


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential moving average. The few points of a validation stay as they are."""
    keep = 0.9 if len(points) > 100 else 0.0
    smooth = []
    mean = points[0][1]
    for step, value in points:
        mean = keep * mean + (1 - keep) * value
        smooth.append((step, mean))
    return smooth
