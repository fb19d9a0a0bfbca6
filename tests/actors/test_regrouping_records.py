"""Is every step recorded once and in its place, when a regrouping and a slow storage meet?

The recorder is held up where it stands; members go on as they would.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.recorder import Recorder
from concertina.elastic.messages import Committed, Move
from concertina.state.manifest import partial_folder
from concertina.track.events import EventType
from tests.actors.test_regrouping import Scene

pytestmark = pytest.mark.unit


class Recorded(Scene):
    """With a recorder that can be held up."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.recorder = Recorder(self.book, lambda message: None)
        self.trains()

    def commits(self, *steps: int) -> None:
        for step in steps:
            self.recorder.put(Committed(step, {"loss": step / 2}))

    def hold(self) -> threading.Event:
        """Storage does not answer until the event is set."""
        answer = threading.Event()
        self.recorder.do(lambda: self._wait(answer))
        return answer

    @staticmethod
    def _wait(answer: threading.Event) -> None:
        assert answer.wait(30)

    def course(self) -> list[int]:
        """Steps as they were recorded, and minus where it was gone back to."""
        assert self.recorder.drain()
        kinds = {EventType.STEP: lambda event: event.step, EventType.ROLLBACK: lambda event: -event.data["to_step"]}
        events = [event for kind in kinds for event in self.events(kind)]
        return [kinds[event.type](event) for event in sorted(events, key=lambda event: event.seq)]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Recorded]:
    made = Recorded(tmp_path)
    yield made
    made.recorder.close()
    made.log.close()


def test_a_generation_trains_before_all_have_said_that_they_formed_it(scene: Recorded) -> None:
    scene.commits(*range(1, 8))
    scene.lose(1)
    for member in (0, 2):
        scene.halted(member, 1, 0, 9, untold=2)
    scene.formed(1, 9, 0)
    scene.commits(10, 11)
    scene.formed(1, 9, 2)
    scene.commits(12)
    assert scene.course() == list(range(1, 13))


def test_members_that_complain_before_anybody_is_lost_say_what_the_first_rank_did_not(scene: Recorded) -> None:
    """Of a node that dies their sockets tell first; nothing is waited for after the loss."""
    scene.commits(*range(1, 8))
    for member in (1, 2):
        scene.halted(member, -1, 0, 9, failure="connection reset", untold=2)
    scene.lose(0)
    assert set(scene.channel.take(Move)) == {1, 2}
    scene.formed(1, 9, 1, 2)
    scene.commits(10)
    assert scene.course() == list(range(1, 11))


def test_a_generation_trains_while_what_was_before_it_is_still_to_be_recorded(scene: Recorded) -> None:
    scene.commits(*range(1, 8))
    answer = scene.hold()
    scene.commits(8, 9)
    scene.recover(9)
    scene.formed(1, 9, 0, 2)
    scene.commits(10, 11, 12)
    answer.set()
    scene.commits(13)
    assert scene.course() == list(range(1, 14))


def test_steps_that_are_given_up_are_recorded_before_that_and_done_again(scene: Recorded) -> None:
    """Also when storage takes longer than anybody waits for it."""
    scene.commits(*range(1, 8))
    answer = scene.hold()
    scene.commits(8, 9)
    growing = partial_folder(scene.plan.checkpoints, 9, 0)
    growing.mkdir()
    scene.lose(0, 1, 2)
    scene.arrive(3, 4, 5)
    assert not growing.exists(), "nobody completes it any more"
    number = scene.regrouping.generations.last_number
    scene.formed(number, 0, 3, 4, 5)
    scene.commits(*range(1, 11))
    answer.set()
    assert scene.course() == [*range(1, 10), 0, *range(1, 11)]
