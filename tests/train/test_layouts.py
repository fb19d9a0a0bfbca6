"""Does the layout change the mathematics? Every axis alone, in pairs, together; uneven worlds, experts, sequences."""

from __future__ import annotations

from ast import literal_eval
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch

from concertina.config import Job
from concertina.errors import LayoutError
from concertina.layout import ENDS, Layout, check_job
from concertina.model import loss as loss_module
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes
from tests.distributed import on_ranks
from tests.train.worlds import LATENT, Degrees, engine_on, layout_of, plainest, record_drops, tiny_job

pytestmark = pytest.mark.dist

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


def odd_job(**changes: Any) -> Job:
    """Seven sequences of eleven tokens: lanes get unequal numbers of them, and no lane whole sequences only."""
    return tiny_job(**{"training__global_batch_size": 7, "data__sequence_length": 11, **changes})


def all_degrees(most_ranks: int) -> list[Degrees]:
    """Every layout of the tiny job that fits up to so many ranks."""
    found = []
    for world, tp, ep, etp in product(range(2, most_ranks + 1), *(range(1, most_ranks + 1),) * 3):
        cluster = {"num_workers": world, "num_nodes": 1}
        try:
            check_job(tiny_job(cluster=cluster, layout={"tp": tp, "ep": ep, "etp": etp}))
        except LayoutError:
            continue
        found.append((world, tp, ep, etp))
    return found


def gradients_of(
    rank: int, store: Any, job: Job, degrees: Degrees, mutation: str = "", loads: tuple[int, ...] = ()
) -> dict[str, Any]:
    """This rank's pieces of the summed gradients of step 1, what two steps and a validation say, and what
    all of it dropped."""
    engine = engine_on(job, layout_of(degrees), rank, store)
    engine.share.seating = replace(engine.share.seating, loads=loads)
    drops = record_drops(engine)
    _mutate(engine, mutation)
    engine._forward_backward(1)
    found = {}
    for bucket, shard in zip(engine.reducer.buckets, engine.reducer.finish(), strict=True):
        for name, (slot, view) in bucket.own_views(shard).items():
            found[name] = (slot.box, engine.shards[name].global_shape, view.numpy().copy())
    results = [engine.train_step(step) for step in (1, 2)]
    facts = [(r.loss, r.grad_norm, r.aux_loss, r.z_loss, r.tokens, r.imbalance, r.dropped) for r in results]
    return {"gradients": found, "facts": facts, "validation": engine.evaluate(), "drops": drops}


def _mutate(engine: Any, mutation: str) -> None:
    """Break one thing that a layout needs."""
    if mutation in ("dp_cp", "dp_cp_kv", "dp_cp_tp", "edp"):  # a sum that one rank of the group does not join in
        for bucket in engine.reducer.buckets:
            if bucket.group.name == mutation and bucket.group.rank == 0:
                bucket.accumulate = lambda name, grad, add=bucket.accumulate: add(name, torch.zeros_like(grad))
    elif mutation == "a lane of etp is not summed":
        dispatcher, silent = engine.decoder.layers[1].moe.dispatcher, float(engine.groups["etp"].rank == 0)
        combine = dispatcher.start_combine
        dispatcher.start_combine = lambda received, out, weights: combine(received, out * silent, weights)
    elif mutation == "lanes of tp count the loss each":
        engine.decoder.build.lanes.__class__ = type("Speaking", (Lanes,), {"speaks": True})
    elif mutation == "expert gradients divided by tp":
        for layer in engine.decoder.layers[1:]:
            layer.moe.experts.w2.register_hook(lambda grad: grad / engine.layout.tp)
    elif mutation == "latents of this lane's tokens only":
        for layer in engine.decoder.layers:
            layer.attention.latents.kv_down.register_hook(lambda grad: grad * float(engine.groups["tp"].rank == 0))
    elif mutation == "balance by this lane's counts":
        gate = engine.decoder.layers[1].moe.gate
        gate.build = replace(gate.build, groups=Groups.alone())
    elif mutation == "positions as if chunks were neighbours":
        context, positions = engine.decoder.build.context, engine.decoder.build.context.positions
        context.positions = lambda *arguments: torch.arange(len(positions(*arguments)))
    elif mutation == "a shared embedding has the first stage's gradient only":
        for bucket in engine.reducer.buckets:
            if bucket.group.name == ENDS and bucket.group.rank:
                bucket.accumulate = lambda name, grad, add=bucket.accumulate: add(name, torch.zeros_like(grad))
    elif mutation == "gradients of keys stay where they are made":
        context = engine.decoder.build.context
        context.scatter = lambda x, length: torch.cat([x[start:stop] for start, stop in context.chunks(length)])
    else:
        assert not mutation, mutation


def assemble(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, (box, shape, piece) in rank["gradients"].items():
            piece = torch.from_numpy(piece)
            whole.setdefault(name, torch.full(shape, float("nan"), dtype=piece.dtype))[box.slices()] = piece
    return whole


def one_process(precision: str, **changes: Any) -> dict[str, Any]:
    """What a world of one says of the odd job with those of the changes that are mathematics; computed once."""
    mathematics = {key: value for key, value in changes.items() if key not in ("layout", "training__micro_batch_size")}
    return _one_process(precision, repr(mathematics))


@cache
def _one_process(precision: str, changes: str) -> dict[str, Any]:
    job = plainest(odd_job(training__precision=precision, **literal_eval(changes)))
    return gradients_of(0, None, job, (1, 1, 1, 1))


def worst_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error of a tensor, relative to its largest element, and which tensor it is."""
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - wanted).abs().max() / wanted.abs().max() for name, wanted in expected.items()}
    worst = max(errors, key=lambda name: float(errors[name].nan_to_num(nan=float("inf"))))
    return float(errors[worst]), worst


def check(degrees: Degrees, precision: str, bound: float, loads: tuple[int, ...] = (), **changes: Any) -> None:
    """Loss, every gradient, every drop of a step, and in float64 two whole steps and a validation, equal one process,
    which takes the batch as a whole."""
    reference = one_process(precision, **changes)
    ranks = on_ranks(gradients_of, degrees[0], odd_job(training__precision=precision, **changes), degrees, "", loads)
    error, where = worst_error(assemble(ranks), assemble([reference]))
    assert error < bound, f"{where}: {error:.2e}"
    assert set().union(*(rank["drops"] for rank in ranks)) == reference["drops"]
    for rank in ranks:
        assert rank["facts"][0] == pytest.approx(reference["facts"][0], rel=bound)
        if precision == "float64":
            assert rank["facts"][1] == pytest.approx(reference["facts"][1], rel=bound)
            assert rank["validation"] == pytest.approx(reference["validation"], rel=bound)


@pytest.mark.parametrize("degrees", TESTED, ids=str)
def test_loss_and_every_gradient_equal_one_process(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10)


@pytest.mark.parametrize(
    ("degrees", "loads"),
    [((3, 1, 3, 1), (1000, 250, 1000)), ((4, 2, 2, 1), (1, 3)), ((4, 1, 2, 1, 1, 2), (5, 2))],
    ids=str,
)
def test_who_is_slower_gets_fewer_sequences(degrees: Degrees, loads: tuple[int, ...]) -> None:
    check(degrees, "float64", 1e-10, loads)
    check(degrees, "float64", 1e-10, loads, training__micro_batch_size=1)


@pytest.mark.parametrize("degrees", [(4, 4, 1, 1), (4, 2, 2, 2)], ids=str)
def test_and_in_fp32_for_one_step(degrees: Degrees) -> None:
    check(degrees, "float32", 1e-5)


@pytest.mark.parametrize("degrees", [(2, 2, 1, 1), (4, 4, 1, 1), (4, 2, 2, 2)], ids=str)
def test_lanes_that_hold_the_same_tokens(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10, layout={"sequence_parallel": False})


@pytest.mark.parametrize("degrees", [(2, 2, 1, 1), (4, 4, 2, 1), (3, 1, 3, 1), (4, 2, 2, 2)], ids=str)
def test_latent_attention(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10, model=LATENT)


@pytest.mark.parametrize("query", [24, 0])
def test_latents_of_lanes_that_hold_the_same_tokens(query: int) -> None:
    check((2, 2, 1, 1), "float64", 1e-10, model={**LATENT, "q_lora_rank": query}, layout={"sequence_parallel": False})


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_on_a_folded_layout(micro: int) -> None:
    check((4, 2, 4, 1), "float64", 1e-10, training__micro_batch_size=micro)


def loss_in_chunks(rank: int, store: Any, changes: dict[str, Any], tp: int) -> tuple[float, float]:
    """Loss and norm of a step whose logits are made a few tokens at a time."""
    with patch.object(loss_module, "_CHUNK_LOGITS", 300):
        result = engine_on(odd_job(**changes), Layout(tp, tp=tp), rank, store).train_step(1)
    return result.loss, result.grad_norm


@pytest.mark.parametrize("tied", [False, True])
def test_lanes_with_unequal_rows_of_the_vocabulary_take_the_same_chunks(tied: bool) -> None:
    """97 rows are 49 and 48: 300 logits are 6 tokens of either."""
    changes = {"model__tie_word_embeddings": tied}
    expected = loss_in_chunks(0, None, changes, 1)
    for found in on_ranks(loss_in_chunks, 2, changes, 2):
        assert found == pytest.approx(expected, rel=1e-10)


def weights_in_bfloat16(rank: int, store: Any, changes: dict[str, Any], degrees: Degrees) -> dict[str, Any]:
    """After three steps: every weight's box and the bits in it."""
    job = odd_job(training__precision="bfloat16", **changes)
    engine = engine_on(job, layout_of(degrees), rank, store)
    for step in (1, 2, 3):
        engine.train_step(step)
    engine.settle()
    bits = {name: tensor.detach().view(torch.int16).numpy().copy() for name, tensor in engine.decoder.named_tensors()}
    return {name: (engine.shards[name].box, piece) for name, piece in bits.items()}


@pytest.mark.parametrize("changes", [{}, {"layout": {"sequence_parallel": False}}], ids=str)
@pytest.mark.parametrize("degrees", [(4, 4, 2, 1), (4, 2, 2, 2)], ids=str)
def test_bfloat16_weights_are_the_same_bits_wherever_they_are_held(degrees: Degrees, changes: dict[str, Any]) -> None:
    held: dict[Any, list[Any]] = {}
    for rank in on_ranks(weights_in_bfloat16, degrees[0], changes, degrees):
        for name, (box, piece) in rank.items():
            held.setdefault((name, box), []).append(piece)
    assert max(map(len, held.values())) == degrees[0]
    for (name, _), pieces in held.items():
        assert all((piece == pieces[0]).all() for piece in pieces), name


@pytest.mark.parametrize(
    ("degrees", "mutation"),
    [
        ((2, 1, 1, 1), "dp_cp"),
        ((4, 4, 1, 1), "dp_cp_kv"),
        ((2, 2, 1, 1), "dp_cp_tp"),
        ((4, 2, 2, 1), "edp"),
        ((2, 1, 1, 2), "a lane of etp is not summed"),
        ((2, 2, 1, 1), "lanes of tp count the loss each"),
        ((2, 2, 2, 1), "expert gradients divided by tp"),
        ((2, 2, 1, 1), "balance by this lane's counts"),
    ],
)
def test_a_mutation_is_seen(degrees: Degrees, mutation: str) -> None:
    reference = one_process("float64")
    ranks = on_ranks(gradients_of, degrees[0], odd_job(), degrees, mutation)
    error, _ = worst_error(assemble(ranks), assemble([reference]))
    assert error > 1e-6 or ranks[0]["facts"][0] != pytest.approx(reference["facts"][0], rel=1e-6)


def test_a_mutation_of_latent_attention_is_seen() -> None:
    mutation = "latents of this lane's tokens only"
    ranks = on_ranks(gradients_of, 2, odd_job(model=LATENT), (2, 2, 1, 1), mutation)
    error, where = worst_error(assemble(ranks), assemble([one_process("float64", model=LATENT)]))
    assert error > 1e-6
    assert where.endswith("kv_down")


def test_seven_ranks_train_eight_experts_on_32_sequences() -> None:
    """No degree but 1 divides both: shares of sequences and experts are uneven."""
    check((7, 1, 7, 1), "float64", 1e-10, training__global_batch_size=32)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", range(2, 9))
def test_every_layout_of_a_world(world: int) -> None:
    """All that fit (79 up to a world of 8), in both precisions, with dropping, and where there are lanes of tp also
    with the same tokens on each."""
    chosen = [degrees for degrees in all_degrees(8) if degrees[0] == world]
    assert chosen or world in (5, 7)
    for degrees in [(world, 1, 1, 1), *chosen]:
        check(degrees, "float64", 1e-10)
        check(degrees, "float32", 1e-5)
        for priority in ("position", "probability"):
            rule = {"factor": 0.8, "group_sequences": 1, "priority": priority}
            check(degrees, "float64", 1e-10, model__capacity=rule)
        check(degrees, "float64", 1e-10, model=LATENT)
        if degrees[1] > 1:
            check(degrees, "float64", 1e-10, layout={"sequence_parallel": False})
