"""python -m benchmarks.snapshots -o FILE: what does it cost a step that a second rank keeps this one's state?

Three ways take turns on the same four ranks, the throughput benchmark's model, at several numbers of tokens a step:
nobody keeps a copy; second owners get the summed gradients and update what they keep (ours); the whole state, master
weights and both moments, is sent to the second owner after every step, beside the next one, into one of two buffers
(what GEMINI and others do). What is sent does not depend on the tokens, so the cost per step does not either, and
its share of a step falls as 1 / tokens. A turn is a few steps, with all they sent received at the end.

The goal is one of a ratio: bytes of state (12 a parameter) over FLOP of the step (6 an active parameter and token),
that of Mixtral 8x22B at 4 M tokens a step. Few machines reach it with a small model in a second, so the row at that
ratio is a line through what was measured: constant cost, time by tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contestants import SHAPE, job_of_shape
from benchmarks.results import Row, refuse_dirty_tree, show, write_result
from benchmarks.spawned import Bounds, answers_of
from concertina.config import Job, load_job
from concertina.config.parameters import count_parameters
from concertina.errors import UserError

__all__ = ["WAYS", "main", "measure", "rows_of"]

RANKS, STEPS_A_TURN = 4, 4
NODES = ["a", "a", "b", "b"]
TIMEOUT = timedelta(seconds=300)
MOST_MINUTES = 60
GOAL = 0.98
MIXTRAL_8X22B = 12 * 141e9 / (6 * 39e9 * 4e6)
"""Bytes of state over FLOP of a step: 141 B parameters, 39 B of them active, 4 M tokens."""
NOBODY, SECOND_OWNERS, WHOLE_STATE = "no copies", "second owners", "whole state sent"
WAYS = (NOBODY, SECOND_OWNERS, WHOLE_STATE)
QUICKSTART = Path(__file__).parent.parent / "jobs" / "quickstart.yaml"

Samples = dict[str, dict[str, list[float]]]
"""Case to way to seconds a step, one sample a round; and `<way>: bytes`, `<way>: waited`, `<way>: updating`."""


class AnyBatch:
    """Sequences of no text, so that reading data is no part of the measurement."""

    def __init__(self, job: Job) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self.count = job.training.global_batch_size
        shape = (self.count, job.data.sequence_length + 1)
        self.tokens = torch.randint(0, job.model.vocab_size, shape, generator=generator)

    def __len__(self) -> int:
        return self.count

    def read(self, ids: list[int]) -> Any:
        return self.tokens[ids, :-1].contiguous(), self.tokens[ids, 1:].contiguous()


class WholeState:
    """Sends this rank's masters and moments to its second owner after each step, beside the next one."""

    def __init__(self, engine: Any, seconds: Sequence[int | None]) -> None:
        import torch

        from concertina.layout import Layout, Seating, segments
        from concertina.parallel.collectives import exchange

        self.engine, self.exchange = engine, exchange
        rank, self.to = engine.rank, seconds[engine.rank]
        seating = Seating(Layout(RANKS, ep=engine.layout.ep), tuple(range(RANKS)), tuple(seconds))
        lengths = {
            first: [each.length for each in segments(engine.job.model, engine.layout, first)]
            for first in seating.firsts(rank)
        }
        self.staged = [[torch.empty_like(each) for each in self._live()] for _ in range(2)]
        dtype = self.staged[0][0].dtype
        self.kept = [[(torch.empty(length, dtype=dtype), first) for first, theirs in lengths.items()
                      for length in theirs for _ in range(3)] for _ in range(2)]  # fmt: skip
        self.bytes = sum(each.nbytes for each in self.staged[0])
        self.turn, self.pending = 0, None
        self.waited_s = 0.0

    def _live(self) -> list[Any]:
        adamw = self.engine.optimizer._adamw
        return [
            tensor
            for master in self.engine.optimizer.masters
            for tensor in (master.detach(), adamw.state[master]["exp_avg"], adamw.state[master]["exp_avg_sq"])
        ]

    def after_step(self) -> None:
        self.wait()
        self.turn = 1 - self.turn
        for staged, live in zip(self.staged[self.turn], self._live(), strict=True):
            staged.copy_(live)
        sends = [(staged, self.to) for staged in self.staged[self.turn]]
        self.pending = self.exchange(sends, self.kept[self.turn], self.engine.groups["seconds"])

    def wait(self) -> None:
        began = time.perf_counter()
        if self.pending is not None:
            self.pending.finish()
            self.pending = None
        self.waited_s += time.perf_counter() - began


def job_at(tokens: int) -> Job:
    """The throughput benchmark's model and this many tokens a step, in micro-batches of its own batch."""
    job = job_of_shape()
    sequences = tokens // SHAPE.sequence_tokens
    training = job.training.model_copy(
        update={"global_batch_size": sequences, "micro_batch_size": max(1, SHAPE.sequences // RANKS)}
    )
    return job.model_copy(update={"training": training})


def measure(jobs: dict[str, Job], rounds: int) -> Samples:
    """Seconds a step of every way, of the slowest rank, one case after the other; a round of warm-up.

    Raises UserError when a rank ends without an answer.
    """
    found = answers_of(_rank, RANKS, Bounds(TIMEOUT, MOST_MINUTES * 60), jobs, rounds)
    return {
        case: {name: [max(values) for values in zip(*(rank[case][name] for rank in found), strict=True)]
               for name in found[0][case]}
        for case in jobs
    }  # fmt: skip


def _rank(rank: int, port: int, jobs: dict[str, Job], rounds: int, answers: Any) -> None:
    import torch

    from concertina.model.host_memory import keep_freed_memory
    from concertina.parallel.groups import connect_store

    torch.set_num_threads(1)
    keep_freed_memory()
    store = connect_store("127.0.0.1", port, TIMEOUT)
    answers.put({case: _case(rank, store, number, job, rounds) for number, (case, job) in enumerate(jobs.items())})


def _case(rank: int, store: Any, number: int, job: Job, rounds: int) -> dict[str, list[float]]:
    engines = {way: _engine(rank, store, 10 * number + place, job, way) for place, way in enumerate(WAYS)}
    found: dict[str, list[float]] = {name: [] for way in WAYS for name in (way, f"{way}: waited", f"{way}: updating")}
    steps = iter(range(1, 1 << 30))
    for turn in range(rounds + 1):
        first = next(steps)
        order = WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]
        for way in order:
            seconds, waited, updating = _turn(*engines[way], first)
            if turn:
                found[way].append(seconds)
                found[f"{way}: waited"].append(waited)
                found[f"{way}: updating"].append(updating)
    seconds_bytes = sum(shard.nbytes for shard in (bucket.shard for bucket in engines[NOBODY][0].reducer.buckets))
    found[f"{SECOND_OWNERS}: bytes"] = [float(seconds_bytes)]
    found[f"{WHOLE_STATE}: bytes"] = [float(engines[WHOLE_STATE][1].bytes)]
    return found


def _engine(rank: int, store: Any, generation: int, job: Job, way: str) -> tuple[Any, WholeState | None, list[float]]:
    import torch

    from concertina.elastic.second_owners import place_seconds
    from concertina.layout import Layout, Seating
    from concertina.parallel.groups import GroupOptions, form_groups
    from concertina.train.engine import Engine

    layout = Layout(RANKS, ep=job.layout.ep)
    seconds = place_seconds(NODES)
    groups = form_groups(layout, rank, store, GroupOptions(generation, timeout=TIMEOUT))
    engine = Engine(job, AnyBatch(job), AnyBatch(job), torch.device("cpu"))
    owners = seconds if way == SECOND_OWNERS else (None,) * RANKS
    engine.adopt(engine.prepare(Seating(layout, tuple(range(RANKS)), owners), rank, groups, "initial"))
    engine.fill_seconds()
    updating: list[float] = []
    apply = engine.share.seconds.apply

    def timed(scale: float, rate: float) -> None:
        began = time.perf_counter()
        apply(scale, rate)
        updating.append(time.perf_counter() - began)

    engine.share.seconds.apply = timed  # type: ignore[method-assign]
    return engine, WholeState(engine, seconds) if way == WHOLE_STATE else None, updating


def _turn(engine: Any, copies: WholeState | None, updating: list[float], first: int) -> tuple[float, float, float]:
    """Seconds of one step of a turn; of these, waiting for copies and updating them."""
    from concertina.parallel.groups import SECONDS

    engine.confirm()  # all begin together
    updating.clear()
    waits = copies or engine.groups[SECONDS].tap
    waited, began = waits.waited_s, time.perf_counter()
    for _ in range(STEPS_A_TURN):
        engine.train_step(engine.applied + 1)
        if copies is not None:
            copies.after_step()
    engine.settle()
    if copies is not None:
        copies.wait()
    return tuple(  # type: ignore[return-value]
        each / STEPS_A_TURN for each in (time.perf_counter() - began, waits.waited_s - waited, sum(updating))
    )


def bytes_over_flop(job: Job) -> float:
    """Of a step of the job."""
    counted = count_parameters(job.model)
    tokens = job.training.global_batch_size * job.data.sequence_length
    return 12 * counted.total / (6 * counted.active * tokens)


def rows_of(samples: Samples, jobs: dict[str, Job]) -> list[Row]:
    """Of every case: seconds a step, the speed that each way keeps, round by round; then what follows for the goal."""
    rows = []
    for case, found in samples.items():
        ratio = f"{bytes_over_flop(jobs[case]) / MIXTRAL_8X22B:.0f} x Mixtral's bytes per FLOP"
        rows.append(Row.of(f"{case}, {NOBODY}", "s/step", found[NOBODY]))
        for way in WAYS[1:]:
            kept = [base / mine for base, mine in zip(found[NOBODY], found[way], strict=True)]
            rows.append(Row.of(f"{case}, {way}: speed kept ({ratio})", "ratio", kept))
            cost = [1e3 * (mine - base) for base, mine in zip(found[NOBODY], found[way], strict=True)]
            rows.append(Row.of(f"{case}, {way}: cost", "ms/step", cost))
            rows.append(Row.of(f"{case}, {way}: sent by a rank", "MB/step", [found[f"{way}: bytes"][0] / 1e6]))
            for part in ("waited", "updating")[: 1 + (way == SECOND_OWNERS)]:
                values = [1e3 * value for value in found[f"{way}: {part}"]]
                rows.append(Row.of(f"{case}, {way}: {part}", "ms/step", values))
    return rows + [_at_the_goal(samples, jobs, way) for way in WAYS[1:]]


def _at_the_goal(samples: Samples, jobs: dict[str, Job], way: str) -> Row:
    """The speed kept where bytes over FLOP are Mixtral's: of the largest case, its cost over a step so much longer."""
    case = max(
        (case for case in samples if case != QUICKSTART.stem), key=lambda case: jobs[case].training.global_batch_size
    )
    base, longer = median(samples[case][NOBODY]), bytes_over_flop(jobs[case]) / MIXTRAL_8X22B
    costs = [mine - each for each, mine in zip(samples[case][NOBODY], samples[case][way], strict=True)]
    kept = [base * longer / (base * longer + cost) for cost in costs]
    name = f"{way}: speed kept at Mixtral 8x22B's bytes per FLOP (extrapolated from {case})"
    return Row.of(name, "ratio", kept, GOAL if way == SECOND_OWNERS else None, reason="see docs/log.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. Exit code 2 for a dirty tree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.snapshots", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file, e.g. benchmarks/results/...")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192, 32768], help="tokens a step")
    parser.add_argument("--allow-dirty", action="store_true", help="a trial: measure uncommitted code")
    options = parser.parse_args(arguments)
    try:
        measured = refuse_dirty_tree(options.allow_dirty)
        jobs = {f"{tokens} tokens": job_at(tokens) for tokens in options.tokens}
        jobs[QUICKSTART.stem] = load_job(QUICKSTART, [])
        rows = rows_of(measure(jobs, options.rounds), jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    config = {"ranks": RANKS, "steps_a_turn": STEPS_A_TURN, "rounds": options.rounds, "tokens": options.tokens}
    write_result(options.output, config, measured, rows)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
