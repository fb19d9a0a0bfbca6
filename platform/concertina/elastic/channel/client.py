"""How does a member tell the coordinator everything exactly once, although either may be away for a while?

One supervisor thread owns the connection: it beats four times a second, sends what is queued, keeps it until it is
acknowledged, and looks for the coordinator again when the connection breaks. The training thread only queues.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from concertina.elastic.channel.outbox import Outbox
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

__all__ = ["BEAT_S", "ChannelClient"]

log = logging.getLogger("concertina.channel")

BEAT_S = 0.25
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_MESSAGES_AT_ONCE = 64


@dataclass
class _Connection:
    """One connection: what came and is unread, what is to go, the last message that was sent on it."""

    socket: socket.socket
    lines: Lines = field(default_factory=lambda: Lines(GREETING_LIMIT_BYTES))
    inbox: deque[dict[str, Any]] = field(default_factory=deque)
    out: bytearray = field(default_factory=bytearray)
    sent: int = 0

    def receive(self) -> None:
        """Move what has come to the inbox. Raises WireError at the end of the stream."""
        data = self.socket.recv(2**18)
        if not data:
            raise WireError("it hung up")
        self.inbox.extend(self.lines.feed(data))

    def next_line(self, deadline_s: float) -> dict[str, Any]:
        while not self.inbox:
            self.socket.settimeout(max(0.01, deadline_s - time.monotonic()))
            self.receive()
        return self.inbox.popleft()


def _ready(wanted: dict[socket.socket, int], bound_s: float) -> dict[Any, int]:
    """Which of these can be read or written within the bound. Unlike `select` it knows descriptors of any number."""
    with selectors.PollSelector() as selector:
        for each, events in wanted.items():
            selector.register(each, events)
        return {key.fileobj: events for key, events in selector.select(bound_s)}


class ChannelClient:
    """A member's end. `start` begins; `hear(document)` gets orders in the supervisor thread, each once."""

    def __init__(self, address: tuple[str, int], token: str, member: int, beat_s: float = BEAT_S) -> None:
        self._address, self._token, self._beat_s = address, token, beat_s
        self._who = (member, os.getpid(), new_nonce())
        self._hear: Callable[[dict[str, Any]], None] = lambda document: None
        self._outbox = Outbox(member)
        self._progress = (0, "", time.monotonic())
        self._pace = (0, 0.0)
        self._heard_s = time.monotonic()
        self._server, self._last_control = "", 0
        self._closing = self._moved = self._connected = False
        self._expelled = False
        self._recorded = 0
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self, hear: Callable[[dict[str, Any]], None]) -> None:
        self._hear = hear
        self._heard_s = time.monotonic()
        self._thread.start()

    @property
    def silent_s(self) -> float:
        """Seconds since a coordinator that holds the token was last heard, or since `start`."""
        return time.monotonic() - self._heard_s

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_expelled(self) -> bool:
        """Whether the run goes on without this member, for good."""
        return self._expelled

    @property
    def recorded(self) -> int:
        """The newest committed step that the coordinator has written down, as far as it has said so."""
        return self._recorded

    def send(self, document: dict[str, Any], at_once: bool = True) -> None:
        """Queue a message; does not wait. Raises RankFailure when far too many are unacknowledged. Not `at_once`: it
        goes with the next heartbeat, and wakes no thread."""
        self._outbox.put(document)
        if at_once:
            self._wake()

    def progress(self, step: int, phase: str) -> None:
        """What the training thread does from now on; rides on the heartbeats."""
        self._progress = (step, phase, time.monotonic())

    def paced(self, step: int, busy_s: float) -> None:
        """So many seconds of computing had gone into all steps when this one was done; rides on the heartbeats."""
        self._pace = (step, busy_s)

    def move_to(self, address: tuple[str, int]) -> None:
        """The coordinator listens here now."""
        self._address, self._moved = address, True
        self._wake()

    def flush(self, bound: timedelta) -> bool:
        """Wait until everything is acknowledged; False at the bound."""
        return self._outbox.wait_empty(bound)

    def unacknowledged(self) -> list[dict[str, Any]]:
        """What no coordinator is known to have, in order."""
        return self._outbox.all()

    def close(self) -> None:
        """Leave with a goodbye: nobody calls this member lost. `flush` first, what is queued is not waited for."""
        self._closing = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(BOUNDS["channel_greeting"].seconds)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # full: it is about to wake
            self._wake_write.send(b".")

    # -- the supervisor thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not (self._closing or self._expelled):
            self._moved = False
            try:
                with socket.create_connection(self._address, BOUNDS["channel_connect"].seconds) as bare:
                    tune(bare)
                    connection = _Connection(bare)
                    self._greet(connection)
                    pause_s = _FIRST_PAUSE_S
                    self._talk(connection)
            except (OSError, WireError) as error:
                log.debug("no coordinator at %s: %s", self._address, error)
            self._connected = False
            if not (self._closing or self._moved):
                self._pause(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _pause(self, bound_s: float) -> None:
        """Until the bound, a new address or the end; a queued message is no reason to hurry."""
        deadline = time.monotonic() + bound_s
        while not (self._closing or self._moved) and (left := deadline - time.monotonic()) > 0:
            _ready({self._wake_read: selectors.EVENT_READ}, left)
            self._drain_wakes()

    def _drain_wakes(self) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _greet(self, connection: _Connection) -> None:
        """Prove who we are and have the server prove itself. Raises WireError."""
        deadline = time.monotonic() + BOUNDS["channel_greeting"].seconds
        first = connection.next_line(deadline)
        server, theirs, ours = str(first.get("server")), first.get("nonce"), new_nonce()
        hello = Hello(*self._who, server=self._server, heard=self._last_control).to_document()
        mac = prove(self._token, "client", theirs, ours, hello)
        connection.socket.sendall(to_line({"hello": hello, "nonce": ours, "mac": mac}))
        answer = connection.next_line(deadline)
        expelled, acked = answer.get("expelled") is True, answer.get("acked")
        claim = "expelled" if expelled else acked
        if not proves(answer.get("mac"), self._token, "server", ours, theirs, claim):
            raise WireError("who listens there does not hold the run's token")
        if expelled:
            self._expelled = True
            raise WireError("the run goes on without this member")
        if server != self._server:
            self._server, self._last_control = server, 0  # a new life of it counts its words anew
        if type(acked) is not int:
            raise WireError("it does not say what it has")
        self._handle({"ack": acked})
        connection.sent, connection.lines.limit_bytes = acked, LINE_LIMIT_BYTES
        connection.socket.setblocking(False)
        self._connected = True

    def _talk(self, connection: _Connection) -> None:
        beat_s = time.monotonic()
        while not (self._closing or self._moved or self._expelled):
            while connection.inbox:
                self._handle(connection.inbox.popleft())
            for number, document in self._outbox.after(connection.sent, 0 if connection.out else _MESSAGES_AT_ONCE):
                connection.out += to_line({"seq": number, "say": document})
                connection.sent = number
            if time.monotonic() >= beat_s:
                connection.out += self._beat()
                beat_s = time.monotonic() + self._beat_s
            self._exchange(connection, beat_s)
        if self._closing:
            connection.socket.settimeout(BOUNDS["channel_connect"].seconds)
            connection.socket.sendall(bytes(connection.out) + to_line({"bye": True}))

    def _exchange(self, connection: _Connection, until_s: float) -> None:
        """Send and receive what can be, at most until `until_s`."""
        bare = connection.socket
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.out else 0)
        found = _ready({bare: wanted, self._wake_read: selectors.EVENT_READ}, max(0.0, until_s - time.monotonic()))
        if self._wake_read in found:
            self._drain_wakes()
        if found.get(bare, 0) & selectors.EVENT_WRITE:
            del connection.out[: bare.send(connection.out)]
        if found.get(bare, 0) & selectors.EVENT_READ:
            connection.receive()

    def _beat(self) -> bytes:
        (step, phase, since_s), (done, busy_s) = self._progress, self._pace
        age_s = round(time.monotonic() - since_s, 3)
        beat = {"step": step, "phase": phase, "age_s": age_s, "heard": self._last_control}
        return to_line({"beat": {**beat, "done": done, "busy_s": round(busy_s, 6)}})

    def _handle(self, document: dict[str, Any]) -> None:
        self._heard_s = time.monotonic()
        if "ack" in document:
            self._outbox.acknowledge(document["ack"])
            self._recorded = document.get("recorded", self._recorded)
        elif "tell" in document and document["number"] > self._last_control:
            self._last_control = document["number"]
            self._hear(document["tell"])
        elif "expelled" in document:
            self._expelled = True
