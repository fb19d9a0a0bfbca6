"""What is written down of a measurement? Rows with goals and raw samples, the commit, the settings, the versions.

A dirty tree is refused: a number nobody can reproduce is worth nothing. `--allow-dirty` is for trials.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from concertina.errors import UserError
from concertina.track.versions import versions

__all__ = ["Row", "refuse_dirty_tree", "show", "write_result"]


@dataclass(frozen=True)
class Row:
    """One measured number. `met` is None without a goal; a missed goal says why, and what could be had at most.

    More is better, unless `at_most`: then the goal is a bound from above.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    samples: Sequence[float] = field(default_factory=tuple)
    reason: str | None = None
    ceiling: float | None = None
    at_most: bool = False

    @classmethod
    def of(cls, name: str, unit: str, samples: Sequence[float], goal: float | None = None, **more: Any) -> Row:
        """The median of the samples."""
        return cls(name, median(samples), unit, goal, tuple(samples), **more)

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def document(self) -> dict[str, Any]:
        """As it stands in the file; `reason` and `ceiling` only beside a missed goal, `at_most` only when true."""
        kept = {key: value for key, value in asdict(self).items() if key not in ("reason", "ceiling", "at_most")}
        kept["met"] = self.met
        if self.at_most:
            kept["at_most"] = True
        if self.met is False:
            kept["reason"] = self.reason
            if self.ceiling is not None:
                kept["ceiling"] = self.ceiling
        return kept


def refuse_dirty_tree(allow_dirty: bool) -> dict[str, Any]:
    """Before the first sample: the versions that are measured, whatever is edited meanwhile.

    Raises UserError when the checkout has changes, or is none.
    """
    measured = versions()
    git = measured["git"]
    if not allow_dirty and (git is None or git["dirty"]):
        raise UserError(
            "the checkout has uncommitted changes or no commit: commit first, or pass --allow-dirty for a trial"
        )
    return measured


def write_result(
    path: Path, config: dict[str, Any], measured: dict[str, Any], rows: Sequence[Row], emulated_compute: bool = False
) -> None:
    """Write the result file; `measured` is what `refuse_dirty_tree` found before the first sample. `emulated_compute`:
    ranks waited instead of computing (`cluster.device: timed`), which tables say beside every number."""
    document = {
        "schema_version": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": config,
        **({"emulated_compute": True} if emulated_compute else {}),
        "versions": measured,
        "rows": [row.document() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def show(rows: Sequence[Row]) -> str:
    """Rows as a table for a terminal."""
    width = max(len(row.name) for row in rows)
    marks = {None: "", True: "met", False: "missed"}
    lines = []
    for row in rows:
        goal = "" if row.goal is None else f"goal {'<= ' * row.at_most}{row.goal:g}"
        lines.append(f"{row.name:<{width}}  {row.value:>10.4g} {row.unit:<9} {goal:<12} {marks[row.met]}".rstrip())
    return "\n".join(lines)
