"""Which number does position i of tensor n start with? A counter hash, so the answer knows no device, world or slice.

Everything is integer arithmetic on int64 (wrapping), then exact float64: CPU and GPU give the same bits, and a box of
a tensor holds the same numbers whoever makes it. The mixer is splitmix64's finalizer (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from concertina.layout.box import Box

__all__ = ["draw_bits", "draw_normal", "draw_uniform", "element_indices", "initialize", "key_of"]

_CHUNK_ELEMENTS = 1 << 18  # temporaries of a draw stay in cache, and small beside a large parameter
_FIELDS = 8
_FIELD_BITS = 16
# A sum of 8 uniform 16-bit integers: mean 4 * 65535, variance 8 * (2^32 - 1) / 12. Both are exact in float64.
_MEAN = _FIELDS * (2**_FIELD_BITS - 1) / 2
_DEVIATION = math.sqrt(_FIELDS * (4**_FIELD_BITS - 1) / 12)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return (value & (2**64 - 1)) - ((value & 2**63) << 1)


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def key_of(seed: int, name: str, *counters: int) -> int:
    """A 64-bit key for a stream of draws: parameters by (seed, name), gate noise by (seed, name, step, layer)."""
    text = "\0".join([str(seed), name, *map(str, counters)])
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw_bits(key: int, index: Tensor) -> Tensor:
    """64 hashed bits for every int64 index, as int64 of the same shape."""
    x = index * _GOLDEN + key
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def draw_uniform(key: int, index: Tensor) -> Tensor:
    """A float64 in [0, 1) for every int64 index: 53 bits, exact."""
    return _shift(draw_bits(key, index), 11).to(torch.float64) * 2.0**-53


def draw_normal(key: int, index: Tensor) -> Tensor:
    """A nearly normal float64 (mean 0, variance 1, never beyond 4.9) for every int64 index.

    The sum of eight uniform 16-bit integers is exact, so no library's logarithm or cosine decides a bit.
    """
    total = torch.zeros_like(index)
    for half in range(2):
        bits = draw_bits(key, index * 2 + half)
        for field in range(4):
            total += (bits >> (field * _FIELD_BITS)) & (2**_FIELD_BITS - 1)
    return (total.to(torch.float64) - _MEAN) * (1.0 / _DEVIATION)


def element_indices(full_shape: tuple[int, ...], box: Box, device: torch.device | str) -> Tensor:
    """Row-major position in the global tensor of every element of `box`, int64 of the box's shape."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for length, start, stop in zip(full_shape, box.start, box.stop, strict=True):
        along = torch.arange(start, stop, dtype=torch.int64, device=device)
        index = index.unsqueeze(-1) * length + along
    return index


def initialize(name: str, full_shape: tuple[int, ...], box: Box, std: float, seed: int, out: Tensor) -> Tensor:
    """Fill `out` (of the box's shape, any float dtype, any device) with the start values of parameter `name`."""
    key = key_of(seed, name)
    flat = out.view(-1)
    index = _ChunkedIndices(full_shape, box, out.device)
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, flat.numel())
        flat[start:stop] = (draw_normal(key, index.between(start, stop)) * std).to(out.dtype)
    return out


class _ChunkedIndices:
    """`element_indices` for a run of the box's elements in row-major order, without making all of them."""

    def __init__(self, full_shape: tuple[int, ...], box: Box, device: torch.device) -> None:
        self.full_shape, self.box, self.device = full_shape, box, device

    def between(self, start: int, stop: int) -> Tensor:
        """Global positions of the box's elements number start to stop - 1."""
        rest = torch.arange(start, stop, dtype=torch.int64, device=self.device)
        index = torch.zeros_like(rest)
        stride = 1
        for length, size, first in zip(
            reversed(self.full_shape), reversed(self.box.shape), reversed(self.box.start), strict=True
        ):
            index += (rest % size + first) * stride
            rest = rest // size
            stride *= length
        return index
