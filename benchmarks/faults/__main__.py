"""python -m benchmarks.faults -o FILE: thousands of mixed faults. Does a run hang, leak, lose or alter a step?

2,000 on processes without Ray, whose conductor, members and network are real, and 200 through Ray, where nodes, agents
and coordinators go as well. No speed is measured here.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median

from benchmarks.faults.found import Found, leaks_of
from benchmarks.faults.series import LAYOUTS, series
from benchmarks.faults.subject import BOUND_S
from benchmarks.recovery.watch import own_all
from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from concertina.errors import UserError
from infra.processes import end_descendants

__all__ = ["main", "rows_of"]

_LOSS, _TENSOR = 1e-9, 1e-9
_BYTES_A_GENERATION = 64 << 10


def rows_of(name: str, wanted: int, found: Sequence[Found]) -> list[Row]:
    """What must not be, and what was."""
    struck = [strike for one in found for strike in one.strikes]
    hung = [f"{one.name}: {one.broken_off}" for one in found if one.broken_off]
    wrong = [strike for strike in struck if strike.expected != strike.lost]
    rows = [
        Row(f"{name}: faults", len(struck), "faults", wanted, reason="; ".join(hung)),
        Row(f"{name}: not whole again within the bound", len(hung), "runs", 0, at_most=True, reason="; ".join(hung)),
        Row(f"{name}: others lost than were struck", len(wrong), "faults", 0, at_most=True, reason=str(wrong)),
        Row(f"{name}: steps missing or twice", sum(one.flaws for one in found), "steps", 0, at_most=True),
        Row(f"{name}: left behind at the end", sum(one.left for one in found), "things", 0, at_most=True),
        Row(f"{name}: steps done", sum(one.steps for one in found), "steps"),
        Row(f"{name}: gone back to a checkpoint", sum(one.rollbacks for one in found), "times"),
    ]
    deviations = [one.deviation for one in found if one.deviation is not None]
    if deviations:
        loss, tensor = max(each.loss for each in deviations), max(each.tensor for each in deviations)
        rows += [
            Row(f"{name}: largest deviation of a loss", loss, "of one process's", _LOSS, at_most=True),
            Row(f"{name}: largest deviation of a tensor", tensor, "of one process's", _TENSOR, at_most=True),
        ]
    for whose, leak in leaks_of(found).items():
        rows += [
            Row(f"{name}: {whose}, memory", leak.bytes, "bytes a generation", _BYTES_A_GENERATION, at_most=True),
            Row(f"{name}: {whose}, threads", leak.threads, "more at the end", 0, at_most=True),
            Row(f"{name}: {whose}, descriptors", leak.descriptors, "more at the end", 0, at_most=True),
        ]
    for deed in sorted({strike.deed for strike in struck}):
        seconds = [strike.seconds for strike in struck if strike.deed == deed]
        rows.append(Row(f"{name}: whole again, {deed.replace('_', ' ')}", median(seconds), "s", samples=seconds))
    return rows


def _through_ray(faults: int, seed: int) -> Found:
    """In a process of its own, which chooses Ray's settings before it imports Ray. Raises UserError when it fails."""
    command = [sys.executable, "-m", "benchmarks.faults.through_ray", "--faults", str(faults), "--seed", str(seed)]
    bound_s = (faults + 10) * BOUND_S
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=bound_s)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{shlex.join(command)} took more than {bound_s:.0f} s") from error
    if done.returncode:
        raise UserError(f"{shlex.join(command)} ended with {done.returncode}")
    return Found.from_json(json.loads(done.stdout))


def main(arguments: Sequence[str] | None = None) -> int:
    """Strike, write and show the result; 1 when anything is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--bare", type=int, default=2000, help="faults without Ray (default 2000)")
    parser.add_argument("--ray", type=int, default=200, help="faults through Ray (default 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the runs")
    parser.add_argument("--allow-dirty", action="store_true")
    options = parser.parse_args(arguments)
    own_all()
    logging.getLogger("concertina").addHandler(logging.NullHandler())  # thousands of losses are not for the terminal
    rows: list[Row] = []
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        with tempfile.TemporaryDirectory(prefix="faults-") as name:
            folder = options.keep or Path(name)
            folder.mkdir(parents=True, exist_ok=True)
            if options.bare:
                rows += rows_of("bare", options.bare, series(folder, options.bare, options.seed))
            if options.ray:
                rows += rows_of("Ray", options.ray, [_through_ray(options.ray, options.seed)])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        end_descendants(timedelta(seconds=10))
    config = {"bare": options.bare, "ray": options.ray, "seed": options.seed, "layouts": LAYOUTS}
    write_result(options.output, config, measured, rows)
    print(show(rows))
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
