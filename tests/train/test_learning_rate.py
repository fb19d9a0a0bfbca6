"""Does the learning rate rise to its peak, fall along a cosine to its end, and stay there?"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.config import TrainingConfig
from concertina.train.learning_rate import learning_rate

pytestmark = pytest.mark.unit


def training(steps: int = 100, warmup_steps: int = 20, peak: float = 1e-2, end: float = 1e-3) -> TrainingConfig:
    return TrainingConfig(steps=steps, warmup_steps=warmup_steps, learning_rate=peak, min_learning_rate=end)


def test_the_known_points() -> None:
    rates = {step: learning_rate(training(), step) for step in (1, 10, 20, 40, 60, 80, 100, 500)}
    middle = (1e-2 + 1e-3) / 2
    quarter = 9e-3 / 2 * math.cos(math.pi / 4)
    assert rates == pytest.approx(
        {1: 5e-4, 10: 5e-3, 20: 1e-2, 40: middle + quarter, 60: middle, 80: middle - quarter, 100: 1e-3, 500: 1e-3},
        rel=1e-12,
    )


def test_without_warm_up_the_first_step_is_already_on_the_cosine() -> None:
    first = learning_rate(training(warmup_steps=0), 1)
    assert 0.99e-2 < first < 1e-2


shapes = st.builds(
    training,
    steps=st.integers(1, 300),
    warmup_steps=st.integers(0, 50),
    peak=st.floats(1e-4, 1.0),
    end=st.floats(0.0, 1e-4),
)


@given(shapes)
def test_up_and_then_down_within_the_bounds(shape: TrainingConfig) -> None:
    rates = [learning_rate(shape, step) for step in range(1, shape.steps + 10)]
    top = shape.warmup_steps
    assert all(a < b for a, b in pairwise(rates[:top]))
    assert all(a >= b for a, b in pairwise(rates[max(top - 1, 0) :]))
    assert all(0 < rate <= shape.learning_rate * (1 + 1e-12) for rate in rates[: shape.steps - 1])
    assert all(rate >= shape.min_learning_rate for rate in rates[top:])


@given(shapes)
def test_the_last_step_has_the_end(shape: TrainingConfig) -> None:
    if shape.warmup_steps < shape.steps:
        assert learning_rate(shape, shape.steps) == pytest.approx(shape.min_learning_rate, rel=1e-12, abs=1e-15)


def test_a_warm_up_longer_than_the_run_is_not_cut_short() -> None:
    shape = training(steps=10, warmup_steps=40)
    assert learning_rate(shape, 10) == pytest.approx(1e-2 * 10 / 40, rel=1e-12)
