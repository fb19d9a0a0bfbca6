"""Is every fast kernel of the experts the loop: forward, all gradients, experts without rows, uneven experts?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concertina.model.experts import ExpertKernel, choose_kernel, experts_blocks, experts_grouped_mm, experts_loop
from tests.model.errors import error

pytestmark = pytest.mark.unit

COUNTS = {
    "even": [8, 8, 8, 8],
    "uneven": [1, 37, 3, 12],
    "some empty": [0, 20, 0, 5],
    "first and last empty": [0, 7, 9, 0],
    "all on one": [0, 0, 40, 0],
    "one expert": [13],
    "no rows at all": [0, 0, 0],
}


def results(kernel: ExpertKernel, counts: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Output, dX, dW13, dW2 for inputs that are the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(sum(counts))
    shapes = ((sum(counts), 16), (len(counts), 16, 48), (len(counts), 16, 24), (sum(counts), 16))
    x, w13, w2, dy = (torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes)
    leaves = [x.requires_grad_(), w13.requires_grad_(), w2.requires_grad_()]
    out = kernel(leaves[0], torch.tensor(counts, dtype=torch.int64), leaves[1], leaves[2])
    return [out, *torch.autograd.grad(out, leaves, dy)]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        (experts_loop, torch.float32, 2e-6),
        (experts_blocks, torch.float64, 1e-14),
        (experts_blocks, torch.float32, 2e-6),
        (experts_blocks, torch.bfloat16, 3e-2),
        (experts_grouped_mm, torch.bfloat16, 3e-2),
    ],
)
def test_kernel_equals_the_float64_loop(
    kernel: ExpertKernel, dtype: torch.dtype, tolerance: float, counts: list[int]
) -> None:
    expected = results(experts_loop, counts, torch.float64)
    for ours, reference in zip(results(kernel, counts, dtype), expected, strict=True):
        assert ours.dtype == dtype
        assert error(ours.to(torch.float64), reference) <= tolerance


def test_the_loop_is_swiglu_of_each_row_by_its_expert() -> None:
    torch.manual_seed(0)
    x, w13, w2 = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 4), (2, 4, 6), (2, 4, 3)))
    out = experts_loop(x, torch.tensor([2, 3]), w13, w2)
    for row in range(5):
        expert = 0 if row < 2 else 1
        h = x[row] @ w13[expert]
        assert error(out[row], w2[expert] @ (torch.nn.functional.silu(h[:3]) * h[3:])) < 1e-13


def test_float64_is_the_loop_and_bfloat16_on_cuda_is_grouped() -> None:
    assert choose_kernel(torch.device("cpu"), torch.float64) is experts_loop
    assert choose_kernel(torch.device("cpu"), torch.float32) is experts_blocks
    assert choose_kernel(torch.device("cuda"), torch.bfloat16) is experts_grouped_mm
    assert choose_kernel(torch.device("cuda"), torch.float64) is experts_loop


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_mm_on_a_gpu(counts: list[int]) -> None:
    def on_gpu(*tensors: Tensor) -> Tensor:
        return experts_grouped_mm(*(tensor.cuda() for tensor in tensors)).cpu()

    expected = results(experts_loop, counts, torch.float64)
    for ours, reference in zip(results(on_gpu, counts, torch.bfloat16), expected, strict=True):
        assert error(ours.to(torch.float64), reference) <= 3e-2
