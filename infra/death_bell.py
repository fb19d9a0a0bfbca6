"""How is the death of a process known before its memory has been given back? By a robust mutex that it holds.

A killed process first lets go of its robust mutexes, then of its memory, and only then of its sockets: with much memory
that is a tenth of a second and more, during which peers and kernel say nothing. Who waits for the mutex is woken at
once, with EOWNERDEAD (pthread_mutexattr_setrobust(3), futex(2)).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from pathlib import Path

__all__ = ["DeathBell", "is_supported"]

_SHARED, _ROBUST = 1, 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST
_MUTEX_BYTES = 64  # 40 on x86-64, 48 on arm64
_READY = 4088
_BYTES = 4096
_FOLDER = Path("/dev/shm")


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def is_supported() -> bool:
    """Whether this system has what it takes: Linux with glibc, and memory files."""
    try:
        return _FOLDER.is_dir() and hasattr(ctypes.CDLL(None), "pthread_mutexattr_setrobust")
    except OSError:
        return False


class DeathBell:
    """A mutex in a file of memory, by name. One process `hang`s it, from a thread that lives as long as itself; another
    one `listen`s."""

    def __init__(self, name: str) -> None:
        self.path = _FOLDER / name
        self._libc = ctypes.CDLL(None)
        self._memory: mmap.mmap | None = None

    def hang(self) -> None:
        """Make it, and hold it from now on: called once, in a thread that never ends. As long as the process lives this
        object must be kept: it maps the mutex. Raises OSError."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _BYTES)
            self._map(descriptor)
        finally:
            os.close(descriptor)
        attributes = ctypes.create_string_buffer(_MUTEX_BYTES)
        self._check(self._libc.pthread_mutexattr_init(attributes))
        self._check(self._libc.pthread_mutexattr_setpshared(attributes, _SHARED))
        self._check(self._libc.pthread_mutexattr_setrobust(attributes, _ROBUST))
        self._check(self._libc.pthread_mutex_init(self._mutex, attributes))
        self._check(self._libc.pthread_mutex_lock(self._mutex))
        assert self._memory is not None
        self._memory[_READY] = 1

    def listen(self, bound_s: float) -> bool:
        """Whether the holder has died, waiting at most so long; False while it lives or has not hung it yet."""
        if self._memory is None and not self._open():
            time.sleep(min(bound_s, 0.2))
            return False
        deadline = time.time() + bound_s
        until = _Timespec(int(deadline), int(deadline % 1 * 1e9))
        answer = self._libc.pthread_mutex_timedlock(self._mutex, ctypes.byref(until))
        if answer == errno.ETIMEDOUT:
            return False
        if answer not in (0, errno.EOWNERDEAD, errno.ENOTRECOVERABLE):
            self._check(answer)
        return True

    def listen_on(self, hung_within_s: float, look_s: float = 1.0) -> bool:
        """Until the holder has died. False when the bell does not hang within the bound: nobody made it, or somebody
        else listens already, for its file goes with the first who does."""
        deadline = time.monotonic() + hung_within_s
        while not self.listen(look_s):
            if self._memory is None and time.monotonic() > deadline:
                return False
        return True

    def take_down(self) -> None:
        """Remove the file; who has it goes on having it."""
        self.path.unlink(missing_ok=True)

    def _open(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if os.fstat(descriptor).st_size < _BYTES:
                return False
            self._map(descriptor)
        finally:
            os.close(descriptor)
        assert self._memory is not None
        if not self._memory[_READY]:
            self._memory = None
            return False
        self.take_down()  # both have it: nothing is left behind, whoever dies
        return True

    def _map(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, _BYTES)
        self._mutex = (ctypes.c_char * _MUTEX_BYTES).from_buffer(self._memory)

    @staticmethod
    def _check(answer: int) -> None:
        if answer:
            raise OSError(answer, os.strerror(answer))
