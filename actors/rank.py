"""What does a rank's actor do? It owns one process and one device, trains as assigned, and says how it went.

Thin: the engine and the loop know no Ray, and the coordinator hears everything over the supervision channel.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import ray
import torch

from actors.assignment import Assignment
from concertina.elastic.channel.client import ChannelClient
from concertina.elastic.messages import Control, Message, RankError, Started, encode
from concertina.elastic.waits import BOUNDS
from concertina.errors import ConcertinaError
from concertina.layout import Axis
from concertina.parallel.failures import is_communication_failure
from concertina.parallel.groups import GroupOptions, connect_store, form_groups
from concertina.state.manifest import commit
from concertina.train.loop import CHECKPOINT, STOP, Loop
from concertina.train.standalone import build_engine

__all__ = ["Rank", "RankLink"]

log = logging.getLogger("concertina.rank")


class RankLink:
    """A rank's `Link` over the supervision channel."""

    def __init__(self, client: ChannelClient) -> None:
        self.client = client
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
        log.debug("%s", phase)


class Rank:
    """The actor of one rank. Ray calls it from several threads: `train` returns at once, a thread trains."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._client: ChannelClient | None = None
        self._last_word: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """Where this rank is, once its imports are done."""
        return {"pid": os.getpid(), "address": ray.util.get_node_ip_address(), "torch": torch.__version__}

    def train(self, assignment: Assignment) -> None:
        """Begin; the outcome goes over the channel."""
        assert self._thread is None, "a rank trains one assignment at a time"
        self._thread = threading.Thread(target=self._train, args=(assignment,), name="train", daemon=True)
        self._thread.start()

    def reattach(self, channel: tuple[str, int]) -> dict[str, Any] | None:
        """The coordinator has restarted and listens here now. Answers with this rank's last word, if it has said it."""
        assert self._client is not None
        self._client.move_to(channel)
        return self._last_word

    # -- the training thread --------------------------------------------------------------------------------------

    def _train(self, assignment: Assignment) -> None:
        _log_to(assignment)
        link: RankLink | None = None
        try:
            link = self._connect(assignment)
            loop = self._build(assignment, link)
            finished = loop.run()
            self._last_word = encode(finished)
            if link.orphaned:
                _commit_alone(assignment, finished.step, loop.last_facts)
        except Exception as error:
            log.exception("rank %d ends", assignment.rank)
            report = _report(assignment.rank, error)
            self._last_word = encode(report)
            if link is not None:
                link.send(report)
        self._linger()

    def _connect(self, assignment: Assignment) -> RankLink:
        self._client = ChannelClient(
            assignment.channel, assignment.plan.token, rank=assignment.rank, generation=assignment.generation
        )
        link = RankLink(self._client)
        self._client.start(link.hear)
        return link

    def _build(self, assignment: Assignment, link: RankLink) -> Loop:
        plan, rank, clock = assignment.plan, assignment.rank, time.perf_counter
        torch.set_num_threads(plan.job.cluster.threads_per_worker)
        device = torch.device(plan.device)
        started = clock()
        link.progress(plan.resume_step, "forming")
        timeout = BOUNDS["collective"].timedelta
        store = connect_store(*assignment.store, timeout)
        address = ray.util.get_node_ip_address()
        options = GroupOptions(assignment.generation, plan.device, address, timeout)
        groups = form_groups(plan.layout, rank, store, options)
        formed = clock()
        link.progress(plan.resume_step, "building")
        engine = build_engine(plan.job, plan.corpus, device)
        engine.configure(plan.layout, rank, groups)
        if plan.resume_from is not None:
            engine.load(plan.resume_from)
        seconds = {"groups_s": formed - started, "engine_s": clock() - formed}
        link.send(Started(rank, engine.applied, seconds))
        return Loop(engine, plan.checkpoints, assignment.generation, link)

    def _linger(self) -> None:
        """Wait to be ended by the coordinator; without one, leave: a detached actor must not stay for ever."""
        until = time.monotonic() + BOUNDS["rank_lingers"].seconds
        while time.monotonic() < until:
            time.sleep(0.5)
        os._exit(0)


def _report(rank: int, error: Exception) -> RankError:
    return RankError(
        rank=rank,
        kind_of_error=type(error).__name__,
        message=str(error).splitlines()[0] if str(error) else type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
        exit_code=error.exit_code if isinstance(error, ConcertinaError) else 1,
        secondary=is_communication_failure(error),
    )


def _commit_alone(assignment: Assignment, step: int, facts: dict[str, Any]) -> None:
    """Without a coordinator the first rank completes the last checkpoint itself."""
    if assignment.rank != 0:
        return
    until = time.monotonic() + BOUNDS["last_checkpoint"].seconds
    while time.monotonic() < until:
        if commit(assignment.plan.checkpoints, step, assignment.generation, facts) is not None:
            return
        time.sleep(0.2)


def _log_to(assignment: Assignment) -> None:
    """One log file a rank, each line saying who speaks."""
    layout, rank = assignment.plan.layout, assignment.rank
    where = " ".join(f"{axis.value}{layout.coordinate(rank, axis)}" for axis in (Axis.PP, Axis.DP, Axis.EP))
    path = Path(assignment.plan.folder) / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    prefix = f"[gen {assignment.generation} | rank {rank} {where}]"
    handler.setFormatter(logging.Formatter(f"{prefix} %(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("concertina")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
