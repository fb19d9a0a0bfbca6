"""Does a run go from its first line to its last, stop when asked, and go on as if it had never stopped?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from concertina.state.manifest import list_checkpoints, read_manifest, verify
from concertina.track.events import EventType
from concertina.track.recovery import MemberNews, MemberWhat
from tests.actors.conftest import Start
from tests.actors.drive import ENDLESS, SHORT, STEPS, Drive
from tests.actors.mlflow_copy import MlflowPage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]  # minutes only where other work holds the machine

KEYS = {
    "run_id",
    "mlflow_run_id",
    "steps",
    "train_loss",
    "val_loss",
    "world",
    "layout",
    "tokens",
    "seconds",
    "tokens_per_s",
    "goodput",
    "usd",
    "status",
}
NothingLeft = Callable[[Drive], None]


def test_the_last_line_is_a_summary(reference: Drive) -> None:
    (line,) = reference.out.splitlines()
    found = json.loads(line)
    assert set(found) == KEYS
    assert (found["run_id"], found["status"], found["steps"]) == (reference.run.run_id, "finished", STEPS)
    degrees = {"pp": 1, "dp": 2, "cp": 1, "tp": 1, "edp": 1, "ep": 2, "etp": 1}
    assert (found["world"], found["layout"]) == (2, {"world": 2, **degrees})
    assert 0 < found["train_loss"] < 5
    assert 0 < found["val_loss"] < 5.2
    assert found["tokens_per_s"] > 0
    assert found["tokens"] == sum(event.data["tokens"] for event in reference.events(EventType.STEP))
    assert MlflowPage(reference.run).id == found["mlflow_run_id"]


def test_it_says_how_it_goes(reference: Drive) -> None:
    assert reference.states() == ["forming", "training", "finished"]
    assert [line for line in reference.lines if not line.startswith(("preparing", "step="))] == [
        f"run {reference.run.run_id} in {reference.run.path}",
        "forming",
        "training",
        "finished",
    ]
    assert list(reference.steps()) == list(range(1, STEPS + 1))


def test_a_resume_with_another_model_is_refused_and_changes_nothing(reference: Drive, start: Start) -> None:
    before = reference.run.job_file.read_bytes()
    changes = (f"training.steps={2 * STEPS}", "model.moe_intermediate_size=48")
    second = start(*(word for change in changes for word in ("--set", change)), resume=reference)
    assert second.ends() == 2
    assert "is of another model: layers.0.moe.experts.w13 has shape (4, " in second.lines[-1]
    assert reference.run.job_file.read_bytes() == before


def test_mlflow_holds_every_step_once(reference: Drive) -> None:
    page = MlflowPage(reference.run)
    assert page.status == "FINISHED"
    assert page.values("train/loss") == reference.steps()
    for key in ("train/grad_norm", "train/learning_rate", "train/tokens", "train/tokens_per_s", "train/imbalance"):
        assert list(page.values(key)) == list(range(1, STEPS + 1))
    assert list(page.values("validation/loss")) == [50, 100, 150]
    assert page.params["training.steps"] == str(STEPS)
    assert page.params["model.num_experts"] == "4"
    models = page.checkpoints()
    assert sorted(models) == [20, 40, 60, 80, 100, 120, 140, 150]
    kept = [step for step, model in models.items() if model.tags["concertina.removed"] == "false"]
    assert sorted(kept) == [read_manifest(path).step for path in list_checkpoints(reference.run.checkpoints)]
    assert all(model.tags["mlflow.model.isExternal"] == "true" for model in models.values())


def test_each_member_has_a_log_that_says_who_speaks(reference: Drive) -> None:
    ranks = set()
    for member in range(2):
        lines = (reference.run.logs / f"member-{member}.log").read_text().splitlines()
        seat = r"gen 0 \| rank (?P<rank>\d) pp0 dp(?P=rank) ep(?P=rank)"
        prefix = re.compile(rf"\[(?:member {member}|{seat}) \| step (?P<step>\d+)\] ")
        found = [prefix.match(line) for line in lines]
        assert all(found), lines
        steps = [int(match["step"]) for match in found if match]
        assert steps == sorted(steps)
        assert (steps[0], steps[-1]) == (0, STEPS)
        ranks |= {match["rank"] for match in found if match}
    assert ranks == {None, "0", "1"}
    assert (reference.run.logs / "coordinator.log").exists()


def test_its_members_and_its_generation_are_events(reference: Drive) -> None:
    news = [MemberNews.from_json(event.data) for event in reference.events(EventType.MEMBER)]
    assert sorted((told.member, told.what) for told in news if told.what is MemberWhat.READY) == [
        (0, MemberWhat.READY),
        (1, MemberWhat.READY),
    ]
    assert reference.lost() == {}
    (event,) = reference.events(EventType.GENERATION)
    assert (event.step, event.data["world"], event.data["reason"]) == (0, 2, "start")
    assert reference.recoveries() == []


def test_nothing_is_left_of_it(reference: Drive, nothing_left: NothingLeft) -> None:
    nothing_left(reference)


# -- stopped and resumed -----------------------------------------------------------------------------------------------


def test_stopped_by_ctrl_c_and_resumed_it_is_the_same_run(
    reference: Drive, start: Start, nothing_left: NothingLeft, tmp_path: Path
) -> None:
    first = start(*SHORT)
    first.reaches(3)
    first.send(signal.SIGINT)
    assert first.ends() == 103, first.err
    assert "stopping with a checkpoint after the steps under way; once more to stop at once" in first.lines
    assert first.lines[-1] == "stopped: Ctrl-C"
    assert f"concertina train --resume {first.run.run_id}" in first.out
    assert first.states() == ["forming", "training", "checkpointing", "stopped"]
    assert MlflowPage(first.run).status == "KILLED"
    stopped_at = read_manifest(list_checkpoints(first.run.checkpoints)[-1]).step
    assert list(first.steps())[-1] == stopped_at < STEPS
    nothing_left(first)

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(first.run.path, elsewhere / first.run.run_id)
    again = start(resume=first)
    assert again.ends() == 0, again.err
    assert again.lines[0] == f"resuming run {first.run.run_id} after step {stopped_at}"
    assert again.steps() == reference.steps(), "not the last bit differs"
    assert {event.generation for event in again.events(EventType.STEP)} == {0, 1}
    page = MlflowPage(again.run)
    assert (page.status, page.values("train/loss")) == ("FINISHED", reference.steps())
    assert page.values("validation/loss") == MlflowPage(reference.run).values("validation/loss")
    nothing_left(again)

    _resumes_on_another_layout(reference, start, first, elsewhere, nothing_left)


def _resumes_on_another_layout(
    reference: Drive, start: Start, first: Drive, storage: Path, nothing_left: NothingLeft
) -> None:
    other = ("--set", "cluster.num_workers=3", "--set", "layout.ep=1")
    moved = start(*other, resume=first, storage=storage)
    assert moved.ends() == 0, moved.err
    assert moved.steps() == pytest.approx(reference.steps(), rel=1e-10, abs=0)
    assert [event.data["world"] for event in moved.events(EventType.START)] == [2, 3]
    nothing_left(moved)


def test_a_second_signal_stops_at_once(start: Start, nothing_left: NothingLeft) -> None:
    drive = start("--set", ENDLESS, "--set", "checkpoint.every_steps=100000")
    drive.reaches(3)
    drive.send(signal.SIGTERM)
    drive.send(signal.SIGINT)
    assert drive.ends() == 103, drive.err
    assert "stopping without a checkpoint" in drive.lines, drive.err
    assert re.fullmatch("stopped: (SIGTERM|Ctrl-C), without a checkpoint", drive.lines[-1])
    assert list_checkpoints(drive.run.checkpoints) == []
    assert "--resume" not in drive.out
    assert MlflowPage(drive.run).status == "KILLED"
    nothing_left(drive)


def test_a_run_that_goes_on_is_not_resumed(start: Start, nothing_left: NothingLeft) -> None:
    """And SIGTERM to the driver's whole process group, as batch systems send it, is a stop with a checkpoint."""
    drive = start("--set", ENDLESS)
    drive.reaches(21)
    second = start(resume=drive)
    assert second.ends() == 2
    (line,) = second.lines
    assert re.fullmatch(rf"error: run {drive.run.run_id} is still being run by process \d+ on .*", line)
    os.killpg(drive.process.pid, signal.SIGTERM)
    assert drive.ends() == 103, drive.err
    assert drive.lines[-1] == "stopped: SIGTERM"
    (*_, newest) = list_checkpoints(drive.run.checkpoints)
    assert verify(newest).step == list(drive.steps())[-1]
    nothing_left(drive)


@pytest.mark.soak
def test_a_loss_that_is_none_stops_it_where_the_job_says_so(start: Start, nothing_left: NothingLeft) -> None:
    drive = start("--set", "training.learning_rate=1e200", "--set", "training.anomaly.nonfinite=stop")
    assert drive.ends() == 100, drive.err
    (anomaly,) = drive.events(EventType.ANOMALY)
    assert (anomaly.data["kind"], anomaly.data["action"]) == ("nonfinite", "stop")
    assert drive.lines[-1] == f"failed: the anomaly policy stopped the run at step {list(drive.steps())[-1]}"
    assert MlflowPage(drive.run).status == "FAILED"
    nothing_left(drive)


# -- room --------------------------------------------------------------------------------------------------------------

MUCH = ("--set", "cluster.num_workers=6")
ALL = ("--set", "elastic.min_workers=6")
WAITS = "waiting for 6 workers of 1 CPU each: 4 fit now on 2 nodes, 4 at most on these nodes"


def test_a_job_that_may_not_begin_smaller_says_what_it_waits_for(start: Start, nothing_left: NothingLeft) -> None:
    drive = start(*MUCH, *ALL)
    drive.said(WAITS)
    drive.send(signal.SIGINT)
    assert drive.ends() == 103, drive.err
    assert drive.lines[-1] == "stopped: Ctrl-C"
    assert MlflowPage(drive.run).status == "KILLED"
    nothing_left(drive)


def test_and_gives_up_when_its_bound_is_over(start: Start, nothing_left: NothingLeft) -> None:
    drive = start(*MUCH, *ALL, "--set", "cluster.capacity_timeout_s=1")
    assert drive.ends() == 104, drive.err
    assert drive.lines[-1].startswith(f"failed: gave up after 1 s {WAITS}")
    assert MlflowPage(drive.run).status == "FAILED"
    nothing_left(drive)


@pytest.mark.soak
def test_a_job_too_large_begins_with_the_members_there_are(
    reference: Drive, start: Start, nothing_left: NothingLeft
) -> None:
    drive = start(*MUCH, *SHORT)
    assert drive.ends() == 0, drive.err
    assert [event.data["world"] for event in drive.events(EventType.GENERATION)] == [4]
    assert any(line.startswith(f"waiting for capacity: {WAITS}") for line in drive.lines)
    assert drive.steps() == pytest.approx(reference.steps(), rel=1e-10, abs=0)
    nothing_left(drive)
