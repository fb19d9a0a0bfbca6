"""Can a connection be opened to other nodes from this one?"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from concertina.elastic.waits import BOUNDS

__all__ = ["Targets", "unreached"]

Targets = Mapping[str, tuple[str, int]]
"""Address and port of each node."""

_MOST_AT_ONCE = 32


def unreached(targets: Targets) -> list[str]:
    """Nodes to which none can be opened from here. One where nobody listens is reached all the same."""
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, max(1, len(targets)))) as pool:
        found = dict(zip(targets, pool.map(_is_reached, targets.values()), strict=True))
    return [node for node, reached in found.items() if not reached]


def _is_reached(target: tuple[str, int]) -> bool:
    try:
        socket.create_connection(target, BOUNDS["probe"].seconds).close()
    except ConnectionError:
        return True
    except OSError:
        return False
    return True
