"""What does a token see of its sequence? What comes before it, in its own document if so wished, wherever that is.

Shapes: B sequences, S positions of the whole sequence, R of them here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from concertina.model.rope import Rotation
from concertina.parallel.context import Context

__all__ = ["Sight", "Tile"]

_MASKED_ROWS, _MASKED_KEYS = 256, 4096
"""Rows and keys of a tile where documents end: masks stay small, and more tiles can be left out that nobody sees."""


@dataclass(frozen=True)
class Tile:
    """Queries `rows` of those here against keys `keys` of one piece; the first ones are at these positions of the
    sequence. `causal`: both are the same positions, and a query sees none after its own; else it sees all keys.
    `masked`: but for those of another document."""

    rows: slice
    keys: slice
    first_row: int
    first_key: int
    causal: bool
    masked: bool


@dataclass(frozen=True)
class Sight:
    """Of the tokens here, in sequences of `length`: `turn` is the rotation of the positions here; `starts_BS` where the
    document of each position starts (int64, whole sequences, on the CPU; absent: a token sees all before it)."""

    length: int
    context: Context
    turn: Rotation
    starts_BS: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether whole sequences are here and all of them is seen."""
        return self.context.group.size == 1 and self.starts_BS is None

    def tiles(self, keys: tuple[tuple[int, int], ...]) -> list[Tile]:
        """What queries here see of a piece that has these chunks of positions, one after the other."""
        found, row = [], 0
        for start, stop in self.context.chunks(self.length):
            step = stop - start if self.starts_BS is None else _MASKED_ROWS
            for first in range(start, stop, max(1, step)):
                found += self._row_tiles(first, min(first + step, stop), row + first - start, keys)
            row += stop - start
        return found

    def _row_tiles(self, first: int, last: int, row: int, keys: tuple[tuple[int, int], ...]) -> list[Tile]:
        """Of queries at positions [first, last), which begin with row `row`."""
        rows, found, offset = slice(row, row + last - first), [], 0
        earliest, latest = self._starts(first, last)
        for start, stop in keys:
            # Before the queries, then at the same positions.
            for low, high, causal in ((start, min(stop, first), False), (max(start, first), min(stop, last), True)):
                low = low if causal else max(low, earliest)
                while low < high:
                    end = min(high, low + _MASKED_KEYS) if latest > low and not causal else high
                    here = slice(offset + low - start, offset + end - start)
                    found.append(Tile(rows, here, first, low, causal, latest > low))
                    low = end
            offset += stop - start
        return found

    def _starts(self, first: int, last: int) -> tuple[int, int]:
        """The earliest and the latest start of a document that positions [first, last) belong to."""
        if self.starts_BS is None:
            return 0, 0
        starts = self.starts_BS[:, first:last]
        return int(starts.min()), int(starts.max())

    def mask(self, tile: Tile, device: torch.device) -> Tensor | None:
        """Whether each query of a tile sees each key: bool [B, rows, keys]; None where all of them do that `causal`
        lets."""
        if not tile.masked:
            return None
        assert self.starts_BS is not None
        rows, keys = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        starts = self.starts_BS[:, tile.first_row : tile.first_row + rows].to(device)
        position = torch.arange(tile.first_key, tile.first_key + keys, device=device)
        seen = position >= starts.unsqueeze(2)
        if tile.causal:
            seen &= position <= torch.arange(tile.first_row, tile.first_row + rows, device=device).unsqueeze(1)
        return seen
