"""Which part of a named global tensor is meant? An N-dimensional slice, and the one rule for uneven cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["Box", "cut", "cut_by"]


def cut(length: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` when `length` things are cut into `parts`.

    Sizes differ by at most one, larger ones come first; with more parts than things the last parts are empty.

    The one rule for sequences over dp, experts over ep, layers over pp and rows over optimizer shards.
    """
    small, larger = divmod(length, parts)
    start = index * small + min(index, larger)
    return start, start + small + (index < larger)


def cut_by(length: int, loads: Sequence[int], index: int) -> tuple[int, int]:
    """(start, stop) of part `index` when `length` things are cut in proportion to `loads`, which are positive: within
    one of it, what is left over to the largest remainders; and none empty where there are enough."""
    total = sum(loads)
    sizes = [length * load // total for load in loads]
    by_remainder = sorted(range(len(loads)), key=lambda part: (-(length * loads[part] % total), part))
    for part in by_remainder[: length - sum(sizes)]:
        sizes[part] += 1
    if length >= len(loads):
        for part in [part for part, size in enumerate(sizes) if size == 0]:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[part] = 1
    start = sum(sizes[:index])
    return start, start + sizes[index]


@dataclass(frozen=True, order=True)
class Box:
    """Half-open slice `start[d] <= i < stop[d]` of every dimension d; a scalar's box has none and size 1."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.start) == len(self.stop), (self.start, self.stop)
        assert all(0 <= a <= b for a, b in zip(self.start, self.stop, strict=True)), (self.start, self.stop)

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box of a whole tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements; 0 when any dimension is empty."""
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The elements in both, or None when there are none."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def contains(self, other: Box) -> bool:
        """Whether every element of `other` is in this box; an empty box is in every box."""
        return other.size == 0 or self.intersect(other) == other

    def cut(self, dim: int, parts: int, index: int) -> Box:
        """Part `index` of this box cut evenly along `dim`."""
        a, b = cut(self.shape[dim], parts, index)
        start, stop = list(self.start), list(self.stop)
        start[dim], stop[dim] = self.start[dim] + a, self.start[dim] + b
        return Box(tuple(start), tuple(stop))

    def slices(self, within: Box | None = None) -> tuple[slice, ...]:
        """Index of this box in the global tensor, or in the tensor that holds exactly the box `within`."""
        origin = within.start if within else (0,) * len(self.start)
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, origin, strict=True))
