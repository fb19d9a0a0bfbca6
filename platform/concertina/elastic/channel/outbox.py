"""Which messages has the coordinator not acknowledged yet? They are numbered, kept, and sent again when need be."""

from __future__ import annotations

import threading
from collections import deque
from datetime import timedelta
from itertools import islice
from typing import Any

from concertina.errors import RankFailure

__all__ = ["Outbox"]


class Outbox:
    """A bounded queue from the training thread to the supervisor thread."""

    def __init__(self, member: int, most: int = 10_000) -> None:
        self._member, self._most = member, most
        self._changed = threading.Condition()
        self._kept: deque[tuple[int, dict[str, Any]]] = deque()
        self._last = 0

    def put(self, document: dict[str, Any]) -> None:
        """Number and keep; does not wait. Raises RankFailure when far too many are kept already."""
        with self._changed:
            if len(self._kept) >= self._most:
                raise RankFailure(
                    f"the coordinator has acknowledged none of this member's last {self._most} messages: "
                    "is it overloaded, or its disk full?",
                    rank=self._member,
                )
            self._last += 1
            self._kept.append((self._last, document))

    def after(self, number: int, most: int) -> list[tuple[int, dict[str, Any]]]:
        """At most so many kept messages with higher numbers, in order."""
        with self._changed:
            if not self._kept:
                return []
            skipped = max(0, number + 1 - self._kept[0][0])  # numbers have no gaps
            return list(islice(self._kept, skipped, skipped + most))

    def all(self) -> list[dict[str, Any]]:
        """Everything kept, in order."""
        with self._changed:
            return [document for _, document in self._kept]

    def acknowledge(self, number: int) -> None:
        """Everything up to `number` has arrived for good."""
        with self._changed:
            while self._kept and self._kept[0][0] <= number:
                self._kept.popleft()
            self._changed.notify_all()

    def wait_empty(self, bound: timedelta) -> bool:
        """Whether everything was acknowledged within the bound."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._kept, bound.total_seconds())
