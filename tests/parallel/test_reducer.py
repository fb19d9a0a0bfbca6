"""Is a bucket summed once its gradients are all in, as soon as that, and in the same order on every rank?"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from concertina.layout import BUCKET_BYTES, Box, Layout, Shard
from concertina.parallel.groups import Groups
from concertina.parallel.reducer import GradientReducer, make_buckets
from concertina.parallel.zero import Bucket
from tests.distributed import form, run_distributed
from tests.layout.a_shard import a_shard


def reduced(shapes: dict[str, tuple[int, ...]], group: str = "dp_cp", decay: bool = True) -> list[Shard]:
    return [a_shard(name, Box.whole(shape), group, decay, prod(shape)) for name, shape in shapes.items()]


# -- which parameters share a bucket -----------------------------------------------------------------------------------

kinds = st.tuples(st.integers(0, 14_000_000), st.sampled_from(["dp_cp", "edp"]), st.booleans())


@pytest.mark.unit
@given(st.lists(kinds, min_size=1, max_size=20))
def test_buckets_hold_every_parameter_once_in_reverse_and_stay_small(drawn: list[tuple[int, str, bool]]) -> None:
    items = [a_shard(f"p{i}", Box.whole((size,)), group, decay, size) for i, (size, group, decay) in enumerate(drawn)]
    by_name = {item.name: item for item in items}
    weights = {item.name: torch.empty(item.box.shape, device="meta") for item in items}
    buckets = make_buckets(weights, items, Groups.alone(), weight_decay=0.3)
    order: dict[tuple[str, bool], list[str]] = {}
    for bucket in buckets:
        members = [by_name[name] for name in bucket.parameters]
        assert len({(item.group, item.decay) for item in members}) == 1
        assert bucket.group.name == members[0].group
        assert bucket.weight_decay == (0.3 if members[0].decay else 0.0)
        assert len(members) == 1 or sum(4 * item.box.size for item in members) <= BUCKET_BYTES
        order.setdefault((members[0].group, members[0].decay), []).extend(bucket.parameters)
    for (group, decay), names in order.items():
        assert names == [item.name for item in reversed(items) if (item.group, item.decay) == (group, decay)]
    assert sum(len(names) for names in order.values()) == len(items)


@pytest.mark.unit
def test_a_parameter_larger_than_a_bucket_has_one_to_itself() -> None:
    big = BUCKET_BYTES // 4 + 1
    items = reduced({"first": (8,), "big": (big,), "last": (8,), "after": (8,)})
    weights = {item.name: torch.empty(item.box.shape, device="meta") for item in items}
    found = [list(bucket.parameters) for bucket in make_buckets(weights, items, Groups.alone(), 0.1)]
    assert found == [["after", "last"], ["big"], ["first"]]


@pytest.mark.unit
def test_a_full_bucket_is_full_to_the_byte() -> None:
    half = BUCKET_BYTES // 8
    for extra, expected in [(0, [["b", "a"]]), (1, [["b"], ["a"]])]:
        items = reduced({"a": (half + extra,), "b": (half,)})
        weights = {item.name: torch.empty(item.box.shape, device="meta") for item in items}
        assert [list(bucket.parameters) for bucket in make_buckets(weights, items, Groups.alone(), 0.1)] == expected


# -- when a bucket starts ----------------------------------------------------------------------------------------------


class Told:
    """A bucket that tells what happens to it."""

    def __init__(self, name: str, parameters: dict[str, Tensor], story: list[str]) -> None:
        self.name, self.parameters, self.story = name, parameters, story

    def accumulate(self, name: str, grad: Tensor) -> None:
        self.story.append(f"{name}={grad.item():g}")

    def start_reduce(self) -> None:
        assert not torch.is_grad_enabled()
        self.story.append(f"start {self.name}")

    def finish_reduce(self) -> Tensor:
        self.story.append(f"finish {self.name}")
        return torch.zeros(1)


class Weights:
    """Scalars w0, w1, ... in buckets; `backward` gives them gradients in the order asked for."""

    def __init__(self, buckets: Iterable[tuple[int, ...]]) -> None:
        self.story: list[str] = []
        told = []
        self.weights: dict[int, Tensor] = {}
        for index, members in enumerate(buckets):
            mine = {f"w{i}": torch.ones(1, requires_grad=True) for i in members}
            self.weights |= dict(zip(members, mine.values(), strict=True))
            told.append(Told(f"bucket{index}", mine, self.story))
        self.reducer = GradientReducer(told)  # type: ignore[arg-type]

    def backward(self, *order: int, last: bool = True) -> None:
        self.reducer.arm(last)
        for i in order:
            (self.weights[i] * (i + 10)).sum().backward()


@pytest.mark.unit
def test_a_complete_bucket_starts_under_the_rest_of_the_backward() -> None:
    world = Weights([(0, 1), (2,)])
    world.backward(0, 1, 2)
    assert world.story == ["w0=10", "w1=11", "start bucket0", "w2=12", "start bucket1"]
    world.reducer.finish()
    assert world.story[5:] == ["finish bucket0", "finish bucket1"]


@pytest.mark.unit
def test_buckets_start_in_one_order_whatever_order_gradients_come_in() -> None:
    world = Weights([(0, 1), (2,), (3,)])
    world.backward(2, 3, 1, 0)
    assert world.story == ["w2=12", "w3=13", "w1=11", "w0=10", "start bucket0", "start bucket1", "start bucket2"]


@pytest.mark.unit
def test_nothing_starts_before_the_last_micro_batch() -> None:
    world = Weights([(0,), (1,)])
    world.backward(0, 1, last=False)
    world.backward(0, 1, last=True)
    assert world.story == ["w0=10", "w1=11", "w0=10", "start bucket0", "w1=11", "start bucket1"]


@pytest.mark.unit
def test_a_bucket_that_lacks_a_gradient_starts_at_the_end_and_holds_back_those_after_it() -> None:
    world = Weights([(0,), (1, 2), (3,)])
    world.backward(0, 1, 3)
    assert world.story == ["w0=10", "start bucket0", "w1=11", "w3=13"]
    shards = world.reducer.finish()
    assert world.story[4:] == ["start bucket1", "start bucket2", "finish bucket0", "finish bucket1", "finish bucket2"]
    assert len(shards) == 3


@pytest.mark.unit
def test_steps_follow_each_other_and_gradients_are_taken_off_the_parameters() -> None:
    world = Weights([(0,)])
    for _ in range(2):
        world.backward(0)
        world.reducer.finish()
    assert world.story == ["w0=10", "start bucket0", "finish bucket0"] * 2
    assert world.weights[0].grad is None


@pytest.mark.unit
def test_a_weight_used_twice_is_taken_once_with_both_uses() -> None:
    world = Weights([(0,)])
    world.reducer.arm(last=True)
    (world.weights[0] * 2 + world.weights[0] * 5).sum().backward()
    assert world.story == ["w0=7", "start bucket0"]


# -- real buckets, real ranks ------------------------------------------------------------------------------------------

SHAPES = {"big": (BUCKET_BYTES // 4 // 512 + 2, 512), "unused": (3,), "expert": (5, 3), "norm": (6,)}


def sums_of(rank: int, store: Any) -> dict[str, Any]:
    """Two micro-batches; rank 1 gives `expert` no gradient, and makes the others in another order."""
    groups = form(Layout(2), rank, store)
    items = [
        *reduced({name: SHAPES[name] for name in ("big", "unused")}),
        *reduced({"expert": SHAPES["expert"]}, group="edp"),
        *reduced({"norm": SHAPES["norm"]}, decay=False),
    ]
    weights = {name: torch.ones(shape, requires_grad=True) for name, shape in SHAPES.items()}
    buckets = make_buckets(weights, items, groups, weight_decay=0.1)
    reducer = GradientReducer(buckets)
    order = ["big", "expert", "norm"] if rank == 0 else ["norm", "big"]
    for micro in (0, 1):
        reducer.arm(last=micro == 1)
        for name in order:
            (weights[name] * (10 * micro + rank + 1)).sum().backward()
    return {name: piece for bucket, shard in _zip(buckets, reducer) for name, piece in _pieces(bucket, shard)}


def _zip(buckets: list[Bucket], reducer: GradientReducer) -> list[tuple[Bucket, Tensor]]:
    return list(zip(buckets, reducer.finish(), strict=True))


def _pieces(bucket: Bucket, shard: Tensor) -> list[tuple[str, tuple[int, list[float]]]]:
    return [(name, (view.numel(), view.unique().tolist())) for name, (_, view) in bucket.own_views(shard).items()]


@pytest.mark.dist
def test_ranks_sum_the_same_buckets_though_their_gradients_differ() -> None:
    ranks = run_distributed(sums_of, 2)
    for name, value in [("big", 1 + 11 + 2 + 12), ("unused", 0), ("expert", 1 + 11), ("norm", 26)]:
        pieces = [found[name] for found in ranks]
        assert [values for _, values in pieces] == [[value], [value]], name
        assert sum(count for count, _ in pieces) == torch.Size(SHAPES[name]).numel(), name


def test_ranks_with_more_and_fewer_experts_fill_the_same_buckets() -> None:
    """Three experts over two ranks: boxes differ, the order in which buckets of both groups start must not."""

    def plan(held: int) -> list[list[str]]:
        items = []
        for layer in range(6):
            experts = Box((0, 0), (held, BUCKET_BYTES // 8))
            items.append(a_shard(f"experts{layer}", experts, "edp", True, 3 * BUCKET_BYTES // 8 // 2))
            items.append(a_shard(f"dense{layer}", Box.whole((7,)), "dp_cp", True, 7))
        parameters = {item.name: torch.empty(item.box.shape, device="meta") for item in items}
        return [list(bucket.parameters) for bucket in make_buckets(parameters, items, Groups.alone(), 0.1)]

    assert plan(2) == plan(1)
