"""Who of those that are there gets a seat? The policy of a session: whom it trusts, who is about to go, how few do."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from concertina.config import Job
from concertina.elastic.choice import seat
from concertina.elastic.doubts import Doubts
from concertina.elastic.notices import Notices
from concertina.elastic.stragglers import loads_of
from concertina.errors import CapacityError, ConcertinaError
from concertina.layout import Seating

__all__ = ["Seats"]


@dataclass
class Seats:
    """`guest` is tried in the next change although it is in doubt. `is_stopping`: to leave a checkpoint anybody will
    do, however few, and wherever they are."""

    job: Job
    doubts: Doubts
    notices: Notices
    is_stopping: bool = False
    guest: int | None = None
    slowness: dict[int, float] = field(default_factory=dict)
    """By how much members are slower than others, of those that get fewer sequences for it."""
    unwanted: set[int] = field(default_factory=set)
    """Members without which the others are quicker."""
    clock: Callable[[], float] = field(default=time.monotonic)

    def __call__(self, present: Mapping[int, str], old: Seating | None) -> Seating:
        """The seating of `present` (member -> node). Who is on a doomed node gets no rank, unless too few would be
        left and there is still time. Raises ConcertinaError when there is none."""
        leaving = self.leaving(present)
        if not leaving:
            return self._seat(present, old, leaving)
        try:
            return self._seat(present, old, leaving)
        except ConcertinaError:
            if self.is_last_call(present):
                raise
            return self._seat(present, old, frozenset())

    def _seat(self, present: Mapping[int, str], old: Seating | None, leaving: Collection[int]) -> Seating:
        least = 1 if self.is_stopping else self.job.elastic.min_workers
        trusted = self.doubts.trusted(present, self.guest)
        found = seat(self.job, trusted or present, old, leaving)
        if found.layout.world < least and len(trusted) < len(present):
            found = seat(self.job, present, old, leaving)  # there is no other way than with those in doubt
        found = replace(found, loads=loads_of(found.layout, found.members, self.slowness))
        if found.layout.world < least:
            going = f", {len(leaving)} of them on nodes that are taken back" if leaving else ""
            raise CapacityError(f"{len(present)} members are there{going}, elastic.min_workers={least}")
        return found

    # -- nodes that go ------------------------------------------------------------------------------------------------

    def leaving(self, present: Mapping[int, str]) -> frozenset[int]:
        """Members on nodes that will go, and those that are not wanted."""
        if self.is_stopping:
            return frozenset()
        doomed = self.notices.doomed
        return frozenset(m for m, node in present.items() if node in doomed or m in self.unwanted)

    def is_time_to_leave(self, present: Mapping[int, str], seating: Seating) -> bool:
        """Whether ranks are on doomed nodes, and it is time that they go, and the run can go on without them."""
        nodes = self._to_be_left(present, seating)
        return self.notices.is_time_to_leave(nodes, self.clock()) and self._can_leave(present, seating)

    def is_cornered(self, present: Mapping[int, str], seating: Seating) -> bool:
        """Whether the run cannot go on without nodes that will be gone in a moment."""
        if not self.notices.is_last_call(self._to_be_left(present, seating), self.clock()):
            return False
        return not self._can_leave(present, seating)

    def is_last_call(self, present: Mapping[int, str]) -> bool:
        nodes = {present[member] for member in self.leaving(present)}
        return self.notices.is_last_call(nodes, self.clock())

    def _to_be_left(self, present: Mapping[int, str], seating: Seating) -> set[str]:
        leaving = self.leaving(present)
        return {present[member] for member in seating.members if member in leaving}

    def _can_leave(self, present: Mapping[int, str], seating: Seating) -> bool:
        try:
            self._seat(present, seating, self.leaving(present))
        except ConcertinaError:
            return False
        return True
