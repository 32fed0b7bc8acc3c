"""Damages real files of every kind, thousands of times, and reads them; cuts a state file everywhere.

    python tests/campaign_faults.py --examples 1000 --output faults

Not part of pytest: it takes minutes. A reader must say one line or give something that works; whatever else comes of a
file (another exception, 20 seconds of work, memory beyond 2 GB, a crash) is printed, and the file kept in --output.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_faults import READERS, damaged, make_world, outcome  # noqa: E402


def attempt(world: Path, name: str, cases: list[bytes], output: Path) -> tuple[int, int, int]:
    """Reads the cases in processes of their own, each until one kills it: refused, accepted, failed."""
    place, call = READERS[name]
    whole, counts, i = (world / place).read_bytes(), [0, 0, 0], 0
    while i < len(cases):
        receive, send = os.pipe()
        if not (child := os.fork()):
            for number in range(i, len(cases)):
                (world / place).write_bytes(cases[number])
                try:
                    said = "0" if outcome(lambda: call(world)) else "1"
                except BaseException as error:  # a panic of a Rust library is no Exception
                    if isinstance(error, KeyboardInterrupt):
                        os._exit(1)
                    said, line = "2", "".join(traceback.format_exception(error)[-3:])
                    print(f"--- {name}, case {number}: {type(error).__name__}\n{line}", file=sys.stderr, flush=True)
                os.write(send, said.encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as file:
            said = file.read()
        _, status = os.waitpid(child, 0)
        if i + len(said) < len(cases):
            print(f"--- {name}, case {i + len(said)}: the process ended with status {status}", file=sys.stderr)
            said += "2"
        for number, what in enumerate(said, start=i):
            counts[int(what)] += 1
            if what == "2":
                (output / f"{name.replace('/', '_').replace(' ', '_')}-{number}").write_bytes(cases[number])
        i += len(said)
    (world / place).write_bytes(whole)
    return tuple(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=200, help="damaged files a reader [200]")
    parser.add_argument("--readers", nargs="*", default=list(READERS), help="of them [all]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("faults"), help="a folder for files that fail [faults]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp())
    world, total = make_world(folder), [0, 0, 0]
    for name in args.readers:
        place, draw = READERS[name][0], random.Random(f"{args.seed} {name}")
        whole = (world / place).read_bytes()
        cases = [damaged(place, whole, draw) for _ in range(args.examples)]
        runs = {name: cases}
        if name == "state":
            ends = {draw.randrange(len(whole)) for _ in range(200)}
            ends |= {*range(100), *range(len(whole) - 100, len(whole))}
            runs["state, cut"] = [whole[:end] for end in sorted(ends)]
        for what, cases in runs.items():
            counts = attempt(world, name, cases, args.output)
            total = [a + b for a, b in zip(total, counts)]
            print("{}: tried {}, refused {}, accepted {}, failed {}".format(what, sum(counts), *counts), flush=True)
    shutil.rmtree(folder)
    print("all: tried {}, refused {}, accepted {}, failed {}".format(sum(total), *total))
    sys.exit(1 if total[2] else 0)


if __name__ == "__main__":
    main()
