"""python -m benchmarks.supervision -o FILE: what does supervision cost a step, and does it give up who lives?

`cost.py` measures the first, `oversubscribed.py` the second, for `--minutes`. What a step pays is told in two ways.
Where ranks and coordinator share this machine's cores, and all of them are busy, everything that anybody's supervision
computes is taken from the step: processor time of all threads over that of all cores. A rank with a core of its own,
whose coordinator is elsewhere, pays for its own threads only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.recovery.watch import own_all
from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from benchmarks.supervision import cost, oversubscribed
from benchmarks.supervision.cost import OFF, REAL, STEPS_A_TURN, TENFOLD, TIMES, Turns
from benchmarks.supervision.oversubscribed import Strain
from concertina.elastic.channel import Gaps
from concertina.elastic.waits import BOUNDS
from concertina.errors import UserError

__all__ = ["cost_rows", "main", "strain_rows"]

GOAL_PERCENT = 0.5
SHARE = "% of step"
WHY = "see docs/log.md"


def cost_rows(ranks: list[Turns], cores: int) -> list[Row]:
    """What heartbeats and commits cost, with rows for the parts; samples are of rounds where nothing else is said."""
    rounds = range(len(ranks[0][REAL]))
    step_s = [_slowest(ranks, REAL, turn) for turn in rounds]
    beats_rank = [
        fmean(_rate(rank, REAL, turn) for rank in ranks[1:]) for turn in rounds
    ]  # the first sends commits too
    server = [
        _rate(ranks[0], REAL, turn, "server_cpu_s") - _rate(ranks[0], OFF, turn, "server_cpu_s") for turn in rounds
    ]
    of_member = [each / len(ranks) for each in server]
    saying = [max(_saying(rank[REAL][turn]) for rank in ranks) for turn in rounds]
    all_beats = [
        100 * len(ranks) * (mine + theirs + said / step) / cores
        for mine, theirs, said, step in zip(beats_rank, of_member, saying, step_s, strict=True)
    ]
    own_beats = [100 * (mine + said / step) for mine, said, step in zip(beats_rank, saying, step_s, strict=True)]
    rows = [
        Row.of(f"a step of the quickstart, {len(ranks)} ranks", "s", step_s),
        Row.of("heartbeats: a rank's supervisor thread", "CPU s/s", beats_rank),
        Row.of("heartbeats: the coordinator's channel thread, for a member", "CPU s/s", of_member),
        Row.of(f"heartbeats: all ranks and the coordinator, of {cores} cores", SHARE, all_beats),
        *_by_step_times(ranks),
    ]
    commits, all_commits, own_commits = _commit_rows(ranks, step_s, cores)
    both = [one + other for one, other in zip(all_beats, all_commits, strict=True)]
    own = [one + other for one, other in zip(own_beats, own_commits, strict=True)]
    bound: dict[str, Any] = {"goal": GOAL_PERCENT, "at_most": True, "reason": WHY}
    return [
        *rows,
        *commits,
        Row.of(f"heartbeats and commits: all ranks and the coordinator, of {cores} cores", SHARE, both, **bound),
        Row.of("heartbeats and commits: the first rank, of a core of its own", SHARE, own, **bound),
    ]


def _by_step_times(ranks: list[Turns]) -> list[Row]:
    """The cost of beats as the steps themselves show it; a check of the other way, and far noisier."""
    rounds = range(len(ranks[0][REAL]))
    times = {way: [_slowest(ranks, way, turn) for turn in rounds] for way in (OFF, REAL, TENFOLD)}
    against_none = [100 * (real / none - 1) for real, none in zip(times[REAL], times[OFF], strict=True)]
    extrapolated = [
        100 * (many / real - 1) / (TIMES - 1) for many, real in zip(times[TENFOLD], times[REAL], strict=True)
    ]
    return [
        Row.of("heartbeats by step times: against none", SHARE, against_none),
        Row.of(f"heartbeats by step times: from {TIMES} times as many", SHARE, extrapolated),
    ]


def _commit_rows(ranks: list[Turns], step_s: list[float], cores: int) -> tuple[list[Row], list[float], list[float]]:
    """Rows of the parts; then round by round the share of a step, of all cores and of the first rank's."""
    rounds = range(len(step_s))
    first = ranks[0]
    rows = []
    for part, whose, of in (
        ("commit", "first rank", ranks[:1]),
        ("send", "first rank", ranks[:1]),
        ("commit", "others", ranks[1:]),
        ("note", "every rank", ranks),
    ):
        microseconds = [1e6 * each for rank in of for turn in rank[REAL] for each in turn.get(part, [])]
        rows.append(Row.of(f"commits: {part}, {whose}", "us", microseconds))
        rows.append(Row(f"commits: {part}, {whose}, p99", _quantile(microseconds, 0.99), "us"))
    pairs = [
        1e6 * (more - less)
        for turns in first.values()
        for turn in turns
        for more, less in zip(turn["reduce"], turn["reduce without"], strict=True)
    ]
    reduces = Row.of("commits: two numbers more in the all-reduce", "us", pairs)
    says = [turn["cpu_s"] / STEPS_A_TURN for turn in first[OFF]]
    hears = [turn["server_cpu_s"] / STEPS_A_TURN for turn in first[OFF]]
    rows += [
        reduces,
        Row("commits: the all-reduce itself", 1e6 * median(_all(first, "reduce")), "us"),
        Row.of("commits: the first rank's supervisor thread, a commit", "us", [1e6 * each for each in says]),
        Row.of("commits: the coordinator writes one down", "us", [1e6 * each for each in hears]),
    ]
    waits_s = max(0.0, reduces.value / 1e6)  # everybody waits for it
    trains = [[_part(rank[REAL][turn], "commit cpu") + _part(rank[REAL][turn], "note cpu") for rank in ranks]
              for turn in rounds]  # fmt: skip
    shares = [
        100 * (waits_s + (sum(training) + said + heard) / cores) / step
        for training, said, heard, step in zip(trains, says, hears, step_s, strict=True)
    ]
    own = [
        100 * (waits_s + training[0] + said) / step for training, said, step in zip(trains, says, step_s, strict=True)
    ]
    rows.append(Row.of(f"commits: all ranks and the coordinator, of {cores} cores", SHARE, shares))
    return rows, shares, own


def strain_rows(strain: Strain, minutes: float) -> list[Row]:
    """What became of the run whose cores others wanted too, and how long its members were not heard."""
    silence_s = BOUNDS["silence"].seconds
    given_up, why = len(strain.given_up), "; ".join(strain.given_up)
    rows = [
        Row("oversubscribed: members given up", given_up, "members", 0.0, at_most=True, reason=why),
        Row("oversubscribed: it lasted", round(strain.minutes, 2), "min", minutes, reason=strain.ended),
        Row.of("oversubscribed: runnable threads for a core", "threads", strain.runnable or [0.0]),
        Row.of("oversubscribed: a step", "s", strain.steps_s or [0.0]),
        Row("oversubscribed: steps", len(strain.steps_s), "steps"),
    ]
    for name, gaps in (("training", strain.gaps), ("busy otherwise", strain.busy_gaps)):
        if gaps is not None and len(gaps):
            rows += _gap_rows(name, gaps)
    if strain.gaps is not None and len(strain.gaps):
        share = strain.gaps.longest_s / silence_s
        rows.append(Row(f"oversubscribed: longest gap of the {silence_s:g} s of `silence`, training", share, "ratio"))
    return rows


def _gap_rows(name: str, gaps: Gaps) -> list[Row]:
    of = f"oversubscribed: gaps between heartbeats, {name}"
    quantiles = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    rows = [Row(f"{of}, {label}", gaps.quantile(share), "s") for label, share in quantiles.items()]
    return [Row(of, len(gaps), "gaps"), *rows, Row(f"{of}, longest", gaps.longest_s, "s")]


def _rate(rank: Turns, way: str, turn: int, name: str = "cpu_s") -> float:
    return float(rank[way][turn][name] / rank[way][turn]["seconds"])


def _slowest(ranks: list[Turns], way: str, turn: int) -> float:
    return max(float(rank[way][turn]["seconds"]) for rank in ranks) / STEPS_A_TURN


def _saying(turn: dict[str, Any]) -> float:
    """Where a rank is, and where its time goes; processor seconds a step."""
    return _part(turn, "progress cpu") + _part(turn, "spent cpu")


def _part(turn: dict[str, Any], name: str) -> float:
    """Seconds a step; of what did not happen none."""
    return sum(turn.get(name, [])) / STEPS_A_TURN


def _all(rank: Turns, name: str) -> list[float]:
    return [each for turns in rank.values() for turn in turns for each in turn[name]]


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Exit code 2 for a dirty tree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.supervision", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file, e.g. benchmarks/results/...")
    parser.add_argument("--rounds", type=int, default=15, help="of the costs, interleaved; 0: none (default 15)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the oversubscribed run; 0: none (default 10)")
    parser.add_argument("--keep", type=Path, help="folder for that run and its driver's log")
    parser.add_argument("--allow-dirty", action="store_true", help="a trial: measure uncommitted code")
    options = parser.parse_args(arguments)
    own_all()
    cores = len(os.sched_getaffinity(0))
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        rows: list[Row] = []
        if options.rounds:
            rows += cost_rows(cost.measure(options.rounds), cores)
            print(show(rows), flush=True)
        if options.minutes:
            rows += strain_rows(oversubscribed.measure(options.minutes, options.keep), options.minutes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    config = {
        "job": {"costs": "quickstart", "oversubscribed": oversubscribed.JOB.stem},
        "rounds": options.rounds,
        "steps_a_turn": STEPS_A_TURN,
        "minutes": options.minutes,
        "burners": oversubscribed.BURNERS_A_CORE * cores,
        "cores": cores,
        "load_at_end": os.getloadavg(),
    }
    write_result(options.output, config, measured, rows)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
