"""How does a rank compute the micro-batches of a step? By the plan of its pipeline stage; alone, one after the other.

A piece of the model is a graph of its own: it begins with a leaf that another stage's activations are put into, and its
backward with that stage's gradient of what it gave. Losses stay where they are computed, and are added up over the
world once a step.
Shapes: R tokens of this lane, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from concertina.model import Batch, Decoder, ModelOutput
from concertina.parallel.recompute import recomputing
from concertina.parallel.reducer import GradientReducer
from concertina.parallel.stages import Mailbox
from concertina.schedule.pipeline import Action, Plan

__all__ = ["Backward", "MicroBatch", "run"]


class MicroBatch(NamedTuple):
    """So many sequences of this length, which `read` gets."""

    num_sequences: int
    length: int
    read: Callable[[], Batch]


class Backward(NamedTuple):
    """What a run that trains needs: the sum that gradients are of, who takes them, and what is computed again."""

    objective: Callable[[ModelOutput], Tensor]
    reducer: GradientReducer
    recomputed: frozenset[str] = frozenset()


class _Graph(NamedTuple):
    """What the backward of a piece begins with and ends at."""

    x_in: Tensor | None
    x_out: Tensor | None
    objective: Tensor | None


def run(
    decoder: Decoder, plan: Plan, micro_batches: Sequence[MicroBatch], backward: Backward | None = None
) -> Iterator[tuple[Action, ModelOutput]]:
    """What every forward of this rank's stage gives, as it is computed. All ranks must run to the end of the iterator,
    with the same plan."""
    return _Run(decoder, plan, micro_batches, backward).steps()


def _room(decoder: Decoder, micro_batches: Sequence[MicroBatch], number: int) -> Tensor:
    """For what another stage sends of a micro-batch: [R, D]."""
    num_sequences, length, _ = micro_batches[number]
    rows, build = decoder.num_rows(num_sequences, length), decoder.build
    return torch.empty(rows, build.model.hidden_size, dtype=build.dtype, device=build.device)


class _Run:
    def __init__(
        self, decoder: Decoder, plan: Plan, micro_batches: Sequence[MicroBatch], backward: Backward | None
    ) -> None:
        self.decoder, self.plan, self.micro_batches, self.backward = decoder, plan, micro_batches, backward
        group = decoder.build.groups["pp"]
        self.actions = plan.actions[group.rank]
        self.mailbox = Mailbox(group, plan, partial(_room, decoder, micro_batches))
        self.uses = Counter(action.micro_batch for action in self.actions)
        self.left = Counter(action.piece for action in self.actions if action.direction == "backward")
        self.batches: dict[int, Batch] = {}
        self.graphs: dict[tuple[int, int], _Graph] = {}

    def steps(self) -> Iterator[tuple[Action, ModelOutput]]:
        for action in self.actions:
            if action.direction == "forward":
                yield action, self._forward(action)
            else:
                self._backward(action)
            self.uses[action.micro_batch] -= 1
            if not self.uses[action.micro_batch]:
                self.batches.pop(action.micro_batch, None)
        self.mailbox.close()

    def _forward(self, action: Action) -> ModelOutput:
        if action.micro_batch not in self.batches:
            self.batches[action.micro_batch] = self.micro_batches[action.micro_batch].read()
        batch, x_in = self.batches[action.micro_batch], self.mailbox.take(action)
        if x_in is not None and self.backward is not None:
            x_in.requires_grad_()
        with recomputing(self.backward.recomputed if self.backward is not None else frozenset()):
            x_out, routings = self.decoder.advance(action.piece, batch, x_in)
            output = self.decoder.conclude(action.piece, batch, x_out, routings)
        goes_on = self.plan.after(action) is not None
        if goes_on:
            self.mailbox.send(action, x_out.detach())
        if self.backward is not None:
            objective = self.backward.objective(output)
            graph = _Graph(x_in, x_out if goes_on else None, objective if objective.requires_grad else None)
            self.graphs[action.piece, action.micro_batch] = graph
        return output

    def _backward(self, action: Action) -> None:
        assert self.backward is not None
        graph, gradient = self.graphs.pop((action.piece, action.micro_batch)), self.mailbox.take(action)
        self.left[action.piece] -= 1
        if not self.left[action.piece]:
            self.backward.reducer.arm(True, self.decoder.names_in(action.piece))
        ends = [(graph.x_out, gradient), (graph.objective, None)]
        given = [(end, gradient) for end, gradient in ends if end is not None]
        torch.autograd.backward([end for end, _ in given], [gradient for _, gradient in given])
        if graph.x_in is not None:
            assert graph.x_in.grad is not None
            self.mailbox.send(action, graph.x_in.grad)
