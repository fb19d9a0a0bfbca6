"""How does a CPU attend causally without computing the masked half? Row blocks of queries against the keys they see.

The probabilities are kept for the backward, which makes this a kernel for short sequences: it costs
B * heads * S^2 / 2 numbers a layer, against SDPA's few; up to `LONGEST` it is the faster one, in fp32 by 1.6 times.
Rotation and the softmax's scale ride on the copies that pack the heads.
Shapes: B sequences, S positions, N key-value heads, G query heads of each, C width of a head, P = C / 2 pairs,
M = B * N matrices, Q = G * positions query rows of one block (by head), J keys that block sees.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from concertina.model.rope import Rotation

__all__ = ["LONGEST", "attend_in_blocks"]

LONGEST = 1024
# More blocks compute less of the masked half, but in products too small to be fast.
_MOST_BLOCKS, _LEAST_POSITIONS = 8, 32


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = x rotated by the angle whose cosine and sine are given; all end in the halves of a head."""
    (first, second), (out_first, out_second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin)


@lru_cache(maxsize=8)
def _future(positions: int, dtype: torch.dtype) -> Tensor:
    """What a block adds to its scores against its own keys: -inf where the key comes later."""
    return torch.full((positions, positions), float("-inf"), dtype=dtype).triu_(1)


def _blocks(length: int) -> list[tuple[int, int]]:
    step = max(_LEAST_POSITIONS, -(-length // _MOST_BLOCKS))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BSNGC: Tensor, kv_BSN2C: Tensor, turn: Rotation) -> Tensor:
        b, s, n, g, c = q_BSNGC.shape
        scale = c**-0.5
        cos, sin, cos_q, sin_q = turn.cos_SP, turn.sin_SP, turn.cos_SP * scale, turn.sin_SP * scale
        q_BNGSC, (k, v) = q_BSNGC.permute(0, 2, 3, 1, 4), kv_BSN2C.permute(0, 2, 3, 1, 4).split(1, 2)
        k_MSC, v_MSC = k.new_empty(b, n, 1, s, c), v.contiguous().view(b * n, s, c)
        _turn(k, cos, sin, k_MSC)
        k_MSC = k_MSC.view(b * n, s, c)
        out, kept = torch.empty_like(q_BSNGC, memory_format=torch.contiguous_format), []
        out_BNGSC = out.permute(0, 2, 3, 1, 4)
        for start, stop in _blocks(s):
            q_MQC = k.new_empty(b, n, g, stop - start, c)
            _turn(q_BNGSC[:, :, :, start:stop], cos_q[start:stop], sin_q[start:stop], q_MQC)
            q_MQC = q_MQC.view(b * n, -1, c)
            p_MQJ = torch.bmm(q_MQC, k_MSC[:, :stop].transpose(1, 2))
            p_MQJ.view(b * n, g, -1, stop)[..., start:].add_(_future(stop - start, k.dtype))
            torch.softmax(p_MQJ, -1, out=p_MQJ)
            out_BNGSC[:, :, :, start:stop] = torch.bmm(p_MQJ, v_MSC[:, :stop]).view(b, n, g, -1, c)
            kept += [q_MQC, p_MQJ]
        ctx.save_for_backward(k_MSC, v_MSC, out, cos, sin, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        k_MSC, v_MSC, out, cos, sin, *kept = ctx.saved_tensors
        b, s, n, g, c = out.shape
        cos_q, sin_q = cos * c**-0.5, sin * -(c**-0.5)
        do_BNGSC = grads[0].permute(0, 2, 3, 1, 4)
        # Gradient of the softmax: p * (dp - sum(p * dp)), and that sum is do . o.
        along_BNGS = torch.linalg.vecdot(grads[0], out).permute(0, 2, 3, 1)
        dk_MSC, dv_MSC = torch.zeros_like(k_MSC), torch.zeros_like(v_MSC)
        dq, dkv = torch.empty_like(out), out.new_empty(b, s, n, 2, c)
        dq_BNGSC, (dk, dv) = dq.permute(0, 2, 3, 1, 4), dkv.permute(0, 2, 3, 1, 4).split(1, 2)
        for (start, stop), q_MQC, p_MQJ in zip(_blocks(s), kept[::2], kept[1::2], strict=True):
            do_MQC = do_BNGSC[:, :, :, start:stop].reshape(b * n, -1, c)
            dv_MSC[:, :stop].add_(torch.bmm(p_MQJ.transpose(1, 2), do_MQC))
            ds_MQJ = torch.bmm(do_MQC, v_MSC[:, :stop].transpose(1, 2))
            ds_MQJ.sub_(along_BNGS[:, :, :, start:stop].reshape(b * n, -1, 1)).mul_(p_MQJ)
            dk_MSC[:, :stop].add_(torch.bmm(ds_MQJ.transpose(1, 2), q_MQC))
            dq_MQC = torch.bmm(ds_MQJ, k_MSC[:, :stop]).view(b, n, g, -1, c)
            _turn(dq_MQC, cos_q[start:stop], sin_q[start:stop], dq_BNGSC[:, :, :, start:stop])
        _turn(dk_MSC.view(b, n, 1, s, c), cos, -sin, dk)
        dv.copy_(dv_MSC.view(b, n, 1, s, c))
        return dq, dkv, None


def attend_in_blocks(q_BSNGC: Tensor, kv_BSN2C: Tensor, turn: Rotation) -> Tensor:
    """Rotated causal attention to [B, S, N, G, C]; fp32 or float64, on a CPU."""
    return _Attend.apply(q_BSNGC, kv_BSN2C, turn)
