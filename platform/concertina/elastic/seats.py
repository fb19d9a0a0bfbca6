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
        """The seating of `present` (member -> node). Nobody who is not wanted or on a doomed node gets a rank. Where
        too few would be left, first the unwanted do, then those whose node has time. Raises ConcertinaError when there
        is none."""
        problem: ConcertinaError | None = None
        for away in dict.fromkeys([self.leaving(present), self._doomed(present), self._going(present)]):
            try:
                return self._seat(present, old, away)
            except ConcertinaError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def world_of(self, present: Mapping[int, str], old: Seating | None) -> int:
        """How many ranks that makes; 0 where there is no seating."""
        try:
            return self(present, old).layout.world
        except ConcertinaError:
            return 0

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
        return frozenset() if self.is_stopping else self._doomed(present) | self.unwanted.intersection(present)

    def _doomed(self, present: Mapping[int, str]) -> frozenset[int]:
        doomed = frozenset[str]() if self.is_stopping else self.notices.doomed
        return frozenset(member for member, node in present.items() if node in doomed)

    def _going(self, present: Mapping[int, str]) -> frozenset[int]:
        """Members whose node will be gone in a moment."""
        now, doomed = self.clock(), self._doomed(present)
        return frozenset(member for member in doomed if self.notices.is_last_call([present[member]], now))

    def is_time_to_leave(self, present: Mapping[int, str], seating: Seating) -> bool:
        """Whether ranks are on doomed nodes, and it is time that they go, and the run can go on without them."""
        seated = self._doomed(present).intersection(seating.members)
        is_time = self.notices.is_time_to_leave({present[member] for member in seated}, self.clock())
        if is_time and self._are_enough_without(self._doomed(present), present, seating):
            return True
        going = self._going(present)
        return not going.isdisjoint(seated) and self._are_enough_without(going, present, seating)

    def is_cornered(self, present: Mapping[int, str], seating: Seating) -> bool:
        """Whether the run cannot go on without nodes that will be gone in a moment."""
        going = self._going(present)
        return not going.isdisjoint(seating.members) and not self._are_enough_without(going, present, seating)

    def _are_enough_without(self, away: Collection[int], present: Mapping[int, str], seating: Seating) -> bool:
        try:
            self._seat(present, seating, away)
        except ConcertinaError:
            return False
        return True
