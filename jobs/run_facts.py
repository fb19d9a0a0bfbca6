"""How is a run's summary told: as flat facts for programs, as lines for people?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from concertina.track.events import Event
from concertina.track.mlflow_place import ui_command
from concertina.track.recovery import short_node
from concertina.track.run import RunFolder
from concertina.track.summary import RunSummary
from jobs.ledger_facts import ledger_facts, ledger_lines, recovery_facts, recovery_lines

__all__ = ["duration", "event_line", "facts", "lines"]

_SHORT = 12


def facts(summary: RunSummary) -> dict[str, Any]:
    """One flat object; the names are those of `concertina train -o json` where both have the fact."""
    progress, outcome, mlflow = summary.progress, summary.outcome, summary.mlflow
    return {
        "run_id": summary.run_id,
        "status": outcome.status.value,
        "reason": outcome.reason,
        "reason_code": outcome.reason_code,
        "state": outcome.state,
        "created": _iso(summary.created_ns),
        "updated": _iso(summary.updated_ns),
        "steps": progress.steps,
        "target_steps": progress.target_steps,
        "train_loss": progress.train_loss,
        "val_loss": progress.val_loss,
        "evaluations": [{"step": step, "loss": loss} for step, loss in progress.evaluations],
        "tokens": progress.tokens,
        "tokens_per_s": progress.tokens_per_s,
        "seconds": progress.seconds,
        "emulated_compute": summary.shape.emulates_compute,
        "world": summary.shape.world,
        "layout": summary.shape.layout,
        "generation": summary.shape.generation,
        "resumes": summary.resumes,
        "anomalies": summary.anomalies,
        "goodput": summary.ledger.goodput if summary.ledger is not None else None,
        "usd": summary.ledger.usd if summary.ledger is not None else None,
        "ledger": ledger_facts(summary),
        "num_recoveries": summary.num_recoveries,
        "recoveries": recovery_facts(summary),
        "checkpoints": [dict(vars(checkpoint)) for checkpoint in summary.checkpoints],
        "mlflow_run_id": mlflow.run_id,
        "mlflow_experiment_id": mlflow.experiment_id,
        "mlflow_uri": mlflow.uri,
        "mlflow_behind_bytes": mlflow.behind_bytes,
        "owner": dict(vars(summary.owner)) if summary.owner else None,
    }


def lines(folder: RunFolder, summary: RunSummary, now_ns: int) -> list[str]:
    """What a person wants to know, most wanted first."""
    outcome, progress = summary.outcome, summary.progress
    state = f" ({outcome.state})" if outcome.state and outcome.state != outcome.status else ""
    reason = f": {outcome.reason}" if outcome.reason else ""
    again = f", resumed {summary.resumes} times" if summary.resumes else ""
    of = f" of {progress.target_steps:,}" if progress.target_steps else ""
    rate = f", {progress.tokens_per_s:,.0f} tokens/s" if progress.tokens_per_s else ""
    age = duration((now_ns - summary.created_ns) / 1e9)
    told = [
        f"{summary.run_id}  {outcome.status}{state}{reason}{', emulated compute' * summary.shape.emulates_compute}",
        f"  folder       {folder.path}",
        f"  created      {_iso(summary.created_ns)}, {age} ago; ran for {duration(progress.seconds)}{again}",
        f"  steps        {progress.steps:,}{of}; {progress.tokens:,} tokens{rate}",
        f"  loss         {_losses(summary)}",
    ]
    if summary.anomalies:
        told.append(f"  anomalies    {summary.anomalies}")
    if summary.shape.world:
        told.append(f"  world        {summary.shape.world} ranks, generation {summary.shape.generation}")
    if summary.shape.layout:
        told.append(f"  layout       {_layout(summary.shape.layout)}")
    told += [*ledger_lines(summary), *recovery_lines(summary)]
    return [*told, *_origin(folder), *_checkpoint_lines(summary), *_mlflow_lines(summary)]


def event_line(event: Event) -> str:
    """One event on one line."""
    time = datetime.fromtimestamp(event.ts_ns / 1e9).strftime("%H:%M:%S")
    step = "" if event.step is None else f"step {event.step}"
    said = "  ".join(f"{key} {_brief(value)}" for key, value in event.data.items() if value not in (None, ""))
    return f"{time}  {event.type:<11} {step:<9} {said}"[:200].rstrip()


def duration(seconds: float) -> str:
    """Two units at most: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit} {rest} {below}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def _losses(summary: RunSummary) -> str:
    progress = summary.progress
    train = "none yet" if progress.train_loss is None else f"train {progress.train_loss:.4f}"
    if not progress.evaluations:
        return train
    (first, before), (last, now) = progress.evaluations[0], progress.evaluations[-1]
    since = f", from {before:.4f} at step {first}" if first != last else ""
    return f"{train}; validation {now:.4f} at step {last}{since}"


def _layout(layout: Mapping[str, Any]) -> str:
    """`attention pp 1 dp 4 | expert edp 2 ep 2`."""
    parts = []
    for grid in ("attention", "expert"):
        degrees = layout.get(grid)
        if isinstance(degrees, Mapping):
            parts.append(f"{grid} " + " ".join(f"{axis} {degree}" for axis, degree in degrees.items()))
    return " | ".join(parts) or " ".join(f"{axis} {_brief(degree)}" for axis, degree in layout.items())


def _origin(folder: RunFolder) -> list[str]:
    """The job, the corpus and the code, in a line each."""
    told = []
    model = folder.job_document().get("model") or {}
    if model:
        told.append(
            f"  model        {model.get('num_hidden_layers')} layers of {model.get('hidden_size')}, "
            f"{model.get('num_experts')} experts of {model.get('moe_intermediate_size')}, "
            f"{model.get('num_experts_per_tok')} a token; vocabulary {model.get('vocab_size')}"
        )
    start = (folder.job_document().get("checkpoint") or {}).get("initial_load_path")
    if start:
        told.append(f"  started from {start}")
    data = folder.data_facts()
    if data:
        told.append(f"  data         {data.name} {data.fingerprint[:_SHORT]}, {data.num_tokens:,} tokens")
    versions = folder.versions()
    if versions:
        git = versions.get("git")
        commit = f" at {git['commit'][:_SHORT]}{' with changes' if git['dirty'] else ''}" if git else ""
        libraries = ", ".join(f"{name} {versions.get(name)}" for name in ("python", "torch", "ray", "mlflow"))
        told.append(f"  code         concertina {versions.get('concertina')}{commit}; {libraries}")
        told.append(f"  machine      {versions.get('hostname')}")
    return told


def _checkpoint_lines(summary: RunSummary) -> Iterable[str]:
    label = "checkpoints"
    for checkpoint in summary.checkpoints:
        yield f"  {label:<12} step {checkpoint.step}, {checkpoint.bytes / 1e6:,.1f} MB, {checkpoint.path}"
        label = ""
    if label:
        yield f"  {label:<12} none"


def _mlflow_lines(summary: RunSummary) -> Iterable[str]:
    mlflow = summary.mlflow
    if mlflow.run_id is None or mlflow.uri is None:
        yield "  mlflow       nothing copied yet"
        return
    behind = f"{mlflow.behind_bytes:,} bytes of events to come" if mlflow.behind_bytes else "complete"
    yield f"  mlflow       run {mlflow.run_id}, {behind}"
    page = f"/#/experiments/{mlflow.experiment_id}/runs/{mlflow.run_id}"
    if mlflow.uri.startswith("http"):
        yield f"               {mlflow.uri}{page}"
    else:
        yield f"               {ui_command(mlflow.uri)}"
        yield f"               then open http://127.0.0.1:5000{page}"


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {_brief(item)}" for key, item in value.items()) + "}"
    return short_node(" ".join(str(value).split()))


def _iso(ts_ns: int) -> str:
    return datetime.fromtimestamp(ts_ns // 1_000_000_000, UTC).astimezone().isoformat(sep=" ")
