"""How wrong are the predictions? Cross-entropy in chunks of tokens: all logits at once never exist.

The gradient is computed with the loss, while a chunk's logits are at hand; the backward only scales it. Inside
`deferring` the head's own gradient is left for later: its logits are then multiplied out once more. A lane of tp has
the logits of its rows of the vocabulary; of a chunk, lanes exchange three numbers a token.
Shapes: T tokens, D hidden, V rows of the vocabulary here, N tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from concertina.model.deferred import active_queue
from concertina.model.product import product
from concertina.parallel.collectives import all_reduce_max, all_reduce_sum
from concertina.parallel.groups import Group

__all__ = ["IGNORED", "Vocabulary", "cross_entropy_sum", "head_gradient"]

IGNORED = -100
_CHUNK_LOGITS = 1 << 21  # 8 MiB in fp32: three quarters of the time are products that want many rows at once
_CHUNK_LOGITS_CUDA = 1 << 28  # 1 GiB: each chunk reads the whole head's weight, which wants a thousand rows to pay


@dataclass(frozen=True)
class Vocabulary:
    """Rows [start, stop) of the vocabulary are here, of `size` in all, the others on the other ranks of `group`."""

    group: Group
    start: int
    stop: int
    size: int

    @property
    def most_rows(self) -> int:
        """Rows of the rank that has most, which every rank knows."""
        return -(-self.size // self.group.size)

    def here(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `tokens` in what is here (0 for those elsewhere and negative ones), and which are here."""
        found = (tokens >= self.start) & (tokens < self.stop)
        return (tokens - self.start) * found, found


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, vocabulary: Vocabulary, with_gradient: bool
    ) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        ctx.queue = active_queue() if with_gradient else None
        total = torch.zeros((), dtype=wide, device=x_TD.device)
        dx = torch.empty_like(x_TD) if with_gradient else None
        dw = torch.zeros_like(w_VD, dtype=wide) if with_gradient and ctx.queue is None else None
        scales: list[_Scale] = []
        for chunk in _chunks(x_TD, vocabulary):
            x_ND, targets_N = x_TD[chunk], targets_T[chunk]
            logits_NV = product(x_ND, w_VD).to(wide)
            losses, scale = _losses_and_probabilities(logits_NV, targets_N, vocabulary)
            total += losses
            if dx is not None:
                dlogits_NV = _subtract_targets(logits_NV, targets_N, vocabulary).to(x_TD.dtype)
                dx[chunk] = product(dlogits_NV, w_VD.t())
                if dw is not None:
                    _add_product(dw, dlogits_NV, x_ND)
                else:
                    scales.append(scale)
        if dx is not None:
            late = (x_TD, w_VD, targets_T) if dw is None else (dw.to(w_VD.dtype),)
            ctx.save_for_backward(dx, *late)
            ctx.again = (vocabulary, scales)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        dx, *late = ctx.saved_tensors
        if ctx.queue is None:
            return _scaled(dx, grads[0]), _scaled(late[0], grads[0]), None, None, None
        if ctx.needs_input_grad[1]:
            again = (*late, *ctx.again)
            ctx.queue.push([late[1]], lambda: [_scaled(head_gradient(*again), grads[0])])
        return _scaled(dx, grads[0]), None, None, None, None


_Scale = tuple[Tensor, Tensor] | None
"""Largest logit and sum of exponentials [N] over all lanes; None where every row of the vocabulary is here."""


def _scaled(gradient: Tensor, by: Tensor) -> Tensor:
    if by.device.type == "cpu" and by.item() == 1.0:
        return gradient
    return (gradient * by).to(gradient.dtype)


def _chunks(x_TD: Tensor, vocabulary: Vocabulary) -> list[slice]:
    """Tokens whose logits are made together: the same ones on every lane, however its rows are cut."""
    logits = _CHUNK_LOGITS_CUDA if x_TD.device.type == "cuda" else _CHUNK_LOGITS
    rows = max(1, logits // vocabulary.most_rows)
    return [slice(start, start + rows) for start in range(0, x_TD.shape[0], rows)]


def head_gradient(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, vocabulary: Vocabulary, scales: list[_Scale]
) -> Tensor:
    """dW [V, D] of the loss, from logits made anew: no lane is asked again."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    dw = torch.zeros_like(w_VD, dtype=wide)
    for chunk, scale in zip(_chunks(x_TD, vocabulary), scales, strict=True):
        logits_NV = product(x_TD[chunk], w_VD).to(wide)
        if scale is None:
            torch.softmax(logits_NV, 1, out=logits_NV)
        else:
            largest, total = scale
            logits_NV.sub_(largest.unsqueeze(1)).exp_().div_(total.unsqueeze(1))
        dlogits_NV = _subtract_targets(logits_NV, targets_T[chunk], vocabulary).to(x_TD.dtype)
        _add_product(dw, dlogits_NV, x_TD[chunk])
    return dw.to(w_VD.dtype)


def _losses_and_probabilities(logits_NV: Tensor, targets_N: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, _Scale]:
    """Sum of the losses; `logits_NV` becomes probabilities in place."""
    counted = targets_N != IGNORED
    index, found = vocabulary.here(targets_N)
    if vocabulary.group.size > 1:
        losses, *scale = _losses_over_lanes(logits_NV, index, found, vocabulary.group)
        return (losses * counted).sum(), (scale[0], scale[1])
    chosen = logits_NV.gather(1, index.unsqueeze(1)).squeeze(1)
    largest = logits_NV.amax(1)
    torch.softmax(logits_NV, 1, out=logits_NV)
    # The largest probability is 1 / sum(exp(logit - largest)): no second pass of exponentials for the logsumexp.
    losses = largest - logits_NV.amax(1).log_() - chosen
    return (losses * counted).sum(), None


def _losses_over_lanes(
    logits_NV: Tensor, index_N: Tensor, found_N: Tensor, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], the same on every lane, the largest logits and the sums of exponentials; probabilities in place.

    A lane may have no row of the vocabulary at all.
    """
    lowest = torch.finfo(logits_NV.dtype).min
    rows = logits_NV.shape[1]
    largest = logits_NV.amax(1) if rows else logits_NV.new_full((len(logits_NV),), lowest)
    largest = all_reduce_max(largest, group).finish()
    logits_NV.sub_(largest.unsqueeze(1))
    chosen = logits_NV.gather(1, index_N.unsqueeze(1)).squeeze(1) * found_N if rows else torch.zeros_like(largest)
    sums = torch.stack([logits_NV.exp_().sum(1), chosen])
    total, chosen = all_reduce_sum(sums, group).finish()
    logits_NV.div_(total.unsqueeze(1))
    return total.log() - chosen, largest, total


def _subtract_targets(probabilities_NV: Tensor, targets_N: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Probabilities minus one at each target, zero rows where the target is ignored; in place."""
    counted = targets_N != IGNORED
    index, found = vocabulary.here(targets_N)
    if probabilities_NV.shape[1]:
        minus_one = -found.to(probabilities_NV.dtype).unsqueeze(1)
        probabilities_NV.scatter_add_(1, index.unsqueeze(1), minus_one)
    if probabilities_NV.device.type == "cpu" and bool(counted.all()):
        return probabilities_NV
    return probabilities_NV.mul_(counted.unsqueeze(1))


def _add_product(dw_VD: Tensor, dlogits_NV: Tensor, x_ND: Tensor) -> None:
    """dW += dlogits^T x, summed in dW's precision."""
    if dw_VD.dtype == x_ND.dtype:
        dw_VD.addmm_(dlogits_NV.t(), x_ND)
    else:
        dw_VD += torch.mm(dlogits_NV.t(), x_ND)


def cross_entropy_sum(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, vocabulary: Vocabulary | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses of logits x w^T, in at least fp32, and the number of tokens counted (int64).

    Targets of -100 count for nothing. Where the vocabulary is cut, all its ranks must call it with the same tokens;
    each gets the same sum, and the gradient of its rows and, as its part, of x.
    """
    with_gradient = torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad)
    vocabulary = vocabulary or Vocabulary(Group.alone(), 0, w_VD.shape[0], w_VD.shape[0])
    loss = _CrossEntropy.apply(x_TD, w_VD, targets_T, vocabulary, with_gradient)
    return loss, (targets_T != IGNORED).sum()
