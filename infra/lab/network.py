"""How do several hosts on one machine get a network of their own? One namespace a host, a switch in another, and a
link between the two that can be cut in either direction or slowed.

Nothing of it is seen outside: the switch is connected to nothing else. What is cut is lost silently, as on a real
network: a host that drops frames for another sends them to a hardware address nobody has. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from concertina.errors import ConcertinaError

__all__ = ["LabError", "Network", "why_not"]

_SUBNET = "10.77.0"
_NOBODY = "02:00:00:00:00:ff"
_BURST_MS = 5  # of a slowed link: what tbf lets through at once
_LATENCY = "100ms"  # what it queues before it drops
_BOUND_S = 10.0


class LabError(ConcertinaError):
    """The lab cannot do that; the message says why, and what to do."""

    exit_code = 2


def why_not() -> str:
    """Why this process can make no network namespaces; empty when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found: install iproute2" if missing else ""


@dataclass(frozen=True)
class Network:
    """Hosts 0 to `hosts` - 1 of the lab `name`; the value alone says how everything is called."""

    name: str
    hosts: int

    def namespace(self, host: int) -> str:
        return f"clab-{self.name}-{host}"

    @property
    def _switch(self) -> str:
        return f"clab-{self.name}-sw"

    @staticmethod
    def address(host: int) -> str:
        return f"{_SUBNET}.{host + 1}"

    @staticmethod
    def _hardware(host: int) -> str:
        return f"02:00:00:00:00:{host + 1:02x}"

    def inside(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    # -- there and gone -----------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Raises LabError, and leaves nothing then."""
        if problem := why_not():
            raise LabError(f"no lab with links here: {problem}")
        try:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "br0", "up")
            for host in range(self.hosts):
                self._plug_in(host)
        except BaseException:
            self.down()
            raise

    def _plug_in(self, host: int) -> None:
        space, port = self.namespace(host), f"h{host}"
        _run("ip", "netns", "add", space)
        end = ["name", "eth0", "address", self._hardware(host), "netns", space]
        _run("ip", "-n", self._switch, "link", "add", port, "type", "veth", "peer", *end)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")

    def down(self) -> None:
        """Links go with their namespaces. What is gone already is passed over."""
        for space in (self._switch, *map(self.namespace, range(self.hosts))):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=_BOUND_S, check=False)

    # -- what may happen to a network ---------------------------------------------------------------------------------

    def lose(self, source: int, target: int) -> None:
        """What `source` sends to `target` is lost from now on; the other direction stays."""
        self._send_to(source, target, _NOBODY)

    def carry(self, source: int, target: int) -> None:
        """It arrives again."""
        self._send_to(source, target, self._hardware(target))

    def _send_to(self, source: int, target: int, hardware: str) -> None:
        what = [self.address(target), "lladdr", hardware, "dev", "eth0", "nud", "permanent"]
        _run("ip", "-n", self.namespace(source), "neigh", "replace", *what)

    def processes(self, host: int) -> list[int]:
        """All that run on a host."""
        command = ["ip", "netns", "pids", self.namespace(host)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BOUND_S, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def slow(self, host: int, mbit: float) -> None:
        """The link of a host, both directions, carries so many megabits a second."""
        burst = max(3000, round(mbit * 1e6 / 8 * _BURST_MS / 1e3))
        for space, device in self._ends(host):
            shape = ["rate", f"{mbit * 1e6:.0f}bit", "burst", str(burst), "latency", _LATENCY]
            _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *shape)

    def full_speed(self, host: int) -> None:
        """As it was."""
        for space, device in self._ends(host):
            command = ["tc", "-n", space, "qdisc", "delete", "dev", device, "root"]
            subprocess.run(command, capture_output=True, timeout=_BOUND_S, check=False)  # it may not have been slow

    def _ends(self, host: int) -> list[tuple[str, str]]:
        return [(self.namespace(host), "eth0"), (self._switch, f"h{host}")]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BOUND_S, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
