"""Which nodes were there when, and what could have been made of them? A recorded spot trace: `ms,add|remove,node`.

Pure. Traces: Bamboo's (Thorpe et al., NSDI 2023), MIT; they are read from where the reader has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from concertina.errors import UserError

__all__ = ["Change", "fit", "oracle", "read_trace", "thinned"]


@dataclass(frozen=True)
class Change:
    """What came and went at one moment, seconds from the trace's beginning."""

    at_s: float
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def read_trace(path: Path) -> list[Change]:
    """In the order of time, one for each moment. Raises UserError for a line that is none."""
    found: dict[int, tuple[list[str], list[str]]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            at_ms, what, node = line.strip().split(",")
            added, removed = found.setdefault(int(at_ms), ([], []))
            {"add": added, "remove": removed}[what].append(node)
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}, line {number}: {line!r} is not `ms,add|remove,node`") from error
    return [Change(at_ms / 1000, tuple(added), tuple(removed)) for at_ms, (added, removed) in sorted(found.items())]


def thinned(changes: Sequence[Change], most: int) -> list[Change]:
    """Every k-th of its nodes, in the order in which they come, with the least k by which never more than `most` are
    there. Moments at which nothing is left are left out."""
    nodes = list(dict.fromkeys(node for change in changes for node in change.added))
    for step in range(1, len(nodes) + 1):
        kept = set(nodes[::step])
        found = [
            Change(c.at_s, tuple(n for n in c.added if n in kept), tuple(n for n in c.removed if n in kept))
            for c in changes
        ]
        found = [change for change in found if change.added or change.removed]
        if max(count for _, _, count in spans(found, found[-1].at_s)) <= most:
            return found
    raise UserError(f"no part of the trace has at most {most} nodes at a time")


def spans(changes: Sequence[Change], end_s: float) -> Iterator[tuple[float, float, int]]:
    """(from, to, nodes there) between the changes."""
    count = 0
    moments = [*(change.at_s for change in changes), end_s]
    for change, (begin, end) in zip(changes, pairwise(moments), strict=True):
        count += len(change.added) - len(change.removed)
        yield begin, max(begin, end), count


def oracle(changes: Sequence[Change], end_s: float, per_s: Callable[[int], float]) -> float:
    """What is made without a stall: `per_s` of so many nodes, whenever so many are there."""
    return sum((end - begin) * per_s(count) for begin, end, count in spans(changes, end_s) if count > 0)


def fit(step_s: dict[int, float]) -> Callable[[int], float]:
    """Seconds a step of any world, from those of some: what was measured, else `a + b / world` of least squares."""
    if not step_s:
        raise UserError("no step was measured: the run never came to rest")
    xs, ys = [1 / world for world in step_s], list(step_s.values())
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    return lambda world: step_s.get(world, mean_y + slope * (1 / world - mean_x))
