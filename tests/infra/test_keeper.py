"""Does a local cluster end in order when its driver, or its keeper, is killed?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra import LocalCluster
from infra.keeper_spec import CLUSTER_FILE, FOLDER_PREFIX, TOKEN_FILE, KeeperReport
from tests.infra.sockets import tree
from tests.waiting import wait_until

pytestmark = pytest.mark.ray


class Scene:
    """A driver with its cluster, and everything that runs below the keeper."""

    def __init__(self, namespace: str, until: Path) -> None:
        command = [sys.executable, "-m", "tests.infra.driver_program", namespace, str(until)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.driver.stdout is not None
        facts = json.loads(self.driver.stdout.readline())
        self.keeper = psutil.Process(facts["keeper_pid"])
        self.actor = psutil.Process(facts["actor_pid"])
        self.folder = Path(facts["folder"])
        self.processes = tree(self.keeper.pid)

    def kill_driver(self) -> None:
        self.driver.kill()
        self.driver.wait()

    def living(self) -> list[psutil.Process]:
        return [process for process in self.processes if is_there(process)]


def is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def until(tmp_path: Path) -> Iterator[Path]:
    """The file whose appearance ends the actor; made at the end in any case."""
    yield tmp_path / "until"
    (tmp_path / "until").touch()


def test_killed_driver_our_actor_finishes_first(until: Path) -> None:
    scene = Scene("concertina-demo", until)
    scene.kill_driver()
    with pytest.raises(TimeoutError):
        wait_until(lambda: not is_there(scene.keeper) or not is_there(scene.actor), bound_s=2)
    until.touch()
    wait_until(lambda: not is_there(scene.actor))
    wait_until(lambda: not scene.living())
    wait_until(lambda: not scene.folder.exists())


def test_killed_driver_nobody_waits_for_a_strange_actor(until: Path) -> None:
    scene = Scene("somebody", until)
    scene.kill_driver()
    wait_until(lambda: not scene.living() and not scene.folder.exists())
    assert not until.exists()


@pytest.mark.parametrize("which", ["guard", "keeper proper"])
def test_killed_keeper_leaves_nothing(until: Path, which: str) -> None:
    scene = Scene("concertina-demo", until)
    victim = scene.keeper if which == "guard" else scene.keeper.children()[0]
    victim.send_signal(signal.SIGKILL)
    wait_until(lambda: not scene.living() and not scene.folder.exists())
    scene.kill_driver()


def test_a_folder_nobody_keeps_is_swept(tmp_path: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    stale, young, foreign = (root / f"{FOLDER_PREFIX}{name}" for name in ("stale", "young", "foreign"))
    for folder in (stale, young, foreign):
        folder.mkdir()
    for folder in (stale, young):
        (folder / TOKEN_FILE).touch()
    long_gone = KeeperReport(keeper_pid=os.getpid(), keeper_started_s=1.0)
    (stale / CLUSTER_FILE).write_text(long_gone.to_json())
    LocalCluster.start(num_nodes=1, cpus_per_node=1, temp_root=root).stop()
    assert set(os.listdir(root)) == {young.name, foreign.name}
    shutil.rmtree(root)


def test_interrupt_at_the_terminal_does_not_reach_the_keeper(until: Path) -> None:
    scene = Scene("concertina-demo", until)
    assert os.getsid(scene.keeper.pid) == scene.keeper.pid
    assert os.getsid(scene.keeper.pid) != os.getsid(scene.driver.pid)
    scene.keeper.send_signal(signal.SIGINT)
    wait_until(lambda: not scene.living() and not scene.folder.exists())
    scene.kill_driver()
