"""Does each check tell a fit machine from an unfit one, and name the remedy?"""

import resource
import socket
import sqlite3
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import checkup
from jobs.checkup import Status

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_tested_versions_are_those_of_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==", 1) for line in lines if "==" in line)
    assert {name: pinned[name].split("+")[0] for name in checkup.TESTED} == checkup.TESTED


@pytest.mark.parametrize(
    ("version", "system", "status"),
    [
        ("3.11.7", "Linux", Status.OK),
        ("3.10.14", "Linux", Status.FAIL),
        ("3.12.0", "Darwin", Status.FAIL),
        ("3.19.0rc1", "Linux", Status.WARN),
    ],
)
def test_python(version: str, system: str, status: Status) -> None:
    assert checkup.check_python(version, system).status is status


def test_packages() -> None:
    assert checkup.check_package("torch", "2.13.0+cu130").status is Status.OK
    assert checkup.check_package("ray", "2.59.1").remedy == "tested with 2.60.0: pip install ray==2.60.0 if this fails"
    assert checkup.check_package("mlflow", None).status is Status.FAIL


def test_storage_that_is_not_there_yet_is_left_not_there(tmp_path: Path) -> None:
    storage = tmp_path / "a" / "runs"
    assert checkup.check_storage(storage).status is Status.OK
    assert checkup.check_tracking(storage, None).status is Status.OK
    assert checkup.check_disk(storage).found.endswith(f"free under {storage}")
    assert list(tmp_path.iterdir()) == []


def test_storage_that_cannot_be_written() -> None:
    check = checkup.check_storage(Path("/proc/runs"))
    assert check.status is Status.FAIL
    assert "--storage" in check.remedy


def test_a_database_in_use_and_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path, isolation_level=None) as database:
        database.execute("CREATE TABLE runs (x INTEGER)")
        assert checkup.check_tracking(tmp_path, None).status is Status.OK
        assert [row[0] for row in database.execute("SELECT name FROM sqlite_master")] == ["runs"]
    database.close()
    path.write_bytes(b"not a database, " * 100)
    check = checkup.check_tracking(tmp_path, f"sqlite:///{path}")
    assert check.status is Status.FAIL
    assert "file is not a database" in check.found


def test_a_tracking_server_is_shown_without_its_password(tmp_path: Path) -> None:
    found = checkup.check_tracking(tmp_path, "https://me:hush@host:5000/x").found
    assert found == "https://(credentials)@host:5000/x"


@pytest.mark.parametrize(
    ("soft", "hard", "status"),
    [
        (1024, 65536, Status.OK),
        (1024, resource.RLIM_INFINITY, Status.OK),
        (1024, 4096, Status.WARN),
        (256, 256, Status.FAIL),
    ],
)
def test_open_files(soft: int, hard: int, status: Status) -> None:
    check = checkup.check_open_files(soft, hard)
    assert check.status is status
    assert bool(check.remedy) == (status is not Status.OK)


def test_shared_memory_that_is_missing(tmp_path: Path) -> None:
    assert checkup.check_shared_memory(tmp_path / "shm").status is Status.WARN


def test_a_taken_agent_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        other.listen()
        check = checkup.check_agent_port(port)
        assert check.status is Status.WARN
        assert f"{port} is taken" in check.found
    assert checkup.check_agent_port(port).status is Status.OK


def test_other_clusters_are_counted_by_their_gcs() -> None:
    def process(name: str, pid: int) -> SimpleNamespace:
        return SimpleNamespace(info={"name": name, "pid": pid, "username": "ada"})

    check = checkup.check_other_clusters([process("raylet", 1), process("gcs_server", 2)])  # type: ignore[list-item]
    assert check.status is Status.WARN
    assert check.found == "1 on this host (gcs_server pid 2 of ada)"
    assert checkup.check_other_clusters([]).status is Status.OK


def test_ray_address() -> None:
    assert checkup.check_ray_address(None).status is Status.OK
    assert checkup.check_ray_address("nonsense").status is Status.FAIL
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nothing answers
        check = checkup.check_ray_address(f"127.0.0.1:{closed.getsockname()[1]}")
    assert check.status is Status.FAIL
    assert "unset RAY_ADDRESS" in check.remedy


def test_settings_are_shown_and_secrets_are_not() -> None:
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "hush", "HOME": "/root"}
    assert checkup.show_settings(environ).found == "RAY_AUTH_MODE=token, RAY_AUTH_TOKEN=(set)"


def test_a_self_test_that_fails_and_one_that_hangs() -> None:
    failed = checkup.check_gloo([sys.executable, "-c", "raise SystemExit('no route')"], timedelta(seconds=30))
    assert (failed.status, failed.found) == (Status.FAIL, "no route")
    # A process that waits for itself ends at the bound, never before.
    forever = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    hung = checkup.check_gloo(forever, timedelta(seconds=0.5))
    assert (hung.status, hung.found) == (Status.FAIL, "no all-reduce within 0.5 s")
