"""How many bytes does a rank send in a step? By group and kind, from the model, the layout, the batch, the routing.

The numbers that a recording counts (`parallel/trace.py` says what counts as sent), to the byte where the routing is
that of the step; a planner puts in `even_counts`, which need not be whole. For dropless models: what lanes exchange to
drop alike is not counted yet.

    group          kind             what
    tp             all_gather       tokens into column-parallel products
                   reduce_scatter   sums out of row-parallel ones; in the backward the two change places
                   all_reduce       the loss, norms over all heads; without sequence parallelism it takes the place of
                                    both others
    tp_cp          all_reduce       counts of the router; over cp where lanes of tp have the same tokens
    cp             all_gather       keys and values, forward and again backward; their gradients are a reduce_scatter
                   exchange         in place of both: in a ring, gradients along
    etp_ep         counts           rows for every expert, once a layer with experts
    ep             all_to_all       rows to their experts and back, forward and backward
    etp            all_gather       rows to the other slices of their experts
                   reduce_scatter   the slices' outputs back; in the backward the two change places
    edp, dp_cp ..  reduce_scatter   gradients to the owners of pieces, in at least fp32 (ZeRO-1)
                   all_gather       updated weights
    seconds        exchange         the summed gradients of own pieces, as wide, to the rank's second owner
    pp             exchange         hidden states to the next piece's stage, their gradients back
    world          all_reduce       what the ranks of a step must agree on

Sources: Korthikanti et al. 2022 (sequence parallelism), arXiv 2504.14960 (dispatcher), Rajbhandari et al. 2020 (ZeRO).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from concertina.config import ModelConfig, Precision
from concertina.errors import ConfigError
from concertina.layout import (
    ENDS,
    Axis,
    Exchange,
    Layout,
    chunks_size,
    cut,
    cut_heads,
    kv_copies,
    plan_buckets,
    plan_slots,
    segment_length,
    segments,
    shards,
    travels_in_ring,
)

__all__ = [
    "Counts",
    "Sender",
    "Traffic",
    "agreement",
    "context",
    "crossing",
    "dispatch",
    "even_counts",
    "micro_batch",
    "seconds",
    "step",
    "zero",
]

Traffic = dict[tuple[str, str], float]
"""(group, kind) to bytes."""

Counts = Sequence[Sequence[float]]
"""Rows for every expert, by position in the group etp_ep (etp fastest)."""

_ELEMENT_BYTES: dict[Precision, int] = {"float64": 8, "float32": 4, "bfloat16": 2}
_COUNT_BYTES = _AGREED_BYTES = 8
_AGREED = 8
"""Norm, three losses, tokens, choices dropped, acknowledgement, control word: what `train/engine.py` sums beside tokens
of experts."""


@dataclass(frozen=True)
class Sender:
    """The rank whose bytes are counted, and what it computes with. `has_second`: another rank keeps its second copy;
    `recomputed`: the kinds of `training.activation_checkpointing`; `document_mask` that of `data`."""

    model: ModelConfig
    layout: Layout
    rank: int
    precision: Precision = "float32"
    sequence_parallel: bool = True
    has_second: bool = False
    context_exchange: Exchange = "auto"
    recomputed: frozenset[str] = frozenset()
    document_mask: bool = False

    @property
    def element_bytes(self) -> int:
        """Of weights and activations."""
        return _ELEMENT_BYTES[self.precision]

    @property
    def wide_bytes(self) -> int:
        """Of what is summed: at least fp32."""
        return max(4, self.element_bytes)

    @property
    def row_bytes(self) -> int:
        """Of one token's activations."""
        return self.model.hidden_size * self.element_bytes

    @property
    def num_layers(self) -> int:
        """Of the stage of this rank."""
        return len(self.layout.layers_of(self.model.num_hidden_layers, self.rank))

    @property
    def num_moe_layers(self) -> int:
        """Of the stage of this rank, those with experts."""
        return sum(map(self.model.is_moe_layer, self.layout.layers_of(self.model.num_hidden_layers, self.rank)))

    @property
    def has_head(self) -> bool:
        """Whether the model ends here."""
        return self.layout.pieces - 1 in self.layout.pieces_of(self.rank)

    @property
    def crossings(self) -> int:
        """Ways into products over tp and out again, forward and backward, of hidden states: attention's where it has no
        latents, a dense or shared expert's of every layer; embedding's out and back in, the head's in and back out."""
        alone = self.num_moe_layers if not self.model.shared_expert_intermediate_size else 0
        of_layers = (1 if self.model.kv_lora_rank else 2) * self.num_layers - alone
        return 2 * of_layers + (0 in self.layout.pieces_of(self.rank)) + self.has_head

    @property
    def latent_width(self) -> int:
        """Elements of a token that go into latent attention, instead of its hidden state; 0 where there is none."""
        model = self.model
        if not model.kv_lora_rank:
            return 0
        return (model.q_lora_rank or model.hidden_size) + model.kv_lora_rank + model.qk_rope_head_dim


def step(sender: Sender, length: int, micro_batches: Sequence[int], routing: Sequence[Sequence[Counts]]) -> Traffic:
    """Everything of one training step, for micro-batches of so many sequences of `length` tokens.

    `routing`: by micro-batch, by layer with experts of this rank's stage. Raises ConfigError for a model that drops
    tokens.
    """
    if sender.model.capacity.factor is not None:
        raise ConfigError("what ranks exchange to drop alike is not counted yet: leave model.capacity.factor out")
    computed = (micro_batch(sender, length, *each) for each in zip(micro_batches, routing, strict=True))
    return _sum([*computed, zero(sender), seconds(sender), agreement(sender)])


def micro_batch(sender: Sender, length: int, sequences: int, routing: Sequence[Counts]) -> Traffic:
    """Forward and backward; a rank without a sequence computes one all the same, so that its peers need not wait."""
    model, tp = sender.model, sender.layout.tp
    cp, place = sender.layout.cp, sender.layout.coordinate(sender.rank, Axis.CP)
    tokens = max(1, sequences) * chunks_size(length, cp, place)
    per_token = sender.wide_bytes * tokens
    parts = [
        _times(crossing(sender, tokens), sender.crossings),
        *_latent_crossings(sender, tokens),
        _between_stages(sender, tokens),
    ]
    if sender.has_head:
        parts.append(_all_reduce("tp", tp, per_token))  # of the loss, the largest logit
        parts.append(_all_reduce("tp", tp, 2 * per_token))  # and the sum of exponentials, the target's logit
    if model.qk_norm == "full":  # queries and keys, forward and backward
        parts.append(_times(_all_reduce("tp", tp, per_token), 4 * sender.num_layers))
    parts.append(_times(context(sender, length, sequences), sender.num_layers))
    parts.append(_times(_counted(sender, max(1, sequences)), sender.num_moe_layers))
    if not sender.sequence_parallel:  # gradients of the tokens that every lane routes for itself
        parts.append(_times(_all_reduce("tp", tp, per_token * model.hidden_size), sender.num_moe_layers))
    for layer in routing:
        moved = dispatch(sender, layer)
        parts += [moved, {key: count for key, count in moved.items() if key[1] != "counts"}]
    return _sum([*parts, *_computed_again(sender, length, max(1, sequences), routing)])


def _between_stages(sender: Sender, tokens: int) -> Traffic:
    """From every piece here but the model's last to the next one, and from all but its first back."""
    layout = sender.layout
    if layout.pp == 1:
        return {}
    here = layout.pieces_of(sender.rank)
    messages = 2 * len(here) - (0 in here) - sender.has_head
    rows = _own_tokens(sender, tokens) if sender.sequence_parallel else tokens
    return {("pp", "exchange"): messages * rows * sender.row_bytes}


def _counted(sender: Sender, sequences: int) -> Traffic:
    """What one router's counts of sequences cost who has tokens of them."""
    layout, whole = sender.layout, sequences * sender.model.num_experts * _COUNT_BYTES
    if sender.sequence_parallel or layout.tp == 1:
        return _all_reduce("tp_cp", layout.tp * layout.cp, whole)
    return _all_reduce("cp", layout.cp, whole)


def _computed_again(sender: Sender, length: int, sequences: int, routing: Sequence[Counts]) -> Iterator[Traffic]:
    """What a micro-batch sends once more where regions of layers are computed again: up to the last product of the
    region, whose way out nobody needs."""
    model, kinds, tp, cp = sender.model, sender.recomputed, sender.layout.tp, sender.layout.cp
    tokens = sequences * chunks_size(length, cp, sender.layout.coordinate(sender.rank, Axis.CP))
    across = crossing(sender, tokens)
    way_in = {key: sent for key, sent in across.items() if key[1] == "all_gather"}
    way_out = {key: sent for key, sent in across.items() if key[1] != "all_gather"}
    if {"layer", "attention", "core"} & kinds:  # the backward's own exchange is counted already
        yield _times(context(sender, length, sequences, again=True), sender.num_layers)
    if {"layer", "attention"} & kinds:
        latents = _entering(sender, tokens, sender.latent_width) if sender.sequence_parallel else {}
        yield _times(latents if sender.latent_width else way_in, sender.num_layers)
        if model.qk_norm == "full":
            yield _times(_all_reduce("tp", tp, sender.wide_bytes * tokens), 2 * sender.num_layers)
    if "layer" in kinds:  # attention is not the end
        yield _times(way_out, sender.num_layers)
    if {"layer", "mlp"} & kinds:
        yield _times(way_in, sender.num_layers - sender.num_moe_layers)
    if {"layer", "moe"} & kinds:
        yield _times(_counted(sender, sequences), sender.num_moe_layers)
        if model.shared_expert_intermediate_size:
            yield _times(across, sender.num_moe_layers)
        yield from (dispatch(sender, layer) for layer in routing)


def crossing(sender: Sender, tokens: int) -> Traffic:
    """Into a column-parallel product and out of a row-parallel one, forward; the backward is as much."""
    if sender.layout.tp > 1 and not sender.sequence_parallel:
        return _sum_over_lanes(sender, tokens, sender.model.hidden_size)
    return _sum([_entering(sender, tokens, sender.model.hidden_size), _leaving(sender, tokens)])


def _latent_crossings(sender: Sender, tokens: int) -> list[Traffic]:
    """Latents in and hidden states out, forward; in the backward hidden states in and latents out, of every layer."""
    width, hidden = sender.latent_width, sender.model.hidden_size
    if not width:
        return []
    if not sender.sequence_parallel:  # sums of outputs, and of latents' gradients
        parts = [_sum_over_lanes(sender, tokens, hidden), _sum_over_lanes(sender, tokens, width)]
    else:
        forward = [_entering(sender, tokens, width), _leaving(sender, tokens)]
        parts = [*forward, _entering(sender, tokens, hidden), _leaving(sender, tokens, width)]
    return [_times(part, sender.num_layers) for part in parts]


def _own_tokens(sender: Sender, tokens: int) -> int:
    start, stop = cut(tokens, sender.layout.tp, sender.layout.coordinate(sender.rank, Axis.TP))
    return stop - start


def _entering(sender: Sender, tokens: int, width: int) -> Traffic:
    own, others = _own_tokens(sender, tokens), sender.layout.tp - 1
    return {("tp", "all_gather"): others * own * width * sender.element_bytes}


def _leaving(sender: Sender, tokens: int, width: int | None = None) -> Traffic:
    rest = tokens - _own_tokens(sender, tokens)
    return {("tp", "reduce_scatter"): rest * (width or sender.model.hidden_size) * sender.element_bytes}


def _sum_over_lanes(sender: Sender, tokens: int, width: int) -> Traffic:
    return _all_reduce("tp", sender.layout.tp, tokens * width * sender.wide_bytes)


def context(sender: Sender, length: int, sequences: int, again: bool = False) -> Traffic:
    """Keys and values of one layer to the other ranks of cp, forward and, with their gradients, backward; or forward
    alone, once `again`."""
    model, cp, place = sender.model, sender.layout.cp, sender.layout.coordinate(sender.rank, Axis.CP)
    if cp == 1:
        return {}
    kv = cut_heads(model, sender.layout.tp, sender.layout.coordinate(sender.rank, Axis.TP)).kv
    value_width = model.v_head_dim if model.kv_lora_rank else model.width_of_head
    row = max(1, sequences) * (kv[1] - kv[0]) * (model.width_of_head + value_width)
    own, after = (chunks_size(length, cp, index % cp) for index in (place, place + 1))
    if travels_in_ring(sender.context_exchange, length):
        once = (length - after) * sender.element_bytes
        passed = once if again else 2 * once + (length - own) * sender.wide_bytes
        return {("cp", "exchange"): row * passed}
    gathered = (cp - 1) * own * row * sender.element_bytes
    if again:
        return {("cp", "all_gather"): gathered}
    return {
        ("cp", "all_gather"): 2 * gathered,
        ("cp", "reduce_scatter"): (length - own) * row * sender.wide_bytes,
    }


def dispatch(sender: Sender, counts: Counts) -> Traffic:
    """One layer's rows to the experts and back, forward; the backward is as much, without the counts.

    Even routing of T tokens to K experts, D wide: 2 T K D (g-1)/g elements over ep; over etp, whose lanes gather rows
    that are there for every choice, g times that.
    """
    layout, model = sender.layout, sender.model
    lane, place = layout.coordinate(sender.rank, Axis.ETP), layout.coordinate(sender.rank, Axis.EP)
    here = slice(*cut(model.num_experts, layout.ep, place))
    own = counts[place * layout.etp + lane]
    arriving = [sum(counts[source * layout.etp + lane][here]) for source in range(layout.ep)]
    of_all_lanes = sum(sum(rows[here]) for rows in counts)
    leaving, arrived = sum(own) - sum(own[here]), sum(arriving)
    return {
        ("etp_ep", "counts"): (layout.etp * layout.ep - 1) * model.num_experts * _COUNT_BYTES,
        ("ep", "all_to_all"): (leaving + arrived - arriving[place]) * sender.row_bytes,
        ("etp", "all_gather"): (layout.etp - 1) * arrived * sender.row_bytes,
        ("etp", "reduce_scatter"): (of_all_lanes - arrived) * sender.row_bytes,
    }


def even_counts(sender: Sender, tokens: float) -> Counts:
    """What to expect where every rank routes `tokens` tokens and every expert is as likely."""
    model, layout = sender.model, sender.layout
    rows = tokens * model.num_experts_per_tok / model.num_experts
    return [[rows] * model.num_experts] * (layout.etp * layout.ep)


def zero(sender: Sender) -> Traffic:
    """Once a step: every bucket's gradients to the owners of their pieces, and the updated weights back."""
    layout, rank = sender.layout, sender.rank
    parts: list[Traffic] = []
    for members in plan_buckets(shards(sender.model, layout, rank).values()):
        group = members[0].group
        size = len(_members(sender, group))
        others = size - 1
        length = segment_length(plan_slots({shard.name: shard.box for shard in members}, size))
        gradients, weights = others * length * sender.wide_bytes, others * length * sender.element_bytes
        parts.append({(group, "reduce_scatter"): gradients, (group, "all_gather"): weights})
    return _sum(parts)


def _members(sender: Sender, group: str) -> tuple[int, ...]:
    layout, rank = sender.layout, sender.rank
    if group == "dp_cp_kv":
        return layout.neighbours_of(rank, kv_copies(sender.model, layout.tp))
    return layout.ends_of(rank) if group == ENDS else layout.group_of(group, rank)


def seconds(sender: Sender) -> Traffic:
    """Once a step: this rank's shard of every bucket's gradients to its second owner, padding included."""
    if not sender.has_second:
        return {}
    held = segments(sender.model, sender.layout, sender.rank)
    return {("seconds", "exchange"): sum(segment.length for segment in held) * sender.wide_bytes}


def agreement(sender: Sender) -> Traffic:
    """Once a step: one vector of float64 over the world."""
    model = sender.model
    elements = _AGREED + sum(map(model.is_moe_layer, range(model.num_hidden_layers))) * model.num_experts
    return _all_reduce("world", sender.layout.world, elements * _AGREED_BYTES)


def _all_reduce(group: str, size: int, whole_bytes: int) -> Traffic:
    return {(group, "all_reduce"): -(-2 * (size - 1) * whole_bytes // size)}


def _times(traffic: Traffic, number: int) -> Traffic:
    return {key: number * sent for key, sent in traffic.items()}


def _sum(parts: Iterable[Traffic]) -> Traffic:
    total: Traffic = {}
    for part in parts:
        for key, sent in part.items():
            if sent:
                total[key] = total.get(key, 0) + sent
    return total
