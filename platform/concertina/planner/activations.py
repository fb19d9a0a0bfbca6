"""How much of a forward does a rank keep for its backward? Tensor by tensor, with and without computing some again.

Counted is what autograd saves inside the layers under even routing, of one micro-batch, or of those that a pipeline
stage has in flight, with what it has sent of them. Outside of layers the head holds its gradients, which it makes in
its forward (the inputs', the weight's). Scalars and a norm's scales of heads are left out; latent attention is not
counted.
Letters: R tokens of this lane between products, T of all lanes (of cp, of its own chunks), Q rows for the experts here,
D, E, K, F as in the model, H and V the widths of this lane's query heads and key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from concertina.layout import Axis, chunks_size, cut, cut_heads
from concertina.planner.traffic import Sender
from concertina.schedule.pipeline import training_plan

__all__ = ["Activations", "activations", "layer_bytes"]

Kernels = Literal["cpu", "cuda"]
_INDEX = 8  # int64
_BLOCKWISE = 1024
"""Longest sequence for which a CPU keeps the probabilities of wide dtypes (`model/attention_blocks.py`)."""
_MOST_BLOCKS, _LEAST_POSITIONS = 8, 32


@dataclass(frozen=True)
class Activations:
    """Bytes. `kept`: of all layers, between forward and backward; `again`: beside it, what the largest kind takes in a
    layer while it is computed again."""

    kept: int
    again: int

    @property
    def peak(self) -> int:
        return self.kept + self.again


@dataclass(frozen=True)
class _Kept:
    """One tensor or several: what part of the layer it is inside, and which cheap kind would make it again."""

    half: Literal["attention", "moe", "mlp"]
    num_bytes: float
    kind: str = ""
    inside: str = ""
    """The region, smaller than the half, that it is inside: `core`, `experts`."""


def activations(
    sender: Sender, length: int, sequences: int, kernels: Kernels = "cuda", micro_batches: int = 1
) -> Activations:
    """Of the rank of `sender`, by its `recomputed`, at the moment in a step of so many micro-batches of so many
    sequences at which the most is kept."""
    model, layout = sender.model, sender.layout
    sent = round(_Sizes(sender, length, sequences, kernels).residual)
    kept, again = {}, 0
    for piece in layout.pieces_of(sender.rank):
        layers = layout.piece_layers(model.num_hidden_layers, piece)
        found = [layer_bytes(sender, length, sequences, model.is_moe_layer(layer), kernels) for layer in layers]
        kept[piece] = sum(each.kept for each in found) + (sent if piece < layout.pieces - 1 else 0)
        again = max(again, *(each.again for each in found))
    plan = training_plan(layout.pp, layout.virtual, micro_batches).actions[layout.coordinate(sender.rank, Axis.PP)]
    signs = (kept[action.piece] if action.direction == "forward" else -kept[action.piece] for action in plan)
    return Activations(max(accumulate(signs)), again)


def layer_bytes(sender: Sender, length: int, sequences: int, is_moe: bool, kernels: Kernels = "cuda") -> Activations:
    """Of one layer."""
    kinds = sender.recomputed
    sizes = _Sizes(sender, length, sequences, kernels)
    tensors = [*sizes.attention(), *(sizes.moe() if is_moe else sizes.mlp())]
    inputs = sizes.residual
    halves = {"attention", "moe" if is_moe else "mlp"}
    if "layer" in kinds:
        return Activations(round(inputs), round(sum(each.num_bytes for each in tensors) + inputs))
    kept = inputs * len(halves)
    again: dict[str, float] = {}
    for each in tensors:
        if each.half in kinds:
            again[each.half] = again.get(each.half, 0.0) + each.num_bytes
        elif each.inside and each.inside in kinds:
            again[each.inside] = again.get(each.inside, 0.0) + each.num_bytes
        elif each.kind and each.kind in kinds:
            again[each.kind] = again.get(each.kind, 0.0) + each.num_bytes
        else:
            kept += each.num_bytes
    if "core" in kinds and "attention" not in kinds:
        kept += sizes.core_inputs
    return Activations(round(kept), round(max(again.values(), default=0.0)))


class _Sizes:
    """What there is in a layer, in bytes."""

    def __init__(self, sender: Sender, length: int, sequences: int, kernels: Kernels) -> None:
        model, layout = sender.model, sender.layout
        self.model, self.layout, self.sender, self.kernels = model, layout, sender, kernels
        self.length, self.sequences = length, sequences
        lane = layout.coordinate(sender.rank, Axis.TP)
        self.all_tokens = sequences * chunks_size(length, layout.cp, layout.coordinate(sender.rank, Axis.CP))
        start, stop = cut(self.all_tokens, layout.tp, lane) if sender.sequence_parallel else (0, self.all_tokens)
        self.tokens = stop - start
        heads = cut_heads(model, layout.tp, lane)
        (first, last), (low, high) = heads.kv, heads.group
        self.key_values = last - first
        self.heads = self.key_values * (high - low)
        # Even routing: every rank of etp_ep gets as many rows as it sends, times the lanes that gather them.
        self.rows = self.tokens * model.num_experts_per_tok
        inner, outer = cut(model.moe_intermediate_size, layout.etp, layout.coordinate(sender.rank, Axis.ETP))
        self.expert_width = outer - inner
        self.travels = layout.etp * layout.ep > 1
        self.gathered = layout.tp > 1 and sender.sequence_parallel

    @property
    def _element(self) -> int:
        return self.sender.element_bytes

    @property
    def _wide(self) -> int:
        return self.sender.wide_bytes

    @property
    def residual(self) -> float:
        """The input of either half [R, D]."""
        return self.tokens * self.model.hidden_size * self._element

    @property
    def core_inputs(self) -> float:
        """Queries, keys and values before rotation."""
        return self.all_tokens * (self.heads + 2 * self.key_values) * self.model.width_of_head * self._element

    def _norm(self, half: Literal["attention", "moe", "mlp"], is_read: bool) -> Iterator[_Kept]:
        """Scales, and the output, if something keeps it as it is: gathered it is another tensor."""
        yield _Kept(half, self.tokens * self._wide)
        if is_read:
            rows = self.all_tokens if self.gathered else self.tokens
            yield _Kept(half, rows * self.model.hidden_size * self._element, "" if self.gathered else "norm")

    def attention(self) -> Iterator[_Kept]:
        yield from self._norm("attention", is_read=True)
        width = self.all_tokens * self.model.width_of_head * self._element
        if self.model.qk_norm != "none":
            yield _Kept("attention", width * (self.heads + self.key_values))
        yield _Kept("attention", width * self.heads)  # what the core gives and the output projection keeps
        yield _Kept("attention", width * (self.heads + self.key_values), inside="core")  # rotated
        if self.layout.cp > 1 or self.sender.document_mask:
            # In tiles: values beside their keys, the output before heads and tokens change places.
            yield _Kept("attention", width * (self.key_values + self.heads), inside="core")
            yield _Kept("attention", self.all_tokens * self.heads * self._wide, inside="core")
        elif self.kernels == "cpu" and self._element >= 4 and self.length <= _BLOCKWISE:
            yield _Kept("attention", width * self.key_values, inside="core")
            yield _Kept("attention", self._probabilities(), inside="core")
        else:  # values are a view of keys and values; and the logarithms of the softmax's sums
            yield _Kept("attention", width * 2 * self.key_values, inside="core")
            yield _Kept("attention", self.all_tokens * self.heads * self._wide, inside="core")

    def _probabilities(self) -> float:
        step = max(_LEAST_POSITIONS, -(-self.length // _MOST_BLOCKS))
        stops = [min(start + step, self.length) for start in range(0, self.length, step)]
        seen = sum((stop - start) * stop for start, stop in zip([0, *stops], stops, strict=False))
        return self.sequences * self.heads * seen * self._element

    def moe(self) -> Iterator[_Kept]:
        model, row = self.model, self.model.hidden_size * self._element
        shared = model.shared_expert_intermediate_size
        casts = self._wide > self._element
        if shared and self.gathered:
            yield _Kept("moe", self.all_tokens * row)
        yield from self._shared_norm(is_read=not casts or (bool(shared) and not self.gathered))
        if casts:
            yield _Kept("moe", self.tokens * model.hidden_size * self._wide, "norm")
        yield from self._router()
        arriving = self.rows * self.layout.etp
        yield _Kept("moe", arriving * row, "" if self.travels else "permute")
        yield from self._products("moe", arriving, self.expert_width, "experts")
        yield _Kept("moe", self.rows * row)  # the experts' outputs, weighed
        if shared:
            start, stop = cut(shared, self.layout.tp, self.layout.coordinate(self.sender.rank, Axis.TP))
            yield from self._products("moe", self.all_tokens, stop - start)

    def _shared_norm(self, is_read: bool) -> Iterator[_Kept]:
        yield _Kept("moe", self.tokens * self._wide)
        if is_read:
            yield _Kept("moe", self.residual, "norm")

    def _router(self) -> Iterator[_Kept]:
        """Logits, scores, shares of the sequence; weights, choices; their order there and back."""
        model, choices = self.model, self.rows
        yield _Kept("moe", self.tokens * model.num_experts * self._wide * 3)
        yield _Kept("moe", choices * (4 * _INDEX + self._wide + self._element))
        if self._wide > self._element:
            yield _Kept("moe", model.num_experts * model.hidden_size * self._wide)

    def mlp(self) -> Iterator[_Kept]:
        yield from self._norm("mlp", is_read=True)
        width, lane = self.model.intermediate_size, self.layout.coordinate(self.sender.rank, Axis.TP)
        start, stop = cut(width, self.layout.tp, lane)
        yield from self._products("mlp", self.all_tokens, stop - start)

    def _products(self, half: Literal["moe", "mlp"], rows: float, width: int, inside: str = "") -> Iterator[_Kept]:
        """SwiGLU's first product, silu of one half, and the product of the halves, which a CPU's experts make anew."""
        each = rows * width * self._element
        yield _Kept(half, 2 * each, inside=inside)
        yield _Kept(half, each, "activation", inside)
        if not inside or self.kernels == "cuda":
            yield _Kept(half, each, "activation", inside)
