"""What is struck, and how is it watched? No Ray is imported here: who imports this may choose its settings yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from concertina.errors import UserError

__all__ = ["BOUND_S", "WORLD", "Hung", "Tail", "corpus_of", "job_document"]

WORLD = 4
BOUND_S = 60.0
"""Seconds after which a run that is not whole again hangs."""

_ROOT = Path(__file__).parents[2]


class Hung(UserError):
    """The run did not become whole again within the bound."""


def job_document(text: Path, storage: Path, layout: dict[str, Any], standbys: int) -> dict[str, Any]:
    """A model of three layers in float64: rounding is the only thing that may differ, and it is small."""
    return {
        "name": "faults",
        "storage_path": str(storage),
        "model": {
            "vocab_size": 288,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
            "intermediate_size": 48,
            "router_bias": True,
        },
        "data": {"source": str(text), "sequence_length": 12, "tokenizer": {"vocab_size": 288}},
        "training": {
            "steps": 10_000_000,
            "global_batch_size": 12,
            "precision": "float64",
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-3,
            "eval_every_steps": 20,
            "eval_sequences": 6,
        },
        "layout": layout,
        "cluster": {"num_workers": WORLD, "num_nodes": WORLD, "device": "cpu"},
        "checkpoint": {"every_steps": 40, "keep": 1_000_000},
        "elastic": {
            "max_losses_per_node": 1_000_000,
            "verify_every_steps": 1,
            "notices": "none",
            "standbys_per_node": standbys,
        },
    }


def corpus_of(folder: Path) -> Path:
    """This project's own text."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        for number, path in enumerate(sorted((_ROOT / "platform").rglob("*.py"))):
            (text / f"{number}.txt").write_text(path.read_text())
    return text


class Tail:
    """Whole lines of a file that grows, each once."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
