"""The coordinator is gone for good: is nothing that was done missing from what the first rank writes?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.assignment import RunPlan
from actors.last_words import write_last_words
from concertina.config import Job
from concertina.elastic.messages import Committed, Finished, Formed, Halted, Message, encode
from concertina.layout import Box, Layout
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import write_part
from concertina.state.manifest import checkpoint_folder, commit, list_checkpoints, partial_folder, verify
from concertina.track.events import EventLog, EventType, read_events

pytestmark = pytest.mark.unit

UNHEARD: list[Message] = [
    Formed(0, 3, 4),
    Committed(5, {"loss": 2.5, "tokens": 64.0}),
    Halted(0, 4, 3, -1, 5, None, None, [], 0, "lost its peers"),
    Committed(6, {"loss": 3.0, "tokens": 64.0}),
    Finished(0, 6, "stopped", 3),
]


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    """Of a run of one rank that trains in generation 3 and has written its part of step 6."""
    plan = RunPlan("a-1", tmp_path, tmp_path, Job(name="a"), Layout(1), "cpu", "session", "token")
    box = Box.whole((7,))
    piece = {"master/a": BoxedTensor(torch.arange(7.0), box, (7,))}
    write_part(partial_folder(plan.checkpoints, 6, 3), piece, rank=0, world=1, generation=3)
    with EventLog(tmp_path / "events.jsonl", "a-1") as log:
        log.append(EventType.START, {"session": "session", "resumed_from_step": None})
        log.append(EventType.STATE, {"state": "training"}, step=4)
        for step in range(1, 5):
            log.append(EventType.STEP, {"loss": step / 2}, step=step)
    return plan


def write(plan: RunPlan, generation: int = 3, facts_of: int = 6) -> None:
    facts = {"step": facts_of, "tokens": 64 * facts_of}
    write_last_words(plan, generation, 6, facts, [encode(message) for message in UNHEARD])


def test_unheard_steps_the_checkpoint_and_the_end_are_written(plan: RunPlan) -> None:
    """What nobody has heard is more than steps: a member says as well how a change of membership goes."""
    write(plan)
    events = list(read_events(plan.folder / "events.jsonl"))
    assert [event.step for event in events if event.type == EventType.STEP] == list(range(1, 7))
    assert verify(checkpoint_folder(plan.checkpoints, 6)).step == 6
    end = events[-1]
    assert (end.type, end.data["state"], end.data["exit_code"], end.generation) == (EventType.STATE, "failed", 100, 3)
    assert end.data["reason"] == "the coordinator was gone for good; its ranks left a checkpoint of step 6"
    assert [event.step for event in events if event.type == EventType.CHECKPOINT] == [6]


def test_a_coordinator_that_is_back_has_the_last_word(plan: RunPlan) -> None:
    with EventLog(plan.folder / "events.jsonl", "a-1") as log:
        write(plan)
        assert log.append(EventType.STEP, {"loss": 1.0}, step=5) == 6
    assert verify(checkpoint_folder(plan.checkpoints, 6)).step == 6


def test_the_end_is_written_although_the_checkpoint_is_refused(plan: RunPlan) -> None:
    write(plan, facts_of=5)
    end = list(read_events(plan.folder / "events.jsonl"))[-1]
    assert end.data["reason"] == "the coordinator was gone for good; its ranks left no new checkpoint"
    assert list_checkpoints(plan.checkpoints) == []


def test_a_checkpoint_that_an_earlier_generation_left_is_the_last_one(plan: RunPlan) -> None:
    """Of the generation that ends there are no parts, and none will come."""
    commit(plan.checkpoints, 6, 3, {"step": 6, "tokens": 384})
    write(plan, generation=5)
    end = list(read_events(plan.folder / "events.jsonl"))[-1]
    assert end.data["reason"].endswith("left a checkpoint of step 6")
