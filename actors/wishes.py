"""What does whoever watches a run want of it, and is somebody watching at all?

Wishes are said again with every poll: a coordinator that restarts hears them again.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from concertina.elastic.waits import BOUNDS

__all__ = ["Wishes"]


@dataclass
class Wishes:
    """`stop` is the reason to stop, empty while nobody asked; `now` is without a checkpoint. Neither is taken back."""

    stop: str = ""
    now: bool = False
    left: threading.Event = field(default_factory=threading.Event)
    heard_s: float = field(default_factory=time.monotonic)

    def hear(self, stop: str = "", now: bool = False) -> None:
        """Somebody watches, and may want something."""
        self.heard_s = time.monotonic()
        self.stop = self.stop or stop
        self.now = self.now or now

    def forgive(self) -> None:
        """This process was stopped itself: others' silence meanwhile says nothing."""
        self.heard_s = time.monotonic()

    @property
    def driver_gone(self) -> bool:
        return time.monotonic() - self.heard_s > BOUNDS["driver_silence"].seconds
