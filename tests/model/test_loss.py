"""Is chunked cross-entropy the usual one: loss, gradients, ignored targets, extreme logits, scaled backward?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.model import loss as loss_module
from concertina.model.loss import IGNORED, cross_entropy_sum
from tests.model.errors import error

pytestmark = pytest.mark.unit


def inputs(dtype: torch.dtype, rows: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, 8, dtype=dtype).requires_grad_()
    w = torch.randn(17, 8, dtype=dtype).requires_grad_()
    return x, w, torch.randint(0, 17, (rows,))


@pytest.mark.parametrize("chunk_rows", [1, 7, 100])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("ignored", [(), (0, 5, 22), range(23)])
def test_equals_torch(chunk_rows: int, scale: float, ignored: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", chunk_rows * 17)
    x, w, targets = inputs(torch.float64)
    targets[list(ignored)] = IGNORED
    ours, counted = cross_entropy_sum(x, w, targets)
    theirs = F.cross_entropy(F.linear(x, w), targets, reduction="sum")
    assert counted.item() == 23 - len(ignored)
    assert error(ours.detach(), theirs.detach()) < 1e-14
    for a, b in zip(
        torch.autograd.grad(ours * scale, (x, w)), torch.autograd.grad(theirs * scale, (x, w)), strict=True
    ):
        assert error(a, b) < 1e-13


def test_a_hopeless_prediction_has_a_finite_loss() -> None:
    """Its probability underflows in fp32; the loss is the distance of the logits all the same."""
    x = torch.tensor([[200.0, 0.0]])
    w = torch.eye(2)
    ours, _ = cross_entropy_sum(x, w, torch.tensor([1]))
    assert ours.item() == 200.0


def test_validation_computes_no_gradient() -> None:
    x, w, targets = inputs(torch.float32)
    with torch.no_grad():
        value, _ = cross_entropy_sum(x, w, targets)
    assert not value.requires_grad
    assert error(value, F.cross_entropy(F.linear(x, w), targets, reduction="sum").detach()) < 1e-6


def test_bfloat16_sums_in_fp32() -> None:
    x, w, targets = inputs(torch.bfloat16)
    ours, _ = cross_entropy_sum(x, w, targets)
    assert ours.dtype == torch.float32
    wide = [t.detach().to(torch.float64).requires_grad_() for t in (x, w)]
    theirs = F.cross_entropy(F.linear(*wide), targets, reduction="sum")
    assert error(ours.detach(), theirs.detach()) < 1e-2
    for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, wide), strict=True):
        assert a.dtype == torch.bfloat16
        assert error(a.to(torch.float64), b) < 2e-2
