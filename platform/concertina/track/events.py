"""What happened in a run, in which order? One JSON line an event, appended to the run's events.jsonl.

The events are the truth; MLflow, summaries and dashboards are copies made from them. Schema, version 1:

    {"v":1,"ts_ns":..,"run_id":"..","seq":0,"type":"step","generation":0,"step":1,"data":{...}}

`seq` counts from 0 over the run's whole life, resumes included. Readers ignore fields and types they do not know.
JSON has no NaN or infinity: such a value is written as the string "NaN", "Infinity" or "-Infinity", which float()
reads back. Imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from concertina.errors import ConcertinaError
from concertina.track.owner import Busy, OwnerLock

__all__ = ["SCHEMA_VERSION", "Event", "EventLog", "EventType", "last_event", "read_events", "void_after"]

SCHEMA_VERSION = 1
_TAIL_BYTES = 65536


class EventType(StrEnum):
    """The types we write, and the `data` each carries. Others may appear; readers let them pass."""

    START = "start"
    """A session of the run begins: world, layout, resumed_from_step (None in the first session, 0 when there
    was no checkpoint yet). Steps after resumed_from_step are void from here on: they are done again."""
    GENERATION = "generation"
    """A new membership: world, layout, reason."""
    STATE = "state"
    """state (a controller state, or finished, failed, stopped, killed), reason, reason_code."""
    STEP = "step"
    """A committed step: loss, aux_loss, z_loss, grad_norm, learning_rate, tokens (of this step), step_s,
    imbalance, applied_at_s (Unix time at its first rank), world (ranks that computed it). `step` counts optimizer steps
    done, so the first is 1."""
    EVAL = "eval"
    """Validation: loss; of a mixture also by_source, the loss of each source by its name."""
    CHECKPOINT = "checkpoint"
    """A complete one: path (under the run's folder), bytes, tokens, layout, seconds."""
    CHECKPOINT_REMOVED = "checkpoint_removed"
    """An older one was deleted: path."""
    ROLLBACK = "rollback"
    """to_step: steps after it are void from here on."""
    ANOMALY = "anomaly"
    """kind, value, action."""
    ERROR = "error"
    """message, rank, traceback."""
    LEDGER = "ledger"
    """Where the session's time went so far, at changes of membership, at its end, and in between at most every 30 s:
    seconds (of members, by bucket of `elastic.account.Bucket`), total_s (their wall clock, measured apart), goodput,
    missing_s (of ranks that were wanted and not there: not in the total), members (that lived), usd (None without a
    price). The newest of a session counts, and sessions add up (`track.ledger`)."""
    RECOVERY = "recovery"
    """The run went on with other members: generation, cause (member, rank, node, reason), detected_s (from the fault
    to the decision), phases (halt_s, prepare_s, move_s, resume_s), stall_s (from the fault to the first step), step
    (the newest applied, kept), steps_completed (that were under way and were finished, not done again), bytes_local
    and bytes_moved (state copied inside and between members), world_before, world_after, layout
    (`track.recovery.Recovery`)."""
    HEARTBEATS = "heartbeats"
    """At a session's end, the gaps between heartbeats as its coordinator saw them since it started: training and busy,
    each by member: longest_s, buckets (`elastic.channel.Gaps`)."""
    NOTICE = "notice"
    """What a cloud or Ray says of a node's end: node, source, left_s (None: it is taken back), text, is_hint
    (`elastic.notices.NoticeNews`)."""
    STRAGGLER = "straggler"
    """A member is slower than its like, or what was done about it has been measured: member, factor, step_s, remedy
    (replace, rebalance, evict, or empty), expected_s, measured_s (`elastic.stragglers.StragglerNews`)."""
    MEMBER = "member"
    """One process of the run: member, node, pid, what (born, ready, lost, left, spare), reason."""


@dataclass(frozen=True)
class Event:
    """One line. `end_offset` is the byte after it: read_events(path, event.end_offset) goes on from there."""

    ts_ns: int
    run_id: str
    seq: int
    type: str
    generation: int
    step: int | None
    data: Mapping[str, Any]
    end_offset: int
    v: int = SCHEMA_VERSION


class EventLog:
    """The one writer of a run's events; every thread of its process may append.

    Takes `<path>.lock`: a second writer raises ConcertinaError with the first one's pid. A last line torn by a
    kill is cut off before the first append. One write(2) a line and no fsync: a killed process loses nothing, a
    machine that loses power may lose its last seconds, and a checkpoint fsyncs its own files.
    """

    def __init__(self, path: Path, run_id: str, wait: timedelta = timedelta(seconds=2)) -> None:
        self.path = path
        self.run_id = run_id
        self._mutex = threading.Lock()
        self._lock = _own(path, run_id, wait)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = _cut_torn_tail(self._fd)
            last = last_event(path)
        except BaseException:
            self._lock.release()
            raise
        self._next_seq = 0 if last is None else last.seq + 1

    def append(
        self, kind: str, data: Mapping[str, Any] | None = None, *, generation: int = 0, step: int | None = None
    ) -> int:
        """Write one event, return its seq. Raises ConcertinaError when the disk refuses, TypeError on data that
        is not JSON."""
        body = _dumps(data or {})
        with self._mutex:
            seq = self._next_seq
            line = (
                f'{{"v":{SCHEMA_VERSION},"ts_ns":{time.time_ns()},"run_id":{json.dumps(self.run_id)},"seq":{seq},'
                f'"type":{json.dumps(str(kind))},"generation":{generation},'
                f'"step":{"null" if step is None else int(step)},"data":{body}}}\n'
            )
            self._write(line.encode())
            self._next_seq = seq + 1
        return seq

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes were taken")
        except OSError as error:
            # A torn line in the middle would swallow the next one.
            os.ftruncate(self._fd, self._size)
            raise ConcertinaError(
                f"cannot append {len(line)} bytes to {self.path}: {error}; free space or mend the folder",
                path=str(self.path),
            ) from error
        self._size += len(line)

    def close(self) -> None:
        """Let the next writer in; a second call does nothing."""
        with self._mutex:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                self._lock.release()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path, offset: int = 0) -> Iterator[Event]:
    """The complete events from byte `offset` on (0, or an event's end_offset).

    A torn last line is left for the next call, a line that is not an event is passed over, a missing file is
    empty. To follow a growing file, call again with the last end_offset.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            event = _parse(line, offset)
            if event is not None:
                yield event


def void_after(event: Event) -> int | None:
    """The step after which everything before this event is void, because it is done again; None for most."""
    if event.type == EventType.START:
        return _as_step(event.data.get("resumed_from_step"))
    if event.type == EventType.ROLLBACK:
        return _as_step(event.data.get("to_step"))
    return None


def last_event(path: Path) -> Event | None:
    """The newest complete event, read from the end; None when there is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        end = file.seek(0, os.SEEK_END)
        block = _TAIL_BYTES
        while True:
            start = max(0, end - block)
            file.seek(start)
            # The piece before the first newline may be half a line, unless it is the file's start.
            *lines, torn = file.read(end - start).split(b"\n")
            offset = end - len(torn)
            for line in reversed(lines if start == 0 else lines[1:]):
                event = _parse(line, offset)
                if event is not None:
                    return event
                offset -= len(line) + 1
            if start == 0:
                return None
            block *= 4


def _own(path: Path, run_id: str, wait: timedelta) -> OwnerLock:
    try:
        return OwnerLock(path.with_suffix(".lock"), wait)
    except Busy as busy:
        raise Busy(
            f"run {run_id} is still being run by process {busy.data['pid']} on {busy.data['host']}: "
            "stop it first, or wait for its end",
            **busy.data,
        ) from busy


def _cut_torn_tail(fd: int) -> int:
    """Drop what follows the last newline; returns the file's size."""
    size = end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
    return end


def _parse(line: bytes, end_offset: int) -> Event | None:
    try:
        doc = json.loads(line)
        step = doc.get("step")
        return Event(
            ts_ns=int(doc["ts_ns"]),
            run_id=str(doc["run_id"]),
            seq=int(doc["seq"]),
            type=str(doc["type"]),
            generation=int(doc.get("generation", 0)),
            step=None if step is None else int(step),
            data=dict(doc.get("data") or {}),
            end_offset=end_offset,
            v=int(doc.get("v", SCHEMA_VERSION)),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        # Zeros after a power loss, or a line of someone else's: no event, and no reason to stop reading.
        return None


def _as_step(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _dumps(data: Mapping[str, Any]) -> str:
    try:
        return json.dumps(data, allow_nan=False, separators=(",", ":"), default=_plain)
    except ValueError:
        return json.dumps(_spell(data), allow_nan=False, separators=(",", ":"), default=_plain)


def _spell(value: Any) -> Any:
    """The same data with non-finite numbers spelled out."""
    if isinstance(value, Mapping):
        return {str(key): _spell(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spell(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _plain(value: Any) -> Any:
    """JSON's idea of the few other things that end up in events: paths, enums, numpy and torch scalars."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "item"):
        return _spell(value.item())
    raise TypeError(f"{type(value).__name__} {value!r} cannot stand in an event: give numbers, texts, lists, maps")
