"""Where did every second of every member go? The coordinator keeps the ledger while the session goes on."""

from __future__ import annotations

import time

from actors.assignment import RunPlan
from actors.book import Book
from actors.hands import Hands
from actors.journal import Journal
from concertina.elastic.account import Bucket
from concertina.elastic.ledger import Ledger, Price
from concertina.elastic.losses import Loss
from concertina.elastic.messages import TimeSpent
from concertina.track.events import EventLog
from concertina.track.ledger import LedgerWriter

__all__ = ["Accounting"]


class Accounting:
    """Of one session. Called by the conductor's thread only."""

    def __init__(self, plan: RunPlan, events: EventLog, book: Book, hands: Hands, journal: Journal) -> None:
        cluster, now = plan.job.cluster, time.monotonic()
        self.book, self.hands, self.journal = book, hands, journal
        per_node = -(-cluster.num_workers // cluster.num_nodes)
        if journal.ledger:
            ago_s = max(0.0, time.time() - journal.ledger["written_s"])
            self._ledger = Ledger.from_json(journal.ledger, now - ago_s)
        else:
            self._ledger = Ledger(now, cluster.num_workers, Price(plan.job.elastic.usd_per_node_hour, per_node))
        self._writer = LedgerWriter(events, self._ledger, time.monotonic)

    def look(self) -> None:
        """Members that have come since, and those that are there no more without having been lost: they never began, or
        went while no coordinator was there. And write now and then."""
        for number, member in self.hands.members.items():
            if number not in self._ledger.members:
                self._ledger.born(number, member.born_s, member.node_id)
        for number in self._ledger.living - self.hands.members.keys():
            self._ledger.lost(number, time.monotonic())
        self._writer.look(self.book.generation, self.book.step)

    def hear(self, message: TimeSpent) -> None:
        self._ledger.report(message.member, time.monotonic(), message.seconds, Bucket(message.inside))

    def lose(self, losses: list[Loss], *, stopped: bool) -> None:
        """These are gone since they were last heard of. If that has `stopped` the world, everybody who trained has
        waited for them."""
        now = time.monotonic()
        for loss in losses:
            self._ledger.lost(loss.member, now)
        if stopped:
            self._ledger.fault(min(loss.since_s for loss in losses), now)

    def leave(self, members: list[int]) -> None:
        """These end in order, before the session does."""
        for member in members:
            self._ledger.left(member, time.monotonic())

    def write(self) -> None:
        """The membership has changed."""
        self._writer.write(self.book.generation, self.book.step)
        # A monotonic clock may begin anew with the machine: how long ago this is, only the wall's can tell.
        self.journal.ledger = {"written_s": time.time(), **self._ledger.to_json(time.monotonic())}

    def close(self) -> None:
        """The session ends."""
        now = time.monotonic()
        self._ledger.want(now, 0)
        for number in self._ledger.living:
            self._ledger.left(number, now)
        self._writer.write(self.book.generation, self.book.step)
