"""What ranks and the coordinator say to each other: frozen values that travel as JSON lines.

Members say, the coordinator orders (`Control`, `Halt`, `Prepare`, `Move`). A message a reader does not know is an error
of ours, not of a user. What a generation, a step and a seating are: docs/elastic.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

__all__ = [
    "AnomalySeen",
    "Committed",
    "Control",
    "Evaluated",
    "Finished",
    "Formed",
    "Halt",
    "Halted",
    "Keep",
    "Message",
    "Move",
    "PartWritten",
    "Pause",
    "Prepare",
    "Prepared",
    "RankError",
    "RolledBack",
    "TimeSpent",
    "decode",
    "encode",
]


@dataclass(frozen=True)
class Message:
    """Base of all messages; subclasses register themselves by `kind`."""

    kind: ClassVar[str] = ""
    _known: ClassVar[dict[str, type[Message]]] = {}

    def __init_subclass__(cls) -> None:
        Message._known[cls.__name__] = cls


@dataclass(frozen=True)
class Prepared(Message):
    """The groups of a coming generation are formed, and there is room for its share; with a `failure` they are not."""

    member: int
    generation: int
    seconds: float
    failure: str = ""


@dataclass(frozen=True)
class Formed(Message):
    """A member has adopted its share of a generation, verified, and begins after `step`."""

    member: int
    generation: int
    step: int
    seconds: dict[str, float] = field(default_factory=dict)
    moved_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Halted(Message):
    """A member computes nothing, and says what it has.

    `answers` is the newest HALT it has heard, -1 for none. `generation` is the one it has adopted, as a rank or as a
    spare, -1 when it has no whole state of it; `verified` a later one whose state it has beside it, else -1. `step` is
    applied (of a spare, the one it was adopted at); `pending` may be completed with the `totals` of another. `records`
    are metrics of steps that the coordinator may not have yet. `failure` is empty when it stopped because it was asked
    to, else it was at work in `failed`.
    """

    member: int
    answers: int
    generation: int
    verified: int
    step: int
    pending: int | None
    totals: list[float] | None
    records: list[dict[str, Any]]
    evaluated: int
    failure: str
    failed: int = -1


@dataclass(frozen=True)
class TimeSpent(Message):
    """The totals of a member's timesheet, and the bucket it is in."""

    member: int
    seconds: dict[str, float]
    inside: str


@dataclass(frozen=True)
class Committed(Message):
    """A step every rank has applied, with its metrics. Sent by the first rank only, in order."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluated(Message):
    """Validation loss after a step, of a mixture also of each source. Sent by the first rank only."""

    step: int
    loss: float
    by_source: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PartWritten(Message):
    """This rank's part of a generation's checkpoint is on storage; `facts` goes into the manifest."""

    rank: int
    generation: int
    step: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class AnomalySeen(Message):
    """A loss or gradient the policy acted on. Sent by the first rank only."""

    step: int
    anomaly: str
    action: str
    detail: str


@dataclass(frozen=True)
class RolledBack(Message):
    """All ranks went back to a checkpoint. Sent by the first rank only."""

    from_step: int
    to_step: int


@dataclass(frozen=True)
class Finished(Message):
    """This rank of a generation left the loop in order: `reason` is `done`, `stopped` or `anomaly`."""

    rank: int
    step: int
    reason: str
    generation: int = 0


@dataclass(frozen=True)
class RankError(Message):
    """This rank raised. `hardware` marks what another member would not meet."""

    rank: int
    kind_of_error: str
    message: str
    traceback: str
    exit_code: int
    hardware: bool


@dataclass(frozen=True)
class Control(Message):
    """Coordinator to the first rank: what it puts on the next step's all-reduce."""

    stop: bool = False
    checkpoint: bool = False
    regroup: bool = False


@dataclass(frozen=True)
class Pause(Message):
    """Coordinator to members that have halted: there are too few of you, keep what you have."""


@dataclass(frozen=True)
class Keep(Message):
    """Coordinator to members that have halted and are too few: the `present` ones have all of generation `source` at
    `step` between them; write it to a checkpoint, and stay halted. Who is one behind completes it with `totals`.

    `generation` is a number of its own, which no generation that trains has.
    """

    generation: int
    source: int
    present: list[int]
    step: int
    totals: list[float] | None = None


@dataclass(frozen=True)
class Halt(Message):
    """Coordinator to members: leave every generation before this one, at once, and say what you have."""

    generation: int


@dataclass(frozen=True)
class Prepare(Message):
    """Coordinator to members: form the groups of a generation, meeting at `store`, and make room. `seating` is JSON."""

    generation: int
    seating: dict[str, Any]
    store: tuple[str, int]
    fresh: bool = False
    """Whether the weights begin with their start values."""

    def __post_init__(self) -> None:
        host, port = self.store  # JSON makes a list of it
        object.__setattr__(self, "store", (host, port))


@dataclass(frozen=True)
class Move(Message):
    """Coordinator to members: take your share of a generation and train.

    The state is that of `source`, whose `seating` is JSON and of which only the `present` members are left, at `step`:
    who is one behind completes it with `totals`. Without a source it comes from `checkpoint`, or is the beginning.
    `leaving` have no seat as they are about to go.
    """

    generation: int
    source: int | None = None
    seating: dict[str, Any] | None = None
    present: list[int] = field(default_factory=list)
    nodes: dict[str, str] = field(default_factory=dict)
    step: int = 0
    totals: list[float] | None = None
    checkpoint: str | None = None
    evaluated: int = 0
    saved: int = 0
    leaving: list[int] = field(default_factory=list)


def encode(message: Message) -> dict[str, Any]:
    """JSON-able."""
    return {"kind": type(message).__name__, **asdict(message)}


def decode(document: dict[str, Any]) -> Message:
    """The message `encode` was given."""
    fields = dict(document)
    return Message._known[fields.pop("kind")](**fields)
