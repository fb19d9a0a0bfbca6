"""What is written down, and told, of a run that went on with other members, and of each member's coming and going?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["PHASES", "Cause", "MemberNews", "MemberWhat", "Recovery", "short_layout", "short_node"]

_RAYS_NODE_ID = re.compile("[0-9a-f]{56}")

PHASES = ("halt_s", "prepare_s", "move_s", "resume_s")
"""In the order in which they begin; the second overlaps the first."""


@dataclass(frozen=True)
class Cause:
    """Who was lost, and why. Without a rank: a change that was planned, which `reason` names."""

    reason: str
    member: int | None = None
    rank: int | None = None
    node: str | None = None


@dataclass(frozen=True)
class Recovery:
    """The data of a `recovery` event; `str` is its one line."""

    generation: int
    cause: Cause
    world_before: int
    world_after: int
    step: int
    """The newest applied: nothing up to it is done again."""
    stall_s: float
    """From the fault, or from the halt of a planned change, to the first step of the new generation."""
    detected_s: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    steps_completed: int = 0
    bytes_local: int = 0
    bytes_moved: int = 0
    layout: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recovery:
        """Fields of newer versions are passed over. Raises TypeError when one that is needed is absent."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        cause = known.pop("cause", None) or {}
        told = {name: cause[name] for name in Cause.__dataclass_fields__ if name in cause}
        return cls(cause=Cause(**{"reason": "", **told}), **known)

    def __str__(self) -> str:
        step = f"step {self.step} {'completed' if self.steps_completed else 'kept'}"
        degrees = short_layout(self.layout)
        world = f"world {self.world_before} -> {self.world_after}{f' {degrees}' if degrees else ''}"
        return f"{self._what()}: {world}, {step}, {_short_bytes(self.bytes_moved)} moved"

    def _what(self) -> str:
        reason = f" ({self.cause.reason})" if self.cause.reason else ""
        if self.cause.rank is not None:
            return f"recovered in {self.stall_s:.2f}s from the loss of rank {self.cause.rank}{reason}"
        if self.cause.member is not None and self.world_after <= self.world_before:
            return f"recovered in {self.stall_s:.2f}s from the loss of member {self.cause.member}{reason}"
        return f"changed over in {self.stall_s:.2f}s{reason}"


class MemberWhat(StrEnum):
    """What happened to a member."""

    BORN = "born"
    """Its process was asked for."""
    READY = "ready"
    """It has imported, connected and can be given a seat."""
    SPARE = "spare"
    """It waits without a seat."""
    LOST = "lost"
    LEFT = "left"
    """In order."""


@dataclass(frozen=True)
class MemberNews:
    """The data of a `member` event; `str` is its one line."""

    member: int
    what: MemberWhat
    node: str
    pid: int | None = None
    reason: str = ""
    """Of one that left: why before the others; empty when the run was over."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemberNews:
        """Raises KeyError, ValueError when it is none."""
        pid, reason = data.get("pid"), str(data.get("reason") or "")
        return cls(int(data["member"]), MemberWhat(data["what"]), str(data.get("node") or "?"), pid, reason)

    def __str__(self) -> str:
        pid = "" if self.pid is None else f", process {self.pid}"
        reason = f": {self.reason}" if self.reason else ""
        return f"member {self.member} {self.what} on node {short_node(self.node)}{pid}{reason}"


def short_node(node: str) -> str:
    """The name of a node for people: Ray's 56 hexadecimal digits are told apart by the first 8."""
    return node[:8] if _RAYS_NODE_ID.fullmatch(node) else node


def short_layout(layout: Mapping[str, Any]) -> str:
    """`dp3 ep1`: dp and ep, and every other degree that is not 1; `pp2x3` has three pieces a stage. `edp` follows from
    the others and is left out."""
    degrees: dict[str, Any] = {}
    for key, value in layout.items():
        degrees |= value if isinstance(value, Mapping) else {key: value}
    shown = [f"{axis}{degrees[axis]}" for axis in ("pp", "cp", "tp", "etp") if degrees.get(axis, 1) != 1]
    always = [f"{axis}{degrees[axis]}" for axis in ("dp", "ep") if axis in degrees]
    pieces = degrees.get("virtual", 1)
    return " ".join(f"{each}x{pieces}" if each.startswith("pp") and pieces > 1 else each for each in [*always, *shown])


def _short_bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
