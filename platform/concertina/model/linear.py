"""How is a matrix applied, and how do its two gradients split? Input and weight gradient are functions of their own.

Inside `deferring` (`model/deferred.py`) the second one is queued. Shapes: T tokens, I in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from concertina.model.deferred import active_queue
from concertina.model.product import product

__all__ = ["input_gradient", "linear", "weight_gradient"]


def input_gradient(dy_TO: Tensor, w_OI: Tensor) -> Tensor:
    """dX [T, I] of y = x w^T."""
    return product(dy_TO, w_OI.t())


def weight_gradient(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """dW [O, I] of y = x w^T."""
    return torch.mm(dy_TO.t(), x_TI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, w_OI)
        ctx.queue = active_queue()
        return product(x_TI, w_OI)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TI, w_OI = ctx.saved_tensors
        dx = input_gradient(grads[0], w_OI) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        if ctx.queue is None:
            return dx, weight_gradient(grads[0], x_TI)
        ctx.queue.push([w_OI], lambda: [weight_gradient(grads[0], x_TI)])
        return dx, None


def linear(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """y [T, O] = x w^T, any float dtype."""
    return _Linear.apply(x_TI, w_OI)
