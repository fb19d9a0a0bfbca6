"""How does the coordinator hear the members? One thread, one selector, one authenticated connection a member.

A reset or an end of stream is evidence of death; silence is suspicion only. No client, however slow or wrong, holds up
another: sockets do not block, and a connection that has not proved itself in time is closed.
"""

from __future__ import annotations

import logging
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from concertina.elastic.channel.gaps import GapsByMember
from concertina.elastic.channel.wire import (
    GREETING_LIMIT_BYTES,
    LINE_LIMIT_BYTES,
    Hello,
    Lines,
    WireError,
    new_nonce,
    prove,
    proves,
    to_line,
    tune,
)
from concertina.elastic.waits import BOUNDS

__all__ = ["ChannelServer", "Silence"]

log = logging.getLogger("concertina.channel")

_MOST_UNPROVEN = 64
_TICK_S = 0.1
_ANSWER_S = 1.0  # messages at once, beats alone so often: each answer wakes a rank's thread once more
_BUSY_ONLY_SHORT = "step"  # in every other phase a member may hold the interpreter for long: imports, builds, writes


@dataclass(frozen=True)
class Silence:
    """A member not heard for `seconds`. When it was, it was in this step and phase, since `progress_age_s`; `busy_s` of
    computing had gone into all its steps up to `done`."""

    seconds: float
    step: int
    phase: str
    progress_age_s: float
    done: int = 0
    busy_s: float = 0.0

    @property
    def suspicious(self) -> bool:
        """Longer than a living member in this phase is ever silent on a busy machine. No proof of anything."""
        name = "silence" if self.phase == _BUSY_ONLY_SHORT else "silence_busy"
        return self.seconds > BOUNDS[name].seconds


class _CallbackRaised(Exception):
    """Not a connection's fault."""


@dataclass
class _Peer:
    """One connection. `hello` is None until it has proved itself."""

    connection: socket.socket
    nonce: str = field(default_factory=new_nonce)
    lines: Lines = field(default_factory=lambda: Lines(GREETING_LIMIT_BYTES))
    out: bytearray = field(default_factory=bytearray)
    hello: Hello | None = None
    since_s: float = field(default_factory=time.monotonic)
    heard_s: float = field(default_factory=time.monotonic)
    beaten_s: float | None = None
    answered_s: float = 0.0
    step: int = 0
    phase: str = ""
    progress_age_s: float = 0.0
    done: int = 0
    busy_s: float = 0.0


class ChannelServer:
    """Listens on one address of this node from the start. Callbacks come from its thread, in each member's order.

    `heard(member, document)` comes once for every message. A message is acknowledged when it returns, or when the event
    that it returns is set, after all before it: what must outlive this process must be on disk by then. What it raises
    ends the server: `broken`. `lost(member, evidence)` comes when an established connection ends without a goodbye,
    evidence "reset", "eof", "timeout" or "garbage"; the member may connect again.
    `gaps` are those between heartbeats on one connection, as this thread came to read them.
    `received` is what an earlier server's `received` said: no message comes twice over a restart.
    """

    def __init__(
        self,
        host: str,
        token: str,
        heard: Callable[[int, dict[str, Any]], threading.Event | None],
        lost: Callable[[int, str], None],
        received: Mapping[str, int] | None = None,
    ) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise ValueError(f"the channel listens on one address of this node, not on {host!r}")
        self._token = token
        self._expelled: set[int] = set()
        self.recorded = 0
        self.gaps = GapsByMember()
        self.broken: BaseException | None = None
        """Why the thread has ended, if not by `close`: nobody is heard any more."""
        self._heard, self._lost = heard, lost
        self._received = dict(received or {})
        self._pending: dict[str, deque[tuple[int, threading.Event | None]]] = {}
        self._round_s = time.monotonic()
        self._name = new_nonce()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = False
        self._unproven: list[_Peer] = []
        self._peers: dict[int, _Peer] = {}
        self._controls: dict[int, deque[tuple[int, dict[str, Any]]]] = {}
        self._numbers = 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="channel-server", daemon=True)
        self._thread.start()

    # -- for any thread ---------------------------------------------------------------------------------------------

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return host, port

    @property
    def received(self) -> dict[str, int]:
        """The last message of every client that is acknowledged (incarnation -> number), for the journal."""
        return dict(self._received)

    def connected(self) -> dict[int, Hello]:
        """Members that are connected now."""
        return {member: peer.hello for member, peer in list(self._peers.items()) if peer.hello is not None}

    def silences(self) -> dict[int, Silence]:
        """For every connected member how long it has been silent, up to when this server last listened to all: while
        its thread is held up, nobody's silence grows."""
        return {
            member: Silence(
                seconds=max(0.0, self._round_s - peer.heard_s),
                step=peer.step,
                phase=peer.phase,
                progress_age_s=peer.progress_age_s,
                done=peer.done,
                busy_s=peer.busy_s,
            )
            for member, peer in list(self._peers.items())
        }

    def send(self, member: int, document: dict[str, Any]) -> None:
        """Queue an order: it arrives once, when the member is connected. A new server knows nothing of it."""
        self._post(lambda: self._control(member, document))

    def expel(self, member: int) -> None:
        """From now on refuse this member. It is told, now or when it connects again, and cut off."""
        self._post(lambda: self._expel(member))

    def close(self) -> None:
        """Say goodbye to nobody: clients look for another server. Safe to call twice."""
        self._post(lambda: setattr(self, "_closing", True))
        self._thread.join()

    def _post(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)
        try:
            self._wake_write.send(b".")
        except OSError:
            log.debug("the channel is closed")

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                began_s = time.monotonic()
                for key, events in self._selector.select(_TICK_S):
                    self._handle(key, events)
                self._round_s = began_s  # what had come by then is heard
                self._drop_late_greetings()
        except BaseException as error:
            self.broken = error.__cause__ if isinstance(error, _CallbackRaised) else error
            log.exception("the channel ends")
        finally:
            for held in [*self._selector.get_map().values()]:
                held.fileobj.close()  # type: ignore[union-attr]
            self._selector.close()
            self._wake_write.close()

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif key.fileobj is self._wake_read:
            self._do_tasks()
        else:
            self._converse(key.data, events)

    def _do_tasks(self) -> None:
        self._wake_read.recv(4096)
        while not self._tasks.empty():
            self._tasks.get()()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it went again, or we are out of descriptors: the next tick tries again
        connection.setblocking(False)
        tune(connection)
        peer = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        self._unproven.append(peer)
        if len(self._unproven) > _MOST_UNPROVEN:
            self._drop(self._unproven[0], "crowded out")
        self._write(peer, {"nonce": peer.nonce, "server": self._name})

    def _converse(self, peer: _Peer, events: int) -> None:
        if peer.connection.fileno() < 0:
            return  # closed earlier in this turn
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(peer)
            if events & selectors.EVENT_READ:
                self._read(peer)
        except (ConnectionResetError, BrokenPipeError):
            self._drop(peer, "reset")
        except WireError as error:
            log.warning("a connection is closed: %s", error)
            self._drop(peer, "garbage")
        except OSError as error:
            log.warning("a connection ends: %s", error)
            self._drop(peer, "timeout")
        except _CallbackRaised:
            raise
        except Exception:
            # Whatever somebody sends, also one who has proved nothing: it ends no other's connection.
            log.exception("a connection is closed")
            self._drop(peer, "garbage")

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(2**18)
        except BlockingIOError:
            return
        if not data:
            self._drop(peer, "eof")
            return
        peer.heard_s = time.monotonic()
        said = False
        for document in peer.lines.feed(data):
            said |= "say" in document
            if peer.connection.fileno() < 0:
                return  # an earlier line ended it
            if peer.hello is None:
                self._greet(peer, document)
            else:
                self._listen(peer, peer.hello, document)
        if peer.hello is None or peer.connection.fileno() < 0:
            return
        if said or self._pending.get(peer.hello.incarnation) or peer.heard_s - peer.answered_s > _ANSWER_S:
            peer.answered_s = peer.heard_s
            self._write(peer, {"ack": self._acknowledged(peer.hello.incarnation), "recorded": self.recorded})

    def _greet(self, peer: _Peer, document: dict[str, Any]) -> None:
        hello = Hello.from_document(document.get("hello"))
        nonce = document.get("nonce")
        if not proves(document.get("mac"), self._token, "client", peer.nonce, nonce, hello.to_document()):
            raise WireError(f"who says it is member {hello.member} does not hold the run's token")
        if hello.member in self._expelled:
            mac = prove(self._token, "server", nonce, peer.nonce, "expelled")
            self._write(peer, {"expelled": True, "mac": mac})
            self._drop(peer, "expelled")
            return
        acked = self._acknowledged(hello.incarnation)
        self._write(peer, {"acked": acked, "mac": prove(self._token, "server", nonce, peer.nonce, acked)})
        peer.hello, peer.lines.limit_bytes = hello, LINE_LIMIT_BYTES
        self._unproven.remove(peer)
        former = self._peers.get(hello.member)
        self._peers[hello.member] = peer
        if former is not None:
            self._close(former)  # half-open, or cut by the member: not lost, it is here
        heard = hello.heard if hello.server == self._name else 0
        for number, control in self._controls.get(hello.member, ()):
            if number > heard:
                self._write(peer, {"number": number, "tell": control})

    def _listen(self, peer: _Peer, hello: Hello, document: dict[str, Any]) -> None:
        match document:
            case {"seq": int(number), "say": dict(said)}:
                self._take(hello, number, said)
            case {
                "beat": {
                    "step": int(step),
                    "phase": str(phase),
                    "age_s": int() | float() as age_s,
                    "heard": int(heard),
                    "done": int(done),
                    "busy_s": int() | float() as busy_s,
                }
            }:
                if peer.beaten_s is not None:
                    self.gaps.add(hello.member, peer.phase == _BUSY_ONLY_SHORT, peer.heard_s - peer.beaten_s)
                peer.beaten_s = peer.heard_s
                peer.step, peer.phase, peer.progress_age_s = step, phase, age_s
                peer.done, peer.busy_s = done, busy_s
                self._forget_controls(hello.member, heard)
            case {"bye": True}:
                self._close(peer)
            case _:
                raise WireError("a line that is none of the channel's")

    def _take(self, hello: Hello, number: int, said: dict[str, Any]) -> None:
        """Have a message heard, unless it has been."""
        pending = self._pending.setdefault(hello.incarnation, deque())
        if number <= (pending[-1][0] if pending else self._received.get(hello.incarnation, 0)):
            return
        try:
            pending.append((number, self._heard(hello.member, said)))
        except Exception as error:
            raise _CallbackRaised from error

    def _acknowledged(self, incarnation: str) -> int:
        """The last of a client's messages up to which all need not be said again."""
        pending = self._pending.get(incarnation)
        while pending and (pending[0][1] is None or pending[0][1].is_set()):
            self._received[incarnation], _ = pending.popleft()
        return self._received.get(incarnation, 0)

    def _forget_controls(self, member: int, heard: int) -> None:
        controls = self._controls.get(member)
        while controls and controls[0][0] <= heard:
            controls.popleft()

    def _control(self, member: int, document: dict[str, Any]) -> None:
        self._numbers += 1
        self._controls.setdefault(member, deque()).append((self._numbers, document))
        if member in self._peers:
            self._write(self._peers[member], {"number": self._numbers, "tell": document})

    def _expel(self, member: int) -> None:
        self._expelled.add(member)
        self._controls.pop(member, None)
        peer = self._peers.get(member)
        if peer is not None:
            self._write(peer, {"expelled": True})
            self._close(peer)

    def _write(self, peer: _Peer, document: dict[str, Any]) -> None:
        peer.out += to_line(document)
        try:
            self._flush(peer)
        except OSError as error:
            log.debug("its reading end will say so as well: %s", error)

    def _flush(self, peer: _Peer) -> None:
        with suppress(BlockingIOError):
            while peer.out:
                del peer.out[: peer.connection.send(peer.out)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.out else 0)
        self._selector.modify(peer.connection, wanted, peer)

    def _drop_late_greetings(self) -> None:
        late = time.monotonic() - BOUNDS["channel_greeting"].seconds
        for peer in [peer for peer in self._unproven if peer.since_s < late]:
            self._drop(peer, "no greeting")

    def _drop(self, peer: _Peer, evidence: str) -> None:
        """Close; the loss of an established connection is told."""
        established = peer.hello is not None and self._peers.get(peer.hello.member) is peer
        self._close(peer)
        if established and peer.hello is not None:
            self._lost(peer.hello.member, evidence)

    def _close(self, peer: _Peer) -> None:
        if peer.connection.fileno() >= 0:
            self._selector.unregister(peer.connection)
            peer.connection.close()
        if peer in self._unproven:
            self._unproven.remove(peer)
        if peer.hello is not None and self._peers.get(peer.hello.member) is peer:
            del self._peers[peer.hello.member]
