"""What does the coordinator's actor do? It answers polls, and brings its run to an end although nobody asks any more.

The session itself is the conductor's, in a thread of its own. This file imports neither torch nor mlflow: a driver
imports it to start the actor.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.assignment import RunPlan
from actors.wishes import Wishes
from concertina.elastic.notices import Notice, Source
from concertina.elastic.states import RunState
from concertina.elastic.waits import BOUNDS
from concertina.errors import ConcertinaError
from infra.garbage import spare_imports

if TYPE_CHECKING:
    from actors.conductor import Conductor

__all__ = ["COORDINATOR", "Coordinator", "Status"]

COORDINATOR = "coordinator"  # name of the actor in its run's namespace

log = logging.getLogger("concertina.coordinator")


@dataclass(frozen=True)
class Status:
    """What a poll answers. `over` means: ended, and everything given back."""

    state: RunState
    reason: str
    exit_code: int
    step: int
    waiting: str
    over: bool


class Coordinator:
    """The actor of one run's session."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.wishes = Wishes()
        self._conductor: Conductor | None = None
        self._error: ConcertinaError | None = None
        self._over = False
        threading.Thread(target=self._run, name="coordinator", daemon=True).start()

    # -- what others call; each returns at once -------------------------------------------------------------------

    def poll(self, stop: str = "", now: bool = False) -> Status:
        """Somebody watches, and asks how it goes. With a reason in `stop` the run ends: with a checkpoint at the next
        step boundary, or at once. Not polled for a while, it stops with a checkpoint."""
        self.wishes.hear(stop, now)
        if self._conductor is None:
            state = RunState.WAITING_FOR_CAPACITY if self._error is None else RunState.FAILED
            status = Status(state, "", 1, self.plan.resume_step, "", self._over)
        else:
            book, waiting = self._conductor.book, self._conductor.waiting
            status = Status(book.state, book.reason, book.exit_code, book.step, waiting, self._over)
        if self._error is None:
            return status
        return Status(status.state, self._error.message, self._error.exit_code, status.step, "", self._over)

    def mourn(self, member: int, for_memory: bool = False) -> None:
        """The agent of its node knows that this member's process has died, and whether the kernel has just killed one
        there for memory."""
        if self._conductor is not None:
            self._conductor.mourn(member, for_memory)

    def notice(self, node: str, sources: list[str], found: list[dict[str, Any]]) -> None:
        """All that these sources (`elastic.notices.Source`) tell a node's agent of its end, at this moment."""
        if self._conductor is not None:
            told = [Notice.from_json(notice) for notice in found]
            self._conductor.departures.hear(node, [Source(source) for source in sources], told)

    def leave(self) -> None:
        """The driver has seen the end; nothing keeps the coordinator."""
        self.wishes.left.set()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._conduct()
        except ConcertinaError as error:
            self._error = error
        except Exception as error:
            log.exception("the coordinator failed")
            self._error = ConcertinaError(f"the coordinator failed: {type(error).__name__}: {error}")
        if self._conductor is not None:
            self._finish(self._conductor)
        self._over = True
        if not self.wishes.driver_gone:
            self.wishes.left.wait(BOUNDS["coordinator_lingers"].seconds)
        time.sleep(0.1)  # `leave` shall be answered
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _conduct(self) -> None:
        _log_to(self.plan.folder)
        from actors.cluster import RayCluster
        from actors.conductor import Conductor  # torch and mlflow take seconds: polls are answered meanwhile

        spare_imports()
        self._conductor = Conductor(self.plan, self.wishes, RayCluster())
        self._conductor.run()

    def _finish(self, conductor: Conductor) -> None:
        if self._error is not None and not conductor.book.state.is_end:
            try:
                conductor.fail(self._error)
            except ConcertinaError:
                log.exception("the end cannot be written: %s", self._error)
        conductor.end()


def _log_to(folder: Path) -> None:
    handler = logging.FileHandler(folder / "logs" / "coordinator.log")
    handler.setFormatter(logging.Formatter("[coordinator] %(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("concertina")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
