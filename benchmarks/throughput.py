"""python -m benchmarks.throughput -o FILE: how fast is a training step in one process, against whom, and how fast
could it be? What does each axis of a layout cost, and what does Ray?

Every contestant is a process of its own; they take turns, a step each, so that whatever else the machine does hits all
of them alike. Ratios are of the medians, theirs the best of transformers' expert implementations and AdamWs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.axes import measure_axes, rows_of_axes
from benchmarks.contestants import CONTESTANTS, SHAPE
from benchmarks.ranks import JOB, measure_ranks, rows_of_ranks
from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from concertina.errors import UserError

__all__ = ["main", "measure"]

GOALS = {1: 1.25, 2: 1.3}
GEMM_SHARE = 0.75
OURS = "concertina"


class Contestant:
    """One contestant's process, asleep unless it is its turn."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        root = Path(__file__).resolve().parent.parent
        paths = [str(root / "platform"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": str(threads),
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contestants", name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"contestant {self.name} ended with exit code {self._process.wait()}: see its output above")
        return line.strip()

    def await_ready(self) -> None:
        while self._answer() != "ready":
            pass

    def step(self) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def measure(threads: int, rounds: int, names: Sequence[str]) -> dict[str, list[float]]:
    """Tokens per second of every contestant, one sample a round, after two rounds of warm-up."""
    contestants = [Contestant(name, threads) for name in names]
    try:
        for contestant in contestants:
            contestant.await_ready()
        samples: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds + 2):
            for contestant in contestants:
                seconds = contestant.step()
                if number >= 2:
                    samples[contestant.name].append(SHAPE.tokens / seconds)
        return samples
    finally:
        for contestant in contestants:
            contestant.close()


def _best(samples: dict[str, list[float]], prefix: str) -> str:
    return max((name for name in samples if name.startswith(prefix)), key=lambda name: median(samples[name]))


def rows_of(threads: int, samples: dict[str, list[float]]) -> list[Row]:
    """Tokens per second of each, the ratio to the best peer, and the share of what products alone would allow."""
    suffix = f", {threads} thread{'s' * (threads > 1)}"
    peer, gemm = _best(samples, "transformers"), _best(samples, "gemm")
    bound = median(samples[gemm])
    rows = [
        Row.of(name + suffix, "tokens/s", values)
        for name, values in samples.items()
        if not name.startswith("gemm") or name == gemm
    ]
    rate = [value * SHAPE.flops_per_token / 1e9 for value in samples[gemm]]
    rows.append(Row.of(f"fp32 {gemm}" + suffix, "GFLOP/s", rate))
    ratio = [ours / median(samples[peer]) for ours in samples[OURS]]
    slow = "products and attention alone take what is left; see docs/log.md"
    rows.append(
        Row.of(
            f"against the best of transformers{suffix}",
            "ratio",
            ratio,
            GOALS.get(threads),
            reason=slow,
            ceiling=bound / median(samples[peer]),
        )
    )
    share = [ours / bound for ours in samples[OURS]]
    rows.append(Row.of(f"share of the GEMM rate{suffix}", "ratio", share, GEMM_SHARE, reason=slow, ceiling=1.0))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Exit code 2 for a dirty tree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file, e.g. benchmarks/results/...")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="thread counts (default 1 2)")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), help="contestants (default: all)")
    parser.add_argument("--ranks-rounds", type=int, default=5, help="rounds of Ray against torchrun (0: leave it out)")
    parser.add_argument("--axes-rounds", type=int, default=9, help="rounds of the layouts (0: leave them out)")
    parser.add_argument("--allow-dirty", action="store_true", help="a trial: measure uncommitted code")
    options = parser.parse_args(arguments)
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        rows: list[Row] = []
        for threads in options.threads:
            rows += rows_of(threads, measure(threads, options.rounds, options.only))
        if options.axes_rounds:
            rows += rows_of_axes(measure_axes(options.axes_rounds))
        if options.ranks_rounds:
            rows += rows_of_ranks(measure_ranks(options.ranks_rounds))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    settings = {name: getattr(options, name) for name in ("rounds", "threads", "axes_rounds", "ranks_rounds")}
    write_result(options.output, {**asdict(SHAPE), **settings, "ranks_job": JOB.name}, measured, rows)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
