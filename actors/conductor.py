"""How does a session of a run go, from no ranks at all to its end? Room, ranks, their store, and what they report.

Runs in the coordinator's actor. One thread does everything in order; the channel's thread only wakes it. It is not on
the step's path. One that restarts finds its session in the events and its ranks in the journal, and goes on.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import Any

import ray

from actors.assignment import RunPlan
from actors.book import Book
from actors.evidence import Evidence
from actors.hands import Hands, nodes_now, sweep
from actors.journal import Journal
from actors.last_session import read_last_session
from actors.wishes import Wishes
from concertina.elastic.channel.server import ChannelServer
from concertina.elastic.messages import Control, Finished, RankError, Started, decode, encode
from concertina.elastic.placement import Shortage, place
from concertina.elastic.states import RunEvent, RunState
from concertina.elastic.waits import BOUNDS
from concertina.errors import CapacityError, ConcertinaError, RankFailure
from concertina.parallel.groups import make_store
from concertina.state.manifest import discard_after
from concertina.track.events import EventLog, EventType
from concertina.track.mlflow_sink import MlflowSink
from concertina.track.reconcile import reconcile_all, store_of
from concertina.track.run import RunFolder

__all__ = ["Conductor"]

log = logging.getLogger("concertina.coordinator")

LEASE_EVERY_S = 5.0  # a tenth of what agents grant
STILL_WAITING_S = 300.0  # a run whose events stand still for 15 minutes may be taken for lost
TURN_S, TURN_WITHOUT_ROOM_S = 0.5, 1.0  # news of ranks wakes it at once; turns cost the ranks processor time
_NEWS = (Started, Finished, RankError)  # the others are written down, and nothing follows from them


class Conductor:
    """One session. `run` returns at its end, `end` gives everything back; `book` and `waiting` may be read any time."""

    def __init__(self, plan: RunPlan, wishes: Wishes) -> None:
        """Raises Busy when somebody else runs this run."""
        self.plan, self.wishes = plan, wishes
        self.waiting = ""
        folder = RunFolder(plan.folder)
        self.events = EventLog(folder.events_file, plan.run_id)
        self.journal = Journal.open(folder.journal_file, plan.session)
        past = read_last_session(folder.events_file)
        self.restarted = past.session == plan.session
        again = self.restarted and not self.journal.pids and not past.state.is_end
        generation = max(plan.generation, past.generation if self.restarted else 0) + (1 if again else 0)
        if not self.restarted:
            discard_after(plan.checkpoints, plan.resume_step)
            folder.write_job(plan.job)  # a resume may change it, once it is sure that there is one
            self._record_start()
        self.book = Book(self.events, plan.checkpoints, plan.layout.world, generation, plan.job.checkpoint.keep)
        self.journal.write(self.journal.pids, self.journal.nodes)
        self.address = ray.util.get_node_ip_address()
        self.server = ChannelServer(self.address, plan.token, generation, self._heard, self._lost)
        self.hands = Hands(plan, generation, self.server.address)
        self.evidence = Evidence(self.book, self.hands, self.server)
        self.sink = MlflowSink(folder, *store_of(folder)).start()
        threading.Thread(target=reconcile_all, args=(folder.storage,), name="reconcile", daemon=True).start()
        self._wake = threading.Event()
        self._broken: BaseException | None = None
        self._turned = self._renewed = time.monotonic()
        self._asked_to_stop = False
        self._store: Any = None

    def _record_start(self) -> None:
        plan = self.plan
        resumed = plan.resume_step if plan.resume_from is not None else None
        data = {"world": plan.layout.world, "layout": plan.layout.degrees, "resumed_from_step": resumed}
        self.events.append(EventType.START, {**data, "session": plan.session}, generation=plan.generation)

    # -- callbacks of the channel's thread --------------------------------------------------------------------------

    def _heard(self, rank: int, document: dict[str, Any]) -> None:
        try:
            message = decode(document)
            self.book.record(message)
        except Exception as error:
            log.exception("what rank %d said cannot be recorded", rank)
            self._broken = error
            self._wake.set()
            raise  # not acknowledged, and the channel ends
        if isinstance(message, _NEWS):
            self._wake.set()

    def _lost(self, rank: int, evidence: str) -> None:
        log.info("the connection of rank %d broke: %s", rank, evidence)
        self._wake.set()

    # -- the one thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """To the session's end. Raises CapacityError, RankFailure, and what recording raises."""
        if self.book.state.is_end:
            return  # an earlier coordinator came as far as that
        if self.journal.pids:
            self._reattach()
        else:
            self._begin()
        while not self.book.state.is_end:
            self._turn(TURN_S)

    def _turn(self, bound_s: float) -> None:
        """Wait for news, at most so long, and look at everything."""
        self._wake.wait(bound_s)
        self._wake.clear()
        if self._broken is not None:
            raise self._broken
        now = time.monotonic()
        if now - self._renewed > LEASE_EVERY_S:
            self._renewed = now
            self.hands.renew_leases()
        late_s, self._turned = now - self._turned, now
        if late_s > BOUNDS["silence"].seconds + bound_s:
            self.wishes.forgive()  # this process stood still itself: let it hear before it judges
            return
        self._obey()
        if self.book.state is RunState.TRAINING and not self.journal.pids:
            self._write_journal()
        blame = None if self.book.state.is_end else self.evidence.look()
        if blame is not None:
            raise RankFailure(str(blame), rank=blame.rank, reason=blame.reason, traceback=blame.traceback)

    def _obey(self) -> None:
        """Stop if somebody wants it, or if nobody watches any more."""
        reason = self.wishes.stop or ("the driver is gone" if self.wishes.driver_gone else "")
        if not reason or self.book.state.is_end:
            return
        if self.wishes.now:
            self.book.state = RunState.CHECKPOINTING
            self.book.move(RunEvent.LEFT, f"{reason}, without a checkpoint")
        elif not self._asked_to_stop:
            self._asked_to_stop = True
            self.book.stop_reason = reason
            self.book.move(RunEvent.STOP_ASKED, reason)
            self.server.send(0, encode(Control(stop=True)))

    def _begin(self) -> None:
        if self.restarted:
            log.warning("restarted before the ranks had formed: from the start")
            self.book.state = RunState.WAITING_FOR_CAPACITY
            sweep(self.plan.namespace)
        self._find_room()
        self.book.move(RunEvent.CAPACITY)
        bound = BOUNDS["rank_start"]
        until = time.monotonic() + bound.seconds
        while not self.book.state.is_end and (unborn := self.hands.unborn()):
            if time.monotonic() > until:
                raise RankFailure(f"ranks {unborn} did not start within {bound.seconds:.0f} s", rank=unborn[0])
            self._turn(TURN_S)
        if not self.book.state.is_end:
            self._start_ranks()

    def _find_room(self) -> None:
        """Until the ranks have been placed or the run has been stopped. Raises CapacityError after the job's bound."""
        cluster = self.plan.job.cluster
        gpus = 1.0 if self.plan.device == "cuda" else 0.0
        told = time.monotonic()
        until = told + cluster.capacity_timeout_s
        while not self.book.state.is_end:
            found = place(nodes_now(), cluster.num_workers, cluster.cpus_per_worker, gpus)
            if not isinstance(found, Shortage) and self.hands.take(found, cluster.cpus_per_worker, gpus):
                self.waiting = ""
                return
            waiting = str(found) if isinstance(found, Shortage) else "somebody else took the room; trying again"
            now = time.monotonic()
            if waiting != self.waiting or now - told > STILL_WAITING_S:
                self.waiting, told = waiting, now
                self.book.event(EventType.STATE, state=self.book.state.value, reason=waiting)
            if now > until:
                raise CapacityError(f"gave up after {cluster.capacity_timeout_s:.0f} s {waiting}")
            self._turn(TURN_WITHOUT_ROOM_S)

    def _start_ranks(self) -> None:
        self.hands.renew_leases()
        listener = socket.create_server((self.address, 0), backlog=1024)
        store = (self.address, listener.getsockname()[1])
        self._store = make_store(self.address, listener.detach(), BOUNDS["collective"].timedelta)
        for member in self.hands.members.values():
            member.actor.train.remote(store)

    def _write_journal(self) -> None:
        """Where the ranks are, once they train: before that a restart begins anew."""
        members = self.hands.members
        self.journal.write({m.rank: m.pid for m in members.values()}, {m.rank: m.node_id for m in members.values()})

    def _reattach(self) -> None:
        """Find the ranks of this session again, by name, and tell them where the channel is now."""
        log.warning("restarted: re-attaching to %d ranks", len(self.journal.pids))
        state, reason = self.book.state.value, "the coordinator restarted"
        self.book.event(EventType.STATE, self.book.step, state=state, reason=reason)
        self.hands.adopt(self.journal.pids, self.journal.nodes)
        self.hands.renew_leases()
        self.book.started = set(range(self.plan.layout.world))
        for rank in self.journal.pids:
            if rank not in self.hands.members:
                self.book.lost[rank] = "its process was gone when the coordinator restarted"

    # -- the end ------------------------------------------------------------------------------------------------------

    def fail(self, error: ConcertinaError) -> None:
        """Record what broke the run. Raises ConcertinaError when even that cannot be written."""
        data = {"rank": error.data.get("rank"), "traceback": error.data.get("traceback", "")}
        self.book.event(EventType.ERROR, self.book.step, message=error.message, **data)
        self.book.move(RunEvent.FAILURE, error.message, exit_code=error.exit_code)

    def end(self) -> None:
        """Give everything back. One thing that fails keeps none of the others."""
        for give_back in (self._release, self.server.close, self._close_tracking, self.events.close):
            try:
                give_back()
            except Exception:
                log.exception("while ending")
        self.journal.remove()

    def _release(self) -> None:
        if not self.hands.members and self.journal.pids:
            self.hands.adopt(self.journal.pids, self.journal.nodes)
        self.hands.give_back()
        sweep(self.plan.namespace)

    def _close_tracking(self) -> None:
        self.sink.close(BOUNDS["tracking_close"].timedelta)
