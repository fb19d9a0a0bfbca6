"""How does a token find its experts, and how evenly? Logits, noise, a choice, and what keeps the load balanced: two
losses, or a bias.

Losses are per packed sequence and layer, so micro-batches do not change them; each is returned as a sum over the
tokens here, of what each one adds to its sequence's loss times the tokens that sequence counts for. Added up over all
ranks and divided once by the global number of tokens it is the mean.
Shapes: R tokens of this lane of tp, B sequences, D hidden, E experts, K choices of a token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.model.choice import choose, score, shares, weigh
from concertina.model.init import draw_normal, key_of
from concertina.model.linear import linear
from concertina.model.parameters import Build, Part
from concertina.model.span import Span
from concertina.parallel.collectives import all_reduce_sum
from concertina.parallel.recompute import again

__all__ = ["Router", "Routing", "balance_sum", "count_experts", "whole_batch_balance", "z_sum"]


@dataclass(frozen=True)
class Routing:
    """The router's decision: experts by falling score, their weights, how often each was chosen, the two losses, and
    which choices are kept (absent: all). Dropping changes nothing before it: not weights, counts or losses."""

    expert_ids_RK: Tensor
    weights_RK: Tensor
    counts_E: Tensor
    aux_sum: Tensor
    z_sum: Tensor
    kept_RK: Tensor | None = None


class Router(Part):
    """Logits in at least fp32: rounding must not decide where a token goes.

    `bias` is state, not a parameter: no gradient moves it, `Decoder.balance` does.
    """

    router: Tensor
    noise: Tensor
    bias: Tensor | None

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self._make("router")
        if build.model.router_noise:
            self._make("noise")
        wide = torch.promote_types(build.dtype, torch.float32)
        start = torch.zeros(build.model.num_experts, dtype=wide, device=build.device)
        self.register_buffer("bias", start if build.model.has_router_bias else None)

    def forward(self, x_RD: Tensor, span: Span) -> Routing:
        """Route the tokens of `span`. All ranks that have tokens of its sequences must call it (tp_cp)."""
        model, lanes = self.build.model, self.build.lanes
        logits_RE = self._logits(x_RD, span)
        scores_RE = score(logits_RE, model)
        ids_RK = self.choose(scores_RE)
        weights_RK = weigh(scores_RE, ids_RK, model)
        counts_BE, counts_E = self._count(ids_RK, span)
        return Routing(
            ids_RK,
            weights_RK.to(x_RD.dtype),
            counts_E,
            balance_sum(shares(scores_RE, model), counts_BE, span) / lanes.copies,
            z_sum(logits_RE, span) / lanes.copies,
            # By score: weights that are normalised say nothing where a token has one choice.
            span.quota.keep(ids_RK, scores_RE.gather(1, ids_RK)) if span.quota is not None else None,
        )

    def choose(self, scores_RE: Tensor) -> Tensor:
        """The experts of each token: int64 [R, K]."""
        return choose(scores_RE, self.bias, self.build.model)

    def _logits(self, x_RD: Tensor, span: Span) -> Tensor:
        """x w, in training with noise: x w + N(0, 1) * softplus(x w_noise).

        Source: noisy top-k gating (Shazeer et al. 2017, equation 4). The losses see what the choice sees.
        """
        wide = torch.promote_types(x_RD.dtype, torch.float32)
        x_RD = again("norm", Tensor.to, x_RD, wide)
        logits_RE = linear(x_RD, self.router.to(wide))
        if span.place is None or not self.build.model.router_noise:
            return logits_RE
        return logits_RE + self._normal(span).to(wide) * F.softplus(linear(x_RD, self.noise.to(wide)))

    def _normal(self, span: Span) -> Tensor:
        """A normal number for every token and expert, float64 [R, E]: a function of seed, step, layer, position."""
        assert span.place is not None
        key = key_of(self.build.seed, f"{self.prefix}.noise", span.place.step)
        experts = self.build.model.num_experts
        first_R = span.position_R * experts
        return draw_normal(key, first_R.unsqueeze(1) + torch.arange(experts, device=first_R.device))

    def _count(self, ids_RK: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Choices of each sequence wherever its tokens are [B, E], and those that this lane answers for [E]."""
        lanes, groups = self.build.lanes, self.build.groups
        counts_BE = count_experts(ids_RK, span.sequence_R, span.num_sequences, self.build.model.num_experts)
        counts_E = counts_BE.sum(0)
        if lanes.replicated and not lanes.speaks:
            counts_E = torch.zeros_like(counts_E)
        return all_reduce_sum(counts_BE, groups["cp" if lanes.replicated else "tp_cp"]).finish(), counts_E


def count_experts(ids_RK: Tensor, sequence_R: Tensor, num_sequences: int, num_experts: int) -> Tensor:
    """How often each sequence chose each expert: int64 [B, E]."""
    slots = (ids_RK + sequence_R.unsqueeze(1) * num_experts).view(-1)
    counts = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=ids_RK.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots)).view(num_sequences, num_experts)


def balance_sum(probs_RE: Tensor, counts_BE: Tensor, span: Span) -> Tensor:
    """Load-balancing loss E / K * sum_e f_e P_e of each sequence (1 when even), times its tokens: the part that the
    tokens here add.

    f_e: choices of expert e over tokens of the whole sequence, wherever they are, without gradient; P_e: mean
    probability; sigmoid scores are made to sum to 1 first. Source: Switch Transformer (Fedus et al. 2021), equations 4
    to 6, over one sequence; for sigmoid DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), but f_e counts where the
    tokens do go, bias included.
    """
    # f_e * E / K, as E * (share of expert e among all choices of the sequence).
    share_BE = counts_BE.to(probs_RE.dtype) / counts_BE.sum(1, keepdim=True)
    even_R = (share_BE.index_select(0, span.sequence_R) * probs_RE).sum(1)
    return (even_R * span.weight_R.to(even_R.dtype)).sum() * counts_BE.shape[1]


def z_sum(logits_RE: Tensor, span: Span) -> Tensor:
    """Router z loss (Zoph et al. 2022, equation 5): mean of logsumexp^2 of each sequence, times its tokens: the part
    that the tokens here add."""
    squares_R = logits_RE.logsumexp(-1).square()
    return (squares_R * span.weight_R.to(squares_R.dtype)).sum()


def whole_batch_balance(layers: Sequence[Tensor], k: int) -> Tensor:
    """Hugging Face's `load_balancing_loss_func`: one mean over all layers' and sequences' tokens (even: K).

    `layers`: router logits [T, E] of each layer. For comparison only; it depends on the micro-batch.
    """
    probs = torch.cat(list(layers)).softmax(-1)
    num_tokens, num_experts = probs.shape
    nowhere = torch.zeros(num_tokens, dtype=torch.int64, device=probs.device)
    counts_1E = count_experts(probs.topk(k, dim=-1).indices, nowhere, 1, num_experts)
    return num_experts * (counts_1E[0].to(probs.dtype) / num_tokens * probs.mean(0)).sum()
