"""The drawn world: pictures depend on seed and index alone, light moves nothing, held-out
combinations stay unseen, and the true translations are true."""

import ast
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dataset import check, folders, loader
from dataset.pictures import open_picture, to_tensor
from files import tokenizers
from tiny import scenes
from tiny.scenes import COLOURS, KINDS, TASKS, TIMES, WEATHERS, Paired, Scene, Unpaired

LIGHTS = [*product(TIMES, WEATHERS)]
COMBINATIONS = [*product(COLOURS, KINDS, LIGHTS)]


def one(
    colour: str,
    kind: str,
    time: str = "day",
    weather: str = "clear",
    seed: int = 0,
) -> Scene:
    """A scene with a single object."""
    ground = "lake" if kind == "boat" else "grass"
    return Scene(((colour, kind),), ground, time, weather, seed)


def some(n: int) -> list[Scene]:
    """The first n training scenes."""
    return [scenes.nth_scene("train", 0, i) for i in range(n)]


def is_held_out(colour: str, kind: str, light: tuple[str, str]) -> bool:
    return scenes.left_out(one(colour, kind, *light))


# -------------------- what a drawing depends on


def test_the_scenes_know_no_dataset():
    """dataset.folders imports the scenes, so an import back would be circular."""
    tree = ast.parse(Path(scenes.__file__).read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert "torch" in modules and "dataset" not in modules


def test_pictures_become_tensors_as_in_the_dataset():
    picture = scenes.draw(some(1)[0], 32)
    ours, theirs = scenes.to_tensor(picture), to_tensor(picture)
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert ours.is_contiguous()


@pytest.mark.parametrize("make, key", [
    (Paired, "target"),
    (lambda *arguments: Unpaired("day2night", *arguments), "b"),
])
def test_a_drawing_follows_seed_and_index_and_nothing_else(make, key):
    first = make("train", 32, 3)[5]
    again = make("train", 32, 3)[(5, (1, 2, 3))]
    for name, value in first.items():
        if torch.is_tensor(value):
            assert torch.equal(value, again[name])
        else:
            assert value == again[name]
    for other in (make("train", 32, 3)[6], make("train", 32, 4)[5], make("test", 32, 3)[5]):
        assert not torch.equal(first[key], other[key])


def test_a_drawing_has_the_same_content_at_every_size():
    for scene in some(6):
        small = scenes.draw(scene, 64)
        large = scenes.draw(scene, 256).resize((64, 64), Image.Resampling.BOX)
        assert np.abs(np.asarray(small, int) - np.asarray(large, int)).mean() < 5


def test_any_whole_number_is_a_seed():
    seeds = (0, 1, -1, 2**31, 2**32, 2**32 + 1, 10**40, -(10**40))
    pictures = {Paired("train", 16, seed)[0]["target"].numpy().tobytes() for seed in seeds}
    assert len(pictures) == len(seeds)
    negative, positive = one("red", "car", seed=-(10**40)), one("red", "car", seed=10**40)
    assert scenes.draw(negative, 16) != scenes.draw(positive, 16)


# -------------------- data sets


def test_items_are_those_of_the_folders():
    paired = Paired("test", size=48)
    item = paired[7]
    assert set(item) == {"input", "target", "caption", "name"} and item["name"] == "7.png"
    assert item["input"].shape == item["target"].shape == (3, 48, 48)
    inputs = torch.stack([paired[i]["input"] for i in range(10)])
    targets = torch.stack([paired[i]["target"] for i in range(10)])
    assert inputs.min() == 0 and inputs.max() == 1
    assert -1 <= targets.min() < -0.5 and 0.9 < targets.max() <= 1
    assert paired.captions[7] == item["caption"]
    assert len(paired.captions) == len(paired) == 200

    unpaired = Unpaired("clear2rain", "test", size=48)
    item = unpaired[7]
    assert set(item) == {"a", "b", "name_a", "name_b"}
    assert item["a"].shape == item["b"].shape == (3, 48, 48)
    assert -1 <= item["a"].min() < 0 and len(unpaired) == 200

    assert len(Paired("train")) == len(Unpaired("clear2rain", "train")) == 20_000
    assert torch.equal(paired[-1]["target"], paired[199]["target"])
    for world in (paired, unpaired):
        with pytest.raises(IndexError):
            world[200]


def test_the_trainers_reach_the_unpaired_worlds_by_name():
    world = folders.open_unpaired("drawn:day2night", "train", "resize_48", seed=5, size=48)
    assert torch.equal(world[3]["a"], Unpaired("day2night", "train", 48, 5)[3]["a"])
    batch = next(loader.batches(world, 4, seed=0))
    assert batch["a"].shape == batch["b"].shape == (4, 3, 48, 48)


def test_one_combination_in_ten_is_left_out_and_the_rest_covers_every_light():
    kept = {combination for combination in COMBINATIONS if not is_held_out(*combination)}
    assert 0.09 < 1 - len(kept) / len(COMBINATIONS) < 0.11
    assert {(c, light) for c, _, light in kept} == set(product(COLOURS, LIGHTS))
    assert {(kind, light) for _, kind, light in kept} == set(product(KINDS, LIGHTS))
    assert {(c, kind) for c, kind, _ in kept} == set(product(COLOURS, KINDS))


def test_training_shows_all_but_what_is_left_out_and_each_test_scene_some_of_it():
    def combinations_of(found: list[Scene]) -> set:
        return {(c, kind, (s.time, s.weather)) for s in found for c, kind in s.objects}

    train = some(6000)
    test = [scenes.nth_scene("test", 0, i) for i in range(400)]
    shown = combinations_of(train)
    assert shown == {combination for combination in COMBINATIONS if not is_held_out(*combination)}
    assert combinations_of(test) - shown == set(COMBINATIONS) - shown
    assert all(scenes.left_out(s) for s in test)
    assert {s.ground for s in train} == set(scenes.GROUNDS)
    assert {len(s.objects) for s in train} == {1, 2, 3}
    world = Paired("train")
    assert [world[i]["caption"] for i in range(20)] == [scenes.caption(s) for s in train[:20]]


@pytest.mark.parametrize("task", TASKS)
def test_the_domains_hold_their_light_and_share_no_scene(task):
    found = {}
    for split, domain in product(("train", "test"), "ab"):
        world = Unpaired(task, split)
        here = [world.scene(i, domain, domain) for i in range(500)]
        assert {(s.time, s.weather) for s in here} == {TASKS[task]["ab".index(domain)]}
        assert {scenes.left_out(s) for s in here} == {split == "test"}
        assert {kind for s in here for _, kind in s.objects} == set(KINDS)
        found[split, domain] = {s.seed for s in here}
        residue = 2 * (split == "test") + "ab".index(domain)
        assert {seed % 4 for seed in found[split, domain]} == {residue}
    assert len(set.union(*found.values())) == 4 * 500

    # The two pictures of an item do not even show the same objects.
    world = Unpaired(task, "train")
    alike = []
    for i in range(500):
        alike.append(world.scene(i, "a", "a").objects == world.scene(i, "b", "b").objects)
    assert np.mean(alike) < 0.05


@pytest.mark.parametrize("task", TASKS)
def test_the_truth_is_the_same_scene_in_the_other_light(task):
    world = Unpaired(task, "test", seed=1)
    for i, (direction, here, other) in product(range(5), (("a2b", 0, 1), ("b2a", 1, 0))):
        scene = world.scene(i, direction[0], direction[0])
        truth = world.truth(i, direction)
        assert (scene.time, scene.weather) == TASKS[task][here]
        time, weather = TASKS[task][other]
        turned = Scene(scene.objects, scene.ground, time, weather, scene.seed)
        assert torch.equal(truth, to_tensor(scenes.draw(turned, 64)) * 2 - 1)
        own = world[i][direction[0]]
        assert torch.equal(own, to_tensor(scenes.draw(scene, 64)) * 2 - 1)
        assert (truth - own).abs().mean() > 0.05  # an unchanged input is not the answer
        assert not torch.equal(truth, world[i][direction[2]])
    if task == "day2night":
        assert world.truth(0, "a2b").mean() < world[0]["a"].mean() - 0.5
        assert world.truth(0, "b2a").mean() > world[0]["b"].mean() + 0.5


# -------------------- what a drawing shows


def test_time_and_weather_move_nothing_and_are_seen():
    for scene in some(4):
        seen = [replace(scene, time=time, weather=weather) for time, weather in LIGHTS]
        assert len({scenes.outlines(s, 64).tobytes() for s in seen}) == 1
        assert all(scenes.shapes(s) == scenes.shapes(scene) for s in seen)
        pictures = [np.asarray(scenes.draw(s, 64), float) for s in seen]
        assert min(np.abs(a - b).mean() for a, b in combinations(pictures, 2)) > 5
    first = some(1)[0]
    assert scenes.outlines(first, 64) != scenes.outlines(replace(first, seed=9), 64)


def test_the_outlines_lie_on_edges_of_the_picture():
    for scene in some(12):
        scene = replace(scene, time="day", weather="clear")
        picture = np.asarray(scenes.draw(scene, 256), float)
        slope = sum(np.abs(np.gradient(picture, axis=axis)).sum(2) for axis in (0, 1))
        edges = Image.fromarray((slope > 12).astype(np.uint8) * 255)
        near = np.asarray(edges.filter(ImageFilter.MaxFilter(5))) > 0
        lines = np.asarray(scenes.outlines(scene, 256).convert("L")) > 200
        assert lines.sum() > 500 and near[lines].mean() > 0.85 > 0.6 > near.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_objects_have_the_colour_of_their_name_in_every_light(kind):
    for light in LIGHTS:
        pictures = [scenes.draw(one(c, kind, *light), 64) for c in COLOURS]
        seen = np.stack([np.asarray(picture, float) for picture in pictures])
        coloured = np.ptp(seen, axis=0).max(-1) > 40  # where another colour makes a difference
        named = np.array([scenes.shade(c, *light) for c in COLOURS])
        for i, picture in enumerate(seen):
            median = np.median(picture[coloured], axis=0)
            assert np.linalg.norm(named - median, axis=1).argmin() == i, (i, light)
        assert coloured.sum() > 60


def test_colours_stay_distinguishable_in_every_light():
    for light in LIGHTS:
        seen = [np.array(scenes.shade(c, *light), float) for c in COLOURS]
        nearest = min(np.linalg.norm(a - b) for a, b in combinations(seen, 2))
        assert nearest > (60 if light[0] == "night" else 65), (light, nearest)  # of 255


def test_rain_snow_and_stars_are_seen_at_64_pixels():
    def specks(scene: Scene) -> int:
        """Pixels of the sky that are brighter than those around them."""
        sky = scenes.draw(scene, 64).convert("L").crop((0, 0, 64, 26))
        smooth = sky.filter(ImageFilter.MedianFilter(5))
        return (np.asarray(sky, int) - np.asarray(smooth, int) > 16).sum()

    for scene in some(20):
        count = {}
        for time, weather in LIGHTS:
            count[time, weather] = specks(replace(scene, time=time, weather=weather))
        for time in TIMES:
            assert count[time, "rain"] > 80 and count[time, "snow"] > 30
        assert count["night", "clear"] > 60 > 25 > count["night", "fog"]


# -------------------- captions


def test_captions_name_what_is_drawn():
    colours, kinds = "|".join(COLOURS), "|".join(KINDS)
    pattern = (
        rf"(?:an? (?:{colours}) (?:{kinds})(?: and )?){{1,3}} (?:on grass|on sand|by a lake) "
        "(?:in the day|at night|at dusk) (?:in clear weather|in the (?:rain|snow|fog))"
    )
    for scene in some(300):
        text = scenes.caption(scene)
        assert re.fullmatch(pattern, text), text
        assert tuple(re.findall(rf"\b({colours}) ({kinds})", text)) == scene.objects
        assert scene.ground in text and scene.weather in text and scene.time in text

    tree = one("orange", "tree")
    assert scenes.caption(tree) == "an orange tree on grass in the day in clear weather"
    boat = one("red", "boat", "dusk", "fog")
    assert scenes.caption(boat) == "a red boat by a lake at dusk in the fog"


def test_loose_captions_name_the_same_things_in_other_words():
    scene = scenes.Scene((("red", "house"), ("blue", "car")), "sand", "night", "rain", 0)
    texts = [scenes.loose_caption(scene, scenes._rng("test", i)) for i in range(200)]
    assert len(set(texts)) > 190
    named = [text for text in texts if ("red" in text or "crimson" in text) and "blue" in text]
    assert len(named) > 180  # typing errors are in some
    for absent in ("green", "boat", "snow", "day"):
        assert not any(absent in text for text in texts)


def open_drawn(name: str, split: str):
    return folders.open_paired(f"drawn:{name}", split, "no_resize", size=32)


def test_one_training_caption_in_five_is_loose_where_that_is_asked_for():
    plain = open_drawn("scenes", "train")
    loose = open_drawn("loose", "train")
    differs = [plain[i]["caption"] != loose[i]["caption"] for i in range(20)]
    assert differs == [i % 5 == 0 for i in range(20)]
    assert torch.equal(plain[5]["target"], loose[5]["target"])
    assert open_drawn("scenes", "test")[5]["caption"] == open_drawn("loose", "test")[5]["caption"]


def test_the_tiny_tokenizer_knows_every_word_and_cuts_no_caption():
    tokenizer = tokenizers.load_tokenizer("tiny")
    longest = (
        "an orange car and an orange tree and an orange house by a lake in the day in clear weather"
    )
    texts = [longest, *(scenes.caption(s) for s in some(100))]
    for task in TASKS:
        texts += Unpaired(task, "test").prompts
    for text in texts:
        ids = tokenizer.pieces.encode(text, add_special_tokens=False).ids
        assert len(ids) == len(text.split()) <= tokenizer.length - 2


def test_the_prompts_speak_of_light_as_the_captions_do():
    for task in TASKS:
        world = Unpaired(task, "test")
        for domain, prompt in zip("ab", world.prompts):
            text = scenes.caption(world.scene(0, domain, domain))
            assert text.endswith(prompt.removeprefix("a scene "))
    assert Unpaired("day2night", "test").prompts[1] == "a scene at night in clear weather"


# -------------------- wrong descriptions


@pytest.mark.parametrize("fields, word", [
    (dict(objects=()), "0 objects"),
    (dict(objects=(("red", "car"),) * 4), "4 objects"),
    (dict(objects=(("mauve", "car"),)), "mauve"),
    (dict(objects=(("red", "dog"),)), "dog"),
    (dict(objects=(("red", "boat"),)), "a boat on grass"),
    (dict(ground="moon"), "moon"),
    (dict(time="noon"), "noon"),
    (dict(weather="hail"), "hail"),
])
def test_an_impossible_scene_is_refused_in_one_sentence(fields, word):
    with pytest.raises(ValueError, match=word) as error:
        replace(one("red", "car"), **fields)
    assert "\n" not in str(error.value)


def test_unknown_tasks_and_splits_are_refused():
    with pytest.raises(ValueError, match="known are drawn:day2night, drawn:clear2rain"):
        Unpaired("day2dawn", "train")
    with pytest.raises(ValueError, match="known are train, test"):
        Paired("val")[0]


# -------------------- the command line


def picture(path) -> torch.Tensor:
    return to_tensor(open_picture(path)) * 2 - 1


def test_a_written_paired_folder_is_the_data_set(tmp_path, capsys):
    out = tmp_path / "pairs"
    scenes.main([str(out), "--task", "edges", "--n", "20", "--size", "32", "--seed", "7"])
    assert capsys.readouterr().out.strip() == str(out)
    for split, n in (("train", 20), ("test", 2)):
        folder, world = folders.PairedFolder(out, split, "no_resize"), Paired(split, 32, 7)
        assert len(folder) == n
        for item in folder:
            drawn = world[int(item["name"].removesuffix(".png"))]
            assert item["caption"] == drawn["caption"]
            assert torch.allclose(item["input"], drawn["input"], atol=1e-6)
            assert torch.allclose(item["target"], drawn["target"], atol=1e-6)
    assert check.check(out, tmp_path / "sheet.png") == []


@pytest.mark.parametrize("task", TASKS)
def test_a_written_unpaired_folder_is_the_data_set_with_its_truths(task, tmp_path):
    out = tmp_path / task
    scenes.main([str(out), "--task", task, "--n", "20", "--size", "32"])
    for split, n in (("train", 20), ("test", 2)):
        folder = folders.UnpairedFolder(out, split, "no_resize")
        world = Unpaired(task, split, 32)
        assert folder.prompts == world.prompts
        assert [len(names) for names in folder.names] == [n, n]
        for item in map(folder.__getitem__, range(n)):
            for domain in "ab":
                drawn = world[int(item[f"name_{domain}"].removesuffix(".png"))][domain]
                assert torch.allclose(item[domain], drawn, atol=1e-6)
    # `world` is the test split now.
    for i, (side, direction) in product(range(2), (("A", "a2b"), ("B", "b2a"))):
        written = picture(out / f"truth_{side}" / f"{i}.png")
        assert torch.allclose(written, world.truth(i, direction), atol=1e-6)
    assert len([*(out / "truth_A").iterdir()]) == len([*(out / "truth_B").iterdir()]) == 2
    assert check.check(out, tmp_path / "sheet.png") == []


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tiny.scenes", *map(str, arguments)]
    root = Path(scenes.__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_another_process_draws_the_same_and_refuses_a_full_folder_in_one_line(tmp_path):
    arguments = [tmp_path / "out", "--n", "3", "--size", "32", "--seed", 2**62]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    world = Paired("train", 32, 2**62)
    for i in range(3):
        written = picture(tmp_path / "out" / "train_B" / f"{i}.png")
        assert torch.allclose(written, world[i]["target"], atol=1e-6)

    done = run(*arguments)
    assert done.returncode == 2 and "not an empty folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments, word", [
    (["--n", "0"], "--n 0"),
    (["--size", "4"], "--size 4"),
    (["--task", "edge"], "edge"),
    (["--sed", "1"], "--seed"),
])
def test_wrong_arguments_are_refused_in_one_line(arguments, word, tmp_path):
    with pytest.raises(ValueError, match=word) as error:
        scenes.main([str(tmp_path / "out"), *arguments])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_sheet_shows_each_scene_in_all_lights(tmp_path):
    scenes.main([str(tmp_path / "sheet.png"), "--sheet", "--size", "32"])
    page = open_picture(tmp_path / "sheet.png")
    assert page.size == (13 * 32, 9 * 32)
    cells = set()
    for x, y in product(range(0, 13 * 32, 32), range(0, 9 * 32, 32)):
        cells.add(page.crop((x, y, x + 32, y + 32)).tobytes())
    assert len(cells) == 13 * 9
