"""How is a step applied? AdamW on this rank's shard of every bucket, then the weights go round.

Master weights and moments are kept in at least fp32, flat in each bucket's segment; every piece is a box of a named
global tensor, which is how checkpoints see them. Weights travel under the next forward pass, which waits for a bucket
when it comes to it; they are a function of the masters and can always be sent again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from concertina.config import TrainingConfig
from concertina.layout import Segment
from concertina.parallel.collectives import Pending
from concertina.parallel.zero import Bucket
from concertina.train.adamw import KINDS, FlatAdamW

__all__ = ["KINDS", "ShardedAdamW"]


class ShardedAdamW(FlatAdamW):
    """AdamW over this rank's shards of `buckets`, whose weights it sends round.

    With `initial`, masters begin as the weights that are there, else as room that state is moved into.
    """

    def __init__(self, buckets: list[Bucket], training: TrainingConfig, initial: bool = True) -> None:
        segments = [Segment(bucket.own, len(bucket.shard), bucket.weight_decay > 0) for bucket in buckets]
        masters = [bucket.master() if initial else torch.empty_like(bucket.shard) for bucket in buckets]
        super().__init__(segments, masters, training, initial)
        self.buckets = buckets
        self._bucket_of = {name: index for index, bucket in enumerate(buckets) for name in bucket.parameters}
        self._travelling: dict[int, Pending] = {}

    def local_sum_of_squares(self, shards: list[Tensor]) -> Tensor:
        """Of this rank's gradient shards, float64 scalar; summed over the world it is the squared global norm."""
        total = torch.zeros((), dtype=torch.float64, device=shards[0].device)
        for shard in shards:
            total += torch.linalg.vector_norm(shard, dtype=torch.promote_types(shard.dtype, torch.float32)) ** 2
        return total

    def publish(self) -> None:
        """Start sending every rank the weights that the masters round to, those that are read first first.

        Collective over every bucket; `arrive` must be called for a weight before it is read.
        """
        assert not self._travelling, "weights are sent once a step"
        # Buckets stand in the order of the backward.
        for index in reversed(range(len(self.buckets))):
            self._travelling[index] = self.buckets[index].start_gather(self.masters[index].detach())

    def arrive(self, names: Iterable[str] | None = None) -> None:
        """Wait until these weights (absent: all) are what the masters round to."""
        wanted = self._bucket_of.values() if names is None else (self._bucket_of[name] for name in names)
        for index in wanted:
            if index in self._travelling:
                self._travelling.pop(index).finish()

    def forget_weights(self) -> None:
        """Only the state is needed any more: the weights and the buckets' buffers may go."""
        assert not self._travelling, "weights are still under way"
        self.buckets = []

    def forget_travelling(self) -> None:
        """Weights under way have been waited for by whoever gave this up; nobody reads them."""
        self._travelling.clear()
