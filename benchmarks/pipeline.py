"""How long do pipeline stages do nothing? python -m benchmarks.pipeline -o FILE

Four stages that wait where others compute (`cluster.device: timed`), so that two cores do not hide what a schedule
costs: 1F1B and interleaved pieces with few and many micro-batches, taking turns, beside their formulas. The bubble is
the share of a step in which a stage is blocked until another one's message comes. Beside it stands all that is no
product: what is real here (norms, routers, sending, optimizer, the interpreter) is in that as well.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from benchmarks.spawned import Bounds, answers_of
from concertina.config import Job
from concertina.layout import Layout

__all__ = ["CASES", "Shares", "case_name", "formula", "measure", "rows_of"]

STAGES = 4
TOKENS = 64
LAYER_S = 0.04
"""Of one micro-batch in one layer, forward: well above what a rank really does meanwhile."""
CASES: list[tuple[int, int]] = [(4, 1), (8, 1), (16, 1), (4, 2), (8, 2), (16, 2), (8, 4)]
"""Micro-batches, pieces of a stage."""
TIMEOUT = timedelta(seconds=120)


def formula(micro_batches: int, virtual: int) -> float:
    """Share of a step: (p - 1) / (m v + p - 1), which is (p - 1) / (m + p - 1) without interleaving."""
    return (STAGES - 1) / (micro_batches * virtual + STAGES - 1)


def job_of(micro_batches: int, virtual: int) -> Job:
    """Sixteen layers, four a stage; the vocabulary is as small as it can be, since its head is on one stage only."""
    return Job.model_validate(
        {
            "name": "pipeline",
            "model": {
                **{"vocab_size": 257, "hidden_size": 128, "num_hidden_layers": 16, "num_attention_heads": 4},
                **{"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2},
                **{"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
            },
            "data": {"sequence_length": TOKENS, "tokenizer": {"path": "none"}},
            "training": {"global_batch_size": micro_batches, "micro_batch_size": 1},
            "layout": {"pp": STAGES, "virtual_stages": virtual},
            "cluster": {"num_workers": STAGES, "device": "timed", "timed_s_per_token": LAYER_S / TOKENS},
        }
    )


class _Tokens:
    """Any sequences."""

    def __len__(self) -> int:
        return 64

    def read(self, ids: list[int]) -> Any:
        import torch

        tokens = torch.arange(TOKENS).expand(len(ids), -1) % 257
        return tokens, tokens


class Shares(NamedTuple):
    """Of a step, on average over the stages: blocked, and not in a product."""

    blocked: float
    no_product: float


def measure(rounds: int, cases: list[tuple[int, int]] | None = None) -> dict[tuple[int, int], list[Shares]]:
    """One sample a round, after a round of warm-up."""
    cases = CASES if cases is None else cases
    found = answers_of(_stage, STAGES, Bounds(TIMEOUT, 900), rounds + 1, cases)
    samples: dict[tuple[int, int], list[Shares]] = {}
    for case in cases:
        steps = zip(*(stage[case] for stage in found), strict=True)
        samples[case] = [_shares(step) for step in steps][1:]
    return samples


def _shares(stages: Sequence[tuple[float, float, float]]) -> Shares:
    seconds, blocked, products = zip(*stages, strict=True)
    return Shares(fmean(blocked) / max(seconds), 1 - fmean(products) / max(seconds))


def _stage(rank: int, port: int, rounds: int, cases: list[tuple[int, int]], answers: Any) -> None:
    import torch

    from concertina.parallel.groups import GroupOptions, connect_store, form_groups
    from concertina.train.engine import Engine

    torch.set_num_threads(1)
    store, engines = connect_store("127.0.0.1", port, TIMEOUT), {}
    for number, (micro_batches, virtual) in enumerate(cases):
        layout = Layout(STAGES, pp=STAGES, virtual=virtual)
        groups = form_groups(layout, rank, store, GroupOptions(number, timeout=TIMEOUT))
        view: Any = _Tokens()
        engine = Engine(job_of(micro_batches, virtual), view, view, torch.device("cpu"))
        engine.configure(layout, rank, groups)
        engines[micro_batches, virtual] = engine
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {case: [] for case in engines}
    for step in range(1, rounds + 1):
        for case, engine in engines.items():
            engine.confirm()  # all begin together
            work = _count_work(engine)
            start, blocked = time.perf_counter(), engine.groups.waited_s
            engine.train_step(step)
            engine.settle()
            found[case].append((time.perf_counter() - start, engine.groups.waited_s - blocked, work[0]))
    answers.put(found)


def _count_work(engine: Any) -> list[float]:
    """Seconds that this stage's products are worth from now on."""
    pace = next(part.pace for part in engine.decoder.modules() if hasattr(part, "pace"))
    seconds, wait = [0.0], type(pace).wait

    def counted(products: float) -> None:
        seconds[0] += products * pace.s_per_product
        wait(pace, products)

    pace.wait = counted
    return seconds


def case_name(micro_batches: int, virtual: int) -> str:
    """How rows of a case begin."""
    return f"{STAGES} stages, {micro_batches} micro-batches" + (f", {virtual} pieces each" if virtual > 1 else "")


def rows_of(samples: dict[tuple[int, int], list[Shares]]) -> list[Row]:
    """Each case measured, then by the formula, then with all that is no product."""
    rows = []
    for (micro_batches, virtual), shares in samples.items():
        name = case_name(micro_batches, virtual)
        rows.append(Row.of(f"{name}: bubble", "of step", [each.blocked for each in shares]))
        rows.append(Row(f"{name}: by the formula", formula(micro_batches, virtual), "of step"))
        rows.append(Row.of(f"{name}: all that is no product", "of step", [each.no_product for each in shares]))
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    measured = refuse_dirty_tree(arguments.allow_dirty or arguments.output is None)
    rows = rows_of(measure(arguments.rounds))
    print(show(rows))
    if arguments.output is not None:
        config = {"stages": STAGES, "layers": 16, "layer_s": LAYER_S, "rounds": arguments.rounds}
        write_result(arguments.output, config, measured, rows, emulated_compute=True)


if __name__ == "__main__":
    main()
