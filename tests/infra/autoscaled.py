"""python -m tests.infra.autoscaled FOLDER: how do tests get a cluster that grows when it is asked to, beside others?

`ray.cluster_utils.AutoscalingCluster` with Ray's own fake provider, whose nodes are raylets of this machine. As it
comes it begins and ends with `ray stop --force`, which ends every cluster of the user: here a process of its own keeps
it, as `infra.keeper` keeps ours, and ends what is below it and nothing else. `find_cluster` finds it as one of ours.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from infra.cluster_access import ClusterAccess
from infra.keeper_spec import CLUSTER_FILE, FOLDER_PREFIX, LOOPBACK, TOKEN_FILE, KeeperReport, ray_environment
from infra.processes import adopt_orphans, end_descendants, end_with_parent, start_time
from tests.waiting import wait_until

__all__ = ["HEAD_CPUS", "NODE_CPUS", "AutoscaledCluster"]

HEAD_CPUS = NODE_CPUS = 2
_MOST_NODES = 2
_END_BOUND = timedelta(seconds=15)


class AutoscaledCluster:
    """One node, and a fake provider of two more. In a process of its own, which ends with this one."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
        self.token = self.folder / TOKEN_FILE
        self.token.write_text(secrets.token_hex(32))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "tests.infra.autoscaled", str(self.folder)]
        with (self.folder / "keeper.log").open("w") as log:
            self.keeper = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=kept | paths | ray_environment(self.token)
            )

    def __enter__(self) -> AutoscaledCluster:
        try:
            wait_until(lambda: (self.folder / CLUSTER_FILE).exists() or self.keeper.poll() is not None, 90)
            assert self.keeper.poll() is None, self.log
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return (self.folder / "keeper.log").read_text()

    @property
    def address(self) -> str:
        return KeeperReport.from_json((self.folder / CLUSTER_FILE).read_text()).address

    @property
    def access(self) -> ClusterAccess:
        return ClusterAccess(self.address, self.token)

    def stop(self) -> None:
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        self.keeper.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)


# -- the process that keeps it -----------------------------------------------------------------------------------------


def _config(port: int) -> dict[str, Any]:
    """What `ray up` would read. Ray's wheels come without the example file that AutoscalingCluster and the provider's
    own type begin with: so the provider is one from outside, which happens to lie inside Ray."""
    commands = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "tests",
        "max_workers": _MOST_NODES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,  # nodes share the address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "gcs_address": f"{LOOPBACK}:{port}",
        },
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.1,
        **{f"{name}_commands": [] for name in commands},
        "initialization_commands": [],
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
    }


def _start(folder: Path, port: int) -> None:
    from ray.cluster_utils import AutoscalingCluster

    class OfTheseTests(AutoscalingCluster):
        def _generate_config(
            self, head_resources: dict[str, float], worker_node_types: dict[str, Any], **_: Any
        ) -> dict[str, Any]:
            head = {"resources": dict(head_resources), "node_config": {}, "max_workers": 0}
            return _config(port) | {"available_node_types": worker_node_types | {"ray.head.default": head}}

    worker = {"resources": {"CPU": NODE_CPUS}, "node_config": {}, "min_workers": 0, "max_workers": _MOST_NODES}
    cluster = OfTheseTests({"CPU": HEAD_CPUS}, {"worker": worker}, autoscaler_v2=True)
    _stand_in_for_ray(folder, port)
    tempfile.tempdir = str(folder)
    cluster.start()


def _stand_in_for_ray(folder: Path, port: int) -> None:
    """What AutoscalingCluster calls as `ray`: it stops nothing, and starts where nobody else is."""
    where = f"--port={port} --node-ip-address={LOOPBACK} --temp-dir={folder}"
    quiet = "--include-dashboard=false --disable-usage-stats --dashboard-agent-listen-port=0 --min-worker-port=0"
    script = folder / "bin" / "ray"
    script.parent.mkdir()
    python = f'exec {sys.executable} -m ray.scripts.scripts "$@" {where} {quiet} --max-worker-port=0'
    script.write_text(f'#!/bin/sh\n[ "$1" = start ] || exit 0\n{python}\n')
    script.chmod(0o700)
    os.environ["PATH"] = f"{script.parent}{os.pathsep}{os.environ['PATH']}"


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        return int(listener.getsockname()[1])


def main(folder: Path, parent: int) -> int:
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end_with_parent(parent)
    try:
        port, started = _free_port(), start_time(os.getpid())
        assert started is not None
        _start(folder, port)
        report = KeeperReport(f"{LOOPBACK}:{port}", str(folder), None, os.getpid(), started)
        unseen = folder / "cluster.new"
        unseen.write_text(report.to_json())
        unseen.rename(folder / CLUSTER_FILE)
        select.select([sys.stdin], [], [])
    finally:
        left = end_descendants(_END_BOUND)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), os.getppid()))
