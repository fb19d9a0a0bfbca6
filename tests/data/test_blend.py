"""Has every source had its share at every moment, is every sequence of an epoch read once, and does a step need no
history?"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.data import blend
from concertina.data.blend import MOST_OF_A_PERIOD, BlendedSampler, order_of_a_period, shares_of
from concertina.errors import DataError

pytestmark = pytest.mark.unit

shares = st.lists(st.integers(1, 60), min_size=1, max_size=7)
SIZES, WEIGHTS = (7, 100, 13), (0.5, 0.3, 0.2)


def sources_of(sampler: BlendedSampler, ids: list[int]) -> list[int]:
    return (np.searchsorted(sampler.offsets, ids, side="right") - 1).tolist()


def drawn(sampler: BlendedSampler, steps: int, first: int = 0) -> list[int]:
    return [i for step in range(first, first + steps) for i in sampler.batch(step)]


@given(shares=shares)
@settings(max_examples=80, deadline=None)
def test_at_every_place_each_source_has_had_its_share_to_within_one(shares: list[int]) -> None:
    order = order_of_a_period(shares)
    assert Counter(order.tolist()) == {i: n for i, n in enumerate(shares) if n}
    places = np.arange(1, len(order) + 1)
    for number, share in enumerate(shares):
        ahead = np.cumsum(order == number) - places * share / len(order)
        assert np.abs(ahead).max() < 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.7, 0.3], (7, 3)),
        ([1, 1, 1], (1, 1, 1)),
        ([2.5], (1,)),
        ([0.1, 0.2, 0.7], (1, 2, 7)),  # 0.1 + 0.2 is no 0.3 in floats
        ([3e6, 1e6], (3, 1)),
    ],
)
def test_weights_as_they_are_written(weights: list[float], expected: tuple[int, ...]) -> None:
    assert shares_of(weights) == expected


@given(weights=st.lists(st.floats(1.0, 1e3), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_long_period_is_rounded_to_a_short_one(weights: list[float]) -> None:
    found = shares_of(weights)
    assert sum(found) <= MOST_OF_A_PERIOD
    for share, weight in zip(found, weights, strict=True):
        error = Fraction(share, sum(found)) - Fraction(repr(weight)) / sum(Fraction(repr(w)) for w in weights)
        assert abs(error) < Fraction(1, MOST_OF_A_PERIOD)


def test_a_weight_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"a weight of 1e-06 among 1\.12346 is less than one sequence of 65536: set it"):
        shares_of([1.123456789, 1e-6])


@pytest.mark.parametrize("batch", [1, 4, 16, 23])
def test_after_n_sequences_each_source_gave_its_share(batch: int) -> None:
    sampler = BlendedSampler(SIZES, WEIGHTS, batch, 0)
    seen = np.cumsum(np.eye(3)[sources_of(sampler, drawn(sampler, 400 // batch))], axis=0)
    for number, weight in enumerate(WEIGHTS):
        at = np.arange(1, len(seen) + 1)
        assert np.abs(seen[:, number] - weight * at).max() < 1
        assert [sampler.drawn(number, n) for n in (0, 7, 391)] == [0, seen[6, number], sampler.drawn(number, 391)]


def test_epochs_of_each_source_follow_without_a_seam_and_differ() -> None:
    """A small source is read 28 times while half of a large one is: each epoch whole, in another order."""
    sampler = BlendedSampler(SIZES, WEIGHTS, 10, 3)
    ids = np.array(drawn(sampler, 40))
    sources = np.array(sources_of(sampler, ids.tolist()))
    assert sampler.epochs(40) == [200 / 7, 120 / 100, 80 / 13]
    for number, size in enumerate(SIZES):
        mine = (ids[sources == number] - sampler.offsets[number]).tolist()
        epochs = [tuple(mine[first : first + size]) for first in range(0, len(mine) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs)
        assert len(set(mine[len(epochs) * size :])) == len(mine) - len(epochs) * size


@given(step=st.integers(0, 10**9), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_step_needs_no_history(step: int, seed: int) -> None:
    batch = BlendedSampler(SIZES, WEIGHTS, 16, seed).batch(step)
    assert batch == BlendedSampler(SIZES, WEIGHTS, 16, seed).batch(step)
    assert len(batch) == 16
    assert all(isinstance(i, int) and 0 <= i < sum(SIZES) for i in batch)


def test_the_batch_size_cuts_one_order_and_the_seed_makes_another() -> None:
    small, large = BlendedSampler(SIZES, WEIGHTS, 4, 7), BlendedSampler(SIZES, WEIGHTS, 20, 7)
    assert drawn(small, 10) == drawn(large, 2)
    other = BlendedSampler(SIZES, WEIGHTS, 20, 8)
    assert sources_of(other, drawn(other, 2)) == sources_of(large, drawn(large, 2))
    assert drawn(other, 2) != drawn(large, 2)


def test_sources_of_one_size_do_not_go_in_step() -> None:
    ids = np.array(drawn(BlendedSampler((50, 50), (1, 1), 100, 0), 1))
    assert (ids[ids < 50] != ids[ids >= 50] - 50).any()


def test_a_sequence_that_is_drawn_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of epochs fails if the count of a source were one behind after the first period."""
    count = BlendedSampler.drawn
    monkeypatch.setattr(
        blend.BlendedSampler, "drawn", lambda self, source, n: count(self, source, n) - (n >= 20 and source == 0)
    )
    with pytest.raises(AssertionError):
        test_epochs_of_each_source_follow_without_a_seam_and_differ()
