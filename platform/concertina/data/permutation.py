"""Which place does item i have in a shuffled order, without keeping the order in memory?

A Feistel network over the mixed-radix square `rows * columns >= length` (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002), walked until the value falls inside the domain. Integers only: the same on every machine,
numpy version and word order, and nothing to save but the key.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import numpy.typing as npt

__all__ = ["Indices", "mix", "permute"]

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Measured over 3,000 keys: differences of neighbours are far from uniform in domains of 4 to 50 with 4 and 6 rounds
# (50 and 8 standard deviations), still with 8 in a domain of 5; with 12 all is within noise.
ROUNDS = 12
WORD = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of non-negative integers, in order (splitmix64's finalizer, chained)."""
    word = 0
    for value in values:
        word = int(_finalize(np.array([(word + value + 0x9E3779B97F4A7C15) & WORD], dtype=np.uint64))[0])
    return word


def permute(indices: Indices, length: int, key: int) -> Indices:
    """Where `indices` (each in [0, length), any shape) go under the permutation of [0, length) that `key` names."""
    rows = isqrt(length - 1) + 1
    columns = -(-length // rows)
    keys = [mix(key, round_) for round_ in range(ROUNDS)]
    values = _shuffle_once(indices.astype(np.uint64), rows, columns, keys)
    while (outside := values >= length).any():
        values[outside] = _shuffle_once(values[outside], rows, columns, keys)
    return values.astype(np.int64)


def _shuffle_once(values: Words, rows: int, columns: int, keys: list[int]) -> Words:
    """The network on [0, rows * columns): each round adds a hash of one coordinate to the other."""
    row, column = values // np.uint64(columns), values % np.uint64(columns)
    for number, key in enumerate(keys):
        # The hash is reduced before the sum, which would otherwise wrap around 2^64 and no longer be a bijection.
        if number % 2:
            row = (row + _finalize(column + np.uint64(key)) % np.uint64(rows)) % np.uint64(rows)
        else:
            column = (column + _finalize(row + np.uint64(key)) % np.uint64(columns)) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _finalize(word: Words) -> Words:
    """splitmix64's output function; arrays of uint64 wrap around silently, which is what it wants."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
