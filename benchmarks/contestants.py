"""Who takes part in the throughput benchmark? `python -m benchmarks.contestants NAME THREADS` serves one of them.

A contestant lives in a process of its own and does one training step (or one round of products) for every line on its
standard input, answering with the seconds it took; between lines it sleeps, so that contestants can take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["CONTESTANTS", "SHAPE", "OneBatch", "Shape", "job_of_shape"]

Step = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """The model and batch that everyone computes."""

    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 512
    sequences: int = 8
    sequence_tokens: int = 256

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_tokens

    @property
    def flops_per_token(self) -> int:
        from concertina.planner.flops import flops_per_token

        return flops_per_token(job_of_shape().model, self.sequence_tokens)


SHAPE = Shape()


def _timed(action: Callable[[], Any]) -> Step:
    def step() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return step


def _batch() -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, SHAPE.vocab_size, (SHAPE.sequences, SHAPE.sequence_tokens + 1), generator=generator)


def job_of_shape() -> Any:
    from concertina.config import Job

    return Job.model_validate(
        {
            "name": "throughput",
            "model": {
                "vocab_size": SHAPE.vocab_size,
                "hidden_size": SHAPE.hidden_size,
                "num_hidden_layers": SHAPE.layers,
                "num_attention_heads": SHAPE.heads,
                "num_key_value_heads": SHAPE.kv_heads,
                "num_experts": SHAPE.experts,
                "num_experts_per_tok": SHAPE.experts_per_token,
                "moe_intermediate_size": SHAPE.expert_width,
            },
            "training": {"global_batch_size": SHAPE.sequences, "learning_rate": 1e-3},
            "data": {"sequence_length": SHAPE.sequence_tokens},
        }
    )


class OneBatch:
    """A view with one batch, so that reading data is no part of the measurement."""

    def __init__(self) -> None:
        batch = _batch()
        self.tokens, self.targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def __len__(self) -> int:
        return SHAPE.sequences

    def read(self, ids: list[int]) -> Any:
        return self.tokens[ids], self.targets[ids]


def concertina_engine() -> Step:
    """Our engine, a world of one: forward, losses of the router, backward, norm, clipping, AdamW."""
    import torch

    from concertina.layout import Layout
    from concertina.model.host_memory import keep_freed_memory
    from concertina.parallel.groups import Groups
    from concertina.train.engine import Engine

    keep_freed_memory()
    view: Any = OneBatch()
    engine = Engine(job_of_shape(), view, view, torch.device("cpu"))
    engine.configure(Layout(1), 0, Groups.alone())
    steps = iter(range(1, 1 << 30))
    return _timed(lambda: engine.train_step(next(steps)))


def concertina_decoder() -> Step:
    """Our decoder with torch's own AdamW, as anybody would train it."""
    import torch

    from concertina.model import Decoder
    from concertina.model.host_memory import keep_freed_memory
    from concertina.parallel.groups import Groups

    keep_freed_memory()
    model = job_of_shape().model
    view = OneBatch()
    decoder = Decoder(model, torch.float32, torch.device("cpu"), Groups.alone(), 0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def step() -> None:
        output = decoder(view.tokens, view.targets)
        objective = output.loss_sum + model.router_aux_loss_coef * output.aux_sum
        (objective + model.router_z_loss_coef * output.z_sum).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _timed(step)


def _transformers(experts: str, fused: bool) -> Step:
    """Mixtral of the same shape, its loss without the router's; AdamW fused or foreach."""
    import torch
    from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.expert_width,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        num_local_experts=SHAPE.experts,
        num_experts_per_tok=SHAPE.experts_per_token,
        max_position_embeddings=2048,
    )
    model = MixtralForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=fused, foreach=not fused)
    batch = _batch()[:, :-1].contiguous()

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _timed(step)


def _gemm(size: int) -> Step:
    """fp32 products of square matrices, into a buffer that is there: seconds for a training step's FLOPs."""
    import torch

    a, b, out = (torch.randn(size, size) for _ in range(3))
    flops = 2.0 * size**3
    repeats = max(1, round(2e10 / flops))

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    timed = _timed(products)
    return lambda: timed() * SHAPE.flops_per_token * SHAPE.tokens / (flops * repeats)


CONTESTANTS: dict[str, Callable[[], Step]] = {
    "concertina": concertina_engine,
    "concertina decoder, torch AdamW": concertina_decoder,
    "transformers eager, AdamW fused": lambda: _transformers("eager", True),
    "transformers eager, AdamW foreach": lambda: _transformers("eager", False),
    "transformers grouped_mm, AdamW fused": lambda: _transformers("grouped_mm", True),
    "transformers grouped_mm, AdamW foreach": lambda: _transformers("grouped_mm", False),
    "gemm 512": lambda: _gemm(512),
    "gemm 1024": lambda: _gemm(1024),
    "gemm 2048": lambda: _gemm(2048),
}


def _serve(name: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = CONTESTANTS[name]()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
