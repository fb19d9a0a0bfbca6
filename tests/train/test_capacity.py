"""Are the same choices dropped under every layout, and do losses and gradients stay those of one process?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from concertina.config import Job
from concertina.layout import Layout
from concertina.parallel.capacity import Capacity, Quota
from concertina.parallel.groups import Group
from concertina.train.engine import Engine
from tests.distributed import on_ranks
from tests.train.test_layouts import check as check_layout
from tests.train.test_layouts import gradients_of
from tests.train.worlds import Degrees, Drop, engine_on, layout_of, record_drops, tiny_job

pytestmark = pytest.mark.dist

PRIORITIES = ["position", "probability"]
ONE: Degrees = (1, 1, 1, 1)


def capacity(priority: str, factor: float = 0.8, **more: Any) -> dict[str, Any]:
    """Two sequences a group unless said otherwise."""
    return {"factor": factor, "priority": priority, "group_sequences": 2, **more}


def check(degrees: Degrees, precision: str, bound: float, **changes: Any) -> None:
    """Eight sequences, which make whole groups."""
    check_layout(degrees, precision, bound, training__global_batch_size=8, **changes)


def one_process(job: Job) -> dict[str, Any]:
    return gradients_of(0, None, job, ONE)


def drops_of(job: Job) -> set[Drop]:
    found: set[Drop] = one_process(job)["drops"]
    return found


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize(
    ("degrees", "sequences", "changes"),
    [
        ((2, 2, 1, 1), 8, {}),  # all is one group, of which each lane has a part
        ((4, 4, 1, 1), 2, {"training__micro_batch_size": 2}),  # lanes cut inside a sequence
        ((4, 1, 4, 1), 2, {}),
        ((2, 1, 1, 2), 4, {}),
        ((3, 1, 3, 1), 2, {}),  # four groups for three ranks
        ((3, 1, 1, 1), 2, {"training__micro_batch_size": 2}),  # and two of them have none in the second piece
        ((4, 2, 2, 2), 2, {"training__micro_batch_size": 2}),
        ((4, 2, 4, 1), 4, {"layout": {"sequence_parallel": False}}),
    ],
    ids=str,
)
def test_drops_loss_and_every_gradient_equal_one_process(
    degrees: Degrees, sequences: int, changes: dict[str, Any], priority: str
) -> None:
    check(degrees, "float64", 1e-10, model__capacity=capacity(priority, group_sequences=sequences), **changes)


def test_groups_of_one_sequence_on_an_uneven_world() -> None:
    check((5, 1, 1, 1), "float64", 1e-10, model__capacity=capacity("probability", group_sequences=1))


def test_all_eight_sequences_are_one_group() -> None:
    check((4, 4, 2, 2), "float64", 1e-10, model__capacity=capacity("probability", group_sequences=8))


def test_in_fp32() -> None:
    check((2, 2, 2, 1), "float32", 1e-5, model__capacity=capacity("probability"))


@pytest.mark.parametrize(
    ("degrees", "changes"),
    [
        (ONE, {"training__micro_batch_size": 2}),
        ((3, 1, 3, 1), {"training__micro_batch_size": 2}),
        ((6, 2, 3, 2), {"training__micro_batch_size": 2}),  # lanes cut inside a group
        ((2, 2, 2, 1), {"layout": {"sequence_parallel": False}}),
    ],
    ids=str,
)
def test_padding_changes_nothing(degrees: Degrees, changes: dict[str, Any]) -> None:
    check(degrees, "float64", 1e-10, model__capacity=capacity("position", pad=True), **changes)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_enough_is_dropped_for_all_this_to_mean_something(priority: str) -> None:
    reference = one_process(tiny_job(training__precision="float64", model__capacity=capacity(priority)))
    assert 0.2 < reference["facts"][0][-1] < 0.5
    assert {drop[0] for drop in reference["drops"]} == {"layers.1.moe", "layers.2.moe"}


def test_priorities_drop_differently_and_a_large_capacity_nothing() -> None:
    by_priority = [drops_of(tiny_job(model__capacity=capacity(priority))) for priority in PRIORITIES]
    assert by_priority[0] != by_priority[1]
    ample, dropless = one_process(tiny_job(model__capacity=capacity("position", factor=4.0))), one_process(tiny_job())
    assert ample["drops"] == set()
    for ours, theirs in zip(ample["facts"], dropless["facts"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_validation_is_dropless() -> None:
    losses = []
    for job in (tiny_job(model__capacity=capacity("position", factor=0.1)), tiny_job()):
        engine = engine_on(job, Layout(1), 0, None)
        drops = record_drops(engine)
        losses.append(engine.evaluate())
        assert drops == set()
    assert losses[0] == losses[1]


# -- sub-sequences: a mode of its own ----------------------------------------------------------------------------------


def first_step(rank: int, store: Any, job: Job, degrees: Degrees, mutation: str = "") -> tuple[set[Drop], float]:
    """Drops and loss of the first step."""
    engine = engine_on(job, layout_of(degrees), rank, store)
    drops = record_drops(engine)
    if mutation:
        MUTATIONS[mutation](engine)
    return drops, engine.train_step(1).loss


def together(job: Job, degrees: Degrees, mutation: str = "") -> tuple[set[Drop], float]:
    ranks = on_ranks(first_step, degrees[0], job, degrees, mutation)
    return set().union(*(drops for drops, _ in ranks)), ranks[0][1]


def local(priority: str, pad: bool = False) -> Job:
    rule = capacity(priority, scope="sub_sequence", group_sequences=1, pad=pad)
    return tiny_job(model__capacity=rule)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_sub_sequences_are_groups_of_what_a_rank_holds(priority: str) -> None:
    """Four sequences on each of two ranks: a group of four."""
    group = first_step(0, None, tiny_job(model__capacity=capacity(priority, group_sequences=4)), ONE)
    assert together(local(priority), (2, 1, 2, 1)) == (group[0], pytest.approx(group[1], rel=1e-12))


def test_sub_sequences_depend_on_the_layout() -> None:
    whole, lanes = first_step(0, None, local("position"), ONE), together(local("position"), (2, 2, 2, 1))
    assert whole[0] != lanes[0]
    assert abs(whole[1] - lanes[1]) > 1e-6
    padded = together(local("position", pad=True), (2, 2, 2, 1))
    assert padded == (lanes[0], pytest.approx(lanes[1], rel=1e-12))


# -- mutations: each drops something else, and the comparison must see it ----------------------------------------------


class _Mutated(Capacity):
    """Gives quotas that have been tampered with."""

    def __init__(self, capacity: Capacity, change: Callable[[Quota], Quota]) -> None:
        super().__init__(capacity.model, capacity.groups, capacity.lanes)
        self.change = change

    def quota(self, *arguments: Any) -> Quota:
        return self.change(super().quota(*arguments))


def _tamper(engine: Engine, change: Callable[[Quota], Quota]) -> None:
    assert engine.decoder.capacity is not None
    engine.decoder.capacity = _Mutated(engine.decoder.capacity, change)


def _part_groups(engine: Engine) -> None:
    micro_batches = engine._micro_batches
    engine._micro_batches = lambda count, whole=1: micro_batches(count)  # type: ignore[method-assign]


MUTATIONS: dict[str, Callable[[Engine], None]] = {
    "prefix sums ignored": lambda engine: _tamper(engine, lambda q: replace(q, sharers=replace(q.sharers, rank=0))),
    "lanes decide alone": lambda engine: _tamper(engine, lambda q: replace(q, sharers=Group.alone())),
    "one more than capacity": lambda engine: _tamper(engine, lambda q: replace(q, capacity=q.capacity + 1)),
    "groups parted by ranks": _part_groups,
}


@pytest.mark.parametrize(
    ("mutation", "priority", "degrees", "sequences"),
    [
        ("", "position", (2, 2, 2, 1), 8),
        ("", "probability", (2, 2, 2, 1), 8),
        ("prefix sums ignored", "position", (2, 2, 2, 1), 8),  # by weight they matter to ties only: tests/parallel
        ("lanes decide alone", "position", (2, 2, 2, 1), 8),
        ("lanes decide alone", "probability", (2, 2, 2, 1), 8),
        ("one more than capacity", "probability", (2, 1, 2, 1), 2),
        ("groups parted by ranks", "position", (3, 1, 3, 1), 2),
    ],
)
def test_a_mutation_is_seen(mutation: str, priority: str, degrees: Degrees, sequences: int) -> None:
    job = tiny_job(model__capacity=capacity(priority, group_sequences=sequences))
    expected_drops, expected_loss = first_step(0, None, job, ONE)
    drops, loss = together(job, degrees, mutation)
    assert (drops == expected_drops) == (not mutation)
    assert (abs(loss - expected_loss) < 1e-10 * expected_loss) == (not mutation)
