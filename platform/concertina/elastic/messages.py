"""What ranks and the coordinator say to each other: frozen values that travel as JSON lines.

Rank to coordinator: everything but `Control`. A message a reader does not know is an error of ours, not of a user.
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
    "Message",
    "PartWritten",
    "RankError",
    "RolledBack",
    "Started",
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
class Started(Message):
    """A rank has its groups and its state and begins after `step`."""

    rank: int
    step: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed(Message):
    """A step every rank has applied, with its metrics. Sent by the first rank only, in order."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluated(Message):
    """Validation loss after a step. Sent by the first rank only."""

    step: int
    loss: float


@dataclass(frozen=True)
class PartWritten(Message):
    """This rank's part of a checkpoint is on storage; `facts` goes into the manifest."""

    rank: int
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
    """This rank left the loop in order: `reason` is `done`, `stopped` or `anomaly`."""

    rank: int
    step: int
    reason: str


@dataclass(frozen=True)
class RankError(Message):
    """This rank raised. `user` marks errors that retrying cannot help."""

    rank: int
    kind_of_error: str
    message: str
    traceback: str
    exit_code: int
    secondary: bool


@dataclass(frozen=True)
class Control(Message):
    """Coordinator to ranks: what the first rank puts on the next step's all-reduce."""

    stop: bool = False
    checkpoint: bool = False


def encode(message: Message) -> dict[str, Any]:
    """JSON-able."""
    return {"kind": type(message).__name__, **asdict(message)}


def decode(document: dict[str, Any]) -> Message:
    """The message `encode` was given."""
    fields = dict(document)
    return Message._known[fields.pop("kind")](**fields)
