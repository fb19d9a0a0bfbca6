"""How is one job run drawn as one MLflow run? Each verb may be repeated after a crash without doing it twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from concertina.track.course import Point
from concertina.track.mlflow_place import artifact_location, open_client, shown
from concertina.track.run import DataFacts, RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MlflowRun", "attach", "flatten"]

RUN_ID_TAG = "concertina.run_id"
_EXTERNAL_TAG = "mlflow.model.isExternal"
_PARAM_CHARS = 6000
_TAG_CHARS = 5000
_KEY_CHARS = 250
_PARAMS_PER_CALL = 100
_FINAL = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "killed": "KILLED"}


@dataclass(frozen=True)
class MlflowRun:
    """A handle on the MLflow run of one job run. Raises what MLflow and the network raise."""

    client: MlflowClient
    mlflow_run_id: str
    experiment_id: str
    run_id: str

    def last_steps(self) -> dict[str, int]:
        """Newest step MLflow has of every key."""
        # The public `data.metrics` has the values only; the whole history would be millions of rows.
        return {metric.key: metric.step for metric in self.client.get_run(self.mlflow_run_id).data._metric_objs}

    def log_points(self, points: Sequence[tuple[Point, str | None]], tags: Mapping[str, str]) -> None:
        """At most 1000 points, each with the id of the model it measures, or None; one request."""
        from mlflow.entities import Metric, RunTag

        self.client.log_batch(
            self.mlflow_run_id,
            metrics=[
                Metric(point.key, point.value, point.time_ms, point.step, model_id=model) for point, model in points
            ],
            tags=[RunTag(key, value[:_TAG_CHARS]) for key, value in tags.items()],
            synchronous=True,
        )

    def log_facts(self, folder: RunFolder) -> None:
        """Params not there yet (MLflow's are immutable), versions as tags, the corpus as an input."""
        from mlflow.entities import Param

        have = self.client.get_run(self.mlflow_run_id).data.params
        job = folder.job_document()
        _redact(job)
        params = [Param(key, value) for key, value in flatten(job).items() if key not in have]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self.client.log_batch(self.mlflow_run_id, params=params[start : start + _PARAMS_PER_CALL], synchronous=True)
        self.log_points([], _version_tags(folder.versions()))
        data = folder.data_facts()
        if data is not None:
            self._log_corpus(data)

    def log_files(self, folder: RunFolder) -> None:
        """The resolved job and the versions as artifacts, replacing those of an earlier session."""
        for path in (folder.versions_file, folder.job_file):
            text = path.read_text()
            if path == folder.job_file:
                uri = (folder.job_document().get("tracking") or {}).get("tracking_uri")
                text = text.replace(uri, shown(uri)) if uri else text
            self.client.log_text(self.mlflow_run_id, text, path.name)

    def _log_corpus(self, data: DataFacts) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"path": data.path, "num_tokens": data.num_tokens})
        dataset = Dataset(data.name[:500], data.fingerprint[:36], "local", source)
        tags = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.mlflow_run_id, [DatasetInput(dataset, tags)])

    def save_checkpoint(self, step: int, uri: str, facts: Mapping[str, Any]) -> str:
        """A checkpoint as an external logged model: nothing is uploaded. Returns its model id."""
        params = {"step": str(step), "uri": uri, **{key: _text(value) for key, value in facts.items()}}
        tags = {_EXTERNAL_TAG: "true", RUN_ID_TAG: self.run_id, "concertina.removed": "false"}
        model_id = self._find_model(step)
        if model_id is None:
            model_id = self.client.create_logged_model(
                self.experiment_id,
                name=self._model_name(step),
                source_run_id=self.mlflow_run_id,
                tags=tags,
                params={key: value[:_PARAM_CHARS] for key, value in params.items()},
                model_type="checkpoint",
            ).model_id
        else:
            self.client.set_logged_model_tags(model_id, tags)
        self.client.finalize_logged_model(model_id, "READY")
        return model_id

    def remove_checkpoint(self, step: int) -> None:
        """Mark it as deleted from storage; its metrics stay comparable."""
        model_id = self._find_model(step)
        if model_id is not None:
            self.client.set_logged_model_tags(model_id, {"concertina.removed": "true"})

    def _find_model(self, step: int) -> str | None:
        found = self.client.search_logged_models(
            [self.experiment_id],
            filter_string=f"name = '{self._model_name(step)}' AND source_run_id = '{self.mlflow_run_id}'",
            max_results=1,
        )
        return found[0].model_id if found else None

    def _model_name(self, step: int) -> str:
        # A logged model's name has no dots; a job's may.
        return f"{self.run_id.replace('.', '_')}-step-{step:08d}"

    def set_status(self, state: str, time_ms: int) -> None:
        """MLflow's status for a controller state: every one that is not an end is RUNNING."""
        if state in _FINAL:
            self.client.set_terminated(self.mlflow_run_id, _FINAL[state], end_time=time_ms)
        else:
            self.client.update_run(self.mlflow_run_id, status="RUNNING")


def attach(folder: RunFolder, uri: str, experiment: str, known_id: str | None) -> MlflowRun:
    """The MLflow run of a job run: the one known, else one with our tag, else a new one.

    Looking for the tag covers a kill between making a run and writing its id down.
    """
    from mlflow.exceptions import MlflowException

    client = open_client(uri, folder.storage)
    if known_id is not None:
        try:
            info = client.get_run(known_id).info
            return MlflowRun(client, info.run_id, info.experiment_id, folder.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            # The database was deleted, or is another one: the events fill a new run from the start.
    experiment_id = _experiment(client, experiment, artifact_location(uri, folder.storage))
    found = client.search_runs([experiment_id], f"tags.`{RUN_ID_TAG}` = '{folder.run_id}'", max_results=1)
    if not found:
        tags = {RUN_ID_TAG: folder.run_id, "concertina.folder": str(folder.path)}
        start_ms = int(folder.versions().get("created_ns", 0)) // 1_000_000 or None
        found = [client.create_run(experiment_id, start_time=start_ms, tags=tags, run_name=folder.run_id)]
    return MlflowRun(client, found[0].info.run_id, experiment_id, folder.run_id)


def flatten(document: Mapping[str, Any]) -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`, cut to MLflow's limits on keys and values."""
    return {key[:_KEY_CHARS]: _text(value)[:_PARAM_CHARS] for key, value in _leaves(document, "")}


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _redact(job: dict[str, Any]) -> None:
    tracking = job.get("tracking") or {}
    if tracking.get("tracking_uri"):
        job["tracking"] = {**tracking, "tracking_uri": shown(tracking["tracking_uri"])}


def _version_tags(versions: Mapping[str, Any]) -> dict[str, str]:
    tags = {f"concertina.version.{key}": _text(value) for key, value in versions.items() if key != "created_ns"}
    git = versions.get("git")
    if git:
        tags["mlflow.source.git.commit"] = str(git["commit"])
    return tags


def _experiment(client: MlflowClient, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another run was a moment earlier.
            found = client.get_experiment_by_name(name)
            assert found is not None
    return found.experiment_id
