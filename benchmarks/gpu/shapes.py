"""Which blocks are measured, on how many tokens, and how many of them fit?

Shapes are those of the job files. FLOPs are of the blocks alone: no embedding, no head, causal attention counted half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from concertina.config import ModelConfig, load_job
from concertina.layout import Layout, shards
from concertina.planner.activations import layer_bytes
from concertina.planner.flops import flops_per_token
from concertina.planner.traffic import Sender

__all__ = ["SHAPES", "Work", "layers_that_fit", "with_layers", "work_of"]

JOBS = Path(__file__).resolve().parent.parent.parent / "jobs"
SHAPES = {
    "Mixtral 8x22B": ("mixtral-8x22b", 0.60),
    "Qwen2-57B-A14B": ("qwen2-57b-a14b", 0.50),
    "Qwen3-30B-A3B": ("qwen3-30b-a3b", 0.50),
}
"""Job file, and the goal: MFU with real routing."""

_STATE_BYTES = 18
"""A parameter in bfloat16: weight 2, gradient 4, master weight and moments 12."""
_SHARE = 0.85
"""Of the free memory that may be planned with: the rest is for products, their gradients and what is torn."""
_TOY = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
}


@dataclass(frozen=True)
class Work:
    """What everyone computes in a step: `layers` blocks on `micro_batches` times `sequences` of `length` tokens."""

    name: str
    model: ModelConfig
    goal: float | None
    layers: int
    sequences: int
    length: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.sequences * self.length

    @property
    def flops(self) -> int:
        """Of one step."""
        head = 6 * self.model.vocab_size * self.model.hidden_size
        return (flops_per_token(self.stack, self.length) - head) * self.tokens * self.micro_batches

    @property
    def stack(self) -> ModelConfig:
        """The model with as many layers."""
        return self.model.model_copy(update={"num_hidden_layers": self.layers})

    @property
    def parameters(self) -> int:
        """Of one block."""
        table = shards(self.model, Layout(1), 0, layers=[0])
        return sum(shard.box.size for name, shard in table.items() if name.startswith("layers."))


def work_of(name: str, sequences: int, length: int, micro_batches: int, toy: bool) -> Work:
    """One layer of it. `toy`: narrow, short, without a goal, so that a CPU can walk the same way."""
    file, goal = SHAPES[name]
    model = load_job(JOBS / f"{file}.yaml").model
    if not toy:
        return Work(name, model, goal, 1, sequences, length, micro_batches)
    update = dict(_TOY)
    if model.shared_expert_intermediate_size:
        update["shared_expert_intermediate_size"] = 96
    update |= {"num_experts": min(8, model.num_experts), "num_experts_per_tok": min(4, model.num_experts_per_tok)}
    return Work(f"toy {name}", model.model_copy(update=update), None, 1, 2, 32, 2)


def layers_that_fit(work: Work, free_bytes: int, most: int, recomputed: Sequence[str] = ()) -> int:
    """By the planner's count; at least one, at most `most` and what the model has."""
    sender = Sender(work.model, Layout(1), 0, "bfloat16", recomputed=frozenset(recomputed))
    activations = layer_bytes(sender, work.length, work.sequences, True)
    per_layer = _STATE_BYTES * work.parameters + activations.kept
    fitting = (_SHARE * free_bytes - activations.again) // per_layer
    return max(1, min(most, work.model.num_hidden_layers, int(fitting)))


def with_layers(work: Work, layers: int) -> Work:
    """The same with so many."""
    return replace(work, layers=layers)
