"""Do rows come back to their tokens, with the gradients of a scatter written out? Also by the CPU's one-pass way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concertina.parallel.permute import Order, combine, expert_order, kept_order, padded_order, reorder, spread

pytestmark = pytest.mark.unit

IDS = torch.tensor([[2, 0], [0, 2], [3, 2], [2, 3], [0, 3]])  # expert 1 gets nothing
KEPT = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.bool)  # and token 3 goes nowhere
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_on_a_gpu(dtype: torch.dtype) -> None:
    """In one pass, added in fp32."""
    torch.manual_seed(0)
    order, rows, weights = expert_order(IDS), torch.randn(10, 6).to(dtype), torch.rand(5, 2).to(dtype)
    placed = expert_order(IDS.cuda())
    y = combine(rows.cuda(), weights.cuda(), placed)
    assert close(y.cpu(), combine(rows.double(), weights.double(), order), dtype)


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


# -- choices dropped ---------------------------------------------------------------------------------------------------


def order_of(way: str, kept: Tensor = KEPT) -> Order:
    counts_E = torch.stack([(IDS.eq(expert) & kept).sum() for expert in range(4)])
    if way == "padded":
        return padded_order(IDS, kept, counts_E, 4)
    return kept_order(IDS, kept, 4).first(int(kept.sum()))


def test_dropped_choices_have_no_row() -> None:
    order = order_of("cut")
    assert order.choice_R.tolist() == [1, 8, 0, 3, 4, 9]
    assert order.token_R.tolist() == [0, 4, 0, 1, 2, 4]
    assert order.slot_TK[KEPT].tolist() == [2, 0, 3, 4, 1, 5]


def test_padding_gives_every_expert_as_many_rows() -> None:
    order = order_of("padded")
    assert order.filled_R is not None
    assert order.filled_R.view(4, 4).sum(1).tolist() == [2, 0, 2, 2]
    assert order.choice_R[order.filled_R].tolist() == [1, 8, 0, 3, 4, 9]
    assert order.slot_TK[KEPT].tolist() == [8, 0, 9, 12, 1, 13]


@pytest.mark.parametrize("way", ["cut", "padded"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kept", [KEPT, torch.ones_like(KEPT), torch.zeros_like(KEPT)], ids=["some", "all", "none"])
def test_dropped_choices_add_exactly_nothing(kept: Tensor, dtype: torch.dtype, way: str) -> None:
    """Padding brings rows of any content, and its rows get no gradient whatever comes in."""
    torch.manual_seed(0)
    order = order_of(way, kept)
    x, weights = torch.randn(5, 6).to(dtype).requires_grad_(), torch.rand(5, 2).to(dtype).requires_grad_()
    scale = torch.randn(len(order.choice_R), 6).to(dtype)
    rows = spread(x, order)
    rows.retain_grad()
    y = combine(rows * scale, weights, order)
    dy = torch.randn(5, 6).to(dtype)
    y.backward(dy)
    assert x.grad is not None
    assert weights.grad is not None
    assert rows.grad is not None

    wide_x, wide_weights = (t.detach().to(torch.float64).requires_grad_() for t in (x, weights))
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for t, k in kept.nonzero().tolist():
        row = wide_x[t] * scale[order.slot_TK[t, k]] * wide_weights[t, k]
        expected = expected + torch.nn.functional.one_hot(torch.tensor(t), 5).unsqueeze(1) * row
    if kept.any():
        expected_x, expected_weights = torch.autograd.grad(expected, (wide_x, wide_weights), dy.to(torch.float64))
        assert close(y, expected, dtype)
        assert close(x.grad, expected_x, dtype)
        assert close(weights.grad, expected_weights, dtype)
    assert not weights.grad[~kept].any()
    assert not x.grad[~kept.any(1)].any()
    assert not y[~kept.any(1)].any()
    if order.filled_R is not None:
        assert not rows.grad[~order.filled_R].any()
