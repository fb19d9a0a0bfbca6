"""Nobody has the whole state any more: which checkpoint does the run go back to? The newest one that is sound.

A large one takes minutes to read, so that is done in a thread of its own, and the conductor goes on turning.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from actors.assignment import RunPlan
from actors.book import Book
from concertina.elastic.generations import Coming, Restore
from concertina.errors import CheckpointError
from concertina.state.manifest import discard, give_up_partial, list_checkpoints, step_of
from concertina.state.sound import Damage, newest_sound
from concertina.track.events import EventType

__all__ = ["Restoring"]

log = logging.getLogger("concertina.coordinator")

_AT_ONCE_S = 0.5  # a checkpoint that is read within so long is not waited for in turns


class Restoring:
    """Of one session. `begin`, then, once it `is_over`, `answer`."""

    def __init__(self, plan: RunPlan, book: Book) -> None:
        self.plan, self.book = plan, book
        self._number = -1  # of the generation that asks
        self._thread: threading.Thread | None = None
        self._found: Path | None = None
        self._damaged: list[Damage] = []
        self._unread: OSError | None = None

    def begin(self, number: int) -> bool:
        """Generation `number` wants a checkpoint. What is still being written is given up. Whether it is over."""
        self.book.catch_up()
        give_up_partial(self.plan.checkpoints)
        self._number, self._found, self._damaged, self._unread = number, None, [], None
        self._thread = threading.Thread(target=self._look, args=(number,), name="restoring", daemon=True)
        self._thread.start()
        self._thread.join(_AT_ONCE_S)
        return self.is_over

    def _look(self, number: int) -> None:
        try:
            complete = list_checkpoints(self.plan.checkpoints)
        except OSError as error:
            self._unread = error
            return
        found, damaged = newest_sound(complete, self.plan.resume_from)  # that one the driver has read
        if number == self._number:
            self._found, self._damaged = found, damaged

    @property
    def is_over(self) -> bool:
        """Whether there is an answer that nobody has taken."""
        return self._thread is not None and not self._thread.is_alive()

    def answer(self, coming: Coming | None) -> Restore | None:
        """What to restore; None when another generation than the one that asked is coming by now, which asks anew if it
        must. What is damaged is removed, once there is something to go back to.

        Raises CheckpointError when there are checkpoints and none is sound, or when nobody can say whether there are.
        """
        self._thread = None
        if coming is None or coming.number != self._number:
            return None
        if self._unread is not None:
            raise CheckpointError(f"nobody has the state, and {self.plan.checkpoints} cannot be read: {self._unread}")
        for folder, why in self._damaged:
            log.warning("%s; %s is passed over", why, folder.name)
        found = self._found or self.plan.resume_from
        if found is None and self._damaged:
            raise CheckpointError(f"nobody has the state, and none of {len(self._damaged)} checkpoints is sound")
        for folder, why in self._damaged:
            discard(folder)
            path = f"checkpoints/{folder.name}"
            self.book.event(EventType.CHECKPOINT_REMOVED, self.book.step, path=path, damage=why)
        return Restore() if found is None else Restore(str(found), step_of(found))
