"""How do several raylets start on one machine, every socket of theirs on 127.0.0.1?

Ray binds to loopback alone when a node's address is a loopback address, and it keeps a loopback address (instead of
replacing it by the machine's outward one) where "Ray clusters" are off: the default on macOS and Windows, on Linux by
RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0. `ray.cluster_utils.Cluster` fails without that: its GCS listens on 127.0.0.1 and
its clients are sent to the outward address. The whole of Ray's private interface that we use is in this file and in
`cluster_access.py`. Import it only in a process that was started with `ray_environment`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._raylet import GcsClientOptions, GlobalStateAccessor  # type: ignore[attr-defined]
from ray.core.generated import gcs_pb2

from infra.keeper_spec import LOOPBACK, KeeperSpec, StartProblem

__all__ = ["LocalNodes"]

_OBJECT_STORE_BYTES = 100 * 2**20  # our bytes travel over gloo and files; Ray carries small messages only


class _Head(Node):
    """The head without its dashboard: `LocalNodes` starts that later, beside nothing that is waited for."""

    def __init__(self, params: RayParams, on_gcs: Callable[[Node], None]) -> None:
        self._on_gcs = on_gcs
        super().__init__(params, head=True, shutdown_at_exit=False, spawn_reaper=True)

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        self._on_gcs(self)


class LocalNodes:
    """A head and its fellow nodes, started side by side by threads that live as long as this process.

    The threads must not end: each Ray process asks the kernel to be killed when the thread that started it ends
    (PR_SET_PDEATHSIG), which is also why nothing survives a SIGKILL of this process.
    """

    def __init__(self, spec: KeeperSpec, session_name: str) -> None:
        self._spec = spec
        self._session_name = session_name
        self._gcs_up = threading.Event()
        self._head: Node | None = None
        self._accessor: GlobalStateAccessor | None = None
        self._threads = ThreadPoolExecutor(max_workers=spec.num_nodes + 1)
        self._started = spec.num_nodes
        self._joins: list[Future[Any]] = []
        self._starts: list[Future[Any]] = []
        self._fellows_started = False

    @property
    def address(self) -> str:
        assert self._head is not None
        return str(self._head.gcs_address)

    @property
    def session_dir(self) -> Path:
        return Path(self._spec.temp_dir) / self._session_name

    @property
    def dashboard_url(self) -> str | None:
        return self._head.webui_url if self._head is not None else None

    def start(self) -> None:
        """Begin; `ready()` says when all is up."""
        self._starts.append(self._threads.submit(_Head, self._params(0), self._when_gcs_is_up))

    def ready(self) -> bool:
        """Take the next step of the start; True when every node is registered. Raises StartProblem."""
        for start in self._starts:
            if start.done() and (error := start.exception()) is not None:
                raise StartProblem(f"Ray did not start: {error}") from error
        if not self._gcs_up.is_set():
            return False
        alive = self._alive_nodes()
        if alive and not self._fellows_started:
            self._start_fellows()
        if alive < self._spec.num_nodes:
            return False
        return not self._spec.dashboard or self._dashboard_is_up()

    def join(self) -> None:
        """Start one more node beside those there are. Does not wait; `failed_joins` tells of one that failed."""
        self._started += 1
        self._joins.append(self._threads.submit(self._start_fellow, self._started - 1))

    def failed_joins(self) -> list[BaseException]:
        """Why nodes that should have joined did not; each once."""
        done = [join for join in self._joins if join.done()]
        self._joins = [join for join in self._joins if join not in done]
        return [error for join in done if (error := join.exception()) is not None]

    def living_actors(self, namespace_prefix: str) -> list[str]:
        """Names of the actors, dead ones apart, whose namespace begins so."""
        rows = self._gcs().get_actor_table(None, None)
        actors = [gcs_pb2.ActorTableData.FromString(row) for row in rows]
        dead = gcs_pb2.ActorTableData.ActorState.Value("DEAD")
        ours = (a for a in actors if a.state != dead and a.ray_namespace.startswith(namespace_prefix))
        return [a.name or a.class_name for a in ours]

    def gcs_is_alive(self) -> bool:
        if self._head is None:
            return False
        return "gcs_server" in {kind for kind, _ in self._head.live_processes()}

    def let_go(self) -> None:
        """Drop our connection: Ray's client ends the whole process when its server stays away for a minute."""
        self._accessor = None

    def _when_gcs_is_up(self, head: Node) -> None:
        self._head = head
        self._gcs_up.set()

    def _start_fellows(self) -> None:
        for index in range(1, self._spec.num_nodes):
            self._starts.append(self._threads.submit(self._start_fellow, index))
        self._fellows_started = True

    def _start_fellow(self, index: int) -> Node:
        return Node(self._params(index), head=False, shutdown_at_exit=False, spawn_reaper=True)

    def _dashboard_is_up(self) -> bool:
        assert self._head is not None
        if self._head.webui_url:
            return True
        if len(self._starts) == self._spec.num_nodes:
            self._starts.append(self._threads.submit(self._start_dashboard))
        return False

    def _start_dashboard(self) -> None:
        Node.start_api_server(self._head, include_dashboard=True, raise_on_failure=True)

    def _alive_nodes(self) -> int:
        return sum(bool(row["Alive"]) for row in self._gcs().get_node_table())

    def _gcs(self) -> GlobalStateAccessor:
        if self._accessor is None:
            options = GcsClientOptions.create(
                self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
            )
            accessor = GlobalStateAccessor(options)
            if not accessor.connect():
                raise StartProblem(f"no answer from Ray's control store at {self.address}")
            self._accessor = accessor
        return self._accessor

    def _params(self, index: int) -> RayParams:
        spec = self._spec
        params = RayParams(
            node_ip_address=LOOPBACK,
            num_cpus=spec.cpus_per_node,
            num_gpus=len(spec.gpus_of(index)),
            resources=dict(spec.resources_of(index)),
            object_store_memory=_OBJECT_STORE_BYTES,
            temp_dir=spec.temp_dir,
            dashboard_agent_listen_port=0,  # 0: a free one; the fixed default port would meet other clusters
            min_worker_port=0,
            max_worker_port=0,
            include_log_monitor=False,  # ranks write their own files; nothing is streamed to the driver
            env_vars=spec.environment_of(index),
        )
        if index == 0:
            params.update(
                session_name=self._session_name,
                include_dashboard=spec.dashboard,
                dashboard_port=None,
                no_monitor=True,  # the autoscaler
                _system_config={"enable_metrics_collection": spec.dashboard},
            )
        else:
            params.update(gcs_address=self.address, redis_address=self.address)
            sockets = self.session_dir / "sockets"  # Ray looks for free names: two that start at once find the same
            params.update(
                plasma_store_socket_name=str(sockets / f"plasma_store.n{index}"),
                raylet_socket_name=str(sockets / f"raylet.n{index}"),
            )
        return params
