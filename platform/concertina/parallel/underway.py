"""How does a rank wait for a communication, and what becomes of one whose end never comes?

Gloo does not wake everybody when a connection closes: who waits for a message that was half-way, in or out, is told
nothing (gloo's `Pair::signalException`, read and seen with torch 2.13) and sleeps until gloo's own timeout. Its backend
cannot be destroyed before. So a wait comes up for air now and then, and looks whether its generation is fenced. If it
is, and gloo's threads are known to sleep, the wait is over for the rank; the communication, its memory and its backend
are left to a thread of their own until gloo lets go.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from concertina.parallel.failures import is_communication_failure

if TYPE_CHECKING:
    from concertina.parallel.fence import Wires
    from concertina.parallel.groups import Group

__all__ = ["Several", "Underway", "leave"]

log = logging.getLogger("concertina.parallel")

_BREATH = timedelta(seconds=0.05)  # 60 us of this process a time
_LOOK_S = 0.005
_AWAKE_S = 10.0
_LET_GO_S = 1.0


class Underway:
    """One communication that a backend was given. `wait` is called once, or it is left with its generation."""

    __slots__ = ("_group", "_work")

    def __init__(self, work: Any, group: Group) -> None:
        self._work, self._group = work, group
        group.wires.underway.add(self)

    def wait(self) -> None:
        """Until it is done. Raises what the backend does, DistNetworkError when it was fenced and gloo says nothing.

        After it has returned or raised nothing of it touches memory any more.
        """
        if not self.ends():
            _let_go([self.left_over])
            raise dist.DistNetworkError("fenced, and gloo still waits for a message that was half-way")

    def ends(self, asleep: bool = False) -> bool:
        """Wait until it is over, and raise what the backend does; False when it was fenced and gloo says nothing.
        `asleep`: gloo is known to, and whatever is not over now is not waited for."""
        began = time.perf_counter()
        try:
            if self._group.backend.name() == "gloo":
                return not (asleep and not self._work.is_completed()) and self._ends_with_gloo()
            self._work.wait()  # only queues
            return True
        finally:
            self._group.tap.waited_s += time.perf_counter() - began
            self._group.wires.underway.discard(self)

    @property
    def left_over(self) -> tuple[Any, Any]:
        """What gloo holds on to: the work, and its backend."""
        return self._work, self._group.backend

    def _ends_with_gloo(self) -> bool:
        while not self._is_over():
            if self._group.wires.are_dry and _gloo_sleeps() and not self._is_over():
                return False
        return True

    def _is_over(self) -> bool:
        """Whether it ended within a breath. Raises how, if not well."""
        try:
            self._work.wait(_BREATH)
        except RuntimeError:
            if not self._work.is_completed():
                return False
        else:
            return True
        self._work.wait(_BREATH)  # raises; unless it ended well just after the breath
        return True


def leave(wires: Wires) -> None:
    """Of a generation that is fenced: wait for whatever is under way, so that nothing touches memory any more."""
    left: list[tuple[Any, Any]] = []
    try:
        for each in list(wires.underway):
            try:
                if not each.ends(asleep=bool(left)):
                    left.append(each.left_over)
            except RuntimeError as error:
                if not is_communication_failure(error):
                    raise
    finally:
        if left:
            _let_go(left)


class Several:
    """Sends and receives of one exchange, waited for as one work. Those of a pair are matched in their order."""

    def __init__(self, backend: Any, sends: list[tuple[Any, int]], receives: list[tuple[Any, int]], tag: int) -> None:
        together = backend.supports_coalescing  # NCCL's would wait for each other one by one; gloo's do not
        if together:
            backend._start_coalescing()
        self._works = [backend.recv([x], position, tag) for x, position in receives]
        self._works += [backend.send([x], position, tag) for x, position in sends]
        if together:
            self._works = [backend._end_coalescing()]
        self._ended: threading.Event | None = None
        self._failure: tuple[type[RuntimeError], str] | None = None  # not the error: it would hold this, and a backend

    def is_completed(self) -> bool:
        """Whether it is known to be over; who asks first makes a thread look."""
        return self._watch().is_set()

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until none of them touches memory any more; raises the first failure then.

        Raises RuntimeError after a timeout; it goes on in a thread, for gloo closes all connections when one send or
        receive takes longer than it was given.
        """
        if timeout is None:
            self._finish()
        elif not self._watch().wait(timeout.total_seconds()):
            raise RuntimeError("still under way")
        if self._failure is not None:
            kind, text = self._failure
            raise kind(text)

    def _watch(self) -> threading.Event:
        if self._ended is None:
            self._ended = threading.Event()
            threading.Thread(target=self._finish, args=(self._ended,), name="exchange", daemon=True).start()
        return self._ended

    def _finish(self, ended: threading.Event | None = None) -> None:
        while self._works and self._failure is None:
            self._wait_for(self._works.pop(0))
        if self._works:  # each may take as long as the one that failed, from when it is waited for
            others = [threading.Thread(target=self._wait_for, args=(work,), daemon=True) for work in self._works]
            self._works.clear()
            for other in others:
                other.start()
            for other in others:
                other.join()
        if ended is not None:
            ended.set()

    def _wait_for(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            self._failure = self._failure or (type(error), str(error))

    def get_future(self) -> Any:
        raise RuntimeError("not implemented: gloo does not tell of sends and receives")


def _let_go(left: list[tuple[Any, Any]]) -> None:
    """A thread keeps these until gloo's timeout."""
    threading.Thread(target=_keep, args=(left,), name="left-over", daemon=True).start()


def _keep(left: list[tuple[Any, Any]]) -> None:
    """Whoever drops the backend last waits for its threads, and that is to be nobody else. All are looked at each time:
    gloo's timeout of a send or a receive begins when somebody waits for it."""
    while [work for work, _ in left if not work.is_completed()]:
        time.sleep(_LET_GO_S)


def _gloo_sleeps() -> bool:
    """Whether every thread that runs gloo's collectives has slept from one look to another: with all connections closed
    it can only be one that waits for a message, and copies nothing. A thread that is busy is given time."""
    deadline = time.monotonic() + _AWAKE_S
    before = _run_loops()
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        now = _run_loops()
        if now == before and all(state == "S" for state, _ in now.values()):
            return True
        before = now
    log.warning("gloo has been busy for %g s although its connections are closed", _AWAKE_S)
    return False


def _run_loops() -> dict[str, tuple[str, str]]:
    """State, and how often it has gone to sleep, of every such thread of this process."""
    found = {}
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{task}/status") as status:
            said = dict(line.split(":", 1) for line in status.read().splitlines() if ":" in line)
            if said["Name"].strip() == "pt_gloo_runloop":
                found[task] = said["State"].strip()[0], said["voluntary_ctxt_switches"].strip()
    return found
