"""Are the operations of a token those of the published tables, and those that torch counts in our own decoder?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contestants import SHAPE
from concertina.config import load_job
from concertina.model import Decoder
from concertina.parallel.groups import Groups
from concertina.planner.flops import flops_per_token
from tests.train.worlds import LATENT, tiny_job

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("job", "published_gflop"), [("mixtral-8x22b", 250.6), ("qwen2-57b-a14b", 87.2)])
def test_the_convention_of_the_folding_paper(job: str, published_gflop: float) -> None:
    """arXiv 2504.14960, section 3.5 at 4,096 tokens: what MFU was computed with. Half the attention, or no logits,
    would be 1 % and more away."""
    model = load_job(f"jobs/{job}.yaml").model
    assert flops_per_token(model, 4096, causal=False) / 1e9 == pytest.approx(published_gflop, abs=0.1)
    attention = 12 * 4096 * model.num_hidden_layers * model.num_attention_heads * model.width_of_head
    assert flops_per_token(model, 4096) == flops_per_token(model, 4096, causal=False) - attention // 2


def _in_place_product(_: torch.Size, left: torch.Size, right: torch.Size, **rest: object) -> int:
    """`x.addmm_(left, right)`, which torch leaves out."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_expert_gate": True},
        {"shared_expert_intermediate_size": 0, "mlp_only_layers": ()},
        {"head_dim": 24, "tie_word_embeddings": True},
        LATENT,
        {**LATENT, "q_lora_rank": 0},
    ],
)
def test_torch_counts_the_same(changes: dict[str, Any]) -> None:
    """Sequences of one token, where there is nothing that a mask could leave out."""
    job = tiny_job(model=changes)
    torch.set_num_threads(1)  # tensors this small only lose by threads
    decoder = Decoder(job.model, torch.float64, torch.device("cpu"), Groups.alone(), 0)
    tokens = torch.arange(16).view(16, 1)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place_product}) as counter:
        output = decoder(tokens, tokens + 1)
        (output.loss_sum + output.aux_sum + output.z_sum).backward()
    assert counter.get_total_flops() == 16 * flops_per_token(job.model, 1, causal=False)


def test_the_throughput_benchmark_divides_by_it() -> None:
    """As its results did before they were computed here."""
    assert SHAPE.flops_per_token == 31_506_432
