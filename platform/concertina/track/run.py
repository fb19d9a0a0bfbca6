"""Where does a run keep its files, and how is one made and found again?

    <storage>/<run id>/  job.yaml  versions.json  data.json  events.jsonl  checkpoints/  logs/  journal.json
    <storage>/mlflow.db  <storage>/data/<fingerprint>/

A folder with a job.yaml is a run. Imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

import difflib
import json
import os
import secrets
import string
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from concertina.config import Job, dump_job, load_job
from concertina.errors import ConcertinaError, NotFoundError
from concertina.track.versions import versions

__all__ = ["DataFacts", "RunFolder", "create_run", "list_runs", "open_run", "write_atomically"]

LATEST = "latest"
_ALPHABET = string.ascii_lowercase + string.digits
_SUFFIX_CHARS = 8


@dataclass(frozen=True)
class DataFacts:
    """Which corpus a run trained on."""

    name: str
    fingerprint: str
    num_tokens: int
    path: str = ""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def storage(self) -> Path:
        return self.path.parent

    @property
    def job_file(self) -> Path:
        return self.path / "job.yaml"

    @property
    def versions_file(self) -> Path:
        return self.path / "versions.json"

    @property
    def data_file(self) -> Path:
        return self.path / "data.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def owner_lock(self) -> Path:
        """Held by the writer of the events, for as long as it lives."""
        return self.events_file.with_suffix(".lock")

    @property
    def journal_file(self) -> Path:
        return self.path / "journal.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def mlflow_file(self) -> Path:
        """How far the copy into MLflow has come."""
        return self.path / "mlflow.json"

    def job(self) -> Job:
        """The resolved job, for a resume. Raises ConfigError when this version cannot read it any more."""
        return load_job(self.job_file)

    def job_document(self) -> dict[str, Any]:
        """The resolved job as plain data; not validated, so that a run of an older schema can still be shown."""
        return dict(yaml.safe_load(self.job_file.read_text()) or {})

    @property
    def copy_lock(self) -> Path:
        """Held by whoever copies the events into MLflow."""
        return self.path / "mlflow.lock"

    def versions(self) -> dict[str, Any]:
        """What the run was made with; empty when the file is gone."""
        return _read_json(self.versions_file)

    def data_facts(self) -> DataFacts | None:
        """The corpus, or None before it was recorded."""
        doc = _read_json(self.data_file)
        if not doc:
            return None
        return DataFacts(doc["name"], doc["fingerprint"], int(doc["num_tokens"]), doc.get("path", ""))

    def record_data(self, facts: DataFacts) -> None:
        """Write down the corpus; before the first step."""
        write_atomically(self.data_file, json.dumps(facts.__dict__, indent=1) + "\n")

    def write_job(self, job: Job) -> None:
        """Replace job.yaml, for a resume with other settings. The events keep what earlier sessions did."""
        write_atomically(self.job_file, dump_job(job))


def create_run(storage: Path, job: Job, data: DataFacts | None = None) -> RunFolder:
    """A new run's folder with the resolved job, the versions and, if given, the corpus.

    The folder appears complete or not at all. Raises ConcertinaError when `storage` cannot be written.
    """
    storage = storage.resolve()
    try:
        storage.mkdir(parents=True, exist_ok=True)
        folder = _reserve(storage, job.name)
        for part in (folder.checkpoints, folder.logs):
            part.mkdir()
        facts = {"created_ns": time.time_ns(), **versions()}
        write_atomically(folder.versions_file, json.dumps(facts, indent=1) + "\n")
        if data is not None:
            folder.record_data(data)
        # Last: job.yaml is what makes the folder a run.
        folder.write_job(job)
    except OSError as error:
        raise ConcertinaError(
            f"cannot make a run under {storage}: {error.strerror or error}; set storage_path to a folder "
            "you can write to",
            storage=str(storage),
        ) from error
    return folder


def list_runs(storage: Path) -> list[RunFolder]:
    """All runs under `storage`, newest first; empty when there is no such folder."""
    if not storage.is_dir():
        return []
    runs = [RunFolder(path.resolve()) for path in storage.iterdir() if (path / "job.yaml").is_file()]
    return sorted(runs, key=_created_ns, reverse=True)


def open_run(storage: Path, name: str) -> RunFolder:
    """The run called `name`: its id, a beginning of it that fits only one, its folder's path, or "latest".

    Raises NotFoundError with near names, or with all that fit.
    """
    runs = list_runs(storage)
    if not runs:
        raise NotFoundError(f"no runs under {storage}: start one with `concertina train JOB.yaml`", name=name)
    if name == LATEST:
        return runs[0]
    if Path(name).parent.resolve() == storage.resolve():
        name = Path(name).name
    by_id = {run.run_id: run for run in runs}
    if name in by_id:
        return by_id[name]
    fitting = [run_id for run_id in by_id if run_id.startswith(name)] if name else []
    if len(fitting) == 1:
        return by_id[fitting[0]]
    if fitting:
        raise NotFoundError(f"{name!r} fits {len(fitting)} runs: {_some(fitting)}; give more of the id", name=name)
    near = difflib.get_close_matches(name, by_id, n=3, cutoff=0.5)
    hint = f"did you mean {_some(near)}?" if near else f"newest: {_some(list(by_id))}"
    raise NotFoundError(f"no run {name!r} under {storage}; {hint}", name=name, near=near)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader, or a kill, sees the old or the new, never half."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(text)
    draft.replace(path)


def _reserve(storage: Path, name: str) -> RunFolder:
    while True:
        suffix = "".join(secrets.choice(_ALPHABET) for _ in range(_SUFFIX_CHARS))
        try:
            (storage / f"{name}-{suffix}").mkdir()
        except FileExistsError:
            continue
        return RunFolder(storage / f"{name}-{suffix}")


def _created_ns(run: RunFolder) -> tuple[int, str]:
    try:
        return int(run.versions()["created_ns"]), run.run_id
    except (KeyError, ValueError, TypeError):
        return run.path.stat().st_mtime_ns, run.run_id


def _read_json(path: Path) -> dict[str, Any]:
    try:
        doc = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return doc if isinstance(doc, dict) else {}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
