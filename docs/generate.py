"""python -m docs.generate: which tables in the pages are made from the code and from results, and are they current?

What stands between `<!-- generated: NAME -->` and `<!-- end -->` is written here; tests/house compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from benchmarks.axes import LAYOUTS, bytes_of_a_step, row_name
from benchmarks.pipeline import CASES, case_name
from concertina.config import Job
from concertina.config.explain import ANY_NAME, section_below
from concertina.elastic.waits import BOUNDS, ORDER

__all__ = [
    "TABLES",
    "axes_table",
    "bounds_table",
    "bubbles_table",
    "keys_table",
    "results_table",
    "table_in",
    "with_table",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
AWAITED = ("throughput",)
"""Questions a benchmark answers; one without a result yet is named in the table rather than left out."""

_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false"}


# -- README.md: measured results ------------------------------------------------------------------------------------


def results_table(folder: Path = RESULTS) -> str:
    """Every row that has a goal, of the newest result for each question and machine."""
    lines = ["| question | measured | goal | met | machine | commit | samples |", "|---|---|---|---|---|---|---|"]
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):  # <what>_<hardware>_<yyyymm>.json: sorted by time within the first two
        newest[path.stem.rpartition("_")[0]] = path
    for path in newest.values():
        lines += _result_rows(path)
    for what in AWAITED:
        if not any(name.partition("_")[0] == what for name in newest):
            lines.append(f"| {what}: `python -m benchmarks.{what}` | not measured yet | | | | | |")
    return "\n".join(lines)


def _result_rows(path: Path) -> Iterator[str]:
    document = json.loads(path.read_text(encoding="utf-8"))
    git = document["versions"].get("git") or {}
    commit = f"`{git['commit'][:7]}`{' with changes' if git.get('dirty') else ''}" if git else "none"
    what, hardware, month = path.stem.split("_")
    for row in document["rows"]:
        if row["goal"] is None:
            continue
        met = "yes" if row["met"] else f"no: {row.get('reason') or 'no reason given'}"
        measured, goal = _number(row["value"], row["unit"]), _number(row["goal"], row["unit"])
        measured += " (emulated compute)" if document.get("emulated_compute") else ""
        goal = f"at most {goal}" if row.get("at_most") else goal
        link = f"[{len(row['samples']) or 'file'}](benchmarks/results/{path.name})"
        cells = [f"{what}: {row['name']}", measured, goal, met, f"{hardware}, {month[:4]}-{month[4:]}", commit, link]
        yield f"| {' | '.join(cells)} |"


def _newest_rows(folder: Path, what: str) -> dict[str, dict[str, Any]]:
    """By name; none where the question has no result."""
    paths = sorted(folder.glob(f"{what}_*.json"))
    rows = json.loads(paths[-1].read_text(encoding="utf-8"))["rows"] if paths else []
    return {row["name"]: row for row in rows}


def axes_table(folder: Path = RESULTS) -> str:
    """What each layout of the benchmark costs, by its newest result, and what a rank sends by the formulas."""
    measured = _newest_rows(folder, "throughput")
    if not measured:
        return "Not measured yet: `python -m benchmarks.throughput`."
    lines = ["| layout | tokens/s against dp 4 | MB a rank sends in a step | samples |", "|---|---:|---:|---:|"]
    for name, degrees in LAYOUTS.items():
        row = measured.get(row_name(name))
        if row is not None:
            ratio = row["value"] if row["unit"] == "ratio" else 1.0
            samples = len(row["samples"])
            lines.append(f"| {name} | {ratio:.2f} | {bytes_of_a_step(degrees) / 1e6:.0f} | {samples} |")
    return "\n".join(lines)


def bubbles_table(folder: Path = RESULTS) -> str:
    """How long stages are blocked, by the newest result, beside the formula."""
    measured = _newest_rows(folder, "pipeline")
    if not measured:
        return "Not measured yet: `python -m benchmarks.pipeline`."
    lines = [
        "| micro-batches | pieces a stage | bubble | by the formula | all that is no product | samples |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        bubble, formula, rest = (
            measured[f"{case_name(*case)}: {what}"] for what in ("bubble", "by the formula", "all that is no product")
        )
        shares = " | ".join(f"{100 * row['value']:.1f} %" for row in (bubble, formula, rest))
        lines.append(f"| {case[0]} | {case[1]} | {shares} | {len(bubble['samples'])} |")
    return "\n".join(lines)


def _number(value: float, unit: str) -> str:
    known = {"ratio": f"{value:.2f} x", "share": f"{100 * value:.4g} %"}
    return known.get(unit, f"{value:,.4g} {unit}")


# -- docs/ownership.md: bounds --------------------------------------------------------------------------------------


def bounds_table() -> str:
    """Every wait there is, and the order that the table is held to."""
    lines = ["| wait | who | at most | then |", "|---|---|---:|---|"]
    lines += [f"| `{b.name}` | {b.owner} | {b.seconds:g} s | {b.then} |" for b in BOUNDS.values()]
    lines += ["", "| longer | than, one after the other | so that |", "|---|---|---|"]
    for rule in ORDER:
        shorter = ", ".join(f"`{name}`" for name in rule.shorter)
        lines.append(f"| `{rule.longer}` | {shorter} | {rule.why} |")
    return "\n".join(lines)


# -- docs/keys.md: keys ---------------------------------------------------------------------------------------------


def keys_table() -> str:
    """Every key of a job file, by section."""
    return "\n\n".join(_section(Job, ""))


def _section(section: type[BaseModel], prefix: str) -> Iterator[str]:
    below, rows = [], []
    for name, field in section.model_fields.items():
        found = section_below(field)
        if found is not None:
            below.append((name + found[1], found[0]))
        if found is None or found[1]:
            rows.append(f"| `{name}` | {_kind(field)} | {_default(field)} | {_plain(field.description)} |")
    title = f"`{prefix.rstrip('.')}`: {_plain(section.__doc__)}" if prefix else "At the top: " + _plain(section.__doc__)
    yield "\n".join([f"### {title}", "", "| key | value | default | |", "|---|---|---|---|", *rows])
    for name, annotation in below:
        yield from _section(annotation, f"{prefix}{name}.")


def _kind(field: FieldInfo) -> str:
    return _words(field.annotation, list(field.metadata)) if field.metadata else _words(field.annotation)


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as a person says it, with its bounds: `integer >= 1`, `list of text`, `none or head`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _words(inner, more)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin is tuple:
        return f"list of {_words(get_args(annotation)[0])}"
    if origin is dict:
        return f"keys below a {ANY_NAME} each"
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in get_args(annotation) if part is not type(None))
    return " ".join([_WORDS[annotation], *_limits(metadata)])


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    """Pydantic keeps bounds as annotated_types, as one settings object, or as a Field inside the type."""
    for item in metadata:
        for key, sign in _SIGNS.items():
            if getattr(item, key, None) is not None:
                yield f"{sign} {getattr(item, key):g}"
        if isinstance(item, FieldInfo):
            yield from _limits(item.metadata)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "absent"
    text = json.dumps(field.default) if not isinstance(field.default, str) else field.default
    return f"`{text}`"


def _plain(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


# -- all of them ----------------------------------------------------------------------------------------------------

TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "results": ("README.md", results_table),
    "axes": ("docs/engine.md", axes_table),
    "bubbles": ("docs/engine.md", bubbles_table),
    "bounds": ("docs/ownership.md", bounds_table),
    "keys": ("docs/keys.md", keys_table),
}
"""Name -> (page, the function that writes it)."""


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- generated: {name}[^>]* -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)


def table_in(page: str, name: str) -> str:
    """What stands in a page now. Raises AttributeError when the page has no such place."""
    found = _pattern(name).search(page)
    assert found is not None, f"no `<!-- generated: {name} -->` in the page"
    return found.group(0).removeprefix(found.group(1)).removesuffix(found.group(2)).strip("\n")


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table in its place."""
    return _pattern(name).sub(lambda found: f"{found.group(1)}\n{table}\n{found.group(2)}", page)


def main() -> None:
    """Write every table into its page."""
    for name, (page, table) in TABLES.items():
        path = ROOT / page
        path.write_text(with_table(path.read_text(encoding="utf-8"), name, table()), encoding="utf-8")
        print(f"{page}: {name}")


if __name__ == "__main__":
    main()
