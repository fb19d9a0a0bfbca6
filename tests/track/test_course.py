"""Does each (key, step) leave the event stream once, with tokens that add up?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.track.course import Course
from concertina.track.events import Event, EventType
from tests.track.a_run import step_data

pytestmark = pytest.mark.unit


def event(kind: str, step: int | None, **data: object) -> Event:
    return Event(1_000_000, "r", 0, kind, 0, step, data, 0)


def step(number: int) -> Event:
    return event(EventType.STEP, number, **step_data(number))


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=6))
def test_sessions_that_go_back_repeat_no_point(sessions: list[tuple[int, int]]) -> None:
    """Each session resumes somewhere at or before the newest step and trains some steps."""
    course, seen, newest = Course(), [], 0
    for length, back in sessions:
        resumed = max(0, newest - back)
        course.observe(event(EventType.START, None, resumed_from_step=resumed))
        for number in range(resumed + 1, resumed + length + 1):
            seen += [(point.key, point.step) for point in course.observe(step(number))]
        newest = max(newest, resumed + length)
    assert len(seen) == len(set(seen)) == 8 * newest
    assert course.tokens == 100 * newest
    assert course.newest_step == newest
    assert course.sessions == len(sessions)


def test_a_late_reader_still_finds_the_values_of_a_checkpoint() -> None:
    course = Course()
    for number in range(1, 1001):
        course.observe(step(number))
    assert len(course.recent) == 512
    assert course.tokens_at(600) == 60_000
    assert course.tokens_at(3) == 100_000
    assert {point.key for point in course.recent[600]} >= {"train/loss", "train/tokens"}


def test_each_source_of_a_mixture_has_its_own_curve() -> None:
    course = Course()
    points = course.observe(event(EventType.EVAL, 5, loss=2.0, by_source={"code": 1.5, "prose": "NaN"}))
    assert [(point.key, point.step) for point in points] == [
        ("validation/loss", 5),
        ("validation/loss/code", 5),
        ("validation/loss/prose", 5),
    ]
    assert points[1].value == 1.5
    assert course.nonfinite == ["validation/loss/prose@5=nan"]
    assert course.observe(event(EventType.EVAL, 5, loss=2.0, by_source={"code": 1.0})) == []


def test_an_evaluation_before_its_step_hides_nothing() -> None:
    """The loss of a step is committed a step late; its evaluation is not."""
    course = Course()
    assert [point.key for point in course.observe(event(EventType.EVAL, 5, loss=2.0))] == ["validation/loss"]
    assert len(course.observe(step(5))) == 8


def test_metrics_that_are_absent_stay_absent() -> None:
    course = Course()
    found = course.observe(event(EventType.STEP, 1, loss=1.0, aux_loss=None))
    assert {point.key for point in found} == {"train/loss", "train/tokens"}
    assert course.observe(event(EventType.STEP, None, loss=1.0)) == []
