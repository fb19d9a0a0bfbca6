"""Which parameters does a model have, and which box of each does a rank hold, together with whom?

The one table of parameters: the model makes them, buckets reduce them, the planner counts their bytes, all from it.
Every rank that holds the same box adds its part of the gradient: those ranks are the box's group.

    group      holds the same box                                    such as
    edp        the replicas of an expert's slice                     expert weights
    dp_cp      one slice of the lanes of tp, all dp and cp           projections, embeddings
    dp_cp_kv   as dp_cp, and the lanes that share a key-value head   keys and values where tp exceeds their heads
    dp_cp_tp   the whole pipeline stage                              norms, routers, projections to latents
    dp_cp_ends as dp_cp, of the first and last pipeline stage        an embedding that the head shares

Shapes: V vocabulary, D hidden, N key-value heads, G query heads of each, C width of a head, F width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

from concertina.layout.axis import ENDS, Axis
from concertina.layout.box import Box, cut
from concertina.layout.fold import Layout

if TYPE_CHECKING:
    from concertina.config import ModelConfig

__all__ = ["Fill", "HeadCut", "Shard", "cut_heads", "kv_copies", "shards"]

Fill = Literal["normal", "ones", "zeros"]
Cuts = dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Shard:
    """The box of a named global tensor that a rank computes with.

    `group` names the ranks that hold the same box; `fill` says how it starts. `weight`: elements it counts for when
    buckets are filled, equal on every rank of the world, which the size of the box is not where cuts are uneven.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    group: str
    fill: Fill
    weight: int

    @property
    def expert(self) -> bool:
        """Whether it belongs to the experts' grid."""
        return self.group == "edp"

    @property
    def decay(self) -> bool:
        """Whether weight decay applies: to matrices, not to norms and biases."""
        return self.fill == "normal"


@dataclass(frozen=True)
class HeadCut:
    """The heads of one lane: key-value heads [kv), of each the query heads [group); `copies` lanes share a kv head."""

    kv: tuple[int, int]
    group: tuple[int, int]
    copies: int


def kv_copies(model: ModelConfig, tp: int) -> int:
    """How many lanes of tp hold the same key-value head: 1 unless there are fewer heads than lanes."""
    return max(1, tp // model.num_key_value_heads)


def cut_heads(model: ModelConfig, tp: int, lane: int) -> HeadCut:
    """Heads are cut by key-value head, and only where those run out by the query heads of one."""
    heads, copies = model.num_key_value_heads, kv_copies(model, tp)
    group = model.num_attention_heads // heads
    return HeadCut(cut(heads, tp // copies, lane // copies), cut(group, copies, lane % copies), copies)


def shards(model: ModelConfig, layout: Layout, rank: int, layers: Iterable[int] | None = None) -> dict[str, Shard]:
    """Every parameter of `rank` by global name, in the order of computation; a tied weight once.

    `layers`: these, with all that stands outside of layers, wherever they are; absent: what is on the rank's stage.
    """
    table, mine = _Table(model, layout, rank), layout.pieces_of(rank)
    starts, ends = (layers is not None or piece in mine for piece in (0, layout.pieces - 1))
    if starts:
        table.vocabulary("embedding.weight", shared=model.tie_word_embeddings)
    for layer in layout.layers_of(model.num_hidden_layers, rank) if layers is None else layers:
        table.layer(f"layers.{layer}", is_moe=model.is_moe_layer(layer))
    if ends:
        table.everywhere("norm.weight", (model.hidden_size,), "ones")
    if ends and not model.tie_word_embeddings:
        table.vocabulary("head.weight")
    elif ends and not starts:
        table.vocabulary("embedding.weight", shared=True)
    return table.found


class _Table:
    def __init__(self, model: ModelConfig, layout: Layout, rank: int) -> None:
        self.model, self.layout = model, layout
        self.found: dict[str, Shard] = {}
        self.tp, self.lane = layout.tp, layout.coordinate(rank, Axis.TP)
        self.heads = cut_heads(model, layout.tp, self.lane)
        self.experts = cut(model.num_experts, layout.ep, layout.coordinate(rank, Axis.EP))
        self.expert_width = cut(model.moe_intermediate_size, layout.etp, layout.coordinate(rank, Axis.ETP))

    def _add(self, name: str, shape: tuple[int, ...], cuts: Cuts, group: str, fill: Fill, parts: int) -> None:
        start = tuple(cuts[dim][0] if dim in cuts else 0 for dim in range(len(shape)))
        stop = tuple(cuts[dim][1] if dim in cuts else length for dim, length in enumerate(shape))
        self.found[name] = Shard(name, shape, Box(start, stop), group, fill, -(-prod(shape) // parts))

    def everywhere(self, name: str, shape: tuple[int, ...], fill: Fill = "normal") -> None:
        """The same on every rank of the stage."""
        self._add(name, shape, {}, "dp_cp_tp", fill, 1)

    def sliced(self, name: str, shape: tuple[int, ...], dim: int, group: str = "dp_cp") -> None:
        """One slice along `dim` a lane of tp."""
        self._add(name, shape, {dim: cut(shape[dim], self.tp, self.lane)}, group, "normal", self.tp)

    def vocabulary(self, name: str, shared: bool = False) -> None:
        """A row for every token; `shared` between embedding and head."""
        group = ENDS if shared and self.layout.pp > 1 else "dp_cp"
        self.sliced(name, (self.model.vocab_size, self.model.hidden_size), 0, group)

    def queries(self, name: str, shape: tuple[int, ...], first: int, fill: Fill = "normal") -> None:
        """Something a query head has: its dimensions N, G stand at `first`."""
        self._add(name, shape, {first: self.heads.kv, first + 1: self.heads.group}, "dp_cp", fill, self.tp)

    def keys(self, name: str, shape: tuple[int, ...], fill: Fill = "normal") -> None:
        """Something a key-value head has: its dimension N comes first."""
        group = "dp_cp_kv" if self.heads.copies > 1 else "dp_cp"
        self._add(name, shape, {0: self.heads.kv}, group, fill, self.tp // self.heads.copies)

    def layer(self, name: str, is_moe: bool) -> None:
        hidden = (self.model.hidden_size,)
        self.everywhere(f"{name}.attention_norm.weight", hidden, "ones")
        if self.model.kv_lora_rank:
            self._latent_attention(f"{name}.attention")
        else:
            self._attention(f"{name}.attention")
        self.everywhere(f"{name}.feed_forward_norm.weight", hidden, "ones")
        if is_moe:
            self._moe(f"{name}.moe")
        else:
            self._swiglu(f"{name}.mlp", self.model.intermediate_size)

    def _latent_attention(self, name: str) -> None:
        """What all heads are made from is everywhere, what makes them is cut by head."""
        model, hidden, heads = self.model, self.model.hidden_size, self.model.num_attention_heads
        query, latent = model.q_lora_rank, model.kv_lora_rank
        if query:
            self.everywhere(f"{name}.q_down", (query, hidden))
            self.everywhere(f"{name}.q_norm.weight", (query,), "ones")
        self.everywhere(f"{name}.kv_down", (latent + model.qk_rope_head_dim, hidden))
        self.everywhere(f"{name}.kv_norm.weight", (latent,), "ones")
        self.sliced(f"{name}.q", (heads, model.width_of_head, query or hidden), 0)
        self.sliced(f"{name}.kv_up", (heads, model.qk_nope_head_dim + model.v_head_dim, latent), 0)
        self.sliced(f"{name}.output", (hidden, heads, model.v_head_dim), 1)

    def _attention(self, name: str) -> None:
        model, hidden, width = self.model, self.model.hidden_size, self.model.width_of_head
        heads = model.num_key_value_heads
        group = model.num_attention_heads // heads
        self.queries(f"{name}.q", (heads, group, width, hidden), 0)
        self.keys(f"{name}.kv", (heads, 2, width, hidden))
        if model.attention_bias:
            self.queries(f"{name}.q_bias", (heads, group, width), 0, "zeros")
            self.keys(f"{name}.kv_bias", (heads, 2, width), "zeros")
        self.queries(f"{name}.output", (hidden, heads, group, width), 1)
        if model.qk_norm == "head":
            self.everywhere(f"{name}.q_norm.weight", (width,), "ones")
            self.everywhere(f"{name}.k_norm.weight", (width,), "ones")
        elif model.qk_norm == "full":
            self.queries(f"{name}.q_norm.weight", (heads, group, width), 0, "ones")
            self.keys(f"{name}.k_norm.weight", (heads, width), "ones")

    def _swiglu(self, name: str, width: int) -> None:
        self.sliced(f"{name}.w13", (2, width, self.model.hidden_size), 1)
        self.sliced(f"{name}.w2", (self.model.hidden_size, width), 1)

    def _moe(self, name: str) -> None:
        model = self.model
        experts, hidden, width = model.num_experts, model.hidden_size, model.moe_intermediate_size
        self.everywhere(f"{name}.router", (experts, hidden))
        if model.router_noise:
            self.everywhere(f"{name}.noise", (experts, hidden))
        parts = self.layout.ep * self.layout.etp
        cuts = {0: self.experts}
        w13, w2 = (experts, hidden, 2, width), (experts, hidden, width)
        self._add(f"{name}.experts.w13", w13, {**cuts, 3: self.expert_width}, "edp", "normal", parts)
        self._add(f"{name}.experts.w2", w2, {**cuts, 2: self.expert_width}, "edp", "normal", parts)
        if model.shared_expert_intermediate_size:
            self._swiglu(f"{name}.shared", model.shared_expert_intermediate_size)
        if model.shared_expert_gate:
            self.everywhere(f"{name}.shared.gate", (1, hidden))
