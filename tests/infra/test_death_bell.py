"""Is a killed process known to be dead at once, however much memory it has?"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.assignment import bell_name
from infra.death_bell import DeathBell, is_supported
from tests.actors.drive import environment

pytestmark = [pytest.mark.unit, pytest.mark.skipif(not is_supported(), reason="no robust mutexes here")]

HOLDER = """
import os, sys, threading, time
from infra.death_bell import DeathBell
def hold():
    bell = DeathBell(sys.argv[1].format(pid=os.getpid()))
    bell.hang()
    print("hung", flush=True)
    time.sleep(600)
threading.Thread(target=hold).start()
"""


@pytest.fixture
def name() -> Iterator[str]:
    chosen = f"concertina-test-{secrets.token_hex(4)}"
    yield chosen
    Path("/dev/shm", chosen).unlink(missing_ok=True)


def holder(name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, name], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hung\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_it_rings_when_its_holder_dies(name: str, number: signal.Signals) -> None:
    process = holder(name)
    bell = DeathBell(name)
    assert not bell.listen(0.3)
    assert not bell.path.exists(), "both have it: no file is left behind"
    os.kill(process.pid, number)
    assert bell.listen(20)
    process.wait(20)


def test_it_is_listened_to_until_it_rings(name: str) -> None:
    process = holder(name)
    threading.Timer(0.5, process.kill).start()
    assert DeathBell(name).listen_on(hung_within_s=0.2, look_s=0.1)
    process.wait(20)


def test_who_comes_second_does_not_wait_for_ever(name: str) -> None:
    """An agent that is started again: its predecessor has taken the file away."""
    process = holder(name)
    assert not DeathBell(name).listen(0.1)
    assert not DeathBell(name).listen_on(hung_within_s=0.3, look_s=0.1)
    process.kill()
    process.wait(20)


def test_a_stopped_holder_is_not_dead(name: str) -> None:
    process = holder(name)
    bell = DeathBell(name)
    os.kill(process.pid, signal.SIGSTOP)
    assert not bell.listen(0.5)
    process.kill()
    assert bell.listen(20)
    process.wait(20)


def test_one_that_is_not_hung_yet_does_not_ring(name: str) -> None:
    bell = DeathBell(name)
    assert not bell.listen(0.3)
    process = holder(name)
    assert not bell.listen(0.3)
    process.kill()
    assert bell.listen(20)
    process.wait(20)


def test_it_rings_before_the_memory_is_gone(name: str) -> None:
    """The process still exists when the bell rings: that is what it is for. (How much earlier is a benchmark's.)"""
    program = HOLDER.replace("import sys", "ballast = bytearray(b'x') * (600 << 20)\nimport sys")
    process = subprocess.Popen(
        [sys.executable, "-c", program, name], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "hung\n"
    bell = DeathBell(name)
    assert not bell.listen(0.3)
    began = time.monotonic()
    process.kill()
    assert bell.listen(20)
    rang_s = time.monotonic() - began
    process.wait(20)
    print(f"rang after {rang_s * 1e3:.1f} ms, gone after {(time.monotonic() - began) * 1e3:.1f} ms")
    assert rang_s < time.monotonic() - began


def test_one_that_died_unheard_is_not_taken_for_the_next_of_its_number(name: str) -> None:
    """As when a coordinator is started again that had not written its members down."""
    session = name.removeprefix("concertina-")
    pattern = bell_name(session, 0, 4711).replace("4711", "{pid}")
    first, second = holder(pattern), holder(pattern)
    first.kill()
    first.wait(20)
    try:
        assert not DeathBell(bell_name(session, 0, second.pid)).listen(0.3)
    finally:
        second.kill()
        second.wait(20)
        DeathBell(bell_name(session, 0, first.pid)).take_down()
