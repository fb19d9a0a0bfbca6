"""Who copies the events into MLflow while the run goes on, and what happens when MLflow does not answer?

A thread beside the coordinator. Nothing waits for it, nothing it meets is raised into training: it logs one line
when MLflow goes away and one when it is back, tries again after a bounded pause, and what it leaves undone a later
`reconcile` completes, because the queue is the event file itself.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from datetime import timedelta

from concertina.track.mlflow_copy import Copier, one_line, unavailable
from concertina.track.mlflow_place import shown
from concertina.track.owner import Busy, OwnerLock
from concertina.track.run import RunFolder

__all__ = ["MlflowSink", "Pace"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How often the sink looks, and how long it pauses after a failure: doubling from first to most."""

    poll: timedelta = timedelta(seconds=2)
    first_pause: timedelta = timedelta(seconds=1)
    most_pause: timedelta = timedelta(seconds=60)


class MlflowSink:
    """One run's copy into MLflow. `start` returns at once; `close` is bounded."""

    def __init__(self, folder: RunFolder, uri: str, experiment: str, pace: Pace | None = None) -> None:
        self.folder = folder
        self.uri = shown(uri)
        self._pace = pace or Pace()
        self._copier = Copier(folder, uri, experiment)
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._complete = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name=f"mlflow-{folder.run_id}", daemon=True)

    def start(self) -> MlflowSink:
        """Begin copying in the background."""
        self._thread.start()
        return self

    def close(self, timeout: timedelta) -> bool:
        """Copy what was appended before this call, for at most `timeout`; whether MLflow has it all."""
        self._closing.set()
        self._thread.join(timeout.total_seconds())
        self._given_up.set()
        if not self._complete:
            logger.warning(
                "MLflow at %s has not taken all events of run %s; nothing is lost, `concertina runs show %s --sync` "
                "completes it",
                self.uri,
                self.folder.run_id,
                self.folder.run_id,
            )
        return self._complete

    @property
    def is_down(self) -> bool:
        """Whether the last try failed."""
        return self._failures > 0

    def _run(self) -> None:
        try:
            failures = (*unavailable(), Busy)
        except ImportError as error:
            logger.warning("MLflow cannot be imported (%s); the events are complete without it", error)
            return
        try:
            self._loop(failures)
        finally:
            self._given_up.set()

    def _loop(self, failures: tuple[type[BaseException], ...]) -> None:
        lock: OwnerLock | None = None
        try:
            while not self._given_up.is_set():
                # Asked before copying: all that was appended before close() is then copied before the end.
                last_time = self._closing.is_set()
                try:
                    lock = lock or OwnerLock(self.folder.copy_lock, wait=timedelta(0))
                    copied = self._copier.copy(self._given_up.is_set)
                except failures as error:
                    self._wait_after(error)
                    continue
                self._note_success(copied)
                if last_time:
                    self._complete = not self._given_up.is_set()
                    return
                self._closing.wait(self._pace.poll.total_seconds())
        finally:
            if lock is not None:
                lock.release()

    def _wait_after(self, error: BaseException) -> None:
        self._failures += 1
        first, most = self._pace.first_pause.total_seconds(), self._pace.most_pause.total_seconds()
        pause_s = min(most, first * 2 ** min(self._failures - 1, 20))
        if self._failures == 1:
            logger.warning(
                "MLflow at %s does not take events of run %s (%s); training goes on, they are kept in %s and "
                "sent when it answers",
                self.uri,
                self.folder.run_id,
                one_line(error),
                self.folder.events_file,
            )
        if self._closing.is_set():
            # Little time is left: steady short pauses, cut off by close() giving up.
            self._given_up.wait(first)
        else:
            self._closing.wait(pause_s)

    def _note_success(self, copied: int) -> None:
        if self._failures:
            logger.info("MLflow at %s answers again; %d events sent", self.uri, copied)
        self._failures = 0
