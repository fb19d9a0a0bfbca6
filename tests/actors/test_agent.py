"""Whom does a node's agent kill? The processes it was told of, never another one that has got their pid."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from actors.agent import Wards

pytestmark = pytest.mark.unit


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield sleeper
    sleeper.kill()
    sleeper.wait()


def test_a_rank_it_was_told_of(process: subprocess.Popen[bytes]) -> None:
    wards = Wards()
    wards.are([process.pid])
    assert not wards.all_gone
    wards.end()
    assert process.wait(10) == -9
    assert wards.all_gone


def test_not_a_process_it_was_never_told_of(process: subprocess.Popen[bytes]) -> None:
    Wards().end([process.pid])
    assert process.poll() is None


def test_not_another_process_with_the_same_pid(process: subprocess.Popen[bytes]) -> None:
    wards = Wards()
    wards.are([process.pid])
    wards._started[process.pid] -= 30.0  # as if the rank had begun earlier, and ended
    wards.end([process.pid])
    assert process.poll() is None
    assert wards.all_gone
