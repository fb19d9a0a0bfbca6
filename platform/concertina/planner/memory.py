"""How many bytes does a rank's training state take, with what it keeps for others? What the engine will allocate.

The table of shards says what is held, the plan of buckets what is reduced together, its slots what is updated here: the
engine makes its tensors from the same three, its own and those that it keeps for other ranks. Activations and buffers
that are there for the time of an exchange are not counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from concertina.layout import (
    ENDS,
    Axis,
    Layout,
    Shard,
    cut,
    kv_copies,
    plan_buckets,
    rank_slots,
    segment_length,
    shards,
)

if TYPE_CHECKING:  # building the schema takes longer than the count
    from concertina.config import ModelConfig, Precision

__all__ = ["Extremes", "RankBytes", "extremes", "rank_bytes"]

_WEIGHT = {"float64": 8, "float32": 4, "bfloat16": 2}
_WIDE = {"float64": 8, "float32": 4, "bfloat16": 4}
"""Of gradients, master weights and moments: at least fp32."""
_SEGMENTS = 3  # master weight and both moments
_RECEIVED = 1  # gradients come into a segment of their own
_STEP_COUNTER = 4  # AdamW keeps one fp32 scalar a bucket


@dataclass(frozen=True)
class RankBytes:
    """Bytes of a rank's training state by kind.

    `gradients`: of every bucket the buffer that is reduced, and the shard that comes out where its group has more than
    one rank, padding included. `optimizer`: master weights, both moments, and AdamW's step counters. `second_copies`:
    the same for every rank this one is second owner of, and the segments that their gradients are received in.
    """

    weights: int
    gradients: int
    optimizer: int
    second_copies: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.second_copies

    def to_json(self) -> dict[str, int]:
        """The kinds and their total."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "second_copies": self.second_copies,
            "total": self.total,
        }


@dataclass(frozen=True)
class Extremes:
    """The first of the ranks that hold most and of those that hold least."""

    largest: int
    most: RankBytes
    smallest: int
    least: RankBytes


def rank_bytes(
    model: ModelConfig, layout: Layout, precision: Precision, rank: int, firsts: Sequence[int] = ()
) -> RankBytes:
    """What `rank` allocates that is second owner of the ranks `firsts` (`Seating.firsts`)."""
    held = shards(model, layout, rank).values()
    sizes, wide = _group_sizes(model, layout), _WIDE[precision]
    elements, buckets = _reduced(held, sizes)
    copies = [_reduced(shards(model, layout, first).values(), sizes)[1] for first in firsts]
    return RankBytes(
        weights=sum(shard.box.size for shard in held) * _WEIGHT[precision],
        gradients=elements * wide,
        optimizer=_flat(buckets, wide, _SEGMENTS),
        second_copies=sum(_flat(lengths, wide, _SEGMENTS + _RECEIVED) for lengths in copies),
    )


def _flat(lengths: Sequence[int], wide: int, number: int) -> int:
    """Bytes of so many segments of every bucket, and of AdamW's counters."""
    return sum(lengths) * wide * number + len(lengths) * _STEP_COUNTER


def _reduced(held: Iterable[Shard], sizes: Mapping[str, int]) -> tuple[int, list[int]]:
    """Elements of all reduce buffers, and the length of every bucket's segment."""
    elements, lengths = 0, []
    for members in plan_buckets(held):
        size = sizes[members[0].group]
        # Every rank's segment is as long as the first one's.
        length = segment_length([rank_slots({shard.name: shard.box for shard in members}, size, 0)])
        elements += length * (size + 1 if size > 1 else 1)
        lengths.append(length)
    return elements, lengths


def _group_sizes(model: ModelConfig, layout: Layout) -> dict[str, int]:
    """Ranks of each group that a shard may name."""
    replicas = layout.dp * layout.cp
    return {
        "edp": layout.edp,
        "dp_cp": replicas,
        "dp_cp_kv": replicas * kv_copies(model, layout.tp),
        "dp_cp_tp": layout.stage,
        ENDS: 2 * replicas,
    }


def extremes(model: ModelConfig, layout: Layout, precision: Precision) -> Extremes:
    """The largest and the smallest rank, without asking all of them: only those that differ.

    Who is second owner of whom depends on nodes, which are not known here: in a world above 1 every rank is taken to
    keep the copy of one rank that is like itself. On nodes of unequal size some keep none and others several.
    """
    kinds: dict[tuple[int, int, int, int], int] = {}
    for rank in range(layout.world):
        kinds.setdefault(_kind(model, layout, rank), rank)
    alone = layout.world == 1
    found = {rank: rank_bytes(model, layout, precision, rank, () if alone else (rank,)) for rank in kinds.values()}
    largest = max(found, key=lambda rank: found[rank].total)
    smallest = min(found, key=lambda rank: found[rank].total)
    return Extremes(largest, found[largest], smallest, found[smallest])


def _kind(model: ModelConfig, layout: Layout, rank: int) -> tuple[int, int, int, int]:
    """Ranks that agree in this hold boxes of the same shapes: the stage, the lane of tp, how many experts, how wide."""
    first, last = cut(model.num_experts, layout.ep, layout.coordinate(rank, Axis.EP))
    inner, outer = cut(model.moe_intermediate_size, layout.etp, layout.coordinate(rank, Axis.ETP))
    return layout.coordinate(rank, Axis.PP), layout.coordinate(rank, Axis.TP), last - first, outer - inner
