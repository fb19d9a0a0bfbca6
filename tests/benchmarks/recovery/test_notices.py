"""How much longer than a normal step was the longest one? (`gap_of`)"""

from __future__ import annotations

import pytest

from benchmarks.recovery.notices import gap_of
from benchmarks.recovery.stall import Line
from benchmarks.recovery.watch import document_of

pytestmark = pytest.mark.unit


def test_the_longest_gap_beside_a_normal_one() -> None:
    lines = [Line(at_s, 0, 0, 4, step) for step, at_s in enumerate([0.0, 1.0, 2.0, 4.5, 5.5, 99.0])]
    found = gap_of(lines, 0.5, 6.0)
    assert found is not None
    assert found["normal_step_s"] == 1.0
    assert found["stall_s"] == found["stall_steps"] == 1.5
    assert gap_of(lines, 5.0, 6.0) is None, "one step says nothing"


def test_a_document_of_kinds_that_have_no_stall_is_one_all_the_same() -> None:
    samples = [
        {"kind": "slow link", "recovered": True, "step_ratio": 3.0, "members_lost": 0},
        {"kind": "notice taken back", "recovered": True, "stall_s": 0.1, "normal_step_s": 0.5},
        {"kind": "notice", "recovered": False},
    ]
    summary = document_of("ours", {}, samples)["summary"]
    assert summary["slow link"]["stall_s"] is None
    assert summary["notice taken back"]["stall_s"] == {"median": 0.1, "most": 0.1}
    assert summary["notice"] == {"events": 1, "recovered": 0} | dict.fromkeys(
        ("stall_s", "standstill_s", "normal_step_s", "steps_lost", "steps_again")
    )
