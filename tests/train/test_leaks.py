"""Is anything left of the generations of a process that sees hundreds of them, and does it still compute the same?

Members change seats again and again: a planned change, one of them a spare, a step broken off by a fence in the middle.
"""

from __future__ import annotations

import os
import random
import threading
from typing import Any

import pytest

from benchmarks.faults.held import bytes_in_use
from concertina.layout import Layout, Seating
from concertina.model.host_memory import keep_freed_memory
from concertina.parallel.failures import is_communication_failure
from tests.distributed import run_distributed
from tests.train.generations import Life, Stage, on_nodes
from tests.train.worlds import engine_on, tiny_job, unconfigured
from tests.waiting import wait_until

pytestmark = pytest.mark.dist

WORLD = 3
SEATINGS = [
    on_nodes(Layout(3, ep=3), {0: "a", 1: "b", 2: "c"}),
    on_nodes(Layout(2, ep=2), {0: "a", 1: "b"}, spares=(2,)),
    on_nodes(Layout(2, tp=2, ep=2), {2: "c", 1: "b"}, spares=(0,)),
]


def seating_of(number: int) -> Seating:
    return SEATINGS[number % len(SEATINGS)]


def break_off(life: Life, after_s: float) -> None:
    """Begin a step and be fenced in it, or not: as the moment has it."""
    engine = life.engine
    groups = engine.groups
    timer = threading.Timer(after_s, groups.fence)
    timer.start()
    try:
        life.note(engine.train_step(engine.applied + 1))
        engine.settle()
    except RuntimeError as error:
        if not is_communication_failure(error):
            raise
        if engine.last_result is not None and engine.last_result.step == engine.applied:
            life.note(engine.last_result)
    timer.join()
    groups.fence()
    engine.share.abandon()


def gloo_keeps_something() -> bool:
    """A communication that was broken off in mid-message, with its threads, until its own timeout."""
    return any(thread.name == "left-over" for thread in threading.enumerate())


def many_generations(rank: int, store: Any, steps: int, count: int) -> dict[str, Any]:
    keep_freed_memory()
    job = tiny_job(training__steps=steps)
    life, moment = Life(rank, store, job, unconfigured(job)), random.Random(7)
    threads, descriptors, in_use = [], [], []
    stages = [Stage(seating_of(number), 0) for number in range(count)]
    for number, stage in enumerate(stages):
        looks = number in (*range(12, 15), *range(count - 3, count))
        after_s, breaks_off = moment.uniform(0, 0.06), number % 3 != 1 and not looks
        life.enter(number, stages)
        if stage.seating.rank_of(rank) is not None:
            life.train(life.engine.applied + 1)
            if breaks_off:
                break_off(life, after_s)
                life.agree(number, stage)
            else:
                life.engine.settle()
        life.seen.clear()
        life.reports.clear()
        life.readings.clear()
        life.applied_in.clear()
        if looks:  # before the others go on: they wait for this one no longer than gloo does
            wait_until(lambda: not gloo_keeps_something(), bound_s=60)
        store.set(f"done/{number}/{rank}", "")
        store.wait([f"done/{number}/{each}" for each in range(WORLD)])
        if not gloo_keeps_something():
            threads.append(len(os.listdir("/proc/self/task")))
            descriptors.append(len(os.listdir("/proc/self/fd")))
            in_use.append((number, bytes_in_use()))
    return {
        "losses": life.losses,
        "threads": threads,
        "descriptors": descriptors,
        "in_use": in_use,
        "completed": len(life.completed),
    }


def growth(in_use: list[tuple[int, int]], count: int) -> float:
    """Bytes a generation, from the first half to the second: of the seating where it is largest, the least of either,
    for what is on its way only adds."""
    found = []
    for phase in range(len(SEATINGS)):
        halves: tuple[list[int], list[int]] = ([], [])
        for number, size in in_use:
            if number >= 6 and number % len(SEATINGS) == phase:
                halves[number >= count // 2].append(size)
        if all(halves):
            found.append((min(halves[1]) - min(halves[0])) / (count / 2))
    return max(found, default=0.0)


LONG = [pytest.mark.soak, pytest.mark.timeout(900)]


# A share and its groups are megabytes. What settles in the first dozens of generations weighs less among many.
@pytest.mark.parametrize(("count", "most_bytes"), [(27, 512 << 10), pytest.param(240, 64 << 10, marks=LONG)])
def test_nothing_is_left_of_generations_and_every_step_is_done_once(count: int, most_bytes: int) -> None:
    steps = 2 * count
    lives = run_distributed(many_generations, WORLD, steps, count, timeout_s=800)
    alone, others = (
        engine_on(tiny_job(training__steps=steps, **changes), Layout(1), 0, None)
        for changes in ({}, {"training__micro_batch_size": 1})
    )
    losses: dict[int, float] = {}
    for life in lives:
        for step, loss in life["losses"].items():
            assert losses.setdefault(step, loss) == loss
        for what in ("threads", "descriptors"):
            assert min(life[what][-3:]) <= max(life[what][:-3]), (what, life[what])
    assert sorted(losses) == list(range(1, max(losses) + 1))
    # Rounding that differs grows a thousandfold in eighty steps: so much do two runs differ that nobody interrupts.
    natural = 0.0
    for step in range(1, max(losses) + 1):
        loss = alone.train_step(step).loss
        natural = max(natural, abs(others.train_step(step).loss / loss - 1))
        if natural > 1e-4:
            assert step > 150, "so far there is something to compare"
            break
        assert losses[step] == pytest.approx(loss, rel=max(1e-9, 100 * natural))
    for life in lives:
        assert growth(life["in_use"], count) < most_bytes, life["in_use"]
