"""Is this job file right? `concertina validate jobs/quickstart.yaml`"""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from concertina.config import count_parameters, digest, dump_job
from concertina.errors import ConfigError
from jobs.opening import OpenedJob, SetOption, open_job
from jobs.output import Output, OutputOption, next_commands, print_json, short_number

__all__ = ["validate"]


def validate(
    files: Annotated[list[str], typer.Argument(metavar="JOB", help="Job files, or names of jobs in jobs/.")],
    overrides: SetOption = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print every key, defaults included.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check job files without a cluster: keys, types, bounds, and whether layout, model and batch fit.

    \b
    Every problem is a line of its own with file, line and remedy; the exit code is then 2.
    With -o json there is one object a file.

    \b
    Example:
      concertina validate jobs/quickstart.yaml --set training.steps=50
    """
    opened: list[OpenedJob] = []
    problems: list[str] = []
    for file in files:
        try:
            opened.append(open_job(file, overrides))
        except ConfigError as error:
            found = error.data.get("problems", [error.message])
            problems += found
            if output is Output.JSON:
                print_json({"job": file, "valid": False, "problems": found})
            continue
        _report(file, opened[-1], resolved, output)
    if problems:
        raise ConfigError("\n".join(problems), problems=problems)
    if output is Output.TEXT and not resolved and len(files) == 1:
        who = f"concertina layout {_degrees(opened[0]) if overrides else files[0]}"
        run = " ".join([f"concertina train {files[0]}", *(f"--set {shlex.quote(item)}" for item in overrides or ())])
        next_commands([(who, "who is where"), (run, "run it")])


def _degrees(opened: OpenedJob) -> str:
    """The layout as options: `concertina layout` knows no --set."""
    layout = opened.layout
    degrees = {axis: getattr(layout, axis) for axis in ("pp", "cp", "tp", "ep", "etp")}
    return " ".join([f"--world {layout.world}", *(f"--{axis} {n}" for axis, n in degrees.items() if n > 1)])


def _report(file: str, opened: OpenedJob, resolved: bool, output: Output) -> None:
    if output is Output.JSON:
        print_json({"job": file, "valid": True, **_facts(opened)})
    elif resolved:
        sys.stdout.write(dump_job(opened.job))
    else:
        sys.stdout.write(f"{file} is valid\n" + "".join(f"  {line}\n" for line in _lines(opened)))


def _facts(opened: OpenedJob) -> dict[str, Any]:
    job, layout = opened.job, opened.layout
    return {
        "name": job.name,
        "digest": digest(job),
        "parameters": count_parameters(job.model)._asdict(),
        "layout": layout.facts,
        "tokens_per_step": job.training.global_batch_size * job.data.sequence_length,
        "steps": job.training.steps,
    }


def _lines(opened: OpenedJob) -> list[str]:
    job, layout = opened.job, opened.layout
    total, active = count_parameters(job.model)
    batch, length, steps = job.training.global_batch_size, job.data.sequence_length, job.training.steps
    tokens = short_number(steps * batch * length)
    pieces = f" ({layout.virtual} pieces each)" if layout.virtual > 1 else ""
    return [
        f"model     {short_number(total)} parameters, {short_number(active)} of them active for a token",
        f"layout    {layout.world} ranks: pp {layout.pp}{pieces}, attention dp {layout.dp} cp {layout.cp} "
        f"tp {layout.tp}, experts edp {layout.edp} ep {layout.ep} etp {layout.etp}",
        f"training  {steps} steps of {batch} sequences of {length} tokens: {tokens} tokens",
    ]
