"""What will a job learn from? `concertina data prepare jobs/quickstart.yaml`, then `concertina data inspect` it."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concertina.config import DataConfig, TrainingConfig
from jobs.data_facts import contents, facts, lines, mixture_facts, part_rows
from jobs.opening import JobArgument, SetOption, open_job
from jobs.output import Output, OutputOption, next_commands, print_json, print_table

if TYPE_CHECKING:
    from concertina.data import Mixture, TokenCorpus

__all__ = ["data"]

PROGRESS_EVERY_S = 1.0

data = typer.Typer(help="Text to token files, once, and what is in them.", no_args_is_help=True)


@data.command("prepare")
def prepare_command(job: JobArgument, overrides: SetOption = None, output: OutputOption = Output.TEXT) -> None:
    """Turn the job's text into tokens, once.

    \b
    They go under <storage_path>/data; where they are already, this returns at once. A token file that is the only
    one of its source stays where it is.
    `concertina train` does the same at its start.

    \b
    Example:
      concertina data prepare jobs/quickstart.yaml
    """
    config = open_job(job, overrides).job
    from concertina.data import Mixture, open_corpus, prepare

    started = time.monotonic()
    progress = _Progress()
    folder = prepare(config.data, config.storage_path, config.model.vocab_size, progress)
    corpus = open_corpus(folder)
    if output is Output.JSON:
        told = mixture_facts(corpus, config.data, None) if isinstance(corpus, Mixture) else facts(corpus)
        print_json({"folder": str(folder), "built": progress.heard, **told})
        return
    done = f"prepared in {time.monotonic() - started:.1f} s" if progress.heard else "was prepared before"
    sys.stdout.write(f"{corpus.num_tokens:,} tokens, {corpus.num_documents:,} documents: {done}\n  {folder}\n")
    again = _with_overrides(job, overrides)
    next_commands(
        [(f"concertina data inspect {again}", "what is in it"), (f"concertina train {again}", "train on it")],
    )


@data.command("inspect")
def inspect_command(
    target: Annotated[str, typer.Argument(metavar="JOB_OR_FOLDER", help="A job, or the folder of a corpus.")],
    overrides: SetOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of it and compare the checksums.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show a corpus in numbers, and some of its text; of a mixture each source, and how often the job reads it.

    \b
    Sequences are counted for the job's length and held-out share; for a folder, for the defaults.

    \b
    Example:
      concertina data inspect jobs/quickstart.yaml
    """
    from concertina.data import Mixture

    corpus, data, training = _find(target, overrides)
    if verify:
        corpus.verify()
    if isinstance(corpus, Mixture):
        told = mixture_facts(corpus, data, training)
    else:
        told = {"folder": str(corpus.folder), **facts(corpus), **contents(corpus, data, training)}
    if output is Output.JSON:
        print_json({**told, "verified": verify})
        return
    if isinstance(corpus, Mixture):
        _print_mixture(told)
    else:
        sys.stdout.write("".join(f"{line}\n" for line in lines(told)))
    again = _with_overrides(target, overrides)
    commands = [(f"concertina data inspect {again} --verify", "compare every byte with the checksums")]
    if not Path(target).is_dir():
        commands.append((f"concertina train {again}", "train on it"))
    next_commands(commands)


class _Progress:
    """One line on stderr when something begins, and at most one a second after that."""

    def __init__(self) -> None:
        self.heard = False
        self._last = ("", 0.0)

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self.heard = True
        now = time.monotonic()
        if what != self._last[0] or now - self._last[1] >= PROGRESS_EVERY_S:
            self._last = (what, now)
            amount = f"{done_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB" if done_bytes else "..."
            sys.stderr.write(f"{what} {amount}\n")


def _print_mixture(told: dict[str, Any]) -> None:
    sys.stdout.write(f"{told['folder']}\n{told['tokens']:,} tokens; sequences of {told['sequence_length']} tokens\n\n")
    print_table(*part_rows(told))
    for line in told["warnings"]:
        sys.stderr.write(f"warning: {line}\n")


def _find(target: str, overrides: list[str] | None) -> tuple[TokenCorpus | Mixture, DataConfig, TrainingConfig | None]:
    """What is there, what to count it with, and the training of the job, if it is one."""
    from concertina.data import corpus_folder, open_corpus
    from concertina.errors import NotFoundError

    if Path(target).is_dir():
        return open_corpus(target), DataConfig(), None
    job = open_job(target, overrides).job
    folder = corpus_folder(job.data, job.storage_path)
    if not folder.exists():
        again = _with_overrides(target, overrides)
        raise NotFoundError(f"the corpus of {target} is not prepared yet: run `concertina data prepare {again}`")
    return open_corpus(folder), job.data, job.training


def _with_overrides(target: str, overrides: list[str] | None) -> str:
    """The arguments that mean the same job again, to be pasted into a shell."""
    return " ".join([shlex.quote(target), *(f"--set {shlex.quote(override)}" for override in overrides or ())])
