"""Does every tensor of an exchange arrive where it was sent, in order, and does a failure wait for all of them?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from concertina.layout import Layout
from concertina.parallel.collectives import exchange
from concertina.parallel.groups import SECONDS, Group, GroupOptions, form_crowd
from tests.distributed import form, on_ranks

WORLD = 3


def content(round_: int, index: int, source: int, target: int) -> Tensor:
    """Sizes differ by index and round; one is empty."""
    return torch.full((2, 700 * round_ + index), 1000.0 * round_ + 100 * index + 10 * source + target)


def several_under_way(rank: int, store: Any) -> None:
    """Three exchanges at once, three tensors each way between every pair, finished in the reverse order."""
    group = form(Layout(WORLD), rank, store)[SECONDS]
    others = [position for position in range(WORLD) if position != rank]
    started = []
    for round_ in range(3):
        sends = [(content(round_, k, rank, other).t().contiguous().t(), other) for k in range(3) for other in others]
        receives = [(torch.zeros_like(content(round_, k, 0, 0)), other) for other in others for k in range(3)]
        started.append((round_, receives, exchange(sends, receives, group)))
    for round_, receives, pending in reversed(started):
        wanted = [content(round_, k, other, rank) for other in others for k in range(3)]
        assert all(torch.equal(*pair) for pair in zip(pending.finish(), wanted, strict=True))
        assert all(torch.equal(x, want) for (x, _), want in zip(receives, wanted, strict=True))


@pytest.mark.dist
def test_exchanges_overlap_and_keep_their_order() -> None:
    on_ranks(several_under_way, WORLD)


def one_way_in_the_crowd(rank: int, store: Any) -> float:
    """Rank 0 sends to rank 2; rank 1 has no part in it."""
    crowd = form_crowd(rank, WORLD, store, GroupOptions())
    x = torch.full((5,), 3.0 if rank == 0 else 0.0)
    exchange([(x, 2)] if rank == 0 else [], [(x, 0)] if rank == 2 else [], crowd).finish()
    return float(x.sum())


@pytest.mark.dist
def test_who_has_nothing_to_exchange_takes_no_part() -> None:
    assert on_ranks(one_way_in_the_crowd, WORLD) == [15.0, 0.0, 15.0]


@pytest.mark.unit
def test_alone_there_is_nobody_to_exchange_with() -> None:
    assert exchange([], [], Group.alone()).finish() == []
    with pytest.raises(AssertionError, match="to itself"):
        exchange([(torch.ones(1), 0)], [], Group.alone())
