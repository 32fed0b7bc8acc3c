"""Kills a trainer at random moments and lets it resume, many times; at the end the bits must be those of a run left
alone.

    python tests/campaign_kills.py --kills 5

Not part of pytest: it takes minutes. Prints where each kill fell and whether the results agree.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trainer", default="train_pix2pix_turbo.py")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, folder = random.Random(args.seed), pathlib.Path(tempfile.mkdtemp())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ["--device", "cpu", "--train_batch_size", "2", "--checkpointing_steps", "1", "--num_samples_eval", "2",
             "--viz_freq", "7", "--eval_freq", "5"]

    def command(*more: str) -> list[str]:
        return [sys.executable, str(ROOT / args.trainer), *more]

    quiet = dict(env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin = time.monotonic()
    whole = subprocess.Popen(command(*flags, "--max_train_steps", str(args.steps), "--output_dir",
                                     str(folder / "whole")), **quiet)
    while not (folder / "whole" / "state.pt").exists() and whole.poll() is None:
        time.sleep(0.1)
    start = time.monotonic() - begin  # of it, until the first step is saved
    if whole.wait():
        sys.exit(f"the run that was left alone failed with status {whole.returncode}")
    length = time.monotonic() - begin - start
    cut, kills, starts = folder / "cut", 0, 0
    while kills < args.kills:
        resumable = (cut / "state.pt").exists()
        if not resumable and cut.exists():  # killed before its first save: there is nothing to lose
            subprocess.run(["rm", "-rf", str(cut)], check=True)
        first = [*flags, "--max_train_steps", str(args.steps), "--output_dir", str(cut)]
        more = ["--resume", str(cut)] if resumable else first
        process, starts = subprocess.Popen(command(*more), **quiet), starts + 1
        try:
            process.wait(rng.uniform(0.3 * start, 1.2 * start + length / args.kills))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            step = torch.load(cut / "state.pt", weights_only=True)["step"] if (cut / "state.pt").exists() else None
            print(f"kill {kills}: saved step {step}, left behind: {sorted(p.name for p in cut.glob('.*'))}", flush=True)
            continue
        if process.returncode:
            sys.exit(f"a resumed run failed with status {process.returncode}")
        break
    subprocess.run(command("--resume", str(cut)), check=True, **quiet)  # to the end, if the last kill was before it
    one, other = (load_file(folder / name / "model.safetensors") for name in ("whole", "cut"))
    same = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    lines = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
    complete = [line["step"] for line in lines] == list(range(1, args.steps + 1))
    print(f"{kills} kills in {starts} starts, {args.steps} steps: same bits {same}, log complete {complete}")
    sys.exit(0 if same and complete else 1)


if __name__ == "__main__":
    main()
