"""How do positions on a grid become ranks? Mixed radix: the first axis varies fastest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from concertina.layout.axis import Axis

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """Axes with their degrees, fastest first: rank = sum of coordinate * stride."""

    axes: tuple[Axis, ...]
    degrees: tuple[int, ...]

    @property
    def size(self) -> int:
        """Ranks of the grid."""
        return prod(self.degrees)

    def stride(self, axis: Axis) -> int:
        """Distance in ranks between neighbours along `axis`."""
        return prod(self.degrees[: self.axes.index(axis)])

    def degree(self, axis: Axis) -> int:
        """Size of `axis`."""
        return self.degrees[self.axes.index(axis)]

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Position of `rank` along `axis`."""
        return rank // self.stride(axis) % self.degree(axis)

    def offsets(self, axes: Iterable[Axis]) -> list[int]:
        """Ranks of the sub-grid that `axes` span through rank 0, ascending."""
        wanted = set(axes)
        ranks = [0]
        for axis in self.axes:  # fastest first: each slower axis appends shifted copies, so the list stays sorted
            if axis in wanted:
                stride = self.stride(axis)
                ranks = [step * stride + rank for step in range(self.degree(axis)) for rank in ranks]
        return ranks

    def groups(self, axes: tuple[Axis, ...]) -> list[list[int]]:
        """All ranks, cut into the groups in which only `axes` vary, by first rank, ranks ascending."""
        inside = self.offsets(axes)
        starts = self.offsets(axis for axis in self.axes if axis not in axes)
        return [[start + offset for offset in inside] for start in starts]

    def group_of(self, axes: tuple[Axis, ...], rank: int) -> tuple[int, ...]:
        """The one of those groups that holds `rank`."""
        start = rank - sum(self.coordinate(rank, axis) * self.stride(axis) for axis in axes)
        return tuple(start + offset for offset in self.offsets(axes))
