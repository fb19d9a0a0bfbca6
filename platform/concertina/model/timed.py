"""What does a rank do that only seems to compute? It waits as long as a device would, and moves tensors of real sizes.

`cluster.device: timed`, for measuring bubbles and scaling with more ranks than cores. Attention, dense and routed
experts and the head become a wait for their products (forward once, backward twice), a copy of their input, and for
every weight a gradient of its size. Norms, routers, permutations, communication, sums of gradients, the optimizer,
snapshots, checkpoints are those of any run. Numbers mean nothing: the loss is that of guessing, always.
Shapes: T tokens, Q rows for the experts here, D hidden, E experts here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from concertina.config import Job, ModelConfig
from concertina.model.attention import Attention
from concertina.model.decoder import Decoder, Head
from concertina.model.deferred import active_queue
from concertina.model.experts import Experts
from concertina.model.loss import IGNORED
from concertina.model.mlp import SwiGLU
from concertina.model.parameters import Part
from concertina.planner.flops import flops_per_token

__all__ = ["Pace", "pace_of", "pretend", "products_of_a_layer"]

_PULL = 1e-3
"""A weight's gradient is so much of it a token: small, not zero, and the optimizer has something to do."""


def products_of_a_layer(model: ModelConfig, length: int) -> int:
    """Multiply-adds of one token in one layer with experts, forward."""
    layer = model.model_copy(update={"num_hidden_layers": 1, "mlp_only_layers": ()})
    return flops_per_token(layer, length) // 6 - model.vocab_size * model.hidden_size


class Pace:
    """How long products take. What a wait lasts too long the next ones are shorter."""

    def __init__(
        self,
        s_per_product: float,
        length: int,
        sleep: Callable[[float], None] = time.sleep,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.s_per_product, self.length = s_per_product, length
        self._sleep, self._now_s = sleep, now_s
        self._ahead_s = 0.0

    def wait(self, products: float) -> None:
        due_s = products * self.s_per_product - self._ahead_s
        started_s = self._now_s()
        if due_s > 0:
            self._sleep(due_s)
        self._ahead_s = self._now_s() - started_s - due_s


class _Timed(torch.autograd.Function):
    """y = share * x after a wait; the gradient of a weight is itself, so many tokens' worth."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pace: Pace, products: float, share: float, tokens: Sequence[Any], *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*weights)
        ctx.facts, ctx.queue = (pace, products, share, tokens), active_queue()
        pace.wait(products)
        return x * share

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weights = ctx.saved_tensors
        pace, products, share, tokens = ctx.facts

        def gradients() -> list[Tensor]:
            pace.wait(products)
            return [weight * (count * _PULL) for weight, count in zip(weights, tokens, strict=True)]

        pace.wait(products)
        dx = grads[0] * share
        if ctx.queue is None:
            return dx, None, None, None, None, *gradients()
        ctx.queue.push(weights, gradients)
        return dx, None, None, None, None, *(None for _ in weights)


def _timed(part: Any, x: Tensor, products: float, share: float, tokens: Sequence[Any]) -> Tensor:
    weights = [part.get_parameter(attribute) for attribute in part.made] or [part.weight]
    y: Tensor = _Timed.apply(x, part.pace, products, share, tokens or [len(x)] * len(weights), *weights)
    return y


class _TimedAttention(Attention):
    pace: Pace

    def forward(self, x_TD: Tensor, *_: Any) -> Tensor:
        matrices = self.q.numel() + self.kv.numel() + self.output.numel()
        heads = self.q.numel() // x_TD.shape[1]
        # Scores and values of half the sequence.
        products = len(x_TD) * (matrices + self.pace.length * heads)
        return _timed(self, x_TD, products, 1 / self.build.lanes.size, [])


class _TimedSwiGLU(SwiGLU):
    pace: Pace

    def forward(self, x_TD: Tensor) -> Tensor:
        products = len(x_TD) * (self.w13.numel() + self.w2.numel())
        return _timed(self, x_TD, products, 1 / self.build.lanes.size, [])


class _TimedExperts(Experts):
    pace: Pace

    def forward(self, x_QD: Tensor, counts_E: Tensor) -> Tensor:
        each = (self.w13.numel() + self.w2.numel()) // max(1, len(self.w2))
        tokens = [counts_E.view(-1, *(1,) * (weight.dim() - 1)) for weight in (self.w13, self.w2)]
        return _timed(self, x_QD, len(x_QD) * each, 1 / self.build.groups["etp"].size, tokens)


class _TimedHead(Head):
    pace: Pace

    def forward(self, x_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        y_TD = _timed(self, x_TD, len(x_TD) * self.weight.numel(), 1 / self.build.lanes.size, [])
        counted_T = targets_T != IGNORED
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        pull = (y_TD.to(wide).square().sum(1) * counted_T).sum() * (_PULL / 2)
        num_tokens = counted_T.sum()
        return num_tokens * math.log(self.build.model.vocab_size) + (pull - pull.detach()), num_tokens


_INSTEAD: dict[type[Part], type[Part]] = {
    Attention: _TimedAttention,
    SwiGLU: _TimedSwiGLU,
    Experts: _TimedExperts,
    Head: _TimedHead,
}


def pace_of(job: Job) -> Pace:
    """That of `cluster.timed_s_per_token`."""
    length = job.data.sequence_length
    return Pace(job.cluster.timed_s_per_token / products_of_a_layer(job.model, length), length)


def pretend(decoder: Decoder, pace: Pace) -> None:
    """Make parts that compute into parts that wait; once, before hooks are on them."""
    for part in list(decoder.modules()):
        instead = next((timed for kind, timed in _INSTEAD.items() if type(part) is kind), None)
        if instead is not None and isinstance(part, Part):
            if instead is _TimedAttention:  # its norms are passed over, and their weights awaited with its own
                part.made = dict(_paths(part))
            part.__class__ = instead
            part.pace = pace  # type: ignore[assignment]


def _paths(part: Part) -> list[tuple[str, str]]:
    """(path below `part`, global name) of its parameters and those of its parts."""
    return [
        (f"{path}.{attribute}" if path else attribute, name)
        for path, child in part.named_modules()
        if isinstance(child, Part)
        for attribute, name in child.made.items()
    ]
