"""Somebody waits for the place of one that is lost: does it take it at once, with the process and engine it has?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from concertina.elastic.chaos import parse
from infra import LocalCluster
from tests.actors.conftest import Start
from tests.actors.stage import FOUR, NO_CHECKPOINT, NothingLeft, Reference, Stage, trained_alone

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # minutes only where other work holds the machine

Waiting = Callable[[Stage], set[int]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three nodes of two logical CPUs: room for two members more than have ranks."""
    with LocalCluster.start(num_nodes=3, cpus_per_node=2) as started:
        started.access.connect("tests")
        yield started
        ray.shutdown()


@pytest.fixture(scope="module")
def reference(ground: Path) -> Reference:
    return trained_alone(ground)


def spares(stage: Stage) -> set[int]:
    """Members that could be seated and have no rank."""
    scene = stage.injector.scene()
    return scene.pids.keys() - set(scene.ranks)


def standbys(stage: Stage) -> set[int]:
    """Processes beside the members, which have no room of their own and are not members yet."""
    return stage.named() - stage.injector.scene().pids.keys()


@pytest.mark.parametrize(("key", "waiting", "number"), [("spares", spares, 1), ("standbys_per_node", standbys, 2)])
def test_who_waits_takes_the_place(
    key: str,
    waiting: Waiting,
    number: int,
    start: Start,
    cluster: LocalCluster,
    reference: Reference,
    nothing_left: NothingLeft,
) -> None:
    """In the same change in which the other one is lost: the world is never smaller, and soon somebody waits again."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, "--set", f"elastic.{key}=1"), cluster)
    stage.drive.wait(lambda: len(waiting(stage)) >= number)
    there = {member: stage.engine(member) for member in waiting(stage)}
    count, before = stage.recoveries(), stage.engines()
    victim = stage.injector.scene().find(parse("kill rank=1")).member
    stage.do("kill rank=1")
    stage.settles(count, 4)
    recovery = stage.drive.recoveries()[count]
    assert (recovery.cause.rank, recovery.cause.member) == (1, victim)
    assert (recovery.world_before, recovery.world_after) == (4, 4)
    heir = stage.seating().members[1]
    after = stage.engines()
    assert after[heir] == there[heir], "it was there before"
    assert {member: facts for member, facts in after.items() if member != heir} == {
        member: facts for member, facts in before.items() if member != victim
    }
    stage.drive.wait(lambda: len(waiting(stage)) >= number)
    assert heir not in waiting(stage)
    stage.ends_well(reference, nothing_left)
