"""Do lanes of tensor parallelism compute what one process does, whether they share out the tokens or all hold them?"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from concertina.layout import Layout, cut
from concertina.parallel.groups import Group
from concertina.parallel.lanes import Lanes
from tests.distributed import form, on_ranks

WIDTH, INSIDE = 4, 6
TOKENS = [6, 7, 2, 1, 0]
"""Even and uneven over two and three lanes, fewer than lanes, none."""


def inputs(num_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = {"up": (WIDTH, INSIDE), "down": (INSIDE, WIDTH), "scale": (WIDTH,), "alone": (WIDTH, WIDTH)}
    weights = {name: draw(*shape) for name, shape in shapes.items()}
    return draw(num_tokens, WIDTH), weights


def network(x_RD: Tensor, w: dict[str, Tensor], lanes: Lanes, num_tokens: int) -> Tensor:
    """A scaled residual half with a column- and a row-parallel product, then one that every lane does for itself."""
    scaled = x_RD * lanes.count_once(w["scale"])
    x_TD = lanes.enter(scaled, num_tokens)
    h_RD = x_RD + lanes.leave((x_TD @ w["up"]).tanh() @ w["down"])
    own = lanes.duplicate(h_RD)
    return h_RD + lanes.count_once((own @ w["alone"]).tanh())


def gradients(num_tokens: int, lanes: Lanes, mistake: str = "") -> dict[str, Any]:
    """What this lane has: its output, its gradients, for a loss of its tokens that every lane knows alike."""
    x, w = inputs(num_tokens)
    start, stop = lanes.share(num_tokens)
    inside = slice(*cut(INSIDE, lanes.size, lanes.rank))
    x_RD = x[start:stop].clone().requires_grad_()
    mine = {**w, "up": w["up"][:, inside], "down": w["down"][inside]}
    mine = {name: weight.clone().requires_grad_() for name, weight in mine.items()}
    if mistake == "every lane counts":
        lanes.count_once = lambda x: x  # type: ignore[method-assign]
    if mistake == "nobody sums":
        lanes.duplicate = lambda x: x  # type: ignore[method-assign]
    y_RD = network(x_RD, mine, lanes, num_tokens)
    y_RD.square().sum().backward()
    found = {name: weight.grad.tolist() for name, weight in mine.items() if weight.grad is not None}
    return {"y": y_RD.tolist(), "x": x_RD.grad.tolist() if x_RD.grad is not None else None, **found}


def tensors(found: dict[str, Any]) -> dict[str, Tensor]:
    """As they were, also those without rows."""
    wide = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    return {name: tensor.view(-1, WIDTH) if name in ("y", "x") else tensor for name, tensor in wide.items()}


@cache
def one_process(num_tokens: int) -> dict[str, Tensor]:
    return tensors(gradients(num_tokens, Lanes(Group.alone())))


def lanes_of(rank: int, store: Any, world: int, sequence_parallel: bool, mistake: str = "") -> list[dict[str, Any]]:
    group = form(Layout(world, tp=world), rank, store)["tp"]
    return [gradients(num_tokens, Lanes(group, sequence_parallel), mistake) for num_tokens in TOKENS]


def assemble(ranks: list[dict[str, Any]], sequence_parallel: bool) -> dict[str, Tensor]:
    """Output and gradients of the whole: shares side by side, parts summed, what every lane has in a stack."""
    lanes = [tensors(rank) for rank in ranks]
    tokens = torch.cat if sequence_parallel else torch.stack
    return {
        "up": torch.cat([lane["up"] for lane in lanes], 1),
        "down": torch.cat([lane["down"] for lane in lanes]),
        **{name: torch.stack([lane[name] for lane in lanes]).sum(0) for name in ("scale", "alone")},
        **{name: tokens([lane[name] for lane in lanes]) for name in ("y", "x")},
    }


def worst_error(world: int, sequence_parallel: bool, mistake: str = "") -> float:
    ranks = on_ranks(lanes_of, world, world, sequence_parallel, mistake)
    worst = 0.0
    for index, num_tokens in enumerate(TOKENS):
        expected, found = one_process(num_tokens), assemble([rank[index] for rank in ranks], sequence_parallel)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].shape[-2:] == tensor.shape[-2:]
            difference = (found[name] - tensor).abs().max().item() if tensor.numel() else 0.0
            worst = max(worst, difference / (tensor.abs().max().item() or 1.0) if tensor.numel() else 0.0)
    return worst


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_output_and_gradients_equal_one_process(world: int, sequence_parallel: bool) -> None:
    assert worst_error(world, sequence_parallel) < 1e-13


@pytest.mark.dist
@pytest.mark.parametrize("mistake", ["every lane counts", "nobody sums"])
def test_what_lanes_compute_alike_must_count_once(mistake: str) -> None:
    """The comparison sees both ways of forgetting it."""
    assert worst_error(2, False, mistake) > 1e-3


# -- handles, precision ------------------------------------------------------------------------------------------------


def several_at_once(rank: int, store: Any) -> None:
    """Handles of both directions under way together, finished last one first."""
    group = form(Layout(3, tp=3), rank, store)["tp"]
    for sequence_parallel in (True, False):
        lanes = Lanes(group, sequence_parallel)
        pending = []
        for num_tokens in TOKENS:
            x = inputs(num_tokens)[0]
            pending.append((x, lanes.start_enter(x[slice(*lanes.share(num_tokens))], num_tokens)))
            pending.append((x * 3, lanes.start_leave(x)))
        for index, (expected, handle) in reversed(list(enumerate(pending))):
            share = slice(*lanes.share(len(expected))) if index % 2 else slice(None)
            torch.testing.assert_close(handle.finish(), expected[share], rtol=1e-14, atol=1e-14)


@pytest.mark.dist
def test_several_are_under_way_at_once() -> None:
    on_ranks(several_at_once, 3)


def narrow_sums(rank: int, store: Any) -> list[list[float]]:
    """256 + 1 + 1 in bfloat16, forward and backward: one after the other the ones would be lost."""
    group = form(Layout(3, tp=3), rank, store)["tp"]
    mine, found = [256.0, 1.0, 1.0][rank], []
    for sequence_parallel in (True, False):
        lanes = Lanes(group, sequence_parallel)
        rows = torch.full((3, 2), mine, dtype=torch.bfloat16)
        left = lanes.leave(rows)
        assert left.dtype == torch.bfloat16
        start, stop = lanes.share(3)
        leaf = torch.ones(stop - start, 2, dtype=torch.bfloat16, requires_grad=True)
        (lanes.enter(leaf, 3) * mine).sum().backward()
        assert leaf.grad is not None
        found += [left.flatten().tolist(), leaf.grad.flatten().tolist()]
    return found


@pytest.mark.dist
def test_lanes_sum_in_fp32_at_least() -> None:
    for found in on_ranks(narrow_sums, 3):
        assert [set(values) for values in found] == [{258.0}] * 4


@pytest.mark.unit
def test_alone_lanes_do_nothing() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    for sequence_parallel in (True, False):
        lanes = Lanes(Group.alone(), sequence_parallel)
        assert (lanes.share(3), lanes.copies, lanes.replicated, lanes.speaks) == ((0, 3), 1, False, True)
        assert lanes.enter(x, 3) is lanes.leave(x) is lanes.duplicate(x) is lanes.count_once(x) is x
