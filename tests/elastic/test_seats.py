"""Who gets a seat where some will go, some are not wanted, and some are needed all the same? (`Seats`)"""

from __future__ import annotations

from typing import Any

import pytest

from concertina.config import Job
from concertina.elastic.doubts import Doubts
from concertina.elastic.notices import GATHER_S, RESERVE_S, Notice, Notices, Source
from concertina.elastic.seats import Seats
from concertina.errors import CapacityError
from concertina.layout import Seating

pytestmark = pytest.mark.unit


class Hall:
    """Members 0 to n - 1 on nodes of their own, all seated at first, and a clock."""

    def __init__(self, members: int, least: int) -> None:
        document: dict[str, Any] = {"name": "a", "training": {"global_batch_size": 12}}
        document |= {"cluster": {"num_workers": members, "num_nodes": 1}, "elastic": {"min_workers": least}}
        self.now, self.notices = 0.0, Notices()
        self.seats = Seats(Job.model_validate(document), Doubts(), self.notices, clock=lambda: self.now)
        self.present = {member: f"n{member}" for member in range(members)}
        self.seating = self.seats(self.present, None)

    def doom(self, member: int, left_s: float) -> None:
        self.notices.hear(f"n{member}", [Source.AZURE], [Notice(Source.AZURE, left_s)], self.now)

    def seat(self) -> Seating:
        return self.seats(self.present, self.seating)

    @property
    def says(self) -> tuple[bool, bool]:
        """Whether it is time to leave, and whether it is cornered."""
        seats, present, seating = self.seats, self.present, self.seating
        return seats.is_time_to_leave(present, seating), seats.is_cornered(present, seating)


def test_who_is_doomed_or_not_wanted_is_a_spare() -> None:
    hall = Hall(4, least=1)
    hall.doom(1, 30.0)
    hall.seats.unwanted.add(2)
    assert (hall.seat().members, set(hall.seat().spares)) == ((0, 3), {1, 2})


def test_unwanted_ones_are_taken_before_doomed_ones() -> None:
    """Three of four are needed: the slow one is better than one that is gone in half a minute."""
    hall = Hall(4, least=3)
    hall.doom(1, 30.0)
    hall.seats.unwanted.add(2)
    assert hall.seat().members == (0, 2, 3)
    hall.now = GATHER_S
    assert hall.says == (True, False)
    hall.now = 30.0 - RESERVE_S
    assert hall.says == (True, False), "nobody is cornered who can go on with a slow one"


def test_doomed_ones_are_taken_while_there_is_time_and_no_longer() -> None:
    hall = Hall(3, least=3)
    hall.doom(1, 30.0)
    assert hall.seat().members == (0, 1, 2)
    hall.now = GATHER_S
    assert hall.says == (False, False), "it trains as long as it can"
    hall.now = 30.0 - RESERVE_S
    assert hall.says == (False, True)
    with pytest.raises(CapacityError, match="1 of them on nodes that are taken back"):
        hall.seat()


def test_of_several_doomed_ones_those_that_have_time_go_on_without_the_one_that_has_not() -> None:
    hall = Hall(4, least=3)
    hall.doom(1, 20.0)
    hall.doom(2, 200.0)
    hall.now = 10.0
    assert hall.says == (True, False)
    assert hall.seat().members == (0, 2, 3)


def test_the_last_call_of_a_spare_is_nobodys() -> None:
    """It has no rank any more; others are doomed, and have time."""
    hall = Hall(4, least=3)
    hall.doom(3, 20.0)
    hall.now = 6.0
    hall.seating = hall.seat()
    assert hall.seating.spares == (3,)
    hall.now = 12.0  # its last call
    hall.doom(0, 100.0)
    assert hall.says == (False, False)
    assert hall.seats.world_of(hall.present, hall.seating) == 3
    assert hall.seat().members == (0, 1, 2)


def test_who_stops_needs_everybody() -> None:
    hall = Hall(3, least=3)
    hall.doom(1, 5.0)
    hall.seats.unwanted.add(2)
    hall.seats.is_stopping = True
    assert hall.seat().members == (0, 1, 2)
    assert hall.says == (False, False)


def test_who_is_slower_has_fewer_sequences_wherever_it_sits() -> None:
    hall = Hall(3, least=1)
    hall.seats.slowness[1] = 2.0
    assert hall.seat().loads == (1000, 500, 1000)
    del hall.present[0]
    seating = hall.seat()
    assert seating.loads[seating.members.index(1)] == 500
    del hall.present[1]
    assert hall.seat().loads == ()


def test_nobody_at_all_is_no_world() -> None:
    hall = Hall(2, least=2)
    del hall.present[0]
    assert hall.seats.world_of(hall.present, hall.seating) == 0
