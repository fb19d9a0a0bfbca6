"""What is to be broken in a run on purpose, and when? One line says it: `kill rank=2 step=30`.

    DEED [rank=N | member=N | node=N | coordinator | agent=N] [step=N | phase=NAME | after=SECONDS] [times=N] [every=S]
    notice node=N [lead=SECONDS] [cloud=NAME] [when]
    slow rank=N [factor=F] [for=SECONDS] [when]

Pure: a line in, an injection out; an injection and the run's journal in, the victim out. `actors/injector.py` strikes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from concertina.elastic.notices import Source
from concertina.errors import UserError
from concertina.layout import Seating

__all__ = ["MEMBER_PHASES", "RUN_PHASES", "Deed", "Injection", "Kind", "Scene", "Victim", "parse"]

MEMBER_PHASES = (
    "step",
    "validation",
    "checkpoint",
    "last checkpoint",
    "halted",
    "preparing",
    "prepared",
    "moving",
    "verified",
    "adopted",
)
"""What a member says of its training thread; of those that last for microseconds it is the moment they begin."""

RUN_PHASES = ("waiting_for_capacity", "forming", "training", "recovering", "checkpointing")
"""States of the run, as its events have them."""


class Deed(StrEnum):
    """What is done to the victim."""

    KILL = "kill"
    FREEZE = "freeze"
    THAW = "thaw"
    JOIN = "join"
    """One more Ray node; there is no victim."""
    FLAP = "flap"
    """Killed and brought back, again and again."""
    SLOW = "slow"
    """It stands still for a part of every tenth of a second, so that it takes `factor` times as long, for `for_s`."""
    CORRUPT = "corrupt"
    """One bit of a weight that it holds as others do flips in its memory."""
    NOTICE = "notice"
    """A node is told that it will be taken back, and it is, `lead_s` later."""
    CANCEL = "cancel"
    """The notice is taken back: the node stays."""


class Kind(StrEnum):
    """What a victim is."""

    RANK = "rank"
    MEMBER = "member"
    NODE = "node"
    """The raylet of a Ray node, and every process below it."""
    COORDINATOR = "coordinator"
    AGENT = "agent"
    """The agent of a node, counted as nodes are."""


@dataclass(frozen=True)
class Injection:
    """`deed` on `kind` `number`, when a step begins (`step`), a phase does, `after_s` seconds, or at once; `times` in
    all, one every `every_s`."""

    deed: Deed
    kind: Kind | None = None
    number: int = 0
    step: int | None = None
    phase: str | None = None
    after_s: float = 0.0
    times: int = 1
    every_s: float = 10.0
    lead_s: float = 30.0
    factor: float = 3.0
    for_s: float = 60.0
    cloud: str = Source.AZURE.value
    """Whose notice it is; only Azure's may be taken back."""

    def __str__(self) -> str:
        whom = "" if self.kind is None else f" {self.kind.value}"
        whom += "" if self.kind in (None, Kind.COORDINATOR) else f"={self.number}"
        when = "" if self.step is None else f" step={self.step}"
        when += "" if self.phase is None else f" phase={self.phase.replace(' ', '_')}"
        when += f" after={self.after_s:g}" if self.after_s else ""
        often = f" times={self.times} every={self.every_s:g}" if self.times > 1 else ""
        slow = f" factor={self.factor:g} for={self.for_s:g}" if self.deed is Deed.SLOW else ""
        notice = f" lead={self.lead_s:g} cloud={self.cloud}" if self.deed is Deed.NOTICE else ""
        return f"{self.deed.value}{whom}{notice}{slow}{when}{often}"


@dataclass(frozen=True)
class Victim:
    """Whom an injection means: one member, or a whole node, or one of the processes that have no number."""

    kind: Kind
    member: int | None = None
    node: str = ""
    pid: int = 0

    def __str__(self) -> str:
        match self.kind:
            case Kind.NODE | Kind.AGENT:
                return f"{'' if self.kind is Kind.NODE else 'the agent of '}node {self.node[:8]}"
            case Kind.COORDINATOR:
                return f"the coordinator, process {self.pid}"
        return f"member {self.member}, process {self.pid} on node {self.node[:8]}"


@dataclass(frozen=True)
class Scene:
    """Who is where: members by rank, pids and nodes by member. `order` numbers the nodes, the head is 0."""

    ranks: tuple[int, ...]
    pids: Mapping[int, int]
    nodes: Mapping[int, str]
    coordinator: int
    order: tuple[str, ...]

    @classmethod
    def of(cls, journal: Mapping[str, Any], living: Sequence[str]) -> Scene:
        """From a run's journal and the ids of the nodes that live, the head's first."""
        seatings = {int(number): Seating.from_json(found) for number, found in journal["seatings"].items()}
        ranks = seatings[max(seatings)].members if seatings else ()
        nodes = {int(member): node for member, node in journal["nodes"].items() if node in living}
        pids = {int(member): pid for member, pid in journal["pids"].items() if int(member) in nodes}
        return cls(ranks, pids, nodes, int(journal["coordinator_pid"]), tuple(living))

    def find(self, injection: Injection) -> Victim:
        """Whom it means now. Raises UserError, one line, when there is nobody of that name."""
        number, kind = injection.number, injection.kind
        match kind:
            case Kind.COORDINATOR:
                return Victim(kind, pid=self.coordinator)
            case Kind.NODE | Kind.AGENT:
                if number >= len(self.order):
                    raise UserError(f"there is no node {number}: the cluster has {len(self.order)}, counted from 0")
                if kind is Kind.NODE and number == 0 and injection.deed not in _NOTICES:
                    raise UserError("node 0 has Ray's control store and the driver: no run survives it; kill another")
                return Victim(kind, node=self.order[number])
            case Kind.RANK:
                if number >= len(self.ranks):
                    raise UserError(f"there is no rank {number}: the run has {len(self.ranks)}, counted from 0")
                return self._member(kind, self.ranks[number])
        return self._member(Kind.MEMBER, number)

    def _member(self, kind: Kind, member: int) -> Victim:
        if member not in self.pids:
            there = ", ".join(map(str, sorted(self.pids))) or "none"
            raise UserError(f"there is no member {member}: those there are {there}")
        return Victim(kind, member, self.nodes[member], self.pids[member])


def parse(line: str) -> Injection:
    """The injection of a line. Raises UserError, which says what is wrong with it."""
    first, *words = line.split() or [""]
    if first not in set(Deed):
        raise UserError(f"{line!r}: it begins with {', '.join(Deed)}")
    found: dict[str, Any] = {"deed": Deed(first)}
    for word in words:
        name, sign, value = word.partition("=")
        if name in set(Kind):
            if "kind" in found:
                raise UserError(f"{line!r}: one victim a line")
            found |= {"kind": Kind(name), "number": 0}
            if name != Kind.COORDINATOR:
                found["number"] = int(_number(line, name, value, whole=True))
            continue
        if name not in _WHEN or not sign:
            raise UserError(f"{line!r}: {word!r} is none of rank=N member=N node=N coordinator agent=N {_SPELLED}")
        field, whole = _WHEN[name]
        found[field] = value.replace("_", " ") if whole is None else _number(line, name, value, whole)
    injection = Injection(**found)
    _refuse(line, injection)
    return injection


_WHEN: dict[str, tuple[str, bool | None]] = {
    "step": ("step", True),
    "phase": ("phase", None),
    "after": ("after_s", False),
    "times": ("times", True),
    "every": ("every_s", False),
    "lead": ("lead_s", False),
    "cloud": ("cloud", None),
    "factor": ("factor", False),
    "for": ("for_s", False),
}
_SPELLED = "step=N phase=NAME after=SECONDS times=N every=SECONDS lead=SECONDS cloud=NAME factor=F for=S"
_NOTICES = (Deed.NOTICE, Deed.CANCEL)
_CLOUDS = tuple(source.value for source in Source if source is not Source.RAY)


def _number(line: str, name: str, value: str, whole: bool) -> float:
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        number = -1
    if not 0 <= number < 1e9:
        raise UserError(f"{line!r}: {name} takes a {'whole ' if whole else ''}number from 0 on")
    return number


def _refuse(line: str, injection: Injection) -> None:
    deed, kind = injection.deed, injection.kind
    problem = ""
    phases = [*MEMBER_PHASES, *(phase.replace("_", " ") for phase in RUN_PHASES)]
    if deed is Deed.JOIN and kind is not None:
        problem = "join makes a node and takes no victim"
    elif deed in (*_NOTICES, Deed.SLOW) and injection.phase in MEMBER_PHASES:
        problem = f"{deed.value} has phases of the run only: {', '.join(RUN_PHASES)}"
    elif deed in _NOTICES and kind is not Kind.NODE:
        problem = f"a {deed.value} is of a node: node=N"
    elif deed is Deed.SLOW and (kind not in (Kind.RANK, Kind.MEMBER) or injection.factor <= 1):
        problem = "a rank or a member is made slow, by a factor of more than 1"
    elif deed is Deed.CORRUPT and (kind not in (Kind.RANK, Kind.MEMBER) or injection.step is None):
        problem = "the memory of a rank or a member is corrupted, when a step begins: step=N"
    elif injection.cloud not in _CLOUDS:
        problem = f"cloud is one of {', '.join(_CLOUDS)}"
    elif deed is not Deed.JOIN and kind is None:
        problem = "whom? rank=N, member=N, node=N, coordinator or agent=N"
    elif kind in (Kind.NODE, Kind.AGENT) and deed in (Deed.FREEZE, Deed.THAW):
        problem = f"a frozen {kind.value} hears no thaw: freeze its ranks" if kind is not None else ""
    elif injection.step is not None and injection.phase is not None:
        problem = "a step or a phase, not both"
    elif injection.phase is not None and injection.phase not in phases:
        problem = f"phase is one of {', '.join(phase.replace(' ', '_') for phase in phases)}"
    elif kind in (Kind.COORDINATOR, Kind.AGENT, None) and injection.phase in MEMBER_PHASES:
        problem = f"{kind.value if kind else 'a join'} has phases of the run only: {', '.join(RUN_PHASES)}"
    elif injection.times < 1:
        problem = "times is at least 1"
    if problem:
        raise UserError(f"{line!r}: {problem}")
