"""Which choices does an expert take when it may not take all? The same ones under every layout.

Capacity is counted over groups of consecutive sequences. An expert's choices of a group queue by position, or by weight
with ties by position, and the first that fit are kept. Where several ranks share a group's tokens only counts travel,
never a logit or a weight. By position: the exclusive prefix sums of each queue's length, in one gather. By weight: an
exact radix select of the last weight that fits, on its bits (positive floats order as their integers), with one sum of
256 bins a queue for each byte (four in fp32, eight in float64), then the prefix sums of those that tie with it. The
papers' local dropping, which depends on the layout, is the scope `sub_sequence`.
Decisions are as equal as the weights are: where rounding differs it can move one. No host synchronisation.
Shapes: R tokens here in order of position, K choices of a token, N = R * K choices by position then number of choice,
E experts, X = groups * E queues, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from concertina.config import ModelConfig
from concertina.layout import Axis, chunks, chunks_size
from concertina.parallel.collectives import all_reduce_sum, gather_counts
from concertina.parallel.groups import Group, Groups
from concertina.parallel.lanes import Lanes

__all__ = ["Capacity", "Quota"]

_BINS = 256
_INTEGERS = {4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Quota:
    """What experts take of one micro-batch: `capacity` choices of each of its groups.

    `group_R`: the group of each token here, of `num_groups`; `sharers`: the ranks that hold tokens of the same groups.
    A group is `num_pieces` pieces in order of position, `piece_R` is each token's (absent: there is one); of a piece,
    the sharers have tokens in their order. `padded`: rows of every expert from each rank of etp_ep; absent: as many as
    there are.
    """

    capacity: int
    by_weight: bool
    num_experts: int
    num_groups: int
    group_R: Tensor
    sharers: Group
    padded: tuple[int, ...] | None = None
    piece_R: Tensor | None = None
    num_pieces: int = 1

    def keep(self, expert_ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Which choices are kept: bool [R, K]. Weights are fp32 or float64. All `sharers` must call it."""
        queues = _Queues(self, expert_ids_RK)
        if not self.by_weight:
            kept_N = queues.places() < self.capacity
        elif self.sharers.size == 1:  # a sort knows it all
            order_N = _bits(weights_RK).argsort(descending=True, stable=True)
            kept_N = _places(queues.queue_N, queues.number, order_N)[0] < self.capacity
        else:
            kept_N = _above_threshold(_bits(weights_RK), queues, self.capacity)
        return kept_N.view(expert_ids_RK.shape)


class _Queues:
    """Which queue each choice stands in, and which part of it: that of its piece."""

    def __init__(self, quota: Quota, expert_ids_RK: Tensor) -> None:
        self.sharers, self.number = quota.sharers, quota.num_groups * quota.num_experts
        self.shape = (quota.num_groups, quota.num_pieces, quota.num_experts)
        self.queue_N = (expert_ids_RK + quota.group_R.unsqueeze(1) * quota.num_experts).view(-1)
        part_R = quota.group_R * quota.num_pieces
        if quota.piece_R is not None:
            part_R = part_R + quota.piece_R
        self.part_N = (expert_ids_RK + part_R.unsqueeze(1) * quota.num_experts).view(-1)

    def places(self, among_N: Tensor | None = None) -> Tensor:
        """How many of its queue stand before each choice, by position, wherever they are; only those `among_N` count
        (bool; absent: all), and what is said of others means nothing."""
        num_parts = self.number * self.shape[1]
        if among_N is None:
            place_N, counts_Y = _places(self.part_N, num_parts)
        else:
            place_N, counts = _places(self.part_N.masked_fill(~among_N, num_parts), num_parts + 1)
            counts_Y = counts[:num_parts]
        everywhere = gather_counts(counts_Y.view(self.shape), self.sharers).finish()
        whole = everywhere.sum(0)
        # Pieces before this one, then the ranks before this one in the piece.
        ahead = whole.cumsum(1) - whole + everywhere[: self.sharers.rank].sum(0)
        return place_N + ahead.view(-1)[self.part_N]


def _bits(weights_RK: Tensor) -> Tensor:
    """Integers in the order of the weights [N]; what is not a number is larger than all."""
    return weights_RK.detach().abs().view(_INTEGERS[weights_RK.element_size()]).reshape(-1)


def _places(queue_N: Tensor, num_queues: int, order_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many of its queue stand before each choice here, in `order_N` (absent: by position); the queues' lengths."""
    by_queue = queue_N.argsort(stable=True) if order_N is None else order_N[queue_N[order_N].argsort(stable=True)]
    counts_X = queue_N.new_zeros(num_queues).scatter_add_(0, queue_N, torch.ones_like(queue_N))
    starts_X = counts_X.cumsum(0) - counts_X
    place = torch.arange(queue_N.numel(), device=queue_N.device) - starts_X[queue_N[by_queue]]
    return torch.empty_like(place).scatter_(0, by_queue, place), counts_X


def _above_threshold(bits_N: Tensor, queues: _Queues, capacity: int) -> Tensor:
    """Whether each choice is among the `capacity` largest of its queue, the earlier of equals: bool [N]."""
    queue_N = queues.queue_N
    threshold_X, left_X = _select(bits_N, queue_N, queues.number, capacity, queues.sharers)
    ties_N = bits_N == threshold_X[queue_N]
    return (bits_N > threshold_X[queue_N]) | (ties_N & (queues.places(ties_N) < left_X[queue_N]))


def _select(bits_N: Tensor, queue_N: Tensor, num_queues: int, capacity: int, sharers: Group) -> tuple[Tensor, Tensor]:
    """The `capacity`-th largest of each queue, and how many equal to it still fit; 0 where all fit.

    From the highest byte on: which value of this byte holds the one looked for, among those that agree so far?
    """
    threshold_X = queue_N.new_zeros(num_queues)
    left_X = torch.full_like(threshold_X, capacity)
    for shift in range(8 * bits_N.element_size() - 8, -1, -8):
        upto_N = bits_N >> shift
        agrees_N = (upto_N >> 8) == threshold_X[queue_N]
        slots_N = queue_N * _BINS + (upto_N & (_BINS - 1))
        bins = torch.zeros(num_queues * _BINS, dtype=torch.int32, device=bits_N.device)
        bins.scatter_add_(0, slots_N, agrees_N.to(torch.int32))
        bins_XB = all_reduce_sum(bins, sharers).finish().view(num_queues, _BINS)
        from_XB = bins_XB.flip(1).cumsum(1).flip(1)
        # Falls with the byte; the last value from which on there are enough. None: the queue is too short.
        byte_X = ((from_XB >= left_X.unsqueeze(1)).sum(1) - 1).clamp(min=0)
        left_X = left_X - (from_XB - bins_XB).gather(1, byte_X.unsqueeze(1)).squeeze(1)
        threshold_X = threshold_X * _BINS + byte_X
    return threshold_X, left_X


class Capacity:
    """A job's rule, which gives every micro-batch its quota. `model.capacity.factor` must be set."""

    def __init__(self, model: ModelConfig, groups: Groups, lanes: Lanes) -> None:
        self.model, self.groups, self.lanes = model, groups, lanes
        self.local = model.capacity.scope == "sub_sequence"
        self.cp = groups["cp"]

    def quota(self, num_sequences: int, length: int, device: torch.device, peers: Sequence[int] | None = None) -> Quota:
        """For a micro-batch of so many sequences of `length`. `peers`: how many each rank of dp has in its own, for
        padding; absent: the same."""
        share = _Share(self, num_sequences, length, self.cp.rank, self.lanes.rank)
        token_R = torch.arange(share.start, share.stop, device=device)
        quota = Quota(
            share.capacity,
            self.model.capacity.priority == "probability",
            self.model.num_experts,
            -(-(share.last - share.first) // max(1, share.size)),
            (token_R - share.first) // max(1, share.size),
            self._sharers(),
            self._padded(peers or [num_sequences] * self.groups.layout.dp, length) if self.model.capacity.pad else None,
        )
        if self.local or self.cp.size == 1:
            return quota
        number_S = torch.cat([torch.full((b - a,), n, device=device) for n, (a, b) in _numbered(length, self.cp)])
        sequences, pieces = self.model.capacity.group_sequences, 2 * self.cp.size
        piece_R = token_R // share.length % sequences * pieces + number_S[token_R % share.length]
        return replace(quota, piece_R=piece_R, num_pieces=sequences * pieces)

    def _sharers(self) -> Group:
        if self.local:
            return Group.alone()
        return self.cp if self.lanes.replicated else self.groups["tp_cp"]

    def _padded(self, peers: Sequence[int], length: int) -> tuple[int, ...]:
        """Rows of an expert from each rank of etp_ep: of each group min(capacity, the group's tokens on that rank)."""
        layout, rows = self.groups.layout, []
        for rank in self.groups["etp_ep"].ranks:
            dp, cp, tp = (layout.coordinate(rank, axis) for axis in (Axis.DP, Axis.CP, Axis.TP))
            rows.append(_Share(self, peers[dp], length, cp, tp).most_rows())
        return tuple(rows)


class _Share:
    """Tokens [start, stop) of those that lane `tp` of rank `cp` has of a micro-batch, `length` of each sequence; it
    counts together with those in [first, last), of which `size` are a group's, that takes `capacity` of an expert."""

    def __init__(self, rule: Capacity, num_sequences: int, length: int, cp: int, tp: int) -> None:
        self.length = chunks_size(length, rule.cp.size, cp)
        here, sequences = num_sequences * self.length, rule.model.capacity.group_sequences
        self.start, self.stop = rule.lanes.share(here, tp)
        if rule.local:
            self.first, self.last, self.size = self.start, self.stop, max(1, self.stop - self.start)
            self.capacity = rule.model.expert_capacity(self.size)
        else:
            self.first, self.last, self.size = 0, here, sequences * self.length
            self.capacity = rule.model.expert_capacity(sequences * length)

    def most_rows(self) -> int:
        """Rows that an expert can get from here."""
        begins = range(self.first, self.last, max(1, self.size))
        here = (min(self.stop, begin + self.size) - max(self.start, begin) for begin in begins)
        return sum(min(self.capacity, max(0, tokens)) for tokens in here)


def _numbered(length: int, cp: Group) -> list[tuple[int, tuple[int, int]]]:
    """The chunks here, with their numbers among all of a sequence."""
    own = chunks(length, cp.size, cp.rank)
    return list(zip((cp.rank, 2 * cp.size - 1 - cp.rank), own, strict=True))
