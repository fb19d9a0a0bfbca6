"""Which running cluster does `--address` mean, and does it answer?"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from concertina.errors import NotFoundError, UserError
from infra.cluster_access import ClusterAccess
from infra.keeper_spec import CLUSTER_FILE, FOLDER_PREFIX, TOKEN_FILE, KeeperReport

__all__ = ["find_cluster"]

_PROBE_S = 3.0


def find_cluster(address: str | None, temp_root: Path | None = None) -> ClusterAccess | None:
    """The cluster at `address`, else at RAY_ADDRESS, else None: nobody named one, the caller starts its own.

    Raises UserError for an address that is none, NotFoundError (within 3 s) when nothing answers there.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        return None
    if address == "auto":
        return ClusterAccess("auto")
    _probe(*_split(address))
    return ClusterAccess(address, _token_of(address, temp_root or Path(tempfile.gettempdir())))


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError(
            f"address {address!r} is not host:port: give the address `ray start` printed, such as 10.0.0.1:6379",
            address=address,
        )
    return host.strip("[]"), int(port)


def _probe(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=_PROBE_S).close()
    except OSError as error:
        raise NotFoundError(
            f"no Ray cluster answers at {host}:{port} ({error}): check the address, or leave --address out "
            "to start a local cluster",
            address=f"{host}:{port}",
        ) from error


def _token_of(address: str, temp_root: Path) -> Path | None:
    """A local cluster of ours leaves its address and its token side by side in its folder."""
    for file in temp_root.glob(f"{FOLDER_PREFIX}*/{CLUSTER_FILE}"):
        if os.access(file, os.R_OK) and KeeperReport.from_json(file.read_text()).address == address:
            return file.parent / TOKEN_FILE
    return None
