"""Which node runs which members? A pure decision on what the nodes have free."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["NodeCapacity", "Shortage", "place", "shortage"]


@dataclass(frozen=True)
class NodeCapacity:
    """What one living node has: logical CPUs and GPUs, free and in all."""

    node_id: str
    address: str
    free_cpus: float
    free_gpus: float
    total_cpus: float
    total_gpus: float

    def workers(self, cpus: float, gpus: float) -> int:
        """Members that fit into what is free."""
        return _fit(self.free_cpus, self.free_gpus, cpus, gpus)

    def most(self, cpus: float, gpus: float) -> int:
        """Members that would fit if all of it were free."""
        return _fit(self.total_cpus, self.total_gpus, cpus, gpus)


@dataclass(frozen=True)
class Shortage:
    """Why a world does not fit now."""

    wanted: int
    free: int
    possible: int
    num_nodes: int
    cpus: float
    gpus: float

    def __str__(self) -> str:
        what = f"{self.gpus:g} GPU and {self.cpus:g} CPU" if self.gpus else f"{self.cpus:g} CPU"
        nodes, these = ("node", "this node") if self.num_nodes == 1 else ("nodes", "these nodes")
        text = f"waiting for {self.wanted} workers of {what} each: {self.free} fit now on {self.num_nodes} {nodes}"
        if self.possible < self.wanted:
            text += f", {self.possible} at most on {these}: add nodes or lower cluster.num_workers"
        return text


def place(
    nodes: list[NodeCapacity], wanted: int, cpus: float, gpus: float, held: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Up to `wanted` more members, by node: spread as evenly as room allows, ties by node id.

    `held`: members that nodes run or will run already. Least loaded first: losing one node then costs the fewest.
    """
    room = {node.node_id: node.workers(cpus, gpus) for node in nodes}
    load = held or {}
    taken: dict[str, int] = {}
    queue = [(load.get(node_id, 0), node_id) for node_id in sorted(room) if room[node_id]]
    heapq.heapify(queue)
    while queue and sum(taken.values()) < wanted:
        count, node_id = heapq.heappop(queue)
        taken[node_id] = taken.get(node_id, 0) + 1
        if taken[node_id] < room[node_id]:
            heapq.heappush(queue, (count + 1, node_id))
    return taken


def shortage(nodes: list[NodeCapacity], wanted: int, held: int, cpus: float, gpus: float) -> Shortage:
    """What is missing to `wanted` members when `held` are there or on their way."""
    free = sum(node.workers(cpus, gpus) for node in nodes)
    possible = sum(node.most(cpus, gpus) for node in nodes)
    return Shortage(wanted, min(wanted, free + held), possible, len(nodes), cpus, gpus)


def _fit(cpus_there: float, gpus_there: float, cpus: float, gpus: float) -> int:
    by_cpu = int((cpus_there + 1e-6) // cpus)
    return min(by_cpu, int((gpus_there + 1e-6) // gpus)) if gpus else by_cpu
