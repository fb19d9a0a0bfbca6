"""Does every epoch read every sequence once, whatever the batch size, the step one starts at and the world?"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.data.sampler import GlobalSampler, share
from concertina.errors import DataError

pytestmark = pytest.mark.unit

sizes = st.tuples(st.integers(1, 200), st.integers(1, 64), st.integers(0, 2**32))


@given(size=sizes, num_epochs=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_epochs_follow_one_another_without_a_seam(size: tuple[int, int, int], num_epochs: int) -> None:
    num_sequences, batch_size, seed = size
    sampler = GlobalSampler(num_sequences, batch_size, seed)
    num_steps = -(-num_epochs * num_sequences // batch_size)
    ids = [i for step in range(num_steps) for i in sampler.batch(step)]
    for epoch in range(num_epochs):
        part = ids[epoch * num_sequences : (epoch + 1) * num_sequences]
        assert sorted(part) == list(range(num_sequences))


@given(size=sizes, step=st.integers(0, 10**9))
@settings(max_examples=50, deadline=None)
def test_a_step_needs_no_history(size: tuple[int, int, int], step: int) -> None:
    batch = GlobalSampler(*size).batch(step)
    assert len(batch) == size[1]
    assert batch == GlobalSampler(*size).batch(step)
    assert all(isinstance(i, int) and 0 <= i < size[0] for i in batch)


@given(size=sizes, parts=st.integers(1, 80))
@settings(max_examples=50, deadline=None)
def test_shares_of_any_world_are_the_batch_in_order(size: tuple[int, int, int], parts: int) -> None:
    batch = GlobalSampler(*size).batch(3)
    shares = [share(batch, parts, index) for index in range(parts)]
    assert [i for piece in shares for i in piece] == batch
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(groups=st.integers(1, 40), whole=st.integers(1, 5), parts=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_shares_by_loads_are_the_batch_in_order_and_part_no_group(groups: int, whole: int, parts: int) -> None:
    batch, loads = list(range(groups * whole)), [1 + index % 3 for index in range(parts)]
    shares = [share(batch, parts, index, whole, loads) for index in range(parts)]
    assert [i for piece in shares for i in piece] == batch
    assert {len(piece) % whole for piece in shares} == {0}


@given(groups=st.integers(1, 40), whole=st.integers(1, 5), parts=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_shares_part_no_group(groups: int, whole: int, parts: int) -> None:
    batch = GlobalSampler(500, groups * whole, 3).batch(1)
    shares = [share(batch, parts, index, whole) for index in range(parts)]
    assert [i for piece in shares for i in piece] == batch
    assert {len(piece) % whole for piece in shares} == {0}
    assert max(map(len, shares)) - min(map(len, shares)) <= whole


def test_the_batch_size_cuts_one_order() -> None:
    """Two batch sizes read the same order: a run may change it and lose its place nowhere."""
    small, large = GlobalSampler(100, 4, 7), GlobalSampler(100, 20, 7)
    assert [i for step in range(10) for i in small.batch(step)] == [*large.batch(0), *large.batch(1)]


def test_seeds_and_epochs_have_their_own_order() -> None:
    orders = [GlobalSampler(1000, 1000, seed).batch(step) for seed in range(4) for step in range(4)]
    for k, one in enumerate(orders):
        for other in orders[k + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 12  # about 1 is expected


def test_neighbours_in_the_corpus_are_far_apart_in_an_epoch() -> None:
    order = np.array(GlobalSampler(5000, 5000, 1).batch(0))
    assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.06
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06


def test_epoch_counts_readings_of_the_corpus() -> None:
    assert GlobalSampler(100, 30, 0).epoch(10) == 3.0


@pytest.mark.parametrize(("num_sequences", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_draw_is_refused_with_the_numbers(num_sequences: int, batch_size: int) -> None:
    with pytest.raises(DataError, match=f"batches of {batch_size} from {num_sequences} sequences"):
        GlobalSampler(num_sequences, batch_size, 0)
