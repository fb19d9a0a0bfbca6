"""A session played on a clock of its own: members with real timesheets and the coordinator's real ledger, faults at
random moments, and beside them the truth, which neither of the two is told."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from concertina.elastic.account import Bucket
from concertina.elastic.ledger import Ledger, Price
from concertina.elastic.timesheet import Timesheet

__all__ = ["Session"]

REPORT_EVERY_S = 1.0
STEP_S, WAIT_S, EXCHANGE_S, VALIDATION_S = 0.5, 0.08, 0.02, 0.4


@dataclass
class Member:
    number: int
    sheet: Timesheet | None = None
    alive: bool = True
    truth: dict[Bucket, float] = field(default_factory=lambda: defaultdict(float))


class Session:
    """`play` runs it. The coordinator's clock and the members' differ by an offset that nobody knows."""

    def __init__(self, seed: int, members: int = 4, raises_at_once: bool = True) -> None:
        self.random = random.Random(seed)
        self.raises_at_once = raises_at_once
        self.now = self.random.uniform(100, 200)
        self.began = self.now
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.ledger = Ledger(self.now, members, Price(3.6, 2))
        self.members: dict[int, Member] = {}
        self.last_wait_s = 0.0
        for number in range(members):
            self.bear(number)

    def at(self, after_s: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + after_s, self._count, do))

    def advance(self, seconds: float) -> None:
        """Everything that is due until then, in order."""
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, do = heapq.heappop(self._queue)
            do()
        self.now = until

    def bear(self, number: int) -> Member:
        member = Member(number)
        self.members[number] = member
        self.ledger.born(number, self.now, f"node{number // 2}")
        offset = self.random.uniform(-1e4, 1e4)
        imports_s = self.random.uniform(0.5, 3)

        def begin() -> None:
            member.sheet = Timesheet(lambda: self.now + offset)
            self._report(member)

        self.at(imports_s, begin)
        return member

    def _report(self, member: Member) -> None:
        if not member.alive:
            return
        self.say(member)
        self.at(REPORT_EVERY_S, lambda: self._report(member))

    def say(self, member: Member) -> None:
        """A word, a little under way."""
        assert member.sheet is not None
        totals, inside, number = member.sheet.totals(), member.sheet.current, member.number

        def arrives() -> None:
            self.ledger.report(number, self.now, totals, inside)

        self.at(self.random.uniform(0.0001, 0.002), arrives)

    def spend(self, bucket: Bucket, seconds: float, who: list[Member]) -> None:
        self.advance(seconds)
        for member in who:
            member.truth[bucket] += seconds

    @property
    def living(self) -> list[Member]:
        return [member for member in self.members.values() if member.alive]

    def form(self, seconds: float) -> None:
        """All sheets go from what they are in to the first step."""
        self.spend(Bucket.STARTING, seconds, self.living)

    def each(self, do: Callable[[Timesheet], object]) -> None:
        for member in self.living:
            assert member.sheet is not None
            do(member.sheet)

    def step(self) -> None:
        self.each(Timesheet.begin_step)
        self.spend(Bucket.PRODUCTIVE, STEP_S - WAIT_S - EXCHANGE_S, self.living)
        self.each(lambda sheet: sheet.enter(Bucket.SNAPSHOT_STALL))
        self.spend(Bucket.SNAPSHOT_STALL, EXCHANGE_S, self.living)
        self.each(lambda sheet: sheet.enter(Bucket.PRODUCTIVE))
        self.spend(Bucket.EXPOSED_COMMUNICATION, WAIT_S, self.living)
        self.each(lambda sheet: sheet.add(Bucket.EXPOSED_COMMUNICATION, WAIT_S))
        self.each(Timesheet.end_step)

    def validate(self) -> None:
        spells = [member.sheet.spend(Bucket.VALIDATION) for member in self.living if member.sheet]
        for spell in spells:
            spell.__enter__()
        self.spend(Bucket.VALIDATION, VALIDATION_S, self.living)
        for spell in spells:
            spell.__exit__(None, None, None)

    def lose(self, victim: int, detection_s: float, reconfiguration_s: float, voided: bool = True) -> None:
        """Somewhere in a step a member dies. Voided: the step is to be done again; else those left complete it."""
        dead = self.members[victim]
        self.each(Timesheet.begin_step)
        until_fault_s = self.random.uniform(0.1, 0.9) * STEP_S
        self.spend(Bucket.RECOMPUTATION if voided else Bucket.PRODUCTIVE, until_fault_s, self.living)
        t_fault, dead.alive = self.now, False
        dead.truth[Bucket.DETECTION] += detection_s
        noticed_s = min(0.004, detection_s) if self.raises_at_once else detection_s
        self.spend(Bucket.DETECTION, noticed_s, self.living)
        if self.raises_at_once:
            # The collective raises, and the rank waits to be told.
            self.each(Timesheet.void_step if voided else lambda sheet: sheet.enter(Bucket.DETECTION))
        self.spend(Bucket.DETECTION, detection_s - noticed_s, self.living)
        self.ledger.lost(victim, self.now)
        self.ledger.fault(t_fault, self.now)
        if voided:
            self.each(Timesheet.void_step)
        else:
            self.each(Timesheet.end_step)
        self.each(lambda sheet: sheet.enter(Bucket.RECONFIGURATION))
        self.spend(Bucket.RECONFIGURATION, reconfiguration_s, self.living)

    def truth(self) -> dict[Bucket, float]:
        found: dict[Bucket, float] = defaultdict(float)
        for member in self.members.values():
            for bucket, seconds in member.truth.items():
                found[bucket] += seconds
        return found
