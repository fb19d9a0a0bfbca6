"""Which degrees do not fit, in one line each, and which values would?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Fault", "divisors", "misfits", "world_faults"]

Degrees = Mapping[str, int]


class Fault(NamedTuple):
    """`axis=6 must divide dp*cp*tp=8`, without the remedy."""

    axis: str
    verb: str
    number: str


def misfits(world: int, degrees: Degrees, faults: Callable[[Degrees], Sequence[Fault]]) -> list[tuple[str, str]]:
    """(axis, line with numbers and remedy) of each axis that `faults` names, empty when all fit."""
    found = faults(degrees)
    lines = []
    for axis in dict.fromkeys(fault.axis for fault in found):
        clauses = _clauses([fault for fault in found if fault.axis == axis])
        works = _working(world, axis, degrees, faults)
        lines.append((axis, f"{axis}={degrees[axis]} {clauses}: set layout.{axis} to {_one_of(works)}"))
    return lines


def world_faults(world: int, degrees: Degrees) -> list[Fault]:
    """What a world refuses. Each grid stops at its first axis: what a later one could be depends on it."""
    if world % degrees["pp"]:
        return [Fault("pp", "must divide", f"world={world}")]
    stage = world // degrees["pp"]
    name = "world/pp" if degrees["pp"] > 1 else "world"
    return [*_side(("tp", "cp"), degrees, name, stage), *_side(("etp", "ep"), degrees, "dp*cp*tp", stage)]


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _side(axes: Sequence[str], degrees: Degrees, name: str, left: int) -> Iterator[Fault]:
    for axis in axes:
        degree = degrees[axis]
        if left % degree:
            yield Fault(axis, "must divide", f"{name}={left}")
            return
        left, name = left // degree, f"{name}/{axis}" if degree > 1 else name


def _clauses(faults: Sequence[Fault]) -> str:
    """One axis' faults as one clause: `must divide a=1 and b=2 and is more than c=3`."""
    verbs = dict.fromkeys(fault.verb for fault in faults)
    return " and ".join(f"{v} {' and '.join(f.number for f in faults if f.verb == v)}" for v in verbs)


def _working(world: int, axis: str, degrees: Degrees, faults: Callable[[Degrees], Sequence[Fault]]) -> list[int]:
    """Values that mend `axis` and break no other; 1 when the others leave nothing."""
    broken = {fault.axis for fault in faults(degrees)} - {axis}

    def works(value: int) -> bool:
        return {fault.axis for fault in faults({**degrees, axis: value})} <= broken

    return [value for value in divisors(world) if works(value)] or [1]


def _one_of(values: Sequence[int], most: int = 12) -> str:
    """`1, 2, 4 or 8`; long lists lose their middle, not their ends."""
    words = [str(value) for value in values]
    if len(words) > most:
        words = [*words[: most - 2], "...", words[-1]]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
