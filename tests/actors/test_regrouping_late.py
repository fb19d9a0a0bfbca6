"""Something takes too long although nobody is lost: is nobody blamed for waiting, and somebody in the end?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from concertina.elastic.channel.server import Silence
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.messages import Committed, Control, Halt, Halted, Move, Prepare, Prepared
from concertina.elastic.states import RunState
from concertina.elastic.waits import BOUNDS
from concertina.errors import RankFailure
from concertina.track.events import EventType
from tests.actors.test_regrouping import Scene

pytestmark = pytest.mark.unit


class Clocked(Scene):
    """A session whose clock goes on when the test says so."""

    now = 0.0

    def passes(self, bound: str) -> list[Loss]:
        """So much time, and what the conductor does in a turn: who is given up by then, is."""
        self.now += BOUNDS[bound].seconds + 0.1
        return self.turn()

    def turn(self) -> list[Loss]:
        lost: list[Loss] = []
        for _ in range(2):
            late = self.regrouping.late(set(self.regrouping.generations.present))
            if late:
                self.regrouping.lose(late)
            lost += late
            self.regrouping.look()
        return lost

    @property
    def number(self) -> int:
        return self.regrouping.generations.last_number

    @property
    def world(self) -> set[int]:
        seating = self.regrouping.generations.seating
        assert seating is not None
        return set(seating.members)

    def two_train(self) -> None:
        """Of three that there shall be."""
        self.arrive(0, 1)
        self.passes("gather")
        self.formed(0, 0, 0, 1)
        self.turn()
        self.channel.orders.clear()
        assert self.book.state is RunState.TRAINING

    def joins(self, *members: int) -> set[int]:
        """They arrive, and a planned change begins; who is to prepare."""
        self.arrive(*members)
        self.now += 1.0
        self.turn()
        return set(self.channel.take(Prepare))

    def prepared(self, *members: int, failure: str = "") -> None:
        for member in members:
            self.regrouping.hear(Prepared(member, self.number, 0.1, failure))

    def broke(self, *members: int) -> None:
        """They could not form the generation under way, and have what they had."""
        for member in members:
            had = 0 if member in (0, 1) and self.regrouping.generations.possible.keys() - {self.number} else -1
            failed = self.number
            self.regrouping.hear(Halted(member, failed, had, -1, 7, None, None, [], 0, "not connected", failed))

    def moves(self) -> None:
        """All that are asked have halted, and are told to move."""
        for member in sorted(self.regrouping.generations.holders):
            self.halted(member, self.number, 0 if member in (0, 1) else -1, 7)
        coming = self.regrouping.generations.coming
        assert coming is not None
        assert coming.moving


@pytest.fixture
def clocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Clocked]]:
    made: list[Clocked] = []
    began = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began + Clocked.now if not made else began + made[-1].now)

    def make(workers: int = 3, **elastic: int) -> Clocked:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Clocked(folder, workers, **elastic))
        return made[-1]

    yield make
    for scene in made:
        scene.log.close()


@pytest.fixture
def scene(clocked: Callable[..., Clocked]) -> Clocked:
    return clocked()


# -- a planned change -------------------------------------------------------------------------------------------------


def test_a_joiner_that_connects_to_nobody_is_given_up_and_nobody_else(scene: Clocked) -> None:
    """Forming is collective: because of it no trainer is prepared either."""
    scene.two_train()
    assert scene.joins(2) == {0, 1, 2}
    lost = scene.passes("prepare")
    assert [(loss.member, loss.reason) for loss in lost] == [(2, Reason.LATE)]
    assert scene.channel.orders == [], "the trainers are told nothing: they train"
    assert scene.book.state is RunState.TRAINING
    assert scene.regrouping.generations.is_settled


def test_of_several_joiners_the_one_is_found_that_nobody_can_join_with(clocked: Callable[..., Clocked]) -> None:
    scene = clocked(5, min_workers=1)
    scene.two_train()
    assert scene.joins(2, 3, 4) == {0, 1, 2, 3, 4}
    assert scene.passes("prepare") == [], "it may be any of them"
    lost = []
    for _ in range(3):  # one at a time
        scene.now += 1.0
        scene.turn()
        asked = set(scene.channel.take(Prepare))
        (guest,) = asked - scene.world
        if guest == 3:
            lost += scene.passes("prepare")
            continue
        scene.prepared(*asked)
        for member in scene.regrouping.generations.holders:
            scene.halted(member, -1, scene.number - 1, 7)
        scene.formed(scene.number, 7, *asked)
    assert [loss.member for loss in lost] == [3]
    assert scene.world == {0, 1, 2, 4}


def test_a_joiner_that_says_at_once_that_it_cannot_is_not_asked_for_ever(scene: Clocked) -> None:
    scene.two_train()
    scene.joins(2)
    scene.prepared(2, failure="no route to host")
    scene.turn()
    lost = scene.passes("complaint")
    assert [loss.member for loss in lost] == [2]
    assert "no route to host" in lost[0].text
    assert scene.regrouping.generations.is_settled


def test_a_trainer_that_is_not_prepared_is_not_given_up(scene: Clocked) -> None:
    scene.two_train()
    scene.joins(2)
    scene.prepared(2, 0)
    assert scene.passes("prepare") == []
    assert scene.regrouping.generations.is_settled
    assert scene.book.state is RunState.TRAINING


def test_who_prepares_and_is_lost_stops_nobody_for_nothing(scene: Clocked) -> None:
    scene.two_train()
    scene.joins(2)
    scene.lose(2)
    assert scene.passes("prepare") == []
    assert scene.channel.orders == []
    assert scene.regrouping.generations.is_settled


def test_while_the_world_is_to_stop_a_step_may_take_as_long_as_it_takes(scene: Clocked) -> None:
    scene.two_train()
    scene.joins(2)
    scene.prepared(0, 1, 2)
    assert scene.channel.take(Control)[0].regroup
    for _ in range(50):
        assert scene.passes("form") == []
    assert scene.channel.orders == []
    for member in (0, 1):
        scene.halted(member, -1, 0, 7)
    assert set(scene.channel.take(Move)) == {0, 1, 2}


def test_one_that_does_not_stop_when_the_others_have_is_fenced_and_then_given_up(scene: Clocked) -> None:
    scene.two_train()
    scene.joins(2)
    scene.prepared(0, 1, 2)
    scene.halted(0, -1, 0, 7)
    scene.channel.orders.clear()
    assert scene.passes("form") == []
    assert set(scene.channel.take(Halt)) == {0, 1}
    scene.halted(0, scene.number, 0, 7)
    assert [loss.member for loss in scene.passes("halt")] == [1]


def test_a_network_that_breaks_while_the_world_is_to_stop_is_heard(scene: Clocked) -> None:
    scene.two_train()
    scene.joins(2)
    scene.prepared(0, 1, 2)
    scene.halted(0, -1, 0, 7, failure="connection reset")
    scene.turn()
    scene.channel.orders.clear()
    assert scene.passes("complaint") == []
    assert set(scene.channel.take(Halt)) == {0, 1}


# -- one that has to be ----------------------------------------------------------------------------------------------


def test_one_that_hangs_while_state_moves_is_found_by_a_fence(clocked: Callable[..., Clocked]) -> None:
    scene = clocked(4)
    scene.two_train()
    scene.arrive(2, 3)
    scene.lose(1)
    scene.moves()
    scene.prepared(0, 2, 3)
    scene.channel.orders.clear()
    assert scene.passes("form") == [], "two of three only wait in a collective"
    assert set(scene.channel.take(Halt)) == {0, 2, 3}
    for member in (0, 2):
        scene.halted(member, scene.number, 0 if member == 0 else -1, 7)
    lost = scene.passes("halt")
    assert [(loss.member, loss.reason) for loss in lost] == [(3, Reason.LATE)]


def test_a_checkpoint_may_be_loaded_for_longer_than_state_takes_to_move(scene: Clocked) -> None:
    scene.two_train()
    scene.lose(0, 1)
    scene.arrive(2, 3, 4)
    scene.channel.orders.clear()
    scene.passes("form")
    scene.passes("collective")
    assert scene.channel.orders == []
    assert scene.book.state is RunState.FORMING or scene.book.state is RunState.RECOVERING
    scene.passes("load")
    assert set(scene.channel.take(Halt)) == {2, 3, 4}


def test_who_is_at_storage_answers_a_halt_when_it_is_back(scene: Clocked) -> None:
    scene.trains()
    scene.lose(2)
    scene.halted(0, scene.number, 0, 7)
    scene.channel.heard = {1: Silence(0.1, 7, "checkpoint", 40.0)}
    assert scene.passes("halt") == []
    scene.channel.heard = {1: Silence(0.1, 7, "checkpoint", BOUNDS["storage"].seconds + 1)}
    assert [loss.member for loss in scene.passes("halt")] == [1]


def test_who_steps_and_does_not_answer_a_halt_is_given_up(scene: Clocked) -> None:
    scene.trains()
    scene.lose(2)
    scene.halted(0, scene.number, 0, 7)
    scene.channel.heard = {1: Silence(0.1, 7, "step", 40.0)}
    assert [loss.member for loss in scene.passes("halt")] == [1]


# -- what leads nowhere -----------------------------------------------------------------------------------------------


def repeatedly(do: Callable[[int], None], times: int) -> None:
    for number in range(times):
        do(number)


def cannot_form(scene: Clocked) -> None:
    """All of the generation under way say so, and wait."""
    assert scene.regrouping.generations.coming is not None
    scene.broke(*scene.regrouping.generations.coming.seating.roster)
    scene.turn()
    scene.passes("complaint")


def test_members_that_never_reach_each_other_end_the_run(scene: Clocked) -> None:
    scene.arrive(0, 1, 2)
    with pytest.raises(RankFailure) as caught:
        repeatedly(lambda _: cannot_form(scene), 50)
    text = caught.value.message
    assert "regrouped 10 times" in text
    assert "step 0" in text
    assert "not connected" in text
    assert scene.number < 12


def test_a_run_begins_with_those_that_reach_each_other(clocked: Callable[..., Clocked]) -> None:
    """And the others come one by one; the one with whom nobody can form anything is given up."""
    scene = clocked(4)
    scene.arrive(0, 1, 2, 3)
    while scene.regrouping.generations.coming is not None:
        roster = scene.regrouping.generations.coming.seating.roster
        if 3 in roster:
            cannot_form(scene)
            for member in scene.regrouping.generations.holders:
                scene.regrouping.hear(Halted(member, scene.number, -1, -1, 0, None, None, [], 0, ""))
        else:
            scene.formed(scene.number, 0, *roster)
    assert scene.book.state is RunState.TRAINING
    assert 3 not in scene.world
    assert len(scene.world) > 1


def test_a_loss_with_a_joiner_that_nobody_reaches_is_recovered_from_without_it(clocked: Callable[..., Clocked]) -> None:
    scene = clocked(4)
    scene.two_train()
    scene.arrive(2)
    scene.lose(1)
    assert set(scene.channel.take(Prepare)) == {0, 2}
    scene.moves()
    scene.channel.orders.clear()
    scene.broke(0, 2)
    scene.turn()
    scene.passes("complaint")
    for member in (0, 2):
        scene.halted(member, scene.number, 0 if member == 0 else -1, 7)
    assert set(scene.channel.take(Move)) == {0}
    scene.formed(scene.number, 7, 0)
    assert scene.book.state is RunState.TRAINING


def test_who_is_left_out_and_has_what_nobody_else_has_is_taken_back(clocked: Callable[..., Clocked]) -> None:
    """Two joiners had verified, between them, what was theirs; one of the others had adopted it."""
    scene = clocked(4)
    scene.two_train()
    scene.joins(2, 3)
    scene.prepared(0, 1, 2, 3)
    for member in (0, 1):
        scene.halted(member, -1, 0, 7)
    joined = scene.number
    scene.regrouping._doubts.apart |= {2, 3}
    scene.passes("form")
    scene.channel.orders.clear()
    for member in (0, 1, 2, 3):
        had = joined if member == 0 else 0 if member == 1 else -1
        scene.regrouping.hear(Halted(member, scene.number, had, joined, 7, None, [1.0], [], 0, ""))
    moves = scene.channel.take(Move)
    assert set(moves) == {0, 1, 2, 3}
    assert (moves[0].source, moves[0].present) == (joined, [0, 1, 2, 3])
    assert scene.events(EventType.ROLLBACK) == []


def kill_and_replace(scene: Clocked, newest: int, step: int = 7) -> None:
    """The newest is killed, as by the kernel for its memory; another one comes and forms with the other two."""
    scene.lose(newest)
    for member in sorted(scene.regrouping.generations.holders):
        scene.halted(member, scene.number, scene.number - 1, step)
    scene.formed(scene.number, step, 0, 1)
    scene.joins(newest + 1)
    scene.prepared(0, 1, newest + 1)
    for member in (0, 1):
        scene.halted(member, -1, scene.number - 1, step)
    scene.formed(scene.number, step, 0, 1, newest + 1)


def test_members_that_always_die_before_a_step_end_the_run(scene: Clocked) -> None:
    scene.trains()
    with pytest.raises(RankFailure) as caught:
        repeatedly(lambda number: kill_and_replace(scene, 2 + number), 50)
    assert "regrouped 10 times, and no step came after step 7" in caught.value.message
    assert "(killed: killed)" in caught.value.message


def test_as_long_as_steps_come_members_may_die(scene: Clocked) -> None:
    scene.trains()
    for newest in range(2, 30):
        kill_and_replace(scene, newest, scene.book.step)
        scene.book.record(Committed(scene.book.step + 1, {"loss": 1.0}))


def test_many_that_die_at_a_time_are_one_try(clocked: Callable[..., Clocked]) -> None:
    scene = clocked(16)
    scene.arrive(*range(16))
    scene.formed(0, 0, *range(16))
    for member in range(15, 1, -1):  # one turn of the conductor each
        scene.lose(member)
    for member in sorted(scene.regrouping.generations.holders):
        scene.halted(member, scene.number, 0, 7)
    assert scene.regrouping.generations.coming is not None
