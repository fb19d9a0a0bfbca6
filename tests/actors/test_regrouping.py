"""Does the coordinator begin, regroup, end and come back in the right state, whatever comes in which order?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.accounting import Accounting
from actors.assignment import RunPlan
from actors.book import Book
from actors.journal import Journal
from actors.regrouping import Regrouping
from concertina.config import Job
from concertina.elastic.channel.server import Silence
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.messages import Committed, Finished, Formed, Halt, Halted, Keep, Message, Move, Prepare, decode
from concertina.elastic.notices import Notices
from concertina.elastic.states import RunState
from concertina.elastic.waits import BOUNDS
from concertina.layout import Layout
from concertina.state.manifest import partial_folder
from concertina.track.events import EventLog, EventType, read_events

pytestmark = pytest.mark.unit

SECONDS = {"wait_s": 0.0, "prepare_s": 0.1, "move_s": 0.1}


class Outgoing:
    """Stands for the channel: keeps the orders."""

    def __init__(self) -> None:
        self.recorded, self.address = 0, ("127.0.0.1", 0)
        self.orders: list[tuple[int, Message]] = []
        self.heard: dict[int, Silence] = {}

    def silences(self) -> dict[int, Silence]:
        return self.heard

    def send(self, member: int, document: dict[str, Any]) -> None:
        self.orders.append((member, decode(document)))

    def take(self, kind: type[Message]) -> dict[int, Any]:
        """The newest order of a kind by member; forgets all."""
        found = {member: order for member, order in self.orders if isinstance(order, kind)}
        self.orders.clear()
        return found


class Scene:
    """One session's regrouping, its book and its journal; `restart` is another coordinator at the same files."""

    def __init__(self, folder: Path, workers: int = 3, **elastic: int) -> None:
        cluster = {"num_workers": workers}
        job = Job.model_validate({"name": "a", "cluster": cluster, "elastic": elastic})
        self.plan = RunPlan("a-1", folder, folder, job, Layout(workers), "cpu", "session", "token")
        self.plan.checkpoints.mkdir()
        self.log = EventLog(folder / "events.jsonl", "a-1")
        self.log.append(EventType.START, {"session": "session", "resumed_from_step": None})
        self._open()

    def _open(self) -> None:
        self.book = Book(self.log, self.plan.checkpoints, keep=2)
        self.journal = Journal.open(self.plan.folder / "journal.json", "session")
        self.channel = Outgoing()
        channel: Any = self.channel
        nobody: Any = SimpleNamespace(members={})
        accounting = Accounting(self.plan, self.log, self.book, nobody, self.journal)
        self.notices = Notices()
        self.regrouping = Regrouping(self.plan, self.book, self.journal, channel, accounting, self.notices)

    def restart(self) -> None:
        self.log.close()
        self.log = EventLog(self.plan.folder / "events.jsonl", "a-1")
        self._open()

    def arrive(self, *members: int) -> None:
        for member in members:
            self.regrouping.arrive(member, f"node-{member}")
        self.regrouping.look()

    def lose(self, *members: int) -> None:
        self.regrouping.lose([Loss(m, f"node-{m}", Reason.KILLED, "killed") for m in members])

    def halted(self, member: int, answers: int, generation: int, step: int, failure: str = "", untold: int = 1) -> None:
        """With what came of the last `untold` steps."""
        records = [{"step": each, "metrics": {"loss": each / 2}} for each in range(step - untold + 1, step + 1)]
        self.regrouping.hear(Halted(member, answers, generation, -1, step, None, [1.0], records, 0, failure))

    def formed(self, generation: int, step: int, *members: int) -> None:
        for member in members:
            self.regrouping.hear(Formed(member, generation, step, SECONDS, {"moved": 8}))

    def trains(self) -> None:
        self.arrive(0, 1, 2)
        self.formed(0, 0, 0, 1, 2)
        self.channel.orders.clear()

    def recover(self, step: int) -> None:
        """Member 1 is lost, the others halt at `step` and are told to move."""
        self.lose(1)
        for member in (0, 2):
            self.halted(member, 1, 0, step)

    def events(self, kind: EventType) -> list[Any]:
        return [event for event in read_events(self.log.path) if event.type == kind]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.log.close()


def test_it_waits_for_all_and_then_begins(scene: Scene) -> None:
    scene.arrive(0, 1)
    assert scene.book.state is RunState.WAITING_FOR_CAPACITY, "members that are there are no capacity yet"
    assert scene.channel.orders == []
    scene.arrive(2)
    assert scene.book.state is RunState.FORMING
    assert set(scene.channel.take(Move)) == {0, 1, 2}
    scene.formed(0, 0, 0, 1)
    assert scene.book.state is RunState.FORMING
    scene.formed(0, 0, 2)
    assert scene.book.state is RunState.TRAINING
    (event,) = scene.events(EventType.GENERATION)
    assert (event.data["world"], event.data["reason"]) == (3, "start")


def test_a_loss_halts_and_prepares_at_once_and_moves_when_all_have_halted(scene: Scene) -> None:
    scene.trains()
    scene.lose(1)
    orders = scene.channel.orders
    assert [(m, type(order)) for m, order in orders] == [(0, Halt), (2, Halt), (0, Prepare), (2, Prepare)]
    assert scene.book.state is RunState.RECOVERING
    scene.channel.orders.clear()
    scene.halted(0, 1, 0, 7)
    assert scene.channel.orders == []
    scene.halted(2, 1, 0, 7)
    move = scene.channel.take(Move)[2]
    assert (move.source, move.present, move.step) == (0, [0, 2], 7)
    scene.formed(1, 7, 0, 2)
    assert scene.book.state is RunState.TRAINING
    (recovery,) = scene.events(EventType.RECOVERY)
    assert (recovery.data["cause"]["member"], recovery.data["world_after"], recovery.step) == (1, 2, 7)
    assert [event.step for event in scene.events(EventType.STEP)] == [7], "the first rank had not said it"
    assert scene.channel.recorded == 7


def test_the_journal_knows_a_generation_before_anybody_can_have_adopted_it(scene: Scene) -> None:
    scene.trains()
    scene.recover(7)
    written = Journal.open(scene.plan.folder / "journal.json", "session")
    assert set(written.seatings) == {0, 1}
    scene.formed(1, 7, 0, 2)
    assert set(Journal.open(scene.plan.folder / "journal.json", "session").seatings) == {1}


def test_who_finishes_before_the_last_one_has_formed_ends_the_run_all_the_same(scene: Scene) -> None:
    scene.trains()
    scene.recover(20)
    scene.formed(1, 20, 0)
    for rank in range(2):  # the channel's thread records this at once; what forms is heard a turn later
        scene.book.record(Finished(rank, 20, "done", generation=1))
    assert scene.book.state is RunState.RECOVERING
    scene.formed(1, 20, 2)
    assert scene.book.state is RunState.FINISHED


def test_restarted_while_all_are_at_work_it_touches_nobody(scene: Scene) -> None:
    scene.trains()
    scene.restart()
    scene.regrouping.reattach({0: "a", 1: "b", 2: "c"}, dict.fromkeys(range(3), 0))
    scene.regrouping.look()
    assert scene.channel.orders == []
    assert scene.book.state is RunState.TRAINING
    scene.book.record(Committed(1, {"loss": 1.0}))
    for rank in range(3):
        scene.book.record(Finished(rank, 1, "done", generation=0))
    assert scene.book.state is RunState.FINISHED


def test_restarted_in_the_middle_of_a_move_it_remembers_both_generations(scene: Scene) -> None:
    """Nobody has adopted the newer one: the state is still the older one's."""
    scene.trains()
    scene.recover(7)
    scene.restart()
    scene.regrouping.reattach({0: "a", 2: "c"}, {0: -1, 2: -1})
    assert set(scene.channel.take(Halt)) == {0, 2}
    for member in (0, 2):
        scene.halted(member, 2, 0, 7)
    assert {(move.generation, move.source, move.step) for move in scene.channel.take(Move).values()} == {(2, 0, 7)}
    assert scene.events(EventType.ROLLBACK) == []
    scene.formed(2, 7, 0, 2)
    assert scene.book.state is RunState.TRAINING


def test_restarted_when_a_member_was_lost_as_well_it_makes_the_next_generation(scene: Scene) -> None:
    scene.trains()
    scene.restart()
    scene.regrouping.reattach({0: "a", 2: "c"}, {0: 0})
    assert set(scene.channel.take(Halt)) == {0, 2}
    for member in (0, 2):
        scene.halted(member, 1, 0, 7)
    assert scene.channel.take(Move)[0].source == 0
    scene.formed(1, 7, 0, 2)
    assert scene.book.state is RunState.TRAINING
    assert [event.step for event in scene.events(EventType.STEP)] == [7]


def test_a_roll_back_that_the_first_rank_did_not_live_to_tell_is_one_all_the_same(scene: Scene) -> None:
    """All had loaded the checkpoint of step 5: what comes after it is done again, and written down again."""
    scene.trains()
    for step in range(1, 8):
        scene.book.record(Committed(step, {"loss": 1.0}))
    scene.recover(5)
    scene.formed(1, 5, 0, 2)
    (event,) = scene.events(EventType.ROLLBACK)
    assert (event.data["to_step"], scene.book.step, scene.book.recorded) == (5, 5, 5)
    scene.book.record(Committed(6, {"loss": 2.0}))
    assert [event.step for event in scene.events(EventType.STEP)] == [1, 2, 3, 4, 5, 6, 7, 6]


def test_asked_to_stop_it_still_recovers_and_says_so_to_the_next_first_rank(scene: Scene) -> None:
    scene.trains()
    scene.regrouping.stop()
    assert [(m, order.stop) for m, order in scene.channel.orders] == [(0, True)]  # type: ignore[attr-defined]
    scene.channel.orders.clear()
    scene.lose(0)
    for member in (1, 2):
        scene.halted(member, 1, 0, 7)
    scene.channel.orders.clear()
    scene.formed(1, 7, 1, 2)
    (order,) = scene.channel.orders
    assert order[0] == scene.regrouping.generations.seating.members[0]  # type: ignore[union-attr]
    assert order[1].stop  # type: ignore[attr-defined]


def test_too_few_wait_and_go_on_when_there_are_enough(tmp_path: Path) -> None:
    scene = Scene(tmp_path, min_workers=3)
    scene.trains()
    scene.lose(1)
    assert scene.book.state is RunState.WAITING_FOR_CAPACITY
    for member in (0, 2):
        scene.halted(member, 1, 0, 7)
    keep = Keep(1, 0, [0, 2], 7, [1.0])
    assert [order for order in scene.channel.orders if isinstance(order[1], Keep)] == [(0, keep), (2, keep)]
    assert scene.channel.take(Move) == {}
    assert [event.step for event in scene.events(EventType.STEP)] == [7], (
        "who resumes from it finds the steps before it"
    )
    assert scene.journal.last_generation == 1
    scene.arrive(3)
    assert scene.book.state is RunState.FORMING
    assert scene.channel.take(Move) == {}, "who was told to keep is asked again"
    for member in (0, 2):
        scene.halted(member, 2, 0, 7)
    assert scene.channel.take(Move)[3].source == 0
    scene.formed(2, 7, 0, 2, 3)
    assert scene.book.state is RunState.TRAINING
    scene.log.close()


def test_what_is_in_a_checkpoint_is_not_written_again_and_a_past_that_is_given_up_is_not_completed(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, min_workers=3)
    scene.trains()
    scene.book._written[EventType.CHECKPOINT] = 7
    scene.lose(1)
    for member in (0, 2):
        scene.halted(member, 1, 0, 7)
    assert scene.channel.take(Keep) == {}
    scene.arrive(3)
    for member in (0, 2):
        scene.halted(member, 2, 0, 7)
    scene.formed(2, 7, 0, 2, 3)
    scene.lose(3)
    for member in (0, 2):
        scene.halted(member, 3, 2, 8)
    assert scene.channel.take(Keep)[0] == Keep(3, 2, [0, 2], 8, [1.0])
    growing = partial_folder(scene.plan.checkpoints, 8, 3)
    growing.mkdir()
    scene.lose(0, 2)
    scene.arrive(4, 5, 6)
    assert not growing.exists()
    assert scene.channel.take(Move)[4].source is None
    scene.log.close()


def written_down(scene: Scene, *members: int) -> None:
    """What the conductor has in the journal of its members, before it ends."""
    for member in members:
        scene.journal.pids[member], scene.journal.nodes[member] = 1, f"node-{member}"
    scene.journal.write()


def test_restarted_with_too_few_it_waits_for_capacity_and_goes_on(tmp_path: Path) -> None:
    scene = Scene(tmp_path, min_workers=2)
    scene.trains()
    written_down(scene, 0, 1, 2)
    scene.restart()
    scene.regrouping.reattach({0: "node-0"}, {0: 0})
    assert scene.book.state is RunState.WAITING_FOR_CAPACITY, "or capacity_timeout_s never counts"
    scene.halted(0, scene.regrouping.generations.last_number, 0, 7)
    scene.arrive(3, 4)
    assert scene.book.state is RunState.FORMING
    scene.formed(scene.regrouping.generations.last_number, 7, 0, 3, 4)
    assert scene.book.state is RunState.TRAINING
    scene.log.close()


def test_restarted_when_it_waited_for_capacity_and_there_is_enough(tmp_path: Path) -> None:
    scene = Scene(tmp_path, min_workers=3)
    scene.trains()
    scene.lose(2)
    assert scene.book.state is RunState.WAITING_FOR_CAPACITY
    written_down(scene, 0, 1, 3)
    scene.restart()
    scene.regrouping.reattach(dict.fromkeys((0, 1, 3), "node"), {0: -1, 1: -1, 3: -1})
    number = scene.regrouping.generations.last_number
    for member in (0, 1):
        scene.halted(member, number, 0, 7)
    scene.formed(number, 7, 0, 1, 3)
    assert scene.book.state is RunState.TRAINING
    scene.log.close()


def test_restarted_with_nobody_left_it_waits_for_capacity(scene: Scene) -> None:
    """And a stop ends it there, rather than wait for a checkpoint that nobody writes."""
    scene.trains()
    written_down(scene, 0, 1, 2)
    scene.restart()
    scene.regrouping.reattach({}, {})
    assert scene.book.state is RunState.WAITING_FOR_CAPACITY
    assert not scene.regrouping.holds_state


def test_restarted_while_members_gather_it_begins_with_those_that_are_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.arrive(0, 1)
    written_down(scene, 0, 1)
    scene.restart()
    scene.regrouping.reattach({0: "node-0", 1: "node-1"}, {0: -1, 1: -1})
    scene.regrouping.look()
    assert scene.channel.orders == []
    later = time.monotonic() + BOUNDS["gather"].seconds + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    scene.regrouping.look()
    assert set(scene.channel.take(Prepare)) == {0, 1}


def test_too_few_to_leave_the_last_checkpoint_are_joined_by_others(tmp_path: Path) -> None:
    """Some have finished, one dies while it writes: the others' state and one more member make a whole world again."""
    scene = Scene(tmp_path, min_workers=3)
    scene.trains()
    assert scene.regrouping.wants_members
    for rank in (0, 2):
        scene.book.record(Finished(rank, 20, "done", generation=0))
    assert not scene.regrouping.wants_members
    scene.lose(1)
    assert scene.book.state is RunState.WAITING_FOR_CAPACITY
    assert scene.regrouping.wants_members
    for member in (0, 2):
        scene.halted(member, 1, 0, 20)
    scene.arrive(3)
    number = scene.regrouping.generations.last_number
    scene.formed(number, 20, 0, 2, 3)
    assert scene.regrouping.wants_members, "who finished before is at work again"
    for rank in range(3):
        scene.book.record(Finished(rank, 20, "done", generation=number))
    assert scene.book.state is RunState.FINISHED
    scene.log.close()
