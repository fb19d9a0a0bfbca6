"""What is the whole model? Embedding, layers, a last norm, the head; and the sums that a step adds up.

Nothing inside depends on micro-batches or the world: every loss is a sum over tokens, divided once, outside.
Shapes: B sequences, S positions, T = B * S tokens, D hidden, V vocabulary, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from concertina.config import ModelConfig
from concertina.layout.box import cut
from concertina.model.block import Block
from concertina.model.loss import IGNORED, cross_entropy_sum
from concertina.model.norm import RMSNorm
from concertina.model.parameters import Build, ParameterInfo, Part, declared
from concertina.model.rope import rotation
from concertina.model.router import Routing
from concertina.parallel.dispatch import Dispatcher
from concertina.parallel.groups import Group

__all__ = ["Decoder", "ModelOutput"]


@dataclass(frozen=True)
class ModelOutput:
    """Sums over the micro-batch. The objective is loss_sum + aux coefficient * aux_sum + z coefficient * z_sum.

    `aux_sum` and `z_sum` add up the layers, each sequence weighted by its predicted tokens; `num_tokens` (int64) is
    what all three are divided by once it is summed over the global batch. `expert_counts_LE`: int64.
    """

    loss_sum: Tensor
    aux_sum: Tensor
    z_sum: Tensor
    num_tokens: Tensor
    expert_counts_LE: Tensor


class _Table(Part):
    """A matrix with a row for every token of the vocabulary."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self._declare("weight", (build.model.vocab_size, build.model.hidden_size))


class Decoder(nn.Module):
    """One rank's decoder: everything, but of the experts only its share of `ep`."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: torch.device, ep: Group, seed: int) -> None:
        super().__init__()
        self.model = model
        dispatcher = Dispatcher(model.num_experts, ep)
        build = Build(model, dtype, torch.device(device), seed, cut(model.num_experts, ep.size, ep.rank))
        self.build = build
        self.embedding = _Table(build, "embedding")
        self.layers = nn.ModuleList(Block(build, layer, dispatcher) for layer in range(model.num_hidden_layers))
        self.norm = RMSNorm(build, "norm", (model.hidden_size,))
        self.head = self.embedding if model.tie_word_embeddings else _Table(build, "head")

    def parameter_information(self) -> dict[str, ParameterInfo]:
        """Every parameter by global name, in the order of computation; a tied weight once."""
        return {info.name: info for info, _ in declared(self)}

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, parameter) in the order of `parameter_information`."""
        return ((info.name, tensor) for info, tensor in declared(self))

    def hidden(self, tokens_BS: Tensor, tokens_B: Tensor) -> tuple[Tensor, list[Routing]]:
        """Normed output of the last layer [T, D], and the routing of each layer with experts."""
        x_TD = F.embedding(tokens_BS.reshape(-1), self.embedding.weight)
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        turn = rotation(positions, self.model.width_of_head, self.model.rope_theta, self.build.dtype)
        routings = []
        for layer in self.layers:
            x_TD, routing = layer(x_TD, tokens_B, turn)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_TD), routings

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, V] in the model's dtype; for oracles and small batches, training never makes them all."""
        x_TD, _ = self.hidden(tokens_BS, torch.ones_like(tokens_BS[:, 0]))
        return F.linear(x_TD, self.head.weight).view(*tokens_BS.shape, -1)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> ModelOutput:
        """Tokens and targets: int64; a target of -100 is not predicted. All ranks of the ep group must call it."""
        tokens_B = (targets_BS != IGNORED).sum(1)
        x_TD, routings = self.hidden(tokens_BS, tokens_B)
        loss_sum, num_tokens = cross_entropy_sum(x_TD, self.head.weight, targets_BS.reshape(-1))
        nothing = torch.zeros_like(loss_sum)
        counts = [routing.counts_E for routing in routings]
        return ModelOutput(
            loss_sum,
            sum((routing.aux_sum for routing in routings), nothing),
            sum((routing.z_sum for routing in routings), nothing),
            num_tokens,
            torch.stack(counts) if counts else num_tokens.new_zeros(0, self.model.num_experts),
        )
