"""Logs: log.jsonl, TensorBoard and W&B."""

import contextlib
import json
import pathlib
from collections.abc import Callable

from training.exits import first_line
from training.folders import write_file


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
    report_to: str, folder: pathlib.Path, project: str
) -> Callable[[int, dict], None]:
    """A function of (step, values) that logs to TensorBoard, W&B or nowhere."""
    if report_to not in ("none", "tensorboard", "wandb"):
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
