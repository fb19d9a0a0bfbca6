"""Do the rows say what the turns and the events say, and do burners burn and end?"""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest

from benchmarks.results import Row
from benchmarks.supervision.__main__ import cost_rows, strain_rows
from benchmarks.supervision.cost import OFF, REAL, STEPS_A_TURN, TENFOLD, Turns
from benchmarks.supervision.oversubscribed import Strain, burners, strain_of
from concertina.elastic.channel import Gaps
from concertina.track.events import Event, EventType
from tests.waiting import wait_until

pytestmark = pytest.mark.unit

SECOND_NS = 10**9


def turns_of(rank: int, step_s: float, beats_a_second: dict[str, float], commit_s: float = 0.0) -> Turns:
    """Every beat takes 100 us of the rank's thread and 50 us of the coordinator's, for each of two ranks; every commit
    200 us of the first rank's thread and 300 us of the coordinator's."""
    turns: Turns = {}
    for way, beats in beats_a_second.items():
        seconds = step_s * STEPS_A_TURN
        first = rank == 0
        one: dict[str, Any] = {
            "seconds": seconds,
            "cpu_s": beats * seconds * 100e-6 + first * STEPS_A_TURN * 200e-6,
            "server_cpu_s": first * (2 * beats * seconds * 50e-6 + STEPS_A_TURN * 300e-6),
            "commit": [commit_s] * STEPS_A_TURN,
            "commit cpu": [commit_s / 2] * STEPS_A_TURN,
            "note": [30e-6] * STEPS_A_TURN,
            "note cpu": [20e-6] * STEPS_A_TURN,
            "progress cpu": [5e-6] * STEPS_A_TURN,
            "reduce": [0.0015, 0.0025],
            "reduce without": [0.0014, 0.0024],
        }
        if first:
            one["send"] = [commit_s] * STEPS_A_TURN
        turns[way] = [one, dict(one)]
    return turns


def by_name(rows: list[Row]) -> dict[str, Row]:
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def test_costs_are_shares_of_a_step_of_all_cores() -> None:
    beats = {OFF: 0.0, REAL: 5.0, TENFOLD: 50.0}
    rows = by_name(cost_rows([turns_of(0, 0.5, beats, 400e-6), turns_of(1, 0.5, beats, 8e-6)], cores=2))
    assert rows["heartbeats: a rank's supervisor thread"].value == pytest.approx(5 * 100e-6)
    assert rows["heartbeats: the coordinator's channel thread, for a member"].value == pytest.approx(5 * 50e-6)
    all_beats = 100 * 2 * (5 * 150e-6 + 5e-6 / 0.5) / 2
    assert rows["heartbeats: all ranks and the coordinator, of 2 cores"].value == pytest.approx(all_beats)
    assert rows["commits: two numbers more in the all-reduce"].value == pytest.approx(100.0)
    assert rows["commits: commit, first rank, p99"].value == pytest.approx(400.0)
    assert rows["commits: the coordinator writes one down"].value == pytest.approx(300.0)
    trains = 200e-6 + 4e-6 + 2 * 20e-6
    all_commits = 100 * (100e-6 + (trains + 200e-6 + 300e-6) / 2) / 0.5
    assert rows["commits: all ranks and the coordinator, of 2 cores"].value == pytest.approx(all_commits)
    whole = rows["heartbeats and commits: all ranks and the coordinator, of 2 cores"]
    assert whole.value == pytest.approx(all_beats + all_commits)
    assert (whole.goal, whole.met) == (0.5, True)
    own = 100 * (5 * 100e-6 + 5e-6 / 0.5 + (100e-6 + 200e-6 + 20e-6 + 200e-6) / 0.5)
    assert rows["heartbeats and commits: the first rank, of a core of its own"].value == pytest.approx(own)


def test_more_than_half_a_percent_is_missed() -> None:
    beats = {OFF: 0.0, REAL: 50.0, TENFOLD: 500.0}
    rows = by_name(cost_rows([turns_of(0, 0.5, beats), turns_of(1, 0.5, beats)], cores=2))
    assert rows["heartbeats and commits: all ranks and the coordinator, of 2 cores"].met is False


def test_step_times_of_ten_times_as_many_are_extrapolated() -> None:
    """A step of 1 s takes 1.018 s with ten times the beats: nine times their cost."""
    ranks = [turns_of(rank, 1.0, {OFF: 0.0, REAL: 5.0, TENFOLD: 50.0}) for rank in range(2)]
    for rank in ranks:
        for turn in rank[TENFOLD]:
            turn["seconds"] *= 1.018
    rows = by_name(cost_rows(ranks, cores=2))
    assert rows["heartbeats by step times: from 10 times as many"].value == pytest.approx(0.2)
    assert rows["heartbeats by step times: against none"].value == pytest.approx(0.0)


def event(at_s: float, kind: EventType, **data: Any) -> Event:
    return Event(int(at_s * SECOND_NS), "run", 0, kind, 0, 1, data, 0)


def gaps_of(*seconds: float) -> dict[str, Any]:
    gaps = Gaps()
    for each in seconds:
        gaps.add(each)
    return gaps.to_json()


def test_only_what_happens_under_strain_counts_and_gaps_of_all_coordinators_do() -> None:
    events = [
        event(1, EventType.MEMBER, what="lost", member=7, reason="frozen: before"),
        event(2, EventType.STEP, step_s=0.3),
        event(11, EventType.STEP, step_s=0.9),
        event(12, EventType.MEMBER, what="ready", member=1),
        event(13, EventType.MEMBER, what="lost", member=2, reason="frozen: silent"),
        event(14, EventType.HEARTBEATS, training={"1": gaps_of(0.2), "2": gaps_of(0.4)}, busy={}),
        event(15, EventType.HEARTBEATS, training={"1": gaps_of(1.5)}, busy={"1": gaps_of(3.0)}),
    ]
    strain = strain_of(events, 10 * SECOND_NS, 2.0, [3.0, 4.0, 4.0], "")
    assert strain.steps_s == [0.9]
    assert strain.given_up == ["member 2: frozen: silent"]
    assert strain.gaps is not None
    assert (len(strain.gaps), strain.gaps.longest_s) == (3, 1.5)
    rows = by_name(strain_rows(strain, 2.0))
    lost = rows["oversubscribed: members given up"]
    assert (lost.value, lost.met, lost.reason) == (1, False, "member 2: frozen: silent")
    assert rows["oversubscribed: gaps between heartbeats, busy otherwise, longest"].value == 3.0
    assert rows["oversubscribed: longest gap of the 2 s of `silence`, training"].value == 0.75


def test_a_run_that_ended_early_has_missed_its_minutes() -> None:
    strain = Strain(0.5, [], [], None, None, ended="concertina train ended with 1")
    rows = by_name(strain_rows(strain, 10.0))
    lasted = rows["oversubscribed: it lasted"]
    assert (lasted.met, lasted.reason) == (False, "concertina train ended with 1")
    assert not any("gaps" in name for name in rows)


def test_burners_use_their_cores_and_end() -> None:
    processes: list[psutil.Process] = []

    def fail_in_the_middle() -> None:
        with burners(2) as burning:
            processes.extend(psutil.Process(each.pid) for each in burning)
            assert all(process.nice() == os.nice(0) for process in processes)
            wait_until(lambda: all(sum(process.cpu_times()[:2]) > 0.1 for process in processes))
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        fail_in_the_middle()
    assert len(processes) == 2
    assert not any(process.is_running() for process in processes)
