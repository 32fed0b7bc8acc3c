"""Warnings in plain words, once each, when the signals in the log leave the range of runs that
learn; and the signals of a preview.

A check looks at a tenth of a run (100 to 2,500 steps), or at its last previews, and says
what is seen, over how many steps, and what to try. The bounds come from
`python tests/campaign_warnings.py`: healthy runs stay inside, runs made sick on purpose do not.
"""

import contextlib
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

# Difference of outputs and inputs over that of targets and inputs. Below it, a translator copies.
COPYING = 0.15
# Distance of two outputs over that of two inputs.
COLLAPSE = 0.15
# Mean level of the outputs minus that of the targets, of -1 to 1, and ratio of the contrasts.
LEVEL = 0.3
CONTRAST = (0.4, 2.5)
# A discriminator's accuracy on real pictures plus that on fakes, minus 1: 0 is chance. Above WON
# it has won. It is blind if the mean is below BLIND and below this many standard errors.
WON = 0.95
BLIND = 0.02
BLIND_ERRORS = 2.0
# Distance of the mean hues of outputs and targets, of about 1 at most.
TINT = 0.2
# A gradient norm is high if it is GRADIENT_FACTOR times the median of those before, and above the
# usual --max_grad_norm: smaller ones grow when a network begins to learn. GRADIENT_COUNT high ones
# in the last GRADIENT_STEPS steps are too many.
GRADIENT_FACTOR = 10.0
GRADIENT_FLOOR = 1.0
GRADIENT_COUNT = 4
GRADIENT_STEPS = 50
# How much worse than the best a validation is, relative to the best.
WORSE_BY = 0.05
# Training items in an epoch: fewer are few.
FEW_ITEMS = 50

# Previews in a row that must be out of range.
PREVIEWS = 3
# The shortest and the longest window, in steps.
SHORTEST_WINDOW = 100
LONGEST_WINDOW = 2500
# How many values of a signal are kept in memory: more than two windows, so that a series that was
# cut is not taken for the first two.
KEPT = 6000

Series = dict[str, list[tuple[int, float]]]


# ---------------------------------------------------------------------------------- signals

def preview_signals(
    outputs: Tensor, inputs: Tensor, targets: Tensor, suffix: str = ""
) -> dict[str, float]:
    """What a preview's pictures say. All are [N, 3, H, W] in [-1, 1], of one size.

    preview_change: difference of outputs and inputs over that of targets and inputs; 0 is a copy;
    not given where the targets are the inputs.
    preview_variety: distance of two outputs over that of two inputs; near 0, all outputs are alike.
    preview_level: mean of the outputs minus that of the targets; -0.5 is a quarter of the range
    too dark. preview_tint: the same of the three channels, apart from the level, without sign.
    preview_contrast: standard deviation of the outputs over that of the targets.
    """
    colours = outputs.mean((0, 2, 3)) - targets.mean((0, 2, 3))
    values = {
        "preview_level": colours.mean(),
        "preview_tint": (colours - colours.mean()).abs().mean(),
        "preview_contrast": outputs.std() / targets.std().clamp(min=1e-3),
    }
    wanted = (targets - inputs).abs().mean()
    if wanted > 0:
        values["preview_change"] = (outputs - inputs).abs().mean() / wanted
    if len(outputs) > 1:
        values["preview_variety"] = distance(outputs) / distance(inputs).clamp(min=1e-3)
    return {f"{name}{suffix}": value.item() for name, value in values.items()}


def distance(pictures: Tensor) -> Tensor:
    """Root mean square distance of two of the pictures [N, ...], over all pairs."""
    return (2 * pictures.var(0)).mean().sqrt()


# ---------------------------------------------------------------------------------- history

@dataclass
class History:
    """What a run has logged so far, and by their kind the warnings that it has given."""

    items: int  # in an epoch
    last_step: int
    series: Series = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """The steps that a check looks at."""
        return min(max(SHORTEST_WINDOW, self.last_step // 10), LONGEST_WINDOW)

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points = self.series.setdefault(name, [])
                points.append((step, value))
                if len(points) > 2 * KEPT:
                    del points[:KEPT]

    def note(self, step: int, warning: str) -> None:
        """Remembers that a warning was given, so that it is not repeated."""
        kind = warning.partition(":")[0]
        self.given[kind] = f"{warning} (step {step})"

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.series if name.startswith(prefix)]

    def recent(self, name: str) -> list[float]:
        """A signal's values in the last window; empty before there are so many steps."""
        values = [value for _, value in self.series.get(name, [])[-self.window:]]
        return values if len(values) == self.window else []

    def previews(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the last previews; empty if they are few, or cover less than a window
        (in a short run, than a quarter of it).

        The preview of the first step shows what the base does, and does not count.
        """
        points = [point for point in self.series.get(name, []) if point[0] > 1]
        if len(points) < PREVIEWS:
            return []
        first = len(points) - PREVIEWS
        while first > 0 and points[-1][0] - points[first][0] < self.window:
            first -= 1
        if points[-1][0] - points[first][0] < min(self.window, self.last_step // 4):
            return []
        return points[first:]


def recall(log: pathlib.Path, items: int, last_step: int) -> History:
    """The history in a run's log, which is empty for a new run."""
    history = History(items, last_step)
    if log.is_file():
        for line in log.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
                values = json.loads(line)
                step = values.pop("step")
                history.add(step, values)
                if "warning" in values:
                    history.note(step, values["warning"])
    return history


def next_warning(history: History) -> str | None:
    """The first warning that is due and was not given before: "KIND: what is seen, what to try"."""
    for kind, check in CHECKS.items():
        if kind not in history.given:
            text = check(history)
            if text:
                return f"{kind}: {text}"
    return None


# ----------------------------------------------------------------------------------- checks

def short_data(history: History) -> str | None:
    if history.items >= FEW_ITEMS:
        return None
    return (
        f"an epoch has {history.items} items, which the networks may learn by heart; add data,"
        " crop at random (--train_image_prep), or stop before validation gets worse"
    )


def copying(history: History) -> str | None:
    for name in history.names("preview_change"):
        points = history.previews(name)
        if points and max(value for _, value in points) < COPYING:
            remedy = "nothing asks it to change: give --lambda_gan a weight"
            if "l2" in history.series:
                remedy = "the distance to the targets asks for more: raise --learning_rate"
            elif "gan" in history.series:
                remedy = (
                    "the adversarial loss is paid and changes nothing: raise --lambda_gan, or in"
                    " unpaired training lower --lambda_idt or turn --skips off"
                )
            return (
                f"outputs are almost their inputs, with {points[-1][1]:.0%} of the change to the"
                f" targets, in all previews since step {points[0][0]} ({name}); {remedy}"
            )
    return None


def collapse(history: History) -> str | None:
    for name in history.names("preview_variety"):
        points = history.previews(name)
        if points and max(value for _, value in points) < COLLAPSE:
            return (
                f"outputs of different inputs are alike: {points[-1][1]:.0%} as far apart as the"
                f" inputs, in all previews since step {points[0][0]} ({name}); look at samples/,"
                " check that targets differ, lower --learning_rate"
            )
    return None


def level(history: History) -> str | None:
    for name in history.names("preview_level"):
        points = history.previews(name)
        values = [value for _, value in points]
        if points and (max(values) < -LEVEL or min(values) > LEVEL):
            what = "darker" if values[-1] < 0 else "brighter"
            return (
                f"outputs are {what} than the targets by {abs(values[-1]):.2g} of 2, in all"
                f" previews since step {points[0][0]} ({name}); lower --learning_rate, train"
                " without --mixed_precision fp16, and look at the targets"
            )
    return None


def contrast(history: History) -> str | None:
    """Of previews, and of latents in YOSO's steps."""
    least, most = CONTRAST
    latent = history.recent("latent_contrast")
    if latent and not least <= statistics.median(latent) <= most:
        return (
            f"latents of samples have {statistics.median(latent):.2g} times the contrast of the"
            f" data's over the last {len(latent)} steps (latent_contrast); lower --learning_rate"
        )
    for name in history.names("preview_contrast"):
        points = history.previews(name)
        values = [value for _, value in points]
        if points and (max(values) < least or min(values) > most):
            return (
                f"outputs have {values[-1]:.2g} times the contrast of the targets, in all previews"
                f" since step {points[0][0]} ({name}); lower --learning_rate, and look at the"
                " targets"
            )
    return None


def discriminator_won(history: History) -> str | None:
    real = history.recent("disc_right_on_real")
    fake = history.recent("disc_right_on_fake")
    if not real or not fake or informedness(real, fake) < WON:
        return None
    right = (1 + informedness(real, fake)) / 2
    return (
        f"it was right about {right:.1%} of all pictures over the last {len(real)} steps, which"
        " leaves the generator little to learn from; try a larger --lambda_gan, a lower"
        " --learning_rate, more data, or (of a translator) --gan_augment on"
    )


def discriminator_blind(history: History) -> str | None:
    """One that has seen nothing in the first two windows.

    Asked once, in the steps right after these: later, an accuracy near chance may also mean that
    the generator is good.
    """
    steps = 2 * history.window
    real = history.series.get("disc_right_on_real", [])
    if not steps <= len(real) <= steps + 20:
        return None
    fake = history.series["disc_right_on_fake"]
    known = [informedness([r], [f]) for (_, r), (_, f) in zip(real, fake)]
    error = statistics.pstdev(known) / math.sqrt(len(known))
    if statistics.fmean(known) > min(BLIND, BLIND_ERRORS * error):
        return None
    return (
        f"it has told outputs from real pictures no better than by chance in all {len(known)}"
        " steps, so the generator learns nothing from it; try another --gan_disc_type or"
        " --disc_width, another rate, or for YOSO --disc_adam_beta1 0.5 and --disc_lr_ratio 1"
    )


def informedness(real: list[float], fake: list[float]) -> float:
    """How much a discriminator knew, from its accuracies: 1 is everything, 0 is chance."""
    return statistics.fmean(real) + statistics.fmean(fake) - 1


def drift(history: History) -> str | None:
    for name in history.names("preview_tint"):
        points = history.previews(name)
        if points and min(value for _, value in points) > TINT:
            weights = "--lambda_cycle and --lambda_idt"
            for loss in ("l2", "kl"):
                if loss in history.series:
                    weights = f"--lambda_{loss}"
            return (
                f"the mean hue of outputs is {points[-1][1]:.2g} from that of the targets, in all"
                f" previews since step {points[0][0]} ({name}); lower --learning_rate, or raise"
                f" {weights}"
            )
    return None


def gradient(history: History) -> str | None:
    for name in ("grad_norm", "disc_grad_norm"):
        values = history.recent(name)
        if not values:
            continue
        usual = statistics.median(values[:-GRADIENT_STEPS])
        bound = max(GRADIENT_FACTOR * usual, GRADIENT_FLOOR)
        high = [value for value in values[-GRADIENT_STEPS:] if value > bound]
        if len(high) >= GRADIENT_COUNT:  # a single one is clipped and forgotten
            return (
                f"{name} was over {GRADIENT_FACTOR:.0f} times its usual {usual:.2g} in {len(high)}"
                f" of the last {GRADIENT_STEPS} steps, up to {max(high):.2g}: training may diverge;"
                " lower --learning_rate or --max_grad_norm"
            )
    return None


def validation(history: History) -> str | None:
    """The series val_score holds what `Run.improves` was given: lower is better."""
    points = history.series.get("val_score", [])
    if len(points) < PREVIEWS + 1:
        return None
    best_step, best = min(points, key=score_of)
    step, latest = points[-1]
    worse = latest - best > WORSE_BY * abs(best)
    if not worse or step - best_step < history.last_step / 3:
        return None
    return (
        f"it was best at step {best_step}, whose weights are best.safetensors, and has been worse"
        f" for {step - best_step} steps; stop here, or start again with more data or fewer steps"
    )


def score_of(point: tuple[int, float]) -> float:
    return point[1]


CHECKS: dict[str, Callable[[History], str | None]] = {
    "short data": short_data,
    "copying": copying,
    "collapse": collapse,
    "level": level,
    "contrast": contrast,
    "the discriminator has won": discriminator_won,
    "the discriminator is blind": discriminator_blind,
    "drift": drift,
    "gradient": gradient,
    "validation": validation,
}
