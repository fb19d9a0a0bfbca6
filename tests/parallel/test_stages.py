"""Does every message come to who takes it, and is what was sent let go, with a backward and without?"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from concertina.layout import Layout
from concertina.parallel import stages as stages_module
from concertina.parallel.stages import Mailbox
from concertina.schedule.pipeline import Action, Plan, forward_plan, training_plan
from tests.distributed import form, on_ranks

pytestmark = pytest.mark.dist

SHAPES = [(2, 1, 1), (2, 1, 9), (2, 3, 5), (3, 1, 2), (3, 2, 7), (4, 2, 24)]


def mark(action: Action) -> torch.Tensor:
    """A message that only this action takes; of another size in every micro-batch."""
    number = action.piece * 1000 + action.micro_batch * 2 + (action.direction == "backward")
    return torch.full((1 + action.micro_batch,), float(number))


def with_one_posted(rank: int, store: Any, *shape: int) -> tuple[int, list[int]]:
    with patch.object(stages_module, "_AHEAD", 1):
        return pass_all(rank, store, *shape)


def pass_all(rank: int, store: Any, stages: int, virtual: int, micro_batches: int) -> tuple[int, list[int]]:
    """How many messages were others than expected, and the most that one stage held for another, with a backward and
    without."""
    group, wrong, most = form(Layout(stages, pp=stages), rank, store)["pp"], 0, []
    for make in (training_plan, forward_plan):
        plan: Plan = make(stages, virtual, micro_batches)
        mailbox, held = Mailbox(group, plan, lambda number: torch.empty(1 + number)), 0
        for action in plan.actions[rank]:
            x = mailbox.take(action)
            wrong += x is not None and not torch.equal(x, mark(action))
            after = plan.after(action)
            if after is not None:
                mailbox.send(action, mark(after))
            held = max(held, *(len(sent) for sent in mailbox._sent.values()))
        mailbox.close()
        wrong += sum(map(len, mailbox._sent.values()))
        most.append(held)
    return wrong, most


@pytest.mark.parametrize(("stages", "virtual", "micro_batches"), SHAPES)
def test_every_message_comes_and_is_let_go(stages: int, virtual: int, micro_batches: int) -> None:
    for wrong, most in on_ranks(pass_all, stages, stages, virtual, micro_batches):
        assert not wrong
        in_flight = stages if virtual == 1 else 2 * stages * virtual + stages
        assert most[0] <= 2 * in_flight
        assert most[1] <= 2 * stages + 3


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 2, 9)])
def test_what_is_taken_before_its_turn_comes_too(shape: tuple[int, int, int]) -> None:
    """With one receive posted, the one that is wanted is not always it."""
    for wrong, _ in on_ranks(with_one_posted, shape[0], *shape):
        assert not wrong
