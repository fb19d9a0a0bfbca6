"""How does the coordinator get its ranks from Ray and give them back? Placement groups, actors, and their end.

One placement group a node, detached and named, as are all actors: what a plain call makes dies with its caller.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.agent import NodeAgent
from actors.assignment import Assignment, RunPlan
from actors.coordinator import COORDINATOR
from actors.rank import Rank
from concertina.elastic.blame import KILLED_FOR_MEMORY
from concertina.elastic.placement import NodeCapacity, Placement
from concertina.elastic.waits import BOUNDS

__all__ = ["Hands", "Member", "nodes_now", "sweep"]

log = logging.getLogger("concertina.coordinator")


@dataclass
class Member:
    """A rank as the coordinator holds it. `facts` and `end` are calls under way: the one answers once the rank's
    process is there, the other breaks when it is gone."""

    rank: int
    node_id: str
    actor: Any
    pid: int = 0
    facts: Any = None
    end: Any = None

    def call(self) -> Member:
        self.facts, self.end = self.actor.describe.remote(), self.actor.until_end.remote()
        return self


@dataclass
class Hands:
    """Everything of a run that lives in Ray besides its coordinator, which listens on `channel`."""

    plan: RunPlan
    generation: int
    channel: tuple[str, int]
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
                name=self._reservation(node.node_id),
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
        common = {"namespace": self.plan.namespace, "lifetime": "detached", "max_restarts": 0}
        beside = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        agent = ray.remote(NodeAgent).options(
            name=self._agent(node.node_id), num_cpus=0, max_concurrency=4, scheduling_strategy=beside, **common
        )
        self.agents[node.node_id] = agent.remote(self._reservation(node.node_id))
        for index, rank in enumerate(ranks):
            actor = ray.remote(Rank).options(
                name=self._rank(rank),
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_concurrency=16,  # `until_end` of every coordinator there was, and the short ones
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
                **common,
            )
            handle = actor.remote(Assignment(self.plan, self.generation, rank, self.channel))
            self.members[rank] = Member(rank, node.node_id, handle).call()

    def adopt(self, pids: dict[int, int], nodes: dict[int, str]) -> None:
        """Take over what an earlier coordinator of this session made, and tell it the new channel. Ranks that are gone
        are left out."""
        namespace = self.plan.namespace
        for rank, pid in pids.items():
            try:
                actor = ray.get_actor(self._rank(rank), namespace)
            except ValueError:
                continue
            self.members[rank] = Member(rank, nodes[rank], actor, pid).call()
            actor.reattach.remote(self.channel)
        for node_id in sorted(set(nodes.values())):
            try:
                self.agents[node_id] = ray.get_actor(self._agent(node_id), namespace)
                self.groups.append(get_placement_group(self._reservation(node_id)))
            except ValueError:
                continue

    def _rank(self, rank: int) -> str:
        return f"rank-generation{self.generation}-{rank}"

    def _agent(self, node_id: str) -> str:
        return f"agent-generation{self.generation}-{node_id[:8]}"

    def _reservation(self, node_id: str) -> str:
        return f"{self.plan.namespace}-generation{self.generation}-{node_id[:8]}"

    # -- what is known of the ranks, without waiting ------------------------------------------------------------------

    def unborn(self) -> list[int]:
        """Ranks that have not said yet where they are. Learns the pids of those that have."""
        waiting = {member.facts: member for member in self.members.values() if not member.pid}
        for answer in _ready(list(waiting)):
            try:
                waiting[answer].pid = ray.get(answer)["pid"]
            except RayActorError as error:
                log.debug("`gone` tells it: %s", error)
        return sorted(member.rank for member in waiting.values() if not member.pid)

    def gone(self) -> dict[int, str]:
        """Ranks whose process has ended, and what Ray knows of it."""
        found = {}
        calls = {member.end: member for member in self.members.values()}
        for call in _ready(list(calls)):
            member = calls[call]
            try:
                ray.get(call)
            except ActorUnavailableError:  # the way to it, not the rank
                member.end = member.actor.until_end.remote()
            except RayActorError as error:
                found[member.rank] = _cause(str(error))
        return found

    def is_stopped(self, member: Member) -> bool:
        """Whether its node's agent sees the rank's process stand still; False when nobody can say."""
        try:
            answer = self.agents[member.node_id].stopped.remote(member.pid)
            return bool(ray.get(answer, timeout=BOUNDS["ask_ray"].seconds))
        except (KeyError, RayActorError, GetTimeoutError):
            return False

    def renew_leases(self) -> None:
        """Tell every agent that the coordinator lives. Does not wait."""
        for node_id, agent in self.agents.items():
            agent.renew.remote(self._pids(node_id), socket.gethostname(), os.getpid())

    def _pids(self, node_id: str) -> list[int]:
        return [m.pid for m in self.members.values() if m.node_id == node_id and m.pid]

    # -- the end ------------------------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """End ranks, agents and placement groups. What is gone already is passed over."""
        # Agents first: they kill at once what stands still, Ray takes 5 s over it.
        endings = [agent.end.remote(self._pids(node_id)) for node_id, agent in self.agents.items()]
        if endings:
            ray.wait(endings, num_returns=len(endings), timeout=BOUNDS["ask_ray"].seconds)
        for member in self.members.values():
            ray.kill(member.actor, no_restart=True)
        for agent in self.agents.values():
            ray.kill(agent, no_restart=True)
        for group in self.groups:
            remove_placement_group(group)
        self.members, self.agents, self.groups = {}, {}, []


def sweep(namespace: str) -> None:
    """End whatever a run has in Ray besides its coordinator: what one left behind that died before it wrote it down."""
    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["namespace"] == namespace and found["name"] != COORDINATOR:
            try:
                ray.kill(ray.get_actor(found["name"], namespace), no_restart=True)
            except ValueError:
                continue  # it went by itself
    for table in placement_group_table().values():
        if table["name"].startswith(f"{namespace}-") and table["state"] != "REMOVED":
            try:
                remove_placement_group(get_placement_group(table["name"]))
            except ValueError:
                continue


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


def _ready(calls: list[Any]) -> list[Any]:
    return ray.wait(calls, num_returns=len(calls), timeout=0)[0] if calls else []


def _cause(text: str) -> str:
    """The telling part of Ray's page about a dead actor."""
    for mark in ("out of memory", "memory pressure"):
        if mark in text.lower():
            return KILLED_FOR_MEMORY
    if "creation task" in text:
        return f"its process could not begin: {text.strip().splitlines()[-1]}"
    for line in text.splitlines():
        if "exit detail" in line.lower() or "SIGKILL" in line:
            return "its process was killed (SIGKILL, out of memory, or a crash)"
    return text.splitlines()[0] if text else "its process ended"
