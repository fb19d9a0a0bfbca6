"""Is all that a run needs there, before anything is started? Its folder, its data as tokens, a sound checkpoint.

Everything that can be wrong with the input is found here.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from concertina.config import Job
from concertina.errors import CheckpointError, DataError, NotFoundError, UserError
from concertina.layout import Layout
from concertina.track.mlflow_place import tracking_uri
from concertina.track.run import DataFacts, RunFolder, create_run
from concertina.track.summary import summarize
from concertina.train.start import check_tokenizer, find_start, starting_from
from jobs.data_facts import often_repeated

__all__ = ["NothingLeft", "Prepared", "forget", "prepare_new", "prepare_resume", "refuse_stages_on_gpus"]


class NothingLeft(UserError):
    """The run has done all its steps."""


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: its folder is there, its data is tokens, its checkpoint has been verified."""

    job: Job
    layout: Layout
    folder: RunFolder
    corpus: Path
    resume_from: Path | None = None
    resume_step: int = 0
    generation: int = 0


def prepare_new(job: Job, layout: Layout, run_id: str | None = None) -> Prepared:
    """Make a run's folder. Raises UserError for what this engine cannot do, or for an id that is taken, DataError for
    the corpus; for weights to start from what `find_start` raises."""
    from concertina.data import open_corpus

    _refuse_unsupported(job, layout)
    job, corpus, facts = _prepare_beginning(job)
    folder = create_run(Path(job.storage_path), job, facts, run_id, open_corpus(corpus).tokenizer_file)
    return Prepared(job, layout, folder, corpus)


def prepare_resume(folder: RunFolder, job: Job, layout: Layout, *, or_begin: bool = False) -> Prepared:
    """Continue a run from its newest sound checkpoint; with `or_begin` one that has none from its beginning, but not
    one whose checkpoints are all damaged, which a person shall see. The caller has claimed it. Raises UserError,
    NothingLeft, NotFoundError, CheckpointError or DataError."""
    from concertina.state.manifest import list_checkpoints, read_manifest

    _refuse_unsupported(job, layout)
    checkpoints = list_checkpoints(folder.checkpoints)
    begins = or_begin and not checkpoints
    job = _started_as_before(folder, job, begins)
    if begins:
        job, corpus, facts = _prepare_beginning(job)
    else:
        corpus, facts = _prepare_data(job)
    before = folder.data_facts()
    if before is not None and before.fingerprint != facts.fingerprint:
        raise DataError(
            f"run {folder.run_id} was trained on corpus {before.fingerprint}, now it is {facts.fingerprint}: "
            "its files, or what the job says of them, have changed; restore them, or start a new run"
        )
    generation = summarize(folder).shape.generation + 1
    if begins:
        if damaged := sorted(folder.checkpoints.glob("step-*")):
            raise CheckpointError(
                f"run {folder.run_id} has no complete checkpoint, and {damaged[-1].name} has lost its manifest: "
                f"move it out of {folder.checkpoints} to begin again"
            )
        return Prepared(job, layout, folder, corpus, generation=generation)
    if not checkpoints:
        raise NotFoundError(
            f"run {folder.run_id} has no checkpoint to resume from: start a new run, or begin this one again with "
            f"--run {folder.run_id}"
        )
    chosen = _newest_sound(checkpoints)
    step = read_manifest(chosen).step
    if step >= job.training.steps:
        raise NothingLeft(
            f"run {folder.run_id} stands at step {step} of {job.training.steps}: nothing is left to do; "
            f"give it more with --set training.steps={step * 2}"
        )
    _refuse_another_model(chosen, job)
    return Prepared(job, layout, folder, corpus, chosen, step, generation)


def forget(prepared: Prepared) -> None:
    """Remove a new run's folder in which nothing has happened: no cluster came up, or a person changed their mind."""
    if prepared.resume_from is None and not prepared.folder.events_file.exists():
        shutil.rmtree(prepared.folder.path, ignore_errors=True)


def _newest_sound(checkpoints: list[Path]) -> Path:
    from concertina.state.sound import newest_sound

    found, damaged = newest_sound(checkpoints)
    for folder, why in damaged:
        print(f"warning: {why}; {folder.name} is passed over", file=sys.stderr)
    if found is None:
        raise CheckpointError(f"none of {len(checkpoints)} checkpoints in {checkpoints[0].parent} is sound")
    return found


def _refuse_another_model(checkpoint: Path, job: Job) -> None:
    """A resume goes on with the tensors there are: ranks would find it out, after a cluster has started."""
    from concertina.state.fit import misfit
    from concertina.state.manifest import read_manifest

    if (text := misfit(read_manifest(checkpoint), job.model)) is not None:
        raise UserError(f"{checkpoint.name} is of another model: {text}: leave model.* as it was, or start a new run")


def _started_as_before(folder: RunFolder, job: Job, begins: bool) -> Job:
    """What a run has started from does not change: the name in the job may mean another checkpoint by now. A run that
    has a checkpoint of its own looks at neither."""
    before = (folder.job_document().get("checkpoint") or {}).get("initial_load_path")
    return job if begins and before is None else starting_from(job, before)


def _prepare_beginning(job: Job) -> tuple[Job, Path, DataFacts]:
    """The job with its start found and verified, and its data; both must go together."""
    from concertina.data import open_corpus

    start = find_start(job)
    given = job.data.tokenizer.path
    if start is not None and given is not None and Path(given).expanduser().is_file():
        check_tokenizer(start, Path(given).expanduser())  # before the text is cut with it
    corpus, facts = _prepare_data(job)
    if start is None:
        return job, corpus, facts
    if (tokenizer := open_corpus(corpus).tokenizer_file) is not None:
        check_tokenizer(start, tokenizer)
    return starting_from(job, str(start)), corpus, facts


def _refuse_unsupported(job: Job, layout: Layout) -> None:
    """Tracking must go where we can write, and stages are on CPUs so far."""
    tracking_uri(job.tracking.tracking_uri, Path(job.storage_path))
    if job.cluster.device == "cuda":
        refuse_stages_on_gpus(layout)


def refuse_stages_on_gpus(layout: Layout) -> None:
    """Raises UserError for a pipeline over NCCL: a stage's receives, posted ahead, would hold up its sends there."""
    if layout.pp > 1:
        raise UserError(f"layout.pp={layout.pp} does not run on GPUs yet: set layout.pp to 1, or cluster.device to cpu")


def _prepare_data(job: Job) -> tuple[Path, DataFacts]:
    from concertina.data import Mixture, open_corpus, prepare

    shown = _PreparationLine()
    folder = prepare(job.data, Path(job.storage_path), job.model.vocab_size, shown)
    shown.close()
    corpus = open_corpus(folder)
    splits = corpus.sequences(job.data.sequence_length, job.data.validation_fraction)
    if not len(splits.train) or not len(splits.validation):
        raise DataError(
            f"{corpus.num_tokens} tokens give {len(splits.train)} sequences of {job.data.sequence_length} to train on "
            f"and {len(splits.validation)} to validate on: give more text or a smaller data.sequence_length"
        )
    source = job.data.source if isinstance(job.data.source, str) else ",".join(job.data.source)
    if isinstance(corpus, Mixture):
        source = ", ".join(f"{name} {weight:.3g}" for name, weight in corpus.weights.items())
        for line in often_repeated(splits.train, job.training):
            print(f"warning: {line}", file=sys.stderr)
    return folder, DataFacts(source, corpus.fingerprint, corpus.num_tokens, str(folder))


class _PreparationLine:
    """Says once what takes long."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._said:
            self._said.add(what)
            print(f"preparing data: {what} ({total / 1e6:.1f} MB)", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass
