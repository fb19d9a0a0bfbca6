"""What is made of a coming generation before anything of it is needed? Its groups.

In a thread of its own: the generation before may train meanwhile. `fence` ends it at any moment.
"""

from __future__ import annotations

import logging
import threading
import time

from actors.link import RankLink
from concertina.elastic.messages import Prepare, Prepared
from concertina.elastic.waits import BOUNDS
from concertina.errors import ConcertinaError
from concertina.layout import Seating, kv_copies
from concertina.parallel.failures import in_one_line
from concertina.parallel.fence import Wires
from concertina.parallel.groups import Group, GroupOptions, Groups, connect_store, form_crowd, form_groups
from concertina.train.engine import Engine
from concertina.train.share import Share, Values

__all__ = ["NotPrepared", "Preparation", "let_go"]

log = logging.getLogger("concertina.rank")


def let_go(held: list[Preparation]) -> None:
    """Drop a generation that is over, the last reference to it, in a thread of its own: gloo ends a thread a group,
    which takes as long as a step may."""
    held[0].fence()
    threading.Thread(target=held.clear, name="let-go", daemon=True).start()


class NotPrepared(ConcertinaError):
    """The groups of a generation could not be formed, or were given up: another one comes."""


class Preparation:
    """Of one member for one generation. `rank` is None for a spare, which has neither groups nor share. `early`: the
    share is made at once, where no other takes the room."""

    def __init__(self, order: Prepare, member: int, engine: Engine, options: GroupOptions, early: bool) -> None:
        self.generation, self.fresh = order.generation, order.fresh
        self.seating = Seating.from_json(order.seating)
        self.member, self.rank = member, self.seating.rank_of(member)
        self.crowd: Group | None = None
        self.groups: Groups | None = None
        self.share: Share | None = None
        self.seconds = 0.0
        self._host, self._port = order.store
        self._engine, self._options, self._early = engine, options, early
        self.wires = Wires()
        self._error: Exception | None = None
        self._done = threading.Event()

    def start(self, link: RankLink) -> None:
        """Begin, and tell the coordinator when it is done."""
        threading.Thread(target=self._run, args=(link,), name=f"prepare-{self.generation}", daemon=True).start()

    def _run(self, link: RankLink) -> None:
        began = time.perf_counter()
        link.come_to(0, "preparing")
        try:
            self._prepare()
        except Exception as error:  # noqa: BLE001 - it comes out of `wait`, in the training thread
            log.info("generation %d is not prepared: %s", self.generation, in_one_line(error))
            self._error = error
            link.send(Prepared(self.member, self.generation, time.perf_counter() - began, in_one_line(error)))
        else:
            self.seconds = time.perf_counter() - began
            link.come_to(0, "prepared")
            link.send(Prepared(self.member, self.generation, self.seconds))
        finally:
            self._done.set()

    def _prepare(self) -> None:
        store = connect_store(self._host, self._port, BOUNDS["collective"].timedelta)
        roster = self.seating.roster
        self.crowd = form_crowd(roster.index(self.member), len(roster), store, self._options, self.wires)
        if self.rank is not None:
            lanes = kv_copies(self._engine.job.model, self.seating.layout.tp)
            self.groups = form_groups(self.seating.layout, self.rank, store, self._options, lanes, self.wires)
        if self._early:
            self.make_share()

    def start_values(self) -> None:
        """Another share, with the start values of training: what was to be moved in is nowhere. No collective."""
        assert self.rank is not None
        assert self.groups is not None
        self.share = None  # its memory first
        self.share = self._engine.prepare(self.seating, self.rank, self.groups, "initial")

    def wait(self) -> None:
        """Until it is done. Raises NotPrepared when it failed, was fenced, or takes too long."""
        if not self._done.wait(BOUNDS["prepare"].seconds):
            raise NotPrepared(f"generation {self.generation} took more than {BOUNDS['prepare'].seconds:g} s to prepare")
        if self._error is not None or self.wires.are_cut:
            raise NotPrepared(f"generation {self.generation} could not be prepared") from self._error

    def make_share(self) -> None:
        """Room for this member's share, unless it is there: in the training thread, what the share before it has given
        up serves again."""
        if self.groups is not None and self.share is None:
            assert self.rank is not None
            values: Values = "initial" if self.fresh else "empty"
            self.share = self._engine.prepare(self.seating, self.rank, self.groups, values)

    def fence(self) -> None:
        """Whatever waits on these groups, or for them to form, raises; from any thread."""
        self.wires.fence()
