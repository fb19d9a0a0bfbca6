"""Does the layout change the mathematics? Losses, gradients and weights under every layout equal one process's."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import psutil
import pytest
import torch
import torch.distributed as dist

from concertina.config import Job
from concertina.data import MixtureView, Part, parts_of
from concertina.layout import Layout
from concertina.train.engine import Engine
from tests.distributed import run_distributed
from tests.train.worlds import TinyView, engine_on, tiny_job

pytestmark = pytest.mark.dist

LAYOUTS = [(4, 1), (4, 2), (4, 4), (3, 3), (2, 2), (5, 1)]


def losses_of(rank: int, store: Any, job: Job, world: int, ep: int, steps: int) -> dict[str, Any]:
    engine = engine_on(job, Layout(world, ep=ep), rank, store)
    results = [engine.train_step(step) for step in range(1, steps + 1)]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "auxiliary": [(result.aux_loss, result.z_loss, result.imbalance) for result in results],
        "acknowledged": [result.acknowledged for result in results],
        "validation": engine.evaluate(),
    }


def one_process(job: Job, steps: int) -> dict[str, Any]:
    return losses_of(0, None, job, 1, 1, steps)


def relative(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return one_process(tiny_job(), 20)


def test_the_reference_learns(reference: dict[str, Any]) -> None:
    assert reference["losses"][-1] < 0.8 * reference["losses"][0]


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_losses_of_20_steps_equal_one_process(world: int, ep: int, reference: dict[str, Any]) -> None:
    for ranks in run_distributed(losses_of, world, tiny_job(), world, ep, 20):
        assert relative(ranks["losses"], reference["losses"]) < 1e-10
        assert relative(ranks["norms"], reference["norms"]) < 1e-10
        assert relative([ranks["validation"]], [reference["validation"]]) < 1e-10
        for mine, theirs in zip(ranks["auxiliary"], reference["auxiliary"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-10)
        assert all(ranks["acknowledged"])


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_change_nothing(micro: int, reference: dict[str, Any]) -> None:
    job = tiny_job(training__micro_batch_size=micro)
    assert relative(one_process(job, 20)["losses"], reference["losses"]) < 1e-10
    for ranks in run_distributed(losses_of, 3, job, 3, 3, 20):
        assert relative(ranks["losses"], reference["losses"]) < 1e-10


MIXED = {"large": (0.75, 61), "small": (0.25, 5)}


def mixed_engine(rank: int, store: Any, world: int, ep: int) -> Engine:
    """On a mixture of two sources of other sequences, of which one is read again and again."""
    job = tiny_job()
    engine = engine_on(job, Layout(world, ep=ep), rank, store)
    length, words = job.data.sequence_length, job.model.vocab_size
    views = []
    for count in (1, 2):
        parts = [
            Part(name, weight, TinyView(count * size, length, words - 9 * number))  # type: ignore[arg-type]
            for number, (name, (weight, size)) in enumerate(MIXED.items())
        ]
        views.append(MixtureView(parts, [part.weight for part in parts]))
    mixed = Engine(job, views[0], views[1], engine.device)
    mixed.adopt(engine.share, publish=False)
    return mixed


def mixture_on(rank: int, store: Any, world: int, ep: int) -> dict[str, Any]:
    engine = mixed_engine(rank, store, world, ep)
    losses = [engine.train_step(step).loss for step in range(1, 9)]
    return {"losses": losses, "by_source": engine.evaluate_sources(), "validation": engine.evaluate()}


def test_a_mixture_goes_the_same_way_on_every_layout() -> None:
    alone = mixture_on(0, None, 1, 1)
    for found in run_distributed(mixture_on, 3, 3, 3):
        assert relative(found["losses"], alone["losses"]) < 1e-10
        assert found["by_source"] == pytest.approx(alone["by_source"], rel=1e-10)
        assert found["validation"] == pytest.approx(alone["validation"], rel=1e-10)


def test_validation_is_of_each_source_and_of_all_by_their_weights() -> None:
    engine = mixed_engine(0, None, 1, 1)
    found, half = engine.evaluate_sources(), engine.job.training.eval_sequences // 2
    assert list(found) == list(MIXED)
    for part in parts_of(engine.validation):
        # As a job of this source alone would validate, with its part of the sequences.
        training = engine.job.training.model_copy(update={"eval_sequences": half})
        lone = Engine(
            engine.job.model_copy(update={"training": training}), part.sequences, part.sequences, engine.device
        )
        lone.adopt(engine.share, publish=False)
        assert found[part.name] == lone.evaluate()
    assert engine.evaluate() == pytest.approx(0.75 * found["large"] + 0.25 * found["small"], rel=1e-14)
    assert found["large"] != found["small"]


def gradients_of(rank: int, store: Any, job: Job, world: int, ep: int) -> tuple[float, dict[str, Any]]:
    """Loss and this rank's shard boxes of the summed gradients of step 1."""
    engine = engine_on(job, Layout(world, ep=ep), rank, store)
    sums = engine._forward_backward(1)
    found = {}
    for bucket, shard in zip(engine.reducer.buckets, engine.reducer.finish(), strict=True):
        for name, (slot, view) in bucket.own_views(shard).items():
            found[name] = (slot.box, engine.shards[name].global_shape, view.numpy().copy())
    return float(sums[0]), found


def assemble(ranks: list[tuple[float, dict[str, Any]]]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for _, boxes in ranks:
        for name, (box, shape, piece) in boxes.items():
            piece = torch.from_numpy(piece)
            whole.setdefault(name, torch.full(shape, float("nan"), dtype=piece.dtype))[box.slices()] = piece
    return whole


@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_loss_and_every_gradient_of_one_step(ep: int, precision: str, bound: float) -> None:
    job = tiny_job(training__precision=precision)
    single = [gradients_of(0, None, job, 1, 1)]
    folded = run_distributed(gradients_of, 4, job, 4, ep)
    assert sum(loss for loss, _ in folded) == pytest.approx(single[0][0], rel=bound)
    expected, found = assemble(single), assemble(folded)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        worst = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert worst < bound, f"{name}: {worst:.2e}"


def test_bfloat16_keeps_fp32_masters_and_learns() -> None:
    engine = engine_on(tiny_job(training__precision="bfloat16"), Layout(1), 0, None)
    results = [engine.train_step(step) for step in range(1, 21)]
    assert results[-1].loss < 0.8 * results[0].loss
    for key, boxed in engine.state().items():
        assert boxed.dtype == torch.float32, key


# -- mutations: each breaks the mathematics, and the comparison above must see it --------------------------------------


def mutated(rank: int, store: Any, job: Job, mutation: str) -> list[float]:
    engine = engine_on(job, Layout(4, ep=2), rank, store)
    if mutation == "expert gradients not reduced over edp":
        for bucket in engine.reducer.buckets:
            if bucket.group.name == "edp":
                bucket.start_reduce = lambda bucket=bucket: _reduce_alone(bucket)  # type: ignore[method-assign]
    elif mutation == "expert gradients divided by edp":
        finish = engine.reducer.finish
        groups = [bucket.group for bucket in engine.reducer.buckets]
        engine.reducer.finish = lambda: [  # type: ignore[method-assign]
            shard / group.size if group.name == "edp" else shard for shard, group in zip(finish(), groups, strict=True)
        ]
    elif mutation == "a sequence is skipped":
        batch = engine.sampler.batch
        engine.sampler.batch = lambda step: [*batch(step)[1:], batch(step)[1]]  # type: ignore[method-assign]
    else:
        assert mutation == "a stale moment"
        moment = engine.optimizer._adamw.state[engine.optimizer.masters[0]]["exp_avg"]
        moment.add_(1e-3)
    return [engine.train_step(step).loss for step in range(1, 6)]


def _reduce_alone(bucket: Any) -> None:
    from concertina.parallel.collectives import Pending

    bucket.shard.copy_(bucket.grads[bucket.group.rank])
    bucket._filled.clear()
    bucket._pending = Pending(lambda: bucket.shard)


@pytest.mark.parametrize(
    "mutation",
    [
        "expert gradients not reduced over edp",
        "expert gradients divided by edp",
        "a sequence is skipped",
        "a stale moment",
    ],
)
def test_a_mutation_is_seen(mutation: str, reference: dict[str, Any]) -> None:
    losses = run_distributed(mutated, 4, tiny_job(), mutation)[0]
    assert relative(losses, reference["losses"][:5]) > 1e-8


# -- generations -------------------------------------------------------------------------------------------------------


def generations(rank: int, store: Any, job: Job) -> list[tuple[bool, int]]:
    """One engine after the other: whether anything of it is left once it is dropped, and the threads there are then.

    Nothing may wait for Python's collector, which sees no cycle through a parameter's hooks; only what libraries import
    at their first use keeps a traceback with our frames.
    """
    seen = []
    gc.disable()
    for generation in range(5):
        engine = engine_on(job, Layout(2, tp=2, ep=2), rank, dist.PrefixStore(str(generation), store))
        engine.train_step(1)
        engine.settle()
        left = [ref(engine.optimizer), ref(engine.decoder), ref(engine.groups)]
        del engine
        if generation == 0:
            gc.collect()
        seen.append((any(what() is not None for what in left), psutil.Process().num_threads()))
    gc.enable()
    return seen


def test_an_engine_that_is_dropped_is_gone_with_its_groups_and_their_threads() -> None:
    for seen in run_distributed(generations, 2, tiny_job()):
        assert not any(left for left, _ in seen)
        assert seen[-1][1] <= seen[0][1], "threads add up"


# -- weights travel under the next forward -----------------------------------------------------------------------------


def travels(rank: int, store: Any, job: Job) -> dict[str, Any]:
    """After each of two steps: weights that differ from their masters before and after the next forward has come by."""
    engine = engine_on(job, Layout(2), rank, store)
    waited: list[str] = []
    arrive = engine.optimizer.arrive

    def told(names: Any = None) -> None:
        waited.extend(names or ())
        arrive(names)

    engine.optimizer.arrive = told  # type: ignore[method-assign]
    stale = []
    for step in (1, 2, 3):
        engine.train_step(step)
        stale.append(_stale(engine))
    engine.settle()
    return {
        "stale": stale,
        "settled": _stale(engine),
        "order": waited[: len(engine.shards)],
        "names": list(engine.shards),
    }


def _stale(engine: Any) -> int:
    """Elements of this rank's weights that are not what its masters say."""
    weights = dict(engine.decoder.named_tensors())
    wrong = 0
    for bucket, master in zip(engine.reducer.buckets, engine.optimizer.masters, strict=True):
        for name, (slot, view) in bucket.own_views(master.detach()).items():
            piece = weights[name].detach().narrow(slot.dim, slot.start, slot.stop - slot.start)
            wrong += int((piece != view).sum())
    return wrong


def test_weights_arrive_when_the_next_forward_comes_to_them() -> None:
    """Nobody waits after a step; each part waits for its own weights, one after the other."""
    for found in run_distributed(travels, 2, tiny_job()):
        assert all(stale > 0 for stale in found["stale"]), "the step itself does not wait"
        assert found["settled"] == 0
        assert sorted(found["order"]) == sorted(found["names"])
        layers = [name.split(".")[1] for name in found["order"] if name.startswith("layers")]
        assert layers == sorted(layers)
        assert (found["order"][0], found["order"][-1]) == ("embedding.weight", "head.weight")
