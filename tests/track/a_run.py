"""A small run's folder and events, and what MLflow must hold of it in the end."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from concertina.config.schema import Job
from concertina.layout.fold import Layout
from concertina.track.events import EventLog, EventType
from concertina.track.recovery import Cause, Recovery
from concertina.track.run import DataFacts, RunFolder, create_run

LAYOUT = {"attention": {"dp": 4}, "expert": {"ep": 2, "edp": 2}}
FACTS = DataFacts(name="stdlib", fingerprint="0123456789abcdef" * 2, num_tokens=1000, path="/data/0123")

RECOVERY = Recovery(
    generation=2,
    cause=Cause("node killed", member=2, rank=2, node="n1"),
    world_before=4,
    world_after=3,
    step=17,
    stall_s=0.41,
    detected_s=0.1,
    phases={"halt_s": 0.01, "prepare_s": 0.12, "move_s": 0.11, "resume_s": 0.05},
    bytes_local=9_000_000,
    bytes_moved=31_000_000,
    layout=Layout(3).degrees,
)


def make_run(storage: Path, name: str = "quick", **training: Any) -> RunFolder:
    return create_run(storage, Job.model_validate({"name": name, "training": training}), FACTS)


def step_data(step: int, **changes: float) -> dict[str, float]:
    names = ("loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "imbalance")
    return {**{name: step + n / 10 for n, name in enumerate(names)}, "tokens": 100, "step_s": 0.5, **changes}


def start(log: EventLog, resumed_from_step: int | None = None) -> None:
    data = {"world": 4, "layout": LAYOUT, "resumed_from_step": resumed_from_step}
    log.append(EventType.START, data)


def train(log: EventLog, first: int, last: int, checkpoint_every: int = 5) -> None:
    """Steps first..last; an evaluation and a checkpoint now and then, the latter reported one step late."""
    for step in range(first, last + 1):
        if step % checkpoint_every == 0:
            log.append(EventType.EVAL, {"loss": step / 7}, step=step)
        log.append(EventType.STEP, step_data(step), step=step)
        if step % checkpoint_every == 1 and step > checkpoint_every:
            log.append(EventType.CHECKPOINT, {"bytes": 10, "layout": LAYOUT}, step=step - 1)


def end(log: EventLog, state: str = "finished", reason: str = "all steps done") -> None:
    log.append(EventType.STATE, {"state": state, "reason": reason, "reason_code": state})


def whole_run(folder: RunFolder, steps: int = 12) -> None:
    with EventLog(folder.events_file, folder.run_id) as log:
        start(log)
        train(log, 1, steps)
        end(log)


def rows(client: MlflowClient, mlflow_run_id: str) -> dict[tuple[str, int], list[float]]:
    """All rows MLflow holds, by key and step: each list must have one value."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for key in client.get_run(mlflow_run_id).data.metrics:
        for metric in client.get_metric_history(mlflow_run_id, key):
            found[key, metric.step].append(metric.value)
    return dict(found)


def expected_rows(steps: int, checkpoint_every: int = 5) -> dict[tuple[str, int], list[float]]:
    expected: dict[tuple[str, int], list[float]] = {}
    for step in range(1, steps + 1):
        data = step_data(step)
        for name in ("loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "imbalance"):
            expected[f"train/{name}", step] = [data[name]]
        expected["train/tokens", step] = [100.0 * step]
        expected["train/tokens_per_s", step] = [200.0]
        if step % checkpoint_every == 0:
            expected["validation/loss", step] = [step / 7]
    return expected


def the_run(client: MlflowClient, folder: RunFolder, experiment: str | None = None) -> Any:
    """The MLflow run of a folder; fails when there is more than one in all experiments, or in the one named."""
    experiments = [found.experiment_id for found in client.search_experiments() if experiment in (None, found.name)]
    (found,) = client.search_runs(experiments, f"tags.`concertina.run_id` = '{folder.run_id}'")
    return client.get_run(found.info.run_id)
