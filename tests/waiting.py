"""How does a test wait for something without sleeping for a guessed time?"""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], bound_s: float = 30.0) -> None:
    """Return as soon as `condition()` is true; TimeoutError after `bound_s`."""
    deadline = time.monotonic() + bound_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true within {bound_s:g} s: {condition}")
        time.sleep(0.01)
