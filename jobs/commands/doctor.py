"""Will it run here? `concertina doctor`"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.output import Output, OutputOption, next_commands, print_json

__all__ = ["doctor"]


def doctor(
    storage: Annotated[str, typer.Option(help="Folder of runs.")] = "runs",
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", show_default="sqlite in that folder", help="MLflow's store.")
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check this machine: versions, CPUs and GPUs, disk, memory, ports, other Ray clusters, a self-test.

    \b
    Every finding that is not ok comes with its remedy. Exit code 0 when one can train here, 1 when not.

    \b
    Example:
      concertina doctor
    """
    from jobs.checkup import Status, check_all

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    checks = check_all(Path(storage), uri, os.environ)
    usable = all(check.status is not Status.FAIL for check in checks)
    if output is Output.JSON:
        print_json({"usable": usable, "checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            sys.stdout.write(f"{check.status:<4}  {check.name:<{width}}  {check.found}\n")
            if check.remedy:
                sys.stdout.write(f"{'':4}  {'':{width}}  -> {check.remedy}\n")
        failed = sum(check.status is Status.FAIL for check in checks)
        sys.stdout.write("this machine can train\n" if usable else f"{failed} check(s) failed: mend them first\n")
        if usable:
            next_commands([("concertina train jobs/quickstart.yaml", "train a small model on this machine")])
    if not usable:
        raise typer.Exit(1)
