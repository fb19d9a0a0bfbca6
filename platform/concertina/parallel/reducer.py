"""When are gradients summed? Bucket by bucket under the backward pass that completes them.

Buckets start in one fixed order on every rank, whatever order gradients arrive in; a parameter that got no gradient
(an expert without tokens) counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from concertina.layout import Box
from concertina.parallel.groups import Groups
from concertina.parallel.zero import Bucket

__all__ = ["BUCKET_BYTES", "GradientReducer", "Reduced", "make_buckets"]

BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's default: large enough for bandwidth, small enough to overlap


@dataclass(frozen=True)
class Reduced:
    """How one parameter is reduced: `group` names its data-parallel group, `decay` whether weight decay applies.

    `weight` is the number of elements it counts for when buckets are filled. It must be equal on every rank of the
    world, which the size of `box` is not when experts are cut unevenly: buckets of all groups start in one order.
    """

    name: str
    box: Box
    group: str
    decay: bool
    weight: int


def make_buckets(
    parameters: dict[str, Tensor], reduced: Iterable[Reduced], groups: Groups, weight_decay: float
) -> list[Bucket]:
    """Cut parameters into buckets in reverse order, which is about the order the backward fills them in.

    Parameters of a bucket share their group and their weight decay. Deterministic: equal on every rank.
    """
    planned: list[tuple[Reduced, list[Reduced]]] = []
    open_buckets: dict[tuple[str, bool], tuple[int, list[Reduced]]] = {}
    for item in reversed(list(reduced)):
        key, size = (item.group, item.decay), item.weight * 4
        filled, members = open_buckets.get(key, (0, []))
        if not members or filled + size > BUCKET_BYTES:
            filled, members = 0, []
            planned.append((item, members))
        members.append(item)
        open_buckets[key] = filled + size, members
    return [
        Bucket(
            {item.name: parameters[item.name] for item in members},
            {item.name: item.box for item in members},
            groups[first.group],
            weight_decay if first.decay else 0.0,
        )
        for first, members in planned
    ]


class GradientReducer:
    """Takes gradients off the parameters as autograd makes them; sums a bucket as soon as its last one is there."""

    def __init__(self, buckets: list[Bucket]) -> None:
        self.buckets = buckets
        self._missing: list[set[str]] = []
        self._started = 0
        self._last = False
        for index, bucket in enumerate(buckets):
            for name, parameter in bucket.parameters.items():
                parameter.register_post_accumulate_grad_hook(partial(self._take, index, name))

    def arm(self, last: bool) -> None:
        """Before each micro-batch's backward; `last` says that gradients are complete after it."""
        self._last = last
        self._missing = [set(bucket.parameters) for bucket in self.buckets]
        self._started = 0

    def _take(self, index: int, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.buckets[index].accumulate(name, parameter.grad)
        parameter.grad = None
        self._missing[index].discard(name)
        while self._last and self._started < len(self.buckets) and not self._missing[self._started]:
            self._start_next()

    def _start_next(self) -> None:
        with torch.no_grad():
            self.buckets[self._started].start_reduce()
        self._started += 1

    def finish(self) -> list[Tensor]:
        """This rank's shard of every bucket's summed gradients. All ranks must call it once a step."""
        while self._started < len(self.buckets):
            self._start_next()
        return [bucket.finish_reduce() for bucket in self.buckets]
