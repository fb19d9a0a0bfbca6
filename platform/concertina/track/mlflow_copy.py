"""Which events become which MLflow calls, and how far has the copy come?

The queue is the event file itself; `mlflow.json` in the run's folder holds the offset up to which MLflow has
everything. Each (key, step) reaches MLflow once, whenever we are killed: what lies between the offset and the truth
is sent again only above the newest step MLflow has of that key, and with the event's own time, which makes a row
that is there already the same row. The ledger's points, of which a step may have several, lean on that last part alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from concertina.track.course import Course, Point
from concertina.track.events import Event, EventType, read_events
from concertina.track.mlflow_place import shown
from concertina.track.mlflow_run import MlflowRun, attach
from concertina.track.run import RunFolder, write_atomically

__all__ = ["Copier", "CopyState", "one_line", "unavailable"]

logger = logging.getLogger(__name__)

# MLflow takes 1000 a call; an event carries at most 16 and is not worth splitting.
_FULL = 985


@dataclass
class CopyState:
    """What `mlflow.json` holds: the events before byte `offset` are in MLflow."""

    uri: str
    mlflow_run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0
    facts_logged: bool = False

    @classmethod
    def load(cls, folder: RunFolder, uri: str) -> CopyState:
        """The stored state, or a fresh one for a store that never saw this run."""
        try:
            doc = json.loads(folder.mlflow_file.read_text())
            stored = cls(**{name: doc[name] for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError):
            return cls(uri)
        return stored if stored.uri == uri else cls(uri)

    def save(self, folder: RunFolder) -> None:
        write_atomically(folder.mlflow_file, json.dumps({"v": 1, **asdict(self)}) + "\n")


class Copier:
    """Brings MLflow up to the events. After any error, the next `copy` asks MLflow anew what it has."""

    def __init__(self, folder: RunFolder, uri: str, experiment: str) -> None:
        self.folder = folder
        self.uri = uri
        self.experiment = experiment
        self.state = CopyState(shown(uri))
        self._run: MlflowRun | None = None

    def copy(self, stopping: Callable[[], bool]) -> int:
        """Copy what there is, or until `stopping`; returns the number of events copied. Raises what MLflow raises."""
        run = self._run if self._run is not None else self._begin()
        self._run = None
        copied = 0
        for event in read_events(self.folder.events_file, self.state.offset):
            self._take(run, event)
            self._seen = event.end_offset
            copied += 1
            if len(self._points) >= _FULL:
                self._flush(run)
                if stopping():
                    break
        self._flush(run)
        self._run = run
        return copied

    def _begin(self) -> MlflowRun:
        state = CopyState.load(self.folder, shown(self.uri))
        run = attach(self.folder, self.uri, self.experiment, state.mlflow_run_id)
        if run.mlflow_run_id != state.mlflow_run_id:
            state = CopyState(shown(self.uri), run.mlflow_run_id, run.experiment_id)
            state.save(self.folder)
        self.state = state
        self._seen = state.offset
        self._points: list[tuple[Point, str | None]] = []
        self._tags: dict[str, str] = {}
        self._model: tuple[int, str] | None = None
        self._course = Course()
        for event in read_events(self.folder.events_file):
            if event.end_offset > state.offset:
                break
            self._course.observe(event)
        self._have = run.last_steps()
        if not state.facts_logged:
            self._log_facts(run)
        return run

    def _log_facts(self, run: MlflowRun) -> None:
        run.log_facts(self.folder)
        try:
            run.log_files(self.folder)
        except unavailable() as error:
            # A server's artifact store may want credentials or packages we lack; metrics do not need it.
            logger.warning("MLflow did not take job.yaml and versions.json as artifacts: %s", one_line(error))
        self.state.facts_logged = True
        self.state.save(self.folder)

    # -- one event ------------------------------------------------------------------------------------------------

    def _take(self, run: MlflowRun, event: Event) -> None:
        replayed, odd = len(self._course.replayed), len(self._course.nonfinite)
        for point in self._course.observe(event):
            have = self._have.get(point.key, point.step - 1)
            if point.is_state and point.step >= have:
                # MLflow may have this very row; or, of the same step, only an earlier one.
                self._points.append((point, None))
            elif point.step > have:
                self._points.append((point, self._model_of(point.step)))
        if len(self._course.replayed) > replayed:
            self._tags["concertina.replayed_steps"] = ", ".join(self._course.replayed)
        if len(self._course.nonfinite) > odd:
            self._tags["concertina.nonfinite"] = ", ".join(self._course.nonfinite)
        self._tags["concertina.last_event"] = _iso(event.ts_ns)
        if event.type in (EventType.CHECKPOINT, EventType.CHECKPOINT_REMOVED) and event.step is not None:
            self._flush(run)
            self._take_checkpoint(run, event, _step_of_folder(event, event.step))
        elif event.type in (EventType.START, EventType.STATE):
            self._flush(run)
            self._take_state(run, event)

    def _model_of(self, step: int) -> str | None:
        return self._model[1] if self._model is not None and self._model[0] == step else None

    def _take_checkpoint(self, run: MlflowRun, event: Event, step: int) -> None:
        if event.type == EventType.CHECKPOINT_REMOVED:
            run.remove_checkpoint(step)
            return
        path = self.folder.path / str(event.data.get("path", f"checkpoints/step-{step:08d}"))
        names = ("tokens", "layout", "world", "bytes")
        facts = {name: event.data[name] for name in names if event.data.get(name) is not None}
        facts.setdefault("tokens", self._course.tokens_at(step))
        model_id = run.save_checkpoint(step, path.as_uri(), {**facts, "generation": event.generation})
        self._model = (step, model_id)
        losses = [point for point in self._course.recent.get(step, ()) if point.key.endswith("/loss")]
        if losses:
            # The same rows once more, now measuring the model as well.
            run.log_points([(point, model_id) for point in losses], {})

    def _take_state(self, run: MlflowRun, event: Event) -> None:
        state = str(event.data.get("state", "running"))
        names = ("reason", "reason_code")
        self._tags["concertina.state"] = state
        self._tags |= {f"concertina.{name}": str(event.data[name]) for name in names if event.data.get(name)}
        if event.type == EventType.START:
            self._tags["concertina.sessions"] = str(self._course.sessions)
            if event.data.get("emulated_compute"):
                self._tags["concertina.emulated_compute"] = "true"
            if self._course.sessions > 1:
                self._log_facts(run)
        run.set_status(state, int(event.data.get("ended_ns") or event.ts_ns) // 1_000_000)

    def _flush(self, run: MlflowRun) -> None:
        if self._points or self._tags:
            run.log_points(self._points, self._tags)
            self._points, self._tags = [], {}
        if self.state.offset != self._seen:
            self.state.offset = self._seen
            self.state.save(self.folder)


def _step_of_folder(event: Event, step: int) -> int:
    """The checkpoint an event is about: a removal is reported at the step of the one that replaced it."""
    digits = str(event.data.get("path", "")).rpartition("step-")[2]
    return int(digits) if digits.isdecimal() else step


def unavailable() -> tuple[type[BaseException], ...]:
    """What is raised when MLflow is down, slow, full, or answers nonsense: its own errors, its database's, the
    network's (OSError), and those of reading an answer that is not one. Imports mlflow."""
    from google.protobuf.json_format import Error as MalformedAnswer  # type: ignore[import-untyped]
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    nonsense = (MalformedAnswer, ValueError, LookupError, TypeError)
    # RuntimeError: its thread pools refuse work while the interpreter goes down.
    return (MlflowException, SQLAlchemyError, OSError, ImportError, RuntimeError, *nonsense)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _iso(ts_ns: int) -> str:
    return datetime.fromtimestamp(ts_ns // 1_000_000_000, UTC).isoformat()
