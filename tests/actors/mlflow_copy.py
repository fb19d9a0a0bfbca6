"""What does MLflow hold of a run? Read from the real sqlite database."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from concertina.track.mlflow_place import open_client
from concertina.track.run import RunFolder


class MlflowPage:
    """The one MLflow run of a job run; fails when there are more or none."""

    def __init__(self, folder: RunFolder, storage: Path | None = None) -> None:
        self.folder = folder
        storage = storage or folder.storage
        self.client = open_client(f"sqlite:///{storage / 'mlflow.db'}", storage)
        experiments = [found.experiment_id for found in self.client.search_experiments()]
        (found,) = self.client.search_runs(experiments, f"tags.`concertina.run_id` = '{folder.run_id}'")
        self.id, self.experiment = found.info.run_id, found.info.experiment_id
        self.status, self.params, self.tags = found.info.status, found.data.params, found.data.tags

    def values(self, key: str) -> dict[int, float]:
        """Value by step; fails when a step is there twice. (A row that measures a model as well is one row.)"""
        rows = {(row.step, row.timestamp, row.value) for row in self.client.get_metric_history(self.id, key)}
        steps = Counter(step for step, _, _ in rows)
        assert max(steps.values(), default=1) == 1, f"{key}: {steps.most_common(3)}"
        return {step: value for step, _, value in sorted(rows)}

    def checkpoints(self) -> dict[int, Any]:
        """Logged models by step."""
        found = self.client.search_logged_models([self.experiment], filter_string=f"source_run_id = '{self.id}'")
        return {int(model.params["step"]): model for model in found}
