"""How do our blocks train? The engine's own pieces: blocks, buckets, reducer, sharded AdamW; no embedding, no head.

Every micro-batch has inputs of its own, which together exceed a GPU's cache. Shapes: B sequences, S tokens, T = B * S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.shapes import Work
from concertina.config import TrainingConfig
from concertina.layout import shards
from concertina.model.block import Block
from concertina.model.parameters import Build, made
from concertina.model.rope import rotation
from concertina.model.router import Router
from concertina.model.sight import Sight
from concertina.model.span import Span
from concertina.parallel.context import Context
from concertina.parallel.dispatch import Dispatcher
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes
from concertina.parallel.recompute import recomputing
from concertina.parallel.reducer import GradientReducer, make_buckets
from concertina.train.optimizer import ShardedAdamW

__all__ = ["Ours", "balanced_choice", "draw_inputs", "draw_weights"]

_COMMON = 0.6
"""How much all tokens have in common: text does, and some experts get twice the mean for it."""


def draw_inputs(work: Work, device: torch.device, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Random [B, S, D], of unit size a row, with a part that all share."""
    generator = torch.Generator(device).manual_seed(1)
    shape, width = (work.sequences, work.length, work.model.hidden_size), work.model.hidden_size
    common = _COMMON * torch.randn(width, generator=generator, device=device)
    return [(torch.randn(shape, generator=generator, device=device) + common).to(dtype) for _ in range(count)]


@torch.no_grad()
def draw_weights(module: nn.Module, device: torch.device) -> None:
    """Matrices random, everything else one: as at the start of a training, by the device's own generator."""
    generator = torch.Generator(device).manual_seed(2)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif "bias" in name:
            parameter.zero_()
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


def balanced_choice(num_tokens: int, k: int, num_experts: int, device: torch.device) -> Tensor:
    """Every expert as often as any other: int64 [T, K]."""
    return (torch.arange(num_tokens * k, device=device) % num_experts).view(num_tokens, k)


class _BalancedRouter(Router):
    """Computes all that a router does, and sends tokens round."""

    def choose(self, scores_RE: Tensor) -> Tensor:
        model = self.build.model
        return balanced_choice(len(scores_RE), model.num_experts_per_tok, model.num_experts, scores_RE.device)


class Ours:
    """A stack of blocks and its optimizer."""

    def __init__(self, work: Work, device: torch.device, balanced: bool, recomputed: frozenset[str]) -> None:
        self.work, self.recomputed = work, recomputed
        groups, model, dtype = Groups.alone(), work.stack, torch.bfloat16
        table = shards(model, groups.layout, 0)
        ways = Lanes(groups["tp"]), Context(groups["cp"])
        build = Build(model, dtype, device, 0, table, groups, *ways, initial=False)
        dispatcher = Dispatcher(model.num_experts, groups)
        self.blocks = nn.ModuleList(Block(build, layer, dispatcher) for layer in range(work.layers))
        draw_weights(self.blocks, device)
        if balanced:
            for router in [module for module in self.blocks.modules() if isinstance(module, Router)]:
                router.__class__ = _BalancedRouter
        parameters = dict(made(self.blocks))
        training = TrainingConfig(precision="bfloat16")
        held = [table[name] for name in parameters]
        buckets = make_buckets(parameters, held, groups, training.weight_decay)
        self.reducer = GradientReducer(buckets)
        self.optimizer = ShardedAdamW(buckets, training)
        self.inputs = [x.flatten(0, 1) for x in draw_inputs(work, device, dtype, 2 * work.micro_batches)]
        tokens_B = torch.full((work.sequences,), work.length, device=device)
        positions = torch.arange(work.length, device=device)
        self.span = Span(work.length, positions, 0, work.tokens, tokens_B)
        turn = rotation(positions, model.width_of_head, model.rope_theta, dtype)
        self.sight = Sight(work.length, build.context, turn)
        self.counts: list[Tensor] = []

    def forward_backward(self) -> None:
        """All micro-batches of a step; their gradients are summed in fp32."""
        work, model = self.work, self.work.model
        self.counts = []
        self.reducer.begin()
        for number in range(work.micro_batches):
            self.reducer.arm(last=number == work.micro_batches - 1)
            x, dy = self.inputs[2 * number].detach().requires_grad_(), self.inputs[2 * number + 1]
            y, losses = x, x.new_zeros((), dtype=torch.float32)
            with recomputing(self.recomputed):
                for block in self.blocks:
                    y, routing = block(y, self.span, self.sight)
                    losses = losses + model.router_aux_loss_coef * routing.aux_sum
                    losses = losses + model.router_z_loss_coef * routing.z_sum
                    self.counts.append(routing.counts_E)
            torch.autograd.backward([y, losses], [dy, torch.ones_like(losses)])

    def optimize(self) -> None:
        """Norm, clipping, AdamW in fp32, the weights rounded anew: one number goes to the host, as in a run."""
        gradients = self.reducer.finish()
        norm = float(self.optimizer.local_sum_of_squares(gradients)) ** 0.5
        self.optimizer.apply(gradients, min(1.0, 1.0 / (norm + 1e-6)), 1e-4)
        self.optimizer.publish()
        self.optimizer.arrive()

    def step(self) -> None:
        self.forward_backward()
        self.optimize()

    def imbalance(self) -> float:
        """Tokens of the busiest expert over the mean, the worst layer's, of the last step."""
        return max(float(counts.max() / counts.to(torch.float64).mean()) for counts in self.counts)

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Forward and backward of each part of one block, once, on what it really gets; gradients taken as ever."""
        block: Any = self.blocks[0]
        moe, x, dy = block.moe, self.inputs[0], self.inputs[1]
        with torch.no_grad():
            normed = block.feed_forward_norm(block.attend(x, self.span, self.sight))
            routing = moe.gate(normed, self.span)
            received = moe.dispatcher.start_dispatch(normed, routing.expert_ids_RK).finish()
            drows = torch.randn_like(received.rows_QD)
        weights = routing.weights_RK

        def attention(given: Tensor) -> None:
            block.attend(given, self.span, self.sight).backward(dy)

        def router(given: Tensor) -> None:
            found = moe.gate(given, self.span)
            torch.autograd.backward([found.weights_RK, found.aux_sum + found.z_sum], [weights, None])

        def permute(given: Tensor) -> None:
            there = moe.dispatcher.start_dispatch(given, routing.expert_ids_RK).finish()
            moe.dispatcher.start_combine(there, there.rows_QD, weights.detach().requires_grad_()).finish().backward(dy)

        def experts(given: Tensor) -> None:
            moe.experts(given, received.counts_E).backward(drows)

        def shared(given: Tensor) -> None:
            moe.shared(given, self.span).backward(dy)

        found = {"attention": (attention, x), "router": (router, normed), "permute": (permute, normed)}
        found["experts"] = (experts, received.rows_QD)
        if moe.shared is not None:
            found["shared expert"] = (shared, normed)
        return {name: self._part(run, given) for name, (run, given) in found.items()}

    def _part(self, run: Callable[[Tensor], None], given: Tensor) -> Callable[[], None]:
        def once() -> None:
            self.reducer.arm(last=False)
            run(given.detach().requires_grad_())

        return once
