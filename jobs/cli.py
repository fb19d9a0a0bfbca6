"""What does `concertina` understand? Commands by name, errors as one line and an exit code.

Exit codes: 0 done, 1 an error of ours, 2 usage or job file wrong, 100 the run failed, 102 not found, 103 stopped by
a user, 104 no capacity, 105 verification failed, 130 Ctrl-C (`concertina.errors` has one class for each).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from concertina import __version__
from concertina.errors import ConcertinaError

__all__ = ["COMMANDS", "build", "main"]

COMMANDS = (
    ("validate", "jobs.commands.validate:validate"),
    ("layout", "jobs.commands.layout:layout"),
    ("train", "jobs.commands.train:train"),
    ("ckpt", "jobs.commands.ckpt:app"),
    ("runs", "jobs.commands.runs:runs"),
    ("import", "jobs.commands.import_hf:app"),
    ("export", "jobs.commands.export_hf:app"),
    ("chaos", "jobs.commands.chaos:chaos"),
    ("lab", "jobs.commands.lab:app"),
    ("data", "jobs.commands.data:data"),
    ("doctor", "jobs.commands.doctor:doctor"),
)
"""Name -> `module:attribute`, in the order of --help. The attribute is a function (one command) or a typer.Typer
(a group of commands). Modules import torch, ray and mlflow inside functions only: --help takes under 0.5 s."""


def build(words: Sequence[str] = ()) -> typer.Typer:
    """The application for this command line: just the command it names, or all of them when it names none."""
    app = typer.Typer(
        name="concertina",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    named = next((word for word in words if not word.startswith("-")), None)
    for name, target in [item for item in COMMANDS if item[0] == named] or COMMANDS:
        module, _, attribute = target.partition(":")
        command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main(words: Sequence[str] | None = None) -> None:
    """Run one command line; errors of ours become lines on stderr and the exit code of their class."""
    given = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in given
    rest = [word for word in given if word != "--debug"]  # so that it may stand anywhere
    try:
        build(rest)(args=rest, prog_name="concertina")
    except ConcertinaError as error:
        if debug:
            raise
        for line in error.data.get("problems", [error.message]):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"concertina {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train Mixture-of-Experts language models on machines that come and go.

    \b
    Example:
      concertina train jobs/quickstart.yaml
    """


if __name__ == "__main__":
    main()
