"""How do queries attend to keys that come piece by piece? Tile by tile, merged by the logarithms of their sums.

The softmax over all keys is put together from those over parts of them (online softmax, Milakov and Gimelshein 2018),
and its gradient falls apart again: with the final output and logarithms each tile's is exact by itself
(FlashAttention, arXiv 2205.14135; Ring Attention, arXiv 2310.01889). Tiles are computed by torch's own kernels.
Shapes: M = sequences * key-value heads, G query heads of each, R positions here, C width of a head, W width of its
key and its value together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from concertina.model.attention_kernels import TileInput, TileKernel, choose_kernel
from concertina.model.sight import Sight, Tile
from concertina.parallel.collectives import Pending

__all__ = ["Choose", "attend_in_tiles"]


Choose = Callable[[TileInput], TileKernel]


def attend_in_tiles(q_MGRC: Tensor, kv_RMW: Tensor, sight: Sight, choose: Choose = choose_kernel) -> Tensor:
    """Output [M, G, R, W - C] of rotated queries, with keys (rotated) and values side by side, each tile by the kernel
    that `choose` says. All ranks of cp must call it, and its backward."""
    return _Attend.apply(q_MGRC, kv_RMW, sight, choose)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_MGRC: Tensor, kv_RMW: Tensor, sight: Sight, choose: Choose) -> Tensor:
        wide = torch.promote_types(q_MGRC.dtype, torch.float32)
        out = q_MGRC.new_zeros(*q_MGRC.shape[:3], kv_RMW.shape[2] - q_MGRC.shape[3], dtype=wide)
        logs = torch.full(q_MGRC.shape[:3], float("-inf"), dtype=wide, device=q_MGRC.device)
        for piece, chunks in _pieces(kv_RMW, sight):
            for tile in sight.tiles(chunks):
                x = _input(q_MGRC, piece, tile, sight)
                _merge(out[:, :, tile.rows], logs[:, :, tile.rows], *choose(x).forward(x))
        result = out.to(q_MGRC.dtype)
        ctx.save_for_backward(q_MGRC, kv_RMW, result, logs)
        ctx.sight, ctx.choose = sight, choose
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q_MGRC, kv_RMW, out, logs = ctx.saved_tensors
        dq = torch.zeros_like(q_MGRC, dtype=logs.dtype)
        sums = _Sums(kv_RMW, logs.dtype, ctx.sight)
        for piece, chunks in _pieces(kv_RMW, ctx.sight):
            dpiece = torch.zeros_like(piece, dtype=logs.dtype)
            for tile in ctx.sight.tiles(chunks):
                x = _input(q_MGRC, piece, tile, ctx.sight)
                _add_gradients(ctx.choose(x), x, tile, (grads[0], out, logs), dq, dpiece)
            sums.add(dpiece)
        del piece, x  # of whole sequences, where they are gathered: gradients need the room now
        return dq.to(q_MGRC.dtype), sums.finish().to(kv_RMW.dtype), None, None


def _pieces(kv_RMW: Tensor, sight: Sight) -> Iterator[tuple[Tensor, tuple[tuple[int, int], ...]]]:
    """Keys and values of all positions, piece by piece, and which chunks of positions each has."""
    context, length = sight.context, sight.length
    if not context.travels_in_ring(length):
        yield context.gather(kv_RMW, length), ((0, length),)
        return
    piece, sizes = kv_RMW, context.sizes(length)
    for turn, source in enumerate(context.sources()):
        passing: Pending[Tensor] | None = None
        if turn + 1 < context.group.size:
            passing = context.start_pass(piece, sizes[(source - 1) % len(sizes)])
        yield piece, context.chunks(length, source)
        if passing is not None:
            piece = passing.finish()


class _Sums:
    """Gradients of pieces on the way to who has them: `add` as the pieces come."""

    def __init__(self, kv_RMW: Tensor, dtype: torch.dtype, sight: Sight) -> None:
        self.context, self.length = sight.context, sight.length
        self.ring = self.context.travels_in_ring(self.length)
        self._sources = self.context.sources()
        self._passing: Pending[Tensor] | None = None
        self._own = kv_RMW.new_empty(0, dtype=dtype)

    def add(self, dpiece: Tensor) -> None:
        source = next(self._sources)
        if not self.ring or source == self.context.group.rank:
            self._own = dpiece
            return
        # What neighbours have added to this piece's gradients comes behind the piece itself, at last to who has it.
        if self._passing is not None:
            dpiece += self._passing.finish()
        coming = (source - 1) % self.context.group.size
        self._passing = self.context.start_pass(dpiece, self.context.sizes(self.length)[coming])

    def finish(self) -> Tensor:
        """Those of the piece here."""
        if not self.ring:
            return self.context.scatter(self._own, self.length)
        assert self._passing is not None
        return self._own + self._passing.finish()


def _merge(out: Tensor, logs: Tensor, more: Tensor, more_logs: Tensor) -> None:
    """Put the output over some more keys into that over those so far; in place."""
    total = torch.logaddexp(logs, more_logs)
    # Who has seen nothing yet stays so: -inf less -inf is no number.
    base = total.masked_fill(total == float("-inf"), 0)
    out.mul_((logs - base).exp_().unsqueeze(3)).add_(more * (more_logs - base).exp_().unsqueeze(3))
    logs.copy_(total)


def _input(q_MGRC: Tensor, piece: Tensor, tile: Tile, sight: Sight) -> TileInput:
    """A tile's slices of queries, keys and values."""
    width, groups = q_MGRC.shape[3], q_MGRC.shape[1]
    heads = piece[tile.keys].transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1)
    mask = sight.mask(tile, q_MGRC.device)
    if mask is not None:
        mask = mask.repeat_interleave(len(heads) // len(mask), 0)
    return TileInput(q_MGRC[:, :, tile.rows], heads[..., :width], heads[..., width:], tile.causal, mask)


def _add_gradients(
    kernel: TileKernel, x: TileInput, tile: Tile, whole: tuple[Tensor, ...], dq: Tensor, dpiece: Tensor
) -> None:
    """Add a tile's share to the gradients of queries [M, G, R, C] and of its piece of keys and values."""
    dout, out, logs = (part[:, :, tile.rows] for part in whole)
    dq_tile, dk, dv = kernel.backward(x, dout, out, logs)
    dq[:, :, tile.rows] += dq_tile
    dkeys, width = dpiece[tile.keys].transpose(0, 1), dk.shape[3]
    dkeys[..., :width] += dk.sum(1, dtype=dq.dtype)
    dkeys[..., width:] += dv.sum(1, dtype=dq.dtype)
