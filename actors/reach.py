"""Nobody makes a step, and everybody is heard: do members' nodes reach each other? Their agents try.

A network may fail between two nodes alone. Each waits for the other then, or for somebody who does, and nothing that
the coordinator hears says who. So where a run stands still, agents open connections to the other nodes' raylets, which
listen anyway. What fails twice in a row is a link that is cut.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray

from actors.cluster import RayCluster
from actors.gone import GONE
from actors.hands import Hands
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.reach import Link, to_leave_out
from concertina.elastic.waits import BOUNDS
from concertina.track.recovery import short_node

__all__ = ["Reach"]

log = logging.getLogger("concertina.coordinator")

_PAUSE_S = 1.0


class Reach:
    """Of one session. Called by the conductor's thread only."""

    def __init__(self, hands: Hands, cluster: RayCluster) -> None:
        self.hands, self._cluster = hands, cluster
        self._calls: dict[str, Any] = {}
        self._asked_s = 0.0
        self._before: set[Link] = set()

    def look(self, stands_still: bool) -> list[Loss]:
        """Members of nodes that others do not reach: to be given up. Waits for nothing."""
        now = time.monotonic()
        if not stands_still:
            self._calls, self._before = {}, set()
            return []
        if not self._calls:
            if now - self._asked_s > _PAUSE_S:
                self._ask(now)
            return []
        ready, waiting = ray.wait(list(self._calls.values()), num_returns=len(self._calls), timeout=0)
        if waiting and now - self._asked_s < BOUNDS["ask_ray"].seconds:
            return []
        cut = self._cut(ready)
        sure, self._before, self._calls = cut & self._before, cut, {}
        return self._losses(sure) if sure else []

    def _ask(self, now: float) -> None:
        self._asked_s = now
        where = self._cluster.raylets()
        nodes = {member.node_id for member in self.hands.members.values()} & where.keys() & self.hands.agents.keys()
        if len({where[node][0] for node in nodes}) < 2:
            return  # one machine reaches itself
        for node in nodes:
            others = {other: where[other] for other in nodes if where[other][0] != where[node][0]}
            self._calls[node] = self.hands.agents[node].unreached.remote(others)

    def _cut(self, ready: list[Any]) -> set[Link]:
        """Links that somebody could not use. Who did not answer has said nothing."""
        found: set[Link] = set()
        for node, call in self._calls.items():
            if call in ready:
                try:
                    found |= {frozenset((node, other)) for other in ray.get(call)}
                except GONE as error:
                    log.debug("the agent of node %s has ended: %s", short_node(node), error)
        return found

    def _losses(self, cut: set[Link]) -> list[Loss]:
        members: dict[str, list[int]] = {}
        for member in self.hands.members.values():
            members.setdefault(member.node_id, []).append(member.number)
        order = sorted(members, key=lambda node: (node != self._cluster.home, -len(members[node]), min(members[node])))
        losses = []
        for node in to_leave_out(order, cut):
            others = sorted(short_node(other) for link in cut if node in link for other in link if other != node)
            text = f"its node does not reach node {', '.join(others)}"
            losses += [Loss(member, node, Reason.UNREACHABLE, text) for member in members[node]]
        return losses
