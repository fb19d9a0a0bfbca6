"""What does a rank do that only seems to compute? It waits as long as a device would, and moves tensors of real sizes.

`cluster.device: timed`, for measuring bubbles and scaling with more ranks than cores. Attention, dense and routed
experts and the head become a wait for their products (forward once, backward twice), a copy of their input, and for
every weight a gradient of its size. Norms, routers, permutations, communication, sums of gradients, the optimizer,
snapshots, checkpoints are those of any run; where a sequence is on several ranks keys and values travel, tile by tile
between the waits. Numbers mean nothing: the loss is that of guessing, always.
Shapes: T tokens, R of them on this lane, Q rows for the experts here, D hidden, E experts here, W as in
`latent_attention.py` what goes into latent attention.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.config import Job, ModelConfig
from concertina.model.attention import Attention, attend_apart
from concertina.model.attention_kernels import TileInput, TileKernel
from concertina.model.decoder import Decoder, Head
from concertina.model.deferred import active_queue
from concertina.model.experts import Experts
from concertina.model.latent_attention import LatentAttention, Latents
from concertina.model.loss import IGNORED
from concertina.model.mlp import SwiGLU
from concertina.model.parameters import Part
from concertina.model.sight import Sight
from concertina.parallel.recompute import region
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


def _resized(x: Tensor, width: int) -> Tensor:
    return x[:, :width] if width <= x.shape[1] else F.pad(x, (0, width - x.shape[1]))


def _attended(part: Any, x_T: Tensor, widths: tuple[int, int, int, int], num_sequences: int, sight: Sight) -> Tensor:
    """`x_T` once its core has been waited for: of so many key-value heads, query heads of each, widths of a key and of
    a value, with keys and values that come from other ranks if they are there."""
    kv_heads, group, key, value = widths
    if sight.is_plain:  # scores and values of half the sequence
        products = len(x_T) * part.pace.length * kv_heads * group * (key + value) / 2
        return _Waited.apply(x_T, part.pace, products)
    nothing = x_T[:1, :1].sum() * 0
    q, k, v = (
        nothing + x_T.new_zeros(num_sequences, len(x_T) // num_sequences, *shape)
        for shape in ((kv_heads, group, key), (kv_heads, key), (kv_heads, value))
    )
    kernel = _timed_kernel(part.pace)
    return x_T + attend_apart(q, k, v, sight, lambda _: kernel).sum() * 0


class _Waited(torch.autograd.Function):
    """y = x after a wait."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pace: Pace, products: float) -> Tensor:
        ctx.facts = pace, products
        pace.wait(products)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        pace, products = ctx.facts
        pace.wait(2 * products)
        return grads[0], None, None


def _timed_kernel(pace: Pace) -> TileKernel:
    """Zeros after a wait; of a tile on the diagonal half is seen."""

    def products(x: TileInput) -> float:
        seen = x.k.shape[2] * (x.k.shape[3] + x.v.shape[3])
        return x.q.numel() // x.q.shape[3] * seen / (2 if x.causal else 1)

    def forward(x: TileInput) -> tuple[Tensor, Tensor]:
        pace.wait(products(x))
        wide = torch.promote_types(x.q.dtype, torch.float32)
        return x.q.new_zeros(*x.q.shape[:3], x.v.shape[3]), x.q.new_zeros(x.q.shape[:3], dtype=wide)

    def backward(x: TileInput, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pace.wait(2 * products(x))
        return torch.zeros_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v)

    return TileKernel(forward, backward)


class _TimedAttention(Attention):
    pace: Pace

    def forward(self, x_TD: Tensor, num_sequences: int, sight: Sight) -> Tensor:
        matrices = self.q.numel() + self.kv.numel() + self.output.numel()
        y_TD = _timed(self, x_TD, len(x_TD) * matrices, 1 / self.build.lanes.size, [])
        kv_heads, group, width, _ = self.q.shape
        return region("core", _attended, self, y_TD, (kv_heads, group, width, width), num_sequences, sight)


class _TimedLatents(Latents):
    pace: Pace

    def forward(self, x_RD: Tensor) -> Tensor:
        model = self.build.model
        matrices = self.kv_down.numel() + (self.q_down.numel() if self.q_norm is not None else 0)
        width = (model.q_lora_rank or model.hidden_size) + model.kv_lora_rank + model.qk_rope_head_dim
        return _resized(_timed(self, x_RD, len(x_RD) * matrices, 1.0, []), width)


class _TimedLatentAttention(LatentAttention):
    pace: Pace

    def forward(self, entered_TW: Tensor, num_sequences: int, sight: Sight) -> Tensor:
        model, (heads, width, _) = self.build.model, self.q.shape
        matrices = self.q.numel() + self.kv_up.numel() + self.output.numel()
        y_TW = _timed(self, entered_TW, len(entered_TW) * matrices, 1 / self.build.lanes.size, [])
        y_TW = region("core", _attended, self, y_TW, (heads, 1, width, model.v_head_dim), num_sequences, sight)
        return _resized(y_TW, model.hidden_size)


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
    Latents: _TimedLatents,
    LatentAttention: _TimedLatentAttention,
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
            # Norms inside are passed over, and their weights awaited with the part's own.
            if instead in (_TimedAttention, _TimedLatents):
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
