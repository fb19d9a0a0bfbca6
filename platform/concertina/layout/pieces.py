"""Which box of each parameter's optimizer shard (master weight, two moments) does a rank own?

As `buckets.py` cuts it: the local box of a parameter, in as many parts as its group has ranks. Every element of the
model has one owner. Parameters of a pipeline stage that differ only in their layer are cut alike, so there is one table
for all of them: a few lanes (the distinct local boxes), and in each lane the ranks that share it, in the order of their
parts.

Not re-exported by the package: it needs numpy, which takes longer to import than most commands that need a layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from concertina.layout.axis import ENDS
from concertina.layout.box import Box
from concertina.layout.buckets import split_dim
from concertina.layout.fold import Layout
from concertina.layout.seating import Seating
from concertina.layout.shards import kv_copies, shards

if TYPE_CHECKING:
    from concertina.config import ModelConfig

__all__ = ["Cuts", "Ownership", "holdings", "ownership", "pieces"]

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cuts:
    """How the parameters `names` are cut: `lanes[l]` is a local box, `ranks[l, i]` owns part i of it."""

    names: tuple[str, ...]
    lanes: tuple[Box, ...]
    ranks: Ints

    @cached_property
    def start(self) -> Ints:
        """First index of each lane, [lane, dim]."""
        return np.array([lane.start for lane in self.lanes], dtype=np.int64)

    @cached_property
    def stop(self) -> Ints:
        """Index behind the last of each lane, [lane, dim]."""
        return np.array([lane.stop for lane in self.lanes], dtype=np.int64)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The dimension each lane is cut along."""
        return tuple(split_dim(lane.shape, self.parts) for lane in self.lanes)

    @property
    def parts(self) -> int:
        """Ranks that share a lane."""
        return int(self.ranks.shape[1])

    @cached_property
    def edges(self) -> Ints:
        """Part i of a lane is edges[lane, i] to edges[lane, i + 1] of its dimension. Empty parts come last."""
        index = np.arange(self.parts + 1)
        lengths = [lane.shape[dim] for lane, dim in zip(self.lanes, self.dims, strict=True)]
        first = np.array([lane.start[dim] for lane, dim in zip(self.lanes, self.dims, strict=True)])
        small, larger = np.divmod(np.array(lengths), self.parts)
        return first[:, None] + index * small[:, None] + np.minimum(index, larger[:, None])

    @cached_property
    def _places(self) -> tuple[Ints, Ints]:
        """Lane and part of each rank, -1 of those that have none of these parameters."""
        lane, part = np.full((2, int(self.ranks.max()) + 1), -1, dtype=np.int64)
        lane[self.ranks] = np.arange(len(self.lanes))[:, None]
        part[self.ranks] = np.arange(self.parts)
        return lane, part

    def box(self, rank: int) -> Box:
        """What `rank` owns of each of these parameters; may be empty."""
        lanes, parts = self._places
        if rank >= len(lanes) or lanes[rank] < 0:
            return Box(self.lanes[0].start, self.lanes[0].start)
        lane = int(lanes[rank])
        return self.lanes[lane].cut(self.dims[lane], self.parts, int(parts[rank]))


@dataclass(frozen=True, eq=False)
class Ownership:
    """Who owns what of a model under a layout. `names`: all parameters in order; each is in one of `cuts`."""

    names: tuple[str, ...]
    cuts: tuple[Cuts, ...]

    def ordered(self, per_cuts: list[Box]) -> dict[str, Box]:
        """Parameter -> what `per_cuts` has for its cuts, in the model's order, empty boxes left out."""
        return {name: per_cuts[index] for name, index in self.index.items() if per_cuts[index].size}

    @cached_property
    def index(self) -> dict[str, int]:
        """Parameter -> which of `cuts`, in the model's order."""
        found = {name: index for index, cuts in enumerate(self.cuts) for name in cuts.names}
        return {name: found[name] for name in self.names}


@lru_cache(maxsize=16)
def ownership(model: ModelConfig, layout: Layout) -> Ownership:
    """The tables of all parameters."""
    dense = [layer for layer in range(model.num_hidden_layers) if not model.is_moe_layer(layer)]
    sparse = [layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer)]
    samples = [*dense[:1], *sparse[:1]]
    stages = _stages(model, layout)
    names = tuple(shards(model, Layout(1), 0))
    alike: dict[tuple[str, int], list[str]] = {}
    for name in names:
        alike.setdefault((re.sub(r"^layers\.\d+\.", "layers.*.", name), stages(name)), []).append(name)
    # The first lanes.size ranks stand in different lanes, on either grid.
    local = [shards(model, layout, rank, samples) for rank in range(max(layout.tp, layout.ep * layout.etp))]
    sample_of = {re.sub(r"^layers\.\d+\.", "layers.*.", name): name for name in reversed(local[0])}
    cuts = []
    for (kind, stage), same in alike.items():
        sample = sample_of[kind]
        ranks = _ranks(layout, local[0][sample].group, kv_copies(model, layout.tp))
        lanes = tuple(local[int(rank)][sample].box for rank in ranks[:, 0])
        cuts.append(Cuts(tuple(same), lanes, ranks + stage * layout.stage))
    return Ownership(names, tuple(cuts))


def _stages(model: ModelConfig, layout: Layout) -> Callable[[str], int]:
    """Which pipeline stage a parameter is on; of a shared embedding, the first."""
    of_layer = {
        layer: piece % layout.pp
        for piece in range(layout.pieces)
        for layer in layout.piece_layers(model.num_hidden_layers, piece)
    }

    def stage(name: str) -> int:
        if name.startswith("layers."):
            return of_layer[int(name.split(".")[1])]
        return 0 if name.startswith("embedding.") else layout.pp - 1

    return stage


def _ranks(layout: Layout, group: str, lanes_of_kv_head: int) -> Ints:
    """Every group of that name (`shards.py`) of the first stage, [lane, position]: the ranks that hold one lane."""
    stage = np.arange(layout.stage)
    if group == "dp_cp_tp":
        return stage[None]
    if group == "edp":
        return stage.reshape(layout.edp, -1).T
    copies = lanes_of_kv_head if group == "dp_cp_kv" else 1
    blocks = stage.reshape(-1, layout.tp // copies, copies)
    ranks = blocks.transpose(1, 0, 2).reshape(layout.tp // copies, -1)
    return np.concatenate([ranks, ranks + (layout.pp - 1) * layout.stage], 1) if group == ENDS else ranks


def pieces(model: ModelConfig, layout: Layout, rank: int) -> dict[str, Box]:
    """The box of each parameter whose optimizer shard `rank` owns, in the model's order; empty ones left out."""
    table = ownership(model, layout)
    return table.ordered([cuts.box(rank) for cuts in table.cuts])


def holdings(model: ModelConfig, seating: Seating, member: int) -> dict[str, list[Box]]:
    """What `member` keeps: its own pieces, then those of each rank it is second owner of. No two boxes overlap."""
    rank = seating.rank_of(member)
    if rank is None:
        return {}
    held: dict[str, list[Box]] = {}
    for owner in (rank, *seating.firsts(rank)):
        for name, box in pieces(model, seating.layout, owner).items():
            held.setdefault(name, []).append(box)
    return held
