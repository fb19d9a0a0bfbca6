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
from concertina.model.rope import rotation
from concertina.model.router import Routing
from concertina.model.span import Span
from concertina.parallel.capacity import Capacity, Quota
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


class _Table(Part):
    """A matrix with a row for every token of the vocabulary, of which a lane of tp has its share."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__(build, prefix)
        self._make("weight")
        box = build.shards[f"{prefix}.weight"].box
        self.vocabulary = Vocabulary(build.lanes.group, box.start[0], box.stop[0])

    def look_up(self, tokens_T: Tensor) -> Tensor:
        """Rows of the tokens that are here, zeros for the others: [T, D], to be summed over the lanes."""
        if self.build.lanes.size == 1:
            return F.embedding(tokens_T, self.weight)
        index, found = self.vocabulary.here(tokens_T)
        if not len(self.weight):  # a vocabulary smaller than tp
            return self.weight.new_zeros(len(tokens_T), self.weight.shape[1]) + self.weight.sum()
        return F.embedding(index, self.weight) * found.unsqueeze(1)


class Decoder(nn.Module):
    """One rank's decoder: its boxes of every parameter, by the layout of `groups`."""

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        groups: Groups,
        seed: int,
        sequence_parallel: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.shards = shards(model, groups.layout, groups.rank)
        lanes = Lanes(groups["tp"], sequence_parallel)
        build = Build(model, dtype, torch.device(device), seed, self.shards, groups, lanes)
        self.build = build
        self.capacity = Capacity(model, groups, lanes) if model.capacity.factor is not None else None
        dispatcher = Dispatcher(model.num_experts, groups)
        self.embedding = _Table(build, "embedding")
        self.layers = nn.ModuleList(Block(build, layer, dispatcher) for layer in range(model.num_hidden_layers))
        self.norm = ResidualNorm(build, "norm")
        self.head = self.embedding if model.tie_word_embeddings else _Table(build, "head")

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, parameter) in the order of `shards`, which is that of computation."""
        found = dict(made(self))
        assert found.keys() == self.shards.keys()
        return ((name, found[name]) for name in self.shards)

    def span(self, tokens_BS: Tensor, tokens_B: Tensor, quota: Quota | None = None) -> Span:
        """Which of the micro-batch's tokens this lane holds between products."""
        start, stop = self.build.lanes.share(tokens_BS.numel())
        return Span(len(tokens_BS), tokens_BS.shape[1], start, stop, tokens_B, quota)

    def hidden(self, tokens_BS: Tensor, span: Span) -> tuple[Tensor, list[Routing]]:
        """Normed output of the last layer [R, D], and the routing of each layer with experts."""
        x_RD = self.build.lanes.leave(self.embedding.look_up(tokens_BS.reshape(-1)))
        positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        turn = rotation(positions, self.model.width_of_head, self.model.rope_theta, self.build.dtype)
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

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor, dropless: bool = False, peers: Sequence[int] | None = None
    ) -> ModelOutput:
        """Tokens and targets: int64; a target of -100 is not predicted. All ranks of the stage must call it.

        `dropless`: experts take every token, whatever the model's capacity. `peers`: how many sequences each rank of dp
        has in this micro-batch, where they differ and experts' rows are padded.
        """
        lanes, quota = self.build.lanes, None
        if self.capacity is not None and not dropless:
            quota = self.capacity.quota(len(tokens_BS), tokens_BS.shape[1], tokens_BS.device, peers)
        span = self.span(tokens_BS, (targets_BS != IGNORED).sum(1), quota)
        x_RD, routings = self.hidden(tokens_BS, span)
        x_TD = lanes.enter(x_RD, span.num_tokens)
        loss, num_tokens = cross_entropy_sum(x_TD, self.head.weight, targets_BS.reshape(-1), self.head.vocabulary)
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
