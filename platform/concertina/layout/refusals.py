"""Which degrees do not fit a world, and which values would?"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["divisors", "misfits", "one_of"]


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def one_of(values: Sequence[object], most: int = 12) -> str:
    """`1, 2, 4 or 8`; long lists lose their middle, not their ends."""
    words = [str(value) for value in values]
    if len(words) > most:
        words = [*words[: most - 2], "...", words[-1]]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def misfits(world: int, pp: int, cp: int, tp: int, ep: int, etp: int) -> list[tuple[str, str]]:
    """(axis, line) for each degree that does not fit, empty when all do.

    Each side stops at its first: the values a later axis could take depend on the earlier ones.
    """
    given = {"world": world, "pp": pp, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
    small = [(key, f"{key}={value} must be at least 1") for key, value in given.items() if value < 1]
    if small:
        return small
    if world % pp:
        return [("pp", _line("pp", pp, "world", world))]
    stage = world // pp
    of_stage = "world/pp" if pp > 1 else "world"
    attention = _side((("tp", tp), ("cp", cp)), of_stage, stage)
    expert = _side((("etp", etp), ("ep", ep)), "dp*cp*tp", stage)
    return attention + expert


def _side(axes: Sequence[tuple[str, int]], name: str, left: int) -> list[tuple[str, str]]:
    for axis, degree in axes:
        if left % degree:
            return [(axis, _line(axis, degree, name, left))]
        left, name = left // degree, f"{name}/{axis}" if degree > 1 else name
    return []


def _line(axis: str, degree: int, name: str, number: int) -> str:
    return f"{axis}={degree} must divide {name}={number}: set layout.{axis} to {one_of(divisors(number))}"
