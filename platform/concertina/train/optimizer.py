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
from concertina.layout import Box
from concertina.parallel.collectives import Pending
from concertina.parallel.zero import Bucket

__all__ = ["KINDS", "ShardedAdamW"]

KINDS = ("master", "exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """AdamW (Loshchilov and Hutter 2019) over the shards of `buckets`; `updates` counts the steps applied."""

    def __init__(self, buckets: list[Bucket], training: TrainingConfig) -> None:
        self.buckets = buckets
        self.updates = 0
        self._bucket_of = {name: index for index, bucket in enumerate(buckets) for name in bucket.parameters}
        self._travelling: dict[int, Pending] = {}
        self.masters = [torch.nn.Parameter(bucket.master()) for bucket in buckets]
        groups = [
            {"params": [master], "weight_decay": bucket.weight_decay}
            for master, bucket in zip(self.masters, buckets, strict=True)
        ]
        betas = (training.adam_beta1, training.adam_beta2)
        # The moments are made here rather than at the first step, so that a checkpoint can be loaded into them.
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=training.adam_epsilon, fused=True)
        for master in self.masters:
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def local_sum_of_squares(self, shards: list[Tensor]) -> Tensor:
        """Of this rank's gradient shards, float64 scalar; summed over the world it is the squared global norm."""
        total = torch.zeros((), dtype=torch.float64, device=shards[0].device)
        for shard in shards:
            total += torch.linalg.vector_norm(shard, dtype=torch.promote_types(shard.dtype, torch.float32)) ** 2
        return total

    def apply(self, shards: list[Tensor], scale: float, rate: float) -> None:
        """Update with `scale` times the summed gradients at learning rate `rate`, and start sending the weights.

        Collective over every bucket; `arrive` must be called for a weight before it is read.
        """
        self.updates += 1
        for group, master, shard in zip(self._adamw.param_groups, self.masters, shards, strict=True):
            group["lr"] = rate
            master.grad = shard.mul_(scale)
            self._adamw.state[master]["step"].fill_(self.updates - 1)
        self._adamw.step()
        for master in self.masters:
            master.grad = None
        self.publish()

    def publish(self) -> None:
        """Start sending every rank the weights that the masters round to, those that are read first first."""
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

    def pieces(self) -> dict[str, tuple[Box, Tensor]]:
        """Every piece this rank owns: `<kind>/<parameter>` to its box and its live storage, kinds as in KINDS."""
        found: dict[str, tuple[Box, Tensor]] = {}
        for bucket, master in zip(self.buckets, self.masters, strict=True):
            state = self._adamw.state[master]
            segments = (master.detach(), state["exp_avg"], state["exp_avg_sq"])
            for kind, segment in zip(KINDS, segments, strict=True):
                for name, (slot, view) in bucket.own_views(segment).items():
                    found[f"{kind}/{name}"] = (slot.box, view)
        return found
