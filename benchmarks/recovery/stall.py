"""How long did a run stand still, and what did it lose? Answered from the lines that its ranks wrote, and the fault.

A rank writes a line for every step it has applied: `time rank pid world step`, time on CLOCK_MONOTONIC, which all
processes of a machine share. A step counts as applied when its first rank says so, before the fault as after it.

The world after a fault is seen in its lines: another size, or processes that were not there before. What the old world
still writes after the fault (a step that was in flight, or everything until a join takes effect) is the old world's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["Line", "Outage", "StepLog", "outage_of", "read_lines"]

NORMAL_STEPS = 10
"""So many steps of the world after, at most, make its normal step; with a checkpoint among them it stays a step."""

FEWEST_STEPS = 3

_SUFFIX = ".steps"


@dataclass(frozen=True)
class Line:
    """A rank has applied a step."""

    at_s: float
    rank: int
    pid: int
    world: int
    step: int

    @classmethod
    def parse(cls, text: str) -> Line:
        at_s, *numbers = text.split()
        return cls(float(at_s), *map(int, numbers))

    def __str__(self) -> str:
        return f"{self.at_s:.6f} {self.rank} {self.pid} {self.world} {self.step}"


@dataclass(frozen=True)
class Outage:
    """What one fault cost."""

    stall_s: float
    """From the fault until the world after has applied one step more than was applied before; less a normal step."""
    standstill_s: float
    """The same, from the old world's last step if that came after the fault: what a join costs those who are there."""
    normal_step_s: float
    """Median step of the world after."""
    step_before: int
    """The last step that the old world applied."""
    steps_lost: int
    """Applied before the fault, and not in the state that the world after began with."""
    steps_again: int
    """How many step numbers were applied a second time, by a survivor or by a world without any."""
    world_before: int
    world_after: int

    def document(self) -> dict[str, Any]:
        return asdict(self)


class StepLog:
    """What a rank writes its lines to; each is in the kernel's hands before the next step, so a SIGKILL loses none."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._rank = rank
        self._pid = os.getpid()
        self._file = os.open(folder / f"{self._pid}{_SUFFIX}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def applied(self, step: int, world: int, rank: int | None = None) -> None:
        """Call right after the optimizer."""
        line = Line(time.monotonic(), self._rank if rank is None else rank, self._pid, world, step)
        os.write(self._file, f"{line}\n".encode())


def read_lines(folder: Path) -> list[Line]:
    """All whole lines of all ranks, in the order of time."""
    texts = [path.read_text() for path in folder.glob(f"*{_SUFFIX}")]
    whole = [line for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return sorted((Line.parse(line) for line in whole), key=lambda line: line.at_s)


def outage_of(lines: Sequence[Line], fault_s: float) -> Outage | None:
    """None as long as the world after has not applied `FEWEST_STEPS` more than one new step.

    `lines` in the order of time, those before the fault included, none of after the next fault.
    Raises ValueError when the run had applied nothing before the fault.
    """
    before = [line for line in lines if line.at_s <= fault_s]
    if not before:
        raise ValueError(f"no step was applied before the fault at {fault_s:.3f}: nothing to compare with")
    pids, world = {line.pid for line in before}, before[-1].world
    changed = [line.at_s for line in lines if line.at_s > fault_s and (line.pid not in pids or line.world != world)]
    if not changed:
        return None
    old = [line for line in lines if line.at_s < changed[0]]
    new = [line for line in lines if line.at_s >= changed[0]]
    step_before = max(line.step for line in old)
    applied = _first_times(line for line in new if line.step > step_before)
    if len(applied) <= FEWEST_STEPS:
        return None
    times = [applied[step] for step in sorted(applied)][: NORMAL_STEPS + 1]
    normal_s = median(later - earlier for earlier, later in pairwise(times))
    repeated = _repeated(old, new, step_before)
    return Outage(
        stall_s=times[0] - fault_s - normal_s,
        standstill_s=times[0] - max(fault_s, _first_times(old)[step_before]) - normal_s,
        normal_step_s=normal_s,
        step_before=step_before,
        steps_lost=step_before - min(repeated) + 1 if repeated else 0,
        steps_again=len(repeated),
        world_before=world,
        world_after=next(line.world for line in new if line.step > step_before),
    )


def _repeated(old: Sequence[Line], new: Sequence[Line], step_before: int) -> set[int]:
    """Steps applied twice. A process that joins survivors may write the step that they are at: no repetition."""
    last: dict[int, int] = {}
    for line in old:
        last[line.pid] = max(line.step, last.get(line.pid, line.step))
    survivors = last.keys() & {line.pid for line in new}
    if survivors:
        return {line.step for line in new if line.pid in survivors and line.step <= last[line.pid]}
    return {line.step for line in new if line.step <= step_before}


def _first_times(lines: Iterable[Line]) -> dict[int, float]:
    """Step -> when its first rank had applied it."""
    times: dict[int, float] = {}
    for line in lines:
        times.setdefault(line.step, line.at_s)
    return times
