"""What do a run's events say of its newest session? A restarted coordinator asks before it does anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from concertina.elastic.states import RunState
from concertina.track.events import Event, EventType, read_events

__all__ = ["LastSession", "read_last_session"]


@dataclass
class LastSession:
    """`written` holds the newest step recorded since the session began or last rolled back, by event type."""

    session: str = ""
    generation: int = 0
    state: RunState = RunState.WAITING_FOR_CAPACITY
    reason: str = ""
    exit_code: int | None = None
    written: dict[str, int] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self.generation = max(self.generation, event.generation)
        if event.type == EventType.START:
            self._begin(event)
        elif event.type == EventType.ROLLBACK:
            self._go_back(int(event.data["to_step"]))
        elif event.type == EventType.STATE:
            self._move(event)
        elif event.step is not None:
            self.written[event.type] = max(self.written.get(event.type, 0), event.step)

    def _begin(self, event: Event) -> None:
        self.session = str(event.data.get("session", ""))
        self.state, self.reason, self.exit_code, self.written = RunState.WAITING_FOR_CAPACITY, "", None, {}
        self._go_back(int(event.data.get("resumed_from_step") or 0))

    def _go_back(self, step: int) -> None:
        self.written |= {EventType.STEP: step, EventType.EVAL: step}

    def _move(self, event: Event) -> None:
        known = str(event.data.get("state")) in set(RunState)
        # `killed` is the word of somebody who found no coordinator: an end as well.
        self.state = RunState(event.data["state"]) if known else RunState.STOPPED
        self.reason = str(event.data.get("reason", ""))
        self.exit_code = event.data.get("exit_code")


def read_last_session(path: Path) -> LastSession:
    """Reads the whole file, about 10 us a line."""
    found = LastSession()
    for event in read_events(path):
        found.add(event)
    return found
