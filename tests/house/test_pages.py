"""Are the pages whole: tables current, pictures readable in light and dark, every page in the index?"""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from concertina.config.explain import known_keys
from docs.generate import TABLES, keys_table, table_in
from tests.house.tree import ROOT

pytestmark = pytest.mark.unit

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = sorted((ROOT / "docs").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", sorted(TABLES.keys() - {"results"}))
def test_generated_tables_are_current(name: str) -> None:
    page, table = TABLES[name]
    assert table_in((ROOT / page).read_text(encoding="utf-8"), name) == table(), "run `python -m docs.generate`"


def test_every_key_is_in_the_reference() -> None:
    table = keys_table()
    for key in known_keys():
        assert f"`{key.rpartition('.')[2]}`" in table or f"### `{key}`" in table, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_are_there_and_have_words(page: Path) -> None:
    for tag in re.findall(r"<img [^>]*>", page.read_text(encoding="utf-8")):
        source = re.search(r'src="([^"]+)"', tag)
        assert source is not None, tag
        assert (page.parent / source.group(1)).is_file(), tag
        assert re.search(r'alt="[^"]{20,}"', tag), f"{page}: {tag} has no words for those who cannot see it"


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_pictures_are_readable_in_light_and_dark(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    assert root.find(f"{SVG}title") is not None
    style = "".join(found.text or "" for found in root.iter(f"{SVG}style"))
    light, _, dark = style.partition("prefers-color-scheme: dark")
    colours = set(re.findall(r"(--[\w-]+):", light))
    assert colours, f"{picture} names no colours"
    assert colours == set(re.findall(r"(--[\w-]+):", dark.partition("text {")[0])), "a colour has one scheme only"
    used = set(re.findall(r"var\((--[\w-]+)\)", picture.read_text(encoding="utf-8")))
    assert used <= colours
    assert not re.search(r'(?:fill|stroke)="#', picture.read_text(encoding="utf-8")), "a colour outside the schemes"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"]({page.name})" not in index] == []
