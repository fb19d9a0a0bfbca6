"""Do we compute what Hugging Face's models compute? Same weights, same tokens: same logits, same gradients (fp32)."""

from __future__ import annotations

import pytest
import torch

from concertina.model import Decoder
from concertina.model.families import export_tensors, import_tensors, model_config, pieces
from concertina.model.router import whole_batch_balance
from concertina.parallel.groups import Groups
from tests.model.errors import error
from tests.model.hf_models import CASES, reference

pytestmark = pytest.mark.unit

TOLERANCE = 1e-5


def held(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Parameters, and what no gradient moves."""
    return {**dict(decoder.named_tensors()), **decoder.router_biases()}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_all_gradients_equal_transformers(case: str) -> None:
    theirs = reference(case)
    config = theirs.config.to_dict()
    model = model_config(config)
    ours = Decoder(model, torch.float32, torch.device("cpu"), Groups.alone(), 0)
    table = list(pieces(config["model_type"], model, fused=True))
    import_tensors(table, theirs.state_dict(), held(ours))
    tokens = torch.randint(0, model.vocab_size, (3, 33), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    logits = theirs(input_ids=inputs).logits
    assert error(ours.logits(inputs), logits) <= TOLERANCE
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    output = ours(inputs, targets)
    assert output.num_tokens.item() == targets.numel()
    output.loss_sum.backward()

    gradients = {name: tensor.grad for name, tensor in ours.named_tensors()}
    exported = export_tensors([piece for piece in table if piece.ours in gradients], gradients)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert exported.keys() == expected.keys()
    errors = {name: error(exported[name], expected[name]) for name in expected}
    assert max(errors.values()) <= TOLERANCE, {name: value for name, value in errors.items() if value > TOLERANCE}


@pytest.mark.parametrize("case", ["mixtral", "qwen3", "olmoe", "qwen2", "deepseek", "deepseek-without-query-latent"])
def test_import_of_an_export_changes_nothing(case: str) -> None:
    config = reference(case).config.to_dict()
    model = model_config(config)
    ours = Decoder(model, torch.float32, torch.device("cpu"), Groups.alone(), 0)
    named = {name: tensor.detach() for name, tensor in held(ours).items()}
    for fused in (False, True):
        table = list(pieces(config["model_type"], model, fused))
        again = {name: torch.full_like(tensor, float("nan")) for name, tensor in named.items()}
        import_tensors(table, export_tensors(table, named), again)
        assert all(torch.equal(again[name], named[name]) for name in named)


def test_whole_batch_balance_is_transformers_own() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [torch.randn(20, 6, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
    ours = whole_batch_balance(layers, 2)
    theirs = load_balancing_loss_func(tuple(layers), 6, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours_grads, theirs_grads = torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers)
    assert max(error(a, b) for a, b in zip(ours_grads, theirs_grads, strict=True)) <= TOLERANCE
