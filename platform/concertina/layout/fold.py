"""Who is where? Two grids over the same ranks: attention (pp, dp, cp, tp), experts (pp, edp, ep, etp).

MoE parallel folding, arXiv 2504.14960: the only bond between the grids is the pipeline, whose groups are
identical; inside a stage dp*cp*tp == edp*ep*etp, and each side cuts the stage as it likes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from concertina.errors import LayoutError
from concertina.layout.axis import ATTENTION, EXPERT, GROUPS, STAGE, Axis
from concertina.layout.box import cut
from concertina.layout.grid import Grid
from concertina.layout.refusals import misfits, world_faults

__all__ = ["Layout"]

_AXES = {**GROUPS, STAGE: (Axis.DP, Axis.CP, Axis.TP)}


@dataclass(frozen=True)
class Layout:
    """A fitting pair of grids; `dp` and `edp` follow from the world. A value: same degrees, same layout.

    Raises LayoutError with every misfit: `data["problems"]` holds the lines, `data["keys"]` the axis of each.
    """

    world: int
    pp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    virtual: int = 1
    """Pieces of the model that a pipeline stage has; more than one interleaves them."""
    stage_layers: tuple[int, ...] = ()
    """Layers of each of the pp * virtual pieces, in the model's order; empty: as evenly as can be."""

    def __post_init__(self) -> None:
        degrees = {"pp": self.pp, "cp": self.cp, "tp": self.tp, "ep": self.ep, "etp": self.etp}
        given = {"world": self.world, **degrees, "virtual": self.virtual}
        found = [(key, f"{key}={value} must be at least 1") for key, value in given.items() if value < 1]
        if self.virtual > 1 and self.pp == 1:
            found.append(("virtual", f"virtual={self.virtual} needs stages: set pp to 2 or more"))
        if self.stage_layers and (len(self.stage_layers) != self.pieces or min(self.stage_layers) < 1):
            found.append(("stage_layers", f"stage_layers must be {self.pieces} positive numbers, one a piece"))
        found = found or misfits(self.world, degrees, lambda degrees: world_faults(self.world, degrees))
        if found:
            lines = [line for _, line in found]
            raise LayoutError("\n".join(lines), problems=lines, keys=[key for key, _ in found])

    @property
    def pieces(self) -> int:
        """Into how many pieces of consecutive layers the model is cut."""
        return self.pp * self.virtual

    def piece_layers(self, num_layers: int, piece: int) -> range:
        """The layers of piece number `piece`, which is on stage `piece % pp`."""
        if not self.stage_layers:
            return range(*cut(num_layers, self.pieces, piece))
        assert sum(self.stage_layers) == num_layers, (self, num_layers)
        start = sum(self.stage_layers[:piece])
        return range(start, start + self.stage_layers[piece])

    def pieces_of(self, rank: int) -> range:
        """The pieces that `rank` has, in the model's order."""
        return range(self.coordinate(rank, Axis.PP), self.pieces, self.pp)

    def layers_of(self, num_layers: int, rank: int) -> list[int]:
        """The layers that `rank` has, in the model's order."""
        return [layer for piece in self.pieces_of(rank) for layer in self.piece_layers(num_layers, piece)]

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage: dp*cp*tp == edp*ep*etp."""
        return self.world // self.pp

    @property
    def dp(self) -> int:
        """Data parallel degree of attention."""
        return self.stage // (self.cp * self.tp)

    @property
    def edp(self) -> int:
        """Data parallel degree of experts."""
        return self.stage // (self.ep * self.etp)

    @cached_property
    def attention(self) -> Grid:
        """The grid that attention and dense layers see."""
        return Grid(ATTENTION, (self.tp, self.cp, self.dp, self.pp))

    @cached_property
    def expert(self) -> Grid:
        """The grid that routed experts see."""
        return Grid(EXPERT, (self.etp, self.ep, self.edp, self.pp))

    def grid(self, *axes: Axis) -> Grid:
        """The grid that has `axes`; the pipeline alone is found on attention's."""
        return self.attention if set(axes) <= set(ATTENTION) else self.expert

    def degree(self, axis: Axis) -> int:
        """Size of `axis`."""
        return self.grid(axis).degree(axis)

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Position of `rank` along `axis`."""
        return self.grid(axis).coordinate(rank, axis)

    def groups(self, name: str) -> list[list[int]]:
        """Every group called `name` (tp cp dp dp_cp tp_cp dp_cp_tp pp ep etp edp etp_ep): each rank is in one."""
        axes = _AXES[name]
        return self.grid(*axes).groups(axes)

    def group_of(self, name: str, rank: int) -> tuple[int, ...]:
        """Ranks of the group called `name` that `rank` is in, ascending."""
        axes = _AXES[name]
        return self.grid(*axes).group_of(axes, rank)

    def ends_of(self, rank: int) -> tuple[int, ...]:
        """Ranks of the first and the last stage in the lane of tp of `rank`, ascending; none but `rank` for a rank of
        another stage, or where there is one stage."""
        stage = self.coordinate(rank, Axis.PP)
        if self.pp == 1 or stage not in (0, self.pp - 1):
            return (rank,)
        first = tuple(r - stage * self.stage for r in self.group_of("dp_cp", rank))
        return first + tuple(r + (self.pp - 1) * self.stage for r in first)

    def neighbours_of(self, rank: int, lanes: int) -> tuple[int, ...]:
        """Ranks of the stage of `rank` that stand in the same block of `lanes` lanes of tp, ascending: dp_cp for 1,
        the stage for tp."""
        block = self.coordinate(rank, Axis.TP) // lanes
        return tuple(r for r in self.group_of(STAGE, rank) if self.coordinate(r, Axis.TP) // lanes == block)

    @property
    def degrees(self) -> dict[str, int]:
        """`world`, then the degree of every axis by name."""
        return {"world": self.world, **{axis.value: self.degree(axis) for axis in Axis}}

    @property
    def facts(self) -> dict[str, Any]:
        """`degrees` and, where they are not the default, `virtual` and `stage_layers`; ready for json.dumps."""
        stages = {"virtual": self.virtual} if self.virtual > 1 else {}
        uneven = {"stage_layers": list(self.stage_layers)} if self.stage_layers else {}
        return {**self.degrees, **stages, **uneven}

    def to_json(self) -> dict[str, Any]:
        """`world`, the degrees of both grids, and every group by name, ready for json.dumps."""
        return {
            "world": self.world,
            "attention": {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp},
            "expert": {"pp": self.pp, "edp": self.edp, "ep": self.ep, "etp": self.etp},
            **{key: value for key, value in self.facts.items() if key not in self.degrees},
            "groups": {name: self.groups(name) for name in GROUPS},
        }
