"""Break a running run on purpose: `concertina chaos latest kill --rank 2 --at-step 30`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.output import Output, OutputOption, next_commands, print_json

if TYPE_CHECKING:
    from concertina.elastic.chaos import Injection
    from concertina.track.run import RunFolder
    from infra.cluster_access import ClusterAccess

__all__ = ["chaos"]


def chaos(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Its id, the beginning of it, its folder, or latest.")],
    deed: Annotated[str, typer.Argument(metavar="DEED", help="kill, freeze, slow, corrupt ...: see above.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Whoever has this rank then.")] = None,
    member: Annotated[int | None, typer.Option(min=0, help="This process of the run.")] = None,
    node: Annotated[int | None, typer.Option(min=0, help="This Ray node and all on it; the head is 0.")] = None,
    agent: Annotated[int | None, typer.Option(min=0, help="The run's agent on this node.")] = None,
    coordinator: Annotated[bool, typer.Option("--coordinator", help="The run's coordinator.")] = False,
    at_step: Annotated[int | None, typer.Option(min=1, help="When this step begins, or the next one.")] = None,
    at_phase: Annotated[str | None, typer.Option(help="When a member or the run comes to this phase.")] = None,
    after: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="So much later.")] = None,
    times: Annotated[int | None, typer.Option(min=1, help="How often in all; flap: 3.")] = None,
    every: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Time between two; 10.")] = None,
    lead: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="How long a notice leaves; 30.")] = None,
    cloud: Annotated[str | None, typer.Option(help="Whose notice: aws, gcp or azure, which may take it back.")] = None,
    factor: Annotated[float | None, typer.Option(min=1, help="How much slower; 3.")] = None,
    lasting: Annotated[float | None, typer.Option("--for", metavar="SECONDS", help="How long it is slow; 60.")] = None,
    address: Annotated[str | None, typer.Option(help="The Ray cluster, if not where the run says it is.")] = None,
    storage: Annotated[Path, typer.Option(help="The folder of runs: a job's storage_path.")] = Path("runs"),
    output: OutputOption = Output.TEXT,
) -> None:
    """Kill, freeze or bring back a part of a running run, to see it go on.

    \b
    Phases of a member: step, validation, checkpoint, halted, preparing, prepared, moving, verified, adopted;
    of the run: forming, training, recovering, checkpointing.
    DEED is kill, freeze, thaw, slow (a process stands still for a part of every tenth of a second), corrupt (a bit of a
    weight in its memory flips), join (one more Ray node of a local cluster), flap (killed and brought back, again and
    again), notice (a fake metadata service tells a node that it is taken back, and then it is) or cancel (it stays).

    \b
    Example:
      concertina chaos RUN kill --rank 2 --at-step 30
      concertina chaos RUN flap --node 1 --times 3 --every 20
      concertina chaos RUN notice --node 1 --lead 30
    """
    from concertina.track.run import open_run

    whom = {"rank": rank, "member": member, "node": node, "agent": agent}
    how = {"times": 3 if times is None and deed == "flap" else times, "every": every, "lead": lead, "cloud": cloud}
    how |= {"step": at_step, "phase": at_phase, "after": after, "factor": factor, "for": lasting}
    injection = _injection(deed, {**whom, **how}, coordinator)
    folder = open_run(storage, run)
    _strike(folder, injection, address, output)
    if output is Output.TEXT:
        where = "" if storage == Path("runs") else f" --storage {storage}"
        next_commands([(f"concertina runs show {folder.run_id}{where}", "how it took it")])


def _injection(deed: str, given: dict[str, object], coordinator: bool) -> Injection:
    """As the line of `--chaos` that says the same. Raises UserError."""
    from concertina.elastic.chaos import parse

    words = [f"{name}={str(value).replace(' ', '_')}" for name, value in given.items() if value is not None]
    return parse(" ".join([deed, *words, *(["coordinator"] if coordinator else [])]))


def _strike(folder: RunFolder, injection: Injection, address: str | None, output: Output) -> None:
    """Carry it out, and say each turn of it."""
    from actors.injector import Injector, Strike

    access = _join_cluster(folder, address)

    def tell(strike: Strike) -> None:
        if output is Output.JSON:
            print_json({**strike.__dict__, "run_id": folder.run_id})
        else:
            sys.stdout.write(f"{strike}\n")
        sys.stdout.flush()

    Injector(folder, access, tell).carry_out(injection)


def _join_cluster(folder: RunFolder, address: str | None) -> ClusterAccess:
    """The cluster the run is on, by its journal. Raises NotFoundError when it does not run."""
    from concertina.errors import NotFoundError
    from infra.find_cluster import find_cluster

    access = find_cluster(address or str(_journal(folder).get("cluster", "")) or None)
    if access is None:
        raise NotFoundError(f"on which cluster is run {folder.run_id}? Give its --address, host:port")
    access.connect(f"concertina-{folder.run_id}")
    return access


def _journal(folder: RunFolder) -> dict[str, Any]:
    import json

    from concertina.errors import NotFoundError

    try:
        return dict(json.loads(folder.journal_file.read_text()))
    except FileNotFoundError:
        text = f"run {folder.run_id} does not run: start it with `concertina train`, then break it"
        raise NotFoundError(text) from None
