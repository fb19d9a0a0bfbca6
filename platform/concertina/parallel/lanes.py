"""How do activations cross the lanes of tensor parallelism? Into a column-parallel product, out of a row-parallel one.

With sequence parallelism (Korthikanti et al. 2022) a lane keeps its share of the tokens between products: it gathers
all of them on the way in and sums and scatters on the way out. Without, every lane has every token: nothing is sent on
the way in, outputs are summed on the way out; what lanes then compute alike must count once in gradients.
Sums are taken in at least fp32. All lanes must make the same calls in the same order.
Shapes: T tokens of all lanes, R of them here, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from concertina.layout.box import cut
from concertina.parallel.collectives import Pending, all_gather_v, carried, reduce_scatter_v, wide_sum
from concertina.parallel.groups import Group

__all__ = ["Lanes"]


class Lanes:
    """The lanes of `group` (tp), seen from one of them."""

    def __init__(self, group: Group, sequence_parallel: bool = True) -> None:
        self.group = group
        self.sequence_parallel = sequence_parallel

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def rank(self) -> int:
        return self.group.rank

    @property
    def copies(self) -> int:
        """How many lanes hold the same tokens."""
        return 1 if self.sequence_parallel else self.size

    @property
    def replicated(self) -> bool:
        """Whether several lanes hold the same tokens."""
        return self.copies > 1

    @property
    def speaks(self) -> bool:
        """Whether this lane counts what all lanes know alike."""
        return self.rank == 0

    def share(self, num_tokens: int, lane: int | None = None) -> tuple[int, int]:
        """[start, stop) of the tokens that `lane` (absent: this one) holds between products."""
        return (0, num_tokens) if self.replicated else cut(num_tokens, self.size, self.rank if lane is None else lane)

    def _sizes(self, num_tokens: int) -> list[int]:
        return [stop - start for start, stop in (cut(num_tokens, self.size, lane) for lane in range(self.size))]

    def start_enter(self, x_RD: Tensor, num_tokens: int) -> Pending:
        """All `num_tokens` tokens, for a column-parallel product; their gradients are summed over the lanes."""
        if self.replicated:
            return Pending(lambda: self.duplicate(x_RD))
        return all_gather_v(x_RD, self._sizes(num_tokens), self.group)

    def start_leave(self, part_TD: Tensor) -> Pending:
        """The sum of the lanes' row-parallel products, of the tokens that this lane holds."""
        if self.replicated:
            summing = wide_sum(part_TD.detach(), self.group)
            # Every lane computes the same with the sum, so every lane has the whole gradient already.
            return Pending(lambda: carried(part_TD, summing.finish(), lambda grad: Pending(lambda: grad)))
        return reduce_scatter_v(part_TD, self._sizes(len(part_TD)), self.group)

    def enter(self, x_RD: Tensor, num_tokens: int) -> Tensor:
        """`start_enter`, and wait."""
        return self.start_enter(x_RD, num_tokens).finish()

    def leave(self, part_TD: Tensor) -> Tensor:
        """`start_leave`, and wait."""
        return self.start_leave(part_TD).finish()

    def duplicate(self, x_RD: Tensor) -> Tensor:
        """Into what lanes with the same tokens compute each for itself, and `count_once` brings out again."""
        return carried(x_RD, x_RD.detach(), partial(wide_sum, group=self.group)) if self.replicated else x_RD

    def count_once(self, x: Tensor) -> Tensor:
        """Something all lanes compute alike: each answers for its share of the gradient."""
        return _DivideGradient.apply(x, self.size) if self.replicated else x


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: int) -> Tensor:
        ctx.parts = parts
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.parts, None
