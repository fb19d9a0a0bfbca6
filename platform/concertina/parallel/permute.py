"""How do rows move between token order and expert order? Gathers only, forward and backward: nothing is scattered.

Each move has both directions of its permutation at hand, so a backward is a gather too, in a fixed order of addition.
A choice that is dropped has no row: it adds exactly nothing to the output and to gradients. A row of padding is a copy
of some token's that nobody reads and whose gradient is zero.
Shapes: T tokens, K choices of a token, R rows in expert order (T * K where nothing is dropped), D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Order", "combine", "expert_order", "kept_order", "padded_order", "reorder", "spread"]


@dataclass(frozen=True)
class Order:
    """Choices in expert order. `token_R`: whose row it is; `slot_TK`: where a choice went, row 0 if it was dropped.

    `kept_TK`: which choices have a row (absent: all); `filled_R`: which rows are no padding (absent: all).
    """

    choice_R: Tensor
    token_R: Tensor
    slot_TK: Tensor
    kept_TK: Tensor | None = None
    filled_R: Tensor | None = None

    def first(self, num_rows: int) -> Order:
        """Without the rows from `num_rows` on."""
        return replace(self, choice_R=self.choice_R[:num_rows], token_R=self.token_R[:num_rows])


def expert_order(expert_ids_TK: Tensor) -> Order:
    """Stable: by expert, then by token, then by choice."""
    choice_R = expert_ids_TK.reshape(-1).argsort(stable=True)
    slot = torch.empty_like(choice_R)
    slot.scatter_(0, choice_R, torch.arange(choice_R.numel(), device=choice_R.device))
    return Order(choice_R, choice_R // expert_ids_TK.shape[1], slot.view(expert_ids_TK.shape))


def kept_order(expert_ids_TK: Tensor, kept_TK: Tensor, num_experts: int) -> Order:
    """The same of the choices kept. Dropped ones come last: only the host can cut them off (`first`)."""
    order = expert_order(expert_ids_TK.masked_fill(~kept_TK, num_experts))
    return replace(order, slot_TK=order.slot_TK.masked_fill(~kept_TK, 0), kept_TK=kept_TK)


def padded_order(expert_ids_TK: Tensor, kept_TK: Tensor, counts_E: Tensor, rows_of_expert: int) -> Order:
    """The choices kept, `counts_E` of each expert, in as many rows for every expert; nothing is read on the host."""
    order = kept_order(expert_ids_TK, kept_TK, len(counts_E))
    start_E = counts_E.cumsum(0) - counts_E
    place = torch.arange(rows_of_expert, device=counts_E.device)
    sorted_R = (start_E.unsqueeze(1) + place).view(-1).clamp(max=max(0, order.choice_R.numel() - 1))
    moved_E = torch.arange(len(counts_E), device=counts_E.device) * rows_of_expert - start_E
    return Order(
        order.choice_R.index_select(0, sorted_R),
        order.token_R.index_select(0, sorted_R),
        (order.slot_TK + moved_E[expert_ids_TK]).masked_fill(~kept_TK, 0),
        kept_TK,
        (place < counts_E.unsqueeze(1)).view(-1),
    )


def _sum_choices(rows_RD: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """y_t = sum over k of weight_tk * rows[slot_tk], added in the order of k, in at least fp32."""
    if not len(rows_RD):  # no tokens, or all their choices were dropped
        return rows_RD.new_zeros(len(slot_TK), rows_RD.shape[1])
    if rows_RD.device.type == "cuda" or (rows_RD.device.type == "cpu" and rows_RD.dtype == torch.float32):
        # One pass over memory, added in fp32; the general way below makes the gathered [T, K, D] first.
        return F.embedding_bag(slot_TK, rows_RD, mode="sum", per_sample_weights=weights_TK)
    num_tokens, k = slot_TK.shape
    gathered_TKD = rows_RD.index_select(0, slot_TK.view(-1)).view(num_tokens, k, rows_RD.shape[1])
    gathered_TKD = gathered_TKD.to(torch.promote_types(rows_RD.dtype, torch.float32))
    if weights_TK is not None:
        gathered_TKD = gathered_TKD * weights_TK.unsqueeze(-1)
    return gathered_TKD.sum(1).to(rows_RD.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.slot_TK, order.kept_TK)
        return x_TD.index_select(0, order.token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        slot_TK, kept_TK = ctx.saved_tensors
        weights_TK = None if kept_TK is None else kept_TK.to(grads[0].dtype)
        return _sum_choices(grads[0].contiguous(), slot_TK, weights_TK), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, order.choice_R, order.token_R, order.slot_TK, order.filled_R)
        return _sum_choices(rows_RD, order.slot_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weights_TK, choice_R, token_R, slot_TK, filled_R = ctx.saved_tensors
        if not len(rows_RD):
            return torch.zeros_like(rows_RD), torch.zeros_like(weights_TK), None
        dy_RD = grads[0].index_select(0, token_R)
        dweights_R = torch.linalg.vecdot(rows_RD, dy_RD)
        weights_R = weights_TK.view(-1).index_select(0, choice_R)
        if filled_R is not None:
            weights_R = weights_R * filled_R
        drows_RD = dy_RD.mul_(weights_R.unsqueeze(1))
        return drows_RD, dweights_R.index_select(0, slot_TK.view(-1)).view_as(weights_TK), None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, source_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, source_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_R), None, None


def spread(x_TD: Tensor, order: Order) -> Tensor:
    """Copy each token's row to the places of its choices: [R, D]."""
    return _Spread.apply(x_TD, order)


def combine(rows_RD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    """Sum each token's rows, weighted: [T, D], with gradients to rows and weights.

    The weights come after the experts' second product: the rows there are narrower than inside the expert.
    """
    if order.kept_TK is not None:
        weights_TK = weights_TK.masked_fill(~order.kept_TK, 0)
    return _Combine.apply(rows_RD, weights_TK, order)


def reorder(rows_RD: Tensor, source_R: Tensor, inverse_R: Tensor) -> Tensor:
    """rows[source], where `inverse` is the inverse permutation of `source`."""
    return _Reorder.apply(rows_RD, source_R, inverse_R)
