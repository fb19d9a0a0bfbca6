"""What a run leaves behind: its folder, its events, and the copy of them in MLflow."""

from concertina.track.events import Event, EventLog, EventType, last_event, read_events
from concertina.track.run import DataFacts, RunFolder, create_run, list_runs, open_run

__all__ = [
    "DataFacts",
    "Event",
    "EventLog",
    "EventType",
    "RunFolder",
    "create_run",
    "last_event",
    "list_runs",
    "open_run",
    "read_events",
]
