"""dataset/folders.py: paired, unpaired and captioned data sets."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures_helpers import cache_settings, coordinates, make_pairs, noise, pixels, refused
from PIL import Image

import dataset
from dataset.cache import write_cache
from dataset.folders import (
    PairedFolder,
    UnpairedFolder,
    match_partners,
    open_captioned,
    open_paired,
    open_unpaired,
    pictures_in,
)
from dataset.loader import batches
from dataset.pictures import to_picture, to_tensor

# -------------------- what is left out

def test_what_a_folder_holds_beside_pictures_is_named_in_one_line(tmp_path, capsys):
    for name in ("a.png", "b.jfif", "c.AVIF", "d.e.png"):
        noise(16, 16).save(tmp_path / name)
    for name in ("a.txt", "d.e.txt", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_text("not missed")
    assert pictures_in(tmp_path) == ["a.png", "b.jfif", "c.AVIF", "d.e.png"]
    assert capsys.readouterr() == ("", "")

    for name in ("lost.txt", "b.jfif.txt", "x.heic", "notes.md", "a.caption", "._a.png"):
        (tmp_path / name).write_text("x")
    for i in range(5):
        (tmp_path / f"nested{i}").mkdir()
    (tmp_path / "nested0.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(pictures_in(tmp_path)) == 4
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for part in (
        f"{tmp_path}: left out ",
        "1 hidden picture (._a.png)",
        "3 files of another kind (a.caption, notes.md, x.heic)",
        "1 broken link (gone.png)",
        "6 folders (nested0, nested0.png, nested1, ...)",
        "2 caption files without a picture (b.jfif.txt, lost.txt)",
    ):
        assert part in err


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "a.heic").write_text("x")
    found = "holds no picture but 1 file of another kind (a.heic), 1 folder (train): expected"
    refused(pictures_in, tmp_path, match=found)


def test_odd_names_are_told_in_one_line_and_by_one_process(tmp_path):
    noise(8, 8).save(tmp_path / "a.png")
    for name in (b"two\nlines.md", b"\xff\xfe.md", "żółć.md".encode()):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_text("x")
    code = "import sys, pathlib; from dataset.folders import pictures_in;"
    code += " pictures_in(pathlib.Path(sys.argv[1]))"
    for rank, lines in (("0", 1), ("1", 0)):
        process = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=Path(dataset.__file__).parent.parent,
            env=os.environ | {"PYTHONIOENCODING": "cp1252", "RANK": rank},
            capture_output=True,
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr.count(b"\n") == lines


def test_pairs_say_what_they_leave_out(tmp_path, capsys):
    make_pairs(tmp_path, 3)
    PairedFolder(tmp_path, "train", "no_resize")
    assert capsys.readouterr().err == ""

    noise(8, 8).save(tmp_path / "train_B" / "lonely.png")
    (tmp_path / "train_A" / "deep").mkdir()
    for name in ("001.txt", "002.txt"):
        (tmp_path / "train_A" / name).write_text("another caption")
    prompts = {"000.png": "x", "001.png": "", "002.png": "", "y.png": "y", "lonely.png": "z"}
    (tmp_path / "train_prompts.json").write_text(json.dumps(prompts))
    PairedFolder(tmp_path, "train", "no_resize")
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/train_A: left out 1 folder (deep)",
        f"{tmp_path}/train_B: left out 1 picture without a partner (lonely.png)",
        f"{tmp_path}/train_prompts.json: left out 1 caption without a picture (y.png)",
        f"{tmp_path}/train_A: left out 2 caption files (001.txt, 002.txt), as train_prompts.json"
        " holds the captions",
        f"{tmp_path}/train_A: 2 of 3 captions are empty (001.png, 002.png)",
    ]


def test_captioned_folders_say_what_they_leave_out_once(tmp_path, capsys):
    for i in range(10):
        noise(6, 8, i).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("zero")
    (tmp_path / "more").mkdir()
    for split in ("train", "test"):
        open_captioned(tmp_path, split, "no_resize")
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}: left out 1 folder (more)",
        f"{tmp_path}: 9 of 10 captions are empty (1.png, 2.png, 3.png, ...)",
    ]

    rows = [json.dumps(dict(file_name=f"{i}.png", text="x")) for i in (*range(10), 4, 11)]
    write_metadata(tmp_path, rows)
    open_captioned(tmp_path, "train", "no_resize")
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 caption without a picture (11.png)" in line
    assert "1 repeated caption (4.png), as the last one counts" in line


def test_a_zip_of_macos_holds_only_its_pictures(tmp_path, capsys):
    noise(6, 8).save(tmp_path / "one.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.mkdir("pictures")
        for i in range(10):
            archive.write(tmp_path / "one.png", f"pictures/{i}.png")
            archive.writestr(f"__MACOSX/pictures/._{i}.png", b"Mac OS X resource fork")
        archive.writestr("pictures/._x.png", b"Mac OS X resource fork")
        archive.writestr("pictures/.y.png", b"")
        archive.writestr("pictures/z.heic", b"")
        labels = [[f"pictures/{i}.png", i] for i in (0, 1, 2, 3, 4, 5, 6, 7, 12)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))

    train = open_captioned(tmp_path / "set.zip", "train", "no_resize")
    test = open_captioned(tmp_path / "set.zip", "test", "no_resize")
    assert [train[i]["name"] for i in range(9)] == [f"pictures/{i}.png" for i in range(9)]
    assert test[0]["name"] == "pictures/9.png"
    left_out, empty = capsys.readouterr().err.splitlines()
    for part in (
        "set.zip: left out 11 entries that macOS added (__MACOSX/pictures/._0.png, ",
        "1 hidden picture (pictures/.y.png)",
        "1 file of another kind (pictures/z.heic)",
        "1 label without a picture (pictures/12.png)",
    ):
        assert part in left_out
    assert "set.zip: 2 of 10 captions are empty (pictures/8.png, pictures/9.png)" in empty


@pytest.mark.parametrize("layout", ["zip", "folder"])
def test_names_belong_together_in_either_form_of_unicode(tmp_path, capsys, layout):
    names = [f"e\u0301{i}.png" for i in range(10)]  # e and an accent
    composed = [f"\u00e9{i}.png" for i in range(10)]  # é
    noise(6, 8).save(tmp_path / "one.png")
    folder = tmp_path / "set"
    folder.mkdir()
    source = folder
    if layout == "zip":
        source = tmp_path / "set.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name in names:
                archive.write(tmp_path / "one.png", name)
            labels = [[name, 3] for name in composed]
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    else:
        for name in names:
            shutil.copy(tmp_path / "one.png", folder / name)
        rows = [json.dumps(dict(file_name=name, text="class 3")) for name in composed]
        write_metadata(folder, rows)
    train = open_captioned(source, "train", "no_resize")
    assert train.captions == ["class 3"] * 9
    assert capsys.readouterr().err == ""


def test_a_list_of_captions_has_one_a_line_whatever_else_separates_them(tmp_path):
    source = tmp_path / "captions.txt"
    source.write_text("".join(f"red\u2028and {i}\r\n" for i in range(10)), encoding="utf-8")
    train = open_captioned(source, "train", "no_resize")
    assert train.captions == [f"red and {i}" for i in range(9)]


def write_metadata(folder, rows: list[str]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(rows))


# -------------------- pairs

def test_a_pair_is_input_target_caption_and_name(tmp_path):
    pairs = PairedFolder(make_pairs(tmp_path), "train", "no_resize")
    assert len(pairs) == 5
    item = pairs[3]
    assert set(item) == {"input", "target", "caption", "name"}
    assert item["caption"] == "caption 3"
    assert item["name"] == "003.png"
    assert torch.equal(item["input"], to_tensor(coordinates(40, 40, 3)))
    assert torch.equal(item["target"], to_tensor(coordinates(40, 40, 103)) * 2 - 1)


def test_crop_and_flip_of_a_pair_match_and_come_from_the_key(tmp_path):
    pairs = PairedFolder(make_pairs(tmp_path), "train", "resize_40_randomcrop_32x32_hflip")
    corners = set()
    for step in range(20):
        item = pairs[1, (7, step, 0)]
        again = pairs[1, (7, step, 0)]
        assert torch.equal(item["input"], again["input"])
        assert torch.equal(item["target"], again["target"])

        target = (item["target"][:2] + 1) / 2
        assert torch.allclose(item["input"][:2], target, atol=1e-6)
        corner = (item["input"][:2, 0, 0] * 255).round().int()
        corners.add(tuple(corner.tolist()))
    assert len(corners) > 10

    # Without a key nothing is drawn, and the crop is central.
    assert (pairs[1]["input"][:2, 0, 0] * 255).round().tolist() == [4, 4]
    one = pairs[1, (7, 0, 0)]["input"]
    other = pairs[1, (7, 0, 1)]["input"]
    assert not torch.equal(one, other)


def test_pairs_match_by_name_first_and_by_stem_otherwise(tmp_path):
    sides = {
        "A": ["a.jpg", "b.png", "c.PNG", "d.png"],
        "B": ["a.png", "b.png", "b.jpg", "c.webp", "d.png"],
    }
    for side, names in sides.items():
        (tmp_path / f"test_{side}").mkdir()
        for name in names:
            noise(8, 8).save(tmp_path / f"test_{side}" / name)
    (tmp_path / "test_A" / ".hidden.png").write_text("")
    (tmp_path / "test_A" / "notes.md").write_text("")

    pairs = PairedFolder(tmp_path, "test", "no_resize")
    assert pairs.pairs == [
        ("a.jpg", "a.png"),
        ("b.png", "b.png"),
        ("c.PNG", "c.webp"),
        ("d.png", "d.png"),
    ]


def test_a_stem_with_two_candidates_or_two_claims_is_no_match():
    assert match_partners(["a.jpg"], ["a.png", "a.webp"]) == {"a.jpg": None}
    assert match_partners(["a.jpg", "a.png"], ["a.png"]) == {"a.jpg": None, "a.png": "a.png"}


def test_a_zip_without_its_table_is_told_so(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/dataset.json", "{}")
    refused(open_captioned, path, "train", "no_resize", match="no dataset.json at its top")


def test_names_in_two_unicode_forms_belong_together(tmp_path):
    one, two = "caf\u00e9.png", "cafe\u0301.png"  # an accent of its own, as macOS writes it
    assert match_partners([one], [two]) == {one: two}
    assert match_partners([one], ["cafe\u0301.jpg"]) == {one: "cafe\u0301.jpg"}
    for side, name in (("A", one), ("B", two)):
        (tmp_path / f"test_{side}").mkdir()
        noise(8, 8, 0).save(tmp_path / f"test_{side}" / name)
    (tmp_path / "test_prompts.json").write_text(json.dumps({two: "a bar"}))
    assert PairedFolder(tmp_path, "test", "no_resize").captions == ["a bar"]


def test_captions_come_from_text_files_without_the_json(tmp_path):
    make_pairs(tmp_path, 4)
    (tmp_path / "train_prompts.json").unlink()
    (tmp_path / "train_A" / "000.txt").write_text("beside A\n")
    text = "\ufeffbeside B,\n on two lines"
    (tmp_path / "train_B" / "001.txt").write_text(text, encoding="utf-8")
    (tmp_path / "train_A" / "003.txt").write_text("")

    pairs = PairedFolder(tmp_path, "train", "no_resize")
    captions = [pairs[i]["caption"] for i in range(4)]
    assert captions == ["beside A", "beside B, on two lines", "", ""]


def test_the_json_goes_before_text_files_and_may_hold_more_entries(tmp_path):
    make_pairs(tmp_path, 2)
    (tmp_path / "train_A" / "000.txt").write_text("beside A")
    prompts = {"000.png": "Été", "001.png": "", "x": "extra"}
    (tmp_path / "train_prompts.json").write_text(json.dumps(prompts))

    pairs = PairedFolder(tmp_path, "train", "no_resize")
    assert pairs[0]["caption"] == "Été"
    assert pairs[1]["caption"] == ""


def test_bad_folders_are_refused_when_they_are_opened(tmp_path):
    def opening_is_refused(split: str, prep: str, match: str) -> None:
        refused(PairedFolder, tmp_path, split, prep, match=match)

    absent = tmp_path / "none"
    refused(PairedFolder, absent, "train", "no_resize", match="none/train_A is not a folder")
    make_pairs(tmp_path)
    opening_is_refused("test", "no_resize", "test_A is not a folder")
    (tmp_path / "test_A").mkdir()
    opening_is_refused("test", "no_resize", "test_A holds no picture")
    noise(8, 8).save(tmp_path / "test_A" / "a.png")
    opening_is_refused("test", "no_resize", "test_B is not a folder")
    opening_is_refused("train", "resize_big", "resize_big")
    (tmp_path / "train_B" / "002.png").unlink()
    (tmp_path / "train_B" / "004.png").unlink()
    opening_is_refused("train", "no_resize", "002.png has no partner")
    opening_is_refused("train", "no_resize", "(2 of 5 have none)")


@pytest.mark.parametrize("text,match", [
    (
        '{"000.png": "a",\n"001.png" "b"}',
        "train_prompts.json cannot be used (Expecting ':' delimiter: line 2",
    ),
    ('["a", "b"]', "holds a list); expected JSON, {file name: caption}"),
    ('{"000.png": "a", "001.png": 5}', "the caption of '001.png' is a number, not text"),
    ('{"001.png": "b"}', "no caption for '000.png' (1 of 2 have none)"),
    (b'{"000.png": "\xe9"}', "text in UTF-8"),
])
def test_bad_prompts_are_refused_when_the_folder_is_opened(tmp_path, text, match):
    make_pairs(tmp_path, 2)
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "train_prompts.json").write_bytes(content)
    refused(PairedFolder, tmp_path, "train", "no_resize", match=match)


@pytest.mark.parametrize("prep", ["no_resize", "resize_32"])
def test_a_pair_of_two_sizes_is_refused_by_name(tmp_path, prep):
    make_pairs(tmp_path)
    noise(41, 40).save(tmp_path / "train_B" / "001.png")
    pairs = PairedFolder(tmp_path, "train", prep)
    pairs[0]
    message = "001.png and its partner in train_B are 40x40 and 40x41 pixels"
    refused(lambda: pairs[1], match=message)


def test_real_pairs_open(shared):
    pairs = open_paired(shared / "facades", "train", "resize_286_randomcrop_256x256_hflip")
    assert len(pairs) == 36
    item = pairs[0, (1, 2, 3)]
    assert item["input"].shape == item["target"].shape == (3, 256, 256)
    assert item["caption"] == "a photo of a building facade"


def test_unknown_drawings_are_refused_with_the_known_ones():
    message = "drawn:squares: expected drawn:scenes or drawn:loose"
    refused(open_paired, "drawn:squares", "train", "no_resize", match=message)


def test_the_state_of_a_pair_is_that_of_its_target_and_caption(tmp_path):
    def states() -> list[tuple]:
        pairs = PairedFolder(tmp_path, "train", "no_resize")
        return [pairs.state(i) for i in range(len(pairs))]

    make_pairs(tmp_path, 3)
    before = states()
    noise(20, 20).save(tmp_path / "train_A" / "000.png")
    assert states() == before
    noise(20, 20).save(tmp_path / "train_B" / "001.png")
    prompts = tmp_path / "train_prompts.json"
    prompts.write_text(prompts.read_text().replace("caption 2", "another"))
    assert [a == b for a, b in zip(states(), before, strict=True)] == [True, False, False]


# -------------------- two domains

@pytest.fixture
def domains(tmp_path):
    """Five pictures of A, with green 100, and three of B, with green 200."""
    for side, count, green in [("A", 5, 100), ("B", 3, 200)]:
        folder = tmp_path / f"train_{side}"
        folder.mkdir()
        for i in range(count):
            picture = Image.new("RGB", (20 + i, 18), (10 * i, green, 0))
            picture.save(folder / f"{side.lower()}{i}.png")
        prompt = tmp_path / f"fixed_prompt_{side.lower()}.txt"
        prompt.write_text(f"a photo of {side}\n")
    return tmp_path


def test_unpaired_items_come_from_both_domains_and_follow_their_key(domains):
    pictures = UnpairedFolder(domains, "train", "resize_16")
    assert len(pictures) == 5
    assert pictures.prompts == ("a photo of A", "a photo of B")

    item = pictures[4]
    assert (item["name_a"], item["name_b"]) == ("a4.png", "b1.png")
    for side, green in [("a", 100), ("b", 200)]:
        assert item[side].shape == (3, 16, 16)
        assert item[side][1].mean() == pytest.approx(2 * green / 255 - 1)

    drawn = [pictures[(0, (7, step, 0))]["name_b"] for step in range(30)]
    again = [pictures[(0, (7, step, 0))]["name_b"] for step in range(30)]
    assert set(drawn) == {"b0.png", "b1.png", "b2.png"}
    assert drawn == again


def test_of_a_smaller_domain_all_pictures_are_seen_equally_often(domains):
    for i in (3, 4):
        (domains / "train_A" / f"a{i}.png").unlink()
        (domains / "train_B" / f"b{i}.png").write_bytes(
            (domains / "train_B" / "b0.png").read_bytes()
        )
    pictures = UnpairedFolder(domains, "train", "resize_16")
    assert [len(names) for names in pictures.names] == [3, 5]
    seen = Counter(pictures[(i, (7, epoch, i))]["name_a"] for epoch in range(60) for i in range(5))
    # A picture comes up 60 times by its index and 40 times by chance, with a deviation of 5.
    assert all(80 < count < 120 for count in seen.values()), seen


def test_bad_unpaired_folders_are_refused_by_name(domains):
    (domains / "fixed_prompt_b.txt").unlink()
    with pytest.raises(ValueError, match="fixed_prompt_b.txt cannot be used"):
        UnpairedFolder(domains, "train", "resize_16")
    with pytest.raises(ValueError, match="test_A is not a folder"):
        UnpairedFolder(domains, "test", "resize_16")
    with pytest.raises(ValueError, match="cats'.* drawn:day2night"):
        open_unpaired("drawn:cats", "train", "resize_16")


# -------------------- pictures with captions

def test_captions_come_from_metadata_or_text_files_and_every_tenth_item_is_for_the_test(tmp_path):
    for i in range(20):
        noise(6, 8, i).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f" noise \n{i}")
    train = open_captioned(tmp_path, "train", "no_resize")
    test = open_captioned(tmp_path, "test", "no_resize")
    assert (len(train), len(test)) == (18, 2)
    assert test[1]["name"] == "19.png"
    assert train[3]["caption"] == "noise 3"
    assert np.array_equal(pixels(to_picture(train[3]["target"])), pixels(noise(6, 8, 3)))

    rows = []
    for i in range(20):
        row = dict(file_name=f"{i:02d}.png", text=f"text {i}", other=f"other {i}")
        rows.append(json.dumps(row))
    table = tmp_path / "metadata.jsonl"
    table.write_text("\n".join([*rows, ""]))
    assert open_captioned(tmp_path, "train", "no_resize")[3]["caption"] == "text 3"
    other = open_captioned(tmp_path, "test", "no_resize", column="other")
    assert other[0]["caption"] == "other 9"

    refused(
        open_captioned, tmp_path, "train", "no_resize", column="caption",
        match="--caption_column",
    )
    table.write_text("\n".join(rows[:-1]))
    refused(open_captioned, tmp_path, "train", "no_resize", match="no caption for '19.png'")


@pytest.mark.parametrize("row, reason", [
    ('{"file_name": "1.png", "text": null}', "line 2 cannot be used (the caption is null,"),
    ('{"file_name": "1.png", "text": {"en": "x"}}', "the caption is an object, not text"),
    ('{"file_name": "1.png", "text": []}', "the caption is an empty list"),
    ('{"file_name": "1.png", "text": ["x", null]}', "the list of captions holds null"),
    ('{"file_name": "1.png", "text": [["x"]]}', "the list of captions holds a list"),
    ('{"file_name": "1.png", "text": true}', "the caption is true or false"),
    ('{"file_name": "1.png", "text": 7}', "the caption is a number"),
    ('{"file_name": "1.png", "text": NaN}', "the caption is a number"),
    ('{"file_name": null, "text": "x"}', "file_name is null, not text"),
    ('{"file_name": ["1.png"], "text": "x"}', "file_name is a list, not text"),
    ('{"file_name": "1.png"}', "line 2 cannot be used (KeyError: 'text')"),
    ("null", "line 2 cannot be used (it holds null)"),
    ("[]", "line 2 cannot be used (it holds a list)"),
    ('"1.png"', "line 2 cannot be used (it holds text)"),
    ("{oops", "line 2 cannot be used (Expecting property name"),
])
def test_a_caption_that_is_not_text_is_refused_by_its_line(tmp_path, row, reason):
    noise(6, 8).save(tmp_path / "0.png")
    write_metadata(tmp_path, ['{"file_name": "0.png", "text": "x"}', row])
    refused(open_captioned, tmp_path, "train", "no_resize", match=reason)
    refused(open_captioned, tmp_path, "train", "no_resize", match="metadata.jsonl line 2")


def test_one_of_several_captions_is_drawn_from_the_key(tmp_path):
    coordinates(40, 40).save(tmp_path / "0.png")
    prep = "resized_randomcrop_16_hflip"
    write_metadata(tmp_path, ['{"file_name": "0.png", "text": "one"}'])
    plain = open_captioned(tmp_path, "train", prep)
    write_metadata(tmp_path, ['{"file_name": "0.png", "text": ["one", "two", "three"]}', " "])
    several = open_captioned(tmp_path, "train", prep)

    assert several[0]["caption"] == "one"
    assert several.captions == plain.captions == ["one"]
    drawn = []
    for step in range(40):
        item = several[0, (7, step, 0)]
        drawn.append(item["caption"])
        # The list of captions changes no other random number.
        assert torch.equal(item["target"], plain[0, (7, step, 0)]["target"])
    assert drawn == [several[0, (7, step, 0)]["caption"] for step in range(40)]
    assert set(drawn) == {"one", "two", "three"}


def test_a_folder_with_train_and_test_is_not_split_again(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        noise(6, 8).save(tmp_path / split / f"{split}.png")
    for split in ("train", "test"):
        pictures = open_captioned(tmp_path, split, "no_resize")
        assert len(pictures) == 1
        item = pictures[0]
        assert item.keys() == {"target", "caption", "name"}
        assert (item["caption"], item["name"]) == ("", f"{split}.png")


def test_a_zip_in_edms_layout_gives_its_classes_as_captions(shared):
    train = open_captioned(shared / "cifar10.zip", "train", "no_resize")
    test = open_captioned(shared / "cifar10.zip", "test", "no_resize")
    assert (len(train), len(test)) == (18_000, 2_000)
    assert train[0]["target"].shape == (3, 32, 32)
    assert set(train.captions) == {f"class {i}" for i in range(10)}

    # The worker has to open the file for itself.
    batch = next(batches(train, 4, 0, num_workers=1))
    assert batch["target"].shape == (4, 3, 32, 32)
    assert len(batch["caption"]) == 4


def test_workers_open_a_zip_and_a_cache_for_themselves(tmp_path):
    """Forked workers would share the position in a file that was open before the fork.

    Where processes do not fork, an open file cannot be sent to them at all.
    """
    source = tmp_path / "set.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for i in range(60):
            noise(40, 40, i).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"{i:02d}.png")
        archive.writestr("dataset.json", '{"labels": null}')
    write_cache(**cache_settings(source, tmp_path / "cache"))

    for name in ("set.zip", "cache"):
        pictures = open_captioned(tmp_path / name, "train", "no_resize")
        first = pictures[0]
        again = pickle.loads(pickle.dumps(pictures))[0]
        for key, value in first.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, again[key])

        one = batches(pictures, 4, 0, end_step=60, num_workers=0)
        several = batches(pictures, 4, 0, end_step=60, num_workers=2)
        for a, b in zip(one, several, strict=True):
            assert a["name"] == b["name"]
            for key in {"target", "mean"} & a.keys():
                assert torch.equal(a[key], b[key])


def test_a_caption_is_drawn_with_other_random_numbers_than_a_crop(tmp_path):
    """Its key is (seed, step, row, 2)."""
    coordinates(40, 40).save(tmp_path / "0.png")
    write_metadata(tmp_path, ['{"file_name": "0.png", "text": ["0", "1", "2"]}'])
    pictures = open_captioned(tmp_path, "train", "no_resize")
    keys = [(7, step, 0) for step in range(40)]
    drawn = [int(pictures[0, key]["caption"]) for key in keys]
    assert drawn == [np.random.default_rng((*key, 2)).integers(3) for key in keys]
    assert drawn != [np.random.default_rng(key).integers(3) for key in keys]
