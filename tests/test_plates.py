"""The page of ideas says where each is, what turns it off, and what was measured."""

import ast
import json
from dataclasses import fields

import pytest
import torch
from PIL import Image
from test_train_pix2pix_turbo import ROOT

import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
from tiny import plates

CONFIGS = {"train_cyclegan_turbo.py": train_cyclegan_turbo.Config, "train_pix2pix_turbo.py": train_pix2pix_turbo.Config,
           "train_yoso.py": train_yoso.Config}


@pytest.mark.parametrize("name", plates.IDEAS)
def test_an_ideas_function_is_short_and_its_flags_are_the_trainers(name):
    idea = plates.IDEAS[name]
    file, function, line = plates.line_of(idea.where)
    found, = (node for node in ast.walk(ast.parse((ROOT / file).read_text()))
              if isinstance(node, ast.FunctionDef) and node.name == function and node.lineno == line)
    assert found.end_lineno - found.body[0].end_lineno <= 20 and ast.get_docstring(found)
    for one in idea.runs.values():
        while one:
            one = plates.RUNS[one]
            script, shared = plates.KINDS[one.kind]
            known = {f.name for f in fields(CONFIGS[script])}
            assert {*shared, *one.flags, idea.flag.split()[0].removeprefix("--")} <= known
            one = one.after


def test_the_page_is_of_the_results_and_of_the_code_as_it_is():
    results = json.loads((ROOT / "assets" / "plates" / "results.json").read_text())
    assert (ROOT / "IDEAS.md").read_text() == plates.page(results), "run python -m tiny.plates --page"
    for name, idea in plates.IDEAS.items():
        plate = ROOT / "assets" / "plates" / f"{name}.png"
        assert plate.is_file() == all(one in results for one in idea.runs.values())
        assert not plate.is_file() or plate.stat().st_size <= 150_000


def test_what_was_measured_is_not_made_again(monkeypatch, tmp_path, capsys):
    made, pictures = [], torch.rand(max(plates.SHOWN) + 1, 3, 64, 64) * 2 - 1

    def execute(name, seed, steps):
        made.append((name, seed))
        folder = tmp_path / f"{name}-seed{seed}"
        folder.mkdir()
        return folder, dict(minutes=2.0) if seed else {}

    monkeypatch.setattr(plates, "FOLDER", tmp_path)
    monkeypatch.setattr(plates, "execute", execute)
    monkeypatch.setitem(plates.MEASURES, "unpaired",
                        lambda folder: (dict(edges=0.5 + len(made), psnr=20.0), {"": pictures}))
    for seeds in (1, 2, 2):
        monkeypatch.setattr("sys.argv", ["plates", "skips", "--seeds", str(seeds), "--output", str(tmp_path / "out")])
        plates.main()
    assert made == [("unpaired", 0), ("no-skips", 0), ("unpaired", 1), ("no-skips", 1)]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["unpaired"] == {"0": dict(edges=1.5, psnr=20.0),
                                   "1": dict(edges=3.5, psnr=20.0, minutes=2.0)}
    assert plates.figures_of(plates.IDEAS["skips"], results, "with") == {"edges kept": "2.5 (1.5 to 3.5)",
                                                                         "PSNR, dB": "20.0"}
    assert next(row for row in plates.page(results).splitlines() if "**skips**" in row).endswith("| 2 | 4 |")
    plate = tmp_path / "out" / "skips.png"
    assert plate.stat().st_size <= 150_000 and Image.open(plate).width == 190 + 100 * len(plates.SHOWN)


def test_an_idea_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["plates", "skip"])
    with pytest.raises(ValueError, match="no idea called skip; expected skips, base"):
        plates.main()


@pytest.mark.slow
def test_one_idea_end_to_end(monkeypatch, tmp_path):
    """One step of both sides, by the trainers themselves, from an empty folder."""
    monkeypatch.setattr(plates, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["plates", "kl", "--seeds", "1", "--steps", "1", "--output", str(tmp_path / "out")])
    plates.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results.keys() == {"yoso", "no-kl"} and (tmp_path / "out" / "kl.png").is_file()
    assert 0 < results["yoso"]["0"]["all"] < 1
