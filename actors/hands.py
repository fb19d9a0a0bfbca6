"""How does the coordinator get its ranks from Ray and give them back? Placement groups, actors, and their end.

One placement group a node, detached and named, as are all actors: what a plain call makes dies with its caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.agent import NodeAgent
from actors.rank import Rank
from concertina.elastic.blame import KILLED_FOR_MEMORY
from concertina.elastic.placement import NodeCapacity, Placement
from concertina.elastic.waits import BOUNDS

__all__ = ["COORDINATOR", "Hands", "Member", "nodes_now"]

COORDINATOR = "coordinator"  # name of its actor in the run's namespace


@dataclass
class Member:
    """A rank as the coordinator holds it."""

    rank: int
    node_id: str
    actor: Any
    pid: int = 0


@dataclass
class Hands:
    """Everything of a run that lives in Ray besides its coordinator."""

    namespace: str
    generation: int
    members: dict[int, Member] = field(default_factory=dict)
    agents: dict[str, Any] = field(default_factory=dict)
    groups: list[PlacementGroup] = field(default_factory=list)

    def take(self, placement: Placement, cpus: float, gpus: float) -> bool:
        """Reserve the nodes and make the actors; False when somebody else was faster (nothing is kept then)."""
        for node, ranks in placement.ranks():
            bundle = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
            group = placement_group(
                [bundle] * len(ranks),
                strategy="STRICT_PACK",
                name=f"{self.namespace}-generation{self.generation}-{node.node_id[:8]}",
                lifetime="detached",
                _soft_target_node_id=node.node_id,
            )
            self.groups.append(group)
            if not group.wait(BOUNDS["placement_group"].seconds):
                self.give_back()
                return False
            self._start_node(node, ranks, group, bundle)
        return True

    def _start_node(
        self, node: NodeCapacity, ranks: list[int], group: PlacementGroup, bundle: dict[str, float]
    ) -> None:
        common = {"namespace": self.namespace, "lifetime": "detached", "max_restarts": 0}
        beside = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        self.agents[node.node_id] = (
            ray.remote(NodeAgent)
            .options(
                name=f"agent-generation{self.generation}-{node.node_id[:8]}",
                num_cpus=0,
                max_concurrency=4,
                scheduling_strategy=beside,
                **common,
            )
            .remote()
        )
        for index, rank in enumerate(ranks):
            inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            actor = (
                ray.remote(Rank)
                .options(
                    name=f"rank-generation{self.generation}-{rank}",
                    num_cpus=bundle["CPU"],
                    num_gpus=bundle.get("GPU", 0),
                    max_concurrency=4,
                    scheduling_strategy=inside,
                    **common,
                )
                .remote()
            )
            self.members[rank] = Member(rank, node.node_id, actor)

    def sweep(self) -> None:
        """End what a coordinator of this session made before it died, when it had not come to its journal yet."""
        for found in ray.util.list_named_actors(all_namespaces=True):
            if found["namespace"] == self.namespace and found["name"] != COORDINATOR:
                ray.kill(ray.get_actor(found["name"], self.namespace), no_restart=True)
        for table in placement_group_table().values():
            if table["name"].startswith(self.namespace) and table["state"] != "REMOVED":
                remove_placement_group(get_placement_group(table["name"]))

    def adopt(self, pids: dict[int, int], nodes: dict[int, str]) -> None:
        """Take over what an earlier coordinator of this session made. Ranks that are gone are left out."""
        for rank, pid in pids.items():
            try:
                actor = ray.get_actor(f"rank-generation{self.generation}-{rank}", self.namespace)
            except ValueError:
                continue
            self.members[rank] = Member(rank, nodes[rank], actor, pid)
        for node_id in sorted(set(nodes.values())):
            short = node_id[:8]
            try:
                self.agents[node_id] = ray.get_actor(f"agent-generation{self.generation}-{short}", self.namespace)
                self.groups.append(get_placement_group(f"{self.namespace}-generation{self.generation}-{short}"))
            except ValueError:
                continue

    def describe(self) -> None:
        """Wait until every rank has done its imports; learns their pids. Raises GetTimeoutError, RayActorError."""
        answers = [(member, member.actor.describe.remote()) for member in self.members.values()]
        facts = ray.get([answer for _, answer in answers], timeout=BOUNDS["rank_start"].seconds)
        for (member, _), fact in zip(answers, facts, strict=True):
            member.pid = fact["pid"]

    def renew_leases(self) -> None:
        """Tell every agent that the coordinator lives. Does not wait."""
        for node_id, agent in self.agents.items():
            agent.renew.remote([m.pid for m in self.members.values() if m.node_id == node_id and m.pid])

    def why_gone(self, rank: int) -> str:
        """What Ray knows about a rank that vanished."""
        try:
            ray.get(self.members[rank].actor.describe.remote(), timeout=BOUNDS["ask_ray"].seconds)
        except RayActorError as error:
            return _cause(str(error))
        except GetTimeoutError:
            return "its process does not answer"
        return "its connection broke"

    def give_back(self) -> None:
        """End ranks, agents and placement groups. What is gone already is passed over."""
        for member in self.members.values():
            ray.kill(member.actor, no_restart=True)
        for node_id, agent in self.agents.items():
            pids = [m.pid for m in self.members.values() if m.node_id == node_id and m.pid]
            ending = agent.end.remote(pids)
            ray.wait([ending], timeout=BOUNDS["ask_ray"].seconds)
            ray.kill(agent, no_restart=True)
        for group in self.groups:
            remove_placement_group(group)
        self.members, self.agents, self.groups = {}, {}, []


def nodes_now() -> list[NodeCapacity]:
    """What the living nodes of the cluster have."""
    free = ray._private.state.available_resources_per_node()
    return [
        NodeCapacity(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            free_cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
            free_gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
            total_cpus=node["Resources"].get("CPU", 0.0),
            total_gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _cause(text: str) -> str:
    """The telling part of Ray's page about a dead actor."""
    for mark in ("out of memory", "memory pressure"):
        if mark in text.lower():
            return KILLED_FOR_MEMORY
    for line in text.splitlines():
        if "exit detail" in line.lower() or "SIGKILL" in line:
            return "its process was killed (SIGKILL, out of memory, or a crash)"
    return text.splitlines()[0] if text else "its process ended"
