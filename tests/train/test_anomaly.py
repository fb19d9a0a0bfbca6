"""Is a bad step seen, is a good one left alone, and does every rank come to the same judgement after a resume?"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.config import AnomalyConfig
from concertina.train.anomaly import MIN_STEPS, WINDOW_STEPS, Anomaly, AnomalyWatch

pytestmark = pytest.mark.unit


def watch(**changes: Any) -> AnomalyWatch:
    return AnomalyWatch(AnomalyConfig(**changes))


def seen(judged: AnomalyWatch, step: int, loss: float, grad_norm: float = 1.0) -> Anomaly | None:
    """Judge a step and do it, as a step that is skipped is done."""
    found = judged.judge(step, loss, grad_norm)
    judged.note(step, loss, found)
    return found


def calm(steps: int, loss: float = 2.0, **changes: Any) -> AnomalyWatch:
    """A watch that has seen so many steps of one loss."""
    found = watch(**changes)
    for step in range(1, steps + 1):
        assert seen(found, step, loss) is None
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["skip", "stop", "roll_back"])
def test_what_is_not_finite_is_an_anomaly_from_the_first_step(bad: float, action: str) -> None:
    for loss, norm in [(bad, 1.0), (2.0, bad), (bad, bad)]:
        found = watch(nonfinite=action).judge(1, loss, norm)
        assert found == Anomaly(1, "nonfinite", action, f"loss {loss}, gradient norm {norm}")


def test_a_spike_is_measured_against_the_mean_of_the_window() -> None:
    judged = calm(MIN_STEPS, loss=2.0, spike_factor=1.5, spike="roll_back")
    assert judged.judge(9, 3.0, 1.0) is None, "1.5 times the mean is not above it"
    judged = calm(MIN_STEPS, loss=2.0, spike_factor=1.5, spike="roll_back")
    found = judged.judge(9, 3.01, 1.0)
    assert found == Anomaly(
        9, "spike", "roll_back", f"loss 3.0100 is more than 1.5 x 2.0000, the mean of {MIN_STEPS} steps"
    )


def test_few_steps_judge_no_spike() -> None:
    assert calm(MIN_STEPS - 1, spike_factor=1.1).judge(MIN_STEPS, 1e9, 1.0) is None


def test_without_a_factor_no_spike_is_looked_for() -> None:
    assert calm(2 * WINDOW_STEPS).judge(100, 1e9, 1.0) is None


def test_the_window_forgets() -> None:
    judged = calm(WINDOW_STEPS, loss=100.0, spike_factor=2.0)
    for step in range(WINDOW_STEPS):
        seen(judged, 100 + step, 1.0)
    assert judged.recent == [1.0] * WINDOW_STEPS
    assert judged.judge(200, 2.5, 1.0) is not None


def test_a_bad_loss_is_no_part_of_the_past() -> None:
    judged = calm(MIN_STEPS, loss=1.0, spike_factor=2.0, max_events=100)
    for step in range(10, 20):
        assert seen(judged, step, 50.0) is not None
        assert seen(judged, step, math.nan) is not None
    assert judged.recent == [1.0] * MIN_STEPS


def test_too_many_stop_whatever_the_policy() -> None:
    judged = watch(nonfinite="skip", max_events=3)
    actions = [seen(judged, step, math.nan) for step in (1, 2, 3)]
    assert [found.action for found in actions if found] == ["skip", "skip", "stop"]
    assert actions[2] is not None
    assert "anomaly 3 of at most 3" in actions[2].detail


def test_a_step_that_was_rolled_back_is_skipped_and_counts_no_more() -> None:
    judged = watch(max_events=1)
    judged.skipped.add(7)
    for loss in (2.0, math.nan):
        assert seen(judged, 7, loss) == Anomaly(7, "replayed", "skip", "step 7 was rolled back before")
    assert (judged.seen, judged.recent) == (0, [])


losses = st.lists(st.floats(0.1, 10) | st.sampled_from([math.nan, 99.0]), max_size=60)


@given(before=losses, after=losses)
def test_a_watch_goes_on_where_its_state_was_saved(before: list[float], after: list[float]) -> None:
    config = AnomalyConfig(spike_factor=2.0, max_events=5)
    first = AnomalyWatch(config)
    for step, loss in enumerate(before):
        seen(first, step, loss)
    second = AnomalyWatch(config)
    second.load_state(json.loads(json.dumps(first.state())))
    for step, loss in enumerate(after, len(before)):
        assert seen(first, step, loss) == seen(second, step, loss)


def test_judging_changes_nothing() -> None:
    """The step may be void: then nobody has seen it."""
    judged = calm(MIN_STEPS, loss=2.0, spike_factor=1.5, spike="roll_back", nonfinite="stop")
    before = judged.state()
    for loss in (2.0, 9.0, math.nan):
        first = judged.judge(9, loss, 1.0)
        assert judged.judge(9, loss, 1.0) == first
    assert judged.state() == before


def test_going_back_does_not_forget_what_went_wrong_since() -> None:
    judged = calm(4, loss=2.0)
    saved = judged.state()
    seen(judged, 5, 3.0)
    judged.go_back(saved, 6)
    assert judged.recent == [2.0] * 4, "the past is the checkpoint's"
    assert judged.skipped == {6}
    assert judged.seen == 1, "or an anomaly that comes back each time would be replayed for ever"
    judged.go_back(saved, 7)
    assert judged.skipped == {6, 7}, "steps to skip stay marked"
    assert judged.seen == 2


def test_who_loads_the_same_stands_alike() -> None:
    """One that went back on its own, before the others could, forgets it again."""
    judged, other = calm(4), calm(2)
    judged.go_back(judged.state(), 5)
    judged.load_state(other.state())
    assert judged.state() == other.state() == {"recent": [2.0, 2.0], "skipped": [], "seen": 0}


def test_a_saved_state_does_not_change_with_the_watch() -> None:
    judged = calm(2)
    saved = judged.state()
    seen(judged, 3, 5.0)
    judged.skipped.add(3)
    assert saved == {"recent": [2.0, 2.0], "skipped": [], "seen": 0}
