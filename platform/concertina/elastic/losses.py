"""A member is gone: why, and how sure is that? The one word for it, and what is done about it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Loss", "Reason"]


class Reason(StrEnum):
    """Why a member was lost, or why a run failed."""

    KILLED = "killed"
    OUT_OF_MEMORY = "out_of_memory"
    NODE = "node"
    """Its whole node went."""
    FROZEN = "frozen"
    """Its process is there and does nothing."""
    DISCONNECTED = "disconnected"
    """It cannot be reached; it may live."""
    UNREACHABLE = "unreachable"
    """The coordinator reaches it, and others of the run do not."""
    HARDWARE = "hardware"
    PREEMPTED = "preempted"
    LATE = "late"
    """It did not obey an order within its bound."""
    SLOW = "slow"
    """The others are quicker without it."""
    UNBORN = "unborn"
    """Its process could not begin, where others could."""
    USER_ERROR = "user_error"
    RAISED = "raised"

    @property
    def ends_the_run(self) -> bool:
        """Whether going on without the member cannot help: the same would happen to the next."""
        return self in (Reason.USER_ERROR, Reason.RAISED)


@dataclass(frozen=True)
class Loss:
    """One member and why it is given up; `node` runs it. `since_s`: when it was last there, on the monotonic clock of
    who says so."""

    member: int
    node: str
    reason: Reason
    text: str
    since_s: float = field(default_factory=time.monotonic, compare=False)

    def __str__(self) -> str:
        return f"member {self.member} ({self.reason.value}: {self.text})"
