"""What does a member need to know before it has a seat? One frozen value the coordinator sends it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from concertina.config import Job
from concertina.layout import Layout

__all__ = ["LEASE_EVERY_S", "Assignment", "RunPlan", "agent_name", "bell_name", "member_name"]

LEASE_EVERY_S = 5.0  # a tenth of what agents grant


def member_name(session: str, member: int) -> str:
    """Of its actor, in the run's namespace."""
    return f"member-{session}-{member}"


def bell_name(session: str, member: int, pid: int) -> str:
    """Of the bell that rings when its process dies (`infra/death_bell.py`), on its node. One that died before anybody
    listened leaves its bell behind: nobody shall take it for another's."""
    return f"concertina-{session}-{member}-{pid}"


def agent_name(session: str, node_id: str) -> str:
    return f"agent-{session}-{node_id}"  # whole: nodes of a provider may begin alike


@dataclass(frozen=True)
class RunPlan:
    """One session of a run, as the driver hands it to the coordinator. Paths are seen by every node.

    `session` names this start of the run (a coordinator that restarts finds itself in its journal by it); `token` is
    the secret of the supervision channel and never reaches a file. `layout` is that of all workers; `generation` the
    first one's number.
    """

    run_id: str
    folder: Path
    corpus: Path
    job: Job
    layout: Layout
    device: str
    session: str
    token: str
    generation: int = 0
    resume_from: Path | None = None
    resume_step: int = 0

    @property
    def namespace(self) -> str:
        """Ray namespace of everything the run owns."""
        return f"concertina-{self.run_id}"

    @property
    def start_from(self) -> Path | None:
        """Whose weights the run begins with, whenever it begins: while it has no checkpoint of its own."""
        path = self.job.checkpoint.initial_load_path
        return None if path is None else Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class Assignment:
    """A member's number, known before its process starts. `channel` is where the coordinator listens."""

    plan: RunPlan
    member: int
    channel: tuple[str, int]
