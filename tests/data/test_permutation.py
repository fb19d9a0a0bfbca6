"""Is it a permutation for every length and key, and does it look like a random one?"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.data.permutation import mix, permute

pytestmark = pytest.mark.unit


@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_every_place_is_taken_once(length: int, key: int) -> None:
    places = permute(np.arange(length), length, key)
    assert np.array_equal(np.sort(places), np.arange(length))


@given(length=st.integers(2**20, 2**40), key=st.integers(0, 2**64 - 1), first=st.integers(0, 2**19))
@settings(max_examples=30, deadline=None)
def test_large_domains_stay_inside_and_collide_nowhere(length: int, key: int, first: int) -> None:
    places = permute(np.arange(first, first + 1000), length, key)
    assert places.min() >= 0
    assert places.max() < length
    assert len(set(places.tolist())) == 1000


@pytest.mark.parametrize("length", [3, 5, 12, 50])
def test_items_and_places_and_neighbours_are_independent(length: int) -> None:
    """Chi-square over many keys: item against place, and the difference between neighbours."""
    num_keys = 1500
    counts = np.zeros((length, length))
    differences = np.zeros(length)
    for key in range(num_keys):
        places = permute(np.arange(length), length, key)
        counts[np.arange(length), places] += 1
        differences += np.bincount(np.diff(places) % length, minlength=length)
    assert _deviations(counts, (length - 1) ** 2) < 5
    assert _deviations(differences[1:], length - 2) < 5


def test_the_order_is_fixed_for_ever() -> None:
    """A changed order would make old runs impossible to resume."""
    assert permute(np.arange(8), 8, 0).tolist() == PERMUTATION_OF_8
    assert mix(1, 2, 3) == MIX_OF_1_2_3


def test_mix_tells_order_and_number_of_values_apart() -> None:
    assert len({mix(), mix(0), mix(0, 0), mix(0, 1), mix(1, 0), mix(2**64 - 1)}) == 6


def _deviations(counts: np.ndarray, degrees_of_freedom: int) -> float:
    """How many standard deviations the chi-square of counts that should be equal is from its mean."""
    expected = counts.mean()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return abs(chi_square - degrees_of_freedom) / float(np.sqrt(2 * degrees_of_freedom))


PERMUTATION_OF_8 = [2, 1, 7, 5, 0, 4, 3, 6]
MIX_OF_1_2_3 = 7702586659592502839
