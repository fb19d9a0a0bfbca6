"""Does a run get the machines it wants from Ray's autoscaler, and does it let go of them?

The cluster has one node; a provider of Ray's own adds raylets of this machine when the autoscaler says so.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
import ray
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.sdk import get_cluster_status

from actors.injector import Injector
from concertina.elastic.chaos import parse
from concertina.track.events import EventType
from tests.actors.conftest import Start
from tests.actors.drive import ENDLESS, Drive
from tests.infra.autoscaled import HEAD_CPUS, NODE_CPUS, AutoscaledCluster
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]  # minutes only where other work holds the machine

WANTED = HEAD_CPUS + NODE_CPUS
LEAST = HEAD_CPUS + 1
NothingLeft = Callable[[Drive], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[AutoscaledCluster]:
    """One node of two logical CPUs, which must not be enough."""
    with AutoscaledCluster() as started:
        started.access.connect("tests")
        yield started
        ray.shutdown()


def requested(cluster: AutoscaledCluster) -> list[tuple[dict[str, float], int]]:
    """What Ray's autoscaler is asked to have, whoever uses it."""
    demands = get_cluster_status(cluster.address).resource_demands.cluster_constraint_demand
    return [(dict(each.bundle), each.count) for demand in demands for each in demand.bundles_by_count]


def nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def begins(start: Start, *words: str) -> Drive:
    """A run for which the node there is has not enough: it waits, and gets another one without a word of ours."""
    wanted = [f"cluster.num_workers={WANTED}", f"elastic.min_workers={LEAST}", ENDLESS]
    apart = ["checkpoint.every_steps=100000", "training.eval_every_steps=100000"]
    drive = start(*(word for each in (*wanted, *apart, *words) for word in ("--set", each)))
    drive.said(f"waiting for {WANTED} workers of 1 CPU each: {HEAD_CPUS} fit now on 1 node")
    drive.reaches(3)
    assert [event.data["world"] for event in drive.events(EventType.GENERATION)] == [WANTED]
    return drive


def ends(drive: Drive, cluster: AutoscaledCluster, nothing_left: NothingLeft) -> None:
    """Nothing is wanted any more, and the nodes that came for it go."""
    drive.journal()
    drive.send(signal.SIGINT)
    assert drive.ends() == 103, drive.err
    assert drive.steps()
    nothing_left(drive)
    assert requested(cluster) == []
    wait_until(lambda: nodes() == 1, bound_s=60)


def test_it_waits_until_there_is_another_node(
    start: Start, cluster: AutoscaledCluster, nothing_left: NothingLeft
) -> None:
    drive = begins(start)
    assert requested(cluster) == [({"CPU": 1.0}, WANTED)]
    ends(drive, cluster, nothing_left)


@pytest.mark.soak
def test_what_it_loses_is_replaced(start: Start, cluster: AutoscaledCluster, nothing_left: NothingLeft) -> None:
    """A node dies when somebody else's request has taken the place of the run's own; the next one is there and may not
    be used. Below its minimum the run waits, then it goes on."""
    drive = begins(start, "elastic.rejoin_after_s=3600")
    injector = Injector(drive.run, cluster.access, lambda _: None)
    before = drive.journal()["pids"]
    request_resources(bundles=[])
    injector.carry_out(parse("kill node=1"))
    drive.wait(lambda: drive.states()[-1] == "waiting_for_capacity")
    drive.wait(lambda: drive.recoveries() and drive.recoveries()[-1].world_after == WANTED)
    assert len({*before.items()} & {*drive.journal()["pids"].items()}) == HEAD_CPUS, "who was left has been kept"

    node, lost = max(injector.scene().nodes.values()), set[int]()  # the provider counts its nodes

    def there() -> set[int]:
        return {member for member, where in injector.scene().nodes.items() if where == node} - lost

    while len(lost) < 3:  # elastic.max_losses_per_node
        drive.wait(there)
        for member in there():
            lost.add(member)
            injector.carry_out(parse(f"kill member={member}"))
    drive.wait(lambda: requested(cluster) == [({"CPU": 1.0}, WANTED + NODE_CPUS)])
    drive.wait(lambda: nodes() == 3 and drive.recoveries()[-1].world_after == WANTED)
    ends(drive, cluster, nothing_left)
