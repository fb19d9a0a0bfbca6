"""How does a session of a run go, from no members at all to its end? Members come and are lost; generations follow.

Runs in the coordinator's actor. One thread does everything in order; the channel's thread only wakes it, and another
one writes down what members say. It is not on the step's path. One that restarts finds its session in the events, its
members in the journal, and goes on.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from actors.accounting import Accounting
from actors.assignment import LEASE_EVERY_S, RunPlan
from actors.book import Book
from actors.cluster import RayCluster
from actors.departures import Departures
from actors.evidence import Evidence
from actors.hands import Hands, Member, generations_of
from actors.journal import Journal
from actors.last_session import read_last_session
from actors.pacing import Pacing
from actors.reach import Reach
from actors.recorder import Recorder
from actors.recruiter import Recruiter
from actors.regrouping import Regrouping
from actors.wishes import Wishes
from concertina.elastic.channel.server import ChannelServer
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.messages import (
    Finished,
    Formed,
    Halted,
    Message,
    Prepared,
    RankError,
    TimeSpent,
    decode,
)
from concertina.elastic.notices import Notices
from concertina.elastic.states import RunEvent, RunState
from concertina.elastic.waits import BOUNDS
from concertina.errors import CapacityError, ConcertinaError, RankFailure
from concertina.state.manifest import discard_after
from concertina.track.events import EventLog, EventType
from concertina.track.mlflow_sink import MlflowSink
from concertina.track.reconcile import reconcile_all, store_of
from concertina.track.run import RunFolder

__all__ = ["Conductor"]

log = logging.getLogger("concertina.coordinator")

STILL_WAITING_S = 300.0  # a run whose events stand still for 15 minutes may be taken for lost
_MOST_RESTARTS = 3  # without a step between them
TURN_S = 0.25  # news of members wakes it at once; turns cost the ranks processor time
_GUESSED = frozenset({Reason.KILLED, Reason.NODE, Reason.FROZEN, Reason.DISCONNECTED})  # by what is seen at first
_LATE_WORDS = frozenset({Reason.OUT_OF_MEMORY, Reason.PREEMPTED})
_FOR_REGROUPING = (Prepared, Formed, Halted, TimeSpent)


class Conductor:
    """One session. `run` returns at its end, `end` gives everything back; `book` and `waiting` may be read any time."""

    def __init__(
        self, plan: RunPlan, wishes: Wishes, cluster: RayCluster, make_hands: Callable[..., Hands] = Hands
    ) -> None:
        """Raises Busy when somebody else runs this run."""
        self.plan, self.wishes = plan, wishes
        folder = RunFolder(plan.folder)
        self.events = EventLog(folder.events_file, plan.run_id)
        self.journal = Journal.open(folder.journal_file, plan.session)
        self.journal.cluster = cluster.name
        past = read_last_session(folder.events_file)
        self.restarted = past.session == plan.session
        if not self.restarted:
            discard_after(plan.checkpoints, plan.resume_step)
            folder.write_job(plan.job)  # a resume may change it, once it is sure that there is one
            self._record_start(first=not past.session)
        self.book = Book(self.events, plan.checkpoints, plan.job.checkpoint.keep)
        self.journal.write()
        self._news: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._wake = threading.Event()
        self.recorder = Recorder(self.book, self._recorded)
        self.server = ChannelServer(cluster.address, plan.token, self._heard, self._lost)
        self.server.recorded = self.book.recorded
        self.hands = make_hands(plan, self.server.address, self.journal.give_number)
        notices = Notices()
        self.recruiter = Recruiter(plan, self.hands, notices, cluster)
        self.evidence = Evidence(self.hands, self.server)
        self.accounting = Accounting(plan, self.events, self.book, self.hands, self.journal)
        self.regrouping = Regrouping(plan, self.book, self.journal, self.server, self.accounting, notices)
        self.reach = Reach(self.hands, cluster)
        self.pacing = Pacing(plan.job, self.book, self.server, self.regrouping)
        self.departures = Departures(notices, self.book, self.hands, self.regrouping, cluster, self._dismiss)
        self.sink = MlflowSink(folder, *store_of(folder)).start()
        threading.Thread(target=reconcile_all, args=(folder.storage,), name="reconcile", daemon=True).start()
        self._renewed = time.monotonic()
        self._unexplained: dict[int, Loss] = {}  # of whose end only is known that it came
        self._short_since: float | None = None
        self._said, self._said_s = "", 0.0

    def _record_start(self, first: bool) -> None:
        """A run that goes on without a checkpoint begins again: what it did before is void."""
        plan = self.plan
        resumed = None if first and plan.resume_from is None else plan.resume_step
        data = {"world": plan.layout.world, "layout": plan.layout.facts, "resumed_from_step": resumed}
        if plan.job.emulates_compute:
            data["emulated_compute"] = True
        self.events.append(EventType.START, {**data, "session": plan.session}, generation=plan.generation)

    @property
    def waiting(self) -> str:
        """What the run waits for, if it does."""
        if self.book.state is not RunState.WAITING_FOR_CAPACITY:
            return ""
        shortage = self.regrouping.generations.shortage
        found = [text for text in (shortage.reason if shortage else "", self.recruiter.waiting) if text]
        if found and (saved := max(self.book.newest_checkpoint(), self.plan.resume_step)):
            found.append(
                f"its checkpoint is of step {saved}" + (f" of {self.book.step}" if saved < self.book.step else "")
            )
        return "; ".join(found)

    # -- callbacks of the channel's thread ----------------------------------------------------------------------------

    def _heard(self, member: int, document: dict[str, Any]) -> threading.Event | None:
        message = decode(document)
        if isinstance(message, _FOR_REGROUPING):
            self._news.put(message)
        elif isinstance(message, RankError):
            self.book.errors.append(message)  # nothing is written; `record` would wait for storage in this thread
        else:
            return self.recorder.put(message)
        self._wake.set()
        return None

    def _recorded(self, message: Message | None) -> None:
        """In the recorder's thread."""
        self.server.recorded = self.book.recorded
        if isinstance(message, Finished) or self.recorder.broken is not None:
            self._wake.set()

    def _lost(self, member: int, evidence: str) -> None:
        log.info("the connection of member %d broke: %s", member, evidence)
        self._wake.set()

    def mourn(self, member: int, for_memory: bool) -> None:
        """A member's process has died, and the kernel has killed one for memory or not; any thread may say so."""
        self.evidence.dead[member] = Reason.OUT_OF_MEMORY if for_memory else Reason.KILLED
        self._wake.set()

    # -- the one thread -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """To the session's end. Raises CapacityError, RankFailure, and what recording raises."""
        if self.book.state.is_end:
            return  # an earlier coordinator came as far as that
        self.recruiter.ask()
        if self.restarted:
            self._reattach()
        while not self.book.state.is_end:
            self._turn()

    def _turn(self) -> None:
        """Wait for news, at most a turn, and look at everything."""
        began = time.monotonic()
        self._wake.wait(self.regrouping.turn_s(min(TURN_S, self.evidence.due_s)))
        self._wake.clear()
        broken = self.recorder.broken or self.server.broken
        if broken is not None:
            raise broken
        now = time.monotonic()
        if now - self._renewed > LEASE_EVERY_S:
            self._renewed = now
            self.hands.renew_leases()
        if now - began > BOUNDS["silence"].seconds:  # what its own work takes is no reason
            self.wishes.forgive()  # this process stood still itself: let it hear before it judges
            self.evidence.forgive()
            return
        self._hear_news()
        self._hear_late_words()
        self._judge()
        if self.book.state.is_end:
            return
        self.departures.look(self.wishes)
        self._obey()
        self._recruit()
        if not self.book.state.is_end:
            self.pacing.look()
            self.regrouping.look()
            self._look_at_shortage()

    def _hear_news(self) -> None:
        while not self._news.empty():
            message = self._news.get()
            if isinstance(message, TimeSpent):
                self.accounting.hear(message)
            else:
                self.regrouping.hear(message)

    def _hear_late_words(self) -> None:
        """That a process has died is known first, what it was killed for soon after: from Ray, or from its node's
        agent. Nobody waits for that."""
        for member, (reason, text) in (self.evidence.died() | self.hands.told_late()).items():
            if reason in _LATE_WORDS and (before := self._unexplained.pop(member, None)) is not None:
                self.regrouping.correct(replace(before, reason=reason, text=text))

    def _judge(self) -> None:
        """Fail for what no other member could do better; go on without the members that are lost."""
        own = next((error for error in self.book.errors if not error.hardware), None)
        if own is not None:
            reason = Reason.USER_ERROR if own.exit_code == 2 else Reason.RAISED
            text = f"member {own.rank} raised {own.kind_of_error}: {own.message}"
            raise RankFailure(text, rank=own.rank, reason=reason.value, traceback=own.traceback)
        members = self.hands.members
        proven = self.evidence.look(self.regrouping.waits_for_members)
        said = [
            *proven,
            *self.regrouping.late(members.keys() - {loss.member for loss in proven}),
            *self.reach.look(self.evidence.stands_still),
            *self.pacing.losses(),
            *(
                Loss(error.rank, members[error.rank].node_id, Reason.HARDWARE, error.message)
                for error in self.book.errors
                if error.rank in members
            ),
        ]
        first: dict[int, Loss] = {}  # each is lost once, for what is known best
        for loss in said:
            if loss.member in members:
                first.setdefault(loss.member, loss)
        losses = [self.recruiter.judge(loss) for loss in first.values()]
        for loss in losses:
            if loss.reason.ends_the_run:
                raise RankFailure(f"member {loss.member}: {loss.text}", rank=loss.member, reason=loss.reason.value)
        if losses:
            self._lose(losses)

    def _lose(self, losses: list[Loss]) -> None:
        for loss in losses:
            log.warning("%s is lost", loss)
            if loss.reason in _GUESSED:
                self._unexplained[loss.member] = loss
            self.server.expel(loss.member)
            self.recruiter.blame(loss)
            if loss.reason in (Reason.KILLED, Reason.OUT_OF_MEMORY):  # its node lives
                heir = self.hands.promote(loss.member)
                if heir is not None:
                    self._welcome(heir)
        self.regrouping.lose(losses)  # who is left is told before anything is tidied up
        self.accounting.lose(losses, stopped=not self.regrouping.generations.trains)
        for loss in losses:
            self.journal.forget(loss.member)
            self.hands.lose(loss.member)
            if loss.reason is Reason.NODE:
                self.hands.lose_node(loss.node)
        self.journal.write()

    def _dismiss(self, node: str, members: list[int]) -> None:
        """They have left a node that will go; nothing of the run stays there."""
        log.info("node %s is given back: members %s end", node, members)
        self._part_with(members, "its node is taken back")
        self.hands.vacate(node)

    def _send_home(self) -> None:
        """Another was asked for in the place of one whose node was to go, and stays after all: who has no rank, and is
        more than is wanted, ends."""
        surplus, generations = self.recruiter.surplus, self.regrouping.generations
        seating = generations.seating
        if surplus <= 0 or seating is None or not generations.is_settled:
            return
        if seating.layout.world == self.plan.job.cluster.num_workers:
            idle = [m.number for m in self.hands.members.values() if m.pid and seating.rank_of(m.number) is None]
            if idle:
                self._part_with(sorted(idle)[:surplus], "one too many")

    def _part_with(self, members: list[int], why: str) -> None:
        """They end in order."""
        for member in members:
            self.journal.forget(member)  # before `dismiss` may write it
        self.regrouping.dismiss(members, why)
        self.accounting.leave(members)
        for member in members:
            self.server.expel(member)
            self.hands.lose(member)
        self.journal.write()

    def _obey(self) -> None:
        """Stop if somebody wants it, or if nobody watches any more."""
        reason = self.wishes.stop or ("the driver is gone" if self.wishes.driver_gone else "")
        if not reason or self.book.state.is_end:
            return
        if self.wishes.now:
            self.book.state = RunState.CHECKPOINTING
            self.book.move(RunEvent.LEFT, f"{reason}, without a checkpoint")
        elif not self.regrouping.asked_to_stop:
            self.book.stop_reason = reason
            waits = self.book.state in (RunState.WAITING_FOR_CAPACITY, RunState.FORMING)
            if not (waits and self.regrouping.holds_state):  # else whoever is there first forms, to leave a checkpoint
                self.book.move(RunEvent.STOP_ASKED, reason)
            self.regrouping.stop()
        elif self.book.state is RunState.WAITING_FOR_CAPACITY and not self.regrouping.holds_state:
            self.book.move(RunEvent.STOP_ASKED, reason)  # all were lost while they stopped: nobody is waited for

    def _recruit(self) -> None:
        if self.regrouping.wants_members:
            self.recruiter.look()
        born = self.hands.born()
        for member in born:
            if member.number in self.hands.members:
                self._welcome(member)
                self.journal.write()
        if born:
            self.hands.renew_leases()  # an agent ends nobody it was not told of
        self._send_home()
        self.accounting.look()
        self.regrouping.expected = sum(1 for member in self.hands.members.values() if not member.pid)

    def _welcome(self, member: Member) -> None:
        """It can be seated from now on."""
        self.journal.pids[member.number], self.journal.nodes[member.number] = member.pid, member.node_id
        self.regrouping.arrive(member.number, member.node_id)

    def _look_at_shortage(self) -> None:
        """Say what is waited for, and give up after the job's bound."""
        now = time.monotonic()
        if self.book.state is not RunState.WAITING_FOR_CAPACITY:
            self._short_since = None
            return
        self._short_since = now if self._short_since is None else self._short_since
        waiting = self.waiting
        if waiting and (waiting != self._said or now - self._said_s > STILL_WAITING_S):
            self._said, self._said_s = waiting, now
            self.book.event(EventType.STATE, state=self.book.state.value, reason=waiting)
        bound_s = self.plan.job.cluster.capacity_timeout_s
        if waiting and now - self._short_since > bound_s:
            raise CapacityError(f"gave up after {bound_s:.0f} s {waiting}")

    # -- a coordinator that restarts ----------------------------------------------------------------------------------

    def _count_restarts(self) -> None:
        """Raises ConcertinaError when coordinators end again and again, and no step is recorded in between."""
        step, restarts = self.book.recorded, self.journal.restarts
        self.journal.restarts = restarts = [*restarts, step][-(_MOST_RESTARTS + 1) :]
        self.journal.write()
        if len(restarts) > _MOST_RESTARTS and restarts[0] == step:
            text = f"the coordinator has ended {len(restarts)} times, and no step was recorded since step {step}"
            raise ConcertinaError(f"{text}: logs/coordinator.log says why")

    def _reattach(self) -> None:
        """Find the members of this session again, by name, and tell them where the channel is now."""
        self._count_restarts()
        members = dict(self.journal.pids)
        log.warning("restarted: re-attaching to %d members", len(members))
        state, reason = self.book.state.value, "the coordinator restarted"
        self.book.event(EventType.STATE, self.book.step, state=state, reason=reason)
        if not members:
            self.book.state = RunState.WAITING_FOR_CAPACITY
            self.hands.adopt({}, {})  # what was on its way ends, and its numbers and names are used
            self.hands.give_back()
            return
        answers = self.hands.adopt(members, self.journal.nodes)
        for member in members.keys() - self.hands.members.keys():
            self.journal.forget(member)
        at_work = generations_of(answers)
        self.hands.renew_leases()
        self.regrouping.reattach({m: member.node_id for m, member in self.hands.members.items()}, at_work)

    # -- the end ------------------------------------------------------------------------------------------------------

    def fail(self, error: ConcertinaError) -> None:
        """Record what broke the run. Raises ConcertinaError when even that cannot be written."""
        self.recorder.drain()
        data = {"rank": error.data.get("rank"), "traceback": error.data.get("traceback", "")}
        self.book.event(EventType.ERROR, self.book.step, message=error.message, **data)
        self.book.move(RunEvent.FAILURE, error.message, exit_code=error.exit_code)

    def end(self) -> None:
        """Give everything back. One thing that fails keeps none of the others."""
        give_backs = (
            self.accounting.close,
            self.recruiter.withdraw,
            self._tell_heartbeats,
            self._release,
            self.server.close,
            self.recorder.close,
            self._close_tracking,
            self.events.close,
        )
        for give_back in give_backs:
            try:
                give_back()
            except Exception:
                log.exception("while ending")
        self.journal.remove()

    def _tell_heartbeats(self) -> None:
        self.book.event(EventType.HEARTBEATS, self.book.step, **self.server.gaps.to_json())

    def _release(self) -> None:
        if not self.hands.members and self.journal.pids:
            self.hands.adopt(self.journal.pids, self.journal.nodes)
        self.hands.give_back()

    def _close_tracking(self) -> None:
        self.sink.close(BOUNDS["tracking_close"].timedelta)
