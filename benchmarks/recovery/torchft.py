"""python -m benchmarks.recovery.torchft --events 10: how long does torchft stand still when a replica is killed, or
frozen, and what does it cost the others when one comes back?

A lighthouse, four replica groups of one rank, data parallel over gloo. A killed replica is started again only when the
stall has been measured: a supervisor that restarts it at once would take the survivors' cores from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.recovery import faults
from benchmarks.recovery.faults import Fault
from benchmarks.recovery.torchft_replica import LIGHTHOUSE
from benchmarks.recovery.watch import Watch, document_of, own_all
from concertina.errors import UserError
from infra.processes import end_descendants

__all__ = ["PROFILES", "Settings", "main", "measure"]

REPLICAS = 4
ROOT = Path(__file__).resolve().parents[2]
KILLED, FROZEN = "process killed", "process frozen"


@dataclass(frozen=True)
class Settings:
    """torchft's dials; what is given here is what its README, its lighthouse and its Manager say."""

    heartbeat_timeout_ms: int = 5000
    quorum_tick_ms: int = 100
    join_timeout_ms: int = 10_000
    heartbeat_interval_ms: int = 100
    timeout_s: int = 60
    quorum_timeout_s: int = 60


# A ring's members beside the dead one notice at once, the one opposite does not: it hangs in its collective until the
# others form a quorum without it, which they do when the join timeout is over and the dead one has missed its
# heartbeats. So both dials make the stall; too short, they split off whoever is merely late.
PROFILES = {
    "default": Settings(),
    "tuned": Settings(heartbeat_timeout_ms=1000, join_timeout_ms=1000, quorum_tick_ms=10, timeout_s=10),
    "aggressive": Settings(500, quorum_tick_ms=10, join_timeout_ms=500, heartbeat_interval_ms=50, timeout_s=10),
}


class Processes:
    """The lighthouse and the replicas, by index."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder = folder
        self._settings = json.dumps(asdict(settings))
        paths = [str(ROOT / "platform"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._environment["TORCHFT_LIGHTHOUSE"] = self._start(LIGHTHOUSE, subprocess.PIPE)

    def start(self, index: int) -> None:
        self._start(str(index), None)

    def pid(self, index: int) -> int:
        return self._running[str(index)].pid

    def reap(self, index: int) -> None:
        self._running.pop(str(index)).wait(10)

    def check(self) -> None:
        """Raises UserError when one has ended that nobody killed."""
        for role, process in self._running.items():
            if process.poll() is not None:
                tail = self._log(role).read_text(errors="replace")[-2000:]
                raise UserError(f"torchft's process {role} ended with {process.returncode}:\n{tail}")

    def _log(self, role: str) -> Path:
        return self._folder / f"{role}.log"

    def _start(self, role: str, stdout: int | None) -> str:
        """The first line that it prints, where it has a pipe."""
        command = [sys.executable, "-m", "benchmarks.recovery.torchft_replica", role, str(self._folder), self._settings]
        with self._log(role).open("ab") as log:
            process = subprocess.Popen(
                command, stdout=stdout or log, stderr=log, env=self._environment, cwd=ROOT, text=True
            )
        self._running[role] = process
        if process.stdout is None:
            return ""
        line = process.stdout.readline().strip()
        if not line:  # it ended before it said anything
            process.wait(10)
            self.check()
        return line


def measure(events: int, kind: str, settings: Settings, bound_s: float) -> list[dict[str, Any]]:
    """Two samples an event: the fault, and the replica's return."""
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="recovery-torchft-") as name:
        folder = Path(name)
        try:
            replicas = Processes(folder, settings)
            for index in range(REPLICAS):
                replicas.start(index)
            watch = Watch(folder, bound_s, replicas.check)
            watch.settle(REPLICAS)
            for event in range(events):
                samples += _event(watch, replicas, event % REPLICAS, kind)
        finally:
            end_descendants(timedelta(seconds=10))
    return samples


def _event(watch: Watch, replicas: Processes, victim: int, kind: str) -> list[dict[str, Any]]:
    watch.pause()
    pid = replicas.pid(victim)
    fault = faults.kill_process(pid) if kind == KILLED else faults.freeze_process(pid)
    if kind == KILLED:
        replicas.reap(victim)
    stalled = watch.outage(fault)
    if kind == FROZEN:
        # A frozen replica that wakes up after it was left out is another question; here it makes room.
        faults.kill_process(pid)
        replicas.reap(victim)
    watch.settle(REPLICAS - 1)
    replicas.start(victim)
    joined = watch.outage(Fault("join", monotonic()))
    watch.settle(REPLICAS)
    return [stalled, joined]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.torchft", description=__doc__)
    parser.add_argument("--events", type=int, default=10, help="faults (default 10)")
    parser.add_argument("--fault", choices=[KILLED, FROZEN], default=KILLED)
    parser.add_argument("--profile", choices=list(PROFILES), default="tuned", help="torchft's dials (default tuned)")
    parser.add_argument("--bound", type=float, default=180.0, help="seconds an event may take at most (default 180)")
    options = parser.parse_args(arguments)
    own_all()
    settings = PROFILES[options.profile]
    try:
        samples = measure(options.events, options.fault, settings, options.bound)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    trainer = {"torchft": version("torchft-nightly"), "profile": options.profile, **asdict(settings)}
    print(json.dumps(document_of("torchft", trainer, samples), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
