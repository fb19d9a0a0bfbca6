"""A tiny job, its data, and what a rank of a test does with them: shared by the tests of the engine and the loop."""

from __future__ import annotations

from typing import Any

import torch

from concertina.config import Job, LayoutConfig
from concertina.layout import Layout, Seating, kv_copies
from concertina.train.engine import Engine
from tests.distributed import form, seat

__all__ = [
    "LATENT",
    "NUM_SEQUENCES",
    "Degrees",
    "Drop",
    "TinyView",
    "engine_on",
    "layout_of",
    "plainest",
    "record_drops",
    "seated_engine",
    "tiny_job",
    "unconfigured",
]

NUM_SEQUENCES = 61  # no multiple of a batch: epochs meet in the middle of one
Degrees = tuple[int, ...]
"""World, tp, ep, etp, and where they are not 1 cp, pp, the pieces of a stage; then, if uneven, layers of each piece."""
Drop = tuple[str, int, int, int, int]
"""Router, sequence, position, number of the choice, expert."""


class TinyView:
    """Sequences that are a pure function of their id, with a learnable pattern and some targets left out."""

    def __init__(self, count: int, length: int, vocab_size: int) -> None:
        self.count, self.length, self.vocab_size = count, length, vocab_size

    def __len__(self) -> int:
        return self.count

    def read(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor(ids, dtype=torch.int64).view(-1, 1)
        positions = torch.arange(self.length + 1)
        text = (rows * 7 + positions * (rows % 5 + 1) + (rows * positions) % 3) % self.vocab_size
        targets = text[:, 1:].clone()
        targets[(rows % 4 == 1).expand_as(targets) & (positions[1:] % 6 == 0)] = -100
        return text[:, :-1].contiguous(), targets

    def starts(self, ids: list[int]) -> torch.Tensor:
        """A document begins every 4 to 6 tokens."""
        positions, apart = torch.arange(self.length), torch.tensor([4 + number % 3 for number in ids]).view(-1, 1)
        return positions // apart * apart


LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "router_bias": True,
}
"""Changes to the model of `tiny_job` that make its attention latent, and its routers' biases there but unmoved."""


def tiny_job(**changes: Any) -> Job:
    """A decoder of three layers (the first one dense), eight experts, on twelve tokens a sequence."""
    document: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mlp_only_layers": [0],
            "intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "initializer_range": 0.1,
        },
        "data": {"sequence_length": 12, "tokenizer": {"path": "none"}},
        "training": {
            "steps": 20,
            "global_batch_size": 8,
            "precision": "float64",
            "learning_rate": 2e-2,
            "min_learning_rate": 1e-3,
            "warmup_steps": 3,
            "eval_every_steps": 10,
            "eval_sequences": 6,
        },
        "checkpoint": {"every_steps": 5, "keep": 2},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            document.setdefault(section, {})[key] = value
        else:
            document[section] = {**document.get(section, {}), **value} if isinstance(value, dict) else value
    return Job.model_validate(document)


def plainest(job: Job) -> Job:
    """The job without what must not change its mathematics: layout, micro-batches, padding."""
    capacity = job.model.capacity.model_copy(update={"pad": False})
    sections = {
        "model": job.model.model_copy(update={"capacity": capacity}),
        "training": job.training.model_copy(update={"micro_batch_size": None}),
        "layout": LayoutConfig(),
    }
    return job.model_copy(update=sections)


def layout_of(degrees: Degrees) -> Layout:
    world, tp, ep, etp, cp, pp, virtual = (*degrees, 1, 1, 1)[:7]
    return Layout(world, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp, virtual=virtual, stage_layers=degrees[7:])


def record_drops(engine: Engine) -> set[Drop]:
    """Everything that is dropped on this rank from now on, by names that no layout knows."""
    drops: set[Drop] = set()
    length = engine.job.data.sequence_length

    def note(gate: Any, arguments: tuple[Any, ...], routing: Any) -> None:
        if routing.kept_RK is None or not arguments[1].tokens_B.any():
            return  # a rank without a sequence computes one all the same
        for row, choice in (~routing.kept_RK).nonzero().tolist():
            span = arguments[1]
            sequence = int(span.sequence_R[row])
            number = span.place.first + sequence
            position = int(span.position_R[row]) - number * length
            expert = int(routing.expert_ids_RK[row, choice])
            drops.add((gate.prefix, engine.sampler.batch(span.place.step - 1)[number], position, choice, expert))

    for layer in engine.decoder.layers:
        if layer.moe is not None:
            layer.moe.gate.register_forward_hook(note)
    return drops


def unconfigured(job: Job) -> Engine:
    torch.set_num_threads(1)  # tensors this small only lose by threads
    length, vocabulary = job.data.sequence_length, job.model.vocab_size
    views = (TinyView(NUM_SEQUENCES, length, vocabulary), TinyView(9, length, vocabulary))
    return Engine(job, *views, torch.device("cpu"))


def engine_on(job: Job, layout: Layout, rank: int, store: Any) -> Engine:
    """A configured engine of one rank."""
    engine = unconfigured(job)
    engine.configure(layout, rank, form(layout, rank, store, kv_lanes=kv_copies(job.model, layout.tp)))
    return engine


def seated_engine(job: Job, layout: Layout, rank: int, seating: Seating | None = None) -> Engine:
    """A rank's engine without its peers: it has all its own state, and nobody to compute with. With a seating of the
    layout it has copies of others, still to be filled."""
    engine, groups = unconfigured(job), seat(layout, rank, kv_copies(job.model, layout.tp))
    if seating is None:
        engine.configure(layout, rank, groups)
    else:
        engine.adopt(engine.prepare(seating, rank, groups, "initial"))
    return engine
