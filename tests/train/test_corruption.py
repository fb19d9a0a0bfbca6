"""Is one bit that flips in a rank's memory seen before it is trained on, and is it known whose?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from concertina.config import Job
from concertina.layout import Layout, kv_copies
from concertina.parallel.groups import GroupOptions, form_groups
from concertina.train.corruption import Findings, SilentCorruption, bits, culprits, find_corruption
from tests.distributed import on_ranks
from tests.train.generations import on_nodes
from tests.train.worlds import tiny_job, unconfigured

A, B, C = 11, 22, 33


@pytest.mark.unit
@pytest.mark.parametrize(
    ("weights", "masters", "found"),
    [
        ([[A, B], [A, B]], [A, B], (set(), False)),
        ([[A, B, C], [A, B, C], [A, 9, C]], [A, B, C], ({2}, False)),
        ([[A, B, C], [A, B, C], [9, 8, C]], [A, B, C], ({2}, False)),
        ([[A, B], [A, 9]], [A, B], ({1}, False)),  # the owner of B is position 1, and its masters say B
        ([[A, 9], [A, B]], [A, B], ({0}, False)),
        ([[A, B], [9, B]], [7, B], (set(), True)),  # neither is what the owner's masters say
        ([[A, B], [A, B]], [A, 9], ({1}, False)),  # sent to all, and changed since
        ([[A, B, C], [A, 8, C], [A, 9, C]], [A, B, C], ({1, 2}, False)),
    ],
)
def test_who_is_wrong(weights: list[list[int]], masters: list[int], found: tuple[set[int], bool]) -> None:
    assert culprits(weights, masters) == found


@pytest.mark.unit
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_one_bit_changes_the_sum(dtype: torch.dtype) -> None:
    x = torch.randn(37, dtype=dtype)
    before = bits(x)
    whole = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    for bit in range(8 * x.element_size() - 1):
        whole[bit % 37] ^= 1 << bit
        assert bits(x) != before
        whole[bit % 37] ^= 1 << bit
    assert bits(x) == before


def flip(x: torch.Tensor) -> None:
    """One bit of one element, a low one: nobody would see it in a loss."""
    with torch.no_grad():
        x.view(-1)[:1].view(torch.int64).bitwise_xor_(1 << 20)


def trained(rank: int, store: Any, job: Job, layout: Layout, wrong: int | None, what: str) -> dict[str, Any]:
    """Two steps, a flip in the memory of one rank, another step."""
    seating = on_nodes(layout, {member: f"n{member % 2}" for member in range(layout.world)})
    engine = unconfigured(job)
    groups = form_groups(layout, rank, store, GroupOptions(), kv_copies(job.model, layout.tp))
    engine.adopt(engine.prepare(seating, rank, groups, "initial"))
    engine.start_anew()
    for step in (1, 2):
        engine.train_step(step)
    engine.settle()
    clean = find_corruption(engine.share)
    if rank == wrong:
        bucket = next(b for b in engine.reducer.buckets if b.group.size > 1)
        if what == "copy":
            flip(next(iter(engine.share.seconds.copies.values())).masters[0])
        elif what == "master":
            flip(engine.optimizer.masters[engine.reducer.buckets.index(bucket)])
        else:
            flip(next(iter(bucket.parameters.values())))
    try:
        engine.train_step(3)
    except SilentCorruption as error:
        return {"clean": clean, "mine": error.mine, "known": error.known, "said": str(error), "applied": engine.applied}
    return {"clean": clean, "applied": engine.applied}


LAYOUTS = [Layout(2), Layout(3, ep=3), Layout(4, tp=2), Layout(4, pp=2), Layout(4, ep=2)]


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("what", ["weights", "master"])
def test_a_bit_that_flips_is_seen_before_it_is_trained_on(layout: Layout, what: str) -> None:
    job = tiny_job(elastic={"verify_every_steps": 1})
    wrong = layout.world - 1
    found = on_ranks(trained, layout.world, job, layout, wrong, what)
    for rank, said in enumerate(found):
        assert said["clean"] == Findings()
        assert said["applied"] == 2, "nobody applies it"
        assert (said["mine"], said["known"]) == (rank == wrong, True), said["said"]
        assert f"rank {wrong}" in said["said"]


@pytest.mark.dist
def test_of_two_copies_of_a_shard_nobody_knows_which_is_right() -> None:
    job = tiny_job(elastic={"verify_every_steps": 1})
    for said in on_ranks(trained, 4, job, Layout(4), 1, "copy"):
        assert (said["mine"], said["known"], said["applied"]) == (False, False, 2)
        assert "nothing says which is right" in said["said"]


@pytest.mark.dist
def test_nothing_is_found_where_nothing_is_wrong_or_nobody_looks() -> None:
    for every, step in ((1, 3), (2, 3), (0, 3)):
        job = tiny_job(elastic={"verify_every_steps": every})
        wrong = None if every == 1 else 1
        for said in on_ranks(trained, 2, job, Layout(2), wrong, "weights"):
            assert said["applied"] == step
