"""What does a member's actor do? It owns one process and one device, and lends them to the seat it has.

Thin: orders come over the supervision channel, which is open for as long as the process lives, and the training thread
obeys them. Without a coordinator on it, a member leaves by itself.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from typing import Any

import ray
import torch

from actors.assignment import Assignment, bell_name
from actors.link import RankLink
from actors.rank_log import open_member_log
from actors.strike import Fuse, end_node, strike_self
from actors.trainer import Trainer
from concertina.elastic.channel.client import ChannelClient
from concertina.elastic.chaos import Deed, Kind
from concertina.elastic.waits import BOUNDS
from infra.death_bell import DeathBell, is_supported
from infra.garbage import spare_imports

__all__ = ["Rank"]

log = logging.getLogger("concertina.rank")

_GUARD_S = 0.5


class Rank:
    """The actor of one member. Ray calls it from several threads; the trainer's thread trains."""

    def __init__(self, seat: Assignment, address: str = "") -> None:
        """`address`: of this machine, where Ray is not there to say it."""
        self.seat, self._address = seat, address or ray.util.get_node_ip_address()
        plan = seat.plan
        stamp = open_member_log(plan.folder / "logs", seat.member, plan.resume_step)
        self._client = ChannelClient(seat.channel, plan.token, seat.member)
        self._link = RankLink(self._client, stamp)
        self._link.progress(plan.resume_step, "waiting for the others")
        importlib.import_module("torch._dynamo")  # else the first optimizer does, most of a second, and a join waits
        torch.set_num_threads(plan.job.cluster.threads_per_worker)
        self._trainer = Trainer(seat, self._link, self._address)
        spare_imports()
        self._client.start(self._trainer.hear)
        self._trainer.start()
        self._bell = DeathBell(bell_name(plan.session, seat.member, os.getpid()))
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        """Where this member is, once it could take a seat."""
        engine = id(self._trainer.engine)
        return {"pid": os.getpid(), "address": self._address, "torch": torch.__version__, "engine": engine}

    def until_end(self) -> None:
        """Never answers. The call breaks when this process ends, and Ray tells its caller at once."""
        threading.Event().wait()

    def reattach(self, channel: tuple[str, int]) -> int:
        """The coordinator has restarted and listens here now. The generation this member has adopted and works in, -1
        when it does not. What the coordinator before it knew and did not write down, this member's last word, is said
        again, after all that was not acknowledged."""
        self._client.move_to(channel)
        self._trainer.repeat_last_word()
        return self._trainer.at_work_in

    def lay_fuse(self, deed: Deed | None, kind: Kind = Kind.MEMBER, step: int | None = None, phase: str = "") -> bool:
        """Break this process, its memory, or its whole node, on purpose, when it comes to a step or a phase. No deed:
        not after all. Whether a fuse lay there before, and has not burnt."""
        lay = self._link.fuse is not None
        self._link.fuse = None
        if deed is not None:
            strike = end_node if kind is Kind.NODE else lambda: strike_self(deed)
            strike = self._trainer.corrupt if deed is Deed.CORRUPT else strike
            self._link.fuse = Fuse(step, phase or None, strike)
        return lay

    def has_fuse(self) -> bool:
        """Whether one lies there that has not burnt."""
        return self._link.fuse is not None

    # -- the guard's thread -----------------------------------------------------------------------------------------

    def _guard(self) -> None:
        """A detached actor must not stay for ever: leave when the run goes on without this member, and when no
        coordinator is heard any more. It is this thread that the bell hangs on."""
        self._hang_bell()
        alone_s = BOUNDS["coordinator_silence"].seconds
        while not self._client.is_expelled:
            working = self._trainer.at_work_in >= 0
            patience_s = alone_s + BOUNDS["last_checkpoint"].seconds if working else alone_s
            if self._client.silent_s > patience_s:
                break
            time.sleep(_GUARD_S)
        log.warning("leaves: %s", "the run goes on without it" if self._client.is_expelled else "no coordinator")
        self._bell.take_down()
        os._exit(0)

    def _hang_bell(self) -> None:
        try:
            if is_supported():
                self._bell.hang()
        except OSError as error:
            log.warning("no bell: a kill of this process is known when its sockets close: %s", error)
