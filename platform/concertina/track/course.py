"""What has a run's event stream said up to some point, as MLflow is to see it?

Pure bookkeeping over committed steps: cumulative tokens, the values at a step, which steps were done again. Built
anew from the events at each start, so that nothing of it needs saving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from concertina.elastic.account import Account
from concertina.track.events import Event, EventType, void_after
from concertina.track.ledger import LedgerTally

__all__ = ["EVAL_KEYS", "STEP_KEYS", "Course", "Point"]

STEP_KEYS = {
    "loss": "train/loss",
    "aux_loss": "train/aux_loss",
    "z_loss": "train/z_loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "imbalance": "train/imbalance",
    "dropped": "train/dropped",
}
EVAL_KEYS = {"loss": "validation/loss"}
_RECENT_STEPS = 512
_MOST_NOTES = 20


@dataclass(frozen=True)
class Point:
    """One metric value. The time is the event's, so that sending it twice is sending the same row twice."""

    key: str
    value: float
    time_ms: int
    step: int
    is_state: bool = False
    """How things stand at that time rather than what a step gave: a step may have several, and no model owns them."""


@dataclass
class Course:
    """`observe` takes every event once, in order, and returns the points that are new.

    A (key, step) seen before is not: after a resume or a roll-back MLflow keeps the first value of a step. Points of
    the ledger are the exception: they stand at the newest step there ever was, each with its own time, and the last
    one is how the run ended.
    """

    tokens: int = 0
    newest_step: int = 0
    sessions: int = 0
    nonfinite: list[str] = field(default_factory=list)
    replayed: list[str] = field(default_factory=list)
    newest: dict[str, int] = field(default_factory=dict)
    """key -> newest step of which a point was returned."""
    ledger: LedgerTally = field(default_factory=LedgerTally)
    ledger_ms: int = 0
    """Time of the last ledger's points."""
    recent: dict[int, list[Point]] = field(default_factory=dict)
    """step -> points, of the last 512 steps: a checkpoint is ready some steps after the step it holds."""

    def observe(self, event: Event) -> list[Point]:
        self.ledger.add(event)
        if event.type == EventType.START:
            self.sessions += 1
        kept = void_after(event)
        if kept is not None and kept < self.newest_step:
            # MLflow cannot take points back: the first value of a step stays there, and a tag says which.
            self.replayed = [*self.replayed, f"{kept + 1}-{self.newest_step}"][-_MOST_NOTES:]
        if event.type == EventType.LEDGER:
            total = self.ledger.total()
            return [] if total is None else self._ledger_points(total, event.ts_ns // 1_000_000)
        if event.step is None:
            return []
        if event.type == EventType.STEP:
            return self._keep(event.step, self._step_points(event, event.step))
        if event.type == EventType.EVAL:
            points = self._points(event.data, event, EVAL_KEYS)
            by_source = event.data.get("by_source") or {}
            keys = {name: f"{EVAL_KEYS['loss']}/{name}" for name in by_source}
            return self._keep(event.step, [*points, *self._points(by_source, event, keys)])
        return []

    def tokens_at(self, step: int) -> int:
        """Tokens trained on up to a step; of the newest step when that one is long past."""
        for point in self.recent.get(step, ()):
            if point.key == "train/tokens":
                return int(point.value)
        return self.tokens

    def _step_points(self, event: Event, step: int) -> list[Point]:
        points = self._points(event.data, event, STEP_KEYS)
        time_ms = event.ts_ns // 1_000_000
        tokens, seconds = float(event.data.get("tokens") or 0), float(event.data.get("step_s") or 0)
        if step > self.newest_step:
            # A step done again reads the same sequences; its tokens count once.
            self.newest_step = step
            self.tokens += int(tokens)
        points.append(Point("train/tokens", float(self.tokens), time_ms, step))
        if tokens and seconds > 0:
            points.append(Point("train/tokens_per_s", tokens / seconds, time_ms, step))
        return points

    def _ledger_points(self, total: Account, time_ms: int) -> list[Point]:
        values = {"goodput": total.goodput}
        values |= {f"ledger/{bucket}_s": seconds for bucket, seconds in total.seconds.items()}
        if total.missing_s:
            values["ledger/missing_s"] = total.missing_s
        if total.usd is not None:
            values["usd"] = total.usd
        # Of two rows of a step and a millisecond MLflow calls the greater one the newest.
        self.ledger_ms = max(time_ms, self.ledger_ms + 1)
        return [Point(key, value, self.ledger_ms, self.newest_step, is_state=True) for key, value in values.items()]

    def _points(self, data: Mapping[str, Any], event: Event, keys: Mapping[str, str]) -> list[Point]:
        """Those of `data`, a part of the event's."""
        points = []
        step = event.step
        assert step is not None
        for name, key in keys.items():
            if data.get(name) is None:
                continue
            value = float(data[name])
            if not math.isfinite(value):
                # MLflow would plot infinity as 1.8e308 and flatten the curve; a gap and a tag say it better.
                if len(self.nonfinite) < _MOST_NOTES:
                    self.nonfinite.append(f"{key}@{step}={value}")
                value = math.nan
            points.append(Point(key, value, event.ts_ns // 1_000_000, step))
        return points

    def _keep(self, step: int, points: list[Point]) -> list[Point]:
        new = [point for point in points if step > self.newest.get(point.key, step - 1)]
        self.newest |= {point.key: step for point in new}
        if new:
            self.recent.setdefault(step, []).extend(new)
        while len(self.recent) > _RECENT_STEPS:
            del self.recent[next(iter(self.recent))]
        return new
