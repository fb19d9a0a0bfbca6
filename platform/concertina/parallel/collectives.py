"""How does a rank exchange tensors with its group? Each call starts something and returns what finishes it.

Every rank of the group must make the same calls in the same order. Groups of one communicate nothing.
Shapes: R rows sent, Q rows received, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from concertina.parallel.groups import Group

__all__ = [
    "Pending",
    "all_gather_into",
    "all_reduce_sum",
    "all_to_all_v",
    "exchange_counts",
    "reduce_scatter_sum",
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


def exchange_counts(counts_E: Tensor, group: Group) -> Tensor:
    """Tell every rank of the group how many rows it will get: int64 [size * n] in, the same shape out (blocking)."""
    if group.size == 1:
        return counts_E
    out = torch.empty_like(counts_E)
    group.backend.alltoall_base(out, counts_E.contiguous(), [], []).wait()
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
