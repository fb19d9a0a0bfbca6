"""Is a member slower than the others, and what is to be done about it? Steps and seconds go in, a remedy comes out.

A world goes at the pace of its slowest rank, and its waiting looks alike on all others. So what is compared is how long
each computes, not how long its steps take. Members of one pipeline stage do like work, in proportion to their loads.
No clock and no network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from concertina.layout import Axis, Layout, Seating, cut_by

__all__ = ["SLOW", "Kind", "Pace", "Paces", "Remedy", "Straggler", "StragglerNews", "Work", "loads_of", "remedies"]

WINDOW_STEPS = 6
WINDOW_S = 1.0  # of short steps: a look at fewer would be a look at noise
WINDOWS = 2  # in a row, so that one hiccup is none: twelve steps in all, where they take a sixth of a second
SLOW = 1.2
NOISE = 4.0  # times the spread of the others
LEAST_GAIN = 0.05
STEADY = 0.85
_UNITS = 1000  # of loads


@dataclass(frozen=True)
class Pace:
    """So many seconds of computing had gone into all of a member's steps when `step` was done, heard at `at_s`."""

    step: int
    busy_s: float
    at_s: float


@dataclass(frozen=True)
class Straggler:
    """`factor` times slower than its like. `step_s`: how long the world's steps take with it."""

    member: int
    factor: float
    step_s: float


@dataclass(frozen=True)
class Work:
    """What a step deals out: so many `units`, of which none is parted, in micro-batches of at most so many (0: of what
    each would get if all got alike). All positions of dp do equally many micro-batches, and in an empty one a unit that
    counts for nothing."""

    units: int
    most: int = 0

    def done(self, dp: int, loads: Sequence[int] = ()) -> list[int]:
        """Units that each position computes."""
        sizes = [stop - start for start, stop in (cut_by(self.units, loads or (1,) * dp, index) for index in range(dp))]
        count = -(-max(sizes) // (self.most or max(1, -(-self.units // dp))))
        return [max(1, size, count) for size in sizes]


@dataclass
class _Run:
    """One member's windows, the newest last: seconds of computing a step, and seconds a step."""

    begin: Pace | None = None
    busy_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOWS))
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOWS))

    def hear(self, pace: Pace) -> None:
        begin = self.begin
        if begin is None or pace.step < begin.step:
            self.begin = pace
            return
        steps = pace.step - begin.step
        if steps >= WINDOW_STEPS and pace.at_s - begin.at_s >= WINDOW_S:
            self.busy_s.append((pace.busy_s - begin.busy_s) / steps)
            self.step_s.append((pace.at_s - begin.at_s) / steps)
            self.begin = pace


class Paces:
    """Of the ranks of one seating, which share out a step's sequences."""

    def __init__(self, seating: Seating, work: Work) -> None:
        self.seating = seating
        self._runs = {member: _Run() for member in seating.members}
        self._done = work.done(seating.layout.dp, seating.loads)

    def hear(self, member: int, pace: Pace) -> None:
        if member in self._runs:
            self._runs[member].hear(pace)

    def pause(self, member: int) -> None:
        """It does something else: what it has done of a window is forgotten."""
        if member in self._runs:
            self._runs[member].begin = None

    @property
    def step_s(self) -> float | None:
        """Seconds a step, of the quickest window; None before there is one."""
        return min((step_s for run in self._runs.values() for step_s in run.step_s), default=None)

    @property
    def are_known(self) -> bool:
        """Whether every member has been heard for long enough."""
        return all(len(run.busy_s) == WINDOWS for run in self._runs.values())

    def stragglers(self) -> list[Straggler]:
        """Those that are slower than their like in every window, beyond what noise makes; the slowest first. Empty
        until all are known."""
        if not self.are_known:
            return []
        found = []
        step_s = self.step_s or 0.0
        for members in self._alike():
            per_window = [self._factors(members, window) for window in range(WINDOWS)]
            for member in members:
                factor = min(factors[member] for factors in per_window)
                if factor > SLOW and all(_stands_out(member, factors) for factors in per_window):
                    found.append(Straggler(member, factor, step_s))
        return sorted(found, key=lambda straggler: -straggler.factor)

    def steady(self) -> dict[int, float]:
        """By how much each is slower than its like, of those of whom all windows say about the same: not of one that
        has just become slower or quicker. Empty until all are known."""
        if not self.are_known:
            return {}
        found: dict[int, float] = {}
        for members in self._alike():
            per_window = [self._factors(members, window) for window in range(WINDOWS)]
            for member in members:
                factors = [factors[member] for factors in per_window]
                if min(factors) > STEADY * max(factors):
                    found[member] = max(factors)
        return found

    def _alike(self) -> Iterator[list[int]]:
        """Members whose work is alike but for their loads: of each pipeline stage."""
        layout = self.seating.layout
        for stage in range(layout.pp):
            yield [m for r, m in enumerate(self.seating.members) if layout.coordinate(r, Axis.PP) == stage]

    def _factors(self, members: Collection[int], window: int) -> dict[int, float]:
        """By how much each is slower than the middle one; of two, than the quicker."""
        rates = {member: self._runs[member].busy_s[window] / self._load(member) for member in members}
        middle = sorted(rates.values())[(len(rates) - 1) // 2]
        return {member: rate / middle if middle > 0 else 1.0 for member, rate in rates.items()}

    def _load(self, member: int) -> float:
        rank = self.seating.rank_of(member)
        assert rank is not None
        return self._done[self.seating.layout.coordinate(rank, Axis.DP)]


def _stands_out(member: int, factors: Mapping[int, float]) -> bool:
    """Whether it is away from the middle by more than the others are."""
    others = sorted(abs(factor - 1.0) for other, factor in factors.items() if other != member)
    spread = others[len(others) // 2] if others else 0.0
    return factors[member] - 1.0 > NOISE * spread


class Kind(StrEnum):
    """What can be done about a member that is slow."""

    REPLACE = "replace"
    """A spare takes its rank."""
    REBALANCE = "rebalance"
    """It gets fewer sequences."""
    EVICT = "evict"
    """The others go on without it."""


@dataclass(frozen=True)
class Remedy:
    """`step_s` is what steps would take then, if computing were all there is to them."""

    kind: Kind
    step_s: float


@dataclass(frozen=True)
class StragglerNews:
    """The data of a `straggler` event; `str` is its one line. `remedy` is empty where nothing is done; with
    `measured_s` it has been, and steps take so long since."""

    member: int
    factor: float
    step_s: float
    remedy: str = ""
    expected_s: float | None = None
    measured_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StragglerNews:
        """Fields of newer versions are passed over. Raises TypeError when one that is needed is absent."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})

    def __str__(self) -> str:
        said = f"member {self.member} is {self.factor:.2f} times slower than its like: steps take {self.step_s:.3f} s"
        if not self.remedy or self.expected_s is None:
            return said
        what = _DONE[Kind(self.remedy)]
        if self.measured_s is None:
            return f"{said}; {what}, {self.expected_s:.3f} s expected"
        return f"steps take {self.measured_s:.3f} s instead of {self.step_s:.3f} s since {what} of member {self.member}"


_DONE = {
    Kind.REPLACE: "a spare has the rank",
    Kind.REBALANCE: "fewer sequences are the share",
    Kind.EVICT: "the others go on without the rank",
}


def loads_of(layout: Layout, members: Collection[int], slowness: Mapping[int, float]) -> tuple[int, ...]:
    """Loads of the positions of dp, each in inverse proportion to the slowest of its ranks; empty where all are alike.
    `members` by rank."""
    factors = _by_position(layout, members, slowness)
    if len(set(factors)) <= 1:
        return ()
    return tuple(max(1, round(_UNITS / factor)) for factor in factors)


def _by_position(layout: Layout, members: Collection[int], slowness: Mapping[int, float]) -> list[float]:
    factors = [1.0] * layout.dp
    for rank, member in enumerate(members):
        position = layout.coordinate(rank, Axis.DP)
        factors[position] = max(factors[position], slowness.get(member, 1.0))
    return factors


def remedies(
    straggler: Straggler,
    seating: Seating,
    slowness: Mapping[int, float],
    work: Work,
    world_without: int,
    has_spare: bool = False,
) -> list[Remedy]:
    """What makes steps shorter by a twentieth at least, the best first. `slowness`: what is known of all members, this
    one included. `world_without`: how many ranks would go on without it."""
    layout, now_s = seating.layout, straggler.step_s
    factors = _by_position(layout, seating.members, slowness)
    others = {member: factor for member, factor in slowness.items() if member != straggler.member}
    without = max(_by_position(layout, seating.members, others), default=1.0)
    loads = loads_of(layout, seating.members, slowness) or (1,) * layout.dp
    pace_now = _slowest(factors, work.done(layout.dp, seating.loads))
    found = [Remedy(Kind.REBALANCE, now_s * _slowest(factors, work.done(layout.dp, loads)) / pace_now)]
    alike = without * max(work.done(layout.dp))
    if world_without:
        found.append(Remedy(Kind.EVICT, now_s * alike / pace_now * layout.world / world_without))
    if has_spare:
        found.append(Remedy(Kind.REPLACE, now_s * alike / pace_now))
    worth = [remedy for remedy in found if remedy.step_s < now_s * (1 - LEAST_GAIN)]
    return sorted(worth, key=lambda remedy: remedy.step_s)


def _slowest(factors: list[float], done: list[int]) -> float:
    """The longest time of a position, in those that a unit takes where nobody is slow."""
    return max(factor * units for factor, units in zip(factors, done, strict=True))
