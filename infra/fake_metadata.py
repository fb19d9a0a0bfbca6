"""A cloud's metadata service that says what it is told, on loopback: for tests, and for `concertina chaos notice`."""

from __future__ import annotations

import json
import secrets
import threading
import time
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["FakeMetadata"]

_NAME = "this-machine"


class FakeMetadata:
    """`notice` and `hint` make it say so, `take_back` makes it say nothing again. Any thread may call."""

    def __init__(self) -> None:
        self._tokens: set[str] = set()
        self._ends_s: float | None = None
        self._hint = False
        self.broken = False
        """Whether it answers 500 to everything."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="metadata", daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def notice(self, lead_s: float) -> None:
        """This machine goes in so many seconds."""
        self._ends_s = time.time() + lead_s

    @property
    def is_given(self) -> bool:
        """Whether there is a notice."""
        return self._ends_s is not None

    @property
    def left_s(self) -> float:
        """Until this machine goes."""
        ends_s = self._ends_s
        return float("inf") if ends_s is None else ends_s - time.time()

    def hint(self) -> None:
        """It may go soon."""
        self._hint = True

    def take_back(self) -> None:
        """It stays."""
        self._ends_s, self._hint = None, False

    def forget_tokens(self) -> None:
        """As after a restart."""
        self._tokens.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- what each cloud answers --------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, headers: Any) -> tuple[int, str]:
        """Status and body, as the real one has them."""
        if self.broken:
            return 500, ""
        if path == "/latest/api/token":
            if method != "PUT" or not headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
                return 400, ""
            self._tokens.add(token := secrets.token_hex(8))
            return 200, token
        if path.startswith("/latest/meta-data/"):
            if headers.get("X-aws-ec2-metadata-token") not in self._tokens:
                return 401, ""
            return self._aws(path.removeprefix("/latest/meta-data/"))
        if path == "/computeMetadata/v1/instance/preempted":
            ok = headers.get("Metadata-Flavor") == "Google"
            return (200, "FALSE" if self._ends_s is None else "TRUE") if ok else (403, "")
        if path.startswith("/metadata/"):
            return self._azure(path) if headers.get("Metadata") == "true" else (400, "")
        return 404, ""

    def _aws(self, name: str) -> tuple[int, str]:
        if name == "spot/instance-action" and self._ends_s is not None:
            at = datetime.fromtimestamp(self._ends_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return 200, json.dumps({"action": "terminate", "time": at})
        if name == "events/recommendations/rebalance" and self._hint:
            return 200, json.dumps({"noticeTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")})
        return 404, ""

    def _azure(self, path: str) -> tuple[int, str]:
        if path.startswith("/metadata/instance/compute/name"):
            return 200, _NAME
        events: list[dict[str, Any]] = [{"EventType": "Freeze", "Resources": [_NAME], "NotBefore": ""}]
        events.append({"EventType": "Preempt", "Resources": ["another-machine"], "NotBefore": ""})
        if self._ends_s is not None:
            at = format_datetime(datetime.fromtimestamp(self._ends_s, UTC), usegmt=True)
            events.append({"EventType": "Preempt", "Resources": [_NAME], "EventStatus": "Scheduled", "NotBefore": at})
        return 200, json.dumps({"DocumentIncarnation": 1, "Events": events})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def _respond(self) -> None:
                status, body = fake.answer(self.command, self.path, self.headers)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = _respond

            def log_message(self, *_: Any) -> None:
                """Nothing to standard error."""

        return Handler
