"""Does the whole model keep its promises: sums, names, boxes, shares of experts, micro-batches, precisions?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concertina.config import ModelConfig
from concertina.layout import Box, Layout
from concertina.model import Decoder
from concertina.parallel.groups import Groups
from tests.distributed import seat
from tests.model.errors import error

pytestmark = pytest.mark.unit

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=24,
    mlp_only_layers=(0,),
    num_experts=5,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=8,
    initializer_range=0.3,
)


def decoder(model: ModelConfig = MODEL, dtype: torch.dtype = torch.float64, groups: Groups | None = None) -> Decoder:
    return Decoder(model, dtype, torch.device("cpu"), groups or Groups.alone(), 7)


def batch(sequences: int = 4, length: int = 12) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 64, (sequences, length + 1), generator=torch.Generator().manual_seed(2))
    targets = tokens[:, 1:].clone()
    targets[0, 3:] = -100
    return tokens[:, :-1], targets


def objective_gradients(model: Decoder, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    model.zero_grad()
    for tokens, targets in parts:
        output = model(tokens, targets)
        (output.loss_sum + 0.1 * output.aux_sum + 0.01 * output.z_sum).backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_tensors() if tensor.grad is not None}


def test_micro_batches_add_up_to_the_batch() -> None:
    model, (tokens, targets) = decoder(), batch()
    together = objective_gradients(model, [(tokens, targets)])
    apart = objective_gradients(model, [(tokens[:1], targets[:1]), (tokens[1:], targets[1:])])
    assert together.keys() == model.shards.keys()
    assert max(error(apart[name], together[name]) for name in together) < 1e-12
    whole, first, rest = model(tokens, targets), model(tokens[:1], targets[:1]), model(tokens[1:], targets[1:])
    for name in ("loss_sum", "aux_sum", "z_sum", "num_tokens", "expert_counts_LE"):
        total = getattr(first, name) + getattr(rest, name)
        assert error(total.to(torch.float64), getattr(whole, name).to(torch.float64)) < 1e-13


def test_sums_and_counts() -> None:
    model, (tokens, targets) = decoder(), batch()
    output = model(tokens, targets)
    logits = model.logits(tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert error(output.loss_sum.detach(), expected.detach()) < 1e-13
    assert output.num_tokens.item() == 4 * 12 - 9
    assert output.expert_counts_LE.shape == (2, 5)
    assert output.expert_counts_LE.sum(1).tolist() == [4 * 12 * 2] * 2


def test_shares_of_experts_are_boxes_of_the_whole() -> None:
    """Five experts over three ranks: two, two and one, each with the numbers that one process starts with."""
    whole = dict(decoder().named_tensors())
    seen: dict[str, list[Box]] = {}
    for rank in range(3):
        part = decoder(groups=seat(Layout(3, ep=3), rank))
        for name, tensor in part.named_tensors():
            info = part.shards[name]
            assert tensor.shape == info.box.shape
            assert info.global_shape == whole[name].shape
            assert torch.equal(tensor, whole[name][info.box.slices()])
            assert info.expert == (".experts." in name)
            if info.expert:
                seen.setdefault(name, []).append(info.box)
    assert [box.shape[0] for box in seen["layers.1.moe.experts.w13"]] == [2, 2, 1]
    assert all(sum(box.size for box in boxes) == whole[name].numel() for name, boxes in seen.items())


def test_names_are_unique_and_decay_is_for_matrices() -> None:
    shards = decoder().shards
    assert len(shards) == len(list(decoder().parameters()))
    assert {name for name, shard in shards.items() if not shard.decay} == {name for name in shards if "norm" in name}


def test_tied_weight_is_one_parameter() -> None:
    model = decoder(MODEL.model_copy(update={"tie_word_embeddings": True}))
    assert "head.weight" not in model.shards
    gradients = objective_gradients(model, [batch()])
    assert gradients.keys() == model.shards.keys()


def test_no_layer_needs_experts() -> None:
    model = decoder(MODEL.model_copy(update={"mlp_only_layers": (0, 1, 2), "shared_expert_intermediate_size": 0}))
    output = model(*batch())
    assert output.expert_counts_LE.shape == (0, 5)
    assert output.aux_sum.item() == output.z_sum.item() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_precisions_agree(dtype: torch.dtype, tolerance: float) -> None:
    """One step's loss; bf16 may send a token elsewhere, so only loosely."""
    exact, narrow = decoder()(*batch()), decoder(dtype=dtype)(*batch())
    assert narrow.loss_sum.dtype == torch.float32
    assert error(narrow.loss_sum.detach().to(torch.float64), exact.loss_sum.detach()) < tolerance


def test_fp32_gradients_of_the_fast_kernels_equal_float64() -> None:
    model = MODEL.model_copy(update={"initializer_range": 0.1})  # with larger weights rounding itself comes to 1e-5
    exact = objective_gradients(decoder(model), [batch()])
    fast = objective_gradients(decoder(model, torch.float32), [batch()])
    assert max(error(fast[name].to(torch.float64), exact[name]) for name in exact) < 1e-5


def test_validation_under_no_grad_gives_the_same_sums() -> None:
    model = decoder()
    with torch.no_grad():
        quiet = model(*batch())
    assert torch.equal(quiet.loss_sum, model(*batch()).loss_sum.detach())
