"""What does a rank hold for one generation? Its part of the model, its shard, what it keeps for others, its groups.

A share is built beside the one in use and becomes current when it holds all it must; nothing outside it refers to it
but the engine, so that it is gone, with its groups and their threads, when the engine lets go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from concertina.config import Job
from concertina.layout import Seating, kv_copies
from concertina.model import Decoder, Part
from concertina.model.deferred import DeferredGradients
from concertina.model.timed import pace_of, pretend
from concertina.parallel.groups import KV, Groups
from concertina.parallel.reducer import GradientReducer, make_buckets
from concertina.parallel.underway import leave
from concertina.state.transfer import Holdings
from concertina.train.adamw import FlatAdamW
from concertina.train.optimizer import ShardedAdamW
from concertina.train.seconds import SecondCopies

__all__ = ["DTYPES", "Share", "Values"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

Values = Literal["initial", "empty"]
"""What a share begins with: the start values of training, or memory that state is moved into."""


def _come_to(optimizer: ShardedAdamW, check: Callable[[], None], part: Part, _: Any) -> None:
    """A forward comes to a part of the model: its weights must be there."""
    check()
    optimizer.arrive(part.made.values())


class Share:
    """One rank's share of a seating. No collective makes it; the groups must be formed."""

    def __init__(
        self,
        job: Job,
        seating: Seating,
        groups: Groups,
        values: Values,
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` is called all along a step, and raises when it is not to be finished."""
        layout, rank = seating.layout, groups.rank
        sharers = layout.neighbours_of(rank, kv_copies(job.model, layout.tp))
        assert groups.layout == layout, "groups were formed for another layout"
        assert groups[KV].ranks == sharers, "groups were formed for another number of lanes of a key-value head"
        self.job, self.seating, self.layout, self.rank, self.groups = job, seating, layout, rank, groups
        training, initial = job.training, values == "initial"
        dtype = DTYPES[training.precision]
        self.decoder = Decoder(job.model, dtype, device, groups, training.seed, job.layout, initial)
        if job.emulates_compute:
            pretend(self.decoder, pace_of(job))
        self.shards = self.decoder.shards
        parameters: dict[str, Tensor] = dict(self.decoder.named_tensors())
        buckets = make_buckets(parameters, self.shards.values(), groups, training.weight_decay)
        self.deferred = DeferredGradients()  # empty unless a step is computed inside `deferring`
        self.reducer = GradientReducer(buckets, self.deferred.owes, check)
        self.optimizer = ShardedAdamW(self.reducer.buckets, training, initial)
        self.seconds = SecondCopies(job, seating, rank, groups, buckets[0].shard)
        self.filled, self.weights_due = initial, not initial
        self._alike: dict[str, Tensor] | None = None  # once stripped
        optimizer = weakref.proxy(self.optimizer)  # hooks hold nothing that would hold this share
        for part in self.decoder.modules():
            if isinstance(part, Part) and part.made:
                part.register_forward_pre_hook(partial(_come_to, optimizer, check))

    def holdings(self) -> Holdings:
        """Every piece of the optimizer's state that has a place here, own ones first, then those kept for others."""
        return self._views(self.optimizer, *self.seconds.copies.values())

    def held(self) -> Holdings:
        """Those of `holdings` that can be given away: what nothing has been moved into yet is left out."""
        copies = self.seconds.copies.values() if self.seconds.filled else ()
        return self._views(*([self.optimizer] if self.filled else []), *copies)

    def _views(self, *owners: FlatAdamW) -> Holdings:
        found: Holdings = {}
        for owner in owners:
            for name, held in owner.views().items():
                found.setdefault(name, []).append(held)
        return found

    def held_alike(self) -> dict[str, Tensor]:
        """What all ranks hold alike and no gradient moves, by the name that checkpoints know: the routers' biases."""
        if self._alike is not None:
            return self._alike
        return {f"buffer/{name}": bias for name, bias in self.decoder.router_biases().items()}

    def strip(self) -> None:
        """Keep the optimizer's state alone, which others may still want: weights, gradients and their buffers go, so
        that the next share finds room. Nothing is under way any more."""
        if self._alike is not None:
            return
        self._alike = {name: tensor.clone() for name, tensor in self.held_alike().items()}
        self.optimizer.forget_weights()
        del self.decoder, self.reducer, self.deferred

    def fill(self, updates: int) -> None:
        """All holdings have been moved in, and have had this many updates."""
        for owner in (self.optimizer, *self.seconds.copies.values()):
            owner.updates = updates
        self.filled = self.seconds.filled = True

    def abandon(self) -> None:
        """Wait for what was begun over groups that are fenced: until it has ended its memory is not free."""
        leave(self.groups.world.wires)
        self.optimizer.forget_travelling()
