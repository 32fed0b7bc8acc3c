"""The comparison of real sides: it trains in pieces, measures each once, draws curves."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch

import training
from tiny import compare, digits

pytestmark = pytest.mark.usefixtures("one_thread")


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, argv)])
    training.run_script(compare.main)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Runs of a few steps, in a folder of their own."""
    monkeypatch.setattr(compare, "RUNS", tmp_path / "runs")
    for name, world in compare.WORLDS.items():
        short = dataclasses.replace(world, marks=(2, 3))
        monkeypatch.setitem(compare.WORLDS, name, short)
    monkeypatch.setattr(digits, "PER_CLASS", 2)
    own = dict(denoising_steps=1, train_batch_size=2, adversarial="data", checkpointing_steps=1)
    monkeypatch.setitem(compare.SIDES, "data", own)


@pytest.mark.slow
def test_a_run_stops_at_each_mark_is_measured_and_goes_on(
    monkeypatch, capsys, small, tmp_path
):
    out = tmp_path / "new" / "folder"
    flags = ["--sides", "data", "--seeds", 5, "--output", out]
    run(monkeypatch, *flags, "--steps", 2)
    first = compare.read_results(out / "digits.json")
    assert [*first] == ["data, seed 5, step 2"]

    run(monkeypatch, *flags, "--steps", 3)
    results = compare.read_results(out / "digits.json")
    assert [*results] == ["data, seed 5, step 2", "data, seed 5, step 3"]
    # What was measured stays: training it again would fail, since the run is past that step.
    assert results["data, seed 5, step 2"] == first["data, seed 5, step 2"]
    assert {*compare.WORLDS["digits"].figures} <= {*results["data, seed 5, step 3"]}
    log = (tmp_path / "runs" / "digits" / "data-5" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3]

    # With other results the run would begin again, but its folder holds later weights.
    with pytest.raises(SystemExit):
        run(monkeypatch, *flags[:-1], tmp_path / "other")
    assert "is at step 3" in capsys.readouterr().err


@pytest.mark.slow
def test_scenes_start_from_the_stage_on_the_data_alone_and_read_a_cache(
    monkeypatch, small, tmp_path
):
    folder = tmp_path / "plates"
    monkeypatch.setattr(compare.plates, "FOLDER", folder)
    shutil.copytree("tiny/tiny-turbo", folder / "data-alone-seed5" / "base")
    monkeypatch.setattr(compare, "SCENES", 6)
    compare.drawings.cache_clear()
    caches = []
    recipe_run = compare.recipe.run

    def without_the_cache(script, *arguments):
        """The cache would encode 20,000 drawings."""
        if script == "-m":
            caches.append(arguments[:3])
        else:
            recipe_run(script, *arguments)

    monkeypatch.setattr(compare.recipe, "run", without_the_cache)
    for_two_steps = compare.SIDES["data"] | dict(denoising_steps=0, dataset_folder="drawn:scenes")
    for_two_steps |= dict(validation_num_images=2)
    monkeypatch.setitem(compare.SIDES, "data", for_two_steps)
    run(monkeypatch, "--world", "scenes", "--sides", "data", "--seeds", 5, "--output", tmp_path)

    assert caches == [("dataset", "cache", "drawn:scenes")]  # made once, for the first of two marks
    settings = json.loads((tmp_path / "runs" / "scenes" / "data-5" / "config.json").read_text())
    assert settings["base"] == str(folder / "data-alone-seed5" / "base")
    results = compare.read_results(tmp_path / "scenes.json")
    assert [*results] == ["data, seed 5, step 2", "data, seed 5, step 3"]
    assert {*compare.WORLDS["scenes"].figures} <= {*results["data, seed 5, step 3"]}
    assert (tmp_path / "scenes.png").is_file()
    compare.drawings.cache_clear()


def test_drawings_are_as_varied_as_drawings_and_grey_pictures_are_not(monkeypatch):
    monkeypatch.setattr(compare, "SCENES", 6)
    compare.drawings.cache_clear()
    described, truth, others = compare.drawings()
    assert len(described) == 6 and (others != truth).flatten(1).any(1).all()

    limits = compare.scenes_limits()
    assert limits["variety"] == 1 and limits["wrong"] < 5 and 0.7 < limits["sharp"] < 1.4
    figures = compare.scene_figures(truth, others)
    assert figures["wrong"] == 0 and figures["frechet"] < 1e-3
    assert figures["variety"] == 1 and figures["sharp"] == 1
    grey = torch.zeros_like(truth)
    worse = compare.scene_figures(grey, grey)
    assert worse["wrong"] > 40 and worse["frechet"] > 10
    assert worse["variety"] == worse["sharp"] == 0
    compare.drawings.cache_clear()


def test_a_side_is_what_its_name_says():
    for side in ("coop", "data", "noisy"):
        assert compare.SIDES[side] == dict(adversarial=side)
    assert compare.SIDES["none"] == dict(lambda_gan=0)


def test_scenes_are_learned_at_a_constant_rate(monkeypatch, tmp_path):
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(compare.plates, "folder_of", lambda name, seed: tmp_path)
    monkeypatch.setattr(compare.recipe, "run", lambda *_: None)
    flags = compare.scenes_flags(5)
    assert compare.CONSTANT.items() <= flags.items() and flags["base"] == tmp_path / "base"


def test_the_accuracy_is_that_of_the_steps_between_two_marks(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": 1, "kl": 0.5}]
    for step, right in ((2, 0.0), (3, 0.5), (4, 1.0)):
        lines.append(dict(step=step, disc=1.4, disc_right_on_real=right, disc_right_on_fake=1))
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare.discriminator_accuracy(log, 0, 1) == {}  # denoising has no discriminator
    assert compare.discriminator_accuracy(log, 1, 3) == {"disc_right": pytest.approx(0.625)}
    assert compare.discriminator_accuracy(log, 3, 4) == {"disc_right": 1}


def test_curves_hold_the_seeds_of_one_side_by_step():
    world = compare.WORLDS["digits"]

    def result(value):
        return dict.fromkeys(world.figures, value)

    results = {
        "coop, seed 1, step 1000": result(0.3),
        "coop, seed 1, step 800": result(0.1),
        "coop, seed 2, step 800": result(0.2),
        "data, seed 1, step 800": result(0.9),
    }
    assert compare.curves(results, "coop", "wrong") == {800: [0.1, 0.2], 1000: [0.3]}
    assert compare.curves(results, "noisy", "wrong") == {}
    rows = compare.table(world, results, (800, 1000)).splitlines()
    assert rows[2] == "| `coop` | 800 |" + " 0.15 (0.1 to 0.2) |" * 6
    assert rows[3] == "| `coop` | 1,000 |" + " 0.3 |" * 6
    assert rows[4].startswith("| `data` | 800 | 0.9 |") and len(rows) == 5
    page = np.asarray(compare.draw_page(world, results))
    red = (page == [192, 57, 43]).all(-1)
    blue = (page == [31, 95, 168]).all(-1)
    assert red.sum() > 6 * 20 and blue.sum() > 6 * 9


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--page"], "found no results"),
        (["--sides", "real"], "invalid choice: 'real'"),
        (["--steps", "799"], "--steps 799: expected 800"),
        (["--world", "scenes", "--steps", "9"], "--steps 9: expected 200"),
        (["--world", "cifar10"], "invalid choice: 'cifar10'"),
        (["--seeds", "one"], "invalid int value: 'one'"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(monkeypatch, capsys, tmp_path, argv, match):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--output", tmp_path, *argv)
    error = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "\n" not in error and match in error
