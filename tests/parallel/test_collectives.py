"""Do the collectives do what they say, for every type, uneven and empty splits, forward and backward?

One conformance test for all backends: what a rank checks takes the group and the device it was formed on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from concertina.layout import Layout
from concertina.parallel.collectives import (
    Pending,
    all_gather_into,
    all_gather_v,
    all_reduce_max,
    all_reduce_sum,
    all_to_all_v,
    gather_counts,
    reduce_scatter_sum,
    reduce_scatter_v,
    wide_sum,
)
from concertina.parallel.groups import Group
from tests.distributed import form, run_distributed

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]
WIDTH = 3

# Rows that position i (first index) sends to position j, for a group of three.
ROUTES = {
    "even": [[2, 2, 2], [2, 2, 2], [2, 2, 2]],
    "uneven": [[1, 4, 2], [3, 0, 5], [2, 7, 1]],
    "a rank that gets nothing": [[3, 0, 1], [2, 0, 4], [1, 0, 0]],
    "a rank that sends nothing": [[1, 2, 3], [0, 0, 0], [4, 0, 2]],
    "only to itself": [[3, 0, 0], [0, 1, 0], [0, 0, 2]],
    "nothing at all": [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
}

# Rows of each position of a group of three.
SIZES = {
    "even": [3, 3, 3],
    "uneven": [1, 4, 2],
    "the first has nothing": [0, 2, 3],
    "the last has nothing": [2, 1, 0],
    "only one has some": [0, 5, 0],
    "nobody has any": [0, 0, 0],
}


def rows_of(rank: int, count: int, dtype: torch.dtype = torch.float64, *more: int) -> Tensor:
    """Small whole numbers, exact in every type; another value in every place of every rank."""
    shape = (count, WIDTH, *more)
    values = torch.arange(torch.Size(shape).numel()) * 3 % 31 + 40 * rank + 1
    return values.view(shape).to(dtype)


def exchanged(sources: list[Tensor], route: list[list[int]], position: int) -> Tensor:
    """What `position` receives, with all sources at hand."""
    return torch.cat([source.split(route[i])[position] for i, source in enumerate(sources)])


def splits(route: list[list[int]], position: int) -> tuple[list[int], list[int]]:
    return route[position], [row[position] for row in route]


# -- conformance, run by every rank of a group -------------------------------------------------------------------------


def check_sums(group: Group, dtype: torch.dtype) -> None:
    size, me = group.size, group.rank
    everyone = [rows_of(rank, 2 * size, dtype) for rank in range(size)]
    total = torch.stack(everyone).sum(0)
    mine = everyone[me].clone()
    found = all_reduce_sum(mine, group).finish()
    assert torch.equal(found, total)
    assert found.data_ptr() == mine.data_ptr(), "in place"
    whole, out = everyone[me].flatten(), torch.full((2 * WIDTH,), 7, dtype=dtype)
    found = reduce_scatter_sum(out, whole, group).finish()
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(found, total.flatten().view(size, -1)[me])
    assert torch.equal(whole, everyone[me].flatten()), "what was summed is left as it was"


def check_gather(group: Group, dtype: torch.dtype) -> None:
    out = torch.zeros(group.size * WIDTH, dtype=dtype)
    found = all_gather_into(out, rows_of(group.rank, 1, dtype).flatten(), group).finish()
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(found, torch.cat([rows_of(rank, 1, dtype).flatten() for rank in range(group.size)]))


def check_exchanges(group: Group, dtype: torch.dtype) -> None:
    """All routes under way at once, finished last one first."""
    me, pending = group.rank, {}
    for name, route in ROUTES.items():
        send, receive = splits(route, me)
        pending[name] = all_to_all_v(rows_of(me, sum(send), dtype), send, receive, group)
    for name, route in reversed(ROUTES.items()):
        found = pending[name].finish()
        expected = exchanged([rows_of(rank, sum(route[rank]), dtype) for rank in range(group.size)], route, me)
        assert torch.equal(found, expected), name
        assert found.dtype == dtype
        assert not found.requires_grad


def check_shapes(group: Group) -> None:
    """Rows of any shape; memory that is not in order; counts."""
    route, me = ROUTES["uneven"], group.rank
    send, receive = splits(route, me)
    sources = [rows_of(rank, sum(route[rank]), torch.float64, 2) for rank in range(group.size)]
    assert torch.equal(all_to_all_v(sources[me], send, receive, group).finish(), exchanged(sources, route, me))
    scattered = sources[me].transpose(0, 2).contiguous().transpose(0, 2)
    assert not scattered.is_contiguous()
    assert torch.equal(all_to_all_v(scattered, send, receive, group).finish(), exchanged(sources, route, me))
    counts = torch.tensor(route)
    assert gather_counts(counts[me], group).finish().tolist() == counts.tolist()
    strided = torch.stack([counts[me], counts[me] + 100], dim=1)[:, 1]
    assert gather_counts(strided, group).finish().tolist() == (counts + 100).tolist()
    assert gather_counts(counts[:, me : me + 1], group).finish().shape == (group.size, group.size, 1)


def there_and_back(rows: Tensor, weights: Tensor, exchange: Any) -> Tensor:
    """A dispatch, something that is not linear, a combine."""
    there = exchange(rows, forth=True)
    return (exchange((there * weights).tanh(), forth=False) * rows).sum()


def check_gradients(group: Group, route: list[list[int]]) -> None:
    """Gradients of the sum of all ranks' losses, against one process that has every rank's rows."""
    size, me = group.size, group.rank
    sources = [(rows_of(rank, sum(route[rank])) / 100).requires_grad_() for rank in range(size)]
    weights = [(rows_of(rank + 5, sum(row[rank] for row in route)) / 300).requires_grad_() for rank in range(size)]

    def own(rows: Tensor, forth: bool) -> Tensor:
        send, receive = splits(route, me)
        return all_to_all_v(rows, *((send, receive) if forth else (receive, send)), group).finish()

    rows, weight = sources[me].detach().clone().requires_grad_(), weights[me].detach().clone().requires_grad_()
    loss = there_and_back(rows, weight, own)
    loss.backward()

    turned = [(exchanged(sources, route, at) * weights[at]).tanh() for at in range(size)]
    back = [list(column) for column in zip(*route, strict=True)]
    losses = [(exchanged(turned, back, at) * sources[at]).sum() for at in range(size)]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(loss, losses[me], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, sources[me].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, weights[me].grad, rtol=1e-12, atol=1e-12)


def check_largest(group: Group, dtype: torch.dtype) -> None:
    """Of every element by itself, below zero too; the largest is on another rank for another element."""
    size, me = group.size, group.rank
    everyone = torch.stack([(rows_of(rank, size) * 7 % 23 - 30).to(dtype) for rank in range(size)])
    mine = everyone[me].clone()
    found = all_reduce_max(mine, group).finish()
    assert found.data_ptr() == mine.data_ptr(), "in place"
    assert torch.equal(found, everyone.amax(0))
    assert len(everyone.argmax(0).unique()) > 1


def check_gathers_and_scatters_v(group: Group, dtype: torch.dtype) -> None:
    """All sizes of both kinds under way at once, finished last one first; counts and sums between them."""
    size, me = group.size, group.rank
    gathers, scatters, counted = {}, {}, {}
    for name, sizes in SIZES.items():
        gathers[name] = all_gather_v(rows_of(me, sizes[me], dtype), sizes, group)
        counted[name] = gather_counts(torch.tensor([sizes[me], me]), group)
        scatters[name] = reduce_scatter_v(rows_of(me, sum(sizes), dtype), sizes, group)
    for name, sizes in reversed(SIZES.items()):
        total = torch.stack([rows_of(rank, sum(sizes), dtype) for rank in range(size)]).sum(0)
        assert torch.equal(scatters[name].finish(), total.split(sizes)[me]), name
        assert counted[name].finish().tolist() == [[sizes[rank], rank] for rank in range(size)]
        found = gathers[name].finish()
        assert torch.equal(found, torch.cat([rows_of(rank, sizes[rank], dtype) for rank in range(size)])), name
        assert found.dtype == dtype


def check_sums_are_wide(group: Group) -> None:
    """256 + 1 is 256 in bfloat16, 256 + 1 + 1 is not: added one after the other the ones would be lost."""
    me, summands = group.rank, [256.0, 1.0, 1.0]
    one = torch.full((1, WIDTH), summands[me], dtype=torch.bfloat16)
    assert all(total == 258.0 for total in wide_sum(one, group).finish().flatten().tolist())
    assert one.unique().tolist() == [summands[me]], "what was summed is left as it was"
    for sizes in SIZES.values():
        rows = torch.full((sum(sizes), WIDTH), summands[me], dtype=torch.bfloat16)
        found = reduce_scatter_v(rows, sizes, group).finish()
        assert found.dtype == torch.bfloat16
        assert found.flatten().tolist() == [258.0] * (sizes[me] * WIDTH)
        gathered = all_gather_v(leaf := rows[: sizes[me]].clone().requires_grad_(), sizes, group).finish()
        (gathered * summands[me]).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.flatten().tolist() == [258.0] * (sizes[me] * WIDTH), "gradients too"


def check_gradients_v(group: Group, sizes: list[int]) -> None:
    """Gather, something that is not linear, scatter: gradients of all ranks' losses, against one process."""
    size, me = group.size, group.rank
    sources = [(rows_of(rank, sizes[rank]) / 100).requires_grad_() for rank in range(size)]
    weights = [(rows_of(rank + 5, sum(sizes)) / 300).requires_grad_() for rank in range(size)]
    rows, weight = sources[me].detach().clone().requires_grad_(), weights[me].detach().clone().requires_grad_()
    everyone = all_gather_v(rows, sizes, group).finish()
    back = reduce_scatter_v((everyone * weight).tanh(), sizes, group).finish()
    loss = (back * rows).sum()
    loss.backward()

    total = torch.stack([(torch.cat(sources) * weights[rank]).tanh() for rank in range(size)]).sum(0)
    losses = [(part * source).sum() for part, source in zip(total.split(sizes), sources, strict=True)]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(loss, losses[me], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, sources[me].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, weights[me].grad, rtol=1e-12, atol=1e-12)


def check_shapes_v(group: Group) -> None:
    """Rows of any shape, memory that is not in order, gradients without memory of their own."""
    sizes, me = SIZES["uneven"], group.rank
    sources = [rows_of(rank, sizes[rank], torch.float64, 2) for rank in range(group.size)]
    for rows in (sources[me], sources[me].transpose(0, 2).contiguous().transpose(0, 2)):
        assert torch.equal(all_gather_v(rows, sizes, group).finish(), torch.cat(sources))
    wholes = [rows_of(rank, sum(sizes), torch.float64, 2) for rank in range(group.size)]
    for rows in (wholes[me], wholes[me].transpose(0, 2).contiguous().transpose(0, 2)):
        total = torch.stack(wholes).sum(0)
        assert torch.equal(reduce_scatter_v(rows, sizes, group).finish(), total.split(sizes)[me])
        assert torch.equal(wide_sum(rows, group).finish(), total)
    leaf = rows_of(me, sum(sizes)).requires_grad_()
    (reduce_scatter_v(leaf, sizes, group).finish().sum() * (me + 2)).backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 0].tolist() == [to + 2.0 for to, count in enumerate(sizes) for _ in range(count)]


def check_expanded_gradient(group: Group) -> None:
    """The gradient of a plain sum has no memory of its own; it must still travel."""
    send, receive = splits(ROUTES["uneven"], group.rank)
    rows = rows_of(group.rank, sum(send)).requires_grad_()
    (all_to_all_v(rows, send, receive, group).finish().sum() * (group.rank + 2)).backward()
    expected = torch.cat([torch.full((count, WIDTH), to + 2.0) for to, count in enumerate(send)])
    assert rows.grad is not None
    assert torch.equal(rows.grad, expected.to(rows.dtype))


def conform(rank: int, store: Any) -> None:
    group = form(Layout(3), rank, store).world
    for dtype in DTYPES:
        check_sums(group, dtype)
        check_gather(group, dtype)
        check_exchanges(group, dtype)
        check_largest(group, dtype)
        if dtype.is_floating_point:
            check_gathers_and_scatters_v(group, dtype)
    check_shapes(group)
    for route in ROUTES.values():
        check_gradients(group, route)
    check_expanded_gradient(group)
    check_sums_are_wide(group)
    for sizes in SIZES.values():
        check_gradients_v(group, sizes)
    check_shapes_v(group)


@pytest.mark.dist
def test_gloo_conforms() -> None:
    run_distributed(conform, 3)


# -- a group of one ----------------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_group_of_one_all_are_the_identity(dtype: torch.dtype) -> None:
    group, x = Group.alone(), rows_of(0, 2, dtype)
    for reduce in (all_reduce_sum, all_reduce_max):
        assert reduce(x, group).finish() is x
    for collective_v in (all_gather_v, reduce_scatter_v):
        assert collective_v(x, [2], group).finish() is x
    for collective in (reduce_scatter_sum, all_gather_into):
        out = torch.zeros_like(x)
        assert collective(out, x, group).finish() is out
        assert torch.equal(out, x)
        assert collective(x, x, group).finish() is x
    assert all_to_all_v(x, [2], [2], group).finish() is x
    counts = torch.tensor([4, 2])
    assert gather_counts(counts, group).finish().tolist() == [[4, 2]]


@pytest.mark.unit
def test_on_a_group_of_one_gradients_pass_through() -> None:
    rows = rows_of(0, 2).requires_grad_()
    (all_to_all_v(rows, [2], [2], Group.alone()).finish() * 3).sum().backward()
    assert rows.grad is not None
    assert rows.grad.unique().tolist() == [3.0]


@pytest.mark.unit
def test_a_communication_is_finished_once() -> None:
    pending = Pending(lambda: torch.ones(1))
    pending.finish()
    with pytest.raises(AssertionError, match="once"):
        pending.finish()
