"""What is one layer? An attention half and a feed-forward half, each added to the residual stream.

Shapes: T tokens in B sequences, R of them on this lane of tp, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from concertina.model.attention import Attention
from concertina.model.latent_attention import LatentAttention
from concertina.model.mlp import SwiGLU
from concertina.model.moe import MoE
from concertina.model.norm import ResidualNorm
from concertina.model.parameters import Build, Part
from concertina.model.router import Routing
from concertina.model.sight import Sight
from concertina.model.span import Span
from concertina.parallel.dispatch import Dispatcher
from concertina.parallel.recompute import layer, region

__all__ = ["Block"]


class Block(Part):
    """Layer number `number` of the model: attention, then experts or a dense MLP."""

    def __init__(self, build: Build, number: int, dispatcher: Dispatcher) -> None:
        super().__init__(build, f"layers.{number}")
        self.attention_norm = ResidualNorm(build, f"{self.prefix}.attention_norm")
        attention = LatentAttention if build.model.kv_lora_rank else Attention
        self.attention = attention(build, f"{self.prefix}.attention")
        self.feed_forward_norm = ResidualNorm(build, f"{self.prefix}.feed_forward_norm")
        self.moe: MoE | None = None
        self.mlp: SwiGLU | None = None
        if build.model.is_moe_layer(number):
            self.moe = MoE(build, f"{self.prefix}.moe", dispatcher)
        else:
            self.mlp = SwiGLU(build, f"{self.prefix}.mlp")

    def attend(self, x_RD: Tensor, span: Span, sight: Sight) -> Tensor:
        """The attention half."""
        return region("attention", self._attend, x_RD, span, sight)

    def _attend(self, x_RD: Tensor, span: Span, sight: Sight) -> Tensor:
        entered = self.attention.enter(self.attention_norm(x_RD), span.num_tokens)
        return x_RD + self.build.lanes.leave(self.attention(entered, span.num_sequences, sight))

    def feed_forward(self, x_RD: Tensor, span: Span) -> tuple[Tensor, Routing | None]:
        """The other half; a dense layer has no routing."""
        return region("moe" if self.moe is not None else "mlp", self._feed_forward, x_RD, span)

    def _feed_forward(self, x_RD: Tensor, span: Span) -> tuple[Tensor, Routing | None]:
        normed = self.feed_forward_norm(x_RD)
        if self.moe is not None:
            y_RD, routing = self.moe(normed, span)
            return x_RD + y_RD, routing
        assert self.mlp is not None
        lanes = self.build.lanes
        return x_RD + lanes.leave(self.mlp(lanes.enter(normed, span.num_tokens))), None

    def forward(self, x_RD: Tensor, span: Span, sight: Sight) -> tuple[Tensor, Routing | None]:
        return layer(self._both, x_RD, span, sight)

    def _both(self, x_RD: Tensor, span: Span, sight: Sight) -> tuple[Tensor, Routing | None]:
        return self.feed_forward(self.attend(x_RD, span, sight), span)
