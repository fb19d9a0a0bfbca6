"""Does every position have one rank, and causal work the same everywhere?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.layout import chunks, chunks_size, travels_in_ring

pytestmark = pytest.mark.unit


@given(st.integers(1, 400), st.integers(1, 12))
def test_every_position_is_on_one_rank(length: int, cp: int) -> None:
    positions = [p for rank in range(cp) for start, stop in chunks(length, cp, rank) for p in range(start, stop)]
    assert sorted(positions) == list(range(length))
    assert [chunks_size(length, cp, rank) for rank in range(cp)] == [
        sum(stop - start for start, stop in chunks(length, cp, rank)) for rank in range(cp)
    ]


@given(st.integers(1, 16), st.integers(2, 12))
def test_causal_work_is_even(per_chunk: int, cp: int) -> None:
    """Pairs of a query and a key that it sees."""
    work = [
        sum(p + 1 for start, stop in chunks(2 * cp * per_chunk, cp, rank) for p in range(start, stop))
        for rank in range(cp)
    ]
    assert len(set(work)) == 1


def test_chunks_rise() -> None:
    assert chunks(10, 1, 0) == ((0, 10),)
    assert chunks(10, 2, 1) == ((3, 6), (6, 8))
    assert chunks(3, 2, 0) == ((0, 1), (3, 3))


def test_long_sequences_take_the_ring() -> None:
    assert not travels_in_ring("auto", 32767)
    assert travels_in_ring("auto", 32768)
    assert travels_in_ring("ring", 1)
    assert not travels_in_ring("gather", 1 << 20)
