"""What the tiny bases can do, in figures: `python -m tiny.measure` draws, translates and judges.

The judge is a small network that was trained on drawings alone (`python -m tiny.recipe judge`) and reads a scene's
attributes from its picture: ground, time, weather, and which of the 32 kinds of thing ("red house") are there. What it
gets wrong of real drawings is printed beside what it finds wrong in made ones.
"""

import argparse
import json
import pathlib
import time

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import evaluate
import sample
import training
from dataset.pictures import canny, to_picture, to_tensor
from files import bases, checkpoints
from tiny import scenes

HERE = pathlib.Path(__file__).parent
FIELDS = dict(ground=scenes.GROUNDS, time=scenes.TIMES, weather=scenes.WEATHERS)
THINGS = [(colour, kind) for colour in scenes.COLOURS for kind in scenes.KINDS]
SPLITS = [*map(len, FIELDS.values()), len(THINGS)]


class Judge(nn.Module):
    """Picture [B, 3, 64, 64] in [-1, 1] -> logits of grounds [B, 3], times [B, 3], weathers [B, 4] and, each for
    itself, of the things that are there [B, 32]."""

    def __init__(self, widths: tuple[int, ...] = (24, 32, 48, 64, 64)):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in zip((3, *widths), widths)])
        self.norms = nn.ModuleList([nn.GroupNorm(8, b) for b in widths])
        self.last = nn.Linear(2 * widths[-1], sum(SPLITS))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.silu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if i < len(self.convs) - 1 else x
        return self.last(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)).split(SPLITS, dim=1)


def attributes(scene: scenes.Scene) -> tuple[list[int], list[float]]:
    """The index of each of FIELDS, and for each of THINGS whether it is there."""
    return [known.index(getattr(scene, field)) for field, known in FIELDS.items()], \
        [float(thing in scene.objects) for thing in THINGS]


def judge_loss(logits: tuple[Tensor, ...], fields: Tensor, things: Tensor) -> Tensor:
    """fields [B, 3], things [B, 32]."""
    return sum(F.cross_entropy(row, fields[:, i]) for i, row in enumerate(logits[:3])) + \
        10 * F.binary_cross_entropy_with_logits(logits[3], things)


def load_judge() -> Judge:
    judge = Judge()
    tensors = safetensors.torch.load_file(HERE / "judge.safetensors")
    judge.load_state_dict({name: t.float() for name, t in tensors.items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def obeyed(judge: Judge, pictures: Tensor, described: list[scenes.Scene]) -> dict[str, float]:
    """Shares of right attributes of pictures [N, 3, 64, 64]: of the three FIELDS, of the objects asked for (their kind
    is there; it is there in its colour), and of all together."""
    logits = [torch.cat(rows) for rows in zip(*(judge(x) for x in pictures.split(50)))]
    found = [row.argmax(1).tolist() for row in logits[:3]]
    there = [{THINGS[i] for i in (row > 0).nonzero().flatten().tolist()} for row in logits[3]]
    right = {name: [] for name in (*FIELDS, "object", "colour")}
    for n, scene in enumerate(described):
        for i, value in enumerate(attributes(scene)[0]):
            right[[*FIELDS][i]].append(found[i][n] == value)
        for thing in scene.objects:
            right["object"].append(thing[1] in {kind for _, kind in there[n]})
            right["colour"].append(thing in there[n])
    every = [value for values in right.values() for value in values]
    return {name: sum(values) / len(values) for name, values in [*right.items(), ("all", every)]}


# -------------------- What is measured

N, SIZE = 200, 64


def held_out(n: int = N) -> tuple[list[scenes.Scene], Tensor]:
    """Descriptions of combinations that training never draws, and their pictures [n, 3, 64, 64]."""
    described = [scenes.nth_scene("test", 0, i) for i in range(n)]
    return described, torch.stack([to_tensor(scenes.draw(scene, SIZE)) * 2 - 1 for scene in described])


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """[N, 3, H, W] in [-1, 1], clamped -> [N] dB."""
    return -10 * ((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)).log10()


def spread(values: Tensor) -> dict[str, float]:
    return dict(mean=values.mean().item(), deviation=values.std().item())


@torch.inference_mode()
def measure_vae(judge: Judge) -> dict:
    """Reconstruction, and how much of it the judge still reads; `real` is the judge on drawings."""
    described, truth = held_out()
    network = bases.load_base("tiny-turbo", ("vae",), torch.float32).vae
    made = torch.cat([network.decode(network.encode(x)[0]) for x in truth.split(50)])
    return dict(psnr=spread(psnr(made, truth)), obeyed=obeyed(judge, made.clamp(-1, 1), described),
                real=obeyed(judge, truth, described))


def measure_text(judge: Judge, name: str, steps: int, guidance: float, seed: int) -> dict:
    """Captions drawn by `sample.text_to_image`, one at a time, picture i from the noise of seed + i."""
    described, _ = held_out(N)
    base = bases.load_base(name, dtype=torch.float32)
    sampler = "lcm" if base.schedule.config["_class_name"] == "LCMScheduler" else "ddim"
    start, made = time.monotonic(), []
    for i, scene in enumerate(tqdm(described, f"{name}, {steps} steps")):
        text = scenes.caption(scene)
        made.append(sample.text_to_image(base, text, [seed + i], (SIZE, SIZE), steps, sampler, guidance))
    seconds = (time.monotonic() - start) / len(described)
    return dict(steps=steps, guidance=guidance, seed=seed, obeyed=obeyed(judge, torch.cat(made), described),
                milliseconds=1000 * seconds)


def edges(pictures: Tensor) -> Tensor:
    """[N, 3, H, W] in [-1, 1] -> Canny edges [N, 1, H, W], 0 or 1."""
    return torch.stack([to_tensor(canny(to_picture(x), 50, 100))[:1] for x in pictures])


def edge_f(made: Tensor, goal: Tensor) -> Tensor:
    """F-score [N] of edges [N, 1, H, W] that may be one pixel away from those they should be."""
    def share(a: Tensor, b: Tensor) -> Tensor:  # of a's edges that b has
        return (a * F.max_pool2d(b, 3, 1, 1)).sum((1, 2, 3)) / a.sum((1, 2, 3)).clamp(min=1)
    precision, recall = share(made, goal), share(goal, made)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)


@torch.inference_mode()
def translated(checkpoint: str, x: Tensor, captions: list[str], direction: str | None = None, seed: int = 0,
               **how: float) -> Tensor:
    """Pictures [N, 3, 64, 64] through `sample.translate_pictures`, each with its own caption, all from one noise."""
    names = ("r", "strength")
    model = checkpoints.load_generator(checkpoint, dtype=torch.float32, **{k: v for k, v in how.items() if k in names})
    made = []
    for start in tqdm(range(0, len(x), 50), checkpoint):
        rows = slice(start, start + 50)
        context = model.text_encoder(model.tokenizer(captions[rows]))
        made.append(sample.translate_pictures(model, [to_picture(one) for one in x[rows]], context, seed, model.r,
                                              how.get("skip_scale", 1.0), direction))
    return torch.cat(made)


def measure_unpaired(task: str, checkpoint: str | None = None) -> dict:
    """How near each direction comes to the true drawing, beside doing nothing, the adapter at strength 0 (the base and
    the right caption) and the adapter with its skips shut."""
    world, results = scenes.Unpaired(task, "test"), {}
    for direction in ("a2b", "b2a"):
        x = torch.stack([world[i][direction[0]] for i in range(N)])
        truth = torch.stack([world.truth(i, direction) for i in range(N)])
        captions = [world.prompts[direction == "a2b"]] * N
        outputs = {"doing nothing": x} | {name: translated(checkpoint or task, x, captions, direction, **how) for
                                          name, how in {"untrained adapter": dict(strength=0.0), "adapter": {},
                                                        "without skips": dict(skip_scale=0.0)}.items()}
        results[direction] = {name: dict(psnr=spread(psnr(y, truth)), ssim=evaluate.ssim(y, truth).mean().item(),
                                         edges=edge_f(edges(y), edges(truth)).mean().item())
                              for name, y in outputs.items()}
    return results


def measure_edges(judge: Judge, checkpoint: str = "edges2scene", several: int = 4) -> dict:
    """Outlines to scenes: nearness to the truth and captions obeyed, by r; and how far `several` noises lead apart."""
    described, truth = held_out()
    x = torch.stack([to_tensor(scenes.outlines(scene, SIZE)) * 2 - 1 for scene in described])
    captions, goal, results = [scenes.caption(scene) for scene in described], edges(truth), {}
    for r in (1.0, 0.7, 0.4, 0.0):
        made = torch.stack([translated(checkpoint, x, captions, None, seed, r=r) for seed in range(several)])
        apart = [(a - b).abs().mean().item() for i, a in enumerate(made) for b in made[:i]]
        results[f"r {r}"] = dict(psnr=spread(psnr(made[0], truth)), edges=edge_f(edges(made[0]), goal).mean().item(),
                                 obeyed=obeyed(judge, made[0], described), apart=sum(apart) / len(apart))
    return results


def main() -> None:
    what = {
        "vae": measure_vae,
        "turbo": lambda judge: [measure_text(judge, "tiny-turbo", 1, 1.0, seed) for seed in (0, 1000, 2000)],
        "sd": lambda judge: [measure_text(judge, "tiny-sd", 25, guidance, 0) for guidance in (1.0, 3.0)],
        "sd one step": lambda judge: [measure_text(judge, "tiny-sd", 1, 1.0, 0)],
        "day2night": lambda judge: measure_unpaired("day2night"),
        "clear2rain": lambda judge: measure_unpaired("clear2rain"),
        "edges2scene": measure_edges,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(what)} [all]")
    args = training.parse_args(parser)
    if unknown := [name for name in args.what if name not in what]:
        raise ValueError(f"there is nothing called {unknown[0]} to measure; expected {', '.join(what)}")
    judge, results = load_judge(), {}
    for name in args.what or what:
        results[name] = what[name](judge)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    training.run(main)
