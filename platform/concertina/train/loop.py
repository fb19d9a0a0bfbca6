"""What does a rank do from its first step to its last? Steps, validations, checkpoints, and one word a step on whether
to go on.

The loop knows no Ray and no sockets: it talks to whoever started it through a `Link`. It outlives generations: `sit`
begins one, `run` trains until the end or until the generation is over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from concertina.config import Job
from concertina.elastic.account import Bucket
from concertina.elastic.messages import (
    AnomalySeen,
    Committed,
    Evaluated,
    Finished,
    Message,
    PartWritten,
    RolledBack,
)
from concertina.elastic.timesheet import Timesheet
from concertina.errors import CheckpointError, RankFailure
from concertina.parallel.collectives import all_reduce_sum
from concertina.parallel.groups import SECONDS
from concertina.state.manifest import Part, checkpoint_folder, discard, list_checkpoints, step_of, verify
from concertina.state.saver import Saver
from concertina.train.engine import Engine, StepResult

__all__ = ["CHECKPOINT", "REGROUP", "STOP", "Link", "Loop", "Overtaken"]

log = logging.getLogger("concertina.rank")

STOP, CHECKPOINT, REGROUP = 1, 2, 4  # bits of the control word
_MOST_RECORDS = 10_000


class Overtaken(Exception):
    """A newer generation has begun: nothing of this one goes on."""


class Link(Protocol):
    """A rank's way to its coordinator. No verb waits for the network."""

    @property
    def recorded(self) -> int:
        """The newest committed step that is written down for good, as far as is known here."""

    def word(self) -> int:
        """The control word to put on the next step; asked of the first rank only."""

    def send(self, message: Message) -> None:
        """Hand over a message, delivered in order and once."""

    def progress(self, step: int, phase: str) -> None:
        """Say where the training thread is; heartbeats carry it. Raises Overtaken when it has to leave."""

    def spent(self, sheet: Timesheet) -> None:
        """A step has been done; now and then it is said where all time went until then."""


@dataclass
class _Clock:
    """Time of the steps since the last look, without validations and checkpoints."""

    started: float = 0.0

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds


class Loop:
    """Runs one member's engine from the step it stands at to the last one, or to where the word says stop."""

    def __init__(self, engine: Engine, checkpoints: Path, link: Link) -> None:
        self.engine = engine
        self.job: Job = engine.job
        self.link = link
        self.root = checkpoints
        self.generation = self.saved = self.evaluated = 0
        self.records: dict[int, dict[str, Any]] = {}
        self.sheet = Timesheet()
        self.mark = self.sheet.mark()
        self._waiting: StepResult | None = None
        self._clock = _Clock()
        self._from = self._given_up = self._heard = 0

    def sit(self, generation: int, saved: int = 0, evaluated: int = 0) -> None:
        """The engine has a share of `generation`. Its steps are recorded so far; the newest complete checkpoint and the
        newest validation are of these steps."""
        self.generation, self.first = generation, self.engine.rank == 0
        self.saver = Saver(self.root, self.engine.rank, self.engine.layout.world, generation, self._part_written)
        self.saved, self.evaluated = saved, evaluated
        self._waiting = None
        self._go_on_from(self.engine.applied)

    def run(self) -> Finished | None:
        """Every rank of the world calls it. Returns when the last checkpoint of this rank is on storage; None when the
        world regroups. Raises Overtaken, and what a broken network raises."""
        reason, last = "done", self.job.training.steps
        self._clock.lap()
        self._catch_up()
        while self.engine.applied < last:
            outcome = self._step(self.engine.applied + 1)
            if outcome == "regroup":
                self.engine.settle()
                return None
            if outcome is not None:
                reason = outcome
                break
        self._finish()
        finished = Finished(self.engine.rank, self.engine.applied, reason, self.generation)
        self.link.send(finished)
        return finished

    def _catch_up(self) -> None:
        """Do what was due after the last step when the generation before this one ended."""
        step = self.engine.applied
        if step and self._is_validated(step) and self.evaluated < step:
            self._evaluate(step)
        if step and step % self.job.checkpoint.every_steps == 0 and self.saved < step:
            self._save(step)

    def _is_validated(self, step: int) -> bool:
        return step % self.job.training.eval_every_steps == 0 or step == self.job.training.steps

    def _step(self, step: int) -> str | None:
        """One step and what is due after it; the reason to leave, if there is one."""
        self.link.progress(step, "step")
        result = self._compute(step)
        self._commit_previous(result)
        if result.anomaly is not None and not self._act_on(result):
            return "anomaly"
        if self.engine.applied != step:
            return None  # rolled back
        self._waiting = self.note(result)
        if self._is_validated(step):
            self._evaluate(step)
        if step % self.job.checkpoint.every_steps == 0 or result.word & CHECKPOINT:
            self._save(step)
        if result.word & STOP:
            return "stopped"
        return "regroup" if result.word & REGROUP else None

    def _compute(self, step: int) -> StepResult:
        """The step itself, and where its time went."""
        groups, seconds = self.engine.groups, self.engine.groups[SECONDS].tap
        waited_s, exchanged_s = groups.waited_s, seconds.waited_s
        self.sheet.begin_step()
        self.mark = self.sheet.mark()
        parting = 0 if self._is_validated(step) else REGROUP
        try:
            result = self.engine.train_step(step, self.link.word() if self.first else 0, parting)
        except Exception:
            if self.engine.applied == step:  # applied, and the weights did not go round
                self.note(self.engine.last_result)
            raise
        self.sheet.add(Bucket.EXPOSED_COMMUNICATION, groups.waited_s - waited_s)
        self.sheet.add(Bucket.SNAPSHOT_STALL, seconds.waited_s - exchanged_s)
        self.sheet.end_step()
        self.link.spent(self.sheet)
        return result

    def note(self, result: StepResult | None) -> StepResult | None:
        """Keep what is to be said of an applied step until it is known to be written down: the first rank may not live
        to say it."""
        assert result is not None
        seconds = self._clock.lap()
        recorded = self._recorded()
        self.records = {step: record for step, record in self.records.items() if step > recorded}
        timing = {"step_s": seconds, "applied_at_s": time.time(), "world": float(self.engine.layout.world)}
        self.records[result.step] = {"step": result.step, "metrics": result.metrics() | timing}
        if len(self.records) > _MOST_RECORDS:
            text = f"the coordinator has written down none of the last {_MOST_RECORDS} steps: is its disk full?"
            raise RankFailure(text, rank=self.engine.rank)
        return result

    def _recorded(self) -> int:
        """The newest step whose record nobody will ask for.

        Of a step that is done a second time nobody knows which time is said to be written down, until a lower one is
        named, or one beyond all that were given up.
        """
        recorded = self.link.recorded
        if recorded < self._heard or recorded > self._given_up:
            self._given_up = 0
        self._heard = recorded
        return min(recorded, self._from) if self._given_up else recorded

    def _go_on_from(self, step: int) -> None:
        """What came after this step is given up, if anything did."""
        self._heard = self.link.recorded
        newest = max(self._given_up, self._heard, *self.records)
        if newest > step:
            self._from = min(self._from, step) if self._given_up else step
            self._given_up = newest
        self.records = {kept: record for kept, record in self.records.items() if kept <= step}

    def _commit_previous(self, result: StepResult) -> None:
        if self._waiting is not None and result.acknowledged:
            self._report_committed()

    def _report_committed(self) -> None:
        assert self._waiting is not None
        committed, self._waiting = self._waiting, None
        if self.first:
            self.link.send(Committed(committed.step, self.records[committed.step]["metrics"]))

    def _commit_now(self) -> None:
        """Ask the world at once rather than with the next step. Collective over the world."""
        if self._waiting is not None and self.engine.confirm():
            self._report_committed()

    def _evaluate(self, step: int) -> None:
        self.link.progress(step, "validation")
        with self.sheet.spend(Bucket.VALIDATION):
            self._commit_now()
            by_source = self.engine.evaluate_sources()
        evaluated = Evaluated(step, self.engine.weigh(by_source), by_source if len(by_source) > 1 else {})
        if self.first:
            self.link.send(evaluated)
        if step in self.records:
            self.records[step] |= {"validation_loss": evaluated.loss, "validation_by_source": evaluated.by_source}
        self.evaluated = step
        self._clock.lap()

    def _save(self, step: int) -> None:
        self.link.progress(step, "checkpoint")
        with self.sheet.spend(Bucket.CHECKPOINT_STALL):
            self._commit_now()
            self.saver.wait()
            self.saver.start(step, self.engine.state(), self.engine.facts())
        self.saved = step
        self._clock.lap()

    def _part_written(self, step: int, part: Part, facts: dict[str, Any]) -> None:
        self.link.send(PartWritten(part.rank, part.generation, step, facts))

    def keep(self, number: int, ranks: Iterable[int]) -> None:
        """Write a checkpoint of the last applied step under a number of its own: this rank's part and those of `ranks`,
        which are lost and of which it is second owner. The world stands still; no collective, and nobody is waited for.

        Whatever generation comes next writes under another number: each is complete by itself, or never.
        """
        engine = self.engine
        with self.sheet.spend(Bucket.CHECKPOINT_STALL):
            saver = Saver(self.root, engine.rank, engine.layout.world, number, self._part_written)
            others = {rank: engine.state(rank) for rank in ranks}
            saver.start(engine.applied, engine.state(), engine.facts(), others)

    def _finish(self) -> None:
        """Commit the last step and leave a checkpoint of it."""
        step = self.engine.applied
        self._commit_now()
        self.engine.settle()
        if self.saved != step and step > 0:
            self._save(step)
        self.link.progress(step, "last checkpoint")
        with self.sheet.spend(Bucket.CHECKPOINT_STALL):
            self.saver.wait()

    # -- anomalies ------------------------------------------------------------------------------------------------

    def _act_on(self, result: StepResult) -> bool:
        """Do what the job file says; False ends the run. Every rank sees the same anomaly and does the same."""
        anomaly = result.anomaly
        assert anomaly is not None
        if self.first:
            self.link.send(AnomalySeen(anomaly.step, anomaly.kind, anomaly.action, anomaly.detail))
        if anomaly.action == "skip":
            return True
        return anomaly.action == "roll_back" and self._roll_back(anomaly.step)

    def _roll_back(self, bad_step: int) -> bool:
        """Load the newest complete checkpoint and mark the bad step to be skipped; False when there is none."""
        self.link.progress(self.engine.applied, "loading")  # until the next step: storage may take its time
        self.saver.wait()
        to_step = self._newest_sound()
        if to_step is None:
            return False
        self.engine.load(checkpoint_folder(self.root, to_step), bad_step)
        self._waiting = None
        self.saved, self.evaluated = min(self.saved, to_step), min(self.evaluated, to_step)
        self._go_on_from(to_step)
        self.engine.confirm()  # nobody says so before everybody has
        if self.first:
            self.link.send(RolledBack(bad_step, to_step))
        self._clock.lap()
        return True

    def _newest_sound(self) -> int | None:
        """The first rank says which there are, newest first: others may see storage later than it does. All read their
        share of the files, and one in which anybody finds damage is passed over, by all."""
        there = [step_of(folder) for folder in list_checkpoints(self.root)] if self.first else []
        world = self.engine.groups.world
        while (step := self._sum((there.pop() if there else -1) if self.first else 0)) >= 0:
            folder, damage = checkpoint_folder(self.root, step), 0
            try:
                verify(folder, world.rank, world.size)
            except (CheckpointError, OSError) as error:
                log.warning("%s; %s is passed over", error, folder.name)
                damage = 1
            if not self._sum(damage):
                return step
            if self.first:
                discard(folder)
        return None

    def _sum(self, number: int) -> int:
        """Over the ranks."""
        given = torch.tensor([float(number)], dtype=torch.float64, device=self.engine.device)
        return int(all_reduce_sum(given, self.engine.groups.world).finish().item())
