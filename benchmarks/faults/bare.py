"""How does a run live without Ray? Its members are processes forked from one that has torch imported, its nodes are
names; its conductor, the supervision channel, the members' threads and gloo are what they are under Ray.

A process that comes is there in a tenth of a second, so thousands of faults fit into an hour.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil

from actors.assignment import Assignment, RunPlan, bell_name
from actors.cluster import RayCluster
from actors.hands import Hands, Member, Reservation
from benchmarks.faults.held import Held
from concertina.elastic.losses import Reason
from concertina.elastic.placement import NodeCapacity
from infra.death_bell import DeathBell, is_supported
from infra.keeper_spec import LOOPBACK
from infra.probe import Targets

__all__ = ["BareCluster", "BareHands", "Process", "cut_connections"]

_PRELOAD = ["actors.rank", "actors.conductor", "concertina.train.standalone", "torch._dynamo"]
_BEGINS_WITHIN_S = 30.0
_ANSWERS_WITHIN_S = 20.0


class BareCluster(RayCluster):
    """Nodes that are names; one member fits on each."""

    def __init__(self, count: int) -> None:
        self.address, self.home, self.name = LOOPBACK, "home", ""
        self._names = [_name(number) for number in range(count)]
        self._serial = count
        self.held: Callable[[], Collection[str]] = tuple
        """Nodes that have a member; told by who has them in hand."""

    def add(self) -> None:
        """One more."""
        self._names = [*self._names, _name(self._serial)]
        self._serial += 1

    def remove(self, node: str) -> None:
        self._names = [name for name in self._names if name != node]

    def nodes(self) -> list[NodeCapacity]:
        held = set(self.held())
        return [NodeCapacity(name, LOOPBACK, float(name not in held), 0.0, 1.0, 0.0) for name in self._names]

    def raylets(self) -> Targets:
        return {}

    def draining(self) -> dict[str, float | None]:
        return {}

    def request(self, bundles: list[dict[str, float]]) -> None:
        """There is nobody to ask."""


def _name(number: int) -> str:
    return f"{number:056x}"  # as Ray's, which some of its values are checked to be


class Process:
    """A member's process, from outside. Its own thread answers what is asked over a pipe."""

    def __init__(self, context: Any, seat: Assignment) -> None:
        ours, theirs = context.Pipe()
        self._pipe: Connection = ours
        self._process = context.Process(target=_serve, args=(theirs, seat), daemon=True)
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()

    @property
    def has_ended(self) -> bool:
        return self._process.exitcode is not None

    def has_begun(self) -> bool:
        """Whether it could take a seat."""
        try:
            return self._pipe.poll() and bool(self._pipe.recv())
        except (EOFError, OSError):
            return False  # it has ended, which others see

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def send(self, number: signal.Signals) -> None:
        """Nothing, if it has ended."""
        if not self.has_ended:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def ask(self, *question: Any) -> Any:
        """What it answers; None where it ends first, or does not within the bound."""
        with self._lock, suppress(EOFError, OSError):
            self._pipe.send(question)
            if self._pipe.poll(_ANSWERS_WITHIN_S):
                return self._pipe.recv()
        return None

    def end(self) -> None:
        self.send(signal.SIGKILL)
        self._process.join(_BEGINS_WITHIN_S)
        self._pipe.close()


def _serve(pipe: Connection, seat: Assignment) -> None:
    """A member's process, from inside."""
    from actors.rank import Rank

    rank = Rank(seat, LOOPBACK)
    pipe.send(rank.describe()["pid"])
    while True:
        match pipe.recv():
            case ("fuse", deed, step, phase):
                pipe.send(rank.lay_fuse(deed, step=step, phase=phase))
            case ("cut",):
                pipe.send(cut_connections(seat.channel))
            case ("held",):
                pipe.send(Held.now())


def cut_connections(address: tuple[str, int]) -> int:
    """Break this process's connections to an address, as a network does; how many there were."""
    cut = 0
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # closed since, or not connected
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue  # a duplicate of it would be no socket, and stay
            with socket.socket(fileno=os.dup(descriptor)) as held:
                if held.getpeername() == address:
                    held.shutdown(socket.SHUT_RDWR)
                    cut += 1
    return cut


class BareHands(Hands):
    """Members that are processes. One whose number is in `out_of_reach` is not killed when it is given up: as on a
    node that is cut off, it has to see for itself that the run goes on without it."""

    def __init__(
        self, cluster: BareCluster, plan: RunPlan, channel: tuple[str, int], give_number: Callable[[], int]
    ) -> None:
        super().__init__(plan, channel, give_number)
        # The fork server of Python 3.11 looks for what it preloads on PYTHONPATH only.
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self.out_of_reach: dict[int, Process] = {}
        self.mourn: Callable[[int, bool], None] = lambda member, for_memory: None
        cluster.held = lambda: {reservation.node_id for reservation in self.reservations}
        self._ending: list[Process] = []

    # -- room ---------------------------------------------------------------------------------------------------------

    def reserve(self, node: NodeCapacity, count: int) -> None:
        group: Any = None
        self.reservations.append(Reservation(node.node_id, node.node_id, group, count, None, is_ready=True))
        self.agents[node.node_id] = None

    def settle(self) -> None:
        """Room is there as soon as it is asked for."""

    def release(self, reservation: Reservation) -> None:
        self.reservations.remove(reservation)

    def _start(self, into: dict[int, Member], node_id: str, **room: Any) -> int:
        number = self._give_number()
        into[number] = Member(number, node_id, Process(self._context, Assignment(self.plan, number, self.channel)))
        return number

    # -- what is known ------------------------------------------------------------------------------------------------

    def born(self) -> list[Member]:
        found = [member for member in self._all() if not member.pid and member.actor.has_begun()]
        for member in found:
            member.pid = member.actor.pid
            if is_supported():
                threading.Thread(target=self._listen, args=(member.number, member.pid), daemon=True).start()
        return found

    def _listen(self, number: int, pid: int) -> None:
        """As the agent of its node does."""
        if DeathBell(bell_name(self.plan.session, number, pid)).listen_on(_BEGINS_WITHIN_S):
            self.mourn(number, False)

    def _ended(self, some: dict[int, Member]) -> dict[int, tuple[Reason, str]]:
        ended = [member for member in some.values() if member.actor.has_ended]
        return {member.number: (Reason.KILLED, "its process was killed") for member in ended}

    def stopped(self, numbers: Collection[int]) -> set[int]:
        found = set()
        for number in numbers:
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(self.members[number].pid).status() == psutil.STATUS_STOPPED:
                    found.add(number)
        return found - self.out_of_reach.keys()

    def renew_leases(self) -> None:
        """Nobody holds one."""

    # -- the end ------------------------------------------------------------------------------------------------------

    def lose(self, number: int) -> None:
        process: Process = self.members.pop(number).actor
        for reservation in self.reservations:
            reservation.held.discard(number)
        if number in self.out_of_reach:
            self.out_of_reach[number] = process
            return
        self._end(process)

    def vacate(self, node_id: str) -> None:
        for standby in [s for s in self.standbys.values() if s.node_id == node_id]:
            self._end(self.standbys.pop(standby.number).actor)
        for reservation in [r for r in self.reservations if r.node_id == node_id]:
            self.release(reservation)

    def _end(self, process: Process) -> None:
        process.send(signal.SIGKILL)
        self._ending.append(process)
        for each in [each for each in self._ending if each.has_ended]:
            self._ending.remove(each)
            each.end()

    def give_back(self) -> None:
        for process in [*self._ending, *self.out_of_reach.values(), *(member.actor for member in self._all())]:
            process.end()
        self._ending, self.out_of_reach, self.members, self.standbys, self.reservations = [], {}, {}, {}, []
