"""What README.md points at is there."""

import re

import pytest
from test_train_pix2pix_turbo import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(links) > 20
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]


@pytest.mark.parametrize(("name", "path", "line"), re.findall(r"\[`(\w+)`\]\(([\w./]+)#L(\d+)\)", TEXT), ids=str)
def test_the_map_from_equations_to_code_names_the_right_line(name, path, line):
    lines = (ROOT / path).read_text().splitlines()
    defined = [i for i, text in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", text)]
    assert int(line) in defined, f"{name} is at {path}#L{defined}"


def test_the_map_has_its_rows():
    assert len(re.findall(r"\]\([\w./]+#L\d+\)", TEXT)) >= 20
