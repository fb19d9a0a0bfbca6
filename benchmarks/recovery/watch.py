"""When has a run settled, and what did a fault cost? Asked from outside, by reading what its ranks have written.

Every wait has a bound: a contestant that does not go on within it has a sample that says so, or ends the measurement.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from benchmarks.recovery.faults import Fault
from benchmarks.recovery.model import SUBJECT
from benchmarks.recovery.stall import Line, outage_of, read_lines
from concertina.errors import UserError
from infra.processes import adopt_orphans

__all__ = ["Watch", "document_of", "own_all"]

POLL_S = 0.25
SETTLED_STEPS = 12
"""So many new steps in the world that is wanted; more than two checkpoints' interval would only cost time."""

MOST_PAUSE_S = 5.0


class Watch:
    """Eyes on one run's folder. `check` raises when the run is beyond hope."""

    def __init__(self, folder: Path, bound_s: float, check: Callable[[], None]) -> None:
        self._folder = folder
        self._bound_s = bound_s
        self._check = check
        self._random = Random(SUBJECT.seed)

    def lines(self) -> list[Line]:
        return read_lines(self._folder)

    def settle(self, world: int) -> None:
        """Wait until a world of that size has applied `SETTLED_STEPS` more. Raises UserError at the bound."""
        start = time.monotonic()
        while time.monotonic() < start + self._bound_s:
            steps = {line.step for line in self.lines() if line.at_s > start and line.world == world}
            if len(steps) > SETTLED_STEPS:
                return
            self._wait()
        raise UserError(f"no {SETTLED_STEPS} steps in a world of {world} within {self._bound_s:.0f} s")

    def pause(self) -> None:
        """Some seconds, by seed: a fault comes at any point of a step and of a checkpoint's interval."""
        time.sleep(self._random.uniform(0.0, MOST_PAUSE_S))

    def outage(self, fault: Fault) -> dict[str, Any]:
        """The sample of one fault; of one that the run did not survive within the bound, only that."""
        sample: dict[str, Any] = {"kind": fault.kind, "bound_s": self._bound_s, "recovered": False}
        while time.monotonic() < fault.at_s + self._bound_s:
            found = outage_of(self.lines(), fault.at_s)
            if found is not None and len(self._steps_since(fault, found.step_before)) > SETTLED_STEPS:
                return sample | {"recovered": True} | found.document()
            self._wait()
        return sample

    def _steps_since(self, fault: Fault, step: int) -> set[int]:
        return {line.step for line in self.lines() if line.at_s > fault.at_s and line.step > step}

    def _wait(self) -> None:
        self._check()
        time.sleep(POLL_S)


def own_all() -> None:
    """What this program starts stays below it, and a SIGTERM ends it in order. Call it first, and again when undone."""
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def document_of(contestant: str, trainer: dict[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a contestant prints: its settings, all samples, and a line of medians for each kind of fault."""
    summary: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(sample["kind"] for sample in samples):
        those = [sample for sample in samples if sample["kind"] == kind]
        good = [sample for sample in those if sample["recovered"]]
        summary[kind] = {"events": len(those), "recovered": len(good)}
        for name in ("stall_s", "standstill_s", "normal_step_s", "steps_lost", "steps_again"):
            values = [sample[name] for sample in good if sample.get(name) is not None]  # not every kind has all
            summary[kind][name] = {"median": median(values), "most": max(values)} if values else None
    return {
        "contestant": contestant,
        "trainer": trainer,
        "subject": asdict(SUBJECT),
        "load_at_end": os.getloadavg(),
        "summary": summary,
        "samples": list(samples),
    }
