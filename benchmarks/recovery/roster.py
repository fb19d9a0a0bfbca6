"""Who has a seat in a run of ours now, and with which engine? The journal names members, each of them says the rest."""

from __future__ import annotations

import json
from typing import Any

from actors.assignment import agent_name, member_name
from benchmarks.recovery.account import Seated
from benchmarks.recovery.watch import own_all
from concertina.elastic.waits import BOUNDS
from concertina.track.run import RunFolder
from infra.cluster_access import ClusterAccess

__all__ = ["Roster"]


class Roster:
    """Of one run. Joins its cluster as a driver, on the head, so that no member is asked by a process made for it: that
    would take a core from the run for a second and more."""

    def __init__(self, folder: RunFolder, address: str) -> None:
        self._folder = folder
        self._namespace = f"concertina-{folder.run_id}"
        ClusterAccess(address).connect(self._namespace)
        own_all()  # ray.init brings a handler of SIGTERM

    def seated(self) -> list[Seated]:
        """By pid. Who does not answer in time has no engine."""
        journal = json.loads(self._folder.journal_file.read_text())
        members = journal["seatings"][max(journal["seatings"], key=int)]["members"]
        there = [member for member in members if str(member) in journal["pids"]]
        engines = self._engines(journal["session"], there)
        found = [
            Seated(member, journal["pids"][str(member)], journal["nodes"][str(member)], engines.get(member))
            for member in there
        ]
        return sorted(found, key=lambda one: one.pid)

    def _engines(self, session: str, members: list[int]) -> dict[int, int]:
        import ray
        from ray.exceptions import RayError

        calls: dict[Any, int] = {}
        for member in members:
            try:
                actor = ray.get_actor(member_name(session, member), self._namespace)
            except ValueError:
                continue  # it has ended
            calls[actor.describe.remote()] = member
        engines: dict[int, int] = {}
        if not calls:
            return engines
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=BOUNDS["ask_ray"].seconds)
        for call in ready:
            try:
                engines[calls[call]] = int(ray.get(call)["engine"])
            except RayError:
                continue  # it died of the question, or before it
        return engines

    def notice(self, node: str) -> None:
        """A metadata service of the node's agent says that it goes in five minutes; as Azure's, it may change its
        mind."""
        self._ask(self._agent(node).pretend_notice.remote("azure", 300.0))

    def take_back(self, node: str) -> None:
        self._ask(self._agent(node).take_notice_back.remote())

    def _agent(self, node: str) -> Any:
        import ray

        session = json.loads(self._folder.journal_file.read_text())["session"]
        return ray.get_actor(agent_name(session, node), self._namespace)

    def _ask(self, call: Any) -> None:
        import ray

        ray.get(call, timeout=BOUNDS["ask_ray"].seconds)

    def leave(self) -> None:
        """The cluster, which goes on."""
        import ray

        ray.shutdown()
