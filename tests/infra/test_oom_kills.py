"""Is the counter of the own cgroup found, in both versions, and does each kill count once and not for long?"""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.oom_kills import OomKills

pytestmark = pytest.mark.unit

V2 = ("0::/pod/rank\n", "pod/rank/memory.events", "low 0\noom 9\noom_kill {}\noom_group_kill 7\n")
V2_NAMESPACE = ("0::/pod/rank\n", "memory.events", "oom_kill {}\n")
V1 = ("8:pids:/\n4:memory:/pod\n0::/\n", "memory/pod/memory.oom_control", "oom_kill_disable 0\noom_kill {}\n")
V1_CONTAINER = ("4:cpu,memory:/docker/a\n", "memory/memory.oom_control", "oom_kill {}\n")


class Machine:
    """Files as the kernel has them."""

    def __init__(self, root: Path, own: str, counter: str, text: str) -> None:
        self.cgroups, self.proc = root / "cgroup", root / "proc"
        self.path, self.text = self.cgroups / counter, text
        self.path.parent.mkdir(parents=True)
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(own)
        (self.proc / "vmstat").write_text("nr_free_pages 1\noom_kill 100\n")
        self.counts(3)

    def counts(self, number: int) -> None:
        self.path.write_text(self.text.format(number))

    def kills(self) -> OomKills:
        return OomKills(self.cgroups, self.proc)


@pytest.mark.parametrize("place", [V2, V2_NAMESPACE, V1, V1_CONTAINER])
def test_each_kill_is_somebodys_once(place: tuple[str, str, str], tmp_path: Path) -> None:
    machine = Machine(tmp_path, *place)
    kills = machine.kills()
    assert not kills.take(), "those before are nobody's"
    machine.counts(5)
    assert [kills.take() for _ in range(3)] == [True, True, False]
    machine.counts(6)
    kills.look()
    assert kills.take(), "it may have been counted just before the look"
    kills.look()
    assert not kills.take()


def test_an_old_one_is_forgotten(tmp_path: Path) -> None:
    machine = Machine(tmp_path, *V2)
    kills = machine.kills()
    machine.counts(4)
    kills.look()
    kills.look()
    assert not kills.take()
    machine.counts(5)
    assert kills.take()


def test_without_a_cgroup_the_machines_counter_serves(tmp_path: Path) -> None:
    machine = Machine(tmp_path, *V2)
    machine.path.unlink()
    kills = machine.kills()
    assert not kills.take()
    (machine.proc / "vmstat").write_text("oom_kill 101\n")
    assert kills.take()


def test_where_nothing_counts_nothing_is_said(tmp_path: Path) -> None:
    kills = OomKills(tmp_path, tmp_path)
    assert not kills.is_supported
    kills.look()
    assert not kills.take()
