"""Is the first tensor named that a checkpoint and a model do not have alike, and are moments no matter?"""

from __future__ import annotations

import pytest

from concertina.config import ModelConfig
from concertina.layout import Layout, shards
from concertina.state.fit import misfit
from concertina.state.manifest import Manifest
from tests.train.worlds import tiny_job

pytestmark = pytest.mark.unit

MODEL = tiny_job(model__router_bias_update_rate=0.01).model
BIASES = {f"buffer/layers.{layer}.moe.bias": (8,) for layer in (1, 2)}


def manifest(model: ModelConfig, kinds: tuple[str, ...] = ("master",), **more: tuple[int, ...]) -> Manifest:
    """Of a checkpoint that has these kinds of every tensor."""
    shapes = {name: shard.global_shape for name, shard in shards(model, Layout(1), 0).items()}
    held = {f"{kind}/{name}": shape for kind in kinds for name, shape in shapes.items()}
    return Manifest(format=1, step=0, world=1, generation=0, files={}, shapes={**held, **more}, facts={})


def test_all_that_fits() -> None:
    assert misfit(manifest(MODEL, **BIASES), MODEL) is None
    assert misfit(manifest(MODEL, ("master", "exp_avg", "exp_avg_sq"), **BIASES), MODEL) is None
    plain = MODEL.model_copy(update={"router_bias_update_rate": 0.0})
    assert misfit(manifest(plain), plain) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"vocab_size": 98},
            "embedding.weight has shape (97, 32) in the checkpoint, and has shape (98, 32) in the job",
        ),
        ({"num_hidden_layers": 4}, "layers.3.moe.bias is not there in the checkpoint, and has shape (8,) in the job"),
        ({"router_bias_update_rate": 0.0}, "layers.1.moe.bias has shape (8,) in the checkpoint, and is not there in"),
        ({"num_experts": 16}, "layers.1.moe.bias has shape (8,) in the checkpoint, and has shape (16,) in the job"),
        ({"attention_bias": True}, "is not there in the checkpoint, and has shape"),
    ],
)
def test_the_first_that_differs_is_named(change: dict[str, object], said: str) -> None:
    found = misfit(manifest(MODEL, **BIASES), MODEL.model_copy(update=change))
    assert found is not None
    assert said in found


def test_a_bias_that_is_missing_is_named() -> None:
    assert misfit(manifest(MODEL), MODEL) == (
        "layers.1.moe.bias is not there in the checkpoint, and has shape (8,) in the job"
    )
