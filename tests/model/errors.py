"""How far apart are two tensors? The measure of every equality test here."""

from __future__ import annotations

from torch import Tensor

__all__ = ["error"]


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|; an all-zero tensor must be all zero."""
    if theirs.numel() == 0:
        return 0.0 if ours.shape == theirs.shape else float("inf")
    largest = theirs.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    return difference / largest if largest else (0.0 if difference == 0 else float("inf"))
