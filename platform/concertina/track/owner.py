"""Who may write here now, and is that process still alive?

A lock file held with flock(2): the kernel lets go of it when its process dies, however it dies, so a free lock is
proof of death where a pid or a heartbeat would be a guess. The file's text names the holder for people.
Imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from concertina.errors import ConcertinaError

__all__ = ["Busy", "Owner", "OwnerLock", "probe"]

# What flock(2) answers on file systems that have no locks (some FUSE mounts of object stores).
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_RETRY_S = 0.02


class Busy(ConcertinaError):
    """Another living process holds the lock. `data`: path, pid, host."""


@dataclass(frozen=True)
class Owner:
    """The last holder of a lock. `held` is None where the file system cannot tell."""

    pid: int
    host: str
    since_ns: int
    held: bool | None

    @property
    def is_here(self) -> bool:
        """Whether it ran on this machine, so that this machine's word about it counts."""
        return self.host == socket.gethostname()

    def is_gone(self) -> bool | None:
        """True or False where there is proof, None where only silence can tell.

        A lock another machine holds is seen over NFS, but a free one may only mean that locks stay local there.
        """
        if self.held:
            return False
        if not self.is_here:
            return None
        return True if self.held is False else not _pid_exists(self.pid)


class OwnerLock:
    """Exclusive while it lives; waits at most `wait` for a holder to let go.

    Raises Busy with the holder's pid and host, FileNotFoundError when file or folder were removed meanwhile. The short
    wait lets a probe pass, which holds the lock for microseconds, and a killed predecessor, whose files the kernel may
    still be closing.
    """

    def __init__(self, path: Path, wait: timedelta = timedelta(seconds=2)) -> None:
        self.path = path
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(time.monotonic() + wait.total_seconds())
            if not os.path.samestat(os.fstat(self._fd), os.stat(path)):
                raise FileNotFoundError(errno.ENOENT, "its holder has removed it", str(path))
            _sign(self._fd)
        except BaseException:
            self.release()
            raise

    def _take(self, deadline: float) -> None:
        assert self._fd is not None
        while not _try_lock(self._fd, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                holder = _read_owner(self.path, held=True)
                who = f"process {holder.pid} on {holder.host}" if holder else "another process"
                raise Busy(
                    f"{self.path} is held by {who}: wait for it to end, or stop it",
                    path=str(self.path),
                    pid=holder.pid if holder else None,
                    host=holder.host if holder else None,
                )
            time.sleep(_RETRY_S)

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> OwnerLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def probe(path: Path) -> Owner | None:
    """Who holds the lock at `path`, or held it last; None when nobody ever did."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        held = not _try_lock(fd, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return _read_owner(path, held=None)
    finally:
        os.close(fd)
    return _read_owner(path, held=held)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # No locks on this file system: a writer goes on alone, a probe must say that it does not know.
        if error.errno in _NO_LOCKS and kind == fcntl.LOCK_EX:
            return True
        raise
    return True


def _sign(fd: int) -> None:
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since_ns": time.time_ns()})
    os.ftruncate(fd, 0)
    os.pwrite(fd, text.encode() + b"\n", 0)


def _read_owner(path: Path, held: bool | None) -> Owner | None:
    try:
        facts = json.loads(path.read_text())
        return Owner(int(facts["pid"]), str(facts["host"]), int(facts["since_ns"]), held)
    except (OSError, ValueError, KeyError, TypeError):
        # Killed between making the file and signing it: held by someone unnamed, or by nobody.
        return Owner(0, "unknown", 0, held) if held else None


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
