"""Which parameters reduce together, and which piece of each does a rank of the group own (ZeRO-1)?

Each parameter's local box is cut along one dimension into one piece a rank of its group; a bucket lays the pieces out
rank-major (rank, parameter, rows), padded to the longest rank, so that one reduce-scatter serves the bucket and every
piece is exactly one box. Source: ZeRO (Rajbhandari et al. 2020), stage 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from concertina.layout.box import Box, cut
from concertina.layout.shards import Shard

__all__ = ["BUCKET_BYTES", "Slot", "plan_buckets", "plan_slots", "rank_slots", "segment_length", "split_dim"]

BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's default: large enough for bandwidth, small enough to overlap


def plan_buckets(shards: Iterable[Shard]) -> list[list[Shard]]:
    """Cut parameters into buckets in reverse order, which is about the order the backward fills them in.

    Parameters of a bucket share their group and whether weight decay applies. Equal on every rank of the world.
    """
    planned: list[list[Shard]] = []
    open_buckets: dict[tuple[str, bool], tuple[int, list[Shard]]] = {}
    for shard in reversed(list(shards)):
        key, size = (shard.group, shard.decay), shard.weight * 4
        filled, members = open_buckets.get(key, (0, []))
        if not members or filled + size > BUCKET_BYTES:
            filled, members = 0, []
            planned.append(members)
        members.append(shard)
        open_buckets[key] = filled + size, members
    return planned


def split_dim(shape: tuple[int, ...], parts: int) -> int:
    """The dimension a box is cut along: the first one with a row for every part, else the longest."""
    assert shape, "a scalar parameter has no dimension to cut: give it shape (1,)"
    for dim, length in enumerate(shape):
        if length >= parts:
            return dim
    return max(range(len(shape)), key=lambda dim: shape[dim])


@dataclass(frozen=True)
class Slot:
    """One rank's piece of one parameter: where it is in the local tensor, in the segment, and globally."""

    name: str
    dim: int
    start: int
    stop: int
    offset: int
    shape: tuple[int, ...]
    box: Box

    @property
    def numel(self) -> int:
        return self.box.size


def plan_slots(boxes: dict[str, Box], parts: int) -> list[dict[str, Slot]]:
    """Cut every parameter's local box for `parts` ranks: the slots of each rank by name, offsets in its segment."""
    return [rank_slots(boxes, parts, index) for index in range(parts)]


def rank_slots(boxes: dict[str, Box], parts: int, index: int) -> dict[str, Slot]:
    """Those of rank number `index`. The first rank's are the longest: `cut` puts larger pieces first."""
    offset, slots = 0, {}
    for name, local in boxes.items():
        dim = split_dim(local.shape, parts)
        start, stop = cut(local.shape[dim], parts, index)
        box = local.cut(dim, parts, index)
        slots[name] = Slot(name, dim, start, stop, offset, box.shape, box)
        offset += box.size
    return slots


def segment_length(ranks: list[dict[str, Slot]]) -> int:
    """Elements of one rank's segment: those of the longest rank, which all are padded to."""
    return max(sum(slot.numel for slot in slots.values()) for slots in ranks)
