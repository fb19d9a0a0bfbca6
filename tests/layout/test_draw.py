"""Can a person read a drawing, and does it show each rank once a grid?"""

from __future__ import annotations

import re

import pytest
from hypothesis import given

from concertina.layout import Layout, draw
from tests.layout.layouts import layouts

pytestmark = pytest.mark.unit


def test_the_quickstart() -> None:
    assert draw(Layout(4, ep=2)).splitlines() == [
        "4 ranks, no pipeline",
        "",
        "attention  pp 1 dp 4 cp 1 tp 1            | parts dp, : parts cp, a space tp",
        "  pp0 dp0-3   | 0 | 1 | 2 | 3 |",
        "",
        "experts    pp 1 edp 2 ep 2 etp 1          | parts edp, : parts ep, a space etp",
        "  pp0 edp0-1  | 0 : 1 | 2 : 3 |",
    ]


def test_a_line_that_ends_inside_a_group_ends_with_its_mark() -> None:
    lines = draw(Layout(32, ep=32)).splitlines()
    assert lines[-2].endswith("15 :")
    assert lines[-1].startswith("  pp0 edp0    : 16 :")
    assert lines[-1].endswith("31 |")


@given(layouts(most_ranks=64))
def test_each_grid_shows_each_rank_once(layout: Layout) -> None:
    drawing = draw(layout)
    assert drawing.isascii()
    assert max(map(len, drawing.splitlines())) <= 100
    for grid in drawing.split("\n\n")[1:]:
        rows = [line[len("  pp0 edp0-1  ") :] for line in grid.splitlines()[1:]]
        shown = [int(word) for row in rows for word in re.findall(r"\d+", row)]
        assert shown == list(range(layout.world))


def test_a_large_layout_is_summarised() -> None:
    drawing = draw(Layout(16384, pp=8, tp=8, ep=64))
    assert len(drawing.splitlines()) < 20
    assert max(map(len, drawing.splitlines())) <= 100
    assert "ep         256 groups of    64  the first: 0 1 2 3 4 5 6 7 ... 63" in drawing
