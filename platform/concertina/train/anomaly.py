"""Is this step's loss or gradient one to act on, and what is done? A pure decision every rank makes alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from concertina.config import AnomalyConfig

__all__ = ["Anomaly", "AnomalyWatch"]

WINDOW_STEPS = 32
MIN_STEPS = 8  # a mean of fewer losses than this judges nothing


@dataclass(frozen=True)
class Anomaly:
    """What was seen at a step and what the job file says to do about it."""

    step: int
    kind: str
    action: str
    detail: str


@dataclass
class AnomalyWatch:
    """The recent past that spikes are measured against. Its whole state is three small values in the checkpoint.

    Judging changes nothing: a step that only some ranks could judge before one was lost is void, and they must all
    stand alike again. `note` takes in a step that is applied, `go_back` one that is rolled back.
    """

    config: AnomalyConfig
    recent: list[float] = field(default_factory=list)
    skipped: set[int] = field(default_factory=set)
    seen: int = 0

    def judge(self, step: int, loss: float, grad_norm: float) -> Anomaly | None:
        """What is wrong with `step`, if anything. `loss` and `grad_norm` are global, hence equal on every rank."""
        if step in self.skipped:
            return Anomaly(step, "replayed", "skip", f"step {step} was rolled back before")
        found = self._look(step, loss, grad_norm)
        if found is None or self.seen + 1 < self.config.max_events:
            return found
        detail = f"{found.detail}; anomaly {self.seen + 1} of at most {self.config.max_events}"
        return Anomaly(step, found.kind, "stop", detail)

    def note(self, step: int, loss: float, found: Anomaly | None) -> None:
        """`step`, judged to be so, is done."""
        if found is None:
            self.recent = [*self.recent, loss][-WINDOW_STEPS:]
        elif step not in self.skipped:
            self.seen += 1

    def _look(self, step: int, loss: float, grad_norm: float) -> Anomaly | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Anomaly(step, "nonfinite", self.config.nonfinite, f"loss {loss}, gradient norm {grad_norm}")
        factor = self.config.spike_factor
        if factor is None or len(self.recent) < MIN_STEPS:
            return None
        mean = sum(self.recent) / len(self.recent)
        if loss <= factor * mean:
            return None
        detail = f"loss {loss:.4f} is more than {factor} x {mean:.4f}, the mean of {len(self.recent)} steps"
        return Anomaly(step, "spike", self.config.spike, detail)

    def state(self) -> dict[str, list[float] | list[int] | int]:
        """JSON-able."""
        return {"recent": list(self.recent), "skipped": sorted(self.skipped), "seen": self.seen}

    def load_state(self, state: dict[str, list[float] | list[int] | int]) -> None:
        """Continue from `state()`, whatever was before: who loads the same stands alike."""
        recent, skipped, seen = state["recent"], state["skipped"], state["seen"]
        assert isinstance(recent, list)
        assert isinstance(skipped, list)
        assert isinstance(seen, int)
        self.recent = [float(loss) for loss in recent]
        self.skipped = {int(step) for step in skipped}
        self.seen = seen

    def go_back(self, state: dict[str, list[float] | list[int] | int], bad_step: int) -> None:
        """Continue from a past `state()`, but remember what has gone wrong since, and skip the step that did."""
        skipped, seen = self.skipped | {bad_step}, self.seen + 1
        self.load_state(state)
        self.skipped |= skipped
        self.seen = max(self.seen, seen)
