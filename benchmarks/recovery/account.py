"""What did one event of ours cost, by the run's own record? Its phases, its bytes, its join, and who came through it.

Pure: steps, recovery records and members in, a sample's values out. What was not seen has not happened: a join that is
not in the record has not recovered, and a member that nobody saw again was not kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.recovery.stall import Line, outage_of

__all__ = ["JOIN", "Seated", "join_of", "join_record", "kept_of", "own_of"]

JOIN = "join"
PHASES = ("halt_s", "prepare_s", "move_s")


@dataclass(frozen=True)
class Seated:
    """A member with a rank: its process, its node, and which engine it has; None when it did not say."""

    member: int
    pid: int
    node: str
    engine: int | None


def kept_of(before: Sequence[Seated], after: Collection[Seated], hit: Collection[int]) -> dict[str, int]:
    """How many were not hit, and how many of those have a seat afterwards in the same process with the same engine."""
    survivors = [one for one in before if one.member not in hit]
    kept = [one for one in survivors if one.engine is not None and one in after]
    return {"survivors": len(survivors), "survivors_kept": len(kept)}


def own_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one change: the coordinator's phases and bytes, of all the tries it took together; nothing without a record.

    A planned change halts late: `halt_s` has what was prepared while the others trained.
    """
    if not records:
        return {}
    own: dict[str, Any] = {name: sum(said["phases"].get(name, 0.0) for said in records) for name in PHASES}
    own |= {name: sum(said[name] for said in records) for name in ("bytes_local", "bytes_moved")}
    return own | {"detected_s": records[0]["detected_s"], "changes": len(records)}


def join_record(records: Sequence[Mapping[str, Any]], world: int) -> Mapping[str, Any] | None:
    """The one that made the world whole."""
    whole = [said for said in records if said["cause"]["reason"] == JOIN and said["world_after"] == world]
    return whole[-1] if whole else None


def join_of(lines: Sequence[Line], said: Mapping[str, Any] | None, since_s: float | None) -> dict[str, Any]:
    """How long those who trained stood still for one that came, by the steps around the record, and what it lost them.

    `lines` in the order of time, none of after the next fault. `since_s`: when a fault took its place or its node came.
    """
    missed = {"kind": JOIN, "recovered": False}
    if said is None:
        return missed
    last = [line.at_s for line in lines if line.world == said["world_before"] and line.step <= said["step"]]
    found = outage_of(lines, last[-1]) if last else None
    if found is None or found.world_after != said["world_after"]:
        return missed
    used_s = min(line.at_s for line in lines if line.at_s > last[-1] and line.world == said["world_after"])
    return (
        missed
        | found.document()
        | {
            "recovered": True,
            "stall_s": found.standstill_s,  # nobody waits from the beginning of a join
            "until_used_s": None if since_s is None else used_s - since_s,
        }
    )
