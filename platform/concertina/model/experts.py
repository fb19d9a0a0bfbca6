"""What do the experts compute? SwiGLU for rows grouped by expert, by the kernel that measures fastest on the device.

Shapes: R rows in expert order, E experts held here, D hidden, F width of an expert.
`w13` [E, 2, F, D] and `w2` [E, D, F]: a cut over experts or over F is one box.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.layout.box import Box
from concertina.model.linear import linear
from concertina.model.mlp import swiglu
from concertina.model.parameters import Build, Part

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
"""(rows [R, D], counts [E] int64, w13 [E, 2F, D], w2 [E, D, F]) to rows [R, D]."""


def row_blocks(counts_E: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every expert's rows; reads the counts on the host."""
    stops = list(accumulate(counts_E.tolist()))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def experts_loop(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """One expert after the other, plain autograd, any dtype: the oracle of every other kernel."""
    outputs = [
        linear(swiglu(linear(x_RD[start:stop], w13[expert])), w2[expert])
        for expert, (start, stop) in enumerate(row_blocks(counts_E))
    ]
    return torch.cat(outputs)


class _Blocks(torch.autograd.Function):
    """Contiguous row blocks, one product each, written straight into their place; the backward by hand."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        blocks = row_blocks(counts_E)
        h_R2F = x_RD.new_empty(x_RD.shape[0], w13.shape[1])
        silu_RF = x_RD.new_empty(x_RD.shape[0], w2.shape[2])
        y_RD = torch.empty_like(x_RD)
        for expert, (start, stop) in enumerate(blocks):
            h, silu = h_R2F[start:stop], silu_RF[start:stop]
            torch.mm(x_RD[start:stop], w13[expert].t(), out=h)
            gate, up = h.chunk(2, -1)
            torch.ops.aten.silu.out(gate, out=silu)
            torch.mm(silu * up, w2[expert].t(), out=y_RD[start:stop])
        ctx.blocks = blocks
        ctx.save_for_backward(x_RD, w13, w2, h_R2F, silu_RF)
        return y_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x_RD, w13, w2, h_R2F, silu_RF = ctx.saved_tensors
        dx_RD, dw13, dw2 = torch.empty_like(x_RD), torch.empty_like(w13), torch.empty_like(w2)
        longest = max((stop - start for start, stop in ctx.blocks), default=0)
        dh_buffer = h_R2F.new_empty(longest, h_R2F.shape[1])
        da_buffer = silu_RF.new_empty(longest, silu_RF.shape[1])
        for expert, (start, stop) in enumerate(ctx.blocks):
            rows = slice(start, stop)
            dy, silu, (gate, up) = grads[0][rows], silu_RF[rows], h_R2F[rows].chunk(2, -1)
            da, dh = da_buffer[: stop - start], dh_buffer[: stop - start]
            dgate, dup = dh.chunk(2, -1)
            torch.mul(silu, up, out=da)
            torch.mm(dy.t(), da, out=dw2[expert])
            torch.mm(dy, w2[expert], out=da)
            torch.mul(da, silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=dgate)
            torch.mm(dh.t(), x_RD[rows], out=dw13[expert])
            torch.mm(dh, w13[expert], out=dx_RD[rows])
        return dx_RD, None, dw13, dw2


def experts_blocks(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`experts_loop` without its copies, zero fills and slices: the fastest on a CPU."""
    return _Blocks.apply(x_RD, counts_E, w13, w2)


def experts_grouped_mm(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Three grouped products; counts stay on the device. bfloat16 on CUDA."""
    offsets = counts_E.cumsum(0).to(torch.int32)
    h_R2F = F.grouped_mm(x_RD, w13.transpose(1, 2), offs=offsets)
    return F.grouped_mm(swiglu(h_R2F), w2.transpose(1, 2), offs=offsets)


def choose_kernel(device: torch.device, dtype: torch.dtype) -> ExpertKernel:
    """The fastest measured kernel that the device has for the dtype."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return experts_grouped_mm
    if device.type == "cpu" and dtype != torch.float64:
        return experts_blocks
    return experts_loop


class Experts(Part):
    """The experts `build.experts` of a layer."""

    w13: Tensor
    w2: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        model = build.model
        start, stop = build.experts
        width, hidden = model.moe_intermediate_size, model.hidden_size
        first = Box((start, 0, 0, 0), (stop, 2, width, hidden))
        second = Box((start, 0, 0), (stop, hidden, width))
        self._declare("w13", (model.num_experts, 2, width, hidden), box=first)
        self._declare("w2", (model.num_experts, hidden, width), box=second)
        self._kernel = choose_kernel(build.device, build.dtype)

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows in expert order, `counts_E` [local experts] int64 on the rows' device."""
        return self._kernel(x_RD, counts_E, self.w13.flatten(1, 2), self.w2)
