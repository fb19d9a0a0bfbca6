"""Does `concertina runs` tell of runs from their files, alike to people and programs?"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from concertina.elastic.account import Account, Bucket
from concertina.track.events import EventLog, EventType
from concertina.track.recovery import MemberNews, MemberWhat
from concertina.track.run import RunFolder, create_run
from jobs.cli import main
from jobs.commands.train import print_summary
from jobs.output import Output
from jobs.run_facts import duration
from tests.track.a_run import LAYOUT, RECOVERY, end, make_run, start, train, whole_run

pytestmark = pytest.mark.unit


def concertina(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = make_run(tmp_path / "runs", steps=12)
    whole_run(folder, 12)
    return folder


def test_list(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert concertina("runs", "list") == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith(run.run_id)]
    assert line.split()[1:7] == ["finished", "12/12", "12.0000", "1.4286", "1,200", "200"]
    assert f"concertina runs show {run.run_id}" in out


def test_list_for_programs(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert concertina("runs", "list", "-o", "json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["run_id"], found["status"], found["steps"], found["tokens"]) == (run.run_id, "finished", 12, 1200)
    assert found["layout"]["expert"] == {"ep": 2, "edp": 2}
    assert concertina("runs", "list", "--storage", str(run.storage), "-o", "csv") == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["run_id"], float(row["val_loss"]), row["reason"]) == (run.run_id, 10 / 7, "all steps done")


def test_nothing_there_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert concertina("runs", "list", "--storage", str(tmp_path)) == 0
    assert "concertina train" in capsys.readouterr().out
    assert concertina("runs", "list", "--storage", str(tmp_path / "none"), "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_older_runs_are_announced(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(run.storage)
    assert concertina("runs", "list", "--limit", "1") == 0
    assert "1 older ones: --limit 2" in capsys.readouterr().out


def test_show(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "step-00000010").mkdir()
    manifest = {"step": 10, "files": {"a": {"bytes": 2_000_000}}}
    (run.checkpoints / "step-00000010" / "manifest.json").write_text(json.dumps(manifest))
    assert concertina("runs", "show", "latest", "--events", "2") == 0
    out = capsys.readouterr().out
    for expected in (
        f"{run.run_id}  finished: all steps done",
        "12 of 12; 1,200 tokens, 200 tokens/s",
        "train 12.0000; validation 1.4286 at step 10, from 0.7143 at step 5",
        "4 ranks, generation 0",
        "attention dp 4 | expert ep 2 edp 2",
        "8 experts of 512, 2 a token",
        "stdlib 0123456789ab, 1,000 tokens",
        "step 10, 2.0 MB",
        "nothing copied yet",
        f"concertina runs show {run.run_id} --sync",
        f"concertina ckpt verify {run.run_id}",
    ):
        assert expected in out
    assert len([line for line in out.splitlines() if "state  " in line or "step 12" in line]) == 2


def test_show_for_programs(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert concertina("runs", "show", run.run_id[:-2], "-o", "json", "--events", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run_id"], found["train_loss"], len(found["events"])) == (run.run_id, 12.0, 3)
    assert found["job"]["name"] == "quick"
    assert found["events"][-1]["data"]["state"] == "finished"
    assert concertina("runs", "show", "latest", "-o", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert (rows[4]["loss"], rows[4]["val_loss"], rows[5]["val_loss"]) == ("5.0", str(5 / 7), "")


def test_a_lost_run_says_so_and_what_to_type(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(run.storage, "lost")
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 3)
    assert concertina("runs", "show", "lost", "--storage", str(run.storage)) == 0
    out = capsys.readouterr().out
    assert f"{folder.run_id}  lost: process " in out
    assert f"concertina runs show {folder.run_id} --storage {run.storage} --sync" in out
    assert f"concertina train runs/{folder.run_id}/job.yaml" in out
    assert concertina("runs", "show", "lost", "--sync") == 0
    assert "its coordinator may restart within 60 s" in capsys.readouterr().err


def test_a_failed_run_shows_where_and_how_to_go_on(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(run.storage, "broken")
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 3)
        trace = "Traceback (most recent call last):\n  File x\nZeroDivisionError: division by zero"
        log.append("error", {"message": "rank 2: division by zero", "rank": 2, "traceback": trace})
        end(log, "failed", "rank 2: division by zero")
    (folder.checkpoints / "step-00000003").mkdir()
    (folder.checkpoints / "step-00000003" / "manifest.json").write_text('{"step": 3, "files": {}}')
    assert concertina("runs", "show", "broken") == 0
    out = capsys.readouterr().out
    assert "failed: rank 2: division by zero" in out
    assert "  traceback    Traceback (most recent call last):\n" in out
    assert "ZeroDivisionError: division by zero\n\nnext:" in out
    assert f"concertina train --resume {folder.run_id} " in out


LEDGER = Account(
    {Bucket.PRODUCTIVE: 84.0, Bucket.STARTING: 12.0, Bucket.DETECTION: 3.5, Bucket.OTHER: 0.5}, 100.0, 7.0, None, 5
)


def a_run_with_recoveries(storage: Path, ledger: Account, count: int) -> RunFolder:
    folder = make_run(storage, "elastic", steps=12)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 12)
        for generation in range(1, count + 1):
            log.append(EventType.RECOVERY, {**RECOVERY.to_json(), "generation": generation}, step=12)
        log.append(EventType.LEDGER, ledger.to_json(), generation=count, step=12)
        end(log)
    return folder


def test_show_tells_where_the_time_went(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    a_run_with_recoveries(run.storage, LEDGER.priced(3.6), 12)
    assert concertina("runs", "show", "elastic") == 0
    out = capsys.readouterr().out
    assert (
        "  goodput      0.840 of 100 member-seconds, most of the rest starting (0.120); $0.1000, 12,000 tokens and"
        in out
    )
    table = out[out.index("  ledger  ") : out.index("  recoveries")].splitlines()
    assert [line[14:].split() for line in table] == [
        ["productive", "84.0", "s", "84.00%", "$0.0840"],
        ["detection", "3.5", "s", "3.50%", "$0.0035"],
        ["starting", "12.0", "s", "12.00%", "$0.0120"],
        ["other", "0.5", "s", "0.50%", "$0.0005"],
        ["(ranks", "missing)", "7.0", "s"],
    ]
    assert "  recoveries   12, the newest 10:\n" in out
    timeline = [line for line in out.splitlines() if ": recovered in 0.41s from the loss of rank 2" in line]
    assert [line.split()[2] for line in timeline] == [f"{generation}:" for generation in range(3, 13)]
    assert "detected 0.10s, halt 0.01s, prepare 0.12s, move 0.11s, resume 0.05s, on n1" in out
    assert "3 ranks, generation 12" in out


def test_show_gives_nodes_short_names(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    node = "8d24f3a1" + 48 * "c"
    folder = make_run(run.storage, "elastic", steps=12)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        log.append(EventType.MEMBER, MemberNews(0, MemberWhat.LOST, node).to_json())
        recovery = replace(RECOVERY, cause=replace(RECOVERY.cause, node=node))
        log.append(EventType.RECOVERY, recovery.to_json(), generation=1, step=12)
    assert concertina("runs", "show", "elastic") == 0
    out = capsys.readouterr().out
    assert out.count("8d24f3a1") == 3
    assert node not in out
    assert concertina("runs", "show", "elastic", "-o", "json") == 0
    assert node in capsys.readouterr().out, "programs get it whole"


def test_show_tells_programs_where_the_time_went(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    a_run_with_recoveries(run.storage, LEDGER, 1)
    assert concertina("runs", "show", "elastic", "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["goodput"], found["usd"], found["num_recoveries"]) == (0.84, None, 1)
    assert found["ledger"]["buckets"]["detection"] == {"seconds": 3.5, "share": 0.035, "usd": None}
    assert set(found["ledger"]["buckets"]) == set(Bucket)
    assert (found["ledger"]["balanced"], found["ledger"]["missing_s"], found["ledger"]["members"]) == (True, 7.0, 5)
    assert found["recoveries"][0]["cause"]["reason"] == "node killed"
    assert concertina("runs", "show", run.run_id, "-o", "json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["goodput"], plain["ledger"], plain["recoveries"]) == (None, None, [])


def test_books_that_do_not_add_up_say_so(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    a_run_with_recoveries(run.storage, Account(LEDGER.seconds, 90.0), 0)
    assert concertina("runs", "show", "elastic") == 0
    assert "the buckets miss the wall clock by +11.11%, 0.56% of it is unexplained" in capsys.readouterr().out


def test_the_summary_of_train_has_one_line_of_goodput(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run_with_recoveries(run.storage, LEDGER.priced(3.6), 0)
    print_summary(folder, "all steps done", Output.TEXT)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("goodput ")]
    assert line.split()[1:5] == ["0.840", "of", "100", "member-seconds,"]
    print_summary(folder, "all steps done", Output.JSON)
    found = json.loads(capsys.readouterr().out)
    assert (found["goodput"], found["usd"]) == (0.84, pytest.approx(0.1))
    print_summary(run, "", Output.TEXT)
    assert "goodput          not recorded\n" in capsys.readouterr().out


def test_a_run_whose_ranks_only_wait_is_marked_everywhere(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(run.storage, name="waits")
    with EventLog(folder.events_file, folder.run_id) as log:
        log.append(EventType.START, {"world": 4, "layout": LAYOUT, "emulated_compute": True})
        train(log, 1, 3)
        end(log)
    assert concertina("runs", "list") == concertina("runs", "show", folder.run_id) == 0
    print_summary(folder, "", Output.TEXT)
    told = [line for line in capsys.readouterr().out.splitlines() if "emulated compute" in line]
    assert len(told) == 3
    assert all(folder.run_id in line for line in told)
    assert concertina("runs", "list", "-o", "json") == 0
    marks = {found["run_id"]: found["emulated_compute"] for found in json.loads(capsys.readouterr().out)}
    assert marks == {folder.run_id: True, run.run_id: False}
    for each in (folder, run):
        print_summary(each, "", Output.JSON)
        assert ("emulated_compute" in json.loads(capsys.readouterr().out)) == (each is folder)


def test_sync_sends_mlflow_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = tmp_path / "runs"
    folder = make_run(storage)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 3)
        end(log, "failed", "rank 2: division by zero")
    assert concertina("runs", "show", "latest", "--storage", str(storage), "--sync") == 0
    said = capsys.readouterr()
    assert said.err == "MLflow has every event\n"
    assert "complete" in said.out
    assert f"mlflow ui --backend-store-uri sqlite:///{storage / 'mlflow.db'}" in said.out
    assert "#/experiments/1/runs/" in said.out
    assert "failed: rank 2: division by zero" in said.out


def test_an_unknown_run_is_one_line_and_102(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert concertina("runs", "show", "quack") == 102
    err = capsys.readouterr().err
    assert err.startswith("error: no run 'quack' under runs; ")
    assert err.count("\n") == 1


def test_a_run_without_events_or_of_an_older_schema_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from concertina.config.schema import Job

    folder = create_run(tmp_path, Job(name="bare"))
    folder.job_file.write_text("schema_version: 0\nwhatever: 1\n")
    assert concertina("runs", "show", "bare", "--storage", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"{folder.run_id}  created" in out
    assert "none yet" in out
    assert concertina("runs", "list", "--storage", str(tmp_path)) == 0


def test_it_works_without_ray_torch_and_mlflow(run: RunFolder) -> None:
    code = (
        "import sys; from jobs.cli import main\n"
        "try: main(['runs', 'show', 'latest'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=run.storage.parent,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (3600, "1 h"), (273600, "3 d 4 h")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
