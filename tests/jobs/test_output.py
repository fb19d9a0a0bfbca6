"""Are tables, JSON and CSV what their readers expect?"""

from __future__ import annotations

import csv
import io
import json

import pytest

from jobs.output import TableOutput, next_commands, print_json, print_table, short_bytes, short_number

pytestmark = pytest.mark.unit

COLUMNS = ("run", "loss", "status")
ROWS = [("quickstart-abcd1234", 2.5, "finished"), ("quickstart-efgh5678", None, "[red]failed, badly[/]")]


def test_a_table_keeps_every_cell_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    long = ("x" * 300, 1.0, "y")
    print_table(COLUMNS, [*ROWS, long])
    out = capsys.readouterr().out
    assert "x" * 300 in out
    assert "[red]failed, badly[/]" in out  # what a run wrote is text, never markup
    assert "\x1b" not in out
    assert len(out.splitlines()) == 4


def test_json_is_one_line_of_objects(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COLUMNS, ROWS, TableOutput.JSON)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out)[1] == {"run": "quickstart-efgh5678", "loss": None, "status": "[red]failed, badly[/]"}


def test_csv_quotes_what_needs_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COLUMNS, ROWS, TableOutput.CSV)
    read = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert read[0] == list(COLUMNS)
    assert read[2] == ["quickstart-efgh5678", "", "[red]failed, badly[/]"]


def test_nan_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "deep": [1.0, float("inf")], "ok": 1})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "deep": [1.0, None], "ok": 1}


def test_next_commands_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    next_commands([("concertina a", "one"), ("concertina longer", "two")])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "next:",
        "  concertina a       # one",
        "  concertina longer  # two",
    ]


def test_short_forms_of_counts_and_bytes() -> None:
    assert [short_number(n) for n in (7, 1500, 4_921_728, 46_702_792_704)] == ["7", "1.5 k", "4.9 M", "46.7 B"]
    assert [short_bytes(n) for n in (7, 1536, 12_607_488, 5 << 29)] == ["7 B", "1.50 KiB", "12.02 MiB", "2.50 GiB"]
