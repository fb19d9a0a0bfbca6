"""Do pipeline stages change the mathematics? Uneven layers, interleaved, embeddings shared, with every other axis."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch

from concertina.config import Job
from concertina.errors import LayoutError
from concertina.layout import check_job
from concertina.model.deferred import deferring
from concertina.parallel.stages import Mailbox
from concertina.schedule.pipeline import Action
from tests.distributed import on_ranks
from tests.train.test_layouts import assemble, gradients_of, odd_job, one_process, worst_error
from tests.train.test_layouts import check as check_layout
from tests.train.worlds import Degrees, engine_on, layout_of

pytestmark = pytest.mark.dist


def check(degrees: Degrees, precision: str, bound: float, **changes: Any) -> None:
    """In micro-batches of one sequence, or of one capacity group."""
    rule = changes.get("model__capacity", {})
    check_layout(degrees, precision, bound, **{"training__micro_batch_size": rule.get("group_sequences", 1), **changes})


TESTED: list[Degrees] = [
    (2, 1, 1, 1, 1, 2),  # three layers on two stages
    (3, 1, 1, 1, 1, 3),
    (4, 1, 1, 1, 1, 2),  # with dp
    (4, 2, 2, 1, 1, 2),
    (4, 1, 2, 1, 2, 2),
    (8, 2, 2, 2, 2, 2),
    (6, 1, 3, 1, 1, 2),
]


@pytest.mark.parametrize("degrees", TESTED, ids=str)
def test_loss_and_every_gradient_equal_one_process(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10)


DEEP: dict[str, Any] = {"model__num_hidden_layers": 5, "model__mlp_only_layers": [0, 3]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "degrees",
    [
        (2, 1, 1, 1, 1, 2, 2),  # four pieces of five layers
        (4, 2, 2, 1, 1, 2, 2),
        (3, 1, 1, 1, 1, 3),
        (2, 1, 1, 1, 1, 2, 1, 1, 4),
        (4, 1, 2, 1, 1, 2, 2, 1, 1, 2, 1),
    ],
    ids=str,
)
def test_pieces_of_any_size_and_a_shared_embedding(degrees: Degrees, tied: bool) -> None:
    check(degrees, "float64", 1e-10, model__tie_word_embeddings=tied, **DEEP)


@pytest.mark.parametrize("micro", [1, 2, 7])
@pytest.mark.parametrize("degrees", [(2, 1, 1, 1, 1, 2), (4, 1, 1, 1, 1, 2, 2)], ids=str)
def test_micro_batches_change_nothing(degrees: Degrees, micro: int) -> None:
    """Seven sequences, in the second layout four and three."""
    check(degrees, "float64", 1e-10, training__micro_batch_size=micro, **DEEP)


def all_deferred(rank: int, store: Any, job: Job, degrees: Degrees) -> dict[str, Any]:
    """As `gradients_of`, every weight's gradient computed later: while other pieces' last ones come."""
    engine = engine_on(job, layout_of(degrees), rank, store)
    backward = type(engine.reducer).arm

    def run_some(reducer: Any, *arguments: Any) -> None:
        backward(reducer, *arguments)
        while len(engine.deferred) > 3:
            engine.deferred.run_next()

    with patch.object(type(engine.reducer), "arm", run_some), deferring(engine.deferred):
        engine._forward_backward(1)
        engine.deferred.run()
    found = {}
    for bucket, shard in zip(engine.reducer.buckets, engine.reducer.finish(), strict=True):
        for name, (slot, view) in bucket.own_views(shard).items():
            found[name] = (slot.box, engine.shards[name].global_shape, view.numpy().copy())
    return {"gradients": found}


def test_late_gradients_of_one_piece_come_among_those_of_another() -> None:
    ranks = on_ranks(all_deferred, 2, odd_job(training__micro_batch_size=1, **DEEP), (2, 1, 1, 1, 1, 2, 2))
    assert worst_error(assemble(ranks), assemble([one_process("float64", **DEEP)]))[0] < 1e-10


def test_and_in_fp32_for_one_step() -> None:
    check((4, 2, 2, 1, 1, 2), "float32", 1e-5)


@pytest.mark.parametrize("priority", ["position", "probability"])
def test_the_same_tokens_are_dropped(priority: str) -> None:
    rule = {"factor": 0.9, "priority": priority, "group_sequences": 2}
    changes = {"model__capacity": rule, "training__global_batch_size": 8}
    check((8, 2, 2, 1, 2, 2), "float64", 1e-10, **changes)
    check((4, 2, 2, 1, 1, 2), "float64", 1e-10, layout={"sequence_parallel": False}, **changes)


def test_routers_are_balanced_and_noisy_on_their_stages() -> None:
    changes = {"model__router_noise": True, "model__router_bias_update_rate": 0.01, "model__scoring_func": "sigmoid"}
    check((4, 1, 2, 1, 1, 2, 2), "float64", 1e-10, **changes, **DEEP)


take = Mailbox.take


def stale(mailbox: Mailbox, action: Action) -> torch.Tensor | None:
    """Of gradients, always the first."""
    x = take(mailbox, action)
    if x is None or action.direction == "forward":
        return x
    mailbox.first = getattr(mailbox, "first", x)  # type: ignore[attr-defined]
    return mailbox.first  # type: ignore[attr-defined, no-any-return]


def mutated(rank: int, store: Any, job: Job, degrees: Degrees, mutation: str) -> dict[str, Any]:
    if mutation != "gradients of another micro-batch":
        return gradients_of(rank, store, job, degrees, mutation)
    with patch.object(Mailbox, "take", stale):
        return gradients_of(rank, store, job, degrees)


@pytest.mark.parametrize(
    ("degrees", "mutation"),
    [
        ((2, 1, 1, 1, 1, 2), "gradients of another micro-batch"),
        ((2, 1, 1, 1, 1, 2), "a shared embedding has the first stage's gradient only"),
        ((4, 1, 1, 1, 1, 2), "dp_cp"),
    ],
)
def test_a_mutation_is_seen(degrees: Degrees, mutation: str) -> None:
    changes = {"model__tie_word_embeddings": True}
    job = odd_job(training__micro_batch_size=1, **changes)
    found = assemble(on_ranks(mutated, degrees[0], job, degrees, mutation))
    assert worst_error(found, assemble([one_process("float64", **changes)]))[0] > 1e-6


# -- samples of all of them -------------------------------------------------------------------------------------------


def sampled(count: int, most_ranks: int) -> list[Degrees]:
    """Layouts of a model of six layers, drawn with a fixed seed: all axes, interleaved, uneven."""
    random, found = Random(5), []
    while len(found) < count:
        world = random.randint(1, most_ranks)
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        pp, tp, cp, ep, etp = (random.choice(divisors) for _ in range(5))
        virtual = random.randint(1, 3) if pp > 1 else 1
        stages: tuple[int, ...] = ()
        if 1 < pp * virtual <= 6 and random.random() < 0.5:
            edges = sorted(random.sample(range(1, 6), pp * virtual - 1))
            stages = tuple(b - a for a, b in pairwise((0, *edges, 6)))
        layout = {"pp": pp, "cp": cp, "tp": tp, "ep": ep, "etp": etp, "virtual_stages": virtual}
        if stages:
            layout["stage_layers"] = list(stages)
        try:
            check_job(odd_job(cluster={"num_workers": world, "num_nodes": 1}, layout=layout, **SIX))
        except LayoutError:
            continue
        degrees = (world, tp, ep, etp, cp, pp, virtual, *stages)
        if degrees not in found:
            found.append(degrees)
    return found


SIX: dict[str, Any] = {"model__num_hidden_layers": 6, "model__mlp_only_layers": [0, 3]}


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("degrees", sampled(64, 16), ids=str)
def test_samples_of_all_axes(degrees: Degrees) -> None:
    tied, ring = len(degrees) % 2 == 1, degrees[0] % 3 == 0
    changes = {"model__tie_word_embeddings": tied, "layout": {"context_exchange": "ring" if ring else "gather"}, **SIX}
    check(degrees, "float64", 1e-10, **changes)
    check(degrees, "float32", 1e-5, **changes)
