"""Is every second of a member in one bucket, whatever is entered, nested, re-labelled, voided, from any thread?"""

from __future__ import annotations

import json
import threading
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concertina.elastic.account import TRAINING, Bucket
from concertina.elastic.timesheet import Timesheet

pytestmark = pytest.mark.unit


class Clock:
    """Goes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sheet(clock: Clock) -> Timesheet:
    return Timesheet(clock)


def test_it_begins_with_starting_and_counts_what_runs(sheet: Timesheet, clock: Clock) -> None:
    clock.now += 3
    assert sheet.totals() == {"starting": 3}
    assert sheet.enter(Bucket.SPARE) is Bucket.STARTING
    clock.now += 2
    assert sheet.totals() == {"starting": 3, "spare": 2}
    assert sheet.current is Bucket.SPARE
    assert json.loads(json.dumps(sheet.totals())) == sheet.totals()


def test_the_inner_spell_is_not_the_outers(sheet: Timesheet, clock: Clock) -> None:
    with sheet.spend(Bucket.CHECKPOINT_STALL):
        clock.now += 1
        with sheet.spend(Bucket.VALIDATION):
            clock.now += 10
        clock.now += 2
    clock.now += 4
    assert sheet.totals() == {"starting": 4, "checkpoint_stall": 3, "validation": 10}


def test_what_is_held_runs_until_it_is_let_go(sheet: Timesheet, clock: Clock) -> None:
    """Another thread knows that the run waits; the one that trains comes out of its step and its validation later."""
    sheet.begin_step()
    clock.now += 2
    with sheet.spend(Bucket.VALIDATION):
        clock.now += 3
        sheet.hold(Bucket.WAITING_FOR_CAPACITY)
        clock.now += 5
    sheet.void_step(Bucket.RECONFIGURATION)
    clock.now += 60
    sheet.enter(Bucket.DETECTION)
    clock.now += 1
    assert sheet.current is Bucket.WAITING_FOR_CAPACITY
    assert sheet.totals() == {"validation": 3, "recomputation": 2, "waiting_for_capacity": 66}
    sheet.let_go()
    clock.now += 1
    assert sheet.enter(Bucket.RECONFIGURATION) is Bucket.WAITING_FOR_CAPACITY
    clock.now += 4
    assert sheet.totals()["reconfiguration"] == 4
    assert sheet.totals()["waiting_for_capacity"] == 67


def test_a_spell_that_raises_ends_all_the_same(sheet: Timesheet, clock: Clock) -> None:
    spell = sheet.spend(Bucket.VALIDATION)
    with suppress(OSError), spell:
        clock.now += 1
        raise OSError("gone")
    assert sheet.totals() == {"validation": 1}
    assert sheet.current is Bucket.STARTING


def test_waits_inside_a_step_are_communication(sheet: Timesheet, clock: Clock) -> None:
    sheet.begin_step()
    clock.now += 5
    assert sheet.add(Bucket.EXPOSED_COMMUNICATION, 2) == 2
    sheet.end_step()
    assert sheet.totals() == {"productive": 3, "exposed_communication": 2}


def test_no_more_is_relabelled_than_this_step_had(sheet: Timesheet, clock: Clock) -> None:
    sheet.begin_step()
    clock.now += 100
    sheet.begin_step()
    clock.now += 5
    assert sheet.add(Bucket.EXPOSED_COMMUNICATION, 7) == 5
    assert sheet.add(Bucket.EXPOSED_COMMUNICATION, -1) == 0
    assert sheet.totals() == {"productive": 100, "exposed_communication": 5}


def test_a_voided_step_is_recomputation_with_its_waits(sheet: Timesheet, clock: Clock) -> None:
    sheet.begin_step()
    clock.now += 1
    sheet.end_step()
    with sheet.spend(Bucket.VALIDATION):
        clock.now += 10
    sheet.begin_step()
    clock.now += 100
    with sheet.spend(Bucket.SNAPSHOT_STALL):
        clock.now += 20
    sheet.add(Bucket.EXPOSED_COMMUNICATION, 30)
    assert sheet.void_step() == 120
    clock.now += 5
    assert sheet.totals() == {"productive": 1, "validation": 10, "recomputation": 120, "detection": 5}
    assert sheet.current is Bucket.DETECTION


def test_a_step_that_was_applied_cannot_be_voided(sheet: Timesheet, clock: Clock) -> None:
    sheet.begin_step()
    clock.now += 1
    sheet.end_step()
    clock.now += 1
    assert sheet.void_step(Bucket.RECONFIGURATION) == 0
    assert sheet.totals() == {"productive": 2}
    assert sheet.current is Bucket.RECONFIGURATION


def test_a_roll_back_voids_all_steps_since_its_mark(sheet: Timesheet, clock: Clock) -> None:
    sheet.begin_step()
    clock.now += 1
    sheet.end_step()
    mark = sheet.mark()
    for _ in range(3):
        sheet.begin_step()
        clock.now += 2
        sheet.end_step()
    with sheet.spend(Bucket.CHECKPOINT_STALL):
        clock.now += 4
    assert sheet.void_since(mark) == 6
    assert sheet.totals() == {"productive": 1, "recomputation": 6, "checkpoint_stall": 4}


def test_a_mark_older_than_a_voided_step_voids_no_second_twice(sheet: Timesheet, clock: Clock) -> None:
    mark = sheet.mark()
    sheet.begin_step()
    clock.now += 3
    sheet.void_step()
    sheet.begin_step()
    clock.now += 2
    assert sheet.void_since(mark) == 2
    assert sheet.totals() == {"recomputation": 5}


ACTIONS = st.one_of(
    st.tuples(st.just("enter"), st.sampled_from(Bucket)),
    st.tuples(st.just("spend"), st.sampled_from(Bucket)),
    st.tuples(st.just("leave"), st.none()),
    st.tuples(st.just("add"), st.tuples(st.sampled_from(Bucket), st.integers(-2, 9))),
    st.tuples(st.sampled_from(["begin_step", "end_step", "void_step", "mark", "void_since"]), st.none()),
)


@given(st.lists(st.tuples(ACTIONS, st.integers(0, 5)), max_size=40))
def test_seconds_are_moved_and_never_made(actions: list) -> None:
    clock = Clock()
    sheet = Timesheet(clock)
    begun, spells, mark = clock.now, [], sheet.mark()
    for (verb, value), passed in actions:
        clock.now += passed
        if verb == "spend":
            spells.append(sheet.spend(value))
            spells[-1].__enter__()
        elif verb == "leave":
            if spells:
                spells.pop().__exit__(None, None, None)
        elif verb == "add":
            sheet.add(*value)
        elif verb == "enter":
            sheet.enter(value)
        elif verb == "mark":
            mark = sheet.mark()
        elif verb == "void_since":
            sheet.void_since(mark)
            assert all(sheet.totals().get(bucket, 0) <= mark[bucket] for bucket in TRAINING)
        else:
            getattr(sheet, verb)()
        totals = sheet.totals()
        assert sum(totals.values()) == clock.now - begun
        assert all(seconds > 0 for seconds in totals.values())


def test_readers_beside_a_writer_see_every_second_once() -> None:
    """The clock is a count of readings, so that a lost update shows as a sum that is not the count."""
    readings = iter(range(10**9))
    sheet = Timesheet(lambda: float(next(readings)))
    over = threading.Event()
    torn: list[tuple[float, float]] = []

    def read() -> None:
        last = 0.0
        while not over.is_set():
            now = sum(sheet.totals().values())
            if now < last:
                torn.append((last, now))
            last = now

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(2000):
        sheet.begin_step()
        with sheet.spend(Bucket.SNAPSHOT_STALL):
            pass
        sheet.add(Bucket.EXPOSED_COMMUNICATION, 1)
        sheet.void_step()
    over.set()
    for reader in readers:
        reader.join()
    assert torn == []
    assert sum(sheet.totals().values()) == next(readings) - 1


def test_what_was_computed_never_falls(sheet: Timesheet, clock: Clock) -> None:
    """A pace is made of it, whatever becomes of the steps."""
    mark = sheet.mark()
    sheet.begin_step()
    clock.now += 4
    sheet.add(Bucket.EXPOSED_COMMUNICATION, 1)
    sheet.end_step()
    assert sheet.computed_s == 3
    sheet.void_since(mark)
    assert sheet.totals() == {"recomputation": 4}
    assert sheet.computed_s == 3
    clock.now += 2
    sheet.enter(Bucket.SPARE)
    assert sheet.computed_s == 5, "what runs is counted as far as it has come"
