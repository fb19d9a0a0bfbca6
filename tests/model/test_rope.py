"""Does the rotation turn pairs by the right angle, so that only distances matter?"""

from __future__ import annotations

import pytest
import torch

from concertina.model.rope import rotate, rotation
from tests.model.errors import error

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


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_backward_is_the_derivative(dtype: torch.dtype, bound: float) -> None:
    """Also of a view into keys and values, and rounded once."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 6, 3, 2, 8, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(2, 6, 3, 1, 8, generator=generator).to(dtype)
    turn = rotation(torch.arange(6), 8, 10000.0, dtype)
    y = rotate(both.split(1, 3)[0], turn)
    (dx,) = torch.autograd.grad(y, both, dy)

    wide = both.detach().double().requires_grad_()
    first, second = wide[:, :, :, :1].chunk(2, -1)
    cos, sin = (angle.double().view(6, 1, 1, 4) for angle in (turn.cos_SP, turn.sin_SP))
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    (expected_dx,) = torch.autograd.grad(expected, wide, dy.double())
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert error(y.double(), expected) < bound
    assert error(dx.double(), expected_dx) < bound
