"""How does a driver get a Ray cluster of several nodes on this machine, and be rid of it without a trace?

with LocalCluster.start(num_nodes=2, cpus_per_node=2) as cluster:
    cluster.access.connect(namespace="concertina-demo")

The cluster belongs to a keeper process (`infra/keeper.py`), so that it ends in order when the driver is killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from concertina import errors
from concertina.elastic.waits import BOUNDS
from infra.cluster_access import ClusterAccess
from infra.keeper_spec import CLUSTER_FILE, FOLDER_PREFIX, TOKEN_FILE, KeeperReport, KeeperSpec, ray_environment
from infra.processes import is_alive, start_time

__all__ = ["LocalCluster"]

_ROOT_LIMIT_CHARS = 45  # + "/concertina-ray-xxxxxxxx/session/sockets/dash_MetricsHead" must fit into a socket's 107
_UNBORN_S = 600.0  # a folder without a cluster file may still be starting; after this it is not


class LocalCluster:
    """A running local cluster; every socket of it is on 127.0.0.1. Made by `start`."""

    def __init__(self, keeper: subprocess.Popen[str], report: KeeperReport, temp_dir: Path) -> None:
        self._keeper = keeper
        self._report = report
        self._temp_dir = temp_dir
        self.access = ClusterAccess(report.address, temp_dir / TOKEN_FILE)

    @classmethod
    def start(
        cls,
        num_nodes: int = 2,
        cpus_per_node: int = 2,
        gpus: Sequence[int] = (),
        temp_root: Path | None = None,
        resources: Sequence[Mapping[str, float]] | None = None,
        startup_timeout: timedelta = BOUNDS["cluster_start"].timedelta,
        dashboard: bool = False,
    ) -> LocalCluster:
        """Start `num_nodes` raylets; about 3 s, or 5 s with the dashboard (the Job API needs it), on two cores.

        `gpus` are device numbers, dealt out evenly; `resources` has one mapping per node. Raises ConcertinaError.
        """
        root = _checked_root(temp_root)
        _sweep(root)
        temp_dir = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=root))
        started = start_time(os.getpid())
        assert started is not None
        spec = KeeperSpec(
            temp_dir=str(temp_dir),
            num_nodes=num_nodes,
            cpus_per_node=cpus_per_node,
            gpus=tuple(gpus),
            resources=tuple(resources or [{}] * num_nodes),
            dashboard=dashboard,
            driver_pid=os.getpid(),
            driver_started_s=started,
            startup_timeout_s=startup_timeout.total_seconds(),
            actors_timeout_s=BOUNDS["actors_finish"].seconds,
        )
        keeper = _spawn(spec)
        report = _hear(keeper, startup_timeout + timedelta(seconds=5))
        if report.problem:
            raise errors.ConcertinaError(_end_failed(keeper, temp_dir, report.problem))
        return cls(keeper, report, temp_dir)

    @property
    def address(self) -> str:
        return self._report.address

    @property
    def session_dir(self) -> Path:
        """Ray's logs are in `logs/` below. Gone after `stop`."""
        return Path(self._report.session_dir)

    @property
    def keeper_pid(self) -> int:
        return self._report.keeper_pid

    @property
    def dashboard_url(self) -> str | None:
        return self._report.dashboard_url

    def stop(self) -> None:
        """End every process and remove the folder; actors get no time, so end them first. Safe to call twice."""
        pipe = self._keeper.stdin
        if pipe is None or pipe.closed:
            self._keeper.terminate()  # let go before: it may still be waiting for actors
        else:
            with contextlib.suppress(BrokenPipeError):
                os.write(pipe.fileno(), b"stop\n")  # unbuffered: nothing is left to fail at closing
        _await_end(self._keeper)

    def let_go(self) -> None:
        """As if this driver were gone: actors of ours finish first, then the keeper ends all. Does not wait."""
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error leaves the run's outcome to its coordinator, which needs the cluster a little longer."""
        if error is None:
            self.stop()
        else:
            self.let_go()


def _checked_root(temp_root: Path | None) -> Path:
    root = (temp_root or Path(tempfile.gettempdir())).resolve()
    if len(str(root)) > _ROOT_LIMIT_CHARS:
        raise errors.UserError(
            f"temporary folder {root} has {len(str(root))} characters, Ray's sockets leave room for "
            f"{_ROOT_LIMIT_CHARS}: set TMPDIR to a shorter path",
            path=str(root),
        )
    root.mkdir(parents=True, exist_ok=True)
    return root


def _sweep(root: Path) -> None:
    """Remove what keepers left that were killed with SIGKILL (their processes died with them)."""
    for token in root.glob(f"{FOLDER_PREFIX}*/{TOKEN_FILE}"):
        folder, file = token.parent, token.with_name(CLUSTER_FILE)
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            if file.exists():
                report = KeeperReport.from_json(file.read_text())
                stale = not is_alive(report.keeper_pid, report.keeper_started_s)
            else:
                stale = time.time() - folder.stat().st_mtime > _UNBORN_S
            if stale:
                shutil.rmtree(folder, ignore_errors=True)


def _spawn(spec: KeeperSpec) -> subprocess.Popen[str]:
    temp_dir = Path(spec.temp_dir)
    token_path = temp_dir / TOKEN_FILE
    token_path.write_text(secrets.token_hex(32))  # the folder is ours alone (mkdtemp: 0700)
    with (temp_dir / "keeper.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "infra.keeper", spec.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_keeper_environment(token_path),
            start_new_session=True,  # Ctrl-C in the driver's terminal is the driver's alone
            text=True,
        )


def _keeper_environment(token_path: Path) -> dict[str, str]:
    """Ours, and none of the user's RAY_*: another cluster's address or token in there would mix the two up."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    sources = [Path(__file__).parents[1], Path(errors.__file__).parents[1]]
    paths = [*map(str, sources), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | ray_environment(token_path) | {"PYTHONPATH": os.pathsep.join(paths)}


def _hear(keeper: subprocess.Popen[str], bound: timedelta) -> KeeperReport:
    assert keeper.stdout is not None
    readable, _, _ = select.select([keeper.stdout], [], [], bound.total_seconds())
    if not readable:
        return KeeperReport(problem=f"its keeper said nothing for {bound.total_seconds():g} s")
    line = keeper.stdout.readline()
    return KeeperReport.from_json(line) if line else KeeperReport(problem="its keeper ended without a word")


def _end_failed(keeper: subprocess.Popen[str], temp_dir: Path, problem: str) -> str:
    """Clean up after a failed start; the message for the user."""
    log = temp_dir / "keeper.log"
    last = log.read_text().strip().splitlines()[-3:] if log.exists() else []
    keeper.terminate()
    _await_end(keeper)
    shutil.rmtree(temp_dir, ignore_errors=True)
    tail = f" (last words: {' | '.join(last)})" if last else ""
    return f"the local Ray cluster did not start: {problem}{tail}; `concertina doctor` checks this machine"


def _await_end(keeper: subprocess.Popen[str]) -> None:
    try:
        keeper.wait(BOUNDS["cluster_end"].seconds)
    except subprocess.TimeoutExpired:
        keeper.send_signal(signal.SIGKILL)  # its children die with it
        keeper.wait()
    for stream in (keeper.stdin, keeper.stdout):
        if stream is not None:
            stream.close()
