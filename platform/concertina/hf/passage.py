"""What does a model say to a few tokens, and which weights does it say it with? One pass over its layers, of which one
is in memory at a time.

Two passes over the same weights, by the same code on the same machine, agree to the bit: what was written is compared
with what is read back, tensor by tensor (all of it, also what no token reaches) and by logits.
Shapes: B sequences, S positions, T = B * S tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from concertina.config import ModelConfig
from concertina.errors import CheckpointError
from concertina.layout import Layout, shards
from concertina.model.block import Block
from concertina.model.decoder import Embedding
from concertina.model.norm import ResidualNorm
from concertina.model.parameters import Build, Part, made
from concertina.model.rope import rotation
from concertina.model.router import Router
from concertina.model.sight import Sight
from concertina.model.span import Span
from concertina.parallel.context import Context
from concertina.parallel.dispatch import Dispatcher
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes

__all__ = ["Fill", "Passage", "Tensors", "agree", "pass_through", "tokens_for"]

Tensors = dict[str, Tensor]
"""Global name to whole tensor; parameters, and the routers' biases."""

Fill = Callable[[Tensors], None]
"""Writes the weights of these names into these tensors."""

P = TypeVar("P", bound=Part)

_SEQUENCES, _POSITIONS = 4, 8


@dataclass(frozen=True)
class Passage:
    """Digest of every tensor, and logits [B, S, V]."""

    digests: dict[str, bytes]
    logits: Tensor


def tokens_for(model: ModelConfig) -> Tensor:
    """A few tokens, always the same: int64 [4, up to 8]."""
    length = min(_POSITIONS, model.max_position_embeddings)
    numbers = torch.arange(_SEQUENCES * length, dtype=torch.int64)
    return ((numbers * 7919 + 13) % model.vocab_size).view(_SEQUENCES, length)


@torch.no_grad()
def pass_through(
    model: ModelConfig, dtype: torch.dtype, fill: Fill, visit: Callable[[Tensors], None] = lambda _: None
) -> Passage:
    """Forward of `tokens_for(model)`, dropless. Each layer's weights are made, filled, shown to `visit` and let go, in
    the order of computation; so are embedding, last norm and head."""
    return _Pass(model, dtype, fill, visit).run()


class _Pass:
    def __init__(self, model: ModelConfig, dtype: torch.dtype, fill: Fill, visit: Callable[[Tensors], None]) -> None:
        groups, boxes = Groups.alone(), shards(model, Layout(1), 0)
        device = torch.device("cpu")
        self.model, self.fill, self.visit = model, fill, visit
        ways = Lanes(groups["tp"]), Context(groups["cp"])
        self.build = Build(model, dtype, device, 0, boxes, groups, *ways, initial=False)
        self.dispatcher = Dispatcher(model.num_experts, groups)
        self.digests: dict[str, bytes] = {}

    def run(self) -> Passage:
        model, tokens_BS = self.model, tokens_for(self.model)
        sequences, length = tokens_BS.shape
        positions = torch.arange(length)
        span = Span(length, positions, 0, tokens_BS.numel(), torch.ones_like(tokens_BS[:, 0]))
        turn = rotation(positions, model.width_of_rotation, model.rope_theta, self.build.dtype, model.rope_scaling)
        sight = Sight(length, self.build.context, turn)
        x_TD = self._filled(Embedding(self.build, "embedding"))(tokens_BS.flatten())
        for layer in range(model.num_hidden_layers):
            x_TD, _ = self._filled(Block(self.build, layer, self.dispatcher))(x_TD, span, sight)
        x_TD = self._filled(ResidualNorm(self.build, "norm"))(x_TD)
        logits_TV = F.linear(x_TD, self._head().weight)
        return Passage(self.digests, logits_TV.view(sequences, length, -1))

    def _head(self) -> Embedding:
        """Rows of the vocabulary, which are the embedding's once more where the two are tied."""
        if not self.model.tie_word_embeddings:
            return self._filled(Embedding(self.build, "head"))
        again = Embedding(self.build, "embedding")
        self.fill(dict(made(again)))
        return again

    def _filled(self, part: P) -> P:
        tensors = dict(made(part))
        for module in part.modules():
            if isinstance(module, Router) and module.bias is not None:
                tensors[f"{module.prefix}.bias"] = module.bias
        self.fill(tensors)
        for name, tensor in tensors.items():
            content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
            self.digests[name] = hashlib.blake2b(content.data, digest_size=16).digest()
        self.visit(tensors)
        return part


def agree(written: Passage, read: Passage, where: str) -> None:
    """Raises CheckpointError unless both passes met the same weights, bit for bit, and the same logits."""
    unlike = [name for name, digest in written.digests.items() if read.digests.get(name) != digest]
    if unlike or len(written.digests) != len(read.digests):
        text = f"{len(unlike)} of {len(written.digests)} tensors read back differ from what was written"
        first = f", the first is {unlike[0]}" if unlike else ""
        raise CheckpointError(f"{where}: {text}{first}", tensors=unlike)
    if not torch.equal(written.logits, read.logits):
        worst = (written.logits - read.logits).abs().max().item()
        raise CheckpointError(f"{where}: logits read back differ by {worst:.3g}, weights do not", error=worst)
