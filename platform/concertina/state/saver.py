"""How does a rank write checkpoints without stopping? It copies its boxes, and a thread writes the copies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concertina.errors import CheckpointError
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import write_part
from concertina.state.manifest import Part, partial_folder

__all__ = ["Saver"]

log = logging.getLogger("concertina.state")

State = dict[str, BoxedTensor]


@dataclass(frozen=True)
class _Place:
    root: Path
    rank: int
    world: int
    generation: int


class Saver:
    """Writes this rank's parts, one step at a time. `on_part(step, part, facts)` is called from the writing thread."""

    def __init__(
        self,
        root: Path,
        rank: int,
        world: int,
        generation: int,
        on_part: Callable[[int, Part, dict[str, Any]], None],
    ) -> None:
        self.place = _Place(root, rank, world, generation)
        self.on_part = on_part
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, step: int, state: State, facts: dict[str, Any], others: Mapping[int, State] | None = None) -> None:
        """Copy `state` to host memory now and write it in the background; waits for the step before it. `facts` are of
        this state: the next ones may be known before it is written. `others`: the state of ranks that are lost, whose
        parts this one writes too."""
        self.wait()
        copies = {rank: _copied(part) for rank, part in {self.place.rank: state, **(others or {})}.items()}
        self._thread = threading.Thread(target=self._write, args=(step, copies, facts), name=f"checkpoint-{step}")
        self._thread.start()

    def _write(self, step: int, parts: dict[int, State], facts: dict[str, Any]) -> None:
        place = self.place
        folder = partial_folder(place.root, step, place.generation)
        try:
            for rank, state in parts.items():
                part = write_part(folder, state, rank=rank, world=place.world, generation=place.generation)
                self.on_part(step, part, facts)
        except Exception as error:  # noqa: BLE001 - `wait` tells it: a full disk surfaces as almost anything
            log.warning("the checkpoint of step %d could not be written: %s", step, error)
            self._error = error

    def wait(self, timeout_s: float = 600.0) -> None:
        """Until the step under way is on storage. Raises CheckpointError if it could not be written."""
        if self._thread is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise CheckpointError(f"{self.place.root}: writing took more than {timeout_s:.0f} s")
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(f"{self.place.root}: could not write: {type(error).__name__}: {error}") from error


def _copied(state: State) -> State:
    return {
        key: BoxedTensor(boxed.piece.detach().to("cpu", copy=True), boxed.box, tuple(boxed.shape))
        for key, boxed in state.items()
    }
