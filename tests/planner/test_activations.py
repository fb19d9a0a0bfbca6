"""Does autograd keep what the formulas say, of every kind of layer, with and without computing it again?"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest

from concertina.config import Job
from concertina.layout import Layout
from concertina.model import ModelOutput, Place, experts
from concertina.parallel.recompute import recomputing
from concertina.planner.activations import activations, layer_bytes
from concertina.planner.traffic import Sender
from concertina.schedule.pipeline import training_plan
from concertina.train.pipeline import Backward, MicroBatch, run
from tests.allocations import Living, recorded
from tests.distributed import on_ranks
from tests.train.worlds import engine_on, tiny_job

SEQUENCES, LENGTH = 8, 128
KINDS: list[Any] = [
    "none",
    "selective",
    "full",
    ["norm"],
    ["activation"],
    ["permute"],
    ["core"],
    ["experts"],
    ["experts", "permute"],
    ["attention"],
    ["moe"],
    ["mlp", "norm"],
]
CASES = [*(("float32", kinds) for kinds in KINDS), *(("bfloat16", kinds) for kinds in KINDS[:3])]


def job_of(layers: int, dense: int = 0, **changes: Any) -> Job:
    model = {"num_hidden_layers": layers, "mlp_only_layers": list(range(dense)), "hidden_size": 64, "vocab_size": 53}
    model |= {"moe_intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
    model |= changes.pop("model", {})
    return tiny_job(**{"model": model, "data__sequence_length": LENGTH, "training__precision": "float32", **changes})


def prepared(rank: int, store: Any, job: Job, degrees: dict[str, int]) -> Callable[[], ModelOutput]:
    """The forward of one micro-batch."""
    engine = engine_on(job, Layout(**({"world": 1} | degrees)), rank, store)
    ids = list(range(SEQUENCES))
    tokens, targets = engine.train.read(ids)
    starts = engine.train.starts(ids) if job.data.document_mask else None
    engine.reducer.arm(last=False)

    def compute() -> ModelOutput:
        with recomputing(job.training.recomputed):
            return engine.decoder(tokens, targets, Place(1, 0), starts)

    return compute


def kept(rank: int, store: Any, job: Job, degrees: dict[str, int]) -> int:
    """What a forward leaves for its backward."""
    compute = prepared(rank, store, job, degrees)
    with Living() as living:
        output = compute()
    time.sleep(0.2 if store else 0.0)  # threads of gloo still let go of what they sent
    assert output.loss_sum.requires_grad, "the graph lives until here"
    return living.num_bytes()


def peak(job: Job) -> int:
    """The most there is at once, until the backward has ended."""
    compute = prepared(0, None, job, {})
    with recorded() as found:
        output = compute()
        (output.loss_sum + output.aux_sum + output.z_sum).backward()
    return found.peak_bytes


def of_one_more(job: Job, more: Job) -> float:
    return kept(0, None, more, {}) - kept(0, None, job, {})


def sender_of(job: Job, layout: Layout | None = None, rank: int = 0) -> Sender:
    training = job.training
    how = {"recomputed": training.recomputed, "document_mask": job.data.document_mask}
    return Sender(job.model, layout or Layout(1), rank, training.precision, **how)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("precision", "kinds"),
    [*(("float32", kinds) for kinds in KINDS), *(("bfloat16", kinds) for kinds in KINDS[:3])],
    ids=str,
)
def test_a_layer_with_experts_keeps_what_is_counted(precision: str, kinds: Any) -> None:
    changes = {"training__precision": precision, "training__activation_checkpointing": kinds}
    two, three = (job_of(layers, **changes) for layers in (2, 3))
    counted = layer_bytes(sender_of(three), LENGTH, SEQUENCES, True, "cpu").kept
    assert of_one_more(two, three) == pytest.approx(counted, rel=0.02)


@pytest.mark.unit
@pytest.mark.parametrize("kinds", ["none", "selective", ["mlp"]], ids=str)
def test_a_dense_layer(kinds: Any) -> None:
    less, more = (job_of(layers, dense=layers, training__activation_checkpointing=kinds) for layers in (1, 2))
    counted = layer_bytes(sender_of(more), LENGTH, SEQUENCES, False, "cpu").kept
    assert of_one_more(less, more) == pytest.approx(counted, rel=0.02)


@pytest.mark.unit
@pytest.mark.parametrize("kinds", ["none", ["activation"], ["experts"]], ids=str)
def test_with_the_kernels_of_a_gpu(kinds: Any) -> None:
    """Grouped products run on a CPU too, and in bfloat16 attention is torch's own there."""
    changes = {"training__precision": "bfloat16", "training__activation_checkpointing": kinds}
    two, three = (job_of(layers, **changes) for layers in (2, 3))
    counted = layer_bytes(sender_of(three), LENGTH, SEQUENCES, True, "cuda").kept
    with patch.object(experts, "choose_kernel", lambda *_: experts.experts_grouped_mm):
        assert of_one_more(two, three) == pytest.approx(counted, rel=0.02)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("degrees", "kinds"),
    [
        ({"world": 2, "tp": 2}, "none"),
        ({"world": 2, "tp": 2}, ["norm", "core"]),
        ({"world": 2, "ep": 2}, "selective"),
        ({"world": 2, "etp": 2}, ["activation", "permute"]),
        ({"world": 2, "tp": 2, "ep": 2}, "full"),
        ({"world": 2, "cp": 2}, "none"),
        ({"world": 2, "cp": 2, "ep": 2}, ["core", "norm"]),
    ],
    ids=str,
)
def test_on_a_layout(degrees: dict[str, int], kinds: Any) -> None:
    """Of both ranks together: how many rows each gets is the router's, their sum is not."""
    two, three = (job_of(layers, training__activation_checkpointing=kinds) for layers in (2, 3))
    less, more = (sum(on_ranks(kept, 2, job, degrees)) for job in (two, three))
    layout = Layout(**degrees)
    counted = sum(layer_bytes(sender_of(three, layout, r), LENGTH, SEQUENCES, True, "cpu").kept for r in range(2))
    assert more - less == pytest.approx(counted, rel=0.03)


@pytest.mark.unit
@pytest.mark.parametrize("kinds", ["none", ["core"]], ids=str)
def test_documents_are_attended_to_in_tiles(kinds: Any) -> None:
    changes = {"training__activation_checkpointing": kinds, "data__document_mask": True}
    two, three = (job_of(layers, **changes) for layers in (2, 3))
    counted = layer_bytes(sender_of(three), LENGTH, SEQUENCES, True, "cpu").kept
    assert of_one_more(two, three) == pytest.approx(counted, rel=0.02)


@pytest.mark.unit
@pytest.mark.parametrize(("micro_batches", "in_flight"), [(1, [1, 1, 1]), (2, [2, 2, 1]), (7, [3, 2, 1])])
def test_a_stage_keeps_what_it_has_in_flight(micro_batches: int, in_flight: list[int]) -> None:
    job, layout, row = job_of(6), Layout(3, pp=3), 64 * 4
    for stage, number in enumerate(in_flight):
        sender = sender_of(job, layout, stage)
        of_one = 2 * layer_bytes(sender, LENGTH, 1, True, "cpu").kept + (LENGTH * row if stage < 2 else 0)
        assert activations(sender, LENGTH, 1, "cpu", micro_batches).kept == number * of_one


def kept_by_stages(rank: int, store: Any, job: Job) -> list[int]:
    """What there is after each forward of a step."""
    layout = Layout(2, pp=2, virtual=job.layout.virtual_stages)
    engine = engine_on(job, layout, rank, store)
    plan, view = training_plan(2, layout.virtual, 4), engine.train
    backward = Backward(engine._objective, engine.reducer, job.training.recomputed)
    pieces = [
        MicroBatch(SEQUENCES, LENGTH, partial(engine._batch, view, [*range(first, first + SEQUENCES)], Place(1, first)))
        for first in range(0, 4 * SEQUENCES, SEQUENCES)
    ]
    engine.reducer.begin()
    with Living() as living:
        return [living.num_bytes() for _ in run(engine.decoder, plan, pieces, backward)]


@pytest.mark.dist
@pytest.mark.parametrize("kinds", ["none", "full"])
@pytest.mark.parametrize("virtual", [1, 2])
def test_of_a_real_stage(virtual: int, kinds: str) -> None:
    """The first one's first two forwards, before anything has come back; tokens and targets are a few percent more."""
    job = job_of(8, training__activation_checkpointing=kinds, layout={"virtual_stages": virtual, "pp": 2})
    layout = Layout(2, pp=2, virtual=virtual)
    first, second, *_ = on_ranks(kept_by_stages, 2, job)[0]
    of_a_piece = activations(sender_of(job, layout), LENGTH, SEQUENCES, "cpu", 1).kept / virtual
    assert of_a_piece < second - first < 1.06 * of_a_piece


@pytest.mark.unit
def test_interleaved_pieces_keep_more() -> None:
    job = job_of(8)
    usual, interleaved = (
        activations(sender_of(job, Layout(2, pp=2, virtual=virtual)), LENGTH, 1, "cpu", 8).kept for virtual in (1, 2)
    )
    assert usual < interleaved <= 2 * usual


@pytest.mark.unit
def test_the_peak_of_a_step_falls_as_predicted() -> None:
    """Six layers: what all keep, and the one that is computed again."""
    peaks, counted = {}, {}
    for kinds in ("none", "selective", "full"):
        job = job_of(6, training__activation_checkpointing=kinds)
        peaks[kinds] = peak(job)
        counted[kinds] = activations(sender_of(job), LENGTH, SEQUENCES, "cpu").peak
    for kinds in ("selective", "full"):
        assert peaks["none"] - peaks[kinds] == pytest.approx(counted["none"] - counted[kinds], rel=0.1)
    assert peaks["full"] < peaks["selective"] < peaks["none"]
