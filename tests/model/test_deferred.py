"""Is a weight gradient that comes later the same gradient, to the bit, at the same price, and never forgotten?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from concertina.layout import Box, Layout
from concertina.model import loss as loss_module
from concertina.model.deferred import DeferredGradients, active_queue, deferring
from concertina.model.experts import ExpertKernel, experts_blocks, experts_grouped_mm, experts_loop
from concertina.model.linear import linear
from concertina.model.loss import IGNORED, cross_entropy_sum
from concertina.model.mlp import swiglu
from concertina.parallel.groups import Group
from concertina.parallel.reducer import GradientReducer
from concertina.parallel.zero import Bucket
from tests.distributed import on_ranks
from tests.train.worlds import engine_on, tiny_job

Leaves = dict[str, Tensor]
Compute = Callable[[Leaves], Tensor]
"""Something that multiplies by weights, down to a scalar."""

WIDE = (torch.float64, torch.float32, torch.bfloat16)


def tensor(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


def projection(leaves: Leaves) -> Tensor:
    """Two uses of one weight's rows by views, one weight by itself, one by a cast."""
    h = linear(leaves["x"], leaves["viewed"].flatten(0, 1))
    y = linear(swiglu(h), leaves["plain"])
    logits = linear(y.double(), leaves["cast"].double())
    return (logits.square() * 0.01).sum()


def head(leaves: Leaves) -> Tensor:
    targets = torch.arange(len(leaves["x"])) % 17
    targets[3] = IGNORED
    return cross_entropy_sum(leaves["x"], leaves["head"], targets)[0] * 0.25


def experts(kernel: ExpertKernel, counts: list[int]) -> Compute:
    def compute(leaves: Leaves) -> Tensor:
        out = kernel(leaves["x"], torch.tensor(counts), leaves["w13"].flatten(2, 3), leaves["w2"])
        return (out * leaves["x"].detach()).sum()

    return compute


def projection_leaves(dtype: torch.dtype) -> Leaves:
    shapes = {"x": (11, 16), "viewed": (2, 12, 16), "plain": (8, 12), "cast": (5, 8)}
    return {name: tensor(*shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def head_leaves(dtype: torch.dtype) -> Leaves:
    return {"x": tensor(23, 8).to(dtype).requires_grad_(), "head": tensor(17, 8).to(dtype).requires_grad_()}


def experts_leaves(dtype: torch.dtype, counts: list[int]) -> Leaves:
    shapes = {"x": (sum(counts), 16), "w13": (len(counts), 16, 2, 24), "w2": (len(counts), 16, 24)}
    return {name: tensor(*shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def at_once(compute: Compute, leaves: Leaves) -> dict[str, Tensor]:
    compute(leaves).backward()
    return taken(leaves)


def taken(leaves: Leaves) -> dict[str, Tensor]:
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    return found


def later(compute: Compute, leaves: Leaves) -> dict[str, Tensor]:
    """Nothing but the input's gradient before the queue runs."""
    queue = DeferredGradients()
    with deferring(queue):
        compute(leaves).backward()
    early = taken(leaves)
    assert {"x"} <= early.keys() <= {"x", "cast"}, early.keys()
    weights = {name: leaf for name, leaf in leaves.items() if name not in early}
    assert all(queue.owes(leaf) for leaf in weights.values())
    assert not queue.owes(leaves["x"])
    queue.run()
    assert len(queue) == 0
    assert not any(queue.owes(leaf) for leaf in leaves.values())
    return {**early, **taken(leaves)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype
        assert torch.equal(found[name], gradient), name


# -- the same gradients ------------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_of_linear_to_the_bit(dtype: torch.dtype) -> None:
    leaves = projection_leaves(dtype)
    assert_equal(later(projection, leaves), at_once(projection, leaves))


@pytest.mark.unit
@pytest.mark.parametrize("counts", [[8, 8, 8], [1, 37, 0, 12], [0, 0, 9], [0, 0]], ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (experts_loop, torch.float64),
        (experts_loop, torch.float32),
        (experts_blocks, torch.float64),
        (experts_blocks, torch.float32),
        (experts_blocks, torch.bfloat16),
        (experts_grouped_mm, torch.bfloat16),
    ],
)
def test_of_experts_to_the_bit(kernel: ExpertKernel, dtype: torch.dtype, counts: list[int]) -> None:
    leaves, compute = experts_leaves(dtype, counts), experts(kernel, counts)
    assert_equal(later(compute, leaves), at_once(compute, leaves))


@pytest.mark.unit
@pytest.mark.parametrize("rows", [7, 100])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_of_the_head_to_the_bit(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", rows * 17)
    leaves = head_leaves(dtype)
    assert_equal(later(head, leaves), at_once(head, leaves))


# -- the same price ----------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts what multiplies matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in {"mm", "addmm_", "_grouped_mm"}:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.unit
@pytest.mark.parametrize(
    ("compute", "leaves", "more"),
    [
        (projection, projection_leaves(torch.float64), 0),
        (experts(experts_loop, [3, 5]), experts_leaves(torch.float64, [3, 5]), 0),
        (experts(experts_blocks, [3, 5]), experts_leaves(torch.float64, [3, 5]), 0),
        (experts(experts_grouped_mm, [3, 5]), experts_leaves(torch.bfloat16, [3, 5]), 0),
        (head, head_leaves(torch.float64), 1),  # the logits once more
    ],
    ids=["linear", "loop", "blocks", "grouped", "head"],
)
def test_nothing_is_multiplied_twice_but_the_logits(compute: Compute, leaves: Leaves, more: int) -> None:
    with Products() as usual:
        at_once(compute, leaves)
    with Products() as split:
        later(compute, leaves)
    assert split.found.total() == usual.found.total() + more


@pytest.mark.unit
def test_what_is_computed_outside_owes_nothing() -> None:
    leaves, queue = projection_leaves(torch.float64), DeferredGradients()
    expected = at_once(projection, leaves)
    outside = projection(leaves)
    with deferring(queue):
        outside.backward()
        inside = projection(leaves)
    assert len(queue) == 0
    assert_equal(taken(leaves), expected)
    inside.backward()  # it is where the forward ran that counts
    assert len(queue) == 3
    queue.run()
    assert_equal(taken(leaves), expected)


@pytest.mark.unit
def test_a_queue_is_active_in_its_block_only() -> None:
    queue = DeferredGradients()
    with deferring(queue):
        assert active_queue() is queue
        with pytest.raises(AssertionError, match="one queue"), deferring(DeferredGradients()):
            pass
        assert active_queue() is queue
    with pytest.raises(KeyError), deferring(queue):
        raise KeyError
    assert active_queue() is None


@pytest.mark.unit
def test_a_frozen_weight_is_not_queued() -> None:
    queue, x = DeferredGradients(), torch.ones(3, 4, requires_grad=True)
    with deferring(queue):
        (
            linear(x, torch.ones(5, 4)).sum() + cross_entropy_sum(x, torch.ones(5, 4), torch.zeros(3).long())[0]
        ).backward()
    assert len(queue) == 0
    assert x.grad is not None


# -- when it comes -----------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_a_gradient_may_be_computed_in_the_middle_of_a_backward() -> None:
    """As a schedule does while a communication is under way; oldest first."""
    leaves, queue, story = projection_leaves(torch.float64), DeferredGradients(), []
    expected = at_once(projection, leaves)
    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(lambda p, name=name: story.append(name) if p.grad is not None else None)
    with deferring(queue):
        between = linear(leaves["x"], leaves["viewed"].flatten(0, 1))
        between.register_hook(lambda _: queue.run_next())
        y = linear(swiglu(between), leaves["plain"])
        (linear(y, leaves["cast"]).square() * 0.01).sum().backward()
    assert story == ["cast", "x"]
    queue.run()
    assert story == ["cast", "x", "plain", "viewed"]
    assert_equal(taken(leaves), expected)


def bucket_of(**parameters: Tensor) -> Bucket:
    boxes = {name: Box.whole(tuple(parameter.shape)) for name, parameter in parameters.items()}
    return Bucket(parameters, boxes, Group.alone(), 0.0)


@pytest.mark.unit
def test_a_bucket_waits_for_what_is_owed_also_of_a_weight_with_another_use() -> None:
    table, other = torch.ones(5, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    queue = DeferredGradients()
    buckets = [bucket_of(table=table), bucket_of(other=other)]
    reducer = GradientReducer(buckets, queue.owes)
    reducer.arm(last=True)
    x = torch.ones(2, 4, requires_grad=True)
    with deferring(queue):
        (linear(x, table).sum() + table[1].sum() + linear(x, other).sum() * 10).backward()
    assert reducer._started == 0, "the second use of the table is still owed"
    with pytest.raises(AssertionError, match=r"still to come: .*table"):
        reducer.finish()
    queue.run()
    assert reducer._started == 2
    first, second = reducer.finish()
    assert first.view(5, 4)[:, 0].tolist() == [2.0, 3.0, 2.0, 2.0, 2.0]
    assert second.unique().tolist() == [20.0]


# -- a whole model -----------------------------------------------------------------------------------------------------


def gradients_of(rank: int, store: Any, changes: dict[str, Any], degrees: tuple[int, ...], deferred: bool) -> Any:
    """This rank's pieces of the summed gradients of step 1, and how many were deferred."""
    world, tp, ep, etp = degrees
    engine = engine_on(tiny_job(**changes), Layout(world, tp=tp, ep=ep, etp=etp), rank, store)
    if deferred:
        with deferring(engine.deferred):
            engine._forward_backward(1)
    else:
        engine._forward_backward(1)
    count = len(engine.deferred)
    engine.deferred.run()
    pieces = {
        name: view.numpy().copy()
        for bucket, shard in zip(engine.reducer.buckets, engine.reducer.finish(), strict=True)
        for name, (_, view) in bucket.own_views(shard).items()
    }
    return count, pieces


def compare(changes: dict[str, Any], degrees: tuple[int, ...], bound: float) -> int:
    """How many weight gradients a rank deferred."""
    if degrees[0] == 1:
        usual, late = ([gradients_of(0, None, changes, degrees, deferred)] for deferred in (False, True))
    else:
        usual, late = (on_ranks(gradients_of, degrees[0], changes, degrees, deferred) for deferred in (False, True))
    for (none, expected), (count, found) in zip(usual, late, strict=True):
        assert none == 0
        assert count > 0
        assert found.keys() == expected.keys()
        for name, piece in expected.items():
            assert abs(found[name] - piece).max() <= bound * abs(piece).max(), name
    return late[0][0]


@pytest.mark.unit
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_of_a_whole_model_to_the_bit(precision: str) -> None:
    changes = {"training__precision": precision, "training__micro_batch_size": 3, "model__shared_expert_gate": True}
    number = compare(changes, (1, 1, 1, 1), 0.0)
    if precision != "float64":  # the loop of float64 queues every expert's product by itself
        # Three micro-batches: q, kv, output of 3 layers; 2 of the dense one; router, experts, shared, its gate of 2;
        # the head.
        assert number == 3 * (9 + 2 + 2 * (1 + 1 + 2 + 1) + 1)


@pytest.mark.unit
def test_of_tied_weights_only_the_order_of_addition_differs() -> None:
    compare({"model__tie_word_embeddings": True}, (1, 1, 1, 1), 1e-14)


@pytest.mark.dist
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_of_a_folded_model(sequence_parallel: bool) -> None:
    changes = {"layout": {"sequence_parallel": sequence_parallel}, "model__shared_expert_gate": True}
    compare(changes, (2, 2, 2, 1), 1e-13)
    compare({**changes, "model__tie_word_embeddings": True}, (4, 2, 2, 2), 1e-13)
