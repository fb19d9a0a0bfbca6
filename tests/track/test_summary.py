"""Do the files alone say how a run stands, through resumes, roll-backs and deaths, and does a dead run get its end?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from concertina.errors import UserError
from concertina.track.events import EventLog, EventType, last_event, read_events
from concertina.track.owner import OwnerLock, probe
from concertina.track.run import RunFolder
from concertina.track.status import RESTART_GRACE, SILENCE, close_if_lost, refuse_living
from concertina.track.summary import RunStatus, summarize
from tests.track.a_run import LAYOUT, end, make_run, start, train, whole_run

pytestmark = pytest.mark.unit


def later(folder: RunFolder, age: timedelta) -> int:
    """A clock that reads `age` after the run's last sign of life."""
    return summarize(folder).updated_ns + int(age.total_seconds() * 1e9)


JUST_PAST = timedelta(seconds=1)


def test_a_finished_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=12)
    whole_run(folder, 12)
    found = summarize(folder)
    assert found.outcome.status is RunStatus.FINISHED
    assert (found.outcome.reason, found.outcome.reason_code) == ("all steps done", "finished")
    progress = found.progress
    assert (progress.steps, progress.target_steps, progress.tokens) == (12, 12, 1200)
    assert (progress.train_loss, progress.val_loss) == (12.0, 10 / 7)
    assert progress.evaluations == ((5, 5 / 7), (10, 10 / 7))
    assert progress.tokens_per_s == 200.0
    assert (found.shape.world, found.shape.layout) == (4, LAYOUT)
    assert (found.resumes, found.mlflow.run_id) == (0, None)
    assert found.mlflow.behind_bytes == folder.events_file.stat().st_size


def test_steps_done_again_count_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 8)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log, resumed_from_step=4)
        train(log, 5, 6)
        found = summarize(folder)
    assert (found.progress.steps, found.progress.tokens, found.resumes) == (6, 600, 1)
    assert found.progress.evaluations == ((5, 5 / 7),)
    with EventLog(folder.events_file, folder.run_id) as log:
        log.append(EventType.ROLLBACK, {"from_step": 7, "to_step": 3}, step=7)
    assert (summarize(folder).progress.steps, summarize(folder).progress.evaluations) == (3, ())


def test_seconds_are_those_of_sessions_not_of_the_pause_between(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    lines = [
        (0, "start", {}),
        (10, "state", {"state": "stopped"}),
        (1000, "start", {"resumed_from_step": 0}),
        (1005, "step", {"loss": 1}),
        (9999, "state", {"state": "killed", "ended_ns": 1005 * 10**9 + 1}),
    ]
    text = ""
    for seq, (at_s, kind, data) in enumerate(lines):
        at_ns = at_s * 10**9 + 1
        line = {"v": 1, "ts_ns": at_ns, "run_id": folder.run_id, "seq": seq, "type": kind, "step": 1, "data": data}
        text += json.dumps(line) + "\n"
    folder.events_file.write_text(text)
    assert summarize(folder).progress.seconds == pytest.approx(15)


def test_only_complete_checkpoints_that_are_there_count(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    manifest = {"step": 5, "files": {"a.safetensors": {"bytes": 70}, "b.safetensors": {"bytes": 30}}}
    for name, text in (("step-00000005", json.dumps(manifest)), ("step-00000010", "{torn"), (".step-00000015", "{}")):
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "manifest.json").write_text(text)
    (only,) = summarize(folder).checkpoints
    assert (only.step, only.bytes, Path(only.path).name) == (5, 100, "step-00000005")


def test_a_living_run_is_running_and_left_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        log.append(EventType.STATE, {"state": "waiting_for_capacity", "reason": "2 of 4 ranks"})
        found = summarize(folder)
        assert (found.outcome.status, found.outcome.state) == (RunStatus.RUNNING, "waiting_for_capacity")
        assert close_if_lost(folder, later(folder, timedelta(days=9))) is None
        with pytest.raises(UserError, match=f"still being run by process {os.getpid()}"):
            refuse_living(folder)
    refuse_living(folder)


def test_a_new_folder_waits_for_its_first_event(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert summarize(folder).outcome.status is RunStatus.CREATED
    assert close_if_lost(folder, later(folder, SILENCE - JUST_PAST)) is None
    assert close_if_lost(folder, later(folder, SILENCE + JUST_PAST)) is RunStatus.KILLED


def killed_writer(folder: RunFolder, script: str = "") -> int:
    """A process that wrote some events and was killed; its pid."""
    code = (
        "import sys, time; from pathlib import Path; from concertina.track.run import RunFolder\n"
        "from concertina.track.events import EventLog; from tests.track.a_run import start, train\n"
        "folder = RunFolder(Path(sys.argv[1])); log = EventLog(folder.events_file, folder.run_id)\n"
        f"start(log); train(log, 1, 7)\n{script}\nprint('up', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert summarize(folder).outcome.status is RunStatus.RUNNING
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return process.pid


def test_a_killed_run_is_lost_and_gets_its_end_after_the_grace(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    pid = killed_writer(folder)
    found = summarize(folder)
    assert found.outcome.status is RunStatus.LOST
    assert f"process {pid} " in found.outcome.reason
    assert close_if_lost(folder, later(folder, RESTART_GRACE - JUST_PAST)) is None
    assert close_if_lost(folder, later(folder, RESTART_GRACE + JUST_PAST)) is RunStatus.KILLED
    ended = summarize(folder)
    assert ended.outcome.status is RunStatus.KILLED
    assert f"process {pid} " in ended.outcome.reason
    assert "since step 7" in ended.outcome.reason
    assert ended.progress.seconds == pytest.approx(found.progress.seconds)
    assert close_if_lost(folder, time.time_ns() + 10**18) is None
    assert last_event(folder.events_file).seq == ended.num_events - 1  # type: ignore[union-attr]


def test_last_words_that_were_an_error_make_it_failed(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    killed_writer(folder, "log.append('error', {'message': 'CUDA out of memory\\nmore', 'rank': 3})")
    assert close_if_lost(folder, later(folder, RESTART_GRACE + JUST_PAST)) is RunStatus.FAILED
    assert summarize(folder).outcome.reason == "CUDA out of memory"


def test_silence_of_another_machine_needs_longer(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
    elsewhere = {"pid": 1, "host": "elsewhere", "since_ns": 1}
    folder.owner_lock.write_text(json.dumps(elsewhere))
    assert summarize(folder).outcome.status is RunStatus.RUNNING
    assert close_if_lost(folder, later(folder, RESTART_GRACE + JUST_PAST)) is None
    assert close_if_lost(folder, later(folder, SILENCE + JUST_PAST)) is RunStatus.KILLED


def test_whoever_comes_back_in_time_keeps_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    killed_writer(folder)
    with EventLog(folder.events_file, folder.run_id) as log:
        assert close_if_lost(folder, later(folder, timedelta(days=1))) is None
        end(log)
    assert summarize(folder).outcome.status is RunStatus.FINISHED
    assert [event.seq for event in read_events(folder.events_file)] == list(range(summarize(folder).num_events))


def test_a_lock_names_its_holder_and_frees_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    assert probe(path) is None
    with OwnerLock(path):
        held = probe(path)
        assert held is not None
        assert (held.held, held.is_here, held.is_gone()) == (True, True, False)
    free = probe(path)
    assert free is not None
    assert (free.held, free.is_gone()) == (False, True)
    path.write_text("")
    assert probe(path) is None
