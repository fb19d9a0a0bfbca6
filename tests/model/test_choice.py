"""Do scores, choice and weights equal transformers' DeepSeek routers, and does the bias move as by hand?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from concertina.config import ModelConfig
from concertina.layout import Layout, shards
from concertina.model.choice import choose, moved, score, shares, weigh
from concertina.model.moe import MoE
from concertina.model.parameters import Build
from concertina.model.span import Span
from concertina.parallel.context import Context
from concertina.parallel.dispatch import Dispatcher
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes
from tests.model.errors import error

pytestmark = pytest.mark.unit

TOKENS, HIDDEN, EXPERTS, CHOICES, WIDTH = 40, 16, 16, 4, 8
GROUPS = [(1, 1), (4, 2), (8, 3), (4, 4)]


def moe(**changes: Any) -> MoE:
    settings = {
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOICES,
        "moe_intermediate_size": WIDTH,
        "initializer_range": 0.5,
    }
    model = ModelConfig(**settings, **changes)
    groups, device = Groups.alone(), torch.device("cpu")
    ways = Lanes(groups["tp"]), Context(groups["cp"])
    build = Build(model, torch.float32, device, 0, shards(model, Layout(1), 0), groups, *ways)
    return MoE(build, "layers.0.moe", Dispatcher(EXPERTS, groups))


def rows() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4))


def span() -> Span:
    return Span(TOKENS, torch.arange(TOKENS), 0, TOKENS, torch.tensor([TOKENS]))


def bias() -> Tensor:
    """Large enough to move many tokens."""
    return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(5)) * 0.3


def spread_out(ids: Tensor, weights: Tensor) -> Tensor:
    """[tokens, experts], zero where a token does not go: the order of choices does not show."""
    return torch.zeros(TOKENS, EXPERTS).scatter(1, ids, weights)


def settings(n_group: int, topk_group: int, scale: float) -> dict[str, Any]:
    return {"n_group": n_group, "topk_group": topk_group, "routed_scaling_factor": scale}


def deepseek_v3(normalized: bool, **groups: Any) -> Any:
    """Their layer: router with a bias, experts, a shared expert."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOICES,
        n_shared_experts=1,
        norm_topk_prob=normalized,
        **groups,
    )
    layer = DeepseekV3MoE(config)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
        layer.gate.e_score_correction_bias.copy_(bias())
    return layer


@pytest.mark.parametrize(
    ("n_group", "topk_group", "normalized"), [(*groups, True) for groups in GROUPS] + [(4, 2, False)]
)
def test_deepseek_v3(n_group: int, topk_group: int, normalized: bool) -> None:
    """Choice, weights, the layer's output, and the router's gradient."""
    groups = settings(n_group, topk_group, 2.5)
    theirs = deepseek_v3(normalized, **groups)
    ours = moe(
        scoring_func="sigmoid",
        norm_topk_prob=normalized,
        router_bias_update_rate=0.1,
        shared_expert_intermediate_size=WIDTH,
        **groups,
    )
    assert ours.shared is not None
    with torch.no_grad():
        ours.gate.router.copy_(theirs.gate.weight)
        assert ours.gate.bias is not None
        ours.gate.bias.copy_(bias())
        ours.experts.w13.copy_(theirs.experts.gate_up_proj.view(EXPERTS, 2, WIDTH, HIDDEN).permute(0, 3, 1, 2))
        ours.experts.w2.copy_(theirs.experts.down_proj)
        ours.shared.mlp.w13.copy_(
            torch.stack([theirs.shared_experts.gate_proj.weight, theirs.shared_experts.up_proj.weight])
        )
        ours.shared.mlp.w2.copy_(theirs.shared_experts.down_proj.weight)
    _, their_weights, their_ids = theirs.gate(rows())
    output, routing = ours(rows(), span())
    assert torch.equal(routing.expert_ids_RK.sort(1).values, their_ids.sort(1).values)
    expected = spread_out(their_ids, their_weights.detach())
    assert error(spread_out(routing.expert_ids_RK, routing.weights_RK.detach()), expected) < 1e-6
    wanted = theirs(rows())
    assert error(output.detach(), wanted.detach()) < 1e-5
    output.square().sum().backward()
    wanted.square().sum().backward()
    assert ours.gate.router.grad is not None
    assert error(ours.gate.router.grad, theirs.gate.weight.grad) < 1e-5


@pytest.mark.parametrize(("n_group", "topk_group"), GROUPS)
def test_deepseek_v2(n_group: int, topk_group: int) -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2TopkRouter

    groups = settings(n_group, topk_group, 1.5)
    method = "greedy" if n_group == 1 else "group_limited_greedy"
    theirs = DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=HIDDEN,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=CHOICES,
            topk_method=method,
            norm_topk_prob=False,
            **groups,
        )
    )
    ours = moe(norm_topk_prob=False, **groups).gate
    with torch.no_grad():
        theirs.weight.copy_(ours.router)
    _, weights, ids = theirs(rows())
    routing = ours(rows(), span())
    assert torch.equal(routing.expert_ids_RK.sort(1).values, ids.sort(1).values)
    found, expected = spread_out(routing.expert_ids_RK, routing.weights_RK), spread_out(ids, weights)
    assert error(found.detach(), expected.detach()) < 1e-6


def scores(model: ModelConfig) -> Tensor:
    return score(torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(7)), model)


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(num_experts=EXPERTS, num_experts_per_tok=CHOICES, **changes)


def test_the_bias_is_in_the_choice_and_not_in_the_weights() -> None:
    model = config(scoring_func="sigmoid", norm_topk_prob=False)
    plain, biased = choose(scores(model), None, model), choose(scores(model), bias(), model)
    assert not torch.equal(plain.sort(1).values, biased.sort(1).values)
    assert torch.equal(weigh(scores(model), biased, model), scores(model).gather(1, biased))
    assert torch.equal(biased, (scores(model) + bias()).argsort(-1, descending=True)[:, :CHOICES])


@pytest.mark.parametrize(("scoring", "best"), [("softmax", 1), ("sigmoid", 2)])
def test_a_group_is_as_good_as_its_best_experts(scoring: str, best: int) -> None:
    model = config(scoring_func=scoring, n_group=4, topk_group=2)

    def by_hand(best: int) -> list[set[int]]:
        chosen = []
        for row in scores(model).tolist():
            strength = [sum(sorted(row[4 * group : 4 * group + 4])[-best:]) for group in range(4)]
            groups = sorted(range(4), key=lambda group: -strength[group])[:2]
            inside = [expert for expert in range(EXPERTS) if expert // 4 in groups]
            chosen.append(set(sorted(inside, key=lambda expert: -row[expert])[:CHOICES]))
        return chosen

    found = [set(row) for row in choose(scores(model), None, model).tolist()]
    assert found == by_hand(best)
    assert found != by_hand(3 - best), "the other rule would choose otherwise"


def test_groups_of_one_expert() -> None:
    model = config(scoring_func="sigmoid", n_group=EXPERTS, topk_group=CHOICES)
    assert torch.equal(choose(scores(model), None, model), scores(model).topk(CHOICES).indices)


def test_scores_that_are_all_zero_give_no_nan() -> None:
    model = config(scoring_func="sigmoid")
    nothing = score(torch.full((3, EXPERTS), -200.0), model)
    assert shares(nothing, model).tolist() == nothing.tolist() == torch.zeros(3, EXPERTS).tolist()
    assert weigh(nothing, choose(nothing, None, model), model).isfinite().all()


def test_a_bias_moves_by_the_sign_alone() -> None:
    start = torch.tensor([0.5, 0.0, -0.25, 0.0], dtype=torch.float64)
    counts = torch.tensor([9.0, 4.0, 5.0, 2.0], dtype=torch.float64)  # mean 5
    assert moved(start, counts, 0.125).tolist() == [0.375, 0.125, -0.25, 0.125]
    assert moved(start, counts * 7, 0.125).tolist() == moved(start, counts, 0.125).tolist()
    thirds = torch.tensor([1.0, 1.0, 2.0])  # a mean that no binary fraction is
    assert moved(torch.zeros(3), thirds, 1.0).tolist() == [1.0, 1.0, -1.0]
