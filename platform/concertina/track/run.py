"""Where does a run keep its files, and how is one made and found again?

    <storage>/<run id>/  job.yaml  versions.json  data.json  tokenizer.json  events.jsonl  checkpoints/  logs/
                         journal.json
    <storage>/mlflow.db  <storage>/data/<fingerprint>/

A folder with a job.yaml is a run; one whose name begins with a dot is being made.
Imports neither torch, ray nor mlflow.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import shutil
import string
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from concertina.config import Job, dump_job, load_job
from concertina.errors import ConcertinaError, NotFoundError, UserError
from concertina.track.versions import versions

__all__ = [
    "TOKENIZER",
    "DataFacts",
    "RunFolder",
    "check_run_id",
    "create_run",
    "find_run",
    "list_runs",
    "open_run",
    "write_atomically",
]

LATEST = "latest"
TOKENIZER = "tokenizer.json"
_ALPHABET = string.ascii_lowercase + string.digits
_SUFFIX_CHARS = 8
_RUN_ID = re.compile(r"[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?")
_RESERVED = (LATEST, "data", "mlflow.db")
"""What means, or is, something else in a folder of runs."""


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
    def tokenizer_file(self) -> Path:
        """What its text was cut with, so that weights and tokenizer stay together; absent for token files without."""
        return self.path / TOKENIZER

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def owner_lock(self) -> Path:
        """Held by the writer of the events, for as long as it lives."""
        return self.events_file.with_suffix(".lock")

    @property
    def driver_lock(self) -> Path:
        """Held by the command that runs this run, also before there are events."""
        return self.path / "driver.lock"

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


def check_run_id(run_id: str) -> None:
    """Raises UserError for an id that a person may not give."""
    if _RUN_ID.fullmatch(run_id) is None:
        raise UserError(
            f"{run_id!r} is no name for a run: 1 to 63 of a-z, 0-9, '.', '_' and '-', a letter or digit first and last"
        )
    if run_id in _RESERVED:
        raise UserError(f"{run_id!r} means something else in a folder of runs: choose another name")


def create_run(
    storage: Path,
    job: Job,
    data: DataFacts | None = None,
    run_id: str | None = None,
    tokenizer: Path | None = None,
) -> RunFolder:
    """A new run's folder with the resolved job, the versions and, if given, the corpus and a copy of the tokenizer.
    Without `run_id` its id is the job's name and eight random characters.

    The folder appears complete or not at all. Raises ConcertinaError when `storage` cannot be written, UserError when
    there is something called `run_id` already.
    """
    storage = storage.resolve()
    try:
        storage.mkdir(parents=True, exist_ok=True)
        # Another process may want the very same id: it is taken when all is there, by a rename.
        folder = _reserve(storage, job.name if run_id is None else f".{run_id}")
        for part in (folder.checkpoints, folder.logs):
            part.mkdir()
        facts = {"created_ns": time.time_ns(), **versions()}
        write_atomically(folder.versions_file, json.dumps(facts, indent=1) + "\n")
        if data is not None:
            folder.record_data(data)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder.tokenizer_file)
        # Last: job.yaml is what makes the folder a run.
        folder.write_job(job)
        return folder if run_id is None else _take_id(folder, run_id)
    except OSError as error:
        raise ConcertinaError(
            f"cannot make a run under {storage}: {error.strerror or error}; set storage_path to a folder "
            "you can write to",
            storage=str(storage),
        ) from error


def list_runs(storage: Path) -> list[RunFolder]:
    """All runs under `storage`, newest first; empty when there is no such folder."""
    if not storage.is_dir():
        return []
    shown = [path for path in storage.iterdir() if not path.name.startswith(".")]
    runs = [RunFolder(path.resolve()) for path in shown if (path / "job.yaml").is_file()]
    return sorted(runs, key=_created_ns, reverse=True)


def find_run(storage: Path, run_id: str) -> RunFolder | None:
    """The run with exactly this id, or None."""
    folder = RunFolder(storage.resolve() / run_id)
    return folder if folder.job_file.is_file() else None


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


def _take_id(draft: RunFolder, run_id: str) -> RunFolder:
    """The draft becomes the run of this id, or is gone."""
    wanted = RunFolder(draft.storage / run_id)
    try:
        draft.path.rename(wanted.path)
    except OSError as error:
        shutil.rmtree(draft.path, ignore_errors=True)
        if not wanted.path.exists():
            raise
        what = "and is no run" if find_run(draft.storage, run_id) is None else "since a moment ago"
        raise UserError(f"{wanted.path} is there already, {what}: choose another name for this run") from error
    return wanted


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
