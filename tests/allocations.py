"""What memory does a piece of code ask for? torch's own record of every tensor, and Python's of everything else.

`with recorded() as found: ...`, then `found.peak_bytes`. `with Living() as living: ...`, then `living.num_bytes()` of
what is still there, whichever thread let go of the rest. A file that is mapped is no allocation: its pages are the
kernel's cache of the file, and only those that are read are there.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Allocations", "Living", "recorded"]


@dataclass
class Allocations:
    """Bytes. `peak` and `kept` (what is still alive at the end) count from the beginning, `largest` is one tensor."""

    peak_bytes: int = 0
    largest_bytes: int = 0
    kept_bytes: int = 0
    python_peak_bytes: int = 0


@contextmanager
def recorded(python: bool = False) -> Iterator[Allocations]:
    """Filled in at the end of the block. This thread only.

    With `python`, that of Python's objects too; never beside a group's threads: CPython 3.11's tracemalloc, while it
    stops, kills a process in which another thread allocates.
    """
    found = Allocations()
    if python:
        tracemalloc.start()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            yield found
        found.python_peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        if python:
            tracemalloc.stop()
    alive: dict[int, int] = {}
    for address, size in _of_tensors(profile):
        if size > 0:
            alive[address] = size
            found.largest_bytes = max(found.largest_bytes, size)
            found.peak_bytes = max(found.peak_bytes, sum(alive.values()))
        else:  # perhaps of something older, that the garbage collector found just now
            alive.pop(address, None)
    found.kept_bytes = sum(alive.values())


def _of_tensors(profile: torch.profiler.profile) -> Iterator[tuple[int, int]]:
    """(address, bytes) in the order of time, negative where memory was given back; mapped files left out."""
    events = _all_below(profile.profiler.kineto_results.experimental_event_tree())
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.tag == _EventType.Allocation and not event.extra_fields.total_reserved:
            yield event.extra_fields.ptr, event.extra_fields.alloc_size


def _all_below(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all_below(event.children)


class Living(TorchDispatchMode):
    """Knows every storage that this thread's operations return, and holds none of them."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in given:
                storage = result.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def num_bytes(self) -> int:
        """Of what is new and still there."""
        return sum(size for storage, size in self._seen.values() if not storage.expired())
