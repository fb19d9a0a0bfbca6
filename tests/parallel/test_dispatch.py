"""Do tokens reach their experts and come back the same, on one rank and on several with uneven experts?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from concertina.layout import Layout
from concertina.parallel.dispatch import Dispatcher, Received
from concertina.parallel.groups import Groups
from tests.distributed import form, run_distributed

EXPERTS, CHOICES, WIDTH, TOKENS = 5, 2, 4, 7


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts and weights of one rank; rank 1 sends everything to experts 0 and 1, rank 2 has no tokens."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 0 if rank == 2 else TOKENS
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    if rank == 1:
        scores[:, :2] += 1
    weights, ids = scores.topk(CHOICES)
    return x, ids, weights


def run_experts(received: Received, first: int) -> Tensor:
    """Expert e multiplies by e + 1: a row that met the wrong expert shows."""
    scale = torch.arange(first + 1, first + 1 + received.counts_E.numel(), dtype=torch.float64)
    return received.rows_QD * scale.repeat_interleave(received.counts_E).unsqueeze(1)


def round_trip(dispatcher: Dispatcher, rank: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Output, and the gradients of a sum of squares, after dispatch, experts and combine."""
    x, ids, weights = inputs(rank)
    x.requires_grad_()
    weights.requires_grad_()
    received = dispatcher.start_dispatch(x, ids).finish()
    out = run_experts(received, dispatcher.local_experts[0])
    y = dispatcher.start_combine(received, out, weights).finish()
    dx, dweights = torch.autograd.grad(y.square().sum(), (x, weights))
    return y.detach(), dx, dweights, received.counts_E.tolist()


def written_out(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    x, ids, weights = inputs(rank)
    x.requires_grad_()
    weights.requires_grad_()
    y = ((ids + 1) * weights).sum(1, keepdim=True) * x
    return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weights))


def assert_close(ours: tuple[Any, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=False):
        torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64).view_as(b), b, rtol=1e-13, atol=1e-13)


@pytest.mark.unit
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_round_trip_alone(rank: int) -> None:
    *ours, counts = round_trip(Dispatcher(EXPERTS, Groups.alone()), rank)
    assert_close(tuple(ours), written_out(rank))
    assert counts == inputs(rank)[1].flatten().bincount(minlength=EXPERTS).tolist()


@pytest.mark.unit
def test_rows_come_by_expert_then_token() -> None:
    x, ids, _ = inputs(0)
    received = Dispatcher(EXPERTS, Groups.alone()).start_dispatch(x, ids).finish()
    expected = [x[token] for e in range(EXPERTS) for token in range(TOKENS) if e in ids[token].tolist()]
    assert torch.equal(received.rows_QD, torch.stack(expected))


@pytest.mark.unit
def test_alone_the_counts_never_visit_the_host() -> None:
    """On a meta device there is nothing to read: any synchronisation would raise."""
    x, ids, weights = (tensor.to("meta") for tensor in inputs(0))
    dispatcher = Dispatcher(EXPERTS, Groups.alone())
    received = dispatcher.start_dispatch(x, ids).finish()
    assert dispatcher.start_combine(received, received.rows_QD, weights).finish().shape == x.shape


def rank_main(rank: int, store: Any) -> tuple[list[Any], ...]:
    layout = Layout.of(3, ep=3)
    y, dx, dweights, counts = round_trip(Dispatcher(EXPERTS, form(layout, rank, store)), rank)
    return y.tolist(), dx.tolist(), dweights.tolist(), counts


@pytest.mark.dist
def test_three_ranks_with_five_experts() -> None:
    """Two, two and one expert; a rank without tokens; experts without rows."""
    results = run_distributed(rank_main, 3)
    everywhere = sum(inputs(rank)[1].flatten().bincount(minlength=EXPERTS) for rank in range(3))
    assert [count for *_, counts in results for count in counts] == torch.as_tensor(everywhere).tolist()
    for rank, result in enumerate(results):
        assert_close(result, written_out(rank))
