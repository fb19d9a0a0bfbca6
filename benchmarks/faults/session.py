"""A run that is struck again and again: is it whole again each time, and is nobody lost but whom it hit?"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.assignment import RunPlan
from actors.conductor import Conductor
from actors.wishes import Wishes
from benchmarks.faults.bare import BareCluster, BareHands, Process
from benchmarks.faults.held import Held
from benchmarks.faults.subject import BOUND_S, WORLD, Hung, Tail, job_document
from concertina.config import Job
from concertina.elastic.states import RunState
from concertina.errors import ConcertinaError, UserError
from concertina.layout import check_job
from concertina.track.events import EventType
from concertina.track.run import RunFolder
from jobs.preparation import prepare_new

__all__ = ["VETERAN", "Session"]

VETERAN = 0
"""The member that nothing strikes: what is left of hundreds of generations is seen in its process."""

_POLL_S = 0.02
_STEPS_OF_REST = 2
_LOOK_EVERY = 10


@dataclass
class Session:
    """A conductor in a thread of this process, and its members. Used as a context: at the end all is given back."""

    storage: Path
    text: Path
    layout: dict[str, Any]
    standbys: int = 0
    held: dict[str, list[Held]] = field(default_factory=lambda: {"conductor": [], "member": []})

    def __post_init__(self) -> None:
        job = Job.model_validate(job_document(self.text, self.storage, self.layout, self.standbys))
        prepared = prepare_new(job, check_job(job))
        self.folder: RunFolder = prepared.folder
        self.plan = RunPlan(
            run_id=self.folder.run_id,
            folder=self.folder.path,
            corpus=prepared.corpus,
            job=prepared.job,
            layout=prepared.layout,
            device="cpu",
            session=secrets.token_hex(4),
            token=secrets.token_hex(32),
        )
        self.cluster, self.wishes = BareCluster(WORLD), Wishes()
        (self.folder.path / "logs").mkdir(exist_ok=True)
        self.conductor = Conductor(self.plan, self.wishes, self.cluster, partial(BareHands, self.cluster))
        hands = self.conductor.hands
        assert isinstance(hands, BareHands)
        self.hands = hands
        hands.mourn = self.conductor.mourn
        self.error: BaseException | None = None
        self._events = Tail(self.folder.events_file)
        self._rested = (-1, 0)
        self._lost: set[int] = set()
        self._thread = threading.Thread(target=self._conduct, name="conductor", daemon=True)

    def __enter__(self) -> Session:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.wishes.stop = self.wishes.stop or "the faults are over"
        self.wishes.now = self.wishes.now or exception[0] is not None
        deadline = time.monotonic() + BOUND_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self.wishes.hear()
            time.sleep(_POLL_S)

    def _conduct(self) -> None:
        try:
            self.conductor.run()
        except Exception as error:  # noqa: BLE001 - whatever it was, `await_whole` raises it
            self.error = error
            if isinstance(error, ConcertinaError):
                self.conductor.fail(error)
        finally:
            self.conductor.end()

    # -- who is there -------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The newest that is recorded."""
        return self.conductor.book.step

    @property
    def generation(self) -> int:
        return max(self.conductor.regrouping.generations.possible, default=-1)

    def process(self, member: int) -> Process:
        found = self.hands.members[member].actor
        assert isinstance(found, Process)
        return found

    @property
    def mortal(self) -> list[int]:
        """Members that may be struck."""
        return sorted(self.hands.members.keys() - {VETERAN})

    def lost(self) -> set[int]:
        """Members that were lost, so far."""
        for event in self._events.read():
            if event["type"] == EventType.MEMBER and event["data"]["what"] == "lost":
                self._lost.add(event["data"]["member"])
        return self._lost

    # -- rest ---------------------------------------------------------------------------------------------------------

    def await_whole(self, gone: Iterable[int] = ()) -> None:
        """Until all ranks train again, and these are no members any more. Raises Hung, and what ended the run."""
        self.until(lambda: self.is_whole and self.hands.members.keys().isdisjoint(gone), f"without {sorted(gone)}")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Raises Hung at the bound, and what ended the run."""
        deadline = time.monotonic() + BOUND_S
        while not holds():
            self.wishes.hear()
            if self.error is not None or not self._thread.is_alive():
                raise UserError(f"the run ended: {self.error!r}") from self.error
            if time.monotonic() > deadline:
                raise Hung(f"not whole {what} within {BOUND_S:.0f} s: {self._state()}")
            time.sleep(_POLL_S)

    @property
    def is_whole(self) -> bool:
        """All ranks train, and have made some steps in their seats."""
        generations = self.conductor.regrouping.generations
        seating, members = generations.seating, list(self.hands.members.values())
        full = seating is not None and seating.layout.world == WORLD == len(members)
        rests = generations.is_settled and self.conductor.book.state is RunState.TRAINING
        if not (full and rests and all(member.pid for member in members)):
            self._rested = (-1, 0)
            return False
        generation, since = self._rested
        if generation != self.generation:
            self._rested = (self.generation, self.step)
            return False
        return self.step >= since + _STEPS_OF_REST

    def _state(self) -> str:
        generations = self.conductor.regrouping.generations
        members = {number: member.pid for number, member in self.hands.members.items()}
        return f"{self.conductor.book.state}, step {self.step}, {generations.coming}, members {members}"

    def look(self, number: int) -> None:
        """Now and then: what the conductor's process and the veteran hold."""
        if number % _LOOK_EVERY == 0:
            self.held["conductor"].append(Held.now())
            found = self.process(VETERAN).ask("held")
            assert found is not None, "the veteran does not answer"
            self.held["member"].append(found)
