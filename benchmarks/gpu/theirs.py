"""How do the same blocks train in transformers? Its models as they come, in bf16, with torch's fused AdamW.

Their optimizer keeps bf16 weights and moments (8 bytes a parameter against our 18): less to read and write, less exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ours import balanced_choice, draw_inputs, draw_weights
from benchmarks.gpu.shapes import Work

__all__ = ["KERNELS", "Theirs"]

KERNELS = ("grouped_mm", "eager")
"""Their ways to multiply experts; eager is a loop that waits for the host."""


def _config(work: Work) -> Any:
    from transformers.models.mixtral import MixtralConfig
    from transformers.models.qwen2_moe import Qwen2MoeConfig
    from transformers.models.qwen3_moe import Qwen3MoeConfig

    model = work.model
    common = {
        "vocab_size": 8,  # nobody reads the embedding
        "hidden_size": model.hidden_size,
        "num_hidden_layers": work.layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.width_of_head,
        "num_experts_per_tok": model.num_experts_per_tok,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    width, experts = model.moe_intermediate_size, model.num_experts
    if model.qk_norm == "head":
        return Qwen3MoeConfig(
            **common, moe_intermediate_size=width, num_experts=experts, norm_topk_prob=model.norm_topk_prob
        )
    if model.shared_expert_intermediate_size:
        return Qwen2MoeConfig(
            **common,
            moe_intermediate_size=width,
            num_experts=experts,
            shared_expert_intermediate_size=model.shared_expert_intermediate_size,
            norm_topk_prob=model.norm_topk_prob,
        )
    return MixtralConfig(**common, intermediate_size=width, num_local_experts=experts)


def _balance(_: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of a router: its logits stay, tokens go round."""
    logits, weights, _ = output
    ids = balanced_choice(len(weights), weights.shape[1], logits.shape[1], logits.device)
    return logits, logits.softmax(-1, dtype=torch.float32).gather(1, ids).to(weights.dtype), ids


class Theirs:
    """A stack of their blocks and its optimizer."""

    def __init__(self, work: Work, device: torch.device, balanced: bool, kernel: str) -> None:
        import transformers

        self.work = work
        config = _config(work)
        name = type(config).__name__.removesuffix("Config") + "Model"
        with device:
            self.model = getattr(transformers, name)._from_config(
                config, attn_implementation="sdpa", experts_implementation=kernel, dtype=torch.bfloat16
            )
        draw_weights(self.model, device)
        self.model.train()
        if balanced:
            for module in self.model.modules():
                if type(module).__name__.endswith("TopKRouter"):
                    module.register_forward_hook(_balance)
        self.inputs = draw_inputs(work, device, torch.bfloat16, 2 * work.micro_batches)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def forward_backward(self) -> None:
        """All micro-batches of a step; their gradients are summed in bf16."""
        for number in range(self.work.micro_batches):
            x, dy = self.inputs[2 * number].detach().requires_grad_(), self.inputs[2 * number + 1]
            self.model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(dy)

    def step(self) -> None:
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
