"""How does one tile of queries attend to one of keys, and what does it need to be part of a softmax over more keys?

Besides its output a tile gives the logarithm of the sum of its exponentials; for its gradients it takes the output and
the logarithms of the whole. torch's flash kernels do both; written out, the same for what they do not take.
Shapes: M matrices, G query heads of each key-value head, R queries, J keys, C width of queries and keys, V of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FLASH_ON_CPU", "FLASH_ON_CUDA", "WRITTEN_OUT", "TileInput", "TileKernel", "choose_kernel"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class TileInput:
    """Queries [M, G, R, C], keys [M, G, J, C], values [M, G, J, V]; `causal`: query r sees key j <= r, and there are as
    many; `mask`: what each sees, bool [M, R, J], the causal part included (absent: all)."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    mask: Tensor | None

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q.contiguous(), self.k.contiguous(), self.v.contiguous()

    def widened(self) -> TileInput:
        """With values as wide as keys, zeros behind: an output's columns there are zero."""
        return replace(self, v=_widened(self.v, self.k.shape[3]))

    def bias(self) -> Tensor | None:
        """What is added to the scores: 0, or -inf where nothing is seen; broadcast over heads [M, 1, R, J]."""
        if self.mask is None:
            return None
        return torch.zeros_like(self.mask, dtype=self.q.dtype).masked_fill_(~self.mask, float("-inf")).unsqueeze(1)


@dataclass(frozen=True)
class TileKernel:
    """A kernel's two directions.

    `forward(x)`: output [M, G, R, V] and logarithms [M, G, R] of at least fp32. `backward(x, dout, out, logs)`:
    gradients of q, k and v, where `out` and `logs` are those over all keys and `dout` the output's gradient.
    """

    forward: Callable[[TileInput], tuple[Tensor, Tensor]]
    backward: Callable[[TileInput, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3]))


def _of_equal_widths(kernel: TileKernel) -> TileKernel:
    """For values no wider than keys, a kernel that takes only equal widths: scores are never made whole."""

    def forward(x: TileInput) -> tuple[Tensor, Tensor]:
        out, logs = kernel.forward(x.widened())
        return out[..., : x.v.shape[3]], logs

    def backward(x: TileInput, dout: Tensor, out: Tensor, logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = x.k.shape[3]
        dq, dk, dv = kernel.backward(x.widened(), _widened(dout, width), _widened(out, width), logs)
        return dq, dk, dv[..., : x.v.shape[3]]

    return TileKernel(forward, backward)


def _cpu_forward(x: TileInput) -> tuple[Tensor, Tensor]:
    op = _aten._scaled_dot_product_flash_attention_for_cpu
    out, logs = op(x.q, x.k, x.v, 0.0, x.causal and x.mask is None, attn_mask=x.bias())
    if x.mask is not None:  # the kernel gives 0 to who sees no key at all
        logs = logs.masked_fill(~x.mask.any(2).unsqueeze(1), float("-inf"))
    return out, logs


def _cpu_backward(x: TileInput, dout: Tensor, out: Tensor, logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    op, causal = _aten._scaled_dot_product_flash_attention_for_cpu_backward, x.causal and x.mask is None
    return op(dout, x.q, x.k, x.v, out, logs, 0.0, causal, attn_mask=x.bias())


def _cuda_forward(x: TileInput) -> tuple[Tensor, Tensor]:
    out, logs, *_ = _aten._scaled_dot_product_flash_attention(*x.contiguous(), 0.0, x.causal)
    return out, logs


def _cuda_backward(x: TileInput, dout: Tensor, out: Tensor, logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty((), dtype=torch.uint64, device=x.q.device)  # seeds of a dropout that is not
    sizes = None, None, x.q.shape[2], x.k.shape[2]
    op = _aten._scaled_dot_product_flash_attention_backward
    found = op(dout, *x.contiguous(), out, logs, *sizes, 0.0, x.causal, unused, unused)
    return found


def _scores(x: TileInput) -> Tensor:
    wide = torch.promote_types(x.q.dtype, torch.float32)
    scores, bias = torch.matmul(x.q.to(wide), x.k.to(wide).transpose(2, 3)) * x.scale, x.bias()
    if bias is not None:
        return scores + bias
    if x.causal:
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu_(1)
        return scores.masked_fill_(future, float("-inf"))
    return scores


def _written_forward(x: TileInput) -> tuple[Tensor, Tensor]:
    scores = _scores(x)
    logs = scores.logsumexp(3)
    # -inf less -inf is no number: who sees nothing gets nothing.
    shares = (scores - logs.masked_fill(logs == float("-inf"), 0).unsqueeze(3)).exp_()
    return torch.matmul(shares.to(x.v.dtype), x.v), logs


def _written_backward(x: TileInput, dout: Tensor, out: Tensor, logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shares = (_scores(x) - logs.unsqueeze(3)).exp_()
    along = torch.linalg.vecdot(dout.to(logs.dtype), out.to(logs.dtype)).unsqueeze(3)
    dshares = torch.matmul(dout, x.v.transpose(2, 3)).to(logs.dtype)
    dscores = ((dshares - along) * shares * x.scale).to(x.q.dtype)
    dv = torch.matmul(shares.to(x.v.dtype).transpose(2, 3), dout)
    return torch.matmul(dscores, x.k), torch.matmul(dscores.transpose(2, 3), x.q), dv


FLASH_ON_CPU = _of_equal_widths(TileKernel(_cpu_forward, _cpu_backward))
"""torch's kernel for CPUs: any float type, values no wider than keys."""

FLASH_ON_CUDA = _of_equal_widths(TileKernel(_cuda_forward, _cuda_backward))
"""FlashAttention for 16-bit types on GPUs, heads of up to 256 in eights, values no wider than keys, no mask."""

WRITTEN_OUT = TileKernel(_written_forward, _written_backward)
"""By the definition: any device, type, width and mask; it makes all scores."""


def choose_kernel(x: TileInput) -> TileKernel:
    """The fastest that takes the tile."""
    if x.v.shape[3] <= x.k.shape[3]:
        if x.q.device.type == "cpu":
            return FLASH_ON_CPU
        fits = x.q.element_size() == 2 and x.mask is None and x.k.shape[3] % 8 == 0 and x.k.shape[3] <= 256
        if x.q.device.type == "cuda" and fits:
            return FLASH_ON_CUDA
    return WRITTEN_OUT
