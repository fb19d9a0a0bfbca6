"""Who writes down what members say, when storage takes its time? A thread of its own, in order: the channel's thread
waits for none of it, and goes on hearing that everybody lives.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from actors.book import Book
from concertina.elastic.messages import Message
from concertina.elastic.waits import BOUNDS
from concertina.errors import RankFailure

__all__ = ["Recorder"]

log = logging.getLogger("concertina.coordinator")

_MOST = 10_000  # as many as a member keeps unacknowledged


class Recorder:
    """Of one book. `put` is the channel's thread's, the other verbs are the conductor's."""

    def __init__(self, book: Book, told: Callable[[Message | None], None], most: int = _MOST) -> None:
        """`told` hears of each message once it is recorded, and None when one could not be, in this thread. At most
        `most` are queued."""
        self.broken: BaseException | None = None
        """Why one could not be recorded; no later one is."""
        self._book, self._told = book, told
        self._queue: queue.Queue[tuple[Callable[[], None] | None, threading.Event] | None] = queue.Queue(most)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()
        book.catch_up, book.in_turn = self.drain, self.do

    def put(self, message: Message) -> threading.Event:
        """Queue a message; set is what comes back once it is on storage. Waits only when far too many are queued, and
        raises RankFailure when none of them is recorded within a bound."""
        written = threading.Event()
        self._enqueue(partial(self._record, message), written)
        return written

    def do(self, job: Callable[[], None]) -> None:
        """After all that was put before, and before all that is put from now on. Waits and raises as `put`."""
        self._enqueue(job, threading.Event())

    def _enqueue(self, job: Callable[[], None], done: threading.Event) -> None:
        bound = BOUNDS["recorder_full"]
        try:
            self._queue.put((job, done), timeout=bound.seconds)
        except queue.Full:
            text = f"storage has taken none of the last {self._queue.maxsize} records in {bound.seconds:g} s"
            raise RankFailure(f"{text}: is it full, or does it hang? Resume when it answers") from None

    def drain(self) -> bool:
        """Wait until all that was put before is recorded, or cannot be; False at the bound."""
        reached, bound_s = threading.Event(), BOUNDS["record"].seconds
        with suppress(queue.Full):
            self._queue.put((None, reached), timeout=bound_s)
        if reached.wait(bound_s):
            return True
        log.warning("%s", BOUNDS["record"])
        return False

    def close(self) -> None:
        """Record what is queued, and end. Safe to call twice."""
        if self._thread.is_alive() and self.drain():
            self._queue.put(None)  # there is room: nothing is put any more
            self._thread.join(BOUNDS["record"].seconds)

    def _run(self) -> None:
        while (queued := self._queue.get()) is not None:
            job, done = queued
            if job is None or self._is_done(job):
                done.set()  # else it is never acknowledged: whoever says it keeps it

    def _is_done(self, job: Callable[[], None]) -> bool:
        """Whether it could be done, as all before it."""
        if self.broken is not None:
            return False
        try:
            job()
        except Exception as error:
            log.exception("what a member said cannot be recorded")
            self.broken = error
            self._told(None)
        return self.broken is None

    def _record(self, message: Message) -> None:
        self._book.record(message)
        self._told(message)
