"""Something is wrong with a rank: is it dead, frozen or only slow, and which one broke the run?

Proof comes from Ray (a process has ended) and from agents (a process stands still). Silence alone counts after a long
bound; a connection that broke may be made again.
"""

from __future__ import annotations

import logging
import time

from actors.book import Book
from actors.hands import Hands, Member
from concertina.elastic.blame import FROZE, Blame
from concertina.elastic.channel.server import ChannelServer, Silence
from concertina.elastic.waits import BOUNDS

__all__ = ["Evidence"]

log = logging.getLogger("concertina.coordinator")


class Evidence:
    """Looks at every rank each turn; names who is to blame once that can be known."""

    def __init__(self, book: Book, hands: Hands, server: ChannelServer) -> None:
        self.book, self.hands, self.server = book, hands, server
        self._away: dict[int, float] = {}
        self._since: float | None = None

    def look(self) -> Blame | None:
        """The root cause, when its evidence is in: the rank to blame is seldom the first one heard of."""
        for rank, why in self.hands.gone().items():
            self._lose(rank, why)
        silences = self.server.silences()
        for member in self.hands.members.values():
            if member.pid and member.rank not in self.book.finished and member.rank not in self.book.lost:
                self._listen(member, silences.get(member.rank))
        return self._judge()

    def _listen(self, member: Member, silence: Silence | None) -> None:
        busy_s = BOUNDS["silence_busy"].seconds
        if silence is None:
            away_s = time.monotonic() - self._away.setdefault(member.rank, time.monotonic())
            if away_s > busy_s:
                self._lose(member.rank, f"not connected for {away_s:.0f} s")
            return
        self._away.pop(member.rank, None)
        where = f"at step {silence.step}, {silence.phase}"
        if silence.seconds > BOUNDS["silence"].seconds and self.hands.is_stopped(member):
            self._lose(member.rank, f"{FROZE}: its process {member.pid} is stopped, {where}")
        elif silence.seconds > busy_s:
            self._lose(member.rank, f"{FROZE}: silent for {silence.seconds:.0f} s, {where}")

    def _lose(self, rank: int, why: str) -> None:
        if rank not in self.book.finished and rank not in self.book.lost:
            log.warning("rank %d is lost: %s", rank, why)
            self.book.lost[rank] = why

    def _judge(self) -> Blame | None:
        blame, now = self.book.blame(), time.monotonic()
        if blame is None:
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        patience = "evidence_of_others" if blame.reason == "lost" else "evidence"
        return blame if now - self._since > BOUNDS[patience].seconds else None
