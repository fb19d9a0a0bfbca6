"""Whom does a node's agent kill? The processes it was told of, never another one that has got their pid."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from actors.agent import NodeAgent
from tests.waiting import wait_until

pytestmark = pytest.mark.unit


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield sleeper
    sleeper.kill()
    sleeper.wait()


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> NodeAgent:
    monkeypatch.setattr(NodeAgent, "_watch_lease", lambda self: None)  # it would end this process
    return NodeAgent("reservation")


def test_a_rank_it_was_told_of(agent: NodeAgent, process: subprocess.Popen[bytes]) -> None:
    agent.renew([process.pid])
    agent.end([process.pid])
    assert process.wait(10) == -9


def test_not_a_process_it_was_never_told_of(agent: NodeAgent, process: subprocess.Popen[bytes]) -> None:
    agent.end([process.pid])
    assert process.poll() is None


def test_not_another_process_with_the_same_pid(agent: NodeAgent, process: subprocess.Popen[bytes]) -> None:
    agent.renew([process.pid])
    agent._started[process.pid] -= 30.0  # as if the rank had begun earlier, and ended
    agent.end([process.pid])
    assert process.poll() is None


def test_a_stopped_process_is_proof(agent: NodeAgent, process: subprocess.Popen[bytes]) -> None:
    assert not agent.stopped(process.pid)
    process.send_signal(19)
    wait_until(lambda: agent.stopped(process.pid), bound_s=10)
    process.kill()
    process.wait()
    assert not agent.stopped(process.pid)
