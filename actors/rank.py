"""What does a rank's actor do? It owns one process and one device, trains as assigned, and says how it went.

Thin: the engine and the loop know no Ray, and the coordinator hears everything over the supervision channel, which is
open for as long as the process lives. Without a coordinator on it, a rank leaves by itself.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from typing import Any

import ray
import torch

from actors.assignment import Assignment
from actors.last_words import write_last_words
from actors.rank_log import StepStamp, open_rank_log
from concertina.elastic.channel.client import ChannelClient
from concertina.elastic.messages import Control, Message, RankError, Started, encode
from concertina.elastic.waits import BOUNDS
from concertina.errors import ConcertinaError
from concertina.layout import kv_copies
from concertina.parallel.failures import in_one_line, is_communication_failure
from concertina.parallel.groups import GroupOptions, connect_store, form_groups
from concertina.train.loop import CHECKPOINT, STOP, Loop
from concertina.train.standalone import build_engine

__all__ = ["Rank", "RankLink"]

log = logging.getLogger("concertina.rank")

_GUARD_S = 0.5


class RankLink:
    """A rank's `Link` over the supervision channel."""

    def __init__(self, client: ChannelClient, stamp: StepStamp) -> None:
        self.client = client
        self._stamp = stamp
        self._phase = ""
        self._control = Control()
        self._asked_checkpoint = False

    def hear(self, document: dict[str, Any]) -> None:
        """The coordinator's word, from the channel's thread."""
        control = Control(stop=bool(document["stop"]), checkpoint=bool(document["checkpoint"]))
        self._asked_checkpoint |= control.checkpoint
        self._control = control

    @property
    def orphaned(self) -> bool:
        """No coordinator has been heard for so long that the run ends by itself."""
        return self.client.silent_s > BOUNDS["coordinator_silence"].seconds

    def word(self) -> int:
        word = STOP if self._control.stop or self.orphaned else 0
        if self._asked_checkpoint:
            self._asked_checkpoint = False
            word |= CHECKPOINT
        return word

    def send(self, message: Message) -> None:
        self.client.send(encode(message))

    def progress(self, step: int, phase: str) -> None:
        self.client.progress(step, phase)
        self._stamp.step = step
        if phase != self._phase:
            self._phase = phase
            log.info("%s", phase)


class Rank:
    """The actor of one rank. Ray calls it from several threads: `train` returns at once, a thread trains."""

    def __init__(self, seat: Assignment) -> None:
        self.seat = seat
        stamp = open_rank_log(seat)
        self._client = ChannelClient(seat.channel, seat.plan.token, rank=seat.rank, generation=seat.generation)
        self._link = RankLink(self._client, stamp)
        self._link.progress(seat.plan.resume_step, "waiting for the others")
        self._client.start(self._link.hear)
        self._training = False
        self._last_word: dict[str, Any] | None = None
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def describe(self) -> dict[str, Any]:
        """Where this rank is, once its imports are done."""
        return {"pid": os.getpid(), "address": ray.util.get_node_ip_address(), "torch": torch.__version__}

    def until_end(self) -> None:
        """Never answers. The call breaks when this process ends, and Ray tells its caller at once."""
        threading.Event().wait()

    def train(self, store: tuple[str, int]) -> None:
        """Begin, with the others that meet at this store; the outcome goes over the channel."""
        assert not self._training, "a rank trains once"
        self._training = True
        threading.Thread(target=self._train, args=(store,), name="train", daemon=True).start()

    def reattach(self, channel: tuple[str, int]) -> None:
        """The coordinator has restarted and listens here now. What the one before it knew and did not write down, this
        rank's last word, is said again, after all that was not acknowledged."""
        self._client.move_to(channel)
        if self._last_word is not None:
            self._client.send(self._last_word)

    # -- the training thread --------------------------------------------------------------------------------------

    def _train(self, store: tuple[str, int]) -> None:
        link = self._link
        try:
            loop = self._build(store)
            finished = loop.run()
            self._last_word = encode(finished)
            log.info("%s", finished.reason)
            if link.orphaned and self.seat.rank == 0:
                write_last_words(self.seat, finished.step, loop.last_facts, self._client.unacknowledged())
        except Exception as error:
            log.exception("rank %d ends", self.seat.rank)
            report = _report(self.seat.rank, error)
            self._last_word = encode(report)
            link.send(report)
        finally:
            self._training = False

    def _build(self, store_address: tuple[str, int]) -> Loop:
        plan, rank, link, clock = self.seat.plan, self.seat.rank, self._link, time.perf_counter
        torch.set_num_threads(plan.job.cluster.threads_per_worker)
        device = torch.device(plan.device)
        started = clock()
        link.progress(plan.resume_step, "forming")
        timeout = BOUNDS["collective"].timedelta
        store = connect_store(*store_address, timeout)
        options = GroupOptions(self.seat.generation, plan.device, ray.util.get_node_ip_address(), timeout)
        groups = form_groups(plan.layout, rank, store, options, kv_copies(plan.job.model, plan.layout.tp))
        formed = clock()
        link.progress(plan.resume_step, "building")
        engine = build_engine(plan.job, plan.corpus, device)
        engine.configure(plan.layout, rank, groups)
        if plan.resume_from is not None:
            engine.load(plan.resume_from)
        seconds = {"groups_s": formed - started, "engine_s": clock() - formed}
        link.send(Started(rank, engine.applied, seconds))
        return Loop(engine, plan.checkpoints, self.seat.generation, link)

    # -- the guard's thread -----------------------------------------------------------------------------------------

    def _guard(self) -> None:
        """A detached actor must not stay for ever: leave when shut out, and when no coordinator is heard any more."""
        alone_s = BOUNDS["coordinator_silence"].seconds
        while self._client.fenced_by is None:
            patience_s = alone_s + BOUNDS["last_checkpoint"].seconds if self._training else alone_s
            if self._client.silent_s > patience_s:
                break
            time.sleep(_GUARD_S)
        log.warning("leaves: shut out by generation %s, or no coordinator", self._client.fenced_by)
        os._exit(0)


def _report(rank: int, error: Exception) -> RankError:
    return RankError(
        rank=rank,
        kind_of_error=type(error).__name__,
        message=in_one_line(error),
        traceback="".join(traceback.format_exception(error)),
        exit_code=error.exit_code if isinstance(error, ConcertinaError) else 1,
        secondary=is_communication_failure(error),
    )
