"""python -m tests.infra.driver_program NAMESPACE FILE: a driver for tests to kill.

It starts a local cluster and a detached actor in NAMESPACE that lives until FILE exists, prints what is where as one
JSON line, and waits for ever.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray

from infra import LocalCluster


class Lingerer:
    """Stands for our coordinator: it needs some more time after the driver has gone, then ends by itself."""

    def __init__(self, until: str) -> None:
        self._until = Path(until)
        threading.Thread(target=self._end_when_told, daemon=True).start()

    def pid(self) -> int:
        return os.getpid()

    def _end_when_told(self) -> None:
        while not self._until.exists():
            time.sleep(0.05)
        os._exit(0)


def main(namespace: str, until: str) -> None:
    cluster = LocalCluster.start(num_nodes=1, cpus_per_node=1)
    cluster.access.connect(namespace)
    actor = ray.remote(Lingerer).options(name="lingerer", lifetime="detached", num_cpus=0).remote(until)
    facts = {
        "keeper_pid": cluster.keeper_pid,
        "folder": str(cluster.session_dir.parent),
        "actor_pid": ray.get(actor.pid.remote()),
    }
    print(json.dumps(facts), flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
