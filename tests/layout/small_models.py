"""Which models do the tests of pieces and plans cut up? Small ones, one of them with nothing even."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import strategies as st

from concertina.config import Job, ModelConfig
from concertina.layout import Layout, fits

__all__ = ["EVEN", "LATENT", "MODELS", "ODD", "layouts_of", "small_job"]

EVEN = ModelConfig(
    vocab_size=8,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    moe_intermediate_size=4,
)

ODD = ModelConfig(
    vocab_size=11,
    hidden_size=6,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=2,
    attention_bias=True,
    qk_norm="full",
    mlp_only_layers=(0,),
    intermediate_size=8,
    num_experts=5,
    moe_intermediate_size=6,
    router_noise=True,
    shared_expert_intermediate_size=8,
    shared_expert_gate=True,
)
"""Five experts, fewer key-value heads than lanes of tp, a dense layer, biases; rows that no number of ranks divides."""

LATENT = EVEN.model_copy(
    update={
        "num_key_value_heads": 4,
        "kv_lora_rank": 5,
        "q_lora_rank": 3,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 3,
    }
)
"""Latents on every lane, heads of unequal widths."""

MODELS = {
    "even": EVEN,
    "odd": ODD,
    "tied": ODD.model_copy(update={"tie_word_embeddings": True, "qk_norm": "head"}),
    "latent": LATENT,
}


def small_job(model: ModelConfig, workers: int, **layout: int) -> Job:
    """A job on so many workers, with sequences enough for all."""
    return Job(
        name="small",
        model=model,
        data={"tokenizer": {"path": "tokenizer.json"}},
        training={"global_batch_size": 1 << 20},
        layout=layout,
        cluster={"num_workers": workers, "num_nodes": 1},
    )


def layouts_of(model: ModelConfig, most_ranks: int, worlds: st.SearchStrategy[int] | None = None) -> st.SearchStrategy:
    """Layouts that fit the model, of up to so many ranks; layers on stages as evenly as can be, or not."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Layout:
        world = draw(worlds or st.integers(1, most_ranks))
        layers = model.num_hidden_layers
        pp = draw(st.sampled_from([d for d in range(1, layers + 1) if world % d == 0]))
        degrees = {"pp": pp, "cp": 1, "tp": 1, "ep": 1, "etp": 1}
        for axis, other in (("tp", "cp"), ("cp", "tp"), ("etp", "ep"), ("ep", "etp")):
            left = world // pp // degrees[other]
            values = [d for d in range(1, left + 1) if left % d == 0 and fits(job, world, {**degrees, axis: d})]
            degrees[axis] = draw(st.sampled_from(values))
        virtual = draw(st.integers(1, layers // pp)) if pp > 1 else 1
        stages: tuple[int, ...] = ()
        if draw(st.booleans()):
            edges = draw(st.sampled_from(list(combinations(range(1, layers), pp * virtual - 1))))
            stages = tuple(b - a for a, b in pairwise((0, *edges, layers)))
        return Layout(world, **degrees, virtual=virtual, stage_layers=stages)

    job = small_job(model, most_ranks)
    return drawn()
