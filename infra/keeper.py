"""python -m infra.keeper SPEC_JSON: who owns a local Ray cluster when its driver may be killed at any moment?

This process does. It starts the nodes, tells the driver where they are (one JSON line on stdout), and watches the
driver through its pid and a pipe on stdin. When the driver is gone it lets our actors finish (checkpoint, tracking
status) within a bound, then ends every process below it, removes the temporary folder and exits. SIGTERM, SIGINT or
the line `stop` on stdin end it at once. Not started by hand: `infra.local_cluster` does that.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import sys
import time
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from infra.keeper_spec import CLUSTER_FILE, JOIN_FILE, KeeperReport, KeeperSpec, StartProblem
from infra.processes import adopt_orphans, end_descendants, end_with_parent, is_alive, reap, start_time

if TYPE_CHECKING:
    from infra.ray_nodes import LocalNodes

__all__ = ["NAMESPACE_PREFIX", "Watch", "Why", "main"]

NAMESPACE_PREFIX = "concertina"
_SESSION_NAME = "session"  # short: a Unix socket's path holds 107 characters
_TICK = timedelta(seconds=1)  # the driver's end and a wish to stop wake it at once
_START_TICK = timedelta(seconds=0.02)
_END_BOUND = timedelta(seconds=15)

log = logging.getLogger("infra.keeper")


class Why(StrEnum):
    """Reasons to end."""

    ASKED = "asked to stop"
    DRIVER_GONE = "the driver is gone"


class Watch:
    """What the keeper listens to: signals, the driver's pid, the pipe the driver holds open."""

    def __init__(self, driver_pid: int, driver_started_s: float, pipe: int) -> None:
        self._driver = (driver_pid, driver_started_s)
        self._pipe: int | None = pipe
        self._asked = False
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait(self, bound: timedelta) -> Why | None:
        """Return at the first reason to end, or None after `bound`. The wish to stop outranks a lost driver."""
        sources = [self._wake_read] if self._pipe is None else [self._wake_read, self._pipe]
        readable, _, _ = select.select(sources, [], [], bound.total_seconds())
        if self._wake_read in readable:
            os.read(self._wake_read, 64)
        if self._pipe in readable:
            self._read_pipe()
        if self._asked:
            return Why.ASKED
        gone = self._pipe is None or not is_alive(*self._driver)
        return Why.DRIVER_GONE if gone else None

    def _read_pipe(self) -> None:
        assert self._pipe is not None
        words = os.read(self._pipe, 4096)
        if b"stop" in words:
            self._asked = True
        if not words:
            self._pipe = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def main(arguments: list[str]) -> int:
    """Two processes, so that a SIGKILL of either leaves nothing: the one that is left cleans up."""
    spec = KeeperSpec.from_json(arguments[0])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    guard = os.getpid()
    adopt_orphans()
    child = os.fork()  # before ray is imported and any thread runs
    if child != 0:
        return _guard(child, spec)
    sys.excepthook = _last_words
    watch = Watch(spec.driver_pid, spec.driver_started_s, sys.stdin.fileno())
    adopt_orphans()
    end_with_parent(guard)
    try:
        _keep(spec, watch, guard)
    finally:
        left = _clean_up(spec)
    return 1 if left else 0


def _guard(child: int, spec: KeeperSpec) -> int:
    """Wait for the keeper proper, passing signals on, then end what it may have left."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGTERM))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout):  # the pipes are the child's: the driver shall see it end
        os.dup2(nothing, stream.fileno())
    _, status = os.waitpid(child, 0)
    left = _clean_up(spec)
    return 1 if left else os.waitstatus_to_exitcode(status)


def _clean_up(spec: KeeperSpec) -> list[int]:
    left = end_descendants(_END_BOUND)
    if left:
        log.error("still there after %g s: %s", _END_BOUND.total_seconds(), left)
    shutil.rmtree(spec.temp_dir, ignore_errors=True)
    return left


def _keep(spec: KeeperSpec, watch: Watch, guard: int) -> None:
    from infra.ray_nodes import LocalNodes  # imports ray, which takes 0.3 s: signals are handled before

    nodes = LocalNodes(spec, _SESSION_NAME)
    if not _start(nodes, spec, watch):
        return
    started = start_time(guard)
    if started is None:
        return
    report = KeeperReport(nodes.address, str(nodes.session_dir), nodes.dashboard_url, guard, started)
    nodes.let_go()
    unseen = Path(spec.temp_dir, "cluster.new")
    unseen.write_text(report.to_json())
    unseen.rename(unseen.with_name(CLUSTER_FILE))  # others read it: whole or absent
    _tell(report)
    why = None
    while why is None:
        why = watch.wait(_TICK)
        reap()
        _join(nodes, Path(spec.temp_dir, JOIN_FILE))
    log.info("%s", why)
    if why is Why.DRIVER_GONE:
        _let_actors_finish(nodes, timedelta(seconds=spec.actors_timeout_s), watch)


def _join(nodes: LocalNodes, wish: Path) -> None:
    """One more node, if somebody wants it."""
    if wish.exists():
        wish.unlink()
        log.info("one more node")
        nodes.join()
    for error in nodes.failed_joins():
        log.error("a node did not start: %s", error)


def _start(nodes: LocalNodes, spec: KeeperSpec, watch: Watch) -> bool:
    """Start every node; False when there was a reason to end meanwhile."""
    deadline = time.monotonic() + spec.startup_timeout_s
    nodes.start()
    while True:
        if nodes.ready():
            return True
        if watch.wait(_START_TICK) is not None:
            return False
        if time.monotonic() > deadline:
            raise StartProblem(f"Ray did not start within {spec.startup_timeout_s:g} s")


def _let_actors_finish(nodes: LocalNodes, bound: timedelta, watch: Watch) -> None:
    """Wait until no actor of ours lives, at most `bound`: the coordinator writes a checkpoint and the status."""
    deadline = time.monotonic() + bound.total_seconds()
    while time.monotonic() < deadline and nodes.gcs_is_alive():
        living = nodes.living_actors(NAMESPACE_PREFIX)
        if not living:
            log.info("no actor of ours is left")
            return
        if watch.wait(_TICK) is Why.ASKED:
            return
    log.warning("ended by the bound of %g s", bound.total_seconds())


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The log is gone with the folder by now: what went wrong must reach the driver, if it still waits."""
    _tell(KeeperReport(problem=str(error) if kind is StartProblem else f"{kind.__name__}: {error}"))
    sys.__excepthook__(kind, error, trace)
    _exit(1)


def _exit(status: int) -> NoReturn:
    """At once: threads that still look for the nodes we have just ended would hold a normal exit for half a minute."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _tell(report: KeeperReport) -> None:
    try:
        print(report.to_json(), flush=True)
    except BrokenPipeError:
        log.warning("the driver went before it heard: %s", report)


if __name__ == "__main__":
    _exit(main(sys.argv[1:]))
