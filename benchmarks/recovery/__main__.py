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

from benchmarks.recovery.ray_train import ROOT
from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from concertina.errors import UserError

__all__ = ["main", "rows_of"]

GOALS_S = {"process killed": 0.4, "node killed": 0.7, "process frozen": 2.4, "join": 0.3}
RATIOS = {"process killed": 30.0, "node killed": 100.0, "join": 30.0}
TORCHFT_RATIO = 2.5
WHY = "see docs/log.md"


def _run(program: str, *words: str) -> dict[str, Any]:
    """One contestant's document. Raises UserError when it fails."""
    command = [sys.executable, "-m", f"benchmarks.recovery.{program}", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{program} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def _stalls(document: dict[str, Any], kind: str, name: str = "stall_s") -> list[float]:
    return [s[name] for s in document["samples"] if s["kind"] == kind and s["recovered"]]


def _tail(values: list[float]) -> float:
    """The 99th percentile: of few samples, the largest."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def rows_of(own: dict[str, Any], ray: dict[str, Any] | None, torchft: dict[str, Any] | None) -> list[Row]:
    """The stalls of every kind with their goals, what was lost, and the ratios to the others."""
    rows: list[Row] = []
    for kind, goal in GOALS_S.items():
        stalls = _stalls(own, kind)
        if not stalls:
            continue
        rows.append(Row.of(f"{kind}, stall", "s", stalls, goal, at_most=True, reason=WHY))
        rows.append(Row(f"{kind}, stall, p99", _tail(stalls), "s"))
    samples = own["samples"]
    rows.append(Row("events survived", sum(s["recovered"] for s in samples) / len(samples), "share", 1.0, reason=WHY))
    for name in ("steps_lost", "steps_again"):
        counts = [float(s[name]) for s in samples if s["recovered"]]
        rows.append(Row(name.replace("_", " "), max(counts), "steps", 0.0, tuple(counts), at_most=True, reason=WHY))
    for other, name, goals in ((ray, "Ray Train", RATIOS), (torchft, "torchft", {"process killed": TORCHFT_RATIO})):
        for kind, goal in goals.items():
            measure = "standstill_s" if kind == "join" else "stall_s"
            ours, theirs = _stalls(own, kind, measure), _stalls(other or {"samples": []}, kind, measure)
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
    parser.add_argument("--without", nargs="*", choices=["ray_train", "torchft"], default=[])
    parser.add_argument("--allow-dirty", action="store_true")
    options = parser.parse_args(arguments)
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        own = _run("concertina", "--events", str(options.events))
        peers = {"ray_train": options.peer_events, "torchft": 3 * options.peer_events}
        found = {
            name: _run(name, "--events", str(events)) for name, events in peers.items() if name not in options.without
        }
        rows = rows_of(own, found.get("ray_train"), found.get("torchft"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    config = {"own": own | {"samples": own["samples"]}, **found}
    write_result(options.output, config, measured, rows)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
