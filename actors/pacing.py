"""Is a member slower than the others, and what does the run do about it? Heartbeats tell how long each computes.

What is done is a planned change like others: at a step boundary a spare takes over, or the slow one gets fewer
sequences, or the others go on without it, whichever makes steps shortest. What it brought is measured, and where a
smaller share did not help, the slow one goes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from actors.book import Book
from actors.regrouping import Regrouping
from concertina.config import Job
from concertina.elastic.channel.server import ChannelServer
from concertina.elastic.choice import choose_layout
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.states import RunState
from concertina.elastic.stragglers import SLOW, Kind, Pace, Paces, Remedy, Straggler, StragglerNews, Work, remedies
from concertina.errors import ConcertinaError
from concertina.track.events import EventType

__all__ = ["Pacing"]

log = logging.getLogger("concertina.coordinator")

_LOOK_S = 0.25
_HELPED = 0.5  # of what was expected, at least, or it did not
_WORSE = 1.25
_AGAIN_S = 60.0
_STILL = 0.5  # of how much slower than the others it was


@dataclass(frozen=True)
class _Tried:
    """What was done about a straggler, in which generation it was found, and how many ranks the next one is to have."""

    straggler: Straggler
    remedy: Remedy
    generation: int
    world: int


class Pacing:
    """Of one session. Called by the conductor's thread only."""

    def __init__(self, job: Job, book: Book, server: ChannelServer, regrouping: Regrouping) -> None:
        self.job, self.book, self.server, self.regrouping = job, book, server, regrouping
        self._mode = job.elastic.stragglers
        self._paces: Paces | None = None
        self._tried: _Tried | None = None
        self._told: dict[int, float] = {}  # factors, by member
        self._useless: set[int] = set()  # members whose smaller share did not help
        self._gives_up = False
        self._again_s = 0.0
        self._looked_s = 0.0

    def look(self) -> None:
        """Take in what heartbeats say, and begin what is worth it."""
        now = time.monotonic()
        if self._mode == "ignore" or now - self._looked_s < _LOOK_S:
            return
        self._looked_s = now
        generations = self.regrouping.generations
        seating = generations.seating
        if seating is None or not generations.is_settled or self.book.state is not RunState.TRAINING:
            self._paces = None
            return
        if self._paces is None or self._paces.seating is not seating:
            self._paces = Paces(seating, self._work)
        for member, silence in self.server.silences().items():
            if silence.phase == "step":
                self._paces.hear(member, Pace(silence.done, silence.busy_s, now - silence.seconds))
            else:
                self._paces.pause(member)
        self._take_back_what_was_called_off()
        if self._paces.are_known:
            self._measure(self._paces)
            self._judge(self._paces)

    def _measure(self, paces: Paces) -> None:
        """What the last remedy brought, once the new generation is known."""
        tried, step_s = self._tried, paces.step_s
        if tried is None or step_s is None or self.book.generation == tried.generation:
            return
        self._tried = None
        if len(paces.seating.members) != tried.world:
            return  # something else has happened as well
        member = tried.straggler.member
        before_s, expected_s = tried.straggler.step_s, tried.remedy.step_s
        self._tell(tried.straggler, tried.remedy, step_s)
        if before_s - step_s >= _HELPED * (before_s - expected_s):
            return
        if tried.remedy.kind is not Kind.REBALANCE:
            self._gives_up = True  # what is slow is not the member: its place, or what it works on
        elif self.regrouping.seats.slowness.pop(member, None) is not None:
            self._useless.add(member)
            self.regrouping.wish = "straggler"

    def _take_back_what_was_called_off(self) -> None:
        """The change did not come about: what was decided is decided anew, a while later."""
        tried = self._tried
        if tried is None or self.regrouping.wish or self.book.generation != tried.generation:
            return
        self._tried, self._again_s = None, time.monotonic() + _AGAIN_S
        self.regrouping.seats.slowness.pop(tried.straggler.member, None)
        self.regrouping.seats.unwanted.discard(tried.straggler.member)

    def _judge(self, paces: Paces) -> None:
        if self._tried is not None or self._recovered(paces):
            return
        stragglers = paces.stragglers()
        if not stragglers or time.monotonic() < self._again_s:
            return
        straggler = stragglers[0]
        remedy = self._remedy(paces, straggler)
        if remedy is None or self._gives_up or self._mode == "report":
            if straggler.factor > _WORSE * self._told.get(straggler.member, 0.0):  # once, unless it becomes worse
                self._tell(straggler, None)
            return
        self._tell(straggler, remedy)
        seats = self.regrouping.seats
        if remedy.kind is Kind.REBALANCE:
            seats.slowness[straggler.member] = straggler.factor
        else:
            seats.unwanted.add(straggler.member)
        leaves = self._world_of(self._usable - 1) if remedy.kind is Kind.EVICT else len(paces.seating.members)
        self._tried = _Tried(straggler, remedy, self.book.generation, leaves)
        self.regrouping.wish = "straggler"

    def _recovered(self, paces: Paces) -> bool:
        """Whether one that got fewer sequences is not so slow any more: it gets more again."""
        slowness, now = self.regrouping.seats.slowness, paces.steady()
        better = {m: now[m] for m, was in slowness.items() if m in now and now[m] - 1 < _STILL * (was - 1)}
        for member, factor in better.items():
            del slowness[member]
            if factor > SLOW:
                slowness[member] = factor
            self._told.pop(member, None)
        if better:
            log.info("members %s are quicker again", sorted(better))
            self.regrouping.wish = "straggler"
        return bool(better)

    def _remedy(self, paces: Paces, straggler: Straggler) -> Remedy | None:
        """The best that has not been tried for nothing."""
        seats, seating = self.regrouping.seats, paces.seating
        slowness = {**seats.slowness, straggler.member: straggler.factor}
        leaving = seats.leaving(self.regrouping.generations.present)
        spare = any(member not in leaving for member in seating.spares)
        found = remedies(straggler, seating, slowness, self._work, self._world_of(self._usable - 1), spare)
        passed_over = {Kind.REBALANCE} if straggler.member in self._useless else set()
        return next((remedy for remedy in found if remedy.kind not in passed_over), None)

    @property
    def _usable(self) -> int:
        """Members that are there and stay."""
        present = self.regrouping.generations.present
        return len(present) - len(self.regrouping.seats.leaving(present))

    @property
    def _work(self) -> Work:
        training, whole = self.job.training, self.job.model.capacity.whole_sequences
        most = (training.micro_batch_size or 0) // whole
        return Work(training.global_batch_size // whole, most or int(self.job.layout.pp > 1))

    def _world_of(self, members: int) -> int:
        """Ranks that so many members make; 0 where they are too few."""
        try:
            world = choose_layout(self.job, members)[0].world
        except ConcertinaError:
            return 0
        return world if world >= self.job.elastic.min_workers else 0

    def losses(self) -> list[Loss]:
        """Members that have no rank any more because they were slow: nobody waits for them."""
        generations, seats = self.regrouping.generations, self.regrouping.seats
        seating = generations.seating
        if seating is None or not generations.is_settled:
            return []
        gone = [m for m in seats.unwanted if m in generations.present and m in seating.spares]
        return [Loss(m, generations.present[m], Reason.SLOW, "the others are quicker without it") for m in gone]

    def _tell(self, straggler: Straggler, remedy: Remedy | None, measured_s: float | None = None) -> None:
        self._told[straggler.member] = straggler.factor
        news = StragglerNews(
            member=straggler.member,
            factor=round(straggler.factor, 3),
            step_s=straggler.step_s,
            remedy="" if remedy is None else remedy.kind.value,
            expected_s=None if remedy is None else remedy.step_s,
            measured_s=measured_s,
        )
        log.warning("%s", news)
        self.book.event(EventType.STRAGGLER, self.book.step, **news.to_json())
