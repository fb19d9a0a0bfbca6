"""What does a node's agent do? It looks at this run's processes on its node and ends them: hung ranks on request, all
of them when the coordinator has been gone for good. It hears when one of them dies, and says so.

It holds a lease: the coordinator renews it, and when it runs out nothing of the run stays on the node.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import get_placement_group, remove_placement_group

from actors.assignment import bell_name
from actors.coordinator import COORDINATOR
from actors.lookout import Lookout
from actors.strike import SIGNALS, end_node
from concertina.elastic.chaos import Deed
from concertina.elastic.notices import Notice, Source
from concertina.elastic.waits import BOUNDS
from infra.death_bell import DeathBell, is_supported
from infra.draining import drain_node
from infra.fake_metadata import FakeMetadata
from infra.metadata import find_sources
from infra.oom_kills import OomKills
from infra.probe import Targets, unreached
from infra.processes import is_alive, start_time

__all__ = ["NodeAgent", "Wards"]

log = logging.getLogger("concertina.agent")

_LOOK_S = 1.0
_SLOW_S = 0.1
_BELL_HANGS_WITHIN_S = 10.0  # it is hung before a member can be known to anybody


class Wards:
    """Processes that may be killed: known by pid and by when they began, for pids are given out again."""

    def __init__(self) -> None:
        self._started: dict[int, float] = {}

    def are(self, pids: list[int]) -> None:
        """These, from now on; those that have ended are left out."""
        known = {pid: self._started.get(pid) or start_time(pid) for pid in pids}
        self._started = {pid: started for pid, started in known.items() if started is not None}

    @property
    def pids(self) -> list[int]:
        return list(self._started)

    @property
    def all_gone(self) -> bool:
        """Whether there were some, and none is left."""
        return bool(self._started) and not any(is_alive(pid, at) for pid, at in self._started.items())

    def end(self, pids: list[int] | None = None) -> None:
        """Kill these, or all. One that is gone already is what was wanted; one never heard of is left alone."""
        self.send(signal.SIGKILL, pids)

    def send(self, number: signal.Signals, pids: list[int] | None = None) -> list[int]:
        """As `end` with another signal; those that got it."""
        told = []
        for pid, started in self._started.items():
            if (pids is None or pid in pids) and is_alive(pid, started):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
                    told.append(pid)
        return told


class NodeAgent:
    """The actor of one node in one session of a run."""

    def __init__(self, session: str = "", notices: str = "none", notice_endpoint: str | None = None) -> None:
        self._session = session
        self._node = ray.get_runtime_context().get_node_id()
        self._lookout = Lookout(find_sources(notices, notice_endpoint), self._tell_notices)
        self._pretended: FakeMetadata | None = None
        self._cloud = Source.AZURE
        self._reservations: list[str] = []
        self._heeded: set[tuple[int, int]] = set()
        self._wards, self._coordinator = Wards(), Wards()
        self._oom_kills = OomKills()  # of the agent's cgroup, which is its node's
        self._renewed = time.monotonic()
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def describe(self) -> dict[str, object]:
        """Where this agent is."""
        return {"pid": os.getpid(), "address": ray.util.get_node_ip_address()}

    def renew(self, members: dict[int, int], reservations: list[str], host: str = "", coordinator: int = 0) -> None:
        """The coordinator lives, there and with that pid; these are the pids of its members and its placement groups on
        this node."""
        self._wards.are(list(members.values()))
        for member, pid in members.items() - self._heeded:
            self._heed(member, pid)
        self._reservations = reservations
        self._coordinator.are([coordinator] if host == socket.gethostname() else [])
        self._renewed = time.monotonic()

    def _heed(self, member: int, pid: int) -> None:
        """Tell the coordinator when this member dies, which may be long before Ray and its peers can know."""
        self._heeded.add((member, pid))
        if is_supported():
            threading.Thread(target=self._listen, args=(member, pid), name=f"bell-{member}", daemon=True).start()

    def _listen(self, member: int, pid: int) -> None:
        if not DeathBell(bell_name(self._session, member, pid)).listen_on(_BELL_HANGS_WITHIN_S):
            log.info("member %d has no bell: its end is known in other ways", member)
            return  # an agent before this one heard it
        for_memory = self._oom_kills.take()
        try:
            ray.get_actor(COORDINATOR, ray.get_runtime_context().namespace).mourn.remote(member, for_memory)
        except ValueError:
            log.debug("member %d has ended, and there is no coordinator to tell", member)

    def _tell_notices(self, sources: list[Source], found: list[Notice]) -> bool:
        """To the coordinator; and to Ray what cannot be taken back. Whether somebody heard."""
        said = [source.value for source in sources], [notice.to_json() for notice in found]
        try:
            ray.get_actor(COORDINATOR, ray.get_runtime_context().namespace).notice.remote(self._node, *said)
        except (ValueError, RayError):
            return False
        for notice in found:
            if not notice.is_hint and not notice.source.may_take_back:
                drain_node(self._node, notice.left_s, f"{notice.source}: {notice.text}")
        return True

    def unreached(self, targets: Targets) -> list[str]:
        """Which of these nodes cannot be reached from this one."""
        return unreached(targets)

    def stopped(self, pids: list[int]) -> list[int]:
        """Which processes stand still (SIGSTOP, a debugger): proof, where their silence is only suspicion."""
        found = []
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                    found.append(pid)
        return found

    def end(self, pids: list[int]) -> None:
        """Kill processes of ranks."""
        self._wards.end(pids)

    # -- on purpose ---------------------------------------------------------------------------------------------------

    def strike(self, deed: Deed, pids: list[int]) -> list[int]:
        """Kill, freeze or thaw processes of the run on this node, its coordinator and this agent among them; those that
        were there. Like `end` it touches nothing that the coordinator has not told it of."""
        if os.getpid() in pids:
            os.kill(os.getpid(), SIGNALS[deed])
        return [*self._wards.send(SIGNALS[deed], pids), *self._coordinator.send(SIGNALS[deed], pids)]

    def slow(self, pid: int, factor: float, for_s: float) -> None:
        """A process of the run stands still for a part of every tenth of a second, for so long."""
        threading.Thread(target=self._slow, args=(pid, factor, for_s), name=f"slow-{pid}", daemon=True).start()

    def _slow(self, pid: int, factor: float, for_s: float) -> None:
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s and self._wards.send(signal.SIGSTOP, [pid]):
            time.sleep(_SLOW_S * (1 - 1 / factor))
            self._wards.send(signal.SIGCONT, [pid])
            time.sleep(_SLOW_S / factor)

    def pretend_notice(self, cloud: str, lead_s: float) -> None:
        """As if the cloud had given notice: a metadata service of this node's says so, and at the end of the lead the
        node is ended, unless it was taken back."""
        if self._pretended is None:
            self._pretended = FakeMetadata()
        self._pretended.notice(lead_s)
        self._cloud = Source(cloud)
        for source in find_sources(cloud, self._pretended.endpoint):
            self._lookout.look_at(source)
        threading.Thread(target=self._end_node_at, args=(self._pretended,), name="end", daemon=True).start()

    def take_notice_back(self) -> bool:
        """Whether there was one that can be: Ray is told of the others, which takes no drain back."""
        if self._pretended is None or not self._pretended.is_given or not self._cloud.may_take_back:
            return False
        self._pretended.take_back()
        self._lookout.look_away(self._cloud)
        return True

    def _end_node_at(self, fake: FakeMetadata) -> None:
        while fake.is_given:
            if fake.left_s <= 0:
                end_node()
            time.sleep(min(0.1, max(0.0, fake.left_s)))

    def end_node(self) -> None:
        """Kill the raylet and every process below it, this one too."""
        end_node()

    # -- the lease's thread -------------------------------------------------------------------------------------------

    def _watch_lease(self) -> None:
        while not self._run_out():
            time.sleep(_LOOK_S)
            self._oom_kills.look()
            self._end_frozen_coordinator()
        self._wards.end()
        for name in self._reservations:
            with suppress(ValueError):  # given back already
                remove_placement_group(get_placement_group(name))
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)  # Ray starts one again that merely exits
        time.sleep(_LOOK_S)
        os._exit(0)  # it may be that nobody hears any more

    def _end_frozen_coordinator(self) -> None:
        if self._silent_s > BOUNDS["coordinator_frozen"].seconds:
            self._coordinator.end(self.stopped(self._coordinator.pids))

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._renewed

    def _run_out(self) -> bool:
        """Ranks without a coordinator leave by themselves; the lease is for those that do not."""
        if self._silent_s > BOUNDS["agent_lease"].seconds:
            return True
        return self._wards.all_gone and self._silent_s > BOUNDS["coordinator_silence"].seconds
