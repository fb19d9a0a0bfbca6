"""How do rows move between token order and expert order? Gathers only, forward and backward: nothing is scattered.

Each move has both directions of its permutation at hand, so a backward is a gather too, in a fixed order of addition.
Shapes: T tokens, K choices of a token, R = T * K rows in expert order, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Order", "combine", "expert_order", "reorder", "spread"]


@dataclass(frozen=True)
class Order:
    """A permutation of T * K choices into expert order. `token_R`: whose row it is; `slot_TK`: where a choice went."""

    choice_R: Tensor
    token_R: Tensor
    slot_TK: Tensor


def expert_order(expert_ids_TK: Tensor) -> Order:
    """Stable: by expert, then by token, then by choice."""
    choice_R = expert_ids_TK.reshape(-1).argsort(stable=True)
    slot = torch.empty_like(choice_R)
    slot.scatter_(0, choice_R, torch.arange(choice_R.numel(), device=choice_R.device))
    return Order(choice_R, choice_R // expert_ids_TK.shape[1], slot.view(expert_ids_TK.shape))


def _sum_choices(rows_RD: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """y_t = sum over k of weight_tk * rows[slot_tk], added in the order of k, in at least fp32."""
    if rows_RD.device.type == "cpu" and rows_RD.dtype == torch.float32:
        # One pass over memory; the general way below makes the gathered [T, K, D] first.
        return F.embedding_bag(slot_TK, rows_RD, mode="sum", per_sample_weights=weights_TK)
    num_tokens, k = slot_TK.shape
    gathered_TKD = rows_RD.index_select(0, slot_TK.view(-1)).view(num_tokens, k, rows_RD.shape[1])
    gathered_TKD = gathered_TKD.to(torch.promote_types(rows_RD.dtype, torch.float32))
    if weights_TK is not None:
        gathered_TKD = gathered_TKD * weights_TK.unsqueeze(-1)
    return gathered_TKD.sum(1).to(rows_RD.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_TK,) = ctx.saved_tensors
        return _sum_choices(grads[0].contiguous(), slot_TK, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, order.choice_R, order.token_R, order.slot_TK)
        return _sum_choices(rows_RD, order.slot_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weights_TK, choice_R, token_R, slot_TK = ctx.saved_tensors
        dy_RD = grads[0].index_select(0, token_R)
        dweights_R = torch.linalg.vecdot(rows_RD, dy_RD)
        drows_RD = dy_RD.mul_(weights_TK.view(-1).index_select(0, choice_R).unsqueeze(1))
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
    """Copy each token's row to the places of its K choices: [R, D]."""
    return _Spread.apply(x_TD, order.token_R, order.slot_TK)


def combine(rows_RD: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    """Sum each token's K rows, weighted: [T, D], with gradients to rows and weights.

    The weights come after the experts' second product: the rows there are narrower than inside the expert.
    """
    return _Combine.apply(rows_RD, weights_TK, order)


def reorder(rows_RD: Tensor, source_R: Tensor, inverse_R: Tensor) -> Tensor:
    """rows[source], where `inverse` is the inverse permutation of `source`."""
    return _Reorder.apply(rows_RD, source_R, inverse_R)
