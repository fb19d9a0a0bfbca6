"""Does training go on, and MLflow end up right, when MLflow is down, slow, wrong or forgetful, or we are killed?"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from mlflow import MlflowClient

from concertina.track.events import EventLog, EventType, read_events
from concertina.track.mlflow_sink import MlflowSink, Pace
from concertina.track.reconcile import reconcile
from concertina.track.run import RunFolder, open_run
from concertina.track.summary import summarize
from tests.track.a_run import end, expected_rows, make_run, rows, start, step_data, the_run, train
from tests.track.mlflow_server import Proxy, Server

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LONG = timedelta(seconds=60)
QUICK = Pace(
    poll=timedelta(milliseconds=20), first_pause=timedelta(milliseconds=20), most_pause=timedelta(milliseconds=100)
)


@pytest.fixture(scope="module")
def server(memory: Path, empty_database: Path) -> Iterator[Server]:
    folder = memory / "server"
    folder.mkdir()
    server = Server(Path(shutil.copy(empty_database, folder / "mlflow.db")), folder)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    proxy = Proxy(server.port)
    yield proxy
    proxy.stop()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited 60 s for {what}"
        time.sleep(0.01)


def run_in(storage: Path, uri: str) -> RunFolder:
    folder = make_run(storage)
    text = folder.job_file.read_text()
    folder.job_file.write_text(text.replace("tracking_uri: null", f"tracking_uri: {uri}"))
    return folder


def check(folder: RunFolder, server: Server, steps: int, status: str = "FINISHED") -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{server.database}")
    run = the_run(client, folder)
    assert rows(client, run.info.run_id) == expected_rows(steps)
    assert run.info.status == status
    names = [model.name for model in client.search_logged_models([run.info.experiment_id])]
    assert sorted(name for name in names if name.startswith(folder.run_id)) == [
        f"{folder.run_id}-step-{step:08d}" for step in range(5, steps, 5)
    ]


@pytest.mark.parametrize("mood", ["refuse", "error", "hang"])
def test_trouble_in_the_middle_holds_nothing_up_and_loses_nothing(
    storage: Path, server: Server, proxy: Proxy, mood: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_in(storage, proxy.uri)
    caplog.set_level(logging.INFO, logger="concertina.track")
    with EventLog(folder.events_file, folder.run_id) as log:
        sink = MlflowSink(folder, proxy.uri, "trials", QUICK).start()
        start(log)
        train(log, 1, 6)
        until(lambda: summarize(folder).mlflow.behind_bytes == 0, "the first events to arrive")
        proxy.mood = mood
        train(log, 7, 30)
        before = proxy.seen
        until(lambda: sink.is_down, "the sink to notice")
        train(log, 31, 36)
        assert len([event for event in read_events(folder.events_file) if event.type == EventType.STEP]) == 36
        assert proxy.seen >= before
        proxy.mood = "pass"
        end(log)
        assert sink.close(LONG)
    check(folder, server, 36)
    said = [record.message for record in caplog.records if record.name.startswith("concertina.track")]
    turns = ["down" if "does not take events" in text else "up" for text in said]
    # One line when it goes, one when it is back, however often it was tried (a loaded machine may add a pair).
    assert turns == ["down", "up"] * (len(turns) // 2)
    assert turns


@pytest.mark.parametrize("mood", ["refuse", "hang"])
def test_close_gives_up_in_bounds_and_a_later_reconcile_completes(
    storage: Path, server: Server, proxy: Proxy, mood: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_in(storage, proxy.uri)
    proxy.mood = mood
    with EventLog(folder.events_file, folder.run_id) as log:
        sink = MlflowSink(folder, proxy.uri, "trials", QUICK).start()
        start(log)
        train(log, 1, 12)
        end(log, "stopped", "Ctrl-C")
        assert not sink.close(timedelta(milliseconds=300))
    assert f"concertina runs show {folder.run_id} --sync" in caplog.text
    assert summarize(folder).mlflow.behind_bytes > 0
    proxy.mood = "pass"
    until(lambda: reconcile(folder, LONG).complete, "the abandoned sink to let go of its lock")
    check(folder, server, 12, "KILLED")


@pytest.mark.parametrize("every", [5, 9])
def test_lost_answers_double_nothing(storage: Path, server: Server, proxy: Proxy, every: int) -> None:
    """The server did what it was asked, and we cannot know."""
    folder = run_in(storage, proxy.uri)
    proxy.forget_every = every
    with EventLog(folder.events_file, folder.run_id) as log:
        sink = MlflowSink(folder, proxy.uri, "trials", QUICK).start()
        start(log)
        for first in range(1, 21, 4):
            train(log, first, first + 3)
            seen = proxy.seen
            until(lambda seen=seen: proxy.seen > seen + 2, "some requests")  # type: ignore[misc]
        end(log)
        proxy.forget_every = 0
        assert sink.close(LONG)
    check(folder, server, 20)


TRAINER = """
import sys, time
from datetime import timedelta
from pathlib import Path
from concertina.track.events import EventLog, last_event
from concertina.track.mlflow_sink import MlflowSink, Pace
from concertina.track.run import RunFolder
from tests.track.a_run import start, train, end

folder, last = RunFolder(Path(sys.argv[1])), int(sys.argv[2])
done = last_event(folder.events_file)
done = 0 if done is None else max(done.step or 0, 1) - 1
with EventLog(folder.events_file, folder.run_id) as log:
    sink = MlflowSink(folder, sys.argv[3], "trials", Pace(poll=timedelta(milliseconds=5))).start()
    start(log, resumed_from_step=done or None)
    print("up", flush=True)
    for step in range(done + 1, last + 1):
        train(log, step, step)
        time.sleep(0.002)
    end(log)
    print(sink.close(timedelta(seconds=60)))
"""


def test_a_process_killed_while_copying_continues_one_run(storage: Path) -> None:
    """SIGKILL while steps and uploads race; the second life finishes."""
    folder = make_run(storage)
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    command = [sys.executable, "-c", TRAINER, str(folder.path)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'platform'}:{root}"}
    process = subprocess.Popen([*command, "100000", uri], env=environment, stdout=subprocess.PIPE)
    for _ in range(4):
        mark = _changed(folder.mlflow_file)
        until(lambda mark=mark: _changed(folder.mlflow_file) != mark, "an upload")  # type: ignore[misc]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    steps = summarize(folder).progress.steps + 20
    done = subprocess.run([*command, str(steps), uri], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["up", "True"]
    client = MlflowClient(tracking_uri=uri)
    run = the_run(client, folder)
    found = rows(client, run.info.run_id)
    assert {key for key, values in found.items() if len(values) != 1} == set()
    assert found == expected_rows(steps)
    assert (run.info.status, summarize(folder).resumes) == ("FINISHED", 1)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def test_two_runs_may_make_the_database_at_once(tmp_path: Path) -> None:
    """From nothing; and nobody writes into the current directory."""
    code = (
        "import os, sys; from pathlib import Path; from concertina.track.mlflow_place import open_client\n"
        "storage = Path(sys.argv[1]); client = open_client(f'sqlite:///{storage}/mlflow.db', storage)\n"
        "print(client.get_experiment('0').artifact_location)"
    )
    here = tmp_path / "here"
    here.mkdir()
    storage = tmp_path / "runs"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'platform'}:{root}"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(storage)],
            cwd=here,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in pair:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert out.strip() == f"{(storage / 'mlflow-artifacts').as_uri()}/0"
        assert "INFO" not in err
    assert os.listdir(here) == []
    assert sorted(os.listdir(storage)) == ["mlflow.db", "mlflow.db.lock"]


def test_no_mlflow_at_all_is_one_line(
    storage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run(storage)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", None)
    with EventLog(folder.events_file, folder.run_id) as log:
        sink = MlflowSink(folder, f"sqlite:///{storage / 'mlflow.db'}", "trials", QUICK).start()
        log.append(EventType.STEP, step_data(1), step=1)
        assert not sink.close(LONG)
    assert "cannot be imported" in caplog.text
    assert open_run(storage, "latest") == folder
