"""What is the whole model? Embedding, layers, a last norm, the head; and the sums that a step adds up.

Nothing inside depends on micro-batches or the world: every loss is a sum over tokens, divided once, outside.
Shapes: B sequences, S positions, T = B * S tokens, R of them on this lane of tp, D hidden, V vocabulary, L layers with
experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from concertina.config import ModelConfig
from concertina.layout import shards
from concertina.model.block import Block
from concertina.model.loss import IGNORED, Vocabulary, cross_entropy_sum
from concertina.model.norm import ResidualNorm
from concertina.model.parameters import Build, Part, made
from concertina.model.rope import Rotation, rotation
from concertina.model.router import Router, Routing
from concertina.model.span import Place, Span
from concertina.parallel.capacity import Capacity
from concertina.parallel.dispatch import Dispatcher
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes

__all__ = ["Decoder", "ModelOutput"]


@dataclass(frozen=True)
class ModelOutput:
    """This rank's part of the sums over the micro-batch; added up over the world they are those of the global batch.

    The objective is loss_sum + aux coefficient * aux_sum + z coefficient * z_sum: its gradient is this rank's part,
    although lanes other than the first count the loss, which all of them know, as zero.
    `aux_sum` and `z_sum` add up the layers, each sequence weighted by its predicted tokens; `num_tokens` (int64) is
    what all three are divided by once it is summed over the global batch. `expert_counts_LE`: int64, how often the
    router chose each expert; `num_dropped` of these choices (int64) did not fit.
    """

    loss_sum: Tensor
    aux_sum: Tensor
    z_sum: Tensor
    num_tokens: Tensor
    expert_counts_LE: Tensor
    num_dropped: Tensor


class Embedding(Part):
    """A row for every token of the vocabulary, of which a lane of tp has its share."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self._make("weight")
        box = build.shards[f"{prefix}.weight"].box
        self.vocabulary = Vocabulary(build.lanes.group, box.start[0], box.stop[0], build.model.vocab_size)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Rows of the tokens that are here, zeros for the others: [T, D], to be summed over the lanes."""
        if self.build.lanes.size == 1:
            return F.embedding(tokens_T, self.weight)
        index, found = self.vocabulary.here(tokens_T)
        if not len(self.weight):  # fewer tokens in the vocabulary than lanes
            return self.weight.new_zeros(len(tokens_T), self.weight.shape[1]) + self.weight.sum()
        return F.embedding(index, self.weight) * found.unsqueeze(1)


class Head(Part):
    """Logits of every token of the vocabulary, and how wrong they are; its weight may be the embedding's."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str, tied: Embedding | None) -> None:
        super().__init__(build, prefix)
        if tied is None:
            self._make("weight")
        else:
            self.weight = tied.weight
        box = build.shards[f"{prefix if tied is None else tied.prefix}.weight"].box
        self.vocabulary = Vocabulary(build.lanes.group, box.start[0], box.stop[0], build.model.vocab_size)

    def forward(self, x_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses, which every lane of tp knows, and the number of tokens counted."""
        return cross_entropy_sum(x_TD, self.weight, targets_T, self.vocabulary)


class Decoder(nn.Module):
    """One rank's decoder: its boxes of every parameter, by the layout of `groups`; with start values if `initial`."""

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        groups: Groups,
        seed: int,
        sequence_parallel: bool = True,
        initial: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.shards = shards(model, groups.layout, groups.rank)
        lanes = Lanes(groups["tp"], sequence_parallel)
        build = Build(model, dtype, torch.device(device), seed, self.shards, groups, lanes, initial)
        self.build = build
        self.capacity = Capacity(model, groups, lanes) if model.capacity.factor is not None else None
        dispatcher = Dispatcher(model.num_experts, groups)
        self.embedding = Embedding(build, "embedding")
        self.layers = nn.ModuleList(Block(build, layer, dispatcher) for layer in range(model.num_hidden_layers))
        self.norm = ResidualNorm(build, "norm")
        self.head = Head(build, "head", self.embedding if model.tie_word_embeddings else None)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, parameter) in the order of `shards`, which is that of computation."""
        found = dict(made(self))
        assert found.keys() == self.shards.keys()
        return ((name, found[name]) for name in self.shards)

    def routers(self) -> Iterator[Router]:
        """The routers of the layers with experts, in the order of `expert_counts_LE`."""
        return (module for module in self.modules() if isinstance(module, Router))

    def router_biases(self) -> dict[str, Tensor]:
        """Global name -> live bias [E] of every router that has one, the same on every rank of the stage."""
        return {f"{router.prefix}.bias": router.bias for router in self.routers() if router.bias is not None}

    def balance(self, expert_counts_LE: Tensor) -> None:
        """After an applied step: move the routers' biases by the tokens that its global batch gave each expert."""
        for router, counts_E in zip(self.routers(), expert_counts_LE, strict=True):
            router.balance(counts_E)

    def span(self, tokens_BS: Tensor, tokens_B: Tensor, place: Place | None = None) -> Span:
        """Which of the micro-batch's tokens this lane holds between products."""
        num_sequences, length = tokens_BS.shape
        start, stop = self.build.lanes.share(tokens_BS.numel())
        quota = None
        if self.capacity is not None and place is not None:
            quota = self.capacity.quota(num_sequences, length, tokens_BS.device, place.peers)
        return Span(num_sequences, length, start, stop, tokens_B, place, quota)

    def rotation(self, positions_S: Tensor) -> Rotation:
        """How far queries and keys of these positions are turned."""
        model = self.model
        return rotation(positions_S, model.width_of_rotation, model.rope_theta, self.build.dtype, model.rope_scaling)

    def hidden(self, tokens_BS: Tensor, span: Span) -> tuple[Tensor, list[Routing]]:
        """Normed output of the last layer [R, D], and the routing of each layer with experts."""
        x_RD = self.build.lanes.leave(self.embedding(tokens_BS.reshape(-1)))
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        turn = self.rotation(positions)
        routings = []
        for layer in self.layers:
            x_RD, routing = layer(x_RD, span, turn)
            if routing is not None:
                routings.append(routing)
        return self.norm(x_RD), routings

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, V] in the model's dtype; for oracles and small batches, training never makes them all. Dropless.
        With tp, a lane has its rows of the vocabulary."""
        span = self.span(tokens_BS, torch.ones_like(tokens_BS[:, 0]))
        x_RD, _ = self.hidden(tokens_BS, span)
        x_TD = self.build.lanes.enter(x_RD, span.num_tokens)
        return F.linear(x_TD, self.head.weight).view(*tokens_BS.shape, -1)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor, place: Place | None = None) -> ModelOutput:
        """Tokens and targets: int64; a target of -100 is not predicted. All ranks of the stage must call it.

        `place` is for training: without it nothing is random and no token is dropped.
        """
        lanes = self.build.lanes
        span = self.span(tokens_BS, (targets_BS != IGNORED).sum(1), place)
        x_RD, routings = self.hidden(tokens_BS, span)
        x_TD = lanes.enter(x_RD, span.num_tokens)
        loss, num_tokens = self.head(x_TD, targets_BS.reshape(-1))
        nothing = torch.zeros_like(loss)
        if not lanes.speaks:
            loss, num_tokens = loss - loss.detach(), torch.zeros_like(num_tokens)
        counts = [routing.counts_E for routing in routings]
        return ModelOutput(
            loss,
            sum((routing.aux_sum for routing in routings), nothing),
            sum((routing.z_sum for routing in routings), nothing),
            num_tokens,
            torch.stack(counts) if counts else num_tokens.new_zeros(0, self.model.num_experts),
            self._num_dropped(routings, num_tokens),
        )

    def _num_dropped(self, routings: Sequence[Routing], like: Tensor) -> Tensor:
        """Choices without a row, of the tokens here; lanes with the same tokens count them once."""
        lanes, kept = self.build.lanes, [routing.kept_RK for routing in routings if routing.kept_RK is not None]
        if not kept or (lanes.replicated and not lanes.speaks):
            return torch.zeros_like(like)
        return (~torch.stack(kept)).sum()
