"""Which run does the command line mean: a new one, one to go on with, or one that is done? Starts nothing.

concertina train JOB                   a new run, with an id of its own
concertina train --resume RUN          one that is there and has a checkpoint
concertina train JOB --run NAME        the run of that name, whatever has become of it so far
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from concertina.config import Job
from concertina.errors import ConfigError, UserError
from concertina.track.run import RunFolder, check_run_id, find_run, open_run
from concertina.track.status import claim
from concertina.track.summary import RunStatus, summarize
from jobs.opening import OpenedJob, open_job
from jobs.preparation import NothingLeft, Prepared, prepare_new, prepare_resume
from jobs.session import Place, find_place

__all__ = ["Done", "Wanted", "find"]

DEFAULT_STORAGE = "runs"


@dataclass(frozen=True)
class Wanted:
    """What was typed."""

    job: str | None
    overrides: list[str]
    resume: str | None
    run: str | None
    address: str | None
    storage: str | None

    def open(self, path: str) -> OpenedJob:
        """This job with what was typed beside it."""
        more = [] if self.storage is None else [f"storage_path={self.storage}"]
        return open_job(path, [*self.overrides, *more])


@dataclass(frozen=True)
class Done:
    """All steps of the run are done: who starts the command again has nothing to wait for."""

    folder: RunFolder
    text: str


def find(wanted: Wanted, held: ExitStack) -> tuple[Prepared, Place] | Done:
    """A run ready to start, and where it is to be. `held` keeps other drivers from it until it is closed.

    Raises UserError, NotFoundError, CheckpointError or DataError.
    """
    if wanted.run is not None and wanted.resume is not None:
        raise ConfigError("--run and --resume both say which run: give one of them")
    if wanted.run is not None:
        return _by_name(wanted, wanted.run, held)
    if wanted.resume is not None:
        folder = open_run(Path(wanted.storage or DEFAULT_STORAGE), wanted.resume)
        return _resume(wanted, folder, wanted.open(wanted.job or str(folder.job_file)), held)
    if wanted.job is None:
        raise ConfigError("which job? Give a job file: concertina train jobs/quickstart.yaml")
    return _begin(wanted, wanted.open(wanted.job), held)


def _by_name(wanted: Wanted, run_id: str, held: ExitStack) -> tuple[Prepared, Place] | Done:
    """The same command serves the first time and every other time."""
    check_run_id(run_id)
    opened = None if wanted.job is None else wanted.open(wanted.job)
    storage = Path(wanted.storage or (opened.job.storage_path if opened else DEFAULT_STORAGE))
    folder = find_run(storage, run_id)
    if folder is None:
        if opened is None:
            raise ConfigError(f"no run {run_id!r} under {storage}, and no job file to start it with")
        return _begin(wanted, opened, held, run_id)
    if opened is None:
        opened = wanted.open(str(folder.job_file))
    _refuse_another_job(folder, opened.job)
    found, steps = summarize(folder), opened.job.training.steps
    if found.outcome.status is RunStatus.FINISHED and found.progress.steps >= steps:
        return Done(folder, f"run {run_id} has finished {found.progress.steps} of {steps} steps: nothing is left to do")
    try:
        return _resume(wanted, folder, opened, held)
    except NothingLeft as error:  # killed between its last checkpoint and its end
        return Done(folder, error.message)


def _begin(wanted: Wanted, opened: OpenedJob, held: ExitStack, run_id: str | None = None) -> tuple[Prepared, Place]:
    place = find_place(opened.job, wanted.address)
    prepared = prepare_new(opened.job, opened.layout, run_id)
    held.enter_context(claim(prepared.folder))
    return prepared, place


def _resume(wanted: Wanted, folder: RunFolder, opened: OpenedJob, held: ExitStack) -> tuple[Prepared, Place]:
    held.enter_context(claim(folder))
    place = find_place(opened.job, wanted.address)
    return prepare_resume(folder, opened.job, opened.layout, or_begin=wanted.run is not None), place


def _refuse_another_job(folder: RunFolder, job: Job) -> None:
    """Two jobs must not become one run because somebody chose a name twice. Other changes are a resume's: allowed,
    where the checkpoint and the corpus allow them."""
    before = folder.job_document().get("name")
    if before != job.name:
        raise UserError(
            f"run {folder.run_id} is of job {before!r}, not of {job.name!r}: choose another name for this run",
            run_id=folder.run_id,
        )
