"""Who breaks a running run on purpose? It waits for the moment, finds the victim in the run's journal, and has the
agent of the victim's node strike, so that the victim may be on any host. A driver of its own, or a thread of one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.assignment import LEASE_EVERY_S, agent_name, member_name
from actors.coordinator import COORDINATOR
from actors.gone import GONE
from concertina.elastic.chaos import MEMBER_PHASES, Deed, Injection, Kind, Scene, Victim
from concertina.elastic.waits import BOUNDS
from concertina.errors import NotFoundError, UserError
from concertina.track.events import EventType, read_events
from concertina.track.run import RunFolder
from infra.cluster_access import ClusterAccess

__all__ = ["Injector", "Strike"]

_POLL_S = 0.02
_FUSE_POLL_S = 0.2  # the fuse needs nobody; this is how soon one is laid anew when somebody else takes the rank


@dataclass(frozen=True)
class Strike:
    """What was done: when by the wall clock, on which line's behalf, to whom, and the newest step committed then."""

    ts_ns: int
    injection: str
    what: str
    step: int

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.ts_ns // 10**9))
        return f"{clock}.{self.ts_ns // 10**6 % 1000:03d} after step {self.step}: {self.what}"


class Injector:
    """Of one run, on a cluster this process has joined in the run's namespace. `tell` hears each strike."""

    def __init__(self, folder: RunFolder, access: ClusterAccess, tell: Callable[[Strike], None]) -> None:
        self.folder, self.access, self.tell = folder, access, tell
        self.namespace = f"concertina-{folder.run_id}"
        self._offset, self._step, self._state = 0, 0, ""

    def carry_out(self, injection: Injection) -> None:
        """All its turns. Raises UserError when there is no such victim, NotFoundError when the run ends before."""
        if injection.after_s:
            time.sleep(injection.after_s)
        for turn in range(injection.times):
            if turn:
                time.sleep(injection.every_s)
            if injection.kind in (Kind.RANK, Kind.MEMBER, Kind.NODE) and _has_fuse(injection):
                self._burn(injection)
            else:
                self._await_moment(injection)
                self._strike(injection)
            if injection.deed is Deed.FLAP and injection.kind is Kind.NODE:
                self._join(injection)

    # -- what is known of the run -------------------------------------------------------------------------------------

    def look(self) -> None:
        """Take in the events that have come. Raises NotFoundError when the run has ended."""
        for event in read_events(self.folder.events_file, self._offset):
            self._offset = event.end_offset
            if event.type == EventType.STEP:
                self._step = event.step or 0
            elif event.type == EventType.STATE:
                self._state = str(event.data["state"])
            elif event.type == EventType.START:
                self._state = "waiting_for_capacity"
        if self._state in ("finished", "failed", "stopped", "killed"):
            raise NotFoundError(f"run {self.folder.run_id} has ended ({self._state}): there is nothing to break")

    def _journal(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.folder.journal_file.read_text()))
        except FileNotFoundError:
            self.look()
            raise NotFoundError(f"run {self.folder.run_id} does not run: it has no journal") from None

    def scene(self) -> Scene:
        """Who is where now. Nodes are counted from the head on, then in the order of their first members."""
        journal = self._journal()
        first = {node: int(member) for member, node in reversed(journal["nodes"].items())}
        living = [node for node in ray.nodes() if node["Alive"]]
        heads = {node["NodeID"] for node in living if "node:__internal_head__" in node["Resources"]}
        ids = [node["NodeID"] for node in living]
        order = sorted(ids, key=lambda node: (node not in heads, first.get(node, 10**9), node))
        return Scene.of(journal, order)

    def _await_moment(self, injection: Injection) -> None:
        wanted = None if injection.phase is None else injection.phase.replace(" ", "_")
        self.look()
        while (wanted is not None and self._state != wanted) or self._step < (injection.step or 0):
            time.sleep(_POLL_S)
            self.look()

    # -- a fuse -------------------------------------------------------------------------------------------------------

    def _burn(self, injection: Injection) -> None:
        """Lay it in whoever is meant now, and anew when that is somebody else, until it has burnt."""
        victim: Victim | None = None
        laid: int | None = None
        actor = end = None
        while True:
            self.look()
            found, member = self._means(injection)
            if laid is None or (member is not None and member != laid):
                if actor is not None and not self._unlay(actor):
                    break
                if member is not None:
                    actor = self._actor(member_name(self._session, member))
                    if self._ask(self._fuse(actor, injection)) is None:
                        actor = laid = end = None  # it ended by itself: look again
                    else:
                        victim, laid, end = found, member, actor.until_end.remote()
            if end is None:
                time.sleep(_FUSE_POLL_S)
            elif self._has_burnt(injection, victim, end):
                break
        assert victim is not None
        self._say(injection, victim)

    def _means(self, injection: Injection) -> tuple[Victim | None, int | None]:
        """The victim and the member that bears the fuse: of a node, its first one."""
        scene = self.scene()
        try:
            victim = scene.find(injection)
        except UserError:
            return None, None  # not there yet, or not there any more
        if victim.kind is not Kind.NODE:
            return victim, victim.member
        on_node = sorted(member for member, node in scene.nodes.items() if node == victim.node)
        return victim, on_node[0] if on_node else None

    def _fuse(self, actor: Any, injection: Injection) -> Any:
        deed = Deed.KILL if injection.deed is Deed.FLAP else injection.deed
        return actor.lay_fuse.remote(deed, injection.kind, injection.step, injection.phase or "")

    def _unlay(self, actor: Any) -> bool:
        """Whether it had not burnt."""
        try:
            return bool(ray.get(actor.lay_fuse.remote(None), timeout=BOUNDS["ask_ray"].seconds))
        except (*GONE, GetTimeoutError):
            return False

    def _has_burnt(self, injection: Injection, victim: Victim | None, end: Any) -> bool:
        if injection.deed is Deed.CORRUPT and victim is not None and victim.member is not None:
            actor = self._actor(member_name(self._session, victim.member))
            time.sleep(_FUSE_POLL_S)
            return self._ask(actor.has_fuse.remote()) is not True  # it goes for it, or nobody looks
        if injection.deed is Deed.FREEZE and victim is not None:
            time.sleep(_FUSE_POLL_S)
            return self._ask(self._agent(victim.node).stopped.remote([victim.pid])) == [victim.pid]
        return bool(ray.wait([end], timeout=_FUSE_POLL_S)[0])

    # -- at once ------------------------------------------------------------------------------------------------------

    def _strike_member(self, deed: Deed, victim: Victim) -> bool:
        """An agent that has just been started again is told of its members with the next lease."""
        deadline = time.monotonic() + 2 * LEASE_EVERY_S
        while not self._ask(self._agent(victim.node).strike.remote(deed, [victim.pid])):
            if time.monotonic() > deadline:
                return False
            time.sleep(_FUSE_POLL_S)
        return True

    def _strike(self, injection: Injection) -> None:
        if injection.deed is Deed.JOIN:
            self._join(injection)
            return
        victim = self.scene().find(injection)
        if injection.deed in (Deed.NOTICE, Deed.CANCEL):
            self._strike_by_notice(injection, victim)
            return
        deed = Deed.KILL if injection.deed is Deed.FLAP else injection.deed
        match victim.kind:
            case _ if deed is Deed.SLOW:
                self._ask(self._agent(victim.node).slow.remote(victim.pid, injection.factor, injection.for_s))
            case Kind.NODE:
                self._ask(self._agent(victim.node).end_node.remote())
            case Kind.AGENT:
                agent = self._agent(victim.node)
                self._ask(agent.strike.remote(deed, [self._ask(agent.describe.remote())["pid"]]))
            case Kind.COORDINATOR:
                self._strike_coordinator(deed, victim.pid)
            case _:
                if not self._strike_member(deed, victim):
                    raise UserError(f"{victim}: the agent there knows no such process")
        self._say(injection, victim)

    def _strike_by_notice(self, injection: Injection, victim: Victim) -> None:
        """A notice, and that the node ends at its time, which its agent sees to; or that there is none any more."""
        agent = self._agent(victim.node)
        if injection.deed is Deed.CANCEL:
            if not self._ask(agent.take_notice_back.remote()):
                raise UserError(f"{victim} was given no notice that can be taken back: cloud=azure gives one")
            self._say(injection, victim, "stays: its notice is taken back")
            return
        self._ask(agent.pretend_notice.remote(injection.cloud, injection.lead_s))
        self._say(injection, victim, f"is taken back in {injection.lead_s:g} s, says {injection.cloud}")

    def _strike_coordinator(self, deed: Deed, pid: int) -> None:
        """By whichever agent is on its host."""
        for node in self.scene().order:
            try:
                if self._ask(self._agent(node).strike.remote(deed, [pid])):
                    return
            except UserError:
                continue  # a node on which the run has nobody
        if deed is not Deed.KILL:
            raise UserError("no agent of the run is on the coordinator's host: it can be killed, not frozen")
        ray.kill(self._actor(COORDINATOR), no_restart=False)

    def _join(self, injection: Injection) -> None:
        before = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self.access.ask_for_node()
        deadline = time.monotonic() + BOUNDS["cluster_start"].seconds
        while not (new := {node["NodeID"] for node in ray.nodes() if node["Alive"]} - before):
            if time.monotonic() > deadline:
                raise NotFoundError("the node did not come: see keeper.log in the cluster's folder")
            time.sleep(_POLL_S)
        self._say(injection, Victim(Kind.NODE, node=next(iter(new))), "joined")

    # -- small things -------------------------------------------------------------------------------------------------

    @property
    def _session(self) -> str:
        return str(self._journal()["session"])

    def _agent(self, node: str) -> Any:
        return self._actor(agent_name(self._session, node))

    def _actor(self, name: str) -> Any:
        try:
            return ray.get_actor(name, self.namespace)
        except ValueError:
            raise UserError(f"the run has no actor {name}: has it ended, or is nobody of it on that node?") from None

    def _ask(self, call: Any) -> Any:
        """The answer; None from one that died of the question."""
        try:
            return ray.get(call, timeout=BOUNDS["ask_ray"].seconds)
        except (*GONE, GetTimeoutError):
            return None
        except RayError as error:
            raise UserError(str(error).strip().splitlines()[-1]) from error

    def _say(self, injection: Injection, victim: Victim, done: str = "") -> None:
        past = {Deed.KILL: "killed", Deed.FREEZE: "froze", Deed.THAW: "thawed", Deed.FLAP: "killed"}
        past[Deed.CORRUPT] = "flipped a bit of"
        past[Deed.SLOW] = f"made {injection.factor:g} times slower"
        self.look_quietly()
        what = f"{victim} {done}" if done else f"{past[injection.deed]} {victim}"
        self.tell(Strike(time.time_ns(), str(injection), what, self._step))

    def look_quietly(self) -> None:
        """As `look`, whether the run has ended or not."""
        try:
            self.look()
        except NotFoundError:
            return


def _has_fuse(injection: Injection) -> bool:
    if injection.deed in (Deed.NOTICE, Deed.CANCEL, Deed.SLOW):
        return False  # a cloud looks at nobody's steps, and who is slow goes on
    return injection.step is not None or injection.phase in MEMBER_PHASES
