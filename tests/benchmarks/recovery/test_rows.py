"""Do the rows say what the samples say, the goals met and missed, and leave nothing out that failed?"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.recovery.__main__ import GOALS_S, rows_of
from benchmarks.results import Row

pytestmark = pytest.mark.unit

FAULTS = [kind for kind in GOALS_S if kind != "join"]


def sample(kind: str, stall_s: float, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": kind, "recovered": True, "stall_s": stall_s, "standstill_s": stall_s}
    found |= {"normal_step_s": 0.5, "steps_lost": 0, "steps_again": 0}
    found |= {"detected_s": 0.1, "halt_s": 0.02, "prepare_s": 0.03, "move_s": 0.25, "bytes_moved": 165_000_000}
    return found | more


def fault(kind: str, stall_s: float, **more: Any) -> dict[str, Any]:
    return sample(kind, stall_s, **{"survivors": 3, "survivors_kept": 3} | more)


def join(of: str, stall_s: float, until_used_s: float | None, **more: Any) -> dict[str, Any]:
    return sample("join", stall_s, of=of, until_used_s=until_used_s, **more)


MISSED_FAULT = {"kind": "node frozen", "recovered": False, "survivors": 3, "survivors_kept": 0}
MISSED_JOIN = {"kind": "join", "recovered": False, "of": "node"}


def rows(*samples: dict[str, Any], planned: int | None = None, ray: Any = None, torchft: Any = None) -> dict[str, Row]:
    own = {"samples": list(samples), "planned": len(samples) if planned is None else planned}
    found = rows_of(own, ray, torchft)
    assert len({row.name for row in found}) == len(found)
    return {row.name: row for row in found}


def test_a_kind_has_its_median_its_tail_and_its_goal() -> None:
    found = rows(*(fault("process killed", stall_s) for stall_s in (0.2, 0.3, 0.9)))
    stall = found["process killed, stall"]
    assert (stall.value, stall.goal, stall.met, stall.samples) == (0.3, 0.4, True, (0.2, 0.3, 0.9))
    assert found["process killed, stall, p99"].value == 0.9
    assert rows(fault("process killed", 0.5))["process killed, stall"].met is False
    assert not any(name.startswith("node killed") for name in found)


def test_only_a_node_that_freezes_has_the_goal_of_a_silence() -> None:
    found = rows(fault("process frozen", 1.5), fault("node frozen", 2.5))
    assert found["process frozen, stall"].met is None
    assert "at_most" not in found["process frozen, stall"].document()
    assert (found["node frozen, stall"].goal, found["node frozen, stall"].met) == (2.4, False)


def test_what_did_not_recover_counts_and_has_no_numbers() -> None:
    found = rows(fault("node frozen", 2.2), MISSED_FAULT, join("node", 0.3, 14.0), MISSED_JOIN)
    assert (found["events survived"].value, found["events survived"].met) == (0.5, False)
    assert found["node frozen, stall"].samples == (2.2,)
    kept = found["survivors kept, same process and engine"]
    assert (kept.value, kept.met, kept.samples) == (0.5, False, (1.0, 0.0))
    nothing = rows(MISSED_FAULT, MISSED_JOIN)
    assert set(nothing) == {"events survived", "survivors kept, same process and engine"}
    assert nothing["events survived"].value == 0.0


def test_events_that_were_not_made_have_not_survived() -> None:
    found = rows(fault("process killed", 0.2), join("process", 0.3, 9.0), planned=8)
    assert (found["events survived"].value, found["events survived"].met) == (0.25, False)


def test_one_survivor_less_misses_the_goal() -> None:
    found = rows(*(fault(kind, 0.2) for kind in FAULTS), fault("node killed", 0.2, survivors_kept=2))
    kept = found["survivors kept, same process and engine"]
    survivors = 3 * (len(FAULTS) + 1)
    assert kept.value == pytest.approx((survivors - 1) / survivors)
    assert kept.met is False
    assert rows(fault("node killed", 0.2))["survivors kept, same process and engine"].met is True


def test_a_step_that_a_join_lost_counts() -> None:
    found = rows(fault("process killed", 0.2), join("process", 0.3, 9.0, steps_lost=2, steps_again=1))
    assert (found["steps lost"].value, found["steps lost"].met) == (2.0, False)
    assert (found["steps again"].value, found["steps again"].samples) == (1.0, (0.0, 1.0))


def test_a_cold_start_is_apart_for_processes_and_nodes() -> None:
    found = rows(join("process", 0.3, 6.0), join("process", 0.3, 8.0), join("node", 0.3, 14.0), join("node", 0.3, None))
    assert found["a process replaced, until used"].samples == (6.0, 8.0)
    assert found["a process replaced, until used"].value == 7.0
    assert found["a node arrived, until used"].samples == (14.0,)


def test_phases_and_bytes_are_the_medians_of_each_kind() -> None:
    killed = [fault("process killed", 0.3, move_s=move_s) for move_s in (0.2, 0.3, 0.7)]
    found = rows(*killed, join("process", 0.3, 6.0, halt_s=1.7, bytes_moved=116_000_000))
    assert found["process killed, move"].value == 0.3
    assert found["process killed, halt"].value == 0.02
    assert found["process killed, prepare"].value == 0.03
    assert found["process killed, until detected"].value == 0.1
    assert found["join, halt"].value == 1.7
    assert found["process killed, state moved between members"].value == 165.0
    assert found["join, state moved between members"].value == 116.0
    assert "join, until detected" not in found  # nobody detects what was planned


def test_peers_are_compared_by_stalls_and_of_a_join_by_standstill() -> None:
    ray = {"samples": [sample("process killed", 18.0), sample("join", 30.0, standstill_s=15.0)]}
    torchft = {"samples": [sample("process killed", 1.0), sample("process killed", 9.0, recovered=False)]}
    found = rows(fault("process killed", 0.5), join("process", 0.3, 6.0), ray=ray, torchft=torchft)
    assert found["Ray Train / Concertina, process killed"].value == pytest.approx(36.0)
    assert found["Ray Train / Concertina, join"].value == pytest.approx(50.0)
    assert found["torchft / Concertina, process killed"].value == pytest.approx(2.0)
    assert found["torchft / Concertina, process killed"].met is False
    assert "Ray Train / Concertina, node killed" not in found
