"""A run on nodes that come and go as a trace says, and what became of its time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.goodput.trace import Change
from benchmarks.recovery import faults
from benchmarks.recovery.concertina import Run
from benchmarks.recovery.watch import own_all
from concertina.errors import UserError
from concertina.track.events import Event, EventType, read_events
from infra.keeper_spec import LOOPBACK

__all__ = ["Market", "Measured", "TimedRun", "job_document", "steady_steps"]

SEQUENCES, LENGTH = 240, 64
_S_PER_TOKEN = 7e-5  # 0.8 s a step of 16 ranks, 13 s of one
_STEADY_AFTER = 2  # steps of a generation that are passed over: the first ones have its beginning in them
_READY_S = 300.0


def job_document(text: Path, storage: Path, most: int, layout: dict[str, int]) -> dict[str, Any]:
    """Ranks that wait as long as a device would compute; all that happens beside it is real."""
    return {
        "name": "goodput",
        "storage_path": str(storage),
        "model": {
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "moe_intermediate_size": 64,
            "intermediate_size": 128,
        },
        "data": {"source": str(text), "sequence_length": LENGTH, "tokenizer": {"vocab_size": 512}},
        "training": {"steps": 1_000_000, "global_batch_size": SEQUENCES, "eval_every_steps": 1_000_000},
        "layout": layout,
        "cluster": {"num_workers": most, "num_nodes": most, "device": "timed", "timed_s_per_token": _S_PER_TOKEN},
        "checkpoint": {"every_steps": 200},
        "elastic": {"max_losses_per_node": 1_000_000},
    }


class TimedRun(Run):
    """The driver, and what it has written."""

    def __init__(self, folder: Path, address: str, most: int) -> None:
        self._most = most
        super().__init__(folder, address, {"ep": 2})

    def _document(self, text: Path, layout: dict[str, int]) -> dict[str, Any]:
        return job_document(text, self._storage, self._most, layout)

    def events(self) -> list[Event]:
        folder = self.folder
        return [] if folder is None else list(read_events(folder.events_file))

    def await_world(self, world: int) -> None:
        """Until so many ranks train. Raises UserError at the bound."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            self.check()
            steps = [event for event in self.events() if event.type == EventType.STEP]
            if steps and int(steps[-1].data["world"]) >= world:
                return
            time.sleep(0.5)
        raise UserError(f"no world of {world} within {_READY_S:.0f} s")


class Market:
    """Nodes of one rank each, beside a head with none. What it did is in `done`, with the times at which it was."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(folder / "ray"), "node_ip_address": LOOPBACK}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        self.done: list[Change] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def make(self, change: Change, now: Callable[[], float]) -> None:
        """Those that go are killed, then those that come are started; each is a change of its own, as it takes time."""
        for name in change.removed:
            faults.kill_node(self._cluster, self._nodes.pop(name))
            self.done.append(Change(now(), (), (name,)))
        for name in change.added:
            self._nodes[name] = self._cluster.add_node(num_cpus=1, node_ip_address=LOOPBACK)
            own_all()  # each node of Ray's brings a handler that would drain it for half a minute at a SIGTERM
            self.done.append(Change(now(), (name,)))

    def close(self) -> None:
        self._cluster.shutdown()


@dataclass
class Measured:
    """Tokens of steps that were committed in the replay, and how long steps of each world take at rest."""

    tokens: float = 0.0
    step_s: dict[int, float] = field(default_factory=dict)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Sequence[Event], begin_s: float, end_s: float) -> Measured:
        """Of the events between two times of the wall clock."""
        found = cls(step_s={world: median(times) for world, times in steady_steps(events).items()})
        for event in events:
            if event.type == EventType.STEP and begin_s < float(event.data["applied_at_s"]) <= end_s:
                found.tokens += float(event.data["tokens"])
            elif event.type == EventType.RECOVERY and begin_s < event.ts_ns / 1e9 <= end_s:
                found.recoveries.append(dict(event.data))
            elif event.type == EventType.LEDGER:
                found.ledger = dict(event.data)
        return found


def steady_steps(events: Sequence[Event]) -> dict[int, list[float]]:
    """Seconds of steps by world, the first ones of each generation left out, and those with a checkpoint in them."""
    found: dict[int, list[float]] = defaultdict(list)
    since = 0
    for event in events:
        if event.type in (EventType.GENERATION, EventType.CHECKPOINT):
            since = 0
        elif event.type == EventType.STEP:
            since += 1
            if since > _STEADY_AFTER:
                found[int(event.data["world"])].append(float(event.data["step_s"]))
    return found
