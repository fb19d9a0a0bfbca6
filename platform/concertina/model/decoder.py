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

from concertina.config import LayoutConfig, ModelConfig
from concertina.layout import shards
from concertina.model.block import Block
from concertina.model.choice import moved
from concertina.model.loss import IGNORED, Vocabulary, cross_entropy_sum
from concertina.model.norm import ResidualNorm
from concertina.model.parameters import Build, Part, made
from concertina.model.rope import Rotation, rotation
from concertina.model.router import Router, Routing
from concertina.model.sight import Sight
from concertina.model.span import Place, Span
from concertina.parallel.capacity import Capacity
from concertina.parallel.context import Context
from concertina.parallel.dispatch import Dispatcher
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes

__all__ = ["Batch", "Decoder", "ModelOutput"]


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


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its way through the pieces of the model: whole sequences of tokens and targets, which tokens are
    here, and what they see."""

    tokens_BS: Tensor
    targets_BS: Tensor
    span: Span
    sight: Sight


class Decoder(nn.Module):
    """One rank's decoder: its boxes of every parameter of its pipeline stage, by the layout of `groups`; with start
    values if `initial`. What stands at the ends of the model is None on the stages between."""

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        groups: Groups,
        seed: int,
        how: LayoutConfig | None = None,
        initial: bool = True,
    ) -> None:
        """Of `how` (absent: the defaults) only what is no degree is read."""
        super().__init__()
        how = how or LayoutConfig()
        self.model, self.layout = model, groups.layout
        self.shards = shards(model, groups.layout, groups.rank)
        lanes, context = Lanes(groups["tp"], how.sequence_parallel), Context(groups["cp"], how.context_exchange)
        build = Build(model, dtype, torch.device(device), seed, self.shards, groups, lanes, context, initial)
        self.build = build
        self.capacity = Capacity(model, groups, lanes) if model.capacity.factor is not None else None
        dispatcher = Dispatcher(model.num_experts, groups)
        self.pieces = self.layout.pieces_of(groups.rank)
        first, last = 0 in self.pieces, self.layout.pieces - 1 in self.pieces
        self.embedding = Embedding(build, "embedding") if first else None
        numbers = self.layout.layers_of(model.num_hidden_layers, groups.rank)
        self.layers = nn.ModuleList(Block(build, layer, dispatcher) for layer in numbers)
        self.by_number = dict(zip(numbers, self.layers, strict=True))
        self.norm = ResidualNorm(build, "norm") if last else None
        self.head = self._make_head() if last else None
        self._biases = self._all_biases()

    def _make_head(self) -> Head:
        if not self.model.tie_word_embeddings:
            return Head(self.build, "head", None)
        # Where the embedding is on another stage the head makes its own copy, of the same parameter.
        return Head(self.build, "head" if self.embedding is not None else "embedding", self.embedding)

    def _all_biases(self) -> dict[str, Tensor]:
        """Of every router of the whole model: each rank moves them all, so that none is lost with its stage."""
        if not self.model.has_router_bias:
            return {}
        own = {router.prefix: router.bias for router in self.routers()}
        found = {}
        for layer in self.moe_layers:
            bias = own.get(f"layers.{layer}.moe")
            wide = torch.promote_types(self.build.dtype, torch.float32)
            start = torch.zeros(self.model.num_experts, dtype=wide, device=self.build.device)
            found[f"layers.{layer}.moe.bias"] = start if bias is None else bias
        return found

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the model's layers with experts."""
        return [layer for layer in range(self.model.num_hidden_layers) if self.model.is_moe_layer(layer)]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, parameter) in the order of `shards`, which is that of computation."""
        found = dict(made(self))
        assert found.keys() == self.shards.keys()
        return ((name, found[name]) for name in self.shards)

    def names_in(self, piece: int) -> list[str]:
        """The parameters of one piece here, by global name."""
        layers = self.layout.piece_layers(self.model.num_hidden_layers, piece)
        parts: list[nn.Module | None] = [self.by_number[number] for number in layers]
        if piece == 0:
            parts.append(self.embedding)
        if piece == self.layout.pieces - 1:
            parts += [self.norm, self.head, self.embedding if self.model.tie_word_embeddings else None]
        return [name for part in parts if part is not None for name, _ in made(part)]

    def routers(self) -> Iterator[Router]:
        """The routers of the layers with experts that are here."""
        return (module for module in self.modules() if isinstance(module, Router))

    def router_biases(self) -> dict[str, Tensor]:
        """Global name -> live bias [E] of every router of the model that has one, the same on every rank."""
        return self._biases

    def balance(self, expert_counts_LE: Tensor) -> None:
        """After an applied step: move the routers' biases by the tokens that its global batch gave each expert."""
        if not self._biases:
            return
        rate = self.model.router_bias_update_rate
        for bias, counts_E in zip(self._biases.values(), expert_counts_LE, strict=True):
            bias.copy_(moved(bias, counts_E.to(bias.device), rate))

    def begin(
        self, tokens_BS: Tensor, targets_BS: Tensor, place: Place | None = None, starts_BS: Tensor | None = None
    ) -> Batch:
        """A micro-batch of whole sequences. Tokens and targets: int64; a target of -100 is not predicted.

        `place` is for training: without it nothing is random and no token is dropped. `starts_BS`: where the document
        of each position starts (int64, on the CPU), for tokens that see their own document only.
        """
        span = self.span(tokens_BS.shape[1], (targets_BS != IGNORED).sum(1), place)
        return Batch(tokens_BS, targets_BS, span, self.sight(span, starts_BS))

    def span(self, length: int, tokens_B: Tensor, place: Place | None = None) -> Span:
        """Which tokens of a micro-batch of sequences of `length` this lane holds between products."""
        num_sequences = len(tokens_B)
        positions = self.build.context.positions(length, tokens_B.device)
        start, stop = self.build.lanes.share(num_sequences * len(positions))
        quota = None
        if self.capacity is not None and place is not None:
            quota = self.capacity.quota(num_sequences, length, tokens_B.device, place.peers)
        return Span(length, positions, start, stop, tokens_B, place, quota)

    def num_rows(self, num_sequences: int, length: int) -> int:
        """Rows of x [R, D] on this lane, of a micro-batch of so many sequences."""
        start, stop = self.build.lanes.share(num_sequences * self.build.context.size(length))
        return stop - start

    def sight(self, span: Span, starts_BS: Tensor | None = None) -> Sight:
        """What tokens see of their sequences."""
        return Sight(span.length, self.build.context, self.rotation(span.positions_S), starts_BS)

    def rotation(self, positions_S: Tensor) -> Rotation:
        """How far queries and keys of these positions are turned."""
        model = self.model
        return rotation(positions_S, model.width_of_rotation, model.rope_theta, self.build.dtype, model.rope_scaling)

    def advance(self, piece: int, batch: Batch, x_RD: Tensor | None = None) -> tuple[Tensor, dict[int, Routing]]:
        """Through the layers of one piece here, from what the piece before it gave (the first one: from tokens): the
        next one's x [R, D], normed after the last layer; and the routing of each layer with experts, by its number. All
        ranks of the stage must call it."""
        if x_RD is None:
            assert self.embedding is not None
            tokens_T = self.build.context.take(batch.tokens_BS).reshape(-1)
            x_RD = self.build.lanes.leave(self.embedding(tokens_T))
        routings = {}
        for number in self.layout.piece_layers(self.model.num_hidden_layers, piece):
            x_RD, routing = self.by_number[number](x_RD, batch.span, batch.sight)
            if routing is not None:
                routings[number] = routing
        if self.norm is not None and piece == self.pieces[-1]:
            x_RD = self.norm(x_RD)
        assert x_RD is not None
        return x_RD, routings

    def conclude(self, piece: int, batch: Batch, x_RD: Tensor, routings: dict[int, Routing]) -> ModelOutput:
        """The sums of what `advance` computed. All lanes of tp must call it."""
        nothing = x_RD.new_zeros((), dtype=torch.promote_types(x_RD.dtype, torch.float32))
        loss, num_tokens = nothing, torch.zeros((), dtype=torch.int64, device=x_RD.device)
        if self.head is not None and piece == self.pieces[-1]:
            loss, num_tokens = self._loss(batch, x_RD)
        counts_LE = num_tokens.new_zeros(len(self.moe_layers), self.model.num_experts)
        for row, number in enumerate(self.moe_layers):
            if number in routings:
                counts_LE[row] = routings[number].counts_E
        return ModelOutput(
            loss,
            sum((routing.aux_sum for routing in routings.values()), nothing),
            sum((routing.z_sum for routing in routings.values()), nothing),
            num_tokens,
            counts_LE,
            self._num_dropped(list(routings.values()), num_tokens),
        )

    def _loss(self, batch: Batch, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        assert self.head is not None
        lanes = self.build.lanes
        x_TD = lanes.enter(x_RD, batch.span.num_tokens)
        loss, num_tokens = self.head(x_TD, self.build.context.take(batch.targets_BS).reshape(-1))
        return (loss, num_tokens) if lanes.speaks else (loss - loss.detach(), torch.zeros_like(num_tokens))

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor, place: Place | None = None, starts_BS: Tensor | None = None
    ) -> ModelOutput:
        """Of a model that is whole here: `begin`, `advance` and `conclude`. All ranks must call it, those of cp and tp
        with the same sequences."""
        assert self.layout.pieces == 1, "a pipeline computes piece by piece"
        batch = self.begin(tokens_BS, targets_BS, place, starts_BS)
        return self.conclude(0, batch, *self.advance(0, batch))

    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, V] in the model's dtype; for oracles and small batches, training never makes them all. Dropless.
        With tp, a lane has its rows of the vocabulary; with cp, a rank its positions; not for pipelines."""
        assert self.head is not None
        batch = self.begin(tokens_BS, torch.zeros_like(tokens_BS))
        x_RD, _ = self.advance(0, batch)
        x_TD = self.build.lanes.enter(x_RD, batch.span.num_tokens)
        return F.linear(x_TD, self.head.weight).view(len(tokens_BS), len(batch.span.positions_S), -1)

    def _num_dropped(self, routings: Sequence[Routing], like: Tensor) -> Tensor:
        """Choices without a row, of the tokens here; lanes with the same tokens count them once."""
        lanes, kept = self.build.lanes, [routing.kept_RK for routing in routings if routing.kept_RK is not None]
        if not kept or (lanes.replicated and not lanes.speaks):
            return torch.zeros_like(like)
        return (~torch.stack(kept)).sum()
