"""What does a driver tell the keeper of its cluster, and what does the keeper answer?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = [
    "CLUSTER_FILE",
    "FOLDER_PREFIX",
    "JOIN_FILE",
    "LOOPBACK",
    "TOKEN_FILE",
    "KeeperReport",
    "KeeperSpec",
    "StartProblem",
    "ray_environment",
]

LOOPBACK = "127.0.0.1"
FOLDER_PREFIX = "concertina-ray-"
TOKEN_FILE = "auth_token"
CLUSTER_FILE = "cluster.json"
JOIN_FILE = "join"
"""Who puts it beside the cluster file wants one more node; the keeper removes it and starts one."""


class StartProblem(Exception):
    """The cluster did not come up; the text says why."""


def ray_environment(token_path: Path) -> dict[str, str]:
    """Variables that every process of a loopback cluster needs before it imports ray, the driver included."""
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keep 127.0.0.1, see ray_nodes.py
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),  # never ~/.ray/auth_token, which is the user's
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",  # 15 as Ray has it: ranks would yield to whatever else the machine does
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else ray.init prints a warning about its future default
    }


@dataclass(frozen=True)
class KeeperSpec:
    """One cluster to start. `gpus` are device numbers, spread evenly; `resources` has one mapping per node."""

    temp_dir: str
    num_nodes: int
    cpus_per_node: int
    gpus: tuple[int, ...]
    resources: tuple[Mapping[str, float], ...]
    dashboard: bool
    driver_pid: int
    driver_started_s: float
    startup_timeout_s: float
    actors_timeout_s: float
    """How long actors of ours may finish once the driver is gone."""

    def gpus_of(self, index: int) -> tuple[int, ...]:
        """A node that joined later has none: all are dealt out."""
        if index >= self.num_nodes:
            return ()
        first, last = (i * len(self.gpus) // self.num_nodes for i in (index, index + 1))
        return self.gpus[first:last]

    def resources_of(self, index: int) -> Mapping[str, float]:
        return self.resources[index] if index < self.num_nodes else {}

    def environment_of(self, index: int) -> dict[str, str]:
        """Two nodes of one machine must not both own device 0."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus_of(index)))} if self.gpus else {}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> KeeperSpec:
        fields = json.loads(text)
        fields["gpus"] = tuple(fields["gpus"])
        fields["resources"] = tuple(fields["resources"])
        return cls(**fields)


@dataclass(frozen=True)
class KeeperReport:
    """The keeper's one line to its driver: `problem` is empty when the cluster is up."""

    address: str = ""
    session_dir: str = ""
    dashboard_url: str | None = None
    keeper_pid: int = 0
    keeper_started_s: float = 0.0
    problem: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> KeeperReport:
        return cls(**json.loads(text))
