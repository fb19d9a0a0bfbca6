"""Is RMSNorm's hand-written backward the derivative of its forward?"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from concertina.model.norm import rms_norm
from tests.model.errors import error

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)])
def test_equals_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    ours, theirs = rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5)
    assert error(ours, theirs) < 1e-14
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), dy), torch.autograd.grad(theirs, (x, weight), dy), strict=True
    ):
        assert error(a, b) < 1e-13


def test_bfloat16_is_computed_in_float32() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.full((64,), 1.5)
    narrow = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, rms_norm(x.bfloat16().to(torch.float32), weight, 1e-5).bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_torchs_kernel_on_a_gpu_computes_the_same() -> None:
    x, dy = (torch.randn(33, 64, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    weight = torch.linspace(0.5, 2.0, 64).bfloat16()
    found = []
    for device in ("cpu", "cuda"):
        given = [tensor.to(device).requires_grad_() for tensor in (x, weight)]
        y = rms_norm(*given, 1e-5)
        found.append([y, *torch.autograd.grad(y, given, dy.to(device))])
    for ours, theirs in zip(*found, strict=True):
        assert error(theirs.cpu().double(), ours.double()) < 1e-2
