"""What travels on the supervision channel, and how do both ends prove that they hold the run's token?

One JSON object a line. The server speaks first:
    server  {"nonce", "server"}                    server: the name of this server's life
    client  {"hello": {...}, "nonce", "mac"}       mac over both nonces and the hello
    server  {"acked", "mac"}                       or {"expelled": true, "mac"}, mac over both nonces and that
Then the client sends {"seq", "say"} (a message), {"beat": {"step", "phase", "age_s", "heard", "done", "busy_s"}} and
{"bye"}; the server
{"ack": seq, "recorded": step} (after messages, and once a second when there are only beats), {"number", "tell"} (an
order) and {"expelled": true}.
The token itself never travels. The channel proves who speaks; it hides nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from concertina.elastic.waits import BOUNDS

__all__ = [
    "GREETING_LIMIT_BYTES",
    "LINE_LIMIT_BYTES",
    "Hello",
    "Lines",
    "WireError",
    "new_nonce",
    "prove",
    "proves",
    "to_line",
    "tune",
]

GREETING_LIMIT_BYTES = 4096
LINE_LIMIT_BYTES = 16 * 2**20  # facts of a checkpoint's part are the longest lines


class WireError(Exception):
    """The other end does not speak our language, or cannot prove who it is."""


@dataclass(frozen=True)
class Hello:
    """Who a client is. `incarnation` names one client object; `heard` is its last order from `server`."""

    member: int
    pid: int
    incarnation: str
    server: str = ""
    heard: int = 0

    @classmethod
    def from_document(cls, document: Any) -> Hello:
        if not isinstance(document, dict) or set(document) != set(cls.__dataclass_fields__):
            raise WireError("not a hello")
        hello = cls(**document)
        numbers = (hello.member, hello.pid, hello.heard)
        names = (hello.incarnation, hello.server)
        if not all(type(value) is int for value in numbers) or not all(type(name) is str for name in names):
            raise WireError("not a hello")
        return hello

    def to_document(self) -> dict[str, Any]:
        return asdict(self)


class Lines:
    """Cuts a stream into JSON objects; refuses lines beyond `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The objects that `data` completes. Raises WireError."""
        self._rest += data
        *whole, rest = self._rest.split(b"\n")
        self._rest = bytearray(rest)
        if max(map(len, [*whole, rest])) > self.limit_bytes:
            raise WireError(f"a line of more than {self.limit_bytes} bytes")
        return [_object(line) for line in whole]


def _object(line: bytes | bytearray) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError("not a line of JSON") from error
    if not isinstance(document, dict):
        raise WireError("not a JSON object")
    return document


def to_line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def new_nonce() -> str:
    return secrets.token_hex(16)


def prove(token: str, role: str, *facts: Any) -> str:
    """Proof that `role` ("client" or "server") holds the token and means these facts."""
    text = json.dumps([role, *facts], sort_keys=True, separators=(",", ":"))
    return hmac.new(token.encode(), text.encode(), hashlib.sha256).hexdigest()


def proves(proof: Any, token: str, role: str, *facts: Any) -> bool:
    """Whether `proof` is that; in constant time."""
    return isinstance(proof, str) and proof.isascii() and hmac.compare_digest(proof, prove(token, role, *facts))


def tune(connection: socket.socket) -> None:
    """Small lines leave at once; a peer whose machine is gone is noticed by the kernel."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    unanswered_s = int(BOUNDS["channel_unanswered"].seconds)
    options = {"TCP_KEEPIDLE": unanswered_s // 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": unanswered_s // 2}
    for name, value in (options | {"TCP_USER_TIMEOUT": unanswered_s * 1000}).items():
        if hasattr(socket, name):
            with suppress(OSError):  # an emulated kernel may lack one
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
