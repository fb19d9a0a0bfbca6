"""Is a stall what the definition says: until one step more than before, less a normal step, whoever applies it?"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recovery.stall import FEWEST_STEPS, Line, StepLog, outage_of, read_lines

pytestmark = pytest.mark.unit

FOUR = (101, 102, 103, 104)


def run(pids: tuple[int, ...], steps: range, start_s: float, step_s: float) -> list[Line]:
    """All ranks write step after step, the first of them at `start_s`, each a little after its neighbour."""
    return [
        Line(start_s + index * step_s + 0.001 * rank, rank, pid, len(pids), step)
        for index, step in enumerate(steps)
        for rank, pid in enumerate(pids)
    ]


def test_survivors_go_on_and_lose_nothing() -> None:
    lines = run(FOUR, range(1, 11), 0.0, 0.5) + run(FOUR[:3], range(11, 20), 6.0, 0.4)
    outage = outage_of(lines, fault_s=4.7)
    assert outage is not None
    assert outage.stall_s == pytest.approx(6.0 - 4.7 - 0.4)
    assert outage.standstill_s == pytest.approx(outage.stall_s)
    assert outage.normal_step_s == pytest.approx(0.4)
    assert (outage.step_before, outage.steps_lost, outage.steps_again) == (10, 0, 0)
    assert (outage.world_before, outage.world_after) == (4, 3)


def test_a_restart_from_a_checkpoint_stalls_until_it_is_past_what_it_had() -> None:
    """Same size, other processes: steps 8, 9, 10 are applied again, and step 11 ends the stall."""
    new = (201, 202, 203, 204)
    lines = run(FOUR, range(1, 11), 0.0, 0.5) + run(new, range(8, 20), 20.0, 0.5)
    outage = outage_of(lines, fault_s=4.7)
    assert outage is not None
    assert outage.stall_s == pytest.approx(20.0 + 3 * 0.5 - 4.7 - 0.5)
    assert (outage.step_before, outage.steps_lost, outage.steps_again) == (10, 3, 3)


def test_what_was_in_flight_belongs_to_the_world_before() -> None:
    """Step 11's gradients were complete when a process died: three ranks write it after the fault."""
    late = [Line(5.0, rank, FOUR[rank], 4, 11) for rank in range(3)]
    outage = outage_of(run(FOUR, range(1, 11), 0.0, 0.5) + late + run(FOUR[:3], range(12, 20), 7.0, 0.4), fault_s=4.9)
    assert outage is not None
    assert (outage.step_before, outage.steps_lost) == (11, 0)
    assert outage.stall_s == pytest.approx(7.0 - 4.9 - 0.4)
    assert outage.standstill_s == pytest.approx(7.0 - 5.0 - 0.4)


def test_a_join_costs_those_who_are_there_their_standstill_only() -> None:
    """The node comes at 1 s, the world of three trains on for 9 s, the newcomer writes the step that it healed at."""
    three = FOUR[:3]
    joiner = [Line(10.05, 3, 999, 3, 21)]
    lines = run(three, range(1, 22), 0.0, 0.5) + joiner + run((*three, 999), range(22, 33), 11.0, 0.6)
    outage = outage_of(sorted(lines, key=lambda line: line.at_s), fault_s=1.1)
    assert outage is not None
    assert outage.stall_s == pytest.approx(11.0 - 1.1 - 0.6)
    assert outage.standstill_s == pytest.approx(11.0 - 10.0 - 0.6)
    assert (outage.steps_lost, outage.steps_again) == (0, 0)
    assert (outage.world_before, outage.world_after) == (3, 4)


def test_survivors_that_fall_back_have_lost() -> None:
    lines = run(FOUR, range(1, 11), 0.0, 0.5) + run(FOUR[:3], range(9, 20), 6.0, 0.5)
    outage = outage_of(lines, fault_s=4.7)
    assert outage is not None
    assert (outage.steps_lost, outage.steps_again) == (2, 2)
    assert outage.stall_s == pytest.approx(7.0 - 4.7 - 0.5)


def test_a_slow_step_among_them_is_no_normal_step() -> None:
    """A checkpoint takes a second, once."""
    after = run(FOUR[:3], range(11, 14), 6.0, 0.4) + run(FOUR[:3], range(14, 20), 8.2, 0.4)
    outage = outage_of(run(FOUR, range(1, 11), 0.0, 0.5) + after, fault_s=4.7)
    assert outage is not None
    assert outage.normal_step_s == pytest.approx(0.4)


def test_not_yet_is_none() -> None:
    before = run(FOUR, range(1, 11), 0.0, 0.5)
    assert outage_of(before, fault_s=4.7) is None
    first = run(FOUR[:3], range(11, 11 + FEWEST_STEPS), 6.0, 0.4)
    assert outage_of(before + first, fault_s=4.7) is None
    again = run((201, 202), range(5, 11), 6.0, 0.4)
    assert outage_of(before + again, fault_s=4.7) is None


def test_a_fault_before_the_first_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="no step was applied before the fault"):
        outage_of(run(FOUR, range(1, 11), 5.0, 0.5), fault_s=4.7)


def test_lines_come_back_in_the_order_of_time_without_a_torn_one(tmp_path: Path) -> None:
    first, second = StepLog(tmp_path, 0), StepLog(tmp_path, 1)
    second.applied(1, 2)
    first.applied(1, 2)
    first.applied(2, 2, rank=5)
    (tmp_path / "7.steps").write_text("9999999999.0 1 7 2 3\n9999999999.5 1 7 2")
    lines = read_lines(tmp_path)
    assert [(line.rank, line.step) for line in lines] == [(1, 1), (0, 1), (5, 2), (1, 3)]
    assert [line.at_s for line in lines] == sorted(line.at_s for line in lines)
    assert Line.parse(str(lines[0])).step == 1
