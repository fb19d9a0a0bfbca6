"""What does a rank keep for others? Second copies of their optimizer shards, updated as they update their own.

In a step only summed gradients travel, 4 bytes a parameter: a rank sends its shard of every bucket to its second owner
and gets those of the ranks it is second owner of. Then both apply the same update to the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concertina.config import Job
from concertina.layout import Seating, segments
from concertina.parallel.collectives import Pending, exchange
from concertina.parallel.groups import SECONDS, Groups
from concertina.train.adamw import FlatAdamW

__all__ = ["SecondCopies"]


class SecondCopies:
    """The shards that `rank` is second owner of, by first owner, and the way of gradients to them and from it.

    Copies begin empty: `filled` is set by whoever moves state into them.
    """

    def __init__(self, job: Job, seating: Seating, rank: int, groups: Groups, like: Tensor) -> None:
        self.to = seating.seconds[rank]
        self.copies: dict[int, FlatAdamW] = {}
        self.received: dict[int, list[Tensor]] = {}
        for first in seating.firsts(rank):
            theirs = segments(job.model, seating.layout, first)
            masters = [like.new_empty(segment.length) for segment in theirs]
            self.copies[first] = FlatAdamW(theirs, masters, job.training, initial=False)
            self.received[first] = [torch.empty_like(master) for master in masters]
        self.filled = not self.copies
        self._group = groups[SECONDS] if self.to is not None or self.copies else None
        self._pending: Pending | None = None

    def start(self, shards: list[Tensor]) -> None:
        """Start sending this rank's gradient shards, which stay as they are until `finish`, and receiving others'."""
        assert self.filled, "second copies are filled before the first step"
        if self._group is None:
            return
        sends = [(shard, self.to) for shard in shards if self.to is not None]
        receives = [(shard, first) for first, theirs in self.received.items() for shard in theirs]
        self._pending = exchange(sends, receives, self._group)

    def finish(self) -> None:
        """Wait for it. From then on this rank can do the step's update of every copy."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.finish()

    def apply(self, scale: float, rate: float) -> None:
        """The update that every first owner makes of its own. Nothing here can fail or wait."""
        for first, copy in self.copies.items():
            copy.apply(self.received[first], scale, rate)
