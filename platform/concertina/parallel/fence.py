"""How does a rank end a generation's communication at once, from any thread? It cuts the generation's wires.

Gloo cannot be told to give up: its `abort` does nothing, and what a frozen peer sends when it wakes lands in whatever
the abandoned buffer has become. So the connected sockets are shut down under it (`shutdown(2)` of both directions, on
duplicates of their descriptors). Gloo takes that for the peers' end: what waits raises (or is ended otherwise, see
`parallel/underway.py`), whatever is started later raises. NCCL is told to abort, which it does (written from its
documentation, `parallel/nccl.py`).

While groups form, a connection is theirs when one of its ends is where a peer or this rank listens for it; afterwards
the sockets themselves are known. Listening sockets are left alone (gloo ends the process when one fails), and so is
every other connection of the process.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from concertina.parallel.underway import Underway

__all__ = ["Address", "Wires"]

Address = tuple[str, int]
"""Host and port."""

_GULP_BYTES = 1 << 18


class Wires:
    """The connections of one rank in one generation: of one forming call, or of several that were given the same."""

    def __init__(self) -> None:
        self.underway: set[Underway] = set()
        self._cut, self._dry = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._listening: set[Address] = set()  # for groups that form now, here and at peers
        self._sockets: set[int] = set()  # by inode: unlike a port, none is given out again
        self._standing: set[int] = set()  # those of groups that are formed; only these have buffers
        self._communicators: list[Any] = []  # of NCCL

    @property
    def are_cut(self) -> bool:
        return self._cut.is_set()

    @property
    def are_dry(self) -> bool:
        """Whether they are cut, and nothing of a peer can arrive any more."""
        return self._dry.is_set()

    def check(self) -> None:
        """Raises torch's DistNetworkError when they are cut."""
        if self.are_cut:
            raise dist.DistNetworkError("this generation has been fenced")

    def fence(self) -> None:
        """Cut them for good, from any thread, any number of times. Returns within milliseconds.

        What waits raises, in every thread. What the kernel had received before is dropped before this returns, so that
        a peer's bytes reach no buffer afterwards, whatever wakes up on the other side.
        """
        self._cut.set()
        with self._lock:
            communicators, self._communicators = self._communicators, []
        _abort(communicators)
        self.shut_down()
        with self._lock:
            for connection in _connections(self._standing):
                _drain(connection)
        self._dry.set()

    def shut_down(self) -> None:
        """Shut down what is connected now, and no more: what is about to connect goes on."""
        with self._lock:
            self._learn()
            for connection in _connections(self._sockets):
                with suppress(OSError):  # the peer has ended it
                    connection.shutdown(socket.SHUT_RDWR)

    # -- said by who forms groups -------------------------------------------------------------------------------------

    def forming(self, listening: set[Address]) -> None:
        """Connections from or to these addresses belong here, until `formed`. Raises as `check`."""
        with self._lock:
            self._listening |= listening
        self.check()

    def formed(self, listening: set[Address]) -> None:
        """At these addresses there will be no other connections than there are. Raises as `check`."""
        with self._lock:
            self._learn()
            self._standing |= self._sockets
            self._listening -= listening
        self.check()

    def register(self, communicator: Any) -> None:
        """Abort this NCCL backend when they are cut. Raises as `check`, having aborted it."""
        with self._lock:
            self._communicators.append(communicator)
        if self.are_cut:
            self.fence()
        self.check()

    def _learn(self) -> None:
        if not self._listening:
            return
        for descriptor, inode in _sockets():
            with suppress(OSError), closing(_duplicate(descriptor, inode)) as connection:
                if not self._listening.isdisjoint(_ends(connection)):
                    self._sockets.add(inode)


def _abort(communicators: list[Any]) -> None:
    """Together: one that is aborted alone may wait for a kernel of another (pytorch issue 119797)."""
    if not communicators:
        return
    communicators[0]._group_start()
    for communicator in reversed(communicators):
        communicator.abort()
    communicators[0]._group_end()


def _sockets() -> Iterator[tuple[int, int]]:
    """The sockets of this process: descriptor and inode."""
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # closed since
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


def _connections(wanted: set[int]) -> Iterator[socket.socket]:
    """Those sockets of this process, by inode, one after the other; each is closed again after its turn."""
    for descriptor, inode in _sockets():
        if inode in wanted:
            with suppress(OSError), closing(_duplicate(descriptor, inode)) as connection:
                yield connection


def _duplicate(descriptor: int, inode: int) -> socket.socket:
    """The socket behind a descriptor; raises OSError when that has become another's."""
    duplicate = os.dup(descriptor)
    if os.fstat(duplicate).st_ino != inode:
        os.close(duplicate)
        raise OSError("the descriptor was closed and given out again")
    return socket.socket(fileno=duplicate)


def _drain(connection: socket.socket) -> None:
    """Drop what has arrived. The kernel lets one read at a time: one of gloo's that had begun is over after this, and
    the next one finds the end. (Whether gloo closes the socket does not matter; it does not when the buffer it was
    receiving into is gone.)"""
    gulp = bytearray(_GULP_BYTES)
    with suppress(OSError):
        while connection.recv_into(gulp, flags=socket.MSG_DONTWAIT):
            pass


def _ends(connection: socket.socket) -> tuple[Address, ...]:
    """Both ends of a TCP connection; raises OSError, or has none, for anything else, as a socket that listens."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return ()
    return connection.getsockname()[:2], connection.getpeername()[:2]
