"""What does a token compute alone? SwiGLU (Shazeer 2020): (silu(x w1) * x w3) w2.

A lane of tp computes its slice of F. Shapes: T tokens, D hidden, F width here. `w13` [2, F, D] holds w1 and w3, so
that a cut over F is one box.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.model.linear import linear
from concertina.model.parameters import Build, Part
from concertina.parallel.recompute import again

__all__ = ["SwiGLU", "swiglu"]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_T2F: Tensor) -> Tensor:
        gate, up = h_T2F.chunk(2, -1)
        silu = again("activation", F.silu, gate)
        ctx.save_for_backward(h_T2F, silu)
        return again("activation", torch.mul, silu, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        h_T2F, silu = ctx.saved_tensors
        gate, up = h_T2F.chunk(2, -1)
        dh = torch.empty_like(h_T2F)
        dgate, dup = dh.chunk(2, -1)
        torch.mul(grads[0], silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=dgate)
        return dh


def swiglu(h_T2F: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    return _Gated.apply(h_T2F)


class SwiGLU(Part):
    """A dense feed-forward layer, or a shared expert."""

    w13: Tensor
    w2: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self._make("w13")
        self._make("w2")

    def forward(self, x_TD: Tensor) -> Tensor:
        """This lane's part of the output; the lanes' parts are to be summed."""
        return linear(swiglu(linear(x_TD, self.w13.flatten(0, 1))), self.w2)
