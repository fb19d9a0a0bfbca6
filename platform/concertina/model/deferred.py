"""When is a weight's gradient computed? With its input's, or later: whenever a schedule has nothing better to do.

Inside `deferring(queue)`, what multiplies by a weight (`linear`, the experts, the head) computes in its backward only
what the layers below wait for, and queues the rest: dW depends on no communication (Lancet, arXiv 2404.19429).
What is queued holds the tensors it needs. It must have run before gradients are reduced.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DeferredGradients", "active_queue", "deferring"]


@dataclass(frozen=True)
class _Item:
    weights: Sequence[Tensor]
    compute: Callable[[], Sequence[Tensor]]


class DeferredGradients:
    """Weight gradients still to be computed, in the order in which the backward came by them."""

    def __init__(self) -> None:
        self._items: deque[_Item] = deque()
        self._owed: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._items)

    def owes(self, parameter: Tensor) -> bool:
        """Whether a part of the gradient of `parameter` is still to come."""
        return self._owed[id(parameter)] > 0

    def push(self, weights: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> None:
        """Later, add what `compute` returns to the gradients of `weights`: parameters, or views and casts of one."""
        weights = [_leaf_itself(weight) for weight in weights]
        self._items.append(_Item(weights, compute))
        self._owed.update(id(_parameter_of(weight)) for weight in weights)

    def run_next(self) -> None:
        """Compute the oldest: its parameters' `grad` and their hooks see it as they see autograd's."""
        item = self._items.popleft()
        with torch.no_grad():
            gradients = item.compute()
        self._owed.subtract(id(_parameter_of(weight)) for weight in item.weights)
        torch.autograd.backward(list(item.weights), list(gradients))

    def run(self) -> None:
        """Compute all that is left."""
        while self._items:
            self.run_next()


def _leaf_itself(weight: Tensor) -> Tensor:
    """A parameter for what autograd kept of it, which is another object where saving was hooked into; views and casts
    as they are."""
    if weight.grad_fn is not None:
        return weight
    accumulator: Any = torch.autograd.graph.get_gradient_edge(weight).node
    leaf: Tensor = accumulator.variable
    return leaf


def _parameter_of(weight: Tensor) -> Tensor:
    """The leaf that `weight` is a view or cast of."""
    node = weight.grad_fn
    if node is None:
        return weight
    while not hasattr(node, "variable"):
        (node,) = (following for following, _ in node.next_functions if following is not None)
    parameter: Tensor = node.variable
    return parameter


# Backward runs on threads of autograd's own where there is a GPU: what is active must be seen from any thread.
_active: DeferredGradients | None = None


def active_queue() -> DeferredGradients | None:
    """Where what is computed now leaves its weight gradients; None: they come with the others."""
    return _active


@contextmanager
def deferring(queue: DeferredGradients) -> Iterator[None]:
    """The backwards of what is computed inside leave weight gradients in `queue`, wherever they run."""
    global _active
    assert _active is None, "one queue at a time"
    _active = queue
    try:
        yield
    finally:
        _active = None
