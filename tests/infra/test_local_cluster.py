"""Is a local cluster usable, loopback only, guarded by its token, and gone without a trace?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from concertina.errors import ConcertinaError, UserError
from infra import LocalCluster, find_cluster
from tests.infra.sockets import beyond_loopback, listening, tree
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

USERS_FILES = [Path.home() / ".ray" / "auth_token", Path("/tmp/ray/ray_current_cluster")]


def _states() -> list[float | None]:
    return [path.stat().st_mtime if path.exists() else None for path in USERS_FILES]


def _shared_memory(process: psutil.Process) -> set[str]:
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {word for word in maps.split() if word.startswith("/dev/shm/")}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster.start(num_nodes=2, cpus_per_node=1, resources=[{"a": 1}, {"b": 2}], dashboard=True) as started:
        started.access.connect("concertina-test")
        yield started
        ray.shutdown()


class Place:
    def where(self) -> tuple[int, str]:
        return os.getpid(), ray.util.get_node_ip_address()


def test_nodes_have_their_resources_and_run_actors(cluster: LocalCluster) -> None:
    assert [ray.cluster_resources()[name] for name in ("CPU", "a", "b")] == [2, 1, 2]
    actors = [ray.remote(Place).options(num_cpus=0, resources={name: 1}).remote() for name in ("a", "b")]
    places = ray.get([actor.where.remote() for actor in actors])
    assert {ip for _, ip in places} == {"127.0.0.1"}
    assert {pid for pid, _ in places} <= {process.pid for process in tree(cluster.keeper_pid)}


def test_every_socket_is_on_loopback(cluster: LocalCluster) -> None:
    actor = ray.remote(Place).options(num_cpus=0).remote()
    ray.get(actor.where.remote())  # a worker of ours listens as well
    found = listening([psutil.Process(), *tree(cluster.keeper_pid)])
    assert len(found) >= 10
    assert any(who.startswith("raylet") for who in found.values())
    assert cluster.dashboard_url is not None
    assert cluster.dashboard_url.replace(":", "|") in found
    assert beyond_loopback(found) == {}


def test_ray_prints_nothing_into_our_output(cluster: LocalCluster, capfd: pytest.CaptureFixture[str]) -> None:
    actor = ray.remote(Place).options(num_cpus=0).remote()
    pid, _ = ray.get(actor.where.remote())
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.where.remote())
    ray.get(ray.remote(Place).options(num_cpus=0).remote().where.remote())  # time enough for Ray's word about it
    assert capfd.readouterr() == ("", "")


def test_the_token_is_wanted(cluster: LocalCluster) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    asked = "import ray._private.ray_constants as c; c.ENABLE_RAY_CLUSTER = False; import ray; ray.init(address={!r})"
    run = subprocess.run(
        [sys.executable, "-c", asked.format(cluster.address)],
        env=clean | {"RAY_AUTH_MODE": "disabled", "RAY_NUM_REDIS_GET_RETRIES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "Unauthenticated" in run.stderr or "token" in run.stderr


def test_another_process_finds_it_with_its_token(cluster: LocalCluster) -> None:
    found = find_cluster(cluster.address)
    assert found == cluster.access


def test_stop_leaves_nothing() -> None:
    before = _states()
    cluster = LocalCluster.start(num_nodes=2, cpus_per_node=1)
    folder, processes = cluster.session_dir.parent, tree(cluster.keeper_pid)
    assert len(processes) >= 8
    shared = {path for process in processes for path in _shared_memory(process)}
    assert shared  # the object stores; their files are unlinked while they are mapped
    cluster.stop()
    cluster.stop()
    assert [path for path in shared if os.path.exists(path)] == []
    assert [process for process in processes if process.is_running()] == []
    assert not folder.exists()
    assert _states() == before


def test_a_signal_ends_it(tmp_path: Path) -> None:
    cluster = LocalCluster.start(num_nodes=1, cpus_per_node=1)
    processes = tree(cluster.keeper_pid)
    os.kill(cluster.keeper_pid, signal.SIGTERM)
    wait_until(lambda: not any(process.is_running() for process in processes[1:]))
    cluster.stop()
    assert not cluster.session_dir.parent.exists()


def test_an_error_in_the_driver_leaves_the_end_to_the_keeper() -> None:
    def fail(cluster: LocalCluster) -> None:
        with cluster:
            raise RuntimeError("a bug in the driver")

    cluster = LocalCluster.start(num_nodes=1, cpus_per_node=1)
    processes = tree(cluster.keeper_pid)
    with pytest.raises(RuntimeError, match="a bug"):
        fail(cluster)
    wait_until(lambda: not any(process.is_running() for process in processes[1:]))
    cluster.stop()
    assert not cluster.session_dir.parent.exists()


def test_a_long_temporary_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave room for 45: set TMPDIR"):
        LocalCluster.start(temp_root=tmp_path / ("x" * 60))


def test_a_failed_start_says_why_and_leaves_nothing() -> None:
    root = Path("/tmp") / f"c{os.getpid()}"
    with pytest.raises(ConcertinaError, match="did not start: ") as failed:
        LocalCluster.start(num_nodes=1, temp_root=root, resources=[{"bad": -1.0}])
    assert "doctor" in failed.value.message
    assert os.listdir(root) == []
    root.rmdir()
