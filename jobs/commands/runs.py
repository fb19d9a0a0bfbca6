"""Which runs are there, and how did each go? `concertina runs list`, `concertina runs show latest`.

Answered from the runs' own files: no cluster and no MLflow server is needed, none is imported.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.output import TableOption, TableOutput, next_commands, print_json, print_table

if TYPE_CHECKING:
    from concertina.track.run import RunFolder
    from concertina.track.summary import RunSummary

__all__ = ["runs"]

DEFAULT_STORAGE = "runs"
TRACEBACK_LINES = 20
SYNC_TIMEOUT = timedelta(minutes=2)
LIST_COLUMNS = ("run_id", "status", "steps", "train_loss", "val_loss", "tokens", "tokens_per_s", "seconds", "world")
STEP_COLUMNS = ("loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens", "step_s", "imbalance", "dropped")

StorageOption = Annotated[Path, typer.Option("--storage", help="The folder of runs: a job's storage_path.")]

runs = typer.Typer(help="What runs there are, and how each went.", no_args_is_help=True)


@runs.command("list")
def list_command(
    storage: StorageOption = Path(DEFAULT_STORAGE),
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    output: TableOption = TableOutput.TEXT,
) -> None:
    """List the newest runs.

    \b
    `lost` is a run whose process is gone and wrote no end: `concertina runs show RUN --sync` gives it one.

    \b
    Example:
      concertina runs list
    """
    from concertina.track.run import list_runs
    from concertina.track.summary import summarize
    from jobs.run_facts import facts

    found = list_runs(storage)
    shown = [facts(summarize(run)) for run in found[:limit]]
    if output is TableOutput.JSON:
        print_json(shown)
        return
    if output is TableOutput.CSV:
        columns = (*LIST_COLUMNS, "created", "reason", "emulated_compute")
        print_table(columns, [[run[column] for column in columns] for run in shown], output)
        return
    if not shown:
        sys.stdout.write(f"no runs under {storage}\n")
        next_commands([("concertina train jobs/quickstart.yaml", "make one")])
        return
    print_table((*LIST_COLUMNS, "created"), [_row(run) for run in shown])
    if len(found) > limit:
        sys.stdout.write(f"{len(found) - limit} older ones: --limit {len(found)}\n")
    next_commands([(f"concertina runs show {shown[0]['run_id']}{_where(storage)}", "how it went, and what now")])


@runs.command("show")
def show_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Its id, the beginning of it, its folder, or latest.")],
    storage: StorageOption = Path(DEFAULT_STORAGE),
    sync: Annotated[bool, typer.Option("--sync", help="First end it if it is lost, and send MLflow the rest.")] = False,
    num_events: Annotated[int, typer.Option("--events", min=0, help="How many of the last events to show.")] = 8,
    output: TableOption = TableOutput.TEXT,
) -> None:
    """Show one run: status and reason, losses, checkpoints, MLflow, last events.

    \b
    -o csv prints the steps that stand, one a row, with the validation loss where there is one.

    \b
    Example:
      concertina runs show latest
    """
    from concertina.track.run import open_run
    from concertina.track.summary import summarize
    from jobs.run_facts import facts, lines

    folder = open_run(storage, run)
    if sync:
        _sync(folder)
    if output is TableOutput.CSV:
        print_table(("step", *STEP_COLUMNS, "val_loss"), _steps(folder), output)
        return
    summary = summarize(folder)
    if output is TableOutput.JSON:
        origin = {"job": folder.job_document(), "versions": folder.versions(), "folder": str(folder.path)}
        print_json({**facts(summary), **origin, "events": [_plain(event) for event in _tail(folder, num_events)]})
        return
    sys.stdout.write("".join(f"{line}\n" for line in lines(folder, summary, time.time_ns())))
    _print_events(folder, num_events)
    _print_traceback(folder, summary)
    next_commands(_next(folder, summary, _where(storage)))


def _sync(folder: RunFolder) -> None:
    from concertina.track.reconcile import reconcile
    from concertina.track.status import RESTART_GRACE
    from concertina.track.summary import RunStatus, summarize

    done = reconcile(folder, SYNC_TIMEOUT)
    if summarize(folder).outcome.status is RunStatus.LOST:
        grace_s = RESTART_GRACE.total_seconds()
        sys.stderr.write(f"not ended yet: its coordinator may restart within {grace_s:.0f} s; then try again\n")
    if done.closed is not None:
        sys.stderr.write(f"wrote its end: {done.closed}\n")
    sys.stderr.write("MLflow has every event\n" if done.complete else f"MLflow has not every event: {done.note}\n")


def _row(run: dict[str, Any]) -> list[Any]:
    """The same facts at a person's precision."""
    from jobs.run_facts import duration

    of = f"/{run['target_steps']}" if run["target_steps"] else ""
    losses = [None if run[name] is None else f"{run[name]:.4f}" for name in ("train_loss", "val_loss")]
    rate = None if run["tokens_per_s"] is None else f"{run['tokens_per_s']:,.0f}"
    progress = [f"{run['steps']}{of}", *losses, f"{run['tokens']:,}", rate, duration(run["seconds"])]
    status = run["status"] + ", emulated compute" * run["emulated_compute"]
    return [run["run_id"], status, *progress, run["world"], run["created"][:19]]


def _steps(folder: RunFolder) -> list[list[Any]]:
    """Rows of committed steps; those a resume or a roll-back did again are there once."""
    from concertina.track.events import EventType, read_events, void_after

    rows: dict[int, dict[str, Any]] = {}
    for event in read_events(folder.events_file):
        kept = void_after(event)
        if kept is not None:
            rows = {step: row for step, row in rows.items() if step <= kept}
        if event.step is not None and event.type == EventType.STEP:
            rows.setdefault(event.step, {}).update(event.data)
        elif event.step is not None and event.type == EventType.EVAL:
            rows.setdefault(event.step, {})["val_loss"] = event.data.get("loss")
    columns = (*STEP_COLUMNS, "val_loss")
    return [[step, *(rows[step].get(column) for column in columns)] for step in sorted(rows)]


def _tail(folder: RunFolder, count: int) -> list[Any]:
    from concertina.track.events import read_events

    return list(deque(read_events(folder.events_file), maxlen=count))


def _print_events(folder: RunFolder, count: int) -> None:
    from jobs.run_facts import event_line

    label = "events"
    for event in _tail(folder, count):
        sys.stdout.write(f"  {label:<12} {event_line(event)}\n")
        label = ""


def _print_traceback(folder: RunFolder, summary: RunSummary) -> None:
    """Of a failed run: where the rank to blame was."""
    from concertina.track.events import EventType, read_events
    from concertina.track.summary import RunStatus

    if summary.outcome.status is not RunStatus.FAILED:
        return
    errors = [event for event in read_events(folder.events_file) if event.type == EventType.ERROR]
    text = str(errors[-1].data.get("traceback") or "") if errors else ""
    for number, line in enumerate(text.rstrip().splitlines()[-TRACEBACK_LINES:]):
        label = "" if number else "traceback"
        sys.stdout.write(f"  {label:<12} {line}\n")


def _plain(event: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(event).items() if key != "end_offset"}


def _next(folder: RunFolder, summary: RunSummary, where: str) -> list[tuple[str, str]]:
    """What one would type now, by how the run stands."""
    from concertina.track.summary import RunStatus

    name = summary.run_id
    again = (f"concertina runs show {name}{where}", "look again")
    commands = []
    if summary.outcome.status is RunStatus.LOST or (summary.outcome.status.is_final and summary.mlflow.behind_bytes):
        commands.append((f"concertina runs show {name}{where} --sync", "write its end, and send MLflow the rest"))
    if summary.outcome.status in (RunStatus.FAILED, RunStatus.STOPPED, RunStatus.KILLED, RunStatus.LOST):
        if summary.checkpoints:
            commands.append((f"concertina train --resume {name}{where}", "go on from its last checkpoint"))
        else:
            commands.append((f"concertina train {_short(folder.job_file)}", "the same job again, from the start"))
    if summary.checkpoints:
        commands.append((f"concertina ckpt verify {name}{where}", "compare its checkpoints with their checksums"))
    if summary.outcome.status.is_final:
        commands.append((f"concertina runs show {name}{where} -o csv", "every step, to plot"))
    return commands or [again]


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _where(storage: Path) -> str:
    return "" if storage == Path(DEFAULT_STORAGE) else f" --storage {storage}"
