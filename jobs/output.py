"""How do commands print facts: tables for people, JSON and CSV for programs, and what to type next?"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Output",
    "OutputOption",
    "TableOption",
    "TableOutput",
    "next_commands",
    "print_json",
    "print_table",
    "said_written",
    "short_bytes",
    "short_number",
]


class Output(StrEnum):
    """For a command that prints facts."""

    TEXT = "text"
    JSON = "json"


class TableOutput(StrEnum):
    """For a command that prints rows."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Text for people or json for programs.")]
TableOption = Annotated[
    TableOutput, typer.Option("--output", "-o", help="A table for people, json or csv for programs.")
]


def print_json(value: Any) -> None:
    """One line of JSON on stdout. NaN and infinity, which JSON does not have, are null."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:  # the rare case pays for the walk, not 16,384 ranks
        text = json.dumps(_finite(value), allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], output: TableOutput = TableOutput.TEXT) -> None:
    """Rows under column names. JSON is a list of objects; an absent value is null there and empty elsewhere."""
    if output is TableOutput.JSON:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif output is TableOutput.CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    else:
        _print_rich(columns, rows)


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = rows and all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    # a pipe has no width: never fold what a program or a log reads; rich itself honours NO_COLOR
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)


def next_commands(commands: Sequence[tuple[str, str]]) -> None:
    """The commands one would want now, each with what it does."""
    width = max(len(command) for command, _ in commands)
    lines = [f"  {command:<{width}}  # {what}" for command, what in commands]
    sys.stdout.write("\n".join(["", "next:", *lines]) + "\n")


def said_written(_: Path) -> None:
    """On stderr, that verification begins, which takes as long again."""
    sys.stderr.write("written; reading it back\n")


def short_number(number: int) -> str:
    """`46.7 B`."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return str(number)


def short_bytes(number: int) -> str:
    """`1.25 GiB`."""
    for size, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
