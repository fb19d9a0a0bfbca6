"""Which generation comes next, and how far along is it? Events in, orders out; no clock, no network.

Members arrive, are lost, halt, prepare and form; each time `Generations` says what to order whom (docs/elastic.md). A
generation that a loss overtakes is given up and its number never used again. Two things make this safe: a member that
was sent `Move` says anew what it has before anybody relies on it, and the newest generation that anyone has adopted is
one that everyone has verified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from concertina.elastic.messages import Halted, Move
from concertina.errors import ConcertinaError
from concertina.layout import Seating

__all__ = ["Coming", "Generations", "Order", "OrderKind", "Restore", "Shortage"]

Seat = Callable[[dict[int, str], Seating | None], Seating]
"""Seats members (to the node of each); the second argument holds the state. Raises ConcertinaError if none fits."""


class OrderKind(StrEnum):
    """What `Generations` wants done."""

    HALT = "halt"
    PREPARE = "prepare"
    STOP = "stop"
    """At the next step boundary: a word to the first rank."""
    MOVE = "move"
    RESTORE = "restore"
    """The state is not complete among who is left: the caller says from which checkpoint to go on."""


@dataclass(frozen=True)
class Order:
    """To `members`, for generation `number`. `move` goes with MOVE only."""

    kind: OrderKind
    number: int
    members: tuple[int, ...] = ()
    move: Move | None = None


@dataclass(frozen=True)
class Restore:
    """From where a state comes that nobody has: a checkpoint and its step, or the beginning."""

    checkpoint: str | None = None
    step: int = 0


@dataclass(frozen=True)
class Shortage:
    """No generation can be made of who is left."""

    reason: str


@dataclass
class Coming:
    """A generation under way. `planned`: the one before trains until it is prepared."""

    number: int
    seating: Seating
    planned: bool
    prepared: set[int] = field(default_factory=set)
    formed: set[int] = field(default_factory=set)
    stopping: bool = False
    moving: bool = False


class Generations:
    """All there are of one session. `seat` is the policy; `present` maps members that can be seated to their nodes.

    `possible`: seatings of the generations that may hold the state, by number; the newest one anyone reports does.
    """

    def __init__(self, seat: Seat, first: int = 0) -> None:
        self._seat = seat
        self.last_number = first - 1
        self.present: dict[int, str] = {}
        self.possible: dict[int, Seating] = {}
        self.coming: Coming | None = None
        self.shortage: Shortage | None = None
        self.reports: dict[int, Halted] = {}
        self._answering = -1  # reports that answer an older HALT say nothing any more
        self._restore: Restore | None = None

    @property
    def seating(self) -> Seating | None:
        """Of the newest generation that may hold the state; None before the first."""
        return self.possible[max(self.possible)] if self.possible else None

    @property
    def is_settled(self) -> bool:
        """Whether a generation trains and none is coming."""
        return self.coming is None and self.shortage is None and bool(self.possible)

    # -- what happens -------------------------------------------------------------------------------------------------

    def arrive(self, member: int, node: str) -> None:
        """A member can be seated from now on; `begin` decides when it is."""
        self.present[member] = node

    def lose(self, members: list[int]) -> list[Order]:
        """These are gone for good. Nobody else is touched unless one of them had a seat."""
        for member in members:
            self.present.pop(member, None)
            self.reports.pop(member, None)
        return self.begin() if self._seated().intersection(members) else []

    def _seated(self) -> set[int]:
        seatings = [*self.possible.values(), *([self.coming.seating] if self.coming else [])]
        return {member for seating in seatings for member in seating.roster}

    def begin(self, *, planned: bool = False) -> list[Order]:
        """Make the next generation of everybody present, at once or, `planned`, while the one before goes on."""
        planned = planned and self.is_settled
        self.last_number += 1
        number = self.last_number
        if self.coming is not None and self.coming.moving:  # who was told to move may have moved
            self.reports.clear()
            self._answering = number
        orders = []
        if not planned and self.holders:
            orders.append(Order(OrderKind.HALT, number, tuple(sorted(self.holders))))
        self.coming = None
        try:
            seating = self._seat(self.present, self.seating)
        except ConcertinaError as error:
            self.shortage = Shortage(error.message)
            return orders
        self.shortage = None
        self.coming = Coming(number, seating, planned)
        return [*orders, Order(OrderKind.PREPARE, number, seating.roster), *self._advance()]

    def prepare(self, member: int, number: int) -> list[Order]:
        """A member has its groups for a generation."""
        coming = self.coming
        if coming is None or coming.number != number:
            return []
        coming.prepared.add(member)
        return self._advance()

    def halt(self, report: Halted) -> list[Order]:
        """A member computes nothing and says what it has."""
        if report.member not in self.present or report.answers < self._answering:
            return []
        self.reports[report.member] = report
        return self._advance()

    def form(self, member: int, number: int) -> bool:
        """A member has adopted a generation; True when it was the last one."""
        coming = self.coming
        if coming is None or coming.number != number:
            return False
        coming.formed.add(member)
        if not coming.formed.issuperset(coming.seating.roster):
            return False
        self.possible = {number: coming.seating}
        self.coming = self._restore = None
        self.reports = {m: report for m, report in self.reports.items() if report.generation == number}
        return True

    def restore(self, found: Restore) -> list[Order]:
        """The answer to RESTORE: whatever state there was is given up."""
        self._restore = found
        self.possible.clear()
        return self._advance()

    # -- what follows -------------------------------------------------------------------------------------------------

    def _advance(self) -> list[Order]:
        coming = self.coming
        if coming is None or coming.moving:
            return []
        if coming.planned and not coming.stopping:
            return self._stop(coming)
        if not self.holders.issubset(self.reports):
            return []
        move = self._agree(coming)
        if move is None:
            return [Order(OrderKind.RESTORE, coming.number)]
        coming.moving = True
        self.possible[coming.number] = coming.seating
        return [Order(OrderKind.MOVE, coming.number, coming.seating.roster, move)]

    def _stop(self, coming: Coming) -> list[Order]:
        seating = self.seating
        assert seating is not None
        if not coming.prepared.issuperset(coming.seating.roster):
            return []
        coming.stopping = True
        return [Order(OrderKind.STOP, coming.number, (seating.members[0],))]

    @property
    def holders(self) -> set[int]:
        """Members present that may hold state."""
        return {m for seating in self.possible.values() for m in seating.roster if m in self.present}

    def _agree(self, coming: Coming) -> Move | None:
        """Where the state is and at which step; None when it is not complete."""
        holding = [report for report in self.reports.values() if report.generation in self.possible]
        if not holding:
            found = self._restore
            return None if found is None else Move(coming.number, checkpoint=found.checkpoint, step=found.step)
        source = max(report.generation for report in holding)
        self.possible = {number: seating for number, seating in self.possible.items() if number >= source}
        seating = self.possible[source]
        adopted = [report for report in holding if report.generation == source]
        step = max(report.step for report in adopted)
        newest = next(report for report in adopted if report.step == step)
        able = {r.member for r in adopted if step in (r.step, r.pending)}
        able |= {report.member for report in self.reports.values() if report.verified == source}
        if not _complete(seating, able):
            return None
        return Move(
            generation=coming.number,
            source=source,
            seating=seating.to_json(),
            present=sorted(able),
            nodes={str(member): node for member, node in self.present.items()},
            step=step,
            totals=newest.totals,
            evaluated=max(report.evaluated for report in adopted),
        )


def _complete(seating: Seating, able: set[int]) -> bool:
    """Whether of every rank the first or the second owner is among `able`."""
    for rank, member in enumerate(seating.members):
        second = seating.seconds[rank]
        if member not in able and (second is None or seating.members[second] not in able):
            return False
    return True
