"""README.md and IDEAS.md point at things that exist.

`python tests/test_readme.py` puts the right line numbers into the links to functions.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "IDEAS.md", "CONTRIBUTING.md", "tiny/README.md", "benchmarks/README.md")
LINK_TO_LINE = re.compile(r"\[`(\w+)`\]\(([\w./]+)#L(\d+)\)")
TEXT = (ROOT / "README.md").read_text()


def lines_of(name: str, path: str) -> list[int]:
    """The lines on which a file defines a function or class."""
    lines = (ROOT / path).read_text().splitlines()
    definition = re.compile(rf"\s*(def|class) {name}\b")
    return [i for i, line in enumerate(lines, 1) if definition.match(line)]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not (folder / link).exists()]
    assert not missing


@pytest.mark.parametrize(("name", "path", "line"), LINK_TO_LINE.findall(TEXT), ids=str)
def test_the_map_from_equations_to_code_names_the_right_line(name, path, line):
    found = lines_of(name, path)
    assert int(line) in found, f"{name} is at {path}#L{found}: run python tests/test_readme.py"


def test_the_map_has_its_rows():
    assert len(LINK_TO_LINE.findall(TEXT)) >= 25


def test_every_command_names_flags_that_exist():
    """Each python command of README.md: its script or module exists, its flags are in --help."""
    commands = re.findall(r"python (?:-m )?([\w.]+)(.*)", TEXT.replace("\\\n", " "))
    assert len(commands) > 30
    for target, rest in commands:
        path = ROOT / target if target.endswith(".py") else ROOT / target.replace(".", "/")
        assert path.exists() or path.with_suffix(".py").exists(), target
        sources = [path, path.with_suffix(".py"), *sorted(path.glob("*.py"))]
        text = "".join(source.read_text() for source in sources if source.is_file())
        for flag in re.findall(r"--(\w+)", rest.split("#")[0].split("`")[0]):
            if flag == "lambda_l1":  # the flag that the reader adds
                continue
            assert re.search(rf"\b{flag}\b", text), f"{target} has no --{flag}"


def main() -> None:
    for page in ("README.md", "IDEAS.md"):
        text = (ROOT / page).read_text()

        def renumber(match: re.Match) -> str:
            name, path, _ = match.groups()
            return f"[`{name}`]({path}#L{lines_of(name, path)[0]})"

        (ROOT / page).write_text(LINK_TO_LINE.sub(renumber, text))


if __name__ == "__main__":
    main()
