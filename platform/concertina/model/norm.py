"""How is a row brought to unit size? RMSNorm (Zhang and Sennrich 2019), with a backward of few passes over memory.

Shapes: ... any, D width. Computed in at least fp32, returned in the input's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from concertina.model.parameters import Build, Part

__all__ = ["RMSNorm", "rms_norm"]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x_D.dtype, torch.float32)
        x = x_D.to(wide)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_D, weight_D, scale)
        return (x * scale).mul_(weight_D).to(x_D.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_D, weight_D, scale = ctx.saved_tensors
        dy = grads[0].to(scale.dtype)
        weight = weight_D.to(scale.dtype)
        normed = x_D.to(scale.dtype) * scale
        product = dy * normed
        dweight = product.flatten(0, -2).sum(0)
        # What of the gradient points along the row itself: it changes the length, which the norm takes away again.
        along = torch.matmul(product, weight).div_(-x_D.shape[-1]).unsqueeze(-1)
        dx = torch.mul(dy, weight, out=product).addcmul_(normed, along).mul_(scale)
        return dx.to(x_D.dtype), dweight.to(weight_D.dtype), None


def rms_norm(x_D: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension."""
    return _RMSNorm.apply(x_D, weight_D, epsilon)


class RMSNorm(Part):
    """RMSNorm over the last `len(shape)` dimensions, with one weight an element."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str, shape: tuple[int, ...]) -> None:
        super().__init__(build, prefix)
        self._declare("weight", shape, fill="ones")

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(x.dim() - self.weight.dim()) if self.weight.dim() > 1 else x
        return rms_norm(flat, self.weight.flatten(), self.build.model.rms_norm_eps).view(x.shape)
