"""What must a restarted coordinator know? Which session it ran, its members, and the generations that may hold the
state, in a file beside the events."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from concertina.layout import Seating
from concertina.track.run import write_atomically

__all__ = ["Journal"]


@dataclass
class Journal:
    """Pids and node ids by member, and seatings by generation. Empty until there are members."""

    path: Path
    session: str
    pids: dict[int, int] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)
    seatings: dict[int, Seating] = field(default_factory=dict)
    last_generation: int = -1
    next_member: int = 0
    ledger: dict[str, Any] = field(default_factory=dict)
    cluster: str = ""
    """Where the Ray cluster is, for those who look for the run."""
    restarts: list[int] = field(default_factory=list)
    """Steps that were recorded when the coordinator was started again, of the newest ones."""

    @classmethod
    def open(cls, path: Path, session: str) -> Journal:
        """The journal of `session`. One an earlier session left behind is of no use and is replaced."""
        try:
            document = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            document = {}
        if document.get("session") != session:
            return cls(path, session)
        return cls(
            path,
            session,
            {int(member): pid for member, pid in document["pids"].items()},
            {int(member): node for member, node in document["nodes"].items()},
            {int(number): Seating.from_json(seating) for number, seating in document["seatings"].items()},
            document["last_generation"],
            document["next_member"],
            document["ledger"],
            restarts=document["restarts"],
        )

    def give_number(self) -> int:
        """For the next member. It is written down before anybody bears it, so no number is given twice."""
        self.next_member += 1
        self.write()
        return self.next_member - 1

    def forget(self, member: int) -> None:
        """It is lost; the next `write` says so."""
        self.pids.pop(member, None)
        self.nodes.pop(member, None)

    def write(self) -> None:
        """It outlives this process once this returns, whatever ends that. Not its machine, with which all of Ray dies:
        the disk is not waited for."""
        document: dict[str, Any] = {
            "session": self.session,
            "cluster": self.cluster,
            "coordinator_pid": os.getpid(),
            "pids": self.pids,
            "nodes": self.nodes,
            "seatings": {number: seating.to_json() for number, seating in self.seatings.items()},
            "last_generation": self.last_generation,
            "next_member": self.next_member,
            "ledger": self.ledger,
            "restarts": self.restarts,
        }
        write_atomically(self.path, json.dumps(document))

    def remove(self) -> None:
        """The session has ended."""
        self.path.unlink(missing_ok=True)
