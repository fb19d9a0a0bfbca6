"""What is one layer? An attention half and a feed-forward half, each added to the residual stream.

Shapes: T tokens in B sequences, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from concertina.model.attention import Attention
from concertina.model.mlp import SwiGLU
from concertina.model.moe import MoE
from concertina.model.norm import RMSNorm
from concertina.model.parameters import Build, Part
from concertina.model.rope import Rotation
from concertina.model.router import Routing
from concertina.parallel.dispatch import Dispatcher

__all__ = ["Block"]


class Block(Part):
    """Layer number `layer`: attention, then experts or a dense MLP."""

    def __init__(self, build: Build, layer: int, dispatcher: Dispatcher) -> None:
        super().__init__(build, f"layers.{layer}")
        hidden = (build.model.hidden_size,)
        self.attention_norm = RMSNorm(build, f"{self.prefix}.attention_norm", hidden)
        self.attention = Attention(build, f"{self.prefix}.attention")
        self.feed_forward_norm = RMSNorm(build, f"{self.prefix}.feed_forward_norm", hidden)
        self.moe: MoE | None = None
        self.mlp: SwiGLU | None = None
        if build.model.is_moe_layer(layer):
            self.moe = MoE(build, f"{self.prefix}.moe", dispatcher)
        else:
            self.mlp = SwiGLU(build, f"{self.prefix}.mlp", build.model.intermediate_size)

    def attend(self, x_TD: Tensor, num_sequences: int, turn: Rotation) -> Tensor:
        """The attention half."""
        return x_TD + self.attention(self.attention_norm(x_TD), num_sequences, turn)

    def feed_forward(self, x_TD: Tensor, tokens_B: Tensor) -> tuple[Tensor, Routing | None]:
        """The other half; a dense layer has no routing."""
        normed = self.feed_forward_norm(x_TD)
        if self.moe is not None:
            y_TD, routing = self.moe(normed, tokens_B)
            return x_TD + y_TD, routing
        assert self.mlp is not None
        return x_TD + self.mlp(normed), None

    def forward(self, x_TD: Tensor, tokens_B: Tensor, turn: Rotation) -> tuple[Tensor, Routing | None]:
        """`tokens_B`: tokens each sequence counts for in the router's losses."""
        return self.feed_forward(self.attend(x_TD, tokens_B.numel(), turn), tokens_B)
