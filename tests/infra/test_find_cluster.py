"""Is a cluster's address understood, and a wrong one refused in one line?"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from concertina.errors import NotFoundError, UserError
from infra import ClusterAccess, find_cluster
from infra.keeper_spec import CLUSTER_FILE, FOLDER_PREFIX, TOKEN_FILE, KeeperReport

pytestmark = pytest.mark.unit


@pytest.fixture
def served() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_no_address_means_none_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert find_cluster(None) is None


def test_the_variable_counts_when_no_address_is_given(monkeypatch: pytest.MonkeyPatch, served: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", served)
    assert find_cluster(None) == ClusterAccess(served)


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1", ":6379", "host:port"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="is not host:port"):
        find_cluster(address)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(NotFoundError, match=f"no Ray cluster answers at {address}"):
        find_cluster(address)


def test_a_local_cluster_of_ours_is_known_by_its_folder(tmp_path: Path, served: str) -> None:
    folder = tmp_path / f"{FOLDER_PREFIX}x"
    folder.mkdir()
    (folder / CLUSTER_FILE).write_text(KeeperReport(address=served).to_json())
    access = find_cluster(served, temp_root=tmp_path)
    assert access == ClusterAccess(served, folder / TOKEN_FILE)
    assert access.environment()["RAY_AUTH_TOKEN_PATH"] == str(folder / TOKEN_FILE)
    assert ClusterAccess(served).environment() == {}
