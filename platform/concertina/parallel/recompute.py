"""What of a forward is kept for its backward, and what is computed once more instead?

Two ways, inside `recomputing` and for the kinds named there:

    region   a part of a layer, computed again as a whole when the backward comes to it (Chen et al. 2016). Its inputs
             are kept. It repeats the part's communication up to the last number that the backward needs: the same
             calls on every rank, since the same graph asks for them.
    again    one cheap tensor that others keep (a norm's output, rows in expert order). It is dropped with the layer's
             forward and made from its inputs when somebody's backward asks for it (as in Megatron-Core's
             output-discarding checkpoint). It never communicates.

Numbers are the same bits: the same functions see the same inputs, and our random numbers are functions of the place.
What counts (a router's tokens, its bias) is taken from the first forward only.
A schedule that keeps what was communicated (TED) gives `checkpoint` its `context_fn`: nothing else need know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["again", "layer", "recomputing", "region"]

T = TypeVar("T")


class _Recipe:
    """How a tensor was made. Its result stays until everybody who saved it has asked."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...], num_bytes: int) -> None:
        self._function, self._inputs, self._num_bytes = function, inputs, num_bytes
        self._result: Tensor | None = None
        self.uses = 0

    def make(self) -> Tensor:
        result = self._result
        if result is None:
            with torch.no_grad():
                result = self._function(*(_unpack(given) for given in self._inputs))
            assert result.untyped_storage().nbytes() == self._num_bytes, "made otherwise than the first time"
        self.uses -= 1
        self._result = result if self.uses > 0 else None
        return result


@dataclass(frozen=True)
class _View:
    """A tensor on the storage that a recipe makes."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, _View):
        return packed
    return packed.recipe.make().as_strided(packed.size, packed.stride, packed.offset)


class _Book:
    """The recipes of one layer. It holds what they made, so that no other tensor comes to lie at the same address."""

    def __init__(self) -> None:
        self._recipes: dict[int, tuple[_Recipe, Tensor]] = {}

    def note(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Tensor:
        result = function(*inputs)
        storage = result.untyped_storage()
        sources = [given.untyped_storage().data_ptr() for given in inputs if isinstance(given, Tensor)]
        if storage.nbytes() and storage.data_ptr() not in sources:
            packed = tuple(self.pack(given) if isinstance(given, Tensor) else given for given in inputs)
            recipe = _Recipe(function, packed, storage.nbytes())
            self._recipes[storage.data_ptr()] = recipe, result.detach()
        return result

    def pack(self, x: Tensor) -> Any:
        """What autograd keeps in the place of `x`."""
        known = self._recipes.get(x.untyped_storage().data_ptr())
        if known is None:
            return x.detach()  # itself, it would hold the graph that holds it
        recipe, _ = known
        recipe.uses += 1
        return _View(recipe, tuple(x.shape), x.stride(), int(x.storage_offset()))

    def close(self) -> None:
        """Let go of what was made: what autograd keeps still refers to this book."""
        self._recipes.clear()


# Backward, and with it what is computed again, runs on threads of autograd's own where there is a GPU.
_kinds: frozenset[str] = frozenset()
_book: _Book | None = None


@contextmanager
def recomputing(kinds: frozenset[str]) -> Iterator[None]:
    """Layers whose forward runs inside keep nothing of these kinds (`training.activation_checkpointing`)."""
    global _kinds, _book
    before = _kinds, _book
    _kinds, _book = kinds, None
    try:
        yield
    finally:
        _kinds, _book = before


def layer(function: Callable[..., T], *inputs: Any) -> T:
    """One layer of the model: the region of the kind `layer`, and the bounds of what `again` drops."""
    global _book
    if not _kinds or not torch.is_grad_enabled():
        return function(*inputs)
    if "layer" in _kinds:
        return region("layer", function, *inputs)
    _book = book = _Book()
    try:
        with torch.autograd.graph.saved_tensors_hooks(book.pack, _unpack):
            return function(*inputs)
    finally:
        _book = None
        book.close()


def region(kind: str, function: Callable[..., T], *inputs: Any) -> T:
    """`function(*inputs)`, whose insides are computed again if `kind` is. Every tensor that it reads of this
    micro-batch must be among its inputs. All ranks that `function` communicates with must call it."""
    if kind not in _kinds or not torch.is_grad_enabled():
        return function(*inputs)

    def alone(*inputs: Any) -> T:
        with recomputing(frozenset()):  # all of it is computed again: nothing inside needs to be
            return function(*inputs)

    result: T = checkpoint(alone, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def again(kind: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, a tensor of its own that is made again if `kind` is, also where its result is saved inside
    an autograd function. `function` must be pure, communicate nothing, and find no other tensors than its inputs."""
    if _book is None or kind not in _kinds:
        return function(*inputs)
    return _book.note(function, inputs)
