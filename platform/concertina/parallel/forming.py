"""What must be known to form the groups of a rank, whatever the backend?"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from concertina.parallel.fence import Wires

__all__ = ["Call", "Place"]


@dataclass(frozen=True)
class Place:
    """Where this rank is in a group to be formed: `ranks[position]` is itself."""

    name: str
    ranks: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class Call:
    """What the forming of all groups of a rank has in common. `key` is unique to a generation and purpose."""

    rank: int
    key: str
    store: dist.Store
    hostname: str
    timeout: timedelta
    wires: Wires
