"""Does the rotation turn pairs by the right angle, so that only distances matter?"""

from __future__ import annotations

import pytest
import torch

from concertina.model.rope import rotate, rotation

pytestmark = pytest.mark.unit


def test_products_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turn = rotation(torch.arange(10), 8, 10000.0, torch.float64)
    turned_q = rotate(q.expand(1, 10, 8), turn)[0]
    turned_k = rotate(k.expand(1, 10, 8), turn)[0]
    scores = turned_q @ turned_k.T
    for distance in range(5):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))


def test_first_position_is_not_turned_and_lengths_stay() -> None:
    x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotation(torch.arange(6), 8, 10000.0, torch.float32))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_positions_may_start_anywhere() -> None:
    """A rank with a chunk of the sequence passes its own positions."""
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    everything = rotate(x, rotation(torch.arange(6), 8, 10000.0, torch.float32))
    chunk = rotate(x[:, 4:], rotation(torch.arange(4, 6), 8, 10000.0, torch.float32))
    assert torch.equal(chunk, everything[:, 4:])
