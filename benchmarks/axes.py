"""What does each axis cost? The same model and batch on four ranks under one layout after the other, taking turns.

Four processes hold an engine for every layout and do a step of each in turn. On ranks that share two cores nothing is
gained by an axis: what is seen is the price of its exchanges and of its smaller products. The sample of a step is the
slowest rank's.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from benchmarks.contestants import SHAPE, OneBatch, job_of_shape
from benchmarks.results import Row
from benchmarks.spawned import Bounds, answers_of
from concertina.layout import Layout

__all__ = ["LAYOUTS", "bytes_of_a_step", "measure_axes", "row_name", "rows_of_axes"]

RANKS = 4
BASE = "dp 4"
LAYOUTS: dict[str, dict[str, Any]] = {
    BASE: {},
    "ep 2": {"ep": 2},
    "ep 4": {"ep": 4},
    "etp 2": {"etp": 2},
    "etp 4": {"etp": 4},
    "ep 2, etp 2": {"ep": 2, "etp": 2},
    "tp 2": {"tp": 2},
    "tp 4": {"tp": 4},
    "tp 2, lanes with all tokens": {"tp": 2, "sequence_parallel": False},
    "tp 2, ep 4 folded over it": {"tp": 2, "ep": 4},
    "tp 2, ep 2, etp 2": {"tp": 2, "ep": 2, "etp": 2},
}
TIMEOUT = timedelta(seconds=120)


def measure_axes(rounds: int) -> dict[str, list[float]]:
    """Tokens per second under each layout, one sample a round, after two rounds of warm-up."""
    seconds = answers_of(_rank, RANKS, Bounds(TIMEOUT, 600), rounds + 2)
    slowest = {name: [max(times) for times in zip(*(rank[name] for rank in seconds), strict=True)] for name in LAYOUTS}
    return {name: [SHAPE.tokens / each for each in times[2:]] for name, times in slowest.items()}


def rows_of_axes(samples: dict[str, list[float]]) -> list[Row]:
    """Tokens per second of the base, and each layout's share of it round by round."""
    base = samples[BASE]
    rows = [Row.of(row_name(BASE), "tokens/s", base)]
    for name, values in samples.items():
        if name != BASE:
            shares = [value / of for value, of in zip(values, base, strict=True)]
            rows.append(Row.of(row_name(name), "ratio", shares))
    return rows


def row_name(layout: str) -> str:
    """What a layout's row is called."""
    return f"{RANKS} ranks, {layout}" + (f", against {BASE}" if layout != BASE else "")


def bytes_of_a_step(degrees: dict[str, Any]) -> float:
    """What rank 0 sends in a step under a layout, where every expert is as likely."""
    from concertina.planner.traffic import Sender, even_counts, step

    layout, sequence_parallel = _layout(degrees)
    sender = Sender(job_of_shape().model, layout, 0, "float32", sequence_parallel)
    sequences = SHAPE.sequences // layout.dp
    tokens = sequences * SHAPE.sequence_tokens / (layout.tp if sequence_parallel else 1)
    routing = [even_counts(sender, tokens)] * sender.num_moe_layers
    return sum(step(sender, SHAPE.sequence_tokens, [sequences], [routing]).values())


def _layout(degrees: dict[str, Any]) -> tuple[Layout, bool]:
    axes = {axis: value for axis, value in degrees.items() if axis != "sequence_parallel"}
    return Layout(RANKS, **axes), degrees.get("sequence_parallel", True)


def _rank(rank: int, port: int, rounds: int, answers: Any) -> None:
    import torch

    from concertina.layout import kv_copies
    from concertina.parallel.groups import GroupOptions, connect_store, form_groups
    from concertina.train.engine import Engine

    torch.set_num_threads(1)
    store, view = connect_store("127.0.0.1", port, TIMEOUT), OneBatch()
    engines = {}
    for number, (name, degrees) in enumerate(LAYOUTS.items()):
        job = job_of_shape()
        job = job.model_copy(update={"layout": job.layout.model_copy(update=degrees)})
        layout, _ = _layout(degrees)
        groups = form_groups(
            layout, rank, store, GroupOptions(number, timeout=TIMEOUT), kv_copies(job.model, layout.tp)
        )
        engines[name] = Engine(job, view, view, torch.device("cpu"))  # type: ignore[arg-type]
        engines[name].configure(layout, rank, groups)
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for step in range(1, rounds + 1):
        for name, engine in engines.items():
            engine.confirm()  # all begin together
            start = time.perf_counter()
            engine.train_step(step)
            engine.settle()
            seconds[name].append(time.perf_counter() - start)
    answers.put(seconds)
