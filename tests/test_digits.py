"""The data set `digits`, the classifier that measures digits, and the figures of samples."""

import io
import json
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import randomise
from pictures_helpers import refused
from PIL import Image

import dataset.digits
import sample
import training
from dataset.digits import SHEET, read_sheet
from dataset.folders import open_captioned
from dataset.loader import batches
from files import bases, checkpoints
from files.tensors import read_tensors
from tiny import digits, recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def asked():
    return torch.arange(1000) % 10


def opened(split, side=32):
    return open_captioned("digits", split, f"resized_crop_{side}")


# -------------------- the data set

def test_digits_are_9000_for_training_and_a_hundred_a_class_for_the_test():
    train, test = opened("train"), opened("test")
    assert len(train) == 9000 and len(test) == 1000
    assert test.captions == [str(i % 10) for i in range(1000)]
    # The classes take turns in training too, and the rarest of them is the 5.
    assert train.captions[:7630] == [str(i % 10) for i in range(7630)]
    assert train.captions.count("5") == 763 and set(train.captions) == set("0123456789")
    assert len({*train.names, *test.names}) == 10_000
    levels = np.concatenate([train.levels, test.levels])
    assert len({digit.tobytes() for digit in levels}) == 10_000


def test_an_item_is_a_padded_digit_with_its_caption(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    test = open_captioned("digits", "test", "resized_randomcrop_32", seed=1, size=32)
    item = test[13]
    assert item["caption"] == "3" and item["name"] == "3-0001"
    assert item["target"].shape == (3, 32, 32) and item["target"].dtype == torch.float32
    levels = (item["target"] + 1) * 127.5
    padded = np.pad(test.levels[13], 2)
    for channel in levels.round().byte().numpy():
        assert np.array_equal(channel, padded)
    # There is nothing to crop at random, so a key changes nothing.
    assert torch.equal(test[(13, (1, 2, 3))]["target"], item["target"])
    assert torch.equal(test.pictures()[13], item["target"][:1])

    assert opened("test", 16)[13]["target"].shape == (3, 16, 16)
    batch = next(batches(test, 4, seed=0, num_workers=1))
    assert batch["target"].shape == (4, 3, 32, 32)


def zipped(path, count=130):
    """A zip in EDM's layout: `count` digits of class 1, then three of class 7, of one level each.

    The levels of the ones are 1, 2, 3 and so on, those of the sevens 201 to 203.
    """
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for level in [*range(1, count + 1), 201, 202, 203]:
            file = io.BytesIO()
            Image.new("L", (28, 28), level).save(file, "PNG")
            archive.writestr(f"{level}.png", file.getvalue())
            labels.append([f"{level}.png", 7 if level > 200 else 1])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_a_sheet_holds_the_digits_of_a_zip_and_their_labels(tmp_path):
    digits.write_sheet(zipped(tmp_path / "set.zip"), tmp_path / "sheet.png")
    levels, labels, names = read_sheet(tmp_path / "sheet.png", "test")
    assert labels == [1, 7, 1, 7, 1, 7, *[1] * 97]
    assert levels[:, 0, 0].tolist() == [1, 201, 2, 202, 3, 203, *range(4, 101)]
    assert names[:2] == ["1-0000", "7-0000"]
    levels, labels, names = read_sheet(tmp_path / "sheet.png", "train")
    assert labels == [1] * 30 and levels[:, 27, 27].tolist() == list(range(101, 131))
    assert names[0] == "1-0100" and (levels == levels[:, :1, :1]).all()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda data: data[:500_000], "damaged.png cannot be used"),
        (lambda data: data[:900_000] + b"\0" + data[900_001:], "damaged.png cannot be used"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1", "cannot identify"),
        (lambda data: b"", "damaged.png cannot be used"),
    ],
    ids=["cut", "a byte", "pointer", "empty"],
)
def test_a_damaged_sheet_is_refused_in_one_line(monkeypatch, tmp_path, damage, match):
    path = tmp_path / "damaged.png"
    path.write_bytes(damage(SHEET.read_bytes()))
    monkeypatch.setattr(dataset.digits, "SHEET", path)
    refused(opened, "train", match=match)
    refused(opened, "train", match="git checkout tiny/digits.png")


def test_another_picture_and_a_missing_one_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "other.png"
    monkeypatch.setattr(dataset.digits, "SHEET", path)
    refused(opened, "test", match="there is no such file")
    Image.new("RGB", (28, 28)).save(path)
    refused(opened, "test", match="28x28 RGB")


def test_a_misspelt_name_says_what_there_is():
    refused(open_captioned, "digit", "train", "no_resize", match="drawn:scenes, or digits")
    refused(open_captioned, "drawn:digits", "train", "no_resize", match="digits")
    refused(open_captioned, "digits", "train", "resized_32", match="unknown preparation")


# -------------------- the classifier

def test_the_classifier_recognises_test_digits_at_both_sizes(asked):
    for side in (32, 16):
        found = digits.recognised(digits.references(side).test_features)
        assert (found == asked).double().mean() >= 0.985
    assert digits.WEIGHTS.stat().st_size < 200_000


def test_training_writes_a_classifier_and_is_repeatable(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "RUNS", tmp_path)
    monkeypatch.setattr(digits, "WEIGHTS", tmp_path / "classifier.safetensors")
    trained = []
    for _ in range(2):
        digits.train_classifier(steps=2, batch=4)
        tensors, _ = read_tensors(digits.WEIGHTS, "a classifier")
        trained.append(tensors)
        shutil.rmtree(tmp_path / "digits")
    assert trained[0].keys() == digits.DigitClassifier().state_dict().keys()
    for name, tensor in trained[0].items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, trained[1][name])


def test_warping_keeps_black_black_and_moves_digits():
    x = opened("test").pictures()[:20]
    warped = digits.warp(x, torch.Generator().manual_seed(0))
    again = digits.warp(x, torch.Generator().manual_seed(0))
    assert torch.equal(warped, again) and not torch.allclose(warped, x, atol=0.5)
    assert (warped[:, :, 0, 0] == -1).all() and warped.min() >= -1 and warped.max() <= 1


# -------------------- the figures

def test_density_and_coverage_of_points_on_a_line():
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0]])  # radii for k = 1: 1, 1, 1, 2
    fake = torch.tensor([[0.5], [1.5], [3.5], [9.0]])
    # 0.5 is in the balls around 0 and 1, 1.5 in those around 1 and 2, 3.5 in that around 4.
    assert digits.density_and_coverage(real, fake, k=1) == (5 / 4, 1.0)
    assert digits.density_and_coverage(real, fake[2:], k=1) == (1 / 2, 1 / 4)
    # For k = 2 the radii are 2, 1, 2, 3.
    assert digits.density_and_coverage(real, fake[:1], k=2) == (3 / 2, 3 / 4)


def test_density_and_coverage_equal_a_count_one_by_one():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=generator)
    fake = 1.5 * torch.randn(30, 3, generator=generator)
    inside, covered = 0, 0
    for i, centre in enumerate(real):
        others = [(centre - x).norm().item() for j, x in enumerate(real) if j != i]
        radius = sorted(others)[4]
        hits = sum((centre - y).norm().item() < radius for y in fake)
        inside += hits
        covered += hits > 0
    expected = (inside / (5 * 30), covered / 40)
    assert 0 < covered < 40
    assert digits.density_and_coverage(real, fake) == pytest.approx(expected, rel=1e-12)


def test_the_limits_are_what_real_digits_get():
    limits = digits.limits()
    assert limits["right"] >= 0.985 and limits["frechet"] < 3
    assert 0.9 < limits["density"] < 1.1 and limits["coverage"] == pytest.approx(31 / 32, abs=0.02)
    assert 0.2 < limits["nearest"] < 0.4


def test_test_digits_measured_as_samples_are_perfect(asked):
    figures = digits.measure(digits.references(32).test, asked)
    assert figures["frechet"] < 1e-6 and figures["density"] == figures["coverage"] == 1


def test_a_digit_a_class_is_right_but_covers_little_and_is_found_to_be_a_copy(asked):
    limits = digits.limits()
    training_digits = digits.references(32).training
    covered = []
    for different in (1, 5, 20):
        x = training_digits[:10 * different].repeat(100 // different, 1, 1, 1)
        figures = digits.measure(x, asked)
        covered.append(figures["coverage"])
        assert figures["right"] == 1 and figures["frechet"] > 2 * limits["frechet"]
        assert figures["nearest"] < 0.01
    assert covered[0] < 0.1 and covered[0] < covered[1] < covered[2] < 0.8


def test_a_sample_of_another_digit_is_wrong_and_noise_is_far_from_digits(asked):
    x = digits.references(32).training[:1000]
    assert digits.measure(x, (asked + 1) % 10)["right"] < 0.01
    noise = torch.randn(1000, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    figures = digits.measure(noise, asked)
    assert figures["right"] < 0.3 and figures["coverage"] < 0.1
    assert figures["frechet"] > 50 * digits.limits()["frechet"]


def test_grey_and_rgb_of_any_size_and_range_are_measured(asked):
    x = digits.references(16).training[:1000]
    figures = digits.measure(x, asked)
    assert figures["frechet"] < 3 and figures["coverage"] > 0.9
    assert digits.measure(3 * x.expand(-1, 3, -1, -1).double(), asked.tolist())["right"] > 0.9
    rgb = digits.measure(x.expand(-1, 3, -1, -1), asked)
    assert rgb == pytest.approx(figures, abs=1e-4)


def test_samples_that_cannot_be_measured_are_refused(asked):
    x = torch.zeros(1000, 1, 32, 32)
    refused(digits.measure, x[:5], asked, match="[5, 1, 32, 32]")
    refused(digits.measure, x[:, 0], asked, match="expected [N, C, H, W]")
    x[7] = torch.nan
    refused(digits.measure, x, asked, match="NaN")


# -------------------- pages and the command

def test_pages_show_ten_samples_a_digit_beside_their_nearest_training_digits():
    training_digits = digits.references(32).training
    asked = torch.arange(200) % 10
    x = training_digits[:200]
    page = np.asarray(digits.samples_page(x, asked))
    assert page.shape == (640, 640, 3)
    one = ((x[23, 0].numpy() + 1) * 127.5).round()  # the third sample of the digit 3
    assert np.array_equal(page[192:256:2, 128:192:2, 0], one)

    page = np.asarray(digits.neighbours_page(x, asked))
    assert page.shape == (640, 1280, 3)
    sample_of_3 = page[192:256:2, 256:320:2, 0]
    neighbour = page[192:256:2, 320:384:2, 0]
    assert np.array_equal(sample_of_3, one)
    # Each is its own nearest training digit.
    assert np.array_equal(neighbour, 255 - sample_of_3)


def write_checkpoint(path):
    """A one-step generator with random weights, of 16 x 16 pixels."""
    base = bases.load_base("pixels", dtype=torch.float32)
    randomise(base.unet)
    trained = {f"unet.{name}": p for name, p in base.unet.named_parameters()}
    prior = (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))
    checkpoints.save_yoso(path, base, "pixels", trained, prior, None)
    return path


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["digits.py", *map(str, argv)])
    training.run_script(digits.main)


def test_the_command_measures_a_checkpoint_and_writes_pages(monkeypatch, capsys, tmp_path):
    path = write_checkpoint(tmp_path / "model.safetensors")
    monkeypatch.setattr(digits, "PER_CLASS", 2)
    monkeypatch.setattr(digits, "limits", lambda side: {"side": side})
    out = tmp_path / "pages"
    run(monkeypatch, "measure", path, "--seeds", 5, 1000, "--output", out)
    printed = json.loads(capsys.readouterr().out)
    samples, asked = digits.draw_samples(str(path), 5, 2)
    assert asked.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    assert printed["seed 5"] == pytest.approx(digits.measure(samples, asked))
    assert printed["seed 1000"] != printed["seed 5"]
    assert printed["digits that people wrote"] == {"side": 16}
    assert Image.open(out / "samples.png").size == (64, 320)
    assert Image.open(out / "neighbours.png").size == (128, 320)

    # The samples are what sample.py draws.
    command = ["3", "--checkpoint", path, "--seed", 12, "--dtype", "float32"]
    command += ["--output", tmp_path / "three.png"]
    sample.draw(sample.parse(list(map(str, command))), torch.device("cpu"))
    drawn = np.asarray(Image.open(tmp_path / "three.png")).astype(int)
    expected = ((samples[7].numpy() + 1) * 127.5).round().transpose(1, 2, 0)
    assert np.abs(drawn - expected).max() <= 1


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["measure", "nothing.safetensors"], "nothing.safetensors"),
        (["measure", SHEET], "digits.png"),
        (["measure"], "checkpoint"),
        (["sheet", SHEET], "a zip of MNIST in EDM's layout"),
        ([], "command"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(monkeypatch, capsys, tmp_path, argv, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *argv)
    error = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "\n" not in error and match in error
