"""Which experts does a token go to, and how evenly? Softmax, top-k, and the two losses that keep the router balanced.

Shapes: T tokens in B sequences of S, D hidden, E experts, K choices of a token, L layers.
Losses are per packed sequence and layer, so micro-batches do not change them; each is returned as a sum over the
sequences, weighted by the tokens each one counts for, to be divided once by the global number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from concertina.model.linear import linear
from concertina.model.parameters import Build, Part

__all__ = ["Router", "Routing", "balance_sum", "count_experts", "whole_batch_balance", "z_sum"]


@dataclass(frozen=True)
class Routing:
    """The router's decision: experts by falling probability, their weights, tokens each expert got, the two losses."""

    expert_ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    aux_sum: Tensor
    z_sum: Tensor


class Router(Part):
    """Logits in at least fp32: rounding must not decide where a token goes."""

    router: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self._declare("router", (build.model.num_experts, build.model.hidden_size))

    def forward(self, x_TD: Tensor, tokens_B: Tensor) -> Routing:
        """`tokens_B`: how many tokens each sequence counts for in the losses (its predicted targets)."""
        model = self.build.model
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = linear(x_TD.to(wide), self.router.to(wide))
        probs_TE = logits_TE.softmax(-1)
        weights_TK, ids_TK = probs_TE.topk(model.num_experts_per_tok, dim=-1)
        if model.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        counts_BE = count_experts(ids_TK, tokens_B.numel(), model.num_experts)
        return Routing(
            ids_TK,
            weights_TK.to(x_TD.dtype),
            counts_BE.sum(0),
            balance_sum(probs_TE, counts_BE, tokens_B),
            z_sum(logits_TE, tokens_B),
        )


def count_experts(ids_TK: Tensor, num_sequences: int, num_experts: int) -> Tensor:
    """How often each sequence chose each expert: int64 [B, E]."""
    sequence_B1 = torch.arange(num_sequences, device=ids_TK.device).unsqueeze(1) * num_experts
    slots = (ids_TK.view(num_sequences, -1) + sequence_B1).view(-1)
    counts = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=ids_TK.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots)).view(num_sequences, num_experts)


def balance_sum(probs_TE: Tensor, counts_BE: Tensor, tokens_B: Tensor) -> Tensor:
    """Load-balancing loss E / K * sum_e f_e P_e of each sequence (1 when even), times its tokens, summed.

    f_e: choices of expert e over tokens, without gradient; P_e: mean probability. Source: Switch Transformer
    (Fedus et al. 2021), equations 4 to 6, over one sequence. Fractions and probabilities are formed before the product:
    ranks that share a sequence sum both first.
    """
    num_sequences, num_experts = counts_BE.shape
    mean_BE = probs_TE.view(num_sequences, -1, num_experts).mean(1)
    # f_e * E / K, as E * (share of expert e among all choices of the sequence).
    share_BE = counts_BE.to(mean_BE.dtype) / counts_BE.sum(1, keepdim=True)
    return (share_BE * mean_BE).sum(1).mul(num_experts * tokens_B).sum()


def z_sum(logits_TE: Tensor, tokens_B: Tensor) -> Tensor:
    """Router z loss (Zoph et al. 2022, equation 5): mean of logsumexp^2 of each sequence, times its tokens, summed."""
    squares_T = logits_TE.logsumexp(-1).square()
    return (squares_T.view(tokens_B.numel(), -1).mean(1) * tokens_B).sum()


def whole_batch_balance(layers: Sequence[Tensor], k: int) -> Tensor:
    """Hugging Face's `load_balancing_loss_func`: one mean over all layers' and sequences' tokens (even: K).

    `layers`: router logits [T, E] of each layer. For comparison only; it depends on the micro-batch.
    """
    probs = torch.cat(list(layers)).softmax(-1)
    num_tokens, num_experts = probs.shape
    counts_1E = count_experts(probs.topk(k, dim=-1).indices, 1, num_experts)
    return num_experts * (counts_1E[0].to(probs.dtype) / num_tokens * probs.mean(0)).sum()
