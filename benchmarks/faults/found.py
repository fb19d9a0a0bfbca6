"""What became of a run that was struck?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.held import Held
from concertina.track.events import Event, EventType, void_after

__all__ = ["Deviation", "Found", "Leak", "Strike", "count_bells", "count_flaws", "leaks_of", "standing"]


@dataclass(frozen=True)
class Deviation:
    """The largest relative one of a loss, the largest of a tensor (max|a - b| / max|b|), and how many steps were done
    again for that."""

    loss: float
    tensor: float
    steps: int


@dataclass(frozen=True)
class Strike:
    """One fault: which members it should have cost, which it did, and until all ranks trained again."""

    deed: str
    expected: tuple[int, ...]
    lost: tuple[int, ...]
    seconds: float


@dataclass
class Found:
    """What became of a run that was struck. `broken_off` says why it did not see all of its faults."""

    name: str
    strikes: list[Strike] = field(default_factory=list)
    broken_off: str = ""
    flaws: int = 0
    steps: int = 0
    rollbacks: int = 0
    left: int = 0
    generations: int = 0
    deviation: Deviation | None = None
    held: dict[str, list[Held]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Found:
        """What `to_json` gave, as far as JSON keeps it: what processes held is left out."""
        strikes = [Strike(s["deed"], tuple(s["expected"]), tuple(s["lost"]), s["seconds"]) for s in document["strikes"]]
        deviation = None if document["deviation"] is None else Deviation(**document["deviation"])
        return cls(**{**document, "strikes": strikes, "deviation": deviation, "held": {}})

    def read(self, events: Sequence[Event]) -> dict[int, float]:
        """Take in what it recorded; losses of the steps that stand."""
        steps = standing(events)
        self.steps, self.flaws = len(steps), count_flaws(steps)
        self.rollbacks = sum(event.type == EventType.ROLLBACK for event in events)
        self.generations = sum(event.type == EventType.GENERATION for event in events)
        return dict(steps)


@dataclass(frozen=True)
class Leak:
    """What a process holds more at the end than before; bytes for each generation it has seen."""

    bytes: float
    threads: int
    descriptors: int

    @classmethod
    def of(cls, samples: Sequence[Held], generations: int) -> Leak:
        """What is on its way only adds, so the least of either half counts."""
        half, last = len(samples) // 2, max(1, len(samples) // 5)
        before, after = samples[half // 4 : half], samples[half:]  # the first ones settle in
        grown = min(held.bytes for held in after) - min(held.bytes for held in before)
        first, final = samples[:-last], samples[-last:]
        threads = min(held.threads for held in final) - max(held.threads for held in first)
        descriptors = min(held.descriptors for held in final) - max(held.descriptors for held in first)
        return cls(grown / (generations / 2), max(0, threads), max(0, descriptors))


def leaks_of(found: Sequence[Found]) -> dict[str, Leak]:
    """The worst of any session, by whose process it is. Too few samples say nothing."""
    leaks: dict[str, list[Leak]] = {}
    for one in found:
        for whose, samples in one.held.items():
            if len(samples) >= 8:
                leaks.setdefault(whose, []).append(Leak.of(samples, one.generations))
    return {
        whose: Leak(*(max(getattr(leak, what) for leak in some) for what in ("bytes", "threads", "descriptors")))
        for whose, some in leaks.items()
    }


def standing(events: Sequence[Event]) -> list[tuple[int, float]]:
    """Steps that stand, with their losses, in the order in which they were recorded."""
    found: list[tuple[int, float]] = []
    for event in events:
        limit = void_after(event)
        if limit is not None:
            found = [(step, loss) for step, loss in found if step <= limit]
        if event.type == EventType.STEP:
            assert event.step is not None
            found.append((event.step, float(event.data["loss"])))
    return found


def count_flaws(steps: Sequence[tuple[int, float]]) -> int:
    """Steps that are missing, there twice, or out of their order."""
    return sum(step != number for number, (step, _) in enumerate(steps, 1)) + len(steps) - len(dict(steps))


def count_bells(session: str) -> int:
    """What members that have died may have left in memory."""
    return len(list(Path("/dev/shm").glob(f"concertina-{session}*")))
