"""Does every plan end, compute everything once, keep few micro-batches in flight, and have the bubble of the paper?"""

from __future__ import annotations

from itertools import permutations, product

import pytest

from concertina.schedule.pipeline import Action, Plan, forward_plan, simulate, training_plan

pytestmark = pytest.mark.unit

SHAPES = [(p, v, m) for p, v, m in product((1, 2, 3, 4, 7), (1, 2, 3), range(1, 30)) if p > 1 or v == 1]
SECONDS = {"forward": 1.0, "backward": 2.0}


@pytest.mark.parametrize(("p", "v", "m"), SHAPES)
def test_everything_once_and_to_the_end(p: int, v: int, m: int) -> None:
    plan = training_plan(p, v, m)
    for stage, actions in enumerate(plan.actions):
        pieces = range(stage, p * v, p)
        assert sorted(actions) == sorted(
            Action(way, piece, number) for way in ("forward", "backward") for piece in pieces for number in range(m)
        )
    assert len(simulate(plan, SECONDS).ends) == 2 * p * v * m
    assert len(simulate(forward_plan(p, v, m), SECONDS).ends) == p * v * m


@pytest.mark.parametrize(("p", "v", "m"), SHAPES)
def test_validation_takes_in_the_order_of_sending(p: int, v: int, m: int) -> None:
    """So that a stage may wait for its oldest message. In training two stages of several pieces do not always."""
    assert out_of_order(forward_plan(p, v, m)) == 0


def test_training_does_not_always() -> None:
    assert out_of_order(training_plan(2, 3, 5)) > 0
    assert out_of_order(training_plan(2, 3, 6)) == out_of_order(training_plan(4, 3, 9)) == 0


def out_of_order(plan: Plan) -> int:
    """Pairs of stages of which one takes in another order than the other sends."""
    found = 0
    for sender, taker in permutations(range(plan.num_stages), 2):
        sent = [plan.after(action) for action in plan.actions[sender]]
        sent = [action for action in sent if action is not None and plan.stage_of(action) == taker]
        needs = {action: plan.before(action) for action in plan.actions[taker]}
        taken = [action for action, need in needs.items() if need is not None and plan.stage_of(need) == sender]
        found += sent != taken
    return found


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 4), (4, 16), (7, 9), (3, 1)])
def test_the_bubble_of_1f1b(p: int, m: int) -> None:
    timeline = simulate(training_plan(p, 1, m), SECONDS)
    assert timeline.bubble(3.0 * m) == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(("p", "v", "m"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (3, 4, 6)])
def test_interleaving_makes_it_smaller_by_v(p: int, v: int, m: int) -> None:
    """Of the useful time it is (p - 1) / (m v)."""
    seconds = {way: each / v for way, each in SECONDS.items()}
    timeline = simulate(training_plan(p, v, m), seconds)
    assert timeline.total / (3.0 * m) - 1 == pytest.approx((p - 1) / (m * v))


@pytest.mark.parametrize(("p", "m"), [(4, 16), (3, 7)])
def test_no_more_micro_batches_in_flight_than_stages(p: int, m: int) -> None:
    for stage, actions in enumerate(training_plan(p, 1, m).actions):
        open_, most = 0, 0
        for action in actions:
            open_ += 1 if action.direction == "forward" else -1
            most = max(most, open_)
        assert most == min(m, p - stage)


def test_what_waits_for_each_other_is_named() -> None:
    plan = training_plan(2, 1, 2)
    backwards_first = tuple(sorted(plan.actions[1]))
    with pytest.raises(ValueError, match=r"stages \[0, 1\] of 2 wait for each other"):
        simulate(Plan(1, (plan.actions[0], backwards_first)), SECONDS)
