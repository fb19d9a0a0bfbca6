"""A run is broken on purpose, in every way we know: does it go on, and is it still the same run?

The oracle is one process alone that trains the same job: same losses, each step once, whoever was killed meanwhile.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from concertina.elastic.chaos import parse
from concertina.state.manifest import list_checkpoints, verify
from concertina.track.events import EventType
from infra import LocalCluster
from tests.actors.conftest import Start
from tests.actors.drive import alive
from tests.actors.stage import BOUND_S, FOUR, NO_CHECKPOINT, PATIENT, NothingLeft, Reference, Stage, trained_alone
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # minutes only where other work holds the machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three nodes of two logical CPUs of these tests' own: some of them die."""
    with LocalCluster.start(num_nodes=3, cpus_per_node=2) as started:
        started.access.connect("tests")
        yield started
        ray.shutdown()


@pytest.fixture(scope="module")
def reference(ground: Path) -> Reference:
    return trained_alone(ground)


def test_each_role_is_killed_in_turn(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Rank 0, a rank in the middle, an agent, the coordinator: who is left keeps process and engine, and never starts
    again."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT), cluster)
    for line in ("kill rank=0", "kill rank=2"):
        before, count = stage.engines(), stage.recoveries()
        victim = stage.injector.scene().find(parse(line)).member
        stage.do(line)
        stage.settles(count + 1, 4)  # the loss, and the join of another member
        after = stage.engines()
        assert {m: facts for m, facts in after.items() if m in before} == {
            m: facts for m, facts in before.items() if m != victim
        }
    before, count, pid = stage.engines(), stage.recoveries(), stage.injector.scene().coordinator
    stage.do("kill agent=1")
    stage.do("kill coordinator")
    stage.drive.wait(lambda: stage.injector.scene().coordinator != pid)
    newest = list(stage.drive.steps())[-1]
    stage.drive.wait(lambda: list(stage.drive.steps())[-1] > newest + 3)
    assert stage.engines() == before
    assert stage.recoveries() == count, "ranks trained on meanwhile"
    count = stage.recoveries()
    stage.do("kill rank=1")
    stage.settles(count, None)
    stage.ends_well(reference, nothing_left)


def test_a_node_dies_and_another_comes(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """At a step of the schedule, with the raylet and all that runs below it; out of a pipeline whose stages share each
    sequence."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, "--set", "layout.pp=2", "--set", "layout.cp=2"), cluster)
    count, before = stage.recoveries(), stage.engines()
    step = list(stage.drive.steps())[-1] + 5
    doomed = stage.injector.scene().find(parse("kill node=1")).node
    dead = {m for m, node in stage.injector.scene().nodes.items() if node == doomed}
    stage.do(f"kill node=1 step={step}")
    assert stage.strikes[-1].what == f"killed node {doomed[:8]}"
    told = stage.command("join")
    assert (told["injection"], told["run_id"]) == ("join", stage.drive.run.run_id)
    stage.settles(count + 1, 4)
    kept = {member: facts for member, facts in stage.engines().items() if member in before}
    assert kept == {member: facts for member, facts in before.items() if member not in dead}
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
def test_a_frozen_rank_that_thaws_is_nobody(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Its node's agent is frozen as well, so that nobody ends it while it stands: it wakes up, in the middle of what it
    did, while the others go on without it."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT), cluster)
    count, before = stage.recoveries(), stage.engines()
    victim = stage.injector.scene().find(parse("freeze rank=1"))
    agent = stage.agent(victim.node)
    try:
        for pid in (agent, victim.pid):
            os.kill(pid, signal.SIGSTOP)
        stage.drive.wait(lambda: stage.drive.states()[-1] == "recovering", BOUND_S)
        os.kill(victim.pid, signal.SIGCONT)
    finally:
        os.kill(agent, signal.SIGCONT)
    stage.settles(count, 4)  # another one is in its place
    after = stage.engines()
    assert {m: facts for m, facts in after.items() if m in before} == {
        m: facts for m, facts in before.items() if m != victim.member
    }
    assert len(after) == 4
    wait_until(lambda: not alive({victim.pid}), 30)
    stage.ends_well(reference, nothing_left)


PHASES = ("halted", "preparing", "prepared", "moving", "verified", "adopted")


@pytest.mark.parametrize("phases", [("prepared", "verified"), pytest.param(PHASES, marks=pytest.mark.soak)])
@pytest.mark.parametrize("deed", ["kill", pytest.param("freeze", marks=pytest.mark.soak)])
def test_a_second_loss_in_each_phase_of_a_recovery(
    phases: tuple[str, ...],
    deed: str,
    start: Start,
    cluster: LocalCluster,
    reference: Reference,
    nothing_left: NothingLeft,
) -> None:
    """Both copies of nothing are lost: nothing is done again, whenever the second one falls."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, *PATIENT), cluster)
    for phase in phases:
        count, before = stage.recoveries(), stage.engines()
        first, second = stage.pair(fatal=False)
        fuse = stage.lay(f"{deed} member={second} phase={phase}")
        stage.do(f"kill member={first}")
        fuse.join(BOUND_S)
        assert not fuse.is_alive(), phase
        stage.settles(count, 4)
        kept = {member: facts for member, facts in stage.engines().items() if member in before}
        assert kept == {member: facts for member, facts in before.items() if member not in (first, second)}, phase
    assert stage.drive.events(EventType.ROLLBACK) == []
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
@pytest.mark.parametrize("fatal", [False, True])
def test_two_at_once(
    fatal: bool, start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Where both owned the two copies of something it goes back to a checkpoint, and says so."""
    stage = Stage(start(*FOUR, *PATIENT), cluster)
    stage.drive.wait(lambda: stage.drive.events(EventType.CHECKPOINT))
    count, before = stage.recoveries(), stage.engines()
    victims = stage.pair(fatal)
    # Some steps after a checkpoint: there is something to give up.
    stage.drive.wait(lambda: 3 <= list(stage.drive.steps())[-1] % 20 <= 12)
    for victim in victims:
        os.kill(before[victim][0], signal.SIGKILL)
    stage.settles(count, 4)
    kept = {member: facts for member, facts in stage.engines().items() if member in before}
    assert kept == {member: facts for member, facts in before.items() if member not in victims}
    rollbacks = stage.drive.events(EventType.ROLLBACK)
    assert [event.data["to_step"] % 20 for event in rollbacks] == [0] * fatal
    if fatal:
        stage.drive.said(f"rolled back to the checkpoint of step {rollbacks[0].data['to_step']}")
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
def test_too_few_and_back_again(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Below elastic.min_workers it waits, with all that survivors hold. What they hold is a checkpoint soon: that the
    rest are lost as well, one node and four members of two others, costs no step."""
    words = ("--set", "cluster.num_workers=6", "--set", "elastic.min_workers=6")
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, *PATIENT, *words), cluster)
    drive, count, before = stage.drive, stage.recoveries(), stage.engines()
    victim = stage.injector.scene().find(parse("kill rank=3")).member
    stage.do("kill rank=3")
    drive.said("waiting for capacity: 5 members are there, elastic.min_workers=6")
    stage.settles(count, 6)
    kept = {member: facts for member, facts in stage.engines().items() if member in before}
    assert kept == {member: facts for member, facts in before.items() if member != victim}
    assert drive.states()[-1] == "training"

    count, before = stage.recoveries(), stage.engines()
    stage.do("kill node=1")
    drive.wait(lambda: drive.states()[-1] == "waiting_for_capacity")
    drive.wait(lambda: drive.events(EventType.CHECKPOINT)[-1].step == list(drive.steps())[-1])
    last = list(drive.steps())[-1]
    assert verify(list_checkpoints(drive.run.checkpoints)[-1]).step == last
    drive.said(f"; its checkpoint is of step {last}")
    for pid in stage.injector.scene().pids.values():
        os.kill(pid, signal.SIGKILL)
    stage.do("join")
    stage.settles(count, 6)
    assert drive.recoveries()[-1].step == last
    assert not {*before.items()} & {*stage.engines().items()}
    assert drive.events(EventType.ROLLBACK) == []
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
@pytest.mark.parametrize("least", [1, 4])
def test_stopped_while_it_recovers(
    least: int, start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Ctrl-C keeps what has been trained, also where too few are left to go on."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, "--set", f"elastic.min_workers={least}"), cluster)
    stage.do("kill rank=2")
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
def test_a_node_that_flaps_is_left_alone(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Its members are killed as soon as they have a seat: after three losses it gets none."""
    words = ("--set", "elastic.max_losses_per_node=3", "--set", "elastic.rejoin_after_s=3600")
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, *words), cluster)
    node = stage.injector.scene().order[2]

    def there() -> list[int]:
        scene = stage.injector.scene()
        return [member for member in stage.seating().members if scene.nodes.get(member) == node]

    lost: set[int] = set()
    while len(lost) < 3:
        stage.drive.wait(lambda: set(there()) - lost, BOUND_S)
        for member in set(there()) - lost:
            lost.add(member)
            stage.do(f"kill member={member}")
    stage.settles(3, 4)
    assert not [m for m, where in stage.injector.scene().nodes.items() if where == node]
    assert len(stage.injector.scene().pids) == 4, "nobody beyond those wanted"
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
def test_two_nodes_join_at_once(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Two of three nodes die one after the other, and come back together: one change takes them all in."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, *PATIENT, "--set", "cluster.num_workers=6"), cluster)
    for world in (4, 2):
        count = stage.recoveries()
        stage.do("kill node=1")
        stage.settles(count, world)
    count, before = stage.recoveries(), stage.engines()
    pair = [threading.Thread(target=stage.do, args=("join",)) for _ in range(2)]
    for thread in pair:
        thread.start()
    stage.settles(count, 6)
    assert {member: facts for member, facts in stage.engines().items() if member in before} == before
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
@pytest.mark.parametrize("phase", ["checkpoint", "validation"])
def test_a_loss_between_two_steps(
    phase: str, start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """The step before it is applied, and stays. What it broke is done again: of checkpoints and validations there are
    all, each once."""
    kind, key = {
        "checkpoint": (EventType.CHECKPOINT, "checkpoint.every_steps"),
        "validation": (EventType.EVAL, "training.eval_every_steps"),
    }[phase]
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, "--set", f"{key}=20"), cluster)
    count, before = stage.recoveries(), stage.engines()
    victim = stage.injector.scene().find(parse("kill rank=2")).member
    stage.do(f"kill member={victim} phase={phase}")
    stage.settles(count, 4)
    kept = {member: facts for member, facts in stage.engines().items() if member in before}
    assert kept == {member: facts for member, facts in before.items() if member != victim}
    step = stage.drive.recoveries()[count].step
    assert step % 20 == 0, "it fell when the step was done"
    stage.drive.wait(lambda: [e for e in stage.drive.events(kind) if (e.step or 0) > step])
    assert stage.drive.events(EventType.ROLLBACK) == []
    stage.ends_well(reference, nothing_left)
    found = [event.step for event in stage.drive.events(kind) if event.step is not None and event.step % 20 == 0]
    assert found == list(range(20, found[-1] + 1, 20))


@pytest.mark.soak
def test_a_node_that_goes_and_comes_back_twice(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Whoever is on other nodes keeps process and engine."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT, *PATIENT), cluster)
    count, before, scene = stage.recoveries(), stage.engines(), stage.injector.scene()
    safe = {member: before[member] for member in before if scene.nodes[member] == scene.order[0]}
    assert safe, "the head has members"
    stage.do("flap node=1 times=2 every=15")
    what = [strike.what.split()[0] for strike in stage.strikes]
    assert what == ["killed", "node", "killed", "node"]
    stage.settles(count + 1, 4)
    assert {member: facts for member, facts in stage.engines().items() if member in safe} == safe
    assert stage.drive.events(EventType.ROLLBACK) == []
    stage.ends_well(reference, nothing_left)


@pytest.mark.soak
def test_frozen_for_a_moment_and_for_good(
    start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Who thaws before it is given up goes on where it was."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT), cluster)
    count, before = stage.recoveries(), stage.engines()
    victim = stage.injector.scene().find(parse("freeze rank=1")).member
    stage.do("freeze rank=1 after=0.5")
    stage.do(f"thaw member={victim}")
    assert [strike.what.split()[0] for strike in stage.strikes] == ["froze", "thawed"]
    newest = list(stage.drive.steps())[-1]
    stage.drive.wait(lambda: list(stage.drive.steps())[-1] > newest + 10)
    assert (stage.engines(), stage.recoveries(), stage.drive.lost()) == (before, count, {})

    stage.do("freeze rank=1 after=0.5")
    stage.settles(count, 4)
    assert {m: why.split(":")[0] for m, why in stage.drive.lost().items()} == {victim: "frozen"}
    assert {m: facts for m, facts in stage.engines().items() if m in before} == {
        m: facts for m, facts in before.items() if m != victim
    }
    stage.ends_well(reference, nothing_left)


def spares(stage: Stage) -> set[int]:
    """Members that could be seated and have no rank."""
    scene = stage.injector.scene()
    return scene.pids.keys() - set(scene.ranks)


def standbys(stage: Stage) -> set[int]:
    """Processes beside the members, which have no room of their own and are not members yet."""
    return stage.named() - stage.injector.scene().pids.keys()


@pytest.mark.soak
@pytest.mark.parametrize(("key", "waiting", "number"), [("spares", spares, 1), ("standbys_per_node", standbys, 2)])
def test_who_waits_takes_the_place(
    key: str,
    waiting: Callable[[Stage], set[int]],
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
