"""Which pieces of the model does a pipeline stage compute, for which micro-batch, in which order?

1F1B (PipeDream-Flush; Narayanan et al. 2021, arXiv 2104.04473, section 2.2): a stage warms up with as many forwards as
there are stages after it, then alternates, so that no more micro-batches are in flight than there are stages. The
bubble is (p - 1) / (m + p - 1) of the step for p stages and m micro-batches. Interleaved (the same, section 2.2.2): a
stage has v pieces, and micro-batches go through the model in groups of p or somewhat more, so that the bubble is v
times smaller; the price is v times as many messages and more activations in flight.
A plan is a list of actions for every stage: who sends what to whom, and in which order, follows from all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from concertina.layout import cut

__all__ = ["Action", "Direction", "Plan", "Timeline", "forward_plan", "simulate", "training_plan"]

Direction = Literal["forward", "backward"]


class Action(NamedTuple):
    """Compute piece `piece` of the model for a micro-batch. What it needs and what it hands over are called by the
    action that needs it."""

    direction: Direction
    piece: int
    micro_batch: int


@dataclass(frozen=True)
class Plan:
    """`actions[stage]`, in order; piece i is on stage i % num_stages."""

    virtual: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.actions)

    @property
    def last_piece(self) -> int:
        return self.num_stages * self.virtual - 1

    @property
    def has_backward(self) -> bool:
        return any(action.direction == "backward" for action in self.actions[0])

    def stage_of(self, action: Action) -> int:
        return action.piece % self.num_stages

    def after(self, action: Action) -> Action | None:
        """Who needs what this action makes: the next piece its activations, the one before it their gradients."""
        piece = action.piece + (1 if action.direction == "forward" else -1)
        return action._replace(piece=piece) if 0 <= piece <= self.last_piece else None

    def before(self, action: Action) -> Action | None:
        """Who makes what this action needs; None for tokens, and for the loss' own gradient."""
        piece = action.piece - (1 if action.direction == "forward" else -1)
        return action._replace(piece=piece) if 0 <= piece <= self.last_piece else None


def training_plan(num_stages: int, virtual: int, micro_batches: int) -> Plan:
    """Forward and backward of every micro-batch."""
    return Plan(virtual, tuple(_order(num_stages, virtual, micro_batches, stage) for stage in range(num_stages)))


def forward_plan(num_stages: int, virtual: int, micro_batches: int) -> Plan:
    """Forward alone."""
    rounds = _rounds(num_stages, virtual, micro_batches)
    return Plan(
        virtual,
        tuple(
            tuple(Action("forward", place * num_stages + stage, number) for place, number in rounds)
            for stage in range(num_stages)
        ),
    )


def _groups(num_stages: int, micro_batches: int) -> list[range]:
    """Micro-batches that go through a piece together: as many as there are stages, a few more where they do not divide.
    Fewer would leave stages waiting for each other."""
    number = max(1, micro_batches // num_stages)
    return [range(*cut(micro_batches, number, index)) for index in range(number)]


def _rounds(num_stages: int, virtual: int, micro_batches: int) -> list[tuple[int, int]]:
    """(place of a piece on its stage, micro-batch) in order."""
    if virtual == 1:
        return [(0, number) for number in range(micro_batches)]
    groups = _groups(num_stages, micro_batches)
    return [(place, number) for group in groups for place in range(virtual) for number in group]


def _order(num_stages: int, virtual: int, micro_batches: int, stage: int) -> tuple[Action, ...]:
    rounds = _rounds(num_stages, virtual, micro_batches)
    forwards = [Action("forward", place * num_stages + stage, number) for place, number in rounds]
    backwards = [Action("backward", (virtual - 1 - place) * num_stages + stage, number) for place, number in rounds]
    warm_up = num_stages - 1 - stage
    if virtual > 1:
        warm_up = 2 * warm_up + (virtual - 1) * len(_groups(num_stages, micro_batches)[0])
    order = forwards[:warm_up]
    for index, backward in enumerate(backwards):
        order += [*forwards[warm_up + index : warm_up + index + 1], backward]
    return tuple(order)


@dataclass(frozen=True)
class Timeline:
    """When every action ends, and how long the step is."""

    ends: dict[Action, float]
    total: float

    def bubble(self, busy: float) -> float:
        """The share of the step in which a stage that computes for `busy` does nothing."""
        return 1 - busy / self.total


def simulate(plan: Plan, seconds: dict[Direction, float]) -> Timeline:
    """Every action as soon as its stage is free and what it needs is made; messages take no time.

    `seconds`: of one piece and micro-batch. Raises ValueError where stages wait for each other for ever.
    """
    ends: dict[Action, float] = {}
    free, place = [0.0] * plan.num_stages, [0] * plan.num_stages
    waiting = set(range(plan.num_stages))
    while waiting:
        moved = False
        for stage in sorted(waiting):
            moved = _advance(plan, stage, place, free, ends, seconds) or moved
            if place[stage] == len(plan.actions[stage]):
                waiting.discard(stage)
        if not moved and waiting:
            raise ValueError(f"stages {sorted(waiting)} of {plan.num_stages} wait for each other")
    return Timeline(ends, max(free))


def _advance(
    plan: Plan,
    stage: int,
    place: list[int],
    free: list[float],
    ends: dict[Action, float],
    seconds: dict[Direction, float],
) -> bool:
    """Let a stage do what it can; whether that was anything."""
    first = place[stage]
    actions: Sequence[Action] = plan.actions[stage]
    while place[stage] < len(actions):
        action = actions[place[stage]]
        needs = [need for need in (plan.before(action), _own_forward(action)) if need is not None]
        if any(need not in ends for need in needs):
            break
        begin = max([free[stage], *(ends[need] for need in needs)])
        ends[action] = free[stage] = begin + seconds[action.direction]
        place[stage] += 1
    return place[stage] > first


def _own_forward(action: Action) -> Action | None:
    return action._replace(direction="forward") if action.direction == "backward" else None
