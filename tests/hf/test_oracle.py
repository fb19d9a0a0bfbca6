"""Does transformers' word count where it can be had, and only there?"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from concertina.config import ModelConfig, count_parameters
from concertina.errors import CheckpointError
from concertina.hf.oracle import MOST_PARAMETERS, compare
from concertina.hf.passage import tokens_for
from concertina.model.families import model_config
from tests.hf.folders import source, tensors_in
from tests.model.hf_models import reference

pytestmark = pytest.mark.unit


@pytest.fixture
def case() -> tuple[ModelConfig, Tensor]:
    theirs = reference("mixtral")
    model = model_config(theirs.config.to_dict())
    with torch.no_grad():
        return model, theirs(input_ids=tokens_for(model)).logits


def test_the_same_is_the_same(case: tuple[ModelConfig, Tensor]) -> None:
    assert compare(source("mixtral"), *case) == "transformers 5.23.0"
    assert compare(source("mixtral"), case[0], case[1].to(torch.float64)) == "transformers 5.23.0"


def test_one_sequence_may_be_off_and_not_two(case: tuple[ModelConfig, Tensor]) -> None:
    model, logits = case
    logits[2] *= 1.1
    assert compare(source("mixtral"), model, logits)
    logits[0] *= 1.1
    with pytest.raises(CheckpointError, match=r"logits of 4 sequences are off by .* at most 0\.0001 is rounding"):
        compare(source("mixtral"), model, logits)
    with pytest.raises(CheckpointError, match="off by nan"):
        compare(source("mixtral"), model, logits * float("nan"))


def test_what_transformers_misses_is_no_success(tmp_path: Path, case: tuple[ModelConfig, Tensor]) -> None:
    shutil.copytree(source("mixtral"), tmp_path, dirs_exist_ok=True)
    tensors = tensors_in(tmp_path)
    tensors["model.layers.0.renamed"] = tensors.pop("model.layers.0.input_layernorm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"finds .*missing_keys.*input_layernorm"):
        compare(tmp_path, *case)


def test_large_models_are_not_asked(case: tuple[ModelConfig, Tensor]) -> None:
    model, logits = case
    assert compare(source("mixtral"), model, logits, count_parameters(model).total - 1) is None
    assert compare(Path("nowhere"), ModelConfig(hidden_size=4096), torch.empty(0)) is None
    assert count_parameters(ModelConfig(hidden_size=4096)).total > MOST_PARAMETERS
