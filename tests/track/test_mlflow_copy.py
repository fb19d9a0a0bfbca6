"""Does MLflow end up with each committed value once, wherever the copying is killed?"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from concertina.config.schema import Job
from concertina.track.events import EventLog, EventType
from concertina.track.mlflow_copy import Copier, CopyState
from concertina.track.run import RunFolder
from tests.track.a_run import LAYOUT, end, expected_rows, make_run, rows, start, step_data, the_run, train, whole_run

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

STEPS = 12
EXPERIMENT = "trials"


def never() -> bool:
    return False


def uri_of(storage: Path) -> str:
    return f"sqlite:///{storage / 'mlflow.db'}"


def copy(folder: RunFolder) -> MlflowClient:
    Copier(folder, uri_of(folder.storage), EXPERIMENT).copy(never)
    return MlflowClient(tracking_uri=uri_of(folder.storage))


def test_a_whole_run_arrives(storage: Path) -> None:
    folder = make_run(storage)
    whole_run(folder, STEPS)
    client = copy(folder)
    run = the_run(client, folder)
    assert rows(client, run.info.run_id) == expected_rows(STEPS)
    assert (run.info.status, run.info.run_name) == ("FINISHED", folder.run_id)
    assert run.data.params["model.num_experts"] == "8"
    assert run.data.params["tracking.tracking_uri"] == "null"
    assert run.data.tags["concertina.reason"] == "all steps done"
    assert run.data.tags["concertina.version.mlflow"] == mlflow.__version__
    (corpus,) = run.inputs.dataset_inputs
    assert (corpus.dataset.name, corpus.dataset.digest) == ("stdlib", "0123456789abcdef" * 2)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"job.yaml", "versions.json"}
    assert run.info.artifact_uri.startswith((storage / "mlflow-artifacts").as_uri())
    assert os.listdir() == []
    assert len(run.data.metrics) <= 150
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["DO_NOT_TRACK"] == "true"


def test_checkpoints_are_models_that_can_be_compared_and_nothing_is_uploaded(storage: Path) -> None:
    folder = make_run(storage)
    whole_run(folder, STEPS)
    with EventLog(folder.events_file, folder.run_id) as log:
        log.append(EventType.CHECKPOINT_REMOVED, {"path": "checkpoints/step-00000005"}, step=12)
    client = copy(folder)
    run = the_run(client, folder)
    order = [{"field_name": "metrics.validation/loss", "ascending": True}]
    models = client.search_logged_models([run.info.experiment_id], order_by=order)
    assert [model.params["step"] for model in models] == ["5", "10"]
    assert [model.params["tokens"] for model in models] == ["500", "1000"]
    assert models[0].params["uri"] == (folder.checkpoints / "step-00000005").as_uri()
    assert json.loads(models[0].params["layout"])["expert"] == {"ep": 2, "edp": 2}
    assert [model.tags["concertina.removed"] for model in models] == ["true", "false"]
    measured = {(metric.key, metric.step): metric.value for metric in models[1].metrics}
    assert measured == {("train/loss", 10): 10.0, ("validation/loss", 10): 10 / 7}
    assert all(model.status == "READY" and model.source_run_id == run.info.run_id for model in models)
    assert not (storage / "mlflow-artifacts" / "models").exists()


class Killed(BaseException):
    """No handler of ours may catch it, as none catches SIGKILL."""


def killing_client(at_call: int, after: bool, counter: list[str]) -> type[MlflowClient]:
    """MLflow's client, but the process dies before, or just after, its call number `at_call`."""

    class Client(MlflowClient):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if name.startswith("_") or not callable(found):
                return found
            return counted(name, found)

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            counter.append(name)
            if len(counter) - 1 == at_call and not after:
                raise Killed
            result = call(*args, **kwargs)
            if len(counter) - 1 == at_call:
                raise Killed
            return result

        return run

    return Client


def test_a_kill_at_any_call_loses_and_doubles_nothing(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each call to MLflow; then a new process continues."""
    folder = make_run(storage)
    whole_run(folder, 6)
    real = MlflowClient
    client = real(tracking_uri=uri_of(storage))
    killed: list[tuple[str, bool]] = []
    for after in (False, True):
        for at_call in range(1000):
            folder.mlflow_file.unlink(missing_ok=True)
            # An experiment of its own each time is as good as an empty database, and quicker.
            experiment = f"{after}-{at_call}"
            calls: list[str] = []
            monkeypatch.setattr(mlflow, "MlflowClient", killing_client(at_call, after, calls))
            try:
                Copier(folder, uri_of(storage), experiment).copy(never)
                break
            except Killed:
                killed.append((calls[-1], after))
            finally:
                monkeypatch.setattr(mlflow, "MlflowClient", real)
            Copier(folder, uri_of(storage), experiment).copy(never)
            run = the_run(client, folder, experiment)
            assert rows(client, run.info.run_id) == expected_rows(6), (calls[-1], after)
            assert run.info.status == "FINISHED"
            assert len(client.search_logged_models([run.info.experiment_id])) == 1
    names = {name for name, _ in killed}
    assert {"create_experiment", "create_run", "log_batch", "log_inputs", "create_logged_model"} <= names
    assert {"finalize_logged_model", "set_terminated", "update_run", "log_text"} <= names


def test_a_resume_continues_the_same_run(storage: Path) -> None:
    folder = make_run(storage, steps=12)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, 8)
        end(log, "failed", "rank 3 died")
    client = copy(folder)
    first = the_run(client, folder)
    assert (first.info.status, first.data.tags["concertina.reason"]) == ("FAILED", "rank 3 died")
    folder.write_job(Job.model_validate({"name": "quick", "training": {"steps": 20}}))
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log, resumed_from_step=5)
        train(log, 6, 7)
    copy(folder)
    assert the_run(client, folder).info.status == "RUNNING"
    with EventLog(folder.events_file, folder.run_id) as log:
        train(log, 8, STEPS)
        end(log)
    copy(folder)
    run = the_run(client, folder)
    assert run.info.run_id == first.info.run_id
    assert rows(client, run.info.run_id) == expected_rows(STEPS)
    assert (run.info.status, run.data.params["training.steps"]) == ("FINISHED", "12")
    assert run.data.tags["concertina.replayed_steps"] == "6-8"
    assert run.data.tags["concertina.sessions"] == "2"
    assert "concertina.emulated_compute" not in run.data.tags


def test_a_run_whose_ranks_only_wait_has_a_tag(storage: Path) -> None:
    folder = make_run(storage, steps=2)
    with EventLog(folder.events_file, folder.run_id) as log:
        log.append(EventType.START, {"world": 4, "layout": LAYOUT, "emulated_compute": True})
        train(log, 1, 2)
        end(log)
    assert the_run(copy(folder), folder).data.tags["concertina.emulated_compute"] == "true"


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("finished", "FINISHED"),
        ("failed", "FAILED"),
        ("stopped", "KILLED"),
        ("killed", "KILLED"),
        ("training", "RUNNING"),
    ],
)
def test_status(storage: Path, state: str, status: str) -> None:
    folder = make_run(storage)
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        end(log, state, "because")
    run = the_run(copy(folder), folder)
    assert (run.info.status, run.data.tags["concertina.reason"]) == (status, "because")
    assert (run.info.end_time is None) == (status == "RUNNING")


def test_what_is_not_finite_leaves_a_gap_and_a_tag(storage: Path) -> None:
    folder = make_run(storage)
    with EventLog(folder.events_file, folder.run_id) as log:
        log.append(EventType.STEP, step_data(1, loss=math.nan, grad_norm=math.inf), step=1)
        log.append(EventType.STEP, step_data(2), step=2)
    client = copy(folder)
    run = the_run(client, folder)
    found = rows(client, run.info.run_id)
    assert math.isnan(found["train/loss", 1][0])
    assert math.isnan(found["train/grad_norm", 1][0])
    assert found["train/loss", 2] == [2.0]
    assert run.data.tags["concertina.nonfinite"] == "train/loss@1=nan, train/grad_norm@1=inf"


def test_long_runs_go_in_batches_and_stop_when_told(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(storage)
    with EventLog(folder.events_file, folder.run_id) as log:
        for step in range(1, 301):
            log.append(EventType.STEP, step_data(step), step=step)
    copier = Copier(folder, uri_of(storage), EXPERIMENT)
    assert copier.copy(lambda: True) == 124
    calls: list[str] = []
    assert copier.copy(never) == 300 - 124
    monkeypatch.setattr(mlflow, "MlflowClient", killing_client(-1, False, calls))
    assert Copier(folder, uri_of(storage), EXPERIMENT).copy(never) == 0
    assert "log_batch" not in calls
    client = MlflowClient(tracking_uri=uri_of(storage))
    expected = {key for key in expected_rows(300) if key[0] != "validation/loss"}
    assert set(rows(client, the_run(client, folder).info.run_id)) == expected


def test_a_lost_state_file_finds_its_run_again(storage: Path) -> None:
    folder = make_run(storage)
    whole_run(folder, STEPS)
    copy(folder)
    folder.mlflow_file.write_text("{torn")
    client = copy(folder)
    assert rows(client, the_run(client, folder).info.run_id) == expected_rows(STEPS)


def test_another_or_a_new_store_gets_everything(storage: Path, empty_database: Path) -> None:
    folder = make_run(storage)
    whole_run(folder, STEPS)
    copy(folder)
    other = f"sqlite:///{shutil.copy(empty_database, storage / 'other.db')}"
    Copier(folder, other, EXPERIMENT).copy(never)
    client = MlflowClient(tracking_uri=other)
    assert rows(client, the_run(client, folder).info.run_id) == expected_rows(STEPS)
    # The same path, but somebody put an empty database there.
    emptied = storage / "emptied.db"
    shutil.copy(empty_database, emptied)
    state = CopyState.load(folder, other)
    CopyState(f"sqlite:///{emptied}", state.mlflow_run_id, "1", state.offset, True).save(folder)
    Copier(folder, f"sqlite:///{emptied}", EXPERIMENT).copy(never)
    client = MlflowClient(tracking_uri=f"sqlite:///{emptied}")
    assert rows(client, the_run(client, folder).info.run_id) == expected_rows(STEPS)
