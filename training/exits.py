"""Exit status: what a user must change is one line, and a bug keeps its traceback."""

import os
import pathlib
import signal
import sys
import typing
from collections.abc import Callable

import torch
from tqdm import tqdm


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
    except (RuntimeError, MemoryError) as error:
        message = explain(error)
        if message is None:
            raise
        fail(message)
    except KeyboardInterrupt as stop:
        if stop.args:
            say_once(stop.args[0])
        sys.exit(130)


def say_once(line: str) -> None:
    """Prints a line on stderr. Of several processes under torchrun, only the first one does."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(line, file=sys.stderr)


def fail(message: str) -> typing.NoReturn:
    """Prints one line without breaking a progress bar, and exits with status 2."""
    script = pathlib.Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else script.name
    tqdm.write(f"{name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED")  # CPU, MPS, cuBLAS
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def explain(error: RuntimeError | MemoryError) -> str | None:
    """What the user can do about an error; None for one that is a bug."""
    if out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}); make pictures or batches smaller (--size,"
            " --batch, --tile; in a trainer --train_batch_size, --resolution), or train with"
            " --gradient_checkpointing; a trainer's --plan measures what each of these saves"
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


def load_or_explain(load: Callable, *args, without: str):
    """load(*args). If it fails, the error also says how to do `without` it."""
    try:
        return load(*args)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; to do without it: {without}") from None


def first_line(error: Exception) -> str:
    text = str(error) or type(error).__name__
    line, *others = text.splitlines()
    if line.endswith(":") and others:  # the point stands below
        line = f"{line} {others[0].strip()}"
        return line[:240]
    return line[:120]
