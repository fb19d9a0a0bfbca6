"""Which pieces under one layout have elements in common with which pieces under another?

No piece is compared with every other: lanes are few, and inside two lanes the parts are intervals in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from concertina.layout.box import Box
from concertina.layout.pieces import Cuts, Ints

__all__ = ["Overlaps", "overlaps"]


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Row m: what `ranks_a[m]` owns under one layout and `ranks_b[m]` under the other, start[m] to stop[m] [dim]."""

    ranks_a: Ints
    ranks_b: Ints
    start: Ints
    stop: Ints

    @classmethod
    def joined(cls, some: list[Overlaps], dims: int) -> Overlaps:
        """All rows, one after the other."""
        if not some:
            none, nowhere = np.empty(0, np.int64), np.empty((0, dims), np.int64)
            return cls(none, none, nowhere, nowhere)
        fields = zip(*((each.ranks_a, each.ranks_b, each.start, each.stop) for each in some), strict=True)
        return cls(*(np.concatenate(field) for field in fields))

    def take(self, rows: Ints) -> Overlaps:
        """These rows, in this order."""
        return Overlaps(self.ranks_a[rows], self.ranks_b[rows], self.start[rows], self.stop[rows])


def overlaps(a: Cuts, b: Cuts, within: Box | None = None) -> Overlaps:
    """Every pair of pieces with common elements, cut to `within`; two pieces overlap in one box."""
    lanes_a, lanes_b = _lanes(a, within), _lanes(b, within)
    start = np.maximum(a.start[lanes_a][:, None], b.start[lanes_b][None])
    stop = np.minimum(a.stop[lanes_a][:, None], b.stop[lanes_b][None])
    if within is not None:
        start, stop = np.maximum(start, within.start), np.minimum(stop, within.stop)
    found = []
    for x, y in zip(*np.nonzero((start < stop).all(-1)), strict=True):
        found.append(_in_lanes(a, int(lanes_a[x]), b, int(lanes_b[y]), start[x, y], stop[x, y]))
    return Overlaps.joined(found, a.start.shape[1])


def _lanes(cuts: Cuts, within: Box | None) -> Ints:
    """The lanes that have elements in `within`."""
    if within is None:
        return np.arange(len(cuts.lanes))
    return np.flatnonzero((np.maximum(cuts.start, within.start) < np.minimum(cuts.stop, within.stop)).all(-1))


def _in_lanes(a: Cuts, lane_a: int, b: Cuts, lane_b: int, start: Ints, stop: Ints) -> Overlaps:
    """The parts of two lanes inside start to stop, which both lanes hold."""
    dim_a, dim_b = a.dims[lane_a], b.dims[lane_b]
    first_a, edges_a = _edges(a.edges[lane_a], start[dim_a], stop[dim_a])
    first_b, edges_b = _edges(b.edges[lane_b], start[dim_b], stop[dim_b])
    if dim_a == dim_b:
        both = np.unique(np.concatenate((edges_a, edges_b)))
        parts_a = np.searchsorted(edges_a, both[:-1], side="right") - 1
        parts_b = np.searchsorted(edges_b, both[:-1], side="right") - 1
        bounds = {dim_a: (both[:-1], both[1:])}
    else:
        count_a, count_b = len(edges_a) - 1, len(edges_b) - 1
        parts_a, parts_b = np.repeat(np.arange(count_a), count_b), np.tile(np.arange(count_b), count_a)
        bounds = {
            dim_a: (edges_a[parts_a], edges_a[parts_a + 1]),
            dim_b: (edges_b[parts_b], edges_b[parts_b + 1]),
        }
    starts, stops = np.tile(start, (len(parts_a), 1)), np.tile(stop, (len(parts_a), 1))
    for dim, (low, high) in bounds.items():
        starts[:, dim], stops[:, dim] = low, high
    return Overlaps(a.ranks[lane_a, parts_a + first_a], b.ranks[lane_b, parts_b + first_b], starts, stops)


def _edges(edges: Ints, start: int, stop: int) -> tuple[int, Ints]:
    """The first part that has something between start and stop, and the edges from there on, cut to them."""
    first = int(np.searchsorted(edges, start, side="right")) - 1
    last = int(np.searchsorted(edges, stop, side="left"))
    return first, np.clip(edges[first : last + 1], start, stop)
