"""One migrated MLflow database for the whole session, and a folder of runs that starts with a copy of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from concertina.track.mlflow_place import open_client

# Hundreds of small transactions, each waiting for the disk, are not what these tests are about.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder that is quick to write."""
    with tempfile.TemporaryDirectory(prefix="concertina-tests-", dir=IN_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def empty_database(memory: Path) -> Path:
    """The migrations take a second; a copy takes none."""
    open_client(f"sqlite:///{memory / 'empty' / 'mlflow.db'}", memory / "empty")
    return memory / "empty" / "mlflow.db"


@pytest.fixture
def storage(memory: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage folder with a fresh mlflow.db, away from the current directory, which stays empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = Path(tempfile.mkdtemp(prefix="runs-", dir=memory))
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder
