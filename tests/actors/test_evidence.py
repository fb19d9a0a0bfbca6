"""Is a rank lost only on proof or after a long silence, and does the blame wait for its evidence?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from concertina.elastic.blame import Blame

from actors.book import Book
from actors.evidence import Evidence
from actors.hands import Member
from concertina.elastic.channel.server import Silence
from concertina.elastic.messages import Finished, RankError
from concertina.elastic.waits import BOUNDS
from concertina.track.events import EventLog
from tests.waiting import wait_until

pytestmark = pytest.mark.unit

BUSY_S = BOUNDS["silence_busy"].seconds


@dataclass
class FakeHands:
    """Three ranks; what Ray and the agents would say of them."""

    members: dict[int, Member] = field(
        default_factory=lambda: {r: Member(r, "node", None, pid=100 + r) for r in range(3)}
    )
    dead: dict[int, str] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)

    def gone(self) -> dict[int, str]:
        return self.dead

    def is_stopped(self, member: Member) -> bool:
        return member.rank in self.stopped


@dataclass
class FakeServer:
    """Seconds of silence of connected ranks."""

    silent_s: dict[int, float] = field(default_factory=lambda: dict.fromkeys(range(3), 0.0))
    phase: str = "step"

    def silences(self) -> dict[int, Silence]:
        return {rank: Silence(seconds, 5, self.phase, 0.0) for rank, seconds in self.silent_s.items()}


@dataclass
class Scene:
    book: Book
    hands: FakeHands = field(default_factory=FakeHands)
    server: FakeServer = field(default_factory=FakeServer)

    def __post_init__(self) -> None:
        hands: Any = self.hands
        server: Any = self.server
        self.evidence = Evidence(self.book, hands, server)

    def lost(self) -> dict[int, str]:
        self.evidence.look()
        return self.book.lost

    def blamed(self) -> Blame:
        wait_until(self.evidence.look)
        found = self.evidence.look()
        assert found is not None
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with EventLog(tmp_path / "events.jsonl", "run-1") as log:
        yield Scene(Book(log, tmp_path, world=3, generation=0, keep=2))


def test_nothing_is_wrong(scene: Scene) -> None:
    assert scene.evidence.look() is None
    assert scene.lost() == {}


def test_rays_word_is_proof(scene: Scene) -> None:
    scene.hands.dead = {1: "its process was killed"}
    assert scene.evidence.look() is None, "the blame waits for others' evidence"
    assert str(scene.blamed()) == "rank 1 died: its process was killed"


def test_who_raised_is_to_blame_though_another_died_first(scene: Scene) -> None:
    scene.hands.dead = {1: "its process was killed"}
    scene.evidence.look()
    scene.book.record(RankError(2, "ValueError", "boom", "Traceback", 1, secondary=False))
    assert str(scene.blamed()) == "rank 2 raised ValueError: boom"


def test_silence_of_a_while_is_no_loss(scene: Scene) -> None:
    scene.server.silent_s[1] = BUSY_S / 2
    assert scene.lost() == {}


@pytest.mark.parametrize("phase", ["step", "checkpoint"])
def test_silence_beyond_the_bound_is(scene: Scene, phase: str) -> None:
    scene.server.silent_s[1], scene.server.phase = BUSY_S + 1, phase
    assert scene.lost() == {1: f"froze: silent for {BUSY_S + 1:.0f} s, at step 5, {phase}"}
    assert scene.blamed().reason == "frozen"


def test_a_process_that_stands_still_is_lost_once_it_is_suspected(scene: Scene) -> None:
    scene.hands.stopped = {1}
    assert scene.lost() == {}
    scene.server.silent_s[1] = BOUNDS["silence"].seconds + 1
    assert scene.lost() == {1: "froze: its process 101 is stopped, at step 5, step"}


def test_a_connection_may_be_made_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    del scene.server.silent_s[1]
    assert scene.lost() == {}
    now += BUSY_S - 1
    assert scene.lost() == {}
    scene.server.silent_s[1] = 0.0
    assert scene.lost() == {}
    del scene.server.silent_s[1]
    now += BUSY_S + 1
    assert scene.lost() == {}, "counted from the second time"
    now += BUSY_S + 1
    assert scene.lost() == {1: f"not connected for {BUSY_S + 1:.0f} s"}


def test_who_has_finished_or_not_begun_may_be_silent(scene: Scene) -> None:
    scene.book.record(Finished(0, 5, "done"))
    scene.hands.members[1].pid = 0
    scene.server.silent_s = {0: BUSY_S + 1, 2: 0.0}
    scene.hands.dead = {0: "its process ended"}
    assert scene.lost() == {}
