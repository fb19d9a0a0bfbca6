"""What do all contestants of the recovery benchmark train? One model, one stream of batches, nothing of a trainer.

The model is our Decoder as a world of one knows it, a plain torch module. The global batch of a step is the same
whatever the world is; a rank computes its share of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from concertina.config import Job
from concertina.model import Decoder
from concertina.model.host_memory import keep_freed_memory
from concertina.parallel.groups import Groups

__all__ = ["SUBJECT", "Share", "Subject", "Trainee", "batch_of", "job_of_subject", "make_optimizer", "prepare_process"]


@dataclass(frozen=True)
class Subject:
    """15.5 M parameters, and a batch that worlds of 4, 3 and 2 divide evenly."""

    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 512
    sequences: int = 12
    sequence_tokens: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


SUBJECT = Subject()


@dataclass(frozen=True)
class Share:
    """Which sequences of the global batch a rank computes; all ranks' shares make up the batch."""

    rank: int
    world: int

    @property
    def sequences(self) -> slice:
        first, last = (i * SUBJECT.sequences // self.world for i in (self.rank, self.rank + 1))
        return slice(first, last)


@cache
def job_of_subject() -> Job:
    return Job.model_validate(
        {
            "name": "recovery",
            "model": {
                "vocab_size": SUBJECT.vocab_size,
                "hidden_size": SUBJECT.hidden_size,
                "num_hidden_layers": SUBJECT.layers,
                "num_attention_heads": SUBJECT.heads,
                "num_key_value_heads": SUBJECT.kv_heads,
                "num_experts": SUBJECT.experts,
                "num_experts_per_tok": SUBJECT.experts_per_token,
                "moe_intermediate_size": SUBJECT.expert_width,
            },
            "training": {"global_batch_size": SUBJECT.sequences, "learning_rate": SUBJECT.learning_rate},
            "data": {"sequence_length": SUBJECT.sequence_tokens},
        }
    )


def prepare_process() -> None:
    """One thread a rank, and freed memory kept: what our own ranks do, and what is best for anybody's here."""
    keep_freed_memory()
    torch.set_num_threads(1)


def batch_of(step: int) -> Tensor:
    """Random tokens of a step's global batch, the same in every process: [sequences, sequence_tokens + 1], int64."""
    generator = torch.Generator().manual_seed(SUBJECT.seed * 1_000_003 + step)
    shape = (SUBJECT.sequences, SUBJECT.sequence_tokens + 1)
    return torch.randint(0, SUBJECT.vocab_size, shape, generator=generator)


class Trainee(nn.Module):
    """Forward gives the objective of a share, scaled so that gradients averaged over ranks are the batch's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.model_config = job_of_subject().model
        self.decoder = Decoder(self.model_config, torch.float32, torch.device("cpu"), Groups.alone(), SUBJECT.seed)

    def forward(self, tokens_BS: Tensor, world: int) -> Tensor:
        output = self.decoder(tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous())
        objective = output.loss_sum + self.model_config.router_aux_loss_coef * output.aux_sum
        objective = objective + self.model_config.router_z_loss_coef * output.z_sum
        return objective * (world / (SUBJECT.sequences * SUBJECT.sequence_tokens))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=SUBJECT.learning_rate, weight_decay=0.1, fused=True)
