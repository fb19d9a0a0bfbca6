"""Several hosts on this machine, to break: `concertina lab up --hosts 4`, then `concertina lab partition 2`"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.output import Output, OutputOption, next_commands, print_json

if TYPE_CHECKING:
    from infra.lab import Lab

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Several hosts on this machine, to be broken.")

HostArgument = Annotated[int, typer.Argument(metavar="HOST", min=0, help="Its number; 0 is the head.")]
LabOption = Annotated[str | None, typer.Option("--lab", help="Its name, where there are several.")]
OthersOption = Annotated[list[int] | None, typer.Option("--from", help="Only between these and HOST; all others.")]


@app.command()
def up(
    hosts: Annotated[int, typer.Option(min=1, max=64, help="How many.")] = 4,
    cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs of each, as Ray counts them.")] = 1,
    mbit: Annotated[float | None, typer.Option(min=0.1, help="Megabits a second of each link; unlimited.")] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Start hosts: as root each with a network of its own (a namespace), whose links can be cut and slowed; else on
    loopback addresses. One Ray cluster spans them. Other clusters of this machine are not touched.

    \b
    Example:
      concertina lab up --hosts 4 --mbit 1000
    """
    from infra.lab import Lab

    lab = Lab.up(hosts, cpus, mbit)
    _show(lab, output)
    if output is Output.TEXT:
        next_commands(
            [
                ("concertina lab exec -- concertina train jobs/quickstart.yaml", "a run on it"),
                ("concertina lab partition 2", "cut one off"),
                ("concertina lab down", "end it"),
            ]
        )


@app.command()
def status(lab: LabOption = None, output: OutputOption = Output.TEXT) -> None:
    """Which hosts there are, and what is broken.

    \b
    Example:
      concertina lab status
    """
    _show(_find(lab), output)


@app.command()
def down(lab: LabOption = None) -> None:
    """End all of it.

    \b
    Example:
      concertina lab down
    """
    _find(lab).down()


@app.command(name="exec", context_settings={"ignore_unknown_options": True})
def execute(
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND ...", help="What to run.")],
    host: Annotated[int, typer.Option(min=0, help="On which host.")] = 0,
    lab: LabOption = None,
) -> None:
    """Run a command on a host: `train` finds the lab's cluster from there.

    \b
    Example:
      concertina lab exec -- concertina train jobs/quickstart.yaml
    """
    found = _find(lab)
    command = found.command(host, words)
    os.execvpe(command[0], command, found.environment())


@app.command()
def partition(
    host: HostArgument,
    others: OthersOption = None,
    one_way: Annotated[str | None, typer.Option(help="Only what it sends (out), or what is sent to it (in).")] = None,
    lab: LabOption = None,
) -> None:
    """Cut a host off. What is sent is lost silently, as on a real network. `heal` mends it.

    \b
    Example:
      concertina lab partition 2
      concertina lab partition 2 --from 0 --one-way out
    """
    from infra.lab import LabError

    if one_way not in (None, "in", "out"):
        raise LabError(f"--one-way={one_way}: it is in or out")
    found = _find(lab)
    found.needs_links()
    found.cut(host, others, sends=one_way != "in", hears=one_way != "out")
    _show(found, Output.TEXT)


@app.command()
def slow(
    host: HostArgument,
    mbit: Annotated[float, typer.Option(min=0.1, help="Megabits a second, in both directions.")] = 10.0,
    lab: LabOption = None,
) -> None:
    """Slow a host's link. `heal` mends it.

    \b
    Example:
      concertina lab slow 2 --mbit 10
    """
    found = _find(lab)
    found.slow(host, mbit)
    _show(found, Output.TEXT)


@app.command()
def heal(host: HostArgument, lab: LabOption = None) -> None:
    """A host's link is whole again, and as fast as it can be.

    \b
    Example:
      concertina lab heal 2
    """
    found = _find(lab)
    found.needs_links()
    found.connect(host)
    found.full_speed(host)
    _show(found, Output.TEXT)


def _on_host(name: str, what: str) -> None:
    def act(host: HostArgument, lab: LabOption = None) -> None:
        found = _find(lab)
        getattr(found, name)(host)
        _show(found, Output.TEXT)

    act.__doc__ = f"{what}\n\n\b\nExample:\n  concertina lab {name} 2\n"
    app.command(name=name)(act)


_on_host("kill", "A host loses its power: every process ends at once, and nobody hears of it.")
_on_host("boot", "Switch on a host that was killed: its Ray node joins again.")
_on_host("freeze", "Every process of a host stands still.")
_on_host("thaw", "They go on.")


def _find(name: str | None) -> Lab:
    from infra.lab import Lab

    return Lab.find(name)


def _show(lab: Lab, output: Output) -> None:
    facts = _facts(lab)
    if output is Output.JSON:
        print_json(facts)
        return
    links = "links of its own" if lab.has_links else "loopback addresses, no links (not root)"
    lines = [f"lab {lab.name}: {len(lab.hosts)} hosts, Ray at {lab.address}, {links}"]
    lines += [f"  {host['host']:>3}  {host['address']:<12}  {_state(host)}" for host in facts["hosts"]]
    sys.stdout.write("\n".join(lines) + "\n")


def _facts(lab: Lab) -> dict[str, Any]:
    hosts: list[dict[str, Any]] = []
    for host in lab.hosts:
        hosts.append(
            {
                "host": host.number,
                "address": host.address,
                "on": host.is_on,
                "frozen": host.is_frozen,
                "mbit": lab.slowed.get(host.number),
                "loses_to": sorted(target for source, target in lab.lost if source == host.number),
            }
        )
    return {"lab": lab.name, "address": lab.address, "links": lab.has_links, "hosts": hosts}


def _state(host: dict[str, Any]) -> str:
    state = "off" if not host["on"] else "frozen" if host["frozen"] else "on"
    slowed = "" if host["mbit"] is None else f", link of {host['mbit']:g} Mbit/s"
    lost = f", reaches no longer: {_numbers(host['loses_to'])}" if host["loses_to"] else ""
    return f"{state}{slowed}{lost}"


def _numbers(found: Sequence[int]) -> str:
    return ", ".join(map(str, found))
