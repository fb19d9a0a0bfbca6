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
from dataclasses import dataclass

import torch
from torch import Tensor

from concertina.config import ModelConfig
from concertina.layout import Axis
from concertina.parallel.collectives import all_reduce_sum, gather_counts
from concertina.parallel.groups import Group, Groups
from concertina.parallel.lanes import Lanes

__all__ = ["Capacity", "Quota"]

_BINS = 256
_INTEGERS = {4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Quota:
    """What experts take of one micro-batch: `capacity` choices of each of its groups.

    `group_R`: the group of each token here, of `num_groups`; `sharers`: the ranks that hold tokens of the same groups,
    in order of position. `padded`: rows of every expert from each rank of etp_ep; absent: as many as there are.
    """

    capacity: int
    by_weight: bool
    num_experts: int
    num_groups: int
    group_R: Tensor
    sharers: Group
    padded: tuple[int, ...] | None = None

    def keep(self, expert_ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """Which choices are kept: bool [R, K]. Weights are fp32 or float64. All `sharers` must call it."""
        queue_N = (expert_ids_RK + self.group_R.unsqueeze(1) * self.num_experts).view(-1)
        num_queues = self.num_groups * self.num_experts
        if self.by_weight:
            kept_N = _heaviest(_bits(weights_RK), queue_N, num_queues, self.capacity, self.sharers)
        else:
            place_N, counts_X = _places(queue_N, num_queues)
            kept_N = place_N + _ahead(counts_X, self.sharers)[queue_N] < self.capacity
        return kept_N.view(expert_ids_RK.shape)


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


def _ahead(counts_X: Tensor, sharers: Group) -> Tensor:
    """How many choices of each queue the ranks before this one have."""
    return gather_counts(counts_X, sharers).finish()[: sharers.rank].sum(0)


def _heaviest(bits_N: Tensor, queue_N: Tensor, num_queues: int, capacity: int, sharers: Group) -> Tensor:
    """Whether each choice is among the `capacity` largest of its queue, the earlier of equals: bool [N]."""
    if sharers.size == 1:  # a sort knows it all
        return _places(queue_N, num_queues, bits_N.argsort(descending=True, stable=True))[0] < capacity
    return _above_threshold(bits_N, queue_N, num_queues, capacity, sharers)


def _above_threshold(bits_N: Tensor, queue_N: Tensor, num_queues: int, capacity: int, sharers: Group) -> Tensor:
    """The same when others have choices of the same queues."""
    threshold_X, left_X = _select(bits_N, queue_N, num_queues, capacity, sharers)
    ties_N = bits_N == threshold_X[queue_N]
    place_N, counts = _places(queue_N.masked_fill(~ties_N, num_queues), num_queues + 1)
    ahead_X = _ahead(counts[:num_queues], sharers)
    return (bits_N > threshold_X[queue_N]) | (ties_N & (place_N + ahead_X[queue_N] < left_X[queue_N]))


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

    def quota(self, num_sequences: int, length: int, device: torch.device, peers: Sequence[int] | None = None) -> Quota:
        """For a micro-batch of so many sequences. `peers`: how many each rank of dp has in its own, for padding;
        absent: the same."""
        start, stop = self.lanes.share(num_sequences * length)
        first, last, size = self._counted(num_sequences, length, self.lanes.rank)
        return Quota(
            self.model.expert_capacity(size),
            self.model.capacity.priority == "probability",
            self.model.num_experts,
            -(-(last - first) // size),
            torch.arange(start - first, stop - first, device=device) // size,
            Group.alone() if self.local or self.lanes.replicated else self.lanes.group,
            self._padded(peers or [num_sequences] * self.groups.layout.dp, length) if self.model.capacity.pad else None,
        )

    def _counted(self, num_sequences: int, length: int, lane: int) -> tuple[int, int, int]:
        """[first, last) of the micro-batch's tokens that `lane` counts together with, and the size of a group."""
        if self.local:
            start, stop = self.lanes.share(num_sequences * length, lane)
            return start, stop, max(1, stop - start)
        return 0, num_sequences * length, self.model.capacity.group_sequences * length

    def _padded(self, peers: Sequence[int], length: int) -> tuple[int, ...]:
        """Rows of an expert from each rank of etp_ep: of each group min(capacity, the group's tokens on that rank)."""
        layout = self.groups.layout
        return tuple(
            self._most_rows(peers[layout.coordinate(rank, Axis.DP)], length, layout.coordinate(rank, Axis.TP))
            for rank in self.groups["etp_ep"].ranks
        )

    def _most_rows(self, num_sequences: int, length: int, lane: int) -> int:
        start, stop = self.lanes.share(num_sequences * length, lane)
        first, last, size = self._counted(num_sequences, length, lane)
        here = (min(stop, begin + size) - max(start, begin) for begin in range(first, last, size))
        return sum(min(self.model.expert_capacity(size), max(0, tokens)) for tokens in here)
