"""How does a CPU attend causally without computing the masked half? Row blocks of queries against the keys they see.

The probabilities are kept for the backward, which makes this a kernel for short sequences: it costs
B * heads * S^2 / 2 numbers a layer, against SDPA's few; up to `LONGEST` it is the faster one, in fp32 by 1.6 times.
Rotation and the softmax's scale ride on the copies that pack the heads.
Shapes: B sequences, S positions, N key-value heads, G query heads of each, C width of a head, P = C / 2 pairs,
M = B * N matrices, Q = G * rows queries of one block, J keys that block sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from concertina.model.rope import Rotation

__all__ = ["LONGEST", "attend_in_blocks"]

LONGEST = 1024
_ROWS = 64


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """out = x rotated by the angle whose cosine and sine are given; all end in the halves of a head."""
    (first, second), (out_first, out_second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin)


def _starts(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS)]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, turn: Rotation) -> Tensor:
        b, s, n, g, c = q.shape
        cos, sin, scale = turn.cos_SP, turn.sin_SP, c**-0.5
        k_MSC, v_MSC = k.new_empty(b, n, s, c), v.new_empty(b, n, s, c)
        _turn(k.permute(0, 2, 1, 3), cos, sin, k_MSC)
        v_MSC.copy_(v.permute(0, 2, 1, 3))
        k_MSC, v_MSC = k_MSC.view(b * n, s, c), v_MSC.view(b * n, s, c)
        future = torch.full((_ROWS, _ROWS), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        out = q.new_empty(b, s, n, g, c)
        kept = []
        for start, stop in _starts(s):
            rows = stop - start
            q_block = q.new_empty(b, n, g, rows, c)
            block = q[:, start:stop].permute(0, 2, 3, 1, 4)
            _turn(block, cos[start:stop] * scale, sin[start:stop] * scale, q_block)
            q_MQC = q_block.view(b * n, g * rows, c)
            p_MQJ = torch.bmm(q_MQC, k_MSC[:, :stop].transpose(1, 2))
            p_MQJ.view(b * n, g, rows, stop)[..., start:].add_(future[:rows, :rows])
            torch.softmax(p_MQJ, -1, out=p_MQJ)
            o_MQC = torch.bmm(p_MQJ, v_MSC[:, :stop])
            out[:, start:stop].copy_(o_MQC.view(b, n, g, rows, c).permute(0, 3, 1, 2, 4))
            kept += [q_MQC, p_MQJ, o_MQC]
        ctx.save_for_backward(k_MSC, v_MSC, cos, sin, *kept)
        ctx.shape = q.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        k_MSC, v_MSC, cos, sin, *kept = ctx.saved_tensors
        b, s, n, g, c = ctx.shape
        dk_MSC, dv_MSC = torch.zeros_like(k_MSC), torch.zeros_like(v_MSC)
        dq = k_MSC.new_empty(ctx.shape)
        for number, (start, stop) in enumerate(_starts(s)):
            q_MQC, p_MQJ, o_MQC = kept[3 * number : 3 * number + 3]
            rows, scale = stop - start, c**-0.5
            do_MQC = grads[0][:, start:stop].permute(0, 2, 3, 1, 4).reshape(b * n, g * rows, c)
            dv_MSC[:, :stop].add_(torch.bmm(p_MQJ.transpose(1, 2), do_MQC))
            ds_MQJ = torch.bmm(do_MQC, v_MSC[:, :stop].transpose(1, 2))
            # Gradient of the softmax: p * (dp - sum(p * dp)), and that sum is do . o.
            ds_MQJ.sub_(torch.linalg.vecdot(do_MQC, o_MQC).unsqueeze(-1)).mul_(p_MQJ)
            dk_MSC[:, :stop].add_(torch.bmm(ds_MQJ.transpose(1, 2), q_MQC))
            dq_MQC = torch.bmm(ds_MQJ, k_MSC[:, :stop]).view(b, n, g, rows, c)
            back = dq[:, start:stop].permute(0, 2, 3, 1, 4)
            _turn(dq_MQC, cos[start:stop] * scale, sin[start:stop] * -scale, back)
        dk = torch.empty_like(dk_MSC).view(b, n, s, c)
        _turn(dk_MSC.view(b, n, s, c), cos, -sin, dk)
        return dq, dk.transpose(1, 2), dv_MSC.view(b, n, s, c).transpose(1, 2), None


def attend_in_blocks(q_BSNGC: Tensor, k_BSNC: Tensor, v_BSNC: Tensor, turn: Rotation) -> Tensor:
    """Rotated causal attention, [B, S, N, G, C]: fp32 or float64, on a CPU."""
    return _Attend.apply(q_BSNGC, k_BSNC, v_BSNC, turn)
