"""Who is to work for the run? Room is asked for until there are as many members as wanted, and a node that keeps losing
them is left alone for a while."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import replace

from actors.assignment import RunPlan
from actors.cluster import RayCluster
from actors.hands import Hands
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.notices import Notices
from concertina.elastic.placement import NodeCapacity, place, shortage
from concertina.elastic.waits import BOUNDS

__all__ = ["Recruiter"]

log = logging.getLogger("concertina.coordinator")

_LOOK_S = 1.0
_ASK_S = 5.0
_MEMORY_OF_LOSSES_S = 600.0
_AS_A_NODE_GOES = frozenset({Reason.KILLED, Reason.NODE, Reason.FROZEN, Reason.DISCONNECTED})


class Recruiter:
    """Keeps the number of members at what the job wants. `waiting` says what is missing, for people."""

    def __init__(self, plan: RunPlan, hands: Hands, notices: Notices, cluster: RayCluster) -> None:
        self.job, self.hands, self.notices, self._cluster = plan.job, hands, notices, cluster
        self.waiting = ""
        self.wanted = plan.job.cluster.num_workers + plan.job.elastic.spares
        self._looked = self._asked = 0.0
        self._beside = 0
        self._losses: dict[str, list[float]] = defaultdict(list)
        self._slow: set[str] = set()  # nodes of members that were given up for that

    def ask(self, beside: int = 0) -> None:
        """Tell Ray's autoscaler, if there is one, what the run wants as long as it lasts: room for all its members, of
        which it subtracts what its nodes have, and for `beside` more, which those have that the run cannot use. Ranks
        that are placed on nodes that are there make no demand by themselves."""
        self._asked, self._beside = time.monotonic(), beside
        self._cluster.request([dict(self.hands.bundle) for _ in range(self.wanted + beside)])

    def withdraw(self) -> None:
        """The run wants nothing any more."""
        self._cluster.request([])

    def judge(self, loss: Loss) -> Loss:
        """The same, or that its node was taken back: it was said when, and that time has come."""
        deadline_s = self.notices.deadline_s(loss.node)
        if deadline_s is None or time.monotonic() < deadline_s or loss.reason not in _AS_A_NODE_GOES:
            return loss
        return replace(loss, reason=Reason.PREEMPTED, text=f"its node was taken back; {loss.text}")

    def blame(self, loss: Loss) -> None:
        """Count a loss against its node, but not those that the node did not cause."""
        if loss.reason is Reason.SLOW:
            self._slow.add(loss.node)  # the next one there would be slow too
        often = self.job.elastic.max_losses_per_node if loss.reason is Reason.UNREACHABLE else 1
        if loss.reason is not Reason.PREEMPTED:
            self._losses[loss.node] += [time.monotonic()] * often

    @property
    def barred(self) -> set[str]:
        """Nodes that get no member: those that have lost them too often, lately, or a slow one; and those that will go,
        or may."""
        elastic, now = self.job.elastic, time.monotonic()
        found = self._slow | self.notices.avoided
        for node, losses in self._losses.items():
            recent = [at for at in losses if now - at < _MEMORY_OF_LOSSES_S]
            if len(recent) >= elastic.max_losses_per_node and now - recent[-1] < elastic.rejoin_after_s:
                found.add(node)
        return found

    def look(self) -> None:
        """Once a second: fill the room there is, ask for more where it is missing."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        nodes = self._cluster.nodes()
        self.hands.lose_dead_nodes({node.node_id for node in nodes})
        self.hands.settle()
        barred = self.barred
        leaving = self._leaving
        self.hands.release_unused(self.wanted + leaving)
        self.hands.fill(barred, self.wanted + leaving)
        self.hands.keep_standbys(barred)
        self._give_up_unborn(now)
        missing = self.wanted + leaving - self.hands.room
        self._ask_again(missing > 0, [node for node in nodes if node.node_id in barred])
        if missing <= 0 and not barred:
            self.waiting = ""
            return
        usable = [node for node in nodes if node.node_id not in barred]
        self._recruit(missing + self._barred_room(barred), usable, barred)

    @property
    def surplus(self) -> int:
        """Members that are there or on their way beyond those that are wanted."""
        return len(self.hands.members) - self.wanted - self._leaving

    @property
    def _leaving(self) -> int:
        """Members on nodes that will go: others are wanted in their place, before they have left."""
        return sum(member.node_id in self.notices.doomed for member in self.hands.members.values())

    def _ask_again(self, is_short: bool, barred: list[NodeCapacity]) -> None:
        """A cluster keeps the newest request only: another run of it that begins or ends takes ours back."""
        cpus, gpus = self.hands.bundle["CPU"], self.hands.bundle.get("GPU", 0.0)
        beside = sum(node.most(cpus, gpus) for node in barred)
        if beside != self._beside or (is_short and time.monotonic() - self._asked > _ASK_S):
            self.ask(beside)

    def _recruit(self, missing: int, nodes: list[NodeCapacity], barred: set[str]) -> None:
        cpus, gpus = self.hands.bundle["CPU"], self.hands.bundle.get("GPU", 0.0)
        held: dict[str, int] = defaultdict(int)
        for reservation in self.hands.reservations:
            held[reservation.node_id] += reservation.size
        by_id = {node.node_id: node for node in nodes}
        placed = place(nodes, missing, cpus, gpus, held)
        for node_id, count in placed.items():
            self.hands.reserve(by_id[node_id], count)
        there = self.hands.room - self._barred_room(barred) - self._leaving
        before = there - sum(placed.values())  # `nodes` were looked at before they were placed
        self.waiting = "" if there >= self.wanted else str(shortage(nodes, self.wanted, before, cpus, gpus))

    def _barred_room(self, barred: set[str]) -> int:
        return sum(r.free for r in self.hands.reservations if r.node_id in barred)

    def _give_up_unborn(self, now: float) -> None:
        bound = BOUNDS["member_start"].seconds
        for member in [m for m in self.hands.members.values() if not m.pid and now - m.born_s > bound]:
            log.warning("member %d did not start within %.0f s", member.number, bound)
            self.blame(Loss(member.number, member.node_id, Reason.LATE, "did not start"))
            self.hands.lose(member.number)
