"""How is a run doing, or how did it end? Answered from its files alone: no cluster, no MLflow.

Imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from concertina.elastic.account import Account
from concertina.track.events import Event, EventType, read_events, void_after
from concertina.track.ledger import LedgerTally
from concertina.track.owner import Owner, probe
from concertina.track.recovery import Recovery
from concertina.track.run import RunFolder

__all__ = ["CheckpointFacts", "MlflowCopy", "Outcome", "Progress", "RunStatus", "RunSummary", "Shape", "summarize"]

_SHOWN_RECOVERIES = 10


class RunStatus(StrEnum):
    """What a run is, for a person. All but the first three are final."""

    CREATED = "created"
    """A folder, and no event yet."""
    RUNNING = "running"
    LOST = "lost"
    """Its process is gone and wrote no end. `track.status.close_if_lost` turns this into killed or failed."""
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    KILLED = "killed"

    @property
    def is_final(self) -> bool:
        return self not in (RunStatus.CREATED, RunStatus.RUNNING, RunStatus.LOST)


@dataclass(frozen=True)
class Outcome:
    """`state` is the controller's word, `reason` one line for a person."""

    status: RunStatus
    state: str
    reason: str
    reason_code: str


@dataclass(frozen=True)
class Progress:
    """Of the steps that stand: what a resume or a roll-back did again counts once. Losses are the newest."""

    steps: int
    target_steps: int | None
    train_loss: float | None
    val_loss: float | None
    evaluations: tuple[tuple[int, float], ...]
    tokens: int
    step_seconds: float
    seconds: float
    """Wall clock of all sessions."""

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.step_seconds if self.step_seconds > 0 else None


@dataclass(frozen=True)
class Shape:
    """The newest membership. `emulates_compute`: its ranks waited instead of computing, in some session at least."""

    world: int | None
    layout: Mapping[str, Any] | None
    generation: int
    emulates_compute: bool = False


@dataclass(frozen=True)
class CheckpointFacts:
    """A complete checkpoint that is there now."""

    step: int
    path: str
    bytes: int


@dataclass(frozen=True)
class MlflowCopy:
    """Which MLflow run mirrors this one, and how many bytes of events it has not got yet."""

    run_id: str | None
    experiment_id: str | None
    uri: str | None
    behind_bytes: int


@dataclass(frozen=True)
class RunSummary:
    """All that `concertina runs show` knows."""

    run_id: str
    name: str
    created_ns: int
    updated_ns: int
    outcome: Outcome
    progress: Progress
    shape: Shape
    checkpoints: tuple[CheckpointFacts, ...]
    mlflow: MlflowCopy
    owner: Owner | None
    resumes: int
    anomalies: int
    num_events: int
    ledger: Account | None = None
    """Where the time of all sessions' members went; None when no coordinator has written it yet."""
    recoveries: tuple[tuple[int, Recovery], ...] = ()
    """(time in ns, what) of the newest ten."""
    num_recoveries: int = 0

    @property
    def tokens_per_usd(self) -> float | None:
        usd = self.ledger.usd if self.ledger is not None else None
        return self.progress.tokens / usd if usd else None

    @property
    def steps_per_usd(self) -> float | None:
        usd = self.ledger.usd if self.ledger is not None else None
        return self.progress.steps / usd if usd else None


def summarize(folder: RunFolder) -> RunSummary:
    """Read the whole event file (about 10 us a line) and the few small ones beside it."""
    tally = _Tally()
    for event in read_events(folder.events_file):
        tally.add(event)
    created_ns = int(folder.versions().get("created_ns") or folder.path.stat().st_mtime_ns)
    owner = probe(folder.owner_lock)
    training = folder.job_document().get("training") or {}
    return RunSummary(
        run_id=folder.run_id,
        name=str(folder.job_document().get("name", folder.run_id)),
        created_ns=created_ns,
        updated_ns=max(created_ns, tally.last_ns),
        outcome=tally.outcome(owner),
        progress=tally.progress(training.get("steps")),
        shape=Shape(tally.world, tally.layout, tally.generation, tally.emulates_compute),
        checkpoints=_checkpoints(folder.checkpoints),
        mlflow=_mlflow(folder),
        owner=owner,
        resumes=max(0, tally.sessions - 1),
        anomalies=tally.anomalies,
        num_events=tally.num_events,
        ledger=tally.ledger.total(),
        recoveries=tuple(tally.recoveries),
        num_recoveries=tally.num_recoveries,
    )


@dataclass
class _Tally:
    """Grows event by event. Steps and evaluations are kept by number, so that a void can take them back."""

    num_events: int = 0
    last_ns: int = 0
    sessions: int = 0
    anomalies: int = 0
    world: int | None = None
    layout: Mapping[str, Any] | None = None
    generation: int = 0
    state: str = ""
    reason: str = ""
    reason_code: str = ""
    session_start_ns: int = 0
    session_end_ns: int = 0
    past_sessions_ns: int = 0
    steps: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    """step -> loss, tokens, seconds."""
    evaluations: dict[int, float] = field(default_factory=dict)
    ledger: LedgerTally = field(default_factory=LedgerTally)
    recoveries: deque[tuple[int, Recovery]] = field(default_factory=lambda: deque(maxlen=_SHOWN_RECOVERIES))
    num_recoveries: int = 0
    emulates_compute: bool = False

    def add(self, event: Event) -> None:
        self.num_events += 1
        self.ledger.add(event)
        self.generation = max(self.generation, event.generation)
        if event.type == EventType.START or not self.session_start_ns:
            self._begin_session(event)
        self.last_ns = event.ts_ns
        self.session_end_ns = int(event.data.get("ended_ns") or event.ts_ns)
        kept = void_after(event)
        if kept is not None:
            self.steps = {step: facts for step, facts in self.steps.items() if step <= kept}
            self.evaluations = {step: loss for step, loss in self.evaluations.items() if step <= kept}
        self._take(event)

    def _begin_session(self, event: Event) -> None:
        self.past_sessions_ns += self.session_end_ns - self.session_start_ns
        self.session_start_ns = event.ts_ns
        self.sessions += event.type == EventType.START
        self.state, self.reason, self.reason_code = "", "", ""

    def _take(self, event: Event) -> None:
        data = event.data
        if event.type == EventType.STEP and event.step is not None:
            facts = (float(data.get(name) or 0.0) for name in ("loss", "tokens", "step_s"))
            self.steps[event.step] = tuple(facts)  # type: ignore[assignment]
        elif event.type == EventType.EVAL and event.step is not None and "loss" in data:
            self.evaluations[event.step] = float(data["loss"])
        elif event.type == EventType.STATE:
            self.state = str(data.get("state", ""))
            self.reason, self.reason_code = str(data.get("reason", "")), str(data.get("reason_code", ""))
        elif event.type == EventType.ANOMALY:
            self.anomalies += 1
        elif event.type == EventType.RECOVERY:
            self._recover(event)
        self.emulates_compute |= bool(data.get("emulated_compute"))
        if event.type in (EventType.START, EventType.GENERATION):
            self.world = data.get("world", self.world)
            self.layout = data.get("layout", self.layout)

    def _recover(self, event: Event) -> None:
        self.num_recoveries += 1
        try:
            found = Recovery.from_json(event.data)
        except TypeError:
            return  # of another version: counted, not told
        self.recoveries.append((event.ts_ns, found))
        self.world, self.layout = found.world_after, found.layout or self.layout

    def outcome(self, owner: Owner | None) -> Outcome:
        """A final state is believed; anything else only while somebody lives who can change it."""
        try:
            status = RunStatus(self.state)
        except ValueError:
            status = RunStatus.RUNNING
        if not status.is_final:
            gone = owner is None or owner.is_gone() is True
            status = RunStatus.CREATED if not self.num_events else RunStatus.LOST if gone else RunStatus.RUNNING
        reason = self.reason
        if status == RunStatus.LOST:
            who = f"process {owner.pid} on {owner.host}" if owner else "its process"
            reason = f"{who} is gone and wrote no end"
        return Outcome(status, self.state, reason, self.reason_code)

    def progress(self, target_steps: int | None) -> Progress:
        newest = max(self.steps, default=0)
        evaluations = tuple(sorted(self.evaluations.items()))
        wall_ns = self.past_sessions_ns + self.session_end_ns - self.session_start_ns
        return Progress(
            steps=newest,
            target_steps=target_steps,
            train_loss=self.steps[newest][0] if newest else None,
            val_loss=evaluations[-1][1] if evaluations else None,
            evaluations=evaluations,
            tokens=int(sum(tokens for _, tokens, _ in self.steps.values())),
            step_seconds=sum(seconds for _, _, seconds in self.steps.values()),
            seconds=wall_ns / 1e9,
        )


def _checkpoints(root: Path) -> tuple[CheckpointFacts, ...]:
    """The folders are the truth here, not the events: a kill may have come between the two."""
    found = []
    for manifest in sorted(root.glob("step-*/manifest.json")):
        try:
            doc = json.loads(manifest.read_text())
            num_bytes = sum(int(record["bytes"]) for record in doc["files"].values())
            found.append(CheckpointFacts(int(doc["step"]), str(manifest.parent), num_bytes))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Unreadable: `concertina ckpt verify` says why; here it is simply not one to resume from.
            continue
    return tuple(found)


def _mlflow(folder: RunFolder) -> MlflowCopy:
    try:
        size = folder.events_file.stat().st_size
    except FileNotFoundError:
        size = 0
    try:
        doc = json.loads(folder.mlflow_file.read_text())
        behind = max(0, size - int(doc["offset"]))
        return MlflowCopy(doc["mlflow_run_id"], doc["experiment_id"], doc["uri"], behind)
    except (OSError, ValueError, KeyError, TypeError):
        return MlflowCopy(None, None, None, size)
