"""Does a run leave nodes that will go, in time, with all it has, and come back when they stay? Without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.departures import Departures
from actors.wishes import Wishes
from concertina.elastic.messages import Control, Halt, Keep, Move, Prepare, Prepared
from concertina.elastic.notices import GATHER_S, RELEASE_S, Notice, Source
from concertina.elastic.states import RunState
from concertina.layout import Seating
from concertina.track.events import EventType
from tests.actors.test_regrouping import Scene

pytestmark = pytest.mark.unit


class Drained(Scene):
    """Members 0, 1, 2 on three nodes, a clock that only tests move, and who is dismissed by node."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **elastic: int) -> None:
        super().__init__(folder, **elastic)
        self.now, self.dismissed, self.wishes = 1000.0, {}, Wishes()
        self.regrouping.seats.clock = lambda: self.now
        self.members = {m: SimpleNamespace(number=m, node_id=f"node-{m}") for m in range(3)}
        hands: Any = SimpleNamespace(members=self.members)
        cluster: Any = SimpleNamespace(home="node-0", draining=dict)
        self.departures = Departures(self.notices, self.book, hands, self.regrouping, cluster, dismiss=self._dismiss)
        monkeypatch.setattr("actors.departures.time", SimpleNamespace(monotonic=lambda: self.now))
        self.trains()

    def _dismiss(self, node: str, members: list[int]) -> None:
        self.dismissed[node] = members
        self.regrouping.dismiss(members, "its node is taken back")
        for member in members:
            del self.members[member]

    def says(self, source: Source, *nodes: int, left_s: float = 30.0) -> None:
        """These nodes will go, and no others."""
        for node in range(3):
            found = [Notice(source, left_s, "preempt")] if node in nodes else []
            self.departures.hear(f"node-{node}", [source], found)
        self.turn()

    def turn(self, later_s: float = 0.0) -> None:
        self.now += later_s
        self.departures.look(self.wishes)
        self.regrouping.look()

    def changes_over(self, number: int, step: int, seats: int) -> Seating:
        """A planned change goes its way: prepared, stopped, moved, formed."""
        prepare = self.channel.take(Prepare)
        seating = Seating.from_json(next(iter(prepare.values())).seating)
        assert set(prepare) == set(seating.roster)
        assert len(seating.members) == seats
        before = self.regrouping.generations.seating
        assert before is not None
        for member in seating.roster:
            self.regrouping.hear(Prepared(member, number, 0.1))
        assert self.channel.take(Control)[before.members[0]].regroup
        for member in before.roster:
            self.halted(member, -1, max(self.regrouping.generations.possible), step)
        move = self.channel.take(Move)[seating.roster[0]]
        assert move.present == list(before.members), "who leaves hands over"
        assert set(move.leaving) <= set(seating.spares), "and knows that it has no seat for that"
        self.formed(number, step, *seating.roster)
        assert self.regrouping.generations.is_settled
        return seating


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drained]:
    made = Drained(tmp_path, monkeypatch)
    yield made
    made.log.close()


def test_who_is_noticed_leaves_at_a_step_boundary_and_hands_over_what_it_has(scene: Drained) -> None:
    scene.says(Source.AWS, 1)
    assert scene.channel.orders == [], "others may be noticed too, and it may be taken back"
    scene.turn(GATHER_S)
    seating = scene.changes_over(1, 7, seats=2)
    assert (seating.members, seating.spares) == ((0, 2), (1,))
    assert scene.regrouping.seats.leaving(scene.regrouping.generations.present) == {1}
    assert scene.dismissed == {}
    scene.turn()
    assert scene.dismissed == {"node-1": [1]}, "before the node goes"
    assert scene.channel.orders == [], "and nobody is stopped for it"
    (recovery,) = scene.events(EventType.RECOVERY)
    assert recovery.data["cause"]["reason"] == "notice"
    assert [e.data["what"] for e in scene.events(EventType.MEMBER) if e.data["member"] == 1] == ["ready", "left"]
    (notice,) = scene.events(EventType.NOTICE)
    assert (notice.data["node"], notice.data["source"]) == ("node-1", "aws")


def test_two_notices_five_seconds_apart_are_one_change(scene: Drained) -> None:
    scene.says(Source.AWS, 1)
    scene.turn(5.0)
    scene.says(Source.AWS, 1, 2)
    scene.turn(GATHER_S - 1)
    assert scene.channel.orders == []
    scene.turn(1.0)
    assert scene.changes_over(1, 7, seats=1).members == (0,)
    scene.turn()
    assert scene.dismissed == {"node-1": [1], "node-2": [2]}


def test_a_notice_that_is_taken_back_at_once_costs_nothing(scene: Drained) -> None:
    scene.says(Source.AZURE, 1)
    scene.turn(GATHER_S / 2)
    scene.says(Source.AZURE)
    scene.turn(60.0)
    assert scene.channel.orders == []
    assert [event.data["left_s"] is None for event in scene.events(EventType.NOTICE)] == [False, True]


def test_a_notice_that_is_taken_back_later_returns_the_very_members(scene: Drained) -> None:
    scene.says(Source.AZURE, 1)
    scene.turn(GATHER_S)
    scene.changes_over(1, 7, seats=2)
    scene.turn(1.0)
    assert scene.dismissed == {}, "it may be taken back until its time is near"
    scene.says(Source.AZURE)
    scene.turn(1.0)
    assert set(scene.channel.take(Prepare)) == set()  # those that come at once come together
    scene.regrouping._unseated_since -= 1.0  # type: ignore[operator]
    scene.turn()
    assert sorted(scene.changes_over(2, 8, seats=3).members) == [0, 1, 2]
    assert scene.dismissed == {}


def test_a_notice_that_may_be_taken_back_and_is_not_ends_its_members_in_time(scene: Drained) -> None:
    scene.says(Source.AZURE, 1)
    scene.turn(GATHER_S)
    scene.changes_over(1, 7, seats=2)
    scene.turn(30.0 - GATHER_S - RELEASE_S - 0.1)
    assert scene.dismissed == {}
    scene.turn(0.2)
    assert scene.dismissed == {"node-1": [1]}


def test_too_few_would_stay_they_stop_in_time_and_write_what_all_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Drained(tmp_path, monkeypatch, min_workers=2)
    scene.says(Source.AWS, 1, 2)
    scene.turn(15.0)
    assert scene.channel.orders == [], "it trains as long as it can"
    scene.turn(6.0)
    assert set(scene.channel.take(Halt)) == {0, 1, 2}
    assert scene.book.state is RunState.WAITING_FOR_CAPACITY
    for member in range(3):
        scene.halted(member, 1, 0, 7)
    assert scene.channel.take(Keep) == {member: Keep(1, 0, [0, 1, 2], 7, [1.0]) for member in range(3)}
    scene.turn(1.0)
    assert scene.dismissed == {}, "they write"
    assert scene.channel.orders == [], "and are not asked again"
    scene.book._written[EventType.CHECKPOINT] = 7
    scene.turn(1.0)
    assert scene.dismissed == {"node-1": [1], "node-2": [2]}
    scene.log.close()


def test_cornered_and_then_taken_back_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Drained(tmp_path, monkeypatch, min_workers=3)
    scene.says(Source.AZURE, 1)
    scene.turn(21.0)
    assert scene.book.state is RunState.WAITING_FOR_CAPACITY
    for member in range(3):
        scene.halted(member, 1, 0, 7)
    scene.says(Source.AZURE)
    assert scene.book.state is RunState.FORMING
    for member in range(3):
        scene.halted(member, 2, 0, 7)
    scene.formed(2, 7, 0, 1, 2)
    assert scene.book.state is RunState.TRAINING
    scene.log.close()


def test_a_loss_meanwhile_is_one_change_with_the_notice(scene: Drained) -> None:
    scene.says(Source.AWS, 1)
    scene.lose(2)
    for member in (0, 1):
        scene.halted(member, 1, 0, 7)
    seating = Seating.from_json(scene.channel.take(Prepare)[0].seating)
    assert (seating.members, seating.spares) == ((0,), (1,))
    scene.formed(1, 7, 0, 1)
    scene.turn()
    assert scene.dismissed == {"node-1": [1]}


def test_a_loss_that_leaves_too_few_keeps_them_while_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Drained(tmp_path, monkeypatch, min_workers=2)
    scene.says(Source.AWS, 1, left_s=120.0)
    scene.lose(2)
    assert Seating.from_json(scene.channel.take(Prepare)[0].seating).members == (0, 1)
    scene.log.close()


def test_who_goes_before_its_time_is_a_loss_as_any_other(scene: Drained) -> None:
    scene.says(Source.AWS, 1)
    scene.lose(1)
    assert set(scene.channel.take(Halt)) == {0, 2}


def test_the_node_of_rays_head_goes_and_the_run_stops_with_a_checkpoint(scene: Drained) -> None:
    scene.says(Source.AWS, 0)
    assert not scene.wishes.stop
    scene.turn(GATHER_S)
    assert "head is taken back" in scene.wishes.stop


def test_a_run_that_stops_anyway_needs_everybody_for_its_checkpoint(scene: Drained) -> None:
    scene.says(Source.AWS, 1)
    scene.regrouping.stop()
    scene.channel.orders.clear()
    scene.turn(GATHER_S)
    assert scene.channel.orders == []
    scene.lose(2)
    assert Seating.from_json(scene.channel.take(Prepare)[0].seating).members == (0, 1)
