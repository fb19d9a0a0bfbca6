"""What can go wrong, one class a kind, and which exit code each ends a command with.

Every error carries its facts in `data` and survives pickling (Ray moves errors between processes).
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConcertinaError",
    "ConfigError",
    "DataError",
    "LayoutError",
    "NotFoundError",
    "RankFailure",
    "RunFailed",
    "RunStopped",
    "StateError",
    "UserError",
]


class ConcertinaError(Exception):
    """Base of all our errors. `message` says what, the numbers and the remedy; `data` holds the facts."""

    exit_code = 1

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.data)

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[ConcertinaError], message: str, data: dict[str, Any]) -> ConcertinaError:
    return cls(message, **data)


class UserError(ConcertinaError):
    """The input is wrong: one line, no traceback, nothing started, never retried."""

    exit_code = 2


class ConfigError(UserError):
    """A job file or an override is wrong."""


class LayoutError(UserError):
    """The degrees of a layout do not fit together, or not this model or world."""


class DataError(UserError):
    """A corpus is missing, empty, truncated or does not fit the model."""


class NotFoundError(ConcertinaError):
    """No such run, checkpoint or cluster."""

    exit_code = 102


class RunFailed(ConcertinaError):
    """The run ended in failure; the root cause is in the message."""

    exit_code = 100


class RankFailure(RunFailed):
    """A rank died or raised. `data`: rank, generation, reason, traceback."""


class RunStopped(ConcertinaError):
    """A user stopped the run; it left a checkpoint."""

    exit_code = 103


class CapacityError(ConcertinaError):
    """The cluster never had what the job asks for, within the bound."""

    exit_code = 104


class CheckpointError(ConcertinaError):
    """A checkpoint is incomplete, altered or does not match the model: verification failed."""

    exit_code = 105


class StateError(RunFailed):
    """State that was moved between members is not what was sent, or not all that was wanted. `data`: member, faults."""
