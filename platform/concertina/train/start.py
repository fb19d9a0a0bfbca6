"""Where does a new run take its weights from, if not from chance? A checkpoint, of this program or imported.

Answered before anything starts. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from concertina.config import Job
from concertina.data.tokenizer import moved_token
from concertina.errors import NotFoundError, UserError
from concertina.state.fit import misfit
from concertina.state.manifest import MANIFEST, list_checkpoints, read_manifest, verify
from concertina.track.run import TOKENIZER, RunFolder, open_run

__all__ = ["check_tokenizer", "find_checkpoint", "find_start", "starting_from"]

KEY = "checkpoint.initial_load_path"


def find_checkpoint(name: str, storage: Path) -> Path:
    """A checkpoint's folder: `name` itself, or the newest complete one of a run (its id, a beginning of it, its folder,
    `latest`) or of a folder of checkpoints. Raises NotFoundError."""
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return path.resolve()
    complete, root = list_checkpoints(path), path
    if not complete:
        is_run = RunFolder(path).job_file.exists()
        root = open_run(*((path.resolve().parent, path.resolve().name) if is_run else (storage, name))).checkpoints
        complete = list_checkpoints(root)
    if not complete:
        raise NotFoundError(f"no complete checkpoint in {root}: `concertina runs show` says how the run stands")
    return complete[-1].resolve()


def find_start(job: Job) -> Path | None:
    """The checkpoint that `checkpoint.initial_load_path` means, every byte of which has been read; None without one.

    Raises NotFoundError, UserError for another model's, CheckpointError for one that is damaged.
    """
    name = job.checkpoint.initial_load_path
    if name is None:
        return None
    try:
        folder = find_checkpoint(name, Path(job.storage_path))
    except NotFoundError as error:
        raise NotFoundError(f"{KEY}: {error.message}", **error.data) from error
    if (text := misfit(read_manifest(folder), job.model)) is not None:
        raise UserError(
            f"{KEY}: {folder} is of another model: {text}: give model.* the checkpoint's shapes, or start from another"
        )
    verify(folder)
    return folder


def starting_from(job: Job, folder: str | None) -> Job:
    """The job with the name resolved: `latest`, or a run that goes on, will mean something else tomorrow."""
    checkpoint = job.checkpoint.model_copy(update={"initial_load_path": folder})
    return job.model_copy(update={"checkpoint": checkpoint})


def check_tokenizer(start: Path, tokenizer: Path) -> None:
    """Raises UserError unless tokens mean to the weights what they mean in `tokenizer`, as far as a tokenizer lies
    beside the checkpoint or in its run's folder. More tokens than it had are no harm."""
    run = RunFolder(start.parent.parent)
    beside = [start / TOKENIZER, *([run.tokenizer_file] if run.job_file.exists() else [])]
    theirs = next((path for path in beside if path.is_file()), None)
    if theirs is None or (moved := moved_token(theirs, tokenizer)) is None:
        return
    token, before, now = moved
    what = "is none" if now is None else f"is {now}"
    raise UserError(
        f"{KEY}: {start} was trained with another tokenizer: token {token!r} is {before} there and {what} here: "
        f"set data.tokenizer.path to {theirs}"
    )
