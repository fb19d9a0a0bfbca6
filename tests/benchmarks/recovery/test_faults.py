"""Does a node that is frozen stand still with all that is below it?"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.recovery.faults import freeze_node
from tests.waiting import wait_until

pytestmark = pytest.mark.unit


class Node:
    """What we ask of one of Ray's: its processes, of which one has started others."""

    def __init__(self) -> None:
        self.raylet = subprocess.Popen(["sh", "-c", "sh -c 'sleep 300 & wait' & sleep 300 & wait"])
        self.log_monitor = subprocess.Popen(["sleep", "300"])

    def live_processes(self) -> list[tuple[str, subprocess.Popen[bytes]]]:
        return [("log_monitor", self.log_monitor), ("raylet", self.raylet)]

    @property
    def tree(self) -> list[psutil.Process]:
        roots = [psutil.Process(process.pid) for _, process in self.live_processes()]
        return roots + [child for root in roots for child in root.children(recursive=True)]


@pytest.fixture
def node() -> Iterator[Node]:
    found = Node()
    wait_until(lambda: len(found.tree) == 5)
    tree = found.tree
    yield found
    for process in tree:
        process.kill()
    psutil.wait_procs(tree, timeout=10)


def test_all_of_it_stands_still(node: Node) -> None:
    fault = freeze_node(node)
    assert fault.kind == "node frozen"
    assert sorted(fault.pids) == sorted(process.pid for process in node.tree)
    wait_until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in node.tree))
