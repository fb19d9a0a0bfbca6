"""What do the experts compute? SwiGLU for rows grouped by expert, by the kernel that measures fastest on the device.

Shapes: R rows in expert order, E experts held here, D hidden, F width of an expert.
`w13` [E, 2, F, D] and `w2` [E, D, F]: a cut over experts or over F is one box.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.layout.box import Box
from concertina.model.linear import linear
from concertina.model.mlp import swiglu
from concertina.model.parameters import Build, Part

__all__ = ["ExpertKernel", "Experts", "choose_kernel", "experts_grouped_mm", "experts_loop", "row_blocks"]

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


def experts_grouped_mm(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Three grouped products; counts stay on the device. bfloat16 on CUDA."""
    offsets = counts_E.cumsum(0).to(torch.int32)
    h_R2F = F.grouped_mm(x_RD, w13.transpose(1, 2), offs=offsets)
    return F.grouped_mm(swiglu(h_R2F), w2.transpose(1, 2), offs=offsets)


def choose_kernel(device: torch.device, dtype: torch.dtype) -> ExpertKernel:
    """The fastest measured kernel that the device has for the dtype."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return experts_grouped_mm
    return experts_loop


class Experts(Part):
    """The experts `build.experts` of a layer."""

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
