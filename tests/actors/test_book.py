"""Is all that ranks say written down once, through restarts, resumes and roll backs, and is the end the right one?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.book import Book
from concertina.elastic.messages import (
    AnomalySeen,
    Committed,
    Evaluated,
    Finished,
    Halted,
    Message,
    PartWritten,
    RankError,
    RolledBack,
)
from concertina.elastic.states import RunEvent, RunState
from concertina.layout import Box
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import write_part
from concertina.state.manifest import checkpoint_folder, commit, list_checkpoints, partial_folder, read_manifest
from concertina.track.events import Event, EventLog, EventType, read_events, void_after

pytestmark = pytest.mark.unit

WORLD = 3
FACTS: dict[str, Any] = {"step": 5, "tokens": 640, "layout": {"world": WORLD}, "updates": 5}


class Desk:
    """A run's folder, and the coordinators that follow each other at it."""

    def __init__(self, folder: Path, generation: int = 0) -> None:
        self.folder, self.generation = folder, generation
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.log = EventLog(folder / "events.jsonl", "run-1")

    def start(self, resumed_from_step: int | None = None) -> Book:
        """A session begins."""
        self.log.append(EventType.START, {"world": WORLD, "resumed_from_step": resumed_from_step})
        return self.book()

    def book(self) -> Book:
        book = Book(self.log, self.checkpoints, keep=2)
        book.generation = max(book.generation, self.generation)
        return book

    def restart(self) -> Book:
        """The coordinator is gone; the next one finds only what is on storage."""
        self.log.close()
        self.log = EventLog(self.folder / "events.jsonl", "run-1")
        return self.book()

    def events(self, *kinds: EventType) -> list[Event]:
        return [event for event in read_events(self.log.path) if not kinds or event.type in kinds]

    def valid(self, kind: EventType) -> list[tuple[int | None, Any]]:
        """(step, loss) of a kind, without what a resume or a roll back has made void."""
        found: list[tuple[int | None, Any]] = []
        for event in self.events():
            limit = void_after(event)
            if limit is not None:
                found = [(step, loss) for step, loss in found if step is not None and step <= limit]
            if event.type == kind:
                found.append((event.step, event.data["loss"]))
        return found

    def write_parts(self, step: int, ranks: range = range(WORLD)) -> list[PartWritten]:
        """What ranks do before they say so."""
        for rank in ranks:
            box = Box.whole((7,)).cut(0, WORLD, rank)
            piece = BoxedTensor(torch.arange(7.0)[box.slices()].clone(), box, (7,))
            folder = partial_folder(self.checkpoints, step, self.generation)
            write_part(folder, {"master/a": piece}, rank=rank, world=WORLD, generation=self.generation)
        return [PartWritten(rank, self.generation, step, {**FACTS, "step": step}) for rank in ranks]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path)
    yield found
    found.log.close()


def committed(step: int, loss: float | None = None) -> Committed:
    return Committed(step, {"loss": step / 2 if loss is None else loss, "tokens": 64.0})


def say(book: Book, *messages: Message) -> None:
    for message in messages:
        book.record(message)


def training(desk: Desk) -> Book:
    book = desk.start()
    book.move(RunEvent.CAPACITY)
    form(book, desk.generation, WORLD, 0)
    return book


def form(book: Book, generation: int, world: int, step: int) -> None:
    """What the coordinator does when the last member has adopted a generation."""
    book.sit(generation, world, step)
    book.move(RunEvent.FORMED)
    book.end_if_finished()


# -- steps and validations, exactly once -------------------------------------------------------------------------------


def test_steps_and_validations_are_events_with_their_numbers(desk: Desk) -> None:
    say(desk.start(), committed(1), Evaluated(1, 4.5), committed(2))
    steps = desk.events(EventType.STEP)
    assert [(event.step, dict(event.data)) for event in steps] == [
        (1, {"loss": 0.5, "tokens": 64.0}),
        (2, {"loss": 1.0, "tokens": 64.0}),
    ]
    assert [(event.step, dict(event.data)) for event in desk.events(EventType.EVAL)] == [(1, {"loss": 4.5})]


def test_what_is_said_twice_is_written_once(desk: Desk) -> None:
    book = desk.start()
    say(
        book, committed(1), committed(2), Evaluated(2, 4.0), committed(1), committed(2), Evaluated(2, 4.0), committed(3)
    )
    assert [step for step, _ in desk.valid(EventType.STEP)] == [1, 2, 3]
    assert len(desk.events(EventType.STEP)) == 3
    assert len(desk.events(EventType.EVAL)) == 1


def test_a_restarted_coordinator_writes_only_what_is_new(desk: Desk) -> None:
    say(desk.start(), committed(1), Evaluated(1, 4.0), committed(2))
    say(desk.restart(), committed(1), Evaluated(1, 4.0), committed(2), committed(3), Evaluated(3, 3.0))
    assert [event.step for event in desk.events(EventType.STEP)] == [1, 2, 3]
    assert [event.step for event in desk.events(EventType.EVAL)] == [1, 3]


@st.composite
def histories(draw: st.DrawFn) -> list[Message]:
    """What a first rank says: steps in order, validations, now and then back to an earlier step and on from there."""
    step, told = 0, []
    for _ in range(draw(st.integers(1, 15))):
        step += 1
        told.append(committed(step, loss=float(len(told))))
        if draw(st.booleans()):
            told.append(Evaluated(step, float(len(told))))
        if draw(st.integers(0, 4)) == 0:
            back = draw(st.integers(0, step))
            told.append(RolledBack(step + 1, back))
            step = back
    return told


def last_word(history: list[Message], kind: type[Message]) -> list[tuple[int, float]]:
    """(step, loss) of what stands in the end."""
    stands: list[tuple[int, float]] = []
    for message in history:
        if isinstance(message, RolledBack):
            stands = [(step, loss) for step, loss in stands if step <= message.to_step]
        elif isinstance(message, kind):
            assert isinstance(message, Committed | Evaluated)
            loss = message.metrics["loss"] if isinstance(message, Committed) else message.loss
            stands.append((message.step, loss))
    return stands


@settings(max_examples=60)
@given(history=histories(), data=st.data())
def test_whatever_is_said_again_after_restarts_counts_once(
    history: list[Message], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each restart is followed by everything since some point: ranks say again what was not acknowledged."""
    desk = Desk(tmp_path_factory.mktemp("run"))
    book, at = desk.start(), 0
    for _ in range(data.draw(st.integers(0, 3), label="restarts")):
        until = data.draw(st.integers(at, len(history)), label="until")
        say(book, *history[at:until])
        at = data.draw(st.integers(0, until), label="again from")
        book = desk.restart()
    say(book, *history[at:])
    assert desk.valid(EventType.STEP) == last_word(history, Committed)
    assert desk.valid(EventType.EVAL) == last_word(history, Evaluated)
    desk.log.close()


def test_a_resume_makes_void_what_came_after_its_checkpoint_and_writes_it_again(desk: Desk) -> None:
    say(desk.start(), *(committed(step) for step in range(1, 9)), Evaluated(8, 4.0))
    say(desk.start(resumed_from_step=5), *(committed(step, loss=9.0) for step in (5, 6, 7)))
    assert [step for step, _ in desk.valid(EventType.STEP)] == [1, 2, 3, 4, 5, 6, 7]
    assert dict(desk.valid(EventType.STEP))[5] == 2.5, "step 5 was committed before"
    assert dict(desk.valid(EventType.STEP))[6] == 9.0
    assert desk.valid(EventType.EVAL) == []
    say(desk.restart(), committed(6, loss=9.0), committed(7, loss=9.0), committed(8, loss=9.0))
    assert [step for step, _ in desk.valid(EventType.STEP)] == list(range(1, 9))


def test_a_roll_back_is_an_event_of_the_step_that_went_wrong(desk: Desk) -> None:
    book = desk.start()
    say(book, committed(6), committed(7), RolledBack(8, 5))
    assert book.step == 5
    event = desk.events(EventType.ROLLBACK)[0]
    assert (event.step, dict(event.data)) == (8, {"to_step": 5})


def test_an_anomaly_is_an_event(desk: Desk) -> None:
    say(desk.start(), AnomalySeen(8, "nonfinite", "skip", "loss nan"))
    event = desk.events(EventType.ANOMALY)[0]
    assert (event.step, dict(event.data)) == (8, {"kind": "nonfinite", "action": "skip", "detail": "loss nan"})


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_last_part_completes_a_checkpoint(desk: Desk) -> None:
    book, (first, *rest) = desk.start(), desk.write_parts(5)
    say(book, first)
    assert list_checkpoints(desk.checkpoints) == [checkpoint_folder(desk.checkpoints, 5)], "all parts lay there"
    say(book, *rest)
    event, *more = desk.events(EventType.CHECKPOINT)
    assert more == []
    manifest = read_manifest(checkpoint_folder(desk.checkpoints, 5))
    assert (event.step, dict(event.data)) == (
        5,
        {
            "path": "checkpoints/step-00000005",
            "bytes": manifest.bytes,
            "tokens": 640,
            "layout": {"world": WORLD},
        },
    )
    assert manifest.facts == FACTS


def test_no_checkpoint_while_a_part_is_missing(desk: Desk) -> None:
    book = desk.start()
    say(book, *desk.write_parts(5, range(2)))
    assert list_checkpoints(desk.checkpoints) == []
    assert desk.events(EventType.CHECKPOINT) == []
    say(book, *desk.write_parts(5, range(2, 3)))
    assert len(desk.events(EventType.CHECKPOINT)) == 1


def test_older_checkpoints_are_removed_and_it_is_said(desk: Desk) -> None:
    book = desk.start()
    for step in (5, 10, 15, 20):
        say(book, *desk.write_parts(step))
    assert [folder.name for folder in list_checkpoints(desk.checkpoints)] == ["step-00000015", "step-00000020"]
    removed = desk.events(EventType.CHECKPOINT_REMOVED)
    assert [event.data["path"] for event in removed] == ["checkpoints/step-00000005", "checkpoints/step-00000010"]


def test_parts_that_do_not_fit_are_an_error_and_no_end(desk: Desk) -> None:
    book = training(desk)
    written = desk.write_parts(5)
    page = partial_folder(desk.checkpoints, 5, 0) / "part-00002.json"
    page.write_text(page.read_text().replace('"master/a": [[5], [7]]', '"master/a": [[4], [7]]'))
    say(book, *written[2:])
    assert desk.events(EventType.CHECKPOINT) == []
    event = desk.events(EventType.ERROR)[0]
    assert (event.step, event.data["rank"]) == (5, 2)
    assert "master/a" in event.data["message"]
    assert book.state is RunState.TRAINING


def test_a_restart_says_no_checkpoint_twice(desk: Desk) -> None:
    written = desk.write_parts(5)
    say(desk.start(), *written)
    say(desk.restart(), *written)
    assert len(desk.events(EventType.CHECKPOINT)) == 1


def test_a_restart_says_what_its_predecessor_could_not(desk: Desk) -> None:
    """It was killed between the rename that completes a checkpoint and the line that tells of it."""
    book, written = desk.start(), desk.write_parts(5)
    say(book, committed(5))
    assert commit(desk.checkpoints, 5, 0, FACTS)
    say(desk.restart(), committed(5), *written)
    assert [(event.step, event.data["tokens"]) for event in desk.events(EventType.CHECKPOINT)] == [(5, 640)]
    desk.restart()
    assert len(desk.events(EventType.CHECKPOINT)) == 1


def test_a_restart_completes_what_its_predecessor_left_unfinished(desk: Desk) -> None:
    """Killed after the manifest was written and before the rename."""
    book, written = desk.start(), desk.write_parts(5)
    assert commit(desk.checkpoints, 5, 0, FACTS)
    final, partial = checkpoint_folder(desk.checkpoints, 5), partial_folder(desk.checkpoints, 5, 0)
    desk.write_parts(5)
    shutil.copy(final / "manifest.json", partial / "manifest.json")
    shutil.rmtree(final)
    del book
    say(desk.restart(), *written)
    assert [event.step for event in desk.events(EventType.CHECKPOINT)] == [5]
    assert read_manifest(final).step == 5


def test_the_step_that_two_generations_save_is_one_checkpoint_and_no_error(desk: Desk) -> None:
    """The world regrouped while it was being written, and the next generation writes it again."""
    book, written = desk.start(), desk.write_parts(5)
    desk.generation = 1
    again = desk.write_parts(5, range(1))
    say(book, *written)
    again += desk.write_parts(5, range(1, WORLD))
    say(book, *again)
    assert desk.events(EventType.ERROR) == []
    assert len(desk.events(EventType.CHECKPOINT)) == 1
    assert read_manifest(checkpoint_folder(desk.checkpoints, 5)).generation == 0
    assert list(desk.checkpoints.glob(".step-*")) == []


# -- states ------------------------------------------------------------------------------------------------------------


def states(desk: Desk) -> list[str]:
    return [event.data["state"] for event in desk.events(EventType.STATE)]


def test_training_begins_when_a_generation_has_formed(desk: Desk) -> None:
    book = desk.start()
    book.move(RunEvent.CAPACITY)
    assert (book.state, book.step) == (RunState.FORMING, 0)
    form(book, 0, WORLD, 10)
    assert (book.state, book.step) == (RunState.TRAINING, 10)
    event = desk.events(EventType.STATE)[-1]
    assert (event.step, event.data["state"]) == (10, "training")


def test_a_transition_that_is_none_is_no_event(desk: Desk) -> None:
    book = training(desk)
    before = states(desk)
    book.move(RunEvent.CAPACITY)
    assert states(desk) == before == ["forming", "training"]


@pytest.mark.parametrize(
    ("reason", "state", "told"),
    [
        ("done", RunState.FINISHED, ""),
        ("stopped", RunState.STOPPED, "Ctrl-C"),
        ("anomaly", RunState.FAILED, "the anomaly policy stopped the run at step 20"),
    ],
)
def test_a_run_ends_when_the_last_rank_has_left(desk: Desk, reason: str, state: RunState, told: str) -> None:
    book = training(desk)
    book.stop_reason = "Ctrl-C"
    say(book, Finished(2, 20, reason), Finished(0, 20, reason), Finished(0, 20, reason))
    assert book.state is RunState.TRAINING
    assert not book.all_finished
    say(book, Finished(1, 20, reason))
    assert (book.state, book.reason) == (state, told)
    assert states(desk)[-1] == state.value
    assert desk.events(EventType.STATE)[-1].data["reason"] == told


def test_every_event_carries_the_generation(tmp_path: Path) -> None:
    desk = Desk(tmp_path, generation=3)
    say(desk.book(), committed(1), AnomalySeen(2, "spike", "skip", ""), *desk.write_parts(5))
    assert {event.generation for event in desk.events()} == {3}
    desk.log.close()


# -- generations -------------------------------------------------------------------------------------------------------


def record_of(step: int, **more: float) -> dict[str, Any]:
    """What members keep of a step until they hear that it is written down."""
    return {"step": step, "metrics": {"loss": step / 2, "tokens": 64.0}, **more}


def test_what_the_first_rank_did_not_live_to_say_is_filled_in(desk: Desk) -> None:
    """All that are left say it, and they may have applied a step that others had not: those agree on step 6."""
    book = training(desk)
    say(book, *(committed(step) for step in (1, 2, 3)))
    members = (
        [record_of(4, validation_loss=4.5), record_of(5), record_of(6)],
        [record_of(3), record_of(4), record_of(5)],
    )
    book.fill([record for told in members for record in told], 6)
    assert desk.valid(EventType.STEP) == [(step, step / 2) for step in range(1, 7)]
    assert desk.valid(EventType.EVAL) == [(4, 4.5)]
    assert (book.step, book.recorded) == (6, 6)
    say(book, committed(6), committed(7))
    assert [step for step, _ in desk.valid(EventType.STEP)] == list(range(1, 8))


def test_losses_of_sources_are_written_down_whoever_says_them(desk: Desk) -> None:
    book = training(desk)
    say(book, committed(1), Evaluated(1, 4.0, {"code": 3.0, "prose": 5.0}), committed(2))
    book.fill([{**record_of(3, validation_loss=3.5), "validation_by_source": {"code": 3.0, "prose": 4.0}}], 3)
    say(book, committed(4), Evaluated(4, 3.0))
    told = [event.data for event in desk.events(EventType.EVAL)]
    assert told == [
        {"loss": 4.0, "by_source": {"code": 3.0, "prose": 5.0}},
        {"loss": 3.5, "by_source": {"code": 3.0, "prose": 4.0}},
        {"loss": 3.0},
    ]


def test_a_step_that_is_void_is_not_filled_in(desk: Desk) -> None:
    book = training(desk)
    say(book, committed(1))
    book.fill([record_of(2), record_of(3, validation_loss=4.0)], 2)
    assert [step for step, _ in desk.valid(EventType.STEP)] == [1, 2]
    assert desk.events(EventType.EVAL) == []


@given(said=st.integers(0, 8), kept=st.integers(0, 8), spans=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9))))
def test_no_step_is_missing_or_twice_when_records_reach_back_far_enough(
    said: int, kept: int, spans: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    desk = Desk(tmp_path_factory.mktemp("run"))
    book = training(desk)
    say(book, *(committed(step) for step in range(1, said + 1)))
    whole = [record_of(step) for step in range(said + 1, kept + 1)]
    book.fill([*whole, *(record_of(step) for first, many in spans for step in range(first, first + many))], kept)
    steps = [step for step, _ in desk.valid(EventType.STEP)]
    assert steps == list(range(1, max(said, kept) + 1))
    desk.log.close()


def test_events_after_a_change_carry_the_new_generation(desk: Desk) -> None:
    book = training(desk)
    say(book, committed(1))
    book.move(RunEvent.LOSS, "member 2 (killed: gone)")
    assert book.state is RunState.RECOVERING
    form(book, 4, 2, 1)
    say(book, committed(2))
    assert [event.generation for event in desk.events(EventType.STEP)] == [0, 4]
    assert book.state is RunState.TRAINING
    assert states(desk) == ["forming", "training", "recovering", "training"]
    assert desk.restart().generation == 4


def test_going_back_to_a_checkpoint_makes_later_steps_void(desk: Desk) -> None:
    """Nobody who is left has the whole state."""
    book = training(desk)
    say(book, *(committed(step) for step in range(1, 8)), Evaluated(7, 4.0))
    book.go_back(5)
    assert (book.step, book.recorded) == (5, 5)
    form(book, 1, 2, 5)
    say(book, committed(6, loss=9.0), committed(7, loss=9.0), Evaluated(7, 3.0))
    assert [step for step, _ in desk.valid(EventType.STEP)] == list(range(1, 8))
    assert dict(desk.valid(EventType.STEP))[6] == 9.0
    assert desk.valid(EventType.EVAL) == [(7, 3.0)]
    assert desk.restart().recorded == 7


def test_who_had_finished_before_a_loss_finishes_again(desk: Desk) -> None:
    """Ranks of another generation say nothing of how many of this one are left."""
    book = training(desk)
    say(book, Finished(0, 20, "done"), Finished(1, 20, "done"))
    form(book, 1, 2, 20)
    assert not book.all_finished
    say(book, Finished(0, 20, "done", generation=0), Finished(0, 20, "done", generation=1))
    assert book.state is RunState.TRAINING
    say(book, Finished(1, 20, "done", generation=1))
    assert book.state is RunState.FINISHED


@pytest.mark.parametrize("reason", ["done", "stopped"])
def test_a_quick_rank_may_finish_before_a_slow_one_has_said_that_it_has_formed(desk: Desk, reason: str) -> None:
    """A loss at the last step: what is left to do takes no time."""
    book = training(desk)
    book.move(RunEvent.LOSS, "member 2 (killed: gone)")
    say(book, *(Finished(rank, 20, reason, generation=1) for rank in range(2)))
    assert book.state is RunState.RECOVERING
    form(book, 1, 2, 20)
    assert book.state is (RunState.FINISHED if reason == "done" else RunState.STOPPED)


def test_it_takes_what_is_to_be_written_down_and_nothing_else(desk: Desk) -> None:
    book = desk.start()
    assert all(book.takes(message) for message in (committed(1), Finished(0, 1, "done"), Evaluated(1, 1.0)))
    assert not book.takes(Halted(0, -1, 0, -1, 1, None, None, [], 0, ""))


def test_what_members_raised_is_kept(desk: Desk) -> None:
    book = training(desk)
    error = RankError(1, "RuntimeError", "boom", "Traceback", 1, hardware=False)
    say(book, error)
    assert book.errors == [error]
    assert book.state is RunState.TRAINING, "the conductor judges it"
