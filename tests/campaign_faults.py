"""Damages real files of every kind, thousands of times, and reads them; cuts a state file
everywhere.

    python tests/campaign_faults.py --examples 1000 --output faults

This is no test of pytest: it takes minutes. A reader must print one error line, or return
something that works. Whatever else comes of a file (another exception, 20 seconds of work, memory
beyond 2 GB, a crash) is printed, and the file is kept in --output.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_faults import READERS, damaged, make_world, outcome  # noqa: E402

REFUSED, ACCEPTED, FAILED = "012"


def attempt(world: Path, name: str, cases: list[bytes], output: Path) -> list[int]:
    """Reads the cases. Returns how many were refused, accepted and failed.

    A process of its own reads them one after the other; a case that kills it has failed, and the
    next process goes on behind it.
    """
    place, _ = READERS[name]
    whole = (world / place).read_bytes()
    results = ""
    while len(results) < len(cases):
        found, status = read_in_child(world, name, cases, first=len(results))
        results += found
        if len(results) < len(cases):
            message = f"--- {name}, case {len(results)}: the process ended with status {status}"
            print(message, file=sys.stderr)
            results += FAILED
    (world / place).write_bytes(whole)

    for number, result in enumerate(results):
        if result == FAILED:
            file = f"{name.replace('/', '_').replace(' ', '_')}-{number}"
            (output / file).write_bytes(cases[number])
    return [results.count(kind) for kind in (REFUSED, ACCEPTED, FAILED)]


def read_in_child(world: Path, name: str, cases: list[bytes], first: int) -> tuple[str, int]:
    """Reads the cases from `first` on in a new process. Returns a letter for each case that it
    came to the end of, and its exit status."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        read_cases(world, name, cases, first, send)
    os.close(send)
    with os.fdopen(receive) as file:
        found = file.read()
    _, status = os.waitpid(child, 0)
    return found, status


def read_cases(world: Path, name: str, cases: list[bytes], first: int, send: int) -> NoReturn:
    """Writes a letter for each case to the pipe `send`, then ends the process."""
    place, call = READERS[name]
    for number in range(first, len(cases)):
        (world / place).write_bytes(cases[number])
        try:
            result = REFUSED if outcome(lambda: call(world)) else ACCEPTED
        except KeyboardInterrupt:
            os._exit(1)
        except BaseException as error:  # a panic of a Rust library is no Exception
            result = FAILED
            trace = "".join(traceback.format_exception(error)[-3:])
            message = f"--- {name}, case {number}: {type(error).__name__}\n{trace}"
            print(message, file=sys.stderr, flush=True)
        os.write(send, result.encode())
    os._exit(0)


def cut_everywhere(whole: bytes, draw: random.Random) -> list[bytes]:
    """The file, cut at 200 random places and at each of the first and last 100."""
    ends = {draw.randrange(len(whole)) for _ in range(200)}
    ends |= set(range(100)) | set(range(len(whole) - 100, len(whole)))
    return [whole[:end] for end in sorted(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--examples", type=int, default=200, help="damaged files for each reader [200]"
    )
    parser.add_argument("--readers", nargs="*", default=list(READERS), help="which [all]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path("faults"), help="a folder for files that fail [faults]"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    world = make_world(folder)

    total = [0, 0, 0]
    for name in args.readers:
        place, _ = READERS[name]
        draw = random.Random(f"{args.seed} {name}")
        whole = (world / place).read_bytes()
        runs = {name: [damaged(place, whole, draw) for _ in range(args.examples)]}
        if name == "state":
            runs["state, cut"] = cut_everywhere(whole, draw)
        for what, cases in runs.items():
            counts = attempt(world, name, cases, args.output)
            total = [a + b for a, b in zip(total, counts)]
            report(what, counts)
    shutil.rmtree(folder)
    report("all", total)
    sys.exit(1 if total[2] else 0)


def report(what: str, counts: list[int]) -> None:
    refused, accepted, failed = counts
    tried = sum(counts)
    print(
        f"{what}: tried {tried}, refused {refused}, accepted {accepted}, failed {failed}",
        flush=True,
    )


if __name__ == "__main__":
    main()
