"""How does a token use a few of many experts? Gate, dispatch, experts, combine: separate steps, strung here.

Only the dispatcher communicates; what may run while it does stands between a start and its finish.
Shapes: R tokens of this lane of tp, Q rows for the experts here, E experts here, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from concertina.model.experts import Experts
from concertina.model.linear import linear
from concertina.model.mlp import SwiGLU
from concertina.model.parameters import Build, Part
from concertina.model.router import Router, Routing
from concertina.model.span import Span
from concertina.parallel.dispatch import Dispatcher
from concertina.parallel.recompute import region

__all__ = ["MoE", "SharedExpert"]


class SharedExpert(Part):
    """The expert every token goes to, with a sigmoid gate on it where the model has one (Qwen2-MoE)."""

    gate: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self.mlp = SwiGLU(build, prefix)
        if build.model.shared_expert_gate:
            self._make("gate")

    def forward(self, x_RD: Tensor, span: Span) -> Tensor:
        lanes = self.build.lanes
        y_RD = lanes.leave(self.mlp(lanes.enter(x_RD, span.num_tokens)))
        if self.build.model.shared_expert_gate:
            y_RD = y_RD * linear(x_RD, lanes.count_once(self.gate)).sigmoid()
        return y_RD


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

    def forward(self, x_RD: Tensor, span: Span) -> tuple[Tensor, Routing]:
        """Output [R, D] and the routing. All ranks of the stage must call it.

        Lanes of tp that hold the same tokens each send them: experts then see copies, whose gradients count for their
        share.
        """
        lanes = self.build.lanes
        routed_RD = lanes.duplicate(x_RD)
        routing = self.gate(routed_RD, span)
        padded = span.quota.padded if span.quota is not None else None
        dispatching = self.dispatcher.start_dispatch(routed_RD, routing.expert_ids_RK, routing.kept_RK, padded)
        shared_RD = self.shared(x_RD, span) if self.shared is not None else None
        received = dispatching.finish()
        out_QD = region("experts", self.experts, received.rows_QD, received.counts_E)
        y_RD = self.dispatcher.start_combine(received, out_QD, routing.weights_RK).finish()
        y_RD = lanes.count_once(y_RD)
        return (y_RD if shared_RD is None else y_RD + shared_RD), routing
