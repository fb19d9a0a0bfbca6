"""When are gradients summed? Bucket by bucket under the backward pass that completes them.

Buckets start in one fixed order on every rank, whatever order gradients arrive in; a parameter that got no gradient
(an expert without tokens) counts as zero. A parameter of which a part is still owed (its gradient is deferred, or only
one of two uses has come) holds its bucket back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from concertina.layout import Shard, plan_buckets
from concertina.parallel.groups import Groups
from concertina.parallel.zero import Bucket

__all__ = ["GradientReducer", "make_buckets"]


def make_buckets(
    parameters: dict[str, Tensor], shards: Iterable[Shard], groups: Groups, weight_decay: float
) -> list[Bucket]:
    """The buckets of `plan_buckets`, with their buffers."""
    return [
        Bucket(
            {shard.name: parameters[shard.name] for shard in members},
            {shard.name: shard.box for shard in members},
            groups[members[0].group],
            weight_decay if members[0].decay else 0.0,
        )
        for members in plan_buckets(shards)
    ]


class GradientReducer:
    """Takes gradients off the parameters as autograd makes them; sums a bucket as soon as its last one is there.

    `owed` says of a parameter whether a part of its gradient is still to come. `check` is called with every gradient,
    and raises when the step is not to be finished.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        owed: Callable[[Tensor], bool] = lambda _: False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.buckets = buckets
        self._owed, self._check = owed, check
        self.begin()
        for index, bucket in enumerate(buckets):
            for name, parameter in bucket.parameters.items():
                # A parameter holds its hooks where Python's collector does not look: they must not hold us in turn, or
                # neither the engine nor the threads of its groups would ever go.
                parameter.register_post_accumulate_grad_hook(partial(_take, ref(self), index, name))

    def begin(self) -> None:
        """A step: nothing of it is here, whatever became of the one before."""
        self._missing = [set(bucket.parameters) for bucket in self.buckets]
        self._final: set[str] = set()
        self._started = 0

    def arm(self, last: bool, names: Collection[str] | None = None) -> None:
        """Before each backward; `last` says that it is the last one of the parameters `names` (absent: of all)."""
        if last:
            self._final.update(*self._missing) if names is None else self._final.update(names)

    def take(self, index: int, name: str, parameter: Tensor) -> None:
        """Take what autograd has added up in `parameter`, bucket `index`'s, and start what is complete."""
        self._check()
        owed = self._owed(parameter)
        if owed and parameter.grad is None:
            return  # autograd calls also where all that came is deferred
        assert parameter.grad is not None
        self.buckets[index].accumulate(name, parameter.grad)
        parameter.grad = None
        if owed or name not in self._final:
            return
        self._missing[index].discard(name)
        while self._started < len(self.buckets) and not self._missing[self._started]:
            self._start_next()

    def _start_next(self) -> None:
        with torch.no_grad():
            self.buckets[self._started].start_reduce()
        self._started += 1

    def finish(self) -> list[Tensor]:
        """This rank's shard of every bucket's summed gradients. All ranks must call it once a step; nothing is owed."""
        owed = [name for bucket in self.buckets for name, p in bucket.parameters.items() if self._owed(p)]
        assert not owed, f"gradients still to come: {owed}"
        while self._started < len(self.buckets):
            self._start_next()
        self.begin()
        return [bucket.finish_reduce() for bucket in self.buckets]


def _take(reducer: ReferenceType[GradientReducer], index: int, name: str, parameter: Tensor) -> None:
    alive = reducer()
    assert alive is not None, "a reducer is kept as long as gradients are made for it"
    alive.take(index, name, parameter)
