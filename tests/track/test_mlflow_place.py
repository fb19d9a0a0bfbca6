"""Is the tracking store the one meant, never the retired file store, and never a password in a file?"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from concertina.errors import ConfigError
from concertina.track.mlflow_place import artifact_location, shown, tracking_uri, ui_command
from concertina.track.mlflow_run import flatten
from concertina.track.reconcile import reconcile, reconcile_all, store_of
from concertina.track.status import RESTART_GRACE
from concertina.track.summary import RunStatus, summarize
from tests.track.a_run import make_run, rows, the_run, whole_run

pytestmark = pytest.mark.unit


def test_the_job_goes_before_the_environment_before_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(None, tmp_path) == "http://tracking:5000"
    assert tracking_uri("https://other", tmp_path) == "https://other"


def test_sqlite_paths_do_not_depend_on_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite:///a/b.db", tmp_path) == f"sqlite:///{tmp_path}/a/b.db"
    assert tracking_uri("sqlite:////a/b.db", tmp_path) == "sqlite:////a/b.db"


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "/tmp/mlruns", "mlruns", "ftp://x"])
def test_other_stores_are_refused_with_a_remedy(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"use sqlite:///PATH\.db"):
        tracking_uri(uri, tmp_path)


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    assert shown("https://me:secret@host:5000/x") == "https://***@host:5000/x"
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert "secret" not in ui_command("postgresql://me:secret@host/db")
    assert artifact_location("http://host", tmp_path) is None


def test_flattened_keys_and_values_fit() -> None:
    flat = flatten({"a": {"b": {"c": 1}, "l": [1, 2], "n": None, "t": True}, "x" * 300: "y" * 9000})
    assert {key: flat[key] for key in ("a.b.c", "a.l", "a.n", "a.t")} == {
        "a.b.c": "1",
        "a.l": "[1, 2]",
        "a.n": "null",
        "a.t": "true",
    }
    assert (len(flat["x" * 250]), max(map(len, flat))) == (6000, 250)


def test_a_password_in_the_job_reaches_neither_params_nor_artifacts(storage: Path) -> None:
    from mlflow import MlflowClient

    from concertina.track.mlflow_copy import Copier

    folder = make_run(storage)
    job = folder.job_document()
    job["tracking"]["tracking_uri"] = "https://me:secret@host:5000"
    folder.job_file.write_text(yaml.safe_dump(job))
    whole_run(folder, 3)
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    Copier(folder, uri, "trials").copy(lambda: False)
    run = the_run(MlflowClient(tracking_uri=uri), folder)
    assert run.data.params["tracking.tracking_uri"] == "https://***@host:5000"
    written = [path for path in (storage / "mlflow-artifacts").rglob("*") if path.is_file()]
    assert {path.name for path in written} == {"job.yaml", "versions.json"}
    assert not any("secret" in path.read_text() for path in [*written, folder.mlflow_file])


def test_reconciling_a_storage_ends_the_lost_and_sends_the_rest(storage: Path) -> None:
    from mlflow import MlflowClient

    from concertina.track.events import EventLog
    from tests.track.a_run import start, train

    whole = make_run(storage, "whole")
    whole_run(whole, 3)
    lost = make_run(storage, "lost")
    with EventLog(lost.events_file, lost.run_id) as log:
        start(log)
        train(log, 1, 3)
    text = lost.events_file.read_text()
    old_s = int(RESTART_GRACE.total_seconds()) + 5
    for event_ns in {line.split('"ts_ns":')[1].split(",")[0] for line in text.splitlines()}:
        text = text.replace(event_ns, str(int(event_ns) - old_s * 10**9))
    lost.events_file.write_text(text)
    versions = lost.versions()
    lost.versions_file.write_text(f'{{"created_ns": {versions["created_ns"] - old_s * 10**9}}}')
    alive = make_run(storage, "alive")
    with EventLog(alive.events_file, alive.run_id) as log:
        start(log)
        done = reconcile_all(storage)
    assert {run_id: (one.closed, one.complete) for run_id, one in done.items()} == {
        whole.run_id: (None, True),
        lost.run_id: (RunStatus.KILLED, True),
    }
    client = MlflowClient(tracking_uri=store_of(whole)[0])
    assert the_run(client, whole).info.status == "FINISHED"
    assert the_run(client, lost).info.status == "KILLED"
    assert all(len(values) == 1 for values in rows(client, the_run(client, lost).info.run_id).values())
    assert summarize(lost).mlflow.behind_bytes == 0
    assert reconcile_all(storage) == {}
    assert reconcile(whole).complete


def test_a_store_is_where_the_job_says_else_where_the_copy_is(storage: Path) -> None:
    folder = make_run(storage)
    default = f"sqlite:///{storage / 'mlflow.db'}"
    assert store_of(folder) == (default, "concertina")
    other = storage / "other.db"
    folder.mlflow_file.write_text(
        f'{{"offset": 0, "mlflow_run_id": "a", "experiment_id": "1", "uri": "sqlite:///{other}"}}'
    )
    assert store_of(folder)[0] == default
    other.write_text("")
    assert store_of(folder)[0] == f"sqlite:///{other}"
    job = folder.job_document()
    job["tracking"] |= {"tracking_uri": "http://tracking:5000", "experiment_name": "mine"}
    folder.job_file.write_text(yaml.safe_dump(job))
    assert store_of(folder) == ("http://tracking:5000", "mine")
