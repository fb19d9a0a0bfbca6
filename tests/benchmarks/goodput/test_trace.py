"""Is a trace read as it is, and is the oracle what could have been had? (`benchmarks/goodput/trace.py`)"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.goodput.trace import Change, fit, oracle, read_trace, spans, thinned
from concertina.errors import UserError

pytestmark = pytest.mark.unit

TRACE = [
    Change(0.0, ("a", "b", "c", "d")),
    Change(10.0, (), ("b",)),
    Change(20.0, ("e",), ("a",)),
    Change(30.0, ("f",)),
]


def test_a_trace_is_read_moment_by_moment(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("0,add,a\n0,add,b\n10000,remove,b\n10000,add,c\n")
    assert read_trace(file) == [Change(0.0, ("a", "b")), Change(10.0, ("c",), ("b",))]
    file.write_text("0,add,a\nsoon,add,b\n")
    with pytest.raises(UserError, match="line 2"):
        read_trace(file)


def test_so_many_are_there_between_the_changes() -> None:
    assert list(spans(TRACE, 40.0)) == [(0.0, 10.0, 4), (10.0, 20.0, 3), (20.0, 30.0, 3), (30.0, 40.0, 4)]


@pytest.mark.parametrize(("most", "kept"), [(4, "abcdef"), (3, "ace"), (2, "ace"), (1, "ae")])
def test_a_thinned_trace_has_every_so_manyth_node(most: int, kept: str) -> None:
    found = thinned(TRACE, most)
    assert "".join(sorted(node for change in found for node in change.added)) == kept
    assert max(count for _, _, count in spans(found, 40.0)) <= most


def test_the_oracle_never_stalls() -> None:
    assert oracle(TRACE, 40.0, lambda nodes: nodes * 2.0) == 2 * (40 + 30 + 30 + 40)
    assert oracle([Change(0.0, ("a",)), Change(5.0, (), ("a",))], 100.0, lambda nodes: 1 / 0 if not nodes else 1.0) == 5


def test_steps_of_worlds_that_were_not_measured_are_between_those_that_were() -> None:
    step_s = fit({2: 0.6, 4: 0.35, 8: 0.225})  # 0.1 + 1 / world
    assert step_s(4) == 0.35
    assert step_s(16) == pytest.approx(0.1625)
    assert fit({3: 0.5})(7) == 0.5
    with pytest.raises(UserError, match="no step"):
        fit({})
