"""Somebody of a run is killed, frozen or broken: does it go on where it can, is the culprit named where it cannot, and
is nothing left behind?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from concertina.state.manifest import list_checkpoints, verify
from concertina.track.events import EventType
from infra import LocalCluster
from tests.actors.conftest import Start
from tests.actors.drive import ENDLESS, SHORT, Drive, alive, environment
from tests.actors.mlflow_copy import MlflowPage
from tests.infra.sockets import tree
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]  # minutes only where other work holds the machine

NothingLeft = Callable[[Drive], None]


def newest(drive: Drive) -> int:
    """The step of the newest checkpoint, which is sound."""
    return verify(list_checkpoints(drive.run.checkpoints)[-1]).step


def in_mlflow(drive: Drive) -> str:
    """The final status, once MLflow holds the same steps as the events."""
    page = MlflowPage(drive.run)
    assert page.values("train/loss") == drive.steps()
    return str(page.status)


def kill_coordinator(drive: Drive) -> int:
    """SIGKILL it while its run trains; its pid."""
    pid = int(drive.journal()["coordinator_pid"])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive({pid}))
    return pid


# -- the driver --------------------------------------------------------------------------------------------------------


def test_killed_driver_the_coordinator_stops_with_a_checkpoint(start: Start, nothing_left: NothingLeft) -> None:
    drive = start("--set", ENDLESS, "--set", "checkpoint.every_steps=100000")
    drive.reaches(3)
    drive.process.kill()
    wait_until(lambda: drive.states()[-1] == "stopped", 60)
    nothing_left(drive)
    assert drive.events(EventType.STATE)[-1].data["reason"] == "the driver is gone"
    assert newest(drive) == list(drive.steps())[-1]
    assert in_mlflow(drive) == "KILLED"


# -- the coordinator ---------------------------------------------------------------------------------------------------


def test_killed_coordinator_the_run_goes_on_to_its_end(
    start: Start, cluster: LocalCluster, nothing_left: NothingLeft
) -> None:
    drive = start("--set", "training.steps=400", "--set", "checkpoint.every_steps=200")
    drive.reaches(3)
    ranks, before = drive.journal()["pids"], describe(drive)
    killed = kill_coordinator(drive)
    drive.wait(lambda: drive.journal()["coordinator_pid"] != killed)
    assert drive.journal()["pids"] == ranks
    assert alive(set(ranks.values())) == set(ranks.values())
    assert describe(drive) == before
    assert drive.ends() == 0, drive.err
    assert list(drive.steps())[-1] == 400
    assert "training: the coordinator restarted" in drive.lines
    assert drive.states()[-1] == "finished"
    assert {event.generation for event in drive.events(EventType.STEP)} == {0}, "ranks trained on"
    nothing_left(drive)
    assert in_mlflow(drive) == "FINISHED"


@pytest.mark.soak
def test_killed_before_the_members_had_formed_the_next_one_takes_them_over(
    start: Start, nothing_left: NothingLeft
) -> None:
    drive = start("--set", "training.steps=20")
    drive.wait(lambda: re.search(r"^run ", drive.err, re.MULTILINE))
    drive.wait(lambda: drive.run.journal_file.exists() and read_journal(drive)["pids"])
    os.kill(read_journal(drive)["coordinator_pid"], signal.SIGKILL)
    assert drive.ends() == 0, drive.err
    assert list(drive.steps())[-1] == 20
    assert len(drive.events(EventType.START)) == 1
    assert drive.states()[-2:] == ["training", "finished"]
    nothing_left(drive)
    assert in_mlflow(drive) == "FINISHED"


def test_killed_before_it_wrote_any_member_down_no_number_is_given_again(
    start: Start, nothing_left: NothingLeft
) -> None:
    """What is left of a process, its bell, would be taken for that of the next one of its number."""
    drive = start("--set", "training.steps=20")
    drive.wait(lambda: re.search(r"^run ", drive.err, re.MULTILINE))
    drive.wait(lambda: drive.run.journal_file.exists() and numbers_of(drive))
    before = read_journal(drive)
    os.kill(before["coordinator_pid"], signal.SIGKILL)
    given = numbers_of(drive)
    assert before["pids"] == {}
    assert drive.ends() == 0, drive.err
    ready = {event.data["member"] for event in drive.events(EventType.MEMBER)}
    assert ready
    assert ready.isdisjoint(given)
    assert drive.lost() == {}
    nothing_left(drive)


def numbers_of(drive: Drive) -> set[int]:
    """Of the members whose actors there are, born or not."""
    named = ray.util.list_named_actors(all_namespaces=True)
    ours = [found["name"] for found in named if found["namespace"] == f"concertina-{drive.run.run_id}"]
    return {int(name.rsplit("-", 1)[1]) for name in ours if name.startswith("member-")}


def test_coordinator_and_a_member_killed_together(start: Start, reference: Drive, nothing_left: NothingLeft) -> None:
    """The one that comes back finds a generation that nobody can go on with, and makes the next."""
    drive = start(*SHORT, *THREE)
    drive.reaches(10)
    before = drive.journal()
    os.kill(before["pids"]["1"], signal.SIGKILL)
    os.kill(before["coordinator_pid"], signal.SIGKILL)
    assert drive.ends() == 0, drive.err
    assert drive.steps() == pytest.approx(reference.steps(), rel=1e-10, abs=0)
    assert drive.events(EventType.ROLLBACK) == []
    assert drive.events(EventType.STEP)[-1].generation > 0
    nothing_left(drive)
    assert in_mlflow(drive) == "FINISHED"


@pytest.mark.soak
def test_frozen_coordinator_is_replaced(start: Start, nothing_left: NothingLeft) -> None:
    drive = start("--set", ENDLESS)
    drive.reaches(3)
    frozen = drive.journal()["coordinator_pid"]
    os.kill(frozen, signal.SIGSTOP)
    drive.wait(lambda: drive.journal()["coordinator_pid"] != frozen)
    drive.said("training: the coordinator restarted")
    drive.send(signal.SIGINT)
    assert drive.ends() == 103, drive.err
    assert newest(drive) == list(drive.steps())[-1]
    nothing_left(drive)


@pytest.mark.soak
def test_a_coordinator_gone_for_good_its_ranks_leave_a_checkpoint(start: Start, nothing_left: NothingLeft) -> None:
    drive = start("--set", ENDLESS, "--set", "checkpoint.every_steps=100000")
    drive.reaches(3)
    killed = 0
    for _ in range(4):  # once, and three restarts
        drive.wait(lambda last=killed: drive.journal()["coordinator_pid"] != last)
        killed = kill_coordinator(drive)
    assert drive.ends(120) == 100, drive.err
    assert any(line.startswith("the coordinator is gone for good") for line in drive.lines)
    assert newest(drive) == list(drive.steps())[-1]
    assert f"its ranks left a checkpoint of step {newest(drive)}" in drive.lines[-1]
    assert f"concertina train --resume {drive.run.run_id}" in drive.out
    assert drive.states()[-1] == "failed"
    nothing_left(drive)
    assert in_mlflow(drive) == "FAILED"


@pytest.mark.soak
def test_driver_and_coordinator_gone_the_ranks_write_the_end(start: Start, nothing_left: NothingLeft) -> None:
    drive = start("--set", ENDLESS, "--set", "checkpoint.every_steps=100000")
    drive.reaches(3)
    drive.process.kill()
    killed = 0
    for _ in range(4):
        wait_until(lambda last=killed: read_journal(drive)["coordinator_pid"] != last)
        killed = read_journal(drive)["coordinator_pid"]
        os.kill(killed, signal.SIGKILL)
    nothing_left(drive)
    assert newest(drive) == list(drive.steps())[-1]
    assert drive.states()[-1] == "failed"
    assert MlflowPage(drive.run).status == "RUNNING", "nobody was there to tell it"
    command = [sys.executable, "-m", "jobs.cli", "runs", "show", drive.run.run_id, "--sync"]
    subprocess.run([*command, "--storage", str(drive.storage)], env=environment(), check=True, timeout=100)
    assert in_mlflow(drive) == "FAILED"


def read_journal(drive: Drive) -> dict[str, int]:
    return dict(json.loads(drive.run.journal_file.read_text()))


# -- a member ----------------------------------------------------------------------------------------------------------

THREE = ("--set", "cluster.num_workers=3", "--set", "layout.ep=1")


def fails(drive: Drive, reason: str) -> None:
    """It ends with exit code 100, in words and in MLflow."""
    assert drive.ends() == 100, drive.err
    assert re.match(reason, drive.events(EventType.ERROR)[-1].data["message"]), drive.err
    (line,) = [line for line in drive.lines if line.startswith("failed: ")]
    assert re.match(f"failed: {reason}", line)
    assert in_mlflow(drive) == "FAILED"


def describe(drive: Drive) -> dict[str, dict[str, Any]]:
    """What every member's actor says of itself, by the actor's id."""
    import ray
    from ray.util import list_named_actors

    namespace = f"concertina-{drive.run.run_id}"
    found = [found["name"] for found in list_named_actors(all_namespaces=True) if found["namespace"] == namespace]
    actors = [ray.get_actor(name, namespace) for name in found if name.startswith("member-")]
    answers = {actor._actor_id.hex(): actor.describe.remote() for actor in actors}
    told = {}
    for actor, answer in answers.items():
        with suppress(ray.exceptions.RayActorError):  # the one that was killed
            told[actor] = dict(ray.get(answer, timeout=60))
    return told


@pytest.mark.soak
def test_a_killed_member_costs_no_step_and_the_others_stay_who_they_are(
    start: Start, reference: Drive, cluster: LocalCluster, nothing_left: NothingLeft
) -> None:
    drive = start("--set", "training.steps=1000", *SHORT[2:], *THREE)
    drive.reaches(5)
    before, killed = describe(drive), drive.journal()["pids"]["1"]
    assert {facts["pid"] for facts in before.values()} == set(drive.journal()["pids"].values())
    os.kill(killed, signal.SIGKILL)
    drive.wait(lambda: drive.recoveries())
    after = describe(drive)
    survivors = {actor: facts for actor, facts in before.items() if facts["pid"] != killed}
    assert {actor: after.get(actor) for actor in survivors} == survivors, "actor, process and engine are the same"
    first = drive.recoveries()[0]
    assert (first.cause.reason, first.cause.member, first.cause.rank) == ("killed", 1, 1)
    assert (first.world_before, first.world_after) == (3, 2)
    assert "killed" in drive.lost()[1]
    drive.wait(lambda: len(drive.recoveries()) > 1)
    second = drive.recoveries()[1]
    assert (second.cause.reason, second.world_before, second.world_after) == ("join", 2, 3)
    drive.wait(lambda: max(drive.steps()) >= second.step + 3)
    assert {actor: facts for actor, facts in describe(drive).items() if actor in survivors} == survivors
    drive.send(signal.SIGINT)
    assert drive.ends() == 103, drive.err
    assert drive.events(EventType.ROLLBACK) == []
    assert newest(drive) == list(drive.steps())[-1]
    assert in_mlflow(drive) == "KILLED"
    nothing_left(drive)


@pytest.mark.soak
def test_after_a_loss_every_loss_is_the_uninterrupted_runs(
    start: Start, reference: Drive, nothing_left: NothingLeft
) -> None:
    drive = start(*SHORT, *THREE)
    drive.reaches(10)
    os.kill(drive.journal()["pids"]["0"], signal.SIGKILL)  # the first rank, which speaks for all
    assert drive.ends() == 0, drive.err
    assert drive.recoveries()[0].cause.member == 0
    assert drive.steps() == pytest.approx(reference.steps(), rel=1e-10, abs=0)
    assert drive.events(EventType.ROLLBACK) == []
    steps = [event.step for event in drive.events(EventType.EVAL)]
    assert steps == [50, 100, 150]
    assert drive.states()[-1] == "finished"
    line = next(line for line in drive.lines if line.startswith("member 0 lost on node "))
    assert re.match(r"member 0 lost on node [0-9a-f]{8}\W", line), line
    assert not re.search(r"[0-9a-f]{56}", drive.err)
    nothing_left(drive)
    assert in_mlflow(drive) == "FINISHED"


def test_all_members_killed_it_goes_back_to_its_checkpoint(
    start: Start, reference: Drive, nothing_left: NothingLeft
) -> None:
    drive = start(*SHORT)
    drive.reaches(25)
    for pid in drive.journal()["pids"].values():
        os.kill(pid, signal.SIGKILL)
    assert drive.ends() == 0, drive.err
    back = drive.events(EventType.ROLLBACK)
    assert [event.data["to_step"] % 20 for event in back] == [0]
    assert drive.steps() == pytest.approx(reference.steps(), rel=1e-10, abs=0)
    nothing_left(drive)
    assert in_mlflow(drive) == "FINISHED"


@pytest.mark.soak
def test_killed_member_that_forms_is_replaced(start: Start, cluster: LocalCluster, nothing_left: NothingLeft) -> None:
    """Its peers would wait for it for two minutes."""
    drive = start("--set", "training.steps=20")
    drive.wait(lambda: members_below(cluster.keeper_pid))
    members_below(cluster.keeper_pid)[0].kill()
    assert drive.ends() == 0, drive.err
    assert list(drive.steps())[-1] == 20
    assert list(drive.lost()) in ([0], [1])
    assert drive.states()[-1] == "finished"
    nothing_left(drive)


def members_below(pid: int) -> list[psutil.Process]:
    """Ray names a worker after what it does: `ray::member-0123abcd-1:Rank.__init__`, later `ray::Rank`."""
    found = []
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            if re.match(r"ray::(member-.*:)?Rank", " ".join(process.cmdline())):
                found.append(process)
    return found


@pytest.mark.soak
def test_a_frozen_member_is_ended_and_the_run_goes_on(
    start: Start, reference: Drive, nothing_left: NothingLeft
) -> None:
    drive = start(*SHORT, *THREE)
    drive.reaches(10)
    frozen = drive.journal()["pids"]["1"]
    os.kill(frozen, signal.SIGSTOP)
    assert drive.ends() == 0, drive.err
    assert re.match("frozen: (its process is stopped|silent for .* s), at step", drive.lost()[1])
    assert not alive({frozen})
    assert drive.steps() == pytest.approx(reference.steps(), rel=1e-10, abs=0)
    assert drive.events(EventType.ROLLBACK) == []
    nothing_left(drive)


def test_stopped_while_it_recovers_it_keeps_every_step(start: Start, nothing_left: NothingLeft) -> None:
    drive = start("--set", ENDLESS, *THREE, "--set", "checkpoint.every_steps=100000")
    drive.reaches(10)
    os.kill(drive.journal()["pids"]["2"], signal.SIGKILL)
    drive.send(signal.SIGINT)
    assert drive.ends() == 103, drive.err
    assert drive.lines[-1] == "stopped: Ctrl-C"
    assert newest(drive) == list(drive.steps())[-1]
    assert drive.events(EventType.ROLLBACK) == []
    nothing_left(drive)
    assert in_mlflow(drive) == "KILLED"


def test_a_member_that_raises_is_named_with_its_traceback(start: Start, nothing_left: NothingLeft) -> None:
    """Where its checkpoint should go is a folder: rank 1's own part, so that no other rank fails."""
    drive = start("--set", ENDLESS)
    drive.said("forming")
    partial = drive.run.checkpoints / ".step-00000020.generation0"
    (partial / "shard-00002-model-00001-of-00001.safetensors").mkdir(parents=True)
    fails(drive, "member 1 raised CheckpointError: .*could not write")
    error = drive.events(EventType.ERROR)[-1].data
    assert (error["rank"], error["traceback"].splitlines()[0]) == (1, "Traceback (most recent call last):")
    assert "member 1, log in " in drive.err
    assert drive.err.index("member 1, log in ") < drive.err.index("Traceback")
    nothing_left(drive)


@pytest.mark.soak
def test_events_that_cannot_be_written_end_the_run(start: Start, nothing_left: NothingLeft) -> None:
    """A limit on file size stands for a full disk: what ranks say cannot be kept, so nobody may go on as if it were."""
    drive = start("--set", ENDLESS)
    drive.reaches(3)
    size = drive.run.events_file.stat().st_size
    psutil.Process(drive.journal()["coordinator_pid"]).rlimit(psutil.RLIMIT_FSIZE, (size, size))
    assert drive.ends() != 0
    assert "cannot append" in drive.out
    assert "free space" in drive.out
    nothing_left(drive)


@pytest.mark.soak
def test_ranks_whose_checkpoints_do_not_fit_end_the_run(start: Start, nothing_left: NothingLeft) -> None:
    drive = start("--set", ENDLESS)
    drive.reaches(25)
    for pid in drive.journal()["pids"].values():
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))
    fails(drive, r"member \d raised CheckpointError: .*could not write")
    assert f"concertina train --resume {drive.run.run_id}" in drive.out
    nothing_left(drive)


def test_a_corpus_that_is_gone_fails_in_one_line(start: Start, ground: Path, nothing_left: NothingLeft) -> None:
    """The driver has seen it; the ranks have not."""
    storage = ground / "vanishing"
    shutil.copytree(ground / "runs" / "data", storage / "data")
    drive = start("--set", ENDLESS, storage=storage)
    drive.wait(lambda: re.search(r"^run ", drive.err, re.MULTILINE))
    shutil.rmtree(storage / "data")
    assert drive.ends() == 100, drive.err
    assert re.match(r"failed: member \d: its process could not begin: ", drive.lines[-1]) or "Traceback" in drive.err
    assert drive.states()[-1] == "failed"
    nothing_left(drive)
