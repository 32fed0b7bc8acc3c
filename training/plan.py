"""--plan: what a run would need of memory and time, found by trying three steps of it.

Each row of the table is a process of its own, so that its peak of memory is its own, and one that
runs out of memory is a row like the others. See meter.py for what such a process does.
"""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BufferedReader

from tqdm import tqdm

STEPS = 3  # of each process; the first is not counted
PATIENCE = 600.0  # seconds after which no further variant is begun
# What would take long and says little about a step; and YOSO's first steps, which are cheaper.
SHORT = dict(validation_num_images=2, prior_pictures=8, denoising_steps=0)
# Settings that the measured processes do not get.
LEFT_OUT = ("plan", "resume", "output_dir")


@dataclass
class Row:
    """What was measured of one variant, and what stopped it if it did not come to its end."""

    name: str
    facts: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0  # of the whole process

    @property
    def start_up(self) -> float:
        """Seconds before the first step."""
        return self.seconds - self.facts["seconds"]

    @property
    def memory(self) -> float:
        """Bytes at the peak, of a GPU or of the process."""
        return self.facts.get("reserved") or self.facts["resident"]


def print_plan(cfg, script: str) -> None:
    """Prints what a trainer with these settings needs. Nothing is trained or written.

    ValueError where the trainer itself would end with one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "--plan measures one process; run it without torchrun (each of N processes needs this"
            " memory, and a step takes N times as many items)"
        )
    # Like Ctrl-C, SIGTERM must end the process that measures: `run` does so.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    asked = measure("as asked", script, cfg, {})
    rows = [asked]
    limit = 2 * asked.seconds + 60
    for name, changes in variants(cfg).items():
        if time.monotonic() - began > PATIENCE:
            rows.append(Row(name, problem=f"not tried: {duration(PATIENCE)} are over"))
        else:
            rows.append(measure(name, script, cfg, changes, limit))
    print("\n".join(summary(cfg, script, asked) + table(cfg, rows)))


def variants(cfg) -> dict[str, dict]:
    """The settings that save memory, by a name for each row, where they are not set yet."""
    found: list[dict[str, object]] = []
    if not cfg.gradient_checkpointing:
        found.append(dict(gradient_checkpointing=True))
    if cfg.mixed_precision == "no" and cfg.dtype == "float32":
        found.append(dict(mixed_precision="bf16"))
    # --lambda_mismatch takes captions within a micro-batch, whose size must stay.
    if cfg.train_batch_size > 1 and not getattr(cfg, "lambda_mismatch", 0):
        slices = cfg.train_batch_size * cfg.gradient_accumulation_steps
        found.append(dict(train_batch_size=1, gradient_accumulation_steps=slices))
    rows = {" ".join(as_flags(changes)): changes for changes in found}
    if len(found) > 1:
        together = {name: value for changes in found for name, value in changes.items()}
        rows["all of the above"] = together
    half = cfg.resolution // 16 * 8
    is_cache = (pathlib.Path(cfg.dataset_folder) / "index.json").is_file()  # its size is fixed
    if cfg.train_image_prep is None and not is_cache and half >= 16:
        rows[f"--resolution {half}"] = dict(resolution=half)
    return rows


def as_flags(settings: dict) -> list[str]:
    """Settings as flags; one that is None has no flag."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            value = "on" if value else "off"
        if value is not None:
            flags.append(f"--{name} {value}")
    return flags


# ------------------------------------------------------------------------------- measuring

def measure(
    name: str, script: str, cfg, changes: dict, limit: float | None = None
) -> Row:
    """Runs the trainer for a few steps in a process of its own.

    ValueError where the process ends with an error and no variant is tried, since the settings
    themselves are at fault.
    """
    tqdm.write(f"measuring {name}", file=sys.stderr)
    started = time.monotonic()
    done = run(command(script, cfg, changes), limit, speak=not changes)
    row = Row(name, last_facts(done.stdout), done.problem, time.monotonic() - started)
    if done.failed and not changes:
        raise ValueError(done.problem)
    return row


def command(script: str, cfg, changes: dict) -> list[str]:
    """The command line that measures `script` with these settings and changes to them."""
    settings = asdict(cfg)
    for name, value in SHORT.items():
        if settings.get(name):
            settings[name] = min(settings[name], value)
    settings |= changes | {"plan_steps": STEPS}
    left_out = set(LEFT_OUT)
    if cfg.resume:  # what a run began with says nothing about going on with it
        left_out.add("init")
    flags = as_flags({name: settings[name] for name in settings if name not in left_out})
    words = [flag.replace(" ", "=", 1) for flag in flags]
    return [sys.executable, script, *words]


@dataclass
class Done:
    """A process that has ended: what it printed, and why it is of no use if it is not."""

    stdout: str
    problem: str = ""
    failed: bool = False  # by an error other than a lack of memory or time


def run(words: list[str], limit: float | None, speak: bool) -> Done:
    """Runs a command for at most `limit` seconds; with `speak` its progress is shown."""
    errors: list[bytes] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process:
        problem = ""
        try:
            reader = threading.Thread(target=read_errors, args=(process.stderr, errors, speak))
            reader.start()
            process.wait(limit)
        except subprocess.TimeoutExpired:
            problem = f"stopped after {duration(limit)}"
        finally:
            process.kill()  # also on Ctrl-C and SIGTERM
            process.wait()
        stdout = process.stdout.read().decode()
        reader.join()
    if problem:
        return Done(stdout, problem)
    text = b"".join(errors).decode(errors="replace")
    return explain_end(process.returncode, stdout, text)


def read_errors(stream: BufferedReader, errors: list[bytes], speak: bool) -> None:
    """Collects what a process writes on stderr, and shows all but its last word."""
    for chunk in iter(partial(stream.read1, 1 << 16), b""):
        errors.append(chunk)
        if speak and b"error: " not in chunk:
            sys.stderr.write(chunk.decode(errors="replace"))


def explain_end(status: int, stdout: str, stderr: str) -> Done:
    """Whether a process came to its end, had no memory, or met an error."""
    if status == 0:
        return Done(stdout)
    lines = stderr.strip().splitlines() or [f"it ended with status {status}"]
    message = lines[-1].rpartition(": error: ")[2]
    if status < 0:  # as a rule the system's, which kills what takes too much memory
        return Done(stdout, f"killed by signal {-status} (out of memory?)")
    if message.startswith("out of memory"):
        return Done(stdout, "out of memory")
    return Done(stdout, message, failed=True)


def last_facts(stdout: str) -> dict[str, float]:
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


# ---------------------------------------------------------------------------- in plain words

def summary(cfg, script: str, row: Row) -> list[str]:
    """About ten lines on the run as asked."""
    lines = [
        f"plan of {pathlib.Path(script).name}: {cfg.base} on {cfg.dataset_folder},"
        f" {cfg.resolution} px, {cfg.train_batch_size} x {cfg.gradient_accumulation_steps} items"
        " a step",
    ]
    facts = row.facts
    if "trained" in facts:
        lines.append(
            f"weights           {millions(facts['trained'])} trained,"
            f" {millions(facts['discriminator'])} of discriminators,"
            f" {millions(facts['frozen'])} frozen"
        )
    if row.problem:
        lines.append(f"as asked          {row.problem}")
        return lines

    steps = int(facts["last_step"])
    validation, preview = periodic_seconds(cfg, row)
    first = row.start_up + facts["first_step"] + preview
    to_validation = seconds_to(row, min(cfg.validation_steps, steps)) + validation
    whole = whole_run(cfg, row)
    share = 1 - seconds_to(row, steps) / whole
    lines += [
        f"memory            {describe_memory(facts)}",
        f"a step            {facts['step']:.3g} s (the first {facts['first_step']:.3g} s),"
        f" after {duration(row.start_up)} to start",
        f"first preview     after {duration(first)} (step 1), {duration(preview)} for each",
        f"first validation  after {duration(to_validation)}"
        f" (step {min(cfg.validation_steps, steps)}), {duration(validation)} for each",
        f"the whole run     {duration(whole)} for {steps} steps, {share:.0%} of it validation and"
        " previews",
        f"a checkpoint      model.safetensors {size(facts['weights_bytes'])},"
        f" state.pt {size(facts['state_bytes'])}",
        f"loading           {describe_loading(cfg, facts)}",
    ]
    if cfg.resume:
        lines.append("of a whole run    times are from step 1; what the run has behind it is done")
    if getattr(cfg, "prior_pictures", 0) and not cfg.resume:
        lines.append(f"not counted       the prior of {cfg.prior_pictures} pictures, at the start")
    if getattr(cfg, "denoising_steps", 0):
        lines.append(f"faster than said  the first {cfg.denoising_steps} steps (--denoising_steps)")
    return lines


def table(cfg, rows: list[Row]) -> list[str]:
    """One line a variant; the one that was asked for is marked."""
    width = max(len(row.name) for row in rows)
    last = max(row.facts.get("last_step", 0) for row in rows)
    lines = ["", f"  {'flags':{width}}     memory   s/step   {last:.0f} steps"]
    for row in rows:
        mark = ">" if row is rows[0] else " "
        rest = f"   {row.problem[:80]}"
        if not row.problem:
            seconds = f"{row.facts['step']:.3g}"
            rest = f" {size(row.memory):>10} {seconds:>8}   {duration(whole_run(cfg, row))}"
        lines.append(f"{mark} {row.name:{width}}{rest}")
    return lines


def seconds_to(row: Row, step: int) -> float:
    """Seconds until so many steps are done, without validation and previews."""
    return row.start_up + row.facts["first_step"] + (step - 1) * row.facts["step"]


def periodic_seconds(cfg, row: Row) -> tuple[float, float]:
    """Seconds of one validation and of one preview."""
    facts = row.facts
    validation = facts["validation"] * min(cfg.validation_num_images, facts["test_items"])
    return validation, facts["validation"] * facts["preview_items"]


def whole_run(cfg, row: Row) -> float:
    """Seconds of the whole run, with validation and previews."""
    steps = int(row.facts["last_step"])
    validation, preview = periodic_seconds(cfg, row)
    validations = math.ceil(steps / cfg.validation_steps)
    previews = 1 + math.ceil(steps / cfg.viz_freq)
    return seconds_to(row, steps) + validations * validation + previews * preview


def describe_memory(facts: dict[str, float]) -> str:
    total = f" of {size(facts['total'])}" if facts["total"] else ""
    if "reserved" in facts:
        return (
            f"{size(facts['allocated'])} allocated, {size(facts['reserved'])} reserved{total}"
            " at the peak (CUDA)"
        )
    return f"{size(facts['resident'])} resident{total} at the peak"


def describe_loading(cfg, facts: dict[str, float]) -> str:
    """Items a second of loading alone against training, and what follows."""
    items = facts["global_batch"]
    training = items / facts["step"]
    workers = cfg.dataloader_num_workers
    loading = facts["loading"] * max(workers, 1)
    text = f"{loading:.3g} items/s alone, training takes {training:.3g} items/s"
    if workers == 0:
        share = items / loading / facts["step"]
        advice = ": --dataloader_num_workers 2 would hide it" if share > 0.1 else ""
        return f"{text}; it is {min(share, 1):.0%} of a step{advice}"
    if loading < 1.2 * training:
        return f"{text}; it holds training up: a faster disk or more --dataloader_num_workers"
    return f"{text}; it does not hold training up"


def millions(count: float) -> str:
    return f"{count / 1e6:.3g} M"


def size(count: float) -> str:
    """Bytes in MB or GB."""
    if count < 1e9:
        return f"{count / 1e6:.3g} MB"
    return f"{count / 1e9:.3g} GB"


def duration(seconds: float) -> str:
    """In seconds, minutes, hours or days, whichever is easily read."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
