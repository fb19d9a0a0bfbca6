"""Who is where, and what does a rank hold? `concertina layout --world 64 --pp 2 --cp 2 --tp 4 --ep 8`"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concertina.errors import ConfigError
from concertina.layout import Layout, cut, draw
from jobs.output import Output, OutputOption, next_commands, print_json, short_bytes, short_number

if TYPE_CHECKING:  # bare degrees need neither YAML nor the schema
    from concertina.config import Job
    from concertina.planner.activations import Activations
    from concertina.planner.memory import Extremes, RankBytes
    from jobs.opening import OpenedJob

__all__ = ["layout"]

_COLUMNS = {"weights": 12, "gradients": 12, "optimizer": 12, "second copies": 15, "total": 12}
"""Of the kinds of `RankBytes.to_json`, in its order, and how wide."""

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
    Of a job also: parameters, FLOPs a token, bytes of weights, gradients, optimizer and second copies (of one
    rank like itself) on the largest and the smallest rank. With -o json: the degrees of both grids and the ranks
    of every group; bytes exact.

    \b
    Example:
      concertina layout --world 64 --pp 2 --cp 2 --tp 4 --ep 8 --etp 1
      concertina layout jobs/quickstart.yaml -o json
    """
    given = {"pp": pp, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
    degrees = {axis: value for axis, value in given.items() if value is not None}
    cost = None
    if file is not None:
        opened = _open(file, world, degrees)
        chosen, cost = opened.layout, _cost(opened)
    elif world is not None:
        chosen = Layout(world, **degrees, stage_layers=())
    else:
        raise ConfigError("which layout? Give a job file, or --world and degrees: concertina layout --world 8 --ep 4")
    if output is Output.JSON:
        print_json({**chosen.to_json(), **(cost.to_json() if cost else {})})
        return
    sys.stdout.write(draw(chosen) + "\n")
    if cost:
        sys.stdout.write("\n" + "".join(f"{line}\n" for line in cost.lines()))
    words = [file] if file is not None else []
    words += [f"--{key} {value}" for key, value in {"world": world, **degrees}.items() if value is not None]
    next_commands([(f"concertina layout {' '.join(words)} -o json", "every group's ranks")])


def _open(file: str, world: int | None, degrees: dict[str, int]) -> OpenedJob:
    from jobs.opening import open_job

    overrides = [f"layout.{axis}={value}" for axis, value in degrees.items()]
    if world is not None:
        overrides += [f"cluster.num_workers={world}", "cluster.num_nodes=1"]  # nodes are not drawn
    return open_job(file, overrides)


@dataclass(frozen=True)
class _Cost:
    """What a job's model is and takes, and which layers each stage has. `micro_batch`: sequences of one; `activations`:
    of the rank `keeper`, the first of the stage that keeps most; not counted of latent attention."""

    total: int
    active: int
    flops_per_token: int
    sequence_length: int
    precision: str
    bytes_per_rank: Extremes
    stages: str
    micro_batch: int
    keeper: int
    activations: Activations | None

    def to_json(self) -> dict[str, Any]:
        found = self.bytes_per_rank
        return {
            "parameters": {"total": self.total, "active": self.active},
            "flops_per_token": self.flops_per_token,
            "bytes_per_rank": {
                "largest": {"rank": found.largest, **found.most.to_json()},
                "smallest": {"rank": found.smallest, **found.least.to_json()},
            },
            "activations": None if self.activations is None else {"rank": self.keeper, **asdict(self.activations)},
        }

    def lines(self) -> list[str]:
        """For people: what is counted stands beside the number."""
        total, active = short_number(self.total), short_number(self.active)
        stages = [f"layers      {self.stages}"] if self.stages else []
        return [
            *stages,
            f"model       {total} parameters, {active} of them active for a token",
            f"training    {_short_flops(self.flops_per_token)} a token: products of forward and backward, causal "
            f"attention over {self.sequence_length} tokens",
            *self._memory(),
            *self._activations(),
        ]

    def _activations(self) -> list[str]:
        found = self.activations
        if found is None:
            return []
        again = f", and {short_bytes(found.again)} of a layer while it is computed again" if found.again else ""
        tokens = f"{self.micro_batch} x {self.sequence_length} tokens"
        what = f"the micro-batches of {tokens} in flight" if self.stages else f"a micro-batch of {tokens}"
        where = f"rank {self.keeper}: " if self.stages else ""
        return [f"activations {where}{short_bytes(found.kept)} of {what}, even routing{again}"]

    def _memory(self) -> list[str]:
        found = self.bytes_per_rank
        names = f"memory, {self.precision:<12}" + "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())
        if found.most == found.least:
            return [names, _row("every rank", found.most)]
        return [
            names,
            _row(f"rank {found.largest}, most", found.most),
            _row(f"rank {found.smallest}, least", found.least),
        ]


def _short_flops(number: int) -> str:
    """`79.7 GFLOP`."""
    return f"{number / 1e9:.1f} GFLOP" if number >= 1e9 else f"{number / 1e6:.1f} MFLOP"


def _row(label: str, held: RankBytes) -> str:
    numbers = zip(held.to_json().values(), _COLUMNS.values(), strict=True)
    return f"  {label:<18}" + "".join(f"{short_bytes(number):>{width}}" for number, width in numbers)


def _cost(opened: OpenedJob) -> _Cost:
    from concertina.config import count_parameters
    from concertina.planner.flops import flops_per_token
    from concertina.planner.memory import extremes

    model, length, precision = opened.job.model, opened.job.data.sequence_length, opened.job.training.precision
    held, flops = extremes(model, opened.layout, precision), flops_per_token(model, length)
    micro, keeper, kept = _activations(opened.job, opened.layout)
    return _Cost(*count_parameters(model), flops, length, precision, held, _stages(opened), micro, keeper, kept)


def _stages(opened: OpenedJob) -> str:
    """`pp0 0-1 4-5, pp1 2-3 6-7`; nothing where there are none."""
    layout, layers = opened.layout, opened.job.model.num_hidden_layers
    if layout.pp == 1:
        return ""

    def shown(piece: int) -> str:
        found = layout.piece_layers(layers, piece)
        return f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0])

    pieces = [range(stage, layout.pieces, layout.pp) for stage in range(layout.pp)]
    return ", ".join(f"pp{stage} {' '.join(map(shown, each))}" for stage, each in enumerate(pieces))


def _activations(job: Job, chosen: Layout) -> tuple[int, int, Activations | None]:
    """Sequences of the largest micro-batch, the rank that keeps most, of all it has in flight, and what it keeps; None
    where that is not counted."""
    from concertina.planner.activations import activations
    from concertina.planner.traffic import Sender

    training, length, whole = job.training, job.data.sequence_length, job.model.capacity.whole_sequences
    # As the engine deals them out: the first rank of dp has most, and its first micro-batch.
    largest = len(range(*cut(training.global_batch_size // whole, chosen.dp, 0))) * whole
    number = -(-largest // (training.micro_batch_size or (largest if chosen.pp == 1 else whole)))
    sequences = len(range(*cut(largest // whole, number, 0))) * whole
    if job.model.kv_lora_rank:
        return sequences, 0, None
    on_gpu = job.cluster.device == "cuda" or (job.cluster.device == "auto" and training.precision == "bfloat16")

    def of(rank: int) -> Activations:
        sender = Sender(
            job.model,
            chosen,
            rank,
            training.precision,
            job.layout.sequence_parallel,
            recomputed=training.recomputed,
            document_mask=job.data.document_mask,
        )
        return activations(sender, length, sequences, "cuda" if on_gpu else "cpu", number)

    found = {rank: of(rank) for rank in range(0, chosen.world, chosen.stage)}
    most = max(found, key=lambda rank: found[rank].peak)
    return sequences, most, found[most]
