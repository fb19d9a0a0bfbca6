"""python -m benchmarks.recovery.ray_train --events 3: how long does Ray Train stand still when a worker is killed, when
a machine goes, and when one comes?

Ray Train v2, elastic between two and four workers, on a cluster of our own: a head without CPUs and four nodes of one.
A round is three events: a worker is killed, a node goes with all on it, a node comes.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.recovery import faults
from benchmarks.recovery.notices import LEAD_S, NOTICE
from benchmarks.recovery.ray_job import CHECKPOINT_STEPS, JobSpec
from benchmarks.recovery.watch import Watch, document_of, own_all
from concertina.errors import UserError
from infra.draining import drain_node
from infra.keeper_spec import LOOPBACK, TOKEN_FILE, ray_environment
from infra.processes import end_descendants

__all__ = ["MOST", "PROFILES", "ROOT", "Nodes", "Settings", "main", "measure", "set_environment"]

FEWEST, MOST = 2, 4
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """Ray's dials: the trainer's, and environment variables of the cluster's processes and of Ray Train's."""

    resize_monitor_interval_s: float = 60.0
    environment: dict[str, str] = field(default_factory=dict)


PROFILES = {
    "default": Settings(),
    # The control store believes in a silent node for 3 s instead of 15 or more; Ray Train looks at its workers every
    # half second, for new nodes every 5 s, and waits 10 s instead of 60 for a node that it still counts on. What can't
    # be turned is how often it counts the nodes: every 20 s.
    "tuned": Settings(
        resize_monitor_interval_s=5.0,
        environment={
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
        },
    ),
}


class Nodes:
    """The cluster, and which worker process lives on which of its nodes. Made and used by one thread only: what Ray
    starts ends with the thread that started it."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        self._nodes: list[Any] = []
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder / "ray")}
        self._cluster = Cluster(initialize_head=True, head_node_args=head | self._everywhere())
        for _ in range(MOST):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _everywhere(self) -> dict[str, Any]:
        return {"node_ip_address": LOOPBACK}

    def add(self) -> faults.Fault:
        fault, node = faults.add_node(lambda: self._cluster.add_node(num_cpus=1, **self._everywhere()))
        own_all()  # each node of Ray's brings a handler that would drain it for half a minute at a SIGTERM
        self._nodes.append(node)
        return fault

    def kill(self, index: int) -> faults.Fault:
        return faults.kill_node(self._cluster, self._nodes.pop(index))

    def kill_id(self, node_id: str) -> faults.Fault:
        """By the id that Ray knows it by; a frozen one as well."""
        return self.kill(self._index(node_id))

    def freeze_id(self, node_id: str) -> faults.Fault:
        """It stays one of the nodes until it is killed."""
        return faults.freeze_node(self._nodes[self._index(node_id)])

    @property
    def ids(self) -> list[str]:
        return [str(node.node_id) for node in self._nodes]

    def _index(self, node_id: str) -> int:
        return next(index for index, node in enumerate(self._nodes) if node.node_id == node_id)

    def shutdown(self) -> None:
        self._cluster.shutdown()


class Driver:
    """The process that calls fit()."""

    def __init__(self, spec: JobSpec) -> None:
        self._log = Path(spec.folder) / "driver.log"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "benchmarks.recovery.ray_job", spec.to_json()]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def check(self) -> None:
        """Raises UserError when it has ended."""
        if self._process.poll() is not None:
            tail = self._log.read_text(errors="replace")[-4000:]
            raise UserError(f"Ray Train's driver ended with {self._process.returncode}:\n{tail}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(10)


def measure(
    rounds: int, settings: Settings, bound_s: float, keep: Path | None, faulty: bool = True, noticed: bool = True
) -> list[dict[str, Any]]:
    """Three samples a round, and one of a notice."""
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="recovery-ray-") as name:
        folder = keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        set_environment(Path(name), settings)
        try:
            nodes = Nodes(Path(name))
            spec = JobSpec(nodes.address, str(folder), FEWEST, MOST, settings.resize_monitor_interval_s)
            driver = Driver(spec)
            watch = Watch(folder, bound_s, driver.check)
            watch.settle(MOST)
            for number in range(rounds):
                samples += _round(watch, nodes, number) if faulty else []
                samples += [_notice(watch, nodes, number)] if noticed else []
            driver.stop()
            nodes.shutdown()
        finally:
            end_descendants(timedelta(seconds=10))
    return samples


def _round(watch: Watch, nodes: Nodes, number: int) -> list[dict[str, Any]]:
    watch.pause()
    victims = sorted({line.pid for line in watch.lines()[-MOST:]})
    killed = watch.outage(faults.kill_process(victims[number % len(victims)]))
    watch.settle(MOST)
    watch.pause()
    gone = watch.outage(nodes.kill(number % MOST))
    watch.settle(MOST - 1)
    joined = watch.outage(nodes.add())
    watch.settle(MOST)
    return [killed, gone, joined]


def _notice(watch: Watch, nodes: Nodes, number: int) -> dict[str, Any]:
    """Ray's own drain, as ours gets it; the node goes at its deadline, whoever is on it."""
    watch.pause()
    node = nodes.ids[number % MOST]
    at_s = time.monotonic()
    drain_node(node, LEAD_S, "benchmark", nodes.address)
    time.sleep(max(0.0, at_s + LEAD_S - time.monotonic()))
    sample = watch.outage(faults.Fault(NOTICE, at_s, nodes.kill_id(node).pids))
    nodes.add()
    watch.settle(MOST)
    return sample


def set_environment(folder: Path, settings: Settings) -> None:
    """Before ray is imported, here and in all that is started from here: a cluster of our own, closed to others."""
    token = folder / TOKEN_FILE
    token.write_text(secrets.token_hex(32))  # the folder is ours alone (mkdtemp: 0700)
    paths = [str(ROOT / "platform"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"RAY_TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    os.environ.update(ray_environment(token) | own | settings.environment)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.ray_train", description=__doc__)
    parser.add_argument("--events", type=int, default=3, help="of each kind (default 3)")
    parser.add_argument("--profile", choices=list(PROFILES), default="tuned", help="Ray's dials (default tuned)")
    parser.add_argument("--bound", type=float, default=180.0, help="seconds an event may take at most (default 180)")
    parser.add_argument("--only", choices=["faults", "notices"], help="one half of the kinds")
    parser.add_argument("--keep", type=Path, help="folder for step logs, checkpoints and the driver's log")
    options = parser.parse_args(arguments)
    own_all()
    settings = PROFILES[options.profile]
    try:
        halves = options.only != "notices", options.only != "faults"
        samples = measure(options.events, settings, options.bound, options.keep, *halves)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    trainer = {"ray": version("ray"), "profile": options.profile, "checkpoint_steps": CHECKPOINT_STEPS}
    print(json.dumps(document_of("Ray Train", trainer | asdict(settings), samples), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
