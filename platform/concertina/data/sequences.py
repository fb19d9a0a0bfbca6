"""Which tokens are sequence i, what is it to predict, and which sequences are held out?

Window w reads tokens [w*S, w*S + S] of the corpus: S inputs and, shifted by one, S targets. The last partial window is
dropped. A target is -100 (nothing to predict) where the next token begins another document: the end-of-text token is
predicted, what comes after it is not; and where the next token belongs to the other split.

Held out are blocks of neighbouring windows, one chosen by hash in each of as many equal stretches of the corpus. In a
source tree in alphabetical order the last 2 % would be one package, and single windows would sit between
training windows of the same file; blocks spread over the whole corpus avoid both. No token is in both splits.
Shapes: B sequences, S tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from concertina.data.permutation import mix
from concertina.errors import DataError

if TYPE_CHECKING:
    import torch

__all__ = ["IGNORED_TARGET", "SequenceView", "Sequences", "Split", "split_windows"]

IGNORED_TARGET = -100
# Enough blocks to see the whole corpus, each long enough (64 * 256 tokens are some 60 KB of source) that few
# files lie on an edge.
LEAST_BLOCKS, MOST_WINDOWS_OF_A_BLOCK = 16, 64

Tokens = npt.NDArray[np.integer]
Positions = npt.NDArray[np.int64]


class Sequences(Protocol):
    """The sequences of one split, by ids from 0."""

    def __len__(self) -> int: ...

    def read(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens_BS, targets_BS) of some of them."""
        ...

    def document_starts(self, index: int) -> list[int]:
        """Positions in [0, S] of one of them at which a document starts."""
        ...

    def starts(self, ids: Sequence[int]) -> torch.Tensor:
        """starts_BS: where the document of each position starts."""
        ...


class HeldOut(NamedTuple):
    """Windows [starts[k], starts[k] + windows) are held out, for each k; starts ascend."""

    starts: Positions
    windows: int

    def covers(self, window: int) -> bool:
        """Whether this window is held out."""
        k = int(np.searchsorted(self.starts, window, side="right")) - 1
        return k >= 0 and window < int(self.starts[k]) + self.windows

    def window_of_validation(self, index: int) -> int:
        """Window of held-out sequence `index`."""
        block, inside = divmod(index, self.windows)
        return int(self.starts[block]) + inside

    def window_of_training(self, index: int) -> int:
        """Window of training sequence `index`: the blocks before it are jumped over."""
        training_before = self.starts - self.windows * np.arange(len(self.starts))
        return index + self.windows * int(np.searchsorted(training_before, index, side="right"))


class SequenceView:
    """The sequences of one split. Ids are 0 to len(view) - 1, whatever the world."""

    def __init__(self, tokens: Tokens, documents: Positions, held_out: HeldOut, length: int, train: bool) -> None:
        self.tokens = tokens
        self.documents = documents
        self.held_out = held_out
        self.sequence_length = length
        self.train = train
        self.num_windows = (len(tokens) - 1) // length

    def __len__(self) -> int:
        held_out = len(self.held_out.starts) * self.held_out.windows
        return self.num_windows - held_out if self.train else held_out

    def window(self, index: int) -> int:
        """Which window of the corpus sequence `index` is."""
        assert 0 <= index < len(self), (index, len(self))
        return self.held_out.window_of_training(index) if self.train else self.held_out.window_of_validation(index)

    def document_starts(self, index: int) -> list[int]:
        """Positions in [0, S] of sequence `index` at which a document starts; S is the last target's position."""
        first = self.window(index) * self.sequence_length
        bounds = np.searchsorted(self.documents, [first, first + self.sequence_length + 1])
        return [int(start) - first for start in self.documents[bounds[0] : bounds[1]]]

    def read(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens_BS, targets_BS), both int64 on the CPU; targets are IGNORED_TARGET where nothing is predicted.

        No ids give tensors of shape (0, S).
        """
        import torch  # here only: `concertina data` answers in half a second without it

        length = self.sequence_length
        tokens_BR = np.empty((len(ids), length + 1), dtype=np.int64)
        for row, index in enumerate(ids):
            first = self.window(index) * length
            tokens_BR[row] = self.tokens[first : first + length + 1]
        targets_BS = tokens_BR[:, 1:].copy()
        for row, index in enumerate(ids):
            targets_BS[row, self._unpredictable(index)] = IGNORED_TARGET
        return torch.from_numpy(tokens_BR[:, :-1].copy()), torch.from_numpy(targets_BS)

    def starts(self, ids: Sequence[int]) -> torch.Tensor:
        """Where the document of each position starts, 0 for one that began before: starts_BS, int64 on the CPU."""
        import torch

        starts_BS = np.zeros((len(ids), self.sequence_length), dtype=np.int64)
        for row, index in enumerate(ids):
            inside = [start for start in self.document_starts(index) if start < self.sequence_length]
            starts_BS[row, inside] = inside
        return torch.from_numpy(np.maximum.accumulate(starts_BS, axis=1))

    def _unpredictable(self, index: int) -> list[int]:
        places = [start - 1 for start in self.document_starts(index) if start > 0]
        window = self.window(index)
        if window + 1 < self.num_windows and self.held_out.covers(window + 1) == self.train:
            places.append(self.sequence_length - 1)
        return places


class Split(NamedTuple):
    """Both views of one corpus, or of one mixture."""

    train: Sequences
    validation: Sequences


def split_windows(tokens: Tokens, documents: Positions, length: int, validation_fraction: float) -> Split:
    """Cut a corpus into windows of `length` tokens and hold out `validation_fraction` of them (0: none).

    The split depends on the corpus' size, the length and the fraction only: no seed, so that runs compare.
    Raises DataError when not even one sequence is left for each.
    """
    num_windows = max(0, len(tokens) - 1) // length
    needed = 2 if validation_fraction else 1
    if num_windows < needed:
        raise DataError(
            f"the corpus has {len(tokens)} tokens, too few for {needed} sequence(s) of {length}: "
            f"give at least {needed * length + 1} tokens of text or a smaller data.sequence_length",
            num_tokens=len(tokens),
            sequence_length=length,
        )
    held_out = _hold_out(num_windows, validation_fraction)
    train, validation = (SequenceView(tokens, documents, held_out, length, train) for train in (True, False))
    return Split(train, validation)


def _hold_out(num_windows: int, fraction: float) -> HeldOut:
    wanted = max(1, round(fraction * num_windows)) if fraction else 0
    wanted = min(wanted, num_windows - 1)
    windows = max(1, min(MOST_WINDOWS_OF_A_BLOCK, wanted // LEAST_BLOCKS))
    num_blocks = wanted // windows
    places = num_windows // windows
    # Block number k lies in places [k * places / num_blocks, (k + 1) * places / num_blocks).
    edges = [k * places // num_blocks for k in range(num_blocks + 1)] if num_blocks else []
    chosen = [a + mix(k, num_windows) % (b - a) for k, (a, b) in enumerate(pairwise(edges))]
    return HeldOut(np.array(chosen, dtype=np.int64) * windows, windows)
