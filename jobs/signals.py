"""How often has a person asked to stop, and how?"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

__all__ = ["Signals"]

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Signals:
    """SIGINT and SIGTERM, counted. Both mean the same: the first asks for a checkpoint, the second for haste."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self._told = 0

    @property
    def news(self) -> int:
        """The count, if it has grown since the last look; else 0."""
        told, self._told = self._told, self.count
        return self.count if self.count > told else 0

    def _on(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = self.name or _NAMES[signal.Signals(number)]

    def caught(self) -> AbstractContextManager[None]:
        """Counted inside; as before outside."""
        return _handled(self._on)

    @staticmethod
    def raised() -> AbstractContextManager[None]:
        """Inside, both raise KeyboardInterrupt: nothing has begun that would have to end in order."""
        return _handled(_interrupt)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _NAMES}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
