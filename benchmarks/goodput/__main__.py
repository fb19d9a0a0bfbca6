"""python -m benchmarks.goodput --trace FILE -o FILE: how much of what a recorded spot market offered does a run use?

A run of up to 16 ranks (`cluster.device: timed`, emulated compute) on Ray nodes that come and are killed, without
notice, as the trace says, time compressed. Goodput is its committed tokens over those of an oracle that makes the best
of whatever nodes are there and never stalls. What changes of membership cost does not depend on how quickly they follow
each other: so the same lost seconds over the trace's real time are the projection, which is reported apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.goodput.replay import LENGTH, SEQUENCES, Market, Measured, TimedRun
from benchmarks.goodput.trace import Change, fit, oracle, read_trace, thinned
from benchmarks.recovery.ray_train import Settings, set_environment
from benchmarks.recovery.watch import own_all
from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from concertina.errors import UserError
from infra.processes import end_descendants

__all__ = ["main", "replay", "rows_of"]

GOALS = {"p3": 0.98, "g4dn": 0.99}
"""Projected to real time, by how a trace's file begins."""
WHY = "see docs/log.md"


def replay(changes: Sequence[Change], compress: float, most: int) -> dict[str, Any]:
    """What the run made of it. Raises UserError when it does not begin, or ends."""
    with tempfile.TemporaryDirectory(prefix="goodput-") as name:
        folder = Path(name)
        set_environment(folder, Settings())
        try:
            market = Market(folder)
            began = time.monotonic()
            market.make(changes[0], lambda: 0.0)
            run = TimedRun(folder, market.address, most)
            run.await_world(min(most, len(changes[0].added)))
            began, begin_s = time.monotonic(), time.time()
            for change in changes[1:]:
                time.sleep(max(0.0, began + change.at_s / compress - time.monotonic()))
                market.make(change, lambda: time.monotonic() - began)
                run.check()
            length_s = max(time.monotonic() - began, changes[-1].at_s / compress)
            measured = Measured.of(run.events(), begin_s, begin_s + length_s)
            run.stop()
            market.close()
        finally:
            end_descendants(timedelta(seconds=10))
    return {"measured": measured, "done": market.done, "length_s": length_s}


def rows_of(found: dict[str, Any], trace: str, real_s: float, most: int) -> list[Row]:
    """Compressed as measured, projected, what changes took, and where members' time went."""
    measured: Measured = found["measured"]
    step_s = fit(measured.step_s)
    tokens_a_step = SEQUENCES * LENGTH
    best = oracle(found["done"], found["length_s"], lambda nodes: tokens_a_step / step_s(min(nodes, most)))
    goodput = measured.tokens / best
    lost_s = (1 - goodput) * found["length_s"]
    goal = next((value for name, value in GOALS.items() if trace.startswith(name)), None)
    rows = [
        Row("goodput, projected to real time", 1 - lost_s / real_s, "of the oracle", goal, reason=WHY),
        Row("goodput, compressed", goodput, "of the oracle"),
        Row("lost in all, as of a whole world", lost_s, "s"),
        Row("changes of nodes", len(found["done"]), "changes"),
    ]
    for cause in sorted({said["cause"]["reason"] for said in measured.recoveries}):
        stalls = [float(said["stall_s"]) for said in measured.recoveries if said["cause"]["reason"] == cause]
        rows.append(Row.of(f"stall, {cause}", "s", stalls))
    total = float(measured.ledger.get("total_s") or 0.0)
    for bucket, seconds in (measured.ledger.get("seconds") or {}).items():
        rows.append(Row(f"ledger, {bucket}", float(seconds) / total if total else 0.0, "of members' time"))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and show the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="ms,add|remove,node: one change a line")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=16, help="at most; every k-th node of the trace (default 16)")
    parser.add_argument("--compress", type=float, default=20.0, help="so many times as fast (default 20)")
    parser.add_argument("--hours", type=float, help="of the trace, from its beginning; all")
    parser.add_argument("--allow-dirty", action="store_true")
    options = parser.parse_args(arguments)
    own_all()
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        whole = read_trace(options.trace)
        until_s = whole[-1].at_s if options.hours is None else options.hours * 3600
        changes = thinned([change for change in whole if change.at_s <= until_s], options.ranks)
        found = replay(changes, options.compress, options.ranks)
        rows = rows_of(found, options.trace.name, changes[-1].at_s, options.ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    config = {
        "trace": options.trace.name,
        "hours": changes[-1].at_s / 3600,
        "ranks": options.ranks,
        "compress": options.compress,
        "seconds_a_step": found["measured"].step_s,
        "done": [vars(change) for change in found["done"]],
        "recoveries": found["measured"].recoveries,
    }
    write_result(options.output, config, measured, rows, emulated_compute=True)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
