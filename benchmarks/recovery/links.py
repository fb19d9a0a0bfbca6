"""python -m benchmarks.recovery.links --events 20: how long does a run stand still when a host is cut off, and what
does a slow link cost?

On the lab's hosts, each with a network of its own (`concertina lab`): four of them with one rank each, shaped to a
gigabit. Needs root.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.recovery.account import own_of
from benchmarks.recovery.concertina import EventWatch, Run
from benchmarks.recovery.faults import Fault
from benchmarks.recovery.model import SUBJECT
from benchmarks.recovery.notices import gap_of
from benchmarks.recovery.ray_train import MOST, ROOT
from benchmarks.recovery.watch import document_of, own_all
from concertina.errors import UserError
from infra.lab import Lab

__all__ = ["CUT_OFF", "SLOW_LINK", "main", "measure"]

CUT_OFF, SLOW_LINK = "cut off", "slow link"
KINDS = (CUT_OFF, SLOW_LINK)
MBIT, SLOW_MBIT = 1000.0, 100.0
_SLOW_FOR_S = 15.0


class LabRun(Run):
    """The driver runs on the lab's head."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        self._lab = lab
        super().__init__(folder, lab.address, {})

    def _start(self, command: list[str], log: Any) -> subprocess.Popen[bytes]:
        paths = {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "OMP_NUM_THREADS": "1"}
        words = self._lab.command(0, command)
        return subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=self._lab.environment() | paths)


def measure(events: int, kinds: Sequence[str], bound_s: float) -> dict[str, Any]:
    """Samples of every kind, and how many were planned. Raises UserError when the run does not begin."""
    samples: list[dict[str, Any]] = []
    broken_off = None
    lab = Lab.up(MOST, cpus=1, mbit=MBIT)
    try:
        with tempfile.TemporaryDirectory(prefix="recovery-links-") as name:
            run = LabRun(Path(name), lab)
            watch = EventWatch(run, bound_s)
            watch.settle(MOST)
            for number, kind in product(range(events), kinds):
                host = 1 + number % (MOST - 1)  # never the head
                try:
                    samples.append(_cut_off(run, watch, lab, host) if kind == CUT_OFF else _slow(run, watch, lab, host))
                except UserError as error:
                    broken_off = str(error)
                    samples.append({"kind": kind, "recovered": False})
                    break
            run.stop()
    finally:
        lab.down()
    return {"samples": samples, "planned": events * len(kinds), "broken_off": broken_off}


def _cut_off(run: LabRun, watch: EventWatch, lab: Lab, host: int) -> dict[str, Any]:
    """Both ways, from everybody; when the others are at ease it comes back, and another member with it."""
    watch.pause()
    old = len(run.recoveries())
    at_s = time.monotonic()
    lab.cut(host)
    sample = watch.outage(Fault(CUT_OFF, at_s))
    lab.connect(host)
    watch.settle(MOST)
    return sample | own_of(run.recoveries()[old : old + 1])


def _slow(run: LabRun, watch: EventWatch, lab: Lab, host: int) -> dict[str, Any]:
    """A tenth of its speed for a while: nobody shall be lost, and steps are longer by what the link takes."""
    watch.pause()
    old, at_s = len(run.recoveries()), time.monotonic()
    before = gap_of(run.lines(), at_s - _SLOW_FOR_S, at_s)
    lab.slow(host, SLOW_MBIT)
    time.sleep(_SLOW_FOR_S)
    during = gap_of(run.lines(), at_s, time.monotonic())
    lab.slow(host, MBIT)
    if before is None or during is None:
        raise UserError("no two steps were done while a link was slow")
    lost = len(run.losses(at_s))
    ratio = during["normal_step_s"] / before["normal_step_s"]
    changes = len(run.recoveries()) - old
    return {"kind": SLOW_LINK, "recovered": True, "members_lost": lost, "changes": changes, "step_ratio": ratio}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.links", description=__doc__)
    parser.add_argument("--events", type=int, default=20, help="of each kind (default 20)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--bound", type=float, default=120.0, help="seconds an event may take at most (default 120)")
    options = parser.parse_args(arguments)
    own_all()
    try:
        found = measure(options.events, options.kinds, options.bound)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    trainer = {"ray": version("ray"), "mbit": MBIT, "slow_mbit": SLOW_MBIT, "sequences": SUBJECT.sequences}
    if found["broken_off"]:
        print(f"broken off: {found['broken_off']}", file=sys.stderr)
    more = {name: found[name] for name in ("planned", "broken_off")}
    print(json.dumps(document_of("Concertina in the lab", trainer, found["samples"]) | more, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
