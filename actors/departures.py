"""Which nodes will go, and who on them may end? Notices come from agents and from Ray; who has left a node is dismissed
before it goes.

Leaving itself is a change like others (`regrouping.py`): members on doomed nodes hand over what they have at a step
boundary, and are spares from then on.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Collection

from actors.book import Book
from actors.cluster import RayCluster
from actors.hands import Hands
from actors.regrouping import Regrouping
from actors.wishes import Wishes
from concertina.elastic.notices import UNKNOWN_LEAD_S, Notice, Notices, Source
from concertina.track.events import EventType
from concertina.track.recovery import short_node

__all__ = ["Departures"]

log = logging.getLogger("concertina.coordinator")

_ASK_RAY_S = 1.0


class Departures:
    """Of one session. `hear` may be called by any thread, `look` by the conductor's. `dismiss` ends members of a node,
    in order."""

    def __init__(
        self,
        notices: Notices,
        book: Book,
        hands: Hands,
        regrouping: Regrouping,
        cluster: RayCluster,
        dismiss: Callable[[str, list[int]], None],
    ) -> None:
        self.notices, self.book, self.hands, self.regrouping = notices, book, hands, regrouping
        self._cluster = cluster
        self._dismiss = dismiss
        self._heard: queue.SimpleQueue[tuple[str, Collection[Source], Collection[Notice]]] = queue.SimpleQueue()
        self._asked_s = 0.0
        self._without_end: dict[str, float] = {}  # nodes drained until nobody knows when: since when

    def hear(self, node: str, sources: Collection[Source], found: Collection[Notice]) -> None:
        """All that these sources say of a node at this moment."""
        self._heard.put((node, sources, found))

    def look(self, wishes: Wishes) -> None:
        """Take in what was said, and dismiss who has left."""
        now = time.monotonic()
        if now - self._asked_s > _ASK_RAY_S:
            self._asked_s = now
            self._ask_ray(now)
        while not self._heard.empty():
            node, sources, found = self._heard.get()
            for news in self.notices.hear(node, sources, found, now):
                log.warning("node %s: %s", short_node(node), news)
                self.book.event(EventType.NOTICE, self.book.step, node=node, **news.to_json())
        if self.notices.is_time_to_leave([self._cluster.home], now):
            wishes.hear("the node of Ray's head is taken back")
        free = {node: self._free(node, now) for node in sorted(self.notices.doomed)}  # before the first is dismissed
        for node, members in free.items():
            if members:
                self._dismiss(node, members)

    def _ask_ray(self, now: float) -> None:
        for node, left_s in self._cluster.draining().items():
            if left_s is None:
                left_s = max(0.0, self._without_end.setdefault(node, now) + UNKNOWN_LEAD_S - now)
            self.hear(node, [Source.RAY], [Notice(Source.RAY, left_s, "drained")])

    def _free(self, node: str, now: float) -> list[int]:
        """Members on a doomed node that may end now: all of them, or none."""
        there = [member.number for member in self.hands.members.values() if member.node_id == node]
        return there if self.notices.is_given_back(node, now) and self._can_spare(there) else []

    def _can_spare(self, members: Collection[int]) -> bool:
        """Whether none of these has anything that the run needs: it trains without them, or has written all it has."""
        generations = self.regrouping.generations
        if generations.shortage is not None:
            reports = generations.reports.values()
            if not generations.holders <= generations.reports.keys():
                return False  # they have yet to say what they have
            return self.book.newest_checkpoint() >= max((report.step for report in reports), default=0)
        seating = generations.seating
        return generations.is_settled and seating is not None and set(seating.members).isdisjoint(members)
