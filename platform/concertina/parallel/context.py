"""Who has which positions of a sequence, and how do keys and values get to all who look back at them?

Context parallelism: each rank of cp has two chunks of every sequence (`layout/chunks.py`), and only attention looks
beyond them. Keys and values travel in one of two ways, with the same bytes. `gather`: every rank gets those of the
whole sequence at once, for as long as one layer's attention takes (Llama 3, arXiv 2407.21783, section 3.3.2); gradients
come back as a reduce-scatter. `ring`: each rank hands on what it got from its neighbour while it attends to it (Ring
Attention, arXiv 2310.01889); no rank ever has more than three pieces, and their gradients travel along.
Shapes: S positions of a sequence, R of them here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from concertina.layout import Exchange, chunks, chunks_size, travels_in_ring
from concertina.parallel.collectives import Pending, all_gather_v, exchange, reduce_scatter_v
from concertina.parallel.groups import Group

__all__ = ["Context"]


class Context:
    """The ranks of `group` (cp), seen from one of them."""

    def __init__(self, group: Group, exchange: Exchange = "auto") -> None:
        self.group, self.exchange = group, exchange

    def chunks(self, length: int, rank: int | None = None) -> tuple[tuple[int, int], ...]:
        """Chunks of a sequence of `length` that `rank` (absent: this one) has."""
        return chunks(length, self.group.size, self.group.rank if rank is None else rank)

    def sizes(self, length: int) -> list[int]:
        """How many positions of a sequence each rank has."""
        return [chunks_size(length, self.group.size, rank) for rank in range(self.group.size)]

    def size(self, length: int) -> int:
        """How many are here."""
        return self.sizes(length)[self.group.rank]

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Those here: int64 [R], rising."""
        return torch.cat([torch.arange(*chunk, device=device) for chunk in self.chunks(length)])

    def take(self, x_BS: Tensor) -> Tensor:
        """What is here of whole sequences: [B, R]."""
        if self.group.size == 1:
            return x_BS
        return torch.cat([x_BS[:, start:stop] for start, stop in self.chunks(x_BS.shape[1])], 1)

    def travels_in_ring(self, length: int) -> bool:
        """Whether keys and values of such sequences go from rank to rank, and not all at once."""
        return self.group.size > 1 and travels_in_ring(self.exchange, length)

    # -- gather -----------------------------------------------------------------------------------------------------

    def gather(self, x_RX: Tensor, length: int) -> Tensor:
        """Rows of all positions, in their order [S, ...]. All ranks of cp must call it."""
        rows = all_gather_v(x_RX, self.sizes(length), self.group).finish()
        found, offset = {}, 0
        for rank in range(self.group.size):
            for start, stop in self.chunks(length, rank):
                found[start, stop], offset = rows[offset : offset + stop - start], offset + stop - start
        return torch.cat([found[chunk] for chunk in sorted(found)])

    def scatter(self, x_SX: Tensor, length: int) -> Tensor:
        """The sum over the ranks of rows of all positions, of those here [R, ...]. All ranks of cp must call it."""
        order = [chunk for rank in range(self.group.size) for chunk in self.chunks(length, rank)]
        rows = torch.cat([x_SX[start:stop] for start, stop in order])
        return reduce_scatter_v(rows, self.sizes(length), self.group).finish()

    # -- ring -------------------------------------------------------------------------------------------------------

    def sources(self) -> Iterator[int]:
        """Whose piece is here at each turn of the ring: one's own first, then the neighbours' before."""
        return ((self.group.rank - turn) % self.group.size for turn in range(self.group.size))

    def start_pass(self, x_RX: Tensor, num_rows: int) -> Pending[Tensor]:
        """Hand a piece on to the next rank, get the one of the rank before, of `num_rows` rows."""
        after, before = (self.group.rank + 1) % self.group.size, (self.group.rank - 1) % self.group.size
        received = x_RX.new_empty(num_rows, *x_RX.shape[1:])
        pending = exchange([(x_RX, after)], [(received, before)], self.group)
        return Pending(lambda: pending.finish()[0])
