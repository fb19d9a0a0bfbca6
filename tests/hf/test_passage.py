"""Does a pass over single layers say what the whole decoder says, and is every kind of difference between two seen?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concertina.config import ModelConfig
from concertina.errors import CheckpointError
from concertina.hf.passage import Tensors, agree, pass_through, tokens_for
from concertina.hf.weights import shapes_of
from concertina.model import Decoder
from concertina.parallel.groups import Groups
from tests.train.worlds import LATENT, tiny_job

pytestmark = pytest.mark.unit

MODELS = {
    "plain": tiny_job().model,
    "tied": tiny_job(model={"tie_word_embeddings": True}).model,
    "latent": tiny_job(model=LATENT).model,
}


def decoder(model: ModelConfig) -> tuple[Decoder, Tensors]:
    """With biases that are not zero."""
    made = Decoder(model, torch.float64, torch.device("cpu"), Groups.alone(), 5)
    for bias in made.router_biases().values():
        bias.copy_(torch.linspace(-0.2, 0.2, len(bias)))
    return made, {**dict(made.named_tensors()), **made.router_biases()}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_decoder(name: str) -> None:
    model = MODELS[name]
    whole, weights = decoder(model)
    seen: list[str] = []

    def fill(tensors: Tensors) -> None:
        for key, tensor in tensors.items():
            tensor.copy_(weights[key])

    passed = pass_through(model, torch.float64, fill, lambda tensors: seen.extend(tensors))
    assert torch.equal(passed.logits, whole.logits(tokens_for(model)))
    assert sorted(seen) == sorted(shapes_of(model)), "each once"
    assert passed.digests.keys() == shapes_of(model).keys()


def test_tokens_fit_the_model_and_are_not_all_alike() -> None:
    tokens = tokens_for(ModelConfig(max_position_embeddings=5))
    assert tokens.shape == (4, 5)
    assert len(tokens.unique()) == 20
    assert int(tokens_for(ModelConfig(vocab_size=7)).max()) < 7


def test_differences_are_named() -> None:
    model = MODELS["plain"]
    _, weights = decoder(model)

    def fill(tensors: Tensors) -> None:
        for key, tensor in tensors.items():
            tensor.copy_(weights[key])

    one = pass_through(model, torch.float64, fill)
    agree(one, pass_through(model, torch.float64, fill), "here")
    with torch.no_grad():
        unreached = weights["layers.2.moe.experts.w2"]
        unreached[7, 0, 0] += 1e-9
    with pytest.raises(CheckpointError, match=r"here: 1 of \d+ tensors .* the first is layers\.2\.moe\.experts\.w2"):
        agree(one, pass_through(model, torch.float64, fill), "here")
    fewer = replace(one, digests=dict(list(one.digests.items())[1:]))
    for pair in ((one, fewer), (fewer, one)):
        with pytest.raises(CheckpointError, match="differ from what was written"):
            agree(*pair, "here")
    with pytest.raises(CheckpointError, match=r"logits read back differ by 0\.5, weights do not"):
        agree(one, replace(one, logits=one.logits + 0.5), "here")
