"""Are the bytes of a rank those that the engine allocates, every one of them, on every rank of every layout?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import lcm
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concertina.config import Job, load_job
from concertina.layout import (
    Box,
    Layout,
    Seating,
    kv_copies,
    plan_buckets,
    plan_slots,
    rank_slots,
    segment_length,
    shards,
)
from concertina.model import Decoder
from concertina.parallel.reducer import make_buckets
from concertina.planner.memory import RankBytes, extremes, rank_bytes
from concertina.train.adamw import FlatAdamW
from concertina.train.engine import Engine
from tests.distributed import form, on_ranks, seat
from tests.train.generations import on_nodes
from tests.train.worlds import LATENT, seated_engine, tiny_job, unconfigured

Degrees = dict[str, int]

LAYOUTS: list[tuple[int, Degrees]] = [
    (1, {}),
    (2, {"tp": 2}),
    (4, {"tp": 4}),  # fewer key-value heads than lanes
    (4, {"ep": 4}),
    (4, {"ep": 2, "etp": 2}),
    (4, {"tp": 2, "ep": 4}),
    (8, {"tp": 2, "ep": 2, "etp": 2}),  # replicas of everything
    (8, {"cp": 2, "tp": 2, "ep": 4}),
    (3, {"ep": 3}),  # eight experts over three
    (5, {}),
    (7, {"ep": 7}),
    (6, {"tp": 2, "ep": 3, "etp": 2}),
    (2, {"pp": 2}),  # two layers and one
    (3, {"pp": 3}),
    (8, {"pp": 2, "cp": 2, "ep": 4}),
    (8, {"pp": 2, "tp": 4, "ep": 2}),
]

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "shared_expert_gate": True, "qk_norm": "head"},
    "norms over all heads": {"qk_norm": "full"},
    "experts only": {"mlp_only_layers": [], "shared_expert_intermediate_size": 0},
    "dense only": {"mlp_only_layers": [0, 1, 2], "shared_expert_intermediate_size": 0},
    "latent attention": LATENT,
    "vocabulary smaller than tp": {"vocab_size": 3},
}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of every storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def uneven(layout: Layout) -> Seating:
    """Ranks on two nodes, one of them twice as large: second owners of none, of one and of several others."""
    large = -(-2 * layout.world // 3)
    return on_nodes(layout, {rank: "large" if rank < large else "small" for rank in range(layout.world)})


def held_by(adamw: FlatAdamW) -> list[Tensor]:
    """Masters, moments and counters."""
    return [*adamw.masters, *(tensor for master in adamw.masters for tensor in adamw._adamw.state[master].values())]


def allocated(engine: Engine) -> RankBytes:
    buckets, seconds = engine.reducer.buckets, engine.share.seconds
    kept = [tensor for copy in seconds.copies.values() for tensor in held_by(copy)]
    received = [tensor for segments in seconds.received.values() for tensor in segments]
    return RankBytes(
        weights=storage_bytes(tensor for _, tensor in engine.decoder.named_tensors()),
        gradients=storage_bytes(tensor for bucket in buckets for tensor in (bucket.grads, bucket.shard)),
        optimizer=storage_bytes(held_by(engine.optimizer)),
        second_copies=storage_bytes([*kept, *received]),
    )


def check(job: Job, layout: Layout) -> None:
    """Of a seating with second owners; what a rank keeps for nobody else is the same without."""
    seating = uneven(layout)
    for rank in range(layout.world):
        counted = rank_bytes(job.model, layout, job.training.precision, rank, seating.firsts(rank))
        assert counted == allocated(seated_engine(job, layout, rank, seating)), f"rank {rank}"


@pytest.mark.unit
@pytest.mark.parametrize(("world", "degrees"), LAYOUTS, ids=str)
def test_bytes_are_the_engine_s(world: int, degrees: Degrees) -> None:
    check(tiny_job(), Layout(world, **degrees))


@pytest.mark.unit
def test_layouts_have_ranks_with_no_copy_with_several_and_with_unlike_ones() -> None:
    """What the comparison of bytes needs, to tell apart the ranks that are kept and the one that keeps."""
    layout = Layout(3, ep=3)
    assert [uneven(layout).firsts(rank) for rank in range(3)] == [(2,), (), (0, 1)]
    own = [rank_bytes(tiny_job().model, layout, "float32", rank).optimizer for rank in range(3)]
    assert own[0] == own[1] > own[2], "eight experts over three ranks"


@pytest.mark.unit
def test_without_second_owners_nothing_is_kept() -> None:
    job, layout = tiny_job(), Layout(4, tp=2, ep=2)
    counted = rank_bytes(job.model, layout, "float64", 1)
    assert counted == allocated(seated_engine(job, layout, 1))
    assert counted.second_copies == 0


@pytest.mark.unit
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("world", "degrees"), [(1, {}), (3, {"ep": 3}), (4, {"tp": 4, "ep": 2, "etp": 2})], ids=str)
def test_of_other_precisions(world: int, degrees: Degrees, precision: str) -> None:
    check(tiny_job(training__precision=precision), Layout(world, **degrees))


@pytest.mark.unit
@pytest.mark.parametrize("shape", SHAPES)
def test_of_other_models(shape: str) -> None:
    check(tiny_job(model=SHAPES[shape]), Layout(4, tp=4, ep=2))
    check(tiny_job(model=SHAPES[shape]), Layout(6, pp=3, tp=2))


@pytest.mark.unit
def test_of_more_than_one_bucket() -> None:
    job = tiny_job(model={"vocab_size": 30000, "hidden_size": 256}, training__precision="bfloat16")
    layout = Layout(2, tp=2)
    groups = [members[0].group for members in plan_buckets(shards(job.model, layout, 0).values())]
    assert groups.count("dp_cp") > 1
    check(job, layout)


@pytest.mark.unit
def test_of_a_published_model() -> None:
    """Two layers of OLMoE, 64 experts over 48, on torch's meta device: its storages have sizes and no memory."""
    model = load_job("jobs/olmoe-1b-7b.yaml").model.model_copy(update={"num_hidden_layers": 2})
    layout = Layout(384, tp=16, ep=48, etp=4)
    for rank in (0, 383):
        groups = seat(layout, rank)
        decoder = Decoder(model, torch.bfloat16, torch.device("meta"), groups, 0)
        parameters: dict[str, Tensor] = dict(decoder.named_tensors())
        buckets = make_buckets(parameters, decoder.shards.values(), groups, 0.1)
        counted = rank_bytes(model, layout, "bfloat16", rank)
        assert counted.weights == sum(tensor.untyped_storage().nbytes() for tensor in parameters.values())
        gradients = [tensor for bucket in buckets for tensor in (bucket.grads, bucket.shard)]
        assert counted.gradients == sum(tensor.untyped_storage().nbytes() for tensor in gradients)
        assert counted.optimizer == sum(3 * bucket.shard.untyped_storage().nbytes() + 4 for bucket in buckets)


def after_two_steps(rank: int, store: Any, job: Job, seating: Seating) -> RankBytes:
    engine, layout = unconfigured(job), seating.layout
    groups = form(layout, rank, store, kv_lanes=kv_copies(job.model, layout.tp))
    engine.adopt(engine.prepare(seating, rank, groups, "initial"))
    engine.fill_seconds()
    for step in (1, 2):
        engine.train_step(step)
    return allocated(engine)


@pytest.mark.dist
def test_a_step_adds_nothing() -> None:
    job, layout = tiny_job(training__precision="float32"), Layout(4, tp=2, ep=2)
    seating = uneven(layout)
    ranks = on_ranks(after_two_steps, 4, job, seating)
    assert ranks == [rank_bytes(job.model, layout, "float32", rank, seating.firsts(rank)) for rank in range(4)]


@pytest.mark.unit
def test_a_byte_too_many_is_seen() -> None:
    layout = Layout(4, ep=2)
    engine = seated_engine(tiny_job(), layout, 3, uneven(layout))
    bucket = engine.reducer.buckets[0]
    counted = allocated(engine)
    bucket.shard = bucket.shard.new_zeros(len(bucket.shard) + 1)
    assert allocated(engine) == replace(counted, gradients=counted.gradients + bucket.shard.element_size())
    received = engine.share.seconds.received[0]
    received[-1] = received[-1].new_zeros(len(received[-1]) + 1)
    kept = counted.second_copies + received[-1].element_size()
    assert allocated(engine).second_copies == kept


@pytest.mark.unit
@given(
    boxes=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5),
    parts=st.integers(1, 9),
)
def test_the_first_rank_of_a_group_has_the_longest_segment(boxes: list[tuple[int, ...]], parts: int) -> None:
    named = {f"p{index}": Box.whole(shape) for index, shape in enumerate(boxes)}
    assert segment_length([rank_slots(named, parts, 0)]) == segment_length(plan_slots(named, parts))


def like(layout: Layout, rank: int) -> tuple[int, ...]:
    """Whose copies the extremes count."""
    return (rank,) if layout.world > 1 else ()


@pytest.mark.unit
@settings(max_examples=40, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4]),
    ep=st.integers(1, 8),
    etp=st.sampled_from([1, 2, 3, 4]),
    replicas=st.integers(1, 3),
)
def test_the_extremes_are_those_of_all_ranks(tp: int, ep: int, etp: int, replicas: int) -> None:
    layout = Layout(lcm(tp, ep * etp) * replicas, tp=tp, ep=ep, etp=etp)
    model = tiny_job().model
    every = [rank_bytes(model, layout, "bfloat16", rank, like(layout, rank)) for rank in range(layout.world)]
    found = extremes(model, layout, "bfloat16")
    totals = [each.total for each in every]
    assert (found.largest, found.smallest) == (totals.index(max(totals)), totals.index(min(totals)))
    assert (found.most, found.least) == (every[found.largest], every[found.smallest])


@pytest.mark.unit
def test_thousands_of_ranks_ask_few() -> None:
    """128 experts over 120 and 16,320 ranks: two kinds of lanes' boxes, two numbers of experts."""
    model = load_job("jobs/qwen3-30b-a3b.yaml").model
    layout = Layout(16320, tp=4, ep=120)
    found = extremes(model, layout, "bfloat16")
    assert found.most == rank_bytes(model, layout, "bfloat16", 16200, [16200])
    assert found.least == rank_bytes(model, layout, "bfloat16", 16319, [16319])
    assert found.most.total > found.least.total


@pytest.mark.unit
def test_one_rank_alone_keeps_nothing_for_others() -> None:
    job = tiny_job()
    found = extremes(job.model, Layout(1), "float64")
    assert found.most == found.least == allocated(seated_engine(job, Layout(1), 0))


@pytest.mark.unit
def test_lanes_share_heads_here() -> None:
    assert kv_copies(tiny_job().model, 4) == 2, "test_bytes_are_the_engine_s wants lanes that share a head"
