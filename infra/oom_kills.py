"""Has the kernel just killed a process for memory, in this process's cgroup? It counts before it kills.

The counter that is nearest is read: `memory.events` of the own cgroup (version 2, which counts what is below it too),
`memory.oom_control` (version 1), else the machine's in /proc/vmstat. None of them says which process it was.
"""

from __future__ import annotations

import threading
from pathlib import Path

__all__ = ["OomKills"]


class OomKills:
    """Kills since the look before the last one: `look` is called once in a while, and older ones are forgotten."""

    def __init__(self, cgroups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> None:
        self._mutex = threading.Lock()
        self._counter = next((path for path in _candidates(cgroups, proc) if _read(path) is not None), None)
        self._before = self._latest = self._count()

    @property
    def is_supported(self) -> bool:
        """Whether there is any counter."""
        return self._counter is not None

    def look(self) -> None:
        """What was counted before the last look is nobody's any more."""
        with self._mutex:
            self._before, self._latest = max(self._before, self._latest), self._count()

    def take(self) -> bool:
        """Whether there is a kill that nobody has taken yet: one for each caller."""
        with self._mutex:
            if self._count() <= self._before:
                return False
            self._before += 1
            return True

    def _count(self) -> int:
        return (_read(self._counter) or 0) if self._counter is not None else 0


def _candidates(cgroups: Path, proc: Path) -> list[Path]:
    """In a container the folder may be the own cgroup already, while the path is still the machine's."""
    found = []
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers:
            found += [cgroups / own.lstrip("/") / "memory.events", cgroups / "memory.events"]
        elif "memory" in controllers.split(","):
            place = cgroups / "memory"
            found += [place / own.lstrip("/") / "memory.oom_control", place / "memory.oom_control"]
    return [*found, proc / "vmstat"]


def _read(path: Path) -> int | None:
    """The line `oom_kill N`; None where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
