"""What does an agent's word about its processes count, when it comes late? A real actor, stopped by a signal."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import ray

from actors.assignment import RunPlan
from actors.hands import Hands, Member
from concertina.config import Job
from concertina.elastic.waits import BOUNDS
from concertina.layout import Layout
from infra import LocalCluster
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


@ray.remote(num_cpus=0)
class Agent:
    """Says of every process that it stands still, until it is told otherwise."""

    def __init__(self) -> None:
        self.standing, self.questions = True, 0

    def stopped(self, pids: list[int]) -> list[int]:
        self.questions += 1
        return pids if self.standing else []

    def facts(self, standing: bool = True) -> tuple[int, int]:
        self.standing = standing
        return os.getpid(), self.questions


def test_an_agent_that_stands_still_is_asked_once_and_its_late_word_counts_nothing(cluster: LocalCluster) -> None:
    plan = RunPlan("a-1", Path(), Path(), Job.model_validate({"name": "a"}), Layout(1), "cpu", "session", "token")
    hands, agent = Hands(plan, ("127.0.0.1", 1), itertools.count(8).__next__), Agent.remote()  # type: ignore[attr-defined]
    pid, _ = ray.get(agent.facts.remote(), timeout=60)
    hands.members, hands.agents = {1: Member(1, "node", None, 11)}, {"node": agent}
    wait_until(lambda: hands.stopped([1]) == {1}, 30)
    _, asked = ray.get(agent.facts.remote(), timeout=30)
    os.kill(pid, signal.SIGSTOP)
    try:
        late = time.monotonic() + BOUNDS["silence"].seconds
        while time.monotonic() <= late:
            assert hands.stopped([1]) == set()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert ray.get(agent.facts.remote(standing=False), timeout=30)[1] == asked + 1
    assert hands.stopped([1]) == set(), "it was so before"
    ray.get(agent.facts.remote(standing=True), timeout=30)
    wait_until(lambda: hands.stopped([1]) == {1}, 30)
    ray.kill(agent)
