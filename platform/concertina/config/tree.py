"""What does a job file hold before it is checked, and where was each value written?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Entry", "Problem", "merge"]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a job: shown as `jobs/x.yaml:12: training.stepz: unknown key`."""

    place: str
    key: str
    text: str

    @property
    def order(self) -> tuple[str, int]:
        """File, then line: sorts problems the way a person mends them, overrides first."""
        file, _, line = self.place.rpartition(":")
        return file, int(line) if line.isdigit() else 0

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place, self.key, self.text) if part)


@dataclass(frozen=True)
class Entry:
    """A value and its place: `file:line` or `--set`. A section's value maps its keys to entries."""

    value: Any
    place: str

    @property
    def is_section(self) -> bool:
        """Whether it holds keys."""
        return isinstance(self.value, Mapping)

    def plain(self) -> Any:
        """The value without places; sequences as tuples, the way the schema has them."""
        if self.is_section:
            return {key: entry.plain() for key, entry in self.value.items()}
        return self.value

    def nearest(self, path: Sequence[str | int]) -> Entry:
        """The entry at `path`, or the section that would hold it."""
        entry = self
        for key in path:
            if not entry.is_section or key not in entry.value:
                break
            entry = entry.value[key]
        return entry


def merge(below: Entry, above: Entry) -> Entry:
    """`below` with what `above` says in its stead: sections key by key, everything else whole."""
    if not (below.is_section and above.is_section):
        return above
    merged = dict(below.value)
    for key, entry in above.value.items():
        merged[key] = merge(merged[key], entry) if key in merged else entry
    return Entry(merged, above.place)
