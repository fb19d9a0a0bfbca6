"""How wrong are the predictions? Cross-entropy in chunks of tokens: all logits at once never exist.

The gradient is computed with the loss, while a chunk's logits are at hand; the backward only scales it.
Shapes: T tokens, D hidden, V vocabulary, N tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from concertina.model.product import product

__all__ = ["IGNORED", "cross_entropy_sum"]

IGNORED = -100
_CHUNK_LOGITS = 1 << 21  # 8 MiB in fp32: three quarters of the time are products that want many rows at once


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, with_gradient: bool) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        rows = max(1, _CHUNK_LOGITS // w_VD.shape[0])
        total = torch.zeros((), dtype=wide, device=x_TD.device)
        dx = torch.empty_like(x_TD) if with_gradient else None
        dw = torch.zeros_like(w_VD, dtype=wide) if with_gradient else None
        for start in range(0, x_TD.shape[0], rows):
            x_ND, targets_N = x_TD[start : start + rows], targets_T[start : start + rows]
            logits_NV = product(x_ND, w_VD).to(wide)
            total += _losses_and_probabilities(logits_NV, targets_N)
            if dx is not None and dw is not None:
                dlogits_NV = _subtract_targets(logits_NV, targets_N).to(x_TD.dtype)
                dx[start : start + rows] = product(dlogits_NV, w_VD.t())
                _add_product(dw, dlogits_NV, x_ND)
        if dx is not None and dw is not None:
            ctx.save_for_backward(dx, dw.to(w_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        if grads[0].device.type == "cpu" and grads[0].item() == 1.0:
            return dx, dw, None, None
        return (dx * grads[0]).to(dx.dtype), (dw * grads[0]).to(dw.dtype), None, None


def _losses_and_probabilities(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of the losses; `logits_NV` becomes probabilities in place."""
    counted = targets_N != IGNORED
    chosen = logits_NV.gather(1, (targets_N * counted).unsqueeze(1)).squeeze(1)
    largest = logits_NV.amax(1)
    torch.softmax(logits_NV, 1, out=logits_NV)
    # The largest probability is 1 / sum(exp(logit - largest)): no second pass of exponentials for the logsumexp.
    losses = largest - logits_NV.amax(1).log_() - chosen
    return (losses * counted).sum()


def _subtract_targets(probabilities_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Probabilities minus one at each target, zero rows where the target is ignored; in place."""
    counted = targets_N != IGNORED
    minus_one = -torch.ones_like(targets_N, dtype=probabilities_NV.dtype).unsqueeze(1)
    probabilities_NV.scatter_add_(1, (targets_N * counted).unsqueeze(1), minus_one)
    if probabilities_NV.device.type == "cpu" and bool(counted.all()):
        return probabilities_NV
    return probabilities_NV.mul_(counted.unsqueeze(1))


def _add_product(dw_VD: Tensor, dlogits_NV: Tensor, x_ND: Tensor) -> None:
    """dW += dlogits^T x, summed in dW's precision."""
    if dw_VD.dtype == x_ND.dtype:
        dw_VD.addmm_(dlogits_NV.t(), x_ND)
    else:
        dw_VD += torch.mm(dlogits_NV.t(), x_ND)


def cross_entropy_sum(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the token losses of logits x w^T, in at least fp32, and the number of tokens counted (int64).

    Targets of -100 count for nothing.
    """
    with_gradient = torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad)
    loss = _CrossEntropy.apply(x_TD, w_VD, targets_T, with_gradient)
    return loss, (targets_T != IGNORED).sum()
