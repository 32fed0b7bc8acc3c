"""Every idea of the two papers turned off, and looked at.

    python -m tiny.plates --list               # the ideas
    python -m tiny.plates skips cycle          # two of them, three seeds each
    python -m tiny.plates --seeds 1            # all, one seed: about two hours of one core
    python -m tiny.plates --page               # IDEAS.md and the plates again, of what was measured before

Each idea trains the tiny base with and without it, by the ordinary trainers as processes: equal steps of the stage that
has it, equal seeds, nothing else changed; in bf16, without which a processor needs minutes for a step. The runs are in
runs/plates and are shared between ideas; a run that was stopped goes on where it stood, one that was measured is not
made again. Figures of 200 held-out drawings go to assets/plates/results.json, a plate of each idea's first seed beside
them, the table to IDEAS.md.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import textwrap
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import sample
import training
from dataset.pictures import to_picture, to_tensor
from files import bases, checkpoints
from files.tensors import read_tensors
from models import diffusion
from tiny import gaussians, measure, recipe, scenes

ROOT = pathlib.Path(__file__).parent.parent
PLATES, FOLDER = ROOT / "assets" / "plates", pathlib.Path("runs/plates")


@dataclass(frozen=True)
class Run:
    """Flags of a trainer, beside those of all runs of its kind. It begins at the base that the run `after` wrote."""
    kind: str
    flags: dict[str, object] = field(default_factory=dict)
    after: str | None = None


KINDS = {
    "unpaired": ("train_cyclegan_turbo.py", dict(base="tiny-turbo", dataset_folder="drawn:day2night",
                                                 mixed_precision="bf16", lr_warmup_steps=20, max_train_steps=100)),
    "paired": ("train_pix2pix_turbo.py", dict(base="tiny-turbo", dataset_folder="drawn:scenes", mixed_precision="bf16",
                                              lr_warmup_steps=20, max_train_steps=200)),
    "yoso": ("train_yoso.py", recipe.COMMON | recipe.STAGES["yoso"] | dict(
        base="tiny-sd", max_train_steps=200, lr_warmup_steps=50, ema_decay=0.99)),
    "gaussians": ("train_yoso.py", dict(base="gaussians")),
}
ADAPT, LORA = dict(learning_rate=3e-4, max_train_steps=250), dict(train="lora", lora_rank=16, learning_rate=5e-4)
RUNS = {
    "unpaired": Run("unpaired"),
    "no-skips": Run("unpaired", dict(skips="off")),
    "random-base": Run("unpaired", dict(base="tiny", train="lora", lora_rank_unet=4, learning_rate=5e-4,
                                        train_batch_size=4, disc_width=32)),
    "no-cycle": Run("unpaired", dict(lambda_cycle=0)),
    "no-identity": Run("unpaired", dict(lambda_idt=0)),
    "no-gan": Run("unpaired", dict(lambda_gan=0)),
    "paired": Run("paired"),
    "all-weights": Run("paired", dict(train="all")),
    "conv-in-frozen": Run("paired", dict(conv_in="off")),
    "stochastic": Run("paired", dict(stochastic="on")),
    "v": Run("yoso", dict(stage="adapt_v", **ADAPT)),
    "zero-snr": Run("yoso", dict(stage="adapt_zsnr", **ADAPT), "v"),
    "heard": Run("yoso", recipe.STAGES["data"] | dict(max_train_steps=1000), "zero-snr"),
    "yoso": Run("yoso", after="heard"),
    "real-is-data": Run("yoso", dict(adversarial="data"), "heard"),
    "real-is-noisy": Run("yoso", dict(adversarial="noisy"), "heard"),
    "no-discriminator": Run("yoso", dict(lambda_gan=0), "heard"),
    "no-kl": Run("yoso", dict(lambda_kl=0), "heard"),
    "no-consistency": Run("yoso", dict(lambda_con=0), "heard"),
    "mse": Run("yoso", dict(consistency="mse"), "heard"),
    "random-discriminator": Run("yoso", dict(disc_random="on"), "heard"),
    "adapted": Run("yoso", after="zero-snr"),
    "not-adapted": Run("yoso"),
    "prior": Run("yoso", LORA | dict(prior_pictures=1000)),
    "no-prior": Run("yoso", LORA),
    "gaussians-coop": Run("gaussians"),
    "gaussians-data": Run("gaussians", dict(adversarial="data")),
    "gaussians-noisy": Run("gaussians", dict(adversarial="noisy")),
}


@dataclass(frozen=True)
class Idea:
    says: str  # what it is for
    formula: str
    where: str  # FILE:FUNCTION
    flag: str  # that turns it off
    runs: dict[str, str]  # with it, and without: names of RUNS
    figures: dict[str, str]  # what is measured: its name there, its name here
    found: str = ""  # what was seen


ATTRIBUTES = dict(all="attributes right")
IDEAS = {
    "skips": Idea(
        "Detail goes past the latent.", "decoder + gamma conv(encoder)", "models/pix2pix_turbo.py:convolved_skips",
        "--skips off", {"with": "unpaired", "without": "no-skips"}, dict(edges="edges kept", psnr="PSNR, dB"),
        "More is kept, on every seed; but the latent of factor 4 carries most of it alone, and PSNR is lower with them:"
        " it may be that they bring the day's light along."),
    "base": Idea(
        "What the one-step model knows of pictures need not be learned again.", "W = W_base + s B A",
        "models/lora.py:changed", "--base tiny", {"with": "unpaired", "without": "random-base"},
        dict(psnr="PSNR, dB", edges="edges kept"), "It is nearer, and the things are sharper."),
    "lora": Idea(
        "A few weights learn the task; the base stays as it was.", "(W + s B A) x + b", "models/lora.py:changed",
        "--train all", {"LoRA": "paired", "all weights": "all-weights"},
        dict(psnr="PSNR, dB", trained="weights trained, M", words="captions that the base then obeys"),
        "The task is learned nearly as well by a fifteenth of the weights, and the base forgets nothing."),
    "conv_in": Idea(
        "The first layer learns to take pictures where noise was.", "z = E(x) in place of eps",
        "models/pix2pix_turbo.py:forward", "--conv_in off", {"trained": "paired", "frozen": "conv-in-frozen"},
        dict(psnr="PSNR, dB"), "No effect here: it may be that the VAE's own LoRA does its work."),
    "r": Idea(
        "One number leads from the input's picture to the noise's.", "r z + (1 - r) eps, adapters times r",
        "models/pix2pix_turbo.py:forward", "--stochastic off", {"with r": "stochastic", "without": "paired"},
        {f"{what}_{r}": f"{name}, r = {r}" for r in (1.0, 0.7, 0.4, 0.0)
         for what, name in (("psnr", "PSNR"), ("apart", "noises apart"))},
        "What varies and what follows the input trade places; at r = 1 being able to vary costs something."),
    "cycle": Idea(
        "There and back again: nothing of the picture may be lost.", "|G(G(a)) - a|",
        "train_cyclegan_turbo.py:cycle_loss", "--lambda_cycle 0", {"with": "unpaired", "without": "no-cycle"},
        dict(edges="edges kept", psnr="PSNR, dB"),
        "Without it things change their colours, two seeds of three keep fewer edges, and the third loses 4 dB."),
    "identity": Idea(
        "What is already there stays as it is.", "|G(b) - b|", "train_cyclegan_turbo.py:identity_loss",
        "--lambda_idt 0", {"with": "unpaired", "without": "no-identity"},
        dict(drift="colour drift of nights, of 2", psnr="PSNR, dB"),
        "Without it nights change their colours four to seven times as much."),
    "gan": Idea(
        "Only the discriminator says what a night looks like.", "cross-entropy of D(G(a))",
        "train_cyclegan_turbo.py:generator_gan_loss", "--lambda_gan 0", {"with": "unpaired", "without": "no-gan"},
        dict(night="judged to be night", psnr="PSNR, dB"), "Without it days stay days: all other losses are content."),
    "coop": Idea(
        "The discriminator's real side is G's own better guess.", "D compares G(x_t) with G(x_{t-k})",
        "train_yoso.py:discriminator_loss", "--adversarial data",
        {"coop": "yoso", "data": "real-is-data", "noisy": "real-is-noisy", "none": "no-discriminator"},
        ATTRIBUTES | dict(sharp="sharpness", disc_right="D right in training"),
        "A discriminator is worth a great deal, one of noised samples nothing. In 200 steps the data as the real side"
        " are ahead of self-cooperation on every seed; it may be that no mode is lost so soon (below: thousands)."),
    "gaussians": Idea(
        "The same in the plane: 25 modes, one step.", "D compares G(x_t) with G(x_{t-k})",
        "train_yoso.py:discriminator_loss", "--adversarial data",
        {"coop": "gaussians-coop", "data": "gaussians-data", "noisy": "gaussians-noisy"},
        dict(modes="modes of 25", good="within three deviations"),
        "Self-cooperation finds the modes; the data as the real side find a few and draw them well."),
    "kl": Idea(
        "A steady pull towards the data.", "min(SNR, 5) |G(x_t) - x0|^2", "train_yoso.py:kl_loss", "--lambda_kl 0",
        {"with": "yoso", "without": "no-kl"}, ATTRIBUTES | dict(sharp="sharpness"),
        "Hardly an effect in 200 steps; the stage before them was this term alone."),
    "consistency": Idea(
        "Neighbouring steps agree.", "w |f(G(x_t)) - f(G(x_{t-25}))|^2", "train_yoso.py:consistency_loss",
        "--lambda_con 0", {"with": "yoso", "without": "no-consistency"},
        ATTRIBUTES | dict(neighbours="distance of neighbours"),
        "It helps, on one seed a little, on two much; but not by what it is named after: all that is blurred agrees."),
    "perceptual": Idea(
        "Distances as a frozen U-Net sees them.", "f: features after the middle block",
        "models/discriminator.py:lower_half", "--consistency mse", {"with": "yoso", "without": "mse"},
        ATTRIBUTES | dict(sharp="sharpness"),
        "Sharper on every seed, and on two of three more attributes."),
    "disc_init": Idea(
        "The discriminator begins as half of the diffusion model.", "D = head(lower half of the U-Net)",
        "models/discriminator.py:lower_half", "--disc_random",
        {"from the U-Net": "yoso", "random": "random-discriminator"},
        ATTRIBUTES | dict(sharp="sharpness", disc_right="D right in training"),
        "A random one sees less in 200 steps: pictures are half as sharp, or less."),
    "prior": Idea(
        "A model that predicts noise begins at noised latents.", "alpha_T x_prior + sigma_T eps",
        "models/diffusion.py:start_from_prior", "--prior_pictures 0", {"with": "prior", "without": "no-prior"},
        ATTRIBUTES | dict(brightness="spread of brightness"),
        "No effect: beside the noise 0.07 of a prior is little, and 200 steps of LoRA make little of either."),
    "adaption": Idea(
        "First v for epsilon, then pure noise at the end; without: one step at once.", "v' = (alpha' x' - x0) / sigma'",
        "train_yoso.py:adapt_loss", "--stage yoso", {"with": "adapted", "without": "not-adapted"},
        ATTRIBUTES | dict(darkest="brightness of the darkest", brightest="of the brightest"),
        "Without it nights are too light and days too dark (drawings: -0.51 and 0.59)."),
}


# -------------------- What a run's checkpoint can do, in figures, and the pictures of a plate


def unpaired(checkpoint: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Days to nights, and nights to where they are."""
    world = scenes.Unpaired("day2night", "test")
    day, night, truth = (torch.stack([f(i) for i in range(measure.N)]) for f in (
        lambda i: world[i]["a"], lambda i: world[i]["b"], lambda i: world.truth(i, "a2b")))
    made, same = (measure.translated(checkpoint, x, [world.prompts[1]] * measure.N, "a2b") for x in (day, night))
    dark = torch.cat([measure.load_judge()(x)[1].argmax(1) for x in made.split(50)]) == scenes.TIMES.index("night")
    return dict(psnr=measure.psnr(made, truth).mean().item(),
                edges=measure.edge_f(measure.edges(made), measure.edges(day)).mean().item(),
                drift=(same.mean((2, 3)) - night.mean((2, 3))).abs().mean().item(),
                night=dark.double().mean().item()), {"": made}


def paired(checkpoint: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Outlines to scenes; and what the base makes of captions when the adapters have gone."""
    described, truth = measure.held_out()
    lines = torch.stack([to_tensor(scenes.outlines(scene, measure.SIZE)) * 2 - 1 for scene in described])
    captions = [scenes.caption(scene) for scene in described]
    model = checkpoints.load_generator(checkpoint, dtype=torch.float32)
    tensors = read_tensors(checkpoints.find_checkpoint(checkpoint))[0]
    stochastic = model.r is not None
    figures, shown = dict(trained=sum(t.numel() for t in tensors.values()) / 1e6), {}
    for r in (1.0, 0.7, 0.4, 0.0) if stochastic else (1.0,):
        made = [measure.translated(checkpoint, lines, captions, seed=seed, **(dict(r=r) if stochastic else {}))
                for seed in range(4 if stochastic else 1)]
        apart = [(a - b).abs().mean().item() for i, a in enumerate(made) for b in made[:i]]
        figures |= {f"psnr_{r}": measure.psnr(made[0], truth).mean().item(),
                    f"apart_{r}": statistics.mean(apart) if stochastic else 0.0}
        shown[f"r = {r}" if stochastic else ""] = made[0]
    base = bases.load_base("tiny-turbo", dtype=torch.float32)
    if model.generator.config.train == "all":
        base.unet, base.vae, base.text_encoder = model.generator.unet, model.generator.vae, model.text_encoder
    figures |= dict(psnr=figures["psnr_1.0"], words=obeyed(texts(base, None))["all"])
    return figures, shown


def texts(base: bases.Base, prior: tuple[Tensor, Tensor] | None) -> Tensor:
    """The held-out captions, drawn in one step."""
    return torch.cat([sample.text_to_image(base, scenes.caption(scene), [i], (measure.SIZE,) * 2, 1, "lcm", prior=prior)
                      for i, scene in enumerate(measure.held_out()[0])])


def obeyed(pictures: Tensor) -> dict[str, float]:
    return measure.obeyed(measure.load_judge(), pictures, measure.held_out()[0])


def slopes(pictures: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels."""
    return sum(pictures.diff(dim=d).square().mean() for d in (2, 3))


@torch.inference_mode()
def yoso(checkpoint: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Captions in one step; neighbouring steps of the same noise."""
    described, truth = measure.held_out()
    path = checkpoints.find_checkpoint(checkpoint)
    base, prior = checkpoints.load_yoso(path, dtype=torch.float32)
    made = texts(base, prior if prior[1].any() else None)
    light, real = (x.mean((1, 2, 3)) for x in (made, truth))
    tenth = max(len(real) // 10, 1)
    z = torch.cat([base.vae.encode(x)[0] for x in truth.split(50)]) * base.vae.config.scaling_factor
    contexts = base.encode([scenes.caption(scene) for scene in described])
    distances = []
    for t in (999, 750, 500, 250):
        eps, outputs = training.draw_noise(range(len(z)), z.shape[1:])[0], []
        for level in (t, t - 25):
            levels = torch.full((len(z),), level)
            x = diffusion.add_noise(z, eps, levels, base.schedule)
            v = torch.cat([base.unet(a, level, b) for a, b in zip(x.split(50), contexts[0].split(50))])
            outputs.append(diffusion.predict_x0(v, x, levels, base.schedule, base.schedule.prediction_type))
        distances.append((outputs[0] - outputs[1]).square().mean().item())
    log = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
    right = [(line["disc_right_on_real"] + line["disc_right_on_fake"]) / 2 for line in log if "disc" in line]
    return dict(obeyed(made), sharp=(slopes(made) / slopes(truth)).item(), brightness=(light.std() / real.std()).item(),
                darkest=light[real.argsort()[:tenth]].mean().item(),
                brightest=light[real.argsort()[-tenth:]].mean().item(), neighbours=statistics.mean(distances),
                disc_right=statistics.mean(right) if right else 0.5), {"": made}


def points(folder: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The trainer's own last validation and picture."""
    last = json.loads((pathlib.Path(folder) / "log.jsonl").read_text().splitlines()[-1])
    page = to_tensor(Image.open(max((pathlib.Path(folder) / "samples").glob("*.png")))) * 2 - 1
    return dict(modes=last["val_modes"], good=last["val_good"]), {"": page[None, :, :, page.shape[2] // 2:]}


MEASURES = dict(unpaired=unpaired, paired=paired, yoso=yoso, gaussians=points)


def strip(kind: str, shown: list[int]) -> dict[str, Tensor]:
    """What a plate has above and below what was made: the input, and the truth."""
    if kind == "unpaired":
        world = scenes.Unpaired("day2night", "test")
        return {"input": torch.stack([world[i]["a"] for i in shown]),
                "truth": torch.stack([world.truth(i, "a2b") for i in shown])}
    if kind == "gaussians":
        return {"truth": gaussians.scatter(gaussians.Points("test").points)[None]}
    described, truth = measure.held_out()
    lines = {"input": torch.stack([to_tensor(scenes.outlines(described[i], measure.SIZE)) * 2 - 1 for i in shown])}
    return (lines if kind == "paired" else {}) | {"a drawing of it": truth[shown]}


SHOWN = [0, 3, 5, 8, 11, 14, 17]


def write_plate(path: pathlib.Path, name: str, idea: Idea, rows: dict[str, Tensor], figures: dict[str, str]) -> None:
    """A row of pictures for each, with its figures beside; at most 150 KB."""
    first = next(iter(rows.values()))
    side = 320 if len(first) == 1 else 96
    cell = side + 4
    across = max(len(pictures) for pictures in rows.values())
    page = Image.new("RGB", (190 + across * cell, 30 + len(rows) * cell), "white")
    pen = ImageDraw.Draw(page)
    pen.text((6, 8), f"{name}: {idea.says}  {idea.formula}", fill="black")
    for i, (label, pictures) in enumerate(rows.items()):
        pen.multiline_text((6, 34 + i * cell), "\n".join([label, *figures.get(label, [])]), fill="black")
        for j, x in enumerate(pictures):
            picture = to_picture(x).resize((side, side), Image.Resampling.BICUBIC)
            page.paste(picture, (190 + j * cell, 30 + i * cell))
    for colours in (256, 128, 64):
        small = page.quantize(colours, dither=Image.Dither.NONE)
        training.write_file(path, lambda temporary, small=small: small.save(temporary, format="PNG", optimize=True))
        if path.stat().st_size <= 150_000:
            break


# -------------------- Training, results, and the page


def folder_of(name: str, seed: int, steps: int | None = None) -> pathlib.Path:
    return FOLDER / (f"{name}-seed{seed}" + (f"-{steps}steps" if steps else ""))


def execute(name: str, seed: int, steps: int | None = None) -> tuple[pathlib.Path, dict[str, float]]:
    """The run's folder, trained to its end; and the minutes of a core that took, if it was not stopped between."""
    one, folder = RUNS[name], folder_of(name, seed, steps)
    script, shared = KINDS[one.kind]
    flags = shared | one.flags | dict(seed=seed) | ({"max_train_steps": steps} if steps else {})
    if one.after:
        flags["base"] = folder_of(one.after, seed, steps) / "base"
        if not flags["base"].is_dir():
            execute(one.after, seed, steps)
    began, anew = os.times(), not folder.exists()
    recipe.run_or_resume(script, folder, **flags)
    took = sum(os.times()[2:4]) - sum(began[2:4])  # of processes that have ended
    return folder, dict(minutes=took / 60) if anew else {}


def read_results(path: pathlib.Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def line_of(where: str) -> tuple[str, str, int]:
    """"FILE:FUNCTION" -> file, function, the line of its def."""
    file, _, function = where.partition(":")
    lines = (ROOT / file).read_text().splitlines()
    return file, function, next(i for i, line in enumerate(lines, 1) if re.match(rf"\s*def {function}\(", line))


def spread(values: list[float]) -> str:
    """Mean over seeds, and the range if there is one."""
    def short(x: float) -> str:
        return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3g}"
    mean, low, high = map(short, (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def figures_of(idea: Idea, results: dict, label: str) -> dict[str, str]:
    """What is known of one side of an idea: a figure's name here -> its mean and range over seeds."""
    seeds = results.get(idea.runs[label], {})
    return {shown: spread(values) for key, shown in idea.figures.items()
            if (values := [of[key] for of in seeds.values() if key in of])}


def page(results: dict) -> str:
    """IDEAS.md of what was measured."""
    rows = []
    for name, idea in IDEAS.items():
        file, function, line = line_of(idea.where)
        sides = [f"**{label}** " + "; ".join(f"{k}: {v}" for k, v in figures_of(idea, results, label).items())
                 for label in idea.runs if figures_of(idea, results, label)]
        seeds = min(len(results.get(one, {})) for one in idea.runs.values())
        took = [[of["minutes"] for of in results.get(one, {}).values() if "minutes" in of]
                for one in idea.runs.values()]
        last = f"{seeds} | {sum(map(statistics.mean, took)):.0f}" if all(took) else f"{seeds} |"
        plate = f"[plate](assets/plates/{name}.png)" if seeds else "not yet"
        rows.append(f"| **{name}**. {idea.says} {idea.found} | {idea.formula.replace('|', chr(92) + '|')} | "
                    f"[`{function}`]({file}#L{line}) | `{idea.flag}` | {plate} | {'<br>'.join(sides)} | {last} |")
    return HEAD + "\n".join(rows) + "\n"


HEAD = """# Ideas, turned off

Each row is an idea of one of the two papers, and what the tiny base does with it and without it: the same trainer and
seeds, equal steps, one flag changed (`base`: also the flags by which the other base would have other defaults;
`adaption`: with two stages of 250 steps before). `python -m tiny.plates IDEA --output FOLDER` measures a row anew
(without `--output` what was measured before is kept); minutes are those of one core for one seed, without the stages
that the YOSO rows share. Figures are of 200 held-out drawings, means over seeds (with their range where there are
several); attributes are shares that the judge of
[tiny/measure.py](tiny/measure.py) finds right, sharpness and the spread of brightness are shares of the drawings'
own. No setting was tuned until an idea won; but the YOSO ideas were begun anew once: at first LoRA was trained on
`tiny-sd` for 200 steps (seed 0), and all sides that had been run lay close together (coop 64.2 %, noisy 62.2, data
61.6, without KL 61.4). These are minutes of training at 64 x 64 pixels, and three seeds say little of small
differences: what shows no effect here may show one at size.

| idea | formula | function | turned off by | pictures | figures | seeds | minutes |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("idea", nargs="*", help="names of --list [all]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side, of seeds 0, 1, ... [3]")
    parser.add_argument("--steps", type=int, help="steps of every run, in place of the settings (to try it)")
    parser.add_argument("--output", type=pathlib.Path, default=PLATES, help="a folder for both [assets/plates]")
    parser.add_argument("--list", action="store_true", help="only name the ideas")
    parser.add_argument("--page", action="store_true", help="only draw again what was measured")
    args = training.parse_args(parser)
    if unknown := [name for name in args.idea if name not in IDEAS]:
        raise ValueError(f"there is no idea called {unknown[0]}; expected {', '.join(IDEAS)}")
    if args.seeds < 1 or (args.steps or 1) < 1:
        raise ValueError("--seeds and --steps: expected 1 or more")
    if args.steps and args.output == PLATES:
        raise ValueError("--steps only tries the runs; expected another --output, so that no trial passes for a result")
    names = args.idea or [*IDEAS]
    if args.list:
        for name in names:
            print(f"{name:12} {IDEAS[name].says}  {IDEAS[name].flag}")
        return
    args.output.mkdir(parents=True, exist_ok=True)
    store = args.output / "results.json"
    todo = [(one, seed) for seed in range(args.seeds)
            for one in dict.fromkeys(one for name in names for one in IDEAS[name].runs.values())]
    for one, seed in tqdm(todo if not args.page else [], "runs"):
        results = read_results(store)
        if str(seed) in results.get(one, {}):
            continue
        folder, took = execute(one, seed, args.steps)
        figures, made = MEASURES[RUNS[one].kind](str(folder))
        if seed == 0:
            torch.save({k: x[SHOWN].clone() if len(x) > 1 else x for k, x in made.items()}, folder / "shown.pt")
        results = read_results(store)  # another process may have written
        results.setdefault(one, {})[str(seed)] = figures | took
        training.write_file(store, lambda path, results=results: path.write_text(json.dumps(results, indent=1)))
    results = read_results(store)
    for name in names:
        idea = IDEAS[name]
        pictures = {label: folder_of(one, 0, args.steps) / "shown.pt" for label, one in idea.runs.items()}
        if all(path.is_file() for path in pictures.values()):
            around, made, lines = strip(RUNS[next(iter(idea.runs.values()))].kind, SHOWN), {}, {}
            for label, path in pictures.items():
                for part, x in torch.load(path, weights_only=True).items():  # of one run, or of one run at one r
                    made[part or label] = x
                    lines[part or label] = [line for k, v in figures_of(idea, results, label).items() if part in k
                                            for line in textwrap.wrap(f"{k}: {v}", 30)]
            rows = {k: v for k, v in around.items() if k == "input"} | made | \
                {k: v for k, v in around.items() if k != "input"}
            write_plate(args.output / f"{name}.png", name, idea, rows, lines)
            print(args.output / f"{name}.png")
    if args.output == PLATES:
        training.write_file(ROOT / "IDEAS.md", lambda path: path.write_text(page(results)))


if __name__ == "__main__":
    training.run(main)
