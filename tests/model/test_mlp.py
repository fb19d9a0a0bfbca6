"""Is SwiGLU's hand-written backward the derivative of its forward?"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from concertina.model.mlp import swiglu
from tests.model.errors import error

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_equals_the_definition(rows: int) -> None:
    h = torch.randn(rows, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gate, up = h.chunk(2, -1)
    expected, ours = F.silu(gate) * up, swiglu(h)
    assert error(ours, expected) == 0
    dy = torch.randn(rows, 6, dtype=torch.float64)
    assert error(*torch.autograd.grad(ours, h, dy), *torch.autograd.grad(expected, h, dy)) < 1e-14
