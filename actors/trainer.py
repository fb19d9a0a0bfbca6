"""How does a member obey? It halts, prepares, moves and trains, as ordered; three threads, one at the engine.

The supervisor's thread hears orders: it fences what a newer generation overtakes, at once, whatever the training thread
waits for. The training thread takes seats and trains. A thread a generation prepares: groups, and room for the share.
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
from actors.preparation import Preparation
from concertina.elastic.messages import Control, Halt, Halted, Move, Prepare, RankError, decode, encode
from concertina.elastic.waits import BOUNDS
from concertina.errors import ConcertinaError
from concertina.layout import Seating
from concertina.parallel.failures import in_one_line, is_communication_failure
from concertina.parallel.groups import GroupOptions
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
        self.loop = Loop(self.engine, plan.checkpoints, link)
        self.at_work_in = -1
        self._generation = -1  # whose state the engine has
        self._halted_by = -1  # the newest HALT
        self._preparing: Preparation | None = None
        self._verified: Preparation | None = None
        self._orders: queue.SimpleQueue[Halt | Move] = queue.SimpleQueue()
        self._last_word: dict[str, Any] | None = None

    def start(self) -> None:
        threading.Thread(target=self._obey, name="train", daemon=True).start()

    def repeat_last_word(self) -> None:
        """Say again how this member ended, if it has."""
        if self._last_word is not None:
            self.link.client.send(self._last_word)

    # -- the supervisor's thread ------------------------------------------------------------------------------------

    def hear(self, document: dict[str, Any]) -> None:
        """One order of the coordinator. Waits for nothing."""
        match decode(document):
            case Control() as control:
                self.link.obey(control)
            case Halt() as halt:
                self._halted_by = halt.generation
                self.link.overtaken = True
                self._abandon(halt.generation)
                self._orders.put(halt)
            case Prepare() as prepare:
                self._abandon(prepare.generation)
                self._preparing = Preparation(prepare, self.seat.member, self.engine, self._options(prepare.generation))
                self._preparing.start(self.link)
            case Move() as move:
                self._orders.put(move)

    def _options(self, generation: int) -> GroupOptions:
        bound = BOUNDS["collective"].timedelta
        return GroupOptions(generation, self.seat.plan.device, self.hostname, bound)

    def _abandon(self, generation: int) -> None:
        """Fence what is older than `generation`: the groups that are trained on, if a HALT has said so, and those under
        way."""
        if self._preparing is not None and self._preparing.generation < generation:
            self._preparing.fence()
        if self.engine.groups is not None and self._generation < self._halted_by:
            self.engine.groups.fence()

    # -- the training thread ------------------------------------------------------------------------------------------

    def _obey(self) -> None:
        while True:
            order = self._orders.get()
            if isinstance(order, Halt):
                self._report("")
            elif order.generation >= self._halted_by:
                self._work(order)

    def _work(self, move: Move) -> None:
        """Take a seat and train, until the end or until the generation is over."""
        self.at_work_in = move.generation
        try:
            self._take_seat(move)
            if self.engine.rank is None:
                return  # a spare
            finished = self.loop.run()
            if finished is None:
                self._report("")
                return
            self._last_word = encode(finished)
            log.info("%s", finished.reason)
            if self.link.orphaned and self.engine.rank == 0:
                self._write_last_words(finished.step)
        except Exception as error:
            self._break(move, error)
        finally:
            self.at_work_in = -1

    def _write_last_words(self, step: int) -> None:
        facts, unheard = self.loop.last_facts, self.link.client.unacknowledged()
        write_last_words(self.seat.plan, self._generation, self.engine.layout.world, step, facts, unheard)

    def _take_seat(self, move: Move) -> None:
        started = time.perf_counter()
        preparation = self._preparing
        assert preparation is not None and preparation.generation == move.generation, "Prepare comes before Move"
        preparation.wait()
        prepared = time.perf_counter()
        self.link.overtaken = self._halted_by > move.generation
        self.link.progress(move.step, "moving")
        seconds = {"wait_s": prepared - started}
        ...


    def _break(self, move: Move, error: Exception) -> None:
        """The generation is over for this member: by its own fault, or because the network or a newer one says so."""
        overtaken = self._halted_by > move.generation
        if overtaken or isinstance(error, Overtaken) or is_communication_failure(error):
            log.info("generation %d ends: %s", move.generation, in_one_line(error) or "overtaken")
            self._fence_all()
            self._report("" if overtaken else in_one_line(error))
            return
        log.exception("member %d ends", self.seat.member)
        report = RankError(
            rank=self.seat.member,
            kind_of_error=type(error).__name__,
            message=in_one_line(error),
            traceback="".join(traceback.format_exception(error)),
            exit_code=error.exit_code if isinstance(error, ConcertinaError) else 1,
            secondary=False,
        )
        self._last_word = encode(report)
        self.link.send(report)
