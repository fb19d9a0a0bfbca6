"""What stops every thread of a process for 0.2 s? A full run of Python's garbage collector, once torch is imported.

It looks at each of half a million objects, nearly all of modules, which never go. One that comes while ranks change
seats holds all of them up.
"""

from __future__ import annotations

import gc

__all__ = ["spare_imports"]


def spare_imports() -> None:
    """From now on the collector looks only at what is made from now on. Call when all is imported."""
    gc.collect()
    gc.freeze()
