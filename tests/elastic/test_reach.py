"""Do all that are left reach each other, and are they as many as can be? (`to_leave_out`)"""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.reach import Link, to_leave_out

pytestmark = pytest.mark.unit
NODES = ["a", "b", "c", "d", "e"]
LINKS = [frozenset(pair) for pair in combinations(NODES, 2)]


def links(*pairs: str) -> set[Link]:
    return {frozenset(pair) for pair in pairs}


@pytest.mark.parametrize(
    ("cut", "gone"),
    [
        (links(), []),
        (links("bc"), ["c"]),  # either would do: the first ones stay
        (links("ab"), ["b"]),
        (links("ba", "bc", "bd", "be"), ["b"]),
        (links("ba", "bc", "bd"), ["b"]),
        (links("ab", "cd"), ["d", "b"]),
        (links("az"), []),  # nobody of the run is there
    ],
)
def test_as_few_as_possible_go(cut: set[Link], gone: list[str]) -> None:
    assert to_leave_out(NODES, cut) == gone


@given(st.sets(st.sampled_from(LINKS)))
def test_who_is_left_reaches_all(cut: set[Link]) -> None:
    gone = to_leave_out(NODES, cut)
    assert not [link for link in cut if link.isdisjoint(gone)]
    fewest = next(n for n in range(6) for some in combinations(NODES, n) if not [c for c in cut if c.isdisjoint(some)])
    assert len(gone) <= fewest + 1
