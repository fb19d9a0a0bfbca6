"""Which job does the command line mean, and does it fit its own cluster?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from concertina.config import Job, read_job
from concertina.errors import ConfigError, LayoutError
from concertina.layout import Layout, check_job

__all__ = ["SHELF", "JobArgument", "OpenedJob", "SetOption", "open_job"]

SHELF = Path(__file__).parent
"""Job files that come with Concertina: their names work from any folder."""

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job file, or the name of one in jobs/.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key: training.steps=50. May be repeated."),
]


@dataclass(frozen=True)
class OpenedJob:
    """A valid job and its layout on all its workers."""

    job: Job
    layout: Layout


def open_job(path: str, overrides: Iterable[str] | None = None) -> OpenedJob:
    """The job with `overrides` applied, checked against itself. Raises ConfigError with every problem, one line
    each with the place where it was written."""
    read = read_job(path, overrides or (), SHELF)
    try:
        return OpenedJob(read.job, check_job(read.job))
    except LayoutError as error:
        pairs = zip(error.data["keys"], error.data["problems"], strict=True)
        lines = [str(read.problem(key, text)) for key, text in pairs]
        raise ConfigError("\n".join(lines), problems=lines) from None
