"""Does a restarted coordinator learn from the events its session, how far it came, and whether it has ended?"""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.last_session import LastSession, read_last_session
from concertina.elastic.states import RunState
from concertina.track.events import EventLog, EventType

pytestmark = pytest.mark.unit


def told(folder: Path, *lines: tuple[EventType, int | None, dict[str, object]], generation: int = 0) -> LastSession:
    path = folder / "events.jsonl"
    with EventLog(path, "run-1") as log:
        for kind, step, data in lines:
            log.append(kind, data, step=step, generation=generation)
    return read_last_session(path)


def start(session: str, resumed_from_step: int | None = None) -> tuple[EventType, None, dict[str, object]]:
    return EventType.START, None, {"session": session, "resumed_from_step": resumed_from_step}


def state(name: str, **data: object) -> tuple[EventType, int, dict[str, object]]:
    return EventType.STATE, 3, {"state": name, **data}


def test_nothing_was_told(tmp_path: Path) -> None:
    assert read_last_session(tmp_path / "events.jsonl") == LastSession()


def test_how_far_it_came(tmp_path: Path) -> None:
    steps = [(EventType.STEP, step, {}) for step in (1, 2, 3)]
    found = told(
        tmp_path, start("a"), state("forming"), state("training"), *steps, (EventType.EVAL, 2, {}), generation=4
    )
    assert (found.session, found.generation, found.state) == ("a", 4, RunState.TRAINING)
    assert (found.written[EventType.STEP], found.written[EventType.EVAL]) == (3, 2)
    assert not found.state.is_end


def test_a_new_session_begins_where_it_resumes(tmp_path: Path) -> None:
    found = told(tmp_path, start("a"), (EventType.STEP, 9, {}), state("stopped", reason="Ctrl-C"), start("b", 5))
    assert (found.session, found.state, found.reason) == ("b", RunState.WAITING_FOR_CAPACITY, "")
    assert found.written == {EventType.STEP: 5, EventType.EVAL: 5}


def test_a_roll_back_takes_steps_back(tmp_path: Path) -> None:
    found = told(tmp_path, start("a"), (EventType.STEP, 9, {}), (EventType.ROLLBACK, 10, {"to_step": 6}))
    assert found.written[EventType.STEP] == 6


def test_an_end_keeps_its_exit_code(tmp_path: Path) -> None:
    found = told(tmp_path, start("a"), state("failed", reason="no room", exit_code=104))
    assert (found.state, found.reason, found.exit_code) == (RunState.FAILED, "no room", 104)


def test_the_end_somebody_else_wrote_is_one(tmp_path: Path) -> None:
    assert told(tmp_path, start("a"), state("killed")).state.is_end
