"""Which experts does a token go to, and with what weights? Scores, groups, top-k, and the bias that evens out the load.

Scores and weights carry gradients, the choice does not. Sources: DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) for
groups, DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) for sigmoid scores and the bias.
Shapes: R tokens, E experts, K choices of a token, G groups of N experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from concertina.config import ModelConfig

__all__ = ["choose", "moved", "score", "shares", "weigh"]

_TINY = 1e-20  # sigmoids can all be 0; beside what softmax sums to it rounds away


def score(logits_RE: Tensor, model: ModelConfig) -> Tensor:
    """How well each expert suits each token, in (0, 1): over all experts (softmax) or each alone (sigmoid)."""
    return logits_RE.sigmoid() if model.scoring_func == "sigmoid" else logits_RE.softmax(-1)


def shares(scores_RE: Tensor, model: ModelConfig) -> Tensor:
    """Scores that sum to 1 for each token, as softmax's do."""
    if model.scoring_func == "softmax":
        return scores_RE
    return scores_RE / (scores_RE.sum(-1, keepdim=True) + _TINY)


@torch.no_grad()
def choose(scores_RE: Tensor, bias_E: Tensor | None, model: ModelConfig) -> Tensor:
    """The K experts of each token by falling biased score, inside its best groups: int64 [R, K]."""
    biased_RE = scores_RE if bias_E is None else scores_RE + bias_E
    if model.topk_group < model.n_group:
        biased_RE = _inside_best_groups(biased_RE, model)
    return biased_RE.topk(model.num_experts_per_tok, dim=-1).indices


def _inside_best_groups(scores_RE: Tensor, model: ModelConfig) -> Tensor:
    """The scores, -inf outside each token's `topk_group` best groups."""
    scores_RGN = scores_RE.unflatten(1, (model.n_group, -1))
    best = min(2 if model.scoring_func == "sigmoid" else 1, scores_RGN.shape[2])
    strength_RG = scores_RGN.topk(best, dim=-1).values.sum(-1)
    chosen_RT = strength_RG.topk(model.topk_group, dim=-1).indices
    barred_RG = torch.ones_like(strength_RG, dtype=torch.bool).scatter_(1, chosen_RT, False)
    return scores_RGN.masked_fill(barred_RG.unsqueeze(2), float("-inf")).flatten(1)


def weigh(scores_RE: Tensor, ids_RK: Tensor, model: ModelConfig) -> Tensor:
    """What the chosen experts' outputs are multiplied by: their scores, without the bias."""
    weights_RK = scores_RE.gather(1, ids_RK)
    if model.norm_topk_prob:
        weights_RK = weights_RK / (weights_RK.sum(-1, keepdim=True) + _TINY)
    return weights_RK if model.routed_scaling_factor == 1.0 else weights_RK * model.routed_scaling_factor


def moved(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The bias after a step whose global batch gave the experts `counts_E` tokens: bias + rate * sign(mean - count).

    Source: auxiliary-loss-free load balancing (Wang et al. 2024, arXiv 2408.15664, algorithm 1). Equal counts, equal
    bits: the sign is taken of whole numbers.
    """
    missing_E = counts_E.sum() - counts_E * len(counts_E)
    return bias_E + rate * missing_E.sign().to(bias_E)
