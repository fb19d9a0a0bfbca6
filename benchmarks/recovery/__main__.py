"""python -m benchmarks.recovery -o FILE: how long does each trainer stand still on the same faults, same model?

Concertina, Ray Train (elastic, its dials tuned) and torchft (tuned; data parallel, a killed process) one after the
other on this machine. torchft needs the extra: pip install -c constraints.txt -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.recovery.links import CUT_OFF, SLOW_LINK
from benchmarks.recovery.notices import NOTICE, TAKEN_BACK
from benchmarks.recovery.ray_train import ROOT
from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from concertina.errors import ConcertinaError, UserError

__all__ = ["main", "rows_of"]

GOALS_S = {"process killed": 0.4, "node killed": 0.7, "process frozen": None, "node frozen": 2.4, "join": 0.3}
GOALS_S |= {NOTICE: 0.3, CUT_OFF: 2.4}
"""A frozen process has none: its node's agent tells of it early. Of a frozen node the silence tells, after 2 s."""
OWN = {"detected_s": "until detected", "halt_s": "halt", "prepare_s": "prepare", "move_s": "move"}
COMERS = {"process": "a process replaced, until used", "node": "a node arrived, until used"}
RATIOS = {"process killed": 30.0, "node killed": 100.0, "join": 30.0, NOTICE: 50.0}
PLANNED = ("join", NOTICE)
"""Nobody waits from the beginning of these: what counts is how long those who train stand still."""
MOST_STEPS_TAKEN_BACK = 1.0
TORCHFT_RATIO = 2.5
WHY = "see docs/log.md"


def _run(program: str, *words: str) -> dict[str, Any]:
    """One contestant's document. Raises UserError when it fails."""
    command = [sys.executable, "-m", f"benchmarks.recovery.{program}", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{program} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def _half(program: str, only: str | None) -> list[str]:
    """The words that choose it."""
    return [] if only is None or program == "torchft" else ["--only", only]


def _own(events: int, only: str | None) -> dict[str, Any]:
    """On one cluster, and on the lab's hosts."""
    own = _run("concertina", "--events", str(events), *_half("concertina", only))
    if only != "faults":
        lab = _run("links", "--events", str(events))
        own |= {
            "samples": own["samples"] + lab["samples"],
            "planned": own["planned"] + lab["planned"],
            "broken_off": own["broken_off"] or lab["broken_off"],
            "lab": lab["trainer"],
        }
    return own


def _values(document: dict[str, Any], kind: str, name: str) -> list[float]:
    """Of the samples that have it; one that did not recover has nothing to say."""
    return [s[name] for s in document["samples"] if s["kind"] == kind and s["recovered"] and s.get(name) is not None]


def _tail(values: list[float]) -> float:
    """The 99th percentile: of few samples, the largest."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def rows_of(own: dict[str, Any], ray: dict[str, Any] | None, torchft: dict[str, Any] | None) -> list[Row]:
    """The stalls of every kind with their goals, what was lost, what it took, and the ratios to the others."""
    rows: list[Row] = []
    for kind, goal in GOALS_S.items():
        stalls = _values(own, kind, "stall_s")
        if stalls:
            rows.append(Row.of(f"{kind}, stall", "s", stalls, goal, at_most=goal is not None, reason=WHY))
            rows.append(Row(f"{kind}, stall, p99", _tail(stalls), "s"))
    longer = _values(own, TAKEN_BACK, "stall_steps")
    if longer:
        goal = MOST_STEPS_TAKEN_BACK
        rows.append(
            Row.of(f"{TAKEN_BACK}, longest step over a normal one", "steps", longer, goal, at_most=True, reason=WHY)
        )
    slower = _values(own, SLOW_LINK, "step_ratio")
    if slower:
        rows.append(Row.of(f"{SLOW_LINK}, a step beside one at full speed", "x", slower))
        lost = _values(own, SLOW_LINK, "members_lost")
        rows.append(Row.of(f"{SLOW_LINK}, members lost", "members", lost, 0.0, at_most=True, reason=WHY))
    rows += [*_kept_rows(own), *_cold_rows(own), *_own_rows(own)]
    peers = ((ray, "Ray Train", RATIOS), (torchft, "torchft", {"process killed": TORCHFT_RATIO}))
    for other, name, goals in peers:
        rows += _peer_rows(own, other or {"samples": []}, name, goals)
    return rows


def _kept_rows(own: dict[str, Any]) -> list[Row]:
    """Events, survivors, steps: what came through, and what did not, or was not tried any more."""
    samples = own["samples"]
    rows = [Row("events survived", sum(s["recovered"] for s in samples) / own["planned"], "share", 1.0, reason=WHY)]
    faults = [s for s in samples if s.get("survivors")]
    if faults:
        kept = sum(s["survivors_kept"] for s in faults) / sum(s["survivors"] for s in faults)
        shares = tuple(s["survivors_kept"] / s["survivors"] for s in faults)
        rows.append(Row("survivors kept, same process and engine", kept, "share", 1.0, shares, reason=WHY))
    for name in ("steps_lost", "steps_again"):
        counts = tuple(float(s[name]) for s in samples if s["recovered"] and name in s)
        if counts:
            rows.append(Row(name.replace("_", " "), max(counts), "steps", 0.0, counts, at_most=True, reason=WHY))
    return rows


def _cold_rows(own: dict[str, Any]) -> list[Row]:
    """From the fault that took the one before it, or from the node's arrival, to the first step with the newcomer."""
    rows = []
    for whose, name in COMERS.items():
        those = [s for s in own["samples"] if s.get("of") == whose]
        seconds = _values({"samples": those}, "join", "until_used_s")
        if seconds:
            rows.append(Row.of(name, "s", seconds))
    return rows


def _own_rows(own: dict[str, Any]) -> list[Row]:
    """The coordinator's own record of each kind."""
    rows = []
    for kind in GOALS_S:
        for name, what in OWN.items():
            seconds = _values(own, kind, name)
            if seconds and not (kind == "join" and name == "detected_s"):
                rows.append(Row.of(f"{kind}, {what}", "s", seconds))
        moved = [size / 1e6 for size in _values(own, kind, "bytes_moved")]
        if moved:
            rows.append(Row.of(f"{kind}, state moved between members", "MB", moved))
    return rows


def _peer_rows(own: dict[str, Any], peer: dict[str, Any], name: str, goals: dict[str, float]) -> list[Row]:
    rows = []
    for kind, goal in goals.items():
        measure = "standstill_s" if kind in PLANNED else "stall_s"
        ours, theirs = _values(own, kind, measure), _values(peer, kind, measure)
        if ours and theirs:
            rows.append(Row.of(f"{name}, {kind}, stall", "s", theirs))
            ratio = rows[-1].value / max(1e-3, Row.of("", "s", ours).value)
            rows.append(Row(f"{name} / Concertina, {kind}", ratio, "x", goal, reason=WHY))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all, write and show the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--events", type=int, default=20, help="of each kind, Concertina's (default 20)")
    parser.add_argument("--peer-events", type=int, default=3, help="of each kind, Ray Train's; torchft's are thrice")
    parser.add_argument("--only", choices=["faults", "notices"], help="faults of old; or notices, and links in the lab")
    parser.add_argument("--without", nargs="*", choices=["ray_train", "torchft"], default=[])
    parser.add_argument("--allow-dirty", action="store_true")
    options = parser.parse_args(arguments)
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        own = _own(options.events, options.only)
        peers = {"ray_train": options.peer_events, "torchft": 3 * options.peer_events}
        wanted = {"ray_train"} if options.only == "notices" else set(peers)
        found = {
            name: _run(name, "--events", str(peers[name]), *_half(name, options.only))
            for name in sorted(wanted.difference(options.without))
        }
        rows = rows_of(own, found.get("ray_train"), found.get("torchft"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_result(options.output, {"own": own, **found}, measured, rows)
    print(show(rows))
    if own["broken_off"]:
        print(f"error: broken off: {own['broken_off']}", file=sys.stderr)
        return ConcertinaError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
