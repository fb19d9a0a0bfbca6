"""What do the experts compute? SwiGLU for rows grouped by expert, by the kernel that measures fastest on the device.

Shapes: R rows in expert order, E experts held here, D hidden, F width of an expert.
`w13` [E, D, 2, F] and `w2` [E, D, F]: a cut over experts or over F is one box, and weight gradients come out in the
orientation that multiplies fastest (on a CPU, 256 by 1024 is 5 % faster than its transpose).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.model.linear import linear
from concertina.model.mlp import swiglu
from concertina.model.parameters import Build, Part
from concertina.model.product import product, row_window

__all__ = [
    "ExpertKernel",
    "Experts",
    "choose_kernel",
    "experts_blocks",
    "experts_grouped_mm",
    "experts_loop",
    "row_blocks",
]

ExpertKernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows [R, D], counts [E] int64, w13 [E, D, 2F], w2 [E, D, F]) to rows [R, D]."""


def row_blocks(counts_E: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every expert's rows; reads the counts on the host."""
    stops = list(accumulate(counts_E.tolist()))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def experts_loop(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """One expert after the other, plain autograd, any dtype: the oracle of every other kernel."""
    outputs = [
        linear(swiglu(linear(x_RD[start:stop], w13[expert].t())), w2[expert])
        for expert, (start, stop) in enumerate(row_blocks(counts_E))
    ]
    return torch.cat(outputs)


class _Blocks(torch.autograd.Function):
    """Contiguous row blocks, each product written straight into its place; the backward by hand.

    Views are cut before the loop: between two products the interpreter runs on cold caches, and a line costs ten times
    what it costs elsewhere. The backward writes into buffers that stay in cache, where torch.mm is as fast as any.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        y_RD, kept = torch.empty_like(x_RD), []
        weights = zip(w13.transpose(1, 2).unbind(), w2.unbind(), strict=True)
        for (start, stop), (first, second) in zip(row_blocks(counts_E), weights, strict=True):
            low, high = row_window(start, stop, x_RD)
            inside = slice(start - low, stop - low)
            h = product(x_RD[low:high], first)
            gate, up = h.chunk(2, -1)
            silu = F.silu(gate)
            y_RD[start:stop] = product(silu * up, second)[inside]
            kept += [h[inside], silu[inside]]
        ctx.save_for_backward(x_RD, w13, w2, *kept)
        return y_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x_RD, w13, w2, *kept = ctx.saved_tensors
        hidden, silus = kept[::2], kept[1::2]
        counts = [len(silu) for silu in silus]
        dx_RD, dw13, dw2 = torch.empty_like(x_RD), torch.empty_like(w13), torch.empty_like(w2)
        # One block's gradients fit in cache; those of all rows would not.
        longest = max(counts, default=0)
        dh_block, act_block = x_RD.new_empty(longest, w13.shape[2]), x_RD.new_empty(longest, w2.shape[2])
        rows = (grads[0].split(counts), dx_RD.split(counts), x_RD.t().split(counts, 1), hidden, silus)
        weights = (w.unbind() for w in (w13.transpose(1, 2), w2, dw13, dw2))
        for dy, dx, x_t, h, silu, first, second, dfirst, dsecond in zip(*rows, *weights, strict=True):
            (gate, up), act, dh = h.chunk(2, -1), act_block[: len(dy)], dh_block[: len(dy)]
            dgate, dup = dh.chunk(2, -1)
            torch.mul(silu, up, out=act)
            torch.mm(dy.t(), act, out=dsecond)
            torch.mm(dy, second, out=act)
            torch.mul(act, silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(act.mul_(up), gate, grad_input=dgate)
            torch.mm(x_t, dh, out=dfirst)
            torch.mm(dh, first, out=dx)
        return dx_RD, None, dw13, dw2


def experts_blocks(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`experts_loop` without its copies, zero fills and slices: the fastest on a CPU."""
    return _Blocks.apply(x_RD, counts_E, w13, w2)


def experts_grouped_mm(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Two grouped products; counts stay on the device. bfloat16 on CUDA."""
    offsets = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(swiglu(F.grouped_mm(x_RD, w13, offs=offsets)), w2.transpose(1, 2), offs=offsets)


def choose_kernel(device: torch.device, dtype: torch.dtype) -> ExpertKernel:
    """The fastest measured kernel that the device has for the dtype."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return experts_grouped_mm
    if device.type == "cpu" and dtype != torch.float64:
        return experts_blocks
    return experts_loop


class Experts(Part):
    """This rank's slices of its experts of a layer; the slices' outputs are to be summed over etp."""

    w13: Tensor
    w2: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self._make("w13")
        self._make("w2")
        self._kernel = choose_kernel(build.device, build.dtype)

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows in expert order, `counts_E` [local experts] int64 on the rows' device."""
        return self._kernel(x_RD, counts_E, self.w13.flatten(2, 3), self.w2)
