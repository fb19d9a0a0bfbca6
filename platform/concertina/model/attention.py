"""How do tokens of one sequence see each other? Causal grouped-query attention in three steps: project, core, output.

Shapes: B sequences, S positions, T = B * S tokens, D hidden, N key-value heads, G query heads of each, C width of a
head, H = G + 2. One tensor holds query, key and value weights, grouped by key-value head: a cut over heads is one box.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.model.attention_blocks import LONGEST, attend_in_blocks
from concertina.model.linear import linear
from concertina.model.norm import RMSNorm
from concertina.model.parameters import Build, Part
from concertina.model.rope import Rotation, rotate

__all__ = ["Attention", "attend", "core"]


def attend(qkv_BSNHC: Tensor, turn: Rotation) -> Tensor:
    """Rotate queries and keys, attend causally, by the kernel that measures fastest.

    `qkv_BSNHC`: of every key-value head its G queries, its key, its value (H = G + 2). Result: [B, S, N, G, C].
    """
    wide = qkv_BSNHC.dtype in (torch.float32, torch.float64)
    if qkv_BSNHC.device.type == "cpu" and wide and qkv_BSNHC.shape[1] <= LONGEST:
        return attend_in_blocks(qkv_BSNHC, turn)
    return core(qkv_BSNHC, turn)


def core(qkv_BSNHC: Tensor, turn: Rotation) -> Tensor:
    """`attend` by torch's scaled dot product attention: any device, dtype and length."""
    group = qkv_BSNHC.shape[3] - 2
    q, k, v = qkv_BSNHC.split([group, 1, 1], 3)
    query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in (rotate(q, turn), rotate(k, turn), v))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).unflatten(2, q.shape[2:4])


class Attention(Part):
    """Query, key and value projections, optional norms and clamp, the core, the output projection."""

    qkv: Tensor
    qkv_bias: Tensor
    output: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        model = build.model
        self.kv_heads = model.num_key_value_heads
        self.group = model.num_attention_heads // self.kv_heads
        self.width = model.width_of_head
        self._declare("qkv", (self.kv_heads, self.group + 2, self.width, model.hidden_size))
        if model.attention_bias:
            self._declare("qkv_bias", (self.kv_heads, self.group + 2, self.width), fill="zeros")
        self._declare("output", (model.hidden_size, self.kv_heads, self.group, self.width))
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if model.qk_norm != "none":
            each_head = model.qk_norm == "head"
            q_shape = (self.width,) if each_head else (self.kv_heads, self.group, self.width)
            k_shape = (self.width,) if each_head else (self.kv_heads, self.width)
            self.q_norm = RMSNorm(build, f"{prefix}.q_norm", q_shape)
            self.k_norm = RMSNorm(build, f"{prefix}.k_norm", k_shape)

    def project(self, x_TD: Tensor, num_sequences: int) -> Tensor:
        """Queries, key and value of every key-value head, before rotation: [B, S, N, G + 2, C]."""
        qkv = linear(x_TD, self.qkv.flatten(0, 2))
        if self.build.model.attention_bias:
            qkv = qkv + self.qkv_bias.flatten()
        qkv = qkv.view(num_sequences, -1, self.kv_heads, self.group + 2, self.width)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([self.group, 1, 1], dim=3)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k.squeeze(3)).unsqueeze(3), v], 3)
        clip = self.build.model.clip_qkv
        return qkv if clip is None else qkv.clamp(-clip, clip)

    def combine_heads(self, heads_BSNGC: Tensor) -> Tensor:
        """The output projection: [T, D]."""
        return linear(heads_BSNGC.reshape(-1, self.output[0].numel()), self.output.flatten(1))

    def forward(self, x_TD: Tensor, num_sequences: int, turn: Rotation) -> Tensor:
        return self.combine_heads(attend(self.project(x_TD, num_sequences), turn))
