"""What does a process hold on to? Threads, descriptors, and bytes that are allocated."""

from __future__ import annotations

import ctypes
import gc
import os
from dataclasses import dataclass

__all__ = ["Held", "bytes_in_use"]


@dataclass(frozen=True)
class Held:
    """Of one process at one moment."""

    threads: int
    descriptors: int
    bytes: int

    @classmethod
    def now(cls) -> Held:
        """Of this process."""
        return cls(len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), bytes_in_use())


class _Mallinfo(ctypes.Structure):
    """glibc's mallinfo2: counts of bytes, over all arenas."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def bytes_in_use() -> int:
    """What is allocated, without the holes that the heap has: their size wanders."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)
