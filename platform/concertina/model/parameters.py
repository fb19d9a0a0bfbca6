"""Which global tensor does a module's parameter hold a box of? Every part declares its own, with its start values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from concertina.config import ModelConfig
from concertina.layout.box import Box
from concertina.model.init import initialize

__all__ = ["Build", "ParameterInfo", "Part", "declared"]

Fill = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True)
class ParameterInfo:
    """A named global tensor and the box of it that this rank computes with.

    `expert`: gradients reduce over `edp`, not over `dp_cp`. `decay`: a matrix, subject to weight decay.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    expert: bool
    decay: bool

    @property
    def kind(self) -> Literal["dense", "expert"]:
        return "expert" if self.expert else "dense"


@dataclass(frozen=True)
class Build:
    """What every part needs to make itself: the shape, the precision, the place, the seed, this rank's experts."""

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    seed: int
    experts: tuple[int, int]
    """Half-open range of the global expert numbers held here."""


class Part(nn.Module):
    """A module whose parameters know their global names, shapes and boxes."""

    def __init__(self, build: Build, prefix: str) -> None:
        super().__init__()
        self.build = build
        self.prefix = prefix
        self.information: dict[str, ParameterInfo] = {}

    def _declare(self, attribute: str, shape: tuple[int, ...], fill: Fill = "normal", box: Box | None = None) -> None:
        """Make parameter `attribute`, the box `box` (absent: all) of global tensor `<prefix>.<attribute>`."""
        expert = box is not None
        local = box or Box.whole(shape)
        info = ParameterInfo(f"{self.prefix}.{attribute}", shape, local, expert, decay=fill == "normal")
        data = torch.empty(local.shape, dtype=self.build.dtype, device=self.build.device)
        if fill == "normal":
            initialize(info.name, shape, local, self.build.model.initializer_range, self.build.seed, data)
        else:
            data.fill_(1.0 if fill == "ones" else 0.0)
        self.information[attribute] = info
        self.register_parameter(attribute, nn.Parameter(data))


def declared(root: nn.Module) -> Iterator[tuple[ParameterInfo, Tensor]]:
    """Every declared parameter below `root`, in the order of declaration, which is the order of computation."""
    for module in root.modules():
        if isinstance(module, Part):
            for attribute, info in module.information.items():
                yield info, module.get_parameter(attribute)
