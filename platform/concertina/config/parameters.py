"""How many weights does a model have, and how many does one token meet?"""

from __future__ import annotations

from typing import NamedTuple

from concertina.config.schema import ModelConfig

__all__ = ["Parameters", "count_parameters"]


class Parameters(NamedTuple):
    """Numbers of weights. `active`: those that one token is multiplied with, embeddings and head included."""

    total: int
    active: int


def count_parameters(model: ModelConfig) -> Parameters:
    """Both counts, as model cards give them. Legend: D hidden, H heads, K key-value heads, N head width."""
    D, V = model.hidden_size, model.vocab_size
    outside = V * D * (1 if model.tie_word_embeddings else 2) + D
    total = active = outside
    for layer in range(model.num_hidden_layers):
        always = _attention(model) + 2 * D
        if model.is_moe_layer(layer):
            routed = 3 * D * model.moe_intermediate_size
            always += D * model.num_experts * (2 if model.router_noise else 1)
            always += 3 * D * model.shared_expert_intermediate_size
            always += D if model.shared_expert_gate else 0
            total += always + model.num_experts * routed
            active += always + model.num_experts_per_tok * routed
        else:
            always += 3 * D * model.intermediate_size
            total += always
            active += always
    return Parameters(total, active)


def _attention(model: ModelConfig) -> int:
    if model.kv_lora_rank:
        return _latent_attention(model)
    D, N = model.hidden_size, model.width_of_head
    q, kv = model.num_attention_heads * N, model.num_key_value_heads * N
    biases = q + 2 * kv if model.attention_bias else 0
    norms = {"none": 0, "head": 2 * N, "full": q + kv}[model.qk_norm]
    return D * q + 2 * D * kv + q * D + biases + norms


def _latent_attention(model: ModelConfig) -> int:
    """Down to the latents (Q, L wide, with a norm each), up to the heads, and out of them."""
    D, H, Q, L = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    q = (D * Q + Q if Q else 0) + (Q or D) * H * model.width_of_head
    kv = D * (L + model.qk_rope_head_dim) + L + L * H * (model.qk_nope_head_dim + model.v_head_dim)
    return q + kv + H * model.v_head_dim * D
