"""How is a row brought to unit size? RMSNorm (Zhang and Sennrich 2019), with a backward of few passes over memory.

A row may lie in pieces on the lanes of a group, which then sum two numbers a row: its square, and in the backward what
of its gradient points along it. Shapes: ... any, D width here. At least fp32 inside, the input's dtype outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.model.parameters import Build, Part
from concertina.parallel.collectives import all_reduce_sum
from concertina.parallel.groups import Group
from concertina.parallel.recompute import again

__all__ = ["Pieces", "RMSNorm", "ResidualNorm", "rms_norm"]


@dataclass(frozen=True)
class Pieces:
    """How a row of `width` elements lies on the ranks of `group`, each element on `copies` of them."""

    group: Group
    width: int
    copies: int = 1

    def total(self, partial: Tensor) -> Tensor:
        """The sum over the row's pieces; in place."""
        summed = all_reduce_sum(partial, self.group).finish()
        return summed if self.copies == 1 else summed.div_(self.copies)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_D: Tensor, weight_D: Tensor, epsilon: float, pieces: Pieces) -> Tensor:
        wide = torch.promote_types(x_D.dtype, torch.float32)
        x = x_D.to(wide)
        square = pieces.total(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_())
        scale = square.div_(pieces.width).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_D, weight_D, scale)
        ctx.pieces = pieces
        return (x * scale).mul_(weight_D).to(x_D.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_D, weight_D, scale = ctx.saved_tensors
        x, dy, weight = (tensor.to(scale.dtype) for tensor in (x_D, grads[0], weight_D))
        # One product serves the weight's gradient and the part of the row's that points along the row itself: that part
        # would change the length, which the norm takes away again.
        product = dy * x
        dweight = torch.mv(product.flatten(0, -2).t(), scale.flatten())
        along = ctx.pieces.total(torch.matmul(product, weight)).unsqueeze(-1)
        along = along.mul_(scale).mul_(scale).mul_(scale).div_(-ctx.pieces.width)
        dx = torch.mul(dy, weight, out=product).mul_(scale).addcmul_(x, along)
        return dx.to(x_D.dtype), dweight.to(weight_D.dtype), None, None


def rms_norm(x_D: Tensor, weight_D: Tensor, epsilon: float, pieces: Pieces | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, and over the pieces of the row elsewhere."""
    if x_D.device.type == "cuda" and pieces is None:  # one kernel each way; on a CPU ours has fewer passes
        return F.rms_norm(x_D, (x_D.shape[-1],), weight_D, epsilon)
    return _RMSNorm.apply(x_D, weight_D, epsilon, pieces or Pieces(Group.alone(), x_D.shape[-1]))


class RMSNorm(Part):
    """RMSNorm over the dimensions that the weight has, one weight an element; rows may lie in `pieces`."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str, pieces: Pieces | None = None) -> None:
        super().__init__(build, prefix)
        self.pieces = pieces
        self.epsilon = build.model.rms_norm_eps
        self._make("weight")

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gradient_weight()
        flat = x.flatten(x.dim() - weight.dim()) if weight.dim() > 1 else x
        return rms_norm(flat, weight.flatten(), self.epsilon, self.pieces).view(x.shape)

    def gradient_weight(self) -> Tensor:
        """The weight, as it counts in gradients."""
        return self.weight


class ResidualNorm(RMSNorm):
    """RMSNorm of the residual stream, whose tokens every lane may hold alike."""

    def forward(self, x: Tensor) -> Tensor:
        return again("norm", rms_norm, x, self.gradient_weight(), self.epsilon)

    def gradient_weight(self) -> Tensor:
        return self.build.lanes.count_once(self.weight)
