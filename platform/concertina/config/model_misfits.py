"""Which keys of a model do not fit each other, and what would?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concertina.config.schema import CapacityConfig, ModelConfig

__all__ = ["model_misfits"]

Problem = tuple[str, str]
"""(key below `model`, what is wrong)."""


def model_misfits(model: ModelConfig) -> list[Problem]:
    """Every one of them."""
    attention = _latent_misfits(model) if model.kv_lora_rank else [*_head_misfits(model), *_idle_latent_keys(model)]
    return [*attention, *_expert_misfits(model), *_group_misfits(model)]


def _head_misfits(model: ModelConfig) -> list[Problem]:
    heads, kv, hidden = model.num_attention_heads, model.num_key_value_heads, model.hidden_size
    problems = []
    if heads % kv:
        problems.append(("num_key_value_heads", f"num_key_value_heads={kv} must divide num_attention_heads={heads}"))
    if model.head_dim is None and hidden % heads:
        text = f"num_attention_heads={heads} must divide hidden_size={hidden}, or set model.head_dim"
        problems.append(("num_attention_heads", text))
    elif model.width_of_head % 2:
        text = f"a head is {model.width_of_head} wide, must be even (rotary embedding turns pairs): set model.head_dim"
        problems.append(("head_dim", text))
    return problems


_LATENT_KEYS = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")


def _idle_latent_keys(model: ModelConfig) -> list[Problem]:
    text = "means nothing without latent attention: set model.kv_lora_rank, or leave it out"
    return [(key, f"{key}={getattr(model, key)} {text}") for key in _LATENT_KEYS if getattr(model, key)]


def _latent_misfits(model: ModelConfig) -> list[Problem]:
    """Latent attention: every head has its own key and value, and none of the plain one's options."""
    heads, kv, rotated = model.num_attention_heads, model.num_key_value_heads, model.qk_rope_head_dim
    problems = []
    if kv != heads:
        text = f"num_key_value_heads={kv} must be num_attention_heads={heads} with latent attention"
        problems.append(("num_key_value_heads", text))
    for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if not getattr(model, key):
            text = f"{key} is missing: latent attention (kv_lora_rank={model.kv_lora_rank}) needs it, 64 for example"
            problems.append((key, text))
    if rotated % 2:
        text = f"qk_rope_head_dim={rotated} must be even (rotary embedding turns pairs): set it to {rotated + 1}"
        problems.append(("qk_rope_head_dim", text))
    refused = {"head_dim": None, "attention_bias": False, "qk_norm": "none", "clip_qkv": None}
    for key, plain in refused.items():
        if getattr(model, key) != plain:
            text = f"{key}={getattr(model, key)} does not go with latent attention (kv_lora_rank): leave it out"
            problems.append((key, text))
    return problems


def _expert_misfits(model: ModelConfig) -> list[Problem]:
    experts, k = model.num_experts, model.num_experts_per_tok
    problems = []
    if k > experts:
        text = f"num_experts_per_tok={k} is more than num_experts={experts}: set it to {experts} or less"
        problems.append(("num_experts_per_tok", text))
    beyond = [layer for layer in model.mlp_only_layers if layer >= model.num_hidden_layers]
    if beyond:
        text = f"{beyond} are beyond the last layer, {model.num_hidden_layers - 1} (layers count from 0)"
        problems.append(("mlp_only_layers", text))
    if model.shared_expert_gate and not model.shared_expert_intermediate_size:
        text = "there is no shared expert to gate: set model.shared_expert_intermediate_size"
        problems.append(("shared_expert_gate", text))
    if model.router_bias is False and model.router_bias_update_rate:
        rate = model.router_bias_update_rate
        text = f"router_bias_update_rate={rate:g} moves a bias, router_bias=false says there is none: leave one out"
        problems.append(("router_bias", text))
    return [*problems, *_capacity_misfits(model.capacity)]


def _capacity_misfits(capacity: CapacityConfig) -> list[Problem]:
    problems = []
    if capacity.factor is None:
        plain = type(capacity)()
        idle = [name for name in type(capacity).model_fields if getattr(capacity, name) != getattr(plain, name)]
        return [
            (f"capacity.{name}", "nothing is dropped without a capacity: set model.capacity.factor") for name in idle
        ]
    if capacity.scope == "sub_sequence" and capacity.group_sequences > 1:
        text = (
            f"group_sequences={capacity.group_sequences} means nothing to scope=sub_sequence, which counts what a rank "
            f"holds: set it to 1, or model.capacity.scope to group"
        )
        problems.append(("capacity.group_sequences", text))
    return problems


def _group_misfits(model: ModelConfig) -> list[Problem]:
    experts, groups, chosen, k = model.num_experts, model.n_group, model.topk_group, model.num_experts_per_tok
    if experts % groups:
        return [("n_group", f"n_group={groups} must divide num_experts={experts}")]
    if chosen > groups:
        return [("topk_group", f"topk_group={chosen} is more than n_group={groups}: set it to {groups} or less")]
    size = experts // groups
    if chosen * size < k <= experts:
        text = f"topk_group={chosen} leaves a token {chosen * size} of {experts} experts"
        return [("topk_group", f"{text}, num_experts_per_tok={k} is more: set it to {-(-k // size)} or more")]
    return []
