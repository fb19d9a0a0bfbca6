"""How does a part of the model come to its parameters? The table of shards says which boxes; here they get memory.

What a part computes, and with which other lanes, it finds in its `Build`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from concertina.config import ModelConfig
from concertina.layout import Shard
from concertina.model.init import initialize
from concertina.parallel.context import Context
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes

__all__ = ["Build", "Part", "made"]


@dataclass(frozen=True)
class Build:
    """What every part needs to make itself: the shape, the precision, the place, the seed, this rank's boxes. Without
    `initial`, parameters are memory and nothing else, for weights that come from elsewhere."""

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    seed: int
    shards: dict[str, Shard]
    groups: Groups
    lanes: Lanes
    context: Context
    initial: bool = True


class Part(nn.Module):
    """A module whose parameters are boxes of named global tensors."""

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__()
        self.build = build
        self.prefix = prefix
        self.made: dict[str, str] = {}

    def _make(self, attribute: str) -> None:
        """Make parameter `attribute`: this rank's box of global tensor `<prefix>.<attribute>`, with its start values.

        Never more memory than the box and a bounded buffer.
        """
        shard = self.build.shards[f"{self.prefix}.{attribute}"]
        data = torch.empty(shard.box.shape, dtype=self.build.dtype, device=self.build.device)
        if not self.build.initial:
            pass
        elif shard.fill == "normal":
            deviation = self.build.model.initializer_range
            initialize(shard.name, shard.global_shape, shard.box, deviation, self.build.seed, data)
        else:
            data.fill_(1.0 if shard.fill == "ones" else 0.0)
        self.made[attribute] = shard.name
        self.register_parameter(attribute, nn.Parameter(data))


def made(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(global name, parameter) of every parameter below `root`."""
    for module in root.modules():
        if isinstance(module, Part):
            for attribute, name in module.made.items():
                yield name, module.get_parameter(attribute)
