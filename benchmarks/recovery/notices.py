"""What does a run stand still for when a node is told that it goes, and when that is taken back?

The notice is Ray's own (`DrainNode`, 30 s, then the node is killed), which Ray Train sees as well; one that is taken
back is Azure's, by a metadata service of the node's agent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.recovery.account import Seated, join_of, own_of
from benchmarks.recovery.stall import Line
from concertina.errors import UserError
from infra.draining import drain_node

if TYPE_CHECKING:
    from benchmarks.recovery.concertina import EventWatch, Run
    from benchmarks.recovery.ray_train import Nodes
    from benchmarks.recovery.roster import Roster

__all__ = ["LEAD_S", "NOTICE", "TAKEN_BACK", "gap_of", "notice_event", "taken_back_event"]

NOTICE, TAKEN_BACK = "notice", "notice taken back"
LEAD_S = 30.0
_WATCHED_S = 12.0
_TAKEN_BACK_AFTER_S = 3.0


def notice_event(run: Run, watch: EventWatch, nodes: Nodes, victim: Seated, old: int) -> dict[str, Any]:
    """The sample: the change that leaves the node, whether anybody was lost, and that it was empty when it went.

    Raises UserError when the run does not leave it in time.
    """
    at_s = time.monotonic()
    drain_node(victim.node, LEAD_S, "benchmark")
    said = _leaves(run, old, at_s + LEAD_S)
    left_s = time.monotonic() - at_s
    time.sleep(max(0.0, at_s + LEAD_S - time.monotonic()))
    nodes.kill_id(victim.node)
    watch.settle(said["world_after"])
    sample = join_of(run.lines(), said, None) | own_of([said])
    lost = len(run.losses(at_s))
    return sample | {"kind": NOTICE, "left_s": left_s, "members_lost": lost, "steps_lost": 0, "steps_again": 0}


def _leaves(run: Run, old: int, until_s: float) -> Mapping[str, Any]:
    while time.monotonic() < until_s:
        found = [said for said in run.recoveries()[old:] if said["cause"]["reason"] == "notice"]
        if found:
            return found[0]
        run.check()
        time.sleep(0.1)
    raise UserError(f"the run did not leave a node within the {LEAD_S:.0f} s of its notice")


def taken_back_event(run: Run, roster: Roster, victim: Seated, old: int) -> dict[str, Any]:
    """The sample of one that is taken back 3 s later: the longest step meanwhile, beside a normal one."""
    at_s = time.monotonic()
    roster.notice(victim.node)
    time.sleep(_TAKEN_BACK_AFTER_S)
    roster.take_back(victim.node)
    time.sleep(_WATCHED_S)
    changes = len(run.recoveries()) - old
    found = gap_of(run.lines(), at_s, time.monotonic())
    return {"kind": TAKEN_BACK, "recovered": found is not None, "changes": changes} | (found or {})


def gap_of(lines: Sequence[Line], since_s: float, until_s: float) -> dict[str, Any] | None:
    """By how much the longest step in that time was longer than a normal one, in seconds and in normal steps; None
    without two steps."""
    times = [line.at_s for line in lines if since_s <= line.at_s <= until_s]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if not gaps:
        return None
    normal_s = median(gaps)
    stall_s = max(gaps) - normal_s
    return {"stall_s": stall_s, "normal_step_s": normal_s, "stall_steps": stall_s / normal_s}
