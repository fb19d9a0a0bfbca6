"""Which node runs which ranks? A pure decision on what the nodes have free."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

__all__ = ["NodeCapacity", "Placement", "Shortage", "place"]


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
        """Ranks that fit into what is free."""
        return _fit(self.free_cpus, self.free_gpus, cpus, gpus)


@dataclass(frozen=True)
class Placement:
    """Ranks by node, consecutive ranks together: `nodes[i]` runs ranks `first[i]` to `first[i] + count[i] - 1`."""

    nodes: tuple[NodeCapacity, ...]
    counts: tuple[int, ...]

    def ranks(self) -> list[tuple[NodeCapacity, list[int]]]:
        """Nodes with the ranks they run, in rank order."""
        placed, first = [], 0
        for node, count in zip(self.nodes, self.counts, strict=True):
            placed.append((node, list(range(first, first + count))))
            first += count
        return placed


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


def place(nodes: list[NodeCapacity], world: int, cpus: float, gpus: float) -> Placement | Shortage:
    """Spread `world` ranks over the nodes as evenly as room allows, ties by node id; or say what is missing."""
    room = {node.node_id: node.workers(cpus, gpus) for node in nodes}
    if sum(room.values()) < world:
        possible = sum(_fit(node.total_cpus, node.total_gpus, cpus, gpus) for node in nodes)
        return Shortage(world, sum(room.values()), possible, len(nodes), cpus, gpus)
    # Least loaded first: losing one node then costs the fewest ranks.
    taken = dict.fromkeys(sorted(room), 0)
    queue = [(0, node_id) for node_id in sorted(room) if room[node_id]]
    for _ in range(world):
        count, node_id = heapq.heappop(queue)
        taken[node_id] = count + 1
        if taken[node_id] < room[node_id]:
            heapq.heappush(queue, (count + 1, node_id))
    used = [node for node in sorted(nodes, key=lambda node: node.node_id) if taken[node.node_id]]
    return Placement(tuple(used), tuple(taken[node.node_id] for node in used))


def _fit(cpus_there: float, gpus_there: float, cpus: float, gpus: float) -> int:
    by_cpu = int((cpus_there + 1e-6) // cpus)
    return min(by_cpu, int((gpus_there + 1e-6) // gpus)) if gpus else by_cpu
