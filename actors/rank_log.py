"""Where do a rank's log lines go, and who speaks in them? `[gen 0 | rank 2 pp0 dp2 ep0 | step 12]` begins each."""

from __future__ import annotations

import logging

from actors.assignment import Assignment
from concertina.layout import Axis

__all__ = ["StepStamp", "open_rank_log"]

_ALWAYS = (Axis.PP, Axis.DP, Axis.EP)


class StepStamp(logging.Filter):
    """Gives every record the step its rank is at; the training thread says which."""

    def __init__(self, step: int = 0) -> None:
        super().__init__()
        self.step = step

    def filter(self, record: logging.LogRecord) -> bool:
        record.step = self.step
        return True


def open_rank_log(seat: Assignment) -> StepStamp:
    """Send what the package logs in this process to the rank's file, appending to earlier sessions'."""
    layout = seat.plan.layout
    named = [axis for axis in Axis if axis in _ALWAYS or (layout.degree(axis) > 1 and axis is not Axis.EDP)]
    where = " ".join(f"{axis.value}{layout.coordinate(seat.rank, axis)}" for axis in named)
    prefix = f"[gen {seat.generation} | rank {seat.rank} {where} | step %(step)d]"
    stamp = StepStamp(seat.plan.resume_step)
    path = seat.plan.folder / "logs" / f"rank-{seat.rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.addFilter(stamp)
    handler.setFormatter(logging.Formatter(f"{prefix} %(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("concertina")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    return stamp
