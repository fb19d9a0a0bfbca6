"""What does the coordinator's actor do? It finds room, starts ranks, listens to them, and brings the run to its end.

It is not on the step's path. One thread does everything in order; Ray's calls and the channel's threads only put things
on its queue. A restarted coordinator finds its session in the journal, re-attaches to the living ranks and goes on.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.assignment import Assignment, RunPlan
from actors.book import Book
from actors.hands import Hands, Member, nodes_now
from actors.journal import Journal
from concertina.elastic.channel.server import ChannelServer
from concertina.elastic.messages import Control, decode, encode
from concertina.elastic.placement import Shortage, place
from concertina.elastic.states import RunEvent, RunState
from concertina.elastic.waits import BOUNDS
from concertina.errors import CapacityError, ConcertinaError, RankFailure
from concertina.parallel.groups import make_store
from concertina.state.manifest import discard_after
from concertina.track.events import EventLog, EventType
from concertina.track.mlflow_sink import MlflowSink
from concertina.track.reconcile import store_of
from concertina.track.run import RunFolder

__all__ = ["Coordinator", "Status"]

log = logging.getLogger("concertina.coordinator")

LEASE_EVERY_S = 5.0  # a tenth of what agents grant


@dataclass(frozen=True)
class Status:
    """What a poll answers."""

    state: RunState
    reason: str
    exit_code: int
    step: int
    waiting: str
    over: bool


class Coordinator:
    """The actor of one run's session."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.journal = Journal.open(plan.folder / "journal.json", plan.session)
        generation = plan.generation
        self.events = EventLog(plan.folder / "events.jsonl", plan.run_id)
        folder = RunFolder(plan.folder)
        self.sink = MlflowSink(folder, *store_of(folder)).start()
        keep = plan.job.checkpoint.keep
        if not self.journal.is_restart:
            discard_after(plan.checkpoints, plan.resume_step)
            self._record_start()
            self.journal.write({}, {})
        self.book = Book(self.events, plan.checkpoints, plan.layout.world, generation, keep)
        self.address = ray.util.get_node_ip_address()
        self.server = ChannelServer(self.address, plan.token, generation, self._heard, self._lost)
        self.hands = Hands(plan.namespace, generation)
        self._waiting = ""
        self._exit_code = 1
        self._over = False
        self._polled = self._renewed = time.monotonic()
        self._trouble_since: float | None = None
        self._store: Any = None
        threading.Thread(target=self._run, name="coordinator", daemon=True).start()

    # -- what others call; each returns at once -------------------------------------------------------------------

    def poll(self) -> Status:
        """The driver lives and asks how it goes. Hears of no driver for a while: the run stops with a checkpoint."""
        self._polled = time.monotonic()
        book = self.book
        return Status(book.state, book.reason, self._exit_code, book.step, self._waiting, self._over)

    def stop(self, reason: str, now: bool = False) -> None:
        """End the run: with a checkpoint at the next step boundary, or at once."""
        self._queue.put(lambda: self._stop(reason, now))

    def leave(self) -> None:
        """The driver has seen the end; nothing keeps the coordinator."""
        self._queue.put(lambda: None)
        self._polled = float("-inf")

    # -- callbacks of the channel ---------------------------------------------------------------------------------

    def _heard(self, rank: int, document: dict[str, Any]) -> None:
        self.book.record(decode(document))

    def _lost(self, rank: int, evidence: str) -> None:
        self._queue.put(lambda: self._on_lost(rank, evidence))

    # -- the one thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self.journal.pids:
                self.journal.write(self.journal.pids, self.journal.nodes)
                self._reattach()
            else:
                self.hands.sweep()
                self._begin()
            while not self.book.state.is_end:
                self._turn(0.25)
            self._exit_code = self.book.state.exit_code
        except ConcertinaError as error:
            self._fail(error)
        except Exception as error:
            log.exception("coordinator")
            self._fail(ConcertinaError(f"the coordinator failed: {type(error).__name__}: {error}"))
        self._end()

    def _turn(self, timeout_s: float) -> None:
        """Handle what is on the queue, at most `timeout_s` after nothing came, and look at the clocks."""
        try:
            self._queue.get(timeout=timeout_s)()
            while True:
                self._queue.get_nowait()()
        except queue.Empty:
            pass
        if time.monotonic() - self._renewed > LEASE_EVERY_S:
            self._renewed = time.monotonic()
            self.hands.renew_leases()
        if time.monotonic() - self._polled > BOUNDS["driver_silence"].seconds:
            self._stop("the driver is gone", now=False)
        self._look_for_trouble()

    def _record_start(self) -> None:
        plan = self.plan
        degrees = {"world": plan.layout.world, "ep": plan.layout.ep, "dp": plan.layout.dp, "edp": plan.layout.edp}
        resumed = plan.resume_step if plan.resume_from is not None else None
        data = {"world": plan.layout.world, "layout": degrees, "resumed_from_step": resumed, "session": plan.session}
        self.events.append(EventType.START, data, generation=plan.generation)

    def _begin(self) -> None:
        self._wait_for_room()
        if self.book.state.is_end:
            return
        self.book.move(RunEvent.CAPACITY)
        try:
            self.hands.describe()
        except (GetTimeoutError, RayActorError) as error:
            raise RankFailure(f"ranks did not start: {str(error).splitlines()[0]}") from error
        self.hands.renew_leases()
        self.journal.write({rank: member.pid for rank, member in self.hands.members.items()}, self._nodes())
        listener = socket.create_server((self.address, 0), backlog=1024)
        store = (self.address, listener.getsockname()[1])
        self._store = make_store(self.address, listener.detach(), BOUNDS["collective"].timedelta)
        for rank, member in self.hands.members.items():
            member.actor.train.remote(Assignment(self.plan, self.plan.generation, rank, store, self.server.address))

    def _wait_for_room(self) -> None:
        """Until the ranks have been placed or somebody stops the run. Raises CapacityError after the job's bound."""
        cluster = self.plan.job.cluster
        gpus = 1.0 if self.plan.device == "cuda" else 0.0
        until = time.monotonic() + cluster.capacity_timeout_s
        while not self.book.state.is_end:
            found = place(nodes_now(), cluster.num_workers, cluster.cpus_per_worker, gpus)
            if not isinstance(found, Shortage) and self.hands.take(found, cluster.cpus_per_worker, gpus):
                self._waiting = ""
                return
            waiting = str(found) if isinstance(found, Shortage) else "somebody else took the room; trying again"
            if waiting != self._waiting:
                self._waiting = waiting
                self.book.event(EventType.STATE, state=self.book.state.value, reason=waiting)
            if time.monotonic() > until:
                raise CapacityError(f"gave up after {cluster.capacity_timeout_s:.0f} s {waiting}")
            self._turn(1.0)

    def _reattach(self) -> None:
        """Find the ranks of this session again, by name, and tell them where the channel is now."""
        log.warning("restarted: re-attaching to %d ranks", len(self.journal.pids))
        self.book.event(EventType.STATE, state=RunState.TRAINING.value, reason="the coordinator restarted")
        self.book.state = RunState.FORMING
        self.hands.adopt(self.journal.pids, self.journal.nodes)
        self.book.started = set(range(self.plan.layout.world))
        self.book.move(RunEvent.FORMED)
        for rank in self.journal.pids:
            if rank not in self.hands.members:
                self.book.lost[rank] = "its process was gone when the coordinator restarted"
        for member in self.hands.members.values():
            self._hear_again(member)

    def _hear_again(self, member: Member) -> None:
        """A rank's last word may have reached the coordinator that is gone: ask for it."""
        try:
            told = ray.get(member.actor.reattach.remote(self.server.address), timeout=BOUNDS["ask_ray"].seconds)
        except (RayActorError, GetTimeoutError) as error:
            self.book.lost[member.rank] = str(error).splitlines()[0]
            return
        if told is not None:
            self.book.record(decode(told))

    def _nodes(self) -> dict[int, str]:
        return {rank: member.node_id for rank, member in self.hands.members.items()}

    def _stop(self, reason: str, now: bool) -> None:
        if self.book.state.is_end:
            return
        self.book.stop_reason = reason
        self.book.move(RunEvent.STOP_ASKED, reason)
        if now:
            self.book.state = RunState.CHECKPOINTING
            self.book.move(RunEvent.LEFT, f"{reason}, without a checkpoint")
        else:
            self.server.send(0, encode(Control(stop=True)))

    # -- failures -------------------------------------------------------------------------------------------------

    def _on_lost(self, rank: int, evidence: str) -> None:
        if rank not in self.book.finished and rank not in self.book.lost:
            self.book.lost[rank] = f"{self.hands.why_gone(rank)} ({evidence})"

    def _look_for_trouble(self) -> None:
        """A failure is judged once its evidence is in: the rank to blame is seldom the first one heard of."""
        for rank, silence in self.server.silences().items():
            if silence.seconds > BOUNDS["silence_busy"].seconds:
                self._on_lost(rank, f"silent for {silence.seconds:.0f} s at step {silence.step} ({silence.phase})")
        blame = self.book.blame()
        if blame is None or self.book.state.is_end:
            return
        now = time.monotonic()
        if self._trouble_since is None:
            self._trouble_since = now
        patience = "evidence_of_others" if blame.reason == "lost" else "evidence"
        if now - self._trouble_since > BOUNDS[patience].seconds:
            raise RankFailure(str(blame), rank=blame.rank, reason=blame.reason, traceback=blame.traceback)

    def _fail(self, error: ConcertinaError) -> None:
        self._exit_code = error.exit_code
        data = {"rank": error.data.get("rank"), "traceback": error.data.get("traceback", "")}
        self.book.event(EventType.ERROR, self.book.step, message=error.message, **data)
        self.book.move(RunEvent.FAILURE, error.message)

    def _end(self) -> None:
        """Give everything back, then wait a little for the driver to see the end, then go."""
        self.hands.give_back()
        self.server.close()
        self.sink.close(BOUNDS["tracking_close"].timedelta)
        self.events.close()
        self.journal.remove()
        self._over = True
        until = time.monotonic() + BOUNDS["coordinator_lingers"].seconds
        while time.monotonic() < until and self._polled > float("-inf"):
            time.sleep(0.1)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
