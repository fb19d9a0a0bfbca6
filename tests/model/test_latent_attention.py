"""Does latent attention compute its definition: narrower values, one rotated key for all heads, rows side by side?"""

from __future__ import annotations

import math

import pytest
import torch

from concertina.config import ModelConfig
from concertina.layout import Layout, shards
from concertina.model.latent_attention import LatentAttention, attend_unequal
from concertina.model.parameters import Build
from concertina.model.rope import rotate, rotation, side_by_side
from concertina.model.sight import Sight
from concertina.parallel.context import Context
from concertina.parallel.groups import Groups
from concertina.parallel.lanes import Lanes
from tests.model.errors import error

pytestmark = pytest.mark.unit

MODEL = ModelConfig(
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=3,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    initializer_range=0.3,
)


def attention(model: ModelConfig) -> LatentAttention:
    groups, lanes = Groups.alone(), Lanes(Groups.alone()["tp"])
    boxes = shards(model, Layout(1), 0)
    build = Build(model, torch.float64, torch.device("cpu"), 3, boxes, groups, lanes, Context(groups["cp"]))
    return LatentAttention(build, "layers.0.attention")


def written_out(part: LatentAttention, x_TD: torch.Tensor, length: int) -> torch.Tensor:
    """One sequence, one head after the other."""
    model, outputs = part.build.model, []
    turn = rotation(torch.arange(length), model.qk_rope_head_dim, model.rope_theta, torch.float64)
    down = x_TD @ part.latents.kv_down.t()
    latent, key = down.split([model.kv_lora_rank, model.qk_rope_head_dim], -1)
    latent = latent * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for head in range(model.num_attention_heads):
        q_plain, q_rope = (x_TD @ part.q[head].t()).split([model.qk_nope_head_dim, model.qk_rope_head_dim], -1)
        k_plain, v = (latent @ part.kv_up[head].t()).split([model.qk_nope_head_dim, model.v_head_dim], -1)
        turned_q, turned_k = (rotate(rope.unsqueeze(0), turn)[0] for rope in (q_rope, key))
        scores = (q_plain @ k_plain.t() + turned_q @ turned_k.t()) / math.sqrt(model.width_of_head)
        probabilities = scores.masked_fill(future, float("-inf")).softmax(-1)
        outputs.append(probabilities @ v @ part.output[:, head].t())
    return torch.stack(outputs).sum(0)


def test_it_is_the_definition() -> None:
    part = attention(MODEL)
    x_TD = torch.randn(2 * 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = rotation(torch.arange(7), 4, MODEL.rope_theta, torch.float64)
    sight = Sight(7, part.build.context, turn)
    found = part(part.enter(x_TD, 14), 2, sight)
    expected = torch.cat([written_out(part, x_TD[:7], 7), written_out(part, x_TD[7:], 7)])
    assert error(found, expected) < 1e-12
    others = x_TD.clone()
    others[6] += 1.0  # nobody before it, and nobody of the other sequence, may see it
    again = part(part.enter(others, 14), 2, sight)
    assert torch.equal(again[:6], found[:6])
    assert torch.equal(again[7:], found[7:])
    assert not torch.equal(again[6], found[6])


def test_values_may_be_wider_than_keys_too() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in ((1, 5, 2, 3, 4), (1, 5, 2, 4), (1, 5, 2, 9)))
    out = attend_unequal(q, k, v)
    assert out.shape == (1, 5, 2, 3, 9)
    for head in range(3):
        torch.testing.assert_close(out[:, 0, :, head], v[:, 0])
        torch.testing.assert_close(out[:, :, :, head : head + 1], attend_unequal(q[:, :, :, head : head + 1], k, v))


def test_pairs_side_by_side_are_the_halves_of_permuted_rows() -> None:
    x = torch.arange(8.0)
    assert side_by_side(x).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    halves, pairs = attention(MODEL), attention(MODEL.model_copy(update={"rope_interleave": True}))
    back = [0, 2, 1, 3]  # where each of four rows stands among pairs
    with torch.no_grad():
        pairs.q[:, 6:] = halves.q[:, 6:][:, back]
        pairs.latents.kv_down[10:] = halves.latents.kv_down[10:][back]
    x_TD = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    turn = rotation(torch.arange(7), 4, MODEL.rope_theta, torch.float64)
    sight = Sight(7, halves.build.context, turn)
    expected = halves(halves.enter(x_TD, 7), 1, sight)
    assert error(pairs(pairs.enter(x_TD, 7), 1, sight), expected) < 1e-14
