"""Are windows, shifted targets, document boundaries and the held-out split what they promise?"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concertina.data.sequences import IGNORED_TARGET, SequenceView, Split, split_windows
from concertina.errors import DataError

pytestmark = pytest.mark.unit


def split_of(num_tokens: int, length: int, fraction: float, documents: list[int] | None = None) -> Split:
    """Token at position p is p: what a view reads says where it read it."""
    starts = np.array([0] if documents is None else documents, dtype=np.int64)
    return split_windows(np.arange(num_tokens, dtype=np.uint32), starts, length, fraction)


def positions_of(view: SequenceView) -> set[int]:
    """Every corpus position that `view` feeds in or predicts."""
    tokens_BS, targets_BS = view.read(range(len(view)))
    return set(tokens_BS.flatten().tolist()) | (set(targets_BS.flatten().tolist()) - {IGNORED_TARGET})


def test_targets_are_the_tokens_shifted_by_one() -> None:
    train, _ = split_of(41, 10, 0.0)
    tokens_BS, targets_BS = train.read([0, 3])
    assert tokens_BS.dtype == targets_BS.dtype == torch.int64
    assert tokens_BS.tolist() == [list(range(10)), list(range(30, 40))]
    assert targets_BS.tolist() == [list(range(1, 11)), list(range(31, 41))]


@pytest.mark.parametrize(("num_tokens", "expected"), [(40, 3), (41, 4), (49, 4), (51, 5)])
def test_the_last_partial_window_is_dropped(num_tokens: int, expected: int) -> None:
    assert len(split_of(num_tokens, 10, 0.0).train) == expected


def test_the_first_token_of_a_document_is_not_predicted() -> None:
    # Documents start at 0, 4, 10 (first of the second window) and 15.
    train, _ = split_of(21, 10, 0.0, [0, 4, 10, 15])
    _, targets_BS = train.read([0, 1])
    assert targets_BS[0].tolist() == [1, 2, 3, -100, 5, 6, 7, 8, 9, -100]
    assert targets_BS[1].tolist() == [11, 12, 13, 14, -100, 16, 17, 18, 19, 20]
    assert train.document_starts(0) == [0, 4, 10]
    assert train.document_starts(1) == [0, 5]


@given(num_windows=st.integers(2, 3000), length=st.integers(1, 9), fraction=st.floats(0.001, 0.99))
@settings(max_examples=80, deadline=None)
def test_no_token_is_in_both_splits_and_no_window_is_lost(num_windows: int, length: int, fraction: float) -> None:
    train, validation = split_of(num_windows * length + 1, length, fraction)
    assert len(train) >= 1
    assert len(validation) >= 1
    assert not positions_of(train) & positions_of(validation)
    windows = [view.window(i) for view in (train, validation) for i in range(len(view))]
    assert sorted(windows) == list(range(num_windows))
    assert [train.window(i) for i in range(len(train))] == sorted(train.window(i) for i in range(len(train)))


@pytest.mark.parametrize("fraction", [0.01, 0.02, 0.1, 0.5])
def test_the_share_held_out_is_the_one_asked_for(fraction: float) -> None:
    train, validation = split_of(10_000 * 4 + 1, 4, fraction)
    assert len(validation) == pytest.approx(fraction * 10_000, rel=0.1)
    assert len(train) + len(validation) == 10_000


def test_held_out_blocks_are_spread_over_the_whole_corpus() -> None:
    _, validation = split_of(10_000 * 4 + 1, 4, 0.02)
    windows = [validation.window(i) for i in range(len(validation))]
    # 16 blocks, one in each 625 windows: no stretch of twice that is without one.
    assert max(b - a for a, b in pairwise([0, *windows, 10_000])) < 1250
    neighbours = sum(b - a == 1 for a, b in pairwise(windows))
    assert neighbours >= 0.9 * len(windows)


def test_no_fraction_holds_nothing_out() -> None:
    train, validation = split_of(101, 10, 0.0)
    assert (len(train), len(validation)) == (10, 0)


def test_a_rank_without_a_share_reads_an_empty_batch() -> None:
    tokens_BS, targets_BS = split_of(101, 10, 0.0).train.read([])
    assert tokens_BS.shape == targets_BS.shape == (0, 10)


@pytest.mark.parametrize(("num_tokens", "fraction", "least"), [(0, 0.0, 11), (10, 0.0, 11), (20, 0.1, 21)])
def test_too_little_text_is_refused_with_the_numbers(num_tokens: int, fraction: float, least: int) -> None:
    with pytest.raises(DataError, match=rf"has {num_tokens} tokens.* at least {least} tokens") as caught:
        split_of(num_tokens, 10, fraction)
    assert "\n" not in str(caught.value)
