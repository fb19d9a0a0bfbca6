"""How does a rank exchange tensors with its group? Each call starts something and returns what finishes it.

Every rank of the group must make the same calls in the same order. Groups of one communicate nothing. Backwards are
made of the same calls: `carried` ties a gradient to the one that sends it back.
Shapes: R rows sent, Q rows received, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from concertina.parallel.groups import Group
from concertina.parallel.trace import Kind
from concertina.parallel.underway import Several, Underway

__all__ = [
    "Pending",
    "all_gather_into",
    "all_gather_v",
    "all_reduce_max",
    "all_reduce_sum",
    "all_to_all_v",
    "carried",
    "exchange",
    "gather_counts",
    "reduce_scatter_sum",
    "reduce_scatter_v",
    "wide_sum",
]


T = TypeVar("T")

_TAG = 0


class Pending(Generic[T]):
    """A communication under way. `finish` waits (bounded by the group's timeout) and returns the result, once."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    def finish(self) -> T:
        assert self._finish is not None, "finish() is called once"
        finish, self._finish = self._finish, None
        return finish()


def _after(work: Underway, result: Tensor) -> Pending[Tensor]:
    def finish() -> Tensor:
        work.wait()
        return result

    return Pending(finish)


def _issue(group: Group, kind: Kind, sent_bytes: int, start: Callable[[], Any]) -> Underway:
    """Hand a communication that takes `sent_bytes` from this rank over to the backend."""
    trace = group.tap.trace
    return Underway(start() if trace is None else trace.follow(group.name, kind, sent_bytes, start), group)


def all_reduce_sum(x: Tensor, group: Group) -> Pending[Tensor]:
    """Sum `x` over the group, in place."""
    return _all_reduce(x, group, dist.ReduceOp.SUM)


def all_reduce_max(x: Tensor, group: Group) -> Pending[Tensor]:
    """The largest of every element of `x` over the group, in place. No gradient flows."""
    return _all_reduce(x, group, dist.ReduceOp.MAX)


def _all_reduce(x: Tensor, group: Group, operation: Any) -> Pending[Tensor]:
    if group.size == 1:
        return Pending(lambda: x)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(operation)
    sent_bytes = -(-2 * (group.size - 1) * x.nbytes // group.size)
    return _after(_issue(group, "all_reduce", sent_bytes, lambda: group.backend.allreduce([x], options)), x)


def wide_sum(x: Tensor, group: Group) -> Pending[Tensor]:
    """The sum of `x` over the group, added in at least fp32: a new tensor of its dtype. No gradient flows."""
    wide = torch.promote_types(x.dtype, torch.float32)
    summing = all_reduce_sum(x.to(wide, copy=True, memory_format=torch.contiguous_format), group)
    return Pending(lambda: summing.finish().to(x.dtype))


def reduce_scatter_sum(out: Tensor, x: Tensor, group: Group) -> Pending[Tensor]:
    """Sum `x` [size * n] over the group; this rank's n elements land in `out`. No gradient flows."""
    if group.size == 1:
        return Pending(lambda: out if out.data_ptr() == x.data_ptr() else out.copy_(x))
    sent_bytes = x.nbytes - out.nbytes
    if group.backend.name() != "gloo":
        start = partial(group.backend._reduce_scatter_base, out, x)
        return _after(_issue(group, "reduce_scatter", sent_bytes, start), out)
    # Gloo's own sums everything everywhere: twice the bytes.
    parts = x.new_empty(group.size, *out.shape)
    start = partial(group.backend.alltoall_base, parts.view(-1), x, [], [])
    work = _issue(group, "reduce_scatter", sent_bytes, start)

    def finish() -> Tensor:
        work.wait()
        return torch.sum(parts, 0, out=out)

    return Pending(finish)


def all_gather_into(out: Tensor, x: Tensor, group: Group) -> Pending[Tensor]:
    """Concatenate every rank's `x` [n] into `out` [size * n], in group order. No gradient flows."""
    if group.size == 1:
        return Pending(lambda: out if out.data_ptr() == x.data_ptr() else out.copy_(x))
    return _gather(out, x, group, "all_gather")


def _gather(out: Tensor, x: Tensor, group: Group, kind: Kind) -> Pending[Tensor]:
    sent_bytes = (group.size - 1) * x.nbytes
    return _after(_issue(group, kind, sent_bytes, lambda: group.backend._allgather_base(out, x)), out)


def gather_counts(counts: Tensor, group: Group) -> Pending[Tensor]:
    """What every rank of the group counted: int64 [size, *counts.shape]."""
    if group.size == 1:
        return Pending(lambda: counts.unsqueeze(0))
    out = counts.new_empty(group.size, *counts.shape)
    gathering = _gather(out.view(-1), counts.contiguous().view(-1), group, "counts")
    return Pending(lambda: gathering.finish().view_as(out))


def exchange(
    sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], group: Group
) -> Pending[list[Tensor]]:
    """Send tensors to positions of the group and receive others from there, in place; no gradient flows.

    The k-th that goes to a position is the k-th that it receives from this one, in this exchange and over all. A rank
    takes part only for its own; none sends to itself. `finish` waits for all, also when one of them fails, and returns
    what was received. What is received into must be contiguous, and as large as what is sent.
    """
    assert group.rank not in {position for _, position in (*sends, *receives)}, "a rank does not send to itself"
    assert all(x.is_contiguous() for x, _ in receives), "received in place"
    there = [(x.detach().contiguous(), position) for x, position in sends if x.numel()]
    here = [(x.detach(), position) for x, position in receives if x.numel()]
    received = [x for x, _ in receives]
    if not there and not here:
        return Pending(lambda: received)
    sent_bytes = sum(x.nbytes for x, _ in there)
    work = _issue(group, "exchange", sent_bytes, lambda: Several(group.backend, there, here, _TAG))

    def finish() -> list[Tensor]:
        work.wait()
        return received

    return Pending(finish)


def all_to_all_v(rows_RD: Tensor, send: list[int], receive: list[int], group: Group) -> Pending[Tensor]:
    """Send `send[i]` consecutive rows to position i, get `receive[i]` rows from it, in group order.

    The exchange starts now, outside autograd; `finish` returns rows_QD with a backward that sends gradients back.
    """
    if group.size == 1:
        return Pending(lambda: rows_RD)
    exchanging = _start_exchange(rows_RD.detach(), send, receive, group)
    back = partial(_start_exchange, send=receive, receive=send, group=group)
    return Pending(lambda: carried(rows_RD, exchanging.finish(), back))


def all_gather_v(rows_RD: Tensor, sizes: list[int], group: Group) -> Pending[Tensor]:
    """Rows of every rank of the group, one after the other; position i gives `sizes[i]` of them.

    The exchange starts now, outside autograd; `finish` returns rows_QD, whose gradients are summed at their origin.
    """
    if group.size == 1:
        return Pending(lambda: rows_RD)
    gathering = _start_gather(rows_RD.detach(), sizes, group)
    back = partial(_start_scatter, sizes=sizes, group=group)
    return Pending(lambda: carried(rows_RD, gathering.finish(), back))


def reduce_scatter_v(rows_QD: Tensor, sizes: list[int], group: Group) -> Pending[Tensor]:
    """Sum rows over the group, in at least fp32, and keep this position's `sizes[i]` of them.

    The exchange starts now, outside autograd; `finish` returns rows_RD, whose gradients go to every rank.
    """
    if group.size == 1:
        return Pending(lambda: rows_QD)
    scattering = _start_scatter(rows_QD.detach(), sizes, group)
    back = partial(_start_gather, sizes=sizes, group=group)
    return Pending(lambda: carried(rows_QD, scattering.finish(), back))


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1:].numel() * rows.element_size()


def _start_exchange(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Pending[Tensor]:
    rows, out = rows.contiguous(), rows.new_empty(sum(receive), *rows.shape[1:])
    sent_bytes = (sum(send) - send[group.rank]) * _row_bytes(rows)
    work = _issue(group, "all_to_all", sent_bytes, lambda: group.backend.alltoall_base(out, rows, receive, send))
    return _after(work, out)


def _start_gather(rows: Tensor, sizes: list[int], group: Group) -> Pending[Tensor]:
    rows, out = rows.contiguous(), rows.new_empty(sum(sizes), *rows.shape[1:])
    if len(set(sizes)) == 1:
        return _gather(out, rows, group, "all_gather")
    # Backends gather equal pieces only; each rank sends its rows to all others, which are the same bytes.
    copies, sent = rows.repeat(group.size, *(1 for _ in rows.shape[1:])), [len(rows)] * group.size
    sent_bytes = (group.size - 1) * rows.nbytes
    work = _issue(group, "all_gather", sent_bytes, lambda: group.backend.alltoall_base(out, copies, sizes, sent))
    return _after(work, out)


def _start_scatter(rows: Tensor, sizes: list[int], group: Group) -> Pending[Tensor]:
    rows, mine = rows.contiguous(), sizes[group.rank]
    wide = torch.promote_types(rows.dtype, torch.float32)
    if len(set(sizes)) == 1 and rows.dtype == wide:
        return reduce_scatter_sum(rows.new_empty(mine, *rows.shape[1:]), rows, group)
    parts, received = rows.new_empty(group.size, mine, *rows.shape[1:]), [mine] * group.size
    sent_bytes = (len(rows) - mine) * _row_bytes(rows)
    start = partial(group.backend.alltoall_base, parts.flatten(0, 1), rows, received, sizes)
    work = _issue(group, "reduce_scatter", sent_bytes, start)

    def finish() -> Tensor:
        work.wait()
        return parts.sum(0, dtype=wide).to(rows.dtype)

    return Pending(finish)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, result: Tensor, start_back: Callable[[Tensor], Pending[Tensor]]) -> Tensor:
        ctx.start_back = start_back
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        pending = ctx.start_back(grads[0])
        return pending.finish(), None, None  # a schedule's work comes between these two lines


def carried(sent: Tensor, result: Tensor, start_back: Callable[[Tensor], Pending[Tensor]]) -> Tensor:
    """`result`, which came of `sent` outside autograd: its gradient becomes that of `sent` by `start_back`."""
    return _Carried.apply(sent, result, start_back)
