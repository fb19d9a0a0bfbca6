"""Does a rank that waits instead of computing wait as long as it should, and do all else that a rank does?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from concertina.config import Job
from concertina.layout import Layout
from concertina.model.deferred import deferring
from concertina.model.timed import Pace, pace_of, products_of_a_layer
from concertina.parallel.trace import bytes_sent, recording
from concertina.planner.flops import flops_per_token
from concertina.train.engine import Engine
from tests.distributed import on_ranks
from tests.train.worlds import LATENT, engine_on, tiny_job

QUICK = {"cluster__timed_s_per_token": 1e-9, "training__precision": "float32"}
ODD: dict[str, Any] = {"model__shared_expert_gate": True, "model__qk_norm": "head", "model__attention_bias": True}


def timed_job(**changes: Any) -> Job:
    return tiny_job(**{"cluster__device": "timed", **QUICK, **changes})


# -- how long ----------------------------------------------------------------------------------------------------------


class _Clock:
    """Sleeps too long, by a little or by a lot."""

    def __init__(self, late_s: list[float]) -> None:
        self.s, self.late_s, self.asked_s = 0.0, late_s, list[float]()

    def sleep(self, seconds: float) -> None:
        self.asked_s.append(seconds)
        self.s += seconds + self.late_s.pop(0)

    def now(self) -> float:
        return self.s


@pytest.mark.unit
def test_what_a_wait_lasts_too_long_the_next_ones_are_shorter() -> None:
    clock = _Clock([0.25, 1.5, 0.0, 0.0])
    pace = Pace(0.5, 8, clock.sleep, clock.now)
    ends = []
    for products in (2, 2, 2, 2, 2):
        pace.wait(products)
        ends.append(clock.s)
    assert ends == [1.25, 3.5, 3.5, 4.0, 5.0], "on time again after the fourth"
    assert clock.asked_s == [1.0, 0.75, 0.5, 1.0]


@pytest.mark.unit
def test_a_token_takes_what_is_asked_for_in_a_layer_alone() -> None:
    job = timed_job(cluster__timed_s_per_token=0.5)
    assert pace_of(job).s_per_product * products_of_a_layer(job.model, 12) == pytest.approx(0.5)


class _Counted(Pace):
    """Takes no time and adds up."""

    def __init__(self) -> None:
        super().__init__(0.0, 12)
        self.products = 0.0

    def wait(self, products: float) -> None:
        self.products += products


def counted(engine: Engine) -> _Counted:
    pace = _Counted()
    for module in engine.decoder.modules():
        if hasattr(module, "pace"):
            module.pace = pace
    return pace


def products_of(job: Job, layout: Layout, rank: int, store: Any) -> float:
    engine = engine_on(job, layout, rank, store)
    pace = counted(engine)
    engine._forward_backward(1)
    return pace.products


def routers(job: Job) -> int:
    """Products that are real, of a token in a step."""
    return 3 * 2 * job.model.num_experts * job.model.hidden_size


@pytest.mark.unit
def test_all_products_but_the_routers_are_waited_for() -> None:
    job = timed_job()
    tokens = job.training.global_batch_size * 12
    expected = tokens * (flops_per_token(job.model, 12) // 2 - routers(job))
    assert products_of(job, Layout(1), 0, None) == pytest.approx(expected)


@pytest.mark.unit
def test_of_latent_attention_too() -> None:
    job = timed_job(model=LATENT)
    expected = job.training.global_batch_size * 12 * (flops_per_token(job.model, 12) // 2 - routers(job))
    assert products_of(job, Layout(1), 0, None) == pytest.approx(expected)


@pytest.mark.unit
def test_what_is_computed_again_is_waited_for_again() -> None:
    plain, full = (
        products_of(timed_job(training__activation_checkpointing=kinds), Layout(1), 0, None)
        for kinds in ("none", "full")
    )
    head = 3 * 97 * 32 * 8 * 12
    assert full - head == pytest.approx((plain - head) * 4 / 3)


def products_on(rank: int, store: Any, job: Job, degrees: dict[str, int]) -> float:
    return products_of(job, Layout(4, **degrees), rank, store)


@pytest.mark.dist
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("model", [{}, LATENT], ids=["heads", "latents"])
@pytest.mark.parametrize("degrees", [{"tp": 2, "ep": 2, "etp": 2}, {"cp": 4, "ep": 2}, {"cp": 2, "pp": 2}], ids=str)
def test_ranks_share_the_wait(degrees: dict[str, int], model: dict[str, Any], exchange: str) -> None:
    job = timed_job(model=model, layout={"context_exchange": exchange})
    total = sum(on_ranks(products_on, 4, job, degrees))
    assert total == pytest.approx(products_of(job, Layout(1), 0, None))


# -- all else ----------------------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize("changes", [{}, ODD, {"model__tie_word_embeddings": True}], ids=str)
def test_state_moves_and_the_loss_is_that_of_guessing(changes: dict[str, Any]) -> None:
    engine = engine_on(timed_job(**changes), Layout(1), 0, None)
    before = {name: tensor.clone() for name, tensor in engine.decoder.named_tensors()}
    assert before.keys() == engine_on(tiny_job(**QUICK, **changes), Layout(1), 0, None).shards.keys()
    for step in (1, 2):
        result = engine.train_step(step)
        assert result.loss == pytest.approx(math.log(97), rel=1e-6)
        assert 0 < result.grad_norm < math.inf
    engine.settle()
    still = {name for name, tensor in engine.decoder.named_tensors() if tensor.equal(before[name])}
    assert not {name for name in still if not name.endswith("bias")}, (
        "biases begin at zero, and pull themselves nowhere"
    )
    assert engine.evaluate() == pytest.approx(math.log(97), rel=1e-6)


@pytest.mark.unit
def test_weight_gradients_may_come_later() -> None:
    found = []
    for deferred in (False, True):
        engine = engine_on(timed_job(), Layout(1), 0, None)
        if deferred:
            with deferring(engine.deferred):
                engine._forward_backward(1)
            assert len(engine.deferred) > 9
            engine.deferred.run()
        else:
            engine._forward_backward(1)
        found.append([shard.clone() for shard in engine.reducer.finish()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def sent_by(rank: int, store: Any, job: Job, degrees: dict[str, int]) -> tuple[dict[tuple[str, str], int], float]:
    engine = engine_on(job, Layout(4, **degrees), rank, store)
    with recording(engine.groups) as records:
        result = engine.train_step(1)
    return bytes_sent(records), result.loss


@pytest.mark.dist
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("model", [{}, LATENT], ids=["heads", "latents"])
@pytest.mark.parametrize("degrees", [{"tp": 2, "ep": 2, "etp": 2}, {"cp": 2, "tp": 2, "ep": 2}], ids=str)
def test_the_same_bytes_travel(degrees: dict[str, int], model: dict[str, Any], exchange: str) -> None:
    """But for rows to the experts, whom other tokens choose."""
    again = {"training__activation_checkpointing": ["core"] if exchange == "ring" else "none"}
    changes = {**QUICK, **again, "model": model, "layout": {"context_exchange": exchange}}
    timed, real = (on_ranks(sent_by, 4, job, degrees) for job in (timed_job(**changes), tiny_job(**changes)))
    for (ours, loss), (theirs, _) in zip(timed, real, strict=True):
        assert loss == pytest.approx(math.log(97), rel=1e-6)
        assert ours.keys() == theirs.keys() - {("tp", "all_reduce")}, "what lanes tell each other of the loss"
        fixed = [key for key in ours if key[0] not in ("ep", "etp")]
        assert {key: ours[key] for key in fixed} == {key: theirs[key] for key in fixed}
        assert all(ours[key] > 0 for key in theirs if key[0] in ("ep", "etp"))
