"""Does a run that stops, resumes, rolls back or changes its layout go the way of the one that did not?"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from concertina.config import Job
from concertina.elastic.messages import AnomalySeen, Committed, Evaluated, Finished, Message, PartWritten, RolledBack
from concertina.elastic.timesheet import Timesheet
from concertina.layout import Layout
from concertina.state.manifest import checkpoint_folder, commit, list_checkpoints, read_manifest, verify
from concertina.train.loop import CHECKPOINT, REGROUP, STOP, Loop, Overtaken
from tests.distributed import run_distributed
from tests.train.test_engine import MIXED, mixed_engine
from tests.train.worlds import engine_on, tiny_job

pytestmark = pytest.mark.dist


@dataclass
class Recorder:
    """A link that keeps what is sent, completes checkpoints, and gives its word at one step."""

    root: Path
    word_at: dict[int, int] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    step: int = 0
    phase: str = ""
    recorded: int = 0
    """What the coordinator says it has; it says so late, or never."""

    def word(self) -> int:
        return self.word_at.get(self.step, 0)

    def progress(self, step: int, phase: str) -> None:
        self.step, self.phase = step, phase

    def spent(self, sheet: Timesheet) -> None:
        pass

    def send(self, message: Message) -> None:
        self.sent.append(message)
        if isinstance(message, PartWritten):
            with _alone(self.root):
                commit(self.root, message.step, message.generation, message.facts)

    def of(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process completes a checkpoint at a time: here every rank stands in for the coordinator, which is one."""
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(
    rank: int,
    store: Any,
    job: Job,
    root: Path,
    world: int,
    ep: int,
    word_at: dict[int, int],
    resume_step: int | None,
    poison: int | None = None,
) -> tuple[list[Message], Finished]:
    engine = engine_on(job, Layout(world, ep=ep), rank, store)
    if resume_step is not None:
        engine.load(checkpoint_folder(root, resume_step))
    if poison is not None:
        _poison(engine, poison)
    link = Recorder(root, word_at)
    loop = Loop(engine, root, link)
    loop.sit(0)
    finished = loop.run()
    assert finished is not None
    return link.sent, finished


def _poison(engine: Any, step: int) -> None:
    """Every time `step` is computed, the loss is not a number."""
    compute = engine._forward_backward

    def poisoned(current: int) -> Any:
        sums = compute(current)
        if current == step:
            sums[0] = float("nan")
        return sums

    engine._forward_backward = poisoned


def losses(sent: list[Message]) -> dict[int, float]:
    return {message.step: message.metrics["loss"] for message in sent if isinstance(message, Committed)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Message]]:
    root = tmp_path_factory.mktemp("uninterrupted")
    sent, finished = run(0, None, tiny_job(), root, 1, 1, {}, None)
    assert finished == Finished(0, 20, "done")
    return root, sent


def test_every_step_is_committed_once_and_in_order(uninterrupted: tuple[Path, list[Message]]) -> None:
    root, sent = uninterrupted
    assert [message.step for message in sent if isinstance(message, Committed)] == list(range(1, 21))
    assert [message.step for message in sent if isinstance(message, Evaluated)] == [10, 20]
    assert [folder.name for folder in list_checkpoints(root)][-1] == "step-00000020"
    facts = read_manifest(checkpoint_folder(root, 20)).facts
    assert facts["step"] == 20
    assert facts["updates"] == 20
    assert facts["tokens"] == sum(message.metrics["tokens"] for message in sent if isinstance(message, Committed))


def test_resume_on_the_same_layout_is_bitwise(uninterrupted: tuple[Path, list[Message]]) -> None:
    root, sent = uninterrupted
    again, _ = run(0, None, tiny_job(), root, 1, 1, {}, 10)
    expected = losses(sent)
    assert losses(again) == {step: expected[step] for step in range(11, 21)}


@pytest.mark.parametrize(("world", "ep"), [(4, 2), (3, 3)])
def test_any_layout_resumes_any_layout(
    world: int, ep: int, uninterrupted: tuple[Path, list[Message]], tmp_path: Path
) -> None:
    """One process writes step 5, a folded world goes on to 12 and stops, one process finishes."""
    job, expected = tiny_job(), losses(uninterrupted[1])
    run(0, None, job, tmp_path, 1, 1, {5: STOP}, None)
    found = losses(run_distributed(run, world, job, tmp_path, world, ep, {12: STOP}, 5)[0][0])
    assert list(found) == list(range(6, 13))
    sent, finished = run(0, None, job, tmp_path, 1, 1, {}, 12)
    assert finished.step == 20
    found |= losses(sent)
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-10), f"step {step}"


def test_the_word_stops_every_rank_at_one_step_with_a_checkpoint(tmp_path: Path) -> None:
    """Rank 0 hears it, the others learn it from the same all-reduce."""
    ranks = run_distributed(run, 3, tiny_job(), tmp_path, 3, 1, {7: STOP}, None)
    assert [finished for _, finished in ranks] == [Finished(rank, 7, "stopped") for rank in range(3)]
    assert list(losses(ranks[0][0])) == list(range(1, 8))
    assert losses(ranks[1][0]) == {}, "only the first rank speaks for the world"
    verify(checkpoint_folder(tmp_path, 7))


def test_the_word_asks_for_a_checkpoint(tmp_path: Path) -> None:
    run(0, None, tiny_job(), tmp_path, 1, 1, {3: CHECKPOINT, 4: STOP}, None)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


# -- generations -------------------------------------------------------------------------------------------------------


def run_in_two(rank: int, store: Any, job: Job, root: Path, world: int, at: int) -> tuple[list[Message], list[Any]]:
    """A world that regroups after step `at`, here into the same seats; the loop and its link stay."""
    engine = engine_on(job, Layout(world), rank, store)
    link = Recorder(root, {at: REGROUP})
    loop = Loop(engine, root, link)
    loop.sit(3)
    left = loop.run()
    link.word_at = {}
    between = (left, engine.applied, sorted(loop.records), loop.saved, loop.evaluated, engine.share.weights_due)
    loop.sit(5, loop.saved, loop.evaluated)
    return link.sent, [between, loop.run()]


@pytest.mark.parametrize("at", [7, 10])
def test_a_world_that_regroups_goes_on_where_it_was(
    at: int, uninterrupted: tuple[Path, list[Message]], tmp_path: Path
) -> None:
    """After any step, also one that is validated and saved. Of the last step nobody knows that all have applied it:
    it is in every rank's records."""
    ranks = run_distributed(run_in_two, 2, tiny_job(), tmp_path, 2, at)
    for rank, (_, ((left, applied, records, saved, evaluated, held_back), finished)) in enumerate(ranks):
        assert (left, applied) == (None, at)
        assert held_back is (at != 10), "weights that nobody will read do not go round; a validation reads them"
        assert records == list(range(1, at + 1)), "nobody has said that anything is written down"
        assert (saved, evaluated) == ((10, 10) if at == 10 else (5, 0))
        assert finished == Finished(rank, 20, "done", generation=5)
    sent, _ = ranks[0]
    told = losses(sent)
    expected = losses(uninterrupted[1])
    missing = set(expected) - set(told)
    assert missing <= {at}, "the coordinator fills it in from the records"
    assert (at in missing) == (at != 10), "a validation asks whether all have it"
    for step, loss in told.items():
        assert loss == pytest.approx(expected[step], rel=1e-10), f"step {step}"
    assert [message.step for message in sent if isinstance(message, Evaluated)] == [10, 20]
    assert {message.generation for message in sent if isinstance(message, PartWritten)} == {3, 5}


@pytest.mark.parametrize(("saved", "evaluated"), [(5, 0), (10, 0), (5, 10), (10, 10)])
def test_what_was_due_when_a_generation_broke_is_done_first(saved: int, evaluated: int, tmp_path: Path) -> None:
    job = tiny_job()
    run(0, None, job, tmp_path, 1, 1, {10: STOP}, None)
    link = Recorder(tmp_path, {11: STOP})
    engine = engine_on(job, Layout(1), 0, None)
    engine.load(checkpoint_folder(tmp_path, 10))
    loop = Loop(engine, tmp_path, link)
    loop.sit(1, saved, evaluated)
    assert loop.run() == Finished(0, 11, "stopped", generation=1)
    assert [m.step for m in link.of(Evaluated)] == ([10] if evaluated < 10 else [])
    assert [m.step for m in link.of(PartWritten)] == ([10] if saved < 10 else []) + [11]
    assert list(losses(link.sent)) == [11]


def test_a_generation_that_begins_at_the_end_only_ends(tmp_path: Path) -> None:
    """A loss after the last step: what is left is its checkpoint, if that is missing."""
    job = tiny_job()
    run(0, None, job, tmp_path, 1, 1, {}, None)
    engine = engine_on(job, Layout(1), 0, None)
    engine.load(checkpoint_folder(tmp_path, 20))
    for saved, parts in ((20, []), (15, [20])):
        link = Recorder(tmp_path)
        loop = Loop(engine, tmp_path, link)
        loop.sit(2, saved, 20)
        assert loop.run() == Finished(0, 20, "done", generation=2)
        assert [m.step for m in link.of(PartWritten)] == parts
        assert losses(link.sent) == {}


def test_a_checkpoint_has_the_facts_of_its_own_step_however_late_it_is_written(tmp_path: Path) -> None:
    """A member joins while step 10 is being written, and step 15 is saved before that has ended."""
    link, gate = Recorder(tmp_path, {10: REGROUP}), threading.Event()
    loop = Loop(engine_on(tiny_job(), Layout(1), 0, None), tmp_path, link)
    loop.sit(1)
    slow, write = loop.saver, loop.saver._write
    slow._write = lambda step, *rest: (step < 10 or gate.wait(60)) and write(step, *rest)  # type: ignore[method-assign]
    assert loop.run() is None
    link.word_at = {15: STOP}
    loop.sit(2, 10, 10)
    loop.run()
    gate.set()
    slow.wait()
    told = [(m.generation, m.step, m.facts["step"], m.facts["updates"]) for m in link.of(PartWritten)]
    assert told == [(1, 5, 5, 5), (2, 15, 15, 15), (1, 10, 10, 10)]
    assert read_manifest(checkpoint_folder(tmp_path, 10)).facts["tokens"] < loop.engine.tokens


def test_records_are_kept_until_they_are_written_down(tmp_path: Path) -> None:
    job = tiny_job()
    link = Recorder(tmp_path, {12: REGROUP})
    loop = Loop(engine_on(job, Layout(1), 0, None), tmp_path, link)
    loop.sit(0)
    assert loop.run() is None
    assert sorted(loop.records) == list(range(1, 13))
    assert [step for step, record in loop.records.items() if "validation_loss" in record] == [10]
    told = losses(link.sent)
    assert {step: record["metrics"]["loss"] for step, record in loop.records.items() if step in told} == told
    link.recorded, link.word_at = 11, {14: STOP}
    loop.sit(1, loop.saved, loop.evaluated)
    loop.run()
    assert sorted(loop.records) == [12, 13, 14]


@pytest.mark.parametrize("late", [9, 10], ids=["already heard", "heard afterwards"])
def test_what_was_written_down_of_a_past_that_was_given_up_is_no_reason_to_forget(late: int, tmp_path: Path) -> None:
    """The world is at step 10 when it goes back to a checkpoint of step 5: its word of before may be late."""
    link = Recorder(tmp_path, {5: CHECKPOINT, 10: REGROUP})
    loop = Loop(engine_on(tiny_job(), Layout(1), 0, None), tmp_path, link)
    loop.sit(0)
    loop.run()
    link.recorded = 9
    loop.engine.load(checkpoint_folder(tmp_path, 5))
    loop.sit(1, 5, 0)
    assert sorted(loop.records) == [1, 2, 3, 4, 5]
    link.recorded, link.word_at = late, {8: REGROUP}
    loop.run()
    assert sorted(loop.records) == [6, 7, 8]
    loop.sit(2, 5, 0)
    link.word_at = {9: REGROUP}
    loop.run()
    assert sorted(loop.records) == [6, 7, 8, 9], "nor has the next generation heard anything new"
    link.recorded, link.word_at = 7, {10: REGROUP}  # it has gone back too
    loop.run()
    assert sorted(loop.records) == [8, 9, 10]


@pytest.mark.parametrize("before", [2, 7])
def test_a_roll_back_forgets_nothing_for_what_was_written_down_before_it(before: int, tmp_path: Path) -> None:
    job = tiny_job(training__anomaly={"nonfinite": "roll_back"})
    engine = engine_on(job, Layout(1), 0, None)
    _poison(engine, 8)
    link = Recorder(tmp_path, {}, recorded=before)
    link.word_at = {7: REGROUP}
    loop = Loop(engine, tmp_path, link)
    loop.sit(0)
    loop.run()
    assert loop._roll_back(8)
    link.recorded, link.word_at = 7, {7: REGROUP}
    loop.run()
    assert {6, 7} <= loop.records.keys()
    link.recorded, link.word_at = 8, {9: REGROUP}
    loop.run()
    assert sorted(loop.records) == [9], "beyond the past, and so of this time"


def test_a_loop_that_is_overtaken_leaves_at_once(tmp_path: Path) -> None:
    """It says so before a step, so that nothing of the step has begun."""

    class Late(Recorder):
        def progress(self, step: int, phase: str) -> None:
            super().progress(step, phase)
            if step == 4:
                raise Overtaken

    link = Late(tmp_path)
    loop = Loop(engine_on(tiny_job(), Layout(1), 0, None), tmp_path, link)
    loop.sit(0)
    with pytest.raises(Overtaken):
        loop.run()
    assert loop.engine.applied == 3
    assert loop.engine.pending is None
    assert sorted(loop.records) == [1, 2, 3]


# -- anomalies ---------------------------------------------------------------------------------------------------------


def test_skip_leaves_the_weights_and_goes_on(tmp_path: Path) -> None:
    job = tiny_job(training__anomaly={"nonfinite": "skip"})
    sent, finished = run(0, None, job, tmp_path, 1, 1, {}, None, poison=8)
    assert finished == Finished(0, 20, "done")
    assert [(m.step, m.anomaly, m.action) for m in sent if isinstance(m, AnomalySeen)] == [(8, "nonfinite", "skip")]
    assert len(losses(sent)) == 20
    assert read_manifest(checkpoint_folder(tmp_path, 20)).facts["updates"] == 19


def test_stop_ends_before_the_bad_step(tmp_path: Path) -> None:
    job = tiny_job(training__anomaly={"nonfinite": "stop"})
    sent, finished = run(0, None, job, tmp_path, 1, 1, {}, None, poison=8)
    assert finished == Finished(0, 7, "anomaly")
    assert list(losses(sent)) == list(range(1, 8))
    assert read_manifest(checkpoint_folder(tmp_path, 7)).step == 7


@pytest.mark.parametrize("world", [1, 2])
def test_roll_back_replays_and_skips_the_bad_step(
    world: int, uninterrupted: tuple[Path, list[Message]], tmp_path: Path
) -> None:
    job = tiny_job(training__anomaly={"nonfinite": "roll_back"})
    arguments = (job, tmp_path, world, 1, {}, None, 8)
    sent, finished = run(0, None, *arguments) if world == 1 else run_distributed(run, world, *arguments)[0]
    assert finished.step == 20
    assert [(m.from_step, m.to_step) for m in sent if isinstance(m, RolledBack)] == [(8, 5)]
    order = [message.step for message in sent if isinstance(message, Committed)]
    assert order == [*range(1, 8), *range(6, 21)]
    expected = losses(uninterrupted[1])
    found = losses(sent)
    for step in range(1, 8):
        assert found[step] == pytest.approx(expected[step], rel=1e-10)
    assert [m.anomaly for m in sent if isinstance(m, AnomalySeen)] == ["nonfinite", "replayed"]


def test_what_was_validated_and_saved_is_void_after_a_roll_back(tmp_path: Path) -> None:
    """Else the next generation would take a validation for done that has yet to come again."""
    job = tiny_job(training__eval_every_steps=7)
    link = Recorder(tmp_path, {7: REGROUP})
    loop = Loop(engine_on(job, Layout(1), 0, None), tmp_path, link)
    loop.sit(0)
    assert loop.run() is None
    assert (loop.saved, loop.evaluated) == (5, 7)
    loop.saved = 7
    phases, wait = [], loop.saver.wait
    loop.saver.wait = lambda *bound: (phases.append(link.phase), wait(*bound))[1]  # type: ignore[func-returns-value]
    assert loop._roll_back(8)
    assert phases == ["loading"], "who waits for storage says so, or it is given up as one that does not halt"
    assert (loop.engine.applied, loop.saved, loop.evaluated) == (5, 5, 5)
    assert loop.engine.watch.skipped == {8}


def test_too_many_anomalies_stop(tmp_path: Path) -> None:
    job = tiny_job(training__anomaly={"nonfinite": "skip", "max_events": 1})
    _, finished = run(0, None, job, tmp_path, 1, 1, {}, None, poison=8)
    assert finished.reason == "anomaly"


def test_a_mixture_tells_each_source(tmp_path: Path) -> None:
    link = Recorder(tmp_path, {11: STOP})
    loop = Loop(mixed_engine(0, None, 1, 1), tmp_path, link)
    loop.sit(0)
    loop.run()
    (told,) = link.of(Evaluated)
    assert list(told.by_source) == list(MIXED)
    assert told.loss == sum(MIXED[name][0] * loss for name, loss in told.by_source.items())
    assert loop.records[10]["validation_by_source"] == told.by_source


def spoilt_before_a_roll_back(rank: int, store: Any, job: Job, root: Path) -> list[int]:
    """Ranks that share the reading: only one of them sees that a file of the newest checkpoint is damaged."""
    engine = engine_on(job, Layout(2, ep=2), rank, store)
    loop = Loop(engine, root, Recorder(root, {8: REGROUP}))
    loop.sit(0)
    loop.run()
    engine.settle()
    loop.saver.wait()
    store.set(f"written{rank}", "")
    store.wait(["written0", "written1"])
    newest = list_checkpoints(root)[-1]
    if rank == 0:
        victim = sorted(newest.glob("*.safetensors"))[1]
        content = bytearray(victim.read_bytes())
        content[-5] ^= 4
        victim.write_bytes(content)
    store.set(f"spoilt{rank}", "")
    store.wait(["spoilt0", "spoilt1"])
    assert loop._roll_back(8)
    return [read_manifest(newest.with_name("step-00000003")).step, engine.applied, int(newest.exists())]


def test_a_roll_back_passes_over_a_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    job = tiny_job(training__anomaly={"nonfinite": "roll_back"}, checkpoint__every_steps=3)
    for found in run_distributed(spoilt_before_a_roll_back, 2, job, tmp_path):
        assert found == [3, 3, 0]
