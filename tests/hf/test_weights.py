"""Are a model's weights found in a checkpoint, whole, rounded where asked, and is another model's refused?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from concertina.errors import ConfigError
from concertina.hf.weights import check_model, from_checkpoint, key_of, shapes_of
from concertina.layout import Layout
from concertina.state.checkpoint import write_part
from concertina.state.manifest import checkpoint_folder, commit, partial_folder, read_manifest
from tests.train.worlds import LATENT, seated_engine, tiny_job

pytestmark = pytest.mark.unit

JOB = tiny_job(model=LATENT, training__precision="float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, layout = tmp_path_factory.mktemp("run"), Layout(4, tp=2, ep=4)
    for rank in range(layout.world):
        engine = seated_engine(JOB, layout, rank)
        for bias in engine.decoder.router_biases().values():
            bias.copy_(torch.linspace(-1, 1, len(bias)) / 3)
        write_part(partial_folder(root, 2, 0), engine.state(), rank=rank, world=layout.world, generation=0)
    assert commit(root, 2, 0, {"step": 2}) is not None
    return checkpoint_folder(root, 2)


def test_names_and_shapes_are_those_of_the_checkpoint(checkpoint: Path) -> None:
    held = {key for key in read_manifest(checkpoint).shapes if not key.startswith("exp_avg")}
    assert held == {key_of(name) for name in shapes_of(JOB.model)}
    check_model(checkpoint, read_manifest(checkpoint), JOB.model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 16}, "has shape"),
        (
            {"router_bias": False},
            r"layers\.1\.moe\.bias has shape \(8,\) in the checkpoint, and is not there in the job",
        ),
        (
            {"shared_expert_intermediate_size": 0},
            r"shared\.w13 has shape .* in the checkpoint, and is not there in the job",
        ),
        ({"num_hidden_layers": 4}, r"layers\.3\.\S+ is not there in the checkpoint, and has shape"),
    ],
)
def test_another_model_is_refused(checkpoint: Path, changes: dict[str, object], said: str) -> None:
    other = tiny_job(model={**LATENT, **changes}).model
    with pytest.raises(ConfigError, match=said):
        check_model(checkpoint, read_manifest(checkpoint), other)


def test_weights_are_rounded_and_biases_are_not(checkpoint: Path) -> None:
    names = ("layers.1.moe.experts.w13", "layers.1.moe.bias", "layers.0.attention.kv_up", "norm.weight")
    full, rounded = ({name: torch.zeros(shapes_of(JOB.model)[name]) for name in names} for _ in range(2))
    from_checkpoint(checkpoint)(full)
    from_checkpoint(checkpoint, torch.bfloat16)(rounded)
    whole = dict(seated_engine(JOB, Layout(1), 0).decoder.named_tensors())
    for name in names:
        if name.endswith("bias"):
            assert torch.equal(full[name], torch.linspace(-1, 1, 8) / 3)
            assert torch.equal(rounded[name], full[name])
        else:
            assert torch.equal(full[name], whole[name])
            assert torch.equal(rounded[name], whole[name].to(torch.bfloat16).to(torch.float32))
    assert not torch.equal(rounded[names[0]], full[names[0]])
