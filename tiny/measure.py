"""Measures what the tiny bases can do: `python -m tiny.measure` draws, translates and scores.

The score is read off the pictures by a small classifier, trained on drawings alone
(`python -m tiny.recipe classifier`). It recognises a scene's attributes: ground, time, weather,
and which of 32 objects, each a colour and a kind ("red house"), are there. Its accuracy on real
drawings is printed beside its accuracy on generated pictures.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable

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
from files.autoencoders import load_autoencoder
from tiny import scenes
from tiny.typed import TYPED

HERE = pathlib.Path(__file__).parent
N = 200  # held-out drawings of a measurement
SIZE = 64

# What the classifier predicts: one value of each field, and for each object whether it is there.
FIELDS = {"ground": scenes.GROUNDS, "time": scenes.TIMES, "weather": scenes.WEATHERS}
THINGS = [(colour, kind) for colour in scenes.COLOURS for kind in scenes.KINDS]
LOGITS = [len(values) for values in FIELDS.values()] + [len(THINGS)]


# -------------------- The attribute classifier

class AttributeClassifier(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> logits of a scene's attributes.

    Grounds [B, 3], times [B, 3] and weathers [B, 4], each for a softmax, and objects [B, 32],
    each for a sigmoid.
    """

    def __init__(self):
        super().__init__()
        widths = (24, 32, 48, 64, 64)
        inputs = (3, *widths)
        self.convs = nn.ModuleList(
            [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, widths)]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(8, width) for width in widths])
        self.last = nn.Linear(2 * widths[-1], sum(LOGITS))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.last(self.features(x)).split(LOGITS, dim=1)

    def features(self, x: Tensor) -> Tensor:
        """[B, 128]."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.silu(norm(conv(x)))
            if i < len(self.convs) - 1:
                x = F.max_pool2d(x, 2)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


def attributes(scene: scenes.Scene) -> tuple[list[int], list[float]]:
    """The labels of a scene: an index for each of FIELDS, and 1 or 0 for each of THINGS."""
    fields = [values.index(getattr(scene, name)) for name, values in FIELDS.items()]
    things = [float(thing in scene.objects) for thing in THINGS]
    return fields, things


def classifier_loss(logits: tuple[Tensor, ...], fields: Tensor, things: Tensor) -> Tensor:
    """Cross-entropy, 10 times as much for objects. Labels: fields [B, 3], things [B, 32]."""
    *logits_fields, logits_things = logits
    loss = 0
    for i, row in enumerate(logits_fields):
        loss = loss + F.cross_entropy(row, fields[:, i])
    return loss + 10 * F.binary_cross_entropy_with_logits(logits_things, things)


def load_classifier() -> AttributeClassifier:
    """The trained classifier, frozen, in float32."""
    classifier = AttributeClassifier()
    tensors = safetensors.torch.load_file(HERE / "classifier.safetensors")
    classifier.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def predict(classifier: AttributeClassifier, pictures: Tensor) -> list[Tensor]:
    """Logits of pictures [N, 3, 64, 64], 50 at a time."""
    batches = [classifier(batch) for batch in pictures.split(50)]
    return [torch.cat(rows) for rows in zip(*batches)]


def attribute_accuracy(
    classifier: AttributeClassifier,
    pictures: Tensor,
    described: list[scenes.Scene],
) -> dict[str, float]:
    """Shares of the attributes of pictures [N, 3, 64, 64] that are as described, by name.

    One for each of FIELDS; "object" (something of that kind is there) and "colour" (it is there
    in its colour), over all objects asked for; and "all", over everything.
    """
    *logits_fields, logits_things = predict(classifier, pictures)
    found_fields = [row.argmax(1).tolist() for row in logits_fields]
    right = {name: [] for name in (*FIELDS, "object", "colour")}
    for n, scene in enumerate(described):
        wanted, _ = attributes(scene)
        for name, found, value in zip(FIELDS, found_fields, wanted):
            right[name].append(found[n] == value)

        found_things = [thing for thing, logit in zip(THINGS, logits_things[n]) if logit > 0]
        found_kinds = [kind for _, kind in found_things]
        for thing in scene.objects:
            _, kind = thing
            right["object"].append(kind in found_kinds)
            right["colour"].append(thing in found_things)

    right["all"] = [value for values in right.values() for value in values]
    return {name: sum(values) / len(values) for name, values in right.items()}


# -------------------- Measures of pictures

def held_out(n: int = N) -> tuple[list[scenes.Scene], Tensor]:
    """n scenes with held-out combinations, and their pictures [n, 3, 64, 64] in [-1, 1]."""
    described = [scenes.nth_scene("test", 0, i) for i in range(n)]
    pictures = [to_tensor(scenes.draw(scene, SIZE)) * 2 - 1 for scene in described]
    return described, torch.stack(pictures)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR [N] in dB of a, clamped, against b. Both [N, 3, H, W] in [-1, 1]."""
    error = ((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3))
    return -10 * error.log10()


def gradient_energy(y: Tensor, x: Tensor) -> float:
    """Squared slopes of pictures y over those of x: 1 is as sharp, less is blurred."""
    energies = []
    for picture in (y, x):
        slopes = [picture.diff(dim=dim).square().mean() for dim in (2, 3)]
        energies.append(sum(slopes).item())
    return energies[0] / energies[1]


def mean_and_std(values: Tensor) -> dict[str, float]:
    return dict(mean=values.mean().item(), std=values.std().item())


def edges(pictures: Tensor) -> Tensor:
    """Canny edges [N, 1, H, W], 0 or 1, of pictures [N, 3, H, W] in [-1, 1]."""
    found = [to_tensor(canny(to_picture(x), 50, 100))[:1] for x in pictures]
    return torch.stack(found)


def edge_f(found: Tensor, wanted: Tensor) -> Tensor:
    """F-score [N] of edges [N, 1, H, W]. An edge may lie one pixel beside where it should."""
    precision = _covered(found, wanted)
    recall = _covered(wanted, found)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)


def _covered(a: Tensor, b: Tensor) -> Tensor:
    """The share [N] of the edges of a that have an edge of b within one pixel."""
    near_b = F.max_pool2d(b, 3, 1, 1)
    return (a * near_b).sum((1, 2, 3)) / a.sum((1, 2, 3)).clamp(min=1)


def mean_difference(several: list[Tensor]) -> float:
    """Mean absolute difference between any two of several tensors of pictures."""
    differences = []
    for i, a in enumerate(several):
        for b in several[:i]:
            differences.append((a - b).abs().mean().item())
    return sum(differences) / len(differences)


# -------------------- What is measured

@torch.inference_mode()
def measure_vae(classifier: AttributeClassifier) -> dict:
    """Reconstruction error, and the classifier on reconstructions and on the drawings."""
    described, truth = held_out()
    vae = bases.load_base("tiny-turbo", ("vae",), torch.float32).vae
    decoded = torch.cat([vae.decode(vae.encode(x)[0]) for x in truth.split(50)])
    return dict(
        psnr=mean_and_std(psnr(decoded, truth)),
        energy=gradient_energy(decoded.clamp(-1, 1), truth),
        attributes=attribute_accuracy(classifier, decoded.clamp(-1, 1), described),
        real=attribute_accuracy(classifier, truth, described),
    )


def measure_text(
    classifier: AttributeClassifier,
    name: str,
    steps: int,
    guidance: float,
    seed: int,
    n: int = N,
    vae: str | None = None,
) -> dict:
    """Attributes of n held-out captions, drawn one at a time, picture i from seed + i."""
    described, truth = held_out(n)
    base = bases.load_base(name, dtype=torch.float32)
    if vae:
        base.vae = load_autoencoder(vae, base, torch.float32)

    start = time.monotonic()
    drawn = []
    for i, scene in enumerate(tqdm(described, f"{name}, {steps} steps")):
        picture = sample.text_to_image(
            base,
            scenes.caption(scene),
            [seed + i],
            (SIZE, SIZE),
            steps=steps,
            guidance=guidance,
        )
        drawn.append(picture)
    seconds = (time.monotonic() - start) / n

    pictures = torch.cat(drawn)
    return dict(
        steps=steps,
        guidance=guidance,
        seed=seed,
        attributes=attribute_accuracy(classifier, pictures, described),
        energy=gradient_energy(pictures.clamp(-1, 1), truth),
        milliseconds=1000 * seconds,
    )


def measure_turbo(classifier: AttributeClassifier) -> list[dict]:
    """tiny-turbo in one step, from three sets of random seeds."""
    return [measure_text(classifier, "tiny-turbo", 1, 1.0, seed) for seed in (0, 1000, 2000)]


def measure_taesd(classifier: AttributeClassifier) -> dict:
    """tiny-turbo in one step, decoded by tiny-turbo-taesd."""
    return measure_text(classifier, "tiny-turbo", 1, 1.0, 0, vae="tiny-turbo-taesd")


def measure_sd(classifier: AttributeClassifier) -> list[dict]:
    """tiny-sd in 25 steps, without and with guidance."""
    return [measure_text(classifier, "tiny-sd", 25, guidance, 0) for guidance in (1.0, 3.0)]


def measure_typed(classifier: AttributeClassifier) -> dict:
    """Captions as people type them, in one step: the shares of what they ask for that is drawn.

    Beside the shares of each kind of attribute, the captions of which something is missing.
    """
    base = bases.load_base("tiny-turbo", dtype=torch.float32)
    right = {}
    missing = {}
    for text, asked in TYPED.items():
        picture = sample.text_to_image(base, text, [0], (SIZE, SIZE))
        there = words_for(classifier, picture)
        for word in filter(None, asked.split(", ")):
            right.setdefault(kind_of(word), []).append(word in there)
            if word not in there:
                missing.setdefault(text, []).append(word)
    right["all"] = [value for values in right.values() for value in values]
    shares = {kind: sum(values) / len(values) for kind, values in right.items()}
    return dict(attributes=shares, missing=missing)


def words_for(classifier: AttributeClassifier, picture: Tensor) -> set[str]:
    """What a picture [1, 3, 64, 64] shows, in words: "night", "red house", and "house"."""
    *fields, things = predict(classifier, picture.clamp(-1, 1))
    words = {FIELDS[name][row[0].argmax()] for name, row in zip(FIELDS, fields)}
    for (colour, kind), logit in zip(THINGS, things[0]):
        if logit > 0:
            words |= {kind, f"{colour} {kind}"}
    return words


def kind_of(word: str) -> str:
    """The name under which `attribute_accuracy` counts such a word."""
    for name, values in FIELDS.items():
        if word in values:
            return name
    return "object" if word in scenes.KINDS else "colour"


def measure_sd_one_step(classifier: AttributeClassifier) -> list[dict]:
    return [measure_text(classifier, "tiny-sd", 1, 1.0, 0)]


@torch.inference_mode()
def translate(
    checkpoint: str,
    x: Tensor,
    captions: list[str],
    direction: str | None = None,
    *,
    seed: int = 0,
    r: float | None = None,
    strength: float = 1.0,
    skip_scale: float = 1.0,
) -> Tensor:
    """Translates pictures [N, 3, 64, 64] in [-1, 1] with a trained generator, as sample.py does.

    Each picture has its own caption, and all have the noise of one seed.
    """
    model = checkpoints.load_generator(checkpoint, dtype=torch.float32, r=r, strength=strength)
    translated = []
    for start in tqdm(range(0, len(x), 50), checkpoint):
        rows = slice(start, start + 50)
        context = model.text_encoder(model.tokenizer(captions[rows]))
        batch = sample.translate_pictures(
            model,
            [to_picture(picture) for picture in x[rows]],
            context,
            seed,
            skip_scale=skip_scale,
            direction=direction,
        )
        translated.append(batch)
    return torch.cat(translated)


def measure_unpaired(task: str, n: int = N) -> dict:
    """How close a translator comes to the true translation, in both directions.

    Beside the adapter: the unchanged input, the untrained adapter (strength 0: the base with the
    right caption), and the adapter without skip connections.
    """
    world = scenes.Unpaired(task, "test")
    results = {}
    for direction in ("a2b", "b2a"):
        x = torch.stack([world[i][direction[0]] for i in range(n)])
        truth = torch.stack([world.truth(i, direction) for i in range(n)])
        prompt = world.prompts[1] if direction == "a2b" else world.prompts[0]
        captions = [prompt] * n
        outputs = {
            "unchanged input": x,
            "untrained adapter": translate(task, x, captions, direction, strength=0.0),
            "adapter": translate(task, x, captions, direction),
            "without skips": translate(task, x, captions, direction, skip_scale=0.0),
        }
        results[direction] = {}
        for name, output in outputs.items():
            results[direction][name] = dict(
                psnr=mean_and_std(psnr(output, truth)),
                ssim=evaluate.ssim(output, truth).mean().item(),
                edges=edge_f(edges(output), edges(truth)).mean().item(),
            )
    return results


def measure_edges(classifier: AttributeClassifier) -> dict:
    """Outlines to scenes, by r: distance to the truth, attributes, difference between seeds."""
    described, truth = held_out()
    captions = [scenes.caption(scene) for scene in described]
    lines = [to_tensor(scenes.outlines(scene, SIZE)) * 2 - 1 for scene in described]
    x = torch.stack(lines)
    wanted = edges(truth)

    results = {}
    for r in (1.0, 0.7, 0.4, 0.0):
        outputs = [translate("edges2scene", x, captions, seed=seed, r=r) for seed in range(4)]
        first = outputs[0]
        results[f"r {r}"] = dict(
            psnr=mean_and_std(psnr(first, truth)),
            edges=edge_f(edges(first), wanted).mean().item(),
            attributes=attribute_accuracy(classifier, first, described),
            difference=mean_difference(outputs),
        )
    return results


def measure_day2night(classifier: AttributeClassifier) -> dict:
    return measure_unpaired("day2night")


def measure_clear2rain(classifier: AttributeClassifier) -> dict:
    return measure_unpaired("clear2rain")


MEASUREMENTS: dict[str, Callable[[AttributeClassifier], object]] = {
    "vae": measure_vae,
    "turbo": measure_turbo,
    "taesd": measure_taesd,
    "typed": measure_typed,
    "sd": measure_sd,
    "sd one step": measure_sd_one_step,
    "day2night": measure_day2night,
    "clear2rain": measure_clear2rain,
    "edges2scene": measure_edges,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(MEASUREMENTS)
    parser.add_argument("what", nargs="*", help=f"any of {known} [all]")
    args = training.parse_args(parser)
    for name in args.what:
        if name not in MEASUREMENTS:
            raise ValueError(f"there is no measurement '{name}': expected any of {known}")

    classifier = load_classifier()
    results = {}
    for name in args.what or MEASUREMENTS:
        results[name] = MEASUREMENTS[name](classifier)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    training.run_script(main)
