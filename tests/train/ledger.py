"""Who read which sequences for which step, and was each sequence of every applied step read once?

Notes are taken where tokens are read. A step counts where it was applied; what was read for it in a generation that did
not come so far is void.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from concertina.config import Job
from concertina.data import GlobalSampler, SequenceView
from tests.train.worlds import NUM_SEQUENCES

__all__ = ["NotedView", "Reading", "applied_in", "check_ledger", "voided"]


class Reading(NamedTuple):
    """What one member read at once in a stage for a step, as lane `lane` of data parallelism."""

    stage: int
    step: int
    lane: int
    ids: tuple[int, ...]


class NotedView:
    """Sequences of another view; `note` hears the ids of all that is read."""

    def __init__(self, view: SequenceView, note: Callable[[list[int]], None]) -> None:
        self.view = view
        self.note = note

    def __len__(self) -> int:
        return len(self.view)

    def read(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self.note(ids)
        return self.view.read(ids)


def applied_in(results: list[dict[str, Any]]) -> dict[int, int]:
    """The stage in which each step was applied: the same for everybody who applied it."""
    stages: dict[int, int] = {}
    for found in results:
        for step, stage in found["applied_in"]:
            assert stages.setdefault(step, stage) == stage, f"step {step} was applied in two stages"
    return stages


def voided(results: list[dict[str, Any]]) -> set[tuple[int, int]]:
    """(stage, step) for which something was read that came to nothing."""
    stages = applied_in(results)
    read = {(each.stage, each.step) for found in results for each in found["readings"]}
    return {(stage, step) for stage, step in read if stages.get(step) != stage}


def check_ledger(results: list[dict[str, Any]], job: Job, steps: int) -> None:
    """Of each of the `steps` the lanes' shares together are its batch, in order, each sequence once; ranks of one lane
    read alike; every epoch reads every sequence once."""
    stages, training = applied_in(results), job.training
    sampler = GlobalSampler(NUM_SEQUENCES, training.global_batch_size, training.seed)
    assert sorted(stages) == list(range(1, steps + 1)), "steps left out"
    shares: dict[int, dict[int, dict[int, list[int]]]] = {step: {} for step in stages}
    for member, found in enumerate(results):
        for stage, step, lane, ids in found["readings"]:
            if stages.get(step) == stage:
                shares[step].setdefault(lane, {}).setdefault(member, []).extend(ids)
    order: list[int] = []
    for step in sorted(shares):
        lanes = [list(shares[step][lane].values()) for lane in sorted(shares[step])]
        assert all(theirs == lane[0] for lane in lanes for theirs in lane), f"step {step}: ranks of a lane differ"
        read = [number for lane in lanes for number in lane[0]]
        assert read == sampler.batch(step - 1), f"step {step} read {read}"
        order += read
    for first in range(0, len(order) - NUM_SEQUENCES + 1, NUM_SEQUENCES):
        assert sorted(order[first : first + NUM_SEQUENCES]) == list(range(NUM_SEQUENCES))
