"""Do rows come back to their tokens, with the gradients of a scatter written out? Also by the CPU's one-pass way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concertina.parallel.permute import combine, expert_order, reorder, spread

pytestmark = pytest.mark.unit

IDS = torch.tensor([[2, 0], [0, 2], [3, 2], [2, 3], [0, 3]])  # expert 1 gets nothing
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    assert ours.dtype == dtype
    return bool((ours.to(torch.float64) - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max())


def test_order_is_by_expert_then_token_then_choice() -> None:
    order = expert_order(IDS)
    assert order.choice_R.tolist() == [1, 2, 8, 0, 3, 5, 6, 4, 7, 9]
    assert order.token_R.tolist() == [0, 1, 4, 0, 1, 2, 3, 2, 3, 4]
    assert order.slot_TK.flatten()[order.choice_R].tolist() == list(range(10))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_spread_copies_rows_and_sums_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    order = expert_order(IDS)
    x = torch.randn(5, 6).to(dtype).requires_grad_()
    rows = spread(x, order)
    assert torch.equal(rows, x[order.token_R])
    dy = torch.randn(10, 6).to(dtype)
    (dx,) = torch.autograd.grad(rows, x, dy)
    expected = torch.zeros(5, 6, dtype=torch.float64).index_add_(0, order.token_R, dy.to(torch.float64))
    assert close(dx, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_combine_weights_and_sums(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    order = expert_order(IDS)
    rows, weights = torch.randn(10, 6).to(dtype).requires_grad_(), torch.rand(5, 2).to(dtype).requires_grad_()
    y = combine(rows, weights, order)
    dy = torch.randn(5, 6).to(dtype)
    drows, dweights = torch.autograd.grad(y, (rows, weights), dy)

    wide_rows, wide_weights = (t.detach().to(torch.float64).requires_grad_() for t in (rows, weights))
    expected = (wide_rows[order.slot_TK] * wide_weights.unsqueeze(-1)).sum(1)
    expected_rows, expected_weights = torch.autograd.grad(expected, (wide_rows, wide_weights), dy.to(torch.float64))
    assert close(y, expected, dtype)
    assert close(drows, expected_rows, dtype)
    assert close(dweights, expected_weights, dtype)


def test_gradients_of_expanded_outputs() -> None:
    """A sum's gradient has stride zero."""
    order = expert_order(IDS)
    x = torch.randn(5, 6, requires_grad=True)
    combine(spread(x, order), torch.ones(5, 2), order).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((5, 6), 2.0))


def test_reorder_is_undone_by_its_inverse() -> None:
    source = torch.randperm(9)
    inverse = source.argsort()
    rows = torch.randn(9, 3, requires_grad=True)
    moved = reorder(rows, source, inverse)
    assert torch.equal(reorder(moved, inverse, source), rows)
    (back,) = torch.autograd.grad(moved, rows, moved.detach())
    assert torch.equal(back, rows)
