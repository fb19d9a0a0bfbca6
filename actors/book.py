"""What does the coordinator know of a run, and what does it write down? Messages in, events and checkpoints out.

Tested without Ray. A session of a run begins at the step of a checkpoint; each step after it is recorded once, also
when the coordinator restarts and ranks say again what it may have missed. Rolling back voids what came after.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.last_session import read_last_session
from concertina.elastic.messages import (
    AnomalySeen,
    Committed,
    Evaluated,
    Finished,
    Message,
    PartWritten,
    RankError,
    RolledBack,
)
from concertina.elastic.states import RunEvent, transition
from concertina.errors import CheckpointError
from concertina.state.manifest import Manifest, checkpoint_folder, commit, list_checkpoints, prune, read_manifest
from concertina.track.events import EventLog, EventType, read_events

__all__ = ["Book"]

log = logging.getLogger("concertina.coordinator")


class Book:
    """One run's state, generation after generation. Any thread may call; one at a time is let in. Only `record` is one
    thread's: it completes and removes checkpoints, for which nobody else waits.

    What `record` has taken in is on storage when it returns: the channel acknowledges a message by that.
    """

    def __init__(self, log: EventLog, checkpoints: Path, keep: int) -> None:
        self._mutex = threading.RLock()
        self.log, self.checkpoints = log, checkpoints
        self.world, self.keep = 0, keep
        past = read_last_session(log.path)
        self.generation = past.generation
        self.state, self.reason, self._exit_code = past.state, past.reason, past.exit_code
        self._written = past.written
        self.step = self._written.get(EventType.STEP, 0)
        self.stop_reason = past.reason or "asked to stop"
        self.finished: dict[int, Finished] = {}
        self.errors: list[RankError] = []
        # Where what is heard queues to be recorded: wait for all of it, and do something after it and before the rest.
        self.catch_up: Callable[[], object] = lambda: None
        self.in_turn: Callable[[Callable[[], None]], None] = lambda job: job()
        self._handlers: dict[type[Message], Callable[[Any], None]] = {
            Committed: self._on_committed,
            Evaluated: self._on_evaluated,
            AnomalySeen: self._on_anomaly,
            RolledBack: self._on_rolled_back,
            Finished: self._on_finished,
            RankError: self.errors.append,
        }
        self._tell_untold()

    def event(self, kind: EventType, step: int | None = None, /, **data: Any) -> None:
        """Append one event of this generation."""
        self.log.append(kind, data, generation=self.generation, step=step)

    def move(self, event: RunEvent, reason: str = "", /, **data: Any) -> None:
        """Make one transition and record it, if it is one."""
        with self._mutex:
            state = transition(self.state, event)
            if state is self.state:
                return
            self.state, self.reason = state, reason
            self._exit_code = data.get("exit_code")
            self.event(EventType.STATE, self.step, state=state.value, reason=reason, **data)

    def takes(self, message: Message) -> bool:
        """Whether it is one to be recorded; the others are for whoever makes generations."""
        return isinstance(message, PartWritten) or type(message) in self._handlers

    def record(self, message: Message) -> None:
        """Take in one message of a rank."""
        if isinstance(message, PartWritten):
            self._on_part(message)
            return
        with self._mutex:
            self._handlers[type(message)](message)

    def sit(self, generation: int, world: int, step: int) -> None:
        """A generation of so many ranks has formed and goes on after `step`."""
        with self._mutex:
            self.generation, self.world = generation, world
            self.step = max(self.step, step)

    def fill(self, records: list[dict[str, Any]], step: int) -> None:
        """Write down what a first rank did not live to say of the steps up to `step`, which is kept."""
        with self._mutex:
            for record in sorted(records, key=lambda record: record["step"]):
                if record["step"] <= step:
                    self._on_committed(Committed(record["step"], record["metrics"]))
                if record["step"] <= step and "validation_loss" in record:
                    by_source = record.get("validation_by_source", {})
                    self._on_evaluated(Evaluated(record["step"], record["validation_loss"], by_source))

    def stand(self, step: int, records: list[dict[str, Any]]) -> None:
        """Everybody stands at `step`, and goes on from there: later steps are void, of earlier ones nothing is missing.
        To be called in turn: what members say of steps they do from now on comes after it."""
        with self._mutex:
            if step < max(self.recorded, self.step):
                self.go_back(step)
            self.fill(records, step)

    def go_back(self, step: int) -> None:
        """Steps after this one are void: they are done again."""
        with self._mutex:
            self.event(EventType.ROLLBACK, self.step, to_step=step)
            self.step = step
            checkpoint = min(step, self.newest_checkpoint())  # one that was found damaged does not count
            self._written |= {EventType.STEP: step, EventType.EVAL: step, EventType.CHECKPOINT: checkpoint}

    @property
    def recorded(self) -> int:
        """The newest committed step that is written down."""
        return self._written.get(EventType.STEP, 0)

    def newest_checkpoint(self) -> int:
        """Its step; 0 when there is none."""
        return self._written.get(EventType.CHECKPOINT, 0)

    @property
    def exit_code(self) -> int:
        """Of the command that waits for the run: its failure's, if that has one, else its state's."""
        return self.state.exit_code if self._exit_code is None else self._exit_code

    @property
    def is_finishing(self) -> bool:
        """Whether a rank of the generation has left in order, as the others will."""
        return any(message.generation >= self.generation for message in list(self.finished.values()))

    @property
    def all_finished(self) -> bool:
        of_this = [message for message in self.finished.values() if message.generation == self.generation]
        return len(of_this) == self.world > 0

    def _tell_checkpoint(self, manifest: Manifest) -> None:
        self._written[EventType.CHECKPOINT] = max(manifest.step, self.newest_checkpoint())
        path = f"checkpoints/{checkpoint_folder(self.checkpoints, manifest.step).name}"
        facts = {key: manifest.facts[key] for key in ("tokens", "layout") if key in manifest.facts}
        self.event(EventType.CHECKPOINT, manifest.step, path=path, bytes=manifest.bytes, **facts)

    def _tell_untold(self) -> None:
        """Checkpoints that were completed by a coordinator which died before it said so, or by ranks that had none."""
        told = {event.data.get("path") for event in read_events(self.log.path) if event.type == EventType.CHECKPOINT}
        for folder in list_checkpoints(self.checkpoints):
            if f"checkpoints/{folder.name}" not in told:
                self._tell_checkpoint(read_manifest(folder))

    # -- one handler a message ------------------------------------------------------------------------------------

    def _on_committed(self, message: Committed) -> None:
        if message.step > self.recorded:
            if message.step > self.recorded + 1:
                log.error("nobody said what came of steps %d to %d", self.recorded + 1, message.step - 1)
            self.step = message.step
            self._written[EventType.STEP] = message.step
            self.event(EventType.STEP, message.step, **message.metrics)

    def _on_evaluated(self, message: Evaluated) -> None:
        if message.step > self._written.get(EventType.EVAL, 0):
            self._written[EventType.EVAL] = message.step
            more = {"by_source": message.by_source} if message.by_source else {}
            self.event(EventType.EVAL, message.step, loss=message.loss, **more)

    def _on_part(self, message: PartWritten) -> None:
        try:
            manifest = commit(self.checkpoints, message.step, message.generation, message.facts)
        except (CheckpointError, OSError) as error:
            self.event(EventType.ERROR, message.step, message=str(error), rank=message.rank, traceback="")
            return
        if manifest is None:
            return
        with self._mutex:
            if message.step == self._written.get(EventType.CHECKPOINT):
                return
            self._tell_checkpoint(manifest)
        for gone in prune(self.checkpoints, self.keep):
            self.event(EventType.CHECKPOINT_REMOVED, message.step, path=f"checkpoints/{gone.name}")

    def _on_anomaly(self, message: AnomalySeen) -> None:
        self.event(EventType.ANOMALY, message.step, kind=message.anomaly, action=message.action, detail=message.detail)

    def _on_rolled_back(self, message: RolledBack) -> None:
        self.step = message.from_step
        self.go_back(message.to_step)

    def _on_finished(self, message: Finished) -> None:
        # A quick rank may be done before a slow one has said that its generation has formed.
        if message.generation >= self.generation:
            self.finished[message.rank] = message
        self.end_if_finished()

    def end_if_finished(self) -> None:
        """The run is over when every rank of the generation has left."""
        with self._mutex:
            if not self.all_finished:
                return
            last = next(message for message in self.finished.values() if message.generation == self.generation)
            if last.reason == "done":
                self.move(RunEvent.DONE)
            elif last.reason == "stopped":
                self.move(RunEvent.LEFT, self.stop_reason)
            else:
                self.move(RunEvent.FAILURE, f"the anomaly policy stopped the run at step {last.step}")
