"""What does a node's agent do? It ends this run's processes on its node: hung ranks on request, all of them when the
coordinator has been gone for good.

It holds a lease: the coordinator renews it, and when it runs out nothing of the run stays on the node.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import ray
from concertina.elastic.waits import BOUNDS

__all__ = ["NodeAgent"]


class NodeAgent:
    """The actor of one node in one run."""

    def __init__(self) -> None:
        self._pids: list[int] = []
        self._renewed = time.monotonic()
        threading.Thread(target=self._watch_lease, name="lease", daemon=True).start()

    def describe(self) -> dict[str, object]:
        """Where this agent is."""
        return {"pid": os.getpid(), "address": ray.util.get_node_ip_address()}

    def renew(self, pids: list[int]) -> None:
        """The coordinator lives; these are the processes of its ranks on this node."""
        self._pids = list(pids)
        self._renewed = time.monotonic()

    def end(self, pids: list[int]) -> None:
        """Kill processes of ranks. A process that is gone already is what was wanted."""
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _watch_lease(self) -> None:
        bound_s = BOUNDS["agent_lease"].seconds
        while time.monotonic() - self._renewed < bound_s:
            time.sleep(1.0)
        self.end(self._pids)
        os._exit(0)
