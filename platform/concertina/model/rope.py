"""Where in the sequence is a token? Rotary position embedding (Su et al. 2021), halves layout as Hugging Face's.

YaRN (Peng et al. 2023, arXiv 2309.00071) stretches the slow frequencies, so that longer sequences turn no further.
Shapes: S positions, B sequences, C width of a head, P = C / 2 pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from concertina.config import RopeScalingConfig

__all__ = ["Rotation", "growth", "rotate", "rotation", "side_by_side"]


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the angle of every (position, pair), in at least fp32."""

    cos_SP: Tensor
    sin_SP: Tensor


def rotation(
    positions_S: Tensor, width: int, theta: float, dtype: torch.dtype, scaling: RopeScalingConfig | None = None
) -> Rotation:
    """Angles position * theta^(-2p / width). Like Hugging Face's, computed in the precision they are used in."""
    wide = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, width, 2, dtype=torch.int64, device=positions_S.device).to(wide)
    frequency_P, size = 1.0 / theta ** (pairs / width), 1.0
    if scaling is not None and scaling.factor > 1:
        frequency_P, size = _stretched(frequency_P, theta, scaling), _size(scaling)
    angles_SP = positions_S.to(wide).unsqueeze(1) * frequency_P
    cos, sin = angles_SP.cos(), angles_SP.sin()
    return Rotation(cos, sin) if size == 1.0 else Rotation(cos * size, sin * size)


def _stretched(frequency_P: Tensor, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """Fast frequencies as they are, slow ones over the factor, a ramp between (paper: section 3.2, "NTK-by-parts")."""
    pairs = len(frequency_P)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), 2 * pairs - 1)
    numbers = torch.arange(pairs, device=frequency_P.device).to(frequency_P)
    slow_P = ((numbers - first) / (last - first or 0.001)).clamp(0, 1)
    return frequency_P * (1 - slow_P) + frequency_P / scaling.factor * slow_P


def growth(factor: float, mscale: float = 1.0) -> float:
    """What attention is sharpened by when sequences become `factor` times longer (paper: equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _size(scaling: RopeScalingConfig) -> float:
    """What rotated queries and keys are multiplied by."""
    if not (scaling.mscale and scaling.mscale_all_dim):
        return growth(scaling.factor)
    return growth(scaling.factor, scaling.mscale) / growth(scaling.factor, scaling.mscale_all_dim)


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


def side_by_side(x: Tensor) -> Tensor:
    """Rotary pairs (2p, 2p + 1) of the last dimension, brought to where `rotate` looks for them."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
