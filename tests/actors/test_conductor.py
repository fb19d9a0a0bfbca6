"""Who is lost by what is known, and what ends the run? The conductor's judgement, without Ray."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.conductor import Conductor
from actors.evidence import Evidence
from actors.hands import Member
from actors.journal import Journal
from actors.pacing import Pacing
from actors.recruiter import Recruiter
from concertina.elastic.channel.server import Silence
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.messages import Halt, Prepare, RankError
from concertina.elastic.notices import Notice, Source
from concertina.elastic.states import RunState
from concertina.errors import ConcertinaError, RankFailure
from concertina.track.events import EventType
from tests.actors.test_regrouping import Outgoing, Scene

pytestmark = pytest.mark.unit


class FakeHands:
    """Three members on three nodes; what Ray says of those that are given up."""

    def __init__(self) -> None:
        self.members = {m: Member(m, f"node-{m}", None, pid=100 + m) for m in range(3)}
        self.late: dict[int, tuple[Reason, str]] = {}

    def gone(self) -> dict[int, tuple[Reason, str]]:
        return {}

    def told_late(self) -> dict[int, tuple[Reason, str]]:
        found, self.late = self.late, {}
        return found

    def stopped(self, numbers: Collection[int]) -> set[int]:
        return set()

    def promote(self, number: int) -> None:
        return None

    def lose(self, number: int) -> None:
        del self.members[number]


class Judge:
    """A conductor with a run that trains: what it knows, decides and writes is real, Ray and the channel are not."""

    def __init__(self, folder: Path) -> None:
        self.scene, self.hands = Scene(folder), FakeHands()
        self.scene.trains()
        self.channel: Outgoing = self.scene.channel
        self.expelled: list[int] = []
        server: Any = self.channel
        server.expel = self.expelled.append
        self.channel.heard = {m: Silence(0.0, 5, "step", 0.0) for m in range(3)}
        hands: Any = self.hands
        cluster: Any = None
        made: Any = Conductor.__new__(Conductor)
        made.book, made.regrouping, made.journal = self.scene.book, self.scene.regrouping, self.scene.journal
        made.accounting, made.server, made.hands = made.regrouping.accounting, server, hands
        made.evidence, made._unexplained, made.plan = Evidence(hands, server), {}, self.scene.plan
        self.recruiter = made.recruiter = Recruiter(self.scene.plan, hands, self.scene.notices, cluster)
        made.reach = SimpleNamespace(look=lambda stands_still: [])
        made.pacing = Pacing(self.scene.plan.job, made.book, server, made.regrouping)
        self.conductor: Conductor = made

    def fails(self, member: int, *, hardware: bool) -> None:
        error = RankError(member, "AcceleratorError", "an uncorrectable memory error", "Traceback", 103, hardware)
        self.scene.book.errors.append(error)
        self.conductor._judge()

    def losses(self) -> list[tuple[int, str]]:
        events = self.scene.events(EventType.MEMBER)
        return [(e.data["member"], e.data["reason"].split(":")[0]) for e in events if e.data["what"] == "lost"]


@pytest.fixture
def judge(tmp_path: Path) -> Any:
    made = Judge(tmp_path)
    yield made
    made.scene.log.close()


def test_whose_device_fails_is_lost_and_the_run_is_not(judge: Judge) -> None:
    judge.fails(1, hardware=True)
    assert judge.expelled == [1]
    assert judge.recruiter._losses.keys() == {"node-1"}
    assert judge.hands.members.keys() == {0, 2}
    sent = [(member, type(order)) for member, order in judge.channel.orders]
    assert sent == [(0, Halt), (2, Halt), (0, Prepare), (2, Prepare)]
    assert judge.scene.book.state is RunState.RECOVERING
    for member in (0, 2):
        judge.scene.halted(member, 1, 0, 7)
    judge.conductor._judge()
    judge.scene.formed(1, 7, 0, 2)
    assert judge.scene.book.state is RunState.TRAINING
    (recovery,) = judge.scene.events(EventType.RECOVERY)
    assert (recovery.data["cause"]["reason"], recovery.data["cause"]["member"]) == ("hardware", 1)
    assert judge.losses() == [(1, "hardware")], "once"


def test_a_coordinator_that_ends_again_and_again_ends_the_run_unless_steps_come_of_it(judge: Judge) -> None:
    for step in (5, 5, 5, 6, 6, 6):
        judge.scene.book._written[EventType.STEP] = step
        judge.conductor._count_restarts()
    again = Journal.open(judge.scene.journal.path, "session")
    assert again.restarts == [5, 6, 6, 6], "who comes next knows"
    with pytest.raises(ConcertinaError, match="ended 4 times, and no step was recorded since step 6"):
        judge.conductor._count_restarts()


def test_who_is_one_too_many_is_sent_home_once_all_ranks_are_there(judge: Judge) -> None:
    """Its node was to be taken back, another came in its place, and it stays after all."""
    judge.hands.members[3] = Member(3, "node-3", None, pid=103)
    judge.scene.arrive(3)
    judge.conductor._send_home()
    assert judge.hands.members.keys() == {0, 1, 2}
    assert judge.expelled == [3]
    (left,) = [e.data for e in judge.scene.events(EventType.MEMBER) if e.data["what"] == "left"]
    assert (left["member"], left["reason"]) == (3, "one too many")
    assert judge.scene.book.state is RunState.TRAINING
    judge.conductor._send_home()
    assert judge.hands.members.keys() == {0, 1, 2}


def test_nobody_is_sent_home_for_one_that_leaves(judge: Judge) -> None:
    """Its node will go: who has come in its place is wanted."""
    judge.scene.notices.hear("node-1", [Source.AWS], [Notice(Source.AWS, 120.0)], time.monotonic())
    judge.hands.members[3] = Member(3, "node-3", None, pid=103)
    judge.scene.arrive(3)
    judge.conductor._send_home()
    assert judge.hands.members.keys() == {0, 1, 2, 3}


def test_who_is_lost_for_two_reasons_is_lost_once(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare that was slow dies in the very turn in which it is given up; what is proven counts."""
    slow = Loss(1, "node-1", Reason.SLOW, "the others are quicker without it")
    monkeypatch.setattr(judge.conductor.pacing, "losses", lambda: [slow, Loss(7, "node-7", Reason.SLOW, "gone before")])
    judge.conductor.evidence.dead[1] = Reason.KILLED
    judge.conductor._judge()
    assert judge.losses() == [(1, "killed")]
    assert judge.hands.members.keys() == {0, 2}


def test_what_any_other_member_would_raise_as_well_ends_the_run(judge: Judge) -> None:
    with pytest.raises(RankFailure) as caught:
        judge.fails(1, hardware=False)
    assert "member 1 raised AcceleratorError" in caught.value.message
    assert judge.hands.members.keys() == {0, 1, 2}


def test_rays_word_after_the_bells_corrects_what_is_written(judge: Judge) -> None:
    """Nobody has waited for it: the recovery is under way."""
    judge.conductor.evidence.dead[1] = Reason.KILLED
    judge.conductor._judge()
    assert judge.losses() == [(1, "killed")]
    judge.hands.late = {1: (Reason.OUT_OF_MEMORY, "killed for memory")}
    judge.conductor._hear_late_words()
    judge.hands.late = {1: (Reason.OUT_OF_MEMORY, "killed for memory")}
    judge.conductor._hear_late_words()
    assert judge.losses() == [(1, "killed"), (1, "out_of_memory")]
    for member in (0, 2):
        judge.scene.halted(member, 1, 0, 7)
    judge.scene.formed(1, 7, 0, 2)
    (recovery,) = judge.scene.events(EventType.RECOVERY)
    assert recovery.data["cause"]["reason"] == "out_of_memory"


def test_an_agents_word_after_the_loss_corrects_it_too(judge: Judge) -> None:
    """Ray, which was quicker, knew less, and says so again."""
    judge.conductor._lose([Loss(1, "node-1", Reason.KILLED, "its process was killed")])
    judge.hands.late = {1: (Reason.KILLED, "the actor is dead")}
    judge.conductor._hear_late_words()
    judge.conductor.evidence.dead[1] = Reason.OUT_OF_MEMORY
    for _ in range(2):
        judge.conductor._hear_late_words()
    assert judge.losses() == [(1, "killed"), (1, "out_of_memory")]


@pytest.mark.parametrize("late", [Reason.KILLED, Reason.NODE, Reason.RAISED])
def test_a_late_word_that_says_no_more_is_passed_over(judge: Judge, late: Reason) -> None:
    judge.conductor.evidence.dead[1] = Reason.KILLED
    judge.conductor._judge()
    judge.hands.late = {1: (late, "the actor is dead")}
    judge.conductor._hear_late_words()
    assert judge.losses() == [(1, "killed")]


def test_what_was_known_well_is_not_corrected(judge: Judge) -> None:
    judge.fails(1, hardware=True)
    judge.hands.late = {1: (Reason.PREEMPTED, "its node was taken back")}
    judge.conductor._hear_late_words()
    assert judge.losses() == [(1, "hardware")]


@pytest.mark.parametrize(("in_s", "reason"), [(0.0, "preempted"), (60.0, "killed")])
def test_a_node_that_goes_after_its_deadline_was_taken_back(judge: Judge, in_s: float, reason: str) -> None:
    """And is not to blame; before that a process may die as anywhere."""
    judge.scene.notices.hear("node-1", [Source.RAY], [Notice(Source.RAY, in_s)], time.monotonic())
    judge.conductor.evidence.dead |= {1: Reason.KILLED, 2: Reason.KILLED}
    judge.conductor._judge()
    assert judge.losses() == [(1, reason), (2, "killed")]
    assert ("node-1" in judge.recruiter._losses) is (reason == "killed")
