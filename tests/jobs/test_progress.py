"""Does a person see each change of a run once, in one line, and the numbers of whoever trains now?"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from concertina.config import Job
from concertina.elastic.account import Account, Bucket
from concertina.track.events import EventLog, EventType
from concertina.track.recovery import MemberNews, MemberWhat
from concertina.track.run import RunFolder, create_run
from jobs.progress import Progress
from tests.track.a_run import FACTS, RECOVERY, end, make_run, start, step_data

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path, steps=40, log_every_steps=10)


def told(folder: RunFolder) -> list[str]:
    stream = io.StringIO()
    progress = Progress(folder.events_file, folder.job(), 4, stream)
    progress.look()
    progress.close()
    return stream.getvalue().splitlines()


def news(log: EventLog, member: int, what: MemberWhat, reason: str = "") -> None:
    log.append(EventType.MEMBER, MemberNews(member, what, f"n{member}", 100 + member, reason).to_json())


def test_a_run_that_loses_and_gains_a_member(folder: RunFolder) -> None:
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        for member in range(4):
            news(log, member, MemberWhat.BORN)
            news(log, member, MemberWhat.READY)
        log.append(EventType.STEP, step_data(1), step=1)
        news(log, 2, MemberWhat.LOST, "node killed")
        log.append(EventType.RECOVERY, RECOVERY.to_json(), step=17)
        log.append(EventType.STEP, step_data(20), step=20)
        news(log, 4, MemberWhat.BORN)
        news(log, 4, MemberWhat.SPARE)
        log.append(EventType.RECOVERY, replace(RECOVERY, world_before=3, world_after=4).to_json(), step=17)
        log.append(EventType.STEP, step_data(30), step=30)
        news(log, 1, MemberWhat.LEFT, "its node will go")
        for member in (0, 3, 4):
            news(log, member, MemberWhat.LEFT)
        end(log)
    lines = told(folder)
    assert [line for line in lines if not line.startswith("step=")] == [
        "member 2 lost on node n2, process 102: node killed",
        str(RECOVERY),
        "member 4 born on node n4, process 104",
        "member 4 spare on node n4, process 104",
        str(replace(RECOVERY, world_before=3)).replace("3 -> 3", "3 -> 4"),
        "member 1 left on node n1, process 101: its node will go",
        "finished: all steps done",
    ]
    steps = [line for line in lines if line.startswith("step=")]
    assert ["world=4" in line for line in steps] == [True, False, True]
    assert "world=3" in steps[1]


def test_goodput_goes_on_from_the_ledger(folder: RunFolder) -> None:
    """A ledger at second 10 with nothing productive yet, one at second 40; four members, steps of 9 seconds."""
    halves = {Bucket.PRODUCTIVE: 60.0, Bucket.EXPOSED_COMMUNICATION: 20.0, Bucket.STARTING: 80.0}
    seconds = []
    with EventLog(folder.events_file, folder.run_id) as log:
        for second, account, steps in (
            (10, Account({Bucket.STARTING: 40.0}, 40), ()),
            (20, None, (10,)),
            (30, None, (20,)),
            (40, Account(halves, 160), ()),
            (50, None, (30,)),
        ):
            if account is not None:
                log.append(EventType.LEDGER, account.to_json())
            for step in steps:
                log.append(EventType.STEP, step_data(step, step_s=9.0), step=step)
            seconds.append(second)
    happened_at(folder, seconds)
    told_goodput = [line.split("goodput=")[1].split()[0] for line in told(folder)]
    # 36 of 80 member-seconds; 72 of 120; then three quarters of a step are productive, as before: 60 + 27 of 200
    assert told_goodput == ["0.45", "0.60", "0.43"]


def happened_at(folder: RunFolder, seconds: list[int]) -> None:
    """Event by event."""
    events = [json.loads(line) for line in folder.events_file.read_text().splitlines()]
    lines = [json.dumps({**event, "ts_ns": s * 10**9}) for event, s in zip(events, seconds, strict=True)]
    folder.events_file.write_text("\n".join(lines) + "\n")


def test_who_is_lost_before_the_first_step_is_told(folder: RunFolder) -> None:
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        news(log, 0, MemberWhat.BORN)
        news(log, 0, MemberWhat.LOST, "its process ended")
    assert told(folder) == ["member 0 lost on node n0, process 100: its process ended"]


def test_a_rate_is_not_averaged_over_a_change(folder: RunFolder) -> None:
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        for step in range(2, 6):
            log.append(EventType.STEP, step_data(step, step_s=100.0), step=step)
        log.append(EventType.RECOVERY, RECOVERY.to_json(), step=5)
        for step in range(6, 11):
            log.append(EventType.STEP, step_data(step), step=step)
    assert "tok/s=200 " in told(folder)[-1]


def test_ranks_that_only_wait_are_told_on_every_line(tmp_path: Path) -> None:
    job = Job.model_validate({"name": "quick", "training": {"log_every_steps": 10}, "cluster": {"device": "timed"}})
    folder = create_run(tmp_path, job, FACTS)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        for step in range(1, 21):
            log.append(EventType.STEP, step_data(step), step=step)
    lines = [line for line in told(folder) if line.startswith("step=")]
    assert len(lines) == 3
    assert all(line.endswith("(emulated compute)") for line in lines)


def test_a_node_has_a_short_name_for_people(folder: RunFolder) -> None:
    """Ray's names of nodes are 56 hexadecimal digits; the events keep them whole."""
    node = "8d24f3a1" + 48 * "c"
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        log.append(EventType.MEMBER, MemberNews(0, MemberWhat.LOST, node, 100, "its node died").to_json())
    assert told(folder) == ["member 0 lost on node 8d24f3a1, process 100: its node died"]


def test_each_source_of_a_mixture_is_told(folder: RunFolder) -> None:
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        log.append(EventType.EVAL, {"loss": 2.0, "by_source": {"code": 1.5, "prose": 3.5}}, step=10)
    assert told(folder)[-1] == (
        "step=10/40 validation_loss=2.0000 validation_loss/code=1.5000 validation_loss/prose=3.5000"
    )
