"""A shard of no model in particular, for tests of what is done with shards."""

from __future__ import annotations

from concertina.layout import Box, Shard

__all__ = ["a_shard"]


def a_shard(name: str, box: Box, group: str = "dp_cp", decay: bool = True, weight: int = 1) -> Shard:
    """The box is all there is of its tensor."""
    return Shard(name, box.shape, box, group, "normal" if decay else "ones", weight)
