"""Where do a member's log lines go, and who speaks in them? `[gen 0 | rank 2 pp0 dp2 ep0 | step 12]` begins each."""

from __future__ import annotations

import logging
from pathlib import Path

from concertina.layout import Axis, Seating

__all__ = ["Stamp", "open_member_log"]

_ALWAYS = (Axis.PP, Axis.DP, Axis.EP)


class Stamp(logging.Filter):
    """Gives every record the generation, the seat and the step its member is at; the training thread says which."""

    def __init__(self, member: int, step: int = 0) -> None:
        super().__init__()
        self.member, self.step = member, step
        self.who = f"member {member}"

    def sit(self, generation: int, seating: Seating) -> None:
        """The member has its seat in this generation, or none."""
        layout, rank = seating.layout, seating.rank_of(self.member)
        if rank is None:
            self.who = f"gen {generation} | spare {self.member}"
            return
        named = [axis for axis in Axis if axis in _ALWAYS or (layout.degree(axis) > 1 and axis is not Axis.EDP)]
        where = " ".join(f"{axis.value}{layout.coordinate(rank, axis)}" for axis in named)
        self.who = f"gen {generation} | rank {rank} {where}"

    def filter(self, record: logging.LogRecord) -> bool:
        record.who, record.step = self.who, self.step
        return True


def open_member_log(folder: Path, member: int, step: int) -> Stamp:
    """Send what the package logs in this process to the member's file in `folder`, appending to earlier sessions'."""
    stamp = Stamp(member, step)
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"member-{member}.log")
    handler.addFilter(stamp)
    handler.setFormatter(logging.Formatter("[%(who)s | step %(step)d] %(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("concertina")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    return stamp
