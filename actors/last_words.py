"""The coordinator is gone for good: who completes the last checkpoint and writes the end of the run? Its first rank."""

from __future__ import annotations

import logging
from typing import Any

from actors.assignment import RunPlan
from actors.book import Book
from concertina.elastic.messages import decode
from concertina.elastic.states import RunEvent
from concertina.elastic.waits import BOUNDS, Ending, wait
from concertina.errors import CheckpointError, ConcertinaError
from concertina.state.manifest import MANIFEST, checkpoint_folder, commit
from concertina.track.events import EventLog
from concertina.track.run import RunFolder

__all__ = ["write_last_words"]

log = logging.getLogger("concertina.rank")


def write_last_words(
    plan: RunPlan, generation: int, step: int, facts: dict[str, Any], unheard: list[dict[str, Any]]
) -> None:
    """Complete the checkpoint of `step`, of which the facts are; then, unless a coordinator has come back meanwhile,
    write down what none has heard, so that no committed step is missing, and that the run has failed."""
    folder = RunFolder(plan.folder)
    complete = _complete(plan, generation, step, facts)
    try:
        with EventLog(folder.events_file, plan.run_id) as events:
            book = Book(events, plan.checkpoints, plan.job.checkpoint.keep)
            book.generation = generation
            for message in map(decode, unheard):
                if book.takes(message):
                    book.record(message)
            left = f"a checkpoint of step {step}" if complete else "no new checkpoint"
            book.move(RunEvent.FAILURE, f"the coordinator was gone for good; its ranks left {left}", exit_code=100)
    except ConcertinaError as error:  # somebody else writes, or the disk is full
        log.warning("the end is not written: %s", error)


def _complete(plan: RunPlan, generation: int, step: int, facts: dict[str, Any]) -> bool:
    """Whether there is a checkpoint of `step` now; a coordinator, or an earlier generation, may have completed it."""
    manifest = checkpoint_folder(plan.checkpoints, step) / MANIFEST

    def is_complete() -> bool:
        return manifest.exists() or commit(plan.checkpoints, step, generation, facts) is not None

    try:
        return wait(BOUNDS["last_checkpoint"], is_complete) is Ending.DONE
    except (CheckpointError, OSError) as error:
        log.warning("the last checkpoint is not complete: %s", error)
        return False
