"""A real MLflow server on loopback, and a proxy before it that can be down, slow, wrong or forgetful."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STARTUP_S = 90


class Server:
    """`mlflow server` in a process group of its own, ended by its id."""

    def __init__(self, database: Path, folder: Path) -> None:
        self.port = free_port()
        self.database = database
        self._log = (folder / "server.log").open("wb")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def wait(self) -> None:
        """Until it answers; raises with its log when it does not."""
        deadline = time.monotonic() + STARTUP_S
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                time.sleep(0.1)
            finally:
                connection.close()
        raise RuntimeError(f"mlflow server did not start:\n{Path(self._log.name).read_text()[-3000:]}")

    def stop(self) -> None:
        """Its workers are in its group, and nobody else is."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


class Proxy:
    """Passes requests on, unless `mood` says otherwise.

    pass: as they are. refuse: close the connection. error: answer 500. hang: never answer, until the mood changes.
    forget: pass the request on, then close without the answer, so that the client cannot know it was heard.
    """

    def __init__(self, upstream_port: int) -> None:
        self.mood = "pass"
        self.forget_every = 0
        self.seen = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def relay(self) -> None:
                proxy.relay(self, upstream_port)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = relay

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that gave up waiting is what we are here for."""

        self._server = Listener(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def relay(self, handler: BaseHTTPRequestHandler, upstream_port: int) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.seen += 1
        forgets = self.forget_every and self.seen % self.forget_every == 0
        while self.mood == "hang":
            time.sleep(0.02)
        if self.mood == "refuse":
            handler.close_connection = True
            return
        if self.mood == "error":
            status, kind, answer = 500, "text/html", b"<html>no</html>"
        else:
            status, kind, answer = _ask(upstream_port, handler, body)
        if forgets:
            handler.close_connection = True
            return
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)

    def stop(self) -> None:
        self.mood = "refuse"
        self._server.shutdown()
        self._server.server_close()


def _ask(port: int, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers = {key: value for key, value in handler.headers.items() if key.lower() not in ("host", "connection")}
        connection.request(handler.command, handler.path, body, {**headers, "Host": f"127.0.0.1:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", "application/json"), answer.read()
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
