"""How do tokens see each other through a narrow vector each? Multi-head latent attention: keys and values of all heads
are made from one latent, queries from another; one rotated key serves all heads.

Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1). A lane of tp makes the latents of its share of the tokens, lanes
gather these instead of hidden states, which are wider, and each makes its own heads from them.
Shapes: B sequences, S positions, T = B * S tokens, R of them on this lane, D hidden, N heads here, G = 1 query of each,
C = P + O width of a query and key: P as it is, O rotated; V width of a value, Q and L widths of the latents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.model.attention import attend_apart
from concertina.model.linear import linear
from concertina.model.norm import ResidualNorm
from concertina.model.parameters import Build, Part
from concertina.model.rope import Rotation, growth, rotate, side_by_side
from concertina.model.sight import Sight
from concertina.parallel.recompute import region

__all__ = ["LatentAttention", "attend_unequal"]

_EPSILON = 1e-6  # of the latents' norms: what DeepSeek's and Hugging Face's code has, whatever rms_norm_eps


def attend_unequal(q_BSNGC: Tensor, k_BSNC: Tensor, v_BSNV: Tensor) -> Tensor:
    """Causal attention of queries and keys that are rotated already, where values have another width:
    [B, S, N, G, V]."""
    query, key, value = q_BSNGC.flatten(2, 3).transpose(1, 2), k_BSNC.transpose(1, 2), v_BSNV.transpose(1, 2)
    shared = q_BSNGC.shape[3] > 1  # on a GPU no kernel but the slow one takes both: groups, and widths that differ
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2).unflatten(2, q_BSNGC.shape[2:4])


def _core(q_BSNGC: Tensor, k_BSNC: Tensor, v_BSNV: Tensor, sight: Sight) -> Tensor:
    heads = q_BSNGC, k_BSNC, v_BSNV
    return attend_unequal(*heads) if sight.is_plain else attend_apart(*heads, sight)


class LatentNorm(ResidualNorm):
    """RMSNorm of a latent, whose tokens every lane may hold alike."""

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self.epsilon = _EPSILON


class Latents(Part):
    """Down to the latents and their norms."""

    q_down: Tensor
    kv_down: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self.q_norm: LatentNorm | None = None
        if build.model.q_lora_rank:
            self._make("q_down")
            self.q_norm = LatentNorm(build, f"{prefix}.q_norm")
        self._make("kv_down")
        self.kv_norm = LatentNorm(build, f"{prefix}.kv_norm")

    def forward(self, x_RD: Tensor) -> Tensor:
        """What queries, keys and values are made from: [R, Q + L + O], or D for Q where queries have no latent."""
        model, lanes = self.build.model, self.build.lanes
        query = x_RD if self.q_norm is None else self.q_norm(linear(x_RD, lanes.count_once(self.q_down)))
        down = linear(x_RD, lanes.count_once(self.kv_down))
        latent_RL, key_RO = down.split([model.kv_lora_rank, model.qk_rope_head_dim], -1)
        return torch.cat([query, self.kv_norm(latent_RL), key_RO], -1)


class LatentAttention(Part):
    """From the latents up to the heads, the core, the output projection."""

    q: Tensor
    kv_up: Tensor
    output: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        model = build.model
        self.latents = Latents(build, prefix)
        for name in ("q", "kv_up", "output"):
            self._make(name)
        self.sharpening = growth(model.rope_scaling.factor, model.rope_scaling.mscale_all_dim) ** 2

    def enter(self, x_RD: Tensor, num_tokens: int) -> Tensor:
        """The latents of all `num_tokens` tokens of the lanes, for `forward`: [T, Q + L + O]."""
        return self.build.lanes.enter(self.latents(x_RD), num_tokens)

    def heads(self, entered_T: Tensor, num_sequences: int, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, N, 1, C] and keys [B, S, N, C], rotated, and values [B, S, N, V]."""
        model = self.build.model
        plain, rotated = model.qk_nope_head_dim, model.qk_rope_head_dim
        widths = [entered_T.shape[1] - model.kv_lora_rank - rotated, model.kv_lora_rank, rotated]
        query, latent, key = entered_T.split(widths, -1)
        q = linear(query, self.q.flatten(0, 1)).view(num_sequences, -1, *self.q.shape[:2])
        kv = linear(latent, self.kv_up.flatten(0, 1)).view(num_sequences, -1, *self.kv_up.shape[:2])
        q_plain, q_turning = q.split([plain, rotated], -1)
        k_plain, v = kv.split([plain, model.v_head_dim], -1)
        k_turning = key.reshape(num_sequences, -1, 1, rotated)
        if model.rope_interleave:
            q_turning, k_turning = side_by_side(q_turning), side_by_side(k_turning)
        k_turned = rotate(k_turning, turn).expand(-1, -1, k_plain.shape[2], -1)
        q = torch.cat([q_plain, rotate(q_turning, turn)], -1)
        q = q if self.sharpening == 1 else q * self.sharpening
        return q.unsqueeze(3), torch.cat([k_plain, k_turned], -1), v

    def forward(self, entered_T: Tensor, num_sequences: int, sight: Sight) -> Tensor:
        """[T, D], to be summed over the lanes of tp. All ranks of cp must call it."""
        out = region("core", _core, *self.heads(entered_T, num_sequences, sight.turn), sight)
        return linear(out.reshape(-1, self.output[0].numel()), self.output.flatten(1))
