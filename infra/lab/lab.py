"""How is a lab started, broken, mended and ended? A folder remembers it, so that any process may do the next thing.

Host 0 is the head. Without root there are no links: Ray nodes on loopback addresses, which can be killed and frozen,
and not cut off. Other Ray clusters of this machine are never touched: folder, addresses and ports are the lab's own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from concertina.elastic.waits import BOUNDS
from infra.keeper_spec import TOKEN_FILE
from infra.lab.host import HAS_ENDED
from infra.lab.network import LabError, Network, why_not
from infra.processes import is_alive, start_time

__all__ = ["Host", "Lab"]

_PREFIX = "concertina-lab-"
_FILE = "lab.json"
_OBJECT_STORE_BYTES = 100 * 2**20
_POLL_S = 0.1
_END_S = 5.0
_MOST_HOSTS = 64
_LONGEST = "/concertina-lab-123456/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_ROOT_LIMIT_CHARS = 107 - len(_LONGEST)
_WITH_OWN_FOLDER = 'mount --bind "$0" "$1" || exit 1; shift; exec "$@"'
_COUNT_NODES = (
    "import ray; ray.init('auto', logging_level='ERROR', log_to_driver=False); "
    "print(sum(node['Alive'] for node in ray.nodes()))"
)


@dataclass
class Host:
    """One host: where it is, and the process above all of its own. `pid` is 0 while it is off."""

    number: int
    address: str
    pid: int = 0
    started_s: float = 0.0

    @property
    def is_on(self) -> bool:
        return self.pid > 0 and is_alive(self.pid, self.started_s)

    @property
    def is_frozen(self) -> bool:
        return self.is_on and psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def processes(self) -> list[psutil.Process]:
        """It and everything below it; empty when it is off."""
        with suppress(psutil.NoSuchProcess):
            if self.is_on:
                top = psutil.Process(self.pid)
                return [top, *top.children(recursive=True)]
        return []


@dataclass
class Lab:
    """Hosts, and the network between them (None: loopback addresses only)."""

    folder: Path
    hosts: list[Host]
    cpus: int
    port: int
    has_links: bool
    lost: list[tuple[int, int]] = field(default_factory=list)
    """(source, target): what is sent that way is lost."""
    off: list[tuple[int, int]] = field(default_factory=list)
    """Of those, what is lost because a host is off."""
    slowed: dict[int, float] = field(default_factory=dict)
    """Megabits a second of hosts whose links were slowed."""

    # -- there and gone -----------------------------------------------------------------------------------------------

    @classmethod
    def up(cls, num_hosts: int = 3, cpus: int = 2, mbit: float | None = None, root: Path | None = None) -> Lab:
        """Start it; some seconds a host. `mbit` slows every link. Raises LabError, and leaves nothing then."""
        if not 1 <= num_hosts <= _MOST_HOSTS:
            raise LabError(f"{num_hosts} hosts: a lab has 1 to {_MOST_HOSTS}")
        if mbit is not None and (problem := why_not()):
            raise LabError(f"no links to slow to {mbit:g} Mbit/s: {problem}")
        folder = _new_folder(root or Path(tempfile.gettempdir()))
        (folder / "ray").mkdir()
        (folder / TOKEN_FILE).write_text(secrets.token_hex(32))
        has_links = not why_not()
        addresses = [Network.address(n) if has_links else f"127.0.1.{n + 1}" for n in range(num_hosts)]
        port = 6379 if has_links else _free_port(addresses[0])
        lab = cls(folder, [Host(n, address) for n, address in enumerate(addresses)], cpus, port, has_links)
        try:
            lab._write()  # whatever ends this process, `down` finds the rest
            if has_links:
                lab.network.up()
            for host in lab.hosts:
                lab.boot(host.number)
                if host.number == 0 or not has_links:
                    lab._await_nodes(host.number + 1)
            lab._await_nodes(num_hosts)
            for host in lab.hosts if mbit is not None else []:
                lab.slow(host.number, mbit or 0.0)
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def find(cls, name: str | None = None, root: Path | None = None) -> Lab:
        """The lab of that name, or the only one there is. Raises LabError."""
        there = sorted(_folders(root))
        found = [folder for folder in there if name in (None, _name(folder))]
        if len(found) == 1:
            return cls._read(found[0])
        names = ", ".join(map(_name, there)) or "none"
        if found:
            raise LabError(f"there are {len(found)} labs, say which with --lab: {names}")
        raise LabError(
            f"there is no lab{f' {name}' if name else ''} (there are: {names}): `concertina lab up` makes one"
        )

    @classmethod
    def _read(cls, folder: Path) -> Lab:
        found: dict[str, Any] = json.loads((folder / _FILE).read_text())
        found["hosts"] = [Host(**host) for host in found["hosts"]]
        for ways in ("lost", "off"):
            found[ways] = [(source, target) for source, target in found[ways]]
        found["slowed"] = {int(host): mbit for host, mbit in found["slowed"].items()}
        return cls(folder, **found)

    def _write(self) -> None:
        document = {key: value for key, value in asdict(self).items() if key != "folder"}
        new = self.folder / f"{_FILE}.new"
        new.write_text(json.dumps(document))
        new.rename(self.folder / _FILE)

    def down(self) -> None:
        """End every process, the network and the folder."""
        for host in self.hosts:
            self._end(host)
        if self.has_links:
            self.network.down()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- where it is --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return _name(self.folder)

    @property
    def network(self) -> Network:
        return Network(self.name, len(self.hosts))

    @property
    def _rays_folder(self) -> Path:
        return self.folder / "ray"

    @property
    def address(self) -> str:
        """Of the Ray cluster, as its hosts reach it."""
        return f"{self.hosts[0].address}:{self.port}"

    def environment(self) -> dict[str, str]:
        """Of a process on a host that is to find the cluster."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        ours = {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / TOKEN_FILE),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_worker_niceness": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        return kept | ours

    def command(self, host: int, words: Iterable[str]) -> list[str]:
        """The command line that runs `words` on a host; give it `environment()`. Each host has a folder of its own for
        Ray's sockets and logs, as each machine has: two nodes that start at once in one take the same names."""
        self._host(host)
        if not self.has_links:
            return list(words)
        own = self.folder / f"host-{host}"
        own.mkdir(exist_ok=True)
        return self.network.inside(host, ["sh", "-c", _WITH_OWN_FOLDER, str(own), str(self._rays_folder), *words])

    # -- what may happen to hosts -------------------------------------------------------------------------------------

    def boot(self, number: int) -> None:
        """Switch a host on that is off. Does not wait for its Ray node."""
        host = self._host(number)
        if host.is_on:
            raise LabError(f"host {number} is on")
        self._mend([way for way in self.off if number in way])
        python = [sys.executable, "-m", "infra.lab.host", "--"]
        with (self.folder / f"host-{number}.log").open("a") as log:
            process = subprocess.Popen(
                self.command(number, [*python, *self._ray_start(number)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
        host.pid, host.started_s = process.pid, start_time(process.pid) or 0.0
        self._write()

    def kill(self, number: int) -> None:
        """As a machine that loses its power: nobody hears of it, and nothing of it is left."""
        host = self._on(number)
        before = set(self.lost)
        self.cut(number)
        self.off = [*self.off, *(way for way in self.lost if way not in before)]
        self._end(host)
        host.pid = 0
        self._write()

    def freeze(self, number: int) -> None:
        """Every process of a host stands still."""
        _send(self._on(number), signal.SIGSTOP)

    def thaw(self, number: int) -> None:
        _send(self._on(number), signal.SIGCONT)

    # -- what may happen to links -------------------------------------------------------------------------------------

    def cut(self, number: int, others: Iterable[int] | None = None, *, sends: bool = True, hears: bool = True) -> None:
        """What a host sends to others (all of them), and what they send to it, is lost, silently."""
        if not self.has_links:
            return
        for other in self._others(number, others):
            for source, target, wanted in ((number, other, sends), (other, number, hears)):
                if wanted and (source, target) not in self.lost:
                    self.network.lose(source, target)
                    self.lost.append((source, target))
                if wanted and (source, target) in self.off:
                    self.off.remove((source, target))  # on purpose now
        self._write()

    def connect(self, number: int) -> None:
        """A host's links are whole again."""
        self._mend([way for way in self.lost if number in way])

    def _mend(self, ways: list[tuple[int, int]]) -> None:
        for source, target in ways:
            self.network.carry(source, target)
        self.lost = [way for way in self.lost if way not in ways]
        self.off = [way for way in self.off if way not in ways]
        self._write()

    def slow(self, number: int, mbit: float) -> None:
        """A host's link carries so many megabits a second from now on, in both directions."""
        self.needs_links()
        if mbit <= 0:
            raise LabError(f"{mbit:g} Mbit/s: a link carries more than nothing; `partition` cuts it")
        self._host(number)
        self.network.slow(number, mbit)
        self.slowed[number] = mbit
        self._write()

    def full_speed(self, number: int) -> None:
        self.needs_links()
        self._host(number)
        self.network.full_speed(number)
        self.slowed.pop(number, None)
        self._write()

    def needs_links(self) -> None:
        """Raises LabError where there are none."""
        if not self.has_links:
            raise LabError(f"this lab has no links of its own: {why_not() or 'it was made without root'}")

    # -- small things -------------------------------------------------------------------------------------------------

    def _end(self, host: Host) -> None:
        """Every process of it, and what `exec` has started there."""
        _end(host)
        if self.has_links:
            for pid in self.network.processes(host.number):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _host(self, number: int) -> Host:
        if not 0 <= number < len(self.hosts):
            raise LabError(f"there is no host {number}: the lab has {len(self.hosts)}, counted from 0")
        return self.hosts[number]

    def _on(self, number: int) -> Host:
        host = self._host(number)
        if not host.is_on:
            raise LabError(f"host {number} is off: `concertina lab boot {number}` switches it on")
        return host

    def _others(self, number: int, others: Iterable[int] | None) -> Iterator[int]:
        self._host(number)
        for other in range(len(self.hosts)) if others is None else others:
            if other != number:
                yield self._host(other).number

    def _ray_start(self, number: int) -> list[str]:
        address = self.hosts[number].address
        where = ["--head", f"--port={self.port}", f"--temp-dir={self._rays_folder}", "--include-dashboard=false"]
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        start += where if number == 0 else [f"--address={self.address}"]
        start += [f"--node-ip-address={address}", f"--num-cpus={self.cpus}", "--num-gpus=0"]
        return [*start, f"--object-store-memory={_OBJECT_STORE_BYTES}", "--dashboard-agent-listen-port=0"]

    def _await_nodes(self, count: int) -> None:
        """Until so many Ray nodes are there."""
        deadline = time.monotonic() + BOUNDS["cluster_start"].seconds
        while time.monotonic() < deadline:
            command = self.command(0, [sys.executable, "-c", _COUNT_NODES])
            try:
                done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=30)
            except subprocess.TimeoutExpired:
                continue
            if done.returncode == 0 and int(done.stdout.split()[-1]) >= count:
                return
            for number in range(count):
                log = (self.folder / f"host-{number}.log").read_text()
                if HAS_ENDED in log:
                    last = log.strip().splitlines()[-3:]
                    raise LabError(f"host {number}: its Ray node did not start (last words: {' | '.join(last)})")
            time.sleep(_POLL_S)
        raise LabError(f"not {count} Ray nodes within {BOUNDS['cluster_start'].seconds:g} s: is this machine busy?")


def _new_folder(root: Path) -> Path:
    """Raises LabError where Ray's sockets would have too long names."""
    if len(str(root)) > _ROOT_LIMIT_CHARS:
        text = f"temporary folder {root} has {len(str(root))} characters, Ray's sockets leave room for"
        raise LabError(f"{text} {_ROOT_LIMIT_CHARS}: set TMPDIR to a shorter path")
    folder = root / f"{_PREFIX}{secrets.token_hex(3)}"
    folder.mkdir(mode=0o700)
    return folder


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as found:
        return int(found.getsockname()[1])


def _folders(root: Path | None) -> Iterator[Path]:
    for file in Path(root or tempfile.gettempdir()).glob(f"{_PREFIX}*/{_FILE}"):
        if _is_ours(file.parent):
            yield file.parent


def _is_ours(folder: Path) -> bool:
    """What is written in it names processes to be ended: nobody else may have written it."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _name(folder: Path) -> str:
    return folder.name.rpartition("-")[2]


def _send(host: Host, number: signal.Signals) -> None:
    for process in host.processes():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _end(host: Host) -> None:
    """Every process of it. The one above all stands still meanwhile: it starts nothing again, and orphans stay below
    it."""
    if not host.is_on:
        return
    with suppress(ProcessLookupError):
        os.kill(host.pid, signal.SIGSTOP)
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline and (below := _living_below(host)):
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=0.05)
    with suppress(ProcessLookupError):
        os.kill(host.pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(host.pid, 0)  # where it is a child of ours


def _living_below(host: Host) -> list[psutil.Process]:
    return [process for process in host.processes()[1:] if start_time(process.pid) is not None]
