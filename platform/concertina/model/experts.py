"""What do the experts compute? SwiGLU for rows grouped by expert, by the kernel that measures fastest on the device.

Shapes: R rows in expert order, E experts held here, D hidden, F width of an expert.
`w13` [E, D, 2, F] and `w2` [E, D, F]: a cut over experts or over F is one box, and weight gradients come out in the
orientation that multiplies fastest (on a CPU, 256 by 1024 is 5 % faster than its transpose).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.model.deferred import active_queue
from concertina.model.linear import linear
from concertina.model.mlp import swiglu
from concertina.model.parameters import Build, Part
from concertina.model.product import product, row_window
from concertina.parallel.recompute import again

__all__ = [
    "ExpertKernel",
    "Experts",
    "blocks_input_gradient",
    "blocks_weight_gradients",
    "choose_kernel",
    "experts_blocks",
    "experts_grouped_mm",
    "experts_loop",
    "grouped_input_gradient",
    "grouped_weight_gradient",
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
            silu = again("activation", F.silu, gate)
            y_RD[start:stop] = product(silu * up, second)[inside]
            kept += [h[inside], silu[inside]]
        ctx.save_for_backward(x_RD, w13, w2, *kept)
        ctx.queue = active_queue()
        return y_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor | None]:
        x_RD, w13, w2, *kept = ctx.saved_tensors
        hidden, silus = kept[::2], kept[1::2]
        if ctx.queue is not None:
            dx_RD, dh_R2F = blocks_input_gradient(grads[0], w13, w2, hidden, silus)
            ctx.queue.push([w13, w2], lambda: blocks_weight_gradients(grads[0], x_RD, dh_R2F, hidden, silus))
            return dx_RD, None, None, None
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


def blocks_input_gradient(
    dy_RD: Tensor, w13: Tensor, w2: Tensor, hidden: Sequence[Tensor], silus: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """dX [R, D] of `experts_blocks`, and the gradient before the first product, [R, 2F], for the weights' gradients.

    `hidden` and `silus`: of each expert's rows, the first product [rows, 2F] and silu of its first half.
    """
    counts = [len(silu) for silu in silus]
    dx_RD, dh_R2F = torch.empty_like(dy_RD), dy_RD.new_empty(len(dy_RD), w13.shape[2])
    act_block = dy_RD.new_empty(max(counts, default=0), w2.shape[2])
    rows = (dy_RD.split(counts), dx_RD.split(counts), dh_R2F.split(counts), hidden, silus)
    for dy, dx, dh, h, silu, first, second in zip(*rows, w13.transpose(1, 2).unbind(), w2.unbind(), strict=True):
        (gate, up), act = h.chunk(2, -1), act_block[: len(dy)]
        dgate, dup = dh.chunk(2, -1)
        torch.mm(dy, second, out=act)
        torch.mul(act, silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(act.mul_(up), gate, grad_input=dgate)
        torch.mm(dh, first, out=dx)
    return dx_RD, dh_R2F


def blocks_weight_gradients(
    dy_RD: Tensor, x_RD: Tensor, dh_R2F: Tensor, hidden: Sequence[Tensor], silus: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """dW13 [E, D, 2F] and dW2 [E, D, F] of `experts_blocks`, from what `blocks_input_gradient` found."""
    counts, width = [len(silu) for silu in silus], x_RD.shape[1]
    dw13 = x_RD.new_empty(len(counts), width, dh_R2F.shape[1])
    dw2 = x_RD.new_empty(len(counts), width, dh_R2F.shape[1] // 2)
    act_block = x_RD.new_empty(max(counts, default=0), dw2.shape[2])
    rows = (dy_RD.split(counts), x_RD.t().split(counts, 1), dh_R2F.split(counts), hidden, silus)
    for dy, x_t, dh, h, silu, dfirst, dsecond in zip(*rows, dw13.unbind(), dw2.unbind(), strict=True):
        act = act_block[: len(dy)]
        torch.mul(silu, h.chunk(2, -1)[1], out=act)
        torch.mm(dy.t(), act, out=dsecond)
        torch.mm(x_t, dh, out=dfirst)
    return dw13, dw2


def experts_blocks(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """`experts_loop` without its copies, zero fills and slices: the fastest on a CPU."""
    return _Blocks.apply(x_RD, counts_E, w13, w2)


def grouped_input_gradient(dy_RO: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """dX [R, I] of a grouped product x w."""
    return F.grouped_mm(dy_RO, w_EIO.transpose(1, 2), offs=offsets_E)


def grouped_weight_gradient(dy_RO: Tensor, x_RI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """dW [E, I, O] of a grouped product x w, laid out in memory as `w_EIO` is."""
    if w_EIO.stride(1) == 1:
        return F.grouped_mm(dy_RO.t(), x_RI, offs=offsets_E).transpose(1, 2)
    return F.grouped_mm(x_RI.t(), dy_RO, offs=offsets_E)


class _Grouped(torch.autograd.Function):
    """F.grouped_mm, whose own backward computes both gradients at once."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, w_EIO, offsets_E)
        ctx.queue = active_queue()
        return F.grouped_mm(x_RI, w_EIO, offs=offsets_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, w_EIO, offsets_E = ctx.saved_tensors
        dx = grouped_input_gradient(grads[0], w_EIO, offsets_E) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        if ctx.queue is None:
            return dx, grouped_weight_gradient(grads[0], x_RI, w_EIO, offsets_E), None
        ctx.queue.push([w_EIO], lambda: [grouped_weight_gradient(grads[0], x_RI, w_EIO, offsets_E)])
        return dx, None, None


def experts_grouped_mm(x_RD: Tensor, counts_E: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Two grouped products; counts stay on the device. bfloat16 on CUDA."""
    offsets = counts_E.cumsum(0).to(torch.int32)
    inside_RF = swiglu(_Grouped.apply(x_RD, w13, offsets))
    return _Grouped.apply(inside_RF, w2.transpose(1, 2), offsets)


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
