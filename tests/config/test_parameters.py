"""Do the shapes in jobs/ have the parameter counts their authors published?"""

from __future__ import annotations

from pathlib import Path

import pytest

from concertina.config import ModelConfig, count_parameters, load_job
from concertina.layout import Box, Layout, shards
from tests.house.tree import ROOT

pytestmark = pytest.mark.unit

B = 10**9


@pytest.mark.parametrize(
    ("job", "exact", "total_billion", "active_billion"),
    [
        # `exact`: what transformers' own class holds for that shape. Billions: the model cards, which round down
        # here and there (Qwen3 says 3.3 of 3.35).
        ("mixtral-8x7b", 46_702_792_704, 46.7, 12.9),
        ("mixtral-8x22b", 140_630_071_296, 140.6, 39.2),
        ("qwen3-30b-a3b", 30_532_122_624, 30.5, 3.3),
        ("olmoe-1b-7b", 6_919_161_856, 6.9, 1.3),
        ("deepseek-v3", 671_026_404_352, 671.0, 37.5),
        ("qwen2-57b-a14b", 57_408_658_944, 57.4, 14.2),
    ],
)
def test_published_counts(job: str, exact: int, total_billion: float, active_billion: float) -> None:
    count = count_parameters(load_job(f"jobs/{job}.yaml").model)
    assert count.total == exact
    assert count.total / B == pytest.approx(total_billion, abs=0.06)
    assert count.active / B == pytest.approx(active_billion, abs=0.06)


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_counts_are_those_of_the_table_of_shards(job: Path) -> None:
    model = load_job(job).model
    sizes = {shard: Box.whole(shard.global_shape).size for shard in shards(model, Layout(1), 0).values()}
    routed = sum(size for shard, size in sizes.items() if shard.expert)
    unused = routed // model.num_experts * (model.num_experts - model.num_experts_per_tok)
    total = sum(sizes.values())
    assert count_parameters(model) == (total, total - unused)


def test_by_hand() -> None:
    model = ModelConfig(
        vocab_size=10,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        mlp_only_layers=(0,),
        intermediate_size=12,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=5,
        shared_expert_intermediate_size=7,
        shared_expert_gate=True,
        attention_bias=True,
        qk_norm="head",
        tie_word_embeddings=True,
    )
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8 + (8 + 4 + 4) + (4 + 4)
    dense = 3 * 8 * 12
    always = 8 * 3 + 3 * 8 * 7 + 8
    expert = 3 * 8 * 5
    outside = 10 * 8 + 8 + 2 * (attention + 16)
    assert count_parameters(model) == (outside + dense + always + 3 * expert, outside + dense + always + 2 * expert)


def test_noise_doubles_the_router_and_a_bias_is_no_weight() -> None:
    plain = ModelConfig(hidden_size=16, num_hidden_layers=3, mlp_only_layers=(1,), num_experts=4)
    more = plain.model_copy(update={"router_noise": True, "router_bias_update_rate": 0.1})
    before, after = count_parameters(plain), count_parameters(more)
    assert (after.total - before.total, after.active - before.active) == (2 * 4 * 16, 2 * 4 * 16)
