"""How do tokens of one sequence see each other? Causal grouped-query attention in three steps: project, core, output.

A lane of tp has its share of the key-value heads with their queries, or, where there are fewer of them than lanes, some
queries of one. Shapes: B sequences, S positions, T = B * S tokens, D hidden, N key-value heads here, G query heads of
each here, C width of a head, V of its values. Weights are grouped by key-value head: a cut over heads is one box.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.layout import cut_heads
from concertina.model.attention_blocks import LONGEST, attend_in_blocks
from concertina.model.attention_kernels import choose_kernel
from concertina.model.attention_tiles import Choose, attend_in_tiles
from concertina.model.linear import linear
from concertina.model.norm import Pieces, RMSNorm
from concertina.model.parameters import Build, Part
from concertina.model.rope import Rotation, rotate
from concertina.model.sight import Sight
from concertina.parallel.recompute import region

__all__ = ["Attention", "attend", "attend_apart", "core"]


def attend(q_BSNGC: Tensor, kv_BSN2C: Tensor, sight: Sight) -> Tensor:
    """Rotate queries and keys, attend to what is seen, by the kernel that measures fastest: [B, S, N, G, C]."""
    if not sight.is_plain:
        k, v = kv_BSN2C.unbind(3)
        return attend_apart(rotate(q_BSNGC, sight.turn), rotate(k, sight.turn), v, sight)
    wide = q_BSNGC.dtype in (torch.float32, torch.float64)
    if q_BSNGC.device.type == "cpu" and wide and q_BSNGC.shape[1] <= LONGEST:
        return attend_in_blocks(q_BSNGC, kv_BSN2C, sight.turn)
    return core(q_BSNGC, kv_BSN2C, sight.turn)


def attend_apart(
    q_BSNGC: Tensor, k_BSNC: Tensor, v_BSNV: Tensor, sight: Sight, choose: Choose = choose_kernel
) -> Tensor:
    """Attend with rotated queries and keys, whatever the values' width, to keys wherever they are: [B, S, N, G, V].
    All ranks of cp must call it."""
    b, s, n, g, _ = q_BSNGC.shape
    q_MGSC = q_BSNGC.permute(0, 2, 3, 1, 4).flatten(0, 1)
    kv_SMW = torch.cat([k_BSNC, v_BSNV], 3).transpose(0, 1).flatten(1, 2)
    out_MGSV = attend_in_tiles(q_MGSC.contiguous(), kv_SMW.contiguous(), sight, choose)
    return out_MGSV.view(b, n, g, s, -1).permute(0, 3, 1, 2, 4)


def core(q_BSNGC: Tensor, kv_BSN2C: Tensor, turn: Rotation) -> Tensor:
    """`attend` by torch's scaled dot product attention: any device, dtype and length."""
    k, v = kv_BSN2C.split(1, 3)
    query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in (rotate(q_BSNGC, turn), rotate(k, turn), v))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).unflatten(2, q_BSNGC.shape[2:4])


class Attention(Part):
    """Query, key and value projections, optional norms and clamp, the core, the output projection."""

    q: Tensor
    kv: Tensor
    q_bias: Tensor
    kv_bias: Tensor
    output: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        model = build.model
        for name in ("q", "kv", *(("q_bias", "kv_bias") if model.attention_bias else ()), "output"):
            self._make(name)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if model.qk_norm != "none":
            q_pieces, k_pieces = self._pieces() if model.qk_norm == "full" else (None, None)
            self.q_norm = RMSNorm(build, f"{prefix}.q_norm", q_pieces)
            self.k_norm = RMSNorm(build, f"{prefix}.k_norm", k_pieces)

    def _pieces(self) -> tuple[Pieces, Pieces]:
        """All heads at once are normed, wherever they are."""
        model, lanes = self.build.model, self.build.lanes
        copies = cut_heads(model, lanes.size, lanes.rank).copies
        width = model.width_of_head
        return (
            Pieces(lanes.group, model.num_attention_heads * width),
            Pieces(lanes.group, model.num_key_value_heads * width, copies),
        )

    def enter(self, x_RD: Tensor, num_tokens: int) -> Tensor:
        """All `num_tokens` tokens of the lanes, for `forward`: [T, D]."""
        return self.build.lanes.enter(x_RD, num_tokens)

    def project(self, x_TD: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Queries [B, S, N, G, C] and, of every key-value head, key and value [B, S, N, 2, C], before rotation."""
        q, kv = linear(x_TD, self.q.flatten(0, 2)), linear(x_TD, self.kv.flatten(0, 2))
        if self.build.model.attention_bias:
            q, kv = q + self.q_bias.flatten(), kv + self.kv_bias.flatten()
        q = q.view(num_sequences, -1, *self.q.shape[:3])
        kv = kv.view(num_sequences, -1, *self.kv.shape[:3])
        if self.q_norm is not None and self.k_norm is not None:
            k, v = kv.unbind(3)
            q, kv = self.q_norm(q), torch.stack([self.k_norm(k), v], 3)
        clip = self.build.model.clip_qkv
        return (q, kv) if clip is None else (q.clamp(-clip, clip), kv.clamp(-clip, clip))

    def combine_heads(self, heads_BSNGC: Tensor) -> Tensor:
        """The output projection, of the heads here: [T, D], to be summed over the lanes of tp."""
        return linear(heads_BSNGC.reshape(-1, self.output[0].numel()), self.output.flatten(1))

    def forward(self, x_TD: Tensor, num_sequences: int, sight: Sight) -> Tensor:
        return self.combine_heads(region("core", attend, *self.project(x_TD, num_sequences), sight))
