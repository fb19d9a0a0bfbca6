"""How does a driver watch its run? It polls the coordinator, passes on what a person wants, and stays to the end, also
when the coordinator does not."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from concertina.elastic.waits import BOUNDS
from concertina.errors import ConcertinaError
from concertina.track.run import RunFolder
from concertina.track.summary import Outcome, summarize
from jobs.progress import Progress
from jobs.signals import Signals

if TYPE_CHECKING:
    from actors.coordinator import Status

__all__ = ["Watch"]

POLL_S = 0.5
ANSWER_BOUND_S = 90.0  # a coordinator may start on a busy machine, or start again
SYNC_BOUND = timedelta(seconds=20)
EXIT_CODES = {"finished": 0, "stopped": 103}


class _NoAnswer(Exception):
    """The coordinator is gone for good, or answers nobody."""


class Watch:
    """Watches one session through the handle of its coordinator."""

    def __init__(self, handle: Any, folder: RunFolder, progress: Progress, signals: Signals) -> None:
        self.handle, self.folder = handle, folder
        self.progress, self.signals = progress, signals

    def until_over(self) -> tuple[int, str]:
        """(exit code, reason), once everything of the run has been given back."""
        try:
            status = self._poll()
            while not status.over:
                if status.state.value in ("waiting_for_capacity", "forming"):
                    self.progress.wait(status.waiting or status.state.value.replace("_", " "))
                time.sleep(POLL_S)
                status = self._poll()
        except _NoAnswer as lost:
            return self._without_coordinator(str(lost))
        finally:
            self.progress.look()
            self.progress.close()
        self._dismiss()
        return status.exit_code, status.reason

    def _poll(self) -> Status:
        """One answer; meanwhile events are shown and signals heard. Raises _NoAnswer."""
        from ray import get, wait
        from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError

        until = time.monotonic() + ANSWER_BOUND_S
        while time.monotonic() < until:
            answer = self.handle.poll.remote(self.signals.name, self.signals.count > 1)
            while not wait([answer], timeout=POLL_S)[0] and time.monotonic() < until:
                self._show()
            self._show()
            try:
                status: Status = get(answer, timeout=0)
                return status
            except (ActorUnavailableError, OutOfMemoryError):  # killed for memory it is started again, like any other
                time.sleep(POLL_S)
            except TimeoutError:
                break
            except RayActorError as error:
                raise _NoAnswer(f"the coordinator is gone for good ({_first_line(error)})") from error
        raise _NoAnswer(f"the coordinator has not answered for {ANSWER_BOUND_S:.0f} s")

    def _show(self) -> None:
        self.progress.look()
        news = self.signals.news
        if news and not self.progress.has_trained:  # no step yet that a checkpoint could keep
            self.progress.say("stopping")
        elif news == 1:
            self.progress.say("stopping with a checkpoint after the steps under way; once more to stop at once")
        elif news:
            self.progress.say("stopping without a checkpoint")

    def _dismiss(self) -> None:
        """Nothing keeps the coordinator. Wait until it is gone: a resume on this cluster wants its name."""
        from ray import get
        from ray.exceptions import GetTimeoutError, RayError

        self.handle.leave.remote()
        until = time.monotonic() + BOUNDS["coordinator_lingers"].seconds
        with suppress(RayError, GetTimeoutError):
            while time.monotonic() < until:
                get(self.handle.poll.remote(), timeout=BOUNDS["ask_ray"].seconds)
                time.sleep(0.05)

    # -- without a coordinator ------------------------------------------------------------------------------------

    def _without_coordinator(self, why: str) -> tuple[int, str]:
        """Its ranks write a checkpoint and leave, which takes them a while: wait for that, then see what is left."""
        if not self._outcome().status.is_final:
            self.progress.say(f"{why}; its ranks write a checkpoint and leave")
            self._end_coordinator()
            self._await_ranks()
            self._sweep()
            self._write_end(why)
        outcome = self._outcome()
        return EXIT_CODES.get(outcome.status.value, 100), outcome.reason

    def _end_coordinator(self) -> None:
        """One that answers nobody may be frozen: it must not come back when its ranks have left."""
        from ray import kill

        kill(self.handle, no_restart=True)

    def _outcome(self) -> Outcome:
        return summarize(self.folder).outcome

    def _await_ranks(self) -> None:
        from ray.util import list_named_actors

        namespace = f"concertina-{self.folder.run_id}"
        until = time.monotonic() + BOUNDS["agent_lease"].seconds
        while time.monotonic() < until:
            names = [
                found["name"] for found in list_named_actors(all_namespaces=True) if found["namespace"] == namespace
            ]
            if not any(name.startswith("member") for name in names):
                return
            self._show()
            time.sleep(POLL_S)

    def _sweep(self) -> None:
        from actors.hands import sweep

        sweep(f"concertina-{self.folder.run_id}")

    def _write_end(self, why: str) -> None:
        """The ranks have written it if they could. MLflow hears of it now, or at the next `runs show --sync`."""
        from concertina.track.events import EventLog, EventType
        from concertina.track.reconcile import reconcile

        summary = summarize(self.folder)
        try:
            if not summary.outcome.status.is_final:
                with EventLog(self.folder.events_file, self.folder.run_id) as events:
                    data = {"state": "failed", "reason": why, "exit_code": 100}
                    generation, step = summary.shape.generation, summary.progress.steps
                    events.append(EventType.STATE, data, generation=generation, step=step)
            reconcile(self.folder, SYNC_BOUND)
        except ConcertinaError as error:  # somebody else writes after all
            self.progress.say(f"warning: {error}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
