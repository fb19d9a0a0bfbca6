"""Who sits where in a generation? Members of a run on the ranks of a layout, and who holds each rank's second copy.

A *member* is one process of a run, numbered for life; its *rank* is its seat in a generation and changes with it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from concertina.layout.fold import Layout

__all__ = ["Seating"]


@dataclass(frozen=True)
class Seating:
    """`members[rank]` sits there. `seconds[rank]` is the rank that owns a second copy of its optimizer's shard, None
    where there is none. `spares` are members without a rank, which hold nothing and wait. `loads` are the parts of a
    batch that the positions of dp get, in proportion; empty: alike."""

    layout: Layout
    members: tuple[int, ...]
    seconds: tuple[int | None, ...]
    spares: tuple[int, ...] = ()
    loads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.members) == len(self.seconds) == self.layout.world, self
        assert len({*self.members, *self.spares}) == len(self.roster), self
        assert not self.loads or (len(self.loads) == self.layout.dp and min(self.loads) > 0), self

    @property
    def roster(self) -> tuple[int, ...]:
        """Everybody: ranks in order, then spares."""
        return self.members + self.spares

    @cached_property
    def _ranks(self) -> dict[int, int]:
        return {member: rank for rank, member in enumerate(self.members)}

    def rank_of(self, member: int) -> int | None:
        """The rank of `member`; None for a spare and for who is not here."""
        return self._ranks.get(member)

    def firsts(self, rank: int) -> tuple[int, ...]:
        """The ranks whose second copies `rank` owns, ascending."""
        return tuple(first for first, second in enumerate(self.seconds) if second == rank)

    def keepers(self, present: Collection[int]) -> tuple[int | None, ...]:
        """Who of `present` has each rank's shard: its first owner, else its second; None where neither is here."""
        seconds = (None if second is None else self.members[second] for second in self.seconds)
        return tuple(
            first if first in present else second if second in present else None
            for first, second in zip(self.members, seconds, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes a seating of."""
        return {
            "layout": asdict(self.layout),
            "members": list(self.members),
            "seconds": list(self.seconds),
            "spares": list(self.spares),
            "loads": list(self.loads),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Seating:
        given = document["layout"]
        layout = Layout(**{**given, "stage_layers": tuple(given.get("stage_layers", ()))})
        members, seconds, spares = (tuple(document[name]) for name in ("members", "seconds", "spares"))
        return cls(layout, members, seconds, spares, tuple(document.get("loads", ())))
