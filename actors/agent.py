"""What does a node's agent do? It looks at this run's processes on its node and ends them: hung ranks on request, all
of them when the coordinator has been gone for good.

It holds a lease: the coordinator renews it, and when it runs out nothing of the run stays on the node.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

import psutil
import ray
from ray.util.placement_group import get_placement_group, remove_placement_group

from concertina.elastic.waits import BOUNDS

__all__ = ["NodeAgent"]

_LOOK_S = 1.0


class NodeAgent:
    """The actor of one node in one run. `reservation` is the name of the run's placement group on this node."""

    def __init__(self, reservation: str) -> None:
        self._reservation = reservation
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

    def stopped(self, pid: int) -> bool:
        """Whether a process stands still (SIGSTOP, a debugger): proof, where its silence is only suspicion."""
        return _state(pid) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)

    def end(self, pids: list[int]) -> None:
        """Kill processes of ranks. A process that is gone already is what was wanted."""
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _watch_lease(self) -> None:
        while not self._run_out():
            time.sleep(_LOOK_S)
        self.end(self._pids)
        with suppress(ValueError):  # given back already
            remove_placement_group(get_placement_group(self._reservation))
        os._exit(0)

    def _run_out(self) -> bool:
        """Ranks without a coordinator leave by themselves; the lease is for those that do not."""
        silent_s = time.monotonic() - self._renewed
        if silent_s > BOUNDS["agent_lease"].seconds:
            return True
        ranks_left = self._pids and not any(_state(pid) for pid in self._pids)
        return bool(ranks_left) and silent_s > BOUNDS["coordinator_silence"].seconds


def _state(pid: int) -> str:
    """The kernel's word about a process; empty when it is gone."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return ""
    return "" if status == psutil.STATUS_ZOMBIE else str(status)
