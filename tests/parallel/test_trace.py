"""Does a recording see every communication, its bytes and its times, and nobody pay for it when there is none?"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from concertina.layout import Layout
from concertina.parallel.collectives import (
    Pending,
    all_gather_into,
    all_gather_v,
    all_reduce_max,
    all_reduce_sum,
    all_to_all_v,
    exchange,
    gather_counts,
    reduce_scatter_sum,
    reduce_scatter_v,
    wide_sum,
)
from concertina.parallel.groups import Group, Groups
from concertina.parallel.trace import Mark, Record, Trace, bytes_sent, recording
from tests.distributed import form, on_ranks

# Group of three, rows of 5 float64 (40 bytes), seen from position 1.
SIZES = [1, 4, 2]
CALLS: dict[str, tuple[str, int, Callable[[Group], Pending]]] = {
    "all_reduce_sum": ("all_reduce", 214, lambda g: all_reduce_sum(rows(4), g)),  # 2 * 2/3 * 160, rounded up
    "all_reduce_max": ("all_reduce", 160, lambda g: all_reduce_max(rows(3), g)),
    "wide_sum of bfloat16": ("all_reduce", 80, lambda g: wide_sum(rows(3).bfloat16(), g)),
    "reduce_scatter_sum": ("reduce_scatter", 2 * 80, lambda g: reduce_scatter_sum(rows(2), rows(6), g)),
    "all_gather_into": ("all_gather", 2 * 80, lambda g: all_gather_into(rows(6), rows(2), g)),
    "gather_counts": ("counts", 2 * 7 * 8, lambda g: gather_counts(torch.ones(7, dtype=torch.int64), g)),
    "all_to_all_v": ("all_to_all", 3 * 40, lambda g: all_to_all_v(rows(7), SIZES, [SIZES[g.rank]] * 3, g)),
    "all_gather_v": ("all_gather", 2 * 4 * 40, lambda g: all_gather_v(rows(SIZES[g.rank]), SIZES, g)),
    "reduce_scatter_v": ("reduce_scatter", 3 * 40, lambda g: reduce_scatter_v(rows(7), SIZES, g)),
    "exchange": ("exchange", 3 * 40, lambda g: exchange([(rows(3), after(g))], [(rows(3), after(g, 2))], g)),
    "even all_gather_v": ("all_gather", 2 * 80, lambda g: all_gather_v(rows(2), [2] * 3, g)),
    "even reduce_scatter_v": ("reduce_scatter", 4 * 40, lambda g: reduce_scatter_v(rows(6), [2] * 3, g)),
}


def after(group: Group, distance: int = 1) -> int:
    return (group.rank + distance) % group.size


def rows(count: int) -> torch.Tensor:
    return torch.ones(count, 5, dtype=torch.float64)


def one_of_each(rank: int, store: Any) -> dict[str, Any]:
    """Everything twice: unheard, then heard; and what is heard of the backwards."""
    groups = form(Layout(3), rank, store)
    for _, _, start in CALLS.values():
        start(groups.world).finish()
    with recording(groups) as records:
        for _, _, start in CALLS.values():
            start(groups.world).finish()
    there = rows(7).requires_grad_()
    with recording(groups) as backwards:
        gathered = all_gather_v(there[: SIZES[rank]], SIZES, groups["dp"]).finish()
        reduce_scatter_v(gathered, SIZES, groups["dp"]).finish().sum().backward()
    for _, _, start in CALLS.values():
        start(groups.world).finish()
    return {"records": records, "backwards": backwards}


def in_order(record: Record) -> bool:
    moments = (record.issued_s, record.started_s, record.wait_began_s, record.wait_ended_s)
    assert None not in moments
    known = [moment for moment in moments if moment is not None]
    assert record.ended_s is not None
    return known == sorted(known) and record.started_s <= record.ended_s <= known[-1]


@pytest.mark.dist
def test_every_communication_leaves_a_record_with_its_bytes_and_times_in_order() -> None:
    for rank, found in enumerate(on_ranks(one_of_each, 3)):
        records: list[Record] = found["records"]
        assert [record.kind for record in records] == [kind for kind, _, _ in CALLS.values()]
        if rank == 1:
            assert [record.sent_bytes for record in records] == [sent for _, sent, _ in CALLS.values()]
        assert {record.group for record in records} == {"world"}
        assert all(in_order(record) for record in records)
        assert [record.issued_s for record in records] == sorted(record.issued_s for record in records)


@pytest.mark.dist
def test_backwards_are_heard_as_forwards_are() -> None:
    for rank, found in enumerate(on_ranks(one_of_each, 3)):
        backwards: list[Record] = found["backwards"]
        assert [record.kind for record in backwards] == ["all_gather", "reduce_scatter"] * 2
        sent = {("dp", "all_gather"): 2 * 2 * SIZES[rank] * 40, ("dp", "reduce_scatter"): 2 * (7 - SIZES[rank]) * 40}
        assert bytes_sent(backwards) == sent


@pytest.mark.dist
def test_records_are_rows_of_json() -> None:
    rows = [record.to_json() for record in on_ranks(one_of_each, 3)[0]["records"]]
    assert [Record(**row) for row in json.loads(json.dumps(rows))] == [Record(**row) for row in rows]
    assert set(rows[0]) == {*Record.__annotations__}


# -- without peers -----------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_a_group_of_one_sends_nothing_and_a_recording_leaves_nothing_behind() -> None:
    groups = Groups.alone()
    with recording(groups) as records:
        all_reduce_sum(rows(1), groups.world).finish()
        with pytest.raises(AssertionError, match="one recording"), recording(groups):
            pass
    assert records == []
    with pytest.raises(KeyError), recording(groups):
        raise KeyError
    assert all(group.tap.trace is None for group in (groups.world, *groups.by_name.values()))


class Told:
    """A clock that counts its readings, and a work that ends when it is told to."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.callback: Callable[[Any], None] | None = None

    def now(self) -> float:
        self.time_s += 1.0
        return self.time_s

    def mark(self) -> Mark:
        moment_s = self.now()
        return lambda: moment_s

    def get_future(self) -> Told:
        return self

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callback = callback

    def wait(self) -> None:
        self.time_s += 10.0


@pytest.mark.unit
def test_an_end_is_when_the_backend_says_so_or_else_the_end_of_the_wait() -> None:
    told = Told()
    trace = Trace(told)
    early, late, never = (trace.follow("ep", "all_to_all", 8 * index, lambda: told) for index in range(3))
    late.wait()
    assert told.callback is not None
    early._end(None)
    early.wait()
    found = trace.records()
    assert found[0] == Record("ep", "all_to_all", 0, 1.0, 2.0, 19.0, 20.0, 31.0)
    assert found[1] == Record("ep", "all_to_all", 8, 3.0, 4.0, 18.0, 7.0, 18.0)
    assert (found[2].ended_s, found[2].wait_began_s, found[2].wait_ended_s) == (None, None, None)
    assert never.ended is None


@pytest.mark.unit
def test_what_a_backend_refuses_otherwise_is_not_swallowed() -> None:
    class Broken(Told):
        def get_future(self) -> Told:
            raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        Trace(Told()).follow("ep", "counts", 8, Broken)
