"""Are both gradients of a product the right ones, and each only computed when wanted?"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from concertina.model.linear import linear
from tests.model.errors import error

pytestmark = pytest.mark.unit

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_equals_torch(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(rows, 20, dtype=dtype, requires_grad=True), torch.randn(9, 20, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, 9, dtype=dtype)
    ours, theirs = linear(x, w), F.linear(x, w)
    assert error(ours, theirs) < TOLERANCE[dtype]
    for a, b in zip(torch.autograd.grad(ours, (x, w), dy), torch.autograd.grad(theirs, (x, w), dy), strict=True):
        assert error(a, b) < TOLERANCE[dtype]


def test_frozen_weight_gets_no_gradient() -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear(x, w).sum().backward()
    assert x.grad is not None
    assert w.grad is None
