"""Nodes are told that they will go: is the run gone from them in time, with everything it has, and nobody lost?"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from concertina.elastic.account import Bucket
from concertina.elastic.chaos import parse
from concertina.state.manifest import list_checkpoints, read_manifest
from concertina.track.events import EventType
from concertina.track.recovery import MemberNews, MemberWhat
from infra import LocalCluster
from tests.actors.conftest import Start
from tests.actors.drive import environment
from tests.actors.stage import BOUND_S, FOUR, NO_CHECKPOINT, NothingLeft, Reference, Stage, trained_alone
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # minutes only where other work holds the machine

PIECES = ("--set", "layout.pp=2", "--set", "layout.cp=2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three nodes of two logical CPUs of these tests' own: some of them go."""
    with LocalCluster.start(num_nodes=3, cpus_per_node=2) as started:
        started.access.connect("tests")
        yield started
        ray.shutdown()


@pytest.fixture(scope="module")
def reference(ground: Path) -> Reference:
    return trained_alone(ground)


def on(stage: Stage, node: int) -> tuple[str, set[int]]:
    """The id of a node, and the members that are there."""
    scene = stage.injector.scene()
    found = scene.find(parse(f"notice node={node}")).node
    return found, {member for member, at in scene.nodes.items() if at == found}


def left(stage: Stage) -> dict[int, float]:
    """Members that left before the run was over, and when."""
    found = {}
    for event in stage.drive.events(EventType.MEMBER):
        news = MemberNews.from_json(event.data)
        if news.what is MemberWhat.LEFT and news.reason:
            found[news.member] = event.ts_ns / 1e9
    return found


def lives(node: str) -> bool:
    return any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


def causes(stage: Stage) -> list[str]:
    return [recovery.cause.reason for recovery in stage.drive.recoveries()]


def nothing_was_done_again(stage: Stage) -> None:
    assert stage.drive.lost() == {}
    assert stage.drive.events(EventType.ROLLBACK) == []


@pytest.mark.soak
def test_a_node_is_left_before_it_goes_and_nobody_is_lost(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Out of a pipeline whose stages share each sequence; another member takes over where there is room."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, *PIECES), cluster)
    node, members = on(stage, 1)
    assert members
    before = {member: facts for member, facts in stage.engines().items() if member not in members}
    lead_s, at = 16.0, time.time()
    stage.do(f"notice node=1 lead={lead_s:g} cloud=aws")
    stage.drive.wait(lambda: members <= left(stage).keys(), BOUND_S)
    assert max(left(stage).values()) < at + lead_s, "in order, and before its time"
    stage.settles(1, 4)
    assert {member: facts for member, facts in stage.engines().items() if member in before} == before
    wait_until(lambda: not lives(node), BOUND_S)
    assert set(causes(stage)) == {"notice", "join"}
    nothing_was_done_again(stage)
    stage.do("join")
    stage.ends_well(reference, nothing_left)


def test_two_notices_are_one_change_and_what_is_taken_back_returns(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """To the very processes: nothing is started again. All there is room for is in use, so nobody comes instead."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, "--set", "cluster.num_workers=6"), cluster)
    before = stage.engines()
    stage.do("notice node=1 lead=300 cloud=azure")
    stage.do("notice node=2 lead=300 cloud=azure after=3")
    stage.settles(0, 2)
    assert causes(stage) == ["notice"], "one for both"
    stage.do("cancel node=1")
    stage.do("cancel node=2")
    stage.settles(1, 6)
    assert stage.engines() == before
    nothing_was_done_again(stage)
    stage.ends_well(reference, nothing_left)
    assert stage.account().share(Bucket.DRAINING) > stage.account().share(Bucket.SPARE), "who leaves is no spare"


@pytest.mark.soak
def test_a_notice_that_is_taken_back_at_once_stops_nobody(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    stage = Stage(start(*FOUR, *NO_CHECKPOINT), cluster)
    stage.do("notice node=1 lead=60 cloud=azure")
    stage.drive.wait(lambda: len(stage.drive.events(EventType.NOTICE)) == 1)
    stage.do("cancel node=1")
    stage.drive.wait(lambda: len(stage.drive.events(EventType.NOTICE)) == 2)
    newest = list(stage.drive.steps())[-1]
    stage.drive.wait(lambda: list(stage.drive.steps())[-1] > newest + 20)
    assert causes(stage) == []
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
def test_the_node_of_rays_head_goes_the_run_stops_with_a_checkpoint(
    start: Start, cluster: LocalCluster, nothing_left: NothingLeft
) -> None:
    """No run survives Ray's head; no step of it is lost."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT), cluster)
    stage.members()
    at = time.time()
    stage.do("notice node=0 lead=30 cloud=azure")  # Ray takes no drain back, and other tests need the head
    assert stage.drive.ends() == 103, stage.drive.err
    assert time.time() < at + 30
    assert "the node of Ray's head is taken back" in stage.drive.err
    newest = read_manifest(list_checkpoints(stage.drive.run.checkpoints)[-1]).step
    assert newest == list(stage.drive.steps())[-1]
    nothing_left(stage.drive)


@pytest.mark.soak
def test_more_nodes_are_noticed_than_it_can_do_without(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """It trains as long as it can, stops where all of its state is still there, and has written it before they go."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, "--set", "elastic.min_workers=3"), cluster)
    for node in (1, 2):
        stage.do(f"notice node={node} lead=30 cloud=azure")
    stage.drive.wait(lambda: stage.drive.states()[-1] == "waiting_for_capacity", BOUND_S)
    stage.drive.wait(lambda: list_checkpoints(stage.drive.run.checkpoints), BOUND_S)
    steps = stage.drive.steps()
    assert read_manifest(list_checkpoints(stage.drive.run.checkpoints)[-1]).step == list(steps)[-1]
    for node in (1, 2):
        stage.do(f"cancel node={node}")
    stage.settles(0, 4)
    nothing_was_done_again(stage)
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
def test_a_node_that_ray_drains_is_left(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """`ray drain-node`, as an autoscaler or an operator does it; then the machine goes by force."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT), cluster)
    node, members = on(stage, 1)
    assert members
    words = ["drain-node", "--address", cluster.address, "--node-id", node, "--reason-message", "spot"]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "20"]
    command = [sys.executable, "-m", "ray.scripts.scripts", *words]
    around = environment() | cluster.access.environment()
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    stage.drive.wait(lambda: members <= left(stage).keys(), BOUND_S)
    stage.settles(1, 4)
    nothing_was_done_again(stage)
    stage.do("join")
    stage.ends_well(reference, nothing_left)
