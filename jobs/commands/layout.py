"""Who is where? `concertina layout --world 64 --pp 2 --cp 2 --tp 4 --ep 8`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from concertina.errors import ConfigError
from concertina.layout import Layout, draw
from jobs.output import Output, OutputOption, next_commands, print_json

__all__ = ["layout"]

Degree = Annotated[int | None, typer.Option(min=1, show_default="1, or the job's")]


def layout(
    file: Annotated[str | None, typer.Argument(metavar="JOB", help="A job file, or the name of one.")] = None,
    world: Annotated[int | None, typer.Option(min=1, help="Ranks.", show_default="the job's")] = None,
    pp: Degree = None,
    cp: Degree = None,
    tp: Degree = None,
    ep: Degree = None,
    etp: Degree = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Draw a layout: the same ranks twice, as attention and as the experts see them.

    \b
    dp and edp follow from the world: dp*cp*tp == edp*ep*etp == world/pp.
    With -o json: the degrees of both grids and the ranks of every group.

    \b
    Example:
      concertina layout --world 64 --pp 2 --cp 2 --tp 4 --ep 8 --etp 1
      concertina layout jobs/quickstart.yaml -o json
    """
    given = {"pp": pp, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
    degrees = {axis: value for axis, value in given.items() if value is not None}
    if file is not None:
        chosen = _of_job(file, world, degrees)
    elif world is not None:
        chosen = Layout(world, **degrees)
    else:
        raise ConfigError("which layout? Give a job file, or --world and degrees: concertina layout --world 8 --ep 4")
    if output is Output.JSON:
        print_json(chosen.to_json())
        return
    sys.stdout.write(draw(chosen) + "\n")
    words = [file] if file is not None else []
    words += [f"--{key} {value}" for key, value in {"world": world, **degrees}.items() if value is not None]
    next_commands([(f"concertina layout {' '.join(words)} -o json", "every group's ranks")])


def _of_job(file: str, world: int | None, degrees: dict[str, int]) -> Layout:
    from jobs.opening import open_job  # bare degrees need neither YAML nor the schema

    overrides = [f"layout.{axis}={value}" for axis, value in degrees.items()]
    if world is not None:
        overrides += [f"cluster.num_workers={world}", "cluster.num_nodes=1"]  # nodes are not drawn
    return open_job(file, overrides).layout
