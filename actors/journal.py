"""What must a restarted coordinator know? Which session it ran and which ranks it had, in a file beside the events."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from concertina.track.run import write_atomically

__all__ = ["Journal"]


@dataclass
class Journal:
    """The ranks of a session: pids and node ids by rank. Empty until they have been placed."""

    path: Path
    session: str
    pids: dict[int, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)
    is_restart: bool = False

    @classmethod
    def open(cls, path: Path, session: str) -> Journal:
        """The journal of `session`. One an earlier session left behind is of no use and is replaced."""
        try:
            document = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            document = {}
        if document.get("session") == session:
            pids = {int(rank): pid for rank, pid in document["pids"].items()}
            nodes = {int(rank): node for rank, node in document["nodes"].items()}
            return cls(path, session, pids, nodes, is_restart=True)
        return cls(path, session)

    def write(self, pids: dict[int, int], nodes: dict[int, str]) -> None:
        """Record where the ranks are, before any of them trains."""
        self.pids, self.nodes = pids, nodes
        document = {"session": self.session, "coordinator_pid": os.getpid(), "pids": pids, "nodes": nodes}
        write_atomically(self.path, json.dumps(document))

    def remove(self) -> None:
        """The session has ended."""
        self.path.unlink(missing_ok=True)
