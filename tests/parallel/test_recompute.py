"""Is what is computed again the same to the bit, and dropped in between, on one process and on layouts?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError

from concertina.config import Job
from concertina.layout import Layout
from concertina.model.deferred import deferring
from concertina.model.experts import Experts
from concertina.model.router import Router
from concertina.parallel.recompute import again, layer, recomputing, region
from concertina.parallel.trace import recording
from tests.allocations import Living
from tests.distributed import on_ranks
from tests.train.worlds import engine_on, tiny_job

ALL = ["norm", "activation", "permute", "core", "experts", "attention", "moe", "mlp"]
KINDS: list[Any] = ["selective", "full", *([kind] for kind in ALL), ["norm", "permute", "experts"], ALL[-3:]]
RANDOM: dict[str, Any] = {
    "model__router_noise": True,
    "model__shared_expert_gate": True,
    "model__router_bias_update_rate": 0.01,
    "model__qk_norm": "full",
    "training__micro_batch_size": 3,
}
DROPPING: dict[str, Any] = {"model__capacity": {"factor": 1.0}}

Degrees = tuple[int, int, int, int]
"""World, tp, ep, etp."""


def steps(rank: int, store: Any, job: Job, degrees: Degrees, deferred: bool = False) -> dict[str, Any]:
    """Of step 1 its sums and this rank's gradients, of two more steps losses and biases; all as bits."""
    world, tp, ep, etp = degrees
    engine = engine_on(job, Layout(world, tp=tp, ep=ep, etp=etp), rank, store)
    with recording(engine.groups) as records:
        if deferred:
            with deferring(engine.deferred):
                sums = engine._forward_backward(1)
            engine.deferred.run()
        else:
            sums = engine._forward_backward(1)
        gradients = [shard.double().numpy().copy() for shard in engine.reducer.finish()]
    results = [engine.train_step(step) for step in (1, 2)]
    return {
        "sums": sums.tolist(),
        "gradients": gradients,
        "losses": [(result.loss, result.grad_norm, result.dropped) for result in results],
        "biases": [bias.tolist() for bias in engine.decoder.router_biases().values()],
        "validation": engine.evaluate(),
        "calls": [(record.group, record.kind) for record in records],
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("sums", "losses", "biases", "validation"):
        assert found[name] == expected[name], name
    pairs = zip(found["gradients"], expected["gradients"], strict=True)
    assert all((ours == theirs).all() for ours, theirs in pairs)


# -- the same bits -----------------------------------------------------------------------------------------------------

usual: dict[tuple[str, str], dict[str, Any]] = {}


def alone(precision: str, kinds: Any = "none", deferred: bool = False, **changes: Any) -> dict[str, Any]:
    job = tiny_job(training__precision=precision, training__activation_checkpointing=kinds, **{**RANDOM, **changes})
    return steps(0, None, job, (1, 1, 1, 1), deferred)


@pytest.fixture(scope="module")
def expected() -> Callable[..., dict[str, Any]]:
    """What it is without, computed once."""

    def find(precision: str, **changes: Any) -> dict[str, Any]:
        key = precision, str(changes)
        if key not in usual:
            usual[key] = alone(precision, **changes)
        return usual[key]

    return find


@pytest.mark.unit
@pytest.mark.parametrize(
    ("precision", "kinds"),
    [*(("float32", kinds) for kinds in KINDS), *product(("float64", "bfloat16"), ("selective", "full", ALL))],
    ids=str,
)
def test_one_process(precision: str, kinds: Any, expected: Callable[..., dict[str, Any]]) -> None:
    assert_same(alone(precision, kinds), expected(precision))


@pytest.mark.unit
@pytest.mark.parametrize("kinds", ["selective", "full", ["moe"]], ids=str)
def test_with_drops(kinds: Any, expected: Callable[..., dict[str, Any]]) -> None:
    for changes in (DROPPING, {"model__capacity": {"factor": 1.0, "pad": True}}):
        found = alone("float32", kinds, **changes)
        assert found["losses"][0][2] > 0, "some are dropped"
        assert_same(found, expected("float32", **changes))


@pytest.mark.unit
@pytest.mark.parametrize("kinds", ["selective", "full", ["experts", "permute"]], ids=str)
def test_weight_gradients_may_come_later(kinds: Any, expected: Callable[..., dict[str, Any]]) -> None:
    """Where they are queued is where the first forward ran; a bucket knows what is owed by the parameter itself."""
    assert_same(alone("float32", kinds, deferred=True), expected("float32"))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("degrees", "kinds", "changes"),
    [
        pytest.param((2, 2, 1, 1), "full", {}, marks=pytest.mark.soak),
        ((2, 1, 2, 1), "selective", {}),
        pytest.param((2, 1, 1, 2), ["moe"], {}, marks=pytest.mark.soak),
        ((3, 1, 3, 1), "full", {}),  # uneven experts
        ((4, 2, 2, 2), "full", DROPPING),
        ((4, 2, 2, 2), ["attention", "experts"], {}),
        ((4, 2, 2, 1), "full", {"layout": {"sequence_parallel": False}}),
    ],
    ids=str,
)
def test_on_a_layout(degrees: Degrees, kinds: Any, changes: dict[str, Any]) -> None:
    for precision in ("float32", "float64") if degrees[0] == 4 else ("float32",):
        common = {"training__precision": precision, **RANDOM, **changes}
        plain, saving = (tiny_job(training__activation_checkpointing=kind, **common) for kind in ("none", kinds))
        ranks = on_ranks(steps, degrees[0], saving, degrees)
        for found, without in zip(ranks, on_ranks(steps, degrees[0], plain, degrees), strict=True):
            assert_same(found, without)
            assert (len(found["calls"]) > len(without["calls"])) == (kinds != "selective")
        assert all(found["calls"] == ranks[0]["calls"] for found in ranks), "the same calls in the same order"


# -- mutations ---------------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_noise_that_is_not_a_function_of_the_place_is_seen() -> None:
    """Tokens go elsewhere when they are routed again, and experts get other numbers of rows."""
    draws = torch.Generator().manual_seed(0)

    def drawn(router: Router, span: Any) -> Tensor:
        return torch.randn(span.num_tokens, router.build.model.num_experts, generator=draws, dtype=torch.float64)

    with patch.object(Router, "_normal", drawn), pytest.raises(CheckpointError, match="different metadata"):
        alone("float64", "full")


# -- what is dropped and made again ------------------------------------------------------------------------------------


def calls_of(kinds: Any) -> Counter[str]:
    """Forwards of parts of the tiny model's two layers with experts in a step, again ones among them."""
    engine = engine_on(tiny_job(training__activation_checkpointing=kinds), Layout(1), 0, None)
    found: Counter[str] = Counter()
    for module in engine.decoder.modules():
        if isinstance(module, Router | Experts):
            module.register_forward_pre_hook(lambda module, *_: found.update([type(module).__name__]))
    engine.train_step(1)
    return found


@pytest.mark.unit
def test_parts_run_as_often_as_they_must() -> None:
    assert calls_of("none") == calls_of("selective") == {"Router": 2, "Experts": 2}
    assert calls_of(["experts"]) == {"Router": 2, "Experts": 4}
    assert calls_of("full") == calls_of(["moe", "experts"]) == {"Router": 4, "Experts": 4}


def chain(x: Tensor, made: list[str]) -> Tensor:
    """Two cheap tensors, the second one made of the first, both kept by two products."""

    def first(x: Tensor) -> Tensor:
        made.append("first")
        return x * 2

    def second(y: Tensor, by: float) -> Tensor:
        made.append("second")
        return y + by

    y = again("norm", first, x)
    z = again("norm", second, y, 1.0)
    return (y * z).sum() + (z.view(-1)[3:] ** 2).sum() + z.sin().sum()


@pytest.mark.unit
def test_a_chain_is_made_once_more_and_no_oftener() -> None:
    results = []
    for kinds in (frozenset[str](), frozenset({"norm"})):
        x, made = torch.arange(6.0).view(2, 3).requires_grad_(), list[str]()
        with recomputing(kinds):
            out = layer(chain, x, made)
        assert made == ["first", "second"]
        out.backward()
        assert made == ["first", "second"] * (1 + len(kinds)) or sorted(made) == ["first"] * 2 + ["second"] * 2
        results.append(x.grad)
    assert torch.equal(*results)


@pytest.mark.unit
def test_what_is_made_again_is_gone_in_between() -> None:
    x = torch.randn(1000, requires_grad=True)

    def kept(kinds: frozenset[str]) -> int:
        with Living() as living, recomputing(kinds):
            out = layer(lambda x: (again("norm", torch.mul, x, 2.0).square() * 3).sum(), x)
        assert out.requires_grad
        return living.num_bytes()

    assert kept(frozenset()) - kept(frozenset({"norm"})) == 4000


@pytest.mark.unit
def test_something_else_the_second_time_is_seen() -> None:
    sizes = iter([3, 5])
    x = torch.ones(3, requires_grad=True)
    with recomputing(frozenset({"norm"})):
        out = layer(lambda x: (x * again("norm", lambda x: x.new_ones(next(sizes)), x.detach())).sum(), x)
    with pytest.raises(AssertionError, match="made otherwise"):
        out.backward()


@pytest.mark.unit
def test_a_result_that_is_its_input_has_no_recipe() -> None:
    x = torch.ones(3, requires_grad=True)
    with recomputing(frozenset({"norm"})):
        layer(lambda x: again("norm", lambda x: x.view(3, 1), x).square().sum(), x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.unit
def test_nothing_happens_outside_or_without_gradients() -> None:
    calls = []

    def count(x: Tensor) -> Tensor:
        calls.append(1)
        return F.silu(x).exp()

    x = torch.ones(3, requires_grad=True)
    region("core", count, x).sum().backward()
    with torch.no_grad(), recomputing(frozenset({"core", "layer"})):
        layer(count, x)
    assert len(calls) == 2
    with recomputing(frozenset({"core"})):
        out = layer(lambda x: region("core", count, x), x)
    out.sum().backward()
    assert len(calls) == 4
