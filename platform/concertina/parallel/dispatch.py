"""How does a token get to its experts and back? Permute, all-to-all-v over ep, all-gather-v over etp, and the way back.

Rows travel to the rank of the ep group that has their expert; the lanes of etp there gather each other's rows, since
each computes a slice of every one; on the way back the slices' outputs are summed and scattered.
Four communications, in two steps with a start and a finish each, so that a schedule can put work between. All ranks of
the stage must make the same calls in the same order.
Host synchronisations: none where etp and ep are 1; else one in each `start_dispatch`, for the counts of all directions.
Shapes: R = tokens * K rows sent, K choices of a token, P rows that arrive over ep, Q rows for the experts here after
the gather over etp, D width, E experts held here, I lanes of etp, J ranks of ep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from concertina.layout.box import cut
from concertina.parallel.collectives import Pending, all_gather_v, all_to_all_v, gather_counts, reduce_scatter_v
from concertina.parallel.groups import Groups
from concertina.parallel.permute import Order, combine, expert_order, reorder, spread

__all__ = ["Combining", "Dispatcher", "Dispatching", "Received"]


@dataclass(frozen=True)
class _Route:
    """Where rows go: `sent[j]` to and `received[j]` from position j of ep, `gathered[i]` from lane i of etp."""

    order: Order
    sent: list[int]
    received: list[int]
    gathered: list[int]
    by_expert_Q: Tensor | None
    """Rows come by lane, source, then expert; this gathers them by expert, lane, source. None: they are already."""
    by_source_Q: Tensor | None


@dataclass(frozen=True)
class Received:
    """Rows for the experts held here, by expert, then source, then token. `counts_E` are on the rows' device."""

    rows_QD: Tensor
    counts_E: Tensor
    route: _Route


class Dispatching:
    """Tokens on their way to the experts."""

    def __init__(self, dispatcher: Dispatcher, pending: Pending, counts_E: Tensor, route: _Route) -> None:
        self._dispatcher, self._pending, self._counts_E, self._route = dispatcher, pending, counts_E, route

    def finish(self) -> Received:
        route = self._route
        rows = all_gather_v(self._pending.finish(), route.gathered, self._dispatcher.groups["etp"]).finish()
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
    """Moves rows between the ranks of a stage, over whose ep `num_experts` experts are cut, evenly or not."""

    def __init__(self, num_experts: int, groups: Groups) -> None:
        self.num_experts = num_experts
        self.groups = groups
        ep = groups["ep"]
        self._ranges = [cut(num_experts, ep.size, index) for index in range(ep.size)]
        self.local_experts = self._ranges[ep.rank]

    def start_dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatching:
        """Sort rows by expert and start sending them. `expert_ids_TK`: int64, global numbers."""
        order = expert_order(expert_ids_TK)
        counts = _count(expert_ids_TK, self.num_experts)
        rows_RD = spread(x_TD, order)
        if self.groups["etp_ep"].size == 1:
            return Dispatching(self, Pending(lambda: rows_RD), counts, _Route(order, [], [], [], None, None))
        route, counts_E = self._plan(order, counts)
        pending = all_to_all_v(rows_RD, route.sent, route.received, self.groups["ep"])
        return Dispatching(self, pending, counts_E, route)

    def start_combine(self, received: Received, out_QD: Tensor, weights_TK: Tensor) -> Combining:
        """Start sending the experts' outputs `out_QD`, in the order of `received.rows_QD`, back to their tokens."""
        route = received.route
        if route.by_expert_Q is not None and route.by_source_Q is not None:
            out_QD = reorder(out_QD, route.by_source_Q, route.by_expert_Q)
        out_PD = reduce_scatter_v(out_QD, route.gathered, self.groups["etp"]).finish()
        pending = all_to_all_v(out_PD, route.received, route.sent, self.groups["ep"])
        return Combining(pending, weights_TK, route.order)

    def _plan(self, order: Order, counts: Tensor) -> tuple[_Route, Tensor]:
        """Who sends how many rows to whom, from everybody's counts; rows for each expert here."""
        etp, ep = self.groups["etp"], self.groups["ep"]
        # Ranks of etp_ep ascend with etp fastest: [J, I, all experts] to [I, J, E].
        everyone = gather_counts(counts, self.groups["etp_ep"]).finish().view(ep.size, etp.size, -1).transpose(0, 1)
        arriving = everyone[:, :, slice(*self.local_experts)]
        leaving = torch.stack([counts[start:stop].sum() for start, stop in self._ranges])
        # The one synchronisation: three lists in one copy.
        numbers = torch.cat([leaving, arriving[etp.rank].sum(1), arriving.sum((1, 2))]).tolist()
        sent, received, gathered = numbers[: ep.size], numbers[ep.size : 2 * ep.size], numbers[2 * ep.size :]
        sources_SE = arriving.flatten(0, 1)
        return _Route(order, sent, received, gathered, *_regrouping(sources_SE)), sources_SE.sum(0)


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
