"""What did a change of membership take? Kept while it goes, told when the new generation has formed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from concertina.elastic.losses import Loss
from concertina.elastic.messages import Formed
from concertina.layout import Seating
from concertina.track.recovery import Cause, Recovery

__all__ = ["Change"]


@dataclass
class Change:
    """One change as it goes: when each phase began, by this process's clock."""

    cause: str
    losses: list[Loss]
    before: Seating | None
    began_s: float = field(default_factory=time.monotonic)
    halted_s: float = 0.0
    completed: int = 0
    formed: dict[int, Formed] = field(default_factory=dict)
    step: int = 0

    def recovery(self, generation: int, seating: Seating, step: int) -> Recovery:
        """The record of it, now that all have formed."""
        now = time.monotonic()
        moved = [formed.moved_bytes for formed in self.formed.values()]
        prepare_s = max((formed.seconds["prepare_s"] for formed in self.formed.values()), default=0.0)
        return Recovery(
            generation=generation,
            cause=self._cause(),
            world_before=self.before.layout.world if self.before is not None else 0,
            world_after=seating.layout.world,
            step=step,
            stall_s=now - (min(loss.since_s for loss in self.losses) if self.losses else self.halted_s),
            detected_s=max(0.0, self.began_s - min((loss.since_s for loss in self.losses), default=self.began_s)),
            steps_completed=self.completed,
            phases={
                "halt_s": self.halted_s - self.began_s,
                "prepare_s": prepare_s,
                "move_s": now - self.halted_s,
            },
            bytes_local=sum(found.get("local", 0) for found in moved),
            bytes_moved=sum(found.get("moved", 0) for found in moved),
            layout=seating.layout.facts,
        )

    def _cause(self) -> Cause:
        if not self.losses:
            return Cause(self.cause)
        first = self.losses[0]
        rank = self.before.rank_of(first.member) if self.before is not None else None
        return Cause(first.reason.value, first.member, rank, first.node)
