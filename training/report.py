"""report.md of a run's folder: what was run, on what, how long, and what came of it.

It is short enough to be pasted into an issue, and shows losses.png and the last sample grid.
"""

import os
import platform
import shlex
import sys
import time
from dataclasses import fields

import torch

from training.folders import write_file
from training.meter import memory
from training.watch import History, score_of

# Settings that say nothing about what was run.
LEFT_OUT = ("resume", "output_dir", "plan", "plan_steps")


def write_report(run, end: str) -> None:
    """Writes report.md of a `Run`. `end` says how it ended."""
    folder = run.folder
    lines = [f"# {folder.name}", ""]
    for name, value in facts_of(run, end).items():
        lines.append(f"- {name}: {value}")
    warnings = list(run.history.given.values()) or ["none"]
    lines += ["", "Warnings:", "", *[f"- {warning}" for warning in warnings]]
    lines += ["", "Settings that differ from the defaults:", ""]
    lines += ["```", *changed_settings(run.cfg), "```"]
    grids = sorted((folder / "samples").glob("*.png"))
    for path in [folder / "losses.png", *grids[-1:]]:
        if path.is_file():
            lines += ["", f"![{path.stem}]({path.relative_to(folder).as_posix()})"]
    text = "\n".join(lines) + "\n"
    # Names of files may hold half a character, which UTF-8 cannot say.
    encoded = text.encode(errors="backslashreplace")
    write_file(folder / "report.md", lambda path: path.write_bytes(encoded))


def facts_of(run, end: str) -> dict[str, str]:
    return {
        "end": end,
        "command": f"`{command_line()}`",
        "data": f"{len(run.items)} {run.items_name} of {run.cfg.dataset_folder}",
        "time": time_taken(run),
        "machine": machine(run.device),
        "best validation": best_validation(run.history),
    }


def command_line() -> str:
    words = shlex.join(sys.argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        return f"torchrun --nproc_per_node={processes} {words}"
    return f"python {words}"


def time_taken(run) -> str:
    """Minutes since this process began to train, and its steps."""
    seconds = time.monotonic() - run.started
    steps = run.bar.n - run.first_step
    text = f"{seconds / 60:.1f} minutes for {steps} steps"
    if run.first_step:
        text += f", resumed at step {run.first_step}"
    return text


def machine(device: torch.device) -> str:
    """The device, how much of its memory was used, and the versions that matter."""
    name = f"{platform.machine()} with {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    used = memory(device)
    peak = used.get("reserved") or used.get("resident", 0)
    versions = f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"{name}, {peak / 1e9:.3g} of {used['total'] / 1e9:.3g} GB of memory, {versions}"


def best_validation(history: History) -> str:
    """The step of the best validation and what was measured there."""
    scores = history.series.get("val_score")
    if not scores:
        return "none was scored"
    step, _ = min(scores, key=score_of)
    found = []
    for name in history.names("val_"):
        values = dict(history.series[name])
        if name != "val_score" and step in values:
            found.append(f"{name} {values[step]:.4g}")
    return f"step {step}: {', '.join(found)} (the last was at step {scores[-1][0]})"


def changed_settings(cfg) -> list[str]:
    """The flags of all settings that are not the trainer's own defaults, one a line."""
    lines = []
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in LEFT_OUT or value == field.default:
            continue
        if isinstance(value, bool):
            value = "on" if value else "off"
        lines.append(f"--{field.name} {shlex.quote(str(value))}")
    return lines
