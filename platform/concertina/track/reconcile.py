"""Does MLflow say of each run what its events say, and has each dead run an end? If not, make it so.

Called by resume, by `concertina runs show --sync`, and by the next `concertina train` for all runs of its storage.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from concertina.track.mlflow_place import tracking_uri
from concertina.track.mlflow_sink import MlflowSink
from concertina.track.owner import probe
from concertina.track.run import RunFolder, list_runs
from concertina.track.status import close_if_lost, lost_reason
from concertina.track.summary import RunStatus, summarize

__all__ = ["Reconciled", "reconcile", "reconcile_all", "store_of"]


@dataclass(frozen=True)
class Reconciled:
    """`closed` is the end that was written, if one was missing; `complete` whether MLflow has every event."""

    closed: RunStatus | None
    complete: bool
    note: str = ""


def reconcile(folder: RunFolder, timeout: timedelta = timedelta(seconds=30)) -> Reconciled:
    """Close a lost run and send what MLflow has not got, for at most `timeout`.

    Leaves a living run alone: its own sink does it. Imports mlflow only when there is something to send.
    """
    closed = close_if_lost(folder)
    if summarize(folder).mlflow.behind_bytes == 0:
        return Reconciled(closed, True)
    copying = probe(folder.copy_lock)
    if copying is not None and copying.held:
        return Reconciled(closed, False, f"process {copying.pid} on {copying.host} is sending them")
    uri, experiment = store_of(folder)
    complete = MlflowSink(folder, uri, experiment).start().close(timeout)
    return Reconciled(closed, complete, "" if complete else f"{uri} did not take them within the time")


def reconcile_all(storage: Path, timeout: timedelta = timedelta(minutes=2)) -> dict[str, Reconciled]:
    """The same for each run that is lost, or over and not all in MLflow; what was done, by run id."""
    deadline = time.monotonic() + timeout.total_seconds()
    done = {}
    for folder in list_runs(storage):
        left_s = deadline - time.monotonic()
        if left_s > 0 and _needs_it(folder):
            done[folder.run_id] = reconcile(folder, timedelta(seconds=left_s))
    return done


def store_of(folder: RunFolder) -> tuple[str, str]:
    """Tracking URI and experiment of a run: where its job says, else where its copy is, else the default.

    Raises ConfigError for a store we do not write to.
    """
    tracking = folder.job_document().get("tracking") or {}
    uri = tracking.get("tracking_uri") or _where_its_copy_is(folder)
    return tracking_uri(uri, folder.storage), str(tracking.get("experiment_name", "concertina"))


def _where_its_copy_is(folder: RunFolder) -> str | None:
    """The stored URI, unless it lost a password on its way there, or names a database that has been moved away."""
    stored = summarize(folder).mlflow.uri
    if stored is None or "***@" in stored:
        return None
    if stored.startswith("sqlite:///") and not Path(stored.removeprefix("sqlite:///")).exists():
        return None
    return stored


def _needs_it(folder: RunFolder) -> bool:
    summary = summarize(folder)
    if lost_reason(summary, time.time_ns()) is not None:
        return True
    return summary.outcome.status.is_final and summary.mlflow.behind_bytes > 0
