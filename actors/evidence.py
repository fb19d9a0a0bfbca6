"""Something is wrong with a member: is it gone, frozen, cut off, or only slow?

Proof comes from Ray (a process has ended) and from agents (a process dies, or stands still). A broken connection counts
at once when peers complain, and after a while when they do not: it may be made again. Silence counts when the world
makes no step meanwhile: a member that is only slow is waited for by peers that go on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque

from actors.hands import Hands
from concertina.elastic.channel.server import ChannelServer, Silence
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.waits import BOUNDS

__all__ = ["Evidence", "is_on_storage"]

log = logging.getLogger("concertina.coordinator")

_SUSPECT_S = BOUNDS["silence"].seconds / 2
_LAST_STEPS, _LONGER = 10, 3.0
_SOONEST_S = 0.02  # silences are as old as the channel's last turn

_DIED = {
    Reason.KILLED: "its process died (SIGKILL, out of memory, or a crash)",
    Reason.OUT_OF_MEMORY: "its process died as the kernel killed one for memory",
}
_ON_STORAGE = frozenset({"checkpoint", "last checkpoint", "loading"})  # phases in which no fence wakes a member


class Evidence:
    """Looks at every member each turn, and says which are lost."""

    def __init__(self, hands: Hands, server: ChannelServer) -> None:
        self.hands, self.server = hands, server
        self.dead: dict[int, Reason] = {}  # as agents say; any thread adds to it
        self.due_s = math.inf
        """Seconds from the last look until a silence may mean more than it does now."""
        self._away: dict[int, float] = {}
        self._step, self._stepped = -1, time.monotonic()
        self._lasted: deque[float] = deque(maxlen=_LAST_STEPS)

    @property
    def stands_still(self) -> bool:
        """Whether no member has come to another step for longer than steps take."""
        usual_s = max(BOUNDS["stands_still"].seconds, _LONGER * max(self._lasted, default=0.0))
        return time.monotonic() - self._stepped > usual_s

    def forgive(self) -> None:
        """This process stood still itself: others' silence meanwhile says nothing."""
        self._away.clear()
        self._stepped = time.monotonic()

    def look(self, complaining: bool) -> list[Loss]:
        """Members that are lost, by what is known now. `complaining`: some have lost the network to their peers."""
        gone = self.hands.gone()
        died = {member: said for member, said in self.died().items() if member in self.hands.members}
        gone |= {member: said for member, said in died.items() if _says_more(said, gone.get(member))}
        losses = [self._loss(member, self._judged(member, reason), why) for member, (reason, why) in gone.items()]
        found = gone.keys()
        silences = self.server.silences()
        self._see_progress(silences)
        living = [member.number for member in self.hands.members.values() if member.pid and member.number not in found]
        stopped = self._stopped(living, silences)
        self.due_s = math.inf
        for number in living:
            loss = self._listen(number, silences.get(number), complaining, number in stopped)
            losses += [] if loss is None else [loss]
        return losses

    def died(self) -> dict[int, tuple[Reason, str]]:
        """Members whose processes have died, as agents say, whether given up since or not."""
        return {member: (reason, _DIED[reason]) for member, reason in self.dead.copy().items()}

    def _judged(self, member: int, reason: Reason) -> Reason:
        """One that cannot begin where others could says something of its node, not of the run."""
        others = any(other.pid for other in self.hands.members.values())
        return Reason.UNBORN if reason is Reason.RAISED and others and not self.hands.members[member].pid else reason

    def _stopped(self, living: list[int], silences: dict[int, Silence]) -> set[int]:
        """Agents are asked on suspicion only, about all suspects at a time: of a whole node that stands still nobody
        answers, and each question takes its bound."""
        suspects = [m for m in living if m in silences and _is_suspect(silences[m])]
        return self.hands.stopped(suspects) if suspects else set()

    def _see_progress(self, silences: dict[int, Silence]) -> None:
        """Remember when any member last came to another step, as the first beat that told of it says."""
        step = max((silence.step for silence in silences.values()), default=-1)
        if step != self._step:
            ago_s = min((s.seconds + s.progress_age_s for s in silences.values() if s.step == step), default=0.0)
            stepped = max(self._stepped, time.monotonic() - ago_s)
            if step == self._step + 1:
                self._lasted.append(stepped - self._stepped)
            self._step, self._stepped = step, stepped

    def _listen(self, member: int, silence: Silence | None, complaining: bool, is_stopped: bool) -> Loss | None:
        now = time.monotonic()
        if silence is None:
            away_s = now - self._away.setdefault(member, now)
            bound = BOUNDS["cut_off" if complaining else "cut_off_alone"]
            if away_s <= bound.seconds:
                return None
            return self._loss(member, Reason.DISCONNECTED, "its connection broke", away_s)
        self._away.pop(member, None)
        where = f"at step {silence.step}, {silence.phase}"
        if not _is_suspect(silence):
            self._look_in(_SUSPECT_S - silence.seconds)
            return None
        if is_stopped:
            return self._loss(member, Reason.FROZEN, f"its process is stopped, {where}", silence.seconds)
        still_s = min(silence.seconds, now - self._stepped)
        bound = BOUNDS["silence" if silence.phase == "step" else "silence_busy"]
        self._look_in(bound.seconds - still_s)
        if still_s > bound.seconds:
            text = f"silent for {silence.seconds:.1f} s, {where}"
            return self._loss(member, Reason.FROZEN, text, silence.seconds)
        return None

    def _look_in(self, seconds: float) -> None:
        self.due_s = min(self.due_s, max(_SOONEST_S, seconds))

    def _loss(self, member: int, reason: Reason, text: str, ago_s: float = 0.0) -> Loss:
        return Loss(member, self.hands.members[member].node_id, reason, text, time.monotonic() - ago_s)


def _says_more(said: tuple[Reason, str], ray_said: tuple[Reason, str] | None) -> bool:
    """Whether an agent knows what Ray, when it is as quick, may not."""
    return ray_said is None or (ray_said[0], said[0]) == (Reason.KILLED, Reason.OUT_OF_MEMORY)


def _is_suspect(silence: Silence) -> bool:
    return silence.seconds > _SUSPECT_S


def is_on_storage(silence: Silence | None) -> bool:
    """Whether a member that is heard waits for nobody but a disk, which may take a while."""
    if silence is None or silence.suspicious:
        return False
    return silence.phase in _ON_STORAGE and silence.progress_age_s < BOUNDS["storage"].seconds
