"""Hosts are cut off in every way, slowed, frozen and lose their power: does the greater part go on, and is what was cut
off nobody when it comes back? On the lab's hosts, each with a network of its own."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from concertina.state.manifest import list_checkpoints, read_manifest
from concertina.track.events import EventType
from infra.lab import Lab
from infra.lab.network import why_not
from tests.actors.drive import Drive, alive, write_job
from tests.actors.stage import FOUR, NO_CHECKPOINT, PATIENT, Reference, trained_alone
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=f"no links here: {why_not()}"),
]

BOUND_S = 120.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Four hosts of one logical CPU."""
    made = Lab.up(4, cpus=1)
    yield made
    made.down()


@pytest.fixture(scope="module")
def ground() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="concertina-partitions-"))
    write_job(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def reference(ground: Path) -> Reference:
    return trained_alone(ground)


@pytest.fixture
def drive(ground: Path, tmp_path: Path, lab: Lab) -> Iterator[Drive]:
    """A run on all hosts, with pipeline stages and chunks of each sequence."""
    words = [str(ground / "tiny.yaml"), *FOUR, *NO_CHECKPOINT, *PATIENT, "--set", "layout.pp=2", "--set", "layout.cp=2"]
    made = Drive(tmp_path / "driver", words, ground / "runs", lab=lab)
    made.reaches(3)
    yield made
    made.clean_up()
    for host in lab.hosts:
        lab.connect(host.number)
        lab.full_speed(host.number)


def world(drive: Drive) -> int:
    """Ranks of the newest generation."""
    return int(drive.events(EventType.GENERATION)[-1].data["world"])


def goes_on(drive: Drive, after: int, ranks: int) -> None:
    """More than `after` recoveries, so many ranks, and steps that follow."""
    drive.wait(lambda: len(drive.recoveries()) > after and world(drive) == ranks, BOUND_S)
    newest = list(drive.steps())[-1]
    drive.wait(lambda: list(drive.steps())[-1] > newest + 3, BOUND_S)


def processes(drive: Drive) -> dict[int, int]:
    return {int(member): int(pid) for member, pid in drive.journal()["pids"].items()}


def ends_well(drive: Drive, reference: Reference) -> None:
    """With a checkpoint of its last step, every step once, and as one process alone does them."""
    processes(drive)
    drive.send(signal.SIGINT)
    assert drive.ends() == 103, drive.err
    found = drive.steps()
    assert found == pytest.approx(reference(len(found)), rel=1e-10, abs=0)
    assert read_manifest(list_checkpoints(drive.run.checkpoints)[-1]).step == list(found)[-1]
    assert drive.events(EventType.ROLLBACK) == [], "nothing was done again"
    wait_until(lambda: not alive(drive.pids), 60)


WAYS = {
    "both": {},
    "out": {"hears": False},
    "in": {"sends": False},
    "from the coordinator": {"others": [0]},
}


def test_cut_off_in_every_way_and_back(drive: Drive, lab: Lab, reference: Reference) -> None:
    for number, (way, how) in enumerate(WAYS.items()):
        host, before, count = 1 + number % 3, processes(drive), len(drive.recoveries())
        lab.cut(host, **how)  # type: ignore[arg-type]
        goes_on(drive, count, 3)
        (lost,) = before.keys() - processes(drive).keys() or [None]
        assert lost is not None, f"{way}: nobody was given up"
        lab.connect(host)
        goes_on(drive, count + 1, 4)
        wait_until(lambda pid=before[lost]: not alive({pid}), 90)  # type: ignore[misc]
        assert processes(drive).items() >= {m: pid for m, pid in before.items() if m != lost}.items()
    ends_well(drive, reference)


def test_cut_off_until_ray_gives_the_node_up(drive: Drive, lab: Lab, reference: Reference) -> None:
    """Its raylet ends itself when it hears of that, and another one joins."""
    count = len(drive.recoveries())
    lab.cut(2)
    goes_on(drive, count, 3)
    drive.wait(lambda: "its node died" in drive.err or "is gone" in _log(drive), BOUND_S)
    lab.connect(2)
    goes_on(drive, count + 1, 4)
    ends_well(drive, reference)


def test_two_that_reach_everybody_but_each_other(drive: Drive, lab: Lab, reference: Reference) -> None:
    """The coordinator hears all; nobody makes a step. One of the two goes, and comes back when the link is whole."""
    count = len(drive.recoveries())
    lab.cut(1, [2])
    goes_on(drive, count, 3)
    assert any("unreachable" in reason for reason in drive.lost().values())
    lab.connect(1)
    goes_on(drive, count + 1, 4)
    ends_well(drive, reference)


def test_power_lost_frozen_and_slow(drive: Drive, lab: Lab, reference: Reference) -> None:
    count = len(drive.recoveries())
    lab.kill(3)
    goes_on(drive, count, 3)
    lab.boot(3)
    goes_on(drive, count + 1, 4)
    count = len(drive.recoveries())
    lab.freeze(2)
    goes_on(drive, count, 3)
    lab.thaw(2)
    goes_on(drive, count + 1, 4)
    count = len(drive.recoveries())
    lab.slow(1, 1.0)
    newest = list(drive.steps())[-1]
    drive.wait(lambda: list(drive.steps())[-1] > newest + 10, BOUND_S)
    assert len(drive.recoveries()) == count, "who is only slow is waited for"
    ends_well(drive, reference)


def test_a_machine_that_is_shut_down_hands_over_first(drive: Drive, lab: Lab, reference: Reference) -> None:
    """SIGTERM to `ray start`, as a machine's shutdown sends it: Ray drains the node, and its member leaves in order."""
    count = len(drive.recoveries())
    os.kill(lab.hosts[3].pid, signal.SIGTERM)
    goes_on(drive, count, 3)
    assert drive.recoveries()[count].cause.reason == "notice"
    wait_until(lambda: not lab.hosts[3].is_on, 60)
    assert drive.lost() == {}
    lab.boot(3)
    goes_on(drive, count + 1, 4)
    ends_well(drive, reference)


def _log(drive: Drive) -> str:
    return (drive.run.path / "logs" / "coordinator.log").read_text()
