"""Where in the sequence is a token? Rotary position embedding (Su et al. 2021), halves layout as Hugging Face's.

Shapes: S positions, B sequences, C width of a head, P = C / 2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rotation", "rotate", "rotation"]


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the angle of every (position, pair), in at least fp32."""

    cos_SP: Tensor
    sin_SP: Tensor


def rotation(positions_S: Tensor, width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position * theta^(-2p / width). Like Hugging Face's, computed in the precision they are used in."""
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, width, 2, dtype=torch.int64, device=positions_S.device).to(wide)
    angles_SP = positions_S.to(wide).unsqueeze(1) * (1.0 / theta ** (pairs / width))
    return Rotation(angles_SP.cos(), angles_SP.sin())


class _Rotate(torch.autograd.Function):
    """The backward turns back: a rotation's transpose is its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computed in the precision of the angles, rounded once."""
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = x.chunk(2, -1), turned.chunk(2, -1)
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1.0))
    out_second.copy_((second * cos).addcmul_(first, sin))
    return turned


def rotate(x_BSC: Tensor, turn: Rotation) -> Tensor:
    """Turn each pair (p, p + P) of every head; x is [B, S, ..., C], the result has its shape and dtype."""
    shape = (turn.cos_SP.shape[0], *(1,) * (x_BSC.dim() - 3), turn.cos_SP.shape[1])
    return _Rotate.apply(x_BSC, turn.cos_SP.view(shape), turn.sin_SP.view(shape))
