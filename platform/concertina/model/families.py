"""What does Hugging Face call our tensors and keys? One table of pieces a family; import and export both read it.

Each of their tensors is a reshaped part of one of ours, so both directions are an index and a view, without arithmetic.
Checked against transformers 5.23: on disk experts are one by one, in memory they are fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from concertina.config import ModelConfig, RopeScalingConfig
from concertina.errors import ConfigError, NotFoundError

__all__ = ["Family", "Piece", "export_tensors", "family_of", "import_tensors", "model_config", "pieces"]

Family = Literal["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"]
Index = tuple[int | slice, ...]
ALL = slice(None)


@dataclass(frozen=True)
class Piece:
    """`theirs`, of `shape`, is `ours[index]` with its dimensions in `order` (absent: as they are), reshaped.

    `wide`: it is never rounded to less than fp32.
    """

    theirs: str
    ours: str
    index: Index
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    wide: bool = False

    def part(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The view of ours that holds theirs."""
        part = tensors[self.ours][self.index]
        return part if self.order is None else part.permute(self.order)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`. Raises ConfigError when it is none of ours."""
    name = config.get("model_type")
    if name not in get_args(Family):
        known = ", ".join(get_args(Family))
        raise ConfigError(f"model_type={name} is not supported: use one of {known}", model_type=name)
    return name  # type: ignore[return-value]


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The decoder's shape from a `config.json`. Raises ConfigError for features the decoder does not have."""
    family = family_of(config)
    config = {**_ABSENT[family], **{key: value for key, value in config.items() if value is not None}}
    _refuse(family, config)
    rope = _rope(config)
    features = _latent_features(config) if family == "deepseek_v3" else _plain_features(family, config)
    try:
        return ModelConfig(
            **{**{key: config[key] for key in _SAME if key in config}, **features},
            rope_theta=rope.get("rope_theta", config["rope_theta"]),
            rope_scaling=_rope_scaling(rope),
            moe_intermediate_size=config[_expert_width(family)],
        )
    except ValidationError as error:
        found = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
        lines = "; ".join(f"{key}: {text}" if key else text for key, text in found)
        raise ConfigError(f"config.json of a {family}: {lines}", family=family) from None


_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "clip_qkv"),
    *("intermediate_size", "num_experts_per_tok", "router_aux_loss_coef", "shared_expert_intermediate_size"),
)
_BALANCE_OF_DEEPSEEK = 1e-4  # of the paper (arXiv 2412.19437, section 4.2); Hugging Face's model has no loss
_ABSENT: dict[Family, dict[str, Any]] = {
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.001},
    "qwen2_moe": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "router_aux_loss_coef": 0.001},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "router_aux_loss_coef": 0.001},
    "olmoe": {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "router_aux_loss_coef": 0.01},
    "deepseek_v3": {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "norm_topk_prob": True},
}
"""What a key of theirs means where it is absent and ours would mean something else."""


def _expert_width(family: Family) -> str:
    return "intermediate_size" if family in ("mixtral", "olmoe") else "moe_intermediate_size"


def _plain_features(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "head_dim": config.get("head_dim"),
        "num_experts": config.get("num_experts") or config["num_local_experts"],
        "mlp_only_layers": _dense_layers(config),
        "norm_topk_prob": True if family == "mixtral" else config.get("norm_topk_prob", False),
        "qk_norm": "head" if family == "qwen3_moe" else "full" if family == "olmoe" else "none",
        "attention_bias": family == "qwen2_moe" and config.get("qkv_bias", True),
        "shared_expert_gate": family == "qwen2_moe",
    }


def _latent_features(config: Mapping[str, Any]) -> dict[str, Any]:
    dense = min(config["first_k_dense_replace"], config["num_hidden_layers"])
    return {
        "router_aux_loss_coef": config.get("aux_loss_alpha", _BALANCE_OF_DEEPSEEK),
        "num_key_value_heads": config["num_attention_heads"],
        "kv_lora_rank": config["kv_lora_rank"],
        "q_lora_rank": config.get("q_lora_rank", 0),
        "qk_nope_head_dim": config["qk_nope_head_dim"],
        "qk_rope_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rope_interleave": config.get("rope_interleave", True),
        "num_experts": config["n_routed_experts"],
        "mlp_only_layers": tuple(range(dense)),
        "shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "scoring_func": "sigmoid",
        "norm_topk_prob": config["norm_topk_prob"],
        "routed_scaling_factor": config["routed_scaling_factor"],
        "n_group": config["n_group"],
        "topk_group": config["topk_group"],
        "router_bias": True,
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Today's name of it, or the one before."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScalingConfig:
    if _rope_type(rope) == "default":
        return RopeScalingConfig()
    return RopeScalingConfig(**{key: rope[key] for key in RopeScalingConfig.model_fields if rope.get(key) is not None})


_NEEDED: dict[Family, tuple[str, ...]] = {
    "mixtral": ("intermediate_size", "num_local_experts"),
    "qwen2_moe": ("moe_intermediate_size", "num_experts", "shared_expert_intermediate_size"),
    "qwen3_moe": ("moe_intermediate_size",),
    "olmoe": ("intermediate_size", "num_experts"),
    "deepseek_v3": (
        *("moe_intermediate_size", "n_routed_experts", "n_shared_experts"),
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        *("first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor"),
    ),
}
_ALWAYS_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok")


def _refuse(family: Family, config: Mapping[str, Any]) -> None:
    missing = [key for key in (*_ALWAYS_NEEDED, *_NEEDED[family]) if key not in config]
    if family == "qwen3_moe" and not {"num_experts", "num_local_experts"} & config.keys():
        missing.append("num_experts")
    if missing:
        raise ConfigError(
            f"config.json of a {family} without {', '.join(missing)}: add what is missing", missing=missing
        )
    idle = ("sliding_window",) if config.get("use_sliding_window") is False else ()
    problems = [
        f"{key}={config[key]}"
        for key in ("sliding_window", "attention_dropout", "router_jitter_noise")
        if config.get(key) and key not in idle
    ]
    # Their attention_bias puts a bias on the output projection too, which no published model of these families uses.
    problems += ["attention_bias=true"] * bool(config.get("attention_bias"))
    for key, only in _ONLY.items():
        if config.get(key, only) != only:
            problems.append(f"{key}={config[key]}")
    problems += [*_rope_problems(_rope(config)), *["quantization_config"] * ("quantization_config" in config)]
    if problems:
        raise ConfigError(f"{family} with {', '.join(problems)} is not supported: switch it off", family=family)


_ONLY = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
"""Keys that may have one value."""


def _rope_problems(rope: Mapping[str, Any]) -> Iterator[str]:
    kind = _rope_type(rope)
    if kind not in ("default", "yarn"):
        yield f"rope_type={kind}"
    if kind == "yarn":
        for key, plain in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
            if rope.get(key, plain) not in (plain, None):
                yield f"{key}={rope[key]}"
        for key in ("factor", "original_max_position_embeddings"):
            if rope.get(key) is None:
                yield f"rope_type=yarn without {key}"


def _dense_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without experts: `mlp_only_layers`, and all but each `decoder_sparse_step`-th."""
    step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return tuple(i for i in range(config["num_hidden_layers"]) if i in listed or (i + 1) % step)


def pieces(family: Family, model: ModelConfig, fused: bool) -> Iterator[Piece]:
    """Every tensor of a checkpoint in their order; `fused`: the experts' weights stacked, as in memory."""
    vocabulary = (model.vocab_size, model.hidden_size)
    yield Piece("model.embed_tokens.weight", "embedding.weight", (), vocabulary)
    for layer in range(model.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        norm = (model.hidden_size,)
        yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", (), norm)
        attention = _latent_attention if model.kv_lora_rank else _attention
        yield from attention(model, f"{theirs}.self_attn", f"{ours}.attention")
        yield Piece(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight", (), norm)
        if not model.is_moe_layer(layer):
            yield from _mlp(model, f"{theirs}.mlp", f"{ours}.mlp", model.intermediate_size)
        else:
            disk_mixtral = family == "mixtral" and not fused
            where = f"{theirs}.{'block_sparse_moe' if disk_mixtral else 'mlp'}"
            yield from _moe(model, where, f"{ours}.moe", fused)
    yield Piece("model.norm.weight", "norm.weight", (), (model.hidden_size,))
    if not model.tie_word_embeddings:
        yield Piece("lm_head.weight", "head.weight", (), vocabulary)


def _attention(model: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    query = model.num_attention_heads * model.width_of_head
    key = model.num_key_value_heads * model.width_of_head
    parts: tuple[tuple[str, str, Index, int], ...] = (
        ("q_proj", "q", (), query),
        ("k_proj", "kv", (ALL, 0), key),
        ("v_proj", "kv", (ALL, 1), key),
    )
    for name, our_name, index, width in parts:
        yield Piece(f"{theirs}.{name}.weight", f"{ours}.{our_name}", index, (width, model.hidden_size))
        if model.attention_bias:
            yield Piece(f"{theirs}.{name}.bias", f"{ours}.{our_name}_bias", index, (width,))
    yield Piece(f"{theirs}.o_proj.weight", f"{ours}.output", (), (model.hidden_size, query))
    if model.qk_norm != "none":
        full = model.qk_norm == "full"
        for name, width in (("q_norm", query), ("k_norm", key)):
            shape = (width if full else model.width_of_head,)
            yield Piece(f"{theirs}.{name}.weight", f"{ours}.{name}.weight", (), shape)


def _latent_attention(model: ModelConfig, theirs: str, ours: str) -> Iterator[Piece]:
    hidden, heads, query, latent = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    query_shape = (heads * model.width_of_head, query or hidden)
    if query:
        yield Piece(f"{theirs}.q_a_proj.weight", f"{ours}.q_down", (), (query, hidden))
        yield Piece(f"{theirs}.q_a_layernorm.weight", f"{ours}.q_norm.weight", (), (query,))
    yield Piece(f"{theirs}.{'q_b_proj' if query else 'q_proj'}.weight", f"{ours}.q", (), query_shape)
    down = (latent + model.qk_rope_head_dim, hidden)
    yield Piece(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.kv_down", (), down)
    yield Piece(f"{theirs}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight", (), (latent,))
    up = (heads * (model.qk_nope_head_dim + model.v_head_dim), latent)
    yield Piece(f"{theirs}.kv_b_proj.weight", f"{ours}.kv_up", (), up)
    yield Piece(f"{theirs}.o_proj.weight", f"{ours}.output", (), (hidden, heads * model.v_head_dim))


def _mlp(model: ModelConfig, theirs: str, ours: str, width: int) -> Iterator[Piece]:
    yield Piece(f"{theirs}.gate_proj.weight", f"{ours}.w13", (0,), (width, model.hidden_size))
    yield Piece(f"{theirs}.up_proj.weight", f"{ours}.w13", (1,), (width, model.hidden_size))
    yield Piece(f"{theirs}.down_proj.weight", f"{ours}.w2", (), (model.hidden_size, width))


def _moe(model: ModelConfig, theirs: str, ours: str, fused: bool) -> Iterator[Piece]:
    experts, width, hidden = model.num_experts, model.moe_intermediate_size, model.hidden_size
    yield Piece(f"{theirs}.gate.weight", f"{ours}.router", (), (experts, hidden))
    if model.has_router_bias:
        yield Piece(f"{theirs}.gate.e_score_correction_bias", f"{ours}.bias", (), (experts,), wide=True)
    if fused:
        w13_shape, w2_shape = (experts, 2 * width, hidden), (experts, hidden, width)
        yield Piece(f"{theirs}.experts.gate_up_proj", f"{ours}.experts.w13", (), w13_shape, (0, 2, 3, 1))
        yield Piece(f"{theirs}.experts.down_proj", f"{ours}.experts.w2", (), w2_shape)
    else:
        names = ("w1", "w3", "w2") if "block_sparse_moe" in theirs else ("gate_proj", "up_proj", "down_proj")
        for expert in range(experts):
            gate, up, down = (f"{theirs}.experts.{expert}.{name}.weight" for name in names)
            yield Piece(gate, f"{ours}.experts.w13", (expert, ALL, 0), (width, hidden), (1, 0))
            yield Piece(up, f"{ours}.experts.w13", (expert, ALL, 1), (width, hidden), (1, 0))
            yield Piece(down, f"{ours}.experts.w2", (expert,), (hidden, width))
    if model.shared_expert_intermediate_size:
        shared = model.shared_expert_intermediate_size
        name = "shared_expert" if model.shared_expert_gate else "shared_experts"
        yield from _mlp(model, f"{theirs}.{name}", f"{ours}.shared", shared)
    if model.shared_expert_gate:
        yield Piece(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared.gate", (), (1, hidden))


def import_tensors(table: list[Piece], theirs: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy their tensors into ours (whole global tensors by name). Raises NotFoundError for a missing one."""
    missing = [piece.theirs for piece in table if piece.theirs not in theirs]
    if missing:
        raise NotFoundError(f"{len(missing)} tensors are missing, the first is {missing[0]}", missing=missing)
    with torch.no_grad():
        for piece in table:
            part = piece.part(into)
            part.copy_(theirs[piece.theirs].reshape(part.shape))


def export_tensors(table: list[Piece], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by name, copied from our whole global tensors."""
    return {piece.theirs: piece.part(ours).reshape(piece.shape).clone() for piece in table}
