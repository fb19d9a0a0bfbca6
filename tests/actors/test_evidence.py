"""Is a member lost only on proof, or after a silence that cannot be anything else?"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.evidence import Evidence
from actors.hands import Member
from concertina.elastic.channel.server import Silence
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.waits import BOUNDS

pytestmark = pytest.mark.unit

SILENCE_S, BUSY_S = BOUNDS["silence"].seconds, BOUNDS["silence_busy"].seconds


@dataclass
class FakeHands:
    """Three members; what Ray and the agents would say of them."""

    members: dict[int, Member] = field(
        default_factory=lambda: {m: Member(m, f"node-{m}", None, pid=100 + m) for m in range(3)}
    )
    dead: dict[int, tuple[Reason, str]] = field(default_factory=dict)
    standing: set[int] = field(default_factory=set)
    asked: list[int] = field(default_factory=list)
    questions: int = 0

    def gone(self) -> dict[int, tuple[Reason, str]]:
        return self.dead.copy()

    def stopped(self, numbers: Collection[int]) -> set[int]:
        self.asked += numbers
        self.questions += 1
        return self.standing.intersection(numbers)


@dataclass
class FakeServer:
    """Seconds of silence of connected members, all at one step, begun so long before they were heard."""

    progress_age_s: float = 0.0
    silent_s: dict[int, float] = field(default_factory=lambda: dict.fromkeys(range(3), 0.0))
    phase: str = "step"
    step: int = 5

    def silences(self) -> dict[int, Silence]:
        return {m: Silence(s, self.step, self.phase, self.progress_age_s) for m, s in self.silent_s.items()}


class Scene:
    """Evidence, and a clock that goes on when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.hands, self.server = FakeHands(), FakeServer()
        hands: Any = self.hands
        server: Any = self.server
        self.evidence = Evidence(hands, server)

    def lost(self, complaining: bool = False) -> list[Loss]:
        return self.evidence.look(complaining)

    def silent(self, member: int, seconds: float) -> list[Loss]:
        """Nobody makes a step, and one says nothing, for so long."""
        self.lost()
        self.now += seconds
        self.server.silent_s[member] = seconds
        return self.lost()


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_nothing_is_wrong(scene: Scene) -> None:
    assert scene.lost() == scene.lost(complaining=True) == []
    assert scene.hands.asked == [], "agents are asked on suspicion only"


@pytest.mark.parametrize("reason", [Reason.KILLED, Reason.OUT_OF_MEMORY])
def test_a_bell_is_proof(scene: Scene, reason: Reason) -> None:
    scene.evidence.dead |= {1: reason, 7: reason}
    assert [(loss.member, loss.reason) for loss in scene.lost()] == [(1, reason)], "7 is nobody"
    scene.hands.dead = {1: (Reason.NODE, "its node died")}
    assert [loss.reason for loss in scene.lost()] == [Reason.NODE], "Ray knows better, if it knows yet"


@pytest.mark.parametrize("reason", [Reason.KILLED, Reason.OUT_OF_MEMORY, Reason.NODE, Reason.RAISED])
def test_rays_word_is_proof(scene: Scene, reason: Reason) -> None:
    scene.hands.dead = {1: (reason, "its process was killed")}
    del scene.server.silent_s[1]
    assert scene.lost() == [Loss(1, "node-1", reason, "its process was killed")]


@pytest.mark.parametrize(
    ("ray_says", "reason"),
    [(Reason.KILLED, Reason.OUT_OF_MEMORY), (Reason.NODE, Reason.NODE), (None, Reason.OUT_OF_MEMORY)],
)
def test_an_agent_knows_of_memory_where_ray_only_knows_of_an_end(
    scene: Scene, ray_says: Reason | None, reason: Reason
) -> None:
    scene.hands.dead = {1: (ray_says, "its process was killed")} if ray_says is not None else {}
    scene.evidence.dead[1] = Reason.OUT_OF_MEMORY
    assert [(loss.member, loss.reason) for loss in scene.lost()] == [(1, reason)]


def test_several_are_lost_at_once(scene: Scene) -> None:
    scene.hands.dead = {1: (Reason.NODE, "its node died"), 2: (Reason.NODE, "its node died")}
    assert [loss.member for loss in scene.lost()] == [1, 2]


@pytest.mark.parametrize(("phase", "bound_s"), [("step", SILENCE_S), ("checkpoint", BUSY_S), ("moving", BUSY_S)])
def test_silence_in_a_world_that_stands_still(scene: Scene, phase: str, bound_s: float) -> None:
    scene.server.phase = phase
    assert scene.silent(1, bound_s - 0.5) == []
    found = scene.silent(1, bound_s + 1)
    assert found == [Loss(1, "node-1", Reason.FROZEN, f"silent for {bound_s + 1:.1f} s, at step 5, {phase}")]


def test_silence_in_a_world_that_goes_on_is_only_slowness(scene: Scene) -> None:
    """Its peers could not make a step without it: it computes, and its supervisor's thread does not get to speak."""
    scene.lost()
    for _ in range(20):
        scene.now += SILENCE_S - 0.5
        scene.server.step += 1
        scene.server.silent_s[1] += SILENCE_S - 0.5
        assert scene.lost() == []


def test_a_world_stands_still_since_its_last_step_not_since_that_was_seen(scene: Scene) -> None:
    scene.lost()
    scene.now += 10.0
    scene.server.step, scene.server.progress_age_s = 6, 0.2
    scene.server.silent_s[1] = 0.1
    assert scene.lost() == [], "its peers made that step 0.2 s ago; it was heard 0.1 s ago"
    scene.now += SILENCE_S - 0.15
    scene.server.silent_s[1] = SILENCE_S - 0.05
    assert scene.lost() == []
    scene.now += 0.1
    scene.server.silent_s[1] = SILENCE_S + 0.05
    assert [loss.member for loss in scene.lost()] == [1]


def test_the_next_look_is_due_when_a_silence_will_mean_more(scene: Scene) -> None:
    """The conductor does not wait out its turn then."""
    scene.server.silent_s[1] = 0.9 * SILENCE_S / 2
    scene.lost()
    assert scene.evidence.due_s == pytest.approx(0.1 * SILENCE_S / 2)
    assert scene.silent(1, 0.95 * SILENCE_S) == []
    assert scene.evidence.due_s == pytest.approx(0.05 * SILENCE_S)
    scene.server.silent_s[1] = 0.0
    scene.lost()
    assert scene.evidence.due_s == SILENCE_S / 2, "nobody is silent"


def test_a_process_that_stands_still_is_lost_once_it_is_suspected(scene: Scene) -> None:
    scene.hands.standing = {1}
    assert scene.lost() == []
    assert scene.silent(1, SILENCE_S * 0.6) == [
        Loss(1, "node-1", Reason.FROZEN, "its process is stopped, at step 5, step")
    ]
    assert scene.hands.asked == [1]


@pytest.mark.parametrize(("complaining", "bound"), [(False, "cut_off_alone"), (True, "cut_off")])
def test_a_broken_connection_may_be_made_again(scene: Scene, complaining: bool, bound: str) -> None:
    """For a while, which is short when peers have lost it as well."""
    bound_s = BOUNDS[bound].seconds
    del scene.server.silent_s[1]
    assert scene.lost(complaining) == []
    scene.now += bound_s * 0.9
    assert scene.lost(complaining) == []
    scene.server.silent_s[1] = 0.0
    assert scene.lost(complaining) == []
    del scene.server.silent_s[1]
    scene.now += bound_s * 2
    assert scene.lost(complaining) == [], "counted from the second time"
    scene.now += bound_s * 1.1
    assert scene.lost(complaining) == [Loss(1, "node-1", Reason.DISCONNECTED, "its connection broke")]


def test_peers_that_complain_shorten_a_wait_that_has_begun(scene: Scene) -> None:
    del scene.server.silent_s[1]
    assert scene.lost() == []
    scene.now += BOUNDS["cut_off"].seconds * 1.1
    assert scene.lost() == []
    assert [loss.reason for loss in scene.lost(complaining=True)] == [Reason.DISCONNECTED]


def test_who_stood_still_itself_blames_nobody(scene: Scene) -> None:
    scene.lost()
    del scene.server.silent_s[2]
    scene.lost()
    scene.now += 60.0
    scene.evidence.forgive()
    scene.server.silent_s[1] = 60.0
    assert scene.lost() == []
    scene.now += BOUNDS["cut_off_alone"].seconds + 1
    assert {loss.member for loss in scene.lost()} == {1, 2}


def test_who_is_not_born_may_be_silent(scene: Scene) -> None:
    """Its process starts, imports and builds; it has a bound of its own."""
    scene.hands.members[1].pid = 0
    del scene.server.silent_s[1]
    scene.lost()
    scene.now += BUSY_S + 1
    scene.server.silent_s = {0: 0.0, 2: 0.0}
    assert scene.lost() == []


def test_of_all_that_are_suspect_agents_are_asked_at_once(scene: Scene) -> None:
    """Of a node that stands still nobody answers, and to ask for each member by itself would take seconds."""
    scene.hands.members = {m: Member(m, "node", None, pid=100 + m) for m in range(64)}
    scene.server.silent_s = dict.fromkeys(range(64), SILENCE_S * 0.6)
    assert scene.lost() == []
    assert scene.hands.questions == 1
    scene.now += SILENCE_S + 0.1
    scene.server.silent_s = dict.fromkeys(range(64), SILENCE_S * 1.6)
    assert [loss.member for loss in scene.lost()] == list(range(64)), "the whole node, at once"
    assert scene.hands.questions == 2


def test_one_that_cannot_begin_where_others_could_does_not_end_the_run(scene: Scene) -> None:
    scene.hands.members[2].pid = 0
    scene.hands.dead = {2: (Reason.RAISED, "its process could not begin: no such library")}
    del scene.server.silent_s[2]
    (loss,) = scene.lost()
    assert (loss.member, loss.reason) == (2, Reason.UNBORN)
    assert not loss.reason.ends_the_run


def test_when_none_could_begin_the_next_would_not_either(scene: Scene) -> None:
    for member in scene.hands.members.values():
        member.pid = 0
    scene.hands.dead = {2: (Reason.RAISED, "its process could not begin: no such library")}
    assert [loss.reason.ends_the_run for loss in scene.lost()] == [True]


def test_a_world_stands_still_when_it_makes_no_step_for_longer_than_steps_take(scene: Scene) -> None:
    scene.lost()
    assert not scene.evidence.stands_still
    scene.now += 6
    scene.lost()
    assert scene.evidence.stands_still
    scene.server.step += 1  # it only took its time
    scene.lost()
    assert not scene.evidence.stands_still
    scene.now += 17
    scene.lost()
    assert not scene.evidence.stands_still, "as the step before did"
    scene.now += 2
    scene.lost()
    assert scene.evidence.stands_still
