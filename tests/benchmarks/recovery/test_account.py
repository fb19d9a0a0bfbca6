"""Does a sample say what the run's record says: which join, what it lost, whose phases, and who came through?"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.recovery.account import Seated, join_of, join_record, kept_of, own_of
from benchmarks.recovery.stall import Line

pytestmark = pytest.mark.unit


def steps(world: int, numbers: range, start_s: float, step_s: float) -> list[Line]:
    """As a run's events have them: one line a step, nobody's pid."""
    return [Line(start_s + index * step_s, 0, 0, world, step) for index, step in enumerate(numbers)]


def record(reason: str, before: int, after: int, step: int = 0, **more: Any) -> dict[str, Any]:
    phases = {"halt_s": 0.02, "prepare_s": 0.03, "move_s": 0.25}
    said = {"cause": {"reason": reason}, "world_before": before, "world_after": after, "step": step, "phases": phases}
    return said | {"detected_s": 0.1, "bytes_local": 200, "bytes_moved": 100} | more


WORLDS = steps(4, range(1, 6), 0.0, 0.5) + steps(3, range(6, 21), 3.0, 0.4)
"""Four, then three: step 20 at 8.6 s."""


def test_a_join_costs_what_is_between_the_steps_around_it() -> None:
    join = join_of(WORLDS + steps(4, range(21, 34), 9.5, 0.5), record("join", 3, 4, step=20), since_s=2.5)
    assert join["recovered"]
    assert join["standstill_s"] == pytest.approx(9.5 - 8.6 - 0.5)
    assert join["stall_s"] == join["standstill_s"]
    assert join["normal_step_s"] == pytest.approx(0.5)
    assert join["until_used_s"] == pytest.approx(9.5 - 2.5)
    assert (join["steps_lost"], join["steps_again"]) == (0, 0)
    assert (join["world_before"], join["world_after"]) == (3, 4)


def test_a_join_that_falls_back_has_lost() -> None:
    """Steps 19 and 20 a second time: it stands still until step 21, and is of use from step 19 on."""
    join = join_of(WORLDS + steps(4, range(19, 34), 9.5, 0.5), record("join", 3, 4, step=20), since_s=2.5)
    assert (join["steps_lost"], join["steps_again"]) == (2, 2)
    assert join["standstill_s"] == pytest.approx(10.5 - 8.6 - 0.5)
    assert join["until_used_s"] == pytest.approx(9.5 - 2.5)


def test_what_the_record_puts_too_low_is_lost_as_well() -> None:
    """The coordinator says 18, the steps say 20."""
    join = join_of(WORLDS + steps(4, range(19, 34), 9.5, 0.5), record("join", 3, 4, step=18), since_s=None)
    assert (join["steps_lost"], join["steps_again"]) == (2, 2)
    assert join["until_used_s"] is None


def test_a_loss_right_after_the_join_is_another_matter() -> None:
    lines = WORLDS + steps(4, range(21, 34), 9.5, 0.5) + steps(3, range(34, 50), 20.0, 0.4)
    join = join_of(lines, record("join", 3, 4, step=20), since_s=2.5)
    assert join["recovered"]
    assert join["standstill_s"] == pytest.approx(9.5 - 8.6 - 0.5)
    assert join["until_used_s"] == pytest.approx(9.5 - 2.5)


def test_a_join_without_a_record_or_steps_has_not_recovered() -> None:
    missed = {"kind": "join", "recovered": False}
    whole = WORLDS + steps(4, range(21, 34), 9.5, 0.5)
    assert join_of(whole, None, 2.5) == missed
    assert join_of(WORLDS, record("join", 3, 4, step=20), 2.5) == missed
    assert join_of(WORLDS + steps(4, range(21, 23), 9.5, 0.5), record("join", 3, 4, step=20), 2.5) == missed
    assert join_of(whole, record("join", 2, 4, step=20), 2.5) == missed
    assert join_of(WORLDS + steps(2, range(21, 34), 9.5, 0.5), record("join", 3, 4, step=20), 2.5) == missed


def test_the_join_is_the_one_that_made_the_world_whole() -> None:
    loss, half, whole = record("killed", 4, 2), record("join", 2, 3), record("join", 3, 4)
    assert join_record([loss, half, whole], 4) is whole
    assert join_record([loss, half], 4) is None
    assert join_record([record("network", 3, 4)], 4) is None


def test_tries_of_one_recovery_add_up() -> None:
    own = own_of([record("killed", 4, 3), record("network", 3, 3, bytes_moved=50, detected_s=7.0)])
    assert own["halt_s"] == pytest.approx(0.04)
    assert own["prepare_s"] == pytest.approx(0.06)
    assert own["move_s"] == pytest.approx(0.5)
    assert (own["bytes_moved"], own["bytes_local"], own["changes"]) == (150, 400, 2)
    assert own["detected_s"] == 0.1
    assert own_of([]) == {}


def test_a_survivor_is_kept_with_its_process_and_its_engine() -> None:
    before = [Seated(member, 100 + member, f"node-{member}", 7) for member in range(4)]
    fresh = Seated(4, 104, "node-3", 9)
    assert kept_of(before, [*before[:3], fresh], {3}) == {"survivors": 3, "survivors_kept": 3}
    process = Seated(1, 201, "node-1", 7)
    engine = Seated(2, 102, "node-2", 8)
    assert kept_of(before, [before[0], process, engine, fresh], {3}) == {"survivors": 3, "survivors_kept": 1}
    assert kept_of(before, [], {3}) == {"survivors": 3, "survivors_kept": 0}
    silent = Seated(0, 100, "node-0", None)
    assert kept_of([silent, *before[1:]], [silent, *before[1:]], {3}) == {"survivors": 3, "survivors_kept": 2}
