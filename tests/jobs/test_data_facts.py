"""Is a source that is read too often named, with a weight that mends it?"""

from __future__ import annotations

import re
from typing import Any

import pytest

from concertina.config import TrainingConfig
from concertina.data import MixtureView, Part
from jobs.data_facts import MOST_EPOCHS, often_repeated

pytestmark = pytest.mark.unit


class Some:
    """So many sequences."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def mixture(**sources: tuple[int, float]) -> MixtureView:
    parts: Any = [Part(name, weight, Some(size)) for name, (size, weight) in sources.items()]  # type: ignore[arg-type]
    return MixtureView(parts, [weight for _, weight in sources.values()])


TRAINING = TrainingConfig(steps=100, global_batch_size=10)


def test_who_is_read_four_times_is_not_told() -> None:
    assert often_repeated(mixture(a=(900, 0.9), b=(25, 0.1)), TRAINING) == []
    assert often_repeated(Some(3), TRAINING) == [], "a corpus alone"  # type: ignore[arg-type]


def test_the_weight_that_is_named_mends_it() -> None:
    (line,) = often_repeated(mixture(a=(900, 0.9), b=(20, 0.1)), TRAINING)
    assert line.startswith("source b is read 5.0 times in 100 steps: ")
    found = re.search(r"make its weight (\S+) of all", line)
    assert found is not None
    weight = float(found.group(1))
    assert weight == MOST_EPOCHS * 20 / 1000
    assert often_repeated(mixture(a=(900, 1 - weight), b=(20, weight)), TRAINING) == []
