"""Who has each rank's shard among those who are there?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.layout import Layout, Seating

pytestmark = pytest.mark.unit

SEATING = Seating(Layout(4), (7, 3, 5, 9), (2, 2, 0, None), spares=(11,))


@pytest.mark.parametrize(
    ("present", "keepers"),
    [
        ((3, 5, 7, 9, 11), (7, 3, 5, 9)),
        ((3, 7, 9), (7, 3, 7, 9)),
        ((5, 9), (5, 5, 5, 9)),
        ((3, 5, 7), (7, 3, 5, None)),
        ((3, 11), (None, 3, None, None)),
    ],
)
def test_the_first_owner_else_the_second(present: tuple[int, ...], keepers: tuple[int | None, ...]) -> None:
    assert SEATING.keepers(present) == keepers


@given(present=st.sets(st.integers(0, 12)))
def test_nobody_keeps_what_it_does_not_hold(present: set[int]) -> None:
    for rank, member in enumerate(SEATING.keepers(present)):
        owners = {SEATING.members[rank], *(SEATING.members[s] for s in [SEATING.seconds[rank]] if s is not None)}
        assert member in owners & present if owners & present else member is None
