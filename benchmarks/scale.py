"""python -m benchmarks.scale -o FILE: how long does a world of thousands decide and plan when it loses a node?

Simulated ranks, eight a node, with the parameters of Mixtral 8x22B. Timed is what is decided between the loss and the
first byte that moves, on one core: the coordinator chooses layout, seats and second owners and learns what moves and
whether anything is lost; a member plans its own moves. Tables are made anew in each round, as in a fresh process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from concertina.config import Job, load_job
from concertina.elastic.choice import seat
from concertina.errors import UserError
from concertina.layout.pieces import ownership
from concertina.layout.reshard import ReshardPlan, plan_moves
from concertina.layout.seating import Seating

__all__ = ["main", "measure", "scale_job"]

T = TypeVar("T")

JOB = "mixtral-8x22b"
RANKS_PER_NODE = 8
GOALS_S = {1024: 2.0, 16384: 20.0}
DEGREES = {"pp": 1, "cp": 1, "tp": 8, "ep": 8, "etp": 1}
"""What the engine trains: the job's own pipeline becomes lanes of tp inside a node."""


class Timed(NamedTuple):
    """Seconds of the parts: deciding, the coordinator's plan, one member's own; and what the plan says."""

    decide_s: float
    coordinator_s: float
    member_s: float
    plan: ReshardPlan
    new: Seating

    @property
    def total_s(self) -> float:
        return self.decide_s + self.coordinator_s + self.member_s


def scale_job(ranks: int) -> Job:
    """The job on so many ranks: a sequence for every replica and two more, so that it can shrink."""
    sets = [f"layout.{axis}={degree}" for axis, degree in DEGREES.items()]
    sets += [f"cluster.num_workers={ranks}", f"cluster.num_nodes={ranks // RANKS_PER_NODE}"]
    return load_job(JOB, [*sets, f"training.global_batch_size={ranks // DEGREES['tp'] * 2}"])


def measure(job: Job, lost_node: int) -> Timed:
    """Lose a node of the job's whole world; the member that plans is the first on the node after it."""
    world = range(job.cluster.num_workers)
    nodes = {member: f"node{member // RANKS_PER_NODE}" for member in world}
    old = seat(job, nodes, None)
    left = {member: node for member, node in nodes.items() if node != f"node{lost_node}"}
    member = next(member for member in left if member > lost_node * RANKS_PER_NODE)
    ownership.cache_clear()
    decide_s, new = _timed(lambda: seat(job, left, old))
    coordinator_s, plan = _timed(lambda: _whole(job, old, new, left))
    ownership.cache_clear()
    member_s, _ = _timed(lambda: plan_moves(job.model, old, new, left.keys(), left, only=member).moves)
    return Timed(decide_s, coordinator_s, member_s, plan, new)


def _whole(job: Job, old: Seating, new: Seating, left: dict[int, str]) -> ReshardPlan:
    """What the coordinator wants to know: who moves how much, and that nothing is lost."""
    plan = plan_moves(job.model, old, new, left.keys(), left)
    assert not plan.missing
    assert plan.bytes(4).total
    return plan


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def rows_of(ranks: int, samples: list[Timed]) -> list[Row]:
    """The sum, which has the goal, and its parts; what moves once more as bytes."""
    traffic = samples[0].plan.bytes(4)
    parts = {"decide": "decide_s", "coordinator's plan": "coordinator_s", "a member's plan": "member_s"}
    total = [each.total_s for each in samples]
    slow = "see the parts"
    rows = [Row.of(f"{ranks} ranks, decide and plan", "s", total, GOALS_S.get(ranks), at_most=True, reason=slow)]
    rows += [Row.of(f"{ranks} ranks, {part}", "s", [getattr(t, name) for t in samples]) for part, name in parts.items()]
    for what in ("local", "same_node", "between_nodes"):
        rows.append(Row.of(f"{ranks} ranks, {what.replace('_', ' ')}", "GB", [getattr(traffic, what) / 1e9]))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Exit code 2 for a dirty tree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file, e.g. benchmarks/results/...")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(GOALS_S), help="worlds (default 1024 16384)")
    parser.add_argument("--rounds", type=int, default=5, help="samples, each loses another node (default 5)")
    parser.add_argument("--allow-dirty", action="store_true", help="a trial: measure uncommitted code")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        for ranks in options.ranks:
            job, num_nodes = scale_job(ranks), ranks // RANKS_PER_NODE
            rows += rows_of(ranks, [measure(job, turn * num_nodes // options.rounds) for turn in range(options.rounds)])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    config: dict[str, Any] = {"job": JOB, "layout": DEGREES, "ranks_per_node": RANKS_PER_NODE, "rounds": options.rounds}
    write_result(options.output, config, measured, rows)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
