"""Is every second of every member in one bucket, over restarts, losses that stop nobody, and births that fail?"""

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
from actors.hands import Member
from actors.journal import Journal
from concertina.config import Job
from concertina.elastic.account import Account, Bucket
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.messages import TimeSpent
from concertina.layout import Layout
from concertina.track.events import EventLog, EventType, read_events
from concertina.track.ledger import LedgerTally

pytestmark = pytest.mark.unit


class Scene:
    """One session's books, and a clock that goes on when the test says so; a restart has another one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.clock_began = 1_000_000.0, 990_000.0
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now - self.clock_began)
        job = Job.model_validate({"name": "a", "cluster": {"num_workers": 2}})
        self.plan = RunPlan("a-1", folder, folder / "checkpoints", job, Layout(2), "cpu", "session", "token")
        self.log = EventLog(folder / "events.jsonl", "a-1")
        self.log.append(EventType.START, {"session": "session", "resumed_from_step": None})
        self.members: dict[int, Member] = {}
        self.began: dict[int, float] = {}
        self._open()

    def _open(self) -> None:
        book = Book(self.log, self.plan.checkpoints, keep=2)
        self.journal = Journal.open(self.plan.folder / "journal.json", "session")
        hands: Any = SimpleNamespace(members=self.members)
        self.accounting = Accounting(self.plan, self.log, book, hands, self.journal)

    def restart(self) -> None:
        """Another process at the same files, perhaps after a reboot. It knows members from when it finds them."""
        self.clock_began += 5_000.0
        self.members = {n: Member(n, "node", None, 1, born_s=time.monotonic()) for n in self.members}
        self._open()
        self.accounting.look()

    def come(self, *numbers: int) -> None:
        """Their processes begin; they say so later."""
        for number in numbers:
            self.members[number] = Member(number, "node", None, born_s=time.monotonic())
            self.began[number] = self.now
        self.accounting.look()

    def spend(self, seconds: float, **inside: str) -> None:
        """So long all say every second where they are: `m0="spare"`, by default they train."""
        for _ in range(round(seconds)):
            self.now += 1
            for number in self.members:
                bucket = inside.get(f"m{number}", "productive")
                self.accounting.hear(TimeSpent(number, {bucket: self.now - self.began[number]}, bucket))

    def settle(self) -> None:
        """A generation has formed."""
        self.accounting.write()
        self.journal.write()

    def account(self) -> Account:
        self.accounting.write()
        tally = LedgerTally()
        for event in read_events(self.log.path):
            tally.add(event)
        total = tally.total()
        assert total is not None
        return total


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(tmp_path, monkeypatch)
    yield made
    made.log.close()


def test_a_restart_long_after_the_last_change_counts_no_second_twice(scene: Scene) -> None:
    scene.come(0, 1)
    scene.spend(10)
    scene.settle()
    scene.spend(3600)
    before = scene.account()
    scene.restart()
    scene.spend(10)
    found = scene.account()
    assert before.total_s == pytest.approx(2 * 3610)
    assert found.total_s == pytest.approx(2 * 3620)
    assert found.of(Bucket.PRODUCTIVE) == pytest.approx(2 * 3620)
    assert (found.members, found.is_balanced) == (2, True)


def test_who_came_after_the_last_change_is_counted_after_a_restart(scene: Scene) -> None:
    """From when its process began, of which only itself still knows."""
    scene.come(0, 1)
    scene.settle()
    scene.spend(20)
    scene.come(2)
    scene.journal.pids = {0: 1, 1: 1, 2: 1}
    scene.journal.write()
    scene.spend(30)
    scene.restart()
    scene.spend(10)
    found = scene.account()
    assert found.total_s == pytest.approx(2 * 60 + 40)
    assert (found.members, found.is_balanced) == (3, True)


def test_who_is_gone_when_the_coordinator_comes_back_lives_no_more(scene: Scene) -> None:
    scene.come(0, 1)
    scene.spend(10)
    scene.settle()
    del scene.members[1]
    scene.restart()
    scene.spend(50)
    assert scene.account().total_s == pytest.approx(60 + 10, abs=1.0)


def test_a_loss_that_stops_nobody_takes_nothing_from_those_who_train(scene: Scene) -> None:
    scene.come(0, 1, 2)
    scene.spend(100, m2="spare")
    since_s = time.monotonic() - 30
    scene.accounting.lose([Loss(2, "node", Reason.FROZEN, "silent", since_s)], stopped=False)
    del scene.members[2]
    scene.spend(10)
    found = scene.account()
    assert found.of(Bucket.PRODUCTIVE) == pytest.approx(2 * 110)
    assert found.of(Bucket.DETECTION) == 0


def test_a_loss_that_stops_the_world_is_waited_for_by_all(scene: Scene) -> None:
    scene.come(0, 1)
    scene.spend(100)
    since_s = time.monotonic() - 3
    scene.accounting.lose([Loss(1, "node", Reason.FROZEN, "silent", since_s)], stopped=True)
    assert scene.account().of(Bucket.DETECTION) >= 3


def test_who_never_began_is_paid_for_until_it_is_given_up(scene: Scene) -> None:
    scene.come(0, 1)
    scene.now += 120
    del scene.members[1]  # it is ended: the recruiter waits for it no more
    scene.accounting.look()
    scene.now += 1000
    found = scene.account()
    assert found.total_s == pytest.approx(1120 + 120)
    assert found.of(Bucket.STARTING) == pytest.approx(1120 + 120)
