"""Does a config.json say all of a model: to us when it is read back, to transformers, and who cannot say what?"""

from __future__ import annotations

from typing import Any

import pytest

from concertina.config import ModelConfig, load_job
from concertina.errors import ConfigError
from concertina.hf.config_json import TRANSFORMERS, config_json, family_for, misfits
from concertina.model.families import Family, model_config
from tests.model.hf_models import CASES, reference

pytestmark = pytest.mark.unit

TRAINING_ONLY = ("router_z_loss_coef", "router_bias_update_rate", "router_bias", "capacity", "head_dim", "topk_group")
"""What no config.json holds, or holds in another way: derived where it was absent."""

JOBS: dict[str, Family] = {
    "mixtral-8x7b": "mixtral",
    "mixtral-8x22b": "mixtral",
    "qwen2-57b-a14b": "qwen2_moe",
    "qwen3-30b-a3b": "qwen3_moe",
    "olmoe-1b-7b": "olmoe",
    "deepseek-v3": "deepseek_v3",
    "quickstart-latent": "deepseek_v3",
}


def what_matters(model: ModelConfig) -> dict[str, Any]:
    """Of a model without dense layers their width does not."""
    idle = () if model.mlp_only_layers else ("intermediate_size",)
    kept = {key: value for key, value in model.model_dump().items() if key not in (*TRAINING_ONLY, *idle)}
    unlimited = model.topk_group == model.n_group
    derived = (model.width_of_head, model.has_router_bias, "all" if unlimited else model.topk_group)
    return {**kept, "n_group": 1 if unlimited else model.n_group, "derived": derived}


@pytest.mark.parametrize("job", JOBS)
def test_published_shapes_come_back(job: str) -> None:
    model = load_job(f"jobs/{job}.yaml").model
    assert family_for(model) == JOBS[job]
    again = model_config(config_json(JOBS[job], model, "bfloat16", {}))
    assert what_matters(again) == what_matters(model)


@pytest.mark.parametrize("case", CASES)
def test_transformers_own_comes_back(case: str) -> None:
    """Every key that both write, and transformers not as null, has the same value."""
    theirs = reference(case).config.to_dict()
    model = model_config(theirs)
    family = family_for(model, theirs["model_type"])
    assert family_for(model) == family
    written = config_json(family, model, "float32", {})
    known = {"dtype", "torch_dtype", "transformers_version", "num_nextn_predict_layers", "router_aux_loss_coef"}
    known |= {"use_sliding_window", "sliding_window", "architectures"}  # none, spelled in several ways
    for key in (written.keys() & theirs.keys()) - known:
        assert theirs[key] is None or written[key] == theirs[key], key
    assert what_matters(model_config(written)) == what_matters(model)


def test_the_version_is_the_one_that_is_tested_with() -> None:
    from importlib.metadata import version

    assert version("transformers") == TRANSFORMERS


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("mixtral", {"mlp_only_layers": (0,)}, "mlp_only_layers=(0,) (it has ())"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False (it has True)"),
        ("mixtral", {"router_noise": True}, "router_noise=True (it has False)"),
        ("mixtral", {"n_group": 4, "topk_group": 2}, "topk_group=2 of n_group=4 (it has no groups)"),
        ("qwen3_moe", {}, "qk_norm=none (it has head)"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8 (it has 0)"),
        ("olmoe", {"qk_norm": "full", "head_dim": 8}, "head_dim=8 (its heads fill hidden_size=256)"),
        ("qwen2_moe", {}, "shared_expert_gate=False (it has True)"),
        ("deepseek_v3", {}, "kv_lora_rank=0 (it has latent attention)"),
        ("deepseek_v3", {"mlp_only_layers": (1,)}, "mlp_only_layers=[1] (its dense layers are the first)"),
        (
            "deepseek_v3",
            {"router_bias_update_rate": 0.1, "scoring_func": "softmax"},
            "scoring_func=softmax (it has sig",
        ),
    ],
)
def test_what_a_family_cannot_say_is_named(family: Family, changes: dict[str, Any], said: str) -> None:
    model = ModelConfig(**changes)
    assert any(each.startswith(said) for each in misfits(family, model)), misfits(family, model)
    with pytest.raises(ConfigError, match=family):
        family_for(model, family)


def test_a_model_of_no_family_is_refused_by_all() -> None:
    with pytest.raises(ConfigError) as refused:
        family_for(load_job("jobs/quickstart.yaml").model)
    assert set(refused.value.data["problems_by_family"]) == set(JOBS.values())
    assert "shared_expert_intermediate_size=256 (it has 0)" in refused.value.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt_oss"}, "model_type=gpt_oss is not supported: use one of mixtral, qwen2_moe"),
        ({"model_type": "deepseek_v2"}, "model_type=deepseek_v2 is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type=llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "without original_max_position_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"topk_method": "greedy"}, "topk_method=greedy"),
        ({"kv_lora_rank": None}, "without kv_lora_rank"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"hidden_size": "wide"}, "config.json of a deepseek_v3: hidden_size: Input should be a valid integer"),
        ({"n_group": 3}, "config.json of a deepseek_v3: Value error, n_group=3 must divide num_experts=8"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], said: str) -> None:
    config = {**reference("deepseek").config.to_dict(), **change}
    with pytest.raises(ConfigError) as refused:
        model_config(config)
    assert said in refused.value.message


def test_the_spelling_of_published_configs_is_read_too() -> None:
    """As deepseek-ai/DeepSeek-V3 has it: rope_scaling and rope_theta, beside keys that say nothing here."""
    config = config_json("deepseek_v3", load_job("jobs/deepseek-v3.yaml").model, "bfloat16", {})
    expected = model_config(config)
    rope = config.pop("rope_parameters")
    published = {**config, "rope_scaling": {**rope, "type": rope.pop("rope_type")}, "ep_size": 1, "seq_aux": True}
    published["num_nextn_predict_layers"] = 1
    assert model_config(published) == expected
    assert expected.rope_scaling.factor == 40
    qwen = {**config_json("qwen2_moe", load_job("jobs/qwen2-57b-a14b.yaml").model, "bfloat16", {})}
    assert model_config({**qwen, "sliding_window": 65536}) == model_config(qwen)
    with pytest.raises(ConfigError, match="sliding_window=65536"):
        model_config({**qwen, "sliding_window": 65536, "use_sliding_window": True})
