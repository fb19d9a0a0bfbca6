"""How does a process of a run break itself, or its whole node, on purpose? By signals, as the world does it.

A fuse burns inside the member it is laid in: no poll from outside would hit a phase of milliseconds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from concertina.elastic.chaos import Deed
from concertina.errors import UserError

__all__ = ["SIGNALS", "Fuse", "end_node", "strike_self"]

SIGNALS = {Deed.KILL: signal.SIGKILL, Deed.FREEZE: signal.SIGSTOP, Deed.THAW: signal.SIGCONT}


@dataclass(frozen=True)
class Fuse:
    """Burns when a step begins, or a phase; then `strike` is called, and does not return when it kills."""

    step: int | None
    phase: str | None
    strike: Callable[[], None]

    def burns(self, step: int, phase: str) -> bool:
        """At the first step from `step` on; a phase by its name."""
        if self.phase is not None:
            return phase == self.phase
        return self.step is not None and phase == "step" and step >= self.step


def strike_self(deed: Deed) -> None:
    """This very process."""
    os.kill(os.getpid(), SIGNALS[deed])


def end_node() -> None:
    """The raylet that started this process and all below it, as if the machine had lost its power; this one last.

    Raises UserError where the process was not started by a raylet.
    """
    raylet = psutil.Process().parent()
    if raylet is None or raylet.name() != "raylet":
        raise UserError("no raylet above this process: its node cannot be ended from here")
    below = [process for process in raylet.children(recursive=True) if process.pid != os.getpid()]
    for process in [raylet, *below]:  # the raylet first, or it would start its workers again
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)
