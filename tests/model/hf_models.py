"""Which models of transformers do tests compare with? Tiny random ones, of every family and its options."""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["CASES", "reference"]

DENSE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    **{"beta_fast": 2.0, "beta_slow": 0.5},
}
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 2},
    **{"intermediate_size": 40, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    "initializer_range": 0.2,  # sharp scores on 0.3 leave fp32 no digits to compare
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "qwen3-dense-first-unnormalized": (
        "Qwen3Moe",
        {
            **{"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
            **{"mlp_only_layers": [0], "intermediate_size": 40, "tie_word_embeddings": True},
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe-clipped": (
        "Olmoe",
        {"intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.7, "norm_topk_prob": True},
    ),
    "qwen2": (
        "Qwen2Moe",
        {
            **{"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
            **{"shared_expert_intermediate_size": 40, "intermediate_size": 40},
        },
    ),
    "qwen3-stretched": (
        "Qwen3Moe",
        {
            **{"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
            "rope_parameters": {**YARN, "factor": 3.0},
        },
    ),
    "deepseek": ("DeepseekV3", {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    "deepseek-published": ("DeepseekV3", {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek-halves": ("DeepseekV3", {**LATENT, "rope_interleave": False, "n_group": 1, "topk_group": 1}),
    "deepseek-without-query-latent": ("DeepseekV3", {**LATENT, "q_lora_rank": None, "rms_norm_eps": 1e-3}),
}

MODULES = {
    **{"Mixtral": "mixtral", "Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe", "Olmoe": "olmoe"},
    "DeepseekV3": "deepseek_v3",
}


def reference(case: str) -> Any:
    """Their model, tiny and random, with norms and biases away from one and zero."""
    name, settings = CASES[case]
    module = importlib.import_module(f"transformers.models.{MODULES[name]}")
    config = getattr(module, f"{name}Config")(**{**DENSE, **settings}, router_aux_loss_coef=0.0)
    torch.manual_seed(5)
    model = getattr(module, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer), alpha=0.3)
    return model
