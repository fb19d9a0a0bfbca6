"""Do routers and attention's variants know nothing of the layout, and does a bias move with the global batch?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from concertina.config import Job
from concertina.errors import CheckpointError
from concertina.layout import Layout
from concertina.model import Place
from concertina.model.norm import Pieces
from concertina.parallel.collectives import all_reduce_sum
from concertina.parallel.lanes import Lanes
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes
from concertina.state.manifest import checkpoint_folder
from concertina.train.engine import Engine
from concertina.train.loop import STOP
from tests.distributed import on_ranks
from tests.train.test_layouts import assemble, check, gradients_of, odd_job, one_process
from tests.train.test_loop import losses, run
from tests.train.worlds import Degrees, engine_on, tiny_job

pytestmark = pytest.mark.dist

RATE = 0.03  # moves tokens at once: the scores of these small models lie close together
BIASED = {"model__scoring_func": "sigmoid", "model__router_bias_update_rate": RATE}
GROUPED = {**BIASED, "model__n_group": 4, "model__topk_group": 2, "model__routed_scaling_factor": 2.5}
NOISY = {"model__router_noise": True}
STEPS = 5

# -- losses and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [(2, 2, 1, 1), (3, 1, 3, 1), (4, 2, 2, 2)], ids=str)
def test_sigmoid_with_bias_and_groups(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10, **GROUPED)


@pytest.mark.parametrize("degrees", [(2, 2, 1, 1), (3, 1, 1, 1), (4, 2, 2, 2)], ids=str)
def test_noise(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10, **NOISY)


@pytest.mark.parametrize("changes", [GROUPED, NOISY], ids=["grouped", "noisy"])
def test_lanes_that_hold_the_same_tokens(changes: dict[str, Any]) -> None:
    check((4, 2, 4, 1), "float64", 1e-10, **changes, layout={"sequence_parallel": False})


@pytest.mark.parametrize("degrees", [(1, 1, 1, 1), (2, 2, 1, 1), (3, 1, 3, 1)], ids=str)
def test_noise_in_micro_batches(degrees: Degrees) -> None:
    check(degrees, "float64", 1e-10, **NOISY, training__micro_batch_size=1)


def test_noise_in_fp32_and_when_it_is_off() -> None:
    """Validation is quiet; training is not; one step of fp32 is as near as without noise."""
    check((2, 2, 1, 1), "float32", 1e-5, **NOISY)
    noisy, quiet = engine_on(tiny_job(**NOISY), Layout(1), 0, None), engine_on(tiny_job(), Layout(1), 0, None)
    assert noisy.evaluate() == quiet.evaluate()
    assert abs(noisy.train_step(1).loss - quiet.train_step(1).loss) > 1e-6


ATTENTION = [
    ((4, 4, 1, 1), {"model__qk_norm": "full"}),  # two key-value heads: lanes share one
    ((2, 2, 2, 1), {"model__qk_norm": "head"}),
    ((4, 4, 1, 1), {"model__attention_bias": True}),
    ((4, 4, 4, 1), {"model__attention_bias": True, "model__qk_norm": "full", "model__clip_qkv": 0.3}),
    ((2, 2, 1, 1), {"model__shared_expert_gate": True}),
    ((4, 4, 2, 1), {"model__shared_expert_gate": True, "model__scoring_func": "sigmoid"}),
]


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence-parallel", "replicated"])
@pytest.mark.parametrize(("degrees", "changes"), ATTENTION)
def test_attention_and_shared_experts(degrees: Degrees, changes: dict[str, Any], sequence_parallel: bool) -> None:
    check(degrees, "float64", 1e-10, **changes, layout={"sequence_parallel": sequence_parallel})


# -- mutations: each must be seen --------------------------------------------------------------------------------------


def misplaced(engine: Engine, view: Any, ids: list[int], place: Place | None = None) -> Any:
    return compute(engine, view, ids, replace(place, first=0) if place else None)


compute = Engine._batch
MUTATIONS: dict[str, tuple[type, str, Callable[..., Any], Degrees, dict[str, Any]]] = {
    "noise of the first micro-batch": (Engine, "_batch", misplaced, (2, 1, 1, 1), NOISY),
    "a key-value head counted by every lane that has it": (
        *(Pieces, "total", lambda self, partial: all_reduce_sum(partial, self.group).finish()),
        *((4, 4, 1, 1), {"model__qk_norm": "full"}),
    ),
    "a gate counted by every lane": (
        *(Lanes, "count_once", lambda self, x: x),
        *((2, 2, 1, 1), {"model__shared_expert_gate": True, "layout": {"sequence_parallel": False}}),
    ),
}


def mutated(rank: int, store: Any, job: Job, degrees: Degrees, mutation: str) -> dict[str, Any]:
    place, name, instead = MUTATIONS[mutation][:3]
    with patch.object(place, name, instead):
        return gradients_of(rank, store, job, degrees)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_seen(mutation: str) -> None:
    *_, degrees, changes = MUTATIONS[mutation]
    found = assemble(on_ranks(mutated, degrees[0], odd_job(**changes), degrees, mutation))
    changes = {key: value for key, value in changes.items() if key != "layout"}
    expected = assemble([one_process("float64", **changes)])
    assert max((found[name] - tensor).abs().max() / tensor.abs().max() for name, tensor in expected.items()) > 1e-3


# -- the bias ----------------------------------------------------------------------------------------------------------


def biases_of(rank: int, store: Any, job: Job, degrees: Degrees, mutation: str = "") -> dict[str, Any]:
    """Each router's bias after every step, the counts of this rank, and which boxes of buffers this rank saves."""
    world, tp, ep, etp = degrees
    engine = engine_on(job, Layout(world, tp=tp, ep=ep, etp=etp), rank, store)
    counts, biases = [], []
    compute = engine._forward_backward

    def watched(step: int) -> Any:
        sums = compute(step)
        counts.append(sums[5:].numpy().reshape(-1, job.model.num_experts).copy())
        return sums

    engine._forward_backward = watched  # type: ignore[method-assign]
    if mutation:
        balance = engine.decoder.balance
        engine.decoder.balance = lambda _: balance(torch.from_numpy(counts[-1]))
    for step in range(1, STEPS + 1):
        engine.train_step(step)
        biases.append({name: bias.tolist() for name, bias in engine.decoder.router_biases().items()})
    owned = [key for key in engine.state() if key.startswith("buffer/")]
    return {"biases": biases, "counts": counts, "owned": owned, "parameters": sorted(engine.shards)}


def by_hand(counts_of_steps: list[Any]) -> list[list[list[float]]]:
    bias, after = np.zeros_like(counts_of_steps[0]), []
    for counts in counts_of_steps:
        bias = bias + RATE * np.sign(counts.mean(1, keepdims=True) - counts)
        after.append(bias.tolist())
    return after


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return biases_of(0, None, tiny_job(**BIASED), (1, 1, 1, 1))


def test_a_bias_moves_as_by_hand(alone: dict[str, Any]) -> None:
    assert [list(biases.values()) for biases in alone["biases"]] == by_hand(alone["counts"])
    assert list(alone["biases"][-1]) == ["layers.1.moe.bias", "layers.2.moe.bias"]
    job = tiny_job(**BIASED)
    tokens = job.training.global_batch_size * job.data.sequence_length
    assert [counts.sum(1).tolist() for counts in alone["counts"]] == [[tokens * 2.0] * 2] * STEPS
    assert not any(name.endswith("bias") for name in alone["parameters"])


@pytest.mark.parametrize(
    ("degrees", "sequence_parallel"),
    [((2, 2, 1, 1), True), ((2, 2, 1, 1), False), ((2, 1, 2, 1), True), ((3, 1, 3, 1), True), ((4, 2, 2, 2), True)],
)
def test_a_bias_is_the_same_bits_everywhere(degrees: Degrees, sequence_parallel: bool, alone: dict[str, Any]) -> None:
    job = tiny_job(**BIASED, layout={"sequence_parallel": sequence_parallel})
    ranks = on_ranks(biases_of, degrees[0], job, degrees)
    assert all(rank["biases"] == alone["biases"] for rank in ranks)
    summed = [sum(parts) for parts in zip(*(rank["counts"] for rank in ranks), strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(summed, alone["counts"], strict=True)), "each token once"
    owned = ["buffer/layers.1.moe.bias", "buffer/layers.2.moe.bias"]
    assert [rank["owned"] for rank in ranks] == [owned, *[[]] * (degrees[0] - 1)]


def test_micro_batches_and_a_bias(alone: dict[str, Any]) -> None:
    found = biases_of(0, None, tiny_job(**BIASED, training__micro_batch_size=3), (1, 1, 1, 1))
    assert found["biases"] == alone["biases"]


def test_a_bias_by_the_counts_of_one_rank_is_seen(alone: dict[str, Any]) -> None:
    ranks = on_ranks(biases_of, 2, tiny_job(**BIASED), (2, 1, 1, 1), "its own counts")
    assert all(rank["biases"] != alone["biases"] for rank in ranks)


def test_a_skipped_step_moves_no_bias() -> None:
    engine = engine_on(tiny_job(**BIASED, training__anomaly={"nonfinite": "skip"}), Layout(1), 0, None)
    compute = engine._forward_backward

    def poisoned(step: int) -> Any:
        sums = compute(step)
        sums[0] = float("nan") if step == 2 else sums[0]
        return sums

    engine._forward_backward = poisoned  # type: ignore[method-assign]
    seen = []
    for step in (1, 2, 3):
        engine.train_step(step)
        seen.append([bias.tolist() for bias in engine.decoder.router_biases().values()])
    assert seen[0] == seen[1]
    assert seen[1] != seen[2]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saved_biases(folder: Path) -> list[list[float]]:
    engine = engine_on(tiny_job(**BIASED), Layout(1), 0, None)
    boxes = {key: boxed for key, boxed in engine.state().items() if key.startswith("buffer/")}
    load_boxes(folder, boxes)
    return [boxed.piece.tolist() for boxed in boxes.values() if isinstance(boxed, BoxedTensor)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    root = tmp_path_factory.mktemp("biased")
    return root, losses(run(0, None, tiny_job(**BIASED), root, 1, 1, {}, None)[0])


def test_resume_goes_on_bitwise(uninterrupted: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    root, expected = uninterrupted
    stopped = losses(run(0, None, tiny_job(**BIASED), tmp_path, 1, 1, {7: STOP}, None)[0])
    again = losses(run(0, None, tiny_job(**BIASED), tmp_path, 1, 1, {}, 7)[0])
    assert stopped | again == expected
    last = [saved_biases(checkpoint_folder(folder, 20)) for folder in (root, tmp_path)]
    assert last[0] == last[1]
    assert any(abs(value) > RATE for layer in last[0] for value in layer)


@pytest.mark.parametrize(("world", "ep"), [(4, 2), (3, 3)])
def test_any_layout_reads_any_layouts_bias(
    world: int, ep: int, uninterrupted: tuple[Path, dict[int, float]], tmp_path: Path
) -> None:
    """One process writes step 5, a folded world goes on to 12, one process finishes: the same bias, bit for bit."""
    job, (root, expected) = tiny_job(**BIASED), uninterrupted
    run(0, None, job, tmp_path, 1, 1, {5: STOP}, None)
    found = losses(on_ranks(run, world, job, tmp_path, world, ep, {12: STOP}, 5)[0][0])
    found |= losses(run(0, None, job, tmp_path, 1, 1, {}, 12)[0])
    assert list(found) == list(range(6, 21))
    assert all(loss == pytest.approx(expected[step], rel=1e-10) for step, loss in found.items())
    last = [saved_biases(checkpoint_folder(folder, 20)) for folder in (root, tmp_path)]
    assert last[0] == last[1]


def test_a_bias_is_neither_lost_nor_made_up(uninterrupted: tuple[Path, dict[int, float]], tmp_path: Path) -> None:
    plain = engine_on(tiny_job(), Layout(1), 0, None)
    with pytest.raises(CheckpointError, match=r"set model\.router_bias_update_rate"):
        plain.load(checkpoint_folder(uninterrupted[0], 20))
    run(0, None, tiny_job(), tmp_path, 1, 1, {1: STOP}, None)
    with pytest.raises(CheckpointError, match=r"has no tensor buffer/layers\.1\.moe\.bias"):
        engine_on(tiny_job(**BIASED), Layout(1), 0, None).load(checkpoint_folder(tmp_path, 1))


def same_noise(rank: int, store: Any, job: Job, root: Path) -> tuple[float, float]:
    """Loss of step 6 as it came, and after going back to step 5."""
    engine = engine_on(job, Layout(2), rank, store)
    engine.load(checkpoint_folder(root, 5))
    first = engine.train_step(6).loss
    engine.load(checkpoint_folder(root, 5))
    return first, engine.train_step(6).loss


def test_a_step_done_again_draws_the_same_noise(tmp_path: Path) -> None:
    sent, _ = run(0, None, tiny_job(**NOISY), tmp_path, 1, 1, {6: STOP}, None)
    for first, again in on_ranks(same_noise, 2, tiny_job(**NOISY), tmp_path):
        assert first == again == pytest.approx(losses(sent)[6], rel=1e-10)
