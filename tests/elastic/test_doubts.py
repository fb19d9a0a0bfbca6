"""Whoever is bad, and however many there are: is everybody else together in the end, and is nobody good blamed?"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from concertina.elastic.doubts import Doubts
from concertina.elastic.generations import Generations
from concertina.layout import Seating
from tests.elastic.simulated_run import LEAST, Run, seats
from tests.elastic.test_interleavings import Faults

pytestmark = pytest.mark.unit

NODES = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c", 5: "d"}


def test_only_a_new_step_is_progress() -> None:
    doubts = Doubts()
    doubts.come_to(7)
    doubts.tries = 3
    doubts.come_to(5)  # back at a checkpoint
    doubts.come_to(7)
    assert doubts.tries == 3
    doubts.come_to(8)
    assert doubts.tries == 0


def test_who_is_proven_goes_on_without_who_is_not() -> None:
    doubts = Doubts()
    doubts.settle([0, 1, 2])
    doubts.fail(NODES, [0, 1, 2, 4, 5], prepared=[0, 1, 2, 4])
    assert doubts.apart == {5}, "it has not even connected"
    doubts.fail(NODES, [0, 1, 2, 4], prepared=[0, 1, 2, 4])
    assert doubts.apart == {4, 5}
    doubts.fail(NODES, [0, 1, 2], prepared=[])
    assert doubts.trusted(NODES).keys() == {0, 1, 2, 3}, "of those that have the state none is left out"


def test_a_first_generation_is_tried_with_all_then_with_parts_of_the_nodes() -> None:
    doubts, tried = Doubts(), []
    for _ in range(7):
        doubts.fail(NODES, list(doubts.trusted(NODES)), prepared=[])
        tried.append(set(doubts.trusted(NODES)))
    assert tried == [{*NODES}, {*NODES}, {0, 1, 4}, {2, 3, 5}, {0, 1}, {2, 3}, {4}]


def test_nodes_that_cannot_be_divided_are_tried_as_they_are() -> None:
    doubts, one = Doubts(), dict.fromkeys(range(3), "a")
    for _ in range(20):
        doubts.fail(one, [0, 1, 2], prepared=[])
        assert doubts.trusted(one) == one


@given(nodes=st.integers(1, 16), bad=st.integers(0, 40), per_node=st.integers(1, 4))
def test_one_bad_node_of_many_is_left_out_within_ten_tries_and_the_others_come_together(
    nodes: int, bad: int, per_node: int
) -> None:
    """Nobody can form anything with its members."""
    present = {member: f"{member // per_node:02}" for member in range(nodes * per_node)}
    sick = {member for member, node in present.items() if int(node) == bad % nodes} if nodes > 1 else set()
    doubts = Doubts()
    while sick & doubts.trusted(present).keys():
        doubts.fail(present, list(doubts.trusted(present)), prepared=[])
        assert doubts.tries < 10
    doubts.settle(doubts.trusted(present))
    blamed = set()
    while (guest := doubts.guest(present.keys() - doubts.proven - blamed)) is not None:
        roster = doubts.trusted({m: n for m, n in present.items() if m not in blamed}, guest)
        if sick.isdisjoint(roster):
            doubts.settle(roster)
        else:
            found = doubts.refuse(list(roster), prepared=[])
            assert found is not None
            blamed.add(found)
    assert blamed == sick
    assert doubts.proven == present.keys() - sick


@given(good=st.integers(0, 6), bad=st.integers(1, 4))
def test_whoever_joins_with_bad_ones_is_not_blamed_for_them(good: int, bad: int) -> None:
    doubts = Doubts()
    doubts.settle([100, 101])
    present = {m: f"{m}" for m in [100, 101, *range(good + bad)]}
    sick, blamed = set(range(good, good + bad)), set()
    for _ in range(2 * len(present)):
        there = {m: n for m, n in present.items() if m not in blamed}
        waiting = there.keys() - doubts.proven
        fresh = waiting - doubts.apart
        roster = doubts.trusted(there, None if fresh else doubts.guest(waiting))
        if sick.isdisjoint(roster):
            doubts.settle(roster)
        elif (found := doubts.refuse(list(roster), prepared=[])) is not None:
            blamed.add(found)
    assert blamed == sick
    assert doubts.proven == present.keys() - sick


# -- whole runs -------------------------------------------------------------------------------------------------------


class Choosy(Run):
    """Leaves out members that are new and not prepared, as `actors/regrouping.py` does."""

    def __init__(self, kind: type[Generations] = Generations) -> None:
        self.apart: set[int] = set()
        super().__init__(kind, members=4, seat=self._choose)

    def _choose(self, present: dict[int, str], old: Seating | None) -> Seating:
        some = {member: node for member, node in present.items() if member not in self.apart}
        return seats(some if len(some) >= LEAST else present, old)

    def leave_out(self) -> None:
        generations, coming = self.generations, self.generations.coming
        if coming is not None and not (coming.planned and not coming.stopping):
            proven = {m for n, seating in generations.possible.items() if n != coming.number for m in seating.roster}
            self.apart |= set(coming.seating.roster) - proven - coming.prepared
            self._do(generations.begin())

    def _restore(self) -> None:
        reports, possible = self.generations.reports.values(), self.generations.possible
        held = {report.member for report in reports if {report.generation, report.verified} & possible.keys()}
        if self.apart & held:
            self.apart -= held
            self._do(self.generations.begin())
        else:
            super()._restore()


class SomeLeftOut(Faults):
    def __init__(self) -> None:
        super().__init__()
        self.run: Choosy = Choosy()

    @rule()
    def leave_out(self) -> None:
        self.run.leave_out()

    @rule()
    def take_back(self) -> None:
        self.run.apart.clear()


class TestSomeLeftOut(SomeLeftOut.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=60, stateful_step_count=30)
