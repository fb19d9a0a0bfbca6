"""How does a token use a few of many experts? Gate, dispatch, experts, combine: separate steps, strung here.

Only the dispatcher communicates; what may run while it does stands between a start and its finish.
Shapes: T tokens in B sequences, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from concertina.model.experts import Experts
from concertina.model.linear import linear
from concertina.model.mlp import SwiGLU
from concertina.model.parameters import Build, Part
from concertina.model.router import Router, Routing
from concertina.parallel.dispatch import Dispatcher

__all__ = ["MoE", "SharedExpert"]


class SharedExpert(Part):
    """The expert every token goes to, with a sigmoid gate on it where the model has one (Qwen2-MoE)."""

    gate: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self.mlp = SwiGLU(build, prefix, build.model.shared_expert_intermediate_size)
        if build.model.shared_expert_gate:
            self._declare("gate", (1, build.model.hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.mlp(x_TD)
        if self.build.model.shared_expert_gate:
            y_TD = y_TD * linear(x_TD, self.gate).sigmoid()
        return y_TD


class MoE(Part):
    """Routed experts, and a shared one where the model has it."""

    def __init__(self, build: Build, prefix: str, dispatcher: Dispatcher) -> None:
        super().__init__(build, prefix)
        self.gate = Router(build, prefix)
        self.experts = Experts(build, f"{prefix}.experts")
        self.dispatcher = dispatcher
        self.shared: SharedExpert | None = None
        if build.model.shared_expert_intermediate_size:
            self.shared = SharedExpert(build, f"{prefix}.shared")

    def forward(self, x_TD: Tensor, tokens_B: Tensor) -> tuple[Tensor, Routing]:
        """Output [T, D] and the routing. All ranks of the ep group must call it."""
        routing = self.gate(x_TD, tokens_B)
        dispatching = self.dispatcher.start_dispatch(x_TD, routing.expert_ids_TK)
        shared_TD = self.shared(x_TD) if self.shared is not None else None
        received = dispatching.finish()
        out_QD = self.experts(received.rows_QD, received.counts_E)
        y_TD = self.dispatcher.start_combine(received, out_QD, routing.weights_TK).finish()
        return (y_TD if shared_TD is None else y_TD + shared_TD), routing
