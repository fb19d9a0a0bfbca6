"""How does a rank exchange tensors with its group? Each call starts something and returns what finishes it.

Every rank of the group must make the same calls in the same order. Groups of one communicate nothing.
Shapes: R rows sent, Q rows received, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from concertina.parallel.groups import Group

__all__ = [
    "Pending",
    "all_gather_into",
    "all_gather_v",
    "all_reduce_max",
    "all_reduce_sum",
    "all_to_all_v",
    "gather_counts",
    "reduce_scatter_sum",
    "reduce_scatter_v",
]


class Pending:
    """A communication under way. `finish` waits (bounded by the group's timeout) and returns the result, once."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish

    def finish(self) -> Tensor:
        assert self._finish is not None, "finish() is called once"
        finish, self._finish = self._finish, None
        return finish()


def _after(work: Any, result: Tensor) -> Pending:
    def finish() -> Tensor:
        work.wait()
        return result

    return Pending(finish)


def all_reduce_sum(x: Tensor, group: Group) -> Pending:
    """Sum `x` over the group, in place."""
    if group.size == 1:
        return Pending(lambda: x)
    return _after(group.backend.allreduce([x]), x)


def all_reduce_max(x: Tensor, group: Group) -> Pending:
    """The largest of every element of `x` over the group, in place. No gradient flows."""
    if group.size == 1:
        return Pending(lambda: x)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
    return _after(group.backend.allreduce([x], options), x)


def reduce_scatter_sum(out: Tensor, x: Tensor, group: Group) -> Pending:
    """Sum `x` [size * n] over the group; this rank's n elements land in `out`. No gradient flows."""
    if group.size == 1:
        return Pending(lambda: out if out.data_ptr() == x.data_ptr() else out.copy_(x))
    return _after(group.backend._reduce_scatter_base(out, x), out)


def all_gather_into(out: Tensor, x: Tensor, group: Group) -> Pending:
    """Concatenate every rank's `x` [n] into `out` [size * n], in group order. No gradient flows."""
    if group.size == 1:
        return Pending(lambda: out if out.data_ptr() == x.data_ptr() else out.copy_(x))
    return _after(group.backend._allgather_base(out, x), out)


def gather_counts(counts: Tensor, group: Group) -> Tensor:
    """What every rank of the group counted: int64 [size, *counts.shape] (blocking)."""
    if group.size == 1:
        return counts.unsqueeze(0)
    out = counts.new_empty(group.size, *counts.shape)
    group.backend._allgather_base(out.view(-1), counts.contiguous().view(-1)).wait()
    return out


def all_to_all_v(rows_RD: Tensor, send: list[int], receive: list[int], group: Group) -> Pending:
    """Send `send[i]` consecutive rows to position i, get `receive[i]` rows from it, in group order.

    The exchange starts now, outside autograd; `finish` returns rows_QD with a backward that sends gradients back.
    """
    if group.size == 1:
        return Pending(lambda: rows_RD)
    rows_QD, work = _start(rows_RD.detach(), send, receive, group)

    def finish() -> Tensor:
        work.wait()
        return _Exchanged.apply(rows_RD, rows_QD, (send, receive, group))

    return Pending(finish)


def all_gather_v(rows_RD: Tensor, sizes: list[int], group: Group) -> Pending:
    """Rows of every rank of the group, one after the other; position i gives `sizes[i]` of them.

    The exchange starts now, outside autograd; `finish` returns rows_QD, whose gradients are summed at their origin.
    """
    if group.size == 1:
        return Pending(lambda: rows_RD)
    gathering = _start_gather(rows_RD.detach(), sizes, group)
    return Pending(lambda: _Gathered.apply(rows_RD, gathering.finish(), (sizes, group)))


def reduce_scatter_v(rows_QD: Tensor, sizes: list[int], group: Group) -> Pending:
    """Sum rows over the group, in at least fp32, and keep this position's `sizes[i]` of them.

    The exchange starts now, outside autograd; `finish` returns rows_RD, whose gradients go to every rank.
    """
    if group.size == 1:
        return Pending(lambda: rows_QD)
    scattering = _start_scatter(rows_QD.detach(), sizes, group)
    return Pending(lambda: _Scattered.apply(rows_QD, scattering.finish(), (sizes, group)))


def _start_gather(rows: Tensor, sizes: list[int], group: Group) -> Pending:
    rows, out = rows.contiguous(), rows.new_empty(sum(sizes), *rows.shape[1:])
    if len(set(sizes)) == 1:
        return _after(group.backend._allgather_base(out, rows), out)
    # Backends gather equal pieces only; each rank sends its rows to all others, which are the same bytes.
    copies = rows.repeat(group.size, *(1 for _ in rows.shape[1:]))
    return _after(group.backend.alltoall_base(out, copies, sizes, [len(rows)] * group.size), out)


def _start_scatter(rows: Tensor, sizes: list[int], group: Group) -> Pending:
    rows, mine = rows.contiguous(), sizes[group.rank]
    wide = torch.promote_types(rows.dtype, torch.float32)
    if len(set(sizes)) == 1 and rows.dtype == wide:
        out = rows.new_empty(mine, *rows.shape[1:])
        return _after(group.backend._reduce_scatter_base(out, rows), out)
    parts = rows.new_empty(group.size, mine, *rows.shape[1:])
    work = group.backend.alltoall_base(parts.flatten(0, 1), rows, [mine] * group.size, sizes)

    def finish() -> Tensor:
        work.wait()
        return parts.sum(0, dtype=wide).to(rows.dtype)

    return Pending(finish)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, rows_QD: Tensor, route: tuple[list[int], Group]) -> Tensor:
        ctx.route = route
        return rows_QD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _start_scatter(grads[0], *ctx.route).finish(), None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_QD: Tensor, rows_RD: Tensor, route: tuple[list[int], Group]) -> Tensor:
        ctx.route = route
        return rows_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _start_gather(grads[0], *ctx.route).finish(), None, None


def _start(rows: Tensor, send: list[int], receive: list[int], group: Group) -> tuple[Tensor, Any]:
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    return out, group.backend.alltoall_base(out, rows.contiguous(), receive, send)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, rows_QD: Tensor, route: tuple[list[int], list[int], Group]) -> Tensor:
        ctx.route = route
        return rows_QD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        send, receive, group = ctx.route
        back, work = _start(grads[0], receive, send, group)
        work.wait()
        return back, None, None
