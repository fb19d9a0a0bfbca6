"""A run broke: which rank broke it? Peers of a dead rank fail too, and are not to blame."""

from __future__ import annotations

from dataclasses import dataclass

from concertina.elastic.messages import RankError

__all__ = ["FROZE", "KILLED_FOR_MEMORY", "Blame", "find_blame"]

KILLED_FOR_MEMORY = "killed for memory"
"""How the reason of a loss begins where memory is known to be the cause, and not one of several that may be."""

FROZE = "froze"
"""How the reason begins where the rank's process is there and does nothing."""


@dataclass(frozen=True)
class Blame:
    """The root cause. `reason` is one of `raised`, `user_error`, `killed`, `out_of_memory`, `frozen`, `lost`."""

    rank: int
    reason: str
    message: str
    traceback: str

    def __str__(self) -> str:
        return f"rank {self.rank} {self.message}"


def find_blame(errors: list[RankError], lost: dict[int, str]) -> Blame | None:
    """The first cause among what ranks reported and which of them vanished; None while there is neither.

    `errors` is in order of arrival. A rank that raised something of its own comes before one that vanished, and both
    before ranks whose communication broke.
    """
    own = [error for error in errors if not error.secondary]
    if own:
        first = own[0]
        reason = "user_error" if first.exit_code == 2 else "raised"
        return Blame(first.rank, reason, f"raised {first.kind_of_error}: {first.message}", first.traceback)
    silent = [rank for rank in sorted(lost) if rank not in {error.rank for error in errors}]
    if silent:
        rank = silent[0]
        why = lost[rank]
        if why.startswith(FROZE):
            return Blame(rank, "frozen", why, "")
        reason = "out_of_memory" if why.startswith(KILLED_FOR_MEMORY) else "killed"
        return Blame(rank, reason, f"died: {why}", "")
    if errors:
        first = errors[0]
        return Blame(first.rank, "lost", f"lost its peers: {first.message}", first.traceback)
    return None
