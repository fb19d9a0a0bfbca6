"""Is the lab broken and mended from the command line, and is what cannot be said in one line? (`concertina lab`)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.lab.network import why_not
from tests.actors.drive import environment

needs_links = pytest.mark.skipif(bool(why_not()), reason=f"no links here: {why_not()}")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Labs of these tests only, in a folder short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp") as name:
        yield Path(name)


def lab(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "lab", *words],
        env=environment() | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status"], "error: there is no lab (there are: none): `concertina lab up` makes one"),
        (["kill", "2", "--lab", "abc"], "error: there is no lab abc (there are: none): `concertina lab up` makes one"),
        (["partition", "1", "--one-way", "up"], "error: --one-way=up: it is in or out"),
    ],
)
def test_refusals_are_one_line(folder: Path, words: list[str], said: str) -> None:
    done = lab(folder, *words)
    assert (done.returncode, done.stderr.strip()) == (2, said)


@needs_links
@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_tour(folder: Path) -> None:
    """As its --help has it, each command once."""
    told = lab(folder, "up", "--hosts", "3", "--mbit", "1000", "-o", "json")
    assert told.returncode == 0, told.stderr
    try:
        assert [host["on"] for host in json.loads(told.stdout)["hosts"]] == [True] * 3
        assert "reaches no longer: 0, 1" in lab(folder, "partition", "2").stdout
        assert "reaches no longer" not in lab(folder, "heal", "2").stdout
        assert "reaches no longer: 0" in lab(folder, "partition", "2", "--from", "0", "--one-way", "out").stdout
        hosts = json.loads(lab(folder, "status", "-o", "json").stdout)["hosts"]
        assert [host["loses_to"] for host in hosts] == [[], [], [0]]
        assert "link of 10 Mbit/s" in lab(folder, "slow", "1").stdout
        assert "frozen" in lab(folder, "freeze", "1").stdout
        assert "frozen" not in lab(folder, "thaw", "1").stdout
        assert "off" in lab(folder, "kill", "2").stdout
        assert lab(folder, "kill", "2").stderr.startswith("error: host 2 is off")
        assert "off" not in lab(folder, "boot", "2").stdout
        assert lab(folder, "exec", "--", "sh", "-c", "echo $RAY_ADDRESS").stdout.strip() == "10.77.0.1:6379"
        assert lab(folder, "exec", "--host", "7", "--", "true").stderr.startswith("error: there is no host 7")
    finally:
        done = lab(folder, "down")
    assert done.returncode == 0
    assert os.listdir(folder) == []
