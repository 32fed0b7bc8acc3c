"""Warnings: each on a synthetic series that is sick and on ones that are not; once, and resumed."""

import json
import random

import pytest
import torch
import trainer_helpers as helpers
from trainer_helpers import pairs  # noqa: F401  a fixture

import train_pix2pix_turbo
from training import watch
from training.logs import open_log

LAST = 600  # steps of the runs, so that a window is 100


def history(
    steps: int = LAST, items: int = 1000, last_step: int = LAST, **signals
) -> watch.History:
    """A history in which every signal is a constant or a function of the step, with 1% of noise.

    Previews and validations come each 50 steps.
    """
    found = watch.History(items, last_step)
    noise = random.Random(0)
    for step in range(1, steps + 1):
        values = {}
        for name, signal in signals.items():
            rare = name.startswith(("preview", "val"))
            if rare and step % 50:
                continue
            value = signal(step) if callable(signal) else signal
            values[name] = value * (1 + 0.01 * noise.uniform(-1, 1))
        found.add(step, values)
    return found


def warned(**signals) -> str | None:
    return watch.next_warning(history(**signals))


# Signals of a run that learns.
WELL = dict(
    grad_norm=1.0,
    gan=0.5,
    latent_contrast=1.0,
    disc_right_on_real=0.7,
    disc_right_on_fake=0.8,
    preview_change=0.9,
    preview_variety=0.8,
    preview_level=0.05,
    preview_tint=0.03,
    preview_contrast=0.9,
    val_score=lambda step: 1 / step,
)


def after(start: int, value: float, before: float):
    """A signal that changes at a step."""
    return lambda step: value if step > start else before


BLIND = dict(disc_right_on_real=0.5, disc_right_on_fake=0.5)


def wavering(mean: float):
    """An accuracy that changes by 0.56 from step to step."""
    return lambda step: mean + (0.28 if step % 2 else -0.28)


SICK = {
    "copies": (dict(preview_change=0.04), "copying: outputs are almost their inputs, with 4% of"),
    "copies one way": (dict(preview_change_a2b=0.04), "(preview_change_a2b); the adversarial loss"),
    "copies of late": (dict(preview_change=after(499, 0.04, before=0.5)), "step 500"),
    "all alike": (dict(preview_variety=0.02), "collapse: outputs of different inputs are"),
    "alike of late": (dict(preview_variety_b2a=after(499, 0.02, before=0.7)), "step 500"),
    "dark": (dict(preview_level=-0.6), "level: outputs are darker than the targets by 0.6"),
    "bright": (dict(preview_level_a2b=0.6), "brighter"),
    "flat": (dict(preview_contrast=0.1), "times the contrast of the targets"),
    "harsh": (dict(preview_contrast=5.0), "times the contrast of the targets"),
    "wild": (dict(latent_contrast=4.0), "samples have 4 times the contrast of the data's over"),
    "has won": (dict(disc_right_on_real=0.995, disc_right_on_fake=0.99), "discriminator has won"),
    "blind": (BLIND | dict(steps=200), "the discriminator is blind: it has told"),
    "blind, with luck": (BLIND | dict(steps=200, disc_right_on_real=wavering(0.51)), "is blind"),
    "one answer": (dict(disc_right_on_real=1.0, disc_right_on_fake=0.0, steps=210), "210 steps"),
    "off colour": (dict(preview_tint=0.5), "drift: the mean hue of outputs is 0.5 from that of"),
    "off colour in b": (dict(preview_tint_a2b=0.5), "(preview_tint_a2b)"),
    "explodes": (dict(grad_norm=after(595, 100, before=1)), "grad_norm was over 10 times"),
    "D explodes": (dict(disc_grad_norm=after(595, 100, before=1)), "disc_grad_norm was"),
    "by heart": (dict(val_score=lambda step: 1 + abs(step - 200) / 100), "best at step 200"),
    "by heart, late": (dict(val_score=lambda step: 1 + abs(step - 350) / 100), "at step 350"),
    "by heart, in dB": (dict(val_score=lambda step: abs(step - 200) / 50 - 22), "best at step 200"),
    "one pair": (dict(items=1), "short data: an epoch has 1 items"),
}


@pytest.mark.parametrize("signals, said", SICK.values(), ids=SICK)
def test_a_signal_that_leaves_its_range_is_warned_of_by_name_and_with_a_remedy(signals, said):
    signals = dict(signals)
    items = signals.pop("items", 1000)
    assert warned(**WELL) is None
    found = warned(**WELL | signals, items=items)
    assert found and said in found and "\n" not in found
    assert any(word in found for word in ("--", "best.safetensors", "look at"))


@pytest.mark.parametrize(
    "loss, kind, says",
    [
        ("l2", "preview_change", "the distance to the targets asks for more"),
        ("cycle", "preview_change", "raise --lambda_gan, or in"),
        ("l2", "preview_tint", "or raise --lambda_l2"),
        ("kl", "preview_tint", "or raise --lambda_kl"),
        ("cycle", "preview_tint", "or raise --lambda_cycle and --lambda_idt"),
    ],
)
def test_a_remedy_names_flags_that_the_trainer_has(loss, kind, says):
    sick = {"preview_change": 0.01, "preview_tint": 0.9}[kind]
    assert says in warned(**WELL | {loss: 1.0, kind: sick})


HEALTHY = {
    "blind for a short time": BLIND | dict(steps=199),
    "slow to see": BLIND | dict(steps=200, disc_right_on_real=wavering(0.53)),
    "has met its match": dict(
        steps=205, disc_right_on_real=after(90, 0.1, before=0.8), disc_right_on_fake=0.9
    ),
    "for a moment": dict(disc_right_on_real=after(590, 1, before=0.7), disc_right_on_fake=1.0),
    "one preview": dict(preview_variety=after(599, 0.02, before=0.8)),
    "outliers": dict(grad_norm=lambda step: 500 if step % 20 == 0 else 1),
    "a gradient that falls": dict(grad_norm=lambda step: 100 / step),
    "a small gradient that grows": dict(disc_grad_norm=after(560, 0.4, before=0.03)),
    "a plateau": dict(val_score=lambda step: 1 + 0.01 * (step > 200)),
    "worse for a short time": dict(val_score=lambda step: 1 + abs(step - 500) / 100),
    "accurate about fakes alone": dict(disc_right_on_fake=1.0),
    "no number": dict(preview_change=float("nan"), grad_norm=float("inf")),
    "no gradient": dict(grad_norm=0.0),
    "wins at first": dict(steps=99, disc_right_on_real=1.0, disc_right_on_fake=1.0),
    "few previews": dict(steps=149, preview_variety=0.02),
    "few validations": dict(steps=150, val_score=lambda step: float(step)),
}


@pytest.mark.parametrize("signals", HEALTHY.values(), ids=HEALTHY)
def test_what_passes_or_is_small_is_not_warned_of(signals):
    assert warned(**WELL | signals) is None


def test_a_long_run_is_watched_over_a_tenth_of_it():
    won = dict(disc_right_on_real=1.0, disc_right_on_fake=1.0)
    few = history(steps=900, last_step=10_000, **won)
    many = history(steps=1000, last_step=10_000, **won)
    assert watch.next_warning(few) is None and "last 1000 steps" in watch.next_warning(many)


def test_each_warning_is_given_once_and_the_next_one_after_it():
    found = history(**WELL | dict(preview_change=0.01, preview_tint=0.9))
    kinds = []
    while (text := watch.next_warning(found)) is not None:
        kinds.append(text.partition(":")[0])
        found.note(LAST, text)
    assert kinds == ["copying", "drift"]
    assert found.given["copying"].endswith("(step 600)")


def test_a_long_history_is_cut_and_still_checked():
    found = watch.History(1000, LAST)
    for step in range(1, 2 * watch.KEPT + 10):
        found.add(step, {"disc_right_on_real": 1.0, "disc_right_on_fake": 1.0})
    assert len(found.series["disc_right_on_real"]) <= 2 * watch.KEPT
    assert "has won" in watch.next_warning(found)


def test_a_cut_history_is_not_taken_for_the_first_steps():
    found = watch.History(1000, last_step=25_000)
    for step in range(1, 2 * watch.KEPT + 30):
        right = 0.8 if step < 5000 else 0.5
        found.add(step, {"disc_right_on_real": right, "disc_right_on_fake": right})
        if step > 2 * watch.KEPT - 10:
            assert watch.next_warning(found) is None, step


def test_the_log_brings_the_history_back_without_damaged_lines(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "preview_change": 0.01}) for step in range(1, 201)]
    lines[49] = json.dumps({"step": 50, "preview_change": 0.01, "warning": "drift: far (a: b)"})
    lines.insert(20, "[1]")
    lines.insert(30, '{"ste')
    log.write_text("\n".join(lines))
    found = watch.recall(log, 1000, LAST)
    assert len(found.series["preview_change"]) == 200 and list(found.given) == ["drift"]
    assert watch.next_warning(found).startswith("copying")
    assert watch.recall(tmp_path / "none", 1000, LAST).series == {}


# ---------------------------------------------------------------------------------- signals

def test_the_signals_of_a_preview():
    torch.manual_seed(0)
    inputs = torch.rand(5, 3, 8, 8) * 2 - 1
    found = watch.preview_signals(0.5 * inputs - 0.25, inputs, inputs, "_a2b")
    del found["preview_tint_a2b"]
    mean = inputs.mean().item()
    expected = dict(level=-0.25 - 0.5 * mean, contrast=0.5, variety=0.5)
    expected = {f"preview_{name}_a2b": value for name, value in expected.items()}
    assert found == pytest.approx(expected, abs=1e-5)

    # Half of the way to black targets, then with more red.
    found = watch.preview_signals(0.5 * inputs, inputs, torch.zeros_like(inputs))
    assert found["preview_change"] == pytest.approx(0.5, abs=1e-5)
    red = inputs + torch.tensor([0.3, 0.0, 0.0]).view(3, 1, 1)
    found = watch.preview_signals(red, inputs, inputs)
    assert found["preview_level"] == pytest.approx(0.1, abs=1e-5)
    assert found["preview_tint"] == pytest.approx((0.2 + 0.1 + 0.1) / 3, abs=1e-5)


def test_variety_is_the_distance_of_pairs():
    pictures = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    squares = []
    for i in range(4):
        for j in range(i):
            squares.append((pictures[i] - pictures[j]).square().mean())
    by_hand = torch.stack(squares).mean().sqrt()
    assert torch.allclose(watch.distance(pictures), by_hand, rtol=1e-12)


def test_one_picture_has_no_variety_and_flat_ones_divide_by_no_zero():
    one = torch.zeros(1, 3, 4, 4)
    found = watch.preview_signals(one, one, one)
    assert not found.keys() & {"preview_variety", "preview_change"}
    found = watch.preview_signals(one.expand(3, -1, -1, -1), *[torch.zeros(3, 3, 4, 4)] * 2)
    assert found["preview_variety"] == 0 and found["preview_contrast"] == 0


# ------------------------------------------------------------------------------ in a trainer

def test_a_warning_is_one_line_on_stderr_and_in_the_log_and_is_not_repeated_when_resumed(
    monkeypatch, tmp_path, pairs, capsys  # noqa: F811
):
    flags = ["--device", "cpu", "--resolution", 24, "--train_batch_size", 2, "--lambda_gan", 0]
    flags += ["--validation_num_images", 1, "--dataset_folder", pairs, "--output_dir", tmp_path]
    helpers.train(monkeypatch, train_pix2pix_turbo, *flags, "--max_train_steps", 2)
    err = capsys.readouterr().err
    warnings = [line for line in err.splitlines() if "warning: " in line]
    assert len(warnings) == 1 and "warning: short data: an epoch has 6 items" in warnings[0]
    first, second = helpers.read_log(tmp_path)
    assert first["warning"].startswith("short data: ") and "warning" not in second
    assert set(first) >= {"preview_level", "preview_contrast", "preview_variety"}
    assert second["val_score"] == second["val_l2"]

    helpers.train(monkeypatch, train_pix2pix_turbo, "--resume", tmp_path, "--max_train_steps", 3)
    assert "warning: " not in capsys.readouterr().err
    assert sum("warning" in line for line in helpers.read_log(tmp_path)) == 1
    # A step that is done again warns again: its line is forgotten.
    open_log(tmp_path, 0)
    assert watch.recall(tmp_path / "log.jsonl", 6, 3).given == {}
