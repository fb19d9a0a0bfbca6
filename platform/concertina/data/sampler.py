"""Which sequences does step s read, and which of them are mine?

The answer is a pure function of (number of sequences, batch size, seed, step). The world is not in it, so a run that
loses or gains ranks reads on where it was; the only state is the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from concertina.data.permutation import Indices, mix, permute
from concertina.errors import DataError
from concertina.layout.box import cut, cut_by

__all__ = ["GlobalSampler", "Sampler", "share"]


class Sampler(Protocol):
    """Who knows the sequences of every step."""

    def batch(self, step: int) -> list[int]:
        """Ids of `step` (from 0), in order."""
        ...


class GlobalSampler:
    """Sequence ids of every step: epoch after epoch, each in its own shuffled order.

    A batch may begin in one epoch and end in the next: nothing is dropped or repeated at the seam. O(1) memory.
    """

    def __init__(self, num_sequences: int, global_batch_size: int, seed: int) -> None:
        if num_sequences < 1 or global_batch_size < 1:
            raise DataError(
                f"cannot draw batches of {global_batch_size} from {num_sequences} sequences: "
                f"both must be at least 1; give more text or a smaller data.sequence_length",
                num_sequences=num_sequences,
                global_batch_size=global_batch_size,
            )
        self.num_sequences = num_sequences
        self.global_batch_size = global_batch_size
        self.seed = seed

    def batch(self, step: int) -> list[int]:
        """The `global_batch_size` sequence ids of `step` (from 0), in order."""
        first = step * self.global_batch_size
        return self.draw(first, self.global_batch_size).tolist()

    def draw(self, first: int, count: int) -> Indices:
        """Ids of the sequences number `first` to `first + count` of the run, from 0."""
        stop = first + count
        parts = []
        while first < stop:
            epoch, position = divmod(first, self.num_sequences)
            count = min(stop - first, self.num_sequences - position)
            parts.append(self._of_epoch(epoch, np.arange(position, position + count, dtype=np.int64)))
            first += count
        return np.concatenate(parts)

    def epoch(self, step: int) -> float:
        """How many times the corpus has been read when `step` begins."""
        return step * self.global_batch_size / self.num_sequences

    def _of_epoch(self, epoch: int, positions: Indices) -> Indices:
        return permute(positions, self.num_sequences, mix(self.seed, epoch))


def share(ids: Sequence[int], parts: int, index: int, whole: int = 1, loads: Sequence[int] = ()) -> list[int]:
    """The contiguous piece of a batch that part `index` of `parts` reads; sizes differ by at most `whole`, or are in
    proportion to `loads`.

    `whole` consecutive sequences, of which the batch has a multiple, stay together.
    """
    assert len(ids) % whole == 0, (len(ids), whole)
    count = len(ids) // whole
    start, stop = cut_by(count, loads, index) if loads else cut(count, parts, index)
    return list(ids[start * whole : stop * whole])
