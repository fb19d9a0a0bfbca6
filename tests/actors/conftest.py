"""One local cluster, one storage folder and one small job for all runs of these tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra import LocalCluster
from tests.actors.drive import SHORT, Drive, alive, write_job
from tests.track.conftest import IN_MEMORY
from tests.waiting import wait_until

Start = Callable[..., Drive]


@pytest.fixture(scope="package")
def ground() -> Iterator[Path]:
    """A quick folder with a job file and a storage folder whose MLflow database is there already."""
    from concertina.track.mlflow_place import open_client

    folder = Path(tempfile.mkdtemp(prefix="concertina-runs-", dir=IN_MEMORY))
    write_job(folder)
    storage = folder / "runs"
    open_client(f"sqlite:///{storage / 'mlflow.db'}", storage)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def cluster() -> Iterator[LocalCluster]:
    """Two nodes of two logical CPUs, as `--address` finds them. This process is a client of it."""
    import ray

    with LocalCluster.start(num_nodes=2, cpus_per_node=2) as started:
        started.access.connect("tests")
        yield started
        ray.shutdown()


@pytest.fixture(scope="package")
def reference(ground: Path, cluster: LocalCluster) -> Drive:
    """A run that nobody disturbs."""
    words = [str(ground / "tiny.yaml"), *SHORT, "-o", "json"]
    drive = Drive(ground / "reference", words, ground / "runs", cluster.address)
    assert drive.ends() == 0, drive.err
    return drive


@pytest.fixture
def start(ground: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """`start("--set", "training.steps=3", address=None)`: the small job on the shared cluster, or on one of its own."""
    drives: list[Drive] = []

    def begin(*words: str, shared: bool = True, resume: Drive | None = None, storage: Path | None = None) -> Drive:
        address = request.getfixturevalue("cluster").address if shared else None
        what = ["--resume", resume.run.run_id] if resume else [str(ground / "tiny.yaml")]
        number = len(drives)
        drives.append(Drive(tmp_path / f"driver-{number}", [*what, *words], storage or ground / "runs", address))
        return drives[-1]

    yield begin
    for drive in drives:
        drive.clean_up()


@pytest.fixture
def nothing_left(cluster: LocalCluster) -> Callable[[Drive], None]:
    """Waits until no actor, reservation or process of a run on the shared cluster is left."""
    from ray.util import list_named_actors, placement_group_table

    def left(drive: Drive) -> list[object]:
        namespace = f"concertina-{drive.run.run_id}"
        actors = [found["name"] for found in list_named_actors(all_namespaces=True) if found["namespace"] == namespace]
        groups = [
            group["name"]
            for group in placement_group_table().values()
            if group["name"].startswith(namespace) and group["state"] != "REMOVED"
        ]
        return [*actors, *groups, *alive(drive.pids)]

    return lambda drive: wait_until(lambda: not left(drive), bound_s=60)
