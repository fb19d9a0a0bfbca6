"""Has every top folder a README of one screen, with a drawing, that names only what exists?"""

from __future__ import annotations

import re

import pytest

from tests.house.tree import ROOT, top_folders

pytestmark = pytest.mark.unit

MOST_LINES = 50


@pytest.mark.parametrize("folder", top_folders())
def test_readme(folder: str) -> None:
    path = ROOT / folder / "README.md"
    assert path.is_file(), f"{folder}/ has no README.md"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES, f"{folder}/README.md is longer than a screen"
    assert "```" in text, f"{folder}/README.md has no drawing"


@pytest.mark.parametrize("folder", top_folders())
def test_modules_it_names_are_there(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![*\w<>/_])[a-z][a-z_/]*\.(?:py|yaml)\b", text))
    assert {name for name in named if not ((ROOT / folder / name).exists() or (ROOT / name).exists())} == set()


@pytest.mark.parametrize("folder", [".", *top_folders()])
def test_relative_links_lead_somewhere(folder: str) -> None:
    for page in (ROOT / folder).glob("*.md"):
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page
