"""IDEAS.md names code and flags that exist, and its figures are those that were measured."""

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_cyclegan_turbo
import train_pix2pix_turbo
import train_yoso
from tiny import gaussians, plates

CONFIGS = {
    "train_cyclegan_turbo.py": train_cyclegan_turbo.Config,
    "train_pix2pix_turbo.py": train_pix2pix_turbo.Config,
    "train_yoso.py": train_yoso.Config,
    "tiny.gaussians": gaussians.Config,
}
RESULTS = json.loads((plates.PLATES / "results.json").read_text())


def sections() -> dict[str, str]:
    """The sections of IDEAS.md, by the name of their figures."""
    found = {}
    for text in plates.PAGE.read_text().split("\n## ")[1:]:
        (name,) = re.findall(r"^<!-- figures: (\w+) -->$", text, re.MULTILINE)
        found[name] = text
    return found


def find_function(file: Path, path: str) -> ast.FunctionDef:
    """A function of a file, or a method as CLASS.METHOD."""
    scope = ast.parse(file.read_text())
    for name in path.split("."):
        (scope,) = (
            node
            for node in scope.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        )
    assert isinstance(scope, ast.FunctionDef)
    return scope


def runs_of(idea: plates.Idea) -> list[plates.Run]:
    """All runs of an idea, and those that they build on."""
    found = []
    for name in idea.runs.values():
        while name:
            found.append(plates.RUNS[name])
            name = plates.RUNS[name].after
    return found


def test_the_page_has_a_section_for_each_idea():
    assert [*sections()] == [*plates.IDEAS]


@pytest.mark.parametrize("name", plates.IDEAS)
def test_an_ideas_functions_exist_and_are_short(name):
    links = re.findall(r"\[`([\w.]+)`\]\(([\w/.]+)\)", sections()[name])
    assert links
    for function, file in links:
        found = find_function(plates.ROOT / file, function)
        assert ast.get_docstring(found)
        # The method on one page is a whole training loop.
        limit = 60 if file == "tiny/gaussians.py" else 30
        assert found.end_lineno - found.body[0].end_lineno <= limit


@pytest.mark.parametrize("name", plates.IDEAS)
def test_an_ideas_flags_are_those_of_its_runs_and_of_the_trainers(name):
    idea = plates.IDEAS[name]
    runs = runs_of(idea)
    for run in runs:
        script = plates.SCRIPTS[run.kind]
        known = {f.name for f in fields(CONFIGS[script])}
        assert {*plates.SHARED[run.kind], *run.flags} <= known

    (line,) = re.findall(r"^- Without it: (.*)$", sections()[name], re.MULTILINE)
    commands = re.findall(r"`([\w.]+) --(\w+)", line)
    assert commands
    changed = {flag for run in runs for flag in run.flags}
    for script, flag in commands:
        assert script in {plates.SCRIPTS[run.kind] for run in runs}
        assert flag in changed


def test_the_page_shows_each_plate():
    for name, section in sections().items():
        assert re.search(rf"^!\[.+\]\(assets/plates/{name}\.png\)$", section, re.MULTILINE)
        assert all(run in RESULTS for run in plates.IDEAS[name].runs.values())
        plate = plates.PLATES / f"{name}.png"
        assert plate.stat().st_size <= 150_000
        assert Image.open(plate).width in (plates.MARGIN + 7 * 100, plates.MARGIN + 324)


def test_the_page_has_the_figures_that_were_measured():
    text = plates.PAGE.read_text()
    assert text == plates.update_page(text, RESULTS), "run python -m tiny.plates --page"


def test_a_table_has_mean_and_range_of_each_side():
    results = {
        "unpaired": {
            "0": dict(edges=0.5, psnr=20.0, minutes=3.0),
            "1": dict(edges=0.7, psnr=20.0),
            "2": dict(edges=0.9, psnr=30.0),  # a seed that the other run has not
        },
        "no-skips": {"0": dict(edges=0.25, psnr=9.0), "1": dict(edges=0.25, psnr=10.0, minutes=5)},
    }
    assert plates.table(plates.IDEAS["skips"], results).splitlines() == [
        "| | with | without |",
        "| --- | --- | --- |",
        "| F-score of edges | 0.6 (0.5 to 0.7) | 0.25 |",
        "| PSNR, dB | 20.0 | 9.5 (9 to 10.0) |",
        "",
        "Seeds: 2. Minutes per seed: 8.",
    ]
    assert plates.table(plates.IDEAS["skips"], {}) == "Not measured yet.\n"


def test_only_what_stands_between_the_markers_is_rewritten():
    markers = "<!-- figures: {0} -->\nold\n<!-- end -->\n"
    parts = [f"prose {name}\n" + markers.format(name) for name in plates.IDEAS]
    text = plates.update_page("# Title\n" + "".join(parts), RESULTS)
    assert text.startswith("# Title\nprose skips\n<!-- figures: skips -->\n| | with |")
    assert text.count("<!-- end -->") == len(plates.IDEAS) and "old" not in text
    for name in plates.IDEAS:
        assert f"prose {name}\n" in text
    assert plates.update_page(text, RESULTS) == text

    without_end = "".join(parts).replace("old\n<!-- end -->", "old", 1)
    with pytest.raises(ValueError, match="no place for the figures of 'skips'"):
        plates.update_page(without_end, RESULTS)


def run_plates(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["plates", *map(str, arguments)])
    plates.main()


def test_what_was_measured_is_not_run_again(monkeypatch, tmp_path, capsys):
    executed = []
    pictures = torch.rand(max(plates.SHOWN) + 1, 3, 64, 64) * 2 - 1

    def execute(name, seed, steps):
        executed.append((name, seed))
        folder = tmp_path / f"{name}-seed{seed}"
        folder.mkdir()
        return folder, {"minutes": 2.0} if seed else {}

    def measure(folder):
        return dict(edges=0.5 + len(executed), psnr=20.0), {"": pictures}

    monkeypatch.setattr(plates, "FOLDER", tmp_path)
    monkeypatch.setattr(plates, "execute", execute)
    monkeypatch.setitem(plates.MEASURES, "unpaired", measure)
    page = plates.PAGE.read_text()
    for seeds in (1, 2, 2):
        run_plates(monkeypatch, "skips", "--seeds", seeds, "--output", tmp_path / "out")
    assert executed == [("unpaired", 0), ("no-skips", 0), ("unpaired", 1), ("no-skips", 1)]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["unpaired"] == {
        "0": dict(edges=1.5, psnr=20.0),
        "1": dict(edges=3.5, psnr=20.0, minutes=2.0),
    }
    figures = plates.figures_of(plates.IDEAS["skips"], results, "with")
    assert figures == {"F-score of edges": "2.5 (1.5 to 3.5)", "PSNR, dB": "20.0"}
    assert "Seeds: 2. Minutes per seed: 4." in plates.table(plates.IDEAS["skips"], results)
    plate = tmp_path / "out" / "skips.png"
    assert plate.stat().st_size <= 150_000
    assert Image.open(plate).size == (plates.MARGIN + 100 * len(plates.SHOWN), 4 * 100)
    assert plates.PAGE.read_text() == page  # of another --output


def test_runs_in_the_plane_are_read_from_their_figures(monkeypatch, tmp_path):
    commands = []

    def run(*command):
        commands.append([str(word) for word in command])
        folder = Path(command[-1])
        folder.mkdir()
        (folder / "figures.json").write_text(json.dumps(dict(modes=24, good=0.5)))
        page = Image.new("RGB", (800, 400), "black")
        page.paste("white", (400, 0, 800, 400))
        page.save(folder / "samples.png")

    monkeypatch.setattr(plates, "FOLDER", tmp_path)
    monkeypatch.setattr(plates.recipe, "run", run)
    for _ in range(2):
        folder, _ = plates.execute("gaussians-data", 1)
    assert folder == tmp_path / "gaussians-data-seed1"
    (command,) = commands
    assert command[:2] == ["-m", "tiny.gaussians"] and command[-1] == str(folder)
    assert "--adversarial data" in " ".join(command) and "--seed 1" in " ".join(command)
    figures, pictures = plates.measure_gaussians(str(folder))
    assert figures == dict(modes=24, good=0.5)
    assert pictures[""].shape == (1, 3, 400, 400) and pictures[""].min() == 1


def test_an_unknown_idea_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="no idea called skip; expected skips, base"):
        run_plates(monkeypatch, "skip")


@pytest.mark.parametrize("arguments, message", [
    (["--seeds", "0"], "--seeds"),
    (["--steps", "1"], "another --output"),
])
def test_flags_that_would_spoil_the_results_are_refused(monkeypatch, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_plates(monkeypatch, *arguments)


def test_results_of_other_steps_are_not_taken(monkeypatch, tmp_path):
    stored = tmp_path / "results.json"
    run_and_flags = ["skips", "--seeds", "1", "--output", tmp_path]
    stored.write_text(json.dumps({"unpaired": {"0": dict(psnr=20, steps=2)}}))
    for steps in ([], ["--steps", "3"]):
        with pytest.raises(ValueError, match="of unpaired after 2 steps, not .*another --output"):
            run_plates(monkeypatch, *run_and_flags, *steps)
    stored.write_text('{"unpaired"')
    with pytest.raises(ValueError, match="results.json does not hold results"):
        run_plates(monkeypatch, *run_and_flags)


@pytest.mark.slow
def test_one_idea_end_to_end(monkeypatch, tmp_path):
    """One step of both sides, by the trainers themselves, from an empty folder."""
    monkeypatch.setattr(plates, "FOLDER", tmp_path)
    flags = ["--seeds", "1", "--steps", "1", "--output", tmp_path / "out"]
    run_plates(monkeypatch, "kl", *flags)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results.keys() == {"yoso", "no-kl"} and (tmp_path / "out" / "kl.png").is_file()
    assert 0 < results["yoso"]["0"]["all"] < 1
