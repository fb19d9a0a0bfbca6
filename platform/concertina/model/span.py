"""Which tokens of a micro-batch are here? Between products a lane of tp may hold only some of them.

Shapes: B sequences of S tokens, T = B * S; R tokens of this lane, consecutive ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from concertina.parallel.capacity import Quota

__all__ = ["Span"]


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a micro-batch. `tokens_B`: how many tokens each sequence counts for in the router's
    losses (its predicted targets). `quota`: how many of them an expert takes; absent: all."""

    num_sequences: int
    length: int
    start: int
    stop: int
    tokens_B: Tensor
    quota: Quota | None = None

    @property
    def num_tokens(self) -> int:
        """All tokens of the micro-batch, T."""
        return self.num_sequences * self.length

    @cached_property
    def sequence_R(self) -> Tensor:
        """Which sequence of the micro-batch each token here is in: int64."""
        return torch.arange(self.start, self.stop, device=self.tokens_B.device) // self.length

    @cached_property
    def weight_R(self) -> Tensor:
        """What a token's share of a mean over its sequence counts for: float64."""
        return (self.tokens_B.to(torch.float64) / self.length).index_select(0, self.sequence_R)
