"""What will a job learn from? `concertina data prepare jobs/quickstart.yaml`, then `concertina data inspect` it."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.opening import JobArgument, SetOption, open_job
from jobs.output import Output, OutputOption, next_commands, print_json

if TYPE_CHECKING:
    from concertina.data import TokenCorpus

__all__ = ["data"]

EXCERPT_TOKENS = 60
PROGRESS_EVERY_S = 1.0
COUNT_BLOCK_TOKENS = 1 << 24

data = typer.Typer(help="Text to token files, once, and what is in them.", no_args_is_help=True)


@data.command("prepare")
def prepare_command(job: JobArgument, overrides: SetOption = None, output: OutputOption = Output.TEXT) -> None:
    """Turn the job's text into tokens, once.

    \b
    They go under <storage_path>/data; where they are already, this returns at once.
    `concertina train` does the same at its start.

    \b
    Example:
      concertina data prepare jobs/quickstart.yaml
    """
    config = open_job(job, overrides).job
    from concertina.data import TokenCorpus, prepare

    started = time.monotonic()
    progress = _Progress()
    folder = prepare(config.data, config.storage_path, config.model.vocab_size, progress)
    corpus = TokenCorpus.open(folder)
    if output is Output.JSON:
        print_json({"folder": str(folder), "built": progress.heard, **_facts(corpus)})
        return
    done = f"prepared in {time.monotonic() - started:.1f} s" if progress.heard else "was prepared before"
    sys.stdout.write(f"{corpus.num_tokens:,} tokens, {corpus.manifest.num_documents:,} documents: {done}\n  {folder}\n")
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
    """Show a corpus in numbers, and some of its text.

    \b
    Sequences are counted for the job's length and held-out share; for a folder, for the defaults.

    \b
    Example:
      concertina data inspect jobs/quickstart.yaml
    """
    corpus, length, fraction = _find(target, overrides)
    if verify:
        corpus.verify()
    facts = {"folder": str(corpus.folder), **_facts(corpus), **_contents(corpus, length, fraction)}
    if output is Output.JSON:
        print_json({**facts, "verified": verify})
        return
    sys.stdout.write("".join(f"{line}\n" for line in _lines(facts)))
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


def _find(target: str, overrides: list[str] | None) -> tuple[TokenCorpus, int, float]:
    """The corpus, the sequence length and the held-out share to count with."""
    from concertina.config import DataConfig
    from concertina.data import TokenCorpus, corpus_folder
    from concertina.errors import NotFoundError

    if Path(target).is_dir():
        defaults = DataConfig()
        return TokenCorpus.open(target), defaults.sequence_length, defaults.validation_fraction
    job = open_job(target, overrides).job
    folder = corpus_folder(job.data, job.storage_path)
    if not folder.exists():
        again = _with_overrides(target, overrides)
        raise NotFoundError(f"the corpus of {target} is not prepared yet: run `concertina data prepare {again}`")
    return TokenCorpus.open(folder), job.data.sequence_length, job.data.validation_fraction


def _with_overrides(target: str, overrides: list[str] | None) -> str:
    """The arguments that mean the same job again, to be pasted into a shell."""
    return " ".join([shlex.quote(target), *(f"--set {shlex.quote(override)}" for override in overrides or ())])


def _facts(corpus: TokenCorpus) -> dict[str, Any]:
    manifest = corpus.manifest
    return {
        "fingerprint": corpus.fingerprint,
        "content_sha256": corpus.content_sha256,
        "sources": manifest.sources,
        "tokens": corpus.num_tokens,
        "documents": manifest.num_documents,
        "text_bytes": manifest.text_bytes,
        "bytes_per_token": manifest.text_bytes / corpus.num_tokens if manifest.text_bytes else None,
        "vocab_size": corpus.vocab_size,
    }


def _contents(corpus: TokenCorpus, length: int, fraction: float) -> dict[str, Any]:
    """What only reading the tokens tells."""
    import numpy as np

    counts = np.zeros(corpus.manifest.largest_token + 1, dtype=np.int64)
    for first in range(0, corpus.num_tokens, COUNT_BLOCK_TOKENS):
        counts += np.bincount(corpus.tokens[first : first + COUNT_BLOCK_TOKENS], minlength=len(counts))
    train, validation = corpus.sequences(length, fraction)
    middle = int(corpus.documents[len(corpus.documents) // 2])
    ids = corpus.tokens[middle : middle + EXCERPT_TOKENS].tolist()
    return {
        "vocabulary_used": int((counts > 0).sum()),
        "sequence_length": length,
        "sequences": {"train": len(train), "validation": len(validation)},
        "excerpt": corpus.decode(ids),
        "excerpt_ids": ids,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    sources, sequences = facts["sources"], facts["sequences"]
    ratio = f", {facts['bytes_per_token']:.2f} bytes of text each" if facts["bytes_per_token"] else ""
    excerpt = facts["excerpt"] or f"(no tokenizer) {facts['excerpt_ids']}"
    return [
        facts["folder"],
        f"source      {', '.join(sources['source'])}: {sources['num_files']:,} files, {sources['num_bytes']:,} bytes",
        f"tokens      {facts['tokens']:,}{ratio}",
        f"documents   {facts['documents']:,}",
        f"vocabulary  {facts['vocabulary_used']:,} of {facts['vocab_size']:,} tokens occur",
        f"sequences   {sequences['train']:,} for training, {sequences['validation']:,} held out, "
        f"of {facts['sequence_length']} tokens",
        f"content     sha256 {facts['content_sha256'][:16]}",
        "excerpt",
        *(f"  | {line}" for line in excerpt.splitlines()),
    ]
