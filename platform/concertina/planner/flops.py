"""How many floating-point operations does training on a token take? Those of the model, whatever recomputes.

Products only, 2 operations a multiply-add; the backward pass is twice the forward. Embedding rows are looked up, not
multiplied; norms, activations, softmax and the optimizer are not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concertina.config import ModelConfig

__all__ = ["flops_per_token"]

_PASSES = 3  # forward, and two products in the backward for each of its own
_MULTIPLY_ADD = 2


def flops_per_token(model: ModelConfig, sequence_length: int, causal: bool = True) -> int:
    """Operations of forward and backward for one token of a sequence, the head's logits included.

    `causal`: scores and values of a token count half of the sequence, which is what a causal mask leaves of them on
    average. False is the convention of published tables (arXiv 2504.14960): all of it, as if nothing were masked.
    """
    layers = range(model.num_hidden_layers)
    weights = sum(_layer_weights(model, layer) for layer in layers) + model.vocab_size * model.hidden_size
    # A query meets each key once in the scores and each value once in the sum.
    of_a_head = model.width_of_head + model.width_of_value
    attended = sequence_length * model.num_attention_heads * of_a_head * len(layers)
    return _PASSES * _MULTIPLY_ADD * (weights + (attended // 2 if causal else attended))


def _layer_weights(model: ModelConfig, layer: int) -> int:
    """Weights of matrices that one token is multiplied with."""
    hidden, attention = model.hidden_size, _attention_weights(model)
    if not model.is_moe_layer(layer):
        return attention + 3 * hidden * model.intermediate_size
    expert_widths = model.num_experts_per_tok * model.moe_intermediate_size + model.shared_expert_intermediate_size
    gates = hidden * (model.num_experts * (1 + model.router_noise) + model.shared_expert_gate)
    return attention + 3 * hidden * expert_widths + gates


def _attention_weights(model: ModelConfig) -> int:
    hidden, width, heads = model.hidden_size, model.width_of_head, model.num_attention_heads
    if not model.kv_lora_rank:
        return hidden * width * (2 * heads + 2 * model.num_key_value_heads)
    query = hidden * model.q_lora_rank + (model.q_lora_rank or hidden) * heads * width
    down = hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return query + down + up + heads * model.v_head_dim * hidden
