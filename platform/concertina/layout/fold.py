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

    def __post_init__(self) -> None:
        degrees = {"pp": self.pp, "cp": self.cp, "tp": self.tp, "ep": self.ep, "etp": self.etp}
        given = {"world": self.world, **degrees}
        found = [(key, f"{key}={value} must be at least 1") for key, value in given.items() if value < 1]
        found = found or misfits(self.world, degrees, lambda degrees: world_faults(self.world, degrees))
        if found:
            lines = [line for _, line in found]
            raise LayoutError("\n".join(lines), problems=lines, keys=[key for key, _ in found])

    @classmethod
    def of(cls, world: int, pp: int = 1, cp: int = 1, tp: int = 1, ep: int = 1, etp: int = 1) -> Layout:
        """The layout with these degrees."""
        return cls(world, pp, cp, tp, ep, etp)

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

    def neighbours_of(self, rank: int, lanes: int) -> tuple[int, ...]:
        """Ranks of the stage of `rank` that stand in the same block of `lanes` lanes of tp, ascending: dp_cp for 1,
        the stage for tp."""
        block = self.coordinate(rank, Axis.TP) // lanes
        return tuple(r for r in self.group_of(STAGE, rank) if self.coordinate(r, Axis.TP) // lanes == block)

    @property
    def degrees(self) -> dict[str, int]:
        """`world`, then the degree of every axis by name."""
        return {"world": self.world, **{axis.value: self.degree(axis) for axis in Axis}}

    def to_json(self) -> dict[str, Any]:
        """`world`, the degrees of both grids, and every group by name, ready for json.dumps."""
        return {
            "world": self.world,
            "attention": {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp},
            "expert": {"pp": self.pp, "edp": self.edp, "ep": self.ep, "etp": self.etp},
            "groups": {name: self.groups(name) for name in GROUPS},
        }
