"""A run is broken on purpose, in every way we know: does it go on, and is it still the same run?

The oracle is one process alone that trains the same job: same losses, each step once, whoever was killed meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from actors.assignment import agent_name, member_name
from actors.injector import Injector, Strike
from concertina.elastic.chaos import parse
from concertina.layout import Seating
from concertina.state.manifest import list_checkpoints, read_manifest, verify
from concertina.track.events import EventType
from infra import LocalCluster
from tests.actors.conftest import Start
from tests.actors.drive import ENDLESS, Drive, alive, environment
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]  # minutes only where other work holds the machine

STEPS = 1500
FOUR = ("--set", ENDLESS, "--set", "cluster.num_workers=4", "--set", "training.eval_every_steps=100000")
NO_CHECKPOINT = ("--set", "checkpoint.every_steps=100000")
PATIENT = ("--set", "elastic.max_losses_per_node=100")
BOUND_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three nodes of two logical CPUs of these tests' own: some of them die."""
    with LocalCluster.start(num_nodes=3, cpus_per_node=2) as started:
        started.access.connect("tests")
        yield started
        ray.shutdown()


@pytest.fixture(scope="module")
def reference(ground: Path) -> Callable[[int], dict[int, float]]:
    """Losses of the job on one process alone, at least up to a step."""
    steps_file = ground / "alone.jsonl"
    words = [ENDLESS, "layout.ep=1", f"storage_path={ground / 'alone'}", "checkpoint.every_steps=100000"]
    words.append("training.eval_every_steps=100000")
    command = [sys.executable, "-m", "concertina.train.standalone", str(ground / "tiny.yaml")]
    command += [word for key in words for word in ("--set", key)]

    def until(step: int) -> dict[int, float]:
        process = subprocess.Popen([*command, "--steps-file", str(steps_file)], env=environment())
        try:
            wait_until(lambda: steps_file.exists() and len(steps_file.read_text().splitlines()) > step, 300)
        finally:
            process.kill()
            process.wait()
        found = [json.loads(line) for line in steps_file.read_text().splitlines()[:step]]
        steps_file.unlink()
        return {line["step"]: line["loss"] for line in found}

    return until


class Stage:
    """One run and who breaks it."""

    def __init__(self, drive: Drive, cluster: LocalCluster) -> None:
        self.drive = drive
        self.strikes: list[Strike] = []
        drive.reaches(3)
        self.injector = Injector(drive.run, cluster.access, self.strikes.append)

    def do(self, line: str) -> None:
        self.injector.carry_out(parse(line))

    def command(self, *words: str) -> dict[str, object]:
        """The same as a person does it; what it says it did."""
        run = self.drive.run
        line = [sys.executable, "-m", "jobs.cli", "chaos", run.run_id, *words, "--storage", str(run.storage)]
        done = subprocess.run([*line, "-o", "json"], env=environment(), capture_output=True, text=True, timeout=BOUND_S)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def lay(self, line: str) -> threading.Thread:
        """Carry it out in a thread: its fuse is laid when this returns."""
        own = Injector(self.drive.run, self.injector.access, self.strikes.append)
        thread = threading.Thread(target=own.carry_out, args=(parse(line),), daemon=True)
        thread.start()
        thread.join(1.0)
        return thread

    def members(self) -> dict[int, int]:
        """Members to their processes, by rank; one that was just lost may still have a seat, and no process."""
        scene = self.injector.scene()
        self.drive.pids |= {scene.coordinator, *scene.pids.values()}
        return {member: scene.pids[member] for member in scene.ranks if member in scene.pids}

    def seating(self) -> Seating:
        seatings = json.loads(self.drive.run.journal_file.read_text())["seatings"]
        return Seating.from_json(seatings[max(seatings, key=int)])

    def pair(self, fatal: bool) -> tuple[int, int]:
        """Two members, the first never of rank 0: with `fatal` they own both copies of something."""
        seating = self.seating()
        for one in (1, 2, 3):
            for other in range(4):
                both = seating.seconds[one] == other or seating.seconds[other] == one
                if one != other and both is fatal:
                    return seating.members[one], seating.members[other]
        raise AssertionError(seating)

    def engines(self) -> dict[int, tuple[int, int]]:
        """(pid, engine) of every member: what a survivor keeps."""
        session = json.loads(self.drive.run.journal_file.read_text())["session"]
        found = {}
        for member in self.members():
            actor = ray.get_actor(member_name(session, member), f"concertina-{self.drive.run.run_id}")
            facts = ray.get(actor.describe.remote(), timeout=BOUND_S)
            found[member] = facts["pid"], facts["engine"]
        return found

    def agent(self, node: str) -> int:
        """Its process."""
        session = json.loads(self.drive.run.journal_file.read_text())["session"]
        actor = ray.get_actor(agent_name(session, node), f"concertina-{self.drive.run.run_id}")
        return int(ray.get(actor.describe.remote(), timeout=BOUND_S)["pid"])

    def recoveries(self) -> int:
        return len(self.drive.events(EventType.RECOVERY))

    def settles(self, after: int, world: int | None = None) -> None:
        """More than `after` recoveries are written down, steps go on after the last, in a world of so many ranks."""
        drive = self.drive

        def goes_on() -> bool:
            kinds = (EventType.RECOVERY, EventType.STEP, EventType.GENERATION)
            events, seen, steps, now = drive.events(*kinds), 0, 0, 0
            for event in events:
                if event.type == EventType.STEP:
                    steps += 1
                    continue
                seen, steps = seen + (event.type == EventType.RECOVERY), 0
                now = event.data["world"] if event.type == EventType.GENERATION else now
            return seen > after and steps > 2 and world in (None, now)

        drive.wait(goes_on, BOUND_S)

    def ends_well(self, reference: Callable[[int], dict[int, float]], left: Callable[[Drive], None]) -> None:
        """Stopped with Ctrl-C it leaves a checkpoint of its last step, every step once, and nothing else."""
        self.members()
        self.drive.send(signal.SIGINT)
        assert self.drive.ends() == 103, self.drive.err
        found = self.drive.steps()
        assert found == pytest.approx(reference(len(found)), rel=1e-10, abs=0)
        newest = read_manifest(list_checkpoints(self.drive.run.checkpoints)[-1]).step
        assert newest == list(found)[-1]
        left(self.drive)


Reference = Callable[[int], dict[int, float]]
NothingLeft = Callable[[Drive], None]


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
    """At a step of the schedule, with the raylet and all that runs below it."""
    stage = Stage(start(*FOUR, *NO_CHECKPOINT), cluster)
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
    stage.settles(count)
    assert {m: facts for m, facts in stage.engines().items() if m in before} == {
        m: facts for m, facts in before.items() if m != victim.member
    }
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


@pytest.mark.parametrize("fatal", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_two_at_once(
    fatal: bool, start: Start, cluster: LocalCluster, reference: Reference, nothing_left: NothingLeft
) -> None:
    """Where both owned the two copies of something it goes back to a checkpoint, and says so."""
    stage = Stage(start(*FOUR, *PATIENT), cluster)
    stage.drive.wait(lambda: stage.drive.events(EventType.CHECKPOINT))
    count, before = stage.recoveries(), stage.engines()
    victims = stage.pair(fatal)
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


@pytest.mark.parametrize("least", [1, pytest.param(4, marks=pytest.mark.soak)])
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
