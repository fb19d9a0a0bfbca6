"""Is this machine fit to train on? One function a check; each says what it found and, when that is bad, the remedy.

Every check takes what it looks at as an argument and changes nothing that it does not take back.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from concertina.errors import ConcertinaError

__all__ = ["TESTED", "Check", "Status", "check_all"]

# What constraints.txt pins; a test compares the two.
TESTED = {"torch": "2.13.0", "ray": "2.60.0", "mlflow": "3.17.2", "tokenizers": "0.23.3"}
TESTED_PYTHONS = ("3.11", "3.12", "3.13")
LEAST_FREE_DISK_BYTES, FREE_DISK_BYTES = 1 << 30, 5 << 30
# The two local nodes of `concertina train` hold 100 MiB of Ray objects each; the rest is room for others.
LEAST_SHM_BYTES, SHM_BYTES = 64 << 20, 512 << 20
LEAST_OPEN_FILES, OPEN_FILES = 1024, 8192  # Ray's own recommendation
RAY_AGENT_PORT = 52365
SELFTEST_TIMEOUT = timedelta(seconds=60)
SHOWN_SETTINGS = (
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_TMPDIR",
    "MLFLOW_TRACKING_URI",
    "CUDA_VISIBLE_DEVICES",
    "TOKENIZERS_PARALLELISM",
)


class Status(StrEnum):
    """`warn` may train, `fail` will not."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found and what to do about it (empty when it is ok)."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def check_all(storage: Path, tracking_uri: str | None, environ: Mapping[str, str]) -> list[Check]:
    """Every check, in the order a person reads them; the gloo self-test takes a few seconds."""
    checks: list[Callable[[], Check]] = [
        lambda: check_python(platform.python_version(), platform.system()),
        *(lambda name=name: check_package(name, _installed(name)) for name in TESTED),
        check_hardware,
        lambda: check_storage(storage),
        lambda: check_disk(storage),
        lambda: check_tracking(storage, tracking_uri),
        lambda: check_shared_memory(Path("/dev/shm")),
        lambda: check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        lambda: check_agent_port(RAY_AGENT_PORT),
        lambda: check_other_clusters(psutil.process_iter(["pid", "name", "username"])),
        lambda: check_ray_address(environ.get("RAY_ADDRESS")),
        lambda: show_settings(environ),
        lambda: check_gloo([sys.executable, "-m", "jobs.gloo_selftest"], SELFTEST_TIMEOUT),
    ]
    return [check() for check in checks]


def check_python(version: str, system: str) -> Check:
    """3.11 or newer, on Linux."""
    found = f"{version} on {system}"
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < (3, 11):
        return Check("python", Status.FAIL, found, "install Python 3.11 or newer")
    if system != "Linux":
        return Check("python", Status.FAIL, found, "use Linux: processes are watched over with Linux' own calls")
    if f"{major}.{minor}" not in TESTED_PYTHONS:
        return Check("python", Status.WARN, found, f"tested with {', '.join(TESTED_PYTHONS)}; use one if this fails")
    return Check("python", Status.OK, found)


def check_package(name: str, installed: str | None) -> Check:
    """Installed, and the version that was tested (a build suffix such as +cpu does not matter)."""
    tested = TESTED[name]
    if installed is None:
        return Check(name, Status.FAIL, "not installed", "run `make setup`, or pip install -e . -c constraints.txt")
    if installed.split("+")[0] != tested:
        return Check(name, Status.WARN, installed, f"tested with {tested}: pip install {name}=={tested} if this fails")
    return Check(name, Status.OK, installed)


def check_hardware() -> Check:
    """CPUs this process may use, memory, GPUs torch sees."""
    import torch

    cpus, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = f"{cpus} CPUs, {_size(memory.available)} of {_size(memory.total)} memory free, {len(gpus)} GPUs"
    if not gpus and shutil.which("nvidia-smi"):
        remedy = f"nvidia-smi is here, but torch {torch.__version__} sees no GPU: install torch's CUDA build"
        return Check("hardware", Status.WARN, found, remedy)
    return Check("hardware", Status.OK, f"{found} ({', '.join(sorted(set(gpus)))})" if gpus else found)


def check_storage(storage: Path) -> Check:
    """A file can be written, synced and removed where runs will live."""
    place = _existing(storage)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".concertina-doctor-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remedy = "set storage_path (or --storage) to a folder you may write to"
        return Check("storage", Status.FAIL, f"{place}: {error.strerror}", remedy)
    return Check("storage", Status.OK, f"{storage.absolute()} can be written")


def check_disk(storage: Path) -> Check:
    """Room for checkpoints: a model of a billion parameters writes about 16 GB each."""
    free = shutil.disk_usage(_existing(storage)).free
    found = f"{_size(free)} free under {storage.absolute()}"
    remedy = "free some space, or set storage_path to another disk"
    return _enough(Check("disk", Status.OK, found, remedy), free, LEAST_FREE_DISK_BYTES, FREE_DISK_BYTES)


def check_tracking(storage: Path, tracking_uri: str | None) -> Check:
    """MLflow's database takes a write lock; a server is only named, not asked."""
    if tracking_uri is not None and not tracking_uri.startswith("sqlite:///"):
        return Check("mlflow store", Status.OK, without_password(tracking_uri))
    path = Path(tracking_uri.removeprefix("sqlite:///")) if tracking_uri else storage / "mlflow.db"
    try:
        with tempfile.TemporaryDirectory(dir=_existing(path.parent), prefix=".concertina-doctor-") as scratch:
            # Its own folder when there is no database yet: SQLite needs working file locks, which some network
            # file systems lack.
            target = path if path.exists() else Path(scratch) / "try.db"
            with contextlib.closing(sqlite3.connect(target, timeout=5, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("CREATE TABLE concertina_doctor (x INTEGER)")
                database.execute("ROLLBACK")
    except (OSError, sqlite3.Error) as error:
        remedy = "close what holds it, mend its permissions, or set tracking.tracking_uri to another place"
        return Check("mlflow store", Status.FAIL, f"{path}: {error}", remedy)
    return Check("mlflow store", Status.OK, f"sqlite at {path.absolute()} can be written")


def check_shared_memory(folder: Path) -> Check:
    """Ray's objects live there; too little makes them go through the disk."""
    if not folder.is_dir():
        return Check("shared memory", Status.WARN, f"no {folder}", "Ray will use /tmp, which is slower")
    free = shutil.disk_usage(folder).free
    found = f"{_size(free)} free in {folder}"
    remedy = "in a container: start it with --shm-size=2g; else delete what is left over there"
    return _enough(Check("shared memory", Status.OK, found, remedy), free, LEAST_SHM_BYTES, SHM_BYTES)


def check_open_files(soft: int, hard: int) -> Check:
    """Ray raises its own soft limit up to the hard one."""
    limit = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    found = f"{soft} (hard {'unlimited' if limit == sys.maxsize else hard})"
    remedy = f"raise it: ulimit -Hn {OPEN_FILES}, or LimitNOFILE / nofile of the service or container"
    return _enough(Check("open files", Status.OK, found, remedy), limit, LEAST_OPEN_FILES, OPEN_FILES)


def check_agent_port(port: int) -> Check:
    """`ray start` gives every node's dashboard agent this one port: a second cluster on the host cannot submit jobs."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            remedy = (
                "harmless for `concertina train`, which takes free ports; for your own `ray start` give "
                "--dashboard-agent-listen-port another number"
            )
            return Check("ray agent port", Status.WARN, f"{port} is taken, likely by another Ray cluster", remedy)
    return Check("ray agent port", Status.OK, f"{port} is free")


def check_other_clusters(processes: Iterable[psutil.Process]) -> Check:
    """Each Ray cluster has one gcs_server."""
    heads = [process.info for process in processes if process.info["name"] == "gcs_server"]
    if not heads:
        return Check("ray clusters", Status.OK, "none on this host")
    named = ", ".join(f"pid {head['pid']} of {head['username']}" for head in heads)
    remedy = "`ray stop` would end them all: stop yours by its own command, and mind that they share CPUs and memory"
    return Check("ray clusters", Status.WARN, f"{len(heads)} on this host (gcs_server {named})", remedy)


def check_ray_address(address: str | None) -> Check:
    """RAY_ADDRESS decides where `concertina train` goes, unnoticed by who has forgotten it."""
    if not address:
        return Check("ray address", Status.OK, "RAY_ADDRESS is not set: a local cluster is started for each run")
    from infra.find_cluster import find_cluster

    try:
        find_cluster(address)
    except ConcertinaError as error:
        return Check("ray address", Status.FAIL, f"RAY_ADDRESS={address}: {error}", "unset RAY_ADDRESS, or correct it")
    return Check("ray address", Status.OK, f"RAY_ADDRESS={address}: runs go there unless --address says otherwise")


def show_settings(environ: Mapping[str, str]) -> Check:
    """Variables that change what Ray and MLflow do; secrets are only said to be there."""
    shown = [
        f"{name}={'(set)' if name.endswith('_TOKEN') else without_password(environ[name])}"
        for name in SHOWN_SETTINGS
        if name in environ
    ]
    return Check("environment", Status.OK, ", ".join(shown) or "nothing set that changes Ray or MLflow")


def check_gloo(command: list[str], timeout: timedelta) -> Check:
    """Two processes add their ranks over loopback, as ranks of a run would."""
    name, remedy = "gloo", "let processes of this user connect to 127.0.0.1 (firewall, sandbox, container settings)"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout.total_seconds(),
            # Found the way this process was, installed or not, from whatever folder.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
    except subprocess.TimeoutExpired:
        return Check(name, Status.FAIL, f"no all-reduce within {timeout.total_seconds():g} s", remedy)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return Check(name, Status.FAIL, last, remedy)
    return Check(name, Status.OK, done.stdout.strip())


def without_password(uri: str) -> str:
    """`https://user:secret@host/x` without what stands before the @."""
    parts = urlsplit(uri)
    return uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "(credentials)@") if "@" in parts.netloc else uri


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The path, or the nearest parent that is there."""
    path = path.expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def _enough(check: Check, amount: int, least: int, recommended: int) -> Check:
    """`check` with the status `amount` deserves; enough needs no remedy."""
    if amount >= recommended:
        return replace(check, remedy="")
    return replace(check, status=Status.FAIL if amount < least else Status.WARN)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
