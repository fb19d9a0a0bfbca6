"""A run that is struck again and again: is it whole again each time, and is nobody lost but whom it hit?"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.assignment import RunPlan
from actors.conductor import Conductor
from actors.wishes import Wishes
from benchmarks.faults.bare import BareCluster, BareHands, Process
from benchmarks.faults.held import Held
from concertina.config import Job
from concertina.elastic.states import RunState
from concertina.errors import ConcertinaError, UserError
from concertina.layout import check_job
from concertina.track.events import EventType
from concertina.track.run import RunFolder
from jobs.preparation import prepare_new

__all__ = ["BOUND_S", "VETERAN", "WORLD", "Hung", "Session", "job_document"]

WORLD = 4
VETERAN = 0
"""The member that nothing strikes: what is left of hundreds of generations is seen in its process."""

BOUND_S = 60.0
"""Seconds after which a run that is not whole again hangs."""

_POLL_S = 0.02
_STEPS_OF_REST = 2
_LOOK_EVERY = 10


class Hung(UserError):
    """The run did not become whole again within the bound."""


def job_document(text: Path, storage: Path, layout: dict[str, Any], standbys: int) -> dict[str, Any]:
    """A model of three layers in float64: rounding is the only thing that may differ, and it is small."""
    return {
        "name": "faults",
        "storage_path": str(storage),
        "model": {
            "vocab_size": 288,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
            "intermediate_size": 48,
            "router_bias": True,
        },
        "data": {"source": str(text), "sequence_length": 12, "tokenizer": {"vocab_size": 288}},
        "training": {
            "steps": 10_000_000,
            "global_batch_size": 12,
            "precision": "float64",
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-3,
            "eval_every_steps": 20,
            "eval_sequences": 6,
        },
        "layout": layout,
        "cluster": {"num_workers": WORLD, "num_nodes": WORLD, "device": "cpu"},
        "checkpoint": {"every_steps": 40, "keep": 1_000_000},
        "elastic": {
            "max_losses_per_node": 1_000_000,
            "verify_every_steps": 1,
            "notices": "none",
            "standbys_per_node": standbys,
        },
    }


@dataclass
class Session:
    """A conductor in a thread of this process, and its members. Used as a context: at the end all is given back."""

    storage: Path
    text: Path
    layout: dict[str, Any]
    standbys: int = 0
    held: dict[str, list[Held]] = field(default_factory=lambda: {"conductor": [], "member": []})

    def __post_init__(self) -> None:
        job = Job.model_validate(job_document(self.text, self.storage, self.layout, self.standbys))
        prepared = prepare_new(job, check_job(job))
        self.folder: RunFolder = prepared.folder
        self.plan = RunPlan(
            run_id=self.folder.run_id,
            folder=self.folder.path,
            corpus=prepared.corpus,
            job=prepared.job,
            layout=prepared.layout,
            device="cpu",
            session=secrets.token_hex(4),
            token=secrets.token_hex(32),
        )
        self.cluster, self.wishes = BareCluster(WORLD), Wishes()
        (self.folder.path / "logs").mkdir(exist_ok=True)
        self.conductor = Conductor(self.plan, self.wishes, self.cluster, partial(BareHands, self.cluster))
        hands = self.conductor.hands
        assert isinstance(hands, BareHands)
        self.hands = hands
        hands.mourn = self.conductor.mourn
        self.error: BaseException | None = None
        self._events = _Tail(self.folder.events_file)
        self._rested = (-1, 0)
        self._lost: set[int] = set()
        self._thread = threading.Thread(target=self._conduct, name="conductor", daemon=True)

    def __enter__(self) -> Session:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.wishes.stop = self.wishes.stop or "the faults are over"
        self.wishes.now = self.wishes.now or exception[0] is not None
        deadline = time.monotonic() + BOUND_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self.wishes.hear()
            time.sleep(_POLL_S)

    def _conduct(self) -> None:
        try:
            self.conductor.run()
        except Exception as error:  # noqa: BLE001 - whatever it was, `await_whole` raises it
            self.error = error
            if isinstance(error, ConcertinaError):
                self.conductor.fail(error)
        finally:
            self.conductor.end()

    # -- who is there -------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The newest that is recorded."""
        return self.conductor.book.step

    @property
    def generation(self) -> int:
        return max(self.conductor.regrouping.generations.possible, default=-1)

    def process(self, member: int) -> Process:
        found = self.hands.members[member].actor
        assert isinstance(found, Process)
        return found

    @property
    def mortal(self) -> list[int]:
        """Members that may be struck."""
        return sorted(self.hands.members.keys() - {VETERAN})

    def lost(self) -> set[int]:
        """Members that were lost, so far."""
        for event in self._events.read():
            if event["type"] == EventType.MEMBER and event["data"]["what"] == "lost":
                self._lost.add(event["data"]["member"])
        return self._lost

    # -- rest ---------------------------------------------------------------------------------------------------------

    def await_whole(self, gone: Iterable[int] = ()) -> None:
        """Until all ranks train again, and these are no members any more. Raises Hung, and what ended the run."""
        self.until(lambda: self.is_whole and self.hands.members.keys().isdisjoint(gone), f"without {sorted(gone)}")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Raises Hung at the bound, and what ended the run."""
        deadline = time.monotonic() + BOUND_S
        while not holds():
            self.wishes.hear()
            if self.error is not None or not self._thread.is_alive():
                raise UserError(f"the run ended: {self.error!r}") from self.error
            if time.monotonic() > deadline:
                raise Hung(f"not whole {what} within {BOUND_S:.0f} s: {self._state()}")
            time.sleep(_POLL_S)

    @property
    def is_whole(self) -> bool:
        """All ranks train, and have made some steps in their seats."""
        generations = self.conductor.regrouping.generations
        seating, members = generations.seating, list(self.hands.members.values())
        full = seating is not None and seating.layout.world == WORLD == len(members)
        rests = generations.is_settled and self.conductor.book.state is RunState.TRAINING
        if not (full and rests and all(member.pid for member in members)):
            self._rested = (-1, 0)
            return False
        generation, since = self._rested
        if generation != self.generation:
            self._rested = (self.generation, self.step)
            return False
        return self.step >= since + _STEPS_OF_REST

    def _state(self) -> str:
        generations = self.conductor.regrouping.generations
        members = {number: member.pid for number, member in self.hands.members.items()}
        return f"{self.conductor.book.state}, step {self.step}, {generations.coming}, members {members}"

    def look(self, number: int) -> None:
        """Now and then: what the conductor's process and the veteran hold."""
        if number % _LOOK_EVERY == 0:
            self.held["conductor"].append(Held.now())
            found = self.process(VETERAN).ask("held")
            assert found is not None, "the veteran does not answer"
            self.held["member"].append(found)


class _Tail:
    """Whole lines of a file that grows, each once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
