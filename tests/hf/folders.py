"""What do tests of imports and exports begin from? A folder of transformers' for each case, and checkpoints re-cut."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from concertina.config import ModelConfig
from concertina.layout import Layout
from concertina.state.checkpoint import load_boxes, write_part
from concertina.state.manifest import checkpoint_folder, commit, partial_folder
from tests.model.hf_models import reference
from tests.train.worlds import seated_engine, tiny_job

__all__ = ["FAMILIES", "recut", "source", "tensors_in"]

FAMILIES = {
    "mixtral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3-dense-first-unnormalized": "qwen3_moe",
    "olmoe": "olmoe",
    "deepseek": "deepseek_v3",
}
"""One case of every family."""


@cache
def _made(case: str, dtype: torch.dtype, original: bool) -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="hf-")
    model = reference(case)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder.name, save_original_format=original)
    return folder


def source(case: str, dtype: torch.dtype = torch.float32, *, fused: bool = False) -> Path:
    """A folder as transformers saves it; made once. Biases of routers stay in fp32."""
    return Path(_made(case, dtype, not fused).name)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All of a folder's tensors, by name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def recut(checkpoint: Path, model: ModelConfig, layout: Layout, root: Path) -> Path:
    """The checkpoint's weights as ranks of `layout` hold them, who write a checkpoint of step 3 with their moments."""
    job = tiny_job(training__precision="float32").model_copy(update={"model": model})
    for rank in range(layout.world):
        engine = seated_engine(job, layout, rank)
        own = engine.state()
        load_boxes(checkpoint, {key: boxed for key, boxed in own.items() if not key.startswith("exp_avg")})
        write_part(partial_folder(root, 3, 0), own, rank=rank, world=layout.world, generation=0)
    facts = {"step": 3, "tokens": 5, "layout": layout.degrees, "precision": "float32"}
    assert commit(root, 3, 0, facts) is not None
    return checkpoint_folder(root, 3)
