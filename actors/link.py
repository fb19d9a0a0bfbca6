"""How does the loop of a member talk to the coordinator? Over the supervision channel, never waiting for it."""

from __future__ import annotations

import logging
import time

from actors.rank_log import Stamp
from actors.strike import Fuse
from concertina.elastic.channel.client import ChannelClient
from concertina.elastic.messages import Committed, Control, Message, TimeSpent, encode
from concertina.elastic.timesheet import Timesheet
from concertina.elastic.waits import BOUNDS
from concertina.train.loop import CHECKPOINT, REGROUP, STOP, Overtaken

__all__ = ["SAY_TIME_EVERY_S", "RankLink"]

log = logging.getLogger("concertina.rank")

SAY_TIME_EVERY_S = 1.0
"""How often a member that trains says where its time goes: what its death leaves to be guessed."""


class RankLink:
    """A member's `Link`. `overtaken` is set by who hears orders, and cleared by who takes a new seat."""

    def __init__(self, client: ChannelClient, stamp: Stamp) -> None:
        self.client = client
        self.stamp = stamp
        self.overtaken = False
        self.fuse: Fuse | None = None
        self._phase = ""
        self._control = Control()
        self._asked_checkpoint = False
        self._said_s = -SAY_TIME_EVERY_S

    def obey(self, control: Control) -> None:
        """The coordinator's word, from the channel's thread. Which step boundary it counts for the first rank says."""
        self._asked_checkpoint |= control.checkpoint
        self._control = control

    def regrouped(self) -> None:
        """A new generation has begun, and the word to regroup is spent."""
        self._control = Control(stop=self._control.stop)

    @property
    def orphaned(self) -> bool:
        """No coordinator has been heard for so long that the run ends by itself."""
        return self.client.silent_s > BOUNDS["coordinator_silence"].seconds

    @property
    def recorded(self) -> int:
        return self.client.recorded

    def word(self) -> int:
        word = STOP if self._control.stop or self.orphaned else 0
        word |= REGROUP if self._control.regroup else 0
        if self._asked_checkpoint:
            self._asked_checkpoint = False
            word |= CHECKPOINT
        return word

    def send(self, message: Message) -> None:
        self.client.send(encode(message), at_once=not isinstance(message, Committed))  # one a step, and no hurry

    def spent(self, sheet: Timesheet) -> None:
        """Without it, all the time since a member's last change of seats would count as such, were it to die now."""
        self.client.paced(self.stamp.step, sheet.computed_s)
        now = time.monotonic()
        if now - self._said_s < SAY_TIME_EVERY_S:
            return
        self._said_s = now
        self.client.send(encode(TimeSpent(self.stamp.member, sheet.totals(), sheet.current.value)), at_once=False)

    def come_to(self, step: int, phase: str) -> None:
        """A moment at which somebody may want this process to break. Otherwise nothing."""
        fuse = self.fuse
        if fuse is not None and fuse.burns(step, phase):
            self.fuse = None
            log.warning("breaks on purpose: %s", phase)
            fuse.strike()

    def progress(self, step: int, phase: str) -> None:
        self.client.progress(step, phase)
        self.come_to(step, phase)
        self.stamp.step = step
        if phase != self._phase:
            self._phase = phase
            log.info("%s", phase)
        self.check()

    def check(self) -> None:
        """Raises Overtaken when a newer generation has begun."""
        if self.overtaken:
            raise Overtaken
