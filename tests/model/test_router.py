"""Does the router choose as defined, and do its losses know nothing of micro-batches?"""

from __future__ import annotations

import pytest
import torch

from concertina.config import ModelConfig
from concertina.layout import Layout, shards
from concertina.model.init import draw_normal, key_of
from concertina.model.parameters import Build
from concertina.model.router import Router, Routing, balance_sum, count_experts, z_sum
from concertina.model.span import Place, Span
from concertina.parallel.context import Context
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes
from tests.model.errors import error

pytestmark = pytest.mark.unit


def make(dtype: torch.dtype = torch.float64, prefix: str = "layers.0.moe", seed: int = 0, **changes: object) -> Router:
    model = ModelConfig(hidden_size=16, num_experts=6, num_experts_per_tok=2, initializer_range=0.5, **changes)  # type: ignore[arg-type]
    groups = Groups.alone()
    table, ways = shards(model, Layout(1), 0), (Lanes(groups["tp"]), Context(groups["cp"]))
    return Router(Build(model, dtype, torch.device("cpu"), seed, table, groups, *ways), prefix)


def routed(x: torch.Tensor, tokens_B: torch.Tensor, **changes: object) -> tuple[Router, Routing]:
    router = make(x.dtype, **changes)  # type: ignore[arg-type]
    return router, router(x, whole(len(x), tokens_B))


def whole(num: int, tokens_B: torch.Tensor) -> Span:
    """All tokens of a micro-batch are here."""
    return piece(tokens_B, num // len(tokens_B), 0, num)


def piece(tokens_B: torch.Tensor, length: int, start: int, stop: int, place: Place | None = None) -> Span:
    """Some tokens of whole sequences."""
    return Span(length, torch.arange(length), start, stop, tokens_B, place)


def rows(num: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(num, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("normalized", [True, False])
def test_takes_the_most_probable_experts(normalized: bool) -> None:
    x = rows(12)
    router, routing = routed(x, torch.tensor([6, 6]), norm_topk_prob=normalized)
    probabilities = (x @ router.router.T).softmax(-1)
    order = probabilities.argsort(-1, descending=True)[:, :2]
    assert torch.equal(routing.expert_ids_RK, order)
    weights = probabilities.gather(1, order)
    expected = weights / weights.sum(1, keepdim=True) if normalized else weights
    assert error(routing.weights_RK, expected) < 1e-14
    assert routing.counts_E.tolist() == [(order == e).sum().item() for e in range(6)]


def test_losses_are_sums_over_sequences_of_token_weighted_means() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3 * 4, 5, dtype=torch.float64)
    probabilities = logits.softmax(-1)
    ids = probabilities.topk(2).indices
    tokens = torch.tensor([4, 3, 0])
    aux = z = 0.0
    for b in range(3):
        part, chosen = probabilities[4 * b : 4 * b + 4], ids[4 * b : 4 * b + 4]
        fractions = torch.stack([(chosen == e).sum() / 4 for e in range(5)])
        aux += tokens[b] * 5 / 2 * (fractions * part.mean(0)).sum()
        z += tokens[b] * logits[4 * b : 4 * b + 4].logsumexp(-1).square().mean()
    span = whole(12, tokens)
    counts = count_experts(ids, span.sequence_R, 3, 5)
    assert error(balance_sum(probabilities, counts, span), torch.as_tensor(aux)) < 1e-7
    assert error(z_sum(logits, span), torch.as_tensor(z)) < 1e-14
    # The parts of lanes that hold some of the tokens add up.
    parts = [piece(tokens, 4, start, stop) for start, stop in ((0, 5), (5, 9), (9, 12))]
    aux_parts = [balance_sum(probabilities[part.start : part.stop], counts, part) for part in parts]
    assert error(torch.stack(aux_parts).sum(), torch.as_tensor(aux)) < 1e-7
    z_parts = [z_sum(logits[part.start : part.stop], part) for part in parts]
    assert error(torch.stack(z_parts).sum(), torch.as_tensor(z)) < 1e-14


def test_even_routing_costs_one_per_token() -> None:
    probabilities = torch.full((8, 4), 0.25, dtype=torch.float64)
    counts = torch.full((2, 4), 2)
    assert balance_sum(probabilities, counts, whole(8, torch.tensor([4, 4]))).item() == pytest.approx(8.0)


def test_losses_and_gradients_do_not_see_micro_batches() -> None:
    x, tokens = rows(20), torch.tensor([5, 4, 3, 5])

    def gradient(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        total = torch.zeros(())
        for part, counted in parts:
            router, routing = routed(part, counted)
            (routing.aux_sum + 0.1 * routing.z_sum).backward()
            assert router.router.grad is not None
            total = total + router.router.grad
        return total

    together = gradient([(x, tokens)])
    apart = gradient([(x[:5], tokens[:1]), (x[5:], tokens[1:])])
    assert error(apart, together) < 1e-13


def test_counts_carry_no_gradient() -> None:
    """Through the probabilities only: the derivative of the loss in P_e is the fraction f_e."""
    probabilities = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([[6, 0, 0]])
    balance_sum(probabilities, counts, whole(6, torch.tensor([6]))).backward()
    assert probabilities.grad is not None
    assert torch.equal(probabilities.grad, torch.tensor([[3.0, 0, 0]], dtype=torch.float64).expand(6, 3))


def test_logits_of_bfloat16_rows_are_fp32() -> None:
    _, routing = routed(rows(8, torch.bfloat16), torch.tensor([8]))
    assert routing.aux_sum.dtype == torch.float32
    assert routing.weights_RK.dtype == torch.bfloat16


def test_sigmoid_scores_are_balanced_as_shares() -> None:
    x = rows(8)
    router, routing = routed(x, torch.tensor([8]), scoring_func="sigmoid")
    logits = x @ router.router.T
    scores = logits.sigmoid()
    means = (scores / scores.sum(1, keepdim=True)).mean(0)
    chosen = scores.argsort(-1, descending=True)[:, :2]
    fractions = torch.stack([(chosen == e).sum() / 8 for e in range(6)])
    assert error(routing.aux_sum.detach(), (8 * 6 / 2 * (fractions * means).sum()).detach()) < 1e-7
    assert error(routing.z_sum.detach(), logits.logsumexp(-1).square().sum().detach()) < 1e-14


def test_a_bias_is_state_and_no_parameter() -> None:
    router = make(torch.bfloat16, router_bias_update_rate=0.5)
    assert router.bias is not None
    assert router.bias.dtype == torch.float32
    assert [name for name, _ in router.named_parameters()] == ["router"]
    assert make().bias is None


# -- noise -------------------------------------------------------------------------------------------------------------


def noise_of(router: Router, x: torch.Tensor, place: Place | None, start: int = 0) -> torch.Tensor:
    """What is added to the logits of rows that begin at `start` of a micro-batch of two sequences of five."""
    tokens = torch.tensor([5, 5])
    quiet = router._logits(x, piece(tokens, 5, start, start + len(x)))
    return (router._logits(x, piece(tokens, 5, start, start + len(x), place)) - quiet).detach()


def test_noise_is_as_the_paper_says() -> None:
    router, x = make(router_noise=True), rows(10)
    deviation = torch.log1p(torch.exp(x @ router.noise.T)).detach()
    many = torch.cat([noise_of(router, x, Place(step, 0)) / deviation for step in range(300)])
    normal = draw_normal(key_of(0, "layers.0.moe.noise", 7), torch.arange(60)).view(10, 6)
    assert error(many[70:80], normal) < 1e-13
    assert abs(many.mean().item()) < 0.03
    assert abs(many.std().item() - 1) < 0.03


def test_noise_is_a_function_of_seed_step_layer_and_position() -> None:
    router, x = make(router_noise=True), rows(10)
    whole_batch = noise_of(router, x, Place(3, 4))
    assert error(noise_of(router, x[3:7], Place(3, 4), 3), whole_batch[3:7]) < 1e-13
    # The second sequence alone, as a micro-batch of its own.
    assert error(noise_of(router, x[5:], Place(3, 5)), whole_batch[5:]) < 1e-13
    others = [
        noise_of(router, x, Place(4, 4)),
        noise_of(router, x, Place(3, 5)),
        noise_of(make(router_noise=True, seed=1), x, Place(3, 4)),
        noise_of(make(router_noise=True, prefix="layers.1.moe"), x, Place(3, 4)),
    ]
    assert all((other.sign() != whole_batch.sign()).any() for other in others)


def test_noise_is_for_training_and_learned() -> None:
    router, x = make(router_noise=True), rows(10)
    plain = make()
    quiet = router(x, whole(10, torch.tensor([10])))
    assert torch.equal(quiet.weights_RK, plain(x, whole(10, torch.tensor([10]))).weights_RK)
    noisy = router(x, piece(torch.tensor([10]), 10, 0, 10, Place(1, 0)))
    assert not torch.equal(noisy.weights_RK, quiet.weights_RK)
    noisy.weights_RK[:, 0].sum().backward()
    assert router.noise.grad is not None
    assert router.noise.grad.abs().max() > 0
