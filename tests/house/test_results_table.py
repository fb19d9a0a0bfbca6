"""Does the README's table of measured results say what the result files say?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.axes import row_name
from benchmarks.pipeline import CASES, Shares, rows_of
from benchmarks.results import Row, write_result
from docs.generate import AWAITED, axes_table, bubbles_table, results_table, table_in
from tests.house.tree import ROOT

pytestmark = pytest.mark.unit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, rows: list[Row], dirty: bool = False) -> None:
    versions = {"git": {"commit": COMMIT, "dirty": dirty}}
    path.write_text(json.dumps({"versions": versions, "rows": [row.document() for row in rows]}))


def test_the_readme_says_what_the_files_say() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table_in(page, "results") == results_table(), "run `python -m docs.generate`"


def test_rows_with_a_goal_have_their_commit_and_link(tmp_path: Path) -> None:
    good = Row.of("against a peer", "ratio", [1.31, 1.29, 1.3], 1.25)
    missed = Row.of("share of the GEMM rate", "ratio", [0.7], 0.75, reason="memory bound")
    write(tmp_path / "throughput_2core_202611.json", [good, missed, Row.of("raw", "tokens/s", [4200.0])])
    rows = results_table(tmp_path).splitlines()[2:]
    assert len(rows) == 2
    assert "| 1.30 x | 1.25 x | yes |" in rows[0]
    assert "`0123456`" in rows[0]
    assert "[3](benchmarks/results/throughput_2core_202611.json)" in rows[0]
    assert "no: memory bound" in rows[1]


def test_a_bound_from_above_is_met_below_it(tmp_path: Path) -> None:
    rows = [Row.of("fast", "s", [1.5], 2.0, at_most=True), Row.of("slow", "s", [2.5], 2.0, reason="x", at_most=True)]
    write(tmp_path / "scale_2core_202611.json", rows)
    fast, slow = results_table(tmp_path).splitlines()[2:4]
    assert "| 1.5 s | at most 2 s | yes |" in fast
    assert "| 2.5 s | at most 2 s | no: x |" in slow


def test_what_was_measured_with_waits_says_so(tmp_path: Path) -> None:
    path, measured = tmp_path / "bubbles_2core_202611.json", {"git": {"commit": COMMIT, "dirty": False}}
    for emulated in (True, False):
        write_result(path, {}, measured, [Row.of("bubble", "ratio", [0.2], 0.1)], emulated_compute=emulated)
        assert ("| 0.20 x (emulated compute) | 0.10 x | yes |" in results_table(tmp_path)) == emulated


def test_the_newest_result_of_a_question_and_machine_counts(tmp_path: Path) -> None:
    write(tmp_path / "throughput_2core_202611.json", [Row.of("old", "ratio", [1.0], 1.0)])
    write(tmp_path / "throughput_2core_202701.json", [Row.of("new", "ratio", [1.1], 1.0)], dirty=True)
    write(tmp_path / "throughput_h200_202611.json", [Row.of("elsewhere", "ratio", [1.2], 1.0)])
    table = results_table(tmp_path)
    assert "old" not in table
    assert "with changes" in table
    assert "elsewhere" in table


def test_every_measured_layout_has_a_line_with_its_bytes(tmp_path: Path) -> None:
    base = Row.of(row_name("dp 4"), "tokens/s", [1500.0])
    write(tmp_path / "throughput_2core_202611.json", [base, Row.of(row_name("tp 2"), "ratio", [0.9, 0.8, 0.85])])
    assert axes_table(tmp_path).splitlines()[2:] == ["| dp 4 | 1.00 | 93 | 1 |", "| tp 2 | 0.85 | 92 | 3 |"]


def test_bubbles_stand_beside_their_formula(tmp_path: Path) -> None:
    samples = {case: [Shares(0.5, 0.6), Shares(0.4, 0.5), Shares(0.45, 0.7)] for case in CASES}
    write(tmp_path / "pipeline_2core_202611.json", rows_of(samples))
    first, *others = bubbles_table(tmp_path).splitlines()[2:]
    assert first == "| 4 | 1 | 45.0 % | 42.9 % | 60.0 % | 3 |"
    assert len(others) == len(CASES) - 1
    assert bubbles_table(tmp_path / "nowhere").startswith("Not measured yet")


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    assert results_table(tmp_path).count("not measured yet") == len(AWAITED)
