"""Does the layout change the mathematics? Every axis alone, in pairs, together; uneven worlds, experts, sequences."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from concertina.config import Job
from concertina.layout import Layout
from tests.distributed import on_ranks
from tests.train.worlds import engine_on, plainest, record_drops, tiny_job

pytestmark = pytest.mark.dist

Degrees = tuple[int, int, int, int]
"""World, tp, ep, etp."""

TESTED: list[Degrees] = [
    (2, 2, 1, 1),  # each axis alone
    (2, 1, 2, 1),
    (2, 1, 1, 2),
    (2, 1, 1, 1),
    (4, 4, 1, 1),  # fewer key-value heads than lanes
    (2, 2, 2, 1),  # pairs, on the same ranks
    (2, 2, 1, 2),
    (4, 1, 2, 2),
    (4, 2, 4, 1),  # ep spans tp and dp
    (4, 2, 2, 2),
    (8, 2, 2, 2),  # all together, with replicas of everything
    (3, 1, 3, 1),  # uneven experts
    (5, 1, 1, 1),  # uneven sequences
    (6, 2, 3, 2),
    (7, 1, 7, 1),
]


def gradients_of(rank: int, store: Any, job: Job, degrees: Degrees) -> dict[str, Any]:
    """Sums, this rank's pieces of the summed gradients of step 1, and then two steps; what all of it dropped."""
    world, tp, ep, etp = degrees
    engine = engine_on(job, Layout(world, tp=tp, ep=ep, etp=etp), rank, store)
    drops = record_drops(engine)
    engine._forward_backward(engine.sampler.batch(0))
    found = {}
    for bucket, shard in zip(engine.reducer.buckets, engine.reducer.finish(), strict=True):
        for name, (slot, view) in bucket.own_views(shard).items():
            found[name] = (slot.box, engine.shards[name].global_shape, view.numpy().copy())
    results = [engine.train_step(step) for step in (1, 2)]
    facts = [(r.loss, r.grad_norm, r.aux_loss, r.z_loss, r.tokens, r.imbalance, r.dropped) for r in results]
    return {"gradients": found, "facts": facts, "validation": engine.evaluate(), "drops": drops}


def assemble(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, (box, shape, piece) in rank["gradients"].items():
            piece = torch.from_numpy(piece)
            whole.setdefault(name, torch.full(shape, float("nan"), dtype=piece.dtype))[box.slices()] = piece
    return whole


@cache
def one_process(job: Job) -> dict[str, Any]:
    return gradients_of(0, None, job, (1, 1, 1, 1))


def check(degrees: Degrees, precision: str, bound: float, **changes: Any) -> None:
    job = tiny_job(training__precision=precision, **changes)
    reference = one_process(plainest(job))
    ranks = on_ranks(gradients_of, degrees[0], job, degrees)
    expected, found = assemble([reference]), assemble(ranks)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        worst = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert worst < bound, f"{name}: {worst:.2e}"
    assert set().union(*(rank["drops"] for rank in ranks)) == reference["drops"]
    for rank in ranks:
        assert rank["facts"][0] == pytest.approx(reference["facts"][0], rel=bound)
        if precision == "float64":
            assert rank["facts"][1] == pytest.approx(reference["facts"][1], rel=bound)
            assert rank["validation"] == pytest.approx(reference["validation"], rel=bound)


@pytest.mark.parametrize("degrees", TESTED, ids=lambda d: "world{}-tp{}-ep{}-etp{}".format(*d))
def test_loss_and_every_gradient_equal_one_process(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10)


@pytest.mark.parametrize("degrees", [(2, 2, 1, 1), (4, 4, 1, 1), (4, 2, 2, 2)])
def test_lanes_that_hold_the_same_tokens(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10, layout={"sequence_parallel": False})
