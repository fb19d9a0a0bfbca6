"""Do all kernels of attention compute the same: SDPA, blocks on a CPU, and the definition written out?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from concertina.model.attention import attend, core
from concertina.model.attention_blocks import LONGEST, attend_in_blocks
from concertina.model.rope import Rotation, rotate, rotation
from concertina.model.sight import Sight
from concertina.parallel.context import Context
from concertina.parallel.groups import Group
from tests.model.errors import error

pytestmark = pytest.mark.unit


def inputs(length: int, kv: int, group: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Rotation]:
    """Queries, keys with values, and their rotation."""
    generator = torch.Generator().manual_seed(length)
    q, kv_heads = (torch.randn(2, length, kv, n, width, generator=generator, dtype=dtype) for n in (group, 2))
    return q.requires_grad_(), kv_heads.requires_grad_(), rotation(torch.arange(length), width, 10000.0, dtype)


def seen(turn: Rotation) -> Sight:
    """All of a whole sequence."""
    return Sight(len(turn.cos_SP), Context(Group.alone()), turn)


def written_out(q: Tensor, kv: Tensor, turn: Rotation) -> Tensor:
    k, v = kv.unbind(3)
    q, k = rotate(q, turn), rotate(k, turn)
    scores = torch.einsum("bsngc,btnc->bngst", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bngst,btnc->bsngc", scores.masked_fill(future, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("kernel", [core, attend_in_blocks])
@pytest.mark.parametrize(
    ("length", "kv", "group", "width"), [(1, 1, 1, 2), (37, 2, 3, 8), (64, 4, 1, 4), (150, 2, 2, 16)]
)
def test_kernels_equal_the_definition(kernel: object, length: int, kv: int, group: int, width: int) -> None:
    q, kv_heads, turn = inputs(length, kv, group, width, torch.float64)
    ours, expected = kernel(q, kv_heads, turn), written_out(q, kv_heads, turn)  # type: ignore[operator]
    assert error(ours, expected) < 1e-13
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad(out, (q, kv_heads), dy) for out in (ours, expected))
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-12


@pytest.mark.parametrize("length", [128, LONGEST + 1])
def test_fp32_is_close_on_both_sides_of_the_switch(length: int) -> None:
    q, kv, turn = inputs(length, 1, 2, 8, torch.float32)
    exact = rotation(torch.arange(length), 8, 10000.0, torch.float64)
    expected = written_out(q.detach().to(torch.float64), kv.detach().to(torch.float64), exact)
    assert error(attend(q, kv, seen(turn)).detach(), expected) < 1e-4  # angles of fp32 at position 1000


def test_bfloat16_goes_to_sdpa() -> None:
    q, kv, turn = inputs(16, 2, 2, 8, torch.bfloat16)
    out = attend(q, kv, seen(turn))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    for leaf in (q, kv):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
