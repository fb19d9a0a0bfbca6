"""How does a token get to its experts and back? Permute, all-to-all-v over ep, all-gather-v over etp, and the way back.

Rows travel to the rank of the ep group that has their expert; the lanes of etp there gather each other's rows, since
each computes a slice of every one; on the way back the slices' outputs are summed and scattered.
Four communications, in two steps with a start and a finish each, so that a schedule can put work between. All ranks of
the stage must make the same calls in the same order.
Dropped choices send no row. With padding each rank sends as many rows for every expert, known from the micro-batch's
shape alone, and no counts are exchanged.
Host synchronisations: none where etp and ep are 1 and nothing may be dropped, and none with padding; else one in each
`start_dispatch`, for the counts of all directions.
Shapes: R rows sent (tokens * K, less what is dropped), K choices of a token, P rows that arrive over ep, Q rows for the
experts here after the gather over etp, D width, E experts held here, I lanes of etp, J ranks of ep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from concertina.layout.box import cut
from concertina.parallel.collectives import Pending, all_gather_v, all_to_all_v, gather_counts, reduce_scatter_v
from concertina.parallel.groups import Groups
from concertina.parallel.permute import Order, combine, expert_order, kept_order, padded_order, reorder, spread
from concertina.parallel.recompute import again

__all__ = ["Combining", "Dispatcher", "Dispatching", "Received"]


@dataclass(frozen=True)
class _Route:
    """Where rows go: `sent[j]` to and `received[j]` from position j of ep, `gathered[i]` from lane i of etp."""

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
    order: Order
    route: _Route


class Dispatching:
    """Tokens on their way to the experts."""

    def __init__(self, dispatcher: Dispatcher, pending: Pending, counts_E: Tensor, order: Order, route: _Route) -> None:
        self._dispatcher, self._pending = dispatcher, pending
        self._counts_E, self._order, self._route = counts_E, order, route

    def finish(self) -> Received:
        route = self._route
        rows = all_gather_v(self._pending.finish(), route.gathered, self._dispatcher.groups["etp"]).finish()
        if route.by_expert_Q is not None and route.by_source_Q is not None:
            rows = reorder(rows, route.by_expert_Q, route.by_source_Q)
        return Received(rows, self._counts_E, self._order, route)


class Combining:
    """The experts' outputs on their way back."""

    def __init__(self, pending: Pending, weights_TK: Tensor, order: Order) -> None:
        self._pending, self._weights_TK, self._order = pending, weights_TK, order

    def finish(self) -> Tensor:
        """[T, D]: each token's rows, weighted and added in the order of its choices."""
        return combine(self._pending.finish(), self._weights_TK, self._order)


class Dispatcher:
    """Moves rows between the ranks of a stage, over whose ep `num_experts` experts are cut, evenly or not."""

    def __init__(self, num_experts: int, groups: Groups) -> None:
        self.num_experts = num_experts
        self.groups = groups
        ep = groups["ep"]
        self._ranges = [cut(num_experts, ep.size, index) for index in range(ep.size)]
        self.local_experts = self._ranges[ep.rank]
        self._padded_plan: tuple[tuple[Any, ...], tuple[_Route, Tensor]] | None = None  # the last one asked for

    def start_dispatch(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        kept_TK: Tensor | None = None,
        padded: Sequence[int] | None = None,
    ) -> Dispatching:
        """Sort rows by expert and start sending them. `expert_ids_TK`: int64, global numbers.

        `kept_TK`: which choices are not dropped, bool; absent: all. `padded`, with it: the rows that each rank of
        etp_ep sends to every expert, at least as many as it keeps. A rank of which a capacity group's tokens are only
        a part fills up its part to min(capacity, its tokens of the group), so the group gets more rows than it takes.
        """
        counts = _count(expert_ids_TK, self.num_experts, kept_TK)
        if kept_TK is None:
            order = expert_order(expert_ids_TK)
            rows_RD = self._spread(x_TD, order)  # before the host waits for the counts
            route, counts_E = self._plan(counts)
        elif padded is None:
            order = kept_order(expert_ids_TK, kept_TK, self.num_experts)
            route, counts_E = self._plan(counts)
            order = order.first(sum(route.sent) if self.groups["etp_ep"].size > 1 else int(counts.sum()))
            rows_RD = self._spread(x_TD, order)
        else:
            order = padded_order(expert_ids_TK, kept_TK, counts, padded[self.groups["etp_ep"].rank])
            rows_RD = self._spread(x_TD, order)
            route, counts_E = self._plan_padded(padded, counts)
        pending = all_to_all_v(rows_RD, route.sent, route.received, self.groups["ep"])
        return Dispatching(self, pending, counts_E, order, route)

    def _spread(self, x_TD: Tensor, order: Order) -> Tensor:
        """Rows that travel are no longer here when the backward wants them."""
        return spread(x_TD, order) if self.groups["etp_ep"].size > 1 else again("permute", spread, x_TD, order)

    def start_combine(self, received: Received, out_QD: Tensor, weights_TK: Tensor) -> Combining:
        """Start sending the experts' outputs `out_QD`, in the order of `received.rows_QD`, back to their tokens."""
        route = received.route
        if route.by_expert_Q is not None and route.by_source_Q is not None:
            out_QD = reorder(out_QD, route.by_source_Q, route.by_expert_Q)
        out_PD = reduce_scatter_v(out_QD, route.gathered, self.groups["etp"]).finish()
        pending = all_to_all_v(out_PD, route.received, route.sent, self.groups["ep"])
        return Combining(pending, weights_TK, received.order)

    def _plan(self, counts: Tensor) -> tuple[_Route, Tensor]:
        """Who sends how many rows to whom, from everybody's counts; rows for each expert here."""
        etp, ep = self.groups["etp"], self.groups["ep"]
        if self.groups["etp_ep"].size == 1:
            return _Route([], [], [], None, None), counts
        # Ranks of etp_ep ascend with etp fastest: [J, I, all experts] to [I, J, E].
        everyone = gather_counts(counts, self.groups["etp_ep"]).finish().view(ep.size, etp.size, -1).transpose(0, 1)
        arriving = everyone[:, :, slice(*self.local_experts)]
        leaving = torch.stack([counts[start:stop].sum() for start, stop in self._ranges])
        # The one synchronisation: three lists in one copy.
        numbers = torch.cat([leaving, arriving[etp.rank].sum(1), arriving.sum((1, 2))]).tolist()
        sent, received, gathered = numbers[: ep.size], numbers[ep.size : 2 * ep.size], numbers[2 * ep.size :]
        sources_SE = arriving.flatten(0, 1)
        return _Route(sent, received, gathered, *_regrouping(sources_SE, sum(gathered))), sources_SE.sum(0)

    def _plan_padded(self, padded: Sequence[int], like: Tensor) -> tuple[_Route, Tensor]:
        """The same from what every rank of etp_ep sends to every expert: nothing to exchange, nothing to wait for. All
        layers of a micro-batch ask for the same."""
        key = (*padded, like.device)
        if self._padded_plan is None or self._padded_plan[0] != key:
            self._padded_plan = key, self._make_padded_plan(padded, like)
        return self._padded_plan[1]

    def _make_padded_plan(self, padded: Sequence[int], like: Tensor) -> tuple[_Route, Tensor]:
        etp, mine = self.groups["etp"], padded[self.groups["etp_ep"].rank]
        here = self.local_experts[1] - self.local_experts[0]
        by_lane = [padded[lane :: etp.size] for lane in range(etp.size)]  # etp is fastest
        sent = [mine * (stop - start) for start, stop in self._ranges]
        received = [rows * here for rows in by_lane[etp.rank]]
        gathered = [sum(rows) * here for rows in by_lane]
        sources_SE = torch.stack([like.new_full((here,), rows) for lane in by_lane for rows in lane])
        return _Route(sent, received, gathered, *_regrouping(sources_SE, sum(gathered))), sources_SE.sum(0)


def _count(expert_ids_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> Tensor:
    """Rows for each expert, on the device (torch.bincount asks the host for its length)."""
    flat = expert_ids_TK.reshape(-1)
    ones = torch.ones_like(flat) if kept_TK is None else kept_TK.reshape(-1).to(flat.dtype)
    return flat.new_zeros(num_experts).scatter_add_(0, flat, ones)


def _regrouping(arriving_SE: Tensor, num_rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Gather indices from (source, expert) order to (expert, source) order and back; None when they are the same."""
    sources, experts = arriving_SE.shape
    if sources == 1 or experts <= 1:
        return None, None
    chunks = torch.arange(sources * experts, device=arriving_SE.device).view(sources, experts)
    chunk_Q = chunks.flatten().repeat_interleave(arriving_SE.flatten(), output_size=num_rows)
    expert_Q = chunk_Q % experts
    by_expert = expert_Q.argsort(stable=True)
    by_source = torch.empty_like(by_expert)
    by_source.scatter_(0, by_expert, torch.arange(by_expert.numel(), device=by_expert.device))
    return by_expert, by_source
