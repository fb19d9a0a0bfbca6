"""How does a token get to its experts and back? Dropless: permute, all-to-all-v over ep, regroup, and the way back.

Two communications, each with a start and a finish, so that a schedule can put work between. All ranks of the ep group
must make the same calls in the same order.
Host synchronisations: none on a group of one; else one in each `start_dispatch`, for the counts of both directions.
Shapes: T tokens here, K choices of a token, R = T * K rows sent, Q rows received, D width, E experts held here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from concertina.layout.box import cut
from concertina.parallel.collectives import Pending, all_to_all_v, exchange_counts
from concertina.parallel.groups import Group
from concertina.parallel.permute import Order, combine, expert_order, reorder, spread

__all__ = ["Combining", "Dispatcher", "Dispatching", "Received"]


@dataclass(frozen=True)
class _Route:
    """Where rows go. `sent[i]` rows to and `received[i]` rows from position i of the group."""

    order: Order
    sent: list[int]
    received: list[int]
    by_expert_Q: Tensor | None
    """Arrived rows come by source, then expert; this gathers them by expert, then source. None: they are already."""
    by_source_Q: Tensor | None


@dataclass(frozen=True)
class Received:
    """Rows for the experts held here, by expert, then source rank, then token. `counts_E` are on the rows' device."""

    rows_QD: Tensor
    counts_E: Tensor
    route: _Route


class Dispatching:
    """Tokens on their way to the experts."""

    def __init__(self, pending: Pending, counts_E: Tensor, route: _Route) -> None:
        self._pending, self._counts_E, self._route = pending, counts_E, route

    def finish(self) -> Received:
        rows, route = self._pending.finish(), self._route
        if route.by_expert_Q is not None and route.by_source_Q is not None:
            rows = reorder(rows, route.by_expert_Q, route.by_source_Q)
        return Received(rows, self._counts_E, route)


class Combining:
    """The experts' outputs on their way back."""

    def __init__(self, pending: Pending, weights_TK: Tensor, order: Order) -> None:
        self._pending, self._weights_TK, self._order = pending, weights_TK, order

    def finish(self) -> Tensor:
        """[T, D]: each token's K rows, weighted and added in the order of its choices."""
        return combine(self._pending.finish(), self._weights_TK, self._order)


class Dispatcher:
    """Moves rows between the ranks of `group` (ep), over which `num_experts` experts are cut, evenly or not."""

    def __init__(self, num_experts: int, group: Group) -> None:
        self.num_experts = num_experts
        self.group = group
        self.local_experts = cut(num_experts, group.size, group.rank)
        self._ranges = [cut(num_experts, group.size, index) for index in range(group.size)]
        self._most = max(stop - start for start, stop in self._ranges)

    def start_dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatching:
        """Sort rows by expert and start sending them. `expert_ids_TK`: int64, global numbers."""
        order = expert_order(expert_ids_TK)
        counts = _count(expert_ids_TK, self.num_experts)
        rows_RD = spread(x_TD, order)
        if self.group.size == 1:
            return Dispatching(Pending(lambda: rows_RD), counts, _Route(order, [], [], None, None))
        arriving = self._exchange(counts)
        route = _Route(order, *self._splits(counts, arriving), *_regrouping(arriving))
        pending = all_to_all_v(rows_RD, route.sent, route.received, self.group)
        return Dispatching(pending, arriving.sum(0), route)

    def start_combine(self, received: Received, out_QD: Tensor, weights_TK: Tensor) -> Combining:
        """Start sending the experts' outputs `out_QD`, in the order of `received.rows_QD`, back to their tokens."""
        route = received.route
        if self.group.size == 1:
            return Combining(Pending(lambda: out_QD), weights_TK, route.order)
        if route.by_expert_Q is not None and route.by_source_Q is not None:
            out_QD = reorder(out_QD, route.by_source_Q, route.by_expert_Q)
        pending = all_to_all_v(out_QD, route.received, route.sent, self.group)
        return Combining(pending, weights_TK, route.order)

    def _exchange(self, counts: Tensor) -> Tensor:
        """Rows that each source will send to each expert held here: int64 [size, local experts]."""
        padded = counts.new_zeros(self.group.size, self._most)
        for index, (start, stop) in enumerate(self._ranges):
            padded[index, : stop - start] = counts[start:stop]
        arriving = exchange_counts(padded.view(-1), self.group).view(self.group.size, self._most)
        return arriving[:, : self.local_experts[1] - self.local_experts[0]]

    def _splits(self, counts: Tensor, arriving: Tensor) -> tuple[list[int], list[int]]:
        """Rows to and from every rank, on the host: the one synchronisation."""
        leaving = torch.stack([counts[start:stop].sum() for start, stop in self._ranges])
        both = torch.stack([leaving, arriving.sum(1)]).tolist()
        return both[0], both[1]


def _count(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Rows for each expert, on the device (torch.bincount asks the host for its length)."""
    flat = expert_ids_TK.reshape(-1)
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


def _regrouping(arriving_SE: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gather indices from (source, expert) order to (expert, source) order and back; None when they are the same."""
    sources, experts = arriving_SE.shape
    if sources == 1 or experts <= 1:
        return None, None
    chunks = torch.arange(sources * experts, device=arriving_SE.device).view(sources, experts)
    chunk_Q = chunks.flatten().repeat_interleave(arriving_SE.flatten())
    expert_Q = chunk_Q % experts
    by_expert = expert_Q.argsort(stable=True)
    by_source = torch.empty_like(by_expert)
    by_source.scatter_(0, by_expert, torch.arange(by_expert.numel(), device=by_expert.device))
    return by_expert, by_source
