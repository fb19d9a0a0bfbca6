"""Why was somebody lost, where only Ray knows it? On a real cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from concertina.elastic.chaos import parse
from concertina.track.events import EventType
from infra import LocalCluster
from tests.actors.conftest import Start
from tests.actors.drive import environment
from tests.actors.stage import BOUND_S, FOUR, NO_CHECKPOINT, NothingLeft, Reference, Stage, trained_alone
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster.start(num_nodes=3, cpus_per_node=2) as started:
        started.access.connect("tests")
        yield started
        ray.shutdown()


@pytest.fixture(scope="module")
def reference(ground: Path) -> Reference:
    return trained_alone(ground)


def test_a_node_that_is_taken_back(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Ray was told of it, and that the machine goes by force; when it is gone, its members were preempted."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT), cluster)
    count, scene = stage.recoveries(), stage.injector.scene()
    doomed = stage.injector.scene().find(parse("kill node=1")).node
    dead = {member for member, node in scene.nodes.items() if node == doomed}
    assert dead
    words = ["drain-node", "--address", cluster.address, "--node-id", doomed, "--reason-message", "spot"]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "1"]
    command = [sys.executable, "-m", "ray.scripts.scripts", *words]
    done = subprocess.run(
        command, env=environment() | cluster.access.environment(), capture_output=True, text=True, timeout=BOUND_S
    )
    assert done.returncode == 0, done.stderr
    stage.do("kill node=1 after=2")
    stage.settles(count)
    wait_until(lambda: {stage.drive.lost().get(m, "").split(":")[0] for m in dead} == {"preempted"}, 60)
    assert stage.drive.events(EventType.ROLLBACK) == []
    stage.ends_well(reference, nothing_left)
