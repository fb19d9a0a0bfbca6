"""Do cuts and boxes tile what they cut, with nothing twice and nothing left out?"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.layout import Box, cut, cut_by

pytestmark = pytest.mark.unit


@given(st.integers(0, 1000), st.integers(1, 64))
def test_cuts_tile_the_length(length: int, parts: int) -> None:
    pieces = [cut(length, parts, index) for index in range(parts)]
    assert pieces[0][0] == 0
    assert pieces[-1][1] == length
    assert all(left[1] == right[0] for left, right in pairwise(pieces))
    sizes = [stop - start for start, stop in pieces]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_the_first_parts_take_the_remainder() -> None:
    assert [cut(10, 4, index) for index in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert [cut(2, 4, index) for index in range(4)] == [(0, 1), (1, 2), (2, 2), (2, 2)]


@given(st.integers(0, 300), st.lists(st.integers(1, 1000), min_size=1, max_size=12))
def test_cuts_by_loads_tile_the_length_and_are_near_to_their_proportion(length: int, loads: list[int]) -> None:
    pieces = [cut_by(length, loads, index) for index in range(len(loads))]
    assert pieces[0][0] == 0
    assert pieces[-1][1] == length
    assert all(left[1] == right[0] for left, right in pairwise(pieces))
    sizes = [stop - start for start, stop in pieces]
    if length >= len(loads):
        assert min(sizes) >= 1
    raised = sum(length * load < sum(loads) for load in loads)  # to one, which others pay
    for size, load in zip(sizes, loads, strict=True):
        assert abs(size - length * load / sum(loads)) < 1 + raised


def test_cuts_by_like_loads_are_cuts() -> None:
    for length in range(40):
        assert [cut_by(length, (7, 7, 7), i) for i in range(3)] == [cut(length, 3, i) for i in range(3)]


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...] = (5, 4, 6)) -> Box:
    pairs = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def mask(box: Box, shape: tuple[int, ...] = (5, 4, 6)) -> np.ndarray:
    marked = np.zeros(shape, dtype=bool)
    marked[box.slices()] = True
    return marked


@given(boxes(), boxes())
def test_intersection_is_what_both_hold(a: Box, b: Box) -> None:
    both = mask(a) & mask(b)
    common = a.intersect(b)
    assert (common is None) == (not both.any())
    if common is not None:
        assert (mask(common) == both).all()
        assert common == b.intersect(a)
        assert a.contains(common)
        assert b.contains(common)


@given(boxes(), boxes())
def test_containing_is_holding_every_element(a: Box, b: Box) -> None:
    assert a.contains(b) == bool((mask(a) | ~mask(b)).all())


@given(boxes(), st.integers(0, 2), st.integers(1, 5))
def test_cutting_a_box_tiles_it(box: Box, dim: int, parts: int) -> None:
    pieces = [box.cut(dim, parts, index) for index in range(parts)]
    assert sum(piece.size for piece in pieces) == box.size
    counted = sum(mask(piece).astype(int) for piece in pieces)
    assert (counted == mask(box)).all()


@given(boxes(), boxes())
def test_slices_within_a_box_find_the_same_elements(outer: Box, inner: Box) -> None:
    tensor = np.arange(5 * 4 * 6).reshape(5, 4, 6)
    common = outer.intersect(inner)
    if common is not None:
        assert (tensor[outer.slices()][common.slices(within=outer)] == tensor[common.slices()]).all()


def test_shapes_sizes_and_scalars() -> None:
    box = Box((1, 0), (3, 4))
    assert box.shape == (2, 4)
    assert box.size == 8
    assert Box.whole((3, 4)) == Box((0, 0), (3, 4))
    scalar = Box.whole(())
    assert scalar.size == 1
    assert scalar.slices() == ()
    assert scalar.intersect(scalar) == scalar
    assert Box.whole((3, 0)).size == 0
    with pytest.raises(AssertionError):
        Box((2,), (1,))
