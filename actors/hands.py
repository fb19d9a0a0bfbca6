"""How does the coordinator get its members from Ray and give them back? Reservations, actors, and their end.

One placement group a node and reservation, detached and named, as are all actors: what a plain call makes dies with its
caller. Nothing here waits: reservations and births are looked at each turn.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RuntimeEnvSetupError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.agent import NodeAgent
from actors.assignment import Assignment, RunPlan, agent_name, member_name
from actors.coordinator import COORDINATOR
from actors.gone import GONE, HAS_NO_ROOM
from actors.rank import Rank
from concertina.elastic.losses import Reason
from concertina.elastic.placement import NodeCapacity
from concertina.elastic.waits import BOUNDS
from concertina.model.host_memory import ENVIRONMENT

__all__ = ["Hands", "Member", "generations_of", "sweep"]

log = logging.getLogger("concertina.coordinator")


@dataclass
class Member:
    """A member as the coordinator holds it. `facts` and `end` are calls under way: the one answers once its process
    could take a seat, the other breaks when it is gone."""

    number: int
    node_id: str
    actor: Any
    pid: int = 0
    facts: Any = None
    end: Any = None
    born_s: float = field(default_factory=time.monotonic)

    def call(self) -> Member:
        self.facts, self.end = self.actor.describe.remote(), self.actor.until_end.remote()
        return self


@dataclass
class Reservation:
    """Room for `size` members on one node; `held` are those in it. All bundles are alike: Ray chooses one."""

    name: str
    node_id: str
    group: PlacementGroup
    size: int
    ready: Any
    held: set[int] = field(default_factory=set)
    since_s: float = field(default_factory=time.monotonic)
    is_ready: bool = False

    @property
    def free(self) -> int:
        return self.size - len(self.held)


class Hands:
    """Everything of a run that lives in Ray besides its coordinator, which listens on `channel`."""

    def __init__(self, plan: RunPlan, channel: tuple[str, int], give_number: Callable[[], int]) -> None:
        self.plan, self.channel, self._give_number = plan, channel, give_number
        self.members: dict[int, Member] = {}
        self.standbys: dict[int, Member] = {}  # processes that could be members at once, and have no room of their own
        self.agents: dict[str, Any] = {}
        self._asked: dict[str, tuple[Any, float]] = {}  # what an agent is asked, and when, until it answers
        self._untold: dict[int, Member] = {}  # given up before Ray said what it knows of their end
        self.reservations: list[Reservation] = []
        cluster = plan.job.cluster
        self.bundle = {"CPU": cluster.cpus_per_worker, **({"GPU": 1.0} if plan.device == "cuda" else {})}
        self._serial = 0  # names of reservations, never given twice

    # -- room ---------------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Members there are or will be, once every reservation stands."""
        return sum(reservation.size for reservation in self.reservations)

    def reserve(self, node: NodeCapacity, count: int) -> None:
        """Ask for room for `count` more members on a node."""
        self._serial += 1
        name = f"{self.plan.namespace}-{self.plan.session}-{self._serial}"
        group = placement_group(
            [self.bundle] * count,
            strategy="STRICT_PACK",
            name=name,
            lifetime="detached",
            _soft_target_node_id=node.node_id,
        )
        self.reservations.append(Reservation(name, node.node_id, group, count, group.ready()))

    def settle(self) -> None:
        """Look which reservations stand; give up those that somebody else was faster for."""
        for reservation in [r for r in self.reservations if not r.is_ready]:
            if _ready([reservation.ready]):
                reservation.is_ready = True
                reservation.node_id = _place_of(reservation.group)  # perhaps not where it was asked for
                self._start_agent(reservation.node_id)
            elif time.monotonic() - reservation.since_s > BOUNDS["placement_group"].seconds:
                self.release(reservation)

    def release(self, reservation: Reservation) -> None:
        """Give room back. Members in it end."""
        self.reservations.remove(reservation)
        remove_placement_group(reservation.group)

    def release_unused(self, most: int) -> None:
        """Give back room with nobody in it, while there is more than for `most`."""
        for reservation in [r for r in self.reservations if not r.held]:
            if self.room - reservation.size >= most:
                self.release(reservation)

    def fill(self, barred: set[str], most: int) -> None:
        """Start a member wherever there is room and none, but on `barred` nodes, until there are `most`."""
        for reservation in self.reservations:
            if reservation.is_ready and reservation.node_id not in barred:
                for _ in range(min(reservation.free, most - len(self.members))):
                    self._start_member(reservation)

    def keep_standbys(self, barred: set[str]) -> None:
        """As many as the job wants on every node that runs members, once these are there."""
        for number in [number for number, end in self._ended(self.standbys).items() if end is not None]:
            log.info("standby %d has ended", number)
            del self.standbys[number]
        if "GPU" in self.bundle or any(not member.pid for member in self.members.values()):
            return  # a process sees the GPUs of the room it was started in
        per_node = self.plan.job.elastic.standbys_per_node
        for node_id in {m.node_id for m in self.members.values()} - barred:
            there = sum(standby.node_id == node_id for standby in self.standbys.values())
            for _ in range(per_node - there):
                beside = NodeAffinitySchedulingStrategy(node_id, soft=False)
                self._start(self.standbys, node_id, num_cpus=0, scheduling_strategy=beside)

    def promote(self, number: int) -> Member | None:
        """A standby beside this member, which is lost, takes its room; None where there is none, or where the agent is
        gone, and the node perhaps with it."""
        node_id = self.members[number].node_id
        heir = next((s for s in self.standbys.values() if s.node_id == node_id and s.pid), None)
        if heir is None or node_id not in self.agents:  # without its agent the node is gone as well
            return None
        self.members[heir.number] = self.standbys.pop(heir.number)
        for reservation in self.reservations:
            if number in reservation.held:
                reservation.held ^= {number, heir.number}
        return heir

    def _start_agent(self, node_id: str) -> None:
        if node_id in self.agents:
            return
        common = {"namespace": self.plan.namespace, "lifetime": "detached", "max_restarts": -1}
        beside = NodeAffinitySchedulingStrategy(node_id, soft=False)
        agent = ray.remote(NodeAgent).options(
            name=self._agent(node_id), num_cpus=0, max_concurrency=4, scheduling_strategy=beside, **common
        )
        elastic = self.plan.job.elastic
        self.agents[node_id] = agent.remote(self.plan.session, elastic.notices, elastic.notice_endpoint)

    def _start_member(self, reservation: Reservation) -> None:
        inside = PlacementGroupSchedulingStrategy(reservation.group, placement_group_bundle_index=-1)
        cpus, gpus = self.bundle["CPU"], self.bundle.get("GPU", 0)
        room = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": inside}
        reservation.held.add(self._start(self.members, reservation.node_id, **room))

    def _start(self, into: dict[int, Member], node_id: str, **room: Any) -> int:
        number = self._give_number()
        environment = ENVIRONMENT if self.plan.device == "cpu" else {}
        actor = ray.remote(Rank).options(
            name=self._member(number),
            runtime_env={"env_vars": environment},
            namespace=self.plan.namespace,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=16,  # `until_end` of every coordinator there was, and the short ones
            **room,
        )
        handle = actor.remote(Assignment(self.plan, number, self.channel))
        into[number] = Member(number, node_id, handle).call()
        return number

    def adopt(self, pids: dict[int, int], nodes: dict[int, str]) -> dict[int, Any]:
        """Take over what an earlier coordinator of this session made, and tell it the new channel. Members that are
        gone are left out; of the others the answers of `reattach`, which are under way."""
        answers = {}
        self._end_unborn(set(pids))
        for number, pid in pids.items():
            try:
                actor = ray.get_actor(self._member(number), self.plan.namespace)
            except ValueError:
                continue
            self.members[number] = Member(number, nodes[number], actor, pid).call()
            answers[number] = actor.reattach.remote(self.channel)
        for node_id in sorted(set(nodes.values())):
            try:
                self.agents[node_id] = ray.get_actor(self._agent(node_id), self.plan.namespace)
            except ValueError:
                continue
        self._adopt_reservations(nodes)
        return answers

    def _end_unborn(self, known: set[int]) -> None:
        """Members that were on their way when the coordinator ended know only the former channel."""
        prefix = self._member(0).removesuffix("0")
        for found in ray.util.list_named_actors(all_namespaces=True):
            name = found["name"]
            if found["namespace"] != self.plan.namespace or not name.startswith(prefix):
                continue
            number = int(name.removeprefix(prefix))
            if number not in known:
                try:
                    ray.kill(ray.get_actor(name, self.plan.namespace), no_restart=True)
                except ValueError:
                    continue  # it went by itself

    def _adopt_reservations(self, nodes: dict[int, str]) -> None:
        """Those that stand, by name, with the members on their node in them; those that do not are given back."""
        prefix = f"{self.plan.namespace}-{self.plan.session}-"
        inside = sorted(self.members)
        for table in placement_group_table().values():
            if not table["name"].startswith(prefix):
                continue
            self._serial = max(self._serial, int(table["name"].removeprefix(prefix)))
            if table["state"] == "REMOVED":
                continue
            group = get_placement_group(table["name"])
            if table["state"] != "CREATED":
                remove_placement_group(group)
                continue
            size, node_id = len(table["bundles"]), _place_of(group)
            found = Reservation(table["name"], node_id, group, size, None, is_ready=True)
            found.held = set([m for m in inside if nodes[m] == node_id][:size])
            inside = [m for m in inside if m not in found.held]
            self.reservations.append(found)

    def _member(self, number: int) -> str:
        return member_name(self.plan.session, number)

    def _agent(self, node_id: str) -> str:
        return agent_name(self.plan.session, node_id)

    # -- what is known of the members, without waiting ----------------------------------------------------------------

    def born(self) -> list[Member]:
        """Members and standbys that have just said where they are."""
        waiting = {member.facts: member for member in self._all() if not member.pid}
        found = []
        for answer in _ready(list(waiting)):
            try:
                waiting[answer].pid = ray.get(answer)["pid"]
                found.append(waiting[answer])
            except GONE as error:
                log.debug("`gone` tells it: %s", error)
        return found

    def gone(self) -> dict[int, tuple[Reason, str]]:
        """Members whose process has ended, and what Ray knows of it."""
        return self._ended(self.members)

    def _ended(self, some: dict[int, Member]) -> dict[int, tuple[Reason, str]]:
        found = {}
        calls = {member.end: member for member in some.values()}
        for call in _ready(list(calls)):
            member = calls[call]
            try:
                ray.get(call)
            except ActorUnavailableError:  # the way to it, not the member
                member.end = member.actor.until_end.remote()
            except GONE as error:
                found[member.number] = _cause(error)
        return found

    def told_late(self) -> dict[int, tuple[Reason, str]]:
        """As `gone`, of members that were given up since then: milliseconds later Ray knows why they died."""
        found = self._ended(self._untold)
        for number in found:
            del self._untold[number]
        return found

    def stopped(self, numbers: Collection[int]) -> set[int]:
        """Those of them whose processes stand still, as their nodes' agents see it. All agents are asked together, and
        one that still owes an answer, as it stands still itself, is not asked again: it holds up this thread once."""
        suspects: dict[str, dict[int, int]] = defaultdict(dict)
        for member in (self.members[number] for number in numbers):
            if member.node_id in self.agents:
                suspects[member.node_id][member.pid] = member.number
        fresh, now = suspects.keys() - self._asked.keys(), time.monotonic()
        self._asked |= {node: (self.agents[node].stopped.remote(list(suspects[node])), now) for node in fresh}
        _ready([self._asked[node][0] for node in fresh], BOUNDS["ask_agent"].seconds)
        answered = _ready([call for call, _ in self._asked.values()])
        found: set[int] = set()
        for node, (call, asked_s) in [(n, question) for n, question in self._asked.items() if question[0] in answered]:
            del self._asked[node]
            if now - asked_s > BOUNDS["silence"].seconds:
                continue  # it was so then; who stands still now is asked about anew
            pids = suspects.get(node, {})
            with suppress(*GONE):
                found |= {pids[pid] for pid in ray.get(call) if pid in pids}
        return found

    def renew_leases(self) -> None:
        """Tell every agent that the coordinator lives. Does not wait."""
        for node_id, agent in self.agents.items():
            names = [reservation.name for reservation in self.reservations if reservation.node_id == node_id]
            members = {m.number: m.pid for m in self._all() if m.node_id == node_id and m.pid}
            agent.renew.remote(members, names, socket.gethostname(), os.getpid())

    def _pids(self, node_id: str) -> list[int]:
        return [m.pid for m in self._all() if m.node_id == node_id and m.pid]

    def _all(self) -> list[Member]:
        return [*self.members.values(), *self.standbys.values()]

    # -- the end ------------------------------------------------------------------------------------------------------

    def lose(self, number: int) -> None:
        """Give a member up: end its process, also one that hangs, once its node answers. Its room stays."""
        member = self._untold[number] = self.members.pop(number)
        if member.node_id in self.agents and member.pid:
            self.agents[member.node_id].end.remote([member.pid])
        ray.kill(member.actor, no_restart=True)
        for reservation in self.reservations:
            reservation.held.discard(number)

    def lose_node(self, node_id: str) -> None:
        """A node has died: its room and its agent are gone as well."""
        agent = self.agents.pop(node_id, None)
        self._asked.pop(node_id, None)
        if agent is not None:
            ray.kill(agent, no_restart=True)
        for reservation in [r for r in self.reservations if r.node_id == node_id]:
            self.release(reservation)

    def vacate(self, node_id: str) -> None:
        """Everything of the run on a node ends, but for its agent, which goes with it."""
        for standby in [s for s in self.standbys.values() if s.node_id == node_id]:
            del self.standbys[standby.number]
            ray.kill(standby.actor, no_restart=True)
        for reservation in [r for r in self.reservations if r.node_id == node_id]:
            self.release(reservation)

    def lose_dead_nodes(self, living: set[str]) -> None:
        """However the first news of it came: a connection that breaks does not say that a node has died."""
        for node_id in {*self.agents, *(r.node_id for r in self.reservations if r.is_ready)} - living:
            log.warning("node %s is gone", node_id[:8])
            self.lose_node(node_id)

    def give_back(self) -> None:
        """End members, agents and placement groups, also those that nobody wrote down."""
        # Agents first: they kill at once what stands still, Ray takes 5 s over it.
        endings = [agent.end.remote(self._pids(node_id)) for node_id, agent in self.agents.items()]
        if endings:
            ray.wait(endings, num_returns=len(endings), timeout=BOUNDS["ask_ray"].seconds)
        for handle in [*(member.actor for member in self._all()), *self.agents.values()]:
            ray.kill(handle, no_restart=True)
        for reservation in list(self.reservations):
            self.release(reservation)
        self.members, self.standbys, self.agents = {}, {}, {}
        sweep(self.plan.namespace)


def generations_of(answers: dict[int, Any]) -> dict[int, int]:
    """Which one each member that `adopt` asked is at work in, of those that answer in time; -1 when it has ended since,
    which `Hands.gone` tells."""
    found = {}
    ready = _ready(list(answers.values()), BOUNDS["ask_ray"].seconds)
    for member, answer in answers.items():
        if answer in ready:
            try:
                found[member] = int(ray.get(answer))
            except GONE:
                found[member] = -1
    return found


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


_FOR_MEMORY = ("out of memory", "out-of-memory", "memory pressure", "low on memory")


def _place_of(group: PlacementGroup) -> str:
    return str(next(iter(placement_group_table(group)["bundles_to_node_id"].values())))


def _ready(calls: list[Any], bound_s: float = 0) -> list[Any]:
    return ray.wait(calls, num_returns=len(calls), timeout=bound_s)[0] if calls else []


def _cause(error: RayError) -> tuple[Reason, str]:
    """The telling part of Ray's page about a dead actor."""
    text = str(error)
    if isinstance(error, HAS_NO_ROOM):
        return Reason.NODE, "its node was lost before it began"
    if isinstance(error, OutOfMemoryError) or any(mark in text.lower() for mark in _FOR_MEMORY):
        return Reason.OUT_OF_MEMORY, "killed for memory"
    if isinstance(error, RayActorError) and error.preempted:
        return Reason.PREEMPTED, "its node was taken back"
    if "creation task" in text or isinstance(error, RuntimeEnvSetupError):
        return Reason.RAISED, f"its process could not begin: {text.strip().splitlines()[-1]}"
    if "its node has died" in text:
        return Reason.NODE, "its node died"
    for line in text.splitlines():
        if "exit detail" in line.lower() or "SIGKILL" in line:
            return Reason.KILLED, "its process was killed (SIGKILL, out of memory, or a crash)"
    return Reason.KILLED, text.splitlines()[0] if text else "its process ended"
