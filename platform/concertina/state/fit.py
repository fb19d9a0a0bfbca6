"""Are a checkpoint's tensors those of a model? Answered from its manifest. Imports no torch."""

from __future__ import annotations

from concertina.config import ModelConfig
from concertina.layout import Layout, shards
from concertina.state.manifest import Manifest

__all__ = ["misfit"]


def misfit(manifest: Manifest, model: ModelConfig) -> str | None:
    """The first tensor that differs, with both shapes; None when all fit. Moments may be there or not."""
    wanted = {f"master/{name}": shard.global_shape for name, shard in shards(model, Layout(1), 0).items()}
    if model.has_router_bias:
        layers = (layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer))
        wanted |= {f"buffer/layers.{layer}.moe.bias": (model.num_experts,) for layer in layers}
    held = {key: shape for key, shape in manifest.shapes.items() if not key.startswith("exp_avg")}
    for key in sorted(wanted.keys() | held.keys()):
        if wanted.get(key) != held.get(key):
            there, here = (f"has shape {s[key]}" if key in s else "is not there" for s in (held, wanted))
            return f"{key.partition('/')[2]} {there} in the checkpoint, and {here} in the job"
    return None
