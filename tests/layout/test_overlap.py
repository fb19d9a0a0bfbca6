"""Does the index find every pair of pieces that overlap, and no other?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.config import ModelConfig
from concertina.layout import Box
from concertina.layout.overlap import Overlaps, overlaps
from concertina.layout.pieces import Cuts, ownership
from tests.layout.small_models import MODELS, layouts_of

pytestmark = pytest.mark.unit

Found = dict[tuple[int, int], Box]


def one_by_one(a: Cuts, b: Cuts, within: Box | None) -> Found:
    """Every piece against every piece."""
    found = {}
    for x in a.ranks.ravel().tolist():
        for y in b.ranks.ravel().tolist():
            common = a.box(x).intersect(b.box(y))
            if common is not None and within is not None:
                common = common.intersect(within)
            if common is not None:
                found[x, y] = common
    return found


def as_found(rows: Overlaps) -> Found:
    listed = [field.tolist() for field in (rows.ranks_a, rows.ranks_b, rows.start, rows.stop)]
    found = {(x, y): Box(tuple(start), tuple(stop)) for x, y, start, stop in zip(*listed, strict=True)}
    assert len(found) == len(rows.ranks_a), "a pair twice"
    return found


@given(st.data(), st.sampled_from(list(MODELS.values())))
def test_overlaps_are_those_of_every_piece_with_every_piece(data: st.DataObject, model: ModelConfig) -> None:
    tables = [ownership(model, data.draw(layouts_of(model, 16))) for _ in range(2)]
    name = data.draw(st.sampled_from(tables[0].names))
    a, b = (table.cuts[table.index[name]] for table in tables)
    assert as_found(overlaps(a, b)) == one_by_one(a, b, None)
    shape = [max(column) for column in zip(*(lane.stop for lane in a.lanes), strict=True)]
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    within = Box(*(tuple(pair[end] for pair in bounds) for end in (0, 1)))
    assert as_found(overlaps(a, b, within)) == one_by_one(a, b, within)
