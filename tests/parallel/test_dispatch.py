"""Do tokens reach their experts and come back the same, on one rank and on several with uneven experts?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from concertina.layout import Layout
from concertina.parallel.dispatch import Dispatcher, Received
from concertina.parallel.groups import Groups
from tests.distributed import form, on_ranks, run_distributed

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


def round_trip(
    dispatcher: Dispatcher, rank: int, kept: Tensor | None = None, padded: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Output, and the gradients of a sum of squares, after dispatch, experts and combine."""
    x, ids, weights = inputs(rank)
    x.requires_grad_()
    weights.requires_grad_()
    received = dispatcher.start_dispatch(x, ids, kept, padded).finish()
    out = run_experts(received, dispatcher.local_experts[0])
    y = dispatcher.start_combine(received, out, weights).finish()
    dx, dweights = torch.autograd.grad(y.square().sum(), (x, weights))
    return y.detach(), dx, dweights, received.counts_E.tolist()


def written_out(rank: int, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    x, ids, weights = inputs(rank)
    x.requires_grad_()
    weights.requires_grad_()
    y = ((ids + 1) * weights * (1 if kept is None else kept)).sum(1, keepdim=True) * x
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
    layout = Layout(3, ep=3)
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


# -- choices dropped ---------------------------------------------------------------------------------------------------

PADDED = [7, 6, 0, 8]
"""Rows of an expert from each of four ranks: as many as its tokens, a few less or more. Rank 2 has no tokens."""
LAYOUTS = [Layout(4, ep=4), Layout(4, ep=2, etp=2), Layout(4, etp=4), Layout(4)]


def some(rank: int) -> Tensor:
    """Rank 0 drops nothing, rank 1 everything of its first three tokens, rank 3 all but two choices."""
    kept = torch.ones_like(inputs(rank)[1], dtype=torch.bool)
    if rank == 1:
        kept[:3] = False
    if rank == 3:
        kept[1:] = False
    return kept


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Names of what asks a device for a value: reads from Python, and operators whose shapes depend on values."""
    seen: list[str] = []
    reads = {"tolist", "numpy", "cpu"}
    shapes = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "unique_consecutive"}

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in reads:
                seen.append(func.__name__)
                with torch._C.DisableTorchFunction():
                    return func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            unsized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
            if name in shapes or (unsized and func._overloadname == "Tensor"):
                seen.append(name)
            return func(*args, **(kwargs or {}))

    with Operators(), Calls():
        yield seen


def reads_of(dispatcher: Dispatcher, rank: int, kept: Tensor | None, padded: list[int] | None) -> list[str]:
    x, ids, weights = inputs(rank)
    x.requires_grad_()
    with host_reads() as seen:
        received = dispatcher.start_dispatch(x, ids, kept, padded).finish()
        dispatcher.start_combine(received, received.rows_QD * 2, weights).finish().sum().backward()
    return seen


@pytest.mark.unit
def test_reads_are_seen() -> None:
    with host_reads() as seen:
        x = torch.ones(3, dtype=torch.int64)
        x.tolist(), x.sum().item(), bool(x.any()), int(x[0]), x.nonzero(), x.repeat_interleave(x)
    assert len(seen) == 6


@pytest.mark.unit
def test_padded_and_alone_the_counts_never_visit_the_host() -> None:
    x, ids, weights = (tensor.to("meta") for tensor in inputs(0))
    dispatcher = Dispatcher(EXPERTS, Groups.alone())
    received = dispatcher.start_dispatch(x, ids, some(0).to("meta"), [4]).finish()
    assert received.rows_QD.shape == (EXPERTS * 4, WIDTH)
    assert dispatcher.start_combine(received, received.rows_QD, weights).finish().shape == x.shape


@pytest.mark.unit
def test_layers_of_a_micro_batch_share_one_plan_of_padded_rows() -> None:
    dispatcher, (x, ids, _) = Dispatcher(EXPERTS, Groups.alone()), inputs(0)
    first, again, other = (dispatcher.start_dispatch(x, ids, some(0), [rows]).finish() for rows in (4, 4, 5))
    assert again.counts_E is first.counts_E
    assert (first.counts_E.tolist(), other.counts_E.tolist()) == ([4] * EXPERTS, [5] * EXPERTS)
    assert dispatcher.start_dispatch(x, ids, some(0), [4]).finish().counts_E.tolist() == [4] * EXPERTS


@pytest.mark.unit
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("padding", [False, True])
def test_dropping_alone(rank: int, padding: bool) -> None:
    dispatcher, padded = Dispatcher(EXPERTS, Groups.alone()), [PADDED[rank]] if padding else None
    *ours, counts = round_trip(dispatcher, rank, some(rank), padded)
    assert_close(tuple(ours), written_out(rank, some(rank)))
    assert sum(counts) == (EXPERTS * PADDED[rank] if padding else int(some(rank).sum()))
    assert len(reads_of(dispatcher, rank, some(rank), padded)) == (0 if padding else 1)


def dropping_main(rank: int, store: Any) -> list[tuple[Any, ...]]:
    """Of each layout, without and with padding: the round trip, and how often the host read something."""
    found = []
    for number, layout in enumerate(LAYOUTS):
        dispatcher = Dispatcher(EXPERTS, form(layout, rank, torch.distributed.PrefixStore(str(number), store)))
        padded = [PADDED[r] for r in dispatcher.groups["etp_ep"].ranks]
        for rows in (None, padded):
            y, dx, dweights, counts = round_trip(dispatcher, rank, some(rank), rows)
            reads = [len(reads_of(dispatcher, rank, kept, rows)) for kept in (some(rank), None)]
            found.append((y.tolist(), dx.tolist(), dweights.tolist(), counts, reads))
    return found


@pytest.mark.dist
def test_dropping_on_every_layout() -> None:
    """Each slice of etp computes the whole product here, so outputs come back times etp."""
    ranks = on_ranks(dropping_main, 4)
    for number, layout in enumerate(LAYOUTS):
        for padding in (False, True):
            counts = 0
            for rank, found in enumerate(ranks):
                y, dx, dweights, here, reads = found[2 * number + padding]
                expected = written_out(rank, some(rank))
                scaled = [tensor * layout.etp**power for tensor, power in zip(expected, (1, 2, 2), strict=True)]
                assert_close((y, dx, dweights), tuple(scaled))
                counts += sum(here)
                alone = layout.ep * layout.etp == 1
                assert reads == [0 if padding else 1, 0 if alone else 1]
            rows = sum(PADDED) * EXPERTS if padding else sum(int(some(rank).sum()) for rank in range(4))
            assert counts == rows * layout.etp
