"""How does the coordinator carry out what `Generations` orders, and when does it begin a new one by itself?

It makes the stores, sends the orders, keeps the journal ahead of them, bounds every phase, and writes down what a
recovery took.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from actors.accounting import Accounting
from actors.assignment import RunPlan
from actors.book import Book
from actors.change import Change
from actors.evidence import is_on_storage
from actors.journal import Journal
from actors.restoring import Restoring
from concertina.elastic.channel.server import ChannelServer
from concertina.elastic.doubts import Doubts
from concertina.elastic.generations import Coming, Generations, Order, OrderKind
from concertina.elastic.losses import Loss, Reason
from concertina.elastic.messages import Control, Formed, Halt, Halted, Keep, Message, Pause, Prepare, Prepared, encode
from concertina.elastic.notices import Notices
from concertina.elastic.seats import Seats
from concertina.elastic.states import RunEvent, RunState
from concertina.elastic.waits import BOUNDS
from concertina.errors import RankFailure
from concertina.layout import Seating
from concertina.parallel.groups import make_store
from concertina.track.events import EventType
from concertina.track.recovery import MemberNews, MemberWhat

__all__ = ["Regrouping"]

log = logging.getLogger("concertina.coordinator")

_SETTLE_S = 0.5  # joiners that are ready within so long come in together
_MOST_TRIES = 10  # regroupings in a row without a new step, at least: a bad network may come back in five minutes


class Regrouping:
    """Of one session. Called by the conductor's thread only."""

    def __init__(
        self,
        plan: RunPlan,
        book: Book,
        journal: Journal,
        server: ChannelServer,
        accounting: Accounting,
        notices: Notices,
    ) -> None:
        self.plan, self.book, self.journal, self.server, self.accounting = plan, book, journal, server, accounting
        self.address = server.address[0]
        self._doubts = Doubts()
        self._restoring = Restoring(plan, book)
        self.seats = Seats(plan.job, self._doubts, notices)
        self.generations = Generations(self.seats, first=plan.generation)
        self.expected = 0  # members that are about to arrive
        self.wish = ""  # why a planned change is wanted, if one is
        self._change: Change | None = None
        self._store: Any = None
        self._deadline: tuple[float, str] | None = None
        self._unseated_since: float | None = None
        self._complaint_since: float | None = None
        self._too_few: object = None  # who was there when they were
        self._blamed: dict[int, str] = {}
        self._failures: dict[int, str] = {}  # what members said, since a generation formed

    @property
    def asked_to_stop(self) -> bool:
        return self.seats.is_stopping

    # -- what happens -------------------------------------------------------------------------------------------------

    @property
    def complaining(self) -> bool:
        """Whether members have lost the network to their peers."""
        return any(report.failure for report in self.generations.reports.values())

    @property
    def waits_for_members(self) -> bool:
        """Whether the world stands still until everybody has answered: who cannot be reached is missed at once. Of a
        node that died, the second member would else be waited for after the first was given up."""
        return self.complaining or (self.generations.coming is not None and not self.generations.trains)

    def turn_s(self, longest_s: float) -> float:
        """How long the conductor may wait for news: evidence comes together quickly when something is wrong."""
        return 0.02 if self.complaining and not self.generations.coming else longest_s

    def arrive(self, member: int, node: str) -> None:
        self.generations.arrive(member, node)
        self._unseated_since = self._unseated_since or time.monotonic()
        self._tell_member(MemberNews(member, MemberWhat.READY, node))

    def lose(self, losses: list[Loss]) -> None:
        """Go on without them, at once."""
        for loss in losses:
            self._tell_lost(loss)
            self.journal.pids.pop(loss.member, None)  # a coordinator that restarts shall not take it back
            self._failures.pop(loss.member, None)
        seating, coming = self.generations.seating, self.generations.coming
        begun = coming.moving or coming.planned if coming is not None else self.generations.is_settled
        orders = self.generations.lose([loss.member for loss in losses])
        if begun and orders and not self.generations.trains:  # of many lost at a time it is one try
            self._doubts.come_to(self.book.step)
            self._doubts.tries += 1
            self._bear_with(losses)
        if (orders and not self.generations.trains) or self.generations.shortage:
            self._change = self._change or Change("loss", [], seating)
            self._change.losses += losses
            self.book.move(RunEvent.LOSS, "; ".join(map(str, losses)))
        elif self.generations.is_settled:
            self._deadline = self._change = None  # what was planned is called off
        self._do(orders)

    def dismiss(self, members: list[int], why: str) -> None:
        """These end in order: the run can spare them."""
        for member in members:
            self._failures.pop(member, None)
            news = MemberNews(member, MemberWhat.LEFT, self.generations.present.get(member, ""), reason=why)
            self._tell_member(news)
        self._do(self.generations.lose(members))

    def correct(self, loss: Loss) -> None:
        """It is known by now why this one was lost. What is written stays, and is followed by what is true."""
        self._tell_lost(loss)
        if self._change is not None:
            self._change.losses = [loss if old.member == loss.member else old for old in self._change.losses]

    def _tell_lost(self, loss: Loss) -> None:
        self._tell_member(MemberNews(loss.member, MemberWhat.LOST, loss.node, reason=f"{loss.reason}: {loss.text}"))

    def _tell_member(self, news: MemberNews) -> None:
        self.book.event(EventType.MEMBER, self.book.step, **news.to_json())

    def hear(self, message: Message) -> None:
        match message:
            case Prepared():
                if message.failure:
                    log.info("member %d cannot prepare: %s", message.member, message.failure)
                    self._failures[message.member] = message.failure
                self._do(self.generations.prepare(message.member, message.generation, message.failure))
            case Halted():
                if message.failure:
                    self._failures[message.member] = message.failure
                self._do(self.generations.halt(message))
            case Formed():
                self._hear_formed(message)
        self._bound_the_stop()

    def _hear_formed(self, message: Formed) -> None:
        if self._change is not None:
            self._change.formed[message.member] = message
        if self.generations.form(message.member, message.generation):
            self._settle(message.generation, message.step)

    def stop(self) -> None:
        """End with a checkpoint at the next step boundary."""
        self.seats.is_stopping = True
        seating = self.generations.seating
        if seating is not None:
            self.server.send(seating.members[0], encode(Control(stop=True)))

    def look(self) -> None:
        """Begin what is due without anything having happened."""
        generations, now = self.generations, time.monotonic()
        if self._restoring.is_over:
            self._go_back()
        if (not generations.possible and generations.coming is None) or generations.shortage:
            if self._enough(now):
                self._begin_anew()
            return
        if self._stuck(now) or self._overdue(now):
            self._try_again()
        elif generations.is_settled and not self.asked_to_stop:
            self._look_ahead(now)
        self.seats.guest = None

    def _look_ahead(self, now: float) -> None:
        """Leave nodes that will go, and take in who has come, while the world trains."""
        present, seating = self.generations.present, self.generations.seating
        assert seating is not None
        if self.book.is_finishing or self.book.state is not RunState.TRAINING:
            self._unseated_since = None
        elif self.seats.is_time_to_leave(present, seating):
            self._plan("notice")
        elif self.seats.is_cornered(present, seating):
            self._stop_short()
        elif self.wish:
            self._plan(self.wish)
        elif self._grows(now, seating):
            self._plan("join")
        self.wish = ""

    def _plan(self, cause: str) -> None:
        self._change = Change(cause, [], self.generations.seating)
        self._do(self.generations.begin(planned=True))

    def _stop_short(self) -> None:
        """The run cannot go on without nodes that are about to go: it stops where all of its state is still there, and
        writes it down."""
        self._change = Change("notice", [], self.generations.seating)
        self._too_few = self._there
        self.book.move(RunEvent.LOSS, "nodes that the run cannot do without are taken back")
        self._do(self.generations.begin())

    def _try_again(self) -> None:
        """What is under way does not come about, and nobody is lost. Who only prepares is let be; else a fence comes
        first: who does not answer it is to blame."""
        generations, coming = self.generations, self.generations.coming
        self._complaint_since = None
        if coming is not None and generations.trains:
            self._call_off(coming)
            return
        self._change = self._change or Change("network", [], generations.seating)
        roster, prepared = (coming.seating.roster, coming.prepared) if coming is not None else ((), set())
        self._doubts.come_to(self.book.step)
        self._doubts.fail(generations.present, roster, prepared)
        self._bear_with([])
        self.book.move(RunEvent.LOSS, "the network between members broke")
        self._do(generations.begin())

    def _bear_with(self, losses: list[Loss]) -> None:
        """End the run when it gets nowhere: every node has had its chances, and no step came of it."""
        job = self.plan.job
        most = max(_MOST_TRIES, job.elastic.max_losses_per_node * job.cluster.num_nodes)
        if self._doubts.tries >= most:
            reason = losses[0].reason if losses else Reason.LATE
            raise RankFailure(self._doubts.verdict(losses, self._failures), reason=reason.value)

    def _call_off(self, coming: Coming) -> None:
        """Members that train are not to blame for one that nobody can join with."""
        to_blame = self._doubts.refuse(coming.seating.roster, coming.prepared)
        log.warning("generation %d is called off: %s", coming.number, self._failures or "not prepared in time")
        if to_blame is not None:
            said = self._failures.get(to_blame, f"not done within {BOUNDS['prepare'].seconds:g} s: prepare")
            self._blamed[to_blame] = said
        self._deadline = self._change = self._unseated_since = None
        self.generations.call_off()

    def _begin_anew(self) -> None:
        """After a shortage, or for the first time. Who was too few once is so until somebody else comes."""
        generations = self.generations
        if generations.shortage is not None and self._there == self._too_few:
            return
        self._change = self._change or Change("start", [], None)
        orders = generations.begin()
        self._too_few = self._there if generations.shortage is not None else None
        if generations.shortage is None:
            self.book.move(RunEvent.CAPACITY)
        self._do(orders)
        if generations.shortage is not None and self.asked_to_stop:
            self.book.move(RunEvent.STOP_ASKED, f"{self.book.stop_reason}; no checkpoint of the last steps")

    @property
    def _there(self) -> object:
        """All that decides whether there are enough."""
        present = self.generations.present
        return frozenset(present), self.seats.leaving(present), self.asked_to_stop

    @property
    def wants_members(self) -> bool:
        """Whether more are of use: at its end the run needs none, unless too few are left for the last checkpoint."""
        return not self.asked_to_stop and (self.generations.shortage is not None or not self.book.is_finishing)

    @property
    def holds_state(self) -> bool:
        """Whether there is something that a checkpoint could keep."""
        return bool(self.generations.holders)

    def _enough(self, now: float) -> bool:
        """Whether to begin with who is there: all, or enough and no more for a while."""
        there, cluster = len(self.generations.present), self.plan.job.cluster
        if there >= cluster.num_workers or (self.asked_to_stop and self.holds_state):
            return True
        gathered = self._unseated_since is not None and now - self._unseated_since > BOUNDS["gather"].seconds
        if self.generations.shortage is not None:
            gathered = gathered or self.expected == 0
        return gathered and there >= self.plan.job.elastic.min_workers and there > 0

    def _stuck(self, now: float) -> bool:
        """Members wait for a generation that nobody has begun, and none of them is lost."""
        if not self.generations.is_stuck:
            self._complaint_since = None
            return False
        self._complaint_since = self._complaint_since or now
        return now - self._complaint_since > BOUNDS["complaint"].seconds

    def _overdue(self, now: float) -> bool:
        """A generation takes too long. (Of a HALT, `late` says who is to blame.)"""
        return self._deadline is not None and now > self._deadline[0] and self._deadline[1] != "halt"

    def _grows(self, now: float, seating: Seating) -> bool:
        """Whether members that wait for a seat would make the world larger, and all that come now are there."""
        present, leaving = self.generations.present, self.seats.leaving(self.generations.present)
        waiting = [m for m in present if seating.rank_of(m) is None and m not in leaving]
        if not waiting:
            self._unseated_since = None
            return False
        since = self._unseated_since = self._unseated_since or now
        patience = BOUNDS["gather"].seconds if self.expected else _SETTLE_S
        if now - since < patience or seating.layout.world >= self.plan.job.cluster.num_workers:
            return False
        if self.seats.world_of(present, seating) > seating.layout.world:
            return True
        self.seats.guest = self._doubts.guest(waiting)  # as a spare, where it makes no larger world by itself
        return self.seats.guest is not None

    # -- orders -------------------------------------------------------------------------------------------------------

    def _do(self, orders: list[Order]) -> None:
        for order in orders:
            log.info("generation %d: %s %s", order.number, order.kind.value, list(order.members))
            match order.kind:
                case OrderKind.HALT:
                    self._tell(order, Halt(order.number))
                    self._expect("halt")
                case OrderKind.PREPARE:
                    self._prepare(order)
                case OrderKind.STOP:
                    self._tell(order, Control(regroup=True))
                    self._deadline = None  # a step may take as long as it takes
                case OrderKind.MOVE:
                    self._move(order)
                case OrderKind.KEEP:
                    self._keep(order)
                case OrderKind.RESTORE:
                    self._restore(order.number)
        if self.generations.shortage is not None:
            self._deadline = None
            for member in self.generations.present:
                self.server.send(member, encode(Pause()))
            self.book.move(RunEvent.SHORTAGE, self.generations.shortage.reason)

    def _tell(self, order: Order, message: Message) -> None:
        document = encode(message)
        for member in order.members:
            self.server.send(member, document)

    def _expect(self, bound: str) -> None:
        self._deadline = (time.monotonic() + BOUNDS[bound].seconds, bound)

    def _bound_the_stop(self) -> None:
        """All leave at the same step boundary: once one has, the others are not far."""
        coming = self.generations.coming
        if coming is not None and coming.stopping and self.generations.reports and self._deadline is None:
            self._expect("form")

    def _prepare(self, order: Order) -> None:
        coming = self.generations.coming
        assert coming is not None
        self._write_journal()  # its number is used
        listener = socket.create_server((self.address, 0), backlog=1024)
        address = (self.address, listener.getsockname()[1])
        # The store before it goes, and with it whoever still waits there.
        self._store = make_store(self.address, listener.detach(), BOUNDS["collective"].timedelta)
        fresh = not self.generations.possible
        self._tell(order, Prepare(order.number, coming.seating.to_json(), address, fresh))
        if self._deadline is None or coming.planned:
            self._expect("prepare")

    def _move(self, order: Order) -> None:
        assert order.move is not None
        if order.move.source is not None:  # somebody has adopted it, so all of it have verified it
            self._doubts.settle(self.generations.possible[order.move.source].roster)
            self._stand(order.move.step)
        change = self._change
        if change is not None:
            change.halted_s, change.step = time.monotonic(), order.move.step
            reports = self.generations.reports.values()
            change.completed = int(any(r.pending == order.move.step and r.step < order.move.step for r in reports))
        self._write_journal()  # before anybody can have adopted it
        saved = max(self.book.newest_checkpoint(), self.plan.resume_step)
        evaluated = max(order.move.evaluated, self.plan.resume_step if order.move.source is None else 0)
        leaving = sorted(self.seats.leaving(self.generations.present))
        self._tell(order, replace(order.move, saved=saved, evaluated=evaluated, leaving=leaving))
        self._expect("load" if order.move.source is None else "form")

    def _stand(self, step: int) -> None:
        """All that hold state have said where they stand: it is there, or nowhere. Written down before anything that
        is done from there, with what a first rank that is lost did not say."""
        records = [record for report in self.generations.reports.values() for record in report.records]

        def stand() -> None:
            self.book.stand(step, records)
            self.server.recorded = self.book.recorded

        self.book.in_turn(stand)

    def _keep(self, order: Order) -> None:
        """Too few are left, and have everything between them: a checkpoint, so that losing them too costs nothing."""
        move = order.move
        assert move is not None
        assert move.source is not None
        self._stand(move.step)
        if move.step <= max(self.book.newest_checkpoint(), self.plan.resume_step):
            return
        self._write_journal()  # its number is used, and what members said before says nothing afterwards
        self._tell(order, Keep(order.number, move.source, move.present, move.step, move.totals))

    def _restore(self, number: int) -> None:
        """Nobody has the whole state: the newest checkpoint, or the beginning. But first with those that were left out
        and may have some of it."""
        reports, possible = self.generations.reports.values(), self.generations.possible
        held = {report.member for report in reports if {report.generation, report.verified} & possible.keys()}
        if left_out := self._doubts.apart & held:
            self._doubts.settle(left_out)
            self._do(self.generations.begin())
            return
        self._expect("load")
        if self._restoring.begin(number):
            self._go_back()

    def _go_back(self) -> None:
        restore = self._restoring.answer(self.generations.coming)
        if restore is None:
            return
        if self.generations.possible:
            if self.book.step > restore.step:
                log.warning("the state is not complete among who is left: back to step %d", restore.step)
            self.server.recorded = min(restore.step, self.server.recorded)
            self._stand(restore.step)
        self._do(self.generations.restore(restore))

    def _write_journal(self) -> None:
        self.journal.seatings = dict(self.generations.possible)
        self.journal.last_generation = self.generations.last_number
        self.journal.write()

    def _settle(self, number: int, step: int) -> None:
        """Everybody has formed: the steps up to here are kept, and written down."""
        seating, change = self.generations.seating, self._change
        assert seating is not None
        self._deadline = self._change = self._complaint_since = None
        self._doubts.settle(seating.roster)
        self._failures.clear()
        self.book.sit(number, seating.layout.world, step)
        if change is not None:
            self._tell_change(change, seating, step)
        self.book.move(RunEvent.FORMED)
        self.accounting.write()
        self._write_journal()
        self.book.end_if_finished()
        if self.asked_to_stop:
            self.stop()

    def _tell_change(self, change: Change, seating: Seating, step: int) -> None:
        layout = seating.layout
        self.book.event(EventType.GENERATION, step, world=layout.world, layout=layout.facts, reason=change.cause)
        if change.cause != "start":
            recovery = change.recovery(self.book.generation, seating, step)
            self.book.event(EventType.RECOVERY, step, **recovery.to_json())

    # -- bounds -------------------------------------------------------------------------------------------------------

    def late(self, members: Collection[int]) -> list[Loss]:
        """Members that have not done within its bound what each does by itself: answer a HALT, or, alone, join."""
        nodes, late = self.generations.present, {m: why for m, why in self._blamed.items() if m in members}
        self._blamed.clear()
        if self._deadline is not None and self._deadline[1] == "halt" and time.monotonic() > self._deadline[0]:
            silences = self.server.silences()
            for member in (self.generations.holders - self.generations.reports.keys()).intersection(members):
                if not is_on_storage(silences.get(member)):
                    late[member] = f"not done within {BOUNDS['halt'].seconds:g} s: halt"
            self._expect("halt")
        return [Loss(member, nodes.get(member, ""), Reason.LATE, late[member]) for member in sorted(late)]

    # -- a coordinator that restarts ----------------------------------------------------------------------------------

    def reattach(self, present: dict[int, str], at_work: dict[int, int]) -> None:
        """Take over the generations an earlier coordinator left: go on when everybody of the newest is at work in it,
        else begin a new one."""
        generations = self.generations
        orders = generations.reattach(present, self.journal.seatings, self.journal.last_generation, at_work)
        seating = generations.seating
        if seating is not None and not orders and generations.is_settled:
            self.book.sit(max(generations.possible), seating.layout.world, 0)
            self.book.move(RunEvent.FORMED)
            self.book.end_if_finished()
        elif seating is not None:
            self._change = Change("coordinator", [], seating)
            self.book.move(RunEvent.LOSS, "the coordinator restarted")
            if generations.shortage is None:
                self.book.move(RunEvent.CAPACITY)  # if the one before waited for that
        self._doubts.settle(min(self.journal.seatings.items())[1].roster if self.journal.seatings else ())
        self._unseated_since = time.monotonic() if present else None
        self._do(orders)
