"""Where in a flat tensor does each piece of a rank lie? Of any rank, from the model and the layout alone.

A rank's own segments are its pieces of the buckets it reduces (`parallel/zero.py`); a second owner lays out the same
ones for a rank it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from concertina.layout.axis import ENDS, GROUPS, STAGE
from concertina.layout.buckets import Slot, plan_buckets, rank_slots
from concertina.layout.fold import Layout
from concertina.layout.shards import kv_copies, shards

if TYPE_CHECKING:
    from concertina.config import ModelConfig

__all__ = ["Segment", "segments"]


@dataclass(frozen=True)
class Segment:
    """One rank's pieces of a bucket, by parameter, in a flat tensor of `length` elements, padding included."""

    slots: dict[str, Slot]
    length: int
    decay: bool

    @property
    def filled(self) -> int:
        """Elements that are somebody's; padding comes after them."""
        return sum(slot.numel for slot in self.slots.values())


def segments(model: ModelConfig, layout: Layout, rank: int) -> list[Segment]:
    """The segments of `rank`, one a bucket, in the order of buckets: the same whoever asks."""
    found = []
    for members in plan_buckets(shards(model, layout, rank).values()):
        ranks = _ranks(model, layout, rank, members[0].group)
        boxes = {shard.name: shard.box for shard in members}
        # Every rank's segment is padded to the first one's, which is the longest.
        length = sum(slot.numel for slot in rank_slots(boxes, len(ranks), 0).values())
        found.append(Segment(rank_slots(boxes, len(ranks), ranks.index(rank)), length, members[0].decay))
    return found


def _ranks(model: ModelConfig, layout: Layout, rank: int, group: str) -> tuple[int, ...]:
    """The ranks that hold the same boxes as `rank` of the parameters of `group`."""
    if group in (*GROUPS, STAGE):
        return layout.group_of(group, rank)
    if group == ENDS:
        return layout.ends_of(rank)
    return layout.neighbours_of(rank, kv_copies(model, layout.tp))
