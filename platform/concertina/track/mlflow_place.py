"""Where is the tracking store, and how is it opened so that it surprises nobody?

No telemetry, nothing written into the current directory, bounded requests, no migration chatter, and a new sqlite
database that appears complete or not at all however many runs want it at once.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import tempfile
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from concertina.errors import ConfigError
from concertina.track.owner import OwnerLock

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["TRACKING_URI_ENV_VAR", "artifact_location", "open_client", "shown", "tracking_uri", "ui_command"]

TRACKING_URI_ENV_VAR = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Retrying is the sink's business: it can tell a person, and stop.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
_NO_TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
_SCRATCH_BYTES = 64 << 20
_CREATION_WAIT = timedelta(minutes=2)


def tracking_uri(given: str | None, storage: Path) -> str:
    """The job's `tracking.tracking_uri`, else MLFLOW_TRACKING_URI, else sqlite under `storage`; paths absolute.

    Raises ConfigError for a store we do not write to.
    """
    given = given or os.environ.get(TRACKING_URI_ENV_VAR)
    if not given:
        return f"{_SQLITE}{storage.resolve() / 'mlflow.db'}"
    scheme = re.split(r"[:+]", given, maxsplit=1)[0].lower()
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"tracking.tracking_uri={shown(given)}: MLflow's file store is retired and others are unknown; "
            f"use sqlite:///PATH.db, http://HOST:PORT, or leave it out for sqlite under {storage}",
            tracking_uri=shown(given),
        )
    if scheme == "sqlite":
        return f"{_SQLITE}{Path(given.removeprefix(_SQLITE)).resolve()}"
    return given


def shown(uri: str) -> str:
    """The same without user name and password, for files, logs and tags."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))


def artifact_location(uri: str, storage: Path) -> str | None:
    """Where a new experiment keeps its few small files: beside our sqlite; a server knows its own place."""
    return (storage.resolve() / "mlflow-artifacts").as_uri() if uri.startswith(_SQLITE) else None


def ui_command(uri: str) -> str:
    """What to type, or where to go, to see the runs."""
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite") else shown(uri)


def open_client(uri: str, storage: Path) -> MlflowClient:
    """A client of the store at `uri`; makes a missing sqlite database. Takes seconds: never on a step's path.

    Raises what MLflow, its database and the network raise, and Busy after two minutes of somebody else making it.
    """
    for name, value in _NO_TELEMETRY.items():
        os.environ[name] = value
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for chatter in ("mlflow.store.db.utils", "mlflow.tracking", "alembic"):
        logging.getLogger(chatter).setLevel(logging.WARNING)
    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
        if not database.exists():
            _create_database(database, artifact_location(uri, storage))
    return MlflowClient(tracking_uri=uri)


def _create_database(database: Path, artifacts: str | None) -> None:
    """MLflow's 60-odd migrations in a scratch folder, then one rename.

    Each migration commits, and on a disk each commit waits for it: 6 s measured, against 0.7 s in memory. A kill
    in between leaves no half-migrated database, which MLflow could never open again.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    with OwnerLock(database.with_name(database.name + ".lock"), wait=_CREATION_WAIT):
        if database.exists():
            return
        draft = database.with_name(f".{database.name}.{os.getpid()}.tmp")
        with tempfile.TemporaryDirectory(prefix="concertina-mlflow-", dir=_scratch()) as folder:
            _migrate(Path(folder) / "new.db", artifacts)
            with closing(sqlite3.connect(Path(folder) / "new.db")) as old, closing(sqlite3.connect(draft)) as new:
                old.backup(new)
        draft.replace(database)


def _migrate(path: Path, artifacts: str | None) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # Also gives the experiment "Default" a place; otherwise that is ./mlruns of whoever came first.
    store = SqlAlchemyStore(f"{_SQLITE}{path}", artifacts or path.parent.as_uri())
    store.engine.dispose()


def _scratch() -> str | None:
    """A folder in memory where there is one with room, else the system's temporary folder."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _SCRATCH_BYTES:
        return str(memory)
    return None
