"""How does a member obey? It halts, prepares, moves and trains, as ordered; three threads, one at the engine.

The supervisor's thread hears orders: it fences what a newer generation overtakes, at once, whatever the training thread
waits for. The training thread takes seats and trains. A thread a generation forms its groups.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from actors.assignment import Assignment
from actors.last_words import write_last_words
from actors.link import RankLink
from actors.preparation import NotPrepared, Preparation, let_go
from concertina.elastic.account import Bucket
from concertina.elastic.messages import (
    Control,
    Formed,
    Halt,
    Halted,
    Keep,
    Move,
    Pause,
    Prepare,
    RankError,
    TimeSpent,
    decode,
    encode,
)
from concertina.elastic.waits import BOUNDS
from concertina.errors import ConcertinaError
from concertina.layout import Seating
from concertina.layout.reshard import plan_moves
from concertina.model.host_memory import take_ahead
from concertina.parallel.failures import in_one_line, is_communication_failure, is_hardware_failure
from concertina.parallel.groups import GroupOptions
from concertina.planner.memory import rank_bytes
from concertina.train.corruption import SilentCorruption, corrupt
from concertina.train.loop import Loop, Overtaken
from concertina.train.standalone import build_engine

__all__ = ["Trainer"]

log = logging.getLogger("concertina.rank")


class Trainer:
    """One member's engine and what is done with it. `hear` is called by the supervisor's thread only."""

    def __init__(self, seat: Assignment, link: RankLink, hostname: str) -> None:
        self.seat, self.link, self.hostname = seat, link, hostname
        plan = seat.plan
        self.engine = build_engine(plan.job, plan.corpus, torch.device(plan.device))
        self.engine.check = link.check
        self._take_memory_ahead()
        self.loop = Loop(self.engine, plan.checkpoints, link)
        self.at_work_in = -1  # the generation it has adopted and not left
        self._halted_by = -1  # the newest HALT
        self._adopted, self._adopted_at = -1, 0  # generation, as a rank or as a spare, and its step
        self._coming: Preparation | None = None
        self._verified: Preparation | None = None  # has its state, and is not known to have been adopted
        self._current: Preparation | None = None  # whose share the engine has
        self._orders: queue.SimpleQueue[Halt | Keep | Move] = queue.SimpleQueue()
        self._last_word: dict[str, Any] | None = None

    def _take_memory_ahead(self) -> None:
        """Twice what a rank of the whole world takes: old and new state are there at a time while seats change, and
        gloo sums in a copy of the gradients."""
        plan = self.seat.plan
        if plan.device == "cpu":
            take_ahead(2 * rank_bytes(plan.job.model, plan.layout, plan.job.training.precision, 0, firsts=(0,)).total)

    def start(self) -> None:
        threading.Thread(target=self._obey, name="train", daemon=True).start()

    def repeat_last_word(self) -> None:
        """Say again how this member ended, if it has."""
        if self._last_word is not None:
            self.link.client.send(self._last_word)

    # -- the supervisor's thread --------------------------------------------------------------------------------------

    def hear(self, document: dict[str, Any]) -> None:
        """One order of the coordinator. Waits for nothing."""
        match decode(document):
            case Control() as control:
                self.link.obey(control)
            case Halt() as halt:
                self._halted_by = halt.generation
                if self.loop.sheet.current is Bucket.DETECTION:
                    self.loop.sheet.enter(Bucket.RECONFIGURATION)
                self.link.overtaken = True
                self._fence(halt.generation)
                self._orders.put(halt)
            case Prepare() as prepare:
                if self._coming is not None and self._coming is not self._current:
                    self._coming.fence()
                plan, bound = self.seat.plan, BOUNDS["collective"].timedelta
                options = GroupOptions(prepare.generation, plan.device, self.hostname, bound)
                early = self._current is None
                self._coming = Preparation(prepare, self.seat.member, self.engine, options, early)
                self._coming.start(self.link)
            case Keep() as keep:
                self._orders.put(keep)
            case Move() as move:
                self.loop.sheet.let_go()
                self._orders.put(move)
            case Pause():
                self.loop.sheet.hold(Bucket.WAITING_FOR_CAPACITY)  # the training thread may not have halted yet
                self._say_time()

    def _fence(self, generation: int) -> None:
        """What is older than `generation` communicates no more."""
        for preparation in (self._coming, self._verified, self._current):
            if preparation is not None and preparation.generation < generation:
                preparation.fence()

    # -- the training thread ------------------------------------------------------------------------------------------

    def corrupt(self) -> None:
        """On purpose: one bit of a weight flips. In the training thread, between two steps."""
        self.engine.settle()
        corrupt(self.engine.share)

    def _obey(self) -> None:
        while True:
            order = self._orders.get()
            if isinstance(order, Halt):
                self._report("")
            elif order.generation < self._halted_by:
                continue
            elif isinstance(order, Keep):
                self._keep(order)
            else:
                self._work(order)

    def _work(self, move: Move) -> None:
        """Take a seat and train, until the end or until the generation is over."""
        self._last_word = None
        try:
            self._take_seat(move)
            if self._current is None:
                return  # a spare
            finished = self.loop.run()
            if finished is None:
                self.loop.sheet.enter(Bucket.RECONFIGURATION)
                self._report("")
                return
            self._last_word = encode(finished)
            self.loop.sheet.enter(Bucket.DRAINING)
            self._say_time()
            log.info("%s", finished.reason)
            if self.link.orphaned and self.engine.rank == 0:
                self._write_last_words(finished.step)
        except Exception as error:  # noqa: BLE001 - `_break` sorts them
            self._break(move, error)
        finally:
            self.at_work_in = -1

    def _keep(self, keep: Keep) -> None:
        """Write down what this member has, and what it has of ranks that are lost; it stays as it is."""
        try:
            self._bring_up(keep)
        except Exception as error:  # noqa: BLE001 - `_break` sorts them
            self._break(keep, error)
            return
        if self._current is not None:  # else it has given its state up since it said that it had it
            keepers = self._current.seating.keepers(keep.present)
            self._write_parts(keep, [rank for rank, member in enumerate(keepers) if member == self.seat.member])

    def _write_parts(self, keep: Keep, ranks: list[int]) -> None:
        """The run does without this checkpoint, but not without who failed to write it: the others may be lost."""
        progress, step = self.link.client.progress, self.engine.applied
        progress(step, "checkpoint")
        try:
            self.loop.keep(keep.generation, [rank for rank in ranks if rank != self.engine.rank])
            log.info("writes the parts of ranks %s of a checkpoint of step %d", ranks, keep.step)
        except Exception as error:  # noqa: BLE001 - no room for a copy is a RuntimeError of torch's
            log.warning("no checkpoint of step %d while the run waits: %s", keep.step, in_one_line(error))
        progress(step, "halted")

    def _take_seat(self, move: Move) -> None:
        """Bring the state to where the new seating wants it, and make the new share the engine's."""
        began = time.perf_counter()
        self.loop.sheet.enter(Bucket.RECONFIGURATION)
        coming = self._coming
        assert coming is not None, "Prepare comes before Move"
        self._bring_up(move)
        coming.wait()
        self.link.overtaken = False  # before the look at HALT, which may come at any time
        if coming.generation != move.generation or self._halted_by > move.generation:
            raise Overtaken
        prepared = time.perf_counter()
        self.link.progress(move.step, "moving")
        if self._current is not None:
            self.engine.share.strip()
        coming.make_share()
        made = time.perf_counter()
        moved = self._move(move, coming) if move.source is not None else self._begin(move, coming)
        self._adopt(move, coming)
        self.at_work_in = move.generation
        self.link.come_to(move.step, "adopted")
        seconds = {
            "wait_s": prepared - began,
            "prepare_s": coming.seconds,
            "make_s": made - prepared,
            "move_s": time.perf_counter() - made,
        }
        log.info("generation %d: %s", move.generation, ", ".join(f"{k} {v:.3f}" for k, v in seconds.items()))
        self.link.send(Formed(self.seat.member, move.generation, move.step, seconds, moved))
        if coming.share is None:
            self.loop.sheet.enter(Bucket.DRAINING if self.seat.member in move.leaving else Bucket.SPARE)
        self._say_time()

    def _bring_up(self, move: Move | Keep) -> None:
        """To the state that the order starts from: adopt what was only verified, complete the step others have applied,
        or let go of a state that is none of theirs."""
        verified, self._verified = self._verified, None
        if verified is not None and verified.generation == move.source:
            assert verified.share is not None
            self.engine.adopt(verified.share, publish=False)
            self._current, self._adopted = verified, verified.generation
        if self._current is None:
            return
        if self._current.generation != move.source or self.seat.member not in move.present:
            self._leave()
        elif self.engine.pending == move.step and move.totals is not None:
            self.loop.note(self.engine.complete(move.totals))
        elif self.engine.pending is not None:
            self.loop.sheet.void_since(self.loop.mark)
            self.engine.void()

    def _leave(self) -> None:
        if self._current is not None:
            self.engine.adopt(None)
            over, self._current, self._adopted = [self._current], None, -1
            let_go(over)

    def _move(self, move: Move, coming: Preparation) -> dict[str, int]:
        """State from members that have it. Bytes moved, by how far."""
        assert move.seating is not None
        assert coming.crowd is not None
        nodes = {int(member): node for member, node in move.nodes.items()}
        old, member = Seating.from_json(move.seating), self.seat.member
        plan = plan_moves(self.seat.plan.job.model, old, coming.seating, move.present, nodes, only=member)

        def verified() -> None:
            if coming.share is not None:
                self._verified = coming
            self.link.come_to(move.step, "verified")

        report = self.engine.move(coming.share, coming.seating, member, plan, coming.crowd, verified)
        return {"local": report.bytes_local, "moved": report.bytes_received}

    def _begin(self, move: Move, coming: Preparation) -> dict[str, int]:
        """State from a checkpoint, or the beginning: that of weights that were trained before, if the job has any."""
        if coming.share is not None:
            if move.checkpoint is None and not coming.fresh:
                coming.start_values()
            coming.share.filled = True
            self.engine.adopt(coming.share, publish=False)
            self._current, self._adopted = coming, move.generation
            weights = self.seat.plan.start_from
            if move.checkpoint is not None or weights is not None:
                self.link.progress(move.step, "loading")
            if move.checkpoint is not None:
                self.engine.load(Path(move.checkpoint))
            else:
                self.engine.start_anew(weights)
        return {}

    def _adopt(self, move: Move, coming: Preparation) -> None:
        former, self._current = self._current, coming if coming.share is not None else None
        self._adopted, self._adopted_at = move.generation, move.step
        if coming.share is None:
            self.engine.adopt(None)
            self.loop.records.clear()  # of a past that others may void; they are written down by now
        elif former is not coming:
            self.engine.adopt(coming.share)
        self._verified = None
        if former is not None and former is not coming:
            over = [former]
            del former
            let_go(over)
        self.link.stamp.sit(move.generation, coming.seating)
        self.link.regrouped()
        if coming.share is not None:
            self.loop.sit(move.generation, move.saved, move.evaluated)

    def _write_last_words(self, step: int) -> None:
        assert self._current is not None
        assert self.engine.applied == step
        facts, unheard = self.engine.facts(), self.link.client.unacknowledged()
        write_last_words(self.seat.plan, self._current.generation, step, facts, unheard)

    # -- it is over ---------------------------------------------------------------------------------------------------

    def _break(self, move: Move | Keep, error: Exception) -> None:
        """The generation is over for this member: by its own fault, or because the network or a newer one says so."""
        overtaken = self._halted_by > move.generation
        others = isinstance(error, SilentCorruption) and error.known and not error.mine
        if overtaken or others or isinstance(error, (Overtaken, NotPrepared)) or is_communication_failure(error):
            text = in_one_line(error)
            log.info("generation %d ends: %s", move.generation, text)
            self._stop_the_clock(Bucket.RECONFIGURATION if overtaken else Bucket.DETECTION)
            self._end_communication(move.generation)
            self._report("" if overtaken else text, move.generation)
            return
        log.exception("member %d ends", self.seat.member)
        report = RankError(
            rank=self.seat.member,
            kind_of_error=type(error).__name__,
            message=in_one_line(error),
            traceback="".join(traceback.format_exception(error)),
            exit_code=error.exit_code if isinstance(error, ConcertinaError) else 1,
            hardware=is_hardware_failure(error) or (isinstance(error, SilentCorruption) and error.mine),
        )
        self._last_word = encode(report)
        self.link.send(report)

    def _stop_the_clock(self, inside: Bucket) -> None:
        """A step that nobody can finish any more was for nothing; one that is pending may yet be finished."""
        if self._current is None or self.engine.pending is not None:
            self.loop.sheet.end_step()
            self.loop.sheet.enter(inside)
        else:
            self.loop.sheet.void_step(inside)

    def _say_time(self) -> None:
        sheet = self.loop.sheet
        self.link.send(TimeSpent(self.seat.member, sheet.totals(), sheet.current.value))

    def _end_communication(self, generation: int) -> None:
        """Nothing that was begun goes on: peers that still wait for this member hear at once that it is gone, and no
        buffer is written to any more."""
        self._fence(generation + 1)
        if self._current is not None:
            self.engine.share.abandon()

    def _report(self, failure: str, generation: int = -1) -> None:
        """Say what this member has, and in which generation it failed, if it did."""
        engine, current, verified = self.engine, self._current, self._verified
        whole = current is None or engine.share.seconds.filled  # while a checkpoint is loaded it is not
        applied = engine.applied if current is not None else self._adopted_at
        totals = engine.last_totals
        report = Halted(
            member=self.seat.member,
            answers=self._halted_by,
            generation=self._adopted if whole else -1,
            verified=-1 if verified is None else verified.generation,
            step=applied,
            pending=engine.pending if current is not None else None,
            totals=totals[1] if totals is not None and totals[0] == applied else None,
            records=list(self.loop.records.values()),
            evaluated=self.loop.evaluated,
            failure=failure,
            failed=generation if failure else -1,
        )
        self.link.client.progress(applied, "halted")
        self.link.come_to(applied, "halted")
        self._say_time()
        self.link.send(report)
