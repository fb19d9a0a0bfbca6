"""Do the lab's links carry, lose and slow what they should, and is nothing left of it? (`infra/lab`)"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from infra.lab import Lab, LabError, Network
from infra.lab.network import why_not

pytestmark = pytest.mark.timeout(300)
needs_links = pytest.mark.skipif(bool(why_not()), reason=f"no links here: {why_not()}")

ECHO = """
import socket
server = socket.create_server(("", 5000))
print("ready", flush=True)
while True:
    connection, _ = server.accept()
    while data := connection.recv(1 << 16):
        connection.sendall(data)
"""
SAY = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), timeout=1) as connection:
    connection.sendall(b"hello")
    assert connection.recv(5) == b"hello"
"""
SEND = """
import socket, sys, threading, time
left = size = int(sys.argv[2])
with socket.create_connection((sys.argv[1], 5000), timeout=30) as connection:
    began = time.monotonic()
    threading.Thread(target=connection.sendall, args=(bytes(size),), daemon=True).start()
    while left:
        left -= len(connection.recv(1 << 16))
print(time.monotonic() - began)
"""


class Hosts:
    """Two or three hosts that echo what is said to them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._echoes = [self._echo(host) for host in range(network.hosts)]

    def _echo(self, host: int) -> subprocess.Popen[str]:
        command = self.network.inside(host, [sys.executable, "-c", ECHO])
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def run(self, host: int, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = self.network.inside(host, [sys.executable, "-c", program, *words])
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def reaches(self, source: int, target: int) -> bool:
        return self.run(source, SAY, self.network.address(target)).returncode == 0

    def seconds(self, source: int, target: int, size: int) -> float:
        return float(self.run(source, SEND, self.network.address(target), str(size)).stdout)

    def close(self) -> None:
        for echo in self._echoes:
            echo.kill()
            echo.communicate()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    network = Network(secrets.token_hex(3), 3)
    network.up()
    try:
        made = Hosts(network)
        try:
            yield made
        finally:
            made.close()
    finally:
        network.down()
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert network.name not in listed


@needs_links
def test_a_link_is_cut_in_one_direction_and_mended(hosts: Hosts) -> None:
    """A word and its echo need both; a third host is reached all the time."""
    network = hosts.network
    assert hosts.reaches(0, 1)
    for source, target in ((0, 1), (1, 0)):
        network.lose(source, target)
        assert not hosts.reaches(0, 1)
        assert not hosts.reaches(1, 0)
        assert hosts.reaches(0, 2)
        assert hosts.reaches(2, 1)
        network.carry(source, target)
        assert hosts.reaches(0, 1)


@needs_links
def test_a_slowed_link_is_as_slow_as_it_is_said(hosts: Hosts) -> None:
    """Half a megabyte there and back at 8 Mbit/s: half a second at least, whatever the machine."""
    hosts.network.slow(1, 8.0)
    assert hosts.seconds(0, 1, 500_000) > 0.45
    hosts.network.full_speed(1)
    assert hosts.reaches(0, 1)


@needs_links
def test_a_network_that_cannot_be_made_leaves_nothing() -> None:
    """Its second host's name is taken."""
    network = Network(secrets.token_hex(3), 2)
    subprocess.run(["ip", "netns", "add", network.namespace(1)], check=True)
    with pytest.raises(LabError, match="File exists"):
        network.up()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert network.name not in listed


@pytest.mark.unit
def test_what_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="there is no lab"):
        Lab.find(root=tmp_path)
    with pytest.raises(LabError, match="a lab has 1 to 64"):
        Lab.up(0, root=tmp_path)


@pytest.mark.unit
@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_lab_that_others_may_have_written_is_none(tmp_path: Path, mode: int) -> None:
    """It names processes to be ended."""
    folder = tmp_path / "concertina-lab-abcdef"
    folder.mkdir(mode=0o700)
    document = {"hosts": [], "cpus": 1, "port": 1, "has_links": False, "lost": [], "off": [], "slowed": {}}
    (folder / "lab.json").write_text(json.dumps(document))
    assert Lab.find(root=tmp_path).name == "abcdef"
    folder.chmod(mode)
    with pytest.raises(LabError, match="there is no lab"):
        Lab.find(root=tmp_path)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "elsewhere" / "lab.json").write_text(json.dumps(document))
    (tmp_path / "concertina-lab-123456").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LabError, match="there is no lab"):
        Lab.find(root=tmp_path)


@pytest.fixture
def root() -> Iterator[Path]:
    """Short, for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.unit
def test_a_folder_too_long_for_rays_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="set TMPDIR to a shorter path"):
        Lab.up(2, root=tmp_path / "very-long")


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.parametrize("with_links", [pytest.param(True, marks=needs_links), False])
def test_hosts_go_and_come_back(root: Path, monkeypatch: pytest.MonkeyPatch, with_links: bool) -> None:
    """Switched off, switched on again, frozen and thawed; another process finds the lab by its folder."""
    if not with_links:
        monkeypatch.setattr("infra.lab.lab.why_not", lambda: "network namespaces need root")
    lab = Lab.up(2, root=root)
    try:
        there = Lab.find(lab.name, root)
        assert (there.address, there.has_links) == (lab.address, with_links)
        there.freeze(1)
        assert Lab.find(root=root).hosts[1].is_frozen
        there.thaw(1)
        below = there.hosts[1].processes()
        assert len(below) > 3, "a raylet and what it starts"
        there.kill(1)
        assert not [process for process in below if process.is_running() and process.status() != "zombie"]
        assert not Lab.find(root=root).hosts[1].is_on
        with pytest.raises(LabError, match="host 1 is off"):
            there.freeze(1)
        there.cut(0, [1])  # what is cut on purpose stays cut when a host is switched on
        there.boot(1)
        assert sorted(there.lost) == ([] if not with_links else [(0, 1), (1, 0)])
        there.connect(1)
        until = time.monotonic() + 60
        while len(there.hosts[1].processes()) < 4 and time.monotonic() < until:
            time.sleep(0.2)
        assert there.hosts[1].is_on
        assert there.lost == []
        if not with_links:
            with pytest.raises(LabError, match="no links of its own"):
                there.slow(1, 10.0)
    finally:
        with suppress(LabError):
            Lab.find(lab.name, root).down()
    assert not lab.folder.exists()
    assert [host for host in lab.hosts if host.is_on] == []
