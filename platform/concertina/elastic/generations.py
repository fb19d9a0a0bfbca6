"""Which generation comes next, and how far along is it? Events in, orders out; no clock, no network.

Members arrive, are lost, halt, prepare and form; each time `Generations` says what to order whom (docs/elastic.md). A
generation that a loss overtakes is given up and its number never used again. Two things make this safe: a member that
was sent `Move` says anew what it has before anybody relies on it, and a generation that anyone has adopted is one that
everyone has verified.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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
    KEEP = "keep"
    """There are too few to go on, and the state is complete among them: it shall be written down where it is."""
    RESTORE = "restore"
    """The state is not complete among who is left: the caller says from which checkpoint to go on."""


@dataclass(frozen=True)
class Order:
    """To `members`, for generation `number`. `move` goes with MOVE, and with KEEP, where nothing moves."""

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
    """A generation under way. `planned`: the one before trains until it is prepared. `failed`: somebody could not."""

    number: int
    seating: Seating
    planned: bool
    prepared: set[int] = field(default_factory=set)
    formed: set[int] = field(default_factory=set)
    failed: bool = False
    stopping: bool = False
    moving: bool = False


class Generations:
    """All there are of one session. `seat` is the policy; `present` maps members that can be seated to their nodes.

    `possible`: seatings of the generations that may hold the state, by number, two at most; the newest one anyone
    reports does.
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
        self._adopted = -1  # by every rank, and nobody was told to leave it: what they say of it holds
        self._restore: Restore | None = None
        self._kept = False  # since `begin`

    @property
    def seating(self) -> Seating | None:
        """Of the newest generation that may hold the state; None before the first."""
        return self.possible[max(self.possible)] if self.possible else None

    @property
    def is_settled(self) -> bool:
        """Whether a generation trains and none is coming."""
        return self.coming is None and self.shortage is None and bool(self.possible)

    @property
    def trains(self) -> bool:
        """Whether a generation trains, and was not asked to stop."""
        planned = self.coming is not None and self.coming.planned and not self.coming.stopping
        return (self.is_settled or planned) and not self.reports

    @property
    def is_stuck(self) -> bool:
        """Whether members wait, without a loss, for what nothing under way will bring: another generation must."""
        coming = self.coming
        if coming is None:
            return self.is_settled and not self.holders.isdisjoint(self.reports)
        if coming.failed or any(report.failed == coming.number for report in self.reports.values()):
            return True
        if not coming.planned or coming.moving:
            return False
        stopped = self.reports.values()  # of those that stop as they are asked to, the others are waited for
        return any(report.failure for report in stopped) if coming.stopping else bool(stopped)

    # -- what happens -------------------------------------------------------------------------------------------------

    def arrive(self, member: int, node: str) -> None:
        """A member can be seated from now on; `begin` decides when it is."""
        self.present[member] = node

    def lose(self, members: list[int]) -> list[Order]:
        """These are gone for good. Nobody else is touched unless one of them had a seat: a planned change is called
        off."""
        for member in members:
            self.present.pop(member, None)
            self.reports.pop(member, None)
        seated = self._ranks() | (set(self.coming.seating.roster) if self.coming else set())
        if seated.isdisjoint(members):
            return []
        if self.trains and self._ranks().isdisjoint(members):
            self.call_off()
            return []
        return self.begin()

    def call_off(self) -> None:
        """A planned change does not come about; the generation before goes on. Whoever prepares for it is told when it
        is to prepare for another."""
        assert self.trains
        self.coming = None

    def _ranks(self) -> set[int]:
        return {member for seating in self.possible.values() for member in seating.members}

    def begin(self, *, planned: bool = False) -> list[Order]:
        """Make the next generation of everybody present, at once or, `planned`, while the one before goes on."""
        planned = planned and self.trains
        self.last_number += 1
        number = self.last_number
        moving = self.coming is not None and self.coming.moving
        if moving or self._kept:  # who was told to move may have moved, and who was told to keep has adopted
            self.reports.clear()
            self._answering, self._adopted = number, -1
        self._kept = False
        told = {m for seating in self.possible.values() for m in seating.roster if m in self.present}
        orders = [Order(OrderKind.HALT, number, tuple(sorted(told)))] if told and not planned else []
        self.coming = None
        try:
            seating = self._seat(self.present, self.seating)
        except ConcertinaError as error:
            self.shortage = None if planned else Shortage(error.message)
            return orders
        self.shortage = None
        self.coming = Coming(number, seating, planned)
        return [*orders, Order(OrderKind.PREPARE, number, seating.roster), *self._advance()]

    def reattach(
        self, present: dict[int, str], possible: dict[int, Seating], last_number: int, at_work: dict[int, int]
    ) -> list[Order]:
        """Take over what an earlier coordinator left: go on when all ranks of the newest generation have adopted it
        (`at_work`: the generation of each member that answers), else begin another."""
        self.present, self.possible = dict(present), dict(possible)
        self.last_number = max(self.last_number, last_number)
        self._answering = self.last_number + 1  # what was said to the earlier one may be said again
        seating = self.seating
        if seating is None:
            return []
        newest = max(possible)
        if any(at_work.get(member) != newest for member in seating.members):
            return self.begin()
        self.possible, self._adopted = {newest: seating}, newest
        return []

    def prepare(self, member: int, number: int, failure: str = "") -> list[Order]:
        """A member has its groups for a generation, or will not have them."""
        coming = self.coming
        if coming is None or coming.number != number:
            return []
        if failure:
            coming.failed = True
            return []
        coming.prepared.add(member)
        return self._advance()

    def halt(self, report: Halted) -> list[Order]:
        """A member computes nothing and says what it has."""
        is_new = report.answers >= self._answering or report.generation == self._adopted >= 0
        is_new |= self.coming is not None and report.failed == self.coming.number  # nobody was told that before
        if report.member not in self.present or not is_new:
            return []
        if self.coming is None and report.member not in self.holders:
            return []  # it was left out, and stops nobody
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
        self.coming = None
        self._answering, self._adopted = -1, number  # and who adopted it said all it had to say of older ones before
        self.reports = {m: report for m, report in self.reports.items() if report.generation == number}
        return True

    def restore(self, found: Restore) -> list[Order]:
        """The answer to RESTORE: whatever state there was is given up."""
        self.possible.clear()
        self._restore = found
        orders = self._advance()
        self._restore = None  # next time there may be a newer checkpoint
        return orders

    # -- what follows -------------------------------------------------------------------------------------------------

    def _advance(self) -> list[Order]:
        coming = self.coming
        if coming is None:
            return self._keep()
        if coming.moving:
            return []
        orders = []
        if coming.planned and not coming.stopping:
            if not coming.prepared.issuperset(coming.seating.roster):
                return []
            coming.stopping = True
            orders.append(Order(OrderKind.STOP, coming.number, (self.possible[max(self.possible)].members[0],)))
        if not self.holders.issubset(self.reports):
            return orders
        move = self._agree(coming.number, coming.seating.roster)
        if move is None:
            return [*orders, Order(OrderKind.RESTORE, coming.number)]
        coming.moving = True
        if move.source is not None:  # of a later one all have said that they have not adopted it, nor will
            self.possible = {move.source: self.possible[move.source]}
        self.possible[coming.number] = coming.seating
        return [*orders, Order(OrderKind.MOVE, coming.number, coming.seating.roster, move)]

    def _keep(self) -> list[Order]:
        """In a shortage, when all have said what they have."""
        if self.shortage is None or self._kept or not self.holders or not self.holders.issubset(self.reports):
            return []
        move = self._agree(self.last_number, self.present)
        if move is None:
            return []
        self._kept = True
        return [Order(OrderKind.KEEP, self.last_number, tuple(move.present), move)]

    @property
    def holders(self) -> set[int]:
        """Members present whose reports are waited for: that may hold state, or may know who does. Spares hold nothing,
        but know whether a generation that was overtaken while it moved has been adopted."""
        if len(self.possible) > 1:
            return {m for seating in self.possible.values() for m in seating.roster if m in self.present}
        return self._ranks().intersection(self.present)

    def _agree(self, number: int, reachable: Collection[int]) -> Move | None:
        """Where the state is and at which step; None when those that can be reached do not have it complete."""
        holding = [report for report in self.reports.values() if report.generation in self.possible]
        if not holding:
            found = self._restore
            return None if found is None else Move(number, checkpoint=found.checkpoint, step=found.step)
        source = max(report.generation for report in holding)
        seating = self.possible[source]
        adopted = [report for report in holding if report.generation == source]
        step = max(report.step for report in adopted)
        newest = next(report for report in adopted if report.step == step)
        able = {r.member for r in adopted if step in (r.step, r.pending)}
        able |= {report.member for report in self.reports.values() if report.verified == source}
        able.intersection_update(seating.members, reachable)
        if None in seating.keepers(able):
            return None
        return Move(
            generation=number,
            source=source,
            seating=seating.to_json(),
            present=sorted(able),
            nodes={str(member): node for member, node in self.present.items()},
            step=step,
            totals=newest.totals,
            evaluated=max(report.evaluated for report in adopted),
        )
