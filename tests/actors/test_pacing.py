"""Does a run do about a slow member what is worth it, and see whether it was? Without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.pacing import Pacing
from concertina.elastic.channel.server import Silence
from concertina.elastic.messages import Control, Move, Prepare, Prepared
from concertina.elastic.stragglers import Kind, StragglerNews
from concertina.layout import Seating
from concertina.track.events import EventType
from tests.actors.test_regrouping import Scene

pytestmark = pytest.mark.unit


class Track(Scene):
    """Members 0, 1, 2, the time, and how long each computes a sequence. `fixed_s` of a step has nothing to do with
    sequences."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str, fixed_s: float = 0.0) -> None:
        super().__init__(folder, stragglers=mode)  # type: ignore[arg-type]
        training = self.plan.job.training.model_copy(update={"global_batch_size": 64})
        self.plan = replace(self.plan, job=self.plan.job.model_copy(update={"training": training}))
        self.now, self.fixed_s = 1000.0, fixed_s
        self.slow: dict[int, float] = {}
        self.busy = dict.fromkeys(range(3), 0.0)
        self.step = 0
        self.regrouping.seats.clock = lambda: self.now
        monkeypatch.setattr("actors.pacing.time", SimpleNamespace(monotonic=lambda: self.now))
        channel: Any = self.channel
        self.pacing = Pacing(self.plan.job, self.book, channel, self.regrouping)
        self.trains()

    @property
    def seating(self) -> Seating:
        found = self.regrouping.generations.seating
        assert found is not None
        return found

    def runs(self, steps: int) -> None:
        """Heartbeats after every step."""
        for _ in range(steps):
            done = self.pacing._work.done(len(self.seating.members), self.seating.loads)
            spent = {
                member: self.slow.get(member, 1.0) * (self.fixed_s + 0.9 * number / 64)
                for member, number in zip(self.seating.members, done, strict=True)
            }
            self.step += 1
            self.now += max(spent.values())
            for member, seconds in spent.items():
                self.busy[member] += seconds
                self.channel.heard[member] = Silence(0.0, self.step + 1, "step", 0.0, self.step, self.busy[member])
            self.pacing.look()
            self.regrouping.look()

    def changes_over(self) -> Seating:
        prepare = self.channel.take(Prepare)
        number = next(iter(prepare.values())).generation
        seating = Seating.from_json(next(iter(prepare.values())).seating)
        before = self.seating
        for member in seating.roster:
            self.regrouping.hear(Prepared(member, number, 0.1))
        assert self.channel.take(Control)[before.members[0]].regroup
        for member in before.roster:
            self.halted(member, -1, max(self.regrouping.generations.possible), self.step)
        assert self.channel.take(Move)
        self.formed(number, self.step, *seating.roster)
        return seating

    def news(self) -> list[StragglerNews]:
        return [StragglerNews.from_json(event.data) for event in self.events(EventType.STRAGGLER)]


@pytest.fixture
def track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Track] = []

    def make(mode: str, fixed_s: float = 0.0) -> Track:
        made.append(Track(tmp_path, monkeypatch, mode, fixed_s))
        return made[-1]

    yield make
    for each in made:
        each.log.close()


def test_who_is_slow_gets_fewer_sequences_and_steps_are_shorter(track: Any) -> None:
    run = track("act")
    run.slow = {1: 3.0}
    run.runs(20)
    seating = run.changes_over()
    assert (seating.members, seating.loads) == ((0, 1, 2), (1000, 333, 1000))
    run.runs(20)
    found, measured = run.news()
    assert (found.member, found.remedy, found.measured_s) == (1, Kind.REBALANCE, None)
    assert found.factor == pytest.approx(3.0)
    assert measured.measured_s == pytest.approx(0.9 * 28 / 64, rel=0.05)
    assert run.channel.orders == [], "nothing more is to be done"
    (recovery,) = run.events(EventType.RECOVERY)
    assert recovery.data["cause"]["reason"] == "straggler"


def test_who_is_quick_again_gets_its_share_back(track: Any) -> None:
    run = track("act")
    run.slow = {1: 3.0}
    run.runs(20)
    assert run.changes_over().loads == (1000, 333, 1000)
    run.runs(30)
    run.slow = {1: 2.5}
    run.runs(30)
    assert run.channel.orders == [], "not for a little"
    run.slow = {}
    run.runs(30)
    assert run.changes_over().loads == ()
    run.runs(30)
    assert run.channel.orders == []


def test_where_a_smaller_share_does_not_help_the_others_go_on_without_it(track: Any) -> None:
    """Most of its time has nothing to do with its sequences."""
    run = track("act", fixed_s=1.5)
    run.slow = {1: 3.0}
    run.runs(20)
    assert run.changes_over().loads == (1000, 333, 1000)
    run.runs(20)
    seating = run.changes_over()
    assert seating.loads == (), "what did not help is undone"
    assert (seating.members, seating.spares) == ((0, 2), (1,))
    assert [(loss.member, loss.reason) for loss in run.pacing.losses()] == [(1, "slow")]
    run.lose(1)
    assert run.pacing.losses() == []
    assert [news.remedy for news in run.news()][:3] == [Kind.REBALANCE, Kind.REBALANCE, Kind.EVICT]


def test_where_it_is_only_reported_nothing_is_done_and_it_is_said_once(track: Any) -> None:
    run = track("report")
    run.slow = {1: 3.0}
    run.runs(100)
    assert run.channel.orders == []
    (news,) = run.news()
    assert (news.member, news.remedy) == (1, "")
    assert str(news).startswith("member 1 is 3.00 times slower than its like")


def test_nobody_is_slow_nothing_happens(track: Any) -> None:
    run = track("act")
    run.runs(200)
    assert run.channel.orders == []
    assert run.news() == []


def test_a_change_that_is_called_off_is_wanted_again_later(track: Any) -> None:
    run = track("act")
    run.slow = {1: 3.0}
    run.runs(20)
    assert run.channel.take(Prepare)
    run.regrouping.generations.call_off()
    run.runs(20)
    assert run.channel.take(Prepare) == {}, "not at once"
    assert run.regrouping.seats.slowness == {}
    run.runs(100)
    assert run.changes_over().loads == (1000, 333, 1000)
