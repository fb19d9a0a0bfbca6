"""Where in a checkpoint are a model's weights? Master weights by parameter, and the biases of routers."""

from __future__ import annotations

from pathlib import Path

import torch

from concertina.config import ModelConfig
from concertina.errors import ConfigError
from concertina.hf.passage import Fill, Tensors
from concertina.layout import Box, Layout, shards
from concertina.state.boxed import BoxedTensor
from concertina.state.checkpoint import load_boxes
from concertina.state.fit import misfit
from concertina.state.manifest import Manifest

__all__ = ["check_model", "from_checkpoint", "is_bias", "key_of", "shapes_of"]

_CHUNK_ELEMENTS = 1 << 16


def is_bias(name: str) -> bool:
    """Whether it is a router's, which no optimizer owns."""
    return name.endswith(".moe.bias")


def key_of(name: str) -> str:
    """A weight's name in a checkpoint."""
    return f"{'buffer' if is_bias(name) else 'master'}/{name}"


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model: global name to shape."""
    found = {name: shard.global_shape for name, shard in shards(model, Layout(1), 0).items()}
    if model.has_router_bias:
        layers = (layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer))
        found |= {f"layers.{layer}.moe.bias": (model.num_experts,) for layer in layers}
    return found


def check_model(folder: Path, manifest: Manifest, model: ModelConfig) -> None:
    """Raises ConfigError unless the checkpoint's weights are those of the model."""
    found = misfit(manifest, model)
    if found is not None:
        raise ConfigError(f"{folder} is of another model: {found}")


def from_checkpoint(folder: Path, rounded_to: torch.dtype | None = None) -> Fill:
    """Reads weights of a checkpoint of any layout; rounded as they will be in an export, but for biases."""

    def fill(tensors: Tensors) -> None:
        live = {name: tensor.detach() for name, tensor in tensors.items()}
        load_boxes(folder, {key_of(name): _whole(tensor) for name, tensor in live.items()})
        for name, tensor in live.items():
            if rounded_to is not None and not is_bias(name):
                for chunk in tensor.view(-1).split(_CHUNK_ELEMENTS):
                    chunk.copy_(chunk.to(rounded_to))

    return fill


def _whole(tensor: torch.Tensor) -> BoxedTensor:
    shape = tuple(tensor.shape)
    return BoxedTensor(tensor, Box.whole(shape), shape)
