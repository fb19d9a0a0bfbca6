"""Which processes are ours, and how do they all end?

Ray's workers rewrite their command line and environment and may become orphans, so neither names nor markers find
them. A subreaper does: every orphan of its subtree becomes its child (prctl(2)), and the tree below it is complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from datetime import timedelta

import psutil

__all__ = ["adopt_orphans", "end_descendants", "end_with_parent", "is_alive", "reap", "start_time"]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of every orphan among its descendants."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent: int) -> None:
    """Ask the kernel for a SIGTERM to this process when its parent, the process `parent`, is gone."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went before we asked
        signal.raise_signal(signal.SIGTERM)


def start_time(pid: int) -> float | None:
    """Seconds since the epoch at which `pid` began; None when there is no such process, or only its zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def is_alive(pid: int, started: float) -> bool:
    """Whether the very process that began at `started` runs: a pid alone is given out again."""
    now = start_time(pid)
    return now is not None and abs(now - started) < 1.0


def reap() -> None:
    """Collect every child that has ended, adopted orphans as well."""
    with contextlib.suppress(ChildProcessError):  # no child at all
        while os.waitpid(-1, os.WNOHANG)[0] != 0:
            pass


def end_descendants(bound: timedelta) -> list[int]:
    """SIGKILL everything below this process until nothing is left; the pids that are there still at the bound.

    Repeats, because a process may fork between our look and our signal. SIGKILL also ends stopped processes.
    """
    deadline = time.monotonic() + bound.total_seconds()
    while True:
        reap()
        living = _living_descendants()
        if not living or time.monotonic() > deadline:
            return [process.pid for process in living]
        for process in living:
            _kill(process)
        psutil.wait_procs(living, timeout=0.05)


def _living_descendants() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if start_time(process.pid) is not None]


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")
