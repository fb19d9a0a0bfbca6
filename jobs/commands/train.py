"""Train a job: `concertina train jobs/quickstart.yaml`"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.output import Output, OutputOption, next_commands, print_json

if TYPE_CHECKING:
    from jobs.preparation import Prepared
    from jobs.progress import Progress

__all__ = ["print_summary", "train"]


def train(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="A job file, or the name of one in jobs/.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key. May be repeated.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue this run (an id, a beginning of one, or latest).")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The run of this name: new the first time, then resumed; done: nothing."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, host:port. Absent: RAY_ADDRESS, else a local one.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Folder of runs.", show_default="the job's storage_path")] = None,
    chaos: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE", help="Break the run on purpose: 'kill node=1 step=20'. May be repeated."),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Train in the foreground, on a local Ray cluster or a running one. Ctrl-C stops with a checkpoint.

    \b
    Progress goes to stderr; with -o json the last line of stdout is a summary.
    Exit codes: 0 done, 2 wrong input, 100 failed, 103 stopped, 104 no capacity.

    \b
    Example:
      concertina train jobs/quickstart.yaml --set training.steps=50
      concertina train jobs/quickstart.yaml --run base --set training.steps=50
      concertina train --resume latest --set training.steps=1000
    """
    from concertina.elastic.chaos import parse
    from jobs.progress import Progress
    from jobs.session import run_session
    from jobs.which_run import Done, Wanted, find

    injections = [parse(line) for line in chaos or []]
    with ExitStack() as held:
        found = find(Wanted(job, list(overrides or []), resume, run, address, storage), held)
        if isinstance(found, Done):
            sys.stderr.write(f"{found.text}\n")
            print_summary(found.folder, "", output)
            return
        prepared, place = found
        progress = Progress(prepared.folder.events_file, prepared.job, prepared.layout.world)
        _say_what_begins(prepared, progress)
        code, reason = run_session(prepared, place, progress, injections)
    if code not in (0, 103):
        _root_cause(prepared.folder)
    if injections and output is Output.TEXT:
        _print_story(prepared.folder)
    print_summary(prepared.folder, reason, output)
    if code:
        sys.exit(code)


def _say_what_begins(prepared: Prepared, progress: Progress) -> None:
    """And what earlier sessions wrote is not told again."""
    folder = prepared.folder
    if folder.events_file.exists():
        progress.offset = folder.events_file.stat().st_size
    if prepared.resume_from is not None:
        progress.say(f"resuming run {folder.run_id} after step {prepared.resume_step}")
    elif progress.offset:
        progress.say(f"resuming run {folder.run_id} from the beginning: it has no checkpoint yet")
    else:
        progress.say(f"run {folder.run_id} in {folder.path}")
    start = prepared.job.checkpoint.initial_load_path
    if prepared.resume_from is None and start is not None:
        progress.say(f"its weights begin as those of {start}")


def _root_cause(folder: Any) -> None:
    """The traceback of the member that broke the run, before everything else."""
    from concertina.track.events import EventType, read_events

    errors = [event for event in read_events(folder.events_file) if event.type == EventType.ERROR]
    if errors and errors[-1].data.get("traceback"):
        sys.stderr.write(f"\nmember {errors[-1].data['rank']}, log in {folder.logs}:\n{errors[-1].data['traceback']}\n")


def _print_story(folder: Any) -> None:
    """What became of it that the run was broken: every recovery, and where the time went."""
    from concertina.track.summary import summarize
    from jobs.ledger_facts import ledger_lines, recovery_lines

    found = summarize(folder)
    sys.stdout.write("\n" + "".join(f"{line}\n" for line in [*recovery_lines(found), *ledger_lines(found)]))


def print_summary(folder: Any, reason: str, output: Output) -> None:
    """How a run ended, from its folder."""
    from concertina.track.summary import summarize
    from jobs.ledger_facts import goodput_line
    from jobs.progress import format_seconds, format_tokens

    found = summarize(folder)
    progress, shape = found.progress, found.shape
    if output is Output.JSON:
        print_json(
            {
                "run_id": found.run_id,
                "mlflow_run_id": found.mlflow.run_id,
                "steps": progress.steps,
                "train_loss": progress.train_loss,
                "val_loss": progress.val_loss,
                "world": shape.world,
                "layout": dict(shape.layout or {}),
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "tokens_per_s": progress.tokens_per_s,
                "goodput": found.ledger.goodput if found.ledger is not None else None,
                "usd": found.ledger.usd if found.ledger is not None else None,
                "status": found.outcome.status.value,
                **({"emulated_compute": True} if shape.emulates_compute else {}),
            }
        )
        return
    rows = [
        ("run", found.run_id + ", emulated compute" * shape.emulates_compute),
        ("status", found.outcome.status.value + (f": {reason}" if reason else "")),
        ("steps", f"{progress.steps} of {progress.target_steps}"),
        ("training loss", _number(progress.train_loss)),
        ("validation loss", _number(progress.val_loss)),
        ("tokens", format_tokens(progress.tokens)),
        ("time", format_seconds(progress.seconds)),
        ("tokens/s", format_tokens(progress.tokens_per_s or 0.0)),
        ("goodput", goodput_line(found)),
        ("checkpoints", ", ".join(str(checkpoint.step) for checkpoint in found.checkpoints) or "none"),
        ("folder", str(folder.path)),
    ]
    sys.stdout.write("\n" + "\n".join(f"{name:<16} {value}" for name, value in rows) + "\n")
    where = _where(folder)
    commands = [
        (f"concertina runs show {found.run_id}{where}", "this run"),
        (f"concertina runs list{where}", "all runs"),
        (f"concertina ckpt list {found.run_id}{where}", "its checkpoints"),
    ]
    if found.mlflow.uri:
        commands.append((f"mlflow ui --backend-store-uri {found.mlflow.uri}", "curves and comparisons"))
    if found.checkpoints and progress.steps < (progress.target_steps or 0):
        commands.insert(0, (f"concertina train --resume {found.run_id}{where}", "go on from the last checkpoint"))
    next_commands(commands)


def _where(folder: Any) -> str:
    """What the next commands need to find the run: nothing, when it is where they look by themselves."""
    storage = folder.path.resolve().parent
    return "" if storage == Path("runs").resolve() else f" --storage {storage}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
