"""What does a model of ours look like in Hugging Face's config.json, and which family can say it?

The other direction is `model_config` in `model/families.py`: what one writes the other reads.
"""

from __future__ import annotations

from typing import Any, get_args

from concertina.config import ModelConfig, Precision
from concertina.errors import ConfigError
from concertina.model.families import Family

__all__ = ["TRANSFORMERS", "SpecialTokens", "config_json", "family_for", "misfits"]

TRANSFORMERS = "5.23.0"
"""The version that keys and tensors were checked with; what a config.json names."""

SpecialTokens = dict[str, Any]
"""bos_token_id, eos_token_id, pad_token_id; absent is null, or a reader would take the family's own."""

_ARCHITECTURES: dict[Family, str] = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_PLAIN: dict[str, Any] = {
    "kv_lora_rank": 0,
    "scoring_func": "softmax",
    "has_router_bias": False,
    "routed_scaling_factor": 1.0,
    "router_noise": False,
}
_NO_SHARED_EXPERT = {"attention_bias": False, "shared_expert_intermediate_size": 0}
_WANTED: dict[Family, dict[str, Any]] = {
    "qwen3_moe": {**_PLAIN, **_NO_SHARED_EXPERT, "qk_norm": "head", "clip_qkv": None},
    "mixtral": {
        **{**_PLAIN, **_NO_SHARED_EXPERT, "qk_norm": "none", "clip_qkv": None},
        **{"mlp_only_layers": (), "norm_topk_prob": True},
    },
    "olmoe": {**_PLAIN, **_NO_SHARED_EXPERT, "qk_norm": "full", "mlp_only_layers": ()},
    "qwen2_moe": {**_PLAIN, "qk_norm": "none", "clip_qkv": None, "shared_expert_gate": True},
    "deepseek_v3": {
        **{"scoring_func": "sigmoid", "has_router_bias": True, "router_noise": False, "shared_expert_gate": False},
    },
}
"""Features that a family has one value of, in the order in which families are tried."""


def misfits(family: Family, model: ModelConfig) -> list[str]:
    """What of the model the family cannot say; empty: it can say all."""
    found = [
        f"{key.removeprefix('has_')}={getattr(model, key)} (it has {value})"
        for key, value in _WANTED[family].items()
        if getattr(model, key) != value
    ]
    return [*found, *(_latent_misfits(model) if family == "deepseek_v3" else _plain_misfits(family, model))]


def _plain_misfits(family: Family, model: ModelConfig) -> list[str]:
    found = []
    if model.topk_group < model.n_group:
        found.append(f"topk_group={model.topk_group} of n_group={model.n_group} (it has no groups)")
    if family == "olmoe" and model.width_of_head * model.num_attention_heads != model.hidden_size:
        found.append(f"head_dim={model.width_of_head} (its heads fill hidden_size={model.hidden_size})")
    return found


def _latent_misfits(model: ModelConfig) -> list[str]:
    found, shared = [], model.shared_expert_intermediate_size
    if not model.kv_lora_rank:
        found.append("kv_lora_rank=0 (it has latent attention)")
    if model.mlp_only_layers != tuple(range(len(model.mlp_only_layers))):
        found.append(f"mlp_only_layers={list(model.mlp_only_layers)} (its dense layers are the first)")
    if not shared or shared % model.moe_intermediate_size:
        found.append(f"shared_expert_intermediate_size={shared} (it is a multiple of {model.moe_intermediate_size})")
    if model.num_experts // model.n_group < 2:
        found.append(f"n_group={model.n_group} (its groups have two experts or more)")
    return found


def family_for(model: ModelConfig, wanted: Family | None = None) -> Family:
    """The first family that can say the model, or `wanted`. Raises ConfigError with what is in the way."""
    families: tuple[Family, ...] = tuple(_WANTED) if wanted is None else (wanted,)
    assert set(_WANTED) == set(get_args(Family))
    problems = {family: misfits(family, model) for family in families}
    for family, found in problems.items():
        if not found:
            return family
    said = "; ".join(f"{family}: {', '.join(found)}" for family, found in problems.items())
    raise ConfigError(f"no family of Hugging Face's says this model: {said}", problems_by_family=problems)


def config_json(family: Family, model: ModelConfig, dtype: Precision, tokens: SpecialTokens) -> dict[str, Any]:
    """All keys that a reader of this family may ask for, in both spellings where there are two."""
    return {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS,
        **{key: tokens.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **{key: getattr(model, key) for key in _SAME},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "use_cache": True,
        "rope_theta": model.rope_theta,
        "rope_parameters": _rope_parameters(model),
        **(_of_deepseek(model) if family == "deepseek_v3" else _of_others(family, model)),
    }


_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
    *("num_experts_per_tok", "intermediate_size"),
)


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling.factor == 1:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    given = {key: value for key, value in scaling.model_dump().items() if value or not key.startswith("mscale")}
    return {"rope_type": "yarn", "rope_theta": model.rope_theta, **given}


def _of_others(family: Family, model: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"head_dim": model.width_of_head, "router_aux_loss_coef": model.router_aux_loss_coef}
    if family in ("mixtral", "olmoe"):
        found["intermediate_size"] = model.moe_intermediate_size
    if family == "mixtral":
        return {**found, "num_local_experts": model.num_experts, "router_jitter_noise": 0.0, "sliding_window": None}
    found |= {"num_experts": model.num_experts, "norm_topk_prob": model.norm_topk_prob}
    if family == "olmoe":
        return {**found, "clip_qkv": model.clip_qkv, "attention_bias": False}
    found |= {
        "moe_intermediate_size": model.moe_intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(model.mlp_only_layers),
        "use_sliding_window": False,
        "sliding_window": None,
    }
    if family == "qwen3_moe":
        return {**found, "num_local_experts": model.num_experts, "attention_bias": False}
    shared = model.shared_expert_intermediate_size
    return {**found, "qkv_bias": model.attention_bias, "shared_expert_intermediate_size": shared}


def _of_deepseek(model: ModelConfig) -> dict[str, Any]:
    latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
    routing = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "scoring_func")
    return {
        **{key: getattr(model, key) for key in (*latent, *routing, "moe_intermediate_size")},
        "q_lora_rank": model.q_lora_rank or None,
        "qk_head_dim": model.width_of_head,
        "head_dim": model.qk_rope_head_dim,
        "attention_bias": False,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.shared_expert_intermediate_size // model.moe_intermediate_size,
        "first_k_dense_replace": len(model.mlp_only_layers),
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "aux_loss_alpha": model.router_aux_loss_coef,
    }
