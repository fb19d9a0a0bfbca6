"""How much longer than a normal step was the longest one? (`gap_of`)"""

from __future__ import annotations

import pytest

from benchmarks.recovery.notices import gap_of
from benchmarks.recovery.stall import Line

pytestmark = pytest.mark.unit


def test_the_longest_gap_beside_a_normal_one() -> None:
    lines = [Line(at_s, 0, 0, 4, step) for step, at_s in enumerate([0.0, 1.0, 2.0, 4.5, 5.5, 99.0])]
    found = gap_of(lines, 0.5, 6.0)
    assert found is not None
    assert found["normal_step_s"] == 1.0
    assert found["stall_s"] == found["stall_steps"] == 1.5
    assert gap_of(lines, 5.0, 6.0) is None, "one step says nothing"
