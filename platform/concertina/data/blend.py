"""From which source is the k-th sequence of a run, and which of that source's is it?

Weights become whole numbers n_i, their sum is a period P. The order of one period is fixed: number j of source i (from
1) comes at a place in [floor((j-1) P / n_i), ceil(j P / n_i)), and of those that may come the one that must come first
is taken. So at every moment each source has had its share of what was drawn, to within one (Tijdeman 1980, "The
chairman assignment problem"; Baruah et al. 1996, "Proportionate progress", for windows and the earliest deadline). Any
k is found from the period's table: nothing is counted from the beginning, and the world is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from concertina.data.permutation import mix
from concertina.data.sampler import GlobalSampler
from concertina.errors import DataError

__all__ = ["MOST_OF_A_PERIOD", "BlendedSampler", "order_of_a_period", "shares_of"]

MOST_OF_A_PERIOD = 1 << 16
"""Weights whose common period is longer are rounded to this one's whole numbers: to 0.0008 % of all."""


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to the weights: exactly, if their sum is at most MOST_OF_A_PERIOD, else rounded to
    that sum. Raises DataError for a weight that rounds to nothing."""
    exact = [Fraction(repr(weight)) for weight in weights]  # as it is written: 0.1 is a tenth
    total = sum(exact)
    whole = lcm(*((weight / total).denominator for weight in exact))
    if whole <= MOST_OF_A_PERIOD:
        return tuple(int(weight / total * whole) for weight in exact)
    ideal = [weight / total * MOST_OF_A_PERIOD for weight in exact]
    shares = [int(share) for share in ideal]
    by_rest = sorted(range(len(shares)), key=lambda i: (shares[i] - ideal[i], i))
    for i in by_rest[: MOST_OF_A_PERIOD - sum(shares)]:
        shares[i] += 1
    if 0 in shares:
        least = weights[shares.index(0)]
        raise DataError(
            f"a weight of {least:g} among {float(total):g} is less than one sequence of {MOST_OF_A_PERIOD}: "
            f"set it to {float(total) / MOST_OF_A_PERIOD:.2g} or more, or leave the source out"
        )
    divisor = gcd(*shares)
    return tuple(share // divisor for share in shares)


def order_of_a_period(shares: Sequence[int]) -> npt.NDArray[np.int64]:
    """(period,) the source at each place of a period: of those whose next sequence may come, the one whose must come
    first."""
    period = sum(shares)
    order = np.empty(period, dtype=np.int64)
    taken = [0] * len(shares)
    for place in range(period):
        ready = [i for i, n in enumerate(shares) if taken[i] * period // n <= place]
        chosen = min(ready, key=lambda i: -(-(taken[i] + 1) * period // shares[i]))
        order[place] = chosen
        taken[chosen] += 1
    return order


class BlendedSampler:
    """Sequence ids of every step, drawn from several sources of `sizes` sequences in proportion to `weights`.

    Ids number all sources' sequences one after another. Each source goes through its epochs, each in its own shuffled
    order, as fast as its weight has it. The only state is the step.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], global_batch_size: int, seed: int) -> None:
        self.shares = shares_of(weights)
        self.period = sum(self.shares)
        self.global_batch_size = global_batch_size
        self.offsets = np.cumsum([0, *sizes[:-1]])
        self._sources = [GlobalSampler(size, 1, mix(seed, number)) for number, size in enumerate(sizes)]
        self._order = order_of_a_period(self.shares)
        self._before = np.zeros((len(sizes), self.period + 1), dtype=np.int64)  # of each source, before each place
        for number in range(len(sizes)):
            np.cumsum(self._order == number, out=self._before[number, 1:])

    def batch(self, step: int) -> list[int]:
        """The `global_batch_size` sequence ids of `step` (from 0), in order."""
        first = step * self.global_batch_size
        ids = np.empty(self.global_batch_size, dtype=np.int64)
        sources = self._order[np.arange(first, first + self.global_batch_size) % self.period]
        for number in np.unique(sources):
            mine = sources == number
            drawn = self._sources[number].draw(self.drawn(int(number), first), int(mine.sum()))
            ids[mine] = drawn + self.offsets[number]
        return ids.tolist()

    def drawn(self, source: int, num_sequences: int) -> int:
        """How many of a run's first `num_sequences` sequences are of a source."""
        periods, place = divmod(num_sequences, self.period)
        return periods * self.shares[source] + int(self._before[source, place])

    def epochs(self, step: int) -> list[float]:
        """How many times each source has been read when `step` begins."""
        first = step * self.global_batch_size
        return [self.drawn(number, first) / source.num_sequences for number, source in enumerate(self._sources)]
