"""When may a run that wrote no end be given one, and which?

A coordinator killed with its machine cannot say goodbye. Its lock is free then, and after a while in which a
restarted one would have come back, the next command that passes by writes the end into the events.
Imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

import time
from datetime import timedelta

from concertina.errors import NotFoundError, UserError
from concertina.track.events import Event, EventLog, EventType, read_events
from concertina.track.owner import Busy, OwnerLock, probe
from concertina.track.run import RunFolder
from concertina.track.summary import RunStatus, RunSummary, summarize

__all__ = ["RESTART_GRACE", "SILENCE", "claim", "close_if_lost", "lost_reason", "refuse_living"]

RESTART_GRACE = timedelta(seconds=60)
"""With proof that the writer is gone: so long may its replacement take to come."""
SILENCE = timedelta(minutes=15)
"""Without proof, because it ran on another machine: so long may a living run write nothing."""


def close_if_lost(folder: RunFolder, now_ns: int | None = None) -> RunStatus | None:
    """Write the missing end of a lost run; returns the status written, or None when there was nothing to do.

    Failed when its last words were an error, else killed. Does nothing while its writer may live.
    """
    summary = summarize(folder)
    reason = lost_reason(summary, time.time_ns() if now_ns is None else now_ns)
    if reason is None:
        return None
    error = _last_words(folder)
    status = RunStatus.FAILED if error else RunStatus.KILLED
    data = {
        "state": status.value,
        "reason": _first_line(error) if error else reason,
        "reason_code": "error" if error else "owner_gone",
        "ended_ns": summary.updated_ns,
        "written_by": "reconcile",
    }
    try:
        with EventLog(folder.events_file, folder.run_id, wait=timedelta(0)) as log:
            log.append(EventType.STATE, data, generation=summary.shape.generation, step=summary.progress.steps)
    except Busy:
        # Somebody came back, or another command closes it right now.
        return None
    return status


def lost_reason(summary: RunSummary, now_ns: int) -> str | None:
    """Why a run must be taken for dead, in one line; None while it is over or may live."""
    if summary.outcome.status.is_final:
        return None
    silent_s = (now_ns - summary.updated_ns) / 1e9
    owner = summary.owner
    # Nobody wrote yet: the one who made the folder may still be starting a cluster.
    gone = None if owner is None else owner.is_gone()
    if gone is False:
        return None
    bound = RESTART_GRACE if gone else SILENCE
    if silent_s < bound.total_seconds():
        return None
    who = f"process {owner.pid} on {owner.host}" if owner else "the process that made it"
    proof = "is gone" if gone else "has been silent"
    return f"{who} {proof} without a word since step {summary.progress.steps}, {silent_s:.0f} s ago"


def refuse_living(folder: RunFolder) -> None:
    """Raises UserError when a process is running this run now: a resume would be its second writer."""
    owner = probe(folder.owner_lock)
    if owner is not None and owner.is_gone() is False:
        raise _living(folder, owner.pid, owner.host)


def claim(folder: RunFolder) -> OwnerLock:
    """Be this run's only driver until the lock is released or the process dies: a cluster takes seconds to start, in
    which nobody writes events yet. Raises UserError when a process is running this run now, or is about to."""
    refuse_living(folder)
    try:
        return OwnerLock(folder.driver_lock)
    except Busy as busy:
        raise _living(folder, busy.data["pid"], busy.data["host"]) from None
    except FileNotFoundError:
        raise NotFoundError(f"run {folder.run_id} has just been given up by the process that made it") from None


def _living(folder: RunFolder, pid: int | None, host: str | None) -> UserError:
    return UserError(
        f"run {folder.run_id} is still being run by process {pid} on {host}: stop it first, or wait for its end",
        run_id=folder.run_id,
        pid=pid,
        host=host,
    )


def _first_line(error: Event) -> str:
    lines = str(error.data.get("message", "")).strip().splitlines()
    return lines[0][:500] if lines else "an error without a message"


def _last_words(folder: RunFolder) -> Event | None:
    """The newest error, unless the run went on after it."""
    error = None
    for event in read_events(folder.events_file):
        if event.type == EventType.ERROR:
            error = event
        elif event.type in (EventType.START, EventType.GENERATION, EventType.STEP):
            error = None
    return error
