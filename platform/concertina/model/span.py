"""Which tokens of a micro-batch are here, and which of the global batch's are they? A rank of cp has some positions of
each sequence, and between products a lane of tp may hold only some of those tokens.

Shapes: B sequences, S positions of each on this rank of cp, T = B * S tokens; R of them on this lane, consecutive ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from concertina.parallel.capacity import Quota

__all__ = ["Place", "Span"]


@dataclass(frozen=True)
class Place:
    """Where a micro-batch is in training: it begins with sequence `first` of the global batch of step `step`.

    Random numbers are keyed by it, and so know neither world nor micro-batches. `peers`: how many sequences each rank
    of dp has in this micro-batch; absent: as many as this one.
    """

    step: int
    first: int
    peers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of those of a micro-batch that are on this rank of cp: of each sequence of `length` the ones
    at `positions_S` (int64, rising).

    `tokens_B`: how many tokens each whole sequence counts for in the router's losses (its predicted targets). `place`:
    None outside training. `quota`: how many of them an expert takes; absent: all.
    """

    length: int
    positions_S: Tensor
    start: int
    stop: int
    tokens_B: Tensor
    place: Place | None = None
    quota: Quota | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.tokens_B)

    @property
    def num_tokens(self) -> int:
        """All tokens of the micro-batch on this rank of cp, T."""
        return self.num_sequences * len(self.positions_S)

    @cached_property
    def _token_R(self) -> Tensor:
        return torch.arange(self.start, self.stop, device=self.tokens_B.device)

    @cached_property
    def sequence_R(self) -> Tensor:
        """Which sequence of the micro-batch each token here is in: int64."""
        return self._token_R // len(self.positions_S)

    @cached_property
    def position_R(self) -> Tensor:
        """Number of each token here among those of the global batch: int64. In training only."""
        assert self.place is not None
        inside_R = self.positions_S.index_select(0, self._token_R % len(self.positions_S))
        return (self.place.first + self.sequence_R) * self.length + inside_R

    @cached_property
    def weight_R(self) -> Tensor:
        """What a token's share of a mean over its sequence counts for: float64."""
        return (self.tokens_B.to(torch.float64) / self.length).index_select(0, self.sequence_R)
