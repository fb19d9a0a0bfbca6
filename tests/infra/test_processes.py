"""Are processes told apart from their successors, and does a whole tree end, orphans and stopped ones as well?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from infra.processes import is_alive, start_time

pytestmark = pytest.mark.unit

# Leaves an orphan in a session of its own and a stopped child, then ends everything below itself.
PROGRAM = """
import os, signal, subprocess, sys
from datetime import timedelta
from infra.processes import adopt_orphans, end_descendants
adopt_orphans()
shell = subprocess.run(["bash", "-c", "setsid sleep 300 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True)
stopped = subprocess.Popen(["sleep", "300"])
stopped.send_signal(signal.SIGSTOP)
left = end_descendants(timedelta(seconds=10))
print(shell.stdout.strip(), stopped.pid, left)
"""


def test_a_pid_alone_is_not_enough() -> None:
    started = start_time(os.getpid())
    assert started is not None
    assert is_alive(os.getpid(), started)
    assert not is_alive(os.getpid(), started - 100)
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) is None  # a zombie is no process
    child.wait()


def test_the_whole_tree_ends() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=True)
    orphan, stopped, left = run.stdout.split(maxsplit=2)
    assert left.strip() == "[]"
    assert start_time(int(orphan)) is None
    assert start_time(int(stopped)) is None
