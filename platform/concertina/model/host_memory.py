"""Where do a step's tensors live on a CPU? In memory the last step freed: malloc is told not to give it back.

Left alone, glibc returns the blocks of a step to the kernel at its end and asks for them again at its start; the
kernel then clears every page anew: 62 MB of gradients cost 25 ms, 3 % of a step of the benchmark's model.
"""

from __future__ import annotations

import ctypes

import torch

__all__ = ["ENVIRONMENT", "keep_freed_memory", "take_ahead"]

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""What glibc reads when such a process starts, if somebody starts it: later it is too late to have one heap alone.
Threads there are by then have heaps of their own, and new ones share those."""

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Call once, early, in a process that will train on its CPU. False where malloc is not glibc's.

    No block is mapped on its own, nothing freed goes back to the system, and threads share one heap: the process stays
    as large as its largest step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return all(mallopt(option, value) == 1 for option, value in settings)


def take_ahead(num_bytes: int) -> None:
    """Have the process own so much memory that is free, after `keep_freed_memory`: the kernel clears pages when they
    are first written to, one by one, and others would wait for it in the first steps and while ranks change seats."""
    torch.empty(num_bytes, dtype=torch.uint8).zero_()
