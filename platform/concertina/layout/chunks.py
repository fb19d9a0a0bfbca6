"""Which positions of every sequence does a rank of cp have? A chunk from each end, so that causal work is even.

A sequence is cut into 2 * cp chunks, and rank i has number i and number 2 * cp - 1 - i: what the first sees less of the
past, the second sees more. Source: the zig-zag order of Llama 3 (arXiv 2407.21783, section 3.3.2) and Megatron-Core.
"""

from __future__ import annotations

from typing import Literal

from concertina.layout.box import cut

__all__ = ["Exchange", "chunks", "chunks_size", "travels_in_ring"]

Exchange = Literal["auto", "gather", "ring"]
"""How keys and values get to the other ranks of cp (`parallel/context.py`)."""

_RING_FROM = 32768
# Below it a gather has fewer and larger messages; from here on keys and values of whole sequences fill memory.


def chunks(length: int, cp: int, index: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) of each of its chunks, in rising order; some are empty where there are fewer positions."""
    if cp == 1:
        return ((0, length),)
    return cut(length, 2 * cp, index), cut(length, 2 * cp, 2 * cp - 1 - index)


def chunks_size(length: int, cp: int, index: int) -> int:
    """How many positions of a sequence it has."""
    return sum(stop - start for start, stop in chunks(length, cp, index))


def travels_in_ring(exchange: Exchange, length: int) -> bool:
    """Whether keys and values of sequences of `length` go from neighbour to neighbour, or all at once."""
    return exchange == "ring" or (exchange == "auto" and length >= _RING_FROM)
